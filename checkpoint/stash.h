/*
 * Pages of one checkpoint in memory, read from their layers and checked against their checksums: on the way back, what is put into the
 * guest's memory are these very bytes. They are kept from one revert to the next, as who reverts often mostly writes the same pages in between.
 *
 * Threads: one at a time for one struct.
 */
#ifndef VMCP_CHECKPOINT_STASH_H
#define VMCP_CHECKPOINT_STASH_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "checkpoint/index.h"
#include "vmm/memory.h"

#define STASH_PAGES	 4096u /* room: 16 MiB */
#define STASH_KEEP_PAGES 1024u /* kept */

struct restore_layers;

/* All zero: empty. */
struct page_stash {
	uint8_t *data; /* mapped: STASH_PAGES pages, of which the first `filled` are */
	uint32_t filled;
	uint32_t count; /* pages that are in, zero pages too, which have no data */
	struct stash_entry *table;
};
void stash_free(struct page_stash *stash);

/* Puts in what is missing of the pages, which are sorted, at most STASH_PAGES; others are thrown out where room is short. A page that does not check:
 * ERR_DAMAGED. The layers are those of the checkpoint whose pages are in. */
int stash_fill(struct page_stash *stash, struct restore_layers *layers, const uint32_t *pages, uint32_t count, struct err *err);
/* Makes pages, which all are in, what they are in the checkpoint. changed[i]: pages[i] differed. Returns how many did. Cannot fail. */
uint32_t stash_put_back(const struct page_stash *stash, struct mem *mem, const uint32_t *pages, uint32_t count, bool *changed);
/* Gives memory back, if much is in. */
void stash_trim(struct page_stash *stash);

#endif
