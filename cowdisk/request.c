/* The life of a request. See request_internal.h. */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "cowdisk/request_internal.h"

unsigned cow_req_slice_iov(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t length, struct iovec *out)
{
	unsigned n = 0;
	for (unsigned i = 0; i < count && length > 0; i++) {
		if (skip >= iov[i].iov_len) {
			skip -= iov[i].iov_len;
			continue;
		}
		size_t take = (size_t)min_u64(iov[i].iov_len - skip, length);
		if (out)
			out[n] = (struct iovec){(char *)iov[i].iov_base + skip, take};
		n++;
		length -= take;
		skip = 0;
	}
	return n;
}

static struct work *work_of(const struct cow_request *request) { return request->work; }

uint64_t cow_req_oldest(const struct cow_disk *disk)
{
	return disk->first ? work_of(disk->first)->sequence : UINT64_MAX;
}

void cow_req_wait_on(struct wait_list *list, struct work *work)
{
	work->wait_next = NULL;
	if (list->tail)
		list->tail->wait_next = work;
	else
		list->head = work;
	list->tail = work;
}

void cow_req_wake(struct wait_list *list)
{
	struct work *work = list->head;
	*list = (struct wait_list){0};
	while (work) {
		struct work *next = work->wait_next;
		cow_req_continue(work);
		work = next;
	}
}

void cow_req_fail_waiting(struct wait_list *list, int result)
{
	for (struct work *work = list->head; work; work = work->wait_next)
		work->result = result;
	cow_req_wake(list);
}

static void list_add(struct cow_disk *disk, struct cow_request *r)
{
	r->prev = disk->last;
	r->next = NULL;
	if (disk->last)
		disk->last->next = r;
	else
		disk->first = r;
	disk->last = r;
	disk->inflight++;
}

static void list_remove(struct cow_disk *disk, struct cow_request *r)
{
	if (r->prev)
		r->prev->next = r->next;
	else
		disk->first = r->next;
	if (r->next)
		r->next->prev = r->prev;
	else
		disk->last = r->prev;
	disk->inflight--;
}

static void finish_task(struct io_task *task)
{
	struct work *work = container_of(task, struct work, task);
	struct cow_request *request = work->request;
	struct cow_disk *disk = work->disk;
	struct image *image = work->image;
	int result = work->result;

	list_remove(disk, request);
	atomic_fetch_sub_explicit(&image->inflight, 1, memory_order_release);
	cow_req_wake(&work->waiters);
	if (image->q.frees_ready.count)
		qcow2_frees_release(image);
	if (disk->retired)
		cow_retired_release(disk, false);
	cow_image_writeback(image);
	if (image->seal)
		cow_seal_progress(image);
	free(work);
	request->work = NULL;
	request->done(request, result);
}

static void finish(struct work *work)
{
	work->task.run = finish_task;
	cow_io_later(work->disk->io, &work->task);
}

static int flush_step(struct work *work);

static int step(struct work *work)
{
	switch (work->request->op) {
	case COW_READ:
		cow_req_read(work);
		return 0;
	case COW_WRITE:
		return cow_req_write_step(work);
	case COW_FLUSH:
		return flush_step(work);
	case COW_DISCARD:
	case COW_WRITE_ZEROES:
		return work->image->format == COW_FORMAT_RAW ? cow_req_raw_zero_step(work) : cow_req_zero_step(work);
	}
	return -EINVAL;
}

/* A flush has one step for each layer that is not sealed, whatever its length says. */
static bool steps_left(const struct work *work)
{
	if (work->request->op == COW_FLUSH)
		return work->flushing != NULL;
	return work->position < work->request->length;
}

static void run(struct work *work)
{
	while (work->result == 0 && steps_left(work)) {
		int rc = step(work);
		if (rc == STEP_BLOCKED) {
			work->blocked = true;
			return;
		}
		if (rc < 0)
			work->result = rc;
	}
	if (work->outstanding == 0)
		finish(work);
}

