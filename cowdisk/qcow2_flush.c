/*
 * Rounds: metadata goes to the file in phases, with syncs between them, while requests go on.
 *
 *     begin   copy everything that is dirty; from here on changes belong to the next round
 *     COUNTS  reference counts (new blocks count themselves)            then sync: data written before `begin` as well
 *     TABLE   entries of the reference count table                      then sync
 *     HEADER  where the reference count table is, if it moved           then sync
 *     LINKS   L2 and L1 entries                                         then sync
 *     end     what the round unlinked may be freed
 *
 * Empty phases and their syncs are left out. A phase that is one write takes its sync with it, where the guest flushes after each of its writes. I1: COUNTS
 * and TABLE before LINKS. I2: a sync before LINKS covers the data. I3: frees at the end. I4: a flush waits for a round that began after it. If anything fails, all that the
 * round took is dirty again. One round per image at a time; whoever comes meanwhile shares the next.
 */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/log.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/request_internal.h"

enum phase { PHASE_COUNTS, PHASE_TABLE, PHASE_HEADER, PHASE_LINKS, PHASES };
#define WRITEBACK_BYTES (4u << 20) /* dirty: start a round */
#define THROTTLE_BYTES	(8u << 20) /* dirty: hold up what would make more */
#define WRITEBACK_FREES 65536u

/* A piece of metadata on its way. */
struct item {
	struct item *next;
	struct round *round;
	struct io_op op;
	struct iovec iov;
	struct slice *slice; /* NULL: a sector of a table, or of the header */
	struct table *table;
	uint64_t index; /* first entry of the sector */
	uint8_t data[];
};

struct round {
	struct image *image;
	struct flush_wait *waiters;
	struct item *items[PHASES];
	enum phase phase; /* being written, or to be written when the sync ends */
	unsigned outstanding;
	int result;
	uint64_t writes; /* of the image at the beginning */
	bool unsynced;	 /* something was written since the last sync */
	struct io_op sync;
};

static struct item *add_item(struct round *r, enum phase phase, uint64_t offset, size_t length)
{
	struct item *item = calloc(1, sizeof(*item) + length);
	if (!item)
		return NULL;
	item->round = r;
	item->iov = (struct iovec){item->data, length};
	item->op.kind = IO_WRITE;
	item->op.fd = r->image->fd;
	item->op.offset = offset;
	item->op.length = length;
	item->op.iov = &item->iov;
	item->op.iov_count = 1;
	item->next = r->items[phase];
	r->items[phase] = item;
	return item;
}

static int take_slices(struct round *r)
{
	struct image *image = r->image;
	for (struct slice *s = image->q.dirty_slices, *next; s; s = next) {
		next = s->dirty_next;
		struct item *item =
			add_item(r, s->counts ? PHASE_COUNTS : PHASE_LINKS, s->offset, image->q.slice_bytes);
		if (!item)
			return -ENOMEM;
		memcpy(item->data, s->data, image->q.slice_bytes);
		item->slice = s;
		slice_begin_write(s);
	}
	return 0;
}

static int take_table(struct round *r, struct table *t, enum phase phase)
{
	for (uint64_t i = 0; t->dirty_count && i < t->count; i += TABLE_SECTOR) {
		if (!t->dirty[i / TABLE_SECTOR])
			continue;
		uint64_t n = min_u64(TABLE_SECTOR, t->count - i);
		struct item *item = add_item(r, phase, t->offset + i * 8, (size_t)n * 8);
		if (!item)
			return -ENOMEM;
		for (uint64_t k = 0; k < n; k++)
			put_be64(item->data + k * 8, t->entries[i + k]);
		item->table = t;
		item->index = i;
		t->dirty[i / TABLE_SECTOR] = 0;
		t->dirty_count--;
	}
	return 0;
}

static int take_header(struct round *r)
{
	struct qcow2 *q = &r->image->q;
	if (!q->header_dirty)
		return 0;
	struct item *item = add_item(r, PHASE_HEADER, QCOW2_AT_REFTABLE_OFFSET, 12);
	if (!item)
		return -ENOMEM;
	/* The two fields lie in one sector, so that they change together. */
	put_be64(item->data, q->reftable.offset);
	put_be32(item->data + 8, (uint32_t)q->reftable_clusters);
	q->header_dirty = false;
	return 0;
}

static int take_everything(struct round *r)
{
	struct qcow2 *q = &r->image->q;
	int rc = take_slices(r);
	if (rc == 0)
		rc = take_table(r, &q->reftable, PHASE_TABLE);
	if (rc == 0)
		rc = take_header(r);
	if (rc == 0)
		rc = take_table(r, &q->l1, PHASE_LINKS);
	struct free_list list = q->frees_committing; /* empty; keeps its memory */
	q->frees_committing = q->frees_new;
	q->frees_new = list;
	return rc;
}

static void give_back(struct round *r, const struct item *item)
{
	bool good = r->result == 0;
	if (item->slice)
		slice_end_write(item->slice, good);
	else if (!good && item->table)
		table_mark_dirty(item->table, item->index);
	else if (!good)
		r->image->q.header_dirty = true;
}

static void start_round(struct image *image);

