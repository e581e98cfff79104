/*
 * Any bytes as a qcow2 image: checked, repaired, read, written. Whatever they are, the outcome is data or an error: no crash, no hang, no memory
 * without bound, nothing for a sanitizer.
 *
 * For libFuzzer (see CMakeLists.txt), and for replay.c, which runs what was found before.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/log.h"
#include "cowdisk/check.h"
#include "cowdisk/io_internal.h"
#include "fuzz/fuzz.h"

enum { READ_BYTES = 64 << 10, REQUESTS = 24 };

static uint8_t buffer[READ_BYTES];
static struct cow_io *ring;

static void request_done(struct cow_request *request, int result)
{
	(void)result;
	*(bool *)request->opaque = true;
}

static void request(struct cow_disk *disk, enum cow_op op, uint64_t offset, uint64_t length)
{
	bool done = false;
	struct iovec iov = {buffer, (size_t)length};
	struct cow_request r = {.op = op,
				.offset = offset,
				.length = length,
				.iov = &iov,
				.iov_count = 1,
				.may_unmap = true,
				.done = request_done,
				.opaque = &done};
	cow_submit(disk, &r);
	while (!done)
		cow_io_drive(ring, -1);
}

/* At both ends, and at places that the input chooses. */
static void work_on(struct cow_disk *disk, uint64_t seed, bool write)
{
	static const enum cow_op ops[] = {COW_READ, COW_WRITE, COW_DISCARD, COW_WRITE_ZEROES, COW_FLUSH, COW_READ};
	uint64_t size = cow_size(disk);
	for (unsigned n = 0; n < REQUESTS && size; n++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t offset = n == 0 ? 0 : n == 1 ? size - COW_SECTOR_BYTES : (seed >> 16) % size;
		if (n % 3 == 2) /* where small images have something */
			offset = offset % min_u64(size, 256 << 10);
		offset = round_down(offset, COW_SECTOR_BYTES);
		uint64_t length = min_u64(COW_SECTOR_BYTES * (1 + (seed >> 40) % 128), size - offset);
		request(disk, write ? ops[(seed >> 60) % 6] : COW_READ, offset, length);
	}
}

static void open_and_work(const char *path, unsigned flags, uint64_t seed)
{
	struct cow_disk *disk;
	if (cow_open(ring, path, flags, &disk, NULL) < 0)
		return;
	work_on(disk, seed, !(flags & COW_OPEN_READONLY));
	cow_close(disk, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char path[64];
	struct cow_check check;
	uint64_t seed = size;
	for (size_t i = 0; i < size && i < 4096; i += 7)
		seed = seed * 31 + data[i];
	if (!ring) {
		log_set_sink(-1, NULL); /* nothing: damage is what there is */
		if (cow_io_create(NULL, &ring, NULL) < 0)
			abort();
	}
	int fd = memfd_create("image", MFD_CLOEXEC);
	if (fd < 0 || write(fd, data, size) != (ssize_t)size)
		abort();
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	cow_check(path, &check, NULL);
	open_and_work(path, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, seed);
	open_and_work(path, COW_OPEN_NO_LOCK, seed);
	cow_check(path, &check, NULL);
	close(fd);
	return 0;
}
