/*
 * The writer: takes filled segments to the layer file, pages that follow each other with one request, through io_uring
 * where the host has it and O_DIRECT where the filesystem takes it. It computes each page's checksum on the way, and in an encrypted store encrypts
 * the page first, in the buffer: a copy that nobody else reads.
 *
 * A scope of some pages is packed: they lie in the file one behind the other, so that scattered pages need no request, and the file no extent,
 * each. Of all memory each page is at its own number, as it is where the scope is not known before the last page is written (settle).
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/priority.h"
#include "checkpoint/memcow_internal.h"
#include "checkpoint/store/seal_crypto.h"
#include "checkpoint/sums.h"

#define QUEUE_DEPTH 64u
#define RATE_STEP_NS 10000000u
/* Zero pages in a row within reserved space that are worth a call to give their space back. */
#define PUNCH_PAGES 64u
/* Space is reserved for whole blocks of this size that hold something. */
#define RESERVE_BYTES (64u * PAGE_BYTES)

struct writer {
	struct memcow *cow;
	struct io_uring *ring; /* NULL: this host has none */
	bool direct, reserved;
	uint32_t *below; /* packed: pages of the scope below each block; NULL: not */
	unsigned inflight;
	struct priority_room room;
	uint64_t start_ns, submitted; /* bytes: for the highest rate */
	struct segment *segment; /* being submitted: writes from `next` on are not yet */
	uint32_t next;
	struct err err; /* the first one; from then on nothing more is submitted */
};

static uint64_t place_of(const struct writer *w, uint64_t page)
{
	if (!w->below)
		return page;
	return w->below[page / 64] + popcount64(w->cow->scope[page / 64] & (((uint64_t)1 << page % 64) - 1));
}

static void fail(struct writer *w, int number)
{
	if (w->err.number == 0)
		err_sys(&w->err, number, "writing the memory layer");
	memcow_fail(w->cow, &w->err);
}

/* What libcrypto cannot encrypt is not written: the first failure ends the save. */
static void encrypt_segment(struct writer *w, const struct segment *segment)
{
	for (uint32_t i = 0; w->cow->cipher && i < segment->count; i++)
		if (!seal_page(w->cow->cipher, segment->entries[i].page, segment->entries[i].data))
			fail(w, EIO);
}

/* Sums, and as few writes as the entries allow. */
static void plan_segment(struct writer *w, struct segment *segment)
{
	uint32_t iov = 0;
	qsort(segment->entries, segment->count, sizeof(segment->entries[0]), memcow_compare_pages); /* those of faults are in no order */
	segment->writes = 0;
	struct segment_write *write = NULL;
	for (uint32_t i = 0; i < segment->count; i++) {
		const struct segment_entry *entry = &segment->entries[i];
		uint8_t *data = entry->data;
		uint64_t offset = place_of(w, entry->page) * PAGE_BYTES;
		if (w->cow->sums)
			w->cow->sums[entry->page] = page_sum(entry->page, data);
		bool follows = write && write->offset + write->bytes == offset;
		if (!follows) {
			write = &segment->write[segment->writes++];
			*write =
				(struct segment_write){.segment = segment, .iov = &segment->iov[iov], .offset = offset};
		}
		struct iovec *last = follows ? &segment->iov[iov - 1] : NULL;
		if (last && (uint8_t *)last->iov_base + last->iov_len == data) {
			last->iov_len += PAGE_BYTES;
		} else {
			segment->iov[iov++] = (struct iovec){.iov_base = data, .iov_len = PAGE_BYTES};
			write->iov_count++;
		}
		write->bytes += PAGE_BYTES;
	}
	segment->pending = segment->writes;
}

