#include "base/host.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"

/* linux/fs.h of Linux 6.7; the headers of Debian 12 are older than the kernels that vmcp meets. */
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

/* linux/userfaultfd.h of Linux 6.1. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* First line of a small file, "" if it cannot be read. */
static void read_line(const char *path, char *out, size_t capacity)
{
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd >= 0 ? read(fd, out, capacity - 1) : -1;

	out[n > 0 ? n : 0] = '\0';
	out[strcspn(out, "\n")] = '\0';
}

static bool kvm_has(int fd, int capability) { return ioctl(fd, KVM_CHECK_EXTENSION, capability) > 0; }

static void probe_kvm(struct host *host)
{
	static const char *const modules[] = {"kvm_intel", "kvm_amd", "kvm_pvm"};

	for (size_t i = 0; i < ARRAY_LENGTH(modules); i++) {
		char path[64];
		snprintf(path, sizeof(path), "/sys/module/%s", modules[i]);
		if (access(path, F_OK) == 0)
			snprintf(host->kvm_module, sizeof(host->kvm_module), "%s", modules[i]);
	}

	CLEANUP_CLOSE int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		host->kvm_errno = errno;
		return;
	}
	int version = ioctl(fd, KVM_GET_API_VERSION, 0);
	if (version != KVM_API_VERSION) {
		host->kvm_errno = version < 0 ? errno : ENOTSUP;
		return;
	}
	host->kvm_kind = strcmp(host->kvm_module, "kvm_pvm") == 0 ? HOST_KVM_SOFTWARE : HOST_KVM_HARDWARE;
	host->kvm_irqfd = kvm_has(fd, KVM_CAP_IRQFD);
	host->kvm_ioeventfd = kvm_has(fd, KVM_CAP_IOEVENTFD);
	host->kvm_xsave2 = kvm_has(fd, KVM_CAP_XSAVE2);
	host->kvm_sregs2 = kvm_has(fd, KVM_CAP_SREGS2);
	host->kvm_dirty_ring = kvm_has(fd, KVM_CAP_DIRTY_LOG_RING) || kvm_has(fd, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
	host->kvm_manual_dirty_log = kvm_has(fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
}

/* Without UFFD_USER_MODE_ONLY: faults that KVM takes on the guest's behalf are what it is for. */
static int open_uffd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0 || errno != EPERM)
		return fd;
	CLEANUP_CLOSE int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0) {
		errno = EPERM;
		return -1;
	}
	return ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
}

/* Tries it on a page of a memfd that nothing has touched yet. */
static bool try_wp_shmem(size_t bytes)
{
	CLEANUP_CLOSE int uffd = open_uffd();
	CLEANUP_CLOSE int memfd = memfd_create("vmcp-probe", MFD_CLOEXEC);
	bool works = false;

	if (uffd < 0 || memfd < 0 || ftruncate(memfd, (off_t)bytes) < 0)
		return false;
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	if (map == MAP_FAILED)
		return false;
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
	struct uffdio_range range = {.start = (uintptr_t)map, .len = bytes};
	struct uffdio_register reg = {.range = range, .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	if (ioctl(uffd, UFFDIO_API, &api) == 0 && ioctl(uffd, UFFDIO_REGISTER, &reg) == 0)
		works = ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) == 0;
	munmap(map, bytes);
	return works;
}

static void probe_uffd(struct host *host)
{
	CLEANUP_CLOSE int fd = open_uffd();
	struct uffdio_api api = {.api = UFFD_API};

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) < 0) {
		host->uffd_errno = errno;
		return;
	}
	host->uffd_features = api.features;
	if (api.features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
		host->uffd_wp_shmem = try_wp_shmem(4 * PAGE_BYTES);
}

static void probe_io_uring(struct host *host)
{
	struct io_uring_params params = {0};
	CLEANUP_CLOSE int fd = (int)syscall(SYS_io_uring_setup, 4, &params);

	host->io_uring = fd >= 0;
	if (fd < 0)
		host->io_uring_errno = errno;
}

static void probe_pagemap_scan(struct host *host)
{
	CLEANUP_CLOSE int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (fd >= 0 && page != MAP_FAILED) {
		struct scan_arg arg = {
			.size = sizeof(arg), .start = (uintptr_t)page, .end = (uintptr_t)page + PAGE_BYTES};
		host->pagemap_scan = ioctl(fd, SCAN_IOCTL, &arg) >= 0;
	}
	if (page != MAP_FAILED)
		munmap(page, PAGE_BYTES);
}

