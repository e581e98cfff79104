#include "checkpoint/filler.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "checkpoint/uffd.h"

/* Copied before a look at who waits: what somebody may wait longer for that. */
#define STEP_PAGES 16u

struct filler {
	int uffd;
	struct mem *mem;
	struct restore_layers *layers;
	const uint64_t *pages;
	uint64_t page_count;
	struct filler_range {
		uint64_t first, end;
	} *ranges; /* registered, with no file mapped in them */
	size_t range_count, range_room;
	uint8_t data[STEP_PAGES * PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
};

static void *address_of(struct filler *f, uint64_t page) { return mem_base(f->mem) + page * PAGE_BYTES; }

static int add_range(struct filler *f, uint64_t first, uint64_t end, struct err *err)
{
	if (f->range_count == f->range_room) {
		size_t room = f->range_room ? 2 * f->range_room : 64;
		struct filler_range *grown = realloc(f->ranges, room * sizeof(*grown));
		if (!grown)
			return err_sys(err, ENOMEM, "ranges of scattered pages");
		f->ranges = grown;
		f->range_room = room;
	}
	f->ranges[f->range_count++] = (struct filler_range){.first = first, .end = end};
	return 0;
}

/* All between the first and the last of the pages at which no file will be mapped: all of it is registered. */
static int find_ranges(struct filler *f, const uint64_t *mapped, struct err *err)
{
	uint64_t begin = UINT64_MAX, end = 0, first = UINT64_MAX;
	int r = 0;
	for (uint64_t page = 0; page < f->page_count; page++) {
		if (page % 64 == 0 && f->pages[page / 64] == 0) {
			page += 63;
		} else if (bitmap_has(f->pages, page)) {
			begin = min_u64(begin, page);
			end = page + 1;
		}
	}
	for (uint64_t page = begin; page < end && r == 0; page++) {
		if (!bitmap_has(mapped, page)) {
			first = min_u64(first, page);
		} else if (first != UINT64_MAX) {
			r = add_range(f, first, page, err);
			first = UINT64_MAX;
		}
	}
	return r == 0 && first != UINT64_MAX ? add_range(f, first, end, err) : r;
}

/* From the first range to the last with one call: nothing is mapped in between yet, and what will be leaves the registration. */
static int register_all(struct filler *f, struct err *err)
{
	if (f->range_count == 0)
		return 0;
	uint64_t first = f->ranges[0].first, end = f->ranges[f->range_count - 1].end;
	return uffd_register_missing(f->uffd, address_of(f, first), (end - first) * PAGE_BYTES, err);
}

static void unregister_all(struct filler *f)
{
	for (size_t i = 0; i < f->range_count; i++)
		uffd_unregister(f->uffd, address_of(f, f->ranges[i].first),
				(f->ranges[i].end - f->ranges[i].first) * PAGE_BYTES);
	f->range_count = 0;
}

int filler_create(struct mem *mem, struct restore_layers *layers, const uint64_t *pages, const uint64_t *mapped,
		  struct filler **out, struct err *err)
{
	struct filler *f = NULL;
	int uffd = uffd_open_missing(err);
	if (uffd < 0)
		return uffd;
	if (posix_memalign((void **)&f, PAGE_BYTES, sizeof(*f)) != 0) {
		close(uffd);
		return err_sys(err, ENOMEM, "buffer");
	}
	*f = (struct filler){.uffd = uffd, .mem = mem, .layers = layers, .pages = pages, .page_count = mem_pages(mem)};
	int r = find_ranges(f, mapped, err);
	if (r == 0)
		r = register_all(f, err);
	if (r != 0) {
		filler_destroy(f);
		return r;
	}
	*out = f;
	return 0;
}

/* Pages of one extent, at most STEP_PAGES. */
static int fill_pages(struct filler *f, uint64_t first, uint64_t count, struct err *err)
{
	int r = restore_read(f->layers, page_index_find(f->layers->index, first)->layer, first, count, f->data, err);
	if (r != 0)
		return r;
	r = uffd_fill(f->uffd, address_of(f, first), f->data, count * PAGE_BYTES);
	return r == 0 ? 0 : err_sys(err, -r, "fill page %llu of guest memory", (unsigned long long)first);
}

/* All who wait now. */
static int answer(struct filler *f, struct err *err)
{
	uint64_t address;
	int r;
	while ((r = uffd_next_missing(f->uffd, &address)) == 0) {
		uint64_t page = (address - (uint64_t)(uintptr_t)mem_base(f->mem)) / PAGE_BYTES;
		if (bitmap_has(f->pages, page))
			r = fill_pages(f, page, 1, err);
		else if ((r = uffd_fill(f->uffd, address_of(f, page), NULL, PAGE_BYTES)) != 0)
			err_sys(err, -r, "fill page %llu of guest memory", (unsigned long long)page);
		if (r != 0)
			return r;
	}
	return r == -EAGAIN ? 0 : err_sys(err, -r, "userfaultfd");
}

int filler_run(struct filler *f, struct err *err)
{
	const struct page_index *index = f->layers->index;
	uint64_t step = 0;
	int r = 0;
	for (uint64_t i = 0; i < index->extent_count && r == 0; i++) {
		const struct index_extent *e = &index->extents[i];
		if (e->layer == INDEX_ZERO_LAYER || !bitmap_has(f->pages, e->first))
			continue;
		for (uint64_t done = 0, count; done < e->count && r == 0; done += count) {
			count = min_u64(STEP_PAGES, e->count - done);
			r = fill_pages(f, e->first + done, count, err);
			step += count;
			if (r == 0 && step >= STEP_PAGES) {
				r = answer(f, err);
				step = 0;
			}
		}
	}
	if (r == 0)
		unregister_all(f); /* wakes who waits for a page of zeroes in between */
	return r;
}

void filler_destroy(struct filler *f)
{
	if (!f)
		return;
	unregister_all(f);
	close(f->uffd);
	free(f->ranges);
	free(f);
}
