/*
 * The ring: file operations that end through a callback, in one thread, never from within the call that starts them.
 *
 * Served by io_uring, or by a few threads where the host has none. Short transfers are resumed here; a read beyond
 * the end of the file reads zeroes. All functions run in the I/O thread (or while that thread is parked or does not
 * exist).
 */
#ifndef VMCP_COWDISK_IO_INTERNAL_H
#define VMCP_COWDISK_IO_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"
#include "cowdisk/block.h"

struct io_uring_cqe;
struct slice_cache;
struct io_threads;

/* Something to be done soon, in order, from the top of the dispatcher. Embedded in its owner; queued at most once. */
struct io_task {
	struct io_task *next;
	void (*run)(struct io_task *task);
};

enum io_kind {
	IO_READ,
	IO_WRITE,
	IO_SYNC,  /* fdatasync */
	IO_PUNCH, /* fallocate: deallocate, reads as zeroes; keeps the size */
	IO_ZERO,  /* fallocate: zeroes, stays allocated; keeps the size */
};

struct io_op {
	enum io_kind kind;
	int fd;
	uint64_t offset;
	uint64_t length;
	const struct iovec *iov; /* sum of lengths == length; stays valid and unchanged until done */
	unsigned iov_count;
	bool stable; /* IO_WRITE: when it ends well its data are on stable storage (RWF_DSYNC) */
	bool syncs;  /* IO_WRITE: the file is to be synced behind it, if that needs no wait more; `synced` says that it was. An error may be the sync's */
	bool synced;
	void (*done)(struct io_op *op, int result); /* 0 or -errno; the op may be freed */
	void *opaque;
	/* private to io.c and io_threads.c */
	uint64_t transferred;
	struct iovec *rest; /* what a short transfer left over */
	unsigned rest_count;
	int result;
	struct io_op *next;
	struct io_task task;
};

/* A test's hook, asked before an operation, or the rest of a short transfer, goes to the kernel. */
enum { IO_HOOK_PASS = 0, IO_HOOK_HOLD = 1, IO_HOOK_TAKE = 2 }; /* or a -errno that the operation shall end with */
typedef int io_hook_fn(void *opaque, const struct io_op *op);

/* As cow_io_create. loop may be NULL: then only cow_io_drive serves it. */
int cow_io_create_kind(struct loop *loop, bool threads, struct cow_io **out, struct err *err);

void cow_io_start(struct cow_io *io, struct io_op *op);
/* A read of what is in the page cache, at once: 1; else 0, and nothing was done (its buffers may have changed). */
int cow_io_read_now(const struct cow_io *io, const struct io_op *op);
void cow_io_later(struct cow_io *io, struct io_task *task);

/* Waits at most timeout_ms (-1: no limit) until something ends or is due, and runs its callbacks. May be called from
 * a callback. */
void cow_io_drive(struct cow_io *io, int timeout_ms);

/* Tests only. Held operations start when cow_io_release_held is called (in the order in which they came). */
void cow_io_set_hook(struct cow_io *io, io_hook_fn *hook, void *opaque);
void cow_io_release_held(struct cow_io *io);
unsigned cow_io_held(const struct cow_io *io);

/* Operations that the hook took (IO_HOOK_TAKE) are the test's to carry out and to end, with what the system call would
 * have returned for all of it. It does so in its pump, which cow_io_drive calls each time, and then does not sleep. */
void cow_io_set_pump(struct cow_io *io, void (*pump)(void *opaque), void *opaque);
void cow_io_end_taken(struct cow_io *io, struct io_op *op, int result);

struct slice_cache *cow_io_cache(struct cow_io *io);
struct loop *cow_io_loop(struct cow_io *io);
/* Keeps count, so that a ring with open disks is not destroyed. Any thread. */
void cow_io_count_disk(struct cow_io *io, int change);

/*
 * Threads that carry out operations one system call at a time: writes, which io_uring would hand to threads of the kernel one by one where the file
 * system cannot write without waiting (ext4 into the page cache), and everything where the host has no io_uring.
 *
 * Writes to one file are made in the order in which they were submitted, by one thread at a time, as file systems make writes to a file wait for each
 * other anyway; so a file that does not answer holds up no other.
 */
/* spin: there are processors for who looks for the next operation instead of sleeping, and for the I/O thread beside it. */
int io_threads_create(int event_fd, bool spin, struct io_threads **out, struct err *err);
void io_threads_destroy(struct io_threads *threads); /* nothing is with them */
/* io_threads_go gives what was added to the threads, all of it at once. */
void io_threads_add(struct io_threads *threads, struct io_op *op);
void io_threads_go(struct io_threads *threads);
/* Takes what has ended: a list; op->result is what the system call returned (bytes or -errno). */
struct io_op *io_threads_reap(struct io_threads *threads);
/* Something has ended and was not taken. Any thread. */
bool io_threads_ended(const struct io_threads *threads);
/* From here on event_fd is signalled when something has ended, or no more; some operations may end before that is told. */
void io_threads_arm(struct io_threads *threads, bool armed);

/* The io vectors of what an operation has still to transfer. */
static inline const struct iovec *io_op_iov(const struct io_op *op, unsigned *count)
{
	*count = op->rest ? op->rest_count : op->iov_count;
	return op->rest ? op->rest : op->iov;
}

#endif
