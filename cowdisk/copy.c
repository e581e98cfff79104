/*
 * Copying runs of data from one disk to another, several at a time.
 *
 *     slot:  free -> reading -> [part by part: writing, or writing zeroes] -> free
 *
 * A slot takes a run of the source that is all data, or all zeroes, and no longer than its buffer. Runs do not overlap and so need no
 * order; two that share a cluster of the target are the engine's business.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "cowdisk/copy_internal.h"

enum { SLOTS = 8, SLOT_BYTES = 1 << 20, POLL_MS = 20, PROGRESS_BYTES = 8 << 20 };
enum run_class { RUN_HOLE, RUN_ZERO, RUN_DATA };

struct slot {
	struct cow_request request;
	struct iovec iov;
	struct copier *copier;
	bool busy;
	uint64_t start, length, done; /* of the run */
	uint64_t part;		      /* bytes being written */
	uint8_t *data;
};

struct copier {
	struct copy_job *job;
	struct cow_io *io;
	uint64_t size, position, reported;
	uint64_t grain; /* zeroes are found in such pieces */
	uint64_t started_ns, paid_bytes;
	unsigned busy;
	int result;
	struct slot slots[SLOTS];
};

/* Where a raw file that does not change keeps no blocks, it reads as zeroes: true; *run is cut where that ends. */
static bool is_hole(const struct image *image, uint64_t place, uint64_t *run)
{
	if (image->format != COW_FORMAT_RAW || !(image->readonly || image->fixed))
		return false;
	uint64_t end;
	bool hole = file_is_hole(image->fd, place, &end);
	*run = min_u64(*run, end - place);
	return hole;
}

/* What the next bytes are, as far as that is the same and known in one look. */
static int classify(struct copier *c, uint64_t offset, uint64_t length, enum run_class *class, uint64_t *run)
{
	struct image *owner;
	struct mapping m;
	const struct image *stop = c->job->stop;
	int rc = cow_chain_map(c->job->from->top, offset, length, &owner, &m);
	if (rc < 0)
		return rc;
	*run = m.length;
	if (!owner || (stop && owner->generation <= stop->generation))
		*class = RUN_HOLE;
	else if (m.kind == MAP_DATA)
		*class = is_hole(owner, m.host, run) ? RUN_ZERO : RUN_DATA;
	else
		*class = m.kind == MAP_COMPRESSED ? RUN_DATA : RUN_ZERO;
	return 0;
}

static int find_run(struct copier *c, enum run_class *class, uint64_t *length)
{
	uint64_t limit = c->size - c->position, n;
	int rc = classify(c, c->position, limit, class, length);
	uint64_t most = *class == RUN_DATA ? (uint64_t)SLOT_BYTES : limit;
	while (rc == 0 && *length < most && *length < limit) {
		enum run_class next;
		rc = classify(c, c->position + *length, min_u64(most, limit) - *length, &next, &n);
		if (rc < 0 || next != *class)
			break;
		*length += n;
	}
	*length = min_u64(*length, most);
	return rc;
}

static void release(struct slot *slot, int result)
{
	struct copier *c = slot->copier;
	if (c->result == 0)
		c->result = result;
	slot->busy = false;
	c->busy--;
}

static void write_next(struct slot *slot);

/* Where nothing was copied to yet. */
static bool reads_zero(const struct copy_job *job) { return !job->to->top->backing && !job->keeps; }

static void written(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	slot->done += slot->part;
	if (result < 0)
		release(slot, result);
	else
		write_next(slot);
}

/* End of the grain in which `at` lies. */
static uint64_t grain_end(const struct slot *slot, uint64_t at)
{
	uint64_t grain = slot->copier->grain, offset = slot->start + at;
	return min_u64(offset - offset % grain + grain - slot->start, slot->length);
}

/* The next part of the run: as many grains as are alike. */
static void write_next(struct slot *slot)
{
	struct copier *c = slot->copier;
	for (;;) {
		uint64_t at = slot->done, end;
		if (at == slot->length) {
			release(slot, 0);
			return;
		}
		end = grain_end(slot, at);
		bool zero = bytes_are_zero(slot->data + at, end - at);
		while (end < slot->length) {
			uint64_t next = grain_end(slot, end);
			if (bytes_are_zero(slot->data + end, next - end) != zero)
				break;
			end = next;
		}
		slot->part = end - at;
		if (zero && reads_zero(c->job)) {
			slot->done = end; /* as it is */
			continue;
		}
		slot->iov = (struct iovec){slot->data + at, (size_t)slot->part};
		slot->request = (struct cow_request){.op = zero ? COW_WRITE_ZEROES : COW_WRITE,
						     .may_unmap = true,
						     .offset = slot->start + at,
						     .length = slot->part,
						     .iov = &slot->iov,
						     .iov_count = zero ? 0 : 1,
						     .done = written,
						     .opaque = slot};
		c->job->data_bytes += zero ? 0 : slot->part;
		cow_submit(c->job->to, &slot->request);
		return;
	}
}

