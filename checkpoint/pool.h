/*
 * The pool of copy buffers between those who copy guest pages (fault thread, sweeper) and the writer.
 *
 *     free --pool_get--> filled by its owner --pool_push--> ready --pool_pop--> being written --pool_put--> free
 *
 * A segment is 64 pages of page-aligned memory with a list of what is in it. The last `reserve` free segments are kept
 * for the fault thread, so that the sweeper cannot make a fault wait, or for what is left when passes end. All is allocated by pool_create;
 * nothing later.
 */
#ifndef VMCP_CHECKPOINT_POOL_H
#define VMCP_CHECKPOINT_POOL_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"

#define SEGMENT_PAGES 64u
#define SEGMENT_BYTES (SEGMENT_PAGES * 4096u)

/* What the writer makes of a segment: pages that follow each other in the file. */
struct segment_write {
	struct segment *segment;
	struct iovec *iov; /* in the segment's iov array; advanced by short writes */
	uint32_t iov_count;
	uint64_t offset, bytes;
};

struct segment {
	uint8_t *data; /* immutable: SEGMENT_BYTES */
	struct segment *next;
	uint32_t count;		  /* entries used */
	bool touched;		  /* owner: who holds it; free: the pool */
	uint32_t writes, pending; /* owner: writer */
	struct segment_entry {
		uint64_t page;
		uint8_t *data; /* in this segment, or in another one that nobody uses until all are written */
	} entries[SEGMENT_PAGES];
	struct iovec iov[SEGMENT_PAGES];	   /* owner: writer */
	struct segment_write write[SEGMENT_PAGES]; /* owner: writer */
};

struct pool;

int pool_create(unsigned segments, unsigned reserve, struct pool **out, struct err *err);
/* Nobody uses it any more. NULL is allowed. */
void pool_destroy(struct pool *pool);
/* Makes one that was used whole again, for another checkpoint: all segments are free. */
void pool_reuse(struct pool *pool, unsigned reserve);
/* Until then the kernel may have its memory, should it need it. All segments are free. */
void pool_rest(struct pool *pool);
unsigned pool_segments(const struct pool *pool);
/* Sees to memory for the next `segments` that will be given out, so that no later use of it faults. */
void pool_touch_next(struct pool *pool, unsigned segments);
/* The same for one segment. */
void segment_touch(struct segment *segment);

/* An empty segment; waits for one. `may_use_reserve`: who must not wait for long. *waited (may be NULL) tells whether it had to.
 * NULL once the pool failed. */
struct segment *pool_get(struct pool *pool, bool may_use_reserve, bool *waited);
/* The same without waiting: NULL also if there is none. */
struct segment *pool_try_get(struct pool *pool);
/* Gives one back, empty. */
void pool_put(struct pool *pool, struct segment *segment);
/* Hands a filled one to the writer. */
void pool_push(struct pool *pool, struct segment *segment);
/* The next filled one. With `wait`, NULL means that the pool is closed or failed, and none will come; else that there
 * is none now. */
struct segment *pool_pop(struct pool *pool, bool wait);
/* True if the fault thread has taken half of the reserve: soon it would have to wait. */
bool pool_is_short(struct pool *pool);
/* Waits until all segments are free: what was pushed is written. False if the pool failed. */
bool pool_drain(struct pool *pool);
/* No push will follow. */
void pool_close(struct pool *pool);
/* Ends all waiting, for good. */
void pool_fail(struct pool *pool);

#endif
