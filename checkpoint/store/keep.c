/* Questions that `keep` and the consolidation of memory layers ask the catalogue. */
#include <errno.h>
#include <stdlib.h>

#include "checkpoint/store/store_internal.h"

#define HAS_TAG "EXISTS (SELECT 1 FROM tags t WHERE t.checkpoint = c.id)"

static const char surplus[] =
	"SELECT id FROM checkpoints c WHERE vm = ?1 AND periodic AND NOT " HAS_TAG
	" AND NOT EXISTS (SELECT 1 FROM vms v WHERE v.at = c.id)"
	" AND NOT EXISTS (SELECT 1 FROM checkpoints k WHERE k.parent = c.id AND k.vm <> c.vm)"
	" AND (SELECT COUNT(*) FROM checkpoints k WHERE k.parent = c.id) <= 1"
	" AND seq NOT IN (SELECT seq FROM checkpoints WHERE vm = ?1 AND periodic ORDER BY created_wall_ns DESC, seq DESC LIMIT ?2)"
	/* The newest of each hour, and of each day, of UTC: the bare column beside MAX is that of its row. */
	" AND seq NOT IN (SELECT seq FROM (SELECT seq, MAX(created_wall_ns) FROM checkpoints WHERE vm = ?1 AND periodic"
	" GROUP BY created_wall_ns / 3600000000000 ORDER BY 2 DESC LIMIT ?4))"
	" AND seq NOT IN (SELECT seq FROM (SELECT seq, MAX(created_wall_ns) FROM checkpoints WHERE vm = ?1 AND periodic"
	" GROUP BY created_wall_ns / 86400000000000 ORDER BY 2 DESC LIMIT ?5))"
	" ORDER BY created_wall_ns, seq LIMIT ?3";

int store_surplus(struct store *store, const char *vm, const struct store_keep *keep, size_t most, char (**ids)[STORE_ID_BYTES],
		  size_t *count, struct err *err)
{
	sqlite3_stmt *s;

	*count = 0;
	*ids = xcalloc(most + 1, sizeof(**ids));
	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, surplus, &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, vm, -1, SQLITE_STATIC);
		sqlite3_bind_int64(s, 2, (sqlite3_int64)keep->newest);
		sqlite3_bind_int64(s, 3, (sqlite3_int64)most);
		sqlite3_bind_int64(s, 4, (sqlite3_int64)keep->hourly);
		sqlite3_bind_int64(s, 5, (sqlite3_int64)keep->daily);
		while (*count < most && (rc = catalog_step_locked(store, s, err)) == 1)
			catalog_text(s, 0, (*ids)[(*count)++], STORE_ID_BYTES);
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	if (rc < 0) {
		free(*ids);
		*ids = NULL;
		*count = 0;
		return rc;
	}
	return 0;
}

static const char mergeable[] =
	"SELECT 1 FROM layers l WHERE l.id = ?1 AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE memory_layer = l.id)"
	" AND NOT EXISTS (SELECT 1 FROM refs r JOIN checkpoints c ON c.seq = r.checkpoint WHERE r.layer = l.number AND"
	" (NOT c.periodic OR c.vm <> ?2 OR " HAS_TAG "))";

int store_mergeable(struct store *store, const char *vm, const char (*layers)[STORE_ID_BYTES], uint32_t count, bool *may,
		    struct err *err)
{
	sqlite3_stmt *s;

	pthread_mutex_lock(&store->lock);
	int rc = catalog_prepare_locked(store, mergeable, &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 2, vm, -1, SQLITE_STATIC);
		for (uint32_t i = 0; rc >= 0 && i < count; i++) {
			sqlite3_bind_text(s, 1, layers[i], -1, SQLITE_STATIC);
			rc = catalog_step_locked(store, s, err);
			may[i] = rc == 1;
			sqlite3_reset(s);
		}
		sqlite3_finalize(s);
	}
	pthread_mutex_unlock(&store->lock);
	return rc < 0 ? rc : 0;
}
