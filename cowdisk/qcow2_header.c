/* The header and its extensions. Everything in it is untrusted. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "cowdisk/image_internal.h"

#define CONVERT_HINT "write it out anew first: qemu-img convert -O qcow2 SRC DST"
#define EXPORT_HINT  "write it out anew first: vmcp disk export SRC DST"
enum { CRYPT_AES = 1, CRYPT_LUKS = 2 };

static int damaged(struct err *err, const char *what)
{
	return err_set(err, ERR_DAMAGED, EINVAL, "damaged qcow2 header: %s", what);
}

static int unsupported_but(struct err *err, const char *what, const char *hint)
{
	err_set(err, ERR_FAILED, ENOTSUP, "%s is not supported", what);
	err_hint(err, "%s", hint);
	return -ENOTSUP;
}

static int unsupported(struct err *err, const char *what) { return unsupported_but(err, what, CONVERT_HINT); }

/* Of AES in version 2 `vmcp disk export` is a reader (legacy.h). */
static int encrypted(const struct qcow2_header *h, struct err *err)
{
	const char *what = h->crypt == CRYPT_LUKS  ? "an image that is encrypted (LUKS)"
			   : h->crypt == CRYPT_AES ? "an image that is encrypted (AES)"
						   : "an image that is encrypted (an unknown method)";
	return unsupported_but(err, what,
			       h->version == 2 && h->crypt == CRYPT_AES ? EXPORT_HINT " --key-file FILE"
									: "write it out anew first: qemu-img convert --object secret,id=k,file=FILE --image-opts "
									  "driver=qcow2,encrypt.key-secret=k,file.filename=SRC -O qcow2 DST");
}

static void decode_v2(const uint8_t *raw, struct qcow2_header *h)
{
	*h = (struct qcow2_header){
		.version = get_be32(raw + QCOW2_AT_VERSION),
		.cluster_bits = get_be32(raw + QCOW2_AT_CLUSTER_BITS),
		.size = get_be64(raw + QCOW2_AT_SIZE),
		.crypt = get_be32(raw + QCOW2_AT_CRYPT),
		.l1_count = get_be32(raw + QCOW2_AT_L1_COUNT),
		.l1_offset = get_be64(raw + QCOW2_AT_L1_OFFSET),
		.reftable_offset = get_be64(raw + QCOW2_AT_REFTABLE_OFFSET),
		.reftable_clusters = get_be32(raw + QCOW2_AT_REFTABLE_CLUSTERS),
		.snapshot_count = get_be32(raw + QCOW2_AT_SNAPSHOT_COUNT),
		.snapshots_offset = get_be64(raw + QCOW2_AT_SNAPSHOTS_OFFSET),
		.refcount_order = 4,
		.header_length = QCOW2_HEADER_V2_BYTES,
	};
}

static int check_incompatible(const struct qcow2_header *h, struct err *err)
{
	if (h->incompatible & QCOW2_INCOMPAT_DATA_FILE)
		return unsupported(err, "an external data file");
	if (h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2)
		return unsupported(err, "a qcow2 image with extended L2 entries");
	uint64_t known = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT | QCOW2_INCOMPAT_COMPRESSION;
	if (h->incompatible & ~known) {
		err_set(err, ERR_FAILED, ENOTSUP, "qcow2 with unknown incompatible features 0x%" PRIx64,
			h->incompatible & ~known);
		err_hint(err, CONVERT_HINT);
		return -ENOTSUP;
	}
	return 0;
}

static int decode_v3(int fd, uint64_t file_bytes, const uint8_t *raw, struct qcow2_header *h, struct err *err)
{
	h->incompatible = get_be64(raw + QCOW2_AT_INCOMPATIBLE);
	h->compatible = get_be64(raw + QCOW2_AT_COMPATIBLE);
	h->autoclear = get_be64(raw + QCOW2_AT_AUTOCLEAR);
	h->refcount_order = get_be32(raw + QCOW2_AT_REFCOUNT_ORDER);
	h->header_length = get_be32(raw + QCOW2_AT_HEADER_LENGTH);
	int rc = check_incompatible(h, err);
	if (rc < 0)
		return rc;
	if (h->refcount_order > 6)
		return damaged(err, "refcount_order above 6");
	if (h->header_length < QCOW2_HEADER_V3_BYTES || h->header_length % 8 ||
	    h->header_length > (uint64_t)1 << h->cluster_bits)
		return damaged(err, "header_length");
	if (h->header_length > QCOW2_AT_COMPRESSION) {
		uint8_t type;
		if (file_bytes <= QCOW2_AT_COMPRESSION)
			return damaged(err, "the file ends within it");
		rc = file_pread_full(fd, &type, 1, QCOW2_AT_COMPRESSION, err);
		if (rc < 0)
			return rc;
		h->compression = type;
	}
	if (h->compression > QCOW2_COMPRESSION_ZSTD)
		return unsupported(err, "this compression type");
	if ((h->compression != QCOW2_COMPRESSION_ZLIB) != !!(h->incompatible & QCOW2_INCOMPAT_COMPRESSION))
		return damaged(err, "compression type and feature bit disagree");
	return 0;
}

