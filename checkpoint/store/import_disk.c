/* The disks of an import: qcow2 images of their own, or overlays on what the base has. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "base/fault.h"
#include "base/log.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/store/import_internal.h"
#include "checkpoint/store/verify.h"
#include "cowdisk/block.h"

#define GRAIN 65536u /* a cluster: what differs is written in such pieces */

static const struct transfer_head_disk *head_disk(const struct import *im, uint32_t n) { return &im->head.disks[n]; }

/* --- making --- */

/* What a whole stream brings is not to be damaged because what it is likest to is: that is read first, as it is compared with anyway. */
static int open_before(struct import *im, const struct store_disk_layer *layer, struct import_disk *d, struct cow_create *create, char **path,
		       struct err *err)
{
	const struct verify_options options = {.cancel = im->options->cancel};
	struct err why = ERR_INIT;
	int rc = im->head.since[0] ? 0 : store_verify_layer(im->store, layer, &options, &why);

	if (!rc)
		rc = store_disk_layer_path(im->store, layer->layer, layer->format, path, &why);
	if (!rc)
		rc = cow_open_as(im->io, *path, store_disk_layer_format(layer), COW_OPEN_READONLY, &d->before, &why);
	/* With a whole stream it is a saving. */
	if (rc && rc != -ECANCELED && !im->head.since[0]) {
		log_warn("disk %s is not shared with what is here: %s", layer->disk, why.message);
		return 0;
	}
	if (rc && err)
		*err = why;
	if (rc)
		return rc;
	create->backing = *path;
	create->backing_format = cow_format_of(d->before);
	return 0;
}

static int make_disk(struct import *im, uint32_t n, struct err *err)
{
	const struct transfer_head_disk *disk = head_disk(im, n);
	struct import_disk *d = &im->disks[n];
	struct cow_create create = {.size_bytes = disk->size_bytes};
	CLEANUP_FREE char *before = NULL;
	const struct store_disk_layer *layer = im->has_base && !disk->readonly ? transfer_find_layer(&im->base.checkpoint, disk->name) : NULL;
	int rc = 0;

	d->made = true;
	if (!im->draft)
		return 0;
	if (!im->io)
		rc = cow_io_create(NULL, &im->io, err);
	if (!rc && disk->readonly)
		d->path = store_draft_own_disk(im->draft, disk->name);
	else if (!rc)
		rc = store_draft_new_disk(im->draft, d->layer, &d->path, err);
	if (!rc && layer)
		rc = open_before(im, layer, d, &create, &before, err);
	if (!rc)
		rc = cow_create(d->path, &create, err);
	if (!rc)
		rc = cow_open(im->io, d->path, 0, &d->disk, err);
	return rc ? rc : fault_check(FAULT_IMPORT_DISK_MADE, err);
}

/* --- writing --- */

static int make_buffer(struct import *im, struct err *err)
{
	void *buffer = NULL;

	if (!im->disk_before && posix_memalign(&buffer, PAGE_BYTES, TRANSFER_DATA_BYTES))
		return err_sys(err, ENOMEM, "buffer");
	if (!im->disk_before)
		im->disk_before = buffer;
	return 0;
}

/* Of a whole stream on a base: what is there already stays. */
static int write_if_new(struct import *im, struct import_disk *d, uint64_t offset, uint64_t length, const uint8_t *data, struct err *err)
{
	uint64_t size = cow_size(d->before), known = offset < size ? min_u64(length, size - offset) : 0;
	int rc = make_buffer(im, err);

	if (!rc && known)
		rc = cow_read_sync(d->before, offset, im->disk_before, known, err);
	for (uint64_t at = 0, n; !rc && at < length; at += n) {
		n = min_u64(length - at, GRAIN - (offset + at) % GRAIN);
		if (at + n > known || memcmp(im->disk_before + at, data + at, n) != 0)
			rc = cow_write_sync(d->disk, offset + at, data + at, n, err);
	}
	return rc;
}

/* Zero now, of which the base may say otherwise. */
static int clear(struct import_disk *d, uint64_t offset, uint64_t end, struct err *err)
{
	int rc = 0;

	if (!d->before)
		return 0;
	end = min_u64(end, cow_size(d->before));
	for (struct cow_run run; !rc && offset < end; offset += run.length) {
		rc = cow_map(d->before, offset, end - offset, &run, err);
		if (!rc && run.data)
			rc = cow_zero_sync(d->disk, offset, run.length, err);
		if (rc)
			break;
	}
	return rc;
}

/* The stream is silent about [offset, end): as the base has it, or zero. */
static int pass_over(struct import *im, struct import_disk *d, uint64_t offset, uint64_t end, struct err *err)
{
	return im->draft && !im->head.since[0] ? clear(d, offset, end, err) : 0;
}

