#include "checkpoint/store/store.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>

#include <xxhash.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/store/store_internal.h"
#include "cowdisk/block.h"

#define WAIT_SHARE_NS	30000000000ull
#define STATE_MAX_BYTES (1ull << 30)
#define MISSING_HINT	"`vmcp run` makes it; another one is named by --store or VMCP_STORE"

void store_new_id(char id[STORE_ID_BYTES])
{
	uint8_t bytes[16];

	if (getrandom(bytes, sizeof(bytes), 0) != (ssize_t)sizeof(bytes))
		abort(); /* the kernel does not fail for 16 bytes once it is up */
	put_hex(id, bytes, sizeof(bytes));
}

bool store_is_id(const char *text)
{
	return strlen(text) == STORE_ID_BYTES - 1 && strspn(text, "0123456789abcdef") == STORE_ID_BYTES - 1;
}

int store_check_name(const char *what, const char *name, struct err *err)
{
	size_t length = strlen(name);
	bool good = length > 0 && length < STORE_NAME_BYTES && isalnum((unsigned char)name[0]);

	for (size_t i = 0; good && i < length; i++)
		good = isalnum((unsigned char)name[i]) || strchr("._-", name[i]);
	if (good)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "%s: '%s' is no name", what, name);
	err_hint(err, "letters, digits, '.', '_' and '-', at most %d, a letter or digit first", STORE_NAME_BYTES - 1);
	return -EINVAL;
}

void store_file_name(char out[STORE_ID_BYTES + 8], const char *id, const char *suffix)
{
	snprintf(out, STORE_ID_BYTES + 8, "%s%s", id, suffix);
}

int store_try_lock(int fd)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

	return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : -EAGAIN;
}

int store_lock_byte(struct store *store, enum store_lock which, short type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = which, .l_len = 1};

	return fcntl(store->lock_fd, F_OFD_SETLK, &lock) == 0 ? 0 : -EAGAIN;
}

int store_lock_byte_within(struct store *store, enum store_lock which, short type, uint64_t wait_ns)
{
	const struct timespec moment = {.tv_nsec = 20000000};
	uint64_t end = clock_now_ns() + wait_ns;
	int rc;

	while ((rc = store_lock_byte(store, which, type)) && clock_now_ns() < end)
		nanosleep(&moment, NULL);
	return rc;
}

/* --- opening --- */

bool store_folder_is_empty(int dir)
{
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;
	bool empty = true;

	if (!stream)
		return false;
	while ((entry = readdir(stream)))
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && strcmp(entry->d_name, "lost+found") &&
		    strncmp(entry->d_name, FILE_TEMP_PREFIX, strlen(FILE_TEMP_PREFIX)))
			empty = false;
	closedir(stream);
	return empty;
}

/* Never in the place of another one: two makers at a time would have two keys. */
static int make_encrypted(struct store *store, struct store_key *key, struct err *err)
{
	char text[CRYPT_FORMAT_BYTES] = "", id[STORE_ID_BYTES], name[STORE_ID_BYTES + 8];
	int rc = crypt_make_format(key, text, err);

	store_new_id(id);
	snprintf(name, sizeof(name), FILE_TEMP_PREFIX "%.16s", id);
	if (!rc)
		rc = file_write_atomic(store->dir, name, text, strlen(text), 0600, err);
	if (rc)
		return rc;
	rc = fault_check(FAULT_STORE_KEY_WRITTEN, err);
	/* ENOENT: another one has made it, and changed its key since (rekey.c). */
	if (!rc && linkat(store->dir, name, store->dir, STORE_FORMAT_FILE, 0) && errno != EEXIST && errno != ENOENT)
		rc = err_sys(err, errno, "%s/%s", store->path, STORE_FORMAT_FILE);
	unlinkat(store->dir, name, 0);
	return rc ? rc : file_sync_dir(store->dir, err);
}

static int make_format(struct store *store, bool create, struct store_key *key, struct err *err)
{
	const char *line = "vmcp store 1\n";

	if (!store_folder_is_empty(store->dir)) {
		err_set(err, ERR_FAILED, ENOTDIR, "%s: is no vmcp store, and not empty", store->path);
		err_hint(err, "name another folder with --store or VMCP_STORE");
		return -ENOTDIR;
	}
	if (!create) {
		err_set(err, ERR_NOT_FOUND, ENOENT, "store: %s: is empty", store->path);
		err_hint(err, MISSING_HINT);
		return -ENOENT;
	}
	return key ? make_encrypted(store, key, err) : file_write_atomic(store->dir, STORE_FORMAT_FILE, line, strlen(line), 0600, err);
}

