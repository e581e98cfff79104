/*
 * The catalogue: an SQLite database in WAL mode that answers what exists without reading manifests. It can be made anew from them, so most
 * of its transactions need not wait for the disk (synchronous = NORMAL); a commit and a tag do (FULL).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/store/store_internal.h"

#define BUSY_MS	       10000
#define SCHEMA_VERSION 4
#define SET_WAL	       "PRAGMA journal_mode = WAL"

/* What version 1 had; `refs` has another shape since. */
static const char tables[] =
	"CREATE TABLE IF NOT EXISTS vms(name TEXT PRIMARY KEY, uuid TEXT NOT NULL, at TEXT NOT NULL, pid INTEGER NOT "
	"NULL, state TEXT NOT NULL,"
	" memory_bytes INTEGER NOT NULL, cpus INTEGER NOT NULL, started_wall_ns INTEGER NOT NULL, config_path TEXT NOT "
	"NULL,"
	" config_text TEXT NOT NULL) WITHOUT ROWID;"
	"CREATE TABLE IF NOT EXISTS checkpoints(seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, parent TEXT NOT "
	"NULL, vm TEXT NOT NULL,"
	" vm_uuid TEXT NOT NULL, message TEXT NOT NULL, created_wall_ns INTEGER NOT NULL, live INTEGER NOT NULL, cpus "
	"INTEGER NOT NULL,"
	" memory_bytes INTEGER NOT NULL, saved_pages INTEGER NOT NULL, zero_pages INTEGER NOT NULL, parent_pages "
	"INTEGER NOT NULL,"
	" written_bytes INTEGER NOT NULL, pause_ns INTEGER NOT NULL, durable_ns INTEGER NOT NULL, size_bytes INTEGER "
	"NOT NULL,"
	" memory_layer TEXT NOT NULL);"
	"CREATE INDEX IF NOT EXISTS checkpoints_vm ON checkpoints(vm, created_wall_ns);"
	"CREATE TABLE IF NOT EXISTS tags(tag TEXT PRIMARY KEY, checkpoint TEXT NOT NULL) WITHOUT ROWID;"
	"CREATE INDEX IF NOT EXISTS tags_checkpoint ON tags(checkpoint);";

/* Layers have numbers here, as a checkpoint may refer to hundreds. */
static const char tables_since_2[] =
	"DROP TABLE IF EXISTS refs;"
	"ALTER TABLE vms ADD COLUMN note TEXT NOT NULL DEFAULT '';"
	"ALTER TABLE checkpoints ADD COLUMN periodic INTEGER NOT NULL DEFAULT 0;"
	"CREATE INDEX checkpoints_parent ON checkpoints(parent);"
	"CREATE INDEX checkpoints_memory_layer ON checkpoints(memory_layer);"
	"CREATE INDEX checkpoints_periodic ON checkpoints(vm, created_wall_ns) WHERE periodic;"
	"CREATE TABLE layers(number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL);"
	"CREATE TABLE refs(layer INTEGER NOT NULL, checkpoint INTEGER NOT NULL, PRIMARY KEY(layer, checkpoint)) "
	"WITHOUT ROWID;"
	"CREATE INDEX refs_checkpoint ON refs(checkpoint);"
	"CREATE TABLE images(path TEXT PRIMARY KEY) WITHOUT ROWID;";

/* resources.c */
static const char tables_since_3[] =
	"CREATE TABLE resources(vm TEXT NOT NULL, type TEXT NOT NULL, name TEXT NOT NULL, guest TEXT NOT NULL, host TEXT NOT NULL,"
	" PRIMARY KEY(vm, type, name)) WITHOUT ROWID;"
	"CREATE INDEX resources_host ON resources(type, host);"
	"CREATE TABLE hosts(type TEXT NOT NULL, host TEXT NOT NULL, exclusive INTEGER NOT NULL, refs INTEGER NOT NULL, PRIMARY KEY(type, host)) "
	"WITHOUT ROWID;"
	"CREATE INDEX hosts_unused ON hosts(refs) WHERE refs = 0;"
	"CREATE TABLE templates(checkpoint TEXT PRIMARY KEY, rules TEXT NOT NULL) WITHOUT ROWID;";

