#include "checkpoint/sums.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/file.h"

#define MAGIC	     "vmcpsum\n"
#define VERSION	     1u
#define HEADER_BYTES 32u
#define ENTRY_BYTES  16u

/* Entries gathered for one write. */
struct gather {
	int fd;
	uint64_t offset;
	size_t length;
	uint8_t data[4096];
};

static int flush(struct gather *g, struct err *err)
{
	int r = file_pwrite_full(g->fd, g->data, g->length, g->offset, err);
	g->offset += g->length;
	g->length = 0;
	return r;
}

int page_sums_write(int fd, const uint64_t *saved, const uint64_t *sums, uint64_t pages, struct err *err)
{
	struct gather g = {.fd = fd, .offset = HEADER_BYTES};
	uint8_t header[HEADER_BYTES] = {0};
	uint64_t count = 0;
	int r = 0;
	for (uint64_t word = 0; word * 64 < pages; word++) {
		for (uint64_t bits = saved[word]; bits && r == 0; bits &= bits - 1) {
			uint64_t page = word * 64 + (unsigned)__builtin_ctzll(bits);
			put_le64(g.data + g.length, page);
			put_le64(g.data + g.length + 8, sums[page]);
			g.length += ENTRY_BYTES;
			count++;
			if (g.length == sizeof(g.data))
				r = flush(&g, err);
		}
	}
	if (r == 0)
		r = flush(&g, err);
	memcpy(header, MAGIC, 8);
	put_le32(header + 8, VERSION);
	put_le64(header + 16, count);
	return r == 0 ? file_pwrite_full(fd, header, sizeof(header), 0, err) : r;
}

int page_sums_open(struct page_sums *s, int fd, struct err *err)
{
	uint8_t header[HEADER_BYTES];
	struct stat st;
	*s = (struct page_sums){.fd = fd};
	if (fstat(fd, &st) != 0)
		return err_sys(err, errno, "page checksums");
	if ((uint64_t)st.st_size < HEADER_BYTES)
		return err_set(err, ERR_DAMAGED, EINVAL, "page checksums: the file is too short");
	int r = file_pread_full(fd, header, sizeof(header), 0, err);
	if (r != 0)
		return r;
	if (memcmp(header, MAGIC, 8) != 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "page checksums: no such file");
	if (get_le32(header + 8) != VERSION) {
		err_set(err, ERR_DAMAGED, EINVAL, "page checksums: unknown version %u", get_le32(header + 8));
		return err_hint(err, "it was made by another version of vmcp");
	}
	s->count = get_le64(header + 16);
	if (get_le32(header + 12) != 0 || get_le64(header + 24) != 0 || s->count > UINT64_MAX / 2 / ENTRY_BYTES ||
	    (uint64_t)st.st_size != HEADER_BYTES + s->count * ENTRY_BYTES)
		return err_set(err, ERR_DAMAGED, EINVAL, "page checksums: the length does not fit the header");
	return 0;
}

/* Reads `count` entries from number `at` on; entries past the end are left as they are. */
static int read_entries(const struct page_sums *s, uint64_t at, uint64_t count, uint8_t *out, struct err *err)
{
	if (at >= s->count)
		return 0;
	count = min_u64(count, s->count - at);
	return file_pread_full(s->fd, out, count * ENTRY_BYTES, HEADER_BYTES + at * ENTRY_BYTES, err);
}

/* The number of the first entry whose page is not below `page`. */
static int find(const struct page_sums *s, uint64_t page, uint64_t *at, struct err *err)
{
	uint64_t low = 0, high = s->count;
	while (low < high) {
		uint8_t entry[ENTRY_BYTES];
		uint64_t middle = low + (high - low) / 2;
		int r = read_entries(s, middle, 1, entry, err);
		if (r != 0)
			return r;
		if (get_le64(entry) < page)
			low = middle + 1;
		else
			high = middle;
	}
	*at = low;
	return 0;
}

/* Entries [at, at + count) if they are those of the pages; -ENOENT if not. */
static int read_at(struct page_sums *s, uint64_t at, uint64_t first, uint64_t count, uint64_t *sums, struct err *err)
{
	uint8_t entries[PAGE_SUMS_MAX_READ * ENTRY_BYTES];
	if (s->count < count || at > s->count - count)
		return -ENOENT;
	int r = read_entries(s, at, count, entries, err);
	for (uint64_t i = 0; i < count && r == 0; i++) {
		if (get_le64(entries + i * ENTRY_BYTES) != first + i)
			r = -ENOENT;
		sums[i] = get_le64(entries + i * ENTRY_BYTES + 8);
	}
	if (r == 0)
		s->next = at + count;
	return r;
}

int page_sums_read(struct page_sums *s, uint64_t first, uint64_t count, uint64_t *sums, struct err *err)
{
	int r = read_at(s, s->next, first, count, sums, err);
	if (r == -ENOENT) {
		uint64_t at;
		r = find(s, first, &at, err);
		if (r == 0)
			r = read_at(s, at, first, count, sums, err);
	}
	if (r == -ENOENT)
		err_set(err, ERR_DAMAGED, EINVAL, "page checksums: none for page %llu or one of the %llu behind it",
			(unsigned long long)first, (unsigned long long)count - 1);
	return r == -ENOENT ? -EINVAL : r;
}
