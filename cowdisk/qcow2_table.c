/* L1 and L2: where a guest cluster is, and pointing it elsewhere. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "cowdisk/image_internal.h"

int qcow2_damaged(struct image *image, const char *format, ...)
{
	if (!image->damaged) {
		char text[256];
		va_list ap;
		va_start(ap, format);
		vsnprintf(text, sizeof(text), format, ap);
		va_end(ap);
		log_error("%s: damaged: %s; look at it with: qemu-img check", image->path, text);
		image->damaged = true;
	}
	return -EIO;
}

void table_mark_dirty(struct table *t, uint64_t index)
{
	uint8_t *flag = &t->dirty[index / TABLE_SECTOR];
	t->dirty_count += !*flag;
	*flag = 1;
}

static uint64_t l2_entries(const struct image *image) { return (uint64_t)1 << image->q.l2_bits; }

static uint64_t l1_index(const struct image *image, uint64_t offset)
{
	return offset >> (image->q.header.cluster_bits + image->q.l2_bits);
}

/* Entries of the slice from the one for `offset` on. */
uint64_t qcow2_slice_clusters(const struct image *image, uint64_t offset)
{
	uint64_t per_slice = image->q.slice_bytes / 8;
	return per_slice - ((offset >> image->q.header.cluster_bits) & (per_slice - 1));
}

uint64_t qcow2_missing_l2(const struct image *image, uint64_t offset)
{
	uint64_t i = l1_index(image, offset);
	if (i < image->q.l1.count && image->q.l1.entries[i] & QCOW2_OFFSET_MASK)
		return 0;
	uint64_t span = l2_entries(image) << image->q.header.cluster_bits;
	return span - (offset & (span - 1));
}

static int check_l2_offset(struct image *image, uint64_t l2_offset)
{
	uint64_t cluster = image_cluster_bytes(image);
	if (l2_offset & (cluster - 1) || l2_offset >> image->q.header.cluster_bits >= image->q.end_cluster)
		return qcow2_damaged(image, "L2 table at 0x%" PRIx64, l2_offset);
	return 0;
}

/* The slice that holds the entry for `offset`, and the entry's place in it. The L2 table exists. */
static int get_l2(struct image *image, uint64_t offset, struct slice **out, unsigned *index)
{
	struct qcow2 *q = &image->q;
	uint64_t l2_offset = q->l1.entries[l1_index(image, offset)] & QCOW2_OFFSET_MASK;
	int rc = check_l2_offset(image, l2_offset);
	if (rc < 0)
		return rc;
	uint64_t entry = (offset >> q->header.cluster_bits) & (l2_entries(image) - 1);
	uint64_t per_slice = q->slice_bytes / 8;
	*index = (unsigned)(entry & (per_slice - 1));
	return slice_get(image, l2_offset + (entry - *index) * 8, false, out);
}

/* An entry's meaning; host is that of the cluster's first byte. */
static void decode_entry(const struct image *image, uint64_t entry, struct mapping *m)
{
	bool zero = image->q.header.version >= 3 && (entry & QCOW2_ZERO);
	m->entry = entry;
	m->copied = entry & QCOW2_COPIED;
	m->host = entry & QCOW2_OFFSET_MASK;
	if (entry & QCOW2_COMPRESSED) {
		m->kind = MAP_COMPRESSED;
		m->copied = false;
	} else if (zero)
		m->kind = m->host ? MAP_ZERO_HOST : MAP_ZERO;
	else
		m->kind = m->host ? MAP_DATA : MAP_HOLE;
}

static bool continues(const struct mapping *first, const struct mapping *next, uint64_t distance)
{
	if (first->kind != next->kind || first->kind == MAP_COMPRESSED || first->copied != next->copied)
		return false;
	bool has_host = first->kind == MAP_DATA || first->kind == MAP_ZERO_HOST;
	return !has_host || next->host == first->host + distance;
}

static int check_host(struct image *image, const struct mapping *m)
{
	if ((m->kind == MAP_DATA || m->kind == MAP_ZERO_HOST) && m->host & (image_cluster_bytes(image) - 1))
		return qcow2_damaged(image, "L2 entry 0x%" PRIx64 " is not aligned", m->entry);
	return 0;
}

int qcow2_map(struct image *image, uint64_t offset, uint64_t length, struct mapping *out)
{
	uint64_t cluster = image_cluster_bytes(image), missing = qcow2_missing_l2(image, offset);
	if (missing) {
		*out = (struct mapping){.kind = MAP_HOLE, .length = min_u64(length, missing)};
		return 0;
	}
	struct slice *s;
	unsigned index;
	int rc = get_l2(image, offset, &s, &index);
	if (rc < 0)
		return rc;
	uint64_t within = offset & (cluster - 1);
	uint64_t clusters = min_u64(div_round_up(within + length, cluster), qcow2_slice_clusters(image, offset));
	decode_entry(image, get_be64(s->data + index * 8), out);
	rc = check_host(image, out);
	if (rc < 0)
		return rc;
	uint64_t n = 1;
	for (; n < clusters; n++) {
		struct mapping next;
		decode_entry(image, get_be64(s->data + (index + n) * 8), &next);
		if (!continues(out, &next, n * cluster))
			break;
	}
	out->host += within;
	out->length = min_u64(n * cluster - within, length);
	return 0;
}

