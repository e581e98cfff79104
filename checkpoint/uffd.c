#include "checkpoint/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Both since 5.19, for memfds without UFFD_FEATURE_WP_UNPOPULATED: what is not populated is protected by page table
 * markers. */
#define NEEDED_FEATURES (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

/* Faults of kernel code (KVM, io_uring) must be reported too: never UFFD_USER_MODE_ONLY, which is what unprivileged
 * users get from the system call. */
static int open_descriptor(void)
{
	int fd = -1;
#ifdef USERFAULTFD_IOC_NEW
	int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev >= 0) {
		fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(dev);
	}
#endif
	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

static int open_with(uint64_t features, const char *lack, struct err *err)
{
	int fd = open_descriptor();
	if (fd < 0) {
		err_set(err, ERR_HOST, -fd, "userfaultfd: this host does not let us use it (errno %d)", -fd);
		err_hint(err, fd == -ENOSYS ? "the kernel needs CONFIG_USERFAULTFD"
					    : "give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1");
		return fd;
	}
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	if (ioctl(fd, UFFDIO_API, &api) == 0)
		return fd;
	int number = errno;
	close(fd);
	err_set(err, ERR_HOST, number, "userfaultfd: %s", lack);
	err_hint(err, "Linux 5.19 or newer is needed (CONFIG_PTE_MARKER_UFFD_WP)");
	return -number;
}

int uffd_open(struct err *err) { return open_with(NEEDED_FEATURES, "the kernel cannot write-protect memfds", err); }
int uffd_open_missing(struct err *err) { return open_with(0, "the kernel does not know this version of it", err); }

int uffd_register_missing(int uffd, void *base, size_t bytes, struct err *err)
{
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)base, .len = bytes},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	if (ioctl(uffd, UFFDIO_REGISTER, &reg) != 0)
		return err_set(err, ERR_HOST, errno, "userfaultfd: cannot register guest memory (errno %d)", errno);
	return 0;
}

int uffd_register(int uffd, void *base, size_t bytes, struct err *err)
{
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)base, .len = bytes},
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	if (ioctl(uffd, UFFDIO_REGISTER, &reg) != 0)
		return err_set(err, ERR_HOST, errno, "userfaultfd: cannot register guest memory (errno %d)", errno);
	if (!(reg.ioctls & ((uint64_t)1 << _UFFDIO_WRITEPROTECT)))
		return err_set(err, ERR_HOST, ENOTSUP, "userfaultfd: guest memory cannot be write-protected");
	return 0;
}

int uffd_unregister(int uffd, void *base, size_t bytes)
{
	struct uffdio_range range = {.start = (uintptr_t)base, .len = bytes};
	if (ioctl(uffd, UFFDIO_UNREGISTER, &range) != 0)
		return -errno;
	/* The kernel wakes waiters of a missing-page registration only (userfaultfd_unregister). Nobody can start to
	 * wait any more, so this reaches all. */
	return ioctl(uffd, UFFDIO_WAKE, &range) == 0 ? 0 : -errno;
}

static int change(int uffd, void *base, size_t bytes, uint64_t mode)
{
	struct uffdio_writeprotect wp = {.range = {.start = (uintptr_t)base, .len = bytes}, .mode = mode};
	while (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) != 0) {
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
	}
	return 0;
}

int uffd_protect(int uffd, void *base, size_t bytes) { return change(uffd, base, bytes, UFFDIO_WRITEPROTECT_MODE_WP); }

int uffd_release(int uffd, void *base, size_t bytes) { return change(uffd, base, bytes, 0); }

int uffd_next_missing(int uffd, uint64_t *address)
{
	struct uffd_msg event;
	for (;;) {
		ssize_t n = read(uffd, &event, sizeof(event));
		if (n < 0 && errno == EINTR)
			continue;
		if (n != (ssize_t)sizeof(event))
			return n < 0 ? -errno : -EIO;
		if (event.event != UFFD_EVENT_PAGEFAULT)
			continue;
		*address = event.arg.pagefault.address;
		return 0;
	}
}

/* The number of bytes filled from the front, or -errno. */
static int64_t fill_some(int uffd, uint8_t *to, const uint8_t *data, size_t bytes)
{
	if (!data) {
		struct uffdio_zeropage zero = {.range = {.start = (uintptr_t)to, .len = bytes}};
		int r = ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
		return r == 0 || errno == EAGAIN ? zero.zeropage : -errno;
	}
	struct uffdio_copy copy = {.dst = (uintptr_t)to, .src = (uintptr_t)data, .len = bytes};
	int r = ioctl(uffd, UFFDIO_COPY, &copy);
	return r == 0 || errno == EAGAIN ? copy.copy : -errno;
}

int uffd_fill(int uffd, void *to, const void *data, size_t bytes)
{
	uint8_t *at = to;
	const uint8_t *from = data;
	while (bytes > 0) {
		int64_t done = fill_some(uffd, at, from, bytes);
		if (done == -EEXIST) { /* the first page is there: whoever waits for it may not know yet */
			struct uffdio_range range = {.start = (uintptr_t)at, .len = 4096};
			ioctl(uffd, UFFDIO_WAKE, &range);
			done = 4096;
		}
		if (done < 0 && done != -EAGAIN)
			return (int)done;
		if (done > 0) {
			at += done;
			from = from ? from + done : NULL;
			bytes -= (size_t)done;
		}
	}
	return 0;
}
