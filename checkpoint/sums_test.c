#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "checkpoint/sums.h"

#define PAGES 5000u

static int scratch(void)
{
	FILE *file = tmpfile();
	cr_assert_not_null(file);
	int fd = dup(fileno(file));
	fclose(file);
	return fd;
}

static bool is_saved(uint64_t page) { return page % 7 < 3 || (page >= 1000 && page < 2500); }

/* A file of the pages for which is_saved holds; the sum of page p is p * 3 + 1. Every fifth page has a place, and is not there. */
static int make_file(bool packed)
{
	static uint64_t saved[BITMAP_WORDS(PAGES)], placed[BITMAP_WORDS(PAGES)], sums[PAGES];
	int fd = scratch();
	for (uint64_t p = 0; p < PAGES; p++) {
		saved[p / 64] |= (uint64_t)is_saved(p) << (p % 64);
		placed[p / 64] |= (uint64_t)(is_saved(p) || p % 5 == 0) << (p % 64);
		sums[p] = p * 3 + 1;
	}
	cr_assert_eq(page_sums_write(fd, saved, packed ? placed : NULL, sums, PAGES, NULL), 0);
	return fd;
}

static uint64_t place_of(uint64_t page, bool packed)
{
	uint64_t place = 0;
	for (uint64_t p = 0; p < page; p++)
		place += !packed || is_saved(p) || p % 5 == 0;
	return place;
}

static void check_every_page(bool packed)
{
	struct page_sums s;
	int fd = make_file(packed);
	cr_assert_eq(page_sums_open(&s, fd, NULL), 0);
	for (uint64_t i = 0; i < 2 * PAGES; i++) {
		struct page_entry entry = {0};
		uint64_t page = i < PAGES ? i : i * 2654435761u % PAGES;
		int r = page_sums_read(&s, page, 1, &entry, NULL);
		cr_assert_eq(r, is_saved(page) ? 0 : -EINVAL, "page %llu", (unsigned long long)page);
		cr_assert(r != 0 || (entry.sum == page * 3 + 1 && entry.place == place_of(page, packed)), "page %llu", (unsigned long long)page);
	}
	page_sums_close(&s);
	close(fd);
}

Test(sums, every_page_is_found_in_any_order) { check_every_page(false); }

Test(sums, every_page_of_a_packed_layer_is_found) { check_every_page(true); }

Test(sums, the_same_bytes_differ_from_page_to_page)
{
	static uint8_t page[4096];
	cr_assert_eq(page_sum(7, page), page_sum(7, page));
	cr_assert_neq(page_sum(7, page), page_sum(8, page));
}

/* An entry that was changed to another place, as long as it is not the first of what is read together. */
Test(sums, pages_that_are_not_side_by_side_are_refused)
{
	struct page_sums s;
	struct page_entry entries[3];
	uint8_t place = 0x55;
	int fd = make_file(false);
	/* Entries of pages 0, 1, 2, 7: the second one's place. */
	cr_assert_eq(pwrite(fd, &place, 1, 32 + 16 + 4), 1);
	cr_assert_eq(page_sums_open(&s, fd, NULL), 0);
	cr_assert_eq(page_sums_read(&s, 0, 3, entries, NULL), -EINVAL);
	page_sums_close(&s);
	close(fd);
}

