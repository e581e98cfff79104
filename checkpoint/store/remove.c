/*
 * Removing checkpoints.
 *
 *     1 the manifest's write lock     nobody stands at it, goes back to it, or makes a child of it, from here to the end
 *     2 what is committed is entered  so that the catalogue knows every checkpoint that names its layers
 *     3 one transaction: may it go; checkpoints/<id> is renamed to staging/rm-<id>, both folders synced; its rows go. Several go in one
 *     4 memory layers that no row names any more are unlinked
 *     5 staging/rm-<id> is removed
 *
 * The commit point is the rename. A remover that died after it leaves the lock of staging/rm-<id>/manifest free: whoever opens the store
 * next does the rest. The rename is on the disk before a layer goes: after a crash of the host no checkpoint is there without its layers.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/store_internal.h"

struct removal {
	struct store *store;
	const char *id;
	bool tagged;
	int lock_fd; /* -1: it has no manifest, so nobody can use it */
	char staged[STORE_ID_BYTES + 8];
	bool renamed;
	int refused; /* -errno: it stays */
	struct dead_layers dead;
};

/* --- may it go --- */

static int in_use(struct store *store, const char *id, struct err *err)
{
	struct store_vm *list;
	size_t count = 0;
	char who[STORE_NAME_BYTES] = "";

	if (store_vm_list(store, &list, &count, NULL) == 0) {
		for (size_t i = 0; i < count; i++) {
			if (list[i].alive && !strcmp(list[i].at, id))
				snprintf(who, sizeof(who), "%s", list[i].name);
			store_vm_free(&list[i]);
		}
		free(list);
	}
	if (*who) {
		err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: the VM %s stands at it", id, who);
		err_hint(err, "take another checkpoint, revert the VM to another one, or end it, first");
	} else {
		err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: it is in use", id);
		err_hint(err, "a VM goes back to it, starts from it, or it is being removed: try again");
	}
	return -EBUSY;
}

