/*
 * Writes. Where a layer has space of its own the data go there at once; where it has not, clusters are claimed, what
 * surrounds the data in the first and last cluster is copied up, everything is written by one operation, and then
 * the tables are turned (I2).
 *
 *     alloc:  claimed -> reading (head, tail) -> writing -> linked | given back
 *
 * While an allocation is under way its guest clusters belong to it: other writes, discards and zeroes there wait,
 * reads see what was there before.
 */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/log.h"
#include "cowdisk/request_internal.h"

static const uint8_t zero_page[64 << 10];

struct alloc *cow_req_find_alloc(const struct image *image, uint64_t start, uint64_t end)
{
	struct alloc *found = NULL;
	for (struct alloc *a = image->q.allocs; a; a = a->next)
		if (a->start < end && start < a->end && (!found || a->start < found->start))
			found = a;
	return found;
}

/* A request of an older layer that is under way and will change a byte of [start, end). */
static struct work *pending_below(const struct work *work, uint64_t start, uint64_t end)
{
	for (struct cow_request *r = work->disk->first; r; r = r->next) {
		struct work *other = r->work;
		if (other->image->generation >= work->image->generation)
			break; /* in order of submission, so of layers */
		bool changes = r->op == COW_WRITE || r->op == COW_DISCARD || r->op == COW_WRITE_ZEROES;
		if (changes && ranges_overlap(r->offset, r->length, start, end - start))
			return other;
	}
	return NULL;
}

/* The iov of the data: the request's, or of zeroes. out == NULL only counts. */
static unsigned data_iov(const struct work *work, uint64_t at, uint64_t length, struct iovec *out)
{
	const struct cow_request *r = work->request;
	if (r->op == COW_WRITE)
		return cow_req_slice_iov(r->iov, r->iov_count, at, length, out);
	unsigned n = 0;
	for (; length > 0; n++) {
		size_t take = (size_t)min_u64(length, sizeof(zero_page));
		if (out)
			out[n] = (struct iovec){(void *)(uintptr_t)zero_page, take};
		length -= take;
	}
	return n;
}

static void write_done(struct io_op *op, int result)
{
	struct part *part = container_of(op, struct part, op);
	struct work *work = part->work;
	struct image *image = work->image;
	if (result == 0 && op->stable && image->synced == image->writes)
		image->synced++;
	if (result < 0 && op->stable)
		cow_image_sync_failed(image, result);
	image->writes++;
	free(part);
	cow_req_part_done(work, result);
}

/*
 * A guest that flushes after each write would wait for a thread twice. What such a guest writes is made stable at once, so that its flush finds nothing
 * to do: unless more is to be synced anyway.
 */
static bool expects_flush(const struct work *work, uint64_t length)
{
	const struct image *image = work->image;
	return work->disk->flushed_alone == FLUSHED_ALONE && length == work->request->length && image->writes == image->synced;
}

static int refuse_format(struct image *image)
{
	if (!image->refused)
		log_warn("%s: the guest makes a qcow2 image of its raw disk: such writes fail", image->path);
	image->refused = true;
	return -EPERM;
}

/* Where it matters what a raw file begins with, a copy is looked at and written, as the guest may change its buffer meanwhile. *head: bytes that are copied. */
static int hold_head(const struct work *work, uint64_t host, uint8_t *copy, uint64_t *head)
{
	const struct cow_request *r = work->request;
	*head = 0;
	if (host > 0 || !work->image->guarded || r->op != COW_WRITE)
		return 0;
	for (const struct iovec *iov = r->iov; *head < COW_SECTOR_BYTES; iov++) {
		size_t n = (size_t)min_u64(iov->iov_len, COW_SECTOR_BYTES - *head);
		memcpy(copy + *head, iov->iov_base, n);
		*head += n;
	}
	return get_be32(copy) == QCOW2_MAGIC ? refuse_format(work->image) : 0;
}

/* Writes [position, position + length) of the request to `host`. */
static int write_in_place(struct work *work, uint64_t host, uint64_t length)
{
	uint8_t copy[COW_SECTOR_BYTES];
	uint64_t head;
	int rc = hold_head(work, host, copy, &head);
	if (rc < 0)
		return rc;
	unsigned n = data_iov(work, work->position + head, length - head, NULL) + (head > 0);
	struct part *part = xcalloc(1, sizeof(*part) + n * sizeof(part->iov[0]) + head);
	data_iov(work, work->position + head, length - head, part->iov + (head > 0));
	if (head)
		part->iov[0] = (struct iovec){memcpy(part->iov + n, copy, head), head};
	part->work = work;
	part->op = (struct io_op){.kind = IO_WRITE,
				  .fd = work->image->fd,
				  .offset = host,
				  .length = length,
				  .iov = part->iov,
				  .iov_count = n,
				  .stable = expects_flush(work, length),
				  .done = write_done};
	work->outstanding++;
	work->position += length;
	cow_io_start(work->image->io, &part->op);
	return 0;
}

