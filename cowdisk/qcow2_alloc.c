/* Claiming clusters and giving them back, in the order that I1 and I3 demand. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/log.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/request_internal.h"

enum { SCAN_LIMIT = 512 /* counts looked at for one allocation before the end of the file is used */ };

static size_t set_slot(const struct cluster_set *set, uint64_t cluster)
{
	return (size_t)((cluster * 0x9e3779b97f4a7c15ull) >> 17) & (set->capacity - 1);
}

static void set_insert(struct cluster_set *set, uint64_t cluster)
{
	size_t i = set_slot(set, cluster);
	while (set->slots[i] && set->slots[i] != cluster + 1)
		i = (i + 1) & (set->capacity - 1);
	set->used += set->slots[i] == 0;
	set->slots[i] = cluster + 1;
}

void cluster_set_add(struct cluster_set *set, uint64_t cluster)
{
	if (set->used * 2 >= set->capacity) {
		struct cluster_set larger = {.capacity = set->capacity ? set->capacity * 2 : 64};
		larger.slots = xcalloc(larger.capacity, sizeof(*larger.slots));
		for (size_t i = 0; i < set->capacity; i++)
			if (set->slots[i])
				set_insert(&larger, set->slots[i] - 1);
		free(set->slots);
		*set = larger;
	}
	set_insert(set, cluster);
}

static size_t set_find(const struct cluster_set *set, uint64_t cluster)
{
	size_t i = set_slot(set, cluster);
	while (set->slots[i] && set->slots[i] != cluster + 1)
		i = (i + 1) & (set->capacity - 1);
	return i;
}

bool cluster_set_has(const struct cluster_set *set, uint64_t cluster)
{
	return set->capacity && set->slots[set_find(set, cluster)];
}

void cluster_set_remove(struct cluster_set *set, uint64_t cluster)
{
	if (!cluster_set_has(set, cluster))
		return;
	size_t hole = set_find(set, cluster), mask = set->capacity - 1;
	set->used--;
	set->slots[hole] = 0;
	/* Those that had to go past the hole move up. */
	for (size_t i = (hole + 1) & mask; set->slots[i]; i = (i + 1) & mask) {
		size_t home = set_slot(set, set->slots[i] - 1);
		if (((i - home) & mask) < ((i - hole) & mask))
			continue;
		set->slots[hole] = set->slots[i];
		set->slots[i] = 0;
		hole = i;
	}
}

bool qcow2_hits_metadata(const struct image *image, uint64_t offset, uint64_t length)
{
	unsigned bits = image->q.header.cluster_bits;
	for (uint64_t c = offset >> bits; c <= (offset + length - 1) >> bits; c++)
		if (cluster_set_has(&image->q.metadata, c))
			return true;
	return false;
}

static bool too_far(const struct image *image, uint64_t cluster)
{
	return cluster >= (uint64_t)1 << (55 - image->q.header.cluster_bits);
}

/* Claims `cluster` if it is free. *claimed says so; 0 with !*claimed: it is in use (perhaps since just now, as a
 * block). */
static int try_claim(struct image *image, uint64_t cluster, bool *claimed)
{
	struct qcow2 *q = &image->q;
	uint64_t count;
	bool taken;
	*claimed = false;
	if (too_far(image, cluster))
		return -EFBIG;
	int rc = qcow2_ensure_refblock(image, cluster, &taken);
	if (rc < 0 || taken)
		return rc;
	rc = qcow2_get_refcount(image, cluster, &count);
	if (rc < 0 || count != 0)
		return rc;
	if (cluster_set_has(&q->metadata, cluster))
		return qcow2_damaged(image, "cluster %" PRIu64 " holds metadata and is not counted", cluster);
	rc = qcow2_set_refcount(image, cluster, 1);
	*claimed = rc == 0;
	return rc;
}

/* Where to begin: a free cluster below the end of the file, if a short look finds one; else the end. */
static int find_start(struct image *image, uint64_t *out)
{
	struct qcow2 *q = &image->q;
	for (unsigned n = 0; q->free_hint < q->end_cluster && n < SCAN_LIMIT; n++, q->free_hint++) {
		uint64_t count;
		int rc = qcow2_get_refcount(image, q->free_hint, &count);
		if (rc < 0)
			return rc;
		if (count == 0) {
			*out = q->free_hint;
			return 0;
		}
	}
	*out = q->end_cluster;
	return 0;
}

static void claimed_up_to(struct qcow2 *q, uint64_t end)
{
	q->end_cluster = max_u64(q->end_cluster, end);
	q->fresh_from = max_u64(q->fresh_from, end << q->header.cluster_bits);
}

int qcow2_alloc(struct image *image, uint64_t want, uint64_t *first, uint64_t *got, bool *fresh)
{
	struct qcow2 *q = &image->q;
	uint64_t at, n = 0;
	int rc = image->damaged ? -EIO : find_start(image, &at);
	if (rc < 0)
		return rc;
	while (n < want) {
		bool claimed;
		rc = try_claim(image, at + n, &claimed);
		if (rc < 0)
			break;
		if (claimed)
			n++;
		else if (n > 0)
			break;
		else
			at++; /* a new block took it, or it is a leak beyond the end of the file */
	}
	if (n == 0)
		return rc;
	/* An error after the first is met again by the next allocation. */
	*fresh = at << q->header.cluster_bits >= q->fresh_from;
	claimed_up_to(q, at + n);
	if (q->free_hint == at)
		q->free_hint = at + n;
	*first = at;
	*got = n;
	return 0;
}

