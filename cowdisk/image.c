/* Opening and closing one image file, whatever its format, and asking it where data are. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "cowdisk/image_internal.h"

int cow_image_open_fd(const char *path, bool writable, struct err *err)
{
	/* O_NONBLOCK: a FIFO in the place of an image must not hang us. It means nothing for files. */
	int fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	return fd;
}

static int file_size(int fd, const char *path, struct stat *st, uint64_t *out, struct err *err)
{
	if (fstat(fd, st) < 0)
		return err_sys(err, errno, "%s", path);
	if (S_ISBLK(st->st_mode)) {
		if (ioctl(fd, BLKGETSIZE64, out) < 0)
			return err_sys(err, errno, "%s: size of the block device", path);
		return 0;
	}
	if (!S_ISREG(st->st_mode))
		return err_set(err, ERR_FAILED, EINVAL, "%s: neither a file nor a block device", path);
	*out = (uint64_t)st->st_size;
	return 0;
}

static int probe_format(int fd, uint64_t file_bytes, enum cow_format *out, struct err *err)
{
	uint8_t magic[4];
	*out = COW_FORMAT_RAW;
	if (file_bytes < sizeof(magic))
		return 0;
	int rc = file_pread_full(fd, magic, sizeof(magic), 0, err);
	if (rc == 0 && get_be32(magic) == QCOW2_MAGIC)
		*out = COW_FORMAT_QCOW2;
	return rc;
}

static int open_content(struct image *image, int format, bool writable, bool lock, struct err *err)
{
	struct stat st;
	uint64_t file_bytes;
	int rc = file_size(image->fd, image->path, &st, &file_bytes, err);
	if (rc < 0)
		return rc;
	image->device = st.st_dev;
	image->inode = st.st_ino;
	if (lock) {
		rc = cow_lock_take(image->fd, writable, image->path, err);
		if (rc < 0)
			return rc;
		image->write_locked = writable;
	}
	if (format >= 0)
		image->format = (enum cow_format)format;
	else if ((rc = probe_format(image->fd, file_bytes, &image->format, err)) < 0)
		return err_prefix(err, "%s", image->path);
	if (image->format == COW_FORMAT_QCOW2) {
		rc = qcow2_open(image, file_bytes, writable, err);
		return rc < 0 ? err_prefix(err, "%s", image->path) : 0;
	}
	image->guarded = format < 0;
	if (file_bytes > INT64_MAX - COW_SECTOR_BYTES)
		return err_set(err, ERR_FAILED, EFBIG, "%s: too large", image->path);
	/* An odd tail is padded by zeroes, as reads beyond the end of the file are. */
	image->size = round_up(file_bytes, COW_SECTOR_BYTES);
	return 0;
}

int cow_image_open(struct cow_io *io, const char *path, int format, bool writable, bool lock, struct image **out,
		   struct err *err)
{
	struct image *image = xcalloc(1, sizeof(*image));
	image->io = io;
	image->path = xstrdup(path);
	image->readonly = !writable;
	image->sealed = !writable;
	image->backing_format = -1;
	int rc = image->fd = cow_image_open_fd(path, writable, err);
	if (rc >= 0)
		rc = open_content(image, format, writable, lock, err);
	if (rc < 0) {
		cow_image_free(image);
		return rc;
	}
	*out = image;
	return 0;
}

void cow_image_free(struct image *image)
{
	if (!image)
		return;
	if (image->format == COW_FORMAT_QCOW2)
		qcow2_close(image);
	if (image->fd >= 0)
		close(image->fd);
	free(image->backing_name);
	free(image->path);
	free(image);
}

int cow_image_map(struct image *image, uint64_t offset, uint64_t length, struct mapping *out)
{
	if (image->format == COW_FORMAT_QCOW2)
		return qcow2_map(image, offset, length, out);
	*out = (struct mapping){.kind = MAP_DATA, .copied = true, .host = offset, .length = length};
	return 0;
}

/* Found out when it matters, as the one who seals a layer does not know about those above. */
bool cow_image_is_fixed(struct image *image)
{
	struct image *i = image;
	for (; i && !i->fixed; i = i->backing)
		if (!i->sealed)
			return false;
	for (; image != i; image = image->backing)
		image->fixed = true;
	return true;
}

int cow_chain_map(struct image *image, uint64_t offset, uint64_t length, struct image **owner, struct mapping *out)
{
	for (; image; image = image->backing) {
		if (offset >= image->size)
			break; /* a backing file that is shorter: zeroes from here on, whatever lies deeper */
		length = min_u64(length, image->size - offset);
		if (image->backing && image->disk && cow_image_is_fixed(image))
			return cow_resolve(image->disk, image, offset, length, owner, out);
		int rc = cow_image_map(image, offset, length, out);
		if (rc < 0)
			return rc;
		*owner = image;
		if (out->kind != MAP_HOLE)
			return 0;
		length = out->length;
	}
	*owner = image;
	*out = (struct mapping){.kind = MAP_ZERO, .length = length};
	return 0;
}

int cow_chain_is_zero(struct image *image, uint64_t offset, uint64_t length)
{
	while (length > 0) {
		struct image *owner;
		struct mapping m;
		int rc = cow_chain_map(image, offset, length, &owner, &m);
		if (rc < 0)
			return rc;
		if (m.kind != MAP_ZERO && m.kind != MAP_ZERO_HOST)
			return 0;
		offset += m.length;
		length -= m.length;
	}
	return 1;
}
