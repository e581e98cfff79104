/* Disks: opening, closing, the synchronous forms. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/disk_internal.h"

enum {
	CLEAN_ROUNDS = 16, /* a round may leave freed counts to the next; more than a few mean that something is wrong */
	OPEN_TRIES = 16    /* of a chain whose layers are being merged */
};

static int open_chain(struct cow_io *io, const char *path, int format, unsigned flags, struct image **out,
		      struct err *err)
{
	bool lock = !(flags & COW_OPEN_NO_LOCK);
	struct image *top;
	int rc = -ESTALE;
	for (int n = 0; n < OPEN_TRIES && rc == -ESTALE; n++) {
		if (n > 0 && err)
			*err = ERR_INIT;
		rc = cow_image_open(io, path, format, !(flags & COW_OPEN_READONLY), lock, &top, err);
		if (rc < 0)
			return rc;
		rc = cow_chain_open(top, lock, err);
		if (rc < 0)
			cow_image_free(top);
	}
	*out = top;
	return rc;
}

static void attach_chain(struct cow_disk *disk, struct image *top)
{
	unsigned length = 0;
	for (struct image *i = top; i; i = i->backing, length++)
		i->disk = disk;
	atomic_store(&disk->length, length);
	atomic_store(&top->touched, true); /* by whom, who knows */
	disk->top = top;
}

int cow_open_as(struct cow_io *io, const char *path, int format, unsigned flags, struct cow_disk **out, struct err *err)
{
	struct image *top;
	int rc = open_chain(io, path, format, flags, &top, err);
	if (rc < 0)
		return rc;
	struct cow_disk *disk = xcalloc(1, sizeof(*disk));
	disk->io = io;
	disk->flags = flags;
	disk->size = top->size;
	attach_chain(disk, top);
	cow_io_count_disk(io, 1);
	*out = disk;
	return 0;
}

int cow_open(struct cow_io *io, const char *path, unsigned flags, struct cow_disk **out, struct err *err)
{
	return cow_open_as(io, path, -1, flags, out, err);
}

struct waiter {
	struct flush_wait wait;
	bool done;
	int result;
};

static void waiter_done(struct flush_wait *wait, int result)
{
	struct waiter *w = container_of(wait, struct waiter, wait);
	w->done = true;
	w->result = result;
}

int cow_disk_make_clean(struct image *image)
{
	for (int n = 0; n < CLEAN_ROUNDS && !cow_image_clean(image); n++) {
		struct waiter w = {.wait.done = waiter_done};
		cow_image_flush(image, &w.wait);
		while (!w.done || image->q.punching)
			cow_io_drive(image->io, -1);
		if (w.result < 0)
			return w.result;
	}
	return 0;
}

void cow_disk_wait_idle(struct cow_disk *disk)
{
	for (struct image *i = disk->top; i; i = i->backing)
		while (i->round || i->q.punching)
			cow_io_drive(disk->io, -1);
}

int cow_close(struct cow_disk *disk, struct err *err)
{
	int result = 0;
	if (!disk)
		return 0;
	for (struct image *i = disk->top; i && !i->sealed; i = i->backing) {
		int rc = cow_disk_make_clean(i);
		if (rc < 0 && result == 0)
			result = err_sys(err, rc, "%s: writing back metadata", i->path);
	}
	cow_disk_wait_idle(disk);
	cow_overlay_forget(disk);
	cow_resolved_forget(disk);
	cow_retired_release(disk, true);
	cow_chain_free(disk->top);
	cow_io_count_disk(disk->io, -1);
	free(disk);
	return result;
}

int cow_replace(struct cow_disk *disk, const char *path, struct err *err)
{
	struct image *top;
	int rc = open_chain(disk->io, path, -1, disk->flags, &top, err);
	if (rc < 0)
		return rc;
	if (top->size != disk->size) {
		rc = err_set(err, ERR_FAILED, EINVAL, "%s: size %" PRIu64 " differs from the running disk's %" PRIu64,
			     path, top->size, disk->size);
		cow_chain_free(top);
		return rc;
	}
	cow_disk_wait_idle(disk);
	cow_overlay_forget(disk);
	cow_resolved_forget(disk);
	cow_retired_release(disk, true);
	cow_chain_free(disk->top);
	attach_chain(disk, top);
	return 0;
}

static bool is_file(const struct image *image, const char *path)
{
	struct stat st;
	return stat(path, &st) == 0 && st.st_dev == image->device && st.st_ino == image->inode;
}

bool cow_is_empty_overlay(const struct cow_disk *disk, const char *path, const char *layer_path)
{
	const struct image *top = disk->top;
	if (disk->inflight > 0 || disk->overlays || top->format != COW_FORMAT_QCOW2 || top->readonly || top->damaged ||
	    top->lost_error != 0 || !top->backing || !top->backing->sealed)
		return false;
	for (uint64_t i = 0; i < top->q.l1.count; i++)
		if (top->q.l1.entries[i] != 0)
			return false;
	return is_file(top, path) && is_file(top->backing, layer_path);
}

uint64_t cow_size(const struct cow_disk *disk) { return disk->size; }
enum cow_format cow_format_of(const struct cow_disk *disk) { return disk->top->format; }
bool cow_is_readonly(const struct cow_disk *disk) { return disk->top->readonly; }
uint32_t cow_cluster_bytes(const struct cow_disk *disk) { return (uint32_t)image_cluster_bytes(disk->top); }
bool cow_is_touched(const struct cow_disk *disk) { return atomic_load_explicit(&disk->top->touched, memory_order_relaxed); }
unsigned cow_chain_length(const struct cow_disk *disk) { return atomic_load_explicit(&disk->length, memory_order_relaxed); }
const char *cow_path(const struct cow_disk *disk) { return disk->top->path; }

struct cow_io *cow_disk_io(const struct cow_disk *disk) { return disk->io; }

struct sync_call {
	struct cow_request request;
	struct iovec iov;
	bool done;
	int result;
};

static void sync_done(struct cow_request *request, int result)
{
	struct sync_call *call = container_of(request, struct sync_call, request);
	call->done = true;
	call->result = result;
}

static int run_sync(struct cow_disk *disk, enum cow_op op, uint64_t offset, void *data, size_t length, struct err *err)
{
	static const char *const name[] = {"read", "write", "flush"};
	struct sync_call call = {.request = {.op = op, .offset = offset, .length = length, .done = sync_done}};
	call.iov = (struct iovec){data, length};
	call.request.iov = &call.iov;
	call.request.iov_count = 1;
	cow_submit(disk, &call.request);
	while (!call.done)
		cow_io_drive(disk->io, -1);
	if (call.result < 0)
		return err_sys(err, call.result, "%s: %s of %zu bytes at %" PRIu64, disk->top->path, name[op], length,
			       offset);
	return 0;
}

int cow_read_sync(struct cow_disk *disk, uint64_t offset, void *data, size_t length, struct err *err)
{
	return run_sync(disk, COW_READ, offset, data, length, err);
}

int cow_write_sync(struct cow_disk *disk, uint64_t offset, const void *data, size_t length, struct err *err)
{
	return run_sync(disk, COW_WRITE, offset, (void *)(uintptr_t)data, length, err);
}

int cow_flush_sync(struct cow_disk *disk, struct err *err) { return run_sync(disk, COW_FLUSH, 0, NULL, 0, err); }