/* A folder is a store if it holds the format file; an empty one becomes a store. */
static int check_format(struct store *store, bool create, struct store_key *key, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	unsigned version;

	if (faccessat(store->dir, STORE_FORMAT_FILE, F_OK, 0)) {
		int made = make_format(store, create, key, err);

		/* Not empty: another process may have made the store since, and the format file comes first. */
		if (made && (made != -ENOTDIR || faccessat(store->dir, STORE_FORMAT_FILE, F_OK, 0)))
			return made;
		if (err)
			*err = ERR_INIT;
	}
	int rc = file_read_all(store->dir, STORE_FORMAT_FILE, 4096, &text, err);
	if (rc)
		return rc;
	if (sscanf((char *)text.data, "vmcp store %u", &version) != 1)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s/%s: damaged", store->path, STORE_FORMAT_FILE);
	if (version > STORE_FORMAT_VERSION) {
		err_set(err, ERR_FAILED, ENOTSUP, "%s: format %u is newer than this vmcp knows (%d)", store->path,
			version, STORE_FORMAT_VERSION);
		err_hint(err, "use the newer vmcp that wrote it");
		return -ENOTSUP;
	}
	if (version == CRYPT_FORMAT_VERSION)
		return crypt_open_format(store, key, (char *)text.data, err);
	return key ? crypt_not_encrypted(store, err) : 0;
}

static int open_folders(struct store *store, struct err *err)
{
	const struct {
		const char *name;
		int *fd;
	} folders[] = {{"checkpoints", &store->checkpoints_dir},
		       {"layers", &store->layers_dir},
		       {"vms", &store->vms_dir},
		       {"staging", &store->staging_dir}};

	for (size_t i = 0; i < ARRAY_LENGTH(folders); i++) {
		*folders[i].fd = file_open_dir(store->dir, folders[i].name, 1, err);
		if (*folders[i].fd < 0)
			return *folders[i].fd;
	}
	return 0;
}

