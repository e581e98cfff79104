/*
 * The disks' part of a checkpoint. At every instant, a crash included, the disk's path opens as its present state:
 *
 *     1 the image is linked into the store as a layer                 path and layer are one file
 *     2 an empty overlay is made beside it, its backing the layer     path unchanged
 *     3 the overlay is renamed onto path, the folder synced           path reads as the layer, still written
 *     4 the switch, in the pause                                      the VM writes the overlay
 *
 * Before 4 the layer is renamed back over path to undo.
 *
 * A disk to which nothing was written since the parent's layer was sealed is left alone: its overlay is empty, and the checkpoint names the
 * parent's layer again. In the pause that must still hold, with no request in flight; else the disk is staged after all, and the pause comes
 * again. (A read in flight would go on to the overlay, and could end with data of a write that the checkpoint does not hold.)
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/engine_internal.h"
#include "checkpoint/file_sum.h"

/* A chain of more than 1024 images cannot be opened again. */
#define MAX_CHAIN_LENGTH 1000u
/* How long a layer may still take to be sealed after its checkpoint failed: so many reports of a wait, each after WAIT_REPORT_MS. */
#define SETTLE_REPORTS 5u

char *disk_temp_path(const char *path) { return xasprintf("%s.vmcp-new", path); }

int disk_sync_folder(const char *path, struct err *err)
{
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = slash == NULL   ? xstrdup(".")
				    : slash == path ? xstrdup("/")
						    : strndup(path, (size_t)(slash - path));
	CLEANUP_CLOSE int fd = file_open_dir(AT_FDCWD, folder ? folder : ".", 0, err);
	return fd < 0 ? fd : file_sync_dir(fd, err);
}

struct sealing {
	struct ckpt_engine *engine;
	const struct engine_disk *disk;
};

static void report(void *opaque, const char *waits_for)
{
	const struct sealing *sealing = opaque;
	char text[WAIT_TEXT_BYTES];
	snprintf(text, sizeof(text), "disk %s: %s", sealing->disk->name, waits_for);
	engine_report(sealing->engine, text);
}

static int seal(struct ckpt_engine *engine, const struct engine_disk *disk, struct cow_overlay *overlay, struct err *err)
{
	struct sealing sealing = {engine, disk};
	const struct wait wait = {.cancel = &engine->cancel, .report = report, .opaque = &sealing};
	int r = cow_overlay_seal(overlay, &wait, err);
	engine_report(engine, "");
	return r;
}

static int end_sealing(struct engine_disk *disk, int r)
{
	if (r != -ECANCELED)
		disk->unsealed = NULL;
	if (r != 0 && r != -ECANCELED)
		disk->unsafe = true;
	return r;
}

/* A layer of an earlier checkpoint that was cancelled: the next one stands on it. */
static int seal_leftover(struct ckpt_engine *engine, struct engine_disk *disk, struct err *err)
{
	if (!disk->unsealed)
		return 0;
	return end_sealing(disk, seal(engine, disk, disk->unsealed, err));
}

/* Nothing was written to it since the checkpoint at which the VM stands. */
static bool is_unchanged(const struct take *take, const struct engine_disk *disk)
{
	return disk->sealed_at[0] && strcmp(disk->sealed_at, take->result.parent) == 0 && !disk->unsealed &&
	       !cow_is_touched(disk->disk);
}

static int check_length(const struct engine_disk *disk, struct err *err)
{
	if (cow_chain_length(disk->disk) < MAX_CHAIN_LENGTH)
		return 0;
	err_set(err, ERR_STATE, EMLINK, "its chain has %u images, and one more may be too many to open it again",
		cow_chain_length(disk->disk));
	return err_hint(err, "end the VM and make one image of it: qemu-img convert -O qcow2 %.150s NEW", disk->path);
}

static int stage_disk(struct take *take, struct take_disk *d, struct err *err)
{
	struct engine_disk *disk = d->disk;
	struct store_disk_layer *layer = &d->layer;
	struct err unset = ERR_INIT;
	int r = check_length(disk, err ? err : &unset);
	if (r == 0)
		r = seal_leftover(take->engine, disk, err);
	if (r != 0)
		return r;
	snprintf(layer->disk, sizeof(layer->disk), "%s", disk->name);
	snprintf(layer->format, sizeof(layer->format), "%s",
		 cow_format_of(disk->disk) == COW_FORMAT_QCOW2 ? "qcow2" : "raw");
	layer->size_bytes = cow_size(disk->disk);
	d->temp_path = disk_temp_path(disk->path);
	unlink(d->temp_path); /* of a process that died here */
	r = store_draft_disk_layer(take->draft, disk->name, disk->path, layer->format, layer->layer, &d->layer_path,
				   err);
	if (r == 0)
		r = fault_check(FAULT_TAKE_DISK_LINKED, err);
	if (r == 0)
		r = cow_overlay_prepare(disk->disk, d->temp_path, d->layer_path, &d->overlay, err);
	if (r == 0)
		r = fault_check(FAULT_TAKE_DISK_PREPARED, err);
	if (r == 0 && rename(d->temp_path, disk->path) != 0)
		r = err_sys(err, errno, "rename %s to %s", d->temp_path, disk->path);
	if (r != 0)
		return r;
	d->renamed = true;
	r = fault_check(FAULT_TAKE_DISK_RENAMED, err);
	return r == 0 ? disk_sync_folder(disk->path, err) : r;
}

