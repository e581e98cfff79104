/*
 * Disk layers and what they stand on. A layer's checksum is in the manifests that name it, or was left beside it when those went, or by the merge that made it
 * (disk_record.c). Of base images none is recorded: they are only opened.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/store/verify_internal.h"
#include "cowdisk/check.h"

#define MAX_CHAIN 1024u

/* The name as users meet it: relative in the store, else whole. */
static const char *shown(const struct verify *v, const char *path)
{
	size_t length = strlen(v->store->path);
	return strncmp(path, v->store->path, length) == 0 && path[length] == '/' ? path + length + 1 : path;
}

/* --- what manifests record --- */

static int by_layer(const void *a, const void *b)
{
	return strcmp(((const struct store_disk_layer *)a)->layer, ((const struct store_disk_layer *)b)->layer);
}

static int add_records(struct verify *v, const struct store_checkpoint *c, struct err *err)
{
	if (c->disk_count == 0)
		return 0;
	struct store_disk_layer *grown = realloc(v->records, (v->record_count + c->disk_count) * sizeof(*grown));
	if (!grown)
		return err_sys(err, ENOMEM, "list of disk layers");
	v->records = grown;
	memcpy(grown + v->record_count, c->disks, c->disk_count * sizeof(*grown));
	v->record_count += c->disk_count;
	return 0;
}

/* Of every checkpoint that is there, asked for or not. Those that cannot be read are told, or not, by who looks at them. */
static int read_records(struct verify *v, struct err *err)
{
	int copy = openat(v->store->checkpoints_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), r = 0;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;
	if (!stream)
		return err_sys(err, errno, "%s/checkpoints", v->store->path);
	while (r == 0 && (entry = readdir(stream))) {
		struct store_checkpoint c;
		if (!store_is_id(entry->d_name) || store_read_manifest(v->store, entry->d_name, &c, NULL) != 0)
			continue;
		r = add_records(v, &c, err);
		store_checkpoint_free(&c);
	}
	closedir(stream);
	if (v->record_count)
		qsort(v->records, v->record_count, sizeof(*v->records), by_layer);
	v->has_records = true;
	return r;
}

/* The layer whose file is at `path`, "" if it is none of the store's. Returns its format, else -1. */
static int layer_of(const struct verify *v, const char *path, char id[STORE_ID_BYTES])
{
	const char *name = shown(v, path);
	id[0] = '\0';
	if (strncmp(name, "layers/", 7) != 0 || strlen(name + 7) < STORE_ID_BYTES)
		return -1;
	memcpy(id, name + 7, STORE_ID_BYTES - 1);
	id[STORE_ID_BYTES - 1] = '\0';
	name += 7 + STORE_ID_BYTES - 1;
	if (!store_is_id(id) || *name != '.') {
		id[0] = '\0';
		return -1;
	}
	return store_format_named(name + 1);
}

static int find_record(struct verify *v, struct needed_disk *disk, struct err *err)
{
	struct store_disk_layer key;
	disk->format = layer_of(v, disk->path, key.layer);
	if (disk->recorded || !key.layer[0])
		return 0;
	int r = v->has_records ? 0 : read_records(v, err);
	const struct store_disk_layer *found =
		r == 0 && v->record_count ? bsearch(&key, v->records, v->record_count, sizeof(*v->records), by_layer) : NULL;
	if (found) {
		disk->recorded = true;
		disk->bytes = found->file_bytes;
		disk->xxh3 = found->xxh3;
	} else if (r == 0)
		disk->recorded = disk_record_find(v->store, key.layer, strrchr(disk->path, '.') + 1, &disk->bytes, &disk->xxh3);
	return r;
}

/* --- chains --- */

/* path: malloc, taken. */
static int get_disk(struct verify *v, char *path, struct needed_disk **out, struct err *err)
{
	for (size_t i = 0; i < v->disk_count; i++)
		if (strcmp(v->disks[i]->path, path) == 0) {
			free(path);
			*out = v->disks[i];
			return 0;
		}
	struct needed_disk **grown = realloc(v->disks, (v->disk_count + 1) * sizeof(*grown));
	if (!grown) {
		free(path);
		return err_sys(err, ENOMEM, "list of disk layers");
	}
	v->disks = grown;
	*out = grown[v->disk_count++] = xcalloc(1, sizeof(**out));
	(*out)->path = path;
	return 0;
}

/* Damage of the header, which says what is below: nobody can look further down. */
static void spoil(struct verify *v, struct needed_disk *disk, char *why)
{
	disk->damaged = true;
	disk->damage = verify_add_damage(v, shown(v, disk->path), 0, 0, why);
}

