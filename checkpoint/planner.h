/*
 * Chooses how a checkpoint's memory is held (docs/memory-cow.md), from what saving has cost on this host, and this guest, so far.
 *
 * planner_choose is a pure function of its arguments: no clock, no system call, no state. What it knows is measured by those who do
 * the work and noted with planner_note; the constants in planner.c are bounds.
 *
 * Threads: the engine's operation, one at a time.
 */
#ifndef VMCP_CHECKPOINT_PLANNER_H
#define VMCP_CHECKPOINT_PLANNER_H

#include <stdbool.h>
#include <stdint.h>

enum planner_way {
	PLANNER_NONE, /* there is none: the guest's writes can neither be found nor be held up */
	PLANNER_STOPPED,
	PLANNER_STAGE,
	PLANNER_PROTECT,
	PLANNER_SETTLE,
};

/* 0: not known yet. Times in ns, breaks for others included where the VM runs meanwhile. */
struct planner_costs {
	double copy_page_ns;	    /* copying a page into a buffer, while the VM runs */
	double touch_page_ns;	    /* having the memory of a buffer for it, the first time */
	double log_page_ns;	    /* having a page's next write logged again */
	double log_read_ns;	    /* finding what was written, however little */
	double protect_page_ns;	    /* write-protecting one of scattered pages, ahead of the pause */
	double fault_ns;	    /* a write that meets the protection: seen until released */
	double written_pages_per_s; /* different pages that the guest writes in the time of a pass */
	double saved_bytes_per_s;   /* to the file, until they are durable */
	double stage_most_pages;    /* staging of more has failed lately; 0: of none */
};

/* The first measurement counts as it is, a later one half if it is lower, else a quarter, and as no more than the double: a busy
 * host, or a reclaim of memory, makes one dear, nothing makes one too cheap. */
void planner_note(double *cost, double measured);
/* The mean of it and what was known: of rates the newest tells most, up or down. */
void planner_note_rate(double *rate, double measured);
/* The same for what `count` pages took in all. Few say nothing about the one: less than 32 are left out. */
void planner_note_pages(double *cost, double total, uint64_t count);
/* Notes what it takes to copy pages, by a measurement of its own of some 0.1 ms: for a checkpoint before which none was staged, so that it
 * is neither unknown nor old. */
void planner_measure(struct planner_costs *costs);

/* Staging of so many pages did not get ahead of the guest: until some more checkpoints were taken, only less is staged where there is another way. */
void planner_note_failed_staging(struct planner_costs *costs, uint64_t pages);
/* A checkpoint begins: what has failed counts a little less. */
void planner_age(struct planner_costs *costs);

struct planner_case {
	bool live, settled; /* as was asked for */
	bool incremental;
	bool can_protect;    /* userfaultfd */
	bool tracked;	     /* KVM's dirty log */
	bool staging_failed; /* was tried: the guest wrote too fast */
	uint64_t pages;	     /* to save, as far as is known */
	uint64_t memory_pages; /* of the guest: so many it may write meanwhile */
	uint64_t kept_pages; /* for these there are buffers */
	uint64_t free_bytes; /* what the host can spare */
};

#define PLANNER_REASON_BYTES 160

struct planner_plan {
	enum planner_way way;
	uint64_t buffer_pages;	  /* staging: how many copies there may be */
	uint64_t enough_pages;	  /* staging: a pass that finds so few is the last one */
	uint64_t settled_pages;	  /* settling: passes to the file end when they leave so many */
	uint64_t most_left_pages; /* staging: with more than these left for the pause the plan failed, if there is another */
	/* Predicted. */
	uint64_t copied_pages;			 /* staging: with those copied again */
	uint64_t stage_ns, left_pages, pause_ns; /* until the pause, for the pause, its part for memory */
	uint64_t save_ns, faults;		 /* from the pause until durable, and the guest's write faults meanwhile */
	char reason[PLANNER_REASON_BYTES];	 /* one sentence */
};

void planner_choose(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *out);
/* "stage", or "stage-all" where all memory is saved. A constant. */
const char *planner_name(enum planner_way way, bool incremental);

#endif