/* group.c */
static const char tables_since_4[] =
	"ALTER TABLE checkpoints ADD COLUMN group_id TEXT NOT NULL DEFAULT '';"
	"CREATE INDEX checkpoints_group ON checkpoints(group_id) WHERE group_id <> '';"
	"CREATE TABLE groups(id TEXT PRIMARY KEY, members TEXT NOT NULL, state TEXT NOT NULL, begun_wall_ns INTEGER NOT NULL) WITHOUT ROWID;";

int catalog_error_locked(struct store *store, const char *what, struct err *err)
{
	int code = sqlite3_errcode(store->db);
	int number = code == SQLITE_BUSY ? EBUSY : code == SQLITE_FULL ? ENOSPC : EIO;

	/* ERROR: our statements are right, so the tables are not what they must be. */
	bool damaged = code == SQLITE_CORRUPT || code == SQLITE_NOTADB || code == SQLITE_ERROR;
	err_set(err, damaged ? ERR_DAMAGED : ERR_FAILED, number, "%s/catalog.db: %s: %s", store->path, what, sqlite3_errmsg(store->db));
	if (damaged)
		err_hint(err, "`vmcp gc --rebuild` makes it anew from the checkpoints");
	if (number == ENOSPC)
		err_hint(err, "free space on that filesystem");
	return -number;
}

int catalog_run_locked(struct store *store, const char *sql, struct err *err)
{
	return sqlite3_exec(store->db, sql, NULL, NULL, NULL) == SQLITE_OK ? 0
									   : catalog_error_locked(store, "write", err);
}

int catalog_begin_locked(struct store *store, struct err *err)
{
	int rc = catalog_run_locked(store, "PRAGMA synchronous = FULL; BEGIN IMMEDIATE", err);

	if (rc)
		catalog_run_locked(store, "PRAGMA synchronous = NORMAL", NULL);
	return rc;
}

int catalog_end_locked(struct store *store, int rc, enum fault_point point, struct err *err)
{
	if (!rc)
		rc = fault_check(point, err);
	if (!rc)
		rc = catalog_run_locked(store, "COMMIT", err);
	if (rc)
		catalog_run_locked(store, "ROLLBACK", NULL);
	catalog_run_locked(store, "PRAGMA synchronous = NORMAL", NULL);
	return rc;
}

int catalog_prepare_locked(struct store *store, const char *sql, sqlite3_stmt **out, struct err *err)
{
	return sqlite3_prepare_v2(store->db, sql, -1, out, NULL) == SQLITE_OK
		       ? 0
		       : catalog_error_locked(store, "read", err);
}

int catalog_step_locked(struct store *store, sqlite3_stmt *statement, struct err *err)
{
	switch (sqlite3_step(statement)) {
	case SQLITE_ROW:
		return 1;
	case SQLITE_DONE:
		return 0;
	default:
		return catalog_error_locked(store, "read", err);
	}
}

void catalog_text(sqlite3_stmt *statement, int column, char *out, size_t size)
{
	const unsigned char *text = sqlite3_column_text(statement, column);

	snprintf(out, size, "%s", text ? (const char *)text : "");
}

/* The switch to WAL reports BUSY at once, whatever the timeout, where several processes are the first to open a new store. */
static int set_wal(struct store *store, struct err *err)
{
	const struct timespec moment = {.tv_nsec = 2000000};
	uint64_t end = clock_now_ns() + BUSY_MS * 1000000ull;

	while (catalog_run_locked(store, SET_WAL, NULL) == -EBUSY && clock_now_ns() < end)
		nanosleep(&moment, NULL);
	return catalog_run_locked(store, SET_WAL, err);
}

