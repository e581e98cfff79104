/*
 * Undoing the switch to an overlay: see cow_overlay_undo in overlay.h.
 *
 *     1 nothing is in flight, the overlay is whole on the disk          path -> overlay -> layer
 *     2 what the overlay holds is copied into the layer, and synced     the same: whoever reads finds it in the overlay first
 *     3 the layer takes the overlay's name, by rename, synced           path -> layer
 *     4 the running disk turns to it
 *
 * All of it in the I/O thread, so that the guest writes nothing meanwhile. A crash between any two leaves a disk that reads the same. The rename is
 * durable before the guest writes again: else a crash could bring back the overlay over newer data.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "cowdisk/copy_internal.h"
#include "cowdisk/disk_internal.h"

#define WAIT_NS	       200000000ull /* for what is under way */
#define MOST_BYTES     (32u << 20)  /* that the guest's I/O stands still for */

struct undo {
	struct cow_disk *disk;
	const char *layer_path, *path;
	struct err *err;
	int result;
};

static int check(struct undo *u)
{
	const struct image *top = u->disk->top, *layer = top->backing;
	struct stat st, named;
	if (u->disk->overlays || !layer || !layer->sealed || layer->unsealable || top->lost_error || layer->lost_error || top->damaged ||
	    layer->damaged)
		return err_set(u->err, ERR_STATE, EBUSY, "%s: the layer below is not whole", top->path);
	if (stat(u->layer_path, &st) < 0 || stat(u->path, &named) < 0)
		return err_sys(u->err, errno, "%s", u->layer_path);
	if (st.st_ino != layer->inode || st.st_dev != layer->device || named.st_ino != top->inode || named.st_dev != top->device)
		return err_set(u->err, ERR_STATE, ESTALE, "%s: is another file by now", u->layer_path);
	if ((uint64_t)named.st_blocks * 512 > MOST_BYTES)
		return err_set(u->err, ERR_STATE, EFBIG, "%s: much was written to it", u->path);
	return 0;
}

/* Of a flush that may last longer than anybody waits for it. */
struct flush {
	struct flush_wait wait;
	bool done, abandoned;
	int result;
};

static void flushed(struct flush_wait *wait, int result)
{
	struct flush *f = container_of(wait, struct flush, wait);
	f->done = true;
	f->result = result;
	if (f->abandoned)
		free(f);
}

static bool is_idle(const struct cow_disk *disk) { return disk->inflight == 0 && !disk->top->round && !disk->top->q.punching; }

/* One round of metadata, and what else is under way; a disk that hangs must not hold up the I/O thread. */
static int flush_until(struct cow_disk *disk, uint64_t end_ns)
{
	struct flush *f = xcalloc(1, sizeof(*f));
	f->wait.done = flushed;
	cow_image_flush(disk->top, &f->wait);
	while (!(f->done && is_idle(disk)) && clock_now_ns() < end_ns)
		cow_io_drive(disk->io, 5);
	if (!f->done) {
		f->abandoned = true;
		return -EBUSY;
	}
	int result = f->result;
	free(f);
	return result < 0 ? result : is_idle(disk) ? 0 : -EBUSY;
}

static int make_quiet(struct undo *u)
{
	struct cow_disk *disk = u->disk;
	uint64_t end_ns = clock_now_ns() + WAIT_NS;
	int rc = 0;
	while (!is_idle(disk) && clock_now_ns() < end_ns)
		cow_io_drive(disk->io, 5);
	while (rc == 0 && (!is_idle(disk) || !cow_image_clean(disk->top)))
		rc = is_idle(disk) ? flush_until(disk, end_ns) : -EBUSY;
	if (rc == -EBUSY)
		return err_set(u->err, ERR_STATE, EBUSY, "%s: what is under way to it did not end in time", u->path);
	return rc < 0 ? err_sys(u->err, rc, "%s", u->path) : 0;
}

/* Of the layer, for those who open it: as it was opened. */
static int format_of(const struct undo *u)
{
	const struct image *layer = u->disk->top->backing;
	return layer->guarded ? -1 : (int)layer->format;
}

static int copy_between(struct undo *u, struct cow_io *io)
{
	const unsigned from_flags = COW_OPEN_READONLY | COW_OPEN_NO_LOCK;
	struct copy_job job = {.keeps = true};
	struct cow_disk *from;
	int rc = cow_open_as(io, u->path, COW_FORMAT_QCOW2, from_flags, &from, u->err);
	if (rc < 0)
		return rc;
	rc = cow_open_as(io, u->layer_path, format_of(u), COW_OPEN_NO_LOCK, &job.to, u->err);
	if (rc == 0) {
		job.from = from;
		job.stop = from->top->backing;
		rc = cow_copy(&job, u->err);
		int closed = cow_close(job.to, rc < 0 ? NULL : u->err);
		rc = rc < 0 ? rc : closed;
	}
	cow_close(from, NULL);
	return rc;
}

