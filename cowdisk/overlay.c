/*
 * The overlay switch. See overlay.h.
 *
 *     prepared --switch--> pending --last request ended--> flushing --clean--> sealed
 *         |                   |  ^                            |
 *      abandon          cancelled, called again          error: stays unsealed, flushes of the disk still cover it
 *
 * Lock order: cow_overlay.lock is innermost, and held only to publish the end.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "cowdisk/disk_internal.h"
#include "cowdisk/request_internal.h"

#define OVERLAY_CLUSTER_BYTES 4096u
#define OVERLAY_LARGEST_BYTES 65536u
#define OVERLAY_L1_ENTRIES    16384u

struct cow_overlay {
	struct cow_disk *disk; /* immutable */
	struct image *image;   /* the overlay; the disk's once switched */
	/* owner: I/O thread, from the switch on */
	struct image *layer;
	struct cow_overlay *next; /* disk->overlays */
	struct flush_wait flush;
	bool flushing;
	pthread_t starter; /* thread that ran seal_begin */
	char waits_for[WAIT_TEXT_BYTES]; /* as of the last describe_wait */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	/* under lock */
	bool ended;
	int result;
};

/*
 * Small, so that what a guest writes seldom needs to be copied up: 4 KiB, as guests' file systems write. Larger where the L1 table, which each layer holds in
 * memory, would have more than OVERLAY_L1_ENTRIES (beyond 32 GiB). Not larger than those of the layer below.
 */
static uint32_t overlay_cluster(const struct cow_disk *disk)
{
	uint64_t cluster = OVERLAY_CLUSTER_BYTES, largest = OVERLAY_LARGEST_BYTES;
	if (cow_format_of(disk) == COW_FORMAT_QCOW2)
		largest = cow_cluster_bytes(disk);
	while (cluster < largest && div_round_up(disk->size, cluster * (cluster / 8)) > OVERLAY_L1_ENTRIES)
		cluster *= 2;
	return (uint32_t)min_u64(cluster, largest);
}

int cow_overlay_prepare(struct cow_disk *disk, const char *overlay_path, const char *layer_name,
			struct cow_overlay **out, struct err *err)
{
	if (cow_is_readonly(disk))
		return err_set(err, ERR_STATE, EROFS, "%s: read-only", cow_path(disk));
	enum cow_format format = cow_format_of(disk);
	struct cow_create create = {
		.size_bytes = disk->size,
		.cluster_bytes = overlay_cluster(disk),
		.backing = layer_name,
		.backing_format = format,
	};
	int rc = cow_create(overlay_path, &create, err);
	if (rc == 0)
		rc = fault_check(FAULT_COW_OVERLAY_CREATED, err);
	if (rc < 0)
		return rc;
	struct image *image;
	bool lock = !(disk->flags & COW_OPEN_NO_LOCK);
	rc = cow_image_open(disk->io, overlay_path, COW_FORMAT_QCOW2, true, lock, &image, err);
	if (rc < 0)
		return err_prefix(err, "new overlay");
	struct cow_overlay *o = xcalloc(1, sizeof(*o));
	o->disk = disk;
	o->image = image;
	pthread_mutex_init(&o->lock, NULL);
	pthread_cond_init(&o->changed, NULL);
	*out = o;
	return 0;
}

static void overlay_free(struct cow_overlay *o)
{
	pthread_cond_destroy(&o->changed);
	pthread_mutex_destroy(&o->lock);
	free(o);
}

void cow_overlay_abandon(struct cow_overlay *o)
{
	if (!o)
		return;
	cow_image_free(o->image);
	overlay_free(o);
}

void cow_overlay_switch(struct cow_overlay *o)
{
	struct cow_disk *disk = o->disk;
	o->layer = disk->top;
	o->image->backing = disk->top;
	o->image->generation = disk->top->generation + 1;
	o->image->disk = disk;
	disk->top = o->image;
	atomic_fetch_add(&disk->length, 1);
	o->next = disk->overlays;
	disk->overlays = o;
}

unsigned cow_overlay_pending(const struct cow_overlay *o)
{
	return o->layer ? atomic_load_explicit(&o->layer->inflight, memory_order_acquire) : 0;
}

static void unlist(struct cow_overlay *o)
{
	struct cow_overlay **p = &o->disk->overlays;
	while (*p && *p != o)
		p = &(*p)->next;
	if (*p)
		*p = o->next;
}