static void data_read(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	if (result < 0)
		release(slot, result);
	else
		write_next(slot);
}

static void start_run(struct copier *c, struct slot *slot, enum run_class class, uint64_t length)
{
	struct copy_job *job = c->job;
	slot->copier = c;
	slot->busy = true;
	c->busy++;
	slot->start = c->position;
	slot->length = length;
	slot->done = 0;
	slot->part = length;
	slot->iov = (struct iovec){slot->data, (size_t)length};
	slot->request = (struct cow_request){.offset = slot->start, .length = length, .opaque = slot};
	if (class == RUN_ZERO) {
		slot->request.op = COW_WRITE_ZEROES;
		slot->request.may_unmap = true;
		slot->request.done = written;
		cow_submit(job->to, &slot->request);
		return;
	}
	slot->request.op = COW_READ;
	slot->request.done = data_read;
	slot->request.iov = &slot->iov;
	slot->request.iov_count = 1;
	c->paid_bytes += length;
	cow_submit(job->from, &slot->request);
}

static bool may_go_on(const struct copier *c)
{
	uint64_t rate = c->job->bytes_per_second;
	if (rate == 0)
		return true;
	double due_ns = (double)c->paid_bytes / (double)rate * 1e9;
	return (double)(clock_now_ns() - c->started_ns) >= due_ns;
}

static void report(struct copier *c, bool always)
{
	const struct copy_job *job = c->job;
	if (!job->progress || (!always && c->position - c->reported < PROGRESS_BYTES))
		return;
	c->reported = c->position;
	job->progress(job->opaque, c->position, c->size);
}

static struct slot *free_slot(struct copier *c)
{
	for (unsigned i = 0; i < SLOTS; i++)
		if (!c->slots[i].busy)
			return &c->slots[i];
	return NULL;
}

/* Starts what there is room for. */
static int start_some(struct copier *c)
{
	struct slot *slot;
	while (c->position < c->size && (slot = free_slot(c)) && may_go_on(c)) {
		enum run_class class = RUN_HOLE;
		uint64_t length = 0;
		int rc = find_run(c, &class, &length);
		if (rc < 0)
			return rc;
		if (class == RUN_DATA || (class == RUN_ZERO && !reads_zero(c->job)))
			start_run(c, slot, class, length);
		c->position += length;
		report(c, false);
	}
	return 0;
}

static bool is_cancelled(const struct copy_job *job)
{
	return job->cancel && __atomic_load_n(job->cancel, __ATOMIC_RELAXED);
}

static int work_through(struct copier *c)
{
	int rc = 0;
	while (rc == 0 && c->result == 0 && (c->position < c->size || c->busy)) {
		if (is_cancelled(c->job))
			rc = -ECANCELED;
		if (rc == 0)
			rc = start_some(c);
		if (rc == 0 && (c->busy || c->position < c->size))
			cow_io_drive(c->io, POLL_MS);
	}
	while (c->busy)
		cow_io_drive(c->io, -1);
	return rc ? rc : c->result;
}

int cow_copy(struct copy_job *job, struct err *err)
{
	struct copier *c = xcalloc(1, sizeof(*c));
	c->job = job;
	c->io = job->from->io;
	c->size = job->from->size;
	c->grain = image_cluster_bytes(job->to->top);
	c->started_ns = clock_now_ns();
	int rc = 0;
	for (unsigned i = 0; i < SLOTS && rc == 0; i++)
		if (posix_memalign((void **)&c->slots[i].data, PAGE_BYTES, SLOT_BYTES))
			rc = -ENOMEM;
	if (rc == 0)
		rc = work_through(c);
	if (rc == 0)
		report(c, true);
	for (unsigned i = 0; i < SLOTS; i++)
		free(c->slots[i].data);
	free(c);
	if (rc == -ECANCELED)
		return err_set(err, ERR_STATE, ECANCELED, "cancelled");
	return rc < 0 ? err_sys(err, rc, "copying %s to %s", cow_path(job->from), cow_path(job->to)) : 0;
}
