/*
 * A checkpoint in the making.
 *
 *     staging/<id>.lock           exists from first to last, OFD-locked by its maker
 *     staging/<id>/               becomes checkpoints/<id> by the commit's rename
 *     staging/<id>/mem-<layer>    a memory layer that dies with the draft; written before the layer's files are made, removed after the rename
 *     staging/<id>/disk-<layer>   a disk layer that gc leaves alone meanwhile
 *     staging/<id>/imported       it is an import: no VM's chain stands on its disk layers, they die with the draft
 *     staging/<id>/own-<disk>     a read-only disk that goes to the VM's folder after the rename
 *
 * A maker that died leaves its lock free: the next store_open finishes its work (recover.c). Renamed already: the checkpoint exists and is
 * entered into the catalogue. Not renamed, but of a group that is committed (group.c): it is renamed. Else: folder and memory layers are removed. Disk layers are left: a VM's chain may stand on them.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <xxhash.h>

#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/store/store_internal.h"

#define MAX_DISK_LAYERS	  26
#define MAX_MEMORY_LAYERS 4 /* its own, and adopted ones */

#define MAX_FILES	  (3 + 2 * MAX_MEMORY_LAYERS + MAX_DISK_LAYERS)

struct store_draft {
	struct store *store;
	char id[STORE_ID_BYTES];
	char lock_name[STORE_ID_BYTES + 8];
	int lock_fd, dir;
	char memory_layers[MAX_MEMORY_LAYERS][STORE_ID_BYTES];
	unsigned memory_count;
	char disk_layers[MAX_DISK_LAYERS][STORE_ID_BYTES + 8]; /* file names in layers/ */
	unsigned disk_count;
	struct store_layers index_layers;
	bool switched;
	bool imported;
	uint64_t state_bytes, state_xxh3, index_bytes, index_xxh3;
	/* What the commit makes durable: state, index, manifest, the memory layer and its checksums. The descriptors are ours. */
	struct store_unsynced files[MAX_FILES];
	unsigned file_count;
};

void store_unlink_memory_layer(struct store *store, const char *layer)
{
	char name[STORE_ID_BYTES + 8];

	store_file_name(name, layer, ".mem");
	unlinkat(store->layers_dir, name, 0);
	store_file_name(name, layer, ".sums");
	unlinkat(store->layers_dir, name, 0);
}

/* At the commit; fd, of which -1 is what opening it came to, is ours from here on. */
static int sync_later(struct store_draft *draft, int fd, const char *name, struct err *err)
{
	if (fd < 0)
		return err_sys(err, errno, "%s/staging/%s: %s", draft->store->path, draft->id, name);
	if (draft->file_count == MAX_FILES) {
		close(fd);
		return err_set(err, ERR_FAILED, E2BIG, "%s: written more than once", name);
	}
	draft->files[draft->file_count++] = (struct store_unsynced){.fd = fd, .name = name};
	return 0;
}

static void draft_free(struct store_draft *draft)
{
	for (unsigned i = 0; i < draft->file_count; i++)
		close(draft->files[i].fd);
	if (draft->dir >= 0)
		close(draft->dir);
	if (draft->lock_fd >= 0) {
		unlinkat(draft->store->staging_dir, draft->lock_name, 0);
		close(draft->lock_fd);
	}
	layers_free(&draft->index_layers);
	free(draft);
}

static bool is_there(int dir, const char *id) { return faccessat(dir, id, F_OK, AT_SYMLINK_NOFOLLOW) == 0; }

