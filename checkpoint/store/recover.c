/*
 * What makers left that died: of checkpoints (draft.c) and of removals (remove.c). Done by whoever opens the store, in this order:
 *
 *     0 members of groups that are committed are moved to where checkpoints are
 *     1 what was committed is entered into the catalogue
 *     2 removals are completed
 *     3 what was not committed is removed. A memory layer that a checkpoint names stays in any case, and all stay while 1 could not be done
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/group.h"
#include "checkpoint/store/store_internal.h"

#define LOCK_SUFFIX ".lock"
#define SETTLE_NS   10000000000ull

/* A layer that a marker names, unless a checkpoint does, too. */
static int unlink_layer(struct store *store, const char *layer, bool memory, struct err *err)
{
	char name[STORE_ID_BYTES + 8];

	pthread_mutex_lock(&store->lock);
	int rc = refs_has_layer_locked(store, layer, err);
	pthread_mutex_unlock(&store->lock);
	if (rc)
		return rc;
	store_file_name(name, layer, ".qcow2");
	if (memory)
		store_unlink_memory_layer(store, layer);
	else
		unlinkat(store->layers_dir, name, 0);
	return 0;
}

/* Removes the markers in the folder `id` of `parent`, and with `layers` the memory layers that they name before them; of an import, which no
 * VM stands on, disk layers, too. */
