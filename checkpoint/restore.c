#include "checkpoint/restore.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/memcow_internal.h"

#define CHUNK_PAGES RESTORE_CHUNK_PAGES
/* Zero pages in a row that are worth a hole instead of zeroes written. */
#define HOLE_PAGES 16u

int restore_init(struct restore_layers *layers, struct store *store, const struct page_index *index, struct err *err)
{
	*layers = (struct restore_layers){.store = store, .index = index};
	layers->layers = calloc((size_t)index->layer_count + 1, sizeof(*layers->layers));
	if (!layers->layers)
		return err_sys(err, ENOMEM, "%u memory layers", index->layer_count);
	for (uint32_t i = 0; i < index->layer_count; i++)
		layers->layers[i] = (struct restore_layer){.fd = -1, .sums = {.fd = -1}};
	return 0;
}

void restore_close(struct restore_layers *layers)
{
	for (uint32_t i = 0; layers->layers && i < layers->index->layer_count; i++) {
		if (layers->layers[i].fd >= 0)
			close(layers->layers[i].fd);
		page_sums_close(&layers->layers[i].sums);
		seal_pages_free(layers->layers[i].cipher);
		if (layers->layers[i].sums.fd >= 0)
			close(layers->layers[i].sums.fd);
	}
	free(layers->layers);
	*layers = (struct restore_layers){0};
}

/* Pages are read by pread, and only below the size seen here: a layer that is cut off later gives an error, never
 * SIGBUS. */
static int open_layer(struct restore_layers *layers, uint32_t number, struct err *err)
{
	const char *name = layers->index->layers[number - 1];
	struct restore_layer *layer = &layers->layers[number - 1];
	struct stat st;
	int fd = store_memory_layer_open(layers->store, name, err);
	if (fd < 0)
		return fd;
	layer->fd = fd;
	/* No more is read than is asked for: a layer is sparse, and what the kernel read ahead would be zeroes, 15 ms of a processor before it looks up. */
	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	if (fstat(fd, &st) != 0)
		return err_sys(err, errno, "memory layer %s", name);
	layer->pages = (uint64_t)st.st_size / PAGE_BYTES;
	int r = store_layer_cipher(layers->store, name, false, &layer->cipher, err);
	if (r != 0)
		return r;
	fd = store_memory_sums_open(layers->store, name, err);
	if (fd < 0)
		return fd;
	r = page_sums_open(&layer->sums, fd, err);
	if (r != 0)
		return err_prefix(err, "memory layer %s", name);
	if (layer->sums.count == 0 || layer->sums.end_place < layer->pages)
		return 0;
	return err_set(err, ERR_DAMAGED, EINVAL, "memory layer %s: its file has %llu bytes instead of %llu or more", name,
		       (unsigned long long)st.st_size, (unsigned long long)(layer->sums.end_place + 1) * PAGE_BYTES);
}

/* Layers are opened when a page of theirs is needed: a long history has many of which this way back needs few. */
static int get_layer(struct restore_layers *layers, uint32_t number, struct restore_layer **out, struct err *err)
{
	*out = &layers->layers[number - 1];
	return (*out)->sums.fd >= 0 ? 0 : open_layer(layers, number, err);
}

/* Of at most CHUNK_PAGES pages. */
static int find_entries(struct restore_layers *layers, uint32_t number, uint64_t first, uint64_t count, struct restore_layer **layer,
			struct page_entry *entries, struct err *err)
{
	int r = get_layer(layers, number, layer, err);
	if (r != 0)
		return r;
	r = page_sums_read(&(*layer)->sums, first, count, entries, err);
	if (r == 0 && !range_within(entries[0].place, count, (*layer)->pages))
		r = err_set(err, ERR_DAMAGED, EINVAL, "page %llu is beyond the end of its file", (unsigned long long)first);
	return r == 0 ? 0 : err_prefix(err, "memory layer %s", layers->index->layers[number - 1]);
}