/* Fills the new cluster with what the shared table `from` holds (never dirty: what is shared is not written). */
static int copy_table(struct image *image, uint64_t from, uint64_t to)
{
	uint64_t bytes = image_cluster_bytes(image);
	CLEANUP_FREE void *copy = malloc((size_t)bytes);
	if (!copy)
		return -ENOMEM;
	int rc = file_pread_full(image->fd, copy, (size_t)bytes, from, NULL);
	if (rc == 0)
		rc = file_pwrite_full(image->fd, copy, (size_t)bytes, to, NULL);
	return rc;
}

int qcow2_prepare_l2(struct image *image, uint64_t offset)
{
	struct qcow2 *q = &image->q;
	unsigned bits = q->header.cluster_bits;
	uint64_t index = l1_index(image, offset), old = q->l1.entries[index], old_offset = old & QCOW2_OFFSET_MASK;
	if (old_offset && old & QCOW2_COPIED)
		return check_l2_offset(image, old_offset);
	if (old_offset) {
		int rc = check_l2_offset(image, old_offset);
		if (rc < 0)
			return rc;
	}
	uint64_t cluster, got;
	bool fresh;
	int rc = qcow2_alloc(image, 1, &cluster, &got, &fresh);
	if (rc < 0)
		return rc;
	rc = fault_check(FAULT_COW_L2_ALLOCATED, NULL);
	if (rc == 0)
		rc = qcow2_zero_cluster(image, cluster);
	if (rc == 0 && old_offset)
		rc = copy_table(image, old_offset, cluster << bits);
	if (rc < 0) {
		qcow2_unalloc(image, cluster, 1);
		return rc;
	}
	/* Its content is in the file already, so the table and the L1 entry may go to the file in any order. */
	image->writes++;
	slice_drop(image, cluster << bits, (uint64_t)1 << bits);
	cluster_set_add(&q->metadata, cluster);
	q->l1.entries[index] = cluster << bits | QCOW2_COPIED;
	table_mark_dirty(&q->l1, index);
	if (old_offset)
		qcow2_free_later(image, old_offset >> bits, 1, false, true);
	return 0;
}

/* Frees what an entry that is no longer there pointed to. */
static void release_entry(struct image *image, uint64_t entry, bool punch)
{
	unsigned bits = image->q.header.cluster_bits;
	struct mapping m;
	decode_entry(image, entry, &m);
	if (m.kind == MAP_COMPRESSED) {
		uint64_t offset, length;
		qcow2_compressed_range(image, entry, &offset, &length);
		uint64_t first = offset >> bits, last = (offset + length - 1) >> bits;
		qcow2_free_later(image, first, last - first + 1, false, false);
	} else if (m.kind == MAP_DATA || m.kind == MAP_ZERO_HOST)
		qcow2_free_later(image, m.host >> bits, 1, punch, false);
}

int qcow2_link(struct image *image, uint64_t offset, uint64_t host, uint64_t count)
{
	uint64_t cluster = image_cluster_bytes(image);
	struct slice *s;
	unsigned index;
	int rc = get_l2(image, offset, &s, &index);
	if (rc < 0)
		return rc;
	for (uint64_t n = 0; n < count; n++) {
		uint8_t *place = s->data + (index + n) * 8;
		uint64_t old = get_be64(place), new_host = host + n * cluster;
		put_be64(place, new_host | QCOW2_COPIED);
		bool same = !(old & QCOW2_COMPRESSED) && (old & QCOW2_OFFSET_MASK) == new_host;
		if (!same)
			release_entry(image, old, false);
	}
	slice_mark_dirty(s);
	return 0;
}

/* What an entry becomes whose cluster shall read as zeroes. */
static uint64_t cleared_entry(const struct image *image, uint64_t old, bool keep)
{
	struct mapping m;
	decode_entry(image, old, &m);
	bool has_parent = image->backing != NULL;
	uint64_t nothing = has_parent && image->q.header.version >= 3 ? QCOW2_ZERO : 0;
	switch (m.kind) {
	case MAP_HOLE:
		return nothing;
	case MAP_ZERO:
		return old;
	case MAP_ZERO_HOST:
		return keep ? old : nothing;
	case MAP_DATA:
		return keep && image->q.header.version >= 3 ? old | QCOW2_ZERO : nothing;
	case MAP_COMPRESSED:
		break;
	}
	return nothing;
}

int qcow2_clear(struct image *image, uint64_t offset, uint64_t count, bool keep)
{
	struct slice *s;
	unsigned index;
	int rc = get_l2(image, offset, &s, &index);
	if (rc < 0)
		return rc;
	for (uint64_t n = 0; n < count; n++) {
		uint8_t *place = s->data + (index + n) * 8;
		uint64_t old = get_be64(place), entry = cleared_entry(image, old, keep);
		if (entry == old)
			continue;
		put_be64(place, entry);
		slice_mark_dirty(s);
		if ((entry & QCOW2_OFFSET_MASK) == 0)
			release_entry(image, old, true);
	}
	return 0;
}
