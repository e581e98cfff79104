/*
 * Checking a file: every cluster that something points to is noted, the notes are sorted, and their numbers compared
 * with the reference counts. Memory is 8 bytes for each reference found, so it is bounded by the tables that are
 * really in the file.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "cowdisk/check_internal.h"

static void corrupt(struct checker *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void corrupt(struct checker *c, const char *format, ...)
{
	va_list ap;
	if (c->out->corruptions++ > 0)
		return;
	va_start(ap, format);
	vsnprintf(c->out->first, sizeof(c->out->first), format, ap);
	va_end(ap);
}

/* More than any whole image can hold: every sector of the file used once by each table. */
static uint64_t reference_limit(const struct checker *c)
{
	return (c->file_bytes / COW_SECTOR_BYTES + 1024) * (1 + min_u64(c->header.snapshot_count, 1024));
}

static int note(struct checker *c, uint64_t cluster, struct err *err)
{
	if (c->count >= reference_limit(c))
		return err_set(err, ERR_DAMAGED, EINVAL, "the tables refer to the same clusters again and again");
	if (c->count == c->capacity) {
		size_t capacity = c->capacity ? c->capacity * 2 : 1024;
		uint64_t *larger = realloc(c->references, capacity * sizeof(*larger));
		if (!larger)
			return err_sys(err, ENOMEM, "%zu references", capacity);
		c->references = larger;
		c->capacity = capacity;
	}
	c->references[c->count++] = cluster;
	return 0;
}

/* Notes the clusters of [offset, offset + bytes), which must lie within the file. */
static int note_area(struct checker *c, uint64_t offset, uint64_t bytes, struct err *err)
{
	int rc = 0;
	for (uint64_t at = round_down(offset, c->cluster); rc == 0 && at < offset + bytes; at += c->cluster)
		rc = note(c, at / c->cluster, err);
	return rc;
}

/* A whole cluster of metadata may be there. */
static bool table_ok(const struct checker *c, uint64_t offset)
{
	return offset % c->cluster == 0 && range_within(offset, c->cluster, c->file_bytes);
}

static int load_block(struct checker *c, uint64_t index, bool *there, struct err *err)
{
	uint64_t offset = index < c->blocks ? c->reftable[index] & QCOW2_OFFSET_MASK : 0;
	*there = offset && table_ok(c, offset);
	if (!*there || c->block_index == index)
		return 0;
	c->block_index = UINT64_MAX;
	int rc = file_pread_full(c->fd, c->block, (size_t)c->cluster, offset, err);
	if (rc == 0)
		c->block_index = index;
	return rc;
}

static uint64_t counts_per_block(const struct checker *c) { return c->cluster * 8 >> c->header.refcount_order; }

int cow_checker_count(struct checker *c, uint64_t cluster, uint64_t *out, bool *there, struct err *err)
{
	uint64_t per_block = counts_per_block(c);
	int rc = load_block(c, cluster / per_block, there, err);
	if (rc == 0)
		*out = *there ? qcow2_decode_count(c->block, c->header.refcount_order, cluster % per_block) : 0;
	return rc;
}

/* The flag promises that the count is exactly one; an active entry without it must not be alone. */
static int check_copied(struct checker *c, uint64_t entry, uint64_t offset, const char *what, struct err *err)
{
	uint64_t refcount;
	bool there;
	int rc = cow_checker_count(c, offset / c->cluster, &refcount, &there, err);
	if (rc == 0 && !!(entry & QCOW2_COPIED) != (refcount == 1))
		corrupt(c, "%s 0x%" PRIx64 ": copied flag %s, reference count %" PRIu64, what, offset,
			entry & QCOW2_COPIED ? "set" : "clear", refcount);
	return rc;
}

