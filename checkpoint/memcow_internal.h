/* What the parts of memcow share: memcow.c (life), memcow_fault.c (fault thread), memcow_sweep.c (sweeper),
 * memcow_write.c (writer). */
#ifndef VMCP_CHECKPOINT_MEMCOW_INTERNAL_H
#define VMCP_CHECKPOINT_MEMCOW_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/bitmap.h"
#include "base/priority.h"
#include "checkpoint/memcow.h"
#include "checkpoint/pool.h"

/* Pool of a checkpoint that protects: 48 MiB, of which a third (4096 pages) only the fault thread may take: together with what it may hold, what a
 * guest that faults at full speed needs while the disk stalls for half a second. Mapped while a checkpoint is under way only. */
#define POOL_SEGMENTS 192u
#define POOL_RESERVE  64u
/* For how many pages that fault there is memory at any time, while they may be held. */
#define HOLD_READY_PAGES 1024u
/* Staging: copies beyond the scope's where nothing is said, and how many are ready for the pause at any time. */
#define STAGE_SPARE_PAGES 2048u
#define STAGE_READY_PAGES 1024u
/* Checkpoints that stage and come this often keep their buffers: making some for 10,000 pages takes as long as copying as many. */
#define KEEP_POOL_NS 2000000000u

struct io_uring;

enum memcow_phase {
	MEMCOW_IDLE,	 /* a fault is released: no checkpoint, or one that failed */
	MEMCOW_ARMED,	 /* a fault is released and noted in `dirty` */
	MEMCOW_CAPTURED, /* a fault is copied, claimed and released */
};

enum memcow_way { MEMCOW_PROTECT, MEMCOW_STAGE, MEMCOW_SETTLE, MEMCOW_STOPPED };

/* A set of pages in two levels, so that finding few members in much memory is quick: bit w of `summary` covers word w
 * of `words`. */
struct page_set {
	_Atomic uint64_t *words, *summary;
	uint64_t word_count, summary_count;
};

/* Single copies that wait for the sweeper. memcow_hold.c */
struct hold {
	uint8_t *memory; /* the slots; NULL: none */
	size_t memory_bytes, map_bytes;
	uint32_t slots;
	_Atomic uint32_t *slot_of; /* of each page; 0: none, else one more than the slot's number */
	uint32_t touched;	   /* the first ones; owner: writer, then sweeper */
	pthread_mutex_t lock;	   /* a leaf; of what follows */
	uint32_t used;		   /* so many were ever given out */
	uint32_t *free, free_count;
};

/*
 * Invariants.
 *
 *  1 A page whose bit in `claimed` is set was copied whole, as of the instant, into a segment that goes to the writer, or into
 *    `hold`, from where the sweeper takes it to one, or is marked in `zero`. Copy first, claim second: the copy of whoever fails to claim is dropped.
 *  2 After the instant a page is released only when its bit in `claimed` is set. So the content of an unclaimed page
 *    is that of the instant.
 *  3 Before the instant a page's bit in `dirty` is set after it was released, and cleared before it is protected. So where
 *    the release came last, after the protection, the bit was set after it was cleared: whatever is of the scope and not in `dirty` is
 *    protected, but for a page that the fault thread is at (4). The instant protects or claims the rest.
 *  4 `phase` changes under `lock`, and the fault thread handles each event wholly under it: an event seen as ARMED is
 *    released and noted before the instant begins.
 *  5 Pages outside the scope are claimed from the start: 1 does not hold for them, and nobody saves them.
 *  6 From before the first page is protected until none is, no page is taken away (mem_hold_discards): a hole at the instant was one
 *    when it was protected.
 */
struct memcow {
	/* immutable */
	struct mem *mem;
	uint8_t *base;
	uint64_t pages, blocks; /* a block: 64 pages, one word of the bitmaps */
	int uffd; /* -1: cannot protect */
	int stop_event;
	pthread_t fault_thread;

	_Atomic uint64_t *claimed, *zero;
	struct page_set dirty;

	pthread_mutex_t lock;	       /* outermost of memcow; the pool's is below it */
	enum memcow_phase phase;       /* under lock */
	struct segment *fault_segment; /* under lock: being filled by the fault thread */
	bool uffd_lost;		       /* under lock: protection was given up for good */

	/* of the checkpoint under way; owner: engine thread, unchanged while the threads below live */
	bool active, protecting;
	enum memcow_way way;
	uint64_t *scope;	/* unchanged from the instant on */
	bool whole;		/* the scope is all memory */
	struct segment *staged; /* newest first; the sweeper's from memcow_save on */
	int fd, sums_fd;
	struct seal_pages *cipher; /* the writer's */
	struct pool *pool;
	struct hold hold;     /* protect: has memory then */
	struct pool *kept;    /* between checkpoints that stage, or NULL */
	uint64_t finished_ns; /* the last one that was staged */
	uint64_t *sums;	       /* owner: writer */
	struct io_uring *ring; /* owner: writer, one after the other; NULL: none yet, or this host has none */
	size_t sums_bytes;
	pthread_t sweeper, writer;
	bool sweeper_started, writer_started;

