/*
 * Requests on their way.
 *
 *     submit -> step ... step -> (outstanding operations) -> finish -> done
 *                 |
 *                 '-- blocked: on a wait list (an allocation, an older layer's request, a round) or on the task queue
 *
 * A step handles one run of the request's range and moves `position`. A request belongs to the layer that was the
 * disk's top when it was submitted, for good: what is pending at an overlay switch ends in the layer that is being
 * sealed.
 */
#ifndef VMCP_COWDISK_REQUEST_INTERNAL_H
#define VMCP_COWDISK_REQUEST_INTERNAL_H

#include "cowdisk/block.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/io_internal.h"

enum { FLUSHED_ALONE = 4 }; /* then the next write is taken for one that is flushed as well */

/* Reads a range of a chain. Private state of request_read.c but for the first group. */
struct chain_read {
	struct image *image; /* top of the chain */
	uint64_t offset, length;
	const struct iovec *iov;
	unsigned iov_count;
	void (*done)(struct chain_read *read, int result); /* never from within cow_chain_read */
	void *opaque;

	unsigned outstanding;
	int result;
	struct io_task task;
};

enum { STEP_BLOCKED = 1 }; /* what a step returns besides 0 and -errno: somebody will wake the request */

struct work {
	struct cow_request *request;
	struct cow_disk *disk;
	struct image *image;
	uint64_t sequence;
	uint64_t since_ns;    /* submitted then */
	uint64_t position;    /* bytes of the range that are done or under way */
	unsigned outstanding; /* operations under way */
	int result;
	bool blocked;
	bool raw_tried;	     /* the file system cannot make zeroes */
	struct io_task task; /* continue, or finish */
	struct work *wait_next;
	struct wait_list waiters; /* who waits until this request has ended */
	struct chain_read read;
	struct flush_wait flush;
	struct image *flushing;
};

/* A file operation on a run of a request. */
struct part {
	struct io_op op;
	struct work *work;
	struct iovec iov[];
};

/* An allocating write: [start, end) are whole guest clusters that others must keep away from until it has ended. */
struct alloc {
	struct alloc *next;
	struct image *image;
	struct work *work;
	uint64_t start, end;
	uint64_t host;		       /* cluster number */
	bool claimed;		       /* the clusters are new, else they were there as zero clusters */
	uint64_t data_start, data_end; /* what the request writes */
	uint8_t *head, *tail;	       /* what surrounds it: NULL if it need not be written */
	struct iovec side_iov[2]; /* where head and tail are read to */
	struct chain_read head_read, tail_read;
	unsigned reading;
	int result;
	struct wait_list waiters;
	struct io_op op;
	struct io_task task;
	struct iovec *iov;
};

/* request.c */
void cow_req_continue(struct work *work); /* soon */
void cow_req_part_done(struct work *work, int result);
void cow_req_wait_on(struct wait_list *list, struct work *work);
void cow_req_wake(struct wait_list *list);
/* Wakes them to find that they have failed. */
void cow_req_fail_waiting(struct wait_list *list, int result);
/* Sequence of the oldest request in flight; UINT64_MAX if none is. */
uint64_t cow_req_oldest(const struct cow_disk *disk);
/* iov entries that cover [skip, skip + length) of `iov`; out == NULL only counts. */
unsigned cow_req_slice_iov(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t length, struct iovec *out);

/* request_read.c */
void cow_chain_read(struct chain_read *read);
/* Without waiting for storage. False: it cannot be, or it failed; then it is to be read the other way. Never calls done. */
bool cow_chain_read_now(const struct chain_read *read);
void cow_req_read(struct work *work);

/* request_write.c */
int cow_req_write_step(struct work *work);
/* As a write of `length` zeroes at the work's position. */
int cow_req_zero_fill_step(struct work *work, uint64_t length);
/* The allocation that has a cluster of [start, end), NULL if none has: the one that starts lowest. */
struct alloc *cow_req_find_alloc(const struct image *image, uint64_t start, uint64_t end);

/* request_zero.c */
int cow_req_zero_step(struct work *work); /* write zeroes, discard */
int cow_req_raw_zero_step(struct work *work);

#endif