int take_stage_disks(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	for (unsigned i = 0; i < engine->disk_count; i++) {
		struct take_disk *d = &take->disks[i];
		int r = 0;
		d->disk = &engine->disks[i];
		take->disk_count = i + 1;
		d->unchanged = is_unchanged(take, d->disk);
		if (d->unchanged)
			d->layer = d->disk->sealed;
		else
			r = stage_disk(take, d, err);
		if (r == 0)
			r = engine_check_cancel(engine, err);
		if (r != 0)
			return err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return 0;
}

int take_check_disks(struct take *take, struct err *err)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		const struct take_disk *d = &take->disks[i];
		if (d->unchanged && (cow_is_touched(d->disk->disk) || d->layer.inflight_reads || d->layer.inflight_writes ||
				     cow_inflight(d->disk->disk)))
			return err_set(err, ERR_FAILED, ESTALE, "a disk was written meanwhile");
	}
	return 0;
}

/* All of them, so that this is done once only. */
int take_restage_disks(struct take *take, struct err *err)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct take_disk *d = &take->disks[i];
		if (!d->unchanged)
			continue;
		d->unchanged = false;
		d->layer = (struct store_disk_layer){0};
		int r = stage_disk(take, d, err);
		if (r != 0)
			return err_prefix(err, "disk %s", d->disk->name);
	}
	return engine_check_cancel(take->engine, err);
}

void take_note_disks(struct take *take)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct take_disk *d = &take->disks[i];
		d->disk->sealed = d->layer;
		d->disk->sealed.inflight_reads = d->disk->sealed.inflight_writes = 0;
		memcpy(d->disk->sealed_at, take->result.id, sizeof(d->disk->sealed_at));
	}
}

void take_unstage_disks(struct take *take)
{
	for (unsigned i = take->disk_count; i-- > 0;) {
		struct take_disk *d = &take->disks[i];
		if (d->overlay)
			cow_overlay_abandon(d->overlay);
		d->overlay = NULL;
		if (!d->renamed) {
			if (d->temp_path)
				unlink(d->temp_path);
			continue;
		}
		/* The VM's image is the layer's file. */
		if (rename(d->layer_path, d->disk->path) == 0) {
			disk_sync_folder(d->disk->path, NULL);
			continue;
		}
		/* The path reads as the layer, so nothing is lost as long as that stays; but the VM goes on to write
		 * the layer. */
		log_error("disk %s: cannot put %s back to %s: %s; no further checkpoint until the VM is started again",
			  d->disk->name, d->layer_path, d->disk->path, strerror(errno));
		d->disk->unsafe = true;
		store_draft_switched(take->draft);
	}
}

static bool goes_on(void *opaque, uint64_t bytes, bool read)
{
	(void)bytes, (void)read;
	return !__atomic_load_n((const volatile bool *)opaque, __ATOMIC_RELAXED);
}

static int measure_layer(struct take *take, struct take_disk *d, struct err *err)
{
	struct stat st;
	CLEANUP_CLOSE int fd = open(d->layer_path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) != 0)
		return err_sys(err, errno, "%s", d->layer_path);
	d->layer.file_bytes = (uint64_t)st.st_size;
	return file_sum(fd, d->layer.file_bytes, goes_on, (void *)&take->engine->cancel, &d->layer.xxh3, err);
}

int take_seal_disks(struct take *take, struct err *err)
{
	/* All at a time: what one disk waits for does not hold up the others. */
	for (unsigned i = 0; i < take->disk_count; i++)
		if (take->disks[i].overlay)
			cow_overlay_seal_begin(take->disks[i].overlay);
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct take_disk *d = &take->disks[i];
		if (d->unchanged)
			continue;
		int r = seal(take->engine, d->disk, d->overlay, err);
		if (r != -ECANCELED)
			d->overlay = NULL;
		if (r != 0 && r != -ECANCELED)
			d->disk->unsafe = true;
		if (r == 0)
			r = measure_layer(take, d, err);
		if (r != 0)
			return err_prefix(err, "disk %s: layer", d->disk->name);
	}
	return 0;
}

struct moment {
	volatile bool over;
	unsigned reports;
};

static void count_report(void *opaque, const char *waits_for)
{
	struct moment *moment = opaque;
	(void)waits_for;
	moment->over = ++moment->reports >= SETTLE_REPORTS;
}

/* The checkpoint may have been cancelled, but what is on its way to the disk is given the time to get there. A request that hangs is not waited for. */
static int seal_in_a_moment(struct engine_disk *disk, struct err *err)
{
	struct moment moment = {0};
	const struct wait wait = {.cancel = &moment.over, .report = count_report, .opaque = &moment};
	return end_sealing(disk, cow_overlay_seal(disk->unsealed, &wait, err));
}

/* As long as the draft is there, its marker keeps others from the layer. Where it does not go the chain stays longer by a layer, which is merged with
 * others when that pays (merge_disks.c). */
static void merge_back(struct take *take, const struct take_disk *d)
{
	struct err err = ERR_INIT;
	if (!take->draft || d->disk->unsealed || d->disk->unsafe)
		return;
	if (cow_overlay_undo(d->disk->disk, d->layer_path, d->disk->path, &err) != 0)
		log_info("disk %s: keeps the layer of the checkpoint that failed: %s", d->disk->name, err.message);
}

void take_settle_disks(struct take *take)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct take_disk *d = &take->disks[i];
		if (!d->overlay)
			continue;
		struct err err = ERR_INIT;
		d->disk->unsealed = d->overlay;
		d->overlay = NULL;
		/* If it was cancelled because a request hangs, the next checkpoint waits for that one. */
		if (seal_in_a_moment(d->disk, &err) != 0 && err.number != ECANCELED)
			log_error("disk %s: the layer of the failed checkpoint is not durable: %s", d->disk->name,
				  err.message);
	}
	for (unsigned i = 0; i < take->disk_count; i++)
		if (!take->disks[i].unchanged)
			merge_back(take, &take->disks[i]);
}
