/* Files into guest memory: kernels, initrd, command line. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/file.h"
#include "vmm/x86/boot_internal.h"

int boot_image_open(const char *what, const char *path, struct boot_image *out, struct err *err)
{
	struct stat st;
	int r;

	/* O_NONBLOCK: a FIFO given by mistake must be refused, not waited for. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0) {
		r = err_sys(err, errno, "%s %s", what, path);
		return r;
	}
	if (fstat(fd, &st) < 0) {
		r = err_sys(err, errno, "%s %s", what, path);
	} else if (!S_ISREG(st.st_mode)) {
		r = err_set(err, ERR_USAGE, EINVAL, "%s %s: not a regular file", what, path);
	} else if (st.st_size == 0) {
		r = err_set(err, ERR_USAGE, EINVAL, "%s %s: the file is empty", what, path);
	} else {
		*out = (struct boot_image){.fd = fd, .path = path, .bytes = (uint64_t)st.st_size};
		return 0;
	}
	close(fd);
	return r;
}

void boot_image_close(struct boot_image *image)
{
	close(image->fd);
	image->fd = -1;
}

int boot_image_read(const struct boot_image *image, uint64_t offset, void *data, uint64_t bytes, struct err *err)
{
	if (!range_within(offset, bytes, image->bytes)) {
		return err_set(err, ERR_DAMAGED, ENODATA, "truncated: needs bytes up to %llu, the file has %llu",
			       (unsigned long long)offset + (unsigned long long)bytes,
			       (unsigned long long)image->bytes);
	}
	return file_pread_full(image->fd, data, bytes, offset, err);
}

/*
 * Copies through the memory's descriptor: a whole page written there is neither cleared first nor faulted in, which
 * halves the time of a large initrd. The mapped source is only read by the kernel, so that a file which shrinks
 * meanwhile is an error and no signal.
 */
static int copy_by_descriptor(const struct boot_image *image, uint64_t offset, struct mem *mem, uint64_t ram_offset,
			      uint64_t bytes)
{
	uint64_t skip = offset % PAGE_BYTES, done = 0;
	uint8_t *from =
		mmap(NULL, bytes + skip, PROT_READ, MAP_SHARED | MAP_POPULATE, image->fd, (off_t)(offset - skip));

	if (from == MAP_FAILED)
		return -errno;
	while (done < bytes) {
		ssize_t n = pwrite(mem_fd(mem), from + skip + done, bytes - done, (off_t)(ram_offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		done += (uint64_t)n;
	}
	munmap(from, bytes + skip);
	return done == bytes ? 0 : -EIO;
}

int boot_image_load(const struct boot_image *image, uint64_t offset, struct mem *mem, uint64_t gpa, uint64_t bytes,
		    struct err *err)
{
	uint8_t *to = mem_at(mem, gpa, bytes, true);
	uint64_t ram_offset;

	if (!to || !mem_ram_offset(mem, gpa, &ram_offset)) {
		return err_set(err, ERR_USAGE, EFAULT, "0x%llx-0x%llx is not guest memory", (unsigned long long)gpa,
			       (unsigned long long)gpa + (unsigned long long)bytes);
	}
	if (range_within(offset, bytes, image->bytes) && copy_by_descriptor(image, offset, mem, ram_offset, bytes) == 0)
		return 0;
	/* Huge page memory takes no write(), and only this way says what is wrong with the file. */
	return boot_image_read(image, offset, to, bytes, err);
}

uint64_t boot_low_ram_end(const struct mem *mem)
{
	struct mem_region regions[2];

	mem_regions(mem, regions);
	return regions[0].gpa + regions[0].bytes;
}

int boot_load_initrd(struct mem *mem, const char *path, uint64_t floor, uint64_t ceiling, struct boot_blob *out,
		     struct err *err)
{
	struct boot_image image;
	uint64_t gpa;
	int r;

	*out = (struct boot_blob){0};
	if (!path)
		return 0;
	r = boot_image_open("initrd", path, &image, err);
	if (r < 0)
		return r;
	if (ceiling < image.bytes || (gpa = round_down(ceiling - image.bytes, PAGE_BYTES)) < floor) {
		err_set(err, ERR_USAGE, EFBIG, "initrd %s: its %llu KiB do not fit into the %llu KiB beside the kernel",
			path, (unsigned long long)div_round_up(image.bytes, 1024),
			(unsigned long long)(ceiling > floor ? (ceiling - floor) / 1024 : 0));
		r = err_hint(err, "give the guest more memory");
		goto out;
	}
	r = boot_image_load(&image, 0, mem, gpa, image.bytes, err);
	if (r < 0)
		r = err_prefix(err, "initrd %s", path);
	else
		*out = (struct boot_blob){.gpa = gpa, .bytes = image.bytes};
out:
	boot_image_close(&image);
	return r;
}

int boot_load_cmdline(struct mem *mem, const char *cmdline, uint64_t max_bytes, struct err *err)
{
	uint64_t length = strlen(cmdline);
	uint64_t limit = min_u64(max_bytes, BOOT_CMDLINE_MAX_BYTES);

	if (length > limit) {
		return err_set(err, ERR_USAGE, E2BIG, "kernel command line: %llu bytes, the kernel takes %llu",
			       (unsigned long long)length, (unsigned long long)limit);
	}
	return mem_write(mem, BOOT_CMDLINE_GPA, cmdline, length + 1, err);
}