int restore_find(struct restore_layers *layers, const struct index_extent *part, int *fd, uint64_t *place, struct err *err)
{
	struct page_entry entry, last;
	struct restore_layer *layer;
	int r = find_entries(layers, part->layer, part->first, 1, &layer, &entry, err);
	if (r == 0 && part->count > 1)
		r = find_entries(layers, part->layer, part->first + part->count - 1, 1, &layer, &last, err);
	if (r != 0)
		return r;
	if (part->count > 1 && last.place - entry.place != part->count - 1)
		return err_set(err, ERR_DAMAGED, EINVAL, "memory layer %s: pages from %llu on are not side by side",
			       layers->index->layers[part->layer - 1], (unsigned long long)part->first);
	*fd = layer->fd;
	*place = entry.place;
	return 0;
}

int restore_read(struct restore_layers *layers, uint32_t number, uint64_t first, uint64_t count, uint8_t *data, struct err *err)
{
	struct page_entry entries[CHUNK_PAGES];
	struct restore_layer *layer;
	const char *name = layers->index->layers[number - 1];
	int r = find_entries(layers, number, first, count, &layer, entries, err);
	if (r != 0)
		return r;
	r = file_pread_full(layer->fd, data, count * PAGE_BYTES, entries[0].place * PAGE_BYTES, err);
	if (r != 0)
		return err_prefix(err, "memory layer %s", name);
	for (uint64_t i = 0; i < count; i++) {
		if (entries[i].sum == page_sum(first + i, data + i * PAGE_BYTES))
			continue;
		err_set(err, ERR_DAMAGED, EINVAL, "memory layer %s: page %llu has a wrong checksum", name,
			(unsigned long long)(first + i));
		return err_hint(err, "checkpoints that do not share this layer are not affected: see `vmcp log`");
	}
	return store_cipher_pages(layer->cipher, first, count, data, err);
}

unsigned restore_open_layers(const struct restore_layers *layers)
{
	unsigned open = 0;
	for (uint32_t i = 0; layers->layers && i < layers->index->layer_count; i++)
		open += layers->layers[i].fd >= 0;
	return open;
}

uint8_t *restore_alloc_chunk(struct err *err)
{
	void *chunk = NULL;
	if (posix_memalign(&chunk, PAGE_BYTES, CHUNK_PAGES * PAGE_BYTES) != 0)
		err_sys(err, ENOMEM, "buffer");
	return chunk;
}

/* Pages [first, first + count) of one extent, at most CHUNK_PAGES of them where a layer holds them. */
struct run {
	uint64_t first, count;
	uint32_t layer;
};

/* The next page of `which` at or after `page`. */
static uint64_t next_page(const uint64_t *which, uint64_t page, uint64_t end)
{
	while (page < end) {
		uint64_t bits = which[page / 64] >> (page % 64);
		if (bits)
			return min_u64(page + (unsigned)__builtin_ctzll(bits), end);
		page = (page | 63) + 1;
	}
	return end;
}

/* The next run behind *run and before `end`, of pages of `which` if that is not NULL. False at the end. */
static bool next_run(const struct page_index *index, const uint64_t *which, uint64_t end, struct run *run)
{
	uint64_t page = run->first + run->count;
	if (which)
		page = next_page(which, page, end);
	if (page >= end)
		return false;
	const struct index_extent *e = page_index_find(index, page);
	uint64_t limit = min_u64(e->first + e->count, end);
	if (e->layer != INDEX_ZERO_LAYER)
		limit = min_u64(limit, page + CHUNK_PAGES);
	*run = (struct run){.first = page, .count = limit - page, .layer = e->layer};
	for (uint64_t p = page; which && p < limit; p++) {
		if (which[p / 64] >> (p % 64) & 1)
			continue;
		run->count = p - page;
		break;
	}
	return true;
}

