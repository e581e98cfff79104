/*
 * Reference counts: reading, changing, and making room for more.
 *
 * A new block always counts itself (it is put into the first cluster that it describes and that is wanted), so that
 * one entry of the table makes the block and its own count visible together. Where the table is full it moves: the
 * new one is written whole, then the header turns to it.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "cowdisk/image_internal.h"

/* log2 of the counts in a block */
static unsigned block_bits(const struct qcow2 *q) { return q->header.cluster_bits + 3 - q->header.refcount_order; }

uint64_t qcow2_decode_count(const uint8_t *data, unsigned order, uint64_t index)
{
	switch (order) {
	case 3:
		return data[index];
	case 4:
		return get_be16(data + index * 2);
	case 5:
		return get_be32(data + index * 4);
	case 6:
		return get_be64(data + index * 8);
	default: {
		unsigned width = 1u << order, shift = (unsigned)(index << order) & 7;
		return ((unsigned)data[index << order >> 3] >> shift) & ((1u << width) - 1);
	}
	}
}

void qcow2_encode_count(uint8_t *data, unsigned order, uint64_t index, uint64_t value)
{
	switch (order) {
	case 3:
		data[index] = (uint8_t)value;
		break;
	case 4:
		put_be16(data + index * 2, (uint16_t)value);
		break;
	case 5:
		put_be32(data + index * 4, (uint32_t)value);
		break;
	case 6:
		put_be64(data + index * 8, value);
		break;
	default: {
		unsigned width = 1u << order, shift = (unsigned)(index << order) & 7,
			 mask = ((1u << width) - 1) << shift;
		uint8_t *byte = &data[index << order >> 3];
		*byte = (uint8_t)((*byte & ~mask) | ((unsigned)value << shift));
	}
	}
}

/* The slice with the count of `cluster` and its place there; *out = NULL if there is no block. */
static int get_slice(struct image *image, uint64_t cluster, struct slice **out, uint64_t *index)
{
	struct qcow2 *q = &image->q;
	uint64_t block = cluster >> block_bits(q);
	uint64_t offset = block < q->reftable.count ? q->reftable.entries[block] & QCOW2_OFFSET_MASK : 0;
	*out = NULL;
	if (offset == 0)
		return 0;
	if (offset & (image_cluster_bytes(image) - 1) || offset >> q->header.cluster_bits >= q->end_cluster)
		return qcow2_damaged(image, "reference count block at 0x%" PRIx64, offset);
	uint64_t in_block = cluster & (((uint64_t)1 << block_bits(q)) - 1);
	uint64_t per_slice = (uint64_t)q->slice_bytes * 8 >> q->header.refcount_order;
	*index = in_block & (per_slice - 1);
	return slice_get(image, offset + in_block / per_slice * q->slice_bytes, true, out);
}

int qcow2_get_refcount(struct image *image, uint64_t cluster, uint64_t *out)
{
	struct slice *s;
	uint64_t index;
	int rc = get_slice(image, cluster, &s, &index);
	if (rc == 0)
		*out = s ? qcow2_decode_count(s->data, image->q.header.refcount_order, index) : 0;
	return rc;
}

int qcow2_set_refcount(struct image *image, uint64_t cluster, uint64_t value)
{
	struct slice *s;
	uint64_t index;
	int rc = get_slice(image, cluster, &s, &index);
	if (rc < 0)
		return rc;
	if (!s)
		return qcow2_damaged(image, "no reference count block for cluster %" PRIu64, cluster);
	qcow2_encode_count(s->data, image->q.header.refcount_order, index, value);
	slice_mark_dirty(s);
	return 0;
}

int qcow2_zero_cluster(struct image *image, uint64_t cluster)
{
	uint64_t bytes = image_cluster_bytes(image), offset = cluster * bytes;
	struct stat st;
	if (fstat(image->fd, &st) < 0)
		return -errno;
	/* Beyond the end a last byte is enough. Not ftruncate: data writes under way may have made the file longer
	 * by now. */
	if (S_ISREG(st.st_mode) && offset >= (uint64_t)st.st_size)
		return file_pwrite_full(image->fd, "", 1, offset + bytes - 1, NULL);
	CLEANUP_FREE void *zeroes = calloc(1, (size_t)bytes);
	if (!zeroes)
		return -ENOMEM;
	return file_pwrite_full(image->fd, zeroes, (size_t)bytes, offset, NULL);
}

