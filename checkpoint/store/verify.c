#include "checkpoint/store/verify.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "checkpoint/state_file.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/store/verify_internal.h"

#define PIN_NS 10000000000ull /* that a removal may take to be refused */

/* --- who is hurt by what --- */

uint32_t verify_add_damage(struct verify *v, const char *file, uint64_t offset, uint64_t bytes, char *message)
{
	struct verify_result *result = v->result;
	for (size_t i = 0; i < result->damage_count; i++)
		if (strcmp(result->damages[i].message, message) == 0) {
			free(message);
			return (uint32_t)i;
		}
	struct verify_damage *grown = realloc(result->damages, (result->damage_count + 1) * sizeof(*grown));
	if (!grown)
		abort(); /* as xcalloc: a few bytes */
	result->damages = grown;
	grown[result->damage_count] = (struct verify_damage){.file = xstrdup(file), .offset = offset, .bytes = bytes, .message = message};
	return (uint32_t)result->damage_count++;
}

void verify_blame(struct verify *v, size_t checkpoint, uint32_t damage)
{
	struct verify_checkpoint *c = &v->result->checkpoints[checkpoint];
	for (size_t i = 0; i < c->damage_count; i++)
		if (c->damages[i] == damage)
			return;
	uint32_t *grown = realloc(c->damages, (c->damage_count + 1) * sizeof(*grown));
	if (!grown)
		abort();
	c->damages = grown;
	grown[c->damage_count++] = damage;
}

bool verify_wants(const struct verify *v, const char *file)
{
	for (size_t i = 0; v->suspects && i < v->suspects->damage_count; i++)
		if (strcmp(v->suspects->damages[i].file, file) == 0)
			return true;
	return v->suspects == NULL;
}

static bool is_short(int r) { return r == -ENOMEM || r == -EMFILE || r == -ENFILE; }

/* The host's lack is ours to report; all else is damage of that file. */
static int blame_file(struct verify *v, size_t i, const char *name, const struct err *why, struct err *err)
{
	if (is_short(-why->number)) {
		if (err)
			*err = *why;
		return -why->number;
	}
	CLEANUP_FREE char *file = xasprintf("checkpoints/%s/%s", v->result->checkpoints[i].id, name);
	verify_blame(v, i, verify_add_damage(v, file, 0, 0, xasprintf("%s: %s", file, why->message)));
	return 0;
}

/* --- gathering --- */

/* Held from here on. One whose folder is there but not its manifest is not gone, but damaged. */
static int pin(struct verify *v, size_t i, struct err *err)
{
	const struct timespec moment = {.tv_nsec = 5000000};
	const char *id = v->result->checkpoints[i].id;
	uint64_t end = clock_now_ns() + PIN_NS;
	char manifest[STORE_ID_BYTES + 16];
	snprintf(manifest, sizeof(manifest), "%s/manifest", id);
	for (;;) {
		struct err why = ERR_INIT;
		int r = store_pin(v->store, id, &v->gathered[i].pin, &why);
		if (is_short(r) && err)
			*err = why;
		if (r != -ENOENT)
			return is_short(r) ? r : 0; /* what else it is, reading the manifest tells */
		if (faccessat(v->store->checkpoints_dir, manifest, F_OK, AT_SYMLINK_NOFOLLOW) != 0)
			return 0;
		/* Somebody is about to remove it, or finds that he may not. */
		if (clock_now_ns() >= end)
			return err_set(err, ERR_STATE, EBUSY, "checkpoint %.8s: somebody holds it for its removal", id);
		nanosleep(&moment, NULL);
	}
}

static int read_part(struct verify *v, const struct store_checkpoint *c, const char *name, struct buf *out, struct err *why)
{
	int r = store_checkpoint_read_stored(v->store, c, name, out, why);
	if (r == 0) {
		v->result->files++;
		v->result->read_bytes += out->length;
	}
	return r;
}

