/* See resources.h. hosts.refs is the number of rows of `resources` that name the host resource: both change in one transaction only. */
#include "checkpoint/store/resources.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/dead_sockets.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/store_internal.h"

#define UUID_TYPE "uuid"

void store_resource_free(struct store_resource *resource)
{
	free(resource->name);
	free(resource->guest);
	free(resource->host);
	*resource = (struct store_resource){0};
}

void store_resources_free_list(struct store_resource *list, size_t count)
{
	for (size_t i = 0; i < count; i++)
		store_resource_free(&list[i]);
	free(list);
}

struct store_resource *store_resources_add(struct store_resource **list, size_t *count, const char *type,
					   const char *name, const char *guest, const char *host, bool exclusive)
{
	if ((*count & (*count + 1)) == 0) { /* full at 0, 1, 3, 7 ... */
		struct store_resource *grown = xcalloc(2 * *count + 1, sizeof(*grown));

		if (*count)
			memcpy(grown, *list, *count * sizeof(*grown));
		free(*list);
		*list = grown;
	}
	struct store_resource *one = &(*list)[(*count)++];
	*one = (struct store_resource){
		.name = xstrdup(name), .guest = xstrdup(guest), .host = xstrdup(host), .exclusive = exclusive};
	snprintf(one->type, sizeof(one->type), "%s", type);
	return one;
}

/* --- statements --- */

/* Texts are bound to ?1, ?2, ... up to a NULL; the number to the next. 1: there is a row, whose first two columns are *value and `text` (either may be
 * NULL); 0: none, or it was no query; -errno. */
static int run_with(struct store *store, const char *sql, const char *const *texts, int64_t number, int64_t *value,
		    char text[STORE_NAME_BYTES], struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(store, sql, &s, err), n = 0;

	if (rc)
		return rc;
	for (; texts[n]; n++)
		sqlite3_bind_text(s, n + 1, texts[n], -1, SQLITE_STATIC);
	if (sqlite3_bind_parameter_count(s) > n)
		sqlite3_bind_int64(s, n + 1, number);
	rc = catalog_step_locked(store, s, err);
	if (rc == 1 && value)
		*value = sqlite3_column_int64(s, 0);
	if (rc == 1 && text)
		catalog_text(s, 1, text, STORE_NAME_BYTES);
	sqlite3_finalize(s);
	return rc;
}

#define TEXTS(...) ((const char *const[]){__VA_ARGS__, NULL})

/* --- who has what; inside the caller's transaction --- */

static int release_locked(struct store *store, const char *vm, struct err *err)
{
	int rc = run_with(store,
			  "UPDATE hosts SET refs = refs - (SELECT COUNT(*) FROM resources r WHERE r.vm = ?1 AND r.type "
			  "= hosts.type AND r.host = hosts.host)"
			  " WHERE (type, host) IN (SELECT type, host FROM resources WHERE vm = ?1)",
			  TEXTS(vm), 0, NULL, NULL, err);

	if (!rc)
		rc = run_with(store, "DELETE FROM hosts WHERE refs = 0", TEXTS(NULL), 0, NULL, NULL, err);
	return rc ? rc : run_with(store, "DELETE FROM resources WHERE vm = ?1", TEXTS(vm), 0, NULL, NULL, err);
}

/* 1: `owner` has the host resource, alone or among others; 0: nobody has. */
static int find_owner_locked(struct store *store, const struct store_resource *one, int64_t *exclusive,
			     char owner[STORE_NAME_BYTES], struct err *err)
{
	return run_with(store,
			"SELECT h.exclusive, (SELECT vm FROM resources r WHERE r.type = h.type AND r.host = h.host) "
			"FROM hosts h WHERE h.type = ?1 AND h.host = ?2",
			TEXTS(one->type, one->host), 0, exclusive, owner, err);
}

static int refuse(const struct store_resource *one, const char *owner, struct err *err)
{
	err_set(err, ERR_STATE, EBUSY, "%s %s: the VM %s has it", one->type, one->host, owner);
	return -EBUSY;
}

