/*
 * The catalogue made anew. Nobody else has the store open meanwhile.
 *
 *     1 a new database beside the old one, filled from the manifests and indices
 *     2 what only the old one knows is taken over, row by row as far as it can be read: VMs, tags, images, which ancestor is left
 *     3 the old one's log files are removed, the new one renamed over it: the commit point
 *
 * Before 3 nothing has changed. A crash within 3 leaves the old database as of its last checkpoint of the log, or the new one: either opens, or is rebuilt.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/store_internal.h"

#define NEW_NAME     "catalog.new"
#define WAIT_LOCK_NS 5000000000ull

/* Commands end soon; a VM's process does not. */
static int lock_alone(struct store *store, struct err *err)
{
	if (!store_lock_byte_within(store, STORE_LOCK_OPEN, F_WRLCK, WAIT_LOCK_NS))
		return 0;
	err_set(err, ERR_STATE, EBUSY, "%s: others use this store", store->path);
	err_hint(err, "end its VMs, `vmcp ps` lists them, and what else runs on it, and try again");
	return -EBUSY;
}

static void remove_new(struct store *store)
{
	unlinkat(store->dir, NEW_NAME, 0);
	unlinkat(store->dir, NEW_NAME "-journal", 0);
}

/* --- what the old one knows --- */

struct salvage {
	struct store *store; /* its database is the new one */
	sqlite3 *old;
};

/* From one statement's rows into another's parameters. False: not all of them could be read. */
static bool copy_rows(struct salvage *s, const char *select, const char *insert, uint64_t *copied)
{
	sqlite3_stmt *from = NULL, *to = NULL;
	bool good = sqlite3_prepare_v2(s->old, select, -1, &from, NULL) == SQLITE_OK &&
		    sqlite3_prepare_v2(s->store->db, insert, -1, &to, NULL) == SQLITE_OK;
	int step = good ? sqlite3_step(from) : SQLITE_ERROR;

	for (; step == SQLITE_ROW; step = sqlite3_step(from)) {
		const char *key = (const char *)sqlite3_column_text(from, 0);

		if (!key || !*key) {
			good = false;
			continue;
		}
		for (int i = 0; i < sqlite3_column_count(from); i++)
			sqlite3_bind_value(to, i + 1, sqlite3_column_value(from, i));
		if (sqlite3_step(to) == SQLITE_DONE)
			*copied += (uint64_t)sqlite3_changes(s->store->db);
		else
			good = false; /* a value that does not fit the table */
		sqlite3_reset(to);
	}
	sqlite3_finalize(from);
	sqlite3_finalize(to);
	return good && step == SQLITE_DONE;
}

#define VMS "name, uuid, at, pid, state, memory_bytes, cpus, started_wall_ns, config_path, config_text, note"

/* A name that is none is a damaged row's. */
static int forget_bad_names(struct store *store, struct err *err)
{
	return catalog_run_locked(store,
				  "DELETE FROM vms WHERE name GLOB '*[^A-Za-z0-9._-]*' OR name NOT GLOB '[A-Za-z0-9]*' OR length(name) > 63;"
				  "DELETE FROM tags WHERE tag GLOB '*[^A-Za-z0-9._-]*' OR tag NOT GLOB '[A-Za-z0-9]*' OR length(tag) > 63"
				  " OR (checkpoint NOT IN (SELECT id FROM checkpoints) AND checkpoint NOT IN (SELECT id FROM groups));"
				  "DELETE FROM templates WHERE checkpoint NOT IN (SELECT id FROM checkpoints);",
				  err);
}