static int check_state(struct verify *v, const struct store_checkpoint *c, struct err *why)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	struct state_section *sections = NULL;
	size_t count;
	int r = read_part(v, c, "state", &state, why);
	if (store_is_encrypted(v->store)) {
		/* Without the key its checksum has to do, as it does for pages. */
		if (r != 0 || store_check_key(v->store, NULL) != 0)
			return r;
		r = crypt_open_state(v->store, c->id, &state, why);
	}
	if (r == 0)
		r = state_file_parse(state.data, state.length, &sections, &count, why);
	if (r == 0)
		free(sections);
	return r;
}

static int read_index(struct verify *v, const struct store_checkpoint *c, struct page_index *index, struct err *why)
{
	CLEANUP_BUF struct buf data = BUF_INIT;
	int r = read_part(v, c, "index", &data, why);
	if (r == 0)
		r = page_index_decode(data.data, data.length, index, why);
	if (r == 0 && index->page_count != c->memory_bytes / PAGE_BYTES) {
		r = err_set(why, ERR_DAMAGED, EINVAL, "it is of %llu pages, the manifest's memory has %llu",
			    (unsigned long long)index->page_count, (unsigned long long)(c->memory_bytes / PAGE_BYTES));
		page_index_free(index);
	}
	return r;
}

static int need_memory(struct verify *v, size_t i, struct err *err)
{
	struct gathered *g = &v->gathered[i];
	struct err why = ERR_INIT;
	struct page_index index;
	if (read_index(v, &g->manifest, &index, &why) != 0)
		return blame_file(v, i, "index", &why, err);
	g->has_index = true;
	int r = 0;
	for (uint64_t e = 0; e < index.extent_count && r == 0; e++)
		if (index.extents[e].layer != INDEX_ZERO_LAYER)
			r = verify_need_pages(v, i, &index, &index.extents[e], err);
	page_index_free(&index);
	return r;
}

static int gather_one(struct verify *v, size_t i, struct err *err)
{
	struct verify_checkpoint *c = &v->result->checkpoints[i];
	struct gathered *g = &v->gathered[i];
	struct err why = ERR_INIT;
	int r = v->suspects ? pin(v, i, err) : 0;
	if (r != 0)
		return r;
	if (store_read_manifest(v->store, c->id, &g->manifest, &why) != 0) {
		g->gone = !store_has_folder(v->store, c->id);
		return g->gone ? 0 : blame_file(v, i, "manifest", &why, err);
	}
	v->result->files++;
	memcpy(c->vm, g->manifest.vm, sizeof(c->vm));
	c->created_wall_ns = g->manifest.created_wall_ns;
	why = ERR_INIT;
	if (check_state(v, &g->manifest, &why) != 0)
		r = blame_file(v, i, "state", &why, err);
	if (r == 0)
		r = need_memory(v, i, err);
	return r == 0 ? verify_need_disks(v, i, &g->manifest, err) : r;
}

static int gather(struct verify *v, struct err *err)
{
	size_t count = v->result->checkpoint_count;
	for (size_t i = 0; i < count; i++) {
		int r = gather_one(v, i, err);
		if (r != 0)
			return r;
		if (v->options->progress && i % 64 == 0)
			v->options->progress(v->options->opaque, "checkpoints", i, count);
	}
	return 0;
}

/* --- telling --- */

static bool any_wrong_pages(const struct verify *v)
{
	for (size_t i = 0; i < v->layer_count; i++)
		if (v->layers[i]->run_count)
			return true;
	return false;
}

/* Indices are not kept in memory: they are read again if there is somebody to blame. */
static void tell_wrong_pages(struct verify *v)
{
	struct page_index index;
	verify_tell_wrong_pages(v);
	if (!any_wrong_pages(v))
		return;
	for (size_t i = 0; i < v->result->checkpoint_count; i++) {
		struct gathered *g = &v->gathered[i];
		if (!g->has_index || read_index(v, &g->manifest, &index, NULL) != 0)
			continue;
		verify_blame_pages(v, i, &index);
		page_index_free(&index);
	}
}

