/* What an image says of its backing file, without opening it for work. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "cowdisk/check.h"
#include "cowdisk/image_internal.h"
#include "cowdisk/qcow2_format_internal.h"

int cow_look(const char *path, int format, char **backing, bool *plain, struct err *err)
{
	struct qcow2_extensions extensions = {0};
	struct qcow2_header header;
	uint8_t magic[4];
	struct stat st;

	*backing = NULL;
	*plain = true;
	if (format == COW_FORMAT_RAW)
		return 0;
	CLEANUP_CLOSE int fd = cow_image_open_fd(path, false, err);
	if (fd < 0)
		return fd;
	if (fstat(fd, &st) < 0)
		return err_sys(err, errno, "%s", path);
	int rc = 0;
	if (format < 0) {
		if (st.st_size < (off_t)sizeof(magic))
			return 0;
		rc = file_pread_full(fd, magic, sizeof(magic), 0, err);
		if (rc == 0 && get_be32(magic) != QCOW2_MAGIC)
			return 0;
	}
	if (rc == 0)
		rc = qcow2_read_header(fd, (uint64_t)st.st_size, &header, &extensions, err);
	if (rc < 0)
		return err_prefix(err, "%s", path);
	*plain = header.snapshot_count == 0 && !(header.autoclear & QCOW2_AUTOCLEAR_BITMAPS);
	if (extensions.backing_name)
		rc = cow_resolve_name(path, extensions.backing_name, backing, err);
	free(extensions.backing_name);
	return rc;
}

int cow_backing(const char *path, int format, char **backing, struct err *err)
{
	bool plain;

	return cow_look(path, format, backing, &plain, err);
}
