/* What checkpoints are called: ids and their beginnings, tags, VM and VM~N. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/nearest.h"
#include "checkpoint/store/store_internal.h"

#define PREFIX_DIGITS 4

int catalog_find_locked(struct store *store, const char *sql, const char *text, int64_t number, char id[STORE_ID_BYTES],
			struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, sql, &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, text, -1, SQLITE_STATIC);
	if (sqlite3_bind_parameter_count(s) > 1)
		sqlite3_bind_int64(s, 2, number);
	rc = catalog_step_locked(store, s, err);
	if (rc == 1) {
		catalog_text(s, 0, id, STORE_ID_BYTES);
		rc = catalog_step_locked(store, s, err);
		rc = rc < 0 ? rc : rc + 1;
	}
	sqlite3_finalize(s);
	return rc;
}

static int find_newest_locked(struct store *store, const char *reference, char id[STORE_ID_BYTES], struct err *err)
{
	const char *tilde = strchr(reference, '~');
	char name[STORE_NAME_BYTES];
	long back = 0;
	char *end;

	if (tilde) {
		back = strtol(tilde + 1, &end, 10);
		if (!isdigit((unsigned char)tilde[1]) || *end || back > 1000000000)
			return 0;
	}
	size_t length = tilde ? (size_t)(tilde - reference) : strlen(reference);
	if (length >= sizeof(name))
		return 0;
	memcpy(name, reference, length);
	name[length] = '\0';
	return catalog_find_locked(
		store,
		"SELECT id FROM checkpoints WHERE vm = ?1 ORDER BY created_wall_ns DESC, seq DESC LIMIT 1 OFFSET ?2",
		name, back, id, err);
}

/* Every name that the query lists. */
static void try_names_locked(struct store *store, const char *sql, struct nearest *nearest)
{
	char name[STORE_NAME_BYTES];
	sqlite3_stmt *s;

	if (catalog_prepare_locked(store, sql, &s, NULL))
		return;
	while (catalog_step_locked(store, s, NULL) == 1) {
		catalog_text(s, 0, name, sizeof(name));
		nearest_try(nearest, name);
	}
	sqlite3_finalize(s);
}

static int suggest_locked(struct store *store, const char *reference, struct err *err)
{
	const char *back = strchr(reference, '~');
	CLEANUP_FREE char *name = xasprintf("%.*s", (int)strcspn(reference, "~"), reference);
	struct nearest nearest = nearest_to(name);

	if (!back)
		try_names_locked(store, "SELECT tag FROM tags ORDER BY tag", &nearest);
	try_names_locked(store, "SELECT DISTINCT vm FROM checkpoints ORDER BY vm", &nearest);
	if (nearest.name[0])
		return err_hint(err, "did you mean '%s%s'?", nearest.name, back ? back : "");
	return err_hint(err, "`vmcp log` lists them; an id, 4 or more of its first digits, a tag, a VM's name or VM~N is meant");
}

static int not_found(struct store *store, const char *reference, struct err *err)
{
	CLEANUP_FREE char *vm = xasprintf("%.*s", (int)strcspn(reference, "~"), reference);
	char count[STORE_ID_BYTES] = "";

	err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint '%s': there is none", reference);
	if (!err)
		return -ENOENT;
	if (catalog_find_locked(store, "SELECT g.id FROM groups g LEFT JOIN tags t ON t.checkpoint = g.id WHERE g.id = ?1 OR t.tag = ?1", reference, 0, count,
				NULL) > 0)
		return err_hint(err, "it is a group: `vmcp show %s` lists its checkpoints", reference);
	catalog_find_locked(store, "SELECT COUNT(*) FROM checkpoints WHERE vm = ?1", vm, 0, count, NULL);
	long left = strtol(count, NULL, 10);
	if (left > 0 && strcmp(vm, reference) != 0)
		return err_hint(err, "the oldest of %s is %s~%ld", vm, vm, left - 1);
	if (catalog_find_locked(store, "SELECT name FROM vms WHERE name = ?1", vm, 0, count, NULL) == 1)
		return err_hint(err, "the VM %s has no checkpoint yet: take one with `vmcp checkpoint --live %s`", vm, vm);
	return suggest_locked(store, reference, err);
}

bool catalog_is_prefix(const char *text)
{
	return strlen(text) >= PREFIX_DIGITS && strlen(text) < STORE_ID_BYTES && strspn(text, "0123456789abcdef") == strlen(text);
}