static void end_round(struct round *r)
{
	struct image *image = r->image;
	int result = r->result ? r->result : image->lost_error;
	bool told = false, told_before_switch = false;
	for (int p = 0; p < PHASES; p++)
		for (struct item *item = r->items[p], *next; item; item = next) {
			next = item->next;
			give_back(r, item);
			free(item);
		}
	if (r->result == 0)
		image->synced = r->writes;
	else
		log_warn("%s: writing metadata or syncing failed: %s", image->path, strerror(-r->result));
	image->round = NULL;
	if (image->format == COW_FORMAT_QCOW2) {
		qcow2_frees_committed(image, r->result == 0);
		if (r->result)
			cow_req_fail_waiting(&image->q.throttled, r->result);
		else
			cow_req_wake(&image->q.throttled);
	}
	for (struct flush_wait *w = r->waiters, *next; w; w = next) {
		next = w->next;
		if (!w->done)
			continue;
		told = told || w->guest;
		told_before_switch = told_before_switch || w->guest == image;
		w->done(w, result);
	}
	/* The guest may lose no error, though the kernel reports it once: one that hit a round of our own, or a seal, is its next flush's. */
	image->lost_error = told ? 0 : result;
	if (told && !told_before_switch && result)
		image->unsealable = result;
	free(r);
	if (image->flush_next && !image->round)
		start_round(image);
	cow_seal_progress(image);
}

static void advance(struct round *r);

static const enum fault_point written_fault[PHASES] = {
	FAULT_COW_COUNTS_WRITTEN,
	FAULT_COW_TABLE_WRITTEN,
	FAULT_COW_HEADER_WRITTEN,
	FAULT_COW_LINKS_WRITTEN,
};

static void synced(struct round *r, int result)
{
	if (result == 0)
		result = fault_check(FAULT_COW_SYNCED, NULL);
	r->unsynced = false;
	if (r->result == 0)
		r->result = result;
}

static void sync_done(struct io_op *op, int result)
{
	struct round *r = container_of(op, struct round, sync);
	synced(r, result);
	advance(r);
}

static void start_sync(struct round *r)
{
	r->sync = (struct io_op){.kind = IO_SYNC, .fd = r->image->fd, .done = sync_done};
	cow_io_start(r->image->io, &r->sync);
}

static void item_done(struct io_op *op, int result)
{
	struct round *r = container_of(op, struct item, op)->round;
	if (result == 0)
		result = fault_check(FAULT_COW_META_WRITTEN, NULL);
	if (r->result == 0)
		r->result = result;
	if (--r->outstanding)
		return;
	if (r->result == 0)
		r->result = fault_check(written_fault[r->phase], NULL);
	r->phase++;
	if (op->synced && r->result == 0)
		synced(r, 0);
	advance(r);
}

static void write_phase(struct round *r)
{
	r->unsynced = true;
	for (struct item *item = r->items[r->phase]; item; item = item->next)
		r->outstanding++;
	/* What was written before has ended, so the sync may follow at once. But writes to the file wait for it then. */
	const struct cow_disk *disk = r->image->disk;
	r->items[r->phase]->op.syncs = r->outstanding == 1 && disk && disk->flushed_alone == FLUSHED_ALONE;
	for (struct item *item = r->items[r->phase]; item; item = item->next) {
		item->op.done = item_done;
		cow_io_start(r->image->io, &item->op);
	}
}

static void advance(struct round *r)
{
	while (r->result == 0 && r->phase < PHASES && !r->items[r->phase])
		r->phase++;
	if (r->result)
		end_round(r);
	else if (r->unsynced && r->phase != PHASE_COUNTS)
		start_sync(r);
	else if (r->phase < PHASES)
		write_phase(r);
	else
		end_round(r);
}

struct late_round {
	struct io_task task;
	struct round *round;
};

static void run_late(struct io_task *task)
{
	struct late_round *late = container_of(task, struct late_round, task);
	struct round *r = late->round;
	free(late);
	advance(r);
}

static void start_round(struct image *image)
{
	struct round *r = xcalloc(1, sizeof(*r));
	r->image = image;
	r->waiters = image->flush_next;
	image->flush_next = NULL;
	image->round = r;
	r->writes = image->writes;
	r->unsynced = image->writes != image->synced;
	if (image->format == COW_FORMAT_QCOW2)
		r->result = take_everything(r);
	/* Never straight from here: the round may have nothing to do and end at once, and callers are not prepared
	 * for that. */
	struct late_round *late = xcalloc(1, sizeof(*late));
	late->task.run = run_late;
	late->round = r;
	cow_io_later(image->io, &late->task);
}

void cow_image_sync_failed(struct image *image, int result)
{
	if (image->round && image->round->result == 0)
		image->round->result = result;
}

void cow_image_flush(struct image *image, struct flush_wait *wait)
{
	wait->next = image->flush_next;
	image->flush_next = wait;
	if (!image->round)
		start_round(image);
}

void cow_image_writeback(struct image *image)
{
	if (image->format != COW_FORMAT_QCOW2 || image->round)
		return;
	if (image->q.dirty_bytes >= WRITEBACK_BYTES || image->q.frees_new.count >= WRITEBACK_FREES)
		start_round(image);
}

bool cow_image_throttled(const struct image *image) { return image->q.dirty_bytes >= THROTTLE_BYTES; }

bool cow_image_clean(const struct image *image)
{
	if (image->round || image->flush_next || image->writes != image->synced || image->lost_error)
		return false;
	if (image->format != COW_FORMAT_QCOW2)
		return true;
	const struct qcow2 *q = &image->q;
	return !q->dirty_slices && !q->l1.dirty_count && !q->reftable.dirty_count && !q->header_dirty &&
	       !qcow2_frees_pending(image);
}