static int lock_manifest(struct removal *r, struct err *err)
{
	char path[STORE_ID_BYTES + 16];

	snprintf(path, sizeof(path), "%s/manifest", r->id);
	r->lock_fd = openat(r->store->checkpoints_dir, path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (r->lock_fd < 0)
		return errno == ENOENT ? 0 : err_sys(err, errno, "checkpoint %.8s", r->id);
	return store_try_lock(r->lock_fd) ? in_use(r->store, r->id, err) : 0;
}

/* A row of a query with the checkpoint's id, in its first column. 1 there is one, 0 none, -errno. */
static int find_text(struct removal *r, const char *sql, char *out, size_t size, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(r->store, sql, &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, r->id, -1, SQLITE_STATIC);
	rc = catalog_step_locked(r->store, s, err);
	if (rc == 1)
		catalog_text(s, 0, out, size);
	sqlite3_finalize(s);
	return rc;
}

static int check_tags(struct removal *r, struct err *err)
{
	char tag[STORE_NAME_BYTES];
	int rc = r->tagged ? 0 : find_text(r, "SELECT tag FROM tags WHERE checkpoint = ?", tag, sizeof(tag), err);

	if (rc <= 0)
		return rc;
	err_set(err, ERR_STATE, EEXIST, "checkpoint %.8s: it has the tag '%s'", r->id, tag);
	err_hint(err, "`vmcp rm --force %.8s` removes it with its tags", r->id);
	return -EEXIST;
}

/* The pins say it first; but between a checkpoint's entry and its pin there is a moment. */
static int check_vms(struct removal *r, struct err *err)
{
	char name[STORE_NAME_BYTES];
	sqlite3_stmt *s;
	bool alive = false;
	int rc = catalog_prepare_locked(r->store, "SELECT name FROM vms WHERE at = ?", &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, r->id, -1, SQLITE_STATIC);
	while (!alive && (rc = catalog_step_locked(r->store, s, err)) == 1) {
		catalog_text(s, 0, name, sizeof(name));
		alive = store_vm_is_alive(r->store, name);
	}
	sqlite3_finalize(s);
	if (!alive)
		return rc;
	err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: the VM %s stands at it", r->id, name);
	err_hint(err, "take another checkpoint, revert the VM to another one, or end it, first");
	return -EBUSY;
}

/* --- the commit point and what follows --- */

static int move_away(struct removal *r, struct err *err)
{
	struct store *store = r->store;
	int rc = fault_check(FAULT_STORE_REMOVE_CHECKED, err);

	if (rc)
		return rc;
	if (renameat(store->checkpoints_dir, r->id, store->staging_dir, r->staged))
		return err_sys(err, errno, "checkpoint %.8s", r->id);
	r->renamed = true;
	return fault_check(FAULT_STORE_REMOVE_RENAMED, err);
}

static int sync_folders(struct store *store, struct err *err)
{
	const struct store_unsynced folders[] = {{store->checkpoints_dir, "checkpoints"}, {store->staging_dir, "staging"}};

	return store_sync(folders, ARRAY_LENGTH(folders), err);
}

/* Moves away those that may go. A refusal is that one's alone; anything else is a failure of all. */
static int move_all_away(struct removal *list, size_t count, struct err *err)
{
	for (size_t i = 0; i < count; i++) {
		struct removal *r = &list[i];

		if (r->refused)
			continue;
		int rc = check_tags(r, err);
		if (!rc)
			rc = check_vms(r, err);
		if (rc == -EEXIST || rc == -EBUSY) {
			r->refused = rc;
			continue;
		}
		if (!rc)
			rc = move_away(r, err);
		if (rc)
			return rc;
	}
	return sync_folders(list->store, err);
}

/* One transaction. `move`: they are still in their place. */
static int forget_locked(struct removal *list, size_t count, bool move, struct err *err)
{
	struct store *store = list->store;
	int rc = catalog_begin_locked(store, err);

	if (rc)
		return rc;
	if (move)
		rc = move_all_away(list, count, err);
	for (size_t i = 0; i < count && !rc; i++) {
		int known = list[i].refused ? 0 : refs_forget_locked(store, list[i].id, &list[i].dead, err);
		/* Before the commit, and not again after it: once no checkpoint names a disk layer, a merge may put another file in its place. */
		if (known == 1 || (known == 0 && move && !list[i].refused))
			disk_records_keep(store, list[i].staged);
		rc = known < 0 ? known : 0;
	}
	return catalog_end_locked(store, rc, FAULT_STORE_REMOVE_BEFORE_COMMIT, err);
}

static uint64_t file_bytes(struct store *store, const char *layer, const char *suffix)
{
	char name[STORE_ID_BYTES + 8];
	struct stat st;

	store_file_name(name, layer, suffix);
	return fstatat(store->layers_dir, name, &st, AT_SYMLINK_NOFOLLOW) ? 0 : (uint64_t)st.st_blocks * 512;
}

static int unlink_dead(struct removal *r, struct store_freed *freed, struct err *err)
{
	for (size_t i = 0; i < r->dead.count; i++) {
		const struct dead_layer *layer = &r->dead.list[i];
		int rc = fault_check(FAULT_STORE_REMOVE_UNLINKING, err);

		if (rc)
			return rc;
		if (strcmp(layer->kind, "mem")) {
			freed->disk_layers++; /* other images may stand on it: gc.c */
			continue;
		}
		freed->bytes += file_bytes(r->store, layer->id, ".mem") + file_bytes(r->store, layer->id, ".sums");
		freed->memory_layers++;
		store_unlink_memory_layer(r->store, layer->id);
	}
	return fault_check(FAULT_STORE_REMOVE_UNLINKED, err);
}

static uint64_t folder_bytes(struct store *store, const char *staged)
{
	static const char *const names[] = {"manifest", "state", "index"};
	uint64_t bytes = 0;

	for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
		char path[STORE_ID_BYTES + 24];
		struct stat st;

		snprintf(path, sizeof(path), "%s/%s", staged, names[i]);
		if (fstatat(store->staging_dir, path, &st, AT_SYMLINK_NOFOLLOW) == 0)
			bytes += (uint64_t)st.st_blocks * 512;
	}
	return bytes;
}

/* It is gone: what fails from here on is mended by the next store_open. rc, later: what failed before. */
static void clean_up(struct removal *r, int rc, struct err *later, struct store_freed *freed)
{
	freed->checkpoints++;
	freed->bytes += folder_bytes(r->store, r->staged);
	if (!rc)
		rc = fault_check(FAULT_STORE_REMOVE_FORGOTTEN, later);
	if (!rc)
		rc = unlink_dead(r, freed, later);
	if (!rc)
		rc = file_remove_tree(r->store->staging_dir, r->staged, later);
	if (rc)
		log_warn("checkpoint %.8s: it is removed, but what it leaves waits for the next start of a command: %s", r->id,
			 later->message);
}

/* What cannot go is noted in its removal. A failure that left all of them where they were: -errno. */
static int remove_all(struct removal *list, size_t count, struct store_freed *freed, struct err *err)
{
	struct store *store = list->store;
	struct err error = ERR_INIT;
	bool any = false;
	int rc = draft_settle(store, err);

	if (rc)
		return rc;
	pthread_mutex_lock(&store->lock);
	rc = forget_locked(list, count, true, &error);
	pthread_mutex_unlock(&store->lock);
	for (size_t i = 0; i < count; i++) {
		struct err later = error;

		any |= list[i].renamed;
		if (list[i].renamed)
			clean_up(&list[i], rc, &later, freed);
	}
	if (err)
		*err = any ? ERR_INIT : error;
	return any ? 0 : rc;
}