/* [offset, offset + bytes) is aligned and within the file. */
static bool area_ok(const struct qcow2_header *h, uint64_t offset, uint64_t bytes, uint64_t file_bytes)
{
	uint64_t mask = ((uint64_t)1 << h->cluster_bits) - 1;
	return (offset & mask) == 0 && offset != 0 && range_within(offset, bytes, file_bytes);
}

static int check_areas(const struct qcow2_header *h, uint64_t file_bytes, struct err *err)
{
	uint64_t cluster = (uint64_t)1 << h->cluster_bits;
	uint64_t per_l2 = cluster / 8;
	uint64_t l1_bytes = (uint64_t)h->l1_count * 8;
	uint64_t reftable_bytes = h->reftable_clusters * cluster;
	if (h->size > INT64_MAX - cluster)
		return damaged(err, "size");
	if (l1_bytes > QCOW2_MAX_L1_BYTES)
		return damaged(err, "L1 table larger than 32 MiB");
	if (div_round_up(h->size, cluster * per_l2) > h->l1_count)
		return damaged(err, "L1 table too small for the size of the disk");
	if (h->l1_count && !area_ok(h, h->l1_offset, l1_bytes, file_bytes))
		return damaged(err, "L1 table outside the file");
	if (reftable_bytes > QCOW2_MAX_REFTABLE_BYTES)
		return damaged(err, "reference count table larger than 8 MiB");
	if (h->reftable_clusters && !area_ok(h, h->reftable_offset, reftable_bytes, file_bytes))
		return damaged(err, "reference count table outside the file");
	if (ranges_overlap(h->l1_offset, l1_bytes, h->reftable_offset, reftable_bytes))
		return damaged(err, "L1 and reference count table overlap");
	if (h->snapshot_count > QCOW2_MAX_SNAPSHOTS)
		return damaged(err, "number of snapshots");
	if (h->snapshot_count && !area_ok(h, h->snapshots_offset, QCOW2_SNAPSHOT_HEADER_BYTES, file_bytes))
		return damaged(err, "snapshot table outside the file");
	return 0;
}

static int read_backing_name(int fd, const uint8_t *raw, const struct qcow2_header *h, uint64_t file_bytes,
			     uint64_t *name_offset, struct qcow2_extensions *x, struct err *err)
{
	uint64_t offset = get_be64(raw + QCOW2_AT_BACKING_OFFSET);
	uint32_t length = get_be32(raw + QCOW2_AT_BACKING_SIZE);
	*name_offset = 0;
	if (offset == 0 || length == 0)
		return 0;
	if (length > QCOW2_MAX_BACKING_NAME || !range_within(offset, length, (uint64_t)1 << h->cluster_bits) ||
	    !range_within(offset, length, file_bytes))
		return damaged(err, "name of the backing file");
	x->backing_name = xcalloc(1, (size_t)length + 1);
	int rc = file_pread_full(fd, x->backing_name, length, offset, err);
	if (rc == 0 && strlen(x->backing_name) != length)
		rc = damaged(err, "name of the backing file holds a zero byte");
	*name_offset = offset;
	return rc;
}

static int take_backing_format(const uint8_t *data, uint32_t length, struct qcow2_extensions *x, struct err *err)
{
	if (length == 3 && memcmp(data, "raw", 3) == 0)
		x->backing_format = COW_FORMAT_RAW;
	else if (length == 5 && memcmp(data, "qcow2", 5) == 0)
		x->backing_format = COW_FORMAT_QCOW2;
	else if (x->backing_name) {
		err_set(err, ERR_FAILED, ENOTSUP, "backing file of format '%.*s' is not supported",
			(int)min_u64(length, 16), (const char *)data);
		err_hint(err, CONVERT_HINT);
		return -ENOTSUP;
	}
	return 0;
}

static int take_extension(uint32_t type, const uint8_t *data, uint32_t length, struct qcow2_extensions *x,
			  struct err *err)
{
	if (type == QCOW2_EXT_BACKING_FORMAT)
		return take_backing_format(data, length, x, err);
	if (type == QCOW2_EXT_BITMAPS) {
		if (length < 24)
			return damaged(err, "bitmaps extension");
		x->bitmap_count = get_be32(data);
		x->bitmap_directory_bytes = get_be64(data + 8);
		x->bitmap_directory_offset = get_be64(data + 16);
	}
	return 0; /* others may be ignored: what matters has an incompatible bit */
}

