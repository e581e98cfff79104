/*
 * Which checkpoint needs which layers: the tables `layers` and `refs`. A layer has a row in `layers` if and only if some checkpoint's row in
 * `refs` names it. Every function works inside the caller's transaction.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "checkpoint/index.h"
#include "checkpoint/store/store_internal.h"

void layers_free(struct store_layers *layers)
{
	free(layers->names);
	*layers = (struct store_layers){0};
}

int layers_of_index(const void *index, size_t length, struct store_layers *out, struct err *err)
{
	const char *names;
	int rc = page_index_layers(index, length, &names, &out->count, err);

	out->names = NULL;
	if (rc) {
		out->count = 0;
		return rc;
	}
	out->names = xcalloc((size_t)out->count + 1, sizeof(*out->names));
	for (uint32_t i = 0; i < out->count; i++)
		memcpy(out->names[i], names + (size_t)i * (STORE_ID_BYTES - 1), STORE_ID_BYTES - 1);
	return 0;
}

/* Runs a prepared statement that gives no rows, and makes it ready for the next time. */
static int run_again(struct store *store, sqlite3_stmt *s, struct err *err)
{
	int rc = catalog_step_locked(store, s, err);

	sqlite3_reset(s);
	return rc < 0 ? rc : 0;
}

/* The two statements that enter one reference. */
struct entering {
	struct store *store;
	sqlite3_stmt *layer, *ref;
};

static int enter_one(struct entering *e, const char *layer, const char *kind, struct err *err)
{
	sqlite3_bind_text(e->layer, 1, layer, -1, SQLITE_STATIC);
	sqlite3_bind_text(e->layer, 2, kind, -1, SQLITE_STATIC);
	int rc = run_again(e->store, e->layer, err);
	if (rc)
		return rc;
	sqlite3_bind_text(e->ref, 1, layer, -1, SQLITE_STATIC);
	return run_again(e->store, e->ref, err);
}

int refs_enter_locked(struct store *store, const struct store_checkpoint *c, const struct store_layers *layers, struct err *err)
{
	struct entering e = {.store = store};
	int rc = catalog_prepare_locked(store, "INSERT OR IGNORE INTO layers(id, kind) VALUES(?, ?)", &e.layer, err);

	if (!rc)
		rc = catalog_prepare_locked(store,
					    "INSERT OR IGNORE INTO refs SELECT (SELECT number FROM layers WHERE id = ?1),"
					    " seq FROM checkpoints WHERE id = ?2",
					    &e.ref, err);
	if (!rc) {
		sqlite3_bind_text(e.ref, 2, c->id, -1, SQLITE_STATIC);
		rc = enter_one(&e, c->memory_layer, "mem", err);
	}
	for (uint32_t i = 0; !rc && i < layers->count; i++)
		rc = enter_one(&e, layers->names[i], "mem", err);
	for (uint32_t i = 0; !rc && i < c->disk_count; i++)
		rc = enter_one(&e, c->disks[i].layer, c->disks[i].format, err);
	sqlite3_finalize(e.layer);
	sqlite3_finalize(e.ref);
	return rc;
}

int refs_has_layer_locked(struct store *store, const char *layer, struct err *err)
{
	char found[STORE_ID_BYTES];

	return catalog_find_locked(store, "SELECT id FROM layers WHERE id = ?1", layer, 0, found, err);
}

/* --- forgetting --- */

/* One statement with up to two texts and one number, for what is done to the tables. */
static int run_with(struct store *store, const char *sql, const char *one, const char *two, int64_t number, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, sql, &s, err);

	if (rc)
		return rc;
	if (one)
		sqlite3_bind_text(s, 1, one, -1, SQLITE_STATIC);
	if (two)
		sqlite3_bind_text(s, 2, two, -1, SQLITE_STATIC);
	if (number)
		sqlite3_bind_int64(s, 3, number);
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc < 0 ? rc : 0;
}

static int add_dead(struct dead_layers *dead, sqlite3_stmt *s, struct err *err)
{
	struct dead_layer *grown = realloc(dead->list, (dead->count + 1) * sizeof(*grown));

	if (!grown)
		return err_sys(err, ENOMEM, "list of layers");
	dead->list = grown;
	catalog_text(s, 0, grown[dead->count].id, sizeof(grown->id));
	catalog_text(s, 1, grown[dead->count].kind, sizeof(grown->kind));
	dead->count++;
	return 0;
}

/* Layers that only this checkpoint names. */
static int find_dead(struct store *store, int64_t seq, struct dead_layers *dead, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store,
					"SELECT l.id, l.kind FROM refs r JOIN layers l ON l.number = r.layer WHERE r.checkpoint = ?1"
					" AND NOT EXISTS (SELECT 1 FROM refs o WHERE o.layer = r.layer AND o.checkpoint <> ?1)",
					&s, err);
	if (rc)
		return rc;
	sqlite3_bind_int64(s, 1, seq);
	while ((rc = catalog_step_locked(store, s, err)) == 1) {
		rc = add_dead(dead, s, err);
		if (rc)
			break;
	}
	sqlite3_finalize(s);
	return rc;
}

/* 1 and its number and nearest ancestor that is there ("" if none) and group, 0 if it is not known. */
static int find_checkpoint(struct store *store, const char *id, int64_t *seq, char parent[STORE_ID_BYTES], char group[STORE_ID_BYTES],
			   struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store,
					"SELECT seq, (SELECT p.id FROM checkpoints p WHERE p.id = c.parent), group_id FROM checkpoints c"
					" WHERE c.id = ?",
					&s, err);
	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
	rc = catalog_step_locked(store, s, err);
	if (rc == 1) {
		*seq = sqlite3_column_int64(s, 0);
		catalog_text(s, 1, parent, STORE_ID_BYTES);
		catalog_text(s, 2, group, STORE_ID_BYTES);
	}
	sqlite3_finalize(s);
	return rc;
}

int refs_forget_locked(struct store *store, const char *id, struct dead_layers *dead, struct err *err)
{
	char parent[STORE_ID_BYTES], group[STORE_ID_BYTES] = "";
	size_t first = dead->count;
	int64_t seq = 0;
	int rc = find_checkpoint(store, id, &seq, parent, group, err);

	if (rc <= 0)
		return rc;
	rc = run_with(store, "UPDATE checkpoints SET parent = ?1 WHERE parent = ?2", parent, id, 0, err);
	if (!rc)
		rc = run_with(store, "UPDATE vms SET at = ?1 WHERE at = ?2", parent, id, 0, err);
	if (!rc)
		rc = run_with(store, "DELETE FROM tags WHERE checkpoint = ?1", id, NULL, 0, err);
	if (!rc)
		rc = run_with(store, "DELETE FROM templates WHERE checkpoint = ?1", id, NULL, 0, err);
	if (!rc)
		rc = find_dead(store, seq, dead, err);
	if (!rc)
		rc = run_with(store, "DELETE FROM refs WHERE checkpoint = ?3", NULL, NULL, seq, err);
	for (size_t i = first; !rc && i < dead->count; i++)
		rc = run_with(store, "DELETE FROM layers WHERE id = ?1", dead->list[i].id, NULL, 0, err);
	if (!rc)
		rc = run_with(store, "DELETE FROM checkpoints WHERE seq = ?3", NULL, NULL, seq, err);
	if (!rc)
		rc = group_forget_locked(store, group, err);
	return rc ? rc : 1;
}