/* 0 if it can be had; what a dead VM still has is freed. */
static int make_room_locked(struct store *store, const char *vm, const struct store_resource *one, struct err *err)
{
	for (;;) {
		char owner[STORE_NAME_BYTES] = "";
		int64_t exclusive = 0;
		int rc = find_owner_locked(store, one, &exclusive, owner, err);

		if (rc <= 0)
			return rc;
		if (!exclusive && !one->exclusive)
			return 0;
		if (!strcmp(owner, vm) || store_vm_is_held(store, owner))
			return refuse(one, owner, err);
		rc = release_locked(store, owner, err);
		if (rc)
			return rc;
	}
}

static int enter_locked(struct store *store, const char *vm, const struct store_resource *one, struct err *err)
{
	int rc = one->host[0] ? run_with(store,
					 "INSERT INTO hosts(type, host, exclusive, refs) VALUES(?1, ?2, ?3, 1)"
					 " ON CONFLICT(type, host) DO UPDATE SET refs = refs + 1",
					 TEXTS(one->type, one->host), one->exclusive, NULL, NULL, err)
			      : 0;

	return rc ? rc
		  : run_with(store, "INSERT INTO resources(vm, type, name, guest, host) VALUES(?1, ?2, ?3, ?4, ?5)",
			     TEXTS(vm, one->type, one->name, one->guest, one->host), 0, NULL, NULL, err);
}

/* As it stands behind what `host` is. */
static char *pool_text(const struct store_resource *one, uint32_t number)
{
	return one->pool_of_ip ? xasprintf("%s%u.%u.%u.%u", one->host, number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255)
			       : xasprintf("%s%u", one->host, number);
}

/* The lowest number of the pool that can be had. */
static int choose_locked(struct store *store, const char *vm, struct store_resource *one, store_pool_free_fn *pool_free,
			 void *opaque, struct err *err)
{
	struct store_resource tried = *one;

	for (uint64_t number = one->pool_from; number <= one->pool_to; number++) {
		struct err busy = ERR_INIT;

		tried.host = pool_text(one, (uint32_t)number);
		int rc = make_room_locked(store, vm, &tried, &busy);
		if (!rc && (!pool_free || pool_free(opaque, one, (uint32_t)number))) {
			free(one->host);
			one->host = tried.host;
			return 0;
		}
		free(tried.host);
		if (rc && rc != -EBUSY) {
			if (err)
				*err = busy;
			return rc;
		}
	}
	CLEANUP_FREE char *from = pool_text(one, one->pool_from), *to = pool_text(one, one->pool_to);
	err_set(err, ERR_STATE, ENOSPC, "%s %s: none of %s to %s is free", one->type, one->name, from, to);
	return err_hint(err, "name a larger range, or end VMs that have them");
}

static int bind_locked(struct store *store, const char *vm, struct store_resource *list, size_t count,
		       store_pool_free_fn *pool_free, void *opaque, size_t *failed, struct err *err)
{
	int rc = release_locked(store, vm, err);

	for (size_t i = 0; !rc && i < count; i++) {
		if (failed)
			*failed = i;
		if (list[i].pool_from)
			rc = choose_locked(store, vm, &list[i], pool_free, opaque, err);
		else if (list[i].host[0])
			rc = make_room_locked(store, vm, &list[i], err);
		if (!rc)
			rc = enter_locked(store, vm, &list[i], err);
	}
	return rc;
}

/* --- transactions --- */

/* Not on the disk at once: what is lost with the machine is held by nobody then. */
static int begin_locked(struct store *store, struct err *err)
{
	return catalog_run_locked(store, "BEGIN IMMEDIATE", err);
}