static int check_compressed(struct checker *c, uint64_t entry, struct err *err)
{
	struct image image = {.q.header.cluster_bits = c->header.cluster_bits};
	uint64_t offset, length;
	qcow2_compressed_range(&image, entry, &offset, &length);
	if (entry & QCOW2_COPIED)
		corrupt(c, "compressed cluster at 0x%" PRIx64 " with the copied flag", offset);
	if (offset >= c->file_bytes) {
		corrupt(c, "compressed cluster at 0x%" PRIx64 " beyond the end of the file", offset);
		return 0;
	}
	/* Its last sector need not be in the file as a whole. */
	return note_area(c, offset, min_u64(length, round_up(c->file_bytes, c->cluster) - offset), err);
}

static int check_entry(struct checker *c, uint64_t entry, bool active, struct err *err)
{
	uint64_t offset = entry & QCOW2_OFFSET_MASK;
	bool packed = entry & QCOW2_COMPRESSED, zero = c->header.version >= 3 && entry & QCOW2_ZERO;
	if (!packed && offset == 0)
		return 0;
	if (active && !zero)
		c->out->allocated_clusters++;
	if (packed)
		return check_compressed(c, entry, err);
	/* A preallocated zero cluster may lie where the file does not reach yet. */
	if (offset % c->cluster || (offset >= c->file_bytes && !zero)) {
		corrupt(c, "data cluster at 0x%" PRIx64 " is not aligned or beyond the end of the file", offset);
		return 0;
	}
	int rc = note(c, offset / c->cluster, err);
	if (rc == 0 && active)
		rc = check_copied(c, entry, offset, "data cluster", err);
	return rc;
}

static int check_l2(struct checker *c, uint64_t entry, bool active, struct err *err)
{
	uint64_t offset = entry & QCOW2_OFFSET_MASK;
	if (offset == 0)
		return 0;
	if (!table_ok(c, offset)) {
		corrupt(c, "L2 table at 0x%" PRIx64 " is not aligned or beyond the end of the file", offset);
		c->incomplete = true;
		return 0;
	}
	int rc = note(c, offset / c->cluster, err);
	if (rc == 0 && active)
		rc = check_copied(c, entry, offset, "L2 table", err);
	if (rc == 0)
		rc = qcow2_read_entries(c->fd, offset, c->cluster / 8, c->l2, err);
	for (uint64_t i = 0; rc == 0 && i < c->cluster / 8; i++)
		rc = check_entry(c, c->l2[i], active, err);
	return rc;
}

static int check_l1(struct checker *c, uint64_t offset, uint64_t count, bool active, struct err *err)
{
	if (count == 0)
		return 0;
	if (count * 8 > QCOW2_MAX_L1_BYTES || offset % c->cluster || !range_within(offset, count * 8, c->file_bytes)) {
		corrupt(c, "L1 table at 0x%" PRIx64, offset);
		c->incomplete = true;
		return 0;
	}
	CLEANUP_FREE uint64_t *l1 = malloc((size_t)count * 8);
	if (!l1)
		return err_sys(err, ENOMEM, "L1 table");
	int rc = note_area(c, offset, count * 8, err);
	if (rc == 0)
		rc = qcow2_read_entries(c->fd, offset, count, l1, err);
	for (uint64_t i = 0; rc == 0 && i < count; i++)
		rc = check_l2(c, l1[i], active, err);
	return rc;
}

static int check_snapshots(struct checker *c, struct err *err)
{
	uint64_t at = c->header.snapshots_offset;
	for (uint32_t i = 0; i < c->header.snapshot_count; i++) {
		uint8_t raw[QCOW2_SNAPSHOT_HEADER_BYTES];
		if (!range_within(at, sizeof(raw), c->file_bytes)) {
			corrupt(c, "snapshot table reaches beyond the end of the file");
			c->incomplete = true;
			return 0;
		}
		int rc = file_pread_full(c->fd, raw, sizeof(raw), at, err);
		if (rc == 0)
			rc = check_l1(c, get_be64(raw), get_be32(raw + 8), false, err);
		if (rc < 0)
			return rc;
		at += round_up((uint64_t)sizeof(raw) + get_be16(raw + 12) + get_be16(raw + 14) + get_be32(raw + 36), 8);
	}
	if (!range_within(c->header.snapshots_offset, at - c->header.snapshots_offset,
			  round_up(c->file_bytes, c->cluster))) {
		corrupt(c, "snapshot table reaches beyond the end of the file");
		c->incomplete = true;
		return 0;
	}
	return note_area(c, c->header.snapshots_offset, at - c->header.snapshots_offset, err);
}

