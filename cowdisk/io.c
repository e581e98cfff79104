/*
 * The ring and its dispatcher. See io_internal.h.
 *
 *     cow_io_start -> queue -> (hook) -> kernel, threads -> completion -> [rest of a short transfer: queue] -> done
 *
 * Operations gather in the queue while something is plugged (a request that is being split, a turn, the caller's cow_io_plug) and go to the kernel with
 * one system call at the end. Writes go to threads (io_threads).
 *
 * A turn runs the callbacks of all that has ended, then those of its end. The loop's poller looks for something to end while operations are under
 * way; while it rests, and in cow_io_drive, the ring is armed: the event_fd tells.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/io_internal.h"

enum {
	RING_ENTRIES = 256,
	/* All disks share the ring: one that does not answer may hold as many requests as its queues take, and the others must not wait for it. */
	IN_KERNEL = 8192,
};

struct op_queue {
	struct io_op *head, **tail;
};

/* Owner of all fields: the I/O thread, but for disks. */
struct cow_io {
	struct loop *loop;
	struct loop_source *source;
	int event_fd; /* signalled by the ring, by the threads, and by poke */
	bool have_ring;
	struct io_uring ring;
	struct loop_poller *poller; /* NULL without a loop */
	bool armed;		    /* the event_fd is signalled when something has ended */
	struct io_threads *threads; /* with a ring: made by the first write */
	struct op_queue queue;	    /* started, not yet with the kernel or the threads */
	unsigned in_kernel;	    /* or with the threads */
	unsigned in_threads;
	struct cow_turn *turns, **turns_tail;
	struct io_task *tasks, **tasks_tail;
	unsigned task_count;
	unsigned plugged;
	struct slice_cache *cache;
	io_hook_fn *hook;
	void *hook_opaque;
	void (*pump)(void *opaque);
	void *pump_opaque;
	struct op_queue held;
	unsigned held_count;
	_Atomic unsigned disks;
};

static void queue_init(struct op_queue *q)
{
	q->head = NULL;
	q->tail = &q->head;
}

static void queue_push(struct op_queue *q, struct io_op *op)
{
	op->next = NULL;
	*q->tail = op;
	q->tail = &op->next;
}

static struct io_op *queue_pop(struct op_queue *q)
{
	struct io_op *op = q->head;
	if (op) {
		q->head = op->next;
		if (!q->head)
			q->tail = &q->head;
	}
	return op;
}

static void set_armed(struct cow_io *io, bool armed)
{
	io->armed = armed;
	if (io->have_ring)
		io_uring_cq_eventfd_toggle(&io->ring, armed);
	if (io->threads)
		io_threads_arm(io->threads, armed);
	/* Whoever arms looks again: the other side says what has ended, then looks whether it is to tell. */
	atomic_thread_fence(memory_order_seq_cst);
}

