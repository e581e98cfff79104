/*
 * Consolidation of memory layers: what is still needed of old layers is copied into a new one, and the next checkpoint's index names that
 * instead. Existing indices, manifests and layers never change; the old layers die when the last index that names them is removed.
 * docs/memory-cow.md tells when it pays.
 *
 *     plan      the position's index: which layers may be merged, and which are worth it
 *     copy      checked against their checksums, into a layer that a draft of its own owns; synced
 *     ready     waits in the engine, at most one
 *     applied   by the next checkpoint, to its parent's index, page by page where that still takes the page from the layer it was copied from:
 *               layers are immutable, so this is right whatever became of the position meanwhile. The layer then is that checkpoint's.
 *
 * Threads: one at a time consolidates, beside the engine's operations; `ready` is handed over under the engine's lock.
 */
#ifndef VMCP_CHECKPOINT_CONSOLIDATE_H
#define VMCP_CHECKPOINT_CONSOLIDATE_H

#include <stdbool.h>
#include <stdint.h>

#include "checkpoint/index.h"
#include "checkpoint/store/store.h"

/* A layer that may be merged. */
struct layer_use {
	uint32_t number;     /* in the index's table */
	uint64_t live, held; /* pages: that the index takes from it, that it holds */
	bool chosen;
};
/*
 * Chooses layers whose live pages are worth copying, and returns how many; `stored` pages are in layers at all. Reorders the list.
 *
 *   waste   the layers with the smallest live part, as many as together hold at most as much alive as dead; if there are 8, or a quarter as much
 *           is dead as is stored. So no more is copied than the guest has overwritten.
 *   number  else 8 or more of about one size, within a factor of 4: a page is copied once for each such step up in size.
 */
unsigned consolidation_choose(struct layer_use *list, unsigned count, uint64_t stored);

/* Copied pages that wait for an index. */
struct consolidated {
	struct store_draft *draft; /* owns the layer; NULL when it was handed over */
	char layer[STORE_ID_BYTES];
	struct page_index from; /* whence each page was copied; layer 0: it was not */
};
void consolidated_free(struct consolidated *c); /* and the layer, if it was not handed over. NULL is allowed */

#endif