/* Held while the store is open. Who makes the catalogue anew has it alone, for moments. */
static int share(struct store *store, struct err *err)
{
	store->lock_fd = openat(store->dir, STORE_LOCK_FILE, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (store->lock_fd < 0)
		return err_sys(err, errno, "%s/%s", store->path, STORE_LOCK_FILE);
	if (!store_lock_byte_within(store, STORE_LOCK_OPEN, F_RDLCK, WAIT_SHARE_NS))
		return 0;
	err_set(err, ERR_STATE, EBUSY, "%s: its catalogue is being made anew", store->path);
	return err_hint(err, "try again when `vmcp gc --rebuild` has ended");
}

int store_open_folders(const char *path, bool create, struct store_key *key, struct store **out, struct err *err)
{
	struct store *store = xcalloc(1, sizeof(*store));
	int rc;

	*out = NULL;
	store->checkpoints_dir = store->layers_dir = store->vms_dir = store->staging_dir = store->lock_fd = -1;
	pthread_mutex_init(&store->lock, NULL);
	store->path = xstrdup(path);
	store->dir = rc = file_open_dir(AT_FDCWD, path, create, err);
	if (rc < 0) {
		err_prefix(err, "store");
		err_hint(err, rc == -ENOENT ? MISSING_HINT
					    : "name a folder that you may write to with --store or VMCP_STORE");
		goto fail;
	}
	free(store->path);
	store->path = realpath(path, NULL);
	if (!store->path) {
		rc = err_sys(err, errno, "%s", path);
		goto fail;
	}
	rc = check_format(store, create, key, err);
	if (!rc)
		rc = share(store, err);
	if (!rc)
		rc = open_folders(store, err);
	if (rc)
		goto fail;
	*out = store;
	return 0;
fail:
	store_close(store);
	return rc < 0 ? rc : -EIO;
}

int store_open(const char *path, bool create, struct store **out, struct err *err) { return store_open_with_key(path, create, NULL, out, err); }

int store_open_with_key(const char *path, bool create, struct store_key *key, struct store **out, struct err *err)
{
	int rc = store_open_folders(path, create, key, out, err);

	if (rc)
		return rc;
	rc = catalog_open(*out, err);
	if (!rc)
		rc = draft_recover(*out, err);
	if (!rc)
		return 0;
	store_close(*out);
	*out = NULL;
	return rc < 0 ? rc : -EIO;
}

void store_close(struct store *store)
{
	if (!store)
		return;
	catalog_close(store);
	const int fds[] = {store->dir, store->checkpoints_dir, store->layers_dir, store->vms_dir, store->staging_dir, store->lock_fd};
	for (size_t i = 0; i < ARRAY_LENGTH(fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	pthread_mutex_destroy(&store->lock);
	explicit_bzero(store->master, sizeof(store->master));
	free(store->path);
	free(store);
}

void store_hand_over(struct store *store)
{
	catalog_leave_log(store);
	store_close(store);
}

const char *store_path(const struct store *store) { return store->path; }

/* --- reading checkpoints --- */

void store_checkpoint_free(struct store_checkpoint *checkpoint)
{
	free(checkpoint->message);
	free(checkpoint->disks);
	free(checkpoint->config_text);
	free(checkpoint->needs);
	free(checkpoint->group.members);
	*checkpoint = (struct store_checkpoint){0};
}

bool store_has_folder(struct store *store, const char *id)
{
	return store_is_id(id) && faccessat(store->checkpoints_dir, id, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

int store_checkpoint_get(struct store *store, const char *id, struct store_checkpoint *out, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	char name[STORE_ID_BYTES + 16], what[STORE_ID_BYTES + 32];
	sqlite3_stmt *statement;
	int rc;

	*out = (struct store_checkpoint){0};
	if (!store_is_id(id))
		return err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %s: there is none", id);
	snprintf(name, sizeof(name), "%s/manifest", id);
	rc = file_read_all(store->checkpoints_dir, name, MANIFEST_MAX_BYTES, &text, err);
	if (rc)
		return err_prefix(err, "checkpoint %.8s", id), rc;
	snprintf(what, sizeof(what), "checkpoints/%s", name);
	rc = manifest_decode(what, text.data, text.length, out, err);
	if (!rc && strcmp(out->id, id))
		rc = err_set(err, ERR_DAMAGED, EINVAL, "%s: it is the manifest of %s", what, out->id);
	if (rc) {
		store_checkpoint_free(out);
		return rc;
	}
	/* The catalogue knows the present tag, and what became of the parent. */
	pthread_mutex_lock(&store->lock);
	out->tag[0] = '\0';
	rc = catalog_prepare_locked(store,
				    "SELECT parent, (SELECT tag FROM tags WHERE checkpoint = checkpoints.id) FROM checkpoints WHERE id = ?",
				    &statement, err);
	if (!rc) {
		sqlite3_bind_text(statement, 1, id, -1, SQLITE_STATIC);
		if (catalog_step_locked(store, statement, NULL) == 1) {
			catalog_text(statement, 0, out->parent, sizeof(out->parent));
			catalog_text(statement, 1, out->tag, sizeof(out->tag));
		}
		sqlite3_finalize(statement);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}

static uint64_t time_ns(struct timespec time) { return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec; }

int store_checkpoint_stamp(struct store *store, const char *id, struct store_stamp *out, struct err *err)
{
	char name[STORE_ID_BYTES + 16];
	struct stat st;

	if (!store_is_id(id))
		return err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %s: there is none", id);
	snprintf(name, sizeof(name), "%s/manifest", id);
	if (fstatat(store->checkpoints_dir, name, &st, 0))
		return err_sys(err, errno, "%s/checkpoints/%s", store->path, name);
	*out = (struct store_stamp){.device = st.st_dev,
				    .inode = st.st_ino,
				    .bytes = (uint64_t)st.st_size,
				    .modified_ns = time_ns(st.st_mtim),
				    .changed_ns = time_ns(st.st_ctim)};
	return 0;
}

int store_checkpoint_read_stored(struct store *store, const struct store_checkpoint *checkpoint, const char *name, struct buf *out,
				 struct err *err)
{
	char path[STORE_ID_BYTES + 16];
	bool is_state = !strcmp(name, "state");
	uint64_t bytes = is_state ? checkpoint->state_bytes : checkpoint->index_bytes;
	uint64_t sum = is_state ? checkpoint->state_xxh3 : checkpoint->index_xxh3;
	int rc;

	snprintf(path, sizeof(path), "%s/%s", checkpoint->id, name);
	rc = file_read_all(store->checkpoints_dir, path, STATE_MAX_BYTES, out, err);
	if (rc)
		return err_prefix(err, "checkpoint %.8s", checkpoint->id), rc;
	if (out->length != bytes || XXH3_64bits(out->data, out->length) != sum) {
		buf_free(out);
		err_set(err, ERR_DAMAGED, EBADMSG,
			"checkpoint %.8s: %s/checkpoints/%s is damaged: its checksum is not the manifest's",
			checkpoint->id, store->path, path);
		err_hint(err, "other checkpoints are not affected: see `vmcp log`");
		return -EBADMSG;
	}
	return 0;
}

int store_checkpoint_read(struct store *store, const struct store_checkpoint *checkpoint, const char *name, struct buf *out, struct err *err)
{
	int rc = store_checkpoint_read_stored(store, checkpoint, name, out, err);

	if (!rc && store->encrypted && !strcmp(name, "state"))
		rc = crypt_open_state(store, checkpoint->id, out, err);
	if (rc)
		buf_free(out);
	return rc;
}

int store_checkpoint_plain_state(struct store *store, const struct store_checkpoint *checkpoint, uint64_t *bytes, uint64_t *xxh3, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;

	*bytes = checkpoint->state_bytes;
	*xxh3 = checkpoint->state_xxh3;
	int rc = store->encrypted ? store_checkpoint_read(store, checkpoint, "state", &state, err) : 0;
	if (!rc && store->encrypted) {
		*bytes = state.length;
		*xxh3 = XXH3_64bits(state.data, state.length);
	}
	return rc;
}

static int open_checkpoint_dir(struct store *store, const char *id, struct err *err)
{
	int dir = store_is_id(id) ? openat(store->checkpoints_dir, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW) : -1;

	return dir < 0 ? err_sys(err, errno, "checkpoint %.8s", id) : dir;
}

int store_hint_put(struct store *store, const char *id, const char *name, const void *data, size_t length, struct err *err)
{
	int dir = open_checkpoint_dir(store, id, err);

	if (dir < 0)
		return dir;
	int rc = file_write_atomic(dir, name, data, length, 0600, err);
	close(dir);
	return rc;
}

int store_hint_get(struct store *store, const char *id, const char *name, size_t limit, struct buf *out, struct err *err)
{
	int dir = open_checkpoint_dir(store, id, err);

	if (dir < 0)
		return dir;
	int rc = file_read_all(dir, name, limit, out, err);
	close(dir);
	return rc;
}

int store_hint_open(struct store *store, const char *id, const char *name, int *fd, struct err *err)
{
	int dir = open_checkpoint_dir(store, id, err);

	if (dir < 0)
		return dir;
	*fd = openat(dir, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
	int rc = *fd < 0 ? err_sys(err, errno, "checkpoint %.8s: %s", id, name) : 0;
	close(dir);
	return rc;
}

static int open_layer(struct store *store, const char *layer, const char *suffix, struct err *err)
{
	char name[STORE_ID_BYTES + 8];
	struct stat st;

	if (!store_is_id(layer))
		return err_set(err, ERR_DAMAGED, EINVAL, "layer '%s': no id", layer);
	store_file_name(name, layer, suffix);
	/* A FIFO that someone planted must not hold us up. */
	int fd = openat(store->layers_dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && fcntl(fd, F_SETFL, O_RDONLY) == 0)
		return fd;
	if (fd >= 0) {
		close(fd);
		return err_set(err, ERR_DAMAGED, EINVAL, "%s/layers/%s: is no file", store->path, name);
	}
	int number = errno;
	err_sys(err, number, "%s/layers/%s", store->path, name);
	if (err && number == ENOENT)
		err->class = ERR_DAMAGED;
	return -number;
}

int store_memory_layer_open(struct store *store, const char *layer, struct err *err)
{
	return open_layer(store, layer, ".mem", err);
}

int store_memory_sums_open(struct store *store, const char *layer, struct err *err)
{
	return open_layer(store, layer, ".sums", err);
}

int store_format_named(const char *name) { return strcmp(name, "raw") ? COW_FORMAT_QCOW2 : COW_FORMAT_RAW; }

int store_disk_layer_format(const struct store_disk_layer *layer) { return store_format_named(layer->format); }

int store_disk_layer_path(struct store *store, const char *layer, const char *format, char **path, struct err *err)
{
	if (!store_is_id(layer) || (strcmp(format, "qcow2") && strcmp(format, "raw")))
		return err_set(err, ERR_DAMAGED, EINVAL, "layer '%s' of format '%s': neither exists", layer, format);
	*path = xasprintf("%s/layers/%s.%s", store->path, layer, format);
	if (access(*path, F_OK) == 0)
		return 0;
	int number = errno;
	err_sys(err, number, "%s", *path);
	if (err)
		err->class = ERR_DAMAGED;
	free(*path);
	*path = NULL;
	return -number;
}