	pthread_mutex_t done_lock; /* all below; a leaf */
	pthread_cond_t done_cond;
	struct priority_room room; /* of the engine's thread */
	uint64_t given_back;   /* the engine's thread: mem_given_back when the last pass of staging began */
	uint64_t room_each_ns; /* how often the threads make room for others: 0 after each block */
	uint64_t max_rate;
	const volatile bool *cancel; /* owner: engine thread */
	bool writer_ready; /* buffers touched, space reserved */
	bool save, stop;   /* the sweeper may start; must not */
	bool writer_done;
	struct err error; /* the first one */
	atomic_bool failed;

	/* counters: any thread */
	_Atomic uint64_t saved_pages, zero_pages, written_bytes, throttled, throttled_ns, arm_faults;
	_Atomic uint64_t scope_pages, armed_again_pages, arm_ns, arm_passes, copied_pages, copy_ns,
		touched_pages, touch_ns; /* written by the engine's thread */
	struct histogram latency;
	/* of all checkpoints */
	struct histogram all_latency;
	_Atomic uint64_t all_throttled, all_throttled_ns;
};

/* --- memcow.c --- */

/* Notes the first error and ends the pool's waiting; the checkpoint is dead, the guest goes on. Any thread. */
void memcow_fail(struct memcow *cow, const struct err *err);
static inline unsigned popcount64(uint64_t bits) { return (unsigned)__builtin_popcountll(bits); }

/* The next populated page at or after a place. */
struct populated {
	uint64_t first, end;
};
/* Moves *at so that it ends behind `page`. Places must ascend; {0} at first. -errno. See mem_find_populated. */
int find_populated(const struct memcow *cow, uint64_t page, struct populated *at);

/* --- pages --- */

/* True if all 4096 bytes are zero. Not watched by ThreadSanitizer: see copy_page. */
bool page_is_zero(const void *page);
/* Copies 4096 bytes. May race with a guest write where invariant 1 drops the copy, so sanitizers must not watch. */
void page_copy(void *to, const void *from);

/* For qsort of entries. */
int memcow_compare_pages(const void *a, const void *b);

/* --- page_set --- */
int page_set_init(struct page_set *set, uint64_t pages, struct err *err);
void page_set_free(struct page_set *set);
/* Adds; true if it was not in. */
bool page_set_add(struct page_set *set, uint64_t page);
uint64_t page_set_count(const struct page_set *set);
/*
 * Takes pages out of the set and calls fn for runs that cover them, in order: a run joins members that are at most
 * `gap` pages apart. Members added meanwhile are covered now or stay in. Ends at the first failure of fn and returns
 * it. *taken (may be NULL) counts the members.
 */
typedef int page_run_fn(void *opaque, uint64_t first, uint64_t count);
int page_set_take(struct page_set *set, uint64_t gap, page_run_fn *fn, void *opaque, uint64_t *taken);
/* Empties it. Nobody adds meanwhile. */
void page_set_clear(struct page_set *set);

/* --- memcow_hold.c --- */
int hold_create(struct hold *hold, uint64_t pages, struct err *err);
/* Nobody uses it any more. {0} is allowed. */
void hold_free(struct hold *hold);
/* Holds a copy of the page; false if no slot is free. One thread at a time, before it claims the page. */
bool hold_copy(struct hold *hold, uint64_t page, const void *source);
/* That copy again, if the page was claimed by another one. */
void hold_drop(struct hold *hold, uint64_t page);
/* Takes the copy of a page that was claimed by who held it, to be written; NULL: there is none. The sweeper. */
uint8_t *hold_take(struct hold *hold, uint64_t page);
bool hold_has(const struct hold *hold, uint64_t first, uint64_t end);
/* Those of its entries that were taken from here were written. */
void hold_put(struct hold *hold, const struct segment *segment);
/* Sees to memory for the next `ahead` slots. One thread at a time. */
void hold_touch(struct hold *hold, uint32_t ahead);

/* --- threads --- */
void *memcow_fault_main(void *opaque);	 /* memcow */
void *memcow_sweeper_main(void *opaque); /* memcow */
void *memcow_writer_main(void *opaque);	 /* memcow */
void memcow_free_ring(struct memcow *cow);
/* Makes invariant 1 true for the page. Under lock, at the instant or later. Waits for the writer where buffers are out.
 * False if the checkpoint failed. */
bool memcow_copy_page(struct memcow *cow, uint64_t page);
/* Gives up protection for good: released, or unregistered, or the userfaultfd closed. Under lock. */
void memcow_lose_protection(struct memcow *cow, const char *what, int number);
/* Waits for memcow_save; false if the checkpoint is abandoned before. */
bool memcow_wait_for_save(struct memcow *cow);

#endif