static int copy_down(struct undo *u)
{
	struct cow_io *io;
	int rc = cow_io_create(NULL, &io, u->err);
	if (rc < 0)
		return rc;
	rc = copy_between(u, io);
	cow_io_destroy(io);
	if (rc < 0)
		return rc;
	/* Raw files are not synced by a close. */
	CLEANUP_CLOSE int fd = open(u->layer_path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fsync(fd) < 0)
		return err_sys(u->err, errno, "%s", u->layer_path);
	return fault_check(FAULT_TAKE_UNDO_COPIED, u->err);
}

static int sync_folder_of(const char *path, struct err *err)
{
	CLEANUP_FREE char *folder = xasprintf("%.*s", (int)(strrchr(path, '/') ? strrchr(path, '/') - path + 1 : 2), strrchr(path, '/') ? path : "./");
	CLEANUP_CLOSE int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 ? err_sys(err, errno, "%s", folder) : file_sync_dir(fd, err);
}

/* Nothing fails behind the rename: the disk must be what the path is. */
static int take_name(struct undo *u)
{
	struct err why = ERR_INIT;
	if (rename(u->layer_path, u->path) < 0)
		return err_sys(u->err, errno, "rename %s to %s", u->layer_path, u->path);
	fault_check(FAULT_TAKE_UNDO_RENAMED, &why);
	if (sync_folder_of(u->path, &why) < 0 || sync_folder_of(u->layer_path, &why) < 0)
		log_error("%s: %s", u->path, why.message);
	return 0;
}

static void turn_to(struct undo *u, struct image *image)
{
	struct cow_disk *disk = u->disk;
	struct image *top = disk->top, *layer = top->backing;
	free(image->path);
	image->path = xstrdup(u->path);
	image->backing = layer->backing;
	image->generation = layer->generation;
	image->disk = disk;
	atomic_store(&image->touched, true);
	layer->backing = NULL;
	disk->top = image;
	atomic_fetch_sub(&disk->length, 1);
	cow_resolved_forget(disk);
	cow_retired_release(disk, true);
	cow_image_free(top);
	cow_image_free(layer);
}

/* Keeps others from reading the layer while it changes. Our own lock as its reader would be in the way. Returns a descriptor. */
static int claim(struct undo *u)
{
	int fd = cow_image_open_fd(u->layer_path, true, u->err);
	if (fd < 0 || u->disk->flags & COW_OPEN_NO_LOCK)
		return fd;
	cow_lock_drop(u->disk->top->backing->fd);
	int rc = cow_lock_take(fd, true, u->layer_path, u->err);
	if (rc == 0)
		return fd;
	close(fd);
	return rc;
}

/* From the claim, which is given up, to the image that will be the top. */
static int open_layer(struct undo *u, int claimed, struct image **out)
{
	int rc = cow_image_open(u->disk->io, u->layer_path, format_of(u), true, false, out, u->err);
	close(claimed);
	if (rc < 0 || u->disk->flags & COW_OPEN_NO_LOCK)
		return rc;
	rc = cow_lock_take((*out)->fd, true, u->layer_path, u->err);
	(*out)->write_locked = rc == 0;
	if (rc < 0)
		cow_image_free(*out);
	return rc;
}

static int put_back(struct undo *u)
{
	struct image *image;
	int claimed = claim(u);
	if (claimed < 0)
		return claimed;
	int rc = copy_down(u);
	if (rc < 0) {
		close(claimed);
		return rc;
	}
	rc = open_layer(u, claimed, &image);
	if (rc < 0)
		return rc;
	rc = take_name(u);
	if (rc == 0)
		turn_to(u, image);
	else
		cow_image_free(image);
	return rc;
}

static void undo(void *opaque)
{
	struct undo *u = opaque;
	struct image *layer = u->disk->top->backing;
	u->result = check(u);
	if (u->result == 0)
		u->result = make_quiet(u);
	if (u->result < 0)
		return;
	u->result = put_back(u);
	/* Its reader again. */
	if (u->result < 0 && !(u->disk->flags & COW_OPEN_NO_LOCK))
		cow_lock_take(layer->fd, false, u->layer_path, NULL);
}

int cow_overlay_undo(struct cow_disk *disk, const char *layer_path, const char *path, struct err *err)
{
	struct undo u = {.disk = disk, .layer_path = layer_path, .path = path, .err = err};
	struct loop *loop = cow_io_loop(disk->io);
	if (loop)
		loop_call(loop, undo, &u);
	else
		undo(&u);
	return u.result;
}