/* -ENOENT: there is none. */
static int begin_removal(struct removal *r, struct store *store, const char *id, bool tagged, struct err *err)
{
	*r = (struct removal){.store = store, .id = id, .tagged = tagged, .lock_fd = -1};
	if (!store_is_id(id) || faccessat(store->checkpoints_dir, id, F_OK, AT_SYMLINK_NOFOLLOW))
		return r->refused = err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %.8s: there is none", id);
	snprintf(r->staged, sizeof(r->staged), REMOVED_PREFIX "%s", id);
	return r->refused = lock_manifest(r, err);
}

static void end_removal(struct removal *r)
{
	free(r->dead.list);
	if (r->lock_fd >= 0)
		close(r->lock_fd);
}

int store_checkpoint_remove(struct store *store, const char *id, bool tagged, struct store_freed *freed, struct err *err)
{
	struct removal r;
	int rc = begin_removal(&r, store, id, tagged, err);

	if (!rc)
		rc = remove_all(&r, 1, freed, err);
	if (!rc)
		rc = r.refused;
	end_removal(&r);
	return rc;
}

int store_checkpoints_remove(struct store *store, const char (*ids)[STORE_ID_BYTES], size_t count, struct store_freed *freed,
			     struct err *err)
{
	struct removal *list = xcalloc(count + 1, sizeof(*list));
	int rc = 0;

	for (size_t i = 0; i < count && !rc; i++) {
		rc = begin_removal(&list[i], store, ids[i], false, err);
		if (rc == -ENOENT || rc == -EBUSY)
			rc = 0;
	}
	if (!rc && count > 0)
		rc = remove_all(list, count, freed, err);
	for (size_t i = 0; i < count && list[i].store; i++)
		end_removal(&list[i]);
	free(list);
	return rc;
}

/* --- removers that died --- */

/* Layers that the removed checkpoint named and that have no row any more: their remover had told the catalogue, and then died. */
static void unlink_if_unnamed(struct store *store, const char *layer)
{
	pthread_mutex_lock(&store->lock);
	int named = refs_has_layer_locked(store, layer, NULL);
	pthread_mutex_unlock(&store->lock);
	if (named == 0)
		store_unlink_memory_layer(store, layer);
}

/* What is damaged here, gc finds. */
static void unlink_unnamed(struct removal *r)
{
	CLEANUP_BUF struct buf index = BUF_INIT;
	CLEANUP_BUF struct buf manifest = BUF_INIT;
	struct store_checkpoint checkpoint;
	struct store_layers layers = {0};
	char path[STORE_ID_BYTES + 24];

	snprintf(path, sizeof(path), "%s/index", r->staged);
	if (file_read_all(r->store->staging_dir, path, SIZE_MAX / 2, &index, NULL) == 0 &&
	    layers_of_index(index.data, index.length, &layers, NULL) == 0) {
		for (uint32_t i = 0; i < layers.count; i++)
			unlink_if_unnamed(r->store, layers.names[i]);
		layers_free(&layers);
	}
	snprintf(path, sizeof(path), "%s/manifest", r->staged);
	if (file_read_all(r->store->staging_dir, path, MANIFEST_MAX_BYTES, &manifest, NULL) ||
	    manifest_decode(path, manifest.data, manifest.length, &checkpoint, NULL))
		return;
	unlink_if_unnamed(r->store, checkpoint.memory_layer); /* in no index, if all its pages were zero */
	store_checkpoint_free(&checkpoint);
}

void remove_recover(struct store *store, const char *name)
{
	struct removal r = {.store = store, .id = name + strlen(REMOVED_PREFIX)};
	struct store_freed freed = {0};
	struct err error = ERR_INIT;
	char path[STORE_ID_BYTES + 24];

	if (!store_is_id(r.id))
		return;
	snprintf(r.staged, sizeof(r.staged), "%s", name);
	snprintf(path, sizeof(path), "%s/manifest", name);
	CLEANUP_CLOSE int fd = openat(store->staging_dir, path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd >= 0 && store_try_lock(fd))
		return; /* its remover lives, or another process mends it */
	/* Without a manifest its layers had gone before. */
	int rc = sync_folders(store, &error);
	if (!rc) {
		pthread_mutex_lock(&store->lock);
		rc = forget_locked(&r, 1, false, &error);
		pthread_mutex_unlock(&store->lock);
	}
	if (!rc)
		rc = unlink_dead(&r, &freed, &error);
	if (!rc) {
		unlink_unnamed(&r);
		rc = file_remove_tree(store->staging_dir, name, &error);
	}
	if (rc)
		log_warn("removal of checkpoint %.8s: %s", r.id, error.message);
	free(r.dead.list);
}
