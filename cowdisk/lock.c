/*
 * Image locks as QEMU takes them ("Image locking" in qemu's manual; the bytes are those of its file driver).
 *
 * Each permission has a bit. Whoever uses a permission holds byte 100 + bit, whoever does not allow others a
 * permission holds byte 200 + bit; all of these are *shared* open-file-description locks, and a conflict is found by
 * asking whether an exclusive lock could be had. First all locks are taken, then the others' are looked for: of two
 * that come at the same time at least one finds the other.
 *
 * The kernel gives up the files of a killed process with io_uring a little after the process is gone, so that a
 * conflict is believed only when it lasts.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "base/log.h"
#include "cowdisk/check.h"
#include "cowdisk/image_internal.h"

enum { CONFLICT_TRIES = 25, CONFLICT_WAIT_MS = 10 };
enum { PERMISSION_BASE = 100, UNSHARED_BASE = 200 };
enum { CONSISTENT_READ = 0, WRITE = 1, RESIZE = 3, PERMISSION_BITS = 5 };
#define BIT(n) (1u << (n))

static int lock_byte(int fd, int byte, short type)
{
	struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
	int rc;
	do
		rc = fcntl(fd, F_OFD_SETLK, &l);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : 0;
}

/* 1 if somebody else holds the byte. */
static int byte_is_held(int fd, int byte)
{
	struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
	if (fcntl(fd, F_OFD_GETLK, &l) < 0)
		return -errno;
	return l.l_type != F_UNLCK;
}

static int lock_bits(int fd, int base, unsigned bits)
{
	for (int i = 0; i < PERMISSION_BITS; i++) {
		if (!(bits & BIT(i)))
			continue;
		int rc = lock_byte(fd, base + i, F_RDLCK);
		if (rc < 0)
			return rc;
	}
	return 0;
}

/* 1 if one of the bits is held by somebody else. */
static int bits_are_held(int fd, int base, unsigned bits)
{
	for (int i = 0; i < PERMISSION_BITS; i++) {
		if (!(bits & BIT(i)))
			continue;
		int rc = byte_is_held(fd, base + i);
		if (rc)
			return rc;
	}
	return 0;
}

/* 1 if somebody else uses what we do not share, or does not share what we use. */
static int conflict(int fd, unsigned used, unsigned unshared)
{
	int rc = bits_are_held(fd, UNSHARED_BASE, used);
	return rc ? rc : bits_are_held(fd, PERMISSION_BASE, unshared);
}

static void wait_a_little(void)
{
	struct timespec t = {.tv_nsec = CONFLICT_WAIT_MS * 1000000};
	nanosleep(&t, NULL);
}

int cow_lock_take(int fd, bool write, const char *path, struct err *err)
{
	unsigned used = BIT(CONSISTENT_READ) | (write ? BIT(WRITE) | BIT(RESIZE) : 0);
	unsigned unshared = BIT(WRITE) | BIT(RESIZE);
	int rc = lock_bits(fd, PERMISSION_BASE, used);
	if (rc == 0)
		rc = lock_bits(fd, UNSHARED_BASE, unshared);
	if (rc == 0)
		rc = conflict(fd, used, unshared);
	for (int n = 0; rc == 1 && n < CONFLICT_TRIES; n++) {
		wait_a_little();
		rc = conflict(fd, used, unshared);
	}
	if (rc == -EINVAL || rc == -ENOLCK || rc == -ENOSYS || rc == -EOPNOTSUPP) {
		log_warn("%s: its file system has no locks (%s): nothing keeps others from using the image", path,
			 strerror(-rc));
		return 0;
	}
	if (rc < 0 && rc != -EAGAIN && rc != -EACCES)
		return err_sys(err, rc, "%s: lock", path);
	if (rc != 0) {
		err_set(err, ERR_STATE, EBUSY, "%s: %s", path,
			write ? "another process uses the image" : "another process is writing to the image");
		err_hint(err, "find it with: fuser -v '%.180s'", path);
		return -EBUSY;
	}
	return 0;
}

void cow_lock_drop_write(int fd)
{
	lock_byte(fd, PERMISSION_BASE + WRITE, F_UNLCK);
	lock_byte(fd, PERMISSION_BASE + RESIZE, F_UNLCK);
}

void cow_lock_drop(int fd)
{
	for (int i = 0; i < PERMISSION_BITS; i++) {
		lock_byte(fd, PERMISSION_BASE + i, F_UNLCK);
		lock_byte(fd, UNSHARED_BASE + i, F_UNLCK);
	}
}

int cow_is_open(const char *path, struct err *err)
{
	CLEANUP_CLOSE int fd = cow_image_open_fd(path, false, err);
	if (fd < 0)
		return fd;
	int rc = bits_are_held(fd, PERMISSION_BASE, BIT(CONSISTENT_READ) | BIT(WRITE));
	return rc < 0 ? err_sys(err, rc, "%s: lock", path) : rc;
}