static void leave_out_gone(struct verify *v)
{
	struct verify_result *result = v->result;
	size_t kept = 0;
	for (size_t i = 0; i < result->checkpoint_count; i++) {
		if (v->gathered[i].gone || (!v->suspects && result->checkpoints[i].damage_count && !store_has_folder(v->store, result->checkpoints[i].id)))
			free(result->checkpoints[i].damages);
		else
			result->checkpoints[kept++] = result->checkpoints[i];
	}
	result->checkpoint_count = kept;
}

static void verify_free(struct verify *v, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		store_unpin(v->gathered[i].pin);
		free(v->gathered[i].disks);
		store_checkpoint_free(&v->gathered[i].manifest);
	}
	free(v->gathered);
	verify_free_layers(v);
	verify_free_disks(v);
	pthread_cond_destroy(&v->ended);
	pthread_mutex_destroy(&v->lock);
}

static void verify_init(struct verify *v, struct store *store, const struct verify_options *options, struct verify_result *result)
{
	*v = (struct verify){.store = store, .options = options, .result = result};
	pthread_mutex_init(&v->lock, NULL);
	clock_cond_init(&v->ended);
	v->gathered = xcalloc(result->checkpoint_count + 1, sizeof(*v->gathered));
}

/* One pass over the checkpoints in *result, with its lists of damages empty. */
static int look(struct store *store, const struct verify_options *options, const struct verify_result *suspects,
		struct verify_result *result, struct err *err)
{
	struct verify v;
	size_t count = result->checkpoint_count;
	verify_init(&v, store, options, result);
	v.suspects = suspects;
	int r = gather(&v, err);
	if (r == 0)
		r = verify_read(&v, err);
	if (r == 0) {
		tell_wrong_pages(&v);
		verify_tell_wrong_disks(&v);
		leave_out_gone(&v);
	}
	verify_free(&v, count);
	return r;
}

/* --- both passes --- */

/* The damaged ones of `first`, to be looked at again. */
static size_t start_second(const struct verify_result *first, struct verify_result *second)
{
	second->checkpoints = xcalloc(first->checkpoint_count + 1, sizeof(*second->checkpoints));
	for (size_t i = 0; i < first->checkpoint_count; i++)
		if (first->checkpoints[i].damage_count)
			memcpy(second->checkpoints[second->checkpoint_count++].id, first->checkpoints[i].id, STORE_ID_BYTES);
	return second->checkpoint_count;
}

/* What the second look found stands for what the first did, of those that it looked at. */
static void replace_by_second(struct verify_result *first, struct verify_result *second)
{
	size_t kept = 0, next = 0;
	for (size_t i = 0; i < first->checkpoint_count; i++) {
		struct verify_checkpoint *c = &first->checkpoints[i];
		bool again = c->damage_count > 0, found = next < second->checkpoint_count && !strcmp(second->checkpoints[next].id, c->id);
		if (again)
			free(c->damages);
		if (again && !found)
			continue; /* removed meanwhile */
		first->checkpoints[kept++] = again ? second->checkpoints[next++] : *c;
	}
	first->checkpoint_count = kept;
	for (size_t i = 0; i < first->damage_count; i++) {
		free(first->damages[i].file);
		free(first->damages[i].message);
	}
	free(first->damages);
	first->damages = second->damages;
	first->damage_count = second->damage_count;
	first->read_bytes += second->read_bytes;
	second->checkpoint_count = second->damage_count = 0;
	second->damages = NULL;
}

/* What only checkpoints have that are gone by now is no damage. */
static void count_blame(struct verify_result *result)
{
	uint32_t *numbers = xcalloc(result->damage_count + 1, sizeof(*numbers)), kept = 0;
	for (size_t i = 0; i < result->checkpoint_count; i++)
		for (size_t k = 0; k < result->checkpoints[i].damage_count; k++)
			result->damages[result->checkpoints[i].damages[k]].checkpoints++;
	for (size_t i = 0; i < result->damage_count; i++) {
		numbers[i] = kept;
		if (result->damages[i].checkpoints) {
			result->damages[kept++] = result->damages[i];
			continue;
		}
		free(result->damages[i].file);
		free(result->damages[i].message);
	}
	result->damage_count = kept;
	for (size_t i = 0; i < result->checkpoint_count; i++)
		for (size_t k = 0; k < result->checkpoints[i].damage_count; k++)
			result->checkpoints[i].damages[k] = numbers[result->checkpoints[i].damages[k]];
	free(numbers);
}

