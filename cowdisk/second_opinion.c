/*
 * Another implementation reads the same image: libqcow, which shares no code with ours. 
 *
 * libqcow 20201213 reads some images wrongly and says that all is well, so it is asked only what it knows:
 *   - zero clusters of version 3 come back as other data: where our map meets one nothing is compared;
 *   - a read across a cluster's boundary, the first cluster the parent's, ignores the overlay: no read crosses a boundary of the smallest cluster
 *     of the chain;
 *   - a parent smaller than its overlay makes it loop: such a chain is refused;
 *   - a file that ends within a cluster makes it read beyond its buffers: such clusters are not compared;
 *   - damaged tables: refused, by our own check, first;
 *   - LUKS reads as garbage, zstd and external data files not at all: refused (encrypted images already by our open).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "cowdisk/check.h"
#include "cowdisk/image_internal.h"

static int refuse(struct err *err, const char *path, const char *why)
{
	return err_set(err, ERR_FAILED, ENOTSUP, "%s: no second opinion: %s", path, why);
}

#ifdef VMCP_HAVE_LIBQCOW
#include "cowdisk/qcow_library.h"

static struct qcow_library lib;

enum { MAX_DEPTH = 64 };

struct opinion {
	struct cow_disk *disk;
	libqcow_file_t *files[MAX_DEPTH]; /* from the top down */
	unsigned depth;
	uint64_t step; /* no read crosses a multiple of it */
	uint8_t *ours, *theirs;
	struct cow_second_opinion *out;
};

static int check_layer(const struct image *image, struct err *err)
{
	struct cow_check check;
	if (image->format != COW_FORMAT_QCOW2)
		return refuse(err, image->path, "libqcow takes no raw backing file");
	if (image->q.header.compression != QCOW2_COMPRESSION_ZLIB)
		return refuse(err, image->path, "libqcow knows no zstd");
	if (image->backing && image->backing->size < image->size)
		return refuse(err, image->path, "libqcow hangs where a backing file is shorter than its overlay");
	int rc = cow_check(image->path, &check, err);
	if (rc == 0 && check.corruptions)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "%s: no second opinion on what is damaged: %s", image->path,
			     check.first);
	return rc;
}

static int open_layer(struct opinion *o, const struct image *image, struct err *err)
{
	libqcow_error_t *error = NULL;
	int rc = check_layer(image, err);
	if (rc < 0)
		return rc;
	if (o->depth == MAX_DEPTH)
		return refuse(err, image->path, "the chain is too long");
	libqcow_file_t **file = &o->files[o->depth++];
	if (lib.libqcow_file_initialize(file, &error) != 1 ||
	    lib.libqcow_file_open(*file, image->path, LIBQCOW_OPEN_READ, &error) != 1)
		return qcow_library_failed(&lib, image->path, &error, err);
	if (o->depth > 1 && lib.libqcow_file_set_parent_file(o->files[o->depth - 2], *file, &error) != 1)
		return qcow_library_failed(&lib, image->path, &error, err);
	return 0;
}

/* The data that the mapping names are in the file as a whole. */
static bool is_whole(const struct image *owner, const struct mapping *m)
{
	struct stat st;
	uint64_t cluster = image_cluster_bytes(owner), offset = round_down(m->host, cluster), bytes = cluster;
	if (m->kind == MAP_COMPRESSED)
		qcow2_compressed_range(owner, m->entry, &offset, &bytes);
	return fstat(owner->fd, &st) == 0 && range_within(offset, bytes, (uint64_t)st.st_size);
}

static int compare_run(struct opinion *o, uint64_t offset, uint64_t length, struct err *err)
{
	libqcow_error_t *error = NULL;
	struct image *owner;
	struct mapping m;
	const char *path = o->disk->top->path;
	int rc = cow_chain_map(o->disk->top, offset, length, &owner, &m);
	if (rc < 0)
		return err_sys(err, rc, "%s", path);
	bool data = m.kind == MAP_DATA || m.kind == MAP_COMPRESSED;
	if (data ? !is_whole(owner, &m) : owner != NULL) {
		o->out->skipped_bytes += length;
		return 0;
	}
	rc = cow_read_sync(o->disk, offset, o->ours, (size_t)length, err);
	if (rc < 0)
		return rc;
	memset(o->theirs, 0xa5, (size_t)length);
	ssize_t n = lib.libqcow_file_read_buffer_at_offset(o->files[0], o->theirs, (size_t)length, (off64_t)offset, &error);
	if (n != (ssize_t)length) {
		if (error)
			return qcow_library_failed(&lib, path, &error, err);
		return err_set(err, ERR_DAMAGED, EIO, "%s: libqcow read %zd of %" PRIu64 " bytes at %" PRIu64, path, n,
			       length, offset);
	}
	o->out->compared_bytes += length;
	if (memcmp(o->ours, o->theirs, (size_t)length) == 0)
		return 0;
	if (o->out->different_bytes == 0)
		o->out->first_difference = offset;
	o->out->different_bytes += length;
	return 0;
}

static int compare_all(struct opinion *o, struct err *err)
{
	int rc = 0;
	for (uint64_t at = 0, n; rc == 0 && at < o->disk->size; at += n) {
		n = min_u64(o->step - at % o->step, o->disk->size - at);
		rc = compare_run(o, at, n, err);
	}
	return rc;
}

static int ask(struct opinion *o, struct err *err)
{
	int rc = 0;
	o->step = (uint64_t)1 << QCOW2_MAX_CLUSTER_BITS;
	for (const struct image *i = o->disk->top; rc == 0 && i; i = i->backing) {
		o->step = min_u64(o->step, image_cluster_bytes(i));
		rc = open_layer(o, i, err);
	}
	if (rc < 0)
		return rc;
	o->ours = malloc((size_t)o->step);
	o->theirs = malloc((size_t)o->step);
	rc = o->ours && o->theirs ? compare_all(o, err) : err_sys(err, ENOMEM, "buffers");
	free(o->ours);
	free(o->theirs);
	return rc;
}

int cow_second_opinion(const char *path, int format, struct cow_second_opinion *out, struct err *err)
{
	struct opinion o = {.out = out};
	struct cow_io *io;
	*out = (struct cow_second_opinion){0};
	int rc = qcow_library_load(&lib, path, err);
	if (rc == 0)
		rc = cow_io_create(NULL, &io, err);
	if (rc < 0)
		return rc;
	rc = cow_open_as(io, path, format, COW_OPEN_READONLY, &o.disk, err);
	if (rc == 0) {
		rc = ask(&o, err);
		for (unsigned i = 0; i < o.depth; i++)
			if (o.files[i])
				lib.libqcow_file_free(&o.files[i], NULL);
		cow_close(o.disk, NULL);
	}
	cow_io_destroy(io);
	return rc;
}

#else

int cow_second_opinion(const char *path, int format, struct cow_second_opinion *out, struct err *err)
{
	*out = (struct cow_second_opinion){0};
	refuse(err, path, "this vmcp was built without libqcow");
	err_hint(err, "build it with Debian's libqcow-dev installed");
	return -ENOTSUP;
}

#endif