static int take_run(struct import *im, struct import_disk *d, const struct transfer_run *run, const uint8_t *data, struct err *err)
{
	int rc = pass_over(im, d, d->next, run->first, err);

	if (rc || !im->draft)
		return rc;
	if (!run->data)
		return clear(d, run->first, run->first + run->count, err);
	return d->before && !im->head.since[0] ? write_if_new(im, d, run->first, run->count, data, err)
					       : cow_write_sync(d->disk, run->first, data, run->count, err);
}

/* --- ending --- */

static int measure(struct store_disk_layer *layer, const char *path, file_sum_step step, struct err *err)
{
	struct stat st;
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st))
		return err_sys(err, errno, "%s", path);
	layer->file_bytes = (uint64_t)st.st_size;
	return file_sum(fd, layer->file_bytes, step, NULL, &layer->xxh3, err);
}

static bool go_on(void *opaque, uint64_t bytes, bool read)
{
	(void)opaque;
	(void)bytes;
	(void)read;
	return true;
}

/* Writable disks are the first ones in the head, in the order of the manifest. */
static int finish_disk(struct import *im, uint32_t n, struct err *err)
{
	struct import_disk *d = &im->disks[n];
	int rc = pass_over(im, d, d->next, head_disk(im, n)->size_bytes, err);

	if (!rc && d->disk)
		rc = cow_flush_sync(d->disk, err);
	if (d->disk) {
		int closed = cow_close(d->disk, rc ? NULL : err);
		rc = rc ? rc : closed;
		d->disk = NULL;
	}
	if (d->before)
		cow_close(d->before, NULL);
	d->before = NULL;
	if (rc || !im->draft)
		return rc;
	rc = fault_check(FAULT_IMPORT_DISK_WRITTEN, err);
	if (!rc)
		rc = store_draft_sync_at_commit(im->draft, d->path, err);
	if (rc || head_disk(im, n)->readonly)
		return rc;
	struct store_disk_layer *layer = &im->checkpoint.disks[n];
	memcpy(layer->layer, d->layer, sizeof(layer->layer));
	strcpy(layer->format, "qcow2");
	layer->inflight_reads = layer->inflight_writes = 0;
	return measure(layer, d->path, go_on, err);
}

/* Up to disk `next`, which is made; those that are passed are whole. */
static int go_to_disk(struct import *im, uint32_t next, struct err *err)
{
	int rc = 0;

	for (; !rc; im->disk++) {
		uint32_t n = im->disk;

		if (n < im->head.disk_count && !head_disk(im, n)->kept && !im->disks[n].made)
			rc = make_disk(im, n, err);
		if (rc || n == next)
			break;
		if (!head_disk(im, n)->kept)
			rc = finish_disk(im, n, err);
		if (rc)
			break;
	}
	return rc;
}

int import_disk_chunk(struct import *im, const uint8_t *content, size_t length, struct err *err)
{
	uint32_t n = length >= TRANSFER_RUNS_BYTES ? get_le32(content + 4) : ~0u;
	struct transfer_runs runs;

	if (n >= im->head.disk_count || n < im->disk || head_disk(im, n)->kept)
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: disk number %u", n);
	const struct transfer_head_disk *disk = head_disk(im, n);
	int rc = go_to_disk(im, n, err);
	if (rc)
		return err_prefix(err, "disk %s", disk->name);
	struct import_disk *d = &im->disks[n];
	uint64_t next = d->next;
	rc = transfer_get_runs(content, length, 1, disk->size_bytes, &next, &runs, err);
	for (uint32_t i = 0; !rc && i < runs.count; i++) {
		const struct transfer_run *run = &runs.run[i];

		if (run->first % COW_SECTOR_BYTES || run->count % COW_SECTOR_BYTES)
			rc = err_set(err, ERR_DAMAGED, EINVAL, "damaged: a run that is no sectors");
		if (!rc)
			rc = take_run(im, d, run, runs.data, err);
		d->next = run->first + run->count;
		runs.data += run->data ? run->count : 0;
		im->result->disk_bytes += run->data ? run->count : 0;
	}
	return rc ? err_prefix(err, "disk %s", disk->name) : 0;
}

int import_disks_finish(struct import *im, struct err *err)
{
	int rc = go_to_disk(im, im->head.disk_count, err);

	return rc ? err_prefix(err, "disk %s", im->disk < im->head.disk_count ? head_disk(im, im->disk)->name : "") : 0;
}

void import_disks_close(struct import *im)
{
	for (uint32_t i = 0; i < TRANSFER_MAX_DISKS; i++) {
		if (im->disks[i].disk)
			cow_close(im->disks[i].disk, NULL);
		if (im->disks[i].before)
			cow_close(im->disks[i].before, NULL);
		free(im->disks[i].path);
	}
	if (im->io)
		cow_io_destroy(im->io);
	free(im->disk_before);
}