static void alloc_end(struct alloc *a, int result)
{
	struct image *image = a->image;
	uint64_t cluster = image_cluster_bytes(image), count = (a->end - a->start) / cluster;
	image->writes++;
	if (result == 0)
		result = fault_check(FAULT_COW_DATA_WRITTEN, NULL);
	if (result == 0)
		result = qcow2_link(image, a->start, a->host * cluster, count);
	if (result < 0 && a->claimed)
		qcow2_unalloc(image, a->host, count);
	if (result == 0)
		result = fault_check(FAULT_COW_LINKED, NULL);
	struct alloc **p = &image->q.allocs;
	while (*p != a)
		p = &(*p)->next;
	*p = a->next;
	cow_req_wake(&a->waiters);
	struct work *work = a->work;
	free(a->head);
	free(a->tail);
	free(a->iov);
	free(a);
	cow_req_part_done(work, result);
}

static void alloc_written(struct io_op *op, int result) { alloc_end(container_of(op, struct alloc, op), result); }

static void alloc_fail(struct io_task *task)
{
	struct alloc *a = container_of(task, struct alloc, task);
	alloc_end(a, a->result);
}

static void alloc_write(struct alloc *a)
{
	struct work *work = a->work;
	struct image *image = a->image;
	uint64_t at = a->data_start - work->request->offset, data_length = a->data_end - a->data_start;
	unsigned n = data_iov(work, at, data_length, NULL), k = 0;
	a->iov = xcalloc(n + 2, sizeof(*a->iov));
	if (a->head)
		a->iov[k++] = (struct iovec){a->head, (size_t)(a->data_start - a->start)};
	k += data_iov(work, at, data_length, a->iov + k);
	if (a->tail)
		a->iov[k++] = (struct iovec){a->tail, (size_t)(a->end - a->data_end)};
	uint64_t from = a->head ? a->start : a->data_start, to = a->tail ? a->end : a->data_end;
	a->op = (struct io_op){.kind = IO_WRITE,
			       .fd = image->fd,
			       .offset = a->host * image_cluster_bytes(image) + (from - a->start),
			       .length = to - from,
			       .iov = a->iov,
			       .iov_count = k,
			       .done = alloc_written};
	int rc = fault_check(FAULT_COW_DATA_WRITE, NULL);
	if (rc == 0) {
		cow_io_start(image->io, &a->op);
		return;
	}
	/* Not from here: the request may still be being split, and must not end meanwhile. */
	a->result = rc;
	a->task.run = alloc_fail;
	cow_io_later(image->io, &a->task);
}

static void copy_up_done(struct chain_read *read, int result)
{
	struct alloc *a = read->opaque;
	if (a->result == 0)
		a->result = result;
	if (--a->reading)
		return;
	if (a->result)
		alloc_end(a, a->result);
	else
		alloc_write(a);
}

/*
 * Decides on one side of the data, [start, end) of the guest: nothing to write (it reads as zeroes, and so does the new
 * space), zeroes, or a copy of what is there now; the latter leaves read->length set.
 */
static int plan_side(struct alloc *a, uint64_t start, uint64_t end, bool fresh, uint8_t **buffer, struct iovec *iov,
		     struct chain_read *read)
{
	uint64_t limit = min_u64(end, a->image->size);
	if (start == end)
		return 0;
	int zero = start >= limit ? 1 : cow_chain_is_zero(a->image, start, limit - start);
	if (zero < 0 || (zero && fresh))
		return zero < 0 ? zero : 0;
	*buffer = calloc(1, (size_t)(end - start));
	if (!*buffer)
		return -ENOMEM;
	if (zero)
		return 0;
	*read = (struct chain_read){.image = a->image, .offset = start, .length = limit - start, .done = copy_up_done};
	read->opaque = a;
	*iov = (struct iovec){*buffer, (size_t)(limit - start)}; /* beyond the end of the disk: zeroes */
	read->iov = iov;
	read->iov_count = 1;
	return 0;
}

/*
 * Both sides by one read, the little between them included (which follows the head in its buffer). No page that is all between them: whatever cannot be read
 * spoils a side as well.
 */
static int join_sides(struct alloc *a)
{
	struct chain_read *head = &a->head_read, *tail = &a->tail_read;
	size_t bytes = (size_t)(a->data_end - a->start);
	if (!head->length || !tail->length || a->data_end / PAGE_BYTES - (a->data_start - 1) / PAGE_BYTES > 1)
		return 0;
	uint8_t *buffer = realloc(a->head, bytes);
	if (!buffer)
		return -ENOMEM;
	a->head = buffer;
	a->side_iov[0] = (struct iovec){buffer, bytes};
	head->iov_count = 2;
	head->length = bytes + tail->length;
	tail->length = 0;
	return 0;
}

static void start_alloc(struct alloc *a)
{
	struct chain_read *reads[2] = {&a->head_read, &a->tail_read};
	for (int i = 0; i < 2; i++) {
		if (reads[i]->length && cow_chain_read_now(reads[i]))
			reads[i]->length = 0;
		a->reading += reads[i]->length != 0;
	}
	if (a->reading == 0) {
		alloc_write(a);
		return;
	}
	for (int i = 0; i < 2; i++)
		if (reads[i]->length)
			cow_chain_read(reads[i]);
}

