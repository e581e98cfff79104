#include "checkpoint/working_set.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"

#define PAGES 1000u

static struct buf encode(const uint64_t *set)
{
	struct buf file = BUF_INIT;
	struct err err = ERR_INIT;
	cr_assert_eq(working_set_encode(set, PAGES, &file, &err), 0, "%s", err.message);
	return file;
}

Test(working_set, comes_back_as_it_was)
{
	uint64_t set[BITMAP_WORDS(PAGES)] = {0}, back[BITMAP_WORDS(PAGES)] = {0};
	bitmap_fill(set, 0, 1);
	bitmap_fill(set, 63, 3);
	bitmap_fill(set, 128, 200);
	bitmap_fill(set, PAGES - 1, 1);
	struct buf file = encode(set);
	struct err err = ERR_INIT;
	cr_expect_eq(file.length, 40 + 4 * 16);
	cr_assert_eq(working_set_decode(file.data, file.length, back, PAGES, &err), 0, "%s", err.message);
	cr_expect_eq(memcmp(set, back, sizeof(set)), 0);
	buf_free(&file);
}

Test(working_set, of_nothing_is_empty)
{
	uint64_t set[BITMAP_WORDS(PAGES)] = {0};
	struct buf file = encode(set);
	cr_expect_eq(file.length, 40);
	cr_expect_eq(working_set_decode(file.data, file.length, set, PAGES, NULL), 0);
	buf_free(&file);
}

Test(working_set, every_changed_byte_and_every_length_is_refused)
{
	uint64_t set[BITMAP_WORDS(PAGES)] = {0};
	bitmap_fill(set, 10, 20);
	bitmap_fill(set, 500, 1);
	struct buf file = encode(set);
	for (size_t i = 0; i < file.length; i++) {
		uint64_t out[BITMAP_WORDS(PAGES)] = {0};
		file.data[i] ^= 0x40;
		cr_expect_lt(working_set_decode(file.data, file.length, out, PAGES, NULL), 0, "byte %zu", i);
		file.data[i] ^= 0x40;
		cr_expect_lt(working_set_decode(file.data, i, out, PAGES, NULL), 0, "length %zu", i);
	}
	cr_expect_lt(working_set_decode(file.data, file.length, set, PAGES + 64, NULL), 0, "of another memory");
	buf_free(&file);
}

Test(working_set, finds_what_was_touched)
{
	struct mem *mem;
	struct err err = ERR_INIT;
	cr_assert_eq(mem_create_private(MEM_MIN_BYTES, &mem, &err), 0, "%s", err.message);
	uint64_t which[BITMAP_WORDS(MEM_MIN_BYTES / PAGE_BYTES)], set[BITMAP_WORDS(MEM_MIN_BYTES / PAGE_BYTES)] = {0};
	memset(which, 0xff, sizeof(which));
	which[1] = 0;
	mem_base(mem)[5 * PAGE_BYTES] = 1;
	mem_base(mem)[70 * PAGE_BYTES] = 1; /* not asked for */
	mem_base(mem)[130 * PAGE_BYTES] = 1;
	cr_assert_eq(working_set_find(mem, which, set, &err), 0, "%s", err.message);
	cr_expect_eq(set[0], (uint64_t)1 << 5);
	cr_expect_eq(set[1], 0);
	cr_expect_eq(set[2], (uint64_t)1 << 2);
	mem_destroy(mem);
}
