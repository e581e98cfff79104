/* Memory layers: which of their pages are needed, and whether they check. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/store/verify_internal.h"
#include "checkpoint/sums.h"

#define MAX_RUNS 256u /* of wrong pages in a layer: what is beyond them is told as one */

static bool get_bit(const uint64_t *map, uint64_t i) { return map[i / 64] >> (i % 64) & 1; }

/* --- finding layers --- */

static char *layer_file(const char *id, const char *suffix) { return xasprintf("layers/%s%s", id, suffix); }

/* Pages, and with them places, ascend, and pages side by side are at places side by side: readers bisect, and map runs. */
static bool in_order(const struct page_sum_entry *before, const struct page_sum_entry *entry)
{
	return entry->page > before->page && entry->place > before->place &&
	       (entry->page - before->page > 1 || entry->place - before->place == 1);
}

static int list_pages(struct needed_layer *layer, const struct page_sums *sums, struct err *err)
{
	struct page_sum_entry entries[PAGE_SUMS_MAX_READ], before = {0};
	layer->pages = malloc((size_t)sums->count * sizeof(*layer->pages) + 1);
	if (!layer->pages)
		return err_sys(err, ENOMEM, "%llu pages", (unsigned long long)sums->count);
	for (uint64_t at = 0, n; at < sums->count; at += n) {
		n = min_u64(sums->count - at, PAGE_SUMS_MAX_READ);
		int r = page_sums_list(sums, at, n, entries, err);
		for (uint64_t i = 0; i < n && r == 0; i++) {
			if (at + i > 0 && !in_order(&before, &entries[i]))
				r = err_set(err, ERR_DAMAGED, EINVAL, "entry %llu: out of order", (unsigned long long)(at + i));
			before = entries[i];
			layer->pages[at + i] = (uint32_t)entries[i].page;
		}
		if (r != 0)
			return r;
	}
	return 0;
}

static int read_sums(struct verify *v, struct needed_layer *layer, struct err *err)
{
	struct page_sums sums;
	CLEANUP_CLOSE int fd = store_memory_sums_open(v->store, layer->id, err);
	if (fd < 0)
		return fd;
	int r = page_sums_open(&sums, fd, err);
	if (r == 0)
		r = list_pages(layer, &sums, err);
	layer->count = r == 0 ? sums.count : 0;
	page_sums_close(&sums);
	return r;
}

/* The result is a layer in any case; one whose checksums cannot be read is broken as a whole. */
static int load_layer(struct verify *v, const char *id, struct needed_layer **out, struct err *err)
{
	struct needed_layer *layer = xcalloc(1, sizeof(*layer));
	struct err why = ERR_INIT;
	memcpy(layer->id, id, STORE_ID_BYTES);
	int r = read_sums(v, layer, &why);
	size_t words = (size_t)(layer->count / 64 + 1);
	layer->needed = calloc(words, sizeof(*layer->needed));
	layer->wrong = calloc(words, sizeof(*layer->wrong));
	*out = layer;
	if (r == -ENOMEM || r == -EMFILE || r == -ENFILE || !layer->needed || !layer->wrong)
		return r == 0 ? err_sys(err, ENOMEM, "memory layer %s", id) : (err ? (*err = why, r) : r);
	if (r == 0)
		return 0;
	CLEANUP_FREE char *file = layer_file(id, ".sums");
	layer->broken = true;
	layer->damage = verify_add_damage(v, file, 0, 0, xasprintf("%s: %s", file, why.message));
	return 0;
}

