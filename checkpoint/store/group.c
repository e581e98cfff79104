/*
 * Groups, in the catalogue's table `groups`: a row that is 'open' until the one transaction that makes it 'committed'. No row is as good as a row that
 * was given up, so whoever wants to know what became of a group takes an open row away first.
 */
#include "checkpoint/store/group.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/store/store_internal.h"

/* Runs a statement about the group `id`; how many rows it changed, or -errno. */
static int change_locked(struct store *store, const char *sql, const char *id, const char *text, struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, sql, &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
	if (sqlite3_bind_parameter_count(s) > 1)
		sqlite3_bind_text(s, 2, text, -1, SQLITE_STATIC);
	if (sqlite3_bind_parameter_count(s) > 2)
		sqlite3_bind_int64(s, 3, (sqlite3_int64)clock_wall_ns());
	rc = catalog_step_locked(store, s, err);
	sqlite3_finalize(s);
	return rc < 0 ? rc : sqlite3_changes(store->db);
}

int store_group_begin(struct store *store, const char *tag, char id[STORE_ID_BYTES], struct err *err)
{
	int rc = tag ? catalog_check_tag(store, tag, err) : 0;

	if (rc)
		return rc;
	store_new_id(id);
	pthread_mutex_lock(&store->lock);
	rc = change_locked(store, "INSERT INTO groups(id, members, state, begun_wall_ns) VALUES(?1, ?2, 'open', ?3)", id, "", err);
	pthread_mutex_unlock(&store->lock);
	return rc < 0 ? rc : 0;
}

static int given_up(const char *id, struct err *err)
{
	return err_set(err, ERR_FAILED, ECANCELED, "group %.8s: it was given up", id);
}

int store_group_commit(struct store *store, const char *id, const char *tag, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = catalog_begin_locked(store, err);

	if (!rc) {
		rc = change_locked(store, "UPDATE groups SET state = 'committed' WHERE id = ?1 AND state = 'open'", id, NULL, err);
		rc = rc < 0 ? rc : rc ? 0 : given_up(id, err);
		if (!rc && tag)
			rc = catalog_enter_tag_locked(store, id, tag, err);
		rc = catalog_end_locked(store, rc, FAULT_GROUP_BEFORE_COMMIT, err);
	}
	pthread_mutex_unlock(&store->lock);
	struct err ignored = ERR_INIT;
	if (!rc)
		fault_check(FAULT_GROUP_COMMITTED, &ignored);
	return rc;
}

/* 1: it is committed, 0: it is not, -errno. */
static int is_committed_locked(struct store *store, const char *id, struct err *err)
{
	char found[STORE_ID_BYTES];

	return catalog_find_locked(store, "SELECT id FROM groups WHERE id = ?1 AND state = 'committed'", id, 0, found, err);
}

int store_group_settle(struct store *store, const char *id, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = change_locked(store, "DELETE FROM groups WHERE id = ?1 AND state = 'open'", id, NULL, err);

	if (rc >= 0)
		rc = is_committed_locked(store, id, err);
	pthread_mutex_unlock(&store->lock);
	return rc < 0 ? rc : rc ? 0 : given_up(id, err);
}

int group_enter_locked(struct store *store, const struct store_checkpoint *c, struct err *err)
{
	if (!c->group.id[0])
		return 0;
	int rc = change_locked(store,
			       "INSERT INTO groups(id, members, state, begun_wall_ns) VALUES(?1, ?2, 'committed', ?3)"
			       " ON CONFLICT(id) DO UPDATE SET members = excluded.members, state = 'committed'",
			       c->group.id, c->group.members ? c->group.members : "", err);
	/* A tag that names something else by now stays there. */
	if (rc >= 0 && c->group.tag[0] && catalog_enter_tag_locked(store, c->group.id, c->group.tag, NULL) == -EEXIST)
		rc = 0;
	return rc < 0 ? rc : 0;
}

int group_forget_locked(struct store *store, const char *id, struct err *err)
{
	static const char *const statements[] = {
		"DELETE FROM tags WHERE checkpoint = ?1 AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE group_id = ?1)",
		"DELETE FROM groups WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE group_id = ?1)",
	};
	int rc = 0;

	for (unsigned i = 0; rc >= 0 && *id && i < 2; i++)
		rc = change_locked(store, statements[i], id, NULL, err);
	return rc < 0 ? rc : 0;
}