static int read_extensions(int fd, uint64_t end, const struct qcow2_header *h, struct qcow2_extensions *x,
			   struct err *err)
{
	if (end <= h->header_length)
		return 0;
	size_t bytes = (size_t)(end - h->header_length);
	CLEANUP_FREE uint8_t *area = malloc(bytes);
	if (!area)
		return err_sys(err, ENOMEM, "header extensions");
	int rc = file_pread_full(fd, area, bytes, h->header_length, err);
	for (size_t at = 0; rc == 0 && bytes - at >= 8;) {
		uint32_t type = get_be32(area + at), length = get_be32(area + at + 4);
		at += 8;
		if (type == QCOW2_EXT_END)
			break;
		if (length > bytes - at)
			return damaged(err, "an extension reaches beyond the first cluster");
		rc = take_extension(type, area + at, length, x, err);
		at += (size_t)min_u64(round_up(length, 8), bytes - at);
	}
	return rc;
}

int qcow2_read_header(int fd, uint64_t file_bytes, struct qcow2_header *out, struct qcow2_extensions *x,
		      struct err *err)
{
	uint8_t raw[QCOW2_HEADER_V3_BYTES] = {0};
	*x = (struct qcow2_extensions){.backing_format = -1};
	if (file_bytes < QCOW2_HEADER_V2_BYTES)
		return damaged(err, "the file ends within it");
	int rc = file_pread_full(fd, raw, (size_t)min_u64(sizeof(raw), file_bytes), 0, err);
	if (rc < 0)
		return rc;
	if (get_be32(raw) != QCOW2_MAGIC)
		return err_set(err, ERR_DAMAGED, EINVAL, "not a qcow2 image");
	decode_v2(raw, out);
	if (out->version == 1)
		return unsupported_but(err, "a qcow image of version 1", EXPORT_HINT);
	if (out->version != 2 && out->version != 3)
		return unsupported(err, "this version of qcow2");
	if (out->cluster_bits < QCOW2_MIN_CLUSTER_BITS || out->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
		return damaged(err, "cluster_bits");
	if (out->crypt)
		return encrypted(out, err);
	if (out->version == 3) {
		if (file_bytes < QCOW2_HEADER_V3_BYTES)
			return damaged(err, "the file ends within it");
		rc = decode_v3(fd, file_bytes, raw, out, err);
	}
	if (rc == 0)
		rc = check_areas(out, file_bytes, err);
	uint64_t name_offset = 0;
	if (rc == 0)
		rc = read_backing_name(fd, raw, out, file_bytes, &name_offset, x, err);
	if (rc == 0) {
		uint64_t end = name_offset ? name_offset : (uint64_t)1 << out->cluster_bits;
		rc = read_extensions(fd, min_u64(end, file_bytes), out, x, err);
	}
	if (rc < 0) {
		free(x->backing_name);
		x->backing_name = NULL;
	}
	return rc;
}

int qcow2_check_writable(const struct qcow2_header *h, struct err *err)
{
	if (h->incompatible & QCOW2_INCOMPAT_CORRUPT) {
		err_set(err, ERR_DAMAGED, EROFS, "the image is marked corrupt and cannot be written");
		err_hint(err, "repair it: qemu-img check -r all IMAGE");
		return -EROFS;
	}
	if (h->incompatible & QCOW2_INCOMPAT_DIRTY) {
		err_set(err, ERR_DAMAGED, EROFS,
			"the image was not closed cleanly (lazy refcounts) and cannot be written");
		err_hint(err, "repair it: qemu-img check -r all IMAGE");
		return -EROFS;
	}
	if (h->reftable_clusters == 0)
		return damaged(err, "no reference count table");
	return 0;
}

int qcow2_clear_autoclear(int fd, struct qcow2_header *h, struct err *err)
{
	uint8_t zero[8] = {0};
	if (h->version < 3 || h->autoclear == 0)
		return 0;
	/* We keep no such feature up to date (bitmaps, raw external data), so none may stay. */
	int rc = fault_check(FAULT_COW_OPEN_AUTOCLEAR, err);
	if (rc == 0)
		rc = file_pwrite_full(fd, zero, sizeof(zero), QCOW2_AT_AUTOCLEAR, err);
	if (rc == 0 && fdatasync(fd) < 0)
		rc = err_sys(err, errno, "fdatasync");
	if (rc == 0)
		h->autoclear = 0;
	return rc;
}
