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

int uffd_open(struct err *err)
{
	int fd = open_descriptor();
	if (fd < 0) {
		err_set(err, ERR_HOST, -fd, "userfaultfd: this host does not let us use it (errno %d)", -fd);
		return err_hint(err, fd == -ENOSYS
					     ? "the kernel needs CONFIG_USERFAULTFD"
					     : "give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1");
	}
	struct uffdio_api api = {.api = UFFD_API, .features = NEEDED_FEATURES};
	if (ioctl(fd, UFFDIO_API, &api) != 0) {
		int number = errno;
		close(fd);
		err_set(err, ERR_HOST, number, "userfaultfd: the kernel cannot write-protect memfds");
		return err_hint(err, "Linux 5.19 or newer is needed (CONFIG_PTE_MARKER_UFFD_WP)");
	}
	return fd;
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