static int check_bitmap(struct checker *c, uint64_t offset, uint64_t count, struct err *err)
{
	if (count * 8 > QCOW2_MAX_L1_BYTES || offset % c->cluster || !range_within(offset, count * 8, c->file_bytes)) {
		corrupt(c, "bitmap table at 0x%" PRIx64, offset);
		c->incomplete = true;
		return 0;
	}
	CLEANUP_FREE uint64_t *table = malloc((size_t)count * 8 + 1);
	if (!table)
		return err_sys(err, ENOMEM, "bitmap table");
	int rc = note_area(c, offset, count * 8, err);
	if (rc == 0)
		rc = qcow2_read_entries(c->fd, offset, count, table, err);
	for (uint64_t i = 0; rc == 0 && i < count; i++)
		if (table[i] & QCOW2_OFFSET_MASK)
			rc = note(c, (table[i] & QCOW2_OFFSET_MASK) / c->cluster, err);
	return rc;
}

static int check_bitmaps(struct checker *c, struct err *err)
{
	const struct qcow2_extensions *x = &c->extensions;
	uint64_t at = x->bitmap_directory_offset, end = at + x->bitmap_directory_bytes;
	if (c->header.version < 3 || !(c->header.autoclear & 1) || x->bitmap_count == 0)
		return 0;
	if (at % c->cluster || !range_within(at, x->bitmap_directory_bytes, c->file_bytes)) {
		corrupt(c, "bitmap directory at 0x%" PRIx64, at);
		c->incomplete = true;
		return 0;
	}
	int rc = note_area(c, at, x->bitmap_directory_bytes, err);
	for (uint32_t i = 0; rc == 0 && i < x->bitmap_count && end - at >= 24; i++) {
		uint8_t raw[24];
		rc = file_pread_full(c->fd, raw, sizeof(raw), at, err);
		if (rc == 0)
			rc = check_bitmap(c, get_be64(raw), get_be32(raw + 8), err);
		at += min_u64(round_up(24ull + get_be16(raw + 18) + get_be32(raw + 20), 8), end - at);
	}
	return rc;
}

