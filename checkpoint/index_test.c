#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "checkpoint/index.h"

#define LAYER "0123456789abcdef0123456789abcdef"
#define PAGES 1000u

static struct buf make_file(struct page_index *index)
{
	static _Atomic uint64_t zero[BITMAP_WORDS(PAGES)];
	struct buf file = BUF_INIT;
	for (unsigned i = 0; i < PAGES; i++) {
		if (i < 10 || (i >= 100 && i < 165) || i == 500 || i >= 990)
			bitmap_claim(zero, i);
	}
	uint64_t all[BITMAP_WORDS(PAGES)];
	memset(all, 0xff, sizeof(all));
	const struct page_index_saved saved = {.layer = LAYER, .scope = all, .zero = zero};
	cr_assert_eq(page_index_build(index, &saved, NULL, PAGES, NULL), 0);
	cr_assert_eq(page_index_encode(index, &file, NULL), 0);
	return file;
}

Test(index, round_trip)
{
	struct page_index made, read;
	struct buf file = make_file(&made);
	cr_assert_eq(file.length, 48 + 32 + 7 * 2 + 2, "two of the counts are above 127");
	cr_assert_eq(page_index_decode(file.data, file.length, &read, NULL), 0);
	cr_assert_eq(read.page_count, PAGES);
	cr_assert_eq(read.layer_count, 1);
	cr_assert_str_eq(read.layers[0], LAYER);
	cr_assert_eq(read.extent_count, 7);
	for (unsigned i = 0; i < 7; i++) {
		cr_assert_eq(read.extents[i].first, made.extents[i].first);
		cr_assert_eq(read.extents[i].count, made.extents[i].count);
		cr_assert_eq(read.extents[i].layer, i % 2);
	}
	page_index_free(&made);
	page_index_free(&read);
	buf_free(&file);
}

Test(index, find_gives_the_extent_of_each_page)
{
	struct page_index index;
	struct buf file = make_file(&index);
	for (uint64_t page = 0; page < PAGES; page++) {
		const struct index_extent *e = page_index_find(&index, page);
		cr_assert(page >= e->first && page < e->first + e->count, "page %llu", (unsigned long long)page);
	}
	cr_assert_eq(page_index_find(&index, 500)->count, 1);
	page_index_free(&index);
	buf_free(&file);
}

