/*
 * Discard and write-zeroes. Whole clusters become zero clusters (or holes, where nothing lies below) by their
 * entries alone; what is left over at the ends is written (zeroes) or left alone (discard).
 */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/request_internal.h"

enum { SLICES_PER_STEP = 64 /* then others have their turn */ };

static bool keeps_space(const struct cow_request *r) { return r->op == COW_WRITE_ZEROES && !r->may_unmap; }

/* Zeroes `length` bytes (less than a cluster, or on an image without zero clusters) by writing them, unless they are
 * zero. */
static int fill(struct work *work, uint64_t length)
{
	if (work->request->op == COW_DISCARD) {
		work->position += length;
		return 0;
	}
	length = min_u64(length, 1u << 20);
	uint64_t offset = work->request->offset + work->position;
	int zero = cow_chain_is_zero(work->image, offset, length);
	if (zero < 0)
		return zero;
	/* An allocation under way there may be about to bring other data. */
	uint64_t cluster = image_cluster_bytes(work->image);
	if (zero && !cow_req_find_alloc(work->image, round_down(offset, cluster), round_up(offset + length, cluster))) {
		work->position += length;
		return 0;
	}
	return cow_req_zero_fill_step(work, length);
}

/* Bytes from `offset` on, up to `end`, that are whole clusters; the disk's last one may be short. */
static uint64_t whole_clusters(const struct work *work, uint64_t offset, uint64_t end)
{
	uint64_t cluster = image_cluster_bytes(work->image);
	if (offset & (cluster - 1))
		return 0;
	uint64_t whole = round_down(end, cluster);
	if (end == work->disk->size)
		whole = end;
	return whole > offset ? whole - offset : 0;
}

/* True if the image cannot say "zeroes" without data there: version 2 above another image, or space that must stay. */
static bool must_write(const struct work *work)
{
	const struct image *image = work->image;
	return image->q.header.version < 3 && (image->backing || keeps_space(work->request));
}

/* Clears clusters of one slice. *bytes: how much. */
static int clear_slice(struct work *work, uint64_t offset, uint64_t length, uint64_t *bytes)
{
	struct image *image = work->image;
	uint64_t cluster = image_cluster_bytes(image), missing = qcow2_missing_l2(image, offset);
	*bytes = length;
	if (missing && !image->backing) {
		*bytes = min_u64(length, missing);
		return 0;
	}
	uint64_t count = min_u64(div_round_up(length, cluster), qcow2_slice_clusters(image, offset));
	struct alloc *other = cow_req_find_alloc(image, offset, offset + count * cluster);
	if (other && other->start <= offset) {
		cow_req_wait_on(&other->waiters, work);
		return STEP_BLOCKED;
	}
	if (other)
		count = (other->start - offset) / cluster;
	if (cow_image_throttled(image)) {
		cow_req_wait_on(&image->q.throttled, work);
		cow_image_writeback(image);
		return STEP_BLOCKED;
	}
	*bytes = min_u64(length, count * cluster);
	int rc = qcow2_prepare_l2(image, offset);
	return rc < 0 ? rc : qcow2_clear(image, offset, count, keeps_space(work->request));
}

int cow_req_zero_step(struct work *work)
{
	struct cow_request *r = work->request;
	uint64_t end = r->offset + r->length, cluster = image_cluster_bytes(work->image);
	for (unsigned n = 0; work->position < r->length; n++) {
		uint64_t offset = r->offset + work->position;
		uint64_t whole = must_write(work) ? 0 : whole_clusters(work, offset, end);
		if (whole == 0) {
			uint64_t boundary = round_up(offset + 1, cluster);
			return fill(work, must_write(work) ? end - offset : min_u64(boundary, end) - offset);
		}
		if (n == SLICES_PER_STEP) {
			cow_image_writeback(work->image);
			cow_req_continue(work);
			return STEP_BLOCKED;
		}
		uint64_t bytes;
		int rc = clear_slice(work, offset, whole, &bytes);
		if (rc)
			return rc;
		work->position += bytes;
	}
	return 0;
}

/* raw: the file system does it. */

struct raw_zero {
	struct io_op op;
	struct work *work;
};

static void raw_done(struct io_op *op, int result)
{
	struct raw_zero *z = container_of(op, struct raw_zero, op);
	struct work *work = z->work;
	bool unable = result == -EOPNOTSUPP || result == -ENODEV || result == -EINVAL || result == -ENOSYS;
	free(z);
	work->image->writes++;
	work->outstanding--;
	if (unable && work->request->op == COW_WRITE_ZEROES)
		work->position = 0; /* then by writing: see cow_req_raw_zero_step */
	else if (work->result == 0 && !unable)
		work->result = result;
	work->raw_tried = true;
	cow_req_continue(work);
}

int cow_req_raw_zero_step(struct work *work)
{
	struct cow_request *r = work->request;
	if (work->raw_tried)
		return cow_req_zero_fill_step(work, r->length - work->position);
	struct raw_zero *z = xcalloc(1, sizeof(*z));
	z->work = work;
	z->op = (struct io_op){.kind = keeps_space(r) ? IO_ZERO : IO_PUNCH,
			       .fd = work->image->fd,
			       .offset = r->offset,
			       .length = r->length,
			       .done = raw_done};
	work->outstanding++;
	work->position = r->length;
	cow_io_start(work->image->io, &z->op);
	return STEP_BLOCKED;
}
