#include "checkpoint/sums.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/file.h"

#define MAGIC	     "vmcpsum\n"
#define VERSION	     2u
#define HEADER_BYTES 32u
#define ENTRY_BYTES  16u
#define WINDOW_ENTRIES 256u

/* Entries gathered for one write. */
struct gather {
	int fd;
	uint64_t offset;
	size_t length;
	uint8_t data[65536];
};

static int flush(struct gather *g, struct err *err)
{
	int r = file_pwrite_full(g->fd, g->data, g->length, g->offset, err);
	g->offset += g->length;
	g->length = 0;
	return r;
}

int page_sums_write(int fd, const uint64_t *saved, const uint64_t *placed, const uint64_t *sums, uint64_t pages, struct err *err)
{
	struct gather g = {.fd = fd, .offset = HEADER_BYTES};
	uint8_t header[HEADER_BYTES] = {0};
	uint64_t count = 0, placed_before = 0;
	int r = 0;
	for (uint64_t word = 0; word * 64 < pages; word++) {
		for (uint64_t bits = saved[word]; bits && r == 0; bits &= bits - 1) {
			unsigned bit = (unsigned)__builtin_ctzll(bits);
			uint64_t page = word * 64 + bit;
			uint64_t place = placed ? placed_before + (unsigned)__builtin_popcountll(placed[word] & (((uint64_t)1 << bit) - 1)) : page;
			put_le32(g.data + g.length, (uint32_t)page);
			put_le32(g.data + g.length + 4, (uint32_t)place);
			put_le64(g.data + g.length + 8, sums[page]);
			g.length += ENTRY_BYTES;
			count++;
			if (g.length == sizeof(g.data))
				r = flush(&g, err);
		}
		placed_before += placed ? (unsigned)__builtin_popcountll(placed[word]) : 0;
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
	if (s->count == 0)
		return 0;
	r = file_pread_full(fd, header, ENTRY_BYTES, HEADER_BYTES + (s->count - 1) * ENTRY_BYTES, err);
	s->end_page = get_le32(header);
	s->end_place = get_le32(header + 4);
	return r;
}

void page_sums_close(struct page_sums *s)
{
	free(s->window);
	s->window = NULL;
}

static int read_entries(const struct page_sums *s, uint64_t at, uint64_t count, uint8_t *out, struct err *err)
{
	return file_pread_full(s->fd, out, count * ENTRY_BYTES, HEADER_BYTES + at * ENTRY_BYTES, err);
}

int page_sums_list(const struct page_sums *s, uint64_t at, uint64_t count, struct page_sum_entry *entries, struct err *err)
{
	uint8_t data[PAGE_SUMS_MAX_READ * ENTRY_BYTES];
	for (uint64_t done = 0, n; done < count; done += n) {
		n = min_u64(count - done, PAGE_SUMS_MAX_READ);
		int r = read_entries(s, at + done, n, data, err);
		if (r != 0)
			return r;
		for (uint64_t i = 0; i < n; i++) {
			const uint8_t *one = data + i * ENTRY_BYTES;
			entries[done + i] = (struct page_sum_entry){.page = get_le32(one), .place = get_le32(one + 4), .sum = get_le64(one + 8)};
		}
	}
	return 0;
}

/* --- the window: entries around the last one that was looked for --- */

static int load_window(struct page_sums *s, uint64_t at, uint64_t count, struct err *err)
{
	if (!s->window)
		s->window = malloc(WINDOW_ENTRIES * ENTRY_BYTES);
	s->window_count = 0;
	if (!s->window)
		return err_sys(err, ENOMEM, "page checksums");
	int r = read_entries(s, at, count, s->window, err);
	s->window_at = at;
	s->window_count = r == 0 ? count : 0;
	return r;
}

static uint64_t window_page(const struct page_sums *s, uint64_t i) { return get_le32(s->window + i * ENTRY_BYTES); }

/* How many entries of the window are of pages below `page`. */
static uint64_t count_below(const struct page_sums *s, uint64_t page)
{
	uint64_t low = 0, high = s->window_count;
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (window_page(s, middle) < page)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* --- finding --- */

/* Where `page` would be if the pages of entries [low, high) lay evenly: a layer's mostly do. */
static uint64_t guess(uint64_t low, uint64_t high, uint64_t low_page, uint64_t high_page, uint64_t page)
{
	if (page <= low_page || page >= high_page)
		return page <= low_page ? low : high - 1;
	__extension__ typedef unsigned __int128 wide;
	return low + (uint64_t)((wide)(page - low_page) * (high - low) / (high_page - low_page));
}

/*
 * The number of the first entry whose page is not below `page`: it is in [low, high]. A window is read where it is guessed, then in the middle of
 * what is left, in turns: mostly one read is enough, and never are there more than twice those of a bisection.
 */
static int find(struct page_sums *s, uint64_t page, uint64_t *at, struct err *err)
{
	uint64_t low = 0, high = s->count, low_page = 0, high_page = s->end_page;
	for (unsigned turn = 0; low < high; turn++) {
		uint64_t middle = turn % 2 == 0 ? guess(low, high, low_page, high_page, page) : low + (high - low) / 2;
		uint64_t first = max_u64(low, middle - min_u64(middle, WINDOW_ENTRIES / 2));
		int r = load_window(s, first, min_u64(high - first, WINDOW_ENTRIES), err);
		if (r != 0)
			return r;
		uint64_t below = count_below(s, page), end = first + s->window_count;
		if (below > 0) {
			low = first + below;
			low_page = window_page(s, below - 1);
		}
		if (first + below < end) {
			high = first + below;
			high_page = window_page(s, below);
		}
	}
	*at = low;
	return 0;
}

/* Copies the entries if they are those of the pages; -ENOENT if not. */
static int take(const uint8_t *data, uint64_t first, uint64_t count, struct page_entry *entries)
{
	for (uint64_t i = 0; i < count; i++, data += ENTRY_BYTES) {
		entries[i] = (struct page_entry){.place = get_le32(data + 4), .sum = get_le64(data + 8)};
		if (get_le32(data) != first + i || entries[i].place != entries[0].place + i)
			return -ENOENT;
	}
	return 0;
}

/* From entries [at, at + count); -ENOENT if they are of other pages. */
static int read_at(struct page_sums *s, uint64_t at, uint64_t first, uint64_t count, struct page_entry *entries, struct err *err)
{
	uint8_t data[PAGE_SUMS_MAX_READ * ENTRY_BYTES];
	if (s->count < count || at > s->count - count)
		return -ENOENT;
	int r = read_entries(s, at, count, data, err);
	if (r == 0)
		r = take(data, first, count, entries);
	if (r == 0) {
		s->next = at + count;
		s->next_page = first + count;
	}
	return r;
}

static int take_from_window(const struct page_sums *s, uint64_t first, uint64_t count, struct page_entry *entries)
{
	uint64_t at = count_below(s, first);
	return at + count <= s->window_count ? take(s->window + at * ENTRY_BYTES, first, count, entries) : -ENOENT;
}

int page_sums_read(struct page_sums *s, uint64_t first, uint64_t count, struct page_entry *entries, struct err *err)
{
	if (take_from_window(s, first, count, entries) == 0)
		return 0;
	int r = first == s->next_page ? read_at(s, s->next, first, count, entries, err) : -ENOENT;
	if (r == -ENOENT) {
		uint64_t at;
		r = find(s, first, &at, err);
		if (r == 0 && take_from_window(s, first, count, entries) != 0)
			r = read_at(s, at, first, count, entries, err);
	}
	if (r == -ENOENT)
		err_set(err, ERR_DAMAGED, EINVAL, "page checksums: none for page %llu or one of the %llu behind it, or not side by side",
			(unsigned long long)first, (unsigned long long)count - 1);
	return r == -ENOENT ? -EINVAL : r;
}
