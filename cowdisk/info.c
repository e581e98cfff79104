#include <errno.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/info.h"

static int describe(const struct image *image, struct cow_info *out, struct err *err)
{
	struct stat st;
	if (fstat(image->fd, &st) < 0)
		return err_sys(err, errno, "%s", image->path);
	*out = (struct cow_info){
		.path = xstrdup(image->path),
		.format = image->format,
		.size_bytes = image->size,
		.file_bytes = (uint64_t)st.st_size,
		.occupied_bytes = (uint64_t)st.st_blocks * 512,
		.backing = image->backing_name ? xstrdup(image->backing_name) : NULL,
	};
	if (image->format != COW_FORMAT_QCOW2)
		return 0;
	const struct qcow2_header *h = &image->q.header;
	out->version = h->version;
	out->refcount_bits = 1u << h->refcount_order;
	out->snapshots = h->snapshot_count;
	out->cluster_bytes = (uint32_t)1 << h->cluster_bits;
	out->zstd = h->compression == QCOW2_COMPRESSION_ZSTD;
	out->dirty = h->incompatible & QCOW2_INCOMPAT_DIRTY;
	out->corrupt = h->incompatible & QCOW2_INCOMPAT_CORRUPT;
	out->bitmaps = h->autoclear & QCOW2_AUTOCLEAR_BITMAPS;
	return 0;
}

int cow_info(const char *path, int format, struct cow_info **out, size_t *count, struct err *err)
{
	struct cow_io *io;
	struct cow_disk *disk;
	int rc = cow_io_create(NULL, &io, err);
	if (rc < 0)
		return rc;
	rc = cow_open_as(io, path, format, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, &disk, err);
	if (rc == 0) {
		size_t n = 0;
		for (const struct image *i = disk->top; i; i = i->backing)
			n++;
		*out = xcalloc(n, sizeof(**out));
		*count = 0;
		for (const struct image *i = disk->top; rc == 0 && i; i = i->backing)
			rc = describe(i, &(*out)[(*count)++], err);
		if (rc < 0)
			cow_info_free(*out, *count);
		cow_close(disk, NULL);
	}
	cow_io_destroy(io);
	return rc;
}

void cow_info_free(struct cow_info *info, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		free(info[i].path);
		free(info[i].backing);
	}
	free(info);
}