/* Where the layer is in the list, or belongs. */
static size_t find_place(const struct verify *v, const char *id)
{
	size_t low = 0, high = v->layer_count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (strcmp(v->layers[middle]->id, id) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int get_layer(struct verify *v, const char *id, struct needed_layer **out, struct err *err)
{
	size_t at = find_place(v, id);
	if (at < v->layer_count && strcmp(v->layers[at]->id, id) == 0) {
		*out = v->layers[at];
		return 0;
	}
	struct needed_layer **grown = realloc(v->layers, (v->layer_count + 1) * sizeof(*grown));
	if (!grown)
		return err_sys(err, ENOMEM, "list of layers");
	v->layers = grown;
	int r = load_layer(v, id, out, err);
	memmove(grown + at + 1, grown + at, (v->layer_count - at) * sizeof(*grown));
	grown[at] = *out;
	v->layer_count++;
	return r;
}

/* --- what is needed --- */

/* The first entry whose page is not below `page`. */
static uint64_t find_entry(const struct needed_layer *layer, uint64_t page)
{
	uint64_t low = 0, high = layer->count;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (layer->pages[middle] < page)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

int verify_need_pages(struct verify *v, size_t checkpoint, const struct page_index *index, const struct index_extent *extent,
		      struct err *err)
{
	struct needed_layer *layer;
	int r = get_layer(v, index->layers[extent->layer - 1], &layer, err);
	if (r != 0)
		return r;
	if (layer->broken) {
		verify_blame(v, checkpoint, layer->damage);
		return 0;
	}
	uint64_t at = find_entry(layer, extent->first);
	for (uint64_t i = 0; i < extent->count; i++, at++) {
		if (at >= layer->count || layer->pages[at] != extent->first + i) {
			CLEANUP_FREE char *file = layer_file(layer->id, ".sums");
			verify_blame(v, checkpoint,
				     verify_add_damage(v, file, 0, 0, xasprintf("%s: has no entry for page %llu, which is needed", file,
										(unsigned long long)(extent->first + i))));
			return 0;
		}
		layer->needed_count += !get_bit(layer->needed, at);
		layer->needed[at / 64] |= (uint64_t)1 << (at % 64);
	}
	return 0;
}

static bool wanted(const struct verify *v, const struct needed_layer *layer)
{
	CLEANUP_FREE char *file = layer_file(layer->id, ".mem");
	return !layer->broken && verify_wants(v, file);
}

uint64_t verify_memory_bytes(const struct verify *v)
{
	uint64_t pages = 0;
	for (size_t i = 0; i < v->layer_count; i++)
		pages += wanted(v, v->layers[i]) ? v->layers[i]->needed_count : 0;
	return pages * PAGE_BYTES;
}

/* --- checking --- */

static void mark_wrong(struct verify *v, struct needed_layer *layer, uint64_t entry)
{
	pthread_mutex_lock(&v->lock);
	layer->wrong[entry / 64] |= (uint64_t)1 << (entry % 64);
	pthread_mutex_unlock(&v->lock);
}

/* Entries whose pages are side by side in the file, at most VERIFY_BUFFER_PAGES. Where they cannot be read at once, one by one. */
static void check_run(struct verify *v, struct needed_layer *layer, int fd, uint64_t first, const struct page_sum_entry *entries,
		      uint64_t count, uint8_t *buffer)
{
	bool read = file_pread_full(fd, buffer, count * PAGE_BYTES, entries[0].place * PAGE_BYTES, NULL) == 0;
	for (uint64_t i = 0; i < count; i++) {
		uint8_t *page = buffer + i * PAGE_BYTES;
		bool there = read || file_pread_full(fd, page, PAGE_BYTES, entries[i].place * PAGE_BYTES, NULL) == 0;
		if (!there || page_sum(entries[i].page, page) != entries[i].sum)
			mark_wrong(v, layer, first + i);
	}
	verify_count(v, count * PAGE_BYTES, count * PAGE_BYTES);
}

static void check_entries(struct verify *v, struct needed_layer *layer, const struct page_sums *sums, int fd, uint64_t first,
			  uint64_t count, uint8_t *buffer)
{
	struct page_sum_entry entries[VERIFY_BUFFER_PAGES];
	bool known = page_sums_list(sums, first, count, entries, NULL) == 0;
	for (uint64_t i = 0, n; i < count; i += n) {
		n = 1;
		if (!get_bit(layer->needed, first + i))
			continue;
		while (i + n < count && get_bit(layer->needed, first + i + n) && entries[i + n].place == entries[i].place + n)
			n++;
		if (known)
			check_run(v, layer, fd, first + i, entries + i, n, buffer);
		else
			for (uint64_t k = 0; k < n; k++)
				mark_wrong(v, layer, first + i + k);
	}
}

void verify_check_pages(struct verify *v, struct needed_layer *layer, uint64_t first, uint64_t end, uint8_t *buffer)
{
	struct page_sums sums = {0};
	if (!wanted(v, layer))
		return;
	CLEANUP_CLOSE int fd = store_memory_layer_open(v->store, layer->id, NULL);
	CLEANUP_CLOSE int sums_fd = store_memory_sums_open(v->store, layer->id, NULL);
	bool open = fd >= 0 && sums_fd >= 0 && page_sums_open(&sums, sums_fd, NULL) == 0 && sums.count == layer->count;
	for (uint64_t at = first, n; at < end; at += n) {
		n = min_u64(end - at, VERIFY_BUFFER_PAGES);
		if (open)
			check_entries(v, layer, &sums, fd, at, n, buffer);
		for (uint64_t i = 0; !open && i < n; i++)
			if (get_bit(layer->needed, at + i))
				mark_wrong(v, layer, at + i);
	}
	page_sums_close(&sums);
}

/* --- telling --- */

static uint32_t describe_run(struct verify *v, const struct needed_layer *layer, const struct wrong_run *run)
{
	struct page_sum_entry first = {0}, last = {0};
	struct page_sums sums = {0};
	CLEANUP_FREE char *file = layer_file(layer->id, ".mem");
	CLEANUP_CLOSE int fd = store_memory_sums_open(v->store, layer->id, NULL);
	if (fd < 0 || page_sums_open(&sums, fd, NULL) != 0 || page_sums_list(&sums, run->first, 1, &first, NULL) != 0 ||
	    page_sums_list(&sums, run->end - 1, 1, &last, NULL) != 0)
		return verify_add_damage(v, file, 0, 0, xasprintf("%s: cannot be read", file));
	uint64_t from = first.place * PAGE_BYTES, to = (last.place + 1) * PAGE_BYTES;
	return verify_add_damage(v, file, from, to - from,
				 xasprintf("%s: bytes %llu to %llu (pages %llu to %llu of the guest's memory) do not match their checksums in layers/%s.sums",
					   file, (unsigned long long)from, (unsigned long long)to - 1, (unsigned long long)first.page,
					   (unsigned long long)last.page, layer->id));
}

static void add_run(struct verify *v, struct needed_layer *layer, uint64_t first, uint64_t end)
{
	(void)v;
	if (layer->run_count == MAX_RUNS) {
		layer->runs[MAX_RUNS - 1].end = end;
		return;
	}
	struct wrong_run *grown = realloc(layer->runs, (layer->run_count + 1) * sizeof(*grown));
	if (!grown)
		abort(); /* as xcalloc: a few bytes */
	layer->runs = grown;
	grown[layer->run_count++] = (struct wrong_run){.first = first, .end = end};
}

static void find_runs(struct verify *v, struct needed_layer *layer)
{
	for (uint64_t at = 0, end; at < layer->count; at = end) {
		end = at + 1;
		if (layer->wrong[at / 64] == 0)
			end = (at | 63) + 1;
		if (!get_bit(layer->wrong, at))
			continue;
		while (end < layer->count && get_bit(layer->wrong, end) && layer->pages[end] == layer->pages[end - 1] + 1)
			end++;
		add_run(v, layer, at, end);
	}
	for (size_t i = 0; i < layer->run_count; i++)
		layer->runs[i].damage = describe_run(v, layer, &layer->runs[i]);
}

void verify_tell_wrong_pages(struct verify *v)
{
	for (size_t i = 0; i < v->layer_count; i++)
		find_runs(v, v->layers[i]);
}

static bool takes_wrong(const struct needed_layer *layer, const struct wrong_run *run, const struct index_extent *extent)
{
	uint64_t at = find_entry(layer, extent->first);
	uint64_t end = find_entry(layer, extent->first + extent->count);
	for (at = max_u64(at, run->first), end = min_u64(end, run->end); at < end; at++)
		if (get_bit(layer->wrong, at))
			return true;
	return false;
}

void verify_blame_pages(struct verify *v, size_t checkpoint, const struct page_index *index)
{
	for (uint64_t e = 0; e < index->extent_count; e++) {
		const struct index_extent *extent = &index->extents[e];
		if (extent->layer == INDEX_ZERO_LAYER)
			continue;
		const char *id = index->layers[extent->layer - 1];
		size_t at = find_place(v, id);
		if (at == v->layer_count || strcmp(v->layers[at]->id, id) != 0)
			continue;
		for (size_t i = 0; i < v->layers[at]->run_count; i++)
			if (takes_wrong(v->layers[at], &v->layers[at]->runs[i], extent))
				verify_blame(v, checkpoint, v->layers[at]->runs[i].damage);
	}
}

void verify_free_layers(struct verify *v)
{
	for (size_t i = 0; i < v->layer_count; i++) {
		free(v->layers[i]->pages);
		free(v->layers[i]->needed);
		free(v->layers[i]->wrong);
		free(v->layers[i]->runs);
		free(v->layers[i]);
	}
	free(v->layers);
}
