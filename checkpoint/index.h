/*
 * The index of a checkpoint: which layer holds which page. Complete in itself: no other checkpoint's index is needed to
 * read it. The file is described byte by byte in docs/format.md.
 */
#ifndef VMCP_CHECKPOINT_INDEX_H
#define VMCP_CHECKPOINT_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "checkpoint/store/store.h"

#define INDEX_MAX_BYTES	 (1ull << 32)
#define INDEX_ZERO_LAYER 0u /* the number of "all zeroes" */

struct index_extent {
	uint64_t first, count; /* pages; count > 0 */
	uint32_t layer;	       /* 0: zero pages, else layers[layer - 1] */
};

/* Extents are sorted and cover [0, page_count) exactly once. */
struct page_index {
	uint64_t page_count;
	uint32_t layer_count;
	char (*layers)[STORE_ID_BYTES]; /* malloc */
	uint64_t extent_count;
	struct index_extent *extents; /* malloc */
};
void page_index_free(struct page_index *index);

/* What a checkpoint saved itself. Bitmaps, one bit a page. */
struct page_index_saved {
	const char *layer;
	const uint64_t *scope;	       /* pages that it saved, or found zero */
	const _Atomic uint64_t *zero; /* those of them that are zero: not in the layer */
};
/* Its index: pages outside the scope are where the parent has them. parent NULL: the scope is all memory, else page counts
 * agree. Layers of which no page is left are left out. */
int page_index_build(struct page_index *out, const struct page_index_saved *saved, const struct page_index *parent,
		     uint64_t page_count, struct err *err);

/* The same index with other places for some pages: those of which `from` names the layer from which `index` takes them, too, are taken
 * from `layer`. In `from`, layer 0 stands for pages that are not meant. Page counts agree. */
int page_index_replace(struct page_index *out, const struct page_index *index, const struct page_index *from, const char *layer,
		       struct err *err);
/* True if `layer` is in the table. */
bool page_index_names(const struct page_index *index, const char *layer);

int page_index_encode(const struct page_index *index, struct buf *out, struct err *err);
/* Decodes and validates [data, data + length), which is untrusted: -EINVAL, ERR_DAMAGED. */
int page_index_decode(const void *data, size_t length, struct page_index *out, struct err *err);

/* The names of the layers of an index file, in place: 32 digits each, without a terminator. Header, length and names are checked, the
 * extents are not: -EINVAL, ERR_DAMAGED. */
int page_index_layers(const void *data, size_t length, const char **names, uint32_t *count, struct err *err);

/* Sets in `pages` (bitmap) every page that the two do not take from the same place. Page counts agree. */
void page_index_diff(const struct page_index *a, const struct page_index *b, uint64_t *pages);

/* The extent that holds `page` (< page_count), found by bisection. */
const struct index_extent *page_index_find(const struct page_index *index, uint64_t page);

#endif
