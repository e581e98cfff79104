/* Merges and exports. See merge.h. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fault.h"
#include "base/file.h"
#include "cowdisk/check.h"
#include "cowdisk/copy_internal.h"
#include "cowdisk/legacy_internal.h"
#include "cowdisk/request_internal.h"

struct file_id {
	dev_t device;
	ino_t inode;
	bool there;
};

struct cow_merged {
	char *path, *temp_path;
	struct file_id replaced; /* the topmost layer of the run */
	struct file_id base;	 /* what the merged file stands on */
	struct file_id made;
	uint64_t data_bytes;
	bool temporary; /* the temporary file is there */
};

static struct file_id id_of(const struct image *image)
{
	return image ? (struct file_id){image->device, image->inode, true} : (struct file_id){0};
}

static bool is_file(const struct image *image, const struct file_id *id)
{
	return image->device == id->device && image->inode == id->inode;
}

/* The images of the run must hold nothing that a merge would lose. On success *stop is what lies below the run. */
static int check_run(const struct cow_merge *merge, const struct cow_disk *from, const struct image **stop,
		     struct err *err)
{
	const struct image *image = from->top;
	if (image->format != COW_FORMAT_QCOW2)
		return err_set(err, ERR_FAILED, ENOTSUP, "%s: only a qcow2 layer can take in what is below it",
			       merge->path);
	if (merge->layers == 0)
		return err_set(err, ERR_USAGE, EINVAL, "%s: a merge of no layers", merge->path);
	for (unsigned n = 0; n < merge->layers; n++, image = image->backing) {
		if (!image)
			return err_set(err, ERR_FAILED, EINVAL, "%s: its chain has %u layers, %u were to be merged",
				       merge->path, n, merge->layers);
		if (image->format != COW_FORMAT_QCOW2)
			continue;
		const struct qcow2_header *h = &image->q.header;
		if (h->snapshot_count || h->autoclear & QCOW2_AUTOCLEAR_BITMAPS)
			return err_set(err, ERR_FAILED, ENOTSUP, "%s: holds %s, which a merge would lose", image->path,
				       h->snapshot_count ? "internal snapshots" : "bitmaps");
	}
	*stop = image;
	return 0;
}

/* The name of the base as it is written into a file in the folder of `path`: as the lowest layer of the run has it where that is the same
 * folder. */
