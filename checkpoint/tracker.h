/*
 * Which pages of guest memory were written since the VM stood at its base, the checkpoint that the next one is incremental to: by
 * the guest and KVM (KVM's dirty log), and by the VMM (its marks in vmm/memory.h).
 *
 *     OFF --start--> ON, no base --set_base--> ON, with base --drop_base--> ON, no base
 *
 * harvest, while the VM runs, moves what was written into `since` and protects it, so that a page written again is found again by
 * the next one: the caller copies the pages of `fresh` after it. collect does the same in the pause, where protecting is not needed:
 * those pages count as written to the next base as well, which costs a copy and is never wrong. rewind makes memory's present content the base's.
 *
 * Threads: the engine's operation, one at a time.
 */
#ifndef VMCP_CHECKPOINT_TRACKER_H
#define VMCP_CHECKPOINT_TRACKER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/event.h"
#include "checkpoint/page_words.h"
#include "vmm/vm.h"

struct tracker;

/* `loop`: where the VMM's writes to guest memory happen. */
int tracker_create(struct vm *vm, struct loop *loop, struct tracker **out, struct err *err);
void tracker_destroy(struct tracker *t); /* NULL is allowed */

/* How often the functions that work while the VM runs make room for others on their processor (priority_give_way_each). */
void tracker_make_room(struct tracker *t, uint64_t each_ns);

/* Starts logging and protects all memory, in chunks with room for the guest if the VM runs. ERR_HOST if KVM cannot. Does
 * nothing if it is on. */
int tracker_start(struct tracker *t, bool vm_runs, struct err *err);
bool tracker_is_on(const struct tracker *t);
bool tracker_has_base(const struct tracker *t);

/* Bitmaps, one bit a ram page, tracker_words long. */
uint64_t tracker_words(const struct tracker *t);
const uint64_t *tracker_since(const struct tracker *t); /* written since the base, as far as harvested or collected */
const uint64_t *tracker_fresh(const struct tracker *t); /* what the last harvest or collect found */
uint64_t tracker_since_count(const struct tracker *t);
/* The same as tracker_fresh, with the list of its words that are not 0. Unchanged until the next harvest or collect. */
struct page_words tracker_fresh_words(const struct tracker *t);

/* While the VM runs; parks the loop for a moment. *count: pages of `fresh`. */
int tracker_harvest(struct tracker *t, uint64_t *count, struct err *err);
/* While the VM runs, after a harvest: how many pages the guest wrote since. Nothing changes but `fresh`, which is empty then. */
int tracker_peek(struct tracker *t, uint64_t *count, struct err *err);
/* vCPUs stand and the loop is parked. Allocates nothing, touches no file. Memory's size costs a copy and one look at the log's bitmap,
 * 32 KiB a GiB; all else is proportional to what was written. */
int tracker_collect(struct tracker *t, uint64_t *count, struct err *err);
/* The base is the instant of the last collect. */
void tracker_set_base(struct tracker *t);
/* vCPUs stand, the loop is parked, memory was just made that of a checkpoint: it is the base, and nothing is written yet. All
 * that was written before was collected, or the tracker was just started. */
int tracker_rewind(struct tracker *t, struct err *err);
/* What the last harvest took, for the planner. */
struct tracker_timing {
	uint64_t at_ns;	  /* CLOCK_MONOTONIC when the log was read */
	uint64_t read_ns; /* reading what KVM and the VMM noted */
	uint64_t log_ns;  /* having the next writes to these pages logged again, breaks for others included */
};
struct tracker_timing tracker_timing(const struct tracker *t);

/*
 * The same where `pages`, sorted, are all that were written since the base, by the last collect and tracker_collect_marks. Those that
 * changed (changed[i]) this time and the time before are not protected anew, but count as written from the start: a page that is
 * written each time costs the guest no fault, and the next revert no call.
 */
int tracker_rewind_pages(struct tracker *t, const uint32_t *pages, uint32_t count, const bool *changed, struct err *err);
/* Adds to `since`, and to `words`, what the VMM marked since the last collect. vCPUs stand since then, the loop is parked. Returns whether there was any. */
bool tracker_collect_marks(struct tracker *t, uint64_t *words);
/* It is not known any more what was written. */
void tracker_drop_base(struct tracker *t);

#endif