static int check_reftable(struct checker *c, bool counts, struct err *err)
{
	uint64_t bytes = c->header.reftable_clusters * c->cluster;
	c->blocks = bytes / 8;
	c->reftable = malloc((size_t)bytes + 1);
	if (!c->reftable)
		return err_sys(err, ENOMEM, "reference count table");
	int rc = qcow2_read_entries(c->fd, c->header.reftable_offset, c->blocks, c->reftable, err);
	if (rc == 0 && counts)
		rc = note_area(c, c->header.reftable_offset, bytes, err);
	for (uint64_t i = 0; rc == 0 && i < c->blocks; i++) {
		uint64_t offset = c->reftable[i] & QCOW2_OFFSET_MASK;
		if (offset == 0)
			continue;
		if (!table_ok(c, offset) || cluster_set_has(&c->seen, offset / c->cluster)) {
			corrupt(c, "reference count block at 0x%" PRIx64, offset);
			c->reftable[i] = 0;
			continue;
		}
		cluster_set_add(&c->seen, offset / c->cluster);
		if (counts)
			rc = note(c, offset / c->cluster, err);
	}
	return rc;
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

/* How often `cluster` is noted; the references are visited in ascending order. */
static uint64_t take_references(struct checker *c, size_t *at, uint64_t cluster)
{
	uint64_t n = 0;
	for (; *at < c->count && c->references[*at] == cluster; (*at)++)
		n++;
	return n;
}

static void compare_one(struct checker *c, uint64_t cluster, uint64_t counted, uint64_t referenced)
{
	if (counted < referenced)
		corrupt(c, "cluster %" PRIu64 " at 0x%" PRIx64 ": reference count %" PRIu64 ", used %" PRIu64 " times",
			cluster, cluster * c->cluster, counted, referenced);
	else if (counted > referenced)
		c->out->leaks++;
}

/* The next reference is to a cluster without a count. */
static void compare_uncounted(struct checker *c, size_t *at)
{
	uint64_t cluster = c->references[*at];
	compare_one(c, cluster, 0, take_references(c, at, cluster));
}

static int compare(struct checker *c, struct err *err)
{
	uint64_t per_block = counts_per_block(c);
	size_t at = 0;
	for (uint64_t i = 0; i < c->blocks; i++) {
		bool there;
		int rc = load_block(c, i, &there, err);
		if (rc < 0)
			return rc;
		for (uint64_t k = 0; there && k < per_block; k++) {
			uint64_t cluster = i * per_block + k;
			uint64_t counted = qcow2_decode_count(c->block, c->header.refcount_order, k);
			compare_one(c, cluster, counted, take_references(c, &at, cluster));
		}
		while (!there && at < c->count && c->references[at] < (i + 1) * per_block)
			compare_uncounted(c, &at);
	}
	while (at < c->count)
		compare_uncounted(c, &at);
	return 0;
}

int cow_checker_collect(struct checker *c, bool counts, struct err *err)
{
	struct stat st;
	if (fstat(c->fd, &st) < 0)
		return err_sys(err, errno, "size");
	c->file_bytes = (uint64_t)st.st_size;
	int rc = qcow2_read_header(c->fd, c->file_bytes, &c->header, &c->extensions, err);
	if (rc < 0)
		return rc;
	c->cluster = (uint64_t)1 << c->header.cluster_bits;
	c->block = malloc((size_t)c->cluster);
	c->l2 = malloc((size_t)c->cluster);
	if (!c->block || !c->l2)
		return err_sys(err, ENOMEM, "tables");
	rc = note(c, 0, err);
	if (rc == 0)
		rc = check_reftable(c, counts, err);
	if (rc == 0)
		rc = check_l1(c, c->header.l1_offset, c->header.l1_count, true, err);
	if (rc == 0 && c->header.snapshot_count)
		rc = check_snapshots(c, err);
	if (rc == 0)
		rc = check_bitmaps(c, err);
	if (rc == 0)
		qsort(c->references, c->count, sizeof(*c->references), by_number);
	return rc;
}

int cow_checker_open(struct checker *c, const char *path, bool writable, struct cow_check *out, struct err *err)
{
	*c = (struct checker){.out = out, .block_index = UINT64_MAX};
	*out = (struct cow_check){0};
	c->fd = cow_image_open_fd(path, writable, err);
	if (c->fd < 0)
		return c->fd;
	int rc = cow_lock_take(c->fd, writable, path, err);
	if (rc < 0)
		close(c->fd);
	return rc;
}

void cow_checker_close(struct checker *c)
{
	close(c->fd);
	free(c->extensions.backing_name);
	free(c->reftable);
	free(c->references);
	free(c->block);
	free(c->l2);
	free(c->seen.slots);
}

int cow_check(const char *path, struct cow_check *out, struct err *err)
{
	struct checker c;
	int rc = cow_checker_open(&c, path, false, out, err);
	if (rc < 0)
		return rc;
	rc = cow_checker_collect(&c, true, err);
	if (rc == 0)
		rc = compare(&c, err);
	if (rc < 0)
		err_prefix(err, "%s", path);
	cow_checker_close(&c);
	return rc;
}