static int base_name(const struct image *lowest, const char *path, char **out, struct err *err)
{
	const char *name = lowest->backing_name;
	const char *slash = strrchr(path, '/'), *other = strrchr(lowest->path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0, m = other ? (size_t)(other - lowest->path) : 0;
	if (name[0] == '/' || (n == m && strncmp(path, lowest->path, n) == 0)) {
		*out = xstrdup(name);
		return 0;
	}
	*out = realpath(lowest->backing->path, NULL);
	return *out ? 0 : err_sys(err, errno, "%s", lowest->backing->path);
}

/* A temporary file that nobody has open is of a process that died. */
static int remove_leftover(const char *path, struct err *err)
{
	struct err none = ERR_INIT;
	CLEANUP_CLOSE int fd = cow_image_open_fd(path, true, &none);
	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return err_sys(err, fd, "%s", path);
	int rc = cow_lock_take(fd, true, path, err);
	if (rc == 0 && unlink(path) < 0)
		rc = err_sys(err, errno, "%s", path);
	return rc;
}

static int sync_folder(const char *path, struct err *err)
{
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = slash ? xasprintf("%.*s", (int)(slash - path + 1), path) : xstrdup(".");
	CLEANUP_CLOSE int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 ? err_sys(err, errno, "%s", folder) : file_sync_dir(fd, err);
}

/* The new file is the layer's as far as others can see. */
static int take_over_owner(const struct image *from, const struct image *to, struct err *err)
{
	struct stat st;
	if (fstat(from->fd, &st) < 0)
		return err_sys(err, errno, "%s", from->path);
	if (fchown(to->fd, st.st_uid, st.st_gid) < 0 && errno != EPERM)
		return err_sys(err, errno, "%s: owner", to->path);
	if (fchmod(to->fd, st.st_mode & 07777) < 0)
		return err_sys(err, errno, "%s: mode", to->path);
	return 0;
}

static int create_merged(const struct cow_disk *from, const struct image *stop, const char *path, struct err *err)
{
	const struct image *lowest = from->top;
	while (lowest->backing != stop)
		lowest = lowest->backing;
	CLEANUP_FREE char *name = NULL;
	struct cow_create create = {.size_bytes = from->size,
				    .cluster_bytes = (uint32_t)image_cluster_bytes(from->top)};
	if (stop) {
		int rc = base_name(lowest, from->top->path, &name, err);
		if (rc < 0)
			return rc;
		create.backing = name;
		create.backing_format = stop->format;
	}
	return cow_create(path, &create, err);
}

/* Copies into the file at temp_path, which exists, and makes it durable. */
static int fill_merged(const struct cow_merge *merge, struct cow_merged *merged, struct cow_disk *from,
		       const struct image *stop, struct err *err)
{
	struct copy_job job = {.from = from,
			       .stop = stop,
			       .bytes_per_second = merge->bytes_per_second,
			       .cancel = merge->cancel,
			       .progress = merge->progress,
			       .opaque = merge->opaque};
	int rc = cow_open(from->io, merged->temp_path, 0, &job.to, err);
	if (rc < 0)
		return rc;
	if (job.to->size != from->size)
		rc = err_set(err, ERR_FAILED, EINVAL, "%s: size", merged->temp_path);
	if (rc == 0)
		rc = take_over_owner(from->top, job.to->top, err);
	if (rc == 0)
		rc = cow_copy(&job, err);
	if (rc == 0)
		rc = fault_check(FAULT_COW_MERGE_COPIED, err);
	merged->made = id_of(job.to->top);
	merged->data_bytes = job.data_bytes;
	int closed = cow_close(job.to, rc < 0 ? NULL : err);
	return rc < 0 ? rc : closed;
}

static int prepare(const struct cow_merge *merge, struct cow_merged *merged, struct cow_io *io, struct err *err)
{
	struct cow_disk *from;
	const struct image *stop = NULL;
	int rc = cow_open(io, merge->path, COW_OPEN_READONLY, &from, err);
	if (rc < 0)
		return rc;
	rc = check_run(merge, from, &stop, err);
	if (rc == 0)
		rc = remove_leftover(merged->temp_path, err);
	if (rc == 0)
		rc = create_merged(from, stop, merged->temp_path, err);
	if (rc == 0) {
		merged->temporary = true;
		merged->replaced = id_of(from->top);
		merged->base = id_of(stop);
		rc = fill_merged(merge, merged, from, stop, err);
	}
	cow_close(from, NULL);
	return rc;
}

int cow_merge_prepare(const struct cow_merge *merge, struct cow_merged **out, struct err *err)
{
	struct cow_io *io;
	int rc = cow_io_create(NULL, &io, err);
	if (rc < 0)
		return rc;
	struct cow_merged *merged = xcalloc(1, sizeof(*merged));
	merged->path = xstrdup(merge->path);
	merged->temp_path = xasprintf("%s.vmcp-merge", merge->path);
	rc = prepare(merge, merged, io, err);
	cow_io_destroy(io);
	if (rc < 0) {
		cow_merge_free(merged);
		return err_prefix(err, "merging %u layers into %s", merge->layers, merge->path);
	}
	*out = merged;
	return 0;
}

const char *cow_merged_path(const struct cow_merged *merged) { return merged->temp_path; }
uint64_t cow_merged_data_bytes(const struct cow_merged *merged) { return merged->data_bytes; }

int cow_merge_commit(struct cow_merged *merged, struct err *err)
{
	struct stat st;
	if (stat(merged->path, &st) < 0)
		return err_sys(err, errno, "%s", merged->path);
	if (st.st_dev != merged->replaced.device || st.st_ino != merged->replaced.inode)
		return err_set(err, ERR_STATE, ESTALE, "%s: is another file since the merge began", merged->path);
	int rc = fault_check(FAULT_COW_MERGE_DURABLE, err);
	if (rc < 0)
		return rc;
	if (rename(merged->temp_path, merged->path) < 0)
		return err_sys(err, errno, "rename %s to %s", merged->temp_path, merged->path);
	merged->temporary = false;
	rc = fault_check(FAULT_COW_MERGE_RENAMED, err);
	return rc < 0 ? rc : sync_folder(merged->path, err);
}

void cow_merge_free(struct cow_merged *merged)
{
	if (!merged)
		return;
	if (merged->temporary)
		unlink(merged->temp_path);
	free(merged->path);
	free(merged->temp_path);
	free(merged);
}

/* --- a running disk --- */

/* Layers that are out of the chain, but that requests in flight may still read. Owner: the I/O thread. */
struct retired {
	struct retired *next;
	struct image *top;
	uint64_t sequence; /* of the last request that may */
};

void cow_retired_release(struct cow_disk *disk, bool all)
{
	for (struct retired **p = &disk->retired, *r; (r = *p);) {
		if (!all && cow_req_oldest(disk) <= r->sequence) {
			p = &r->next;
			continue;
		}
		*p = r->next;
		cow_chain_free(r->top);
		free(r);
	}
}

struct adoption {
	const struct cow_merged *merged;
	struct cow_disk *disk;
	struct image *image;
	bool done;
};

/* The place in the chain where the run begins; NULL if it is not there as it was merged. *lowest: its last. */
static struct image **find_run(struct cow_disk *disk, const struct cow_merged *merged, struct image **lowest)
{
	struct image *above = disk->top;
	while (above && above->backing && !is_file(above->backing, &merged->replaced))
		above = above->backing;
	if (!above || !above->backing)
		return NULL;
	struct image *i = above->backing;
	if (!cow_image_is_fixed(i))
		return NULL;
	while (i->backing && !(merged->base.there && is_file(i->backing, &merged->base)))
		i = i->backing;
	if (merged->base.there != (i->backing != NULL))
		return NULL;
	*lowest = i;
	return &above->backing;
}

static void adopt(void *opaque)
{
	struct adoption *a = opaque;
	struct cow_disk *disk = a->disk;
	struct image *lowest, **place = find_run(disk, a->merged, &lowest);
	if (!place)
		return;
	struct retired *r = xcalloc(1, sizeof(*r));
	r->top = *place;
	r->sequence = disk->sequence;
	a->image->backing = lowest->backing;
	a->image->generation = r->top->generation;
	a->image->disk = disk;
	a->image->fixed = true;
	lowest->backing = NULL;
	*place = a->image;
	for (const struct image *i = r->top->backing; i; i = i->backing)
		atomic_fetch_sub(&disk->length, 1);
	r->next = disk->retired;
	disk->retired = r;
	cow_resolved_forget(disk);
	cow_retired_release(disk, false);
	a->done = true;
}

static void in_io_thread(struct cow_disk *disk, loop_task_fn *fn, void *opaque)
{
	struct loop *loop = cow_io_loop(disk->io);
	if (loop)
		loop_call(loop, fn, opaque);
	else
		fn(opaque);
}

int cow_merge_adopt(const struct cow_merged *merged, struct cow_disk *disk, struct err *err)
{
	struct adoption a = {.merged = merged, .disk = disk};
	int rc = fault_check(FAULT_COW_MERGE_ADOPT, err);
	if (rc == 0)
		rc = cow_image_open(disk->io, merged->path, COW_FORMAT_QCOW2, false, !(disk->flags & COW_OPEN_NO_LOCK),
				    &a.image, err);
	if (rc < 0)
		return rc;
	if (is_file(a.image, &merged->made))
		in_io_thread(disk, adopt, &a);
	if (a.done)
		return 0;
	cow_image_free(a.image);
	return err_set(err, ERR_STATE, ESTALE, "%s: the running disk does not stand on the layers that were merged",
		       merged->path);
}

/* --- merges by other processes --- */

/* The names by which the chain's images call what is below them, and the files that were opened under them. */
struct names {
	struct cow_disk *disk;
	struct named_file {
		char *path;
		struct file_id id;
	} *list;
	size_t count;
};

static void collect_names(void *opaque)
{
	struct names *names = opaque;
	struct cow_disk *disk = names->disk;
	names->list = xcalloc(atomic_load(&disk->length) + 1, sizeof(*names->list));
	for (struct image *i = disk->top; i && i->backing; i = i->backing) {
		struct named_file *n = &names->list[names->count];
		if (i->backing_name && cow_image_is_fixed(i->backing) && cow_resolve_name(i->path, i->backing_name, &n->path, NULL) == 0) {
			n->id = id_of(i->backing);
			names->count++;
		}
	}
}

static int id_of_file(const char *path, struct file_id *out)
{
	struct stat st;
	if (stat(path, &st) < 0)
		return -errno;
	*out = (struct file_id){st.st_dev, st.st_ino, true};
	return 0;
}

/* 1: another file has the name, and the disk has turned to it. */
static int follow_one(struct cow_disk *disk, struct named_file *n, struct err *err)
{
	struct cow_merged merged = {.path = n->path, .replaced = n->id};
	CLEANUP_FREE char *base = NULL;
	if (id_of_file(n->path, &merged.made) < 0 || (merged.made.device == n->id.device && merged.made.inode == n->id.inode))
		return 0;
	int rc = cow_backing(n->path, -1, &base, err);
	if (rc == 0 && base)
		rc = id_of_file(base, &merged.base);
	if (rc == 0)
		rc = cow_merge_adopt(&merged, disk, err);
	/* What it does not stand on as expected it does not turn to. */
	if (rc == -ESTALE || rc == -ENOENT) {
		if (err)
			*err = ERR_INIT;
		return 0;
	}
	return rc == 0 ? 1 : rc;
}

int cow_merge_follow(struct cow_disk *disk, unsigned *turned, struct err *err)
{
	struct names names = {.disk = disk};
	int rc = 0;
	*turned = 0;
	in_io_thread(disk, collect_names, &names);
	for (size_t i = 0; i < names.count; i++) {
		rc = rc < 0 ? rc : follow_one(disk, &names.list[i], err);
		*turned += rc > 0;
		free(names.list[i].path);
	}
	free(names.list);
	return rc < 0 ? rc : 0;
}

/* --- export --- */

static int export_to(const struct cow_export *e, struct cow_disk *from, struct err *err)
{
	struct cow_create create = {.size_bytes = from->size, .cluster_bytes = e->cluster_bytes};
	int rc = e->format == COW_FORMAT_QCOW2 ? cow_create(e->path, &create, err)
					       : cow_create_raw(e->path, from->size, err);
	if (rc < 0)
		return rc;
	struct copy_job job = {.from = from,
			       .bytes_per_second = e->bytes_per_second,
			       .cancel = e->cancel,
			       .progress = e->progress,
			       .opaque = e->opaque};
	rc = cow_open_as(from->io, e->path, (int)e->format, 0, &job.to, err);
	if (rc == 0) {
		rc = cow_copy(&job, err);
		int closed = cow_close(job.to, rc < 0 ? NULL : err);
		rc = rc < 0 ? rc : closed;
	}
	if (rc < 0)
		unlink(e->path);
	return rc;
}

int cow_export(const struct cow_export *e, struct err *err)
{
	struct cow_io *io;
	struct cow_disk *from;
	struct legacy legacy;
	int rc = e->source_is_raw ? 0 : legacy_recognise(e->source, &legacy, err);
	if (rc == 1)
		return legacy_export(e, &legacy, err);
	if (rc == 0)
		rc = cow_io_create(NULL, &io, err);
	if (rc < 0)
		return rc;
	rc = cow_open_as(io, e->source, e->source_is_raw ? COW_FORMAT_RAW : -1, COW_OPEN_READONLY, &from, err);
	if (rc == 0) {
		rc = export_to(e, from, err);
		cow_close(from, NULL);
	}
	cow_io_destroy(io);
	return rc;
}
