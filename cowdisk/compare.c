/*
 * Comparing two disks. The maps of both chains say where each range is: one that comes from the same place of the same file is equal without a look, which
 * is what makes two checkpoints of one VM quick to compare. All else is read.
 */
#include "cowdisk/compare.h"

#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/image_internal.h"

enum { CHUNK_BYTES = 1 << 20, PROGRESS_BYTES = 8 << 20 };

struct comparer {
	struct cow_compare *job;
	struct cow_disk *disks[2];
	uint8_t *data[2];
	uint64_t start, end, reported; /* [start, end): the difference found last, not yet told */
};

static void tell(struct comparer *c)
{
	if (c->end > c->start)
		c->job->differs(c->job->opaque, c->start, c->end - c->start);
	c->job->differing_bytes += c->end - c->start;
	c->start = c->end = 0;
}

static void note(struct comparer *c, uint64_t offset, uint64_t length)
{
	if (c->end != offset || c->end == c->start) {
		tell(c);
		c->start = offset;
	}
	c->end = offset + length;
}

static bool is_nothing(const struct image *owner, const struct mapping *m)
{
	return !owner || m->kind == MAP_ZERO || m->kind == MAP_ZERO_HOST || m->kind == MAP_HOLE;
}

static bool is_same(const struct image *a, const struct mapping *ma, const struct image *b, const struct mapping *mb)
{
	if (is_nothing(a, ma) || is_nothing(b, mb))
		return is_nothing(a, ma) && is_nothing(b, mb);
	if (a->device != b->device || a->inode != b->inode || ma->kind != mb->kind)
		return false;
	/* The range is at the same offset of both disks, so a compressed cluster is the same at the same place in it. */
	return ma->kind == MAP_DATA ? ma->host == mb->host : ma->entry == mb->entry;
}

static int compare_data(struct comparer *c, uint64_t offset, uint64_t length, struct err *err)
{
	for (unsigned i = 0; i < 2; i++) {
		int r = cow_read_sync(c->disks[i], offset, c->data[i], (size_t)length, err);
		if (r < 0)
			return err_prefix(err, "%s", c->job->paths[i]);
	}
	c->job->read_bytes += length;
	for (uint64_t at = 0; at < length; at += COW_SECTOR_BYTES)
		if (memcmp(c->data[0] + at, c->data[1] + at, COW_SECTOR_BYTES) != 0)
			note(c, offset + at, COW_SECTOR_BYTES);
	return 0;
}

/* One range for which both maps hold. *length: of it. */
static int compare_range(struct comparer *c, uint64_t offset, uint64_t limit, uint64_t *length, struct err *err)
{
	struct image *owners[2] = {NULL, NULL};
	struct mapping maps[2];
	*length = limit;
	for (unsigned i = 0; i < 2; i++) {
		int r = cow_chain_map(c->disks[i]->top, offset, *length, &owners[i], &maps[i]);
		if (r < 0)
			return err_sys(err, r, "%s: offset %llu", c->job->paths[i], (unsigned long long)offset);
		*length = min_u64(*length, maps[i].length);
	}
	if (is_same(owners[0], &maps[0], owners[1], &maps[1]))
		return 0;
	*length = min_u64(*length, CHUNK_BYTES);
	return compare_data(c, offset, *length, err);
}

static int compare_all(struct comparer *c, struct err *err)
{
	struct cow_compare *job = c->job;
	uint64_t both = min_u64(job->size_bytes[0], job->size_bytes[1]), longer = max_u64(job->size_bytes[0], job->size_bytes[1]);
	int r = 0;
	for (uint64_t at = 0, length; at < both && r == 0; at += length) {
		if (job->cancel && *job->cancel)
			return err_set(err, ERR_FAILED, ECANCELED, "cancelled");
		r = compare_range(c, at, both - at, &length, err);
		if (r == 0 && job->progress && at + length - c->reported >= PROGRESS_BYTES)
			job->progress(job->opaque, c->reported = at + length, both);
	}
	if (r == 0 && longer > both)
		note(c, both, longer - both);
	tell(c);
	return r;
}

static int open_both(struct comparer *c, struct cow_io *io, struct err *err)
{
	for (unsigned i = 0; i < 2; i++) {
		void *data;
		int r = cow_open_as(io, c->job->paths[i], c->job->formats[i], COW_OPEN_READONLY, &c->disks[i], err);
		if (r < 0)
			return r;
		c->job->size_bytes[i] = cow_size(c->disks[i]);
		if (posix_memalign(&data, PAGE_BYTES, CHUNK_BYTES) != 0)
			return err_sys(err, ENOMEM, "buffer");
		c->data[i] = data;
	}
	return 0;
}

int cow_compare(struct cow_compare *compare, struct err *err)
{
	struct comparer c = {.job = compare};
	struct cow_io *io;
	compare->differing_bytes = compare->read_bytes = 0;
	int r = cow_io_create_kind(NULL, false, &io, err);
	if (r < 0)
		return r;
	r = open_both(&c, io, err);
	if (r == 0)
		r = compare_all(&c, err);
	for (unsigned i = 0; i < 2; i++) {
		if (c.disks[i])
			cow_close(c.disks[i], NULL);
		free(c.data[i]);
	}
	cow_io_destroy(io);
	return r;
}
