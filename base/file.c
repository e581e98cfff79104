#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/fault.h"

enum { MAX_TREE_DEPTH = 64 };

int file_pread_full(int fd, void *data, size_t length, uint64_t offset, struct err *err)
{
	uint8_t *at = data;

	if (!range_within(offset, length, INT64_MAX))
		return err_set(err, ERR_FAILED, EOVERFLOW, "read of %zu bytes at %" PRIu64 ": beyond any file", length,
			       offset);
	while (length > 0) {
		ssize_t n = pread(fd, at, length, (off_t)offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_sys(err, errno, "read of %zu bytes at %" PRIu64, length, offset);
		if (n == 0)
			return err_set(err, ERR_FAILED, ENODATA,
				       "read of %zu bytes at %" PRIu64 ": the file ends before", length, offset);
		at += n;
		length -= (size_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

int file_pwrite_full(int fd, const void *data, size_t length, uint64_t offset, struct err *err)
{
	const uint8_t *at = data;

	if (!range_within(offset, length, INT64_MAX))
		return err_set(err, ERR_FAILED, EOVERFLOW, "write of %zu bytes at %" PRIu64 ": beyond any file", length,
			       offset);
	while (length > 0) {
		ssize_t n = pwrite(fd, at, length, (off_t)offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return err_sys(err, n < 0 ? errno : EIO, "write of %zu bytes at %" PRIu64, length, offset);
		at += n;
		length -= (size_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

/* Reads to the end of the file, at most limit bytes. st_size is a first guess only: files in /proc say 0. */
static int read_to_end(int fd, const char *name, size_t limit, size_t guess, struct buf *out, struct err *err)
{
	for (;;) {
		/* One byte of room more than the limit: whatever lands there is too much. */
		size_t room = out->capacity - out->length;
		if (room < 2) {
			size_t more = out->length == 0 ? guess : out->length;
			int ret = buf_append(out, NULL, more < 512 ? 512 : more, err);
			if (ret != 0)
				return err_prefix(err, "%s", name);
			out->length -= more < 512 ? 512 : more;
			room = out->capacity - out->length;
		}
		ssize_t n = read(fd, out->data + out->length, room - 1);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_sys(err, errno, "%s: read", name);
		out->length += (size_t)n;
		if (out->length > limit)
			return err_set(err, ERR_DAMAGED, EFBIG, "%s: larger than %zu bytes", name, limit);
		out->data[out->length] = '\0';
		if (n == 0)
			return 0;
	}
}

bool file_is_hole(int fd, uint64_t at, uint64_t *end)
{
	off_t data = lseek(fd, (off_t)at, SEEK_DATA);

	*end = UINT64_MAX;
	if (data < 0)
		return errno == ENXIO; /* none from here on */
	bool hole = (uint64_t)data > at;
	off_t next = hole ? data : lseek(fd, data, SEEK_HOLE);
	if (next > (off_t)at)
		*end = (uint64_t)next;
	return hole;
}

int file_read_all(int dirfd, const char *name, size_t limit, struct buf *out, struct err *err)
{
	struct stat st;

	/* O_NONBLOCK: opening a FIFO that someone planted must not wait for its writer. */
	CLEANUP_CLOSE int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return err_sys(err, errno, "%s", name);
	if (fstat(fd, &st) < 0)
		return err_sys(err, errno, "%s: fstat", name);
	if (!S_ISREG(st.st_mode))
		return err_set(err, ERR_FAILED, S_ISDIR(st.st_mode) ? EISDIR : EINVAL, "%s: not a regular file", name);
	if (st.st_size > 0 && (uint64_t)st.st_size > limit)
		return err_set(err, ERR_DAMAGED, EFBIG, "%s: larger than %zu bytes", name, limit);

	struct buf data = BUF_INIT;
	int ret = read_to_end(fd, name, limit, (size_t)st.st_size + 2, &data, err);
	if (ret != 0) {
		buf_free(&data);
		return ret;
	}
	*out = data;
	return 0;
}

int file_sync_dir(int dirfd, struct err *err)
{
	CLEANUP_CLOSE int here = -1;

	if (dirfd == AT_FDCWD) {
		dirfd = here = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (here < 0)
			return err_sys(err, errno, "opening the current folder");
	}
	if (fsync(dirfd) < 0)
		return err_sys(err, errno, "fsync of a folder");
	return 0;
}

/* --- atomic replacement --- */

static int create_temp(int dirfd, char *temp, size_t capacity, mode_t mode, struct err *err)
{
	for (int tries = 0; tries < 16; tries++) {
		uint64_t random;
		if (getrandom(&random, sizeof(random), 0) != sizeof(random))
			return err_sys(err, errno, "getrandom");
		snprintf(temp, capacity, FILE_TEMP_PREFIX "%016" PRIx64, random);
		int fd = openat(dirfd, temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
		if (fd >= 0 || errno != EEXIST)
			return fd >= 0 ? fd : err_sys(err, errno, "creating a temporary file");
	}
	return err_set(err, ERR_FAILED, EEXIST, "creating a temporary file: every name is taken");
}

/* Closes fd in every case. */
static int fill_temp(int fd, const void *data, size_t length, struct err *err)
{
	int ret = file_pwrite_full(fd, data, length, 0, err);
	if (ret == 0)
		ret = fault_check(FAULT_FILE_TEMP_WRITTEN, err);
	if (ret == 0 && fsync(fd) < 0)
		ret = err_sys(err, errno, "fsync");
	if (close(fd) < 0 && ret == 0 && errno != EINTR) /* EINTR: Linux closed it, and it is synced */
		ret = err_sys(err, errno, "close");
	if (ret == 0)
		ret = fault_check(FAULT_FILE_BEFORE_RENAME, err);
	return ret;
}

int file_write_atomic(int dirfd, const char *name, const void *data, size_t length, mode_t mode, struct err *err)
{
	char temp[sizeof(FILE_TEMP_PREFIX) + 16];
	int ret;

	if (name[0] == '\0' || strchr(name, '/') != NULL)
		return err_set(err, ERR_FAILED, EINVAL, "writing %s: not the name of a file in its folder", name);
	int fd = create_temp(dirfd, temp, sizeof(temp), mode, err);
	if (fd < 0)
		return err_prefix(err, "writing %s", name), fd;
	ret = fill_temp(fd, data, length, err);
	if (ret == 0 && renameat(dirfd, temp, dirfd, name) < 0)
		ret = err_sys(err, errno, "rename");
	if (ret != 0) {
		unlinkat(dirfd, temp, 0);
		err_prefix(err, "writing %s", name);
		return ret;
	}
	/* Committed: what fails from here on leaves the new content, durable or not. */
	ret = fault_check(FAULT_FILE_AFTER_RENAME, err);
	if (ret == 0)
		ret = file_sync_dir(dirfd, err);
	if (ret != 0)
		err_prefix(err, "writing %s: in place, but a crash of the host may bring the old one back", name);
	return ret;
}

/* --- folders --- */

/* A new name in a folder is durable only when the folder is synced. parent may be an O_PATH descriptor. */
static int sync_parent(int parent, struct err *err)
{
	CLEANUP_CLOSE int fd = openat(parent, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return err_sys(err, errno, "opening the parent folder");
	return file_sync_dir(fd, err);
}

/* Steps from `parent` to its child, making it where it is missing. Returns an O_PATH descriptor or -errno. */
static int enter_dir(int parent, const char *name, struct err *err)
{
	int fd = openat(parent, name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0)
		return fd;
	if (errno != ENOENT)
		return err_sys(err, errno, "%s", name);
	if (mkdirat(parent, name, 0700) < 0 && errno != EEXIST)
		return err_sys(err, errno, "making the folder %s", name);
	int ret = sync_parent(parent, err);
	if (ret != 0)
		return err_prefix(err, "making the folder %s", name), ret;
	fd = openat(parent, name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return fd >= 0 ? fd : err_sys(err, errno, "%s", name);
}

static int make_path(int dirfd, const char *path, struct err *err)
{
	CLEANUP_FREE char *copy = strdup(path);
	if (copy == NULL)
		return err_sys(err, ENOMEM, "%s", path);

	CLEANUP_CLOSE int at = openat(dirfd, path[0] == '/' ? "/" : ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (at < 0)
		return err_sys(err, errno, "%s", path);
	char *rest = NULL;
	for (char *part = strtok_r(copy, "/", &rest); part != NULL; part = strtok_r(NULL, "/", &rest)) {
		int next = enter_dir(at, part, err);
		if (next < 0) {
			err_prefix(err, "%s", path);
			return next;
		}
		close(at);
		at = next;
	}
	return 0;
}

int file_open_dir(int dirfd, const char *path, int create, struct err *err)
{
	int fd = openat(dirfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0 && errno == ENOENT && create && path[0] != '\0') {
		int ret = make_path(dirfd, path, err);
		if (ret != 0)
			return ret;
		fd = openat(dirfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	}
	return fd >= 0 ? fd : err_sys(err, errno, "%s", path);
}

static int remove_tree(int dirfd, const char *name, unsigned depth, struct err *err);

static bool is_dot(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

/* Takes over fd. */
static int empty_dir(int fd, unsigned depth, struct err *err)
{
	DIR *dir = fdopendir(fd);
	int ret = 0;

	if (dir == NULL) {
		ret = err_sys(err, errno, "fdopendir");
		close(fd);
		return ret;
	}
	while (ret == 0) {
		errno = 0;
		struct dirent *entry = readdir(dir);
		if (entry == NULL) {
			if (errno != 0)
				ret = err_sys(err, errno, "readdir");
			break;
		}
		if (!is_dot(entry->d_name))
			ret = remove_tree(fd, entry->d_name, depth + 1, err);
	}
	closedir(dir);
	return ret;
}

static int remove_tree(int dirfd, const char *name, unsigned depth, struct err *err)
{
	if (unlinkat(dirfd, name, 0) == 0 || errno == ENOENT)
		return 0;
	if (errno != EISDIR)
		return err_sys(err, errno, "removing %s", name);
	if (depth > MAX_TREE_DEPTH)
		return err_set(err, ERR_FAILED, ELOOP, "removing %s: folders nested too deep", name);
	/* Again where another process put something in between; not for ever. */
	for (int tries = 0;; tries++) {
		int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (fd < 0)
			return errno == ENOENT ? 0 : err_sys(err, errno, "removing %s", name);
		int ret = empty_dir(fd, depth, err);
		if (ret != 0) {
			err_prefix(err, "removing %s", name);
			return ret;
		}
		if (unlinkat(dirfd, name, AT_REMOVEDIR) == 0 || errno == ENOENT)
			return 0;
		if ((errno != ENOTEMPTY && errno != EEXIST) || tries == 3)
			return err_sys(err, errno, "removing %s", name);
	}
}

int file_remove_tree(int dirfd, const char *name, struct err *err) { return remove_tree(dirfd, name, 0, err); }