static void set_direct(struct writer *w, bool on)
{
	int flags = fcntl(w->cow->fd, F_GETFL);
	w->direct = flags >= 0 && fcntl(w->cow->fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0 && on;
}

static void end_write(struct writer *w, struct segment_write *write)
{
	if (--write->segment->pending > 0)
		return;
	hold_put(&w->cow->hold, write->segment);
	pool_put(w->cow->pool, write->segment);
}

/* What a request came to. True if it must be submitted again, for the rest or for another try. */
static bool account_write(struct writer *w, struct segment_write *write, int result)
{
	if (result == -EAGAIN || result == -EINTR)
		return true;
	if (result == -EINVAL && w->direct) {
		/* The filesystem took the flag, but not the request. */
		set_direct(w, false);
		return true;
	}
	if (result <= 0) {
		fail(w, result == 0 ? EIO : -result);
		end_write(w, write);
		return false;
	}
	uint64_t done = (uint64_t)result;
	if (w->direct && done % PAGE_BYTES != 0 && done < write->bytes)
		done = round_down(done, PAGE_BYTES); /* the rest must stay aligned */
	atomic_fetch_add_explicit(&w->cow->written_bytes, done, memory_order_relaxed);
	write->offset += done;
	write->bytes -= done;
	if (write->bytes == 0) {
		end_write(w, write);
		return false;
	}
	while (done >= write->iov->iov_len) {
		done -= write->iov->iov_len;
		write->iov++;
		write->iov_count--;
	}
	write->iov->iov_base = (uint8_t *)write->iov->iov_base + done;
	write->iov->iov_len -= done;
	return true;
}

static void write_now(struct writer *w, struct segment_write *write)
{
	for (;;) {
		ssize_t n = pwritev(w->cow->fd, write->iov, (int)write->iov_count, (off_t)write->offset);
		if (!account_write(w, write, n < 0 ? -errno : (int)n))
			return;
	}
}

static void submit_write(struct writer *w, struct segment_write *write)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(w->ring);
	if (!sqe) { /* the queue is as deep as `inflight` may get: cannot be */
		write_now(w, write);
		return;
	}
	if (write->iov_count == 1)
		io_uring_prep_write(sqe, w->cow->fd, write->iov->iov_base, (unsigned)write->iov->iov_len,
				    write->offset);
	else
		io_uring_prep_writev(sqe, w->cow->fd, write->iov, write->iov_count, write->offset);
	io_uring_sqe_set_data(sqe, write);
	w->inflight++;
}

static void reap(struct writer *w, bool wait)
{
	struct io_uring_cqe *cqe;
	int r = wait ? io_uring_submit_and_wait(w->ring, 1) : io_uring_submit(w->ring);
	if (r < 0 && r != -EINTR && r != -EAGAIN && r != -EBUSY)
		fail(w, -r); /* what is in flight still completes */
	while (io_uring_peek_cqe(w->ring, &cqe) == 0) {
		struct segment_write *write = io_uring_cqe_get_data(cqe);
		int result = cqe->res;
		io_uring_cqe_seen(w->ring, cqe);
		w->inflight--;
		if (account_write(w, write, result))
			submit_write(w, write);
	}
}

/* Fills the queue from the present segment. */
static void submit_segment(struct writer *w)
{
	while (w->segment && (!w->ring || w->inflight < QUEUE_DEPTH) && w->err.number == 0) {
		struct segment_write *write = &w->segment->write[w->next++];
		bool last = w->next == w->segment->writes;
		if (last)
			w->segment = NULL; /* before it can complete and be reused */
		if (w->ring)
			submit_write(w, write);
		else
			write_now(w, write);
	}
}

/* Sleeps until what was submitted so far is due at the highest rate that is wanted; not while a guest is about to wait for buffers. */
static void keep_rate(struct writer *w, uint64_t bytes)
{
	w->submitted += bytes;
	if (w->cow->max_rate == 0)
		return;
	uint64_t due_ns = w->start_ns + (uint64_t)((double)w->submitted * 1e9 / (double)w->cow->max_rate), now;
	while ((now = clock_now_ns()) < due_ns && !atomic_load_explicit(&w->cow->failed, memory_order_acquire) &&
	       !pool_is_short(w->cow->pool)) {
		struct timespec step = {.tv_nsec = (long)min_u64(due_ns - now, RATE_STEP_NS)};
		nanosleep(&step, NULL);
		if (w->inflight > 0)
			reap(w, false); /* its buffers are wanted */
	}
}

