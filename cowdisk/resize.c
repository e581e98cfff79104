/*
 * Making a disk larger.
 *
 *     1 the L1 table, if it is too short: a longer one is written and synced, the header turned to it, the old one freed
 *     2 what the new space would show of a longer backing file, and of the last cluster, is made zero
 *     3 the header says the new size
 *
 * Until 3 the disk has its old size, and nothing of 1 and 2 can be seen.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "cowdisk/disk_internal.h"

static int write_header(struct image *image, uint64_t at, const void *data, size_t length, struct err *err)
{
	int rc = file_pwrite_full(image->fd, data, length, at, err);
	if (rc == 0 && fdatasync(image->fd) < 0)
		rc = err_sys(err, errno, "sync");
	return rc;
}

static int write_l1(struct image *image, uint64_t offset, uint64_t clusters, struct err *err)
{
	const struct table *l1 = &image->q.l1;
	CLEANUP_FREE uint8_t *raw = calloc((size_t)clusters, (size_t)image_cluster_bytes(image));
	if (!raw)
		return err_sys(err, ENOMEM, "L1 table");
	for (uint64_t i = 0; i < l1->count; i++)
		put_be64(raw + i * 8, l1->entries[i]);
	return file_pwrite_full(image->fd, raw, (size_t)(clusters * image_cluster_bytes(image)), offset, err);
}

/* The L1 table moves to where it has room. */
static int move_l1(struct image *image, uint64_t count, struct err *err)
{
	struct qcow2 *q = &image->q;
	unsigned bits = q->header.cluster_bits;
	uint64_t clusters = div_round_up(count * 8, image_cluster_bytes(image)), first;
	uint64_t old_offset = q->l1.offset, old_clusters = div_round_up(q->l1.count * 8, image_cluster_bytes(image));
	int rc = qcow2_alloc_run(image, clusters, &first);
	/* Counted on stable storage before anything points there (I1). */
	if (rc == 0)
		rc = cow_disk_make_clean(image);
	if (rc < 0)
		return err_sys(err, rc, "room for a longer table");
	rc = write_l1(image, first << bits, clusters, err);
	if (rc == 0 && fdatasync(image->fd) < 0)
		rc = err_sys(err, errno, "sync");
	if (rc == 0)
		rc = fault_check(FAULT_COW_RESIZE_TABLE, err);
	uint8_t header[12];
	put_be32(header, (uint32_t)count);
	put_be64(header + 4, first << bits);
	if (rc == 0)
		rc = write_header(image, QCOW2_AT_L1_COUNT, header, sizeof(header), err);
	if (rc < 0)
		return rc; /* the new one leaks */
	if (table_extend(&q->l1, count) < 0)
		return err_sys(err, ENOMEM, "L1 table");
	for (uint64_t c = first; c < first + clusters; c++)
		cluster_set_add(&q->metadata, c);
	q->l1.offset = first << bits;
	q->header.l1_offset = q->l1.offset;
	q->header.l1_count = (uint32_t)count;
	if (old_offset)
		qcow2_free_later(image, old_offset >> bits, old_clusters, false, true);
	return 0;
}

static void zero_done(struct cow_request *request, int result) { *(int *)request->opaque = result; }

static int zero(struct cow_disk *disk, uint64_t start, uint64_t end, struct err *err)
{
	int result = 1;
	struct cow_request r = {.op = COW_WRITE_ZEROES,
				.may_unmap = true,
				.offset = start,
				.length = end - start,
				.done = zero_done,
				.opaque = &result};
	if (start >= end)
		return 0;
	cow_submit(disk, &r);
	while (result == 1)
		cow_io_drive(disk->io, -1);
	return result < 0 ? err_sys(err, result, "zeroes behind the old end") : 0;
}

static int resize_qcow2(struct cow_disk *disk, uint64_t size, struct err *err)
{
	struct image *image = disk->top;
	uint64_t cluster = image_cluster_bytes(image), old = disk->size;
	uint64_t count = div_round_up(size, cluster * (cluster / 8));
	if (count * 8 > QCOW2_MAX_L1_BYTES) {
		err_set(err, ERR_FAILED, EFBIG, "size %" PRIu64 " is too large for clusters of %" PRIu64 " bytes", size,
			cluster);
		err_hint(err, "export it with larger clusters first");
		return -EFBIG;
	}
	if (image->q.header.version < 3 && image->q.header.snapshot_count)
		return err_set(err, ERR_FAILED, ENOTSUP,
			       "its snapshots do not say their size (version 2), so that it cannot change");
	int rc = count > image->q.l1.count ? move_l1(image, count, err) : 0;
	if (rc < 0)
		return rc;
	uint64_t shown = image->backing ? image->backing->size : 0;
	disk->size = image->size = size;
	rc = zero(disk, old, min_u64(size, max_u64(round_up(old, cluster), shown)), err);
	if (rc == 0 && (rc = cow_disk_make_clean(image)) < 0)
		err_sys(err, rc, "writing metadata");
	if (rc == 0)
		rc = fault_check(FAULT_COW_RESIZE_SIZE, err);
	uint8_t header[8];
	put_be64(header, size);
	if (rc == 0)
		rc = write_header(image, QCOW2_AT_SIZE, header, sizeof(header), err);
	if (rc < 0)
		disk->size = image->size = old;
	return rc;
}

int cow_resize(struct cow_disk *disk, uint64_t size, struct err *err)
{
	struct image *image = disk->top;
	int rc = 0;
	if (image->readonly)
		rc = err_set(err, ERR_STATE, EROFS, "read-only");
	else if (size % COW_SECTOR_BYTES || size > INT64_MAX - ((uint64_t)1 << QCOW2_MAX_CLUSTER_BITS))
		rc = err_set(err, ERR_USAGE, EINVAL, "size %" PRIu64 " is no multiple of 512", size);
	else if (size < disk->size) {
		err_set(err, ERR_USAGE, EINVAL,
			"it has %" PRIu64 " bytes, and what lies behind %" PRIu64 " would be lost", disk->size, size);
		rc = err_hint(err, "disks only grow");
		rc = rc < 0 ? rc : -EINVAL;
	} else if (size > disk->size && image->format == COW_FORMAT_QCOW2)
		rc = resize_qcow2(disk, size, err);
	else if (size > disk->size) {
		if (ftruncate(image->fd, (off_t)size) < 0 || fsync(image->fd) < 0)
			rc = err_sys(err, errno, "size of the file");
		else
			disk->size = image->size = size;
	}
	return rc < 0 ? err_prefix(err, "%s: resize", image->path) : 0;
}
