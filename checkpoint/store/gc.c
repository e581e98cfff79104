/*
 * Reclaiming layers that nothing needs.
 *
 *     1 the layers that are there
 *     2 those that drafts own, by their markers
 *     3 settle: what was committed up to here is in the catalogue
 *     4 those that checkpoints name
 *     5 for disk layers: those on which something stands that stays, by the backing files that headers name
 *
 * In this order, because a layer of 1 had its marker before it was there: at 2 its draft is still seen, or is committed, and then the catalogue
 * knows it at 4, or it has been given up. A disk stands on a layer without a name only if it has stood on it before: overlays are made on layers of
 * checkpoints that are held, and on images that a draft has just linked. So what nobody needs at 5 nobody will need.
 * Chains do not change meanwhile, as LAYERS_SHAPE is held: a merge (merge.c) puts a layer on another one than it stood on before.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/gc_internal.h"
#include "cowdisk/block.h"
#include "cowdisk/check.h"

#define MAX_CHAIN 1024u

/* --- 1: what is there --- */

static int add_layer(struct collection *g, const char *name, struct err *err)
{
	const char *dot = name + STORE_ID_BYTES - 1;
	struct stat st;

	if (strlen(name) < STORE_ID_BYTES || strspn(name, "0123456789abcdef") != STORE_ID_BYTES - 1)
		return 0;
	bool disk = !strcmp(dot, ".qcow2") || !strcmp(dot, ".raw");
	if (!disk && strcmp(dot, ".mem") && strcmp(dot, ".sums"))
		return 0;
	if (fstatat(g->store->layers_dir, name, &st, AT_SYMLINK_NOFOLLOW))
		return errno == ENOENT ? 0 : err_sys(err, errno, "layers/%s", name);
	struct layer *grown = realloc(g->list, (g->count + 1) * sizeof(*grown));
	if (!grown)
		return err_sys(err, ENOMEM, "list of layers");
	g->list = grown;
	grown[g->count] = (struct layer){.device = st.st_dev,
					 .inode = st.st_ino,
					 .links = st.st_nlink,
					 .bytes = (uint64_t)st.st_blocks * 512,
					 .disk = disk,
					 .format = store_format_named(dot + 1)};
	snprintf(grown[g->count].name, sizeof(grown->name), "%.40s", name);
	memcpy(grown[g->count].id, name, STORE_ID_BYTES - 1);
	g->count++;
	return 0;
}

static int by_name(const void *a, const void *b) { return strcmp(((const struct layer *)a)->name, ((const struct layer *)b)->name); }