static void poke(const struct cow_io *io)
{
	uint64_t one = 1;
	while (write(io->event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* There will be, or is, something for a turn. Without a loop cow_io_drive looks for it. */
static void expect(struct cow_io *io)
{
	if (!io->loop)
		return;
	if (!loop_in_thread(io->loop)) {
		poke(io);
		return;
	}
	loop_poller_heat(io->poller);
	if (io->armed)
		set_armed(io, false);
}

static void prepare_sqe(struct io_uring_sqe *sqe, struct io_op *op)
{
	unsigned count;
	const struct iovec *iov = io_op_iov(op, &count);
	uint64_t offset = op->offset + op->transferred;
	switch (op->kind) {
	case IO_READ:
		io_uring_prep_readv(sqe, op->fd, iov, count, offset);
		break;
	case IO_WRITE:
		io_uring_prep_writev2(sqe, op->fd, iov, count, offset, op->stable ? RWF_DSYNC : 0);
		break;
	case IO_SYNC:
		io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
		break;
	case IO_PUNCH:
		io_uring_prep_fallocate(sqe, op->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
					(off_t)op->length);
		break;
	case IO_ZERO:
		io_uring_prep_fallocate(sqe, op->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
					(off_t)op->length);
		break;
	}
	io_uring_sqe_set_data(sqe, op);
}

static int create_threads(struct cow_io *io, struct err *err)
{
	return io_threads_create(io->event_fd, io->loop && loop_spare(io->loop) > 1, &io->threads, err);
}

static bool for_threads(struct cow_io *io, const struct io_op *op)
{
	if (!io->have_ring)
		return true;
	if (op->kind != IO_WRITE)
		return false;
	if (!io->threads && create_threads(io, NULL) == 0)
		io_threads_arm(io->threads, io->armed);
	return io->threads != NULL;
}

/* From the queue to the kernel and the threads. */
static void hand_over(struct cow_io *io)
{
	while (io->queue.head && io->in_kernel < IN_KERNEL) {
		if (for_threads(io, io->queue.head)) {
			io_threads_add(io->threads, queue_pop(&io->queue));
			io->in_threads++;
		} else {
			struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
			if (!sqe)
				break;
			prepare_sqe(sqe, queue_pop(&io->queue));
		}
		io->in_kernel++;
	}
	if (io->threads)
		io_threads_go(io->threads);
}

/* Gives the queue to the kernel, as far as it takes it. What it does not take now goes with the next turn. */
static void submit_queue(struct cow_io *io)
{
	if (io->queue.head)
		expect(io);
	while (io->queue.head && io->in_kernel < IN_KERNEL) {
		hand_over(io);
		if (!io->have_ring || io_uring_sq_ready(&io->ring) == 0)
			return;
		int rc;
		do
			rc = io_uring_submit(&io->ring);
		while (rc == -EINTR);
		if (rc <= 0)
			return; /* the kernel is short of something */
	}
}

static void fail_task(struct io_task *task)
{
	struct io_op *op = container_of(task, struct io_op, task);
	op->done(op, op->result);
}

/* All of the operation, or what is left of it. */
static void begin(struct cow_io *io, struct io_op *op)
{
	if (io->hook) {
		int verdict = io->hook(io->hook_opaque, op);
		if (verdict < 0) {
			op->result = verdict;
			op->task.run = fail_task;
			cow_io_later(io, &op->task);
			return;
		}
		if (verdict == IO_HOOK_TAKE) {
			io->in_kernel++;
			return;
		}
		if (verdict == IO_HOOK_HOLD) {
			queue_push(&io->held, op);
			io->held_count++;
			return;
		}
	}
	queue_push(&io->queue, op);
	if (!io->plugged)
		submit_queue(io);
}

void cow_io_start(struct cow_io *io, struct io_op *op)
{
	op->transferred = 0;
	op->rest = NULL;
	begin(io, op);
}

int cow_io_read_now(const struct cow_io *io, const struct io_op *op)
{
	if (io->hook) /* it wants to be asked, and perhaps to hold it */
		return 0;
	return preadv2(op->fd, op->iov, (int)op->iov_count, (off_t)op->offset, RWF_NOWAIT) == (ssize_t)op->length;
}

void cow_io_later(struct cow_io *io, struct io_task *task)
{
	task->next = NULL;
	if (!io->tasks && !io->plugged)
		expect(io); /* plugged: unplug or the turn looks after it */
	*io->tasks_tail = task;
	io->tasks_tail = &task->next;
	io->task_count++;
}

void cow_io_plug(struct cow_io *io) { io->plugged++; }

void cow_io_unplug(struct cow_io *io)
{
	if (--io->plugged)
		return;
	submit_queue(io);
	if (io->tasks)
		expect(io);
}

void cow_io_at_turn_end(struct cow_io *io, struct cow_turn *turn)
{
	if (turn->queued)
		return;
	turn->queued = true;
	turn->next = NULL;
	*io->turns_tail = turn;
	io->turns_tail = &turn->next;
	if (!io->plugged)
		expect(io);
}

void cow_io_cancel_turn(struct cow_io *io, struct cow_turn *turn)
{
	struct cow_turn **at = &io->turns;
	if (!turn->queued)
		return;
	while (*at != turn)
		at = &(*at)->next;
	*at = turn->next;
	if (!*at)
		io->turns_tail = at;
	turn->queued = false;
}

/* Makes op->rest from what was not yet transferred. */
static void make_rest(struct io_op *op, uint64_t done_bytes)
{
	unsigned count;
	const struct iovec *iov = io_op_iov(op, &count);
	struct iovec *rest = xcalloc(count, sizeof(*rest));
	unsigned n = 0;
	for (unsigned i = 0; i < count; i++) {
		uint64_t skip = min_u64(done_bytes, iov[i].iov_len);
		done_bytes -= skip;
		if (skip == iov[i].iov_len)
			continue;
		rest[n++] = (struct iovec){(char *)iov[i].iov_base + skip, iov[i].iov_len - skip};
	}
	free(op->rest);
	op->rest = rest;
	op->rest_count = n;
}

static void zero_rest(const struct io_op *op)
{
	unsigned count;
	const struct iovec *iov = io_op_iov(op, &count);
	for (unsigned i = 0; i < count; i++)
		memset(iov[i].iov_base, 0, iov[i].iov_len);
}

static void complete_op(struct cow_io *io, struct io_op *op, int res)
{
	io->in_kernel--;
	if (res == -EINTR || res == -EAGAIN) {
		queue_push(&io->queue, op);
		return;
	}
	int result = res < 0 ? res : 0;
	if (res >= 0 && (op->kind == IO_READ || op->kind == IO_WRITE)) {
		uint64_t left = op->length - op->transferred;
		if ((uint64_t)res < left && res > 0) {
			make_rest(op, (uint64_t)res);
			op->transferred += (uint64_t)res;
			begin(io, op);
			return;
		}
		if (res == 0 && left > 0) {
			if (op->kind == IO_READ)
				zero_rest(op);
			else
				result = -EIO;
		}
	}
	free(op->rest);
	op->rest = NULL;
	op->done(op, result);
}

static void reap_threads(struct cow_io *io)
{
	if (!io->threads || !io_threads_ended(io->threads))
		return;
	for (struct io_op *op = io_threads_reap(io->threads), *next; op; op = next) {
		next = op->next;
		io->in_threads--;
		complete_op(io, op, op->result);
	}
}

static void reap(struct cow_io *io)
{
	reap_threads(io);
	struct io_uring_cqe *cqe;
	/* Bounded, so that completions that start further operations do not keep the thread from its other duties. */
	for (unsigned n = 0; io->have_ring && n < 2 * RING_ENTRIES && io_uring_peek_cqe(&io->ring, &cqe) == 0; n++) {
		struct io_op *op = io_uring_cqe_get_data(cqe);
		int res = cqe->res;
		io_uring_cqe_seen(&io->ring, cqe);
		complete_op(io, op, res);
	}
}

/* Those that are due now; not those that they add. One at a time, as a task may drive the ring itself. */
static void run_tasks(struct cow_io *io)
{
	for (unsigned n = io->task_count; n > 0 && io->tasks; n--) {
		struct io_task *task = io->tasks;
		io->tasks = task->next;
		if (!io->tasks)
			io->tasks_tail = &io->tasks;
		io->task_count--;
		task->run(task);
	}
}

static void run_turn_ends(struct cow_io *io)
{
	for (struct cow_turn *turn; (turn = io->turns);) {
		io->turns = turn->next;
		if (!io->turns)
			io->turns_tail = &io->turns;
		turn->queued = false;
		turn->fn(turn);
	}
}

/* There is something for a turn. */
static bool turn_due(struct cow_io *io)
{
	return io->tasks || io->turns || (io->queue.head && io->in_kernel < IN_KERNEL) ||
	       (io->have_ring && (io_uring_cq_ready(&io->ring) || io_uring_sq_ready(&io->ring))) ||
	       (io->threads && io_threads_ended(io->threads));
}

static void take_turn(struct cow_io *io)
{
	io->plugged++;
	reap(io);
	run_tasks(io);
	run_turn_ends(io);
	io->plugged--;
	submit_queue(io);
}

static void clear_event(const struct cow_io *io)
{
	uint64_t count;
	while (read(io->event_fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

static void on_event(void *opaque, uint32_t events)
{
	struct cow_io *io = opaque;
	(void)events;
	clear_event(io); /* first: what ends after this signals again */
	take_turn(io);
	expect(io); /* looks on, or rests */
}

static bool poll_ring(void *opaque)
{
	struct cow_io *io = opaque;
	if (!turn_due(io))
		return false;
	take_turn(io);
	return true;
}

static bool rest_ring(void *opaque)
{
	struct cow_io *io = opaque;
	set_armed(io, true);
	bool due = turn_due(io);
	if (due)
		set_armed(io, false);
	return due;
}

static bool ring_is_helped(void *opaque) { return ((const struct cow_io *)opaque)->in_threads > 0; }

static const struct loop_poller_ops poller_ops = {.poll = poll_ring, .rest = rest_ring, .helped = ring_is_helped};

static void await(struct cow_io *io, int timeout_ms)
{
	bool before = io->armed;
	set_armed(io, true);
	struct pollfd p = {.fd = io->event_fd, .events = POLLIN};
	if (!turn_due(io) && poll(&p, 1, timeout_ms) > 0)
		clear_event(io);
	set_armed(io, before);
}

void cow_io_drive(struct cow_io *io, int timeout_ms)
{
	submit_queue(io);
	if (io->pump) {
		io->plugged++;
		io->pump(io->pump_opaque);
		io->plugged--;
		timeout_ms = 0;
	}
	if (!turn_due(io))
		await(io, timeout_ms);
	take_turn(io);
	/* A loop may serve it next. */
	if (io->loop && turn_due(io))
		expect(io);
}

static int init_ring(struct cow_io *io)
{
	struct io_uring_params params = {.flags = IORING_SETUP_CQSIZE, .cq_entries = IN_KERNEL};
	int rc = io_uring_queue_init_params(RING_ENTRIES, &io->ring, &params);
	if (rc < 0)
		return rc;
	rc = io_uring_register_eventfd(&io->ring, io->event_fd);
	if (rc < 0) {
		io_uring_queue_exit(&io->ring);
		return rc;
	}
	io->have_ring = true;
	return 0;
}

int cow_io_create_kind(struct loop *loop, bool threads, struct cow_io **out, struct err *err)
{
	struct cow_io *io = xcalloc(1, sizeof(*io));
	io->loop = loop;
	io->tasks_tail = &io->tasks;
	io->turns_tail = &io->turns;
	queue_init(&io->queue);
	queue_init(&io->held);
	int rc = 0;
	io->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (io->event_fd < 0) {
		rc = err_sys(err, errno, "eventfd for disk I/O");
		goto fail;
	}
	rc = threads ? -ENOSYS : init_ring(io);
	if (rc < 0) {
		if (!threads)
			log_info("io_uring cannot be used (%s): disk I/O by threads", strerror(-rc));
		rc = create_threads(io, err);
		if (rc < 0)
			goto fail;
	}
	if (loop) {
		rc = loop_add(loop, io->event_fd, EPOLLIN, on_event, io, &io->source, err);
		if (rc < 0)
			goto fail;
		loop_add_poller(loop, &poller_ops, io, &io->poller);
	}
	set_armed(io, loop != NULL); /* without a loop only cow_io_drive waits */
	io->cache = slice_cache_create();
	*out = io;
	return 0;
fail:
	cow_io_destroy(io);
	return rc;
}

int cow_io_create(struct loop *loop, struct cow_io **out, struct err *err)
{
	return cow_io_create_kind(loop, false, out, err);
}

void cow_io_destroy(struct cow_io *io)
{
	if (!io)
		return;
	if (io->disks || io->in_kernel || io->queue.head)
		log_error("disk I/O torn down with %u disks open and %u operations under way", io->disks,
			  io->in_kernel);
	if (io->source)
		loop_remove(io->loop, io->source);
	if (io->poller)
		loop_remove_poller(io->loop, io->poller);
	if (io->have_ring)
		io_uring_queue_exit(&io->ring);
	io_threads_destroy(io->threads);
	if (io->event_fd >= 0)
		close(io->event_fd);
	slice_cache_destroy(io->cache);
	free(io);
}

void cow_io_set_hook(struct cow_io *io, io_hook_fn *hook, void *opaque)
{
	io->hook = hook;
	io->hook_opaque = opaque;
}

void cow_io_set_pump(struct cow_io *io, void (*pump)(void *opaque), void *opaque)
{
	io->pump = pump;
	io->pump_opaque = opaque;
}

void cow_io_end_taken(struct cow_io *io, struct io_op *op, int result) { complete_op(io, op, result); }

void cow_io_release_held(struct cow_io *io)
{
	for (struct io_op *op; (op = queue_pop(&io->held));) {
		io->held_count--;
		queue_push(&io->queue, op);
	}
	if (!io->plugged)
		submit_queue(io);
}

unsigned cow_io_held(const struct cow_io *io) { return io->held_count; }
struct slice_cache *cow_io_cache(struct cow_io *io) { return io->cache; }
struct loop *cow_io_loop(struct cow_io *io) { return io->loop; }
void cow_io_count_disk(struct cow_io *io, int change) { atomic_fetch_add(&io->disks, (unsigned)change); }