/* Fills in `a` for a claimed run of clusters. */
static int plan_alloc(struct alloc *a, uint64_t host, bool claimed, bool fresh)
{
	a->host = host;
	a->claimed = claimed;
	int rc = plan_side(a, a->start, a->data_start, fresh, &a->head, &a->side_iov[0], &a->head_read);
	if (rc == 0)
		rc = plan_side(a, a->data_end, a->end, fresh, &a->tail, &a->side_iov[1], &a->tail_read);
	if (rc == 0)
		rc = join_sides(a);
	if (rc < 0) {
		free(a->head);
		free(a->tail);
	}
	return rc;
}

/* Space for the clusters from `start` on, up to `count`. *host: cluster number. */
static int find_space(struct image *image, const struct mapping *m, uint64_t start, uint64_t offset, uint64_t *count,
		      uint64_t *host, bool *claimed, bool *fresh)
{
	unsigned bits = image->q.header.cluster_bits;
	if (m->kind == MAP_ZERO_HOST && m->copied) {
		uint64_t first = m->host - (offset - start);
		if (first >> bits >= image->q.end_cluster || qcow2_hits_metadata(image, first, *count << bits))
			return qcow2_damaged(image,
					     "zero cluster at guest offset 0x%llx lies in metadata or beyond the file",
					     (unsigned long long)start);
		*host = first >> bits;
		*claimed = *fresh = false;
		return 0;
	}
	*claimed = true;
	return qcow2_alloc(image, *count, host, count, fresh);
}

static int alloc_clusters(struct work *work, const struct mapping *m, uint64_t start, uint64_t end)
{
	struct image *image = work->image;
	uint64_t cluster = image_cluster_bytes(image), offset = work->request->offset + work->position, host;
	bool claimed, fresh;
	int rc = qcow2_prepare_l2(image, offset);
	if (rc < 0)
		return rc;
	uint64_t count = min_u64((end - start) / cluster, qcow2_slice_clusters(image, offset));
	rc = find_space(image, m, start, offset, &count, &host, &claimed, &fresh);
	if (rc < 0)
		return rc;
	struct alloc *a = xcalloc(1, sizeof(*a));
	a->image = image;
	a->work = work;
	a->start = start;
	a->end = start + count * cluster;
	a->data_start = offset;
	a->data_end = min_u64(offset + m->length, a->end);
	rc = plan_alloc(a, host, claimed, fresh);
	if (rc < 0) {
		if (claimed)
			qcow2_unalloc(image, host, count);
		free(a);
		return rc;
	}
	a->next = image->q.allocs;
	image->q.allocs = a;
	work->position += a->data_end - a->data_start;
	work->outstanding++;
	start_alloc(a);
	return 0;
}

/* The run needs space. Waits for whom it must, else claims as much of it as can be had in one piece. */
static int alloc_step(struct work *work, struct mapping *m)
{
	struct image *image = work->image;
	uint64_t cluster = image_cluster_bytes(image), offset = work->request->offset + work->position;
	uint64_t data_end = offset + m->length, start = round_down(offset, cluster), end = round_up(data_end, cluster);
	struct alloc *other = cow_req_find_alloc(image, start, end);
	if (other && other->start < start + cluster) {
		cow_req_wait_on(&other->waiters, work);
		return STEP_BLOCKED;
	}
	if (other) {
		end = other->start;
		m->length = end - offset;
		data_end = end;
	}
	if (cow_image_throttled(image)) {
		cow_req_wait_on(&image->q.throttled, work);
		cow_image_writeback(image);
		return STEP_BLOCKED;
	}
	/* What is pending below in a cluster must land there before it is copied up, or the copy would hide it. */
	struct work *below = NULL;
	if (start < offset)
		below = pending_below(work, start, offset);
	if (!below && data_end < end)
		below = pending_below(work, data_end, end);
	if (below) {
		cow_req_wait_on(&below->waiters, work);
		return STEP_BLOCKED;
	}
	return alloc_clusters(work, m, start, end);
}

static int write_run(struct work *work, uint64_t length)
{
	struct image *image = work->image;
	struct mapping m;
	uint64_t offset = work->request->offset + work->position;
	int rc = cow_image_map(image, offset, length, &m);
	if (rc < 0)
		return rc;
	if (m.kind != MAP_DATA || !m.copied)
		return alloc_step(work, &m);
	if (image->format == COW_FORMAT_QCOW2) {
		unsigned bits = image->q.header.cluster_bits;
		if (image->damaged)
			return -EIO;
		if ((m.host + m.length - 1) >> bits >= image->q.end_cluster ||
		    qcow2_hits_metadata(image, m.host, m.length))
			return qcow2_damaged(image, "guest offset 0x%llx lies in metadata or beyond the file",
					     (unsigned long long)offset);
	}
	return write_in_place(work, m.host, m.length);
}

int cow_req_write_step(struct work *work) { return write_run(work, work->request->length - work->position); }

int cow_req_zero_fill_step(struct work *work, uint64_t length)
{
	return write_run(work, min_u64(length, 16 * sizeof(zero_page)));
}
