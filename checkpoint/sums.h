/*
 * Which pages a memory layer has, where in its file, and their checksums: layers/<id>.sums, described byte by byte in docs/format.md. Sorted by
 * page, so that a layer of few pages has a small file, and a reader finds a page by bisection, without reading the file as a whole.
 *
 * Threads: one at a time for one struct.
 */
#ifndef VMCP_CHECKPOINT_SUMS_H
#define VMCP_CHECKPOINT_SUMS_H

#include <stdint.h>

#include "base/err.h"
#include "vmm/memory.h"

/* The checksum of a page: another one for the same bytes as another page, so that an entry that leads to the wrong place is found out. */
uint64_t page_sum(uint64_t page, const void *data);

struct page_entry {
	uint64_t place; /* in the layer's file, in pages. Places ascend with pages: pages that follow each other are side by side */
	uint64_t sum;
};

/* Writes the file, from its start, for the pages set in `saved`. Bitmaps of `pages` bits. placed: a page's place is the number of pages in it
 * below the page; NULL: the page's own number. sums[p]: of page p. */
int page_sums_write(int fd, const uint64_t *saved, const uint64_t *placed, const uint64_t *sums, uint64_t pages, struct err *err);

struct page_sums {
	int fd; /* the caller's */
	uint64_t count;
	uint64_t end_page, end_place; /* of the last entry, untrusted: to guess where a page is */
	uint64_t next, next_page; /* where the last read ended: most go on from there */
	uint8_t *window;	  /* malloc: entries [window_at, window_at + window_count) */
	uint64_t window_at, window_count;
};

/* -EINVAL, ERR_DAMAGED if it is no such file. */
int page_sums_open(struct page_sums *s, int fd, struct err *err);
/* Frees what is kept. The descriptor stays open. */
void page_sums_close(struct page_sums *s);
/* The entries of the pages [first, first + count), count up to PAGE_SUMS_MAX_READ. -EINVAL, ERR_DAMAGED if the layer has none for
 * one of them, or if they are not side by side. */
#define PAGE_SUMS_MAX_READ 256u
int page_sums_read(struct page_sums *s, uint64_t first, uint64_t count, struct page_entry *entries, struct err *err);
/* Entries [at, at + count) in the file's order, whatever they are of. Within the number of entries. */
struct page_sum_entry {
	uint64_t page, place, sum;
};
int page_sums_list(const struct page_sums *s, uint64_t at, uint64_t count, struct page_sum_entry *entries, struct err *err);

#endif
