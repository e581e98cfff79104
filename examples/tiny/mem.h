/*
 * The working set in memory. Page: words 0-4 are magic, seed, index, stamp and a checksum of these, words 5-511
 * are the body. The body holds the page's ground pattern (a function of seed and index) except at two spots, which
 * are chosen by and filled from (seed, index, stamp); with full=1 the whole body is a function of the stamp. A step
 * gives one page a new stamp: it puts the ground back at the old spots, writes the new spots and the header,
 * five cache lines in all. So the content of every byte follows from the ledger, which says each page's stamp.
 *
 * The running sum over (index, stamp) makes a ledger page that is stale together with its pages stand out.
 */
#ifndef TINY_MEM_H
#define TINY_MEM_H

#include <stdbool.h>
#include <stdint.h>

#include "options.h"
#include "pattern.h"
#include "ram.h"

struct mem {
	uint64_t seed;
	bool full;
	enum mem_mode mode;
	uint64_t hot_pages;
	unsigned int page_bits; /* the set is below 2^page_bits pages */
	uint64_t next_page;	/* of mode seq */
	uint64_t pages;
	unsigned int ranges;
	struct ram_range range[RAM_RANGES]; /* where the pages are, in the order of their index */
	uint64_t *ledger;		    /* stamp that each page must have */
	uint64_t sum;			    /* of pattern_base() over the ledger */
	uint64_t writes;
	uint64_t caught; /* steps that found another stamp in the page than the ledger has */
	struct random random;
};

struct mem_fault {
	uint64_t page;
	uint64_t gpa;
	uint64_t word; /* of the page; for word 3 want and got are stamps */
	uint64_t want;
	uint64_t got;
};

/* Lays out the set in what is left of ram. False if there is no room for even one page. */
bool mem_start(struct mem *mem, struct ram *ram, const struct options *options);

/* The first write of every page. */
void mem_fill(struct mem *mem, struct stamp_source *stamps);

/* One page gets a new stamp. */
void mem_step(struct mem *mem, struct stamp_source *stamps);

/*
 * Every word of every page against the ledger, and the ledger against the running sum. Returns how many pages
 * are wrong; the first `room` of them are described in faults. *sum_right is about the ledger.
 */
uint64_t mem_check(const struct mem *mem, struct mem_fault *faults, unsigned int room, bool *sum_right);

#endif