static int remove_markers(struct store *store, int parent, const char *id, bool layers, struct err *err)
{
	int fd = openat(parent, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	DIR *stream = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;
	int rc = 0;

	if (!stream)
		return 0;
	bool imported = faccessat(fd, DRAFT_IMPORTED, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
	while (rc >= 0 && (entry = readdir(stream))) {
		bool is_memory = !strncmp(entry->d_name, "mem-", 4) && store_is_id(entry->d_name + 4);

		if (!is_memory && (strncmp(entry->d_name, "disk-", 5) || !store_is_id(entry->d_name + 5)))
			continue;
		if (layers && (is_memory || imported))
			rc = unlink_layer(store, entry->d_name + (is_memory ? 4 : 5), is_memory, err);
		if (rc >= 0)
			unlinkat(fd, entry->d_name, 0);
	}
	closedir(stream);
	return rc < 0 ? rc : 0;
}

static int enter_committed(struct store *store, const char *id, struct err *err)
{
	struct store_checkpoint checkpoint;
	struct store_layers layers;
	int rc = store_read_committed(store, id, &checkpoint, &layers, err);

	if (rc)
		return rc;
	CLEANUP_CLOSE int dir = openat(store->checkpoints_dir, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	bool imported = dir >= 0 && faccessat(dir, DRAFT_IMPORTED, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
	remove_markers(store, store->checkpoints_dir, id, false, NULL);
	if (imported)
		rc = draft_place_disks(store, dir, &checkpoint, err);
	if (!rc)
		rc = draft_enter(store, &checkpoint, &layers, imported ? CATALOG_VM_MADE : CATALOG_VM_MOVES_IF_AT_PARENT, err);
	if (!rc && imported)
		unlinkat(dir, DRAFT_IMPORTED, 0);
	store_checkpoint_free(&checkpoint);
	layers_free(&layers);
	return rc;
}

/* A draft's lock, taken for mending; -1: its maker lives, or another process mends it. */
static int take_over(struct store *store, const char *lock_name)
{
	struct stat st;
	int fd = openat(store->staging_dir, lock_name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);

	if (fd >= 0 && !store_try_lock(fd) && !fstat(fd, &st) && st.st_nlink)
		return fd;
	if (fd >= 0)
		close(fd);
	return -1;
}

/* 1: this draft of a dead maker is a member of a group that is committed; 0: it is not, and if it could still come to be that, it cannot any more; -errno: it is not
 * known. */
static int is_decided(struct store *store, const char *id)
{
	struct store_checkpoint checkpoint;

	/* What has no manifest was not yet prepared. */
	if (store_read_manifest_in(store->staging_dir, "staging", id, &checkpoint, NULL))
		return 0;
	int rc = checkpoint.group.id[0] ? store_group_settle(store, checkpoint.group.id, NULL) : -ECANCELED;
	store_checkpoint_free(&checkpoint);
	return rc == 0 ? 1 : rc == -ECANCELED ? 0 : rc;
}

/* All that it holds was durable before its group was decided on. */
static void move_decided(struct store *store, const char *id)
{
	char lock_name[STORE_ID_BYTES + 8];
	struct err error = ERR_INIT;

	store_file_name(lock_name, id, LOCK_SUFFIX);
	bool locked = faccessat(store->staging_dir, lock_name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
	CLEANUP_CLOSE int fd = locked ? take_over(store, lock_name) : -1;
	if ((locked && fd < 0) || is_decided(store, id) <= 0)
		return;
	int rc = renameat(store->staging_dir, id, store->checkpoints_dir, id) ? err_sys(&error, errno, "%s", id) : 0;
	if (!rc)
		rc = file_sync_dir(store->checkpoints_dir, &error);
	if (!rc)
		rc = enter_committed(store, id, &error);
	if (rc)
		log_warn("checkpoint %.8s: %s", id, error.message);
	else
		unlinkat(store->staging_dir, lock_name, 0);
}

static int remove_remains(struct store *store, const char *id, struct err *err)
{
	int rc = remove_markers(store, store->staging_dir, id, true, err);

	return rc ? rc : file_remove_tree(store->staging_dir, id, err);
}

static bool is_lock_name(const char *name)
{
	return strlen(name) == STORE_ID_BYTES - 1 + strlen(LOCK_SUFFIX) && !strcmp(name + STORE_ID_BYTES - 1, LOCK_SUFFIX) &&
	       strspn(name, "0123456789abcdef") == STORE_ID_BYTES - 1;
}

static void id_of_lock(char id[STORE_ID_BYTES], const char *lock_name)
{
	memcpy(id, lock_name, STORE_ID_BYTES - 1);
	id[STORE_ID_BYTES - 1] = '\0';
}

static bool is_committed(struct store *store, const char *id) { return faccessat(store->checkpoints_dir, id, F_OK, 0) == 0; }

static void enter_one(struct store *store, const char *lock_name)
{
	char id[STORE_ID_BYTES];
	struct err error = ERR_INIT;

	id_of_lock(id, lock_name);
	if (!is_committed(store, id))
		return;
	CLEANUP_CLOSE int fd = take_over(store, lock_name);
	if (fd < 0)
		return;
	if (enter_committed(store, id, &error))
		log_warn("checkpoint %.8s: %s", id, error.message);
	else
		unlinkat(store->staging_dir, lock_name, 0);
}

static void remove_one(struct store *store, const char *lock_name)
{
	char id[STORE_ID_BYTES];
	struct err error = ERR_INIT;

	id_of_lock(id, lock_name);
	CLEANUP_CLOSE int fd = take_over(store, lock_name);
	if (fd < 0 || is_committed(store, id) || is_decided(store, id))
		return;
	if (remove_remains(store, id, &error))
		log_warn("%s", error.message);
	else
		unlinkat(store->staging_dir, lock_name, 0);
}

/*
 * A folder without a lock: the host crashed, and only the lock's removal had reached the disk. A maker makes its lock before the folder
 * and removes it after the folder went, so a lock that is missing now says that nobody works in a folder seen before.
 */
static void remove_orphan(struct store *store, const char *id)
{
	char lock_name[STORE_ID_BYTES + 8];
	struct err error = ERR_INIT;

	store_file_name(lock_name, id, LOCK_SUFFIX);
	if (faccessat(store->staging_dir, lock_name, F_OK, AT_SYMLINK_NOFOLLOW) && errno == ENOENT &&
	    !is_decided(store, id) && remove_remains(store, id, &error))
		log_warn("%s", error.message);
}

/* Calls `fn` with every name in staging/ of which it is true that `wanted`. */
static int each_staged(struct store *store, bool (*wanted)(const char *name), void (*fn)(struct store *store, const char *name),
		       struct err *err)
{
	int copy = openat(store->staging_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/staging", store->path);
	while ((entry = readdir(stream)))
		if (wanted(entry->d_name))
			fn(store, entry->d_name);
	closedir(stream);
	return 0;
}

static bool is_removed_name(const char *name) { return !strncmp(name, REMOVED_PREFIX, strlen(REMOVED_PREFIX)); }

/* The name of a lock whose checkpoint is committed, "" if there is none: it waits to be entered. */
static int find_unentered(struct store *store, char found[STORE_ID_BYTES + 8], struct err *err)
{
	int copy = openat(store->staging_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	found[0] = '\0';
	if (!stream)
		return err_sys(err, errno, "%s/staging", store->path);
	while (!found[0] && (entry = readdir(stream))) {
		char id[STORE_ID_BYTES];

		if (!is_lock_name(entry->d_name))
			continue;
		id_of_lock(id, entry->d_name);
		if (is_committed(store, id))
			snprintf(found, STORE_ID_BYTES + 8, "%.40s", entry->d_name);
	}
	closedir(stream);
	return 0;
}

int draft_recover(struct store *store, struct err *err)
{
	char unentered[STORE_ID_BYTES + 8];

	/* As it is for most commands: nothing to look for six times. */
	if (store_folder_is_empty(store->staging_dir))
		return 0;
	int rc = each_staged(store, store_is_id, move_decided, err);

	if (!rc)
		rc = each_staged(store, is_lock_name, enter_one, err);
	if (!rc)
		rc = each_staged(store, is_removed_name, remove_recover, err);
	if (!rc)
		rc = find_unentered(store, unentered, err);
	/* One that could not be entered may name what looks like nobody's. */
	if (rc || unentered[0])
		return rc;
	rc = each_staged(store, is_lock_name, remove_one, err);
	return rc ? rc : each_staged(store, store_is_id, remove_orphan, err);
}

int draft_settle(struct store *store, struct err *err)
{
	const struct timespec moment = {.tv_nsec = 500000};
	uint64_t end = clock_now_ns() + SETTLE_NS;
	char unentered[STORE_ID_BYTES + 8];

	for (;;) {
		int rc = draft_recover(store, err);

		if (!rc)
			rc = find_unentered(store, unentered, err);
		if (rc || !unentered[0])
			return rc;
		if (clock_now_ns() >= end)
			break;
		nanosleep(&moment, NULL);
	}
	err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: it is not in the catalogue yet", unentered);
	err_hint(err, "its own message says why: see `vmcp log` and whether the store's filesystem is full");
	return -EBUSY;
}

static int add_owned(struct store *store, const char *id, struct buf *ids, struct err *err)
{
	int fd = openat(store->staging_dir, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	DIR *stream = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;
	int rc = 0;

	if (!stream)
		return 0; /* committed or given up meanwhile */
	while (!rc && (entry = readdir(stream))) {
		const char *dash = strchr(entry->d_name, '-');

		if (dash && store_is_id(dash + 1))
			rc = buf_append(ids, dash + 1, STORE_ID_BYTES, err);
	}
	closedir(stream);
	return rc;
}

static int scan_owned(struct store *store, struct buf *ids, struct err *err)
{
	int copy = openat(store->staging_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;
	int rc = 0;

	if (!stream)
		return err_sys(err, errno, "%s/staging", store->path);
	while (!rc && (entry = readdir(stream)))
		if (store_is_id(entry->d_name))
			rc = add_owned(store, entry->d_name, ids, err);
	closedir(stream);
	return rc;
}

/* Twice: a marker that was on its way from one folder to another (store_draft_adopt) during the first scan has arrived. */
int draft_owned_layers(struct store *store, struct buf *ids, struct err *err)
{
	int rc = scan_owned(store, ids, err);

	return rc ? rc : scan_owned(store, ids, err);
}
