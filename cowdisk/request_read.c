/* Reading a range of a chain: run by run, from whichever layer has it, straight into the caller's buffers. */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/request_internal.h"

enum { NOW_IOV = 4 };

struct read_part {
	struct io_op op;
	struct chain_read *read;
	struct iovec iov[];
};

/* A compressed cluster on its way, and where in it and in the buffers the wanted bytes are. */
struct packed_part {
	struct io_op op;
	struct chain_read *read;
	struct image *image;
	uint64_t entry;
	uint64_t within, at, length; /* offset in the cluster, offset in the range read, bytes */
	struct iovec iov;
	uint8_t data[];
};

static void copy_out(const struct chain_read *read, uint64_t at, const uint8_t *data, uint64_t length)
{
	for (unsigned i = 0; i < read->iov_count && length > 0; i++) {
		size_t size = read->iov[i].iov_len;
		if (at >= size) {
			at -= size;
			continue;
		}
		size_t take = (size_t)min_u64(size - at, length);
		if (data)
			memcpy((char *)read->iov[i].iov_base + at, data, take);
		else
			memset((char *)read->iov[i].iov_base + at, 0, take);
		data = data ? data + take : NULL;
		length -= take;
		at = 0;
	}
}

static void end_task(struct io_task *task)
{
	struct chain_read *read = container_of(task, struct chain_read, task);
	read->done(read, read->result);
}

static void part_ended(struct chain_read *read, int result)
{
	if (read->result == 0)
		read->result = result;
	if (--read->outstanding == 0)
		read->done(read, read->result);
}

static void read_done(struct io_op *op, int result)
{
	struct read_part *part = container_of(op, struct read_part, op);
	struct chain_read *read = part->read;
	free(part);
	part_ended(read, result);
}

static void start_part(struct chain_read *read, const struct image *owner, uint64_t host, uint64_t at, uint64_t length)
{
	unsigned n = cow_req_slice_iov(read->iov, read->iov_count, at, length, NULL);
	struct read_part *part = xcalloc(1, sizeof(*part) + n * sizeof(part->iov[0]));
	cow_req_slice_iov(read->iov, read->iov_count, at, length, part->iov);
	part->read = read;
	part->op = (struct io_op){.kind = IO_READ,
				  .fd = owner->fd,
				  .offset = host,
				  .length = length,
				  .iov = part->iov,
				  .iov_count = n,
				  .done = read_done};
	read->outstanding++;
	cow_io_start(read->image->io, &part->op);
}

static int unpack(struct packed_part *part)
{
	struct qcow2 *q = &part->image->q;
	if (!q->unpacked) {
		q->unpacked = malloc((size_t)image_cluster_bytes(part->image));
		if (!q->unpacked)
			return -ENOMEM;
	}
	q->unpacked_entry = 0;
	int rc = qcow2_unpack(part->image, part->data, (size_t)part->op.length, q->unpacked);
	if (rc == 0)
		q->unpacked_entry = part->entry;
	return rc;
}

static void packed_done(struct io_op *op, int result)
{
	struct packed_part *part = container_of(op, struct packed_part, op);
	struct chain_read *read = part->read;
	if (result == 0)
		result = unpack(part);
	if (result == 0)
		copy_out(read, part->at, part->image->q.unpacked + part->within, part->length);
	free(part);
	part_ended(read, result);
}

static int start_packed(struct chain_read *read, struct image *owner, const struct mapping *m, uint64_t offset,
			uint64_t at)
{
	uint64_t host, bytes, within = offset & (image_cluster_bytes(owner) - 1);
	if (owner->q.unpacked_entry == m->entry) {
		copy_out(read, at, owner->q.unpacked + within, m->length);
		return 0;
	}
	qcow2_compressed_range(owner, m->entry, &host, &bytes);
	struct packed_part *part = malloc(sizeof(*part) + (size_t)bytes);
	if (!part)
		return -ENOMEM;
	*part = (struct packed_part){.read = read, .image = owner, .entry = m->entry, .within = within, .at = at};
	part->length = m->length;
	part->iov = (struct iovec){part->data, (size_t)bytes};
	part->op = (struct io_op){.kind = IO_READ,
				  .fd = owner->fd,
				  .offset = host,
				  .length = bytes,
				  .iov = &part->iov,
				  .iov_count = 1,
				  .done = packed_done};
	read->outstanding++;
	cow_io_start(read->image->io, &part->op);
	return 0;
}

