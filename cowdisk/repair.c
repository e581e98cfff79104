/*
 * Repairing reference counts. See check.h.
 *
 *     1 blocks and table, written behind the end of the file, synced     the header still names the old ones
 *     2 the header names the new ones, synced                            one sector: the old or the new
 *     3 copied flags                                                     cleared where a cluster is shared, set where not
 *     4 the marks in the header
 *
 * After each step the file is no worse than before it. The old table and its blocks are simply not counted any more.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "cowdisk/check_internal.h"

struct repair {
	struct checker c;
	uint64_t start;		/* first cluster of the new structures: table, then blocks */
	uint64_t table, blocks; /* clusters */
};

static size_t first_at_least(const struct checker *c, uint64_t cluster)
{
	size_t low = 0, high = c->count;
	while (low < high) {
		size_t middle = low + (high - low) / 2;
		if (c->references[middle] < cluster)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* What the count of a cluster is to be. */
static int wanted(struct repair *r, uint64_t cluster, uint64_t *out, struct err *err)
{
	struct checker *c = &r->c;
	uint64_t n = 0, old;
	bool there;
	if (cluster >= r->start) {
		*out = cluster < r->start + r->table + r->blocks;
		return 0;
	}
	for (size_t i = first_at_least(c, cluster); i < c->count && c->references[i] == cluster; i++)
		n++;
	*out = n;
	if (!c->incomplete)
		return 0;
	/* Somebody we could not hear may use it. */
	int rc = cow_checker_count(c, cluster, &old, &there, err);
	if (rc == 0)
		*out = max_u64(n, there ? old : cluster < div_round_up(c->file_bytes, c->cluster));
	return rc;
}

static uint64_t most(const struct checker *c)
{
	return c->header.refcount_order == 6 ? UINT64_MAX : ((uint64_t)1 << (1u << c->header.refcount_order)) - 1;
}

static int plan(struct repair *r, struct err *err)
{
	struct checker *c = &r->c;
	uint64_t per_block = c->cluster * 8 >> c->header.refcount_order;
	r->start = div_round_up(c->file_bytes, c->cluster);
	if (c->count)
		r->start = max_u64(r->start, c->references[c->count - 1] + 1);
	r->table = r->blocks = 1;
	for (;;) {
		uint64_t blocks = div_round_up(r->start + r->table + r->blocks, per_block);
		uint64_t table = div_round_up(blocks * 8, c->cluster);
		if (table * c->cluster > QCOW2_MAX_REFTABLE_BYTES)
			return err_set(err, ERR_DAMAGED, EFBIG, "the tables lead too far beyond the end of the file");
		if (blocks <= r->blocks && table <= r->table)
			return 0;
		r->blocks = max_u64(blocks, r->blocks);
		r->table = max_u64(table, r->table);
	}
}

static int write_block(struct repair *r, uint64_t index, uint8_t *block, struct err *err)
{
	struct checker *c = &r->c;
	uint64_t per_block = c->cluster * 8 >> c->header.refcount_order;
	memset(block, 0, (size_t)c->cluster);
	for (uint64_t k = 0; k < per_block; k++) {
		uint64_t count, cluster = index * per_block + k;
		int rc = wanted(r, cluster, &count, err);
		if (rc < 0)
			return rc;
		if (count > most(c))
			return err_set(err, ERR_DAMAGED, ERANGE,
				       "cluster %" PRIu64 " is used %" PRIu64
				       " times, more than a count of %u bits can say",
				       cluster, count, 1u << c->header.refcount_order);
		qcow2_encode_count(block, c->header.refcount_order, k, count);
	}
	return file_pwrite_full(c->fd, block, (size_t)c->cluster, (r->start + r->table + index) * c->cluster, err);
}

static int sync_file(const struct repair *r, struct err *err)
{
	return fdatasync(r->c.fd) < 0 ? err_sys(err, errno, "sync") : 0;
}

static int write_structures(struct repair *r, struct err *err)
{
	struct checker *c = &r->c;
	CLEANUP_FREE uint8_t *block = malloc((size_t)c->cluster);
	CLEANUP_FREE uint8_t *table = calloc((size_t)r->table, (size_t)c->cluster);
	if (!block || !table)
		return err_sys(err, ENOMEM, "reference counts");
	int rc = 0;
	for (uint64_t i = 0; rc == 0 && i < r->blocks; i++) {
		put_be64(table + i * 8, (r->start + r->table + i) * c->cluster);
		rc = write_block(r, i, block, err);
	}
	if (rc == 0)
		rc = file_pwrite_full(c->fd, table, (size_t)(r->table * c->cluster), r->start * c->cluster, err);
	if (rc == 0)
		rc = sync_file(r, err);
	if (rc < 0)
		return rc;
	uint8_t header[12];
	put_be64(header, r->start * c->cluster);
	put_be32(header + 8, (uint32_t)r->table);
	rc = file_pwrite_full(c->fd, header, sizeof(header), QCOW2_AT_REFTABLE_OFFSET, err);
	return rc < 0 ? rc : sync_file(r, err);
}

/* Sets the flag of an entry of the active tables right; where the table is shared with a snapshot it is only cleared. */
static int fix_entry(struct repair *r, uint64_t at, uint64_t *entry, bool shared, struct err *err)
{
	uint64_t offset = *entry & QCOW2_OFFSET_MASK, count = 0, fixed = *entry & ~QCOW2_COPIED;
	bool packed = *entry & QCOW2_COMPRESSED;
	if (!packed && offset == 0)
		return 0;
	if (!packed && offset % r->c.cluster == 0 && !shared) {
		int rc = wanted(r, offset / r->c.cluster, &count, err);
		if (rc < 0)
			return rc;
	}
	fixed |= count == 1 ? QCOW2_COPIED : 0;
	if (fixed == *entry)
		return 0;
	uint8_t raw[8];
	put_be64(raw, fixed);
	*entry = fixed;
	return file_pwrite_full(r->c.fd, raw, sizeof(raw), at, err);
}

static int fix_l2(struct repair *r, uint64_t offset, struct err *err)
{
	struct checker *c = &r->c;
	uint64_t count;
	if (offset == 0 || offset % c->cluster || !range_within(offset, c->cluster, c->file_bytes))
		return 0;
	int rc = wanted(r, offset / c->cluster, &count, err);
	if (rc == 0)
		rc = qcow2_read_entries(c->fd, offset, c->cluster / 8, c->l2, err);
	for (uint64_t i = 0; rc == 0 && i < c->cluster / 8; i++)
		rc = fix_entry(r, offset + i * 8, &c->l2[i], count != 1, err);
	return rc;
}

static int fix_flags(struct repair *r, struct err *err)
{
	const struct qcow2_header *h = &r->c.header;
	CLEANUP_FREE uint64_t *l1 = calloc((size_t)h->l1_count + 1, 8);
	if (!l1)
		return err_sys(err, ENOMEM, "L1 table");
	int rc = h->l1_count ? qcow2_read_entries(r->c.fd, h->l1_offset, h->l1_count, l1, err) : 0;
	for (uint64_t i = 0; rc == 0 && i < h->l1_count; i++) {
		rc = fix_entry(r, h->l1_offset + i * 8, &l1[i], false, err);
		if (rc == 0)
			rc = fix_l2(r, l1[i] & QCOW2_OFFSET_MASK, err);
	}
	return rc == 0 ? sync_file(r, err) : rc;
}

static int repair_counts(const char *path, struct err *err)
{
	struct repair r = {0};
	struct cow_check found;
	int rc = cow_checker_open(&r.c, path, true, &found, err);
	if (rc < 0)
		return rc;
	rc = cow_checker_collect(&r.c, false, err);
	if (rc == 0)
		rc = plan(&r, err);
	if (rc == 0)
		rc = write_structures(&r, err);
	if (rc == 0)
		rc = fix_flags(&r, err);
	cow_checker_close(&r.c);
	return rc;
}

/* The marks that keep the image from being written, once nothing is wrong with it any more. */
static int clear_marks(const char *path, struct err *err)
{
	struct checker c;
	struct cow_check found;
	int rc = cow_checker_open(&c, path, true, &found, err);
	if (rc < 0)
		return rc;
	uint8_t raw[8];
	c.file_bytes = (uint64_t)lseek(c.fd, 0, SEEK_END);
	rc = qcow2_read_header(c.fd, c.file_bytes, &c.header, &c.extensions, err);
	uint64_t marks = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT;
	if (rc == 0 && c.header.version >= 3 && c.header.incompatible & marks) {
		put_be64(raw, c.header.incompatible & ~marks);
		rc = file_pwrite_full(c.fd, raw, sizeof(raw), QCOW2_AT_INCOMPATIBLE, err);
		if (rc == 0 && fdatasync(c.fd) < 0)
			rc = err_sys(err, errno, "sync");
	}
	cow_checker_close(&c);
	return rc;
}

int cow_repair(const char *path, struct cow_check *before, struct cow_check *after, struct err *err)
{
	int rc = cow_check(path, before, err);
	if (rc < 0)
		return rc;
	if (before->corruptions || before->leaks)
		rc = repair_counts(path, err);
	if (rc < 0)
		return err_prefix(err, "%s: repair", path);
	rc = cow_check(path, after, err);
	if (rc == 0 && after->corruptions == 0)
		rc = clear_marks(path, err);
	return rc;
}
