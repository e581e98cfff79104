#include "checkpoint/stash.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/bytes.h"
#include "checkpoint/engine_internal.h"
#include "checkpoint/memcow_internal.h"

/* Open addressing, at most half full. */
#define TABLE_BITS    13u
#define TABLE_ENTRIES (1u << TABLE_BITS)
_Static_assert(TABLE_ENTRIES >= 2 * STASH_PAGES, "the table stays half empty");

#define ZERO_PLACE UINT32_MAX

struct stash_entry {
	uint32_t page_plus_1; /* 0: free */
	uint32_t place;	      /* in data, or ZERO_PLACE */
};

void stash_free(struct page_stash *stash)
{
	if (stash->data)
		munmap(stash->data, STASH_PAGES * PAGE_BYTES);
	free(stash->table);
	*stash = (struct page_stash){0};
}

static int prepare(struct page_stash *stash, struct err *err)
{
	if (stash->data)
		return 0;
	void *data = mmap(NULL, STASH_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	stash->table = calloc(TABLE_ENTRIES, sizeof(*stash->table));
	if (data == MAP_FAILED || !stash->table) {
		if (data != MAP_FAILED)
			munmap(data, STASH_PAGES * PAGE_BYTES);
		stash_free(stash);
		return err_sys(err, ENOMEM, "pages to be put back");
	}
	stash->data = data;
	return 0;
}

static void empty(struct page_stash *stash)
{
	memset(stash->table, 0, TABLE_ENTRIES * sizeof(*stash->table));
	stash->count = stash->filled = 0;
}

/* The page's entry, or the free one that it would have. */
static struct stash_entry *find(const struct page_stash *stash, uint32_t page)
{
	uint32_t at = (page * 0x9e3779b1u) >> (32 - TABLE_BITS);
	while (stash->table[at].page_plus_1 != 0 && stash->table[at].page_plus_1 != page + 1)
		at = (at + 1) % TABLE_ENTRIES;
	return &stash->table[at];
}

static bool has(const struct page_stash *stash, uint32_t page) { return find(stash, page)->page_plus_1 != 0; }

/* From pages[at] on, pages in a row that are missing and of one extent, as many as are read at once. */
static uint32_t missing_run(const struct page_stash *stash, const struct index_extent *extent, const uint32_t *pages, uint32_t count)
{
	uint64_t end = extent->first + extent->count;
	uint32_t n = 1;
	while (n < count && n < PAGE_SUMS_MAX_READ && pages[n] == pages[0] + n && pages[n] < end && !has(stash, pages[n]))
		n++;
	return n;
}

/* -ENOBUFS: no room. */
static int fill(struct page_stash *stash, struct restore_layers *layers, const uint32_t *pages, uint32_t count, struct err *err)
{
	for (uint32_t i = 0, n; i < count; i += n) {
		n = 1;
		if (has(stash, pages[i]))
			continue;
		const struct index_extent *extent = page_index_find(layers->index, pages[i]);
		bool zero = extent->layer == INDEX_ZERO_LAYER;
		n = missing_run(stash, extent, pages + i, count - i);
		if (stash->count + n > STASH_PAGES)
			return -ENOBUFS;
		int r = zero ? 0 : restore_read(layers, extent->layer, pages[i], n, stash->data + (size_t)stash->filled * PAGE_BYTES, err);
		if (r != 0)
			return r;
		for (uint32_t k = 0; k < n; k++)
			*find(stash, pages[i + k]) = (struct stash_entry){pages[i + k] + 1, zero ? ZERO_PLACE : stash->filled + k};
		stash->count += n;
		stash->filled += zero ? 0 : n;
	}
	return 0;
}

int stash_fill(struct page_stash *stash, struct restore_layers *layers, const uint32_t *pages, uint32_t count, struct err *err)
{
	int r = prepare(stash, err);
	if (r == 0)
		r = fill(stash, layers, pages, count, err);
	if (r == -ENOBUFS) {
		empty(stash);
		r = fill(stash, layers, pages, count, err);
	}
	return r;
}

uint32_t stash_put_back(const struct page_stash *stash, struct mem *mem, const uint32_t *pages, uint32_t count, bool *changed)
{
	uint32_t total = 0;
	for (uint32_t i = 0; i < count; i++) {
		uint8_t *to = mem_base(mem) + (uint64_t)pages[i] * PAGE_BYTES;
		uint32_t place = find(stash, pages[i])->place;
		const uint8_t *from = stash->data + (size_t)place * PAGE_BYTES;
		if (place == ZERO_PLACE) {
			changed[i] = !page_is_zero(to);
			if (changed[i])
				memset(to, 0, PAGE_BYTES);
		} else {
			changed[i] = memcmp(to, from, PAGE_BYTES) != 0;
			if (changed[i])
				page_copy(to, from);
		}
		total += changed[i];
	}
	return total;
}

void stash_trim(struct page_stash *stash)
{
	if (stash->count <= STASH_KEEP_PAGES)
		return;
	/* What stays mapped need not be faulted in the next time. */
	if (stash->filled > STASH_KEEP_PAGES)
		madvise(stash->data + STASH_KEEP_PAGES * PAGE_BYTES, (STASH_PAGES - STASH_KEEP_PAGES) * PAGE_BYTES, MADV_DONTNEED);
	empty(stash);
}