static void write_all(struct writer *w)
{
	w->start_ns = clock_now_ns();
	for (;;) {
		bool took = false;
		int r = w->err.number == 0 ? fault_check(FAULT_MEMCOW_WRITE, &w->err) : 0;
		if (r != 0)
			memcow_fail(w->cow, &w->err);
		if (!w->segment && w->err.number == 0 && w->inflight < QUEUE_DEPTH) {
			w->segment = pool_pop(w->cow->pool, w->inflight == 0);
			w->next = 0;
			took = w->segment != NULL;
			if (w->segment && w->segment->count > 0) {
				encrypt_segment(w, w->segment);
				plan_segment(w, w->segment);
				keep_rate(w, w->segment->count * (uint64_t)PAGE_BYTES);
			} else if (w->segment) {
				pool_put(w->cow->pool, w->segment);
				w->segment = NULL;
				continue;
			} else if (w->inflight == 0) {
				return; /* closed and empty, or failed */
			}
		}
		if (w->err.number != 0)
			w->segment = NULL; /* what is left of it is not submitted any more */
		/* Where it was asleep for too long, on a busy host, what is due by now goes out together. */
		bool more = w->segment != NULL || (took && w->cow->max_rate != 0);
		submit_segment(w);
		priority_give_way_each(w->cow->room_each_ns, &w->room);
		if (w->inflight > 0)
			reap(w, !more || w->inflight >= QUEUE_DEPTH);
		else if (w->err.number != 0)
			return;
	}
}

/* The next run of blocks of RESERVE_BYTES that hold populated pages, at or after *end. False at the end. */
static bool find_run(const struct memcow *cow, uint64_t *first, uint64_t *end)
{
	uint64_t bytes = cow->pages * PAGE_BYTES, at = *end, page, page_end;
	bool found = false;
	while (at < bytes) {
		if (mem_find_populated(cow->mem, at / PAGE_BYTES, 1, &page, &page_end) != 0 || page == cow->pages)
			break;
		uint64_t block = round_down(page * PAGE_BYTES, RESERVE_BYTES);
		if (!found)
			*first = block;
		else if (block != at)
			break;
		found = true;
		*end = at = min_u64(block + RESERVE_BYTES, bytes);
	}
	return found;
}

static int no_space(int number, struct err *err)
{
	err_sys(err, number, "cannot reserve space for the memory layer");
	return err_hint(err, "free space in the store's filesystem, or remove checkpoints (`vmcp rm`)");
}

/* At most: pages may turn out to be zero. */
static uint64_t bytes_to_save(const struct memcow *cow)
{
	return cow->whole ? mem_allocated_bytes(cow->mem) : cow->scope_pages * PAGE_BYTES;
}

/* Before the instant: a look at what is free, so that a checkpoint for which there is no space fails without effect. */
static int check_space(const struct writer *w, struct err *err)
{
	struct statfs fs;
	int r = fault_check(FAULT_MEMCOW_RESERVE, err);
	if (r == 0 && fstatfs(w->cow->fd, &fs) == 0 && (uint64_t)fs.f_bavail < bytes_to_save(w->cow) / (uint64_t)fs.f_bsize)
		return no_space(ENOSPC, err);
	return r;
}

/*
 * Reserves space for what is populated, so that the writer neither runs out of space nor allocates blocks request by request. After the instant, as
 * that would be later by it, and what was free a moment ago mostly still is. Not for scattered pages: it would take a call for each.
 */
static int reserve_space(struct writer *w, struct err *err)
{
	struct memcow *cow = w->cow;
	struct statfs fs;
	/* tmpfs would fill the space with pages; of private memory it is not known what is populated. */
	if (!cow->whole || mem_fd(cow->mem) < 0 || fstatfs(cow->fd, &fs) != 0 || fs.f_type == TMPFS_MAGIC)
		return 0;
	uint64_t first, end = 0;
	for (;;) {
		if (!find_run(cow, &first, &end))
			return 0;
		if (fallocate(cow->fd, FALLOC_FL_KEEP_SIZE, (off_t)first, (off_t)(end - first)) != 0) {
			if (errno != ENOSPC && errno != EDQUOT && errno != EFBIG)
				return 0; /* not possible here: then blocks are allocated as they are written */
			return no_space(errno, err);
		}
		w->reserved = true;
	}
}

/* Zero pages take no space: gives back what reserve_space took for them. Failing costs space only. */
static void return_space(struct writer *w)
{
	struct memcow *cow = w->cow;
	uint64_t run = 0;
	for (uint64_t page = 0; page <= cow->pages; page++) {
		if (page < cow->pages && page % 64 == 0 && page + 64 <= cow->pages &&
		    cow->zero[page / 64] == ~(uint64_t)0) {
			run += 64;
			page += 63;
			continue;
		}
		if (page < cow->pages && bitmap_test(cow->zero, page)) {
			run++;
			continue;
		}
		if (run >= PUNCH_PAGES)
			fallocate(cow->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  (off_t)((page - run) * PAGE_BYTES), (off_t)(run * PAGE_BYTES));
		run = 0;
	}
}