static int read_version(struct store *store, int *version, struct err *err)
{
	sqlite3_stmt *statement;
	int rc = catalog_prepare_locked(store, "PRAGMA user_version", &statement, err);

	if (rc)
		return rc;
	rc = catalog_step_locked(store, statement, err);
	*version = rc == 1 ? sqlite3_column_int(statement, 0) : 0;
	sqlite3_finalize(statement);
	if (rc < 0 || *version <= SCHEMA_VERSION)
		return rc < 0 ? rc : 0;
	err_set(err, ERR_FAILED, ENOTSUP, "%s/catalog.db: version %d is newer than this vmcp knows (%d)", store->path, *version,
		SCHEMA_VERSION);
	err_hint(err, "use the newer vmcp that wrote it");
	return -ENOTSUP;
}

/* Makes the tables what they are today, and fills them from the manifests and indices. Nobody else is in between. */
static int upgrade(struct store *store, struct err *err)
{
	char set_version[64];
	int version, rc = catalog_begin_locked(store, err);

	if (rc)
		return rc;
	rc = read_version(store, &version, err); /* another process may have been faster */
	if (!rc && version < 1)
		rc = catalog_run_locked(store, tables, err);
	if (!rc && version < 2)
		rc = catalog_run_locked(store, tables_since_2, err);
	if (!rc && version < 3)
		rc = catalog_run_locked(store, tables_since_3, err);
	if (!rc && version < 4)
		rc = catalog_run_locked(store, tables_since_4, err);
	if (!rc && version < 2)
		rc = catalog_fill_locked(store, err);
	snprintf(set_version, sizeof(set_version), "PRAGMA user_version = %d", SCHEMA_VERSION);
	if (!rc)
		rc = catalog_run_locked(store, set_version, err);
	return catalog_end_locked(store, rc, FAULT_STORE_BEFORE_UPGRADE_COMMIT, err);
}

static int open_file(struct store *store, const char *name, struct err *err)
{
	char *path = xasprintf("%s/%s", store->path, name);
	int rc = sqlite3_open_v2(path, &store->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, NULL);

	free(path);
	if (rc != SQLITE_OK)
		return catalog_error_locked(store, "open", err);
	sqlite3_busy_timeout(store->db, BUSY_MS);
	return 0;
}

int catalog_make(struct store *store, const char *name, struct err *err)
{
	int rc = open_file(store, name, err);

	return rc ? rc : upgrade(store, err);
}

int catalog_open(struct store *store, struct err *err)
{
	int version, rc = open_file(store, "catalog.db", err);

	if (!rc)
		rc = set_wal(store, err);
	if (!rc)
		rc = catalog_run_locked(store, "PRAGMA synchronous = NORMAL", err);
	if (!rc)
		rc = read_version(store, &version, err);
	return rc || version == SCHEMA_VERSION ? rc : upgrade(store, err);
}

void catalog_close(struct store *store)
{
	sqlite3_close(store->db);
	store->db = NULL;
}

void catalog_leave_log(struct store *store) { sqlite3_db_config(store->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL); }

/* --- checkpoints --- */