int table_extend(struct table *t, uint64_t count)
{
	size_t sectors = (size_t)div_round_up(count, TABLE_SECTOR),
	       old_sectors = (size_t)div_round_up(t->count, TABLE_SECTOR);
	uint64_t *entries = realloc(t->entries, (size_t)count * 8);
	if (!entries)
		return -ENOMEM;
	t->entries = entries;
	uint8_t *dirty = realloc(t->dirty, sectors);
	if (!dirty)
		return -ENOMEM;
	t->dirty = dirty;
	memset(entries + t->count, 0, (size_t)(count - t->count) * 8);
	memset(dirty + old_sectors, 0, sectors - old_sectors);
	t->count = count;
	return 0;
}

/* Growth has failed: the blocks beyond the file's table have no place in it, and nothing refers to them. */
static void forget_blocks(struct image *image, uint64_t count)
{
	struct table *t = &image->q.reftable;
	for (uint64_t i = count; i < t->count; i++) {
		uint64_t offset = t->entries[i] & QCOW2_OFFSET_MASK;
		if (!offset)
			continue;
		cluster_set_remove(&image->q.metadata, offset >> image->q.header.cluster_bits);
		slice_drop(image, offset, image_cluster_bytes(image));
		t->dirty_count -= t->dirty[i / TABLE_SECTOR];
		t->dirty[i / TABLE_SECTOR] = 0;
	}
	t->count = count;
}

/* Moves the table to where it has room for more than `needed` blocks. */
static int grow_reftable(struct image *image, uint64_t needed)
{
	struct qcow2 *q = &image->q;
	uint64_t cluster = image_cluster_bytes(image), old_count = q->reftable.count;
	uint64_t clusters = div_round_up((needed + needed / 2 + 16) * 8, cluster);
	if (q->growing || clusters * cluster > QCOW2_MAX_REFTABLE_BYTES)
		return -EFBIG;
	/* Room in memory first: the blocks that count the new table are entered there. */
	int rc = table_extend(&q->reftable, clusters * cluster / 8);
	if (rc < 0)
		return rc;
	uint64_t first;
	q->growing = true;
	rc = qcow2_alloc_run(image, clusters, &first);
	q->growing = false;
	if (rc < 0) {
		forget_blocks(image, old_count);
		return rc;
	}
	qcow2_free_later(image, q->reftable.offset >> q->header.cluster_bits, q->reftable_clusters, false, true);
	for (uint64_t c = first; c < first + clusters; c++)
		cluster_set_add(&q->metadata, c);
	slice_drop(image, first * cluster, clusters * cluster);
	q->reftable.offset = first * cluster;
	q->reftable_clusters = clusters;
	for (uint64_t i = 0; i < q->reftable.count; i += TABLE_SECTOR)
		table_mark_dirty(&q->reftable, i);
	q->header_dirty = true;
	return 0;
}

int qcow2_ensure_refblock(struct image *image, uint64_t cluster, bool *taken)
{
	struct qcow2 *q = &image->q;
	uint64_t block = cluster >> block_bits(q);
	*taken = false;
	if (block >= q->reftable.count) {
		int rc = grow_reftable(image, block + 1);
		if (rc < 0)
			return rc;
	}
	if (q->reftable.entries[block] & QCOW2_OFFSET_MASK)
		return 0;
	if (cluster_set_has(&q->metadata, cluster))
		return qcow2_damaged(image, "cluster %" PRIu64 " holds metadata and is not counted", cluster);
	int rc = fault_check(FAULT_COW_REFBLOCK_ALLOCATED, NULL);
	if (rc == 0)
		rc = qcow2_zero_cluster(image, cluster);
	if (rc < 0)
		return rc;
	image->writes++;
	if (cluster >= q->end_cluster)
		q->end_cluster = cluster + 1;
	q->fresh_from = max_u64(q->fresh_from, q->end_cluster << q->header.cluster_bits);
	slice_drop(image, cluster << q->header.cluster_bits, (uint64_t)1 << q->header.cluster_bits);
	q->reftable.entries[block] = cluster << q->header.cluster_bits;
	rc = qcow2_set_refcount(image, cluster, 1);
	if (rc < 0) {
		q->reftable.entries[block] = 0;
		return rc;
	}
	cluster_set_add(&q->metadata, cluster);
	table_mark_dirty(&q->reftable, block);
	*taken = true;
	return 0;
}