/* Extends the run [offset, offset + m->length) by what follows it in the same file. */
static int extend_run(struct image *image, const struct image *owner, uint64_t offset, uint64_t limit,
		      struct mapping *m)
{
	while (m->length < limit) {
		struct image *next_owner;
		struct mapping next;
		int rc = cow_chain_map(image, offset + m->length, limit - m->length, &next_owner, &next);
		if (rc < 0)
			return rc;
		if (next.kind != MAP_DATA || next_owner != owner || next.host != m->host + m->length)
			break;
		m->length += next.length;
	}
	return 0;
}

static int read_run(struct chain_read *read, uint64_t at, uint64_t *length)
{
	struct image *owner;
	struct mapping m;
	uint64_t offset = read->offset + at, left = read->length - at;
	int rc = cow_chain_map(read->image, offset, left, &owner, &m);
	if (rc < 0)
		return rc;
	switch (m.kind) {
	case MAP_COMPRESSED:
		rc = start_packed(read, owner, &m, offset, at);
		break;
	case MAP_DATA:
		rc = extend_run(read->image, owner, offset, left, &m);
		if (rc == 0)
			start_part(read, owner, m.host, at, m.length);
		break;
	default:
		copy_out(read, at, NULL, m.length);
		break;
	}
	*length = m.length;
	return rc;
}

void cow_chain_read(struct chain_read *read)
{
	read->outstanding = 0;
	read->result = 0;
	for (uint64_t at = 0, length; at < read->length; at += length) {
		int rc = read_run(read, at, &length);
		if (rc < 0) {
			read->result = rc;
			break;
		}
	}
	if (read->outstanding == 0) {
		read->task.run = end_task;
		cow_io_later(read->image->io, &read->task);
	}
}

/* One run, now. 1: it is done; 0: it may have to wait for storage; or -errno. */
static int read_run_now(const struct chain_read *read, uint64_t at, uint64_t *length)
{
	struct image *owner;
	struct mapping m;
	uint64_t offset = read->offset + at, left = read->length - at;
	int rc = cow_chain_map(read->image, offset, left, &owner, &m);
	if (rc == 0 && m.kind == MAP_DATA)
		rc = extend_run(read->image, owner, offset, left, &m);
	if (rc < 0 || m.kind == MAP_COMPRESSED)
		return rc;
	*length = m.length;
	if (m.kind != MAP_DATA) {
		copy_out(read, at, NULL, m.length);
		return 1;
	}
	struct iovec iov[NOW_IOV];
	if (cow_req_slice_iov(read->iov, read->iov_count, at, m.length, NULL) > NOW_IOV)
		return 0;
	unsigned count = cow_req_slice_iov(read->iov, read->iov_count, at, m.length, iov);
	return cow_io_read_now(read->image->io, &(struct io_op){.kind = IO_READ,
								.fd = owner->fd,
								.offset = m.host,
								.length = m.length,
								.iov = iov,
								.iov_count = count});
}

bool cow_chain_read_now(const struct chain_read *read)
{
	for (uint64_t at = 0, length = 0; at < read->length; at += length)
		if (read_run_now(read, at, &length) <= 0)
			return false;
	return true;
}

static void request_read_done(struct chain_read *read, int result)
{
	cow_req_part_done(container_of(read, struct work, read), result);
}

void cow_req_read(struct work *work)
{
	struct cow_request *r = work->request;
	work->read = (struct chain_read){.image = work->image,
					 .offset = r->offset,
					 .length = r->length,
					 .iov = r->iov,
					 .iov_count = r->iov_count,
					 .done = request_read_done};
	work->position = r->length;
	work->outstanding++;
	cow_chain_read(&work->read);
}
