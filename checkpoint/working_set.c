#include "checkpoint/working_set.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/file.h"

#define MAGIC	     "vmcpwks\n"
#define VERSION	     1u
#define HEADER_BYTES 40u
#define RUN_BYTES    16u

static int append_run(struct buf *out, uint64_t first, uint64_t count, struct err *err)
{
	uint8_t run[RUN_BYTES];
	put_le64(run, first);
	put_le64(run + 8, count);
	return buf_append(out, run, sizeof(run), err);
}

int working_set_encode(const uint64_t *set, uint64_t pages, struct buf *out, struct err *err)
{
	uint8_t header[HEADER_BYTES] = {0};
	int r = buf_append(out, header, sizeof(header), err);
	for (uint64_t page = 0; page < pages && r == 0;) {
		uint64_t first = page;
		if (page % 64 == 0 && set[page / 64] == 0) {
			page += 64;
			continue;
		}
		while (page < pages && bitmap_has(set, page))
			page++;
		if (page > first)
			r = append_run(out, first, page - first, err);
		else
			page++;
	}
	if (r != 0)
		return r;
	memcpy(header, MAGIC, 8);
	put_le32(header + 8, VERSION);
	put_le64(header + 16, pages);
	put_le64(header + 24, (out->length - HEADER_BYTES) / RUN_BYTES);
	put_le64(header + 32, XXH3_64bits(out->data + HEADER_BYTES, out->length - HEADER_BYTES));
	memcpy(out->data, header, sizeof(header));
	return 0;
}

static int damaged(struct err *err, const char *what)
{
	return err_set(err, ERR_DAMAGED, EINVAL, "working set: %s", what);
}

int working_set_decode(const void *data, size_t length, uint64_t *set, uint64_t pages, struct err *err)
{
	const uint8_t *at = data;
	if (length < HEADER_BYTES || memcmp(at, MAGIC, 8) != 0 || get_le32(at + 8) != VERSION || get_le32(at + 12) != 0)
		return damaged(err, "no such file, or of another version");
	uint64_t runs = get_le64(at + 24), next = 0;
	if (get_le64(at + 16) != pages || runs > pages || length - HEADER_BYTES != runs * RUN_BYTES)
		return damaged(err, "the length does not fit the header or the memory");
	if (get_le64(at + 32) != XXH3_64bits(at + HEADER_BYTES, length - HEADER_BYTES))
		return damaged(err, "wrong checksum");
	for (at += HEADER_BYTES; runs > 0; runs--, at += RUN_BYTES) {
		uint64_t first = get_le64(at), count = get_le64(at + 8);
		if (first < next || count == 0 || !range_within(first, count, pages))
			return damaged(err, "runs out of order or beyond the memory");
		next = first + count;
		bitmap_fill(set, first, count);
	}
	return 0;
}

/* proc_pid_pagemap(5): 64 bits a page; bit 63: present, bit 62: in swap. */
#define PAGEMAP_THERE (UINT64_C(3) << 62)

int working_set_find(const struct mem *mem, const uint64_t *which, uint64_t *set, struct err *err)
{
	uint64_t entries[1024], pages = mem_pages(mem), base = (uint64_t)(uintptr_t)mem_base(mem) / PAGE_BYTES;
	int r = 0, fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return err_sys(err, errno, "/proc/self/pagemap");
	for (uint64_t first = 0; first < pages && r == 0; first += ARRAY_LENGTH(entries)) {
		uint64_t count = min_u64(pages - first, ARRAY_LENGTH(entries)), any = 0;
		for (uint64_t page = first; page < first + count; page += 64)
			any |= which[page / 64];
		if (any == 0)
			continue;
		r = file_pread_full(fd, entries, count * sizeof(entries[0]), (base + first) * sizeof(entries[0]), err);
		for (uint64_t i = 0; i < count && r == 0; i++)
			if ((entries[i] & PAGEMAP_THERE) && bitmap_has(which, first + i))
				set[(first + i) / 64] |= (uint64_t)1 << ((first + i) % 64);
	}
	close(fd);
	return r;
}
