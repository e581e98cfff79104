#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"

Test(buf, grows_and_keeps)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	uint32_t sum = 0;

	for (uint32_t i = 0; i < 10000; i++)
		cr_assert_eq(buf_append(&buf, &i, sizeof(i), NULL), 0);
	cr_assert_eq(buf.length, 40000);
	cr_assert_geq(buf.capacity, buf.length);
	for (uint32_t i = 0; i < 10000; i++)
		sum += get_le32(buf.data + 4 * i) == i;
	cr_assert_eq(sum, 10000);
}

Test(buf, null_appends_zeroes)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	static const uint8_t zeroes[100];

	cr_assert_eq(buf_append(&buf, "x", 1, NULL), 0);
	cr_assert_eq(buf_append(&buf, NULL, 100, NULL), 0);
	cr_assert_eq(buf_append(&buf, NULL, 0, NULL), 0);
	cr_assert_eq(buf.length, 101);
	cr_assert_eq(buf.data[0], 'x');
	cr_assert_eq(memcmp(buf.data + 1, zeroes, 100), 0);
}

Test(buf, too_much_leaves_it_unchanged)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct err err = ERR_INIT;

	cr_assert_eq(buf_append(&buf, "abc", 3, NULL), 0);
	cr_assert_eq(buf_append(&buf, NULL, SIZE_MAX, &err), -ENOMEM);
	cr_assert_eq(err.number, ENOMEM);
	cr_assert_eq(buf_append(&buf, NULL, SIZE_MAX / 2, &err), -ENOMEM);
	cr_assert_eq(buf.length, 3);
	cr_assert_eq(memcmp(buf.data, "abc", 3), 0);
}

Test(buf, free_leaves_the_initial_state)
{
	struct buf buf = BUF_INIT;

	buf_append(&buf, "abc", 3, NULL);
	buf_free(&buf);
	cr_assert_null(buf.data);
	cr_assert_eq(buf.length, 0);
	cr_assert_eq(buf.capacity, 0);
	buf_free(&buf);
}

Test(buf, small_allocations)
{
	CLEANUP_FREE char *text = xasprintf("%d-%s", 3, "x");
	CLEANUP_FREE char *copy = xstrdup(text);
	CLEANUP_FREE uint8_t *zeroes = xcalloc(8, 8);
	CLEANUP_FREE void *nothing = xcalloc(0, 8);

	cr_assert_str_eq(copy, "3-x");
	cr_assert_neq(copy, text);
	cr_assert_eq(get_le64(zeroes + 56), 0);
	cr_assert_not_null(nothing);
}

Test(bytes, the_host_is_little_endian)
{
	uint32_t v = 0x01020304;
	uint8_t first;

	memcpy(&first, &v, 1);
	cr_assert_eq(first, 4);
}

Test(bytes, big_and_little_endian_at_odd_addresses)
{
	uint8_t p[16] = {0};

	put_be16(p + 1, 0x0102);
	cr_assert_eq(p[1], 1);
	cr_assert_eq(get_be16(p + 1), 0x0102);
	put_be32(p + 1, 0x01020304);
	cr_assert_eq(p[4], 4);
	cr_assert_eq(get_be32(p + 1), 0x01020304);
	put_be64(p + 1, 0x0102030405060708);
	cr_assert_eq(p[8], 8);
	cr_assert_eq(get_be64(p + 1), 0x0102030405060708);
	put_le16(p + 1, 0x0102);
	cr_assert_eq(p[1], 2);
	cr_assert_eq(get_le16(p + 1), 0x0102);
	put_le32(p + 1, 0x01020304);
	cr_assert_eq(p[1], 4);
	cr_assert_eq(get_le32(p + 1), 0x01020304);
	put_le64(p + 1, 0x0102030405060708);
	cr_assert_eq(p[1], 8);
	cr_assert_eq(get_le64(p + 1), 0x0102030405060708);
}

Test(bytes, overflow_is_seen)
{
	uint64_t out;

	cr_assert(add_overflows(UINT64_MAX, 1, &out));
	cr_assert_not(add_overflows(UINT64_MAX, 0, &out));
	cr_assert_eq(out, UINT64_MAX);
	cr_assert(mul_overflows(UINT64_MAX / 2 + 1, 2, &out));
	cr_assert_not(mul_overflows(1u << 31, 2, &out));
	cr_assert_eq(out, UINT64_C(1) << 32);
}

Test(bytes, range_within_at_its_edges)
{
	cr_assert(range_within(0, 0, 0));
	cr_assert(range_within(0, 10, 10));
	cr_assert(range_within(10, 0, 10));
	cr_assert_not(range_within(11, 0, 10));
	cr_assert_not(range_within(1, 10, 10));
	cr_assert_not(range_within(1, UINT64_MAX, 10));
	cr_assert_not(range_within(UINT64_MAX, 2, UINT64_MAX));
}

Test(bytes, ranges_overlap_at_their_edges)
{
	cr_assert(ranges_overlap(0, 2, 1, 2));
	cr_assert(ranges_overlap(1, 1, 0, 3));
	cr_assert_not(ranges_overlap(0, 1, 1, 1));
	cr_assert_not(ranges_overlap(1, 1, 0, 1));
	cr_assert_not(ranges_overlap(0, 0, 0, 5));
	cr_assert_not(ranges_overlap(2, 3, 3, 0));
}

Test(bytes, rounding)
{
	cr_assert_eq(round_down(4097, 4096), 4096);
	cr_assert_eq(round_up(4097, 4096), 8192);
	cr_assert_eq(round_up(4096, 4096), 4096);
	cr_assert_eq(round_up(0, 4096), 0);
	cr_assert_eq(div_round_up(9, 4), 3);
	cr_assert_eq(div_round_up(8, 4), 2);
	cr_assert_eq(div_round_up(UINT64_MAX, 2), UINT64_MAX / 2 + 1);
	cr_assert_eq(min_u64(1, 2), 1);
	cr_assert_eq(max_u64(1, 2), 2);
}

Test(bitmap, claims_once)
{
	_Atomic uint64_t map[BITMAP_WORDS(130)] = {0};

	cr_assert_eq(ARRAY_LENGTH(map), 3);
	cr_assert(bitmap_claim(map, 129));
	cr_assert_not(bitmap_claim(map, 129));
	cr_assert(bitmap_test(map, 129));
	cr_assert_not(bitmap_test(map, 128));
	cr_assert(bitmap_claim(map, 63));
	cr_assert_not(bitmap_test(map, 64));
	bitmap_clear(map, 129);
	cr_assert_not(bitmap_test(map, 129));
	cr_assert(bitmap_claim(map, 129));
}

Test(clock, goes_forward)
{
	uint64_t before = clock_now_ns();

	cr_assert_geq(clock_now_ns(), before);
	cr_assert_gt(clock_wall_ns(), UINT64_C(1600000000) * 1000000000);
}
