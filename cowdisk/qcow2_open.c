/* From a header to a usable image: the tables that stay in memory, and the set of clusters that hold metadata. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "cowdisk/image_internal.h"

int qcow2_read_entries(int fd, uint64_t offset, uint64_t count, uint64_t *entries, struct err *err)
{
	int rc = file_pread_full(fd, entries, (size_t)count * 8, offset, err);
	if (rc < 0)
		return rc;
	for (uint64_t i = 0; i < count; i++)
		entries[i] = __builtin_bswap64(entries[i]);
	return 0;
}

static int read_table(int fd, struct table *t, uint64_t offset, uint64_t count, struct err *err)
{
	t->offset = offset;
	t->count = count;
	if (count == 0)
		return 0;
	t->entries = calloc((size_t)count, 8);
	t->dirty = calloc((size_t)div_round_up(count, TABLE_SECTOR), 1);
	if (!t->entries || !t->dirty)
		return err_sys(err, ENOMEM, "table of %" PRIu64 " entries", count);
	return qcow2_read_entries(fd, offset, count, t->entries, err);
}

static void add_area(struct image *image, uint64_t offset, uint64_t bytes)
{
	unsigned bits = image->q.header.cluster_bits;
	if (offset == 0 || bytes == 0)
		return;
	for (uint64_t c = offset >> bits; c <= (offset + bytes - 1) >> bits; c++)
		cluster_set_add(&image->q.metadata, c);
}

static void collect_metadata(struct image *image)
{
	struct qcow2 *q = &image->q;
	uint64_t cluster = image_cluster_bytes(image);
	cluster_set_add(&q->metadata, 0);
	add_area(image, q->l1.offset, q->l1.count * 8);
	add_area(image, q->reftable.offset, q->reftable_clusters * cluster);
	for (uint64_t i = 0; i < q->l1.count; i++)
		add_area(image, q->l1.entries[i] & QCOW2_OFFSET_MASK, cluster);
	for (uint64_t i = 0; i < q->reftable.count; i++)
		add_area(image, q->reftable.entries[i] & QCOW2_OFFSET_MASK, cluster);
	/* The snapshots' own tables are counted twice or more, so that nobody allocates them; their list starts
	 * here. */
	if (q->header.snapshot_count)
		add_area(image, q->header.snapshots_offset, 1);
}

static int open_for_writing(struct image *image, struct err *err)
{
	struct qcow2 *q = &image->q;
	int rc = qcow2_check_writable(&q->header, err);
	if (rc < 0)
		return rc;
	q->reftable_clusters = q->header.reftable_clusters;
	uint64_t count = (q->reftable_clusters << q->header.cluster_bits) / 8;
	rc = read_table(image->fd, &q->reftable, q->header.reftable_offset, count, err);
	if (rc < 0)
		return rc;
	collect_metadata(image);
	return qcow2_clear_autoclear(image->fd, &q->header, err);
}

int qcow2_open(struct image *image, uint64_t file_bytes, bool writable, struct err *err)
{
	struct qcow2 *q = &image->q;
	struct qcow2_extensions x;
	int rc = qcow2_read_header(image->fd, file_bytes, &q->header, &x, err);
	if (rc < 0)
		return rc;
	uint64_t cluster = image_cluster_bytes(image);
	image->backing_name = x.backing_name;
	image->backing_format = x.backing_format;
	image->size = round_down(q->header.size, COW_SECTOR_BYTES);
	q->l2_bits = q->header.cluster_bits - 3;
	q->slice_bytes = (uint32_t)min_u64(cluster, PAGE_BYTES);
	q->end_cluster = div_round_up(file_bytes, cluster);
	q->fresh_from = q->end_cluster * cluster;
	rc = read_table(image->fd, &q->l1, q->header.l1_offset, q->header.l1_count, err);
	if (rc == 0 && writable)
		rc = open_for_writing(image, err);
	return rc;
}

static void table_free(struct table *t)
{
	free(t->entries);
	free(t->dirty);
}

void qcow2_close(struct image *image)
{
	struct qcow2 *q = &image->q;
	slice_drop_image(image);
	table_free(&q->l1);
	table_free(&q->reftable);
	free(q->metadata.slots);
	free_list_clear(&q->frees_new);
	free_list_clear(&q->frees_committing);
	free_list_clear(&q->frees_ready);
	free(q->unpacked);
}