static int take_over(struct salvage *s, struct store_rebuilt *out, struct err *err)
{
	uint64_t ignored = 0;
	int rc = 0;

	out->lost_vms = !copy_rows(s, "SELECT " VMS " FROM vms", "INSERT OR REPLACE INTO vms(" VMS ") VALUES(?,?,?,?,?,?,?,?,?,?,?)", &out->vms);
	out->lost_tags = !copy_rows(s, "SELECT tag, checkpoint FROM tags", "INSERT OR REPLACE INTO tags VALUES(?,?)", &out->tags);
	out->lost_images = !copy_rows(s, "SELECT path FROM images", "INSERT OR IGNORE INTO images VALUES(?)", &ignored);
	/* Nobody runs, so nobody has resources. */
	copy_rows(s, "SELECT checkpoint, rules FROM templates", "INSERT OR IGNORE INTO templates VALUES(?,?)", &ignored);
	/* Of one that was decided on, members may still wait to be moved. Before tags are looked at. */
	copy_rows(s, "SELECT id, members, state, begun_wall_ns FROM groups WHERE state = 'committed'", "INSERT OR IGNORE INTO groups VALUES(?,?,?,?)", &ignored);
	/* A parent that is not there any more: the old one knows who is in its place. */
	copy_rows(s, "SELECT id, parent FROM checkpoints",
		  "UPDATE checkpoints SET parent = ?2 WHERE id = ?1 AND parent NOT IN (SELECT id FROM checkpoints)"
		  " AND ?2 IN (SELECT id FROM checkpoints)",
		  &ignored);
	rc = catalog_run_locked(s->store, "UPDATE checkpoints SET parent = '' WHERE parent NOT IN (SELECT id FROM checkpoints)", err);
	if (!rc)
		rc = forget_bad_names(s->store, err);
	if (!rc && out->lost_images)
		rc = catalog_run_locked(s->store, "INSERT OR IGNORE INTO images VALUES('" STORE_UNKNOWN_IMAGES "')", err);
	return rc;
}

/* An old one that cannot be opened knows nothing. */
static int salvage(struct store *store, struct store_rebuilt *out, struct err *err)
{
	char *path = xasprintf("%s/catalog.db", store->path);
	struct salvage s = {.store = store};
	int rc = catalog_run_locked(store, "BEGIN IMMEDIATE", err);

	if (!rc) {
		if (sqlite3_open_v2(path, &s.old, SQLITE_OPEN_READWRITE, NULL) != SQLITE_OK) {
			sqlite3_close(s.old);
			s.old = NULL;
		}
		rc = take_over(&s, out, err);
		sqlite3_close(s.old);
	}
	if (!rc)
		rc = catalog_run_locked(store, "COMMIT", err);
	free(path);
	return rc;
}

static int count_checkpoints(struct store *store, uint64_t *count, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "SELECT COUNT(*) FROM checkpoints", &s, err);

	if (rc)
		return rc;
	rc = catalog_step_locked(store, s, err);
	*count = rc == 1 ? (uint64_t)sqlite3_column_int64(s, 0) : 0;
	sqlite3_finalize(s);
	return rc < 0 ? rc : 0;
}

/* --- in its place --- */

static int put_in_place(struct store *store, struct err *err)
{
	int rc = fault_check(FAULT_STORE_REBUILD_MADE, err);

	if (rc)
		return rc;
	/* They are the old database's, and would be taken for the new one's. */
	unlinkat(store->dir, "catalog.db-wal", 0);
	unlinkat(store->dir, "catalog.db-shm", 0);
	unlinkat(store->dir, "catalog.db-journal", 0);
	rc = file_sync_dir(store->dir, err);
	if (!rc)
		rc = fault_check(FAULT_STORE_REBUILD_LOGS_GONE, err);
	if (!rc && renameat(store->dir, NEW_NAME, store->dir, "catalog.db"))
		rc = err_sys(err, errno, "%s/catalog.db", store->path);
	return rc ? rc : file_sync_dir(store->dir, err);
}

static int rebuild(struct store *store, struct store_rebuilt *out, struct err *err)
{
	remove_new(store);
	int rc = catalog_make(store, NEW_NAME, err);

	if (!rc)
		rc = salvage(store, out, err);
	if (!rc)
		rc = count_checkpoints(store, &out->checkpoints, err);
	catalog_close(store);
	if (!rc)
		rc = put_in_place(store, err);
	if (rc)
		remove_new(store);
	return rc;
}

int store_rebuild(const char *path, struct store_rebuilt *out, struct err *err)
{
	struct store *store;

	*out = (struct store_rebuilt){0};
	int rc = store_open_folders(path, false, NULL, &store, err);
	if (rc)
		return rc;
	rc = lock_alone(store, err);
	if (!rc)
		rc = rebuild(store, out, err);
	store_close(store);
	return rc;
}