static void seal_end(struct cow_overlay *o, int result)
{
	struct image *layer = o->layer;
	layer->seal = NULL;
	if (result == 0)
		result = layer->unsealable;
	if (result == 0)
		result = fault_check(FAULT_COW_SEALED, NULL);
	if (result == 0) {
		layer->sealed = true;
		if (layer->write_locked)
			cow_lock_drop_write(layer->fd);
		layer->write_locked = false;
	}
	unlist(o);
	pthread_mutex_lock(&o->lock);
	o->ended = true;
	o->result = result;
	pthread_cond_broadcast(&o->changed);
	pthread_mutex_unlock(&o->lock); /* the waiter may free it from here on */
}

static void seal_flushed(struct flush_wait *wait, int result)
{
	struct cow_overlay *o = container_of(wait, struct cow_overlay, flush);
	o->flushing = false;
	if (o->layer->seal != o)
		return; /* cancelled meanwhile */
	if (result < 0)
		seal_end(o, result);
	else
		cow_seal_progress(o->layer);
}

void cow_seal_progress(struct image *image)
{
	struct cow_overlay *o = image->seal;
	if (!o || o->flushing || image->q.punching || atomic_load_explicit(&image->inflight, memory_order_relaxed))
		return;
	if (cow_image_clean(image)) {
		seal_end(o, 0);
		return;
	}
	int rc = fault_check(FAULT_COW_SEALING, NULL);
	if (rc < 0) {
		seal_end(o, rc);
		return;
	}
	o->flushing = true;
	o->flush.done = seal_flushed;
	cow_image_flush(image, &o->flush);
}

static bool has_ended(struct cow_overlay *o)
{
	pthread_mutex_lock(&o->lock);
	bool ended = o->ended;
	pthread_mutex_unlock(&o->lock);
	return ended;
}

static void seal_begin(void *opaque)
{
	struct cow_overlay *o = opaque;
	if (has_ended(o))
		return;
	o->starter = pthread_self();
	o->layer->seal = o;
	cow_seal_progress(o->layer);
}

/* The oldest request of the layer, or else what comes after these. */
static void describe_wait(void *opaque)
{
	static const char *const name[] = {"read", "write", "flush", "discard", "write of zeroes"};
	struct cow_overlay *o = opaque;
	const struct cow_request *r = o->disk->first;
	while (r && ((const struct work *)r->work)->image != o->layer)
		r = r->next;
	if (!r) {
		snprintf(o->waits_for, sizeof(o->waits_for), "its metadata");
		return;
	}
	unsigned pending = cow_overlay_pending(o);
	wait_describe_request(o->waits_for, sizeof(o->waits_for), name[r->op], r->op == COW_FLUSH ? 0 : r->length,
			      r->offset / COW_SECTOR_BYTES, ((const struct work *)r->work)->since_ns, pending > 0 ? pending - 1 : 0);
}

/* Cancelled: leaves everything as it is, and notes what it waited for. */
static void seal_detach(void *opaque)
{
	struct cow_overlay *o = opaque;
	if (o->layer->seal != o)
		return;
	o->layer->seal = NULL;
	describe_wait(o);
}

static void call_in_io_thread(struct cow_overlay *o, loop_task_fn *fn)
{
	struct loop *loop = cow_io_loop(o->disk->io);
	if (loop)
		loop_call(loop, fn, o);
	else
		fn(o);
}

static void wait_some(struct cow_overlay *o)
{
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += WAIT_POLL_MS * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&o->lock);
	if (!o->ended)
		pthread_cond_timedwait(&o->changed, &o->lock, &until);
	pthread_mutex_unlock(&o->lock);
}

void cow_overlay_seal_begin(struct cow_overlay *o) { call_in_io_thread(o, seal_begin); }

int cow_overlay_seal(struct cow_overlay *o, const struct wait *wait, struct err *err)
{
	call_in_io_thread(o, seal_begin);
	/* Where no loop runs, nobody but us serves the ring. */
	bool alone = pthread_equal(o->starter, pthread_self());
	for (unsigned polls = 0; !has_ended(o); polls++) {
		if (wait_is_cancelled(wait)) {
			call_in_io_thread(o, seal_detach);
			if (has_ended(o))
				break;
			return err_set(err, ERR_STATE, ECANCELED, "%s: cancelled while sealing the layer waited for %s",
				       o->layer->path, o->waits_for);
		}
		if (wait_reports(wait, polls)) {
			call_in_io_thread(o, describe_wait);
			wait->report(wait->opaque, o->waits_for);
		}
		if (alone)
			cow_io_drive(o->disk->io, WAIT_POLL_MS);
		else
			wait_some(o);
	}
	int result = o->result;
	if (result < 0)
		err_sys(err, result, "%s: sealing the layer", o->layer->path);
	overlay_free(o);
	return result;
}

void cow_overlay_forget(struct cow_disk *disk)
{
	while (disk->overlays) {
		struct cow_overlay *o = disk->overlays;
		disk->overlays = o->next;
		overlay_free(o);
	}
}