void group_collect(struct store *store)
{
	pthread_mutex_lock(&store->lock);
	catalog_run_locked(store, "DELETE FROM groups WHERE state = 'open' AND begun_wall_ns < (strftime('%s', 'now') - 86400) * 1000000000", NULL);
	pthread_mutex_unlock(&store->lock);
}

/* --- finding --- */

int store_group_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], struct err *err)
{
	static const char known[] = "SELECT id FROM groups g WHERE EXISTS (SELECT 1 FROM checkpoints WHERE group_id = g.id) AND ";
	char sql[300];

	id[0] = '\0';
	pthread_mutex_lock(&store->lock);
	snprintf(sql, sizeof(sql), "%sid = ?1", known);
	int rc = catalog_find_locked(store, sql, reference, 0, id, err);
	snprintf(sql, sizeof(sql), "%sid = (SELECT checkpoint FROM tags WHERE tag = ?1)", known);
	if (rc == 0)
		rc = catalog_find_locked(store, sql, reference, 0, id, err);
	snprintf(sql, sizeof(sql), "%sid >= ?1 AND id < ?1 || 'g'", known);
	if (rc == 0 && catalog_is_prefix(reference))
		rc = catalog_find_locked(store, sql, reference, 0, id, err);
	pthread_mutex_unlock(&store->lock);
	if (rc == 1)
		return 0;
	if (rc == 2) {
		err_set(err, ERR_USAGE, EINVAL, "group '%s': more than one id begins so", reference);
		return err_hint(err, "give more digits");
	}
	return rc < 0 ? rc : err_set(err, ERR_NOT_FOUND, ENOENT, "group '%s': there is none", reference);
}

/* In the order in which they were named. */
static void read_members(struct store_group *group, const char *names)
{
	while (*names && group->count < STORE_GROUP_MAX) {
		size_t length = strcspn(names, " ");

		snprintf(group->members[group->count++].vm, STORE_NAME_BYTES, "%.*s", (int)length, names);
		names += length;
		names += strspn(names, " ");
	}
}

static void note_checkpoint(struct store_group *group, const char *vm, const char *checkpoint)
{
	for (unsigned i = 0; i < group->count; i++)
		if (!strcmp(group->members[i].vm, vm) && !group->members[i].checkpoint[0]) {
			snprintf(group->members[i].checkpoint, STORE_ID_BYTES, "%s", checkpoint);
			group->there++;
			return;
		}
}

static int read_checkpoints_locked(struct store *store, struct store_group *out, struct err *err)
{
	char vm[STORE_NAME_BYTES], id[STORE_ID_BYTES];
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, "SELECT vm, id, created_wall_ns FROM checkpoints WHERE group_id = ? ORDER BY created_wall_ns", &s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, out->id, -1, SQLITE_STATIC);
	while ((rc = catalog_step_locked(store, s, err)) == 1) {
		catalog_text(s, 0, vm, sizeof(vm));
		catalog_text(s, 1, id, sizeof(id));
		out->created_wall_ns = (uint64_t)sqlite3_column_int64(s, 2);
		note_checkpoint(out, vm, id);
	}
	sqlite3_finalize(s);
	return rc;
}

int store_group_get(struct store *store, const char *id, struct store_group *out, struct err *err)
{
	sqlite3_stmt *s;

	*out = (struct store_group){0};
	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(
		store, "SELECT id, members, (SELECT tag FROM tags WHERE checkpoint = groups.id) FROM groups WHERE id = ? AND state = 'committed'", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		if (rc == 1) {
			const char *names = (const char *)sqlite3_column_text(s, 1);

			catalog_text(s, 0, out->id, sizeof(out->id));
			catalog_text(s, 2, out->tag, sizeof(out->tag));
			read_members(out, names ? names : "");
		}
		sqlite3_finalize(s);
	}
	if (rc == 1)
		rc = read_checkpoints_locked(store, out, err);
	else if (rc == 0)
		rc = err_set(err, ERR_NOT_FOUND, ENOENT, "group %.8s: there is none", id);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_group_check_whole(const struct store_group *group, struct err *err)
{
	char missing[200] = "";

	if (group->there == group->count)
		return 0;
	for (unsigned i = 0; i < group->count; i++)
		if (!group->members[i].checkpoint[0]) {
			size_t used = strlen(missing);

			snprintf(missing + used, sizeof(missing) - used, "%s%s", used ? ", " : "", group->members[i].vm);
		}
	err_set(err, ERR_STATE, EINVAL, "group %.8s: is not whole any more: of %s there is no checkpoint", group->id, missing);
	return err_hint(err, "each of the others is whole for itself: name it by its own id");
}