int qcow2_alloc_run(struct image *image, uint64_t want, uint64_t *first)
{
	struct qcow2 *q = &image->q;
	uint64_t at = q->end_cluster, n = 0;
	while (n < want) {
		bool claimed;
		int rc = try_claim(image, at + n, &claimed);
		if (rc < 0 || !claimed)
			for (; n > 0; n--)
				qcow2_set_refcount(image, at + n - 1, 0);
		if (rc < 0)
			return rc;
		if (claimed)
			n++;
		else
			at = max_u64(at + 1, q->end_cluster);
	}
	claimed_up_to(q, at + want);
	*first = at;
	return 0;
}

static void lower_count(struct image *image, uint64_t cluster, bool metadata)
{
	uint64_t count;
	struct qcow2 *q = &image->q;
	int rc = qcow2_get_refcount(image, cluster, &count);
	if (rc == 0 && count == 0)
		rc = qcow2_damaged(image, "cluster %" PRIu64 " was in use and is not counted", cluster);
	if (rc == 0)
		rc = qcow2_set_refcount(image, cluster, count - 1);
	if (rc < 0 || count > 1)
		return; /* on an error: a leak, no more */
	if (metadata) {
		cluster_set_remove(&q->metadata, cluster);
		slice_drop(image, cluster << q->header.cluster_bits, image_cluster_bytes(image));
	}
	if (cluster < q->free_hint)
		q->free_hint = cluster;
}

void qcow2_unalloc(struct image *image, uint64_t first, uint64_t count)
{
	for (uint64_t c = first; c < first + count; c++)
		lower_count(image, c, false);
}

void free_list_clear(struct free_list *list)
{
	free(list->ranges);
	*list = (struct free_list){0};
}

static void free_list_push(struct free_list *list, struct free_range range)
{
	if (list->count) {
		struct free_range *last = &list->ranges[list->count - 1];
		if (last->cluster + last->count == range.cluster && last->punch == range.punch &&
		    last->metadata == range.metadata) {
			last->count += range.count;
			last->sequence = max_u64(last->sequence, range.sequence);
			return;
		}
	}
	if (list->count == list->capacity) {
		size_t capacity = list->capacity ? list->capacity * 2 : 16;
		struct free_range *ranges = realloc(list->ranges, capacity * sizeof(*ranges));
		if (!ranges) {
			log_warn("no memory to remember %" PRIu64 " freed clusters: they leak", range.count);
			return;
		}
		list->ranges = ranges;
		list->capacity = capacity;
	}
	list->ranges[list->count++] = range;
}

static void free_list_move(struct free_list *from, struct free_list *to)
{
	for (size_t i = 0; i < from->count; i++)
		free_list_push(to, from->ranges[i]);
	from->count = 0;
}

void qcow2_free_later(struct image *image, uint64_t first, uint64_t count, bool punch, bool metadata)
{
	struct free_range range = {.cluster = first, .count = count, .punch = punch, .metadata = metadata};
	range.sequence = image->disk ? image->disk->sequence : 0;
	if (count)
		free_list_push(&image->q.frees_new, range);
}

void qcow2_frees_committed(struct image *image, bool durable)
{
	struct qcow2 *q = &image->q;
	free_list_move(&q->frees_committing, durable ? &q->frees_ready : &q->frees_new);
	qcow2_frees_release(image);
}

struct punch {
	struct io_op op;
	struct image *image;
	struct free_range range;
};

static void release_range(struct image *image, const struct free_range *range)
{
	for (uint64_t c = range->cluster; c < range->cluster + range->count; c++)
		lower_count(image, c, range->metadata);
}

static void punch_done(struct io_op *op, int result)
{
	struct punch *p = container_of(op, struct punch, op);
	struct image *image = p->image;
	(void)result; /* a file system that cannot: the cluster is free all the same */
	release_range(image, &p->range);
	image->q.punching--;
	free(p);
	cow_seal_progress(image);
}

/* Space goes back to the file system before the count falls: a cluster that may be claimed again is not punched any
 * more. */
static bool start_punch(struct image *image, const struct free_range *range)
{
	if (!range->punch || fault_check(FAULT_COW_FREE_PUNCH, NULL) < 0)
		return false;
	for (uint64_t c = range->cluster; c < range->cluster + range->count; c++) {
		uint64_t count;
		if (qcow2_get_refcount(image, c, &count) < 0 || count != 1)
			return false;
	}
	unsigned bits = image->q.header.cluster_bits;
	struct punch *p = xcalloc(1, sizeof(*p));
	p->image = image;
	p->range = *range;
	p->op = (struct io_op){.kind = IO_PUNCH, .fd = image->fd, .done = punch_done};
	p->op.offset = range->cluster << bits;
	p->op.length = range->count << bits;
	image->q.punching++;
	cow_io_start(image->io, &p->op);
	return true;
}

void qcow2_frees_release(struct image *image)
{
	struct qcow2 *q = &image->q;
	size_t kept = 0;
	/* A layer that is being sealed allocates no more once its own requests have ended: then nobody can find something else in a freed cluster. */
	bool reusable = !image->disk || image->disk->top == image || atomic_load_explicit(&image->inflight, memory_order_relaxed) > 0;
	uint64_t oldest = image->disk ? cow_req_oldest(image->disk) : UINT64_MAX;
	for (size_t i = 0; i < q->frees_ready.count; i++) {
		struct free_range range = q->frees_ready.ranges[i];
		if (reusable && oldest <= range.sequence)
			q->frees_ready.ranges[kept++] = range;
		else if (!start_punch(image, &range))
			release_range(image, &range);
	}
	q->frees_ready.count = kept;
}

bool qcow2_frees_pending(const struct image *image)
{
	const struct qcow2 *q = &image->q;
	return q->frees_new.count || q->frees_committing.count || q->frees_ready.count || q->punching;
}