static int list_layers(struct collection *g, struct err *err)
{
	int copy = openat(g->store->layers_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = 0;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/layers", g->store->path);
	while (!rc && (entry = readdir(stream)))
		rc = add_layer(g, entry->d_name, err);
	closedir(stream);
	if (g->count)
		qsort(g->list, g->count, sizeof(*g->list), by_name);
	return rc;
}

/* --- 2 and 4: who names them --- */

static void need(struct collection *g, const char *id, bool making)
{
	size_t low = 0, high = g->count;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (strcmp(g->list[middle].id, id) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	for (; low < g->count && !strcmp(g->list[low].id, id); low++) {
		g->list[low].needed = g->list[low].named = true;
		g->list[low].making |= making;
	}
}

static int need_owned(struct collection *g, struct err *err)
{
	CLEANUP_BUF struct buf ids = BUF_INIT;
	int rc = draft_owned_layers(g->store, &ids, err);

	for (size_t at = 0; !rc && at < ids.length; at += STORE_ID_BYTES)
		need(g, (const char *)ids.data + at, true);
	return rc;
}

static int need_named_locked(struct collection *g, struct err *err)
{
	char id[STORE_ID_BYTES];
	sqlite3_stmt *s;
	int rc = catalog_prepare_locked(g->store, "SELECT id FROM layers", &s, err);

	if (rc)
		return rc;
	while ((rc = catalog_step_locked(g->store, s, err)) == 1) {
		catalog_text(s, 0, id, sizeof(id));
		need(g, id, false);
	}
	sqlite3_finalize(s);
	return rc;
}

/* --- checkpoints and the catalogue --- */

static bool is_there(int dir, const char *prefix, const char *id, const char *suffix)
{
	char name[STORE_ID_BYTES + 16];

	snprintf(name, sizeof(name), "%.3s%.32s%.8s", prefix, id, suffix);
	return faccessat(dir, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

/* A checkpoint that the catalogue does not know: it is entered, or it is damaged, and then nobody can say which layers are its. */
static int enter_unknown(struct store *store, const char *id, struct err *err)
{
	struct store_checkpoint checkpoint;
	struct store_layers layers;
	char found[STORE_ID_BYTES];

	if (is_there(store->staging_dir, "", id, ".lock"))
		return 0; /* committed since; its layers are marked */
	int rc = store_resolve(store, id, found, NULL);
	if (rc == 0)
		return 0;
	rc = store_read_committed(store, id, &checkpoint, &layers, err);
	if (rc == -ENOENT && !is_there(store->checkpoints_dir, "", id, ""))
		return 0; /* removed meanwhile */
	if (rc) {
		err_prefix(err, "checkpoint %.8s", id);
		return err_hint(err, "which layers it needs cannot be known, so none is removed: `vmcp rm %.8s` it first, or mend it", id);
	}
	rc = draft_enter(store, &checkpoint, &layers, CATALOG_VM_STAYS, err);
	store_checkpoint_free(&checkpoint);
	layers_free(&layers);
	return rc;
}

static int enter_all_unknown(struct store *store, struct err *err)
{
	int copy = openat(store->checkpoints_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = 0;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/checkpoints", store->path);
	while (!rc && (entry = readdir(stream)))
		if (store_is_id(entry->d_name))
			rc = enter_unknown(store, entry->d_name, err);
	closedir(stream);
	return rc;
}

/* Entries whose checkpoint somebody removed by hand. */
static int forget_missing(struct collection *g, struct err *err)
{
	struct store *store = g->store;
	struct dead_layers dead = {0};
	struct store_checkpoint *list;
	size_t count;
	int rc = store_checkpoint_list(store, NULL, &list, &count, err);

	if (rc)
		return rc;
	for (size_t i = 0; i < count; i++) {
		/* Asked again in the transaction, as a removal moves the folder in one. */
		if (!rc && !is_there(store->checkpoints_dir, "", list[i].id, "")) {
			pthread_mutex_lock(&store->lock);
			rc = catalog_run_locked(store, "BEGIN IMMEDIATE", err);
			if (!rc && !is_there(store->checkpoints_dir, "", list[i].id, "") &&
			    !is_there(store->staging_dir, REMOVED_PREFIX, list[i].id, "")) {
				int known = refs_forget_locked(store, list[i].id, &dead, err);

				rc = known < 0 ? known : 0;
				g->forgotten++;
			}
			if (!rc)
				rc = catalog_run_locked(store, "COMMIT", err);
			if (rc)
				catalog_run_locked(store, "ROLLBACK", NULL);
			pthread_mutex_unlock(&store->lock);
		}
		store_checkpoint_free(&list[i]);
	}
	free(list);
	free(dead.list);
	return rc;
}

/* --- 5: on what disks stand --- */

struct layer *collection_at(struct collection *g, const struct stat *st)
{
	for (size_t i = 0; i < g->count; i++)
		if (g->list[i].disk && g->list[i].inode == st->st_ino && g->list[i].device == st->st_dev)
			return &g->list[i];
	return NULL;
}

/* By content, where it need not be an image yet, and may be anything. */
static int format_of(const struct layer *layer) { return layer && (layer->format == COW_FORMAT_RAW || !layer->making) ? layer->format : -1; }

/* The image at `path` (freed) and all below it are needed. */
static int need_chain(struct collection *g, char *path, struct err *err)
{
	int rc = 0;

	for (unsigned depth = 0; path && depth < MAX_CHAIN && !rc; depth++) {
		struct layer *layer;
		struct stat st;
		char *next = NULL;

		if (stat(path, &st)) {
			/* Missing below a disk: damage that is not ours to mend, and nothing to keep there. */
			rc = errno == ENOENT || errno == ENOTDIR ? 0 : err_sys(err, errno, "%s", path);
			break;
		}
		layer = collection_at(g, &st);
		if (layer && layer->needed && depth > 0)
			break; /* been here, or will be */
		if (layer)
			layer->needed = true;
		if (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode))
			rc = cow_backing(path, format_of(layer), &next, err);
		if (rc == -ENOTSUP) { /* a backing that is no file is no layer */
			rc = 0;
			if (err)
				*err = ERR_INIT;
		}
		free(path);
		path = next;
	}
	free(path);
	return rc;
}

/* Below each layer that is needed for itself. */
static int need_backings(struct collection *g, struct err *err)
{
	int rc = 0;

	for (size_t i = 0; !rc && i < g->count; i++)
		if (g->list[i].disk && g->list[i].named)
			rc = need_chain(g, xasprintf("%s/layers/%s", g->store->path, g->list[i].name), err);
	return rc;
}

/* Images of VMs that live in the store: vms/<name>/<disk>.qcow2. */
static int each_vm_image(struct collection *g, const char *vm, collection_image_fn *fn, struct err *err)
{
	int fd = openat(g->store->vms_dir, vm, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW), rc = 0;
	DIR *stream = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;

	if (!stream)
		return 0; /* no folder */
	while (!rc && (entry = readdir(stream))) {
		const char *dot = strrchr(entry->d_name, '.');

		if (dot && !strcmp(dot, ".qcow2"))
			rc = fn(g, xasprintf("%s/vms/%s/%s", g->store->path, vm, entry->d_name), err);
	}
	closedir(stream);
	return rc;
}

static int each_image_of_vms(struct collection *g, collection_image_fn *fn, struct err *err)
{
	int copy = openat(g->store->vms_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = 0;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/vms", g->store->path);
	while (!rc && (entry = readdir(stream)))
		if (entry->d_name[0] != '.')
			rc = each_vm_image(g, entry->d_name, fn, err);
	closedir(stream);
	return rc;
}

/* rebuild.c could not find out. */
static int unknown_images(struct err *err)
{
	err_set(err, ERR_FAILED, ENOTSUP, "images: which of them stand on layers of this store was lost with the old catalogue");
	return err_hint(err, "disk layers that no checkpoint names stay, as an image outside the store may stand on them");
}

static int each_noted_image(struct collection *g, collection_image_fn *fn, struct err *err)
{
	CLEANUP_BUF struct buf paths = BUF_INIT;
	sqlite3_stmt *s;

	pthread_mutex_lock(&g->store->lock);
	int rc = catalog_prepare_locked(g->store, "SELECT path FROM images", &s, err);
	while (!rc && (rc = catalog_step_locked(g->store, s, err)) == 1) {
		const char *path = (const char *)sqlite3_column_text(s, 0);

		rc = buf_append(&paths, path ? path : "", strlen(path ? path : "") + 1, err);
	}
	sqlite3_finalize(s);
	pthread_mutex_unlock(&g->store->lock);
	for (size_t at = 0; !rc && at < paths.length; at += strlen((char *)paths.data + at) + 1)
		rc = !strcmp((char *)paths.data + at, STORE_UNKNOWN_IMAGES) ? unknown_images(err) : fn(g, xstrdup((char *)paths.data + at), err);
	return rc;
}

int collection_each_image(struct collection *g, collection_image_fn *fn, struct err *err)
{
	int rc = each_noted_image(g, fn, err);

	return rc ? rc : each_image_of_vms(g, fn, err);
}

static bool has_unnamed_disk_layer(const struct collection *g)
{
	for (size_t i = 0; i < g->count; i++)
		if (g->list[i].disk && !g->list[i].needed)
			return true;
	return false;
}

/* What cannot be judged stays: of the disk layers all, if a header cannot be read. */
static int need_disks(struct collection *g, struct err *err)
{
	if (!has_unnamed_disk_layer(g))
		return 0;
	int rc = need_backings(g, err);
	if (!rc)
		rc = collection_each_image(g, need_chain, err);
	if (!rc)
		return 0;
	for (size_t i = 0; i < g->count; i++)
		g->list[i].needed |= g->list[i].disk;
	return err_hint(err, "no disk layer is removed, as this one may stand on any of them");
}

/* --- the end --- */

static int unlink_rest(struct collection *g, struct store_gc_result *out, struct err *err)
{
	/* A merge's rename is on the disk before what it made superfluous goes: its maker may have died in between. */
	int synced = file_sync_dir(g->store->layers_dir, err);

	if (synced)
		return synced;
	out->forgotten = g->forgotten;
	for (size_t i = 0; i < g->count; i++) {
		const struct layer *layer = &g->list[i];
		struct stat st;

		out->kept_disk_layers += layer->disk && layer->needed && !layer->named;
		if (layer->needed)
			continue;
		int rc = fault_check(FAULT_STORE_GC_UNLINKING, err);
		if (rc)
			return rc;
		if (fstatat(g->store->layers_dir, layer->name, &st, AT_SYMLINK_NOFOLLOW) ||
		    unlinkat(g->store->layers_dir, layer->name, 0))
			continue; /* another process was faster */
		out->bytes += st.st_nlink > 1 ? 0 : (uint64_t)st.st_blocks * 512;
		out->disk_layers += layer->disk;
		out->memory_layers += !strcmp(layer->name + STORE_ID_BYTES - 1, ".mem");
	}
	return 0;
}

int collection_judge(struct collection *g, struct err *err)
{
	struct store *store = g->store;
	int rc = list_layers(g, err);

	if (!rc)
		rc = need_owned(g, err);
	if (!rc)
		rc = draft_settle(store, err);
	if (!rc)
		rc = enter_all_unknown(store, err);
	if (!rc)
		rc = forget_missing(g, err);
	if (rc)
		return rc;
	pthread_mutex_lock(&store->lock);
	rc = need_named_locked(g, err);
	pthread_mutex_unlock(&store->lock);
	return rc;
}

int store_gc(struct store *store, struct store_gc_result *out, struct err *err)
{
	struct collection g = {.store = store};
	struct err first = ERR_INIT;

	*out = (struct store_gc_result){0};
	CLEANUP_CLOSE int lock = layers_lock(store, LAYERS_SHAPE, true, err);
	if (lock < 0)
		return lock;
	int rc = collection_judge(&g, err);
	if (!rc) {
		/* Memory layers go even where disks cannot be judged. */
		int disks = need_disks(&g, &first);

		rc = unlink_rest(&g, out, err);
		disk_records_collect(store);
		group_collect(store);
		if (!rc && disks) {
			rc = disks;
			if (err)
				*err = first;
		}
	}
	free(g.list);
	return rc;
}

int store_note_image(struct store *store, const char *path, struct err *err)
{
	sqlite3_stmt *s;

	pthread_mutex_lock(&store->lock);
	int rc = catalog_run_locked(store, "PRAGMA synchronous = FULL", err);
	if (!rc)
		rc = catalog_prepare_locked(store, "INSERT OR IGNORE INTO images VALUES(?)", &s, err);
	if (!rc) {
		sqlite3_bind_text(s, 1, path, -1, SQLITE_STATIC);
		rc = catalog_step_locked(store, s, err);
		sqlite3_finalize(s);
	}
	catalog_run_locked(store, "PRAGMA synchronous = NORMAL", NULL);
	pthread_mutex_unlock(&store->lock);
	return rc;
}
