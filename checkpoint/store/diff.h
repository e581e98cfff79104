/* Which pages of memory two checkpoints have different. */
#ifndef VMCP_CHECKPOINT_STORE_DIFF_H
#define VMCP_CHECKPOINT_STORE_DIFF_H

#include "checkpoint/store/store.h"

struct memory_diff {
	const volatile bool *cancel; /* turning true ends it with -ECANCELED. NULL allowed */
	void (*progress)(void *opaque, uint64_t done_bytes, uint64_t total_bytes); /* NULL allowed */
	void *opaque;
	/* results */
	uint64_t total_pages[2];   /* what one has more counts as different */
	uint64_t differing_pages;
	uint64_t compared_pages;   /* content was looked at: they are not in the same layer, nor zero in both */
	struct diff_range {
		uint64_t start, bytes;
	} *ranges; /* malloc; of guest-physical addresses, ascending */
	size_t range_count;
};

/* Holds both meanwhile. What is read is checked: damage is ERR_DAMAGED. On failure there is nothing to free. */
int store_diff_memory(struct store *store, const char *a, const char *b, struct memory_diff *diff, struct err *err);

#endif
