/*
 * Merging disk layers that no checkpoint names any more.
 *
 *     1 LAYERS_MERGE             one process at a time; what one that died left is removed
 *     2 chains.c                 which layers; LAYERS_SHAPE for that moment
 *     3 cow_merge_prepare        the merged file, durable, beside the topmost one           may take long
 *     4 cow_merge_commit         takes its name, under LAYERS_SHAPE: the commit point
 *     5 a running disk turns to it (checkpoint/merge_disks.c), others later or never: they keep the files that they have open
 *     6 gc                       removes the files that nothing stands on any more
 *
 * A crash before 4 leaves NAME.vmcp-merge, after it nothing that gc does not see.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/store/gc_internal.h"
#include "cowdisk/check.h"
#include "cowdisk/merge.h"

#define LEFTOVER_SUFFIX ".vmcp-merge"

int layers_lock(struct store *store, enum layers_lock which, bool wait, struct err *err)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = which, .l_len = 1};
	int fd = openat(store->dir, "layers.lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600), rc;

	if (fd < 0)
		return err_sys(err, errno, "%s/layers.lock", store->path);
	do
		rc = fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &lock);
	while (rc && errno == EINTR);
	if (!rc)
		return fd;
	rc = errno;
	close(fd);
	if (rc == EAGAIN || rc == EACCES)
		return err_set(err, ERR_STATE, EBUSY, "%s: another process merges disk layers", store->path);
	return err_sys(err, rc, "%s/layers.lock", store->path);
}

/* Of mergers that died: there is no living one but us. */
static int remove_leftovers(struct store *store, struct err *err)
{
	int copy = openat(store->layers_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/layers", store->path);
	while ((entry = readdir(stream))) {
		size_t length = strlen(entry->d_name), suffix = strlen(LEFTOVER_SUFFIX);

		if (length > suffix && !strcmp(entry->d_name + length - suffix, LEFTOVER_SUFFIX))
			unlinkat(store->layers_dir, entry->d_name, 0);
	}
	closedir(stream);
	return 0;
}

int store_merge_begin(struct store *store, struct store_merging **out, struct err *err)
{
	int fd = layers_lock(store, LAYERS_MERGE, false, err);

	if (fd < 0)
		return fd;
	int rc = fault_check(FAULT_STORE_MERGE_BEGUN, err);
	if (!rc)
		rc = remove_leftovers(store, err);
	if (rc) {
		close(fd);
		return rc;
	}
	*out = xcalloc(1, sizeof(**out));
	**out = (struct store_merging){.store = store, .lock = fd};
	return 0;
}

void store_merge_end(struct store_merging *merging)
{
	if (!merging)
		return;
	close(merging->lock);
	free(merging);
}

/* Its checksum, for verify; and which layer it will be. */
static int measure(const struct cow_merged *merged, struct store_disk_layer *out, struct err *err)
{
	const char *path = cow_merged_path(merged), *slash = strrchr(path, '/');
	struct stat st;

	*out = (struct store_disk_layer){.format = "qcow2"};
	snprintf(out->layer, sizeof(out->layer), "%.32s", slash ? slash + 1 : path);
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st))
		return err_sys(err, errno, "%s", path);
	out->file_bytes = (uint64_t)st.st_size;
	return file_sum(fd, out->file_bytes, NULL, NULL, &out->xxh3, err);
}

/* The record of the file that had the name goes first: an inode number may come again. */
int store_merge_commit(struct store_merging *merging, struct cow_merged *merged, struct err *err)
{
	struct store_disk_layer layer;
	int rc = measure(merged, &layer, err);

	if (rc)
		return rc;
	CLEANUP_CLOSE int lock = layers_lock(merging->store, LAYERS_SHAPE, true, err);
	if (lock < 0)
		return lock;
	disk_record_forget(merging->store, layer.layer, layer.format);
	rc = cow_merge_commit(merged, err);
	if (rc)
		return rc;
	disk_record_keep(merging->store, &layer);
	return fault_check(FAULT_STORE_MERGE_COMMITTED, err);
}

bool store_merge_passes(int rc) { return rc == -EBUSY || rc == -ESTALE || rc == -ENOENT || rc == -ENOTSUP; }

/* --- where no VM runs --- */

static int merge_one(struct store_merging *merging, const struct store_run *run, const struct store_merge_unused *how,
		     struct store_merge_result *out, struct err *err)
{
	const struct cow_merge merge = {.path = run->path,
					.layers = run->layers,
					.cancel = how->cancel,
					.progress = how->progress,
					.opaque = how->opaque};
	struct cow_merged *merged;
	int rc = cow_is_open(run->path, err);

	if (rc) {
		out->used += rc > 0;
		return rc > 0 ? 0 : rc;
	}
	rc = cow_merge_prepare(&merge, &merged, err);
	if (rc)
		return rc;
	rc = store_merge_commit(merging, merged, err);
	if (!rc) {
		out->layers += run->layers;
		out->runs++;
		out->copied_bytes += cow_merged_data_bytes(merged);
	}
	cow_merge_free(merged);
	return rc;
}

int store_merge_unused(struct store *store, const struct store_merge_unused *how, struct store_merge_result *out, struct err *err)
{
	struct store_merging *merging;
	struct store_run *list = NULL;
	size_t count = 0;

	*out = (struct store_merge_result){0};
	int rc = store_merge_begin(store, &merging, err);
	if (rc)
		return rc;
	rc = store_merge_runs(merging, NULL, 0, how->least, &list, &count, err);
	for (size_t i = 0; i < count && !rc; i++) {
		struct err why = ERR_INIT;

		rc = merge_one(merging, &list[i], how, out, &why);
		if (store_merge_passes(rc)) {
			log_debug("%s: not merged: %s", list[i].path, why.message);
			rc = 0;
		} else if (rc && err) {
			*err = why;
		}
	}
	if (list)
		store_runs_free(list, count);
	store_merge_end(merging);
	return rc;
}