/* The lock file first, then the folder. wanted: the id, NULL: a new one. */
static int lock_draft(struct store_draft *draft, const char *wanted, struct err *err)
{
	struct store *store = draft->store;
	struct stat st;

	do {
		if (draft->lock_fd >= 0)
			close(draft->lock_fd);
		if (wanted)
			memcpy(draft->id, wanted, STORE_ID_BYTES);
		else
			store_new_id(draft->id);
		store_file_name(draft->lock_name, draft->id, ".lock");
		draft->lock_fd =
			openat(store->staging_dir, draft->lock_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (draft->lock_fd < 0 && wanted && errno == EEXIST)
			return err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: another process is making it", wanted);
		if (draft->lock_fd < 0)
			return err_sys(err, errno, "%s/staging", store->path);
		/* Between creation and lock another process may take it for a dead maker's and remove it: then once more. */
	} while (store_try_lock(draft->lock_fd) || fstat(draft->lock_fd, &st) || st.st_nlink == 0);
	/* Nobody else can commit it from here on. */
	if (wanted && is_there(store->checkpoints_dir, wanted))
		return err_set(err, ERR_STATE, EEXIST, "checkpoint %.8s: it is there already", wanted);
	return 0;
}

static int begin(struct store *store, const char *wanted, struct store_draft **out, struct err *err)
{
	struct store_draft *draft = xcalloc(1, sizeof(*draft));

	draft->store = store;
	draft->dir = -1;
	draft->lock_fd = -1;
	int rc = lock_draft(draft, wanted, err);
	if (rc)
		goto fail;
	if (!mkdirat(store->staging_dir, draft->id, 0700))
		draft->dir = openat(store->staging_dir, draft->id, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (draft->dir < 0) {
		rc = err_sys(err, errno, "%s/staging/%s", store->path, draft->id);
		goto fail;
	}
	rc = fault_check(FAULT_STORE_DRAFT_MADE, err);
	if (rc) {
		file_remove_tree(store->staging_dir, draft->id, NULL);
		goto fail;
	}
	*out = draft;
	return 0;
fail:
	draft_free(draft);
	return rc;
}

int store_draft_begin(struct store *store, struct store_draft **out, struct err *err) { return begin(store, NULL, out, err); }

int store_draft_begin_import(struct store *store, const char *id, struct store_draft **out, struct err *err)
{
	int rc = begin(store, id, out, err);

	if (rc)
		return rc;
	CLEANUP_CLOSE int mark = openat((*out)->dir, DRAFT_IMPORTED, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (mark < 0) {
		rc = err_sys(err, errno, "%s/staging/%s", store->path, id);
		store_draft_abort(*out);
	} else
		(*out)->imported = true;
	return rc;
}

const char *store_draft_id(const struct store_draft *draft) { return draft->id; }

static int create_layer_file(struct store *store, const char *layer, const char *suffix, struct err *err)
{
	char name[STORE_ID_BYTES + 8];

	store_file_name(name, layer, suffix);
	int fd = openat(store->layers_dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	return fd >= 0 ? fd : err_sys(err, errno, "%s/layers/%s", store->path, name);
}

static void marker_name(char out[STORE_ID_BYTES + 8], const char *kind, const char *layer)
{
	snprintf(out, STORE_ID_BYTES + 8, "%s-%.32s", kind, layer);
}

static int make_marker(struct store_draft *draft, const char *kind, const char *layer, struct err *err)
{
	char marker[STORE_ID_BYTES + 8];

	marker_name(marker, kind, layer);
	CLEANUP_CLOSE int mark = openat(draft->dir, marker, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	return mark >= 0 ? 0 : err_sys(err, errno, "%s/staging/%s", draft->store->path, draft->id);
}

static int too_many_layers(struct err *err)
{
	return err_set(err, ERR_FAILED, E2BIG, "more than %d new memory layers in one checkpoint", MAX_MEMORY_LAYERS);
}

int store_draft_memory_layer(struct store_draft *draft, char layer[STORE_ID_BYTES], int *fd, int *sums_fd, struct err *err)
{
	store_new_id(layer);
	int rc = draft->memory_count == MAX_MEMORY_LAYERS ? too_many_layers(err) : make_marker(draft, "mem", layer, err);
	if (rc)
		return rc;
	memcpy(draft->memory_layers[draft->memory_count++], layer, STORE_ID_BYTES);
	*fd = create_layer_file(draft->store, layer, ".mem", err);
	if (*fd < 0)
		return *fd;
	*sums_fd = create_layer_file(draft->store, layer, ".sums", err);
	rc = *sums_fd < 0 ? *sums_fd : fault_check(FAULT_STORE_MEMORY_LAYER_MADE, err);
	if (!rc)
		rc = sync_later(draft, fcntl(*fd, F_DUPFD_CLOEXEC, 0), "memory layer", err);
	if (!rc)
		rc = sync_later(draft, fcntl(*sums_fd, F_DUPFD_CLOEXEC, 0), "checksums of the memory layer", err);
	if (rc) {
		close(*fd);
		if (*sums_fd >= 0)
			close(*sums_fd);
	}
	return rc;
}

int store_draft_sync_layers(struct store_draft *draft, struct err *err) { return store_sync(draft->files, draft->file_count, err); }

/* The marker's rename is what counts: before it the layer dies with `made`, after it with `draft`. */
int store_draft_adopt(struct store_draft *draft, struct store_draft *made, struct err *err)
{
	char marker[STORE_ID_BYTES + 8];
	const char *layer = made->memory_layers[0];
	int rc = draft->memory_count == MAX_MEMORY_LAYERS ? too_many_layers(err) : 0;

	if (!rc && made->memory_count != 1)
		rc = err_set(err, ERR_FAILED, EINVAL, "%u memory layers instead of one", made->memory_count);
	marker_name(marker, "mem", layer);
	if (!rc && renameat(made->dir, marker, draft->dir, marker))
		rc = err_sys(err, errno, "%s/staging/%s", draft->store->path, draft->id);
	if (!rc) {
		memcpy(draft->memory_layers[draft->memory_count++], layer, STORE_ID_BYTES);
		made->memory_count = 0;
		rc = fault_check(FAULT_STORE_LAYER_ADOPTED, err);
	}
	store_draft_abort(made);
	return rc;
}

int store_draft_disk_layer(struct store_draft *draft, const char *disk, const char *path, const char *format,
			   char layer[STORE_ID_BYTES], char **layer_path, struct err *err)
{
	struct store *store = draft->store;
	char suffix[8], *name = draft->disk_layers[draft->disk_count];

	*layer_path = NULL;
	if (draft->disk_count == MAX_DISK_LAYERS)
		return err_set(err, ERR_FAILED, E2BIG, "disk %s: more than %d disks", disk, MAX_DISK_LAYERS);
	if (strcmp(format, "qcow2") && strcmp(format, "raw"))
		return err_set(err, ERR_FAILED, EINVAL, "disk %s: no layer has the format '%s'", disk, format);
	store_new_id(layer);
	snprintf(suffix, sizeof(suffix), ".%s", format);
	store_file_name(name, layer, suffix);
	int rc = make_marker(draft, "disk", layer, err);
	if (!rc)
		rc = fault_check(FAULT_STORE_DISK_LAYER_MARKED, err);
	if (rc)
		return rc;
	/* Follows: the layer is to be the image, where the user's path is a symbolic link to it. */
	if (linkat(AT_FDCWD, path, store->layers_dir, name, AT_SYMLINK_FOLLOW)) {
		int number = errno;

		if (number == EXDEV) {
			err_set(err, ERR_FAILED, EXDEV, "disk %s: %s and the store %s are on different filesystems",
				disk, path, store->path);
			err_hint(err, "name a store beside the disk with --store, or keep the image as `base =` of a "
				      "disk in the store");
			return -EXDEV;
		}
		return err_sys(err, number, "disk %s: link of %s into %s/layers", disk, path, store->path);
	}
	draft->disk_count++;
	rc = file_sync_dir(store->layers_dir, err);
	if (!rc)
		rc = fault_check(FAULT_STORE_DISK_LAYER_LINKED, err);
	if (!rc)
		*layer_path = xasprintf("%s/layers/%s", store->path, name);
	return rc;
}

int store_draft_new_disk(struct store_draft *draft, char layer[STORE_ID_BYTES], char **path, struct err *err)
{
	if (draft->disk_count == MAX_DISK_LAYERS)
		return err_set(err, ERR_FAILED, E2BIG, "more than %d disks", MAX_DISK_LAYERS);
	store_new_id(layer);
	int rc = make_marker(draft, "disk", layer, err);
	if (rc)
		return rc;
	store_file_name(draft->disk_layers[draft->disk_count], layer, ".qcow2");
	*path = xasprintf("%s/layers/%s", draft->store->path, draft->disk_layers[draft->disk_count++]);
	return 0;
}

char *store_draft_own_disk(struct store_draft *draft, const char *disk)
{
	return xasprintf("%s/staging/%s/" DRAFT_OWN_PREFIX "%s", draft->store->path, draft->id, disk);
}

int store_draft_sync_at_commit(struct store_draft *draft, const char *path, struct err *err)
{
	return sync_later(draft, open(path, O_RDONLY | O_CLOEXEC), path, err);
}

void store_draft_switched(struct store_draft *draft) { draft->switched = true; }

/* Nobody reads a draft, so its files need not come into being whole. */
static int put_file(struct store_draft *draft, const char *name, const void *data, size_t length, struct err *err)
{
	int fd = openat(draft->dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	int rc = sync_later(draft, fd, name, err);

	if (rc)
		return rc;
	rc = file_pwrite_full(fd, data, length, 0, err);
	if (rc)
		return err_prefix(err, "%s/staging/%s/%s", draft->store->path, draft->id, name), rc;
	return fault_check(FAULT_STORE_FILE_WRITTEN, err);
}

int store_draft_put(struct store_draft *draft, const char *name, const void *data, size_t length, struct err *err)
{
	bool is_state = !strcmp(name, "state");
	CLEANUP_BUF struct buf sealed = BUF_INIT;
	int rc = 0;

	if (is_state && draft->store->encrypted) {
		rc = crypt_seal_state(draft->store, draft->id, data, length, &sealed, err);
		data = sealed.data;
		length = sealed.length;
	} else if (!is_state) {
		layers_free(&draft->index_layers);
		rc = layers_of_index(data, length, &draft->index_layers, err);
	}
	if (!rc)
		rc = put_file(draft, name, data, length, err);
	if (rc)
		return rc;
	*(is_state ? &draft->state_bytes : &draft->index_bytes) = length;
	*(is_state ? &draft->state_xxh3 : &draft->index_xxh3) = XXH3_64bits(data, length);
	return 0;
}

/* Its files, and the names of the files. */
static int sync_all(struct store_draft *draft, struct err *err)
{
	struct store_unsynced files[MAX_FILES + 2];
	unsigned count = draft->file_count;

	memcpy(files, draft->files, count * sizeof(*files));
	files[count++] = (struct store_unsynced){.fd = draft->dir, .name = "the checkpoint's folder"};
	files[count++] = (struct store_unsynced){.fd = draft->store->layers_dir, .name = "layers"};
	return store_sync(files, count, err);
}

/* Everything before the rename. */
static int prepare_commit(struct store_draft *draft, struct store_checkpoint *checkpoint, struct err *err)
{
	CLEANUP_BUF struct buf manifest = BUF_INIT;

	snprintf(checkpoint->id, sizeof(checkpoint->id), "%s", draft->id);
	checkpoint->state_bytes = draft->state_bytes;
	checkpoint->state_xxh3 = draft->state_xxh3;
	checkpoint->index_bytes = draft->index_bytes;
	checkpoint->size_bytes += draft->store->encrypted ? CRYPT_STATE_MORE : 0;
	checkpoint->index_xxh3 = draft->index_xxh3;
	/* Before the commit point, as there is no way back behind it. */
	int rc = checkpoint->tag[0] ? catalog_check_tag(draft->store, checkpoint->tag, err) : 0;
	if (!rc)
		rc = manifest_encode(checkpoint, &manifest, err);
	if (!rc)
		rc = put_file(draft, "manifest", manifest.data, manifest.length, err);
	if (!rc)
		rc = sync_all(draft, err);
	return rc ? rc : fault_check(FAULT_STORE_BEFORE_RENAME, err);
}

/* Its tag may have been taken since it was looked for: the checkpoint matters more. */
int draft_enter(struct store *store, struct store_checkpoint *checkpoint, const struct store_layers *layers,
		enum catalog_position position, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = catalog_enter_locked(store, checkpoint, layers, position, err);
	if (rc == -EEXIST) {
		log_warn("checkpoint %.8s: it is saved without its tag '%s', which another one took meanwhile",
			 checkpoint->id, checkpoint->tag);
		checkpoint->tag[0] = '\0';
		rc = catalog_enter_locked(store, checkpoint, layers, position, err);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}

/* A committed checkpoint's layers die with no draft any more. */
static void remove_markers(struct store_draft *draft)
{
	char marker[STORE_ID_BYTES + 8];

	for (unsigned i = 0; i < draft->memory_count; i++) {
		marker_name(marker, "mem", draft->memory_layers[i]);
		unlinkat(draft->dir, marker, 0);
	}
	for (unsigned i = 0; i < draft->disk_count; i++) {
		marker_name(marker, "disk", draft->disk_layers[i]);
		unlinkat(draft->dir, marker, 0);
	}
}

/* For whoever opens the store next: the lock's file stays, and tells that there is something to do. */
static void leave(struct store_draft *draft, const struct err *why)
{
	log_warn("checkpoint %.8s: it is saved, but its entry in the catalogue waits for the next start of a command: %s", draft->id, why->message);
	close(draft->lock_fd);
	draft->lock_fd = -1;
}

static int move(struct store_draft *draft, struct err *err)
{
	struct store *store = draft->store;

	if (renameat(store->staging_dir, draft->id, store->checkpoints_dir, draft->id) == 0)
		return 0;
	return err_sys(err, errno, "%s/checkpoints/%s", store->path, draft->id);
}

/* It exists from here on; what fails now is mended by the next store_open, so it is no failure of the checkpoint. */
static void enter(struct store_draft *draft, struct store_checkpoint *checkpoint)
{
	struct store *store = draft->store;
	struct err later = ERR_INIT;
	int rc = fault_check(FAULT_STORE_AFTER_RENAME, &later);

	if (!rc) {
		remove_markers(draft);
		rc = file_sync_dir(store->checkpoints_dir, &later);
	}
	if (!rc && draft->imported)
		rc = draft_place_disks(store, draft->dir, checkpoint, &later);
	if (!rc)
		rc = draft_enter(store, checkpoint, &draft->index_layers, draft->imported ? CATALOG_VM_MADE : CATALOG_VM_MOVES, &later);
	if (!rc && draft->imported)
		unlinkat(draft->dir, DRAFT_IMPORTED, 0);
	if (rc)
		leave(draft, &later);
	draft_free(draft);
}

int store_draft_commit(struct store_draft *draft, struct store_checkpoint *checkpoint, struct err *err)
{
	int rc = store_draft_prepare(draft, checkpoint, err);

	if (rc)
		return rc;
	rc = move(draft, err);
	if (rc)
		store_draft_abort(draft);
	else
		enter(draft, checkpoint);
	return rc;
}

int store_draft_prepare(struct store_draft *draft, struct store_checkpoint *checkpoint, struct err *err)
{
	int rc = prepare_commit(draft, checkpoint, err);

	if (rc)
		store_draft_abort(draft);
	return rc;
}

void store_draft_finish(struct store_draft *draft, struct store_checkpoint *checkpoint)
{
	struct err later = ERR_INIT;
	int rc = fault_check(FAULT_GROUP_BEFORE_RENAME, &later);

	if (!rc)
		rc = move(draft, &later);
	if (!rc) {
		enter(draft, checkpoint);
		return;
	}
	leave(draft, &later);
	draft_free(draft);
}

void store_draft_abort(struct store_draft *draft)
{
	if (!draft)
		return;
	for (unsigned i = 0; i < draft->memory_count; i++)
		store_unlink_memory_layer(draft->store, draft->memory_layers[i]);
	if (!draft->switched)
		for (unsigned i = 0; i < draft->disk_count; i++)
			unlinkat(draft->store->layers_dir, draft->disk_layers[i], 0);
	file_remove_tree(draft->store->staging_dir, draft->id, NULL);
	draft_free(draft);
}