static int add_checkpoint(struct verify_result *result, const char *id, struct err *err)
{
	struct verify_checkpoint *grown = realloc(result->checkpoints, (result->checkpoint_count + 1) * sizeof(*grown));
	if (!grown)
		return err_sys(err, ENOMEM, "list of checkpoints");
	result->checkpoints = grown;
	grown[result->checkpoint_count] = (struct verify_checkpoint){0};
	memcpy(grown[result->checkpoint_count++].id, id, STORE_ID_BYTES);
	return 0;
}

/* By what is there, not by the catalogue: what it does not know may be damaged too. */
static int add_all(struct store *store, struct verify_result *result, struct err *err)
{
	int copy = openat(store->checkpoints_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), r = 0;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;
	if (!stream)
		return err_sys(err, errno, "%s/checkpoints", store->path);
	while (r == 0 && (entry = readdir(stream)))
		if (store_is_id(entry->d_name))
			r = add_checkpoint(result, entry->d_name, err);
	closedir(stream);
	return r;
}

static int by_time(const void *a, const void *b)
{
	const struct verify_checkpoint *x = a, *y = b;
	if (x->created_wall_ns != y->created_wall_ns)
		return x->created_wall_ns < y->created_wall_ns ? -1 : 1;
	return strcmp(x->id, y->id);
}

int store_verify(struct store *store, const char (*ids)[STORE_ID_BYTES], size_t count, const struct verify_options *options,
		 struct verify_result *out, struct err *err)
{
	struct verify_result second = {0};
	*out = (struct verify_result){0};
	int r = ids ? 0 : add_all(store, out, err);
	for (size_t i = 0; ids && i < count && r == 0; i++)
		r = add_checkpoint(out, ids[i], err);
	if (r == 0)
		r = look(store, options, NULL, out, err);
	if (r == 0 && start_second(out, &second) > 0) {
		r = look(store, options, out, &second, err);
		if (r == 0)
			replace_by_second(out, &second);
	}
	verify_result_free(&second);
	if (r != 0) {
		verify_result_free(out);
		return r;
	}
	if (!ids && out->checkpoint_count)
		qsort(out->checkpoints, out->checkpoint_count, sizeof(*out->checkpoints), by_time);
	count_blame(out);
	return r;
}

int store_verify_layer(struct store *store, const struct store_disk_layer *layer, const struct verify_options *options, struct err *err)
{
	struct store_disk_layer disk = *layer;
	const struct store_checkpoint manifest = {.disk_count = 1, .disks = &disk};
	struct verify_result result = {0};
	int r = add_checkpoint(&result, "", err);
	if (r != 0)
		return r;
	struct verify v;
	verify_init(&v, store, options, &result);
	r = verify_need_disks(&v, 0, &manifest, err);
	if (r == 0)
		r = verify_read(&v, err);
	if (r == 0)
		verify_tell_wrong_disks(&v);
	if (r == 0 && result.damage_count)
		r = err_set(err, ERR_DAMAGED, EBADMSG, "%s", result.damages[0].message);
	verify_free(&v, 1);
	verify_result_free(&result);
	return r;
}

void verify_result_free(struct verify_result *result)
{
	for (size_t i = 0; i < result->checkpoint_count; i++)
		free(result->checkpoints[i].damages);
	for (size_t i = 0; i < result->damage_count; i++) {
		free(result->damages[i].file);
		free(result->damages[i].message);
	}
	for (size_t i = 0; i < result->unrecorded_count; i++)
		free(result->unrecorded[i]);
	free(result->checkpoints);
	free(result->damages);
	free(result->unrecorded);
	*result = (struct verify_result){0};
}