int restore_verify(struct restore_layers *layers, const uint64_t *which, uint64_t first, uint64_t end, uint8_t *chunk, struct err *err)
{
	struct run run = {.first = first};
	int r = 0;
	while (r == 0 && next_run(layers->index, which, end, &run)) {
		if (run.layer == INDEX_ZERO_LAYER)
			continue;
		r = restore_read(layers, run.layer, run.first, run.count, chunk, err);
	}
	return r;
}

/* Puts back the pages of a run that differ: a page that is not written stays as it is for whoever tracks writes. They were checked
 * before, but are read anew, so they are checked anew. */
static int put_back_run(struct mem *mem, struct restore_layers *layers, const struct run *run, uint8_t *chunk,
			uint64_t *changed, struct err *err)
{
	uint8_t *base = mem_base(mem) + run->first * PAGE_BYTES;
	int r = restore_read(layers, run->layer, run->first, run->count, chunk, err);
	for (uint64_t i = 0; i < run->count && r == 0; i++) {
		if (memcmp(base + i * PAGE_BYTES, chunk + i * PAGE_BYTES, PAGE_BYTES) == 0)
			continue;
		memcpy(base + i * PAGE_BYTES, chunk + i * PAGE_BYTES, PAGE_BYTES);
		++*changed;
	}
	return r;
}

static int load_run(struct mem *mem, struct restore_layers *layers, const struct run *run, uint64_t *changed,
		    struct err *err)
{
	uint8_t *base = mem_base(mem) + run->first * PAGE_BYTES;
	int r = restore_read(layers, run->layer, run->first, run->count, base, err);
	*changed += run->count;
	return r;
}

/* [first, first + count) is populated and not zero. */
static int clear_run(struct mem *mem, uint64_t first, uint64_t count, struct err *err)
{
	if (count >= HOLE_PAGES)
		return mem_discard(mem, first * PAGE_BYTES, count * PAGE_BYTES, err);
	memset(mem_base(mem) + first * PAGE_BYTES, 0, count * PAGE_BYTES);
	return 0;
}

/*
 * Pages that must be zero. Only populated ones are looked at: looking at others would populate them. Each is asked for: SEEK_HOLE
 * would walk over all populated pages behind it, see find_populated.
 */
static int clear_pages(struct mem *mem, const struct run *zero, uint64_t *changed, struct err *err)
{
	uint64_t end = zero->first + zero->count, page = zero->first, run = 0; /* [page - run, page) is to be cleared */
	struct populated at = {.first = 0};
	int r = 0;
	while (page < end && r == 0) {
		if (page >= at.end)
			r = mem_find_populated(mem, page, end - page, &at.first, &at.end);
		if (r != 0)
			return err_sys(err, r, "guest memory: cannot find populated pages");
		uint64_t populated = min_u64(max_u64(at.first, page), end);
		if (populated == page && !page_is_zero(mem_base(mem) + page * PAGE_BYTES)) {
			page++;
			run++;
			continue;
		}
		r = clear_run(mem, page - run, run, err);
		*changed += run;
		run = 0;
		page = max_u64(populated, page + 1);
	}
	if (r == 0)
		r = clear_run(mem, end - run, run, err);
	*changed += run;
	return r;
}

int restore_memory(struct mem *mem, struct restore_layers *layers, const uint64_t *which, bool fresh, uint64_t *changed,
		   struct err *err)
{
	CLEANUP_FREE uint8_t *chunk = restore_alloc_chunk(err);
	struct run run = {0};
	int r = chunk ? 0 : -ENOMEM;
	*changed = 0;
	while (r == 0 && next_run(layers->index, which, layers->index->page_count, &run)) {
		if (run.layer == INDEX_ZERO_LAYER)
			r = fresh ? 0 : clear_pages(mem, &run, changed, err);
		else
			r = fresh ? load_run(mem, layers, &run, changed, err)
				  : put_back_run(mem, layers, &run, chunk, changed, err);
	}
	return r;
}
