/*
 * New images. The file: header, reference count table, its first blocks, L1 table; all else comes by use.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "cowdisk/image_internal.h"

enum { DEFAULT_CLUSTER_BYTES = 65536, ORDER = 4 };

/* In clusters. */
struct layout {
	uint64_t size;
	unsigned cluster_bits;
	uint64_t table, blocks, l1, l1_entries;
};

static int plan_layout(struct layout *l, struct err *err)
{
	uint64_t cluster = (uint64_t)1 << l->cluster_bits, per_block = cluster * 8 >> ORDER;
	uint64_t data = div_round_up(l->size, cluster);
	l->l1_entries = div_round_up(data, cluster / 8);
	if (l->l1_entries * 8 > QCOW2_MAX_L1_BYTES) {
		err_set(err, ERR_FAILED, EFBIG, "size %" PRIu64 " is too large for clusters of %" PRIu64 " bytes",
			l->size, cluster);
		err_hint(err, "use larger clusters");
		return -EFBIG;
	}
	l->l1 = div_round_up(l->l1_entries * 8, cluster);
	/* A table for the whole disk and its L2 tables, so that it seldom has to move; no more than the format's
	 * bound. */
	uint64_t expected = data + div_round_up(data, cluster / 8) + l->l1 + 64;
	uint64_t entries = div_round_up(expected + expected / 64, per_block);
	l->table = min_u64(div_round_up(entries * 8, cluster), QCOW2_MAX_REFTABLE_BYTES / cluster);
	l->blocks = 1;
	while (l->blocks * per_block < 1 + l->table + l->blocks + l->l1)
		l->blocks++;
	/* The blocks that are there from the start must have their place in the table. */
	if (l->blocks * 8 > l->table * cluster)
		return err_set(err, ERR_FAILED, EFBIG,
			       "size %" PRIu64 " is too large for clusters of %" PRIu64 " bytes", l->size, cluster);
	return 0;
}

static int put_extension(uint8_t *raw, size_t *at, size_t room, uint32_t type, const char *data)
{
	size_t length = strlen(data), padded = round_up(length, 8);
	if (room - *at < 8 + padded)
		return -ENAMETOOLONG;
	put_be32(raw + *at, type);
	put_be32(raw + *at + 4, (uint32_t)length);
	memcpy(raw + *at + 8, data, length);
	*at += 8 + padded;
	return 0;
}

/* Header, extensions and name, all in the first cluster (`raw` is zeroed). */
static int fill_header(uint8_t *raw, const struct layout *l, const struct cow_create *create, struct err *err)
{
	uint64_t cluster = (uint64_t)1 << l->cluster_bits;
	size_t at = QCOW2_HEADER_V3_BYTES, room = (size_t)cluster;
	put_be32(raw + QCOW2_AT_MAGIC, QCOW2_MAGIC);
	put_be32(raw + QCOW2_AT_VERSION, 3);
	put_be32(raw + QCOW2_AT_CLUSTER_BITS, l->cluster_bits);
	put_be64(raw + QCOW2_AT_SIZE, l->size);
	put_be32(raw + QCOW2_AT_L1_COUNT, (uint32_t)l->l1_entries);
	put_be64(raw + QCOW2_AT_L1_OFFSET, (1 + l->table + l->blocks) << l->cluster_bits);
	put_be64(raw + QCOW2_AT_REFTABLE_OFFSET, cluster);
	put_be32(raw + QCOW2_AT_REFTABLE_CLUSTERS, (uint32_t)l->table);
	put_be32(raw + QCOW2_AT_REFCOUNT_ORDER, ORDER);
	put_be32(raw + QCOW2_AT_HEADER_LENGTH, QCOW2_HEADER_V3_BYTES);
	if (!create->backing)
		return 0;
	const char *format = create->backing_format == COW_FORMAT_QCOW2 ? "qcow2" : "raw";
	size_t length = strlen(create->backing);
	int rc = put_extension(raw, &at, room - 8, QCOW2_EXT_BACKING_FORMAT, format);
	at += 8; /* the end of the extensions: zeroes */
	if (rc < 0 || length == 0 || length > QCOW2_MAX_BACKING_NAME || length > room - at)
		return err_set(err, ERR_FAILED, ENAMETOOLONG, "name of the backing file does not fit: '%.200s'",
			       create->backing);
	put_be64(raw + QCOW2_AT_BACKING_OFFSET, at);
	put_be32(raw + QCOW2_AT_BACKING_SIZE, (uint32_t)length);
	memcpy(raw + at, create->backing, length);
	return 0;
}