static uint64_t read_number(const char *path)
{
	char line[64];

	read_line(path, line, sizeof(line));
	return strtoull(line, NULL, 10);
}

#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/"

struct host_huge_pages host_huge_pages(void)
{
	uint64_t free_pages = read_number(POOL "free_hugepages"), reserved = read_number(POOL "resv_hugepages");

	return (struct host_huge_pages){
		.total = read_number(POOL "nr_hugepages"),
		.available = free_pages > reserved ? free_pages - reserved : 0,
	};
}

#define THP "/sys/kernel/mm/transparent_hugepage/"

/* Documentation/admin-guide/mm/transhuge.rst, "shmem / tmpfs": deny and force win over all; since Linux 6.10 each size has a switch of its own,
 * which may inherit the common one. */
bool host_thp_shmem(void)
{
	char all[128], own[128];

	read_line(THP "shmem_enabled", all, sizeof(all));
	read_line(THP "hugepages-2048kB/shmem_enabled", own, sizeof(own));
	if (all[0] == '\0' || strstr(all, "[deny]") != NULL)
		return false;
	if (strstr(all, "[force]") != NULL)
		return true;
	const char *word = own[0] == '\0' || strstr(own, "[inherit]") != NULL ? all : own;
	return strstr(word, "[never]") == NULL;
}

static void probe_memory(struct host *host)
{
	char line[256];
	unsigned long long kib;

	FILE *file = fopen("/proc/meminfo", "re");
	while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
		if (sscanf(line, "MemTotal: %llu kB", &kib) == 1)
			host->memory_bytes = kib * 1024;
		else if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			host->memory_available_bytes = kib * 1024;
	}
	if (file != NULL)
		fclose(file);

	struct host_huge_pages pool = host_huge_pages();
	host->hugetlb_2m_total = pool.total;
	host->hugetlb_2m_available = pool.available;
	host->thp_shmem = host_thp_shmem();
}

/* A number in a file of a control group; `missing` where there is none ("max", or no such file). */
static uint64_t read_group_number(const char *group, const char *name, uint64_t missing)
{
	char path[512], line[64];
	snprintf(path, sizeof(path), "/sys/fs/cgroup%s/%s", group, name);
	read_line(path, line, sizeof(line));
	return line[0] >= '0' && line[0] <= '9' ? strtoull(line, NULL, 10) : missing;
}

/* What the limits of the process's control group and of those above it leave. */
static uint64_t left_by_groups(void)
{
	char line[256];
	uint64_t left = UINT64_MAX;
	read_line("/proc/self/cgroup", line, sizeof(line));
	if (strncmp(line, "0::/", 4) != 0)
		return left;
	char *group = line + 3;
	group[strcspn(group, "\n")] = '\0';
	for (char *end; (end = strrchr(group, '/')) != NULL; *end = '\0') {
		uint64_t limit = read_group_number(group, "memory.max", UINT64_MAX);
		uint64_t used = limit == UINT64_MAX ? 0 : read_group_number(group, "memory.current", 0);
		if (limit != UINT64_MAX)
			left = min_u64(left, limit > used ? limit - used : 0);
	}
	return left;
}

uint64_t host_available_memory(void)
{
	char line[256];
	unsigned long long kib = 0;
	FILE *file = fopen("/proc/meminfo", "re");
	while (file != NULL && fgets(line, sizeof(line), file) != NULL && sscanf(line, "MemAvailable: %llu kB", &kib) != 1)
		;
	if (file != NULL)
		fclose(file);
	return min_u64((uint64_t)kib * 1024, left_by_groups());
}

static unsigned count_cpus(void)
{
	cpu_set_t set;
	if (sched_getaffinity(0, sizeof(set), &set) == 0)
		return (unsigned)CPU_COUNT(&set);
	long online = sysconf(_SC_NPROCESSORS_ONLN); /* more than 1024 CPUs: the set is too small */
	return online > 0 ? (unsigned)online : 1;
}

void host_probe(struct host *out)
{
	struct utsname name;

	*out = (struct host){0};
	if (uname(&name) == 0)
		snprintf(out->kernel_release, sizeof(out->kernel_release), "%.63s", name.release);
	probe_kvm(out);
	probe_uffd(out);
	probe_io_uring(out);
	probe_pagemap_scan(out);
	probe_memory(out);
	out->cpus = count_cpus();
}