int store_resources_bind(struct store *store, const char *vm, struct store_resource *list, size_t count,
			 store_pool_free_fn *pool_free, void *opaque, size_t *failed, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = begin_locked(store, err);
	if (!rc)
		rc = catalog_end_locked(store, bind_locked(store, vm, list, count, pool_free, opaque, failed, err), FAULT_RESOURCES_BIND, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_resources_free(struct store *store, const char *vm, struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = begin_locked(store, err);
	if (!rc)
		rc = catalog_end_locked(store, release_locked(store, vm, err), FAULT_RESOURCES_FREE, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

static int list_locked(struct store *store, const char *vm, struct store_resource **list, size_t *count,
		       struct err *err)
{
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(
		store,
		"SELECT r.vm, r.type, r.name, r.guest, r.host, h.exclusive, h.refs FROM resources r LEFT JOIN hosts h"
		" ON h.type = r.type AND h.host = r.host WHERE ?1 IS NULL OR r.vm = ?1 ORDER BY r.vm, r.type, r.name",
		&s, err);

	if (rc)
		return rc;
	sqlite3_bind_text(s, 1, vm, -1, SQLITE_STATIC);
	while ((rc = catalog_step_locked(store, s, err)) == 1) {
		char type[STORE_RESOURCE_TYPE_BYTES];

		catalog_text(s, 1, type, sizeof(type));
		struct store_resource *one =
			store_resources_add(list, count, type, (const char *)sqlite3_column_text(s, 2),
					    (const char *)sqlite3_column_text(s, 3),
					    (const char *)sqlite3_column_text(s, 4), sqlite3_column_int(s, 5));
		catalog_text(s, 0, one->vm, sizeof(one->vm));
		one->refs = (uint64_t)sqlite3_column_int64(s, 6);
	}
	sqlite3_finalize(s);
	return rc;
}

int store_resources_list(struct store *store, const char *vm, struct store_resource **list, size_t *count,
			 struct err *err)
{
	*list = NULL;
	*count = 0;
	pthread_mutex_lock(&store->lock);
	int rc = list_locked(store, vm, list, count, err);
	pthread_mutex_unlock(&store->lock);
	if (rc) {
		store_resources_free_list(*list, *count);
		*list = NULL;
		*count = 0;
	}
	return rc;
}

/* --- what is left of processes that were killed --- */

static bool is_held(void *store, const char *name) { return store_vm_is_held(store, name); }

/* Sockets of VMs, and of networks of mode group. A VM that starts opens none before its own transaction, and those of networks have a lock. */
static void remove_sockets_locked(struct store *store)
{
	dead_sockets_remove_below(store->vms_dir, is_held, store, false);
	CLEANUP_CLOSE int networks = file_open_dir(store->dir, "networks", 0, NULL);
	CLEANUP_CLOSE int lock = networks < 0 ? -1 : openat(networks, ".lock", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
	if (lock >= 0 && !store_try_lock(lock))
		dead_sockets_remove_below(networks, NULL, NULL, true);
}

static int collect_locked(struct store *store, uint64_t *freed, struct err *err)
{
	struct store_resource *list = NULL;
	size_t count = 0;
	int rc = list_locked(store, NULL, &list, &count, err);

	for (size_t i = 0; !rc && i < count; i++) {
		if (store_vm_is_held(store, list[i].vm))
			continue;
		++*freed;
		if (i + 1 == count || strcmp(list[i].vm, list[i + 1].vm))
			rc = release_locked(store, list[i].vm, err);
	}
	store_resources_free_list(list, count);
	if (!rc)
		remove_sockets_locked(store);
	return rc;
}

int store_resources_collect(struct store *store, uint64_t *freed, struct err *err)
{
	*freed = 0;
	pthread_mutex_lock(&store->lock);
	int rc = begin_locked(store, err);
	if (!rc)
		rc = catalog_end_locked(store, collect_locked(store, freed, err), FAULT_RESOURCES_FREE, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

/* --- uuids --- */

/* Version 4 (RFC 9562, 5.4). */
static void new_uuid(char out[37])
{
	uint8_t b[16];

	if (getrandom(b, sizeof(b), 0) != (ssize_t)sizeof(b))
		abort(); /* the kernel does not fail for 16 bytes */
	b[6] = (uint8_t)((b[6] & 0x0f) | 0x40);
	b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
	snprintf(out, 37, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2],
		 b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

/* When a VM first ran, as far as can be told; one that came by an import and never ran comes last. */
#define AGE(table) "ifnull(nullif(" table ".started_wall_ns, 0), 9223372036854775807)"

/* 1: the VM has this one. One that an older VM has too, as after an import of a VM of this very store, is none. */
static int known_uuid_locked(struct store *store, const char *vm, char uuid[37], struct err *err)
{
	char text[STORE_NAME_BYTES] = "";
	int rc = run_with(store,
			  "SELECT 1, uuid FROM vms WHERE name = ?1 UNION ALL SELECT 2, host FROM resources WHERE vm = "
			  "?1 AND type = '" UUID_TYPE "' LIMIT 1",
			  TEXTS(vm), 0, NULL, text, err);

	if (rc != 1)
		return rc;
	rc = run_with(
		store,
		"SELECT 1 FROM vms own, vms other WHERE own.name = ?2 AND other.uuid = ?1 AND other.name != ?2"
		" AND (" AGE("other") ", other.name) < (" AGE("own") ", own.name) UNION ALL"
								     " SELECT 1 FROM resources WHERE type = '" UUID_TYPE
								     "' AND host = ?1 AND vm != ?2 LIMIT 1",
		TEXTS(text, vm), 0, NULL, NULL, err);
	snprintf(uuid, 37, "%.36s", text);
	return rc < 0 ? rc : rc == 0;
}

static int is_taken_locked(struct store *store, const char *uuid, struct err *err)
{
	return run_with(
		store,
		"SELECT 1 FROM vms WHERE uuid = ?1 UNION ALL SELECT 1 FROM checkpoints WHERE vm_uuid = ?1 UNION ALL"
		" SELECT 1 FROM resources WHERE type = '" UUID_TYPE "' AND host = ?1 LIMIT 1",
		TEXTS(uuid), 0, NULL, NULL, err);
}

static int choose_uuid_locked(struct store *store, const char *vm, const char *wanted, char uuid[37], struct err *err)
{
	int rc = known_uuid_locked(store, vm, uuid, err);

	if (rc)
		return rc < 0 ? rc : 0;
	snprintf(uuid, 37, "%s", wanted);
	rc = *wanted ? is_taken_locked(store, uuid, err) : 1;
	while (rc == 1) {
		new_uuid(uuid);
		rc = is_taken_locked(store, uuid, err);
	}
	const struct store_resource one = {
		.type = UUID_TYPE, .name = (char *)"vm", .guest = (char *)"", .host = uuid, .exclusive = true};
	if (!rc)
		rc = release_locked(store, vm, err);
	return rc ? rc : enter_locked(store, vm, &one, err);
}

int store_vm_uuid(struct store *store, const char *vm, const char *wanted, char uuid[37], struct err *err)
{
	pthread_mutex_lock(&store->lock);
	int rc = begin_locked(store, err);
	if (!rc)
		rc = catalog_end_locked(store, choose_uuid_locked(store, vm, wanted, uuid, err), FAULT_RESOURCES_BIND, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

/* --- templates --- */

int store_template_put(struct store *store, const char *id, const char *name, const char *rules, struct err *err)
{
	int rc = store_tag(store, id, name, err);

	if (rc)
		return rc;
	pthread_mutex_lock(&store->lock);
	rc = run_with(store, "INSERT OR REPLACE INTO templates(checkpoint, rules) VALUES(?1, ?2)", TEXTS(id, rules), 0,
		      NULL, NULL, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_template_get(struct store *store, const char *id, char **rules, struct err *err)
{
	sqlite3_stmt *s;

	*rules = NULL;
	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, "SELECT rules FROM templates WHERE checkpoint = ?", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, id, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		if (rc == 1)
			*rules = xstrdup((const char *)sqlite3_column_text(s, 0));
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	return rc;
}