static int write_counts(int fd, const struct layout *l, struct err *err)
{
	uint64_t cluster = (uint64_t)1 << l->cluster_bits;
	uint64_t used = 1 + l->table + l->blocks + l->l1;
	CLEANUP_FREE uint8_t *table = calloc((size_t)l->blocks, 8);
	CLEANUP_FREE uint8_t *counts = calloc((size_t)used, 2);
	if (!table || !counts)
		return err_sys(err, ENOMEM, "reference counts");
	for (uint64_t i = 0; i < l->blocks; i++)
		put_be64(table + i * 8, (1 + l->table + i) << l->cluster_bits);
	for (uint64_t i = 0; i < used; i++)
		put_be16(counts + i * 2, 1);
	int rc = file_pwrite_full(fd, table, (size_t)l->blocks * 8, cluster, err);
	if (rc == 0) /* the blocks follow each other, so the counts do */
		rc = file_pwrite_full(fd, counts, (size_t)used * 2, (1 + l->table) << l->cluster_bits, err);
	return rc;
}

static int sync_new_file(int fd, const char *path, bool with_folder, struct err *err)
{
	int rc = fault_check(FAULT_COW_CREATE_WRITTEN, err);
	if (rc == 0 && fsync(fd) < 0)
		rc = err_sys(err, errno, "fsync");
	if (rc == 0)
		rc = fault_check(FAULT_COW_CREATE_SYNCED, err);
	if (rc < 0 || !with_folder)
		return rc;
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = slash ? xasprintf("%.*s", (int)(slash - path + 1), path) : xstrdup(".");
	CLEANUP_CLOSE int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return err_sys(err, errno, "%s", folder);
	return file_sync_dir(dir, err);
}

static int write_image(int fd, const char *path, const struct layout *l, const struct cow_create *create,
		       struct err *err)
{
	CLEANUP_FREE uint8_t *header = calloc(1, (size_t)1 << l->cluster_bits);
	if (!header)
		return err_sys(err, ENOMEM, "header");
	int rc = fill_header(header, l, create, err);
	if (rc == 0 && ftruncate(fd, (off_t)((1 + l->table + l->blocks + l->l1) << l->cluster_bits)) < 0)
		rc = err_sys(err, errno, "size of the new file");
	if (rc == 0)
		rc = write_counts(fd, l, err);
	if (rc == 0) /* last: before it the file is no image */
		rc = file_pwrite_full(fd, header, (size_t)1 << l->cluster_bits, 0, err);
	if (rc == 0)
		rc = sync_new_file(fd, path, !create->temporary, err);
	return rc;
}

static int backing_size(const char *path, const struct cow_create *create, uint64_t *out, struct err *err)
{
	CLEANUP_FREE char *name = NULL;
	int rc = cow_resolve_name(path, create->backing, &name, err);
	if (rc < 0)
		return rc;
	struct image *image;
	rc = cow_image_open(NULL, name, (int)create->backing_format, false, false, &image, err);
	if (rc < 0)
		return rc;
	*out = image->size;
	cow_image_free(image);
	return 0;
}

static int create_file(const char *path, int *fd, struct err *err)
{
	*fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (*fd < 0)
		return err_sys(err, errno, "%s", path);
	return 0;
}

int cow_create(const char *path, const struct cow_create *create, struct err *err)
{
	uint32_t cluster = create->cluster_bytes ? create->cluster_bytes : (uint32_t)DEFAULT_CLUSTER_BYTES;
	struct layout l = {.size = create->size_bytes};
	if (cluster & (cluster - 1) || cluster < 1u << QCOW2_MIN_CLUSTER_BITS || cluster > 1u << QCOW2_MAX_CLUSTER_BITS)
		return err_set(err, ERR_USAGE, EINVAL, "%s: cluster size %u is no power of two from 512 to 2M", path,
			       cluster);
	l.cluster_bits = (unsigned)__builtin_ctz(cluster);
	int rc = 0;
	if (l.size == 0 && create->backing)
		rc = backing_size(path, create, &l.size, err);
	if (rc < 0)
		return rc;
	if (l.size % COW_SECTOR_BYTES || l.size > (uint64_t)INT64_MAX - cluster)
		return err_set(err, ERR_USAGE, EINVAL, "%s: size %" PRIu64 " is no multiple of 512", path, l.size);
	rc = plan_layout(&l, err);
	if (rc < 0)
		return err_prefix(err, "%s", path);
	CLEANUP_CLOSE int fd = -1;
	rc = create_file(path, &fd, err);
	if (rc < 0)
		return rc;
	rc = write_image(fd, path, &l, create, err);
	if (rc < 0) {
		unlink(path);
		return err_prefix(err, "%s", path);
	}
	return 0;
}

int cow_create_raw(const char *path, uint64_t size_bytes, struct err *err)
{
	CLEANUP_CLOSE int fd = -1;
	if (size_bytes > INT64_MAX - COW_SECTOR_BYTES)
		return err_set(err, ERR_USAGE, EINVAL, "%s: size %" PRIu64, path, size_bytes);
	int rc = create_file(path, &fd, err);
	if (rc < 0)
		return rc;
	if (ftruncate(fd, (off_t)size_bytes) < 0)
		rc = err_sys(err, errno, "size of the new file");
	if (rc == 0)
		rc = sync_new_file(fd, path, true, err);
	if (rc < 0) {
		unlink(path);
		return err_prefix(err, "%s", path);
	}
	return 0;
}