static int look_below(struct verify *v, struct needed_disk *disk, struct err *err)
{
	struct err why = ERR_INIT;
	char *below = NULL;
	disk->looked_below = true;
	int r = find_record(v, disk, err);
	if (r != 0)
		return r;
	if (access(disk->path, R_OK) != 0)
		spoil(v, disk, xasprintf("%s: %s", shown(v, disk->path), errno == ENOENT ? "is missing" : strerror(errno)));
	else if ((r = cow_backing(disk->path, disk->format, &below, &why)) == -EMFILE || r == -ENOMEM)
		return err ? (*err = why, r) : r;
	else if (r != 0 && r != -ENOTSUP)
		spoil(v, disk, xasprintf("%s: %s", shown(v, disk->path), why.message));
	return below ? get_disk(v, below, &disk->below, err) : 0;
}

static int need_chain(struct verify *v, struct needed_disk *disk, struct err *err)
{
	int r = 0;
	for (unsigned depth = 0; r == 0 && disk && !disk->looked_below && depth < MAX_CHAIN; depth++, disk = disk->below)
		r = look_below(v, disk, err);
	return r;
}

int verify_need_disks(struct verify *v, size_t checkpoint, const struct store_checkpoint *manifest, struct err *err)
{
	struct gathered *g = &v->gathered[checkpoint];
	g->disks = xcalloc(manifest->disk_count + 1, sizeof(struct needed_disk *));
	for (uint32_t i = 0; i < manifest->disk_count; i++) {
		const struct store_disk_layer *layer = &manifest->disks[i];
		struct needed_disk *disk;
		char *path = xasprintf("%s/layers/%s.%s", v->store->path, layer->layer, layer->format);
		int r = get_disk(v, path, &disk, err);
		if (r != 0)
			return r;
		disk->recorded = true;
		disk->bytes = layer->file_bytes;
		disk->xxh3 = layer->xxh3;
		g->disks[g->disk_count++] = disk;
		r = need_chain(v, disk, err);
		if (r != 0)
			return r;
	}
	return 0;
}

/* --- reading --- */

static bool count_piece(void *opaque, uint64_t bytes, bool read)
{
	verify_count(opaque, bytes, read ? bytes : 0);
	return !verify_is_cancelled(opaque);
}

void verify_check_disk(struct verify *v, struct needed_disk *disk)
{
	const char *file = shown(v, disk->path);
	struct err why = ERR_INIT;
	struct stat st;
	uint64_t sum;
	if (disk->damaged || !verify_wants(v, file))
		return;
	CLEANUP_CLOSE int fd = open(disk->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 || fstat(fd, &st) != 0)
		disk->wrong = xasprintf("%s: %s", file, strerror(errno));
	else if (!disk->recorded)
		return;
	else if (!S_ISREG(st.st_mode))
		disk->wrong = xasprintf("%s: is no file", file);
	else if ((uint64_t)st.st_size != disk->bytes)
		disk->wrong = xasprintf("%s: it has %" PRIu64 " bytes instead of %" PRIu64, file, (uint64_t)st.st_size, disk->bytes);
	else if (file_sum(fd, disk->bytes, count_piece, v, &sum, &why) != 0)
		disk->wrong = xasprintf("%s: %s", file, why.message);
	else if (sum != disk->xxh3)
		disk->wrong = xasprintf("%s: bytes 0 to %" PRIu64 ", the file as a whole, do not match the checksum in the manifest", file,
					disk->bytes - 1);
}

/* --- telling --- */

static void note_unrecorded(struct verify *v, const struct needed_disk *disk)
{
	struct verify_result *result = v->result;
	char **grown = realloc(result->unrecorded, (result->unrecorded_count + 1) * sizeof(*grown));
	if (!grown)
		abort(); /* as xcalloc: a few bytes */
	result->unrecorded = grown;
	grown[result->unrecorded_count++] = xstrdup(shown(v, disk->path));
}

void verify_tell_wrong_disks(struct verify *v)
{
	for (size_t i = 0; i < v->disk_count; i++) {
		struct needed_disk *disk = v->disks[i];
		if (disk->wrong) {
			disk->damaged = true;
			disk->damage = verify_add_damage(v, shown(v, disk->path), 0, 0, disk->wrong);
			disk->wrong = NULL;
		} else if (!disk->recorded && !disk->damaged)
			note_unrecorded(v, disk);
	}
	for (size_t i = 0; i < v->result->checkpoint_count; i++)
		for (uint32_t k = 0; k < v->gathered[i].disk_count; k++) {
			const struct needed_disk *disk = v->gathered[i].disks[k];
			for (unsigned depth = 0; disk && depth < MAX_CHAIN; depth++, disk = disk->below)
				if (disk->damaged)
					verify_blame(v, i, disk->damage);
		}
}

void verify_free_disks(struct verify *v)
{
	for (size_t i = 0; i < v->disk_count; i++) {
		free(v->disks[i]->path);
		free(v->disks[i]->wrong);
		free(v->disks[i]);
	}
	free(v->disks);
	free(v->records);
}