static int enter_row(struct store *store, const struct store_checkpoint *c, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(
		store,
		"INSERT OR IGNORE INTO checkpoints(id, parent, vm, vm_uuid, message, created_wall_ns, live, cpus,"
		" memory_bytes, saved_pages, zero_pages, parent_pages, written_bytes, pause_ns, durable_ns,"
		" size_bytes, memory_layer, periodic, group_id) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
		&s, err);
	if (rc)
		return rc;
	const char *texts[] = {c->id, c->parent, c->vm, c->vm_uuid, c->message ? c->message : ""};
	const uint64_t numbers[] = {c->created_wall_ns, c->live,       c->cpus,		c->memory_bytes,
				    c->saved_pages,	c->zero_pages, c->parent_pages, c->written_bytes,
				    c->pause_ns,	c->durable_ns, c->size_bytes};
	for (int i = 0; i < (int)ARRAY_LENGTH(texts); i++)
		sqlite3_bind_text(s, 1 + i, texts[i], -1, SQLITE_STATIC);
	for (int i = 0; i < (int)ARRAY_LENGTH(numbers); i++)
		sqlite3_bind_int64(s, 6 + i, (sqlite3_int64)numbers[i]);
	sqlite3_bind_text(s, 17, c->memory_layer, -1, SQLITE_STATIC);
	sqlite3_bind_int(s, 18, c->periodic);
	sqlite3_bind_text(s, 19, c->group.id, -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc;
}

int catalog_enter_tag_locked(struct store *store, const char *id, const char *tag, struct err *err)
{
	char other[STORE_ID_BYTES] = "";
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "INSERT OR IGNORE INTO tags VALUES(?, ?)", &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, tag, -1, SQLITE_STATIC);
	sqlite3_bind_text(s, 2, id, -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	if (!rc)
		rc = catalog_prepare_locked(store, "SELECT checkpoint FROM tags WHERE tag = ?", &s, err);
	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, tag, -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	if (rc == 1)
		catalog_text(s, 0, other, sizeof(other));
	sqlite3_finalize(s);
	if (rc < 0 || !strcmp(other, id))
		return rc < 0 ? rc : 0;
	return catalog_tag_is_taken(tag, other, err);
}

static int set_position_locked(struct store *store, const char *vm, const char *id, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "UPDATE vms SET at = ? WHERE name = ?", &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
	sqlite3_bind_text(s, 2, vm, -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc;
}

/* A VM that was started after the checkpoint was taken stands elsewhere, even where it is at the same parent (none). */
static int follow_locked(struct store *store, const struct store_checkpoint *c, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(
		store, "UPDATE vms SET at = ?1 WHERE name = ?2 AND uuid = ?3 AND at = ?4 AND started_wall_ns <= ?5", &s,
		err);

	if (rc)
		return rc;
	const char *texts[] = {c->id, c->vm, c->vm_uuid, c->parent};
	for (int i = 0; i < (int)ARRAY_LENGTH(texts); i++)
		sqlite3_bind_text(s, 1 + i, texts[i], -1, SQLITE_STATIC);
	sqlite3_bind_int64(s, 5, (sqlite3_int64)c->created_wall_ns);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc;
}

/* A VM that came here with a checkpoint, and never ran here, stands at what came last. */
static int make_vm_locked(struct store *store, const struct store_checkpoint *c, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store,
					"INSERT INTO vms(name, uuid, at, pid, state, memory_bytes, cpus, started_wall_ns, config_path, config_text)"
					" VALUES(?1, ?2, ?3, 0, 'stopped', ?4, ?5, 0, '', ?6)"
					" ON CONFLICT(name) DO UPDATE SET at = excluded.at, config_text = excluded.config_text"
					" WHERE started_wall_ns = 0",
					&s, err);
	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, c->vm, -1, SQLITE_STATIC);
	sqlite3_bind_text(s, 2, c->vm_uuid, -1, SQLITE_STATIC);
	sqlite3_bind_text(s, 3, c->id, -1, SQLITE_STATIC);
	sqlite3_bind_int64(s, 4, (sqlite3_int64)c->memory_bytes);
	sqlite3_bind_int64(s, 5, c->cpus);
	sqlite3_bind_text(s, 6, c->config_text ? c->config_text : "", -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc < 0 ? rc : 0;
}

int catalog_enter_inside_locked(struct store *store, const struct store_checkpoint *c, const struct store_layers *layers,
				enum catalog_position position, struct err *err)
{
	int rc = enter_row(store, c, err);

	if (!rc)
		rc = refs_enter_locked(store, c, layers, err);
	if (!rc && c->tag[0])
		rc = catalog_enter_tag_locked(store, c->id, c->tag, err);
	if (!rc)
		rc = group_enter_locked(store, c, err);
	if (!rc && position == CATALOG_VM_MOVES)
		rc = set_position_locked(store, c->vm, c->id, err);
	if (!rc && position == CATALOG_VM_MADE)
		rc = make_vm_locked(store, c, err);
	if (!rc && position == CATALOG_VM_MOVES_IF_AT_PARENT)
		rc = follow_locked(store, c, err);
	return rc;
}

int catalog_enter_locked(struct store *store, const struct store_checkpoint *c, const struct store_layers *layers,
			 enum catalog_position position, struct err *err)
{
	int rc = catalog_begin_locked(store, err);

	return rc ? rc : catalog_end_locked(store, catalog_enter_inside_locked(store, c, layers, position, err), FAULT_STORE_BEFORE_CATALOG_COMMIT, err);
}

int store_vm_set_position(struct store *store, const char *name, const char *checkpoint_id, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = set_position_locked(store, name, checkpoint_id, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

static void read_row(sqlite3_stmt *s, struct store_checkpoint *c)
{
	catalog_text(s, 0, c->id, sizeof(c->id));
	catalog_text(s, 1, c->parent, sizeof(c->parent));
	catalog_text(s, 2, c->vm, sizeof(c->vm));
	catalog_text(s, 3, c->vm_uuid, sizeof(c->vm_uuid));
	const char *message = (const char *)sqlite3_column_text(s, 4);
	c->message = message && *message ? xstrdup(message) : NULL;
	c->created_wall_ns = (uint64_t)sqlite3_column_int64(s, 5);
	c->live = sqlite3_column_int(s, 6);
	c->cpus = (uint32_t)sqlite3_column_int(s, 7);
	uint64_t *numbers[] = {&c->memory_bytes,  &c->saved_pages, &c->zero_pages, &c->parent_pages,
			       &c->written_bytes, &c->pause_ns,	   &c->durable_ns, &c->size_bytes};
	for (int i = 0; i < (int)ARRAY_LENGTH(numbers); i++)
		*numbers[i] = (uint64_t)sqlite3_column_int64(s, 8 + i);
	catalog_text(s, 16, c->memory_layer, sizeof(c->memory_layer));
	catalog_text(s, 17, c->tag, sizeof(c->tag));
	c->periodic = sqlite3_column_int(s, 18);
	catalog_text(s, 19, c->group.id, sizeof(c->group.id));
}

int store_checkpoint_list(struct store *store, const char *vm, struct store_checkpoint **list, size_t *count,
			  struct err *err)
{
	size_t capacity = 0;
	sqlite3_stmt *s;

	*list = NULL;
	*count = 0;
	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(
		store,
		"SELECT id, parent, vm, vm_uuid, message, created_wall_ns, live, cpus, memory_bytes, saved_pages,"
		" zero_pages, parent_pages, written_bytes, pause_ns, durable_ns, size_bytes, memory_layer,"
		" (SELECT tag FROM tags WHERE checkpoint = checkpoints.id), periodic, group_id FROM checkpoints"
		" WHERE ?1 IS NULL OR vm = ?1 ORDER BY created_wall_ns, seq",
		&s, err);
	if (rc)
		goto out;
	sqlite3_bind_text(s, 1, vm, -1, SQLITE_STATIC);
	while ((rc = catalog_step_locked(store, s, err)) == 1) {
		if (*count == capacity) {
			capacity = capacity ? capacity * 2 : 64;
			struct store_checkpoint *grown = realloc(*list, capacity * sizeof(**list));

			if (!grown) {
				rc = err_sys(err, ENOMEM, "list of checkpoints");
				break;
			}
			*list = grown;
		}
		(*list)[*count] = (struct store_checkpoint){0};
		read_row(s, &(*list)[(*count)++]);
	}
	sqlite3_finalize(s);
	if (rc) {
		for (size_t i = 0; i < *count; i++)
			store_checkpoint_free(&(*list)[i]);
		free(*list);
		*list = NULL;
		*count = 0;
	}
out:
	pthread_mutex_unlock(&store->lock);
	return rc;
}