static void assert_damaged(const struct buf *file, size_t length)
{
	struct page_index index;
	struct err err = ERR_INIT;
	cr_assert_eq(page_index_decode(file->data, length, &index, &err), -EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_null(index.extents);
	page_index_free(&index);
}

Test(index, every_truncation_is_damage)
{
	struct page_index index;
	struct buf file = make_file(&index);
	for (size_t length = 0; length < file.length; length++)
		assert_damaged(&file, length);
	page_index_free(&index);
	buf_free(&file);
}

/* offset, bytes, value: each makes the file wrong. */
static const struct {
	size_t offset, bytes;
	uint64_t value;
} damages[] = {
	{0, 1, 'V'},   /* magic */
	{8, 4, 1},     /* version */
	{12, 4, 8192}, /* page size */
	{16, 8, 0},    /* pages */
	{16, 8, 999},  /* too few for the extents */
	{16, 8, 1001}, /* too many */
	{16, 8, UINT64_MAX},
	{24, 4, 2}, /* layers */
	{24, 4, UINT32_MAX},
	{28, 4, 1}, /* reserved */
	{32, 8, 6}, /* extents */
	{32, 8, UINT64_MAX / 16},
	{40, 8, 15}, /* bytes of extents */
	{40, 8, 17},
	{40, 8, UINT64_MAX},
	{48, 1, 'G'}, /* name of the layer */
	{48, 1, '/'},
	{80, 1, 0},    /* an extent: empty */
	{80, 1, 11},   /* the last one ends beyond the memory */
	{80, 1, 9},    /* before its end */
	{81, 1, 2},    /* no such layer */
	{81, 1, 0x80}, /* 11520 */
	{94, 1, 11},   /* the last extent: beyond the memory */
	{95, 1, 0x80}, /* a number without an end */
};

Test(index, damage_is_found)
{
	struct page_index index;
	struct buf file = make_file(&index);
	for (size_t i = 0; i < ARRAY_LENGTH(damages); i++) {
		uint8_t saved[8], value[8];
		put_le64(value, damages[i].value);
		memcpy(saved, file.data + damages[i].offset, 8);
		memcpy(file.data + damages[i].offset, value, damages[i].bytes);
		assert_damaged(&file, file.length);
		memcpy(file.data + damages[i].offset, saved, 8);
	}
	page_index_free(&index);
	buf_free(&file);
}

Test(index, random_bytes_never_hurt)
{
	struct page_index made, index;
	struct buf file = make_file(&made);
	uint64_t random = 42;
	for (unsigned round = 0; round < 20000; round++) {
		struct buf copy = BUF_INIT;
		cr_assert_eq(buf_append(&copy, file.data, file.length, NULL), 0);
		for (unsigned i = 0; i < 1 + round % 4; i++) {
			random = random * 6364136223846793005u + 1442695040888963407u;
			copy.data[(random >> 32) % copy.length] = (uint8_t)(random >> 24);
		}
		if (page_index_decode(copy.data, copy.length - (round % 3 == 0 ? random % 40 : 0), &index, NULL) == 0) {
			uint64_t pages = 0;
			for (uint64_t i = 0; i < index.extent_count; i++)
				pages += index.extents[i].count;
			cr_assert_eq(pages, index.page_count);
		}
		page_index_free(&index);
		buf_free(&copy);
	}
	page_index_free(&made);
	buf_free(&file);
}

Test(index, layers_are_named_without_reading_the_rest)
{
	struct page_index index;
	struct buf file = make_file(&index);
	const char *names;
	uint32_t count;
	struct err err = ERR_INIT;
	cr_assert_eq(page_index_layers(file.data, file.length, &names, &count, NULL), 0);
	cr_assert_eq(count, 1);
	cr_assert_eq(memcmp(names, LAYER, 32), 0);
	for (size_t length = 0; length < file.length; length++)
		cr_assert_eq(page_index_layers(file.data, length, &names, &count, NULL), -EINVAL);
	file.data[48 + 31] = 'g';
	cr_assert_eq(page_index_layers(file.data, file.length, &names, &count, &err), -EINVAL);
	cr_assert_eq(err.class, ERR_DAMAGED);
	page_index_free(&index);
	buf_free(&file);
}

/* Four layers a, b, c, d; page p is in layer p % 5, 0: zero. */
static void make_striped(struct page_index *index, const char *names)
{
	*index = (struct page_index){.page_count = 100, .layer_count = 4, .extent_count = 100};
	index->layers = calloc(4, sizeof(*index->layers));
	index->extents = calloc(100, sizeof(*index->extents));
	for (unsigned i = 0; i < 4; i++)
		memset(index->layers[i], names[i], STORE_ID_BYTES - 1);
	for (uint32_t p = 0; p < 100; p++)
		index->extents[p] = (struct index_extent){.first = p, .count = 1, .layer = p % 5};
}

Test(index, replaced_pages_are_those_that_are_still_there)
{
	struct page_index index, from, out, built;
	struct err err = ERR_INIT;
	const char layer[] = "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee";
	uint64_t none[BITMAP_WORDS(100)] = {0};
	static _Atomic uint64_t zero[BITMAP_WORDS(100)];
	/* Copied from a (2 in from's table) and b (1), and from an x that the index does not know; c and d were not copied. */
	make_striped(&index, "abcd");
	make_striped(&from, "baxy");
	for (unsigned p = 0; p < 100; p++)
		from.extents[p].layer = p % 5 == 1 ? 2 : p % 5 == 2 ? 1 : p % 5 == 3 ? 3 : 0;
	from.extents[11].layer = 1; /* page 11 was b's when it was copied; it is a's now */
	cr_assert_eq(page_index_replace(&out, &index, &from, layer, &err), 0, "%s", err.message);
	cr_assert(page_index_names(&out, layer));
	for (unsigned p = 0; p < 100; p++) {
		const struct index_extent *e = page_index_find(&out, p);
		const char *name = e->layer ? out.layers[e->layer - 1] : "";
		bool moved = (p % 5 == 1 || p % 5 == 2) && p != 11;
		cr_expect_str_eq(name, moved ? layer : p % 5 ? index.layers[p % 5 - 1] : "", "page %u", p);
	}
	/* As the parent of a checkpoint: b is not needed any more, a for one page. */
	const struct page_index_saved saved = {.layer = LAYER, .scope = none, .zero = zero};
	cr_assert_eq(page_index_build(&built, &saved, &out, 100, NULL), 0);
	cr_expect_eq(built.layer_count, 4);
	cr_expect(page_index_names(&built, layer) && page_index_names(&built, index.layers[0]) && !page_index_names(&built, index.layers[1]));
	cr_expect_eq(built.extent_count, 81, "neighbours are one extent, but for page 11");
	page_index_free(&index);
	page_index_free(&from);
	page_index_free(&out);
	page_index_free(&built);
}