int store_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], struct err *err)
{
	int rc;

	id[0] = '\0';
	pthread_mutex_lock(&store->lock);
	rc = catalog_find_locked(store, "SELECT id FROM checkpoints WHERE id = ?1", reference, 0, id, err);
	if (rc == 0)
		rc = catalog_find_locked(store, "SELECT c.id FROM tags t JOIN checkpoints c ON c.id = t.checkpoint WHERE t.tag = ?1", reference, 0, id, err);
	if (rc == 0)
		rc = find_newest_locked(store, reference, id, err);
	/* A prefix: from the reference up to its successor, by the index on id. */
	if (rc == 0 && catalog_is_prefix(reference))
		rc = catalog_find_locked(store, "SELECT id FROM checkpoints WHERE id >= ?1 AND id < ?1 || 'g'", reference, 0,
				 id, err);
	if (rc == 0)
		rc = not_found(store, reference, err);
	else if (rc == 2) {
		err_set(err, ERR_USAGE, EINVAL, "checkpoint '%s': more than one id begins so", reference);
		err_hint(err, "give more digits: see `vmcp log`");
		rc = -EINVAL;
	} else if (rc == 1)
		rc = 0;
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int catalog_find_tag(struct store *store, const char *tag, char id[STORE_ID_BYTES], struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = catalog_find_locked(store, "SELECT checkpoint FROM tags WHERE tag = ?1", tag, 0, id, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int catalog_tag_is_taken(const char *tag, const char *id, struct err *err)
{
	err_set(err, ERR_STATE, EEXIST, "tag '%s': it names %.8s already", tag, id);
	err_hint(err, "choose another tag");
	return -EEXIST; /* err may be NULL */
}

int catalog_check_tag(struct store *store, const char *tag, struct err *err)
{
	char id[STORE_ID_BYTES];
	int rc = catalog_find_tag(store, tag, id, err);

	return rc == 1 ? catalog_tag_is_taken(tag, id, err) : rc;
}

int store_tag(struct store *store, const char *id, const char *tag, struct err *err)
{
	char found[STORE_ID_BYTES];
	int rc = store_check_name("tag", tag, err);

	if (rc)
		return rc;
	pthread_mutex_lock(&store->lock);
	rc = catalog_find_locked(store, "SELECT id FROM checkpoints WHERE id = ?1 UNION SELECT id FROM groups WHERE id = ?1 AND state = 'committed'", id,
				 0, found, err);
	if (rc == 0)
		rc = not_found(store, id, err);
	else if (rc > 0)
		rc = fault_check(FAULT_STORE_TAGGING, err);
	if (!rc)
		rc = catalog_run_locked(store, "PRAGMA synchronous = FULL", err);
	if (!rc) {
		rc = catalog_enter_tag_locked(store, id, tag, err);
		catalog_run_locked(store, "PRAGMA synchronous = NORMAL", NULL);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_untag(struct store *store, const char *tag, struct err *err)
{
	sqlite3_stmt *s;
	int rc = store_check_name("tag", tag, err), changed = 0;

	if (rc)
		return rc;
	pthread_mutex_lock(&store->lock);
	rc = catalog_run_locked(store, "PRAGMA synchronous = FULL", err);
	if (!rc)
		rc = catalog_prepare_locked(store, "DELETE FROM tags WHERE tag = ?", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, tag, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		changed = rc ? 0 : sqlite3_changes(store->db);
		sqlite3_finalize(s);
	}
	catalog_run_locked(store, "PRAGMA synchronous = NORMAL", NULL);
	pthread_mutex_unlock(&store->lock);
	if (rc || changed)
		return rc;
	struct nearest nearest = nearest_to(tag);
	pthread_mutex_lock(&store->lock);
	try_names_locked(store, "SELECT tag FROM tags ORDER BY tag", &nearest);
	pthread_mutex_unlock(&store->lock);
	err_set(err, ERR_NOT_FOUND, ENOENT, "tag '%s': there is none", tag);
	return nearest.name[0] ? err_hint(err, "did you mean '%s'?", nearest.name) : err_hint(err, "`vmcp log` shows them all");
}

int store_count_tags(struct store *store, const char *id, uint64_t *count, char first[STORE_NAME_BYTES], struct err *err)
{
	sqlite3_stmt *s;

	*count = 0;
	first[0] = '\0';
	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, "SELECT COUNT(*), MIN(tag) FROM tags WHERE checkpoint = ?", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		if (rc == 1) {
			*count = (uint64_t)sqlite3_column_int64(s, 0);
			catalog_text(s, 1, first, STORE_NAME_BYTES);
			rc = 0;
		}
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}
