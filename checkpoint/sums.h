/*
 * The page checksums of a memory layer: layers/<id>.sums, described byte by byte in docs/format.md. Sorted by page, so that a layer
 * of few pages has a small file, and a reader finds a page by bisection, without reading the file as a whole.
 *
 * Threads: one at a time for one struct.
 */
#ifndef VMCP_CHECKPOINT_SUMS_H
#define VMCP_CHECKPOINT_SUMS_H

#include <stdint.h>

#include "base/err.h"

/* Writes the file, from its start. sums[p]: xxh3-64 of page p, for the pages set in `saved`, bitmap of `pages` bits. */
int page_sums_write(int fd, const uint64_t *saved, const uint64_t *sums, uint64_t pages, struct err *err);

struct page_sums {
	int fd; /* the caller's */
	uint64_t count;
	uint64_t end_page; /* of the last entry, untrusted: to guess where a page is */
	uint64_t next, next_page; /* where the last read ended: most go on from there */
	uint8_t *window;	  /* malloc: entries [window_at, window_at + window_count) */
	uint64_t window_at, window_count;
};

/* -EINVAL, ERR_DAMAGED if it is no such file. */
int page_sums_open(struct page_sums *s, int fd, struct err *err);
/* Frees what is kept. The descriptor stays open. */
void page_sums_close(struct page_sums *s);
/* Sums of the pages [first, first + count), count up to PAGE_SUMS_MAX_READ. -EINVAL, ERR_DAMAGED if the layer has none for
 * one of them. */
#define PAGE_SUMS_MAX_READ 256u
int page_sums_read(struct page_sums *s, uint64_t first, uint64_t count, uint64_t *sums, struct err *err);

#endif