static void run_task(struct io_task *task)
{
	struct work *work = container_of(task, struct work, task);
	work->blocked = false;
	run(work);
}

void cow_req_continue(struct work *work)
{
	work->task.run = run_task;
	cow_io_later(work->disk->io, &work->task);
}

void cow_req_part_done(struct work *work, int result)
{
	if (work->result == 0)
		work->result = result;
	if (--work->outstanding == 0 && !work->blocked)
		finish(work);
}

static void flush_done(struct flush_wait *wait, int result)
{
	struct work *work = container_of(wait, struct work, flush);
	work->outstanding--;
	if (work->result == 0)
		work->result = result;
	cow_req_continue(work);
}

static struct image *deepest_unsealed(struct image *top)
{
	struct image *found = NULL;
	for (struct image *i = top; i && !i->sealed; i = i->backing)
		found = i;
	return found;
}

/* The layer above `image` in the chain from `top`, which is not sealed; NULL if image is the top. A merge may have put `image` out of the chain since: then it was sealed, and so
 * was all below the layers that are not. */
static struct image *next_above(struct image *top, const struct image *image)
{
	if (top == image)
		return NULL;
	for (struct image *i = top; i->backing; i = i->backing)
		if (i->backing == image)
			return i;
	return deepest_unsealed(top);
}

/* Deepest first: layers that are still being sealed owe the guest what it wrote before the switch. */
static int flush_step(struct work *work)
{
	struct image *image = work->flushing;
	work->flushing = next_above(work->image, image);
	work->flush.done = flush_done;
	work->flush.guest = work->image;
	work->outstanding++;
	cow_image_flush(image, &work->flush);
	return STEP_BLOCKED;
}

static int check_request(const struct cow_disk *disk, const struct cow_request *r)
{
	if (r->op == COW_FLUSH)
		return 0;
	if ((r->offset | r->length) % COW_SECTOR_BYTES || !range_within(r->offset, r->length, disk->size))
		return -EINVAL;
	if (r->op != COW_READ && disk->top->readonly)
		return -EROFS;
	if (r->op == COW_DISCARD || r->op == COW_WRITE_ZEROES)
		return 0;
	if (r->op != COW_READ && r->op != COW_WRITE)
		return -EINVAL;
	uint64_t sum = 0;
	if (r->iov_count > COW_MAX_IOV)
		return -EINVAL;
	for (unsigned i = 0; i < r->iov_count; i++)
		if (add_overflows(sum, r->iov[i].iov_len, &sum))
			return -EINVAL;
	return sum == r->length ? 0 : -EINVAL;
}

static void watch_flushes(struct cow_disk *disk, enum cow_op op)
{
	if (op == COW_READ)
		return;
	if (op == COW_FLUSH && disk->unflushed && disk->flushed_alone < FLUSHED_ALONE)
		disk->flushed_alone++;
	if (op != COW_FLUSH && disk->unflushed)
		disk->flushed_alone = 0;
	disk->unflushed = op != COW_FLUSH;
}

void cow_submit(struct cow_disk *disk, struct cow_request *request)
{
	struct work *work = xcalloc(1, sizeof(*work));
	work->request = request;
	work->disk = disk;
	work->image = disk->top;
	work->sequence = ++disk->sequence;
	work->since_ns = clock_coarse_ns();
	request->disk = disk;
	request->work = work;
	list_add(disk, request);
	atomic_fetch_add_explicit(&work->image->inflight, 1, memory_order_relaxed);
	if (request->op != COW_READ && request->op != COW_FLUSH)
		atomic_store_explicit(&work->image->touched, true, memory_order_relaxed);
	work->result = check_request(disk, request);
	if (request->op == COW_FLUSH)
		work->flushing = deepest_unsealed(disk->top);
	watch_flushes(disk, request->op);
	cow_io_plug(disk->io);
	run(work);
	cow_io_unplug(disk->io);
}

unsigned cow_inflight(const struct cow_disk *disk) { return disk->inflight; }