/* Pages that lie as unevenly as can be, so that every guess is wrong. */
Test(sums, uneven_layers)
{
	enum { COUNT = 1u << 20 };
	uint64_t *saved = calloc(BITMAP_WORDS(COUNT), sizeof(*saved)), *values = calloc(COUNT, sizeof(*values));
	struct page_sums s;
	int fd = scratch();
	for (uint64_t p = 0; p < COUNT; p++) {
		bool in = p < 3000 || (p & (p - 1)) == 0 || p > COUNT - 700;
		saved[p / 64] |= (uint64_t)in << (p % 64);
		values[p] = p ^ 0x5555;
	}
	cr_assert_eq(page_sums_write(fd, saved, NULL, values, COUNT, NULL), 0);
	cr_assert_eq(page_sums_open(&s, fd, NULL), 0);
	for (uint64_t i = 0, page = 1; i < 20000; i++) {
		page = i % 3 == 0 ? (uint64_t)1 << (i % 20) : (page * 2654435761u + i) % COUNT;
		page = i % 3 == 1 ? page % 4000 : page;
		struct page_entry entry = {0};
		bool in = saved[page / 64] >> (page % 64) & 1;
		cr_assert_eq(page_sums_read(&s, page, 1, &entry, NULL), in ? 0 : -EINVAL, "page %llu", (unsigned long long)page);
		cr_assert(!in || entry.sum == values[page]);
	}
	page_sums_close(&s);
	free(saved);
	free(values);
	close(fd);
}

Test(sums, runs)
{
	struct page_sums s;
	struct err err = ERR_INIT;
	struct page_entry entries[PAGE_SUMS_MAX_READ];
	int fd = make_file(true);
	cr_assert_eq(page_sums_open(&s, fd, NULL), 0);
	cr_assert_eq(page_sums_read(&s, 1100, PAGE_SUMS_MAX_READ, entries, NULL), 0);
	for (uint64_t i = 0; i < PAGE_SUMS_MAX_READ; i++)
		cr_assert_eq(entries[i].sum, (1100 + i) * 3 + 1);
	cr_assert_eq(page_sums_read(&s, 2499, 5, entries, &err), -EINVAL, "the run ends in pages that were not saved");
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_eq(page_sums_read(&s, PAGES - 1, 5, entries, NULL), -EINVAL, "past the end");
	page_sums_close(&s);
	close(fd);
}

Test(sums, an_empty_layer)
{
	struct page_sums s;
	struct page_entry entry;
	uint64_t none[2] = {0};
	int fd = scratch();
	cr_assert_eq(page_sums_write(fd, none, NULL, none, 128, NULL), 0);
	cr_assert_eq(page_sums_open(&s, fd, NULL), 0);
	cr_assert_eq(s.count, 0);
	cr_assert_eq(page_sums_read(&s, 0, 1, &entry, NULL), -EINVAL);
	page_sums_close(&s);
	close(fd);
}

static void assert_refused(int fd)
{
	struct page_sums s;
	struct err err = ERR_INIT;
	cr_assert_eq(page_sums_open(&s, fd, &err), -EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
}

Test(sums, damage_is_refused)
{
	struct page_sums s;
	struct err err = ERR_INIT;
	int fd = make_file(false);
	off_t length = lseek(fd, 0, SEEK_END);
	cr_assert_eq(ftruncate(fd, length - 16), 0);
	assert_refused(fd);
	cr_assert_eq(ftruncate(fd, 31), 0);
	assert_refused(fd);
	cr_assert_eq(ftruncate(fd, 0), 0);
	assert_refused(fd);
	close(fd);
	/* Any bit of the header. */
	for (off_t at = 0; at < 32; at++) {
		uint8_t byte;
		fd = make_file(false);
		cr_assert_eq(pread(fd, &byte, 1, at), 1);
		byte ^= 0x40;
		cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
		cr_assert_eq(page_sums_open(&s, fd, &err), -EINVAL, "byte %d", (int)at);
		close(fd);
	}
}

/* The file format's, however it is computed. */
Test(sums, is_xxh3_seeded_by_the_page)
{
	_Alignas(64) uint8_t data[4096];
	for (uint64_t page = 0; page < 1000; page++) {
		for (size_t i = 0; i < sizeof(data); i++)
			data[i] = page ? (uint8_t)(i * page >> 5) : 0;
		cr_assert_eq(page_sum(page << page % 30, data), XXH3_64bits_withSeed(data, sizeof(data), page << page % 30));
	}
	cr_assert_neq(page_sum(0, data), page_sum(1, data));
}
