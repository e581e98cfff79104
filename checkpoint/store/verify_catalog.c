/* The catalogue, checked against itself and against the manifests. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "checkpoint/store/verify.h"
#include "checkpoint/store/store_internal.h"

static int check_file_locked(struct store *store, char what[512], struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "PRAGMA integrity_check(1)", &s, err);

	if (rc)
		return rc;
	rc = catalog_step_locked(store, s, err);
	if (rc == 1) {
		char text[400];

		catalog_text(s, 0, text, sizeof(text));
		if (strcmp(text, "ok"))
			snprintf(what, 512, "catalog.db: %.400s", text);
		rc = 0;
	}
	sqlite3_finalize(s);
	return rc;
}

/* Names in the schema are text to SQLite's own check, whatever they are. */
static int check_columns_locked(struct store *store, struct err *err)
{
	static const char *const queries[] = {
		"SELECT name, uuid, at, pid, state, memory_bytes, cpus, started_wall_ns, config_path, config_text, note FROM vms",
		"SELECT tag, checkpoint FROM tags",
		"SELECT number, id, kind FROM layers",
		"SELECT layer, checkpoint FROM refs",
		"SELECT path FROM images",
		"SELECT vm, type, name, guest, host FROM resources",
		"SELECT type, host, exclusive, refs FROM hosts",
		"SELECT checkpoint, rules FROM templates",
		"SELECT id, members, state, begun_wall_ns FROM groups",
	};
	int rc = 0;

	for (size_t i = 0; !rc && i < ARRAY_LENGTH(queries); i++) {
		sqlite3_stmt *s;

		rc = catalog_prepare_locked(store, queries[i], &s, err);
		if (!rc)
			sqlite3_finalize(s);
	}
	return rc;
}

static int check_resources_locked(struct store *store, char what[512], struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store,
					"SELECT type, host FROM hosts h WHERE refs != (SELECT COUNT(*) FROM resources r WHERE r.type = h.type AND r.host = h.host)"
					" UNION ALL SELECT type, host FROM resources r WHERE host != '' AND NOT EXISTS"
					" (SELECT 1 FROM hosts h WHERE h.type = r.type AND h.host = r.host) LIMIT 1",
					&s, err);

	if (rc)
		return rc;
	rc = catalog_step_locked(store, s, err);
	if (rc == 1) {
		char type[32], host[300];

		catalog_text(s, 0, type, sizeof(type));
		catalog_text(s, 1, host, sizeof(host));
		snprintf(what, 512, "catalog.db: it is counted wrongly who has %s %s", type, host);
		rc = 0;
	}
	sqlite3_finalize(s);
	return rc;
}

/* What can be compared: a parent may have moved up since. */
static bool agree(const struct store_checkpoint *a, const struct store_checkpoint *b)
{
	const char *one = a->message ? a->message : "", *other = b->message ? b->message : "";

	return !strcmp(a->vm, b->vm) && !strcmp(a->vm_uuid, b->vm_uuid) && !strcmp(one, other) && a->created_wall_ns == b->created_wall_ns &&
	       a->live == b->live && !strcmp(a->group.id, b->group.id) && a->periodic == b->periodic && a->cpus == b->cpus && a->memory_bytes == b->memory_bytes &&
	       a->saved_pages == b->saved_pages && a->zero_pages == b->zero_pages && a->parent_pages == b->parent_pages &&
	       a->written_bytes == b->written_bytes && a->pause_ns == b->pause_ns && a->durable_ns == b->durable_ns &&
	       a->size_bytes == b->size_bytes && !strcmp(a->memory_layer, b->memory_layer);
}

int store_verify_catalog(struct store *store, char what[512], struct err *err)
{
	struct store_checkpoint *list;
	size_t count;

	what[0] = '\0';
	pthread_mutex_lock(&store->lock);
	int rc = check_file_locked(store, what, err);
	if (!rc && !what[0])
		rc = check_columns_locked(store, err);
	if (!rc && !what[0])
		rc = check_resources_locked(store, what, err);
	pthread_mutex_unlock(&store->lock);
	if (rc || what[0])
		return rc;
	rc = store_checkpoint_list(store, NULL, &list, &count, err);
	for (size_t i = 0; !rc && i < count; i++) {
		struct store_checkpoint c;

		/* One that went away, or cannot be read, is not the catalogue's fault. */
		if (!what[0] && store_read_manifest(store, list[i].id, &c, NULL) == 0) {
			if (!agree(&list[i], &c))
				snprintf(what, 512, "catalog.db: what it says of checkpoint %.8s is not what the manifest says", list[i].id);
			store_checkpoint_free(&c);
		}
		store_checkpoint_free(&list[i]);
	}
	if (!rc)
		free(list);
	return rc;
}