/* Where pages go. The scope is unchanged from here on, unless it settles. */
static int lay_out(struct writer *w, struct err *err)
{
	struct memcow *cow = w->cow;
	uint64_t count = 0;
	if (!cow->whole && cow->way != MEMCOW_SETTLE) {
		w->below = xcalloc(cow->blocks, sizeof(*w->below));
		for (uint64_t b = 0; b < cow->blocks; b++) {
			w->below[b] = (uint32_t)count;
			count += popcount64(cow->scope[b]);
		}
	}
	/* Longer than it is, as a direct write that makes a file longer is a slow one. */
	return ftruncate(cow->fd, (off_t)((w->below ? count : cow->pages) * PAGE_BYTES)) == 0 ? 0 : err_sys(err, errno, "memory layer: ftruncate");
}

/* Nobody claims any more: what is of the scope and not zero is in the file. */
static int write_sums(const struct writer *w, struct err *err)
{
	struct memcow *cow = w->cow;
	if (!cow->sums)
		return 0;
	int r = fault_check(FAULT_MEMCOW_SUMS, err);
	CLEANUP_FREE uint64_t *saved = xcalloc(cow->blocks, sizeof(*saved));
	for (uint64_t b = 0; b < cow->blocks; b++)
		saved[b] = cow->scope[b] & ~atomic_load_explicit(&cow->zero[b], memory_order_acquire);
	if (r == 0)
		r = page_sums_write(cow->sums_fd, saved, w->below ? cow->scope : NULL, cow->sums, cow->pages, err);
	return r == 0 ? 0 : err_prefix(err, "writing the page checksums");
}

static void signal_ready(struct memcow *cow)
{
	pthread_mutex_lock(&cow->done_lock);
	cow->writer_ready = true;
	pthread_cond_broadcast(&cow->done_cond);
	pthread_mutex_unlock(&cow->done_lock);
}

static void signal_done(struct memcow *cow)
{
	pthread_mutex_lock(&cow->done_lock);
	cow->writer_done = true;
	pthread_cond_broadcast(&cow->done_cond);
	pthread_mutex_unlock(&cow->done_lock);
}

/* One for all checkpoints: to make and to end one takes the kernel longer than to write a few pages. */
static struct io_uring *get_ring(struct memcow *cow)
{
	if (cow->ring)
		return cow->ring;
	cow->ring = xcalloc(1, sizeof(*cow->ring));
	if (io_uring_queue_init(QUEUE_DEPTH, cow->ring, 0) != 0) {
		free(cow->ring);
		cow->ring = NULL;
	}
	return cow->ring;
}

void memcow_free_ring(struct memcow *cow)
{
	if (!cow->ring)
		return;
	io_uring_queue_exit(cow->ring);
	free(cow->ring);
}

void *memcow_writer_main(void *opaque)
{
	struct memcow *cow = opaque;
	struct writer w = {.cow = cow};
	pthread_setname_np(pthread_self(), "vmcp-write");
	priority_background();
	/* What must be there at the instant. */
	hold_touch(&cow->hold, HOLD_READY_PAGES);
	w.ring = get_ring(cow);
	set_direct(&w, true);
	if (check_space(&w, &w.err) != 0)
		memcow_fail(cow, &w.err);
	signal_ready(cow);
	/* Pages that are copied in the pause must not bring I/O into it. What settles is written before, and drained. */
	if (cow->way == MEMCOW_SETTLE || memcow_wait_for_save(cow)) {
		if (reserve_space(&w, &w.err) != 0 || lay_out(&w, &w.err) != 0)
			memcow_fail(cow, &w.err);
		write_all(&w);
	}
	if (w.err.number == 0 && !atomic_load_explicit(&cow->failed, memory_order_acquire)) {
		if (w.reserved)
			return_space(&w);
		if (write_sums(&w, &w.err) != 0)
			memcow_fail(cow, &w.err);
	}
	set_direct(&w, false);
	free(w.below);
	signal_done(cow);
	return NULL;
}
