#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/memcow_internal.h"

struct runs {
	unsigned count, fail_at;
	struct {
		uint64_t first, count;
	} run[16];
};

static int note(void *opaque, uint64_t first, uint64_t count)
{
	struct runs *runs = opaque;
	if (runs->fail_at && runs->count + 1 == runs->fail_at)
		return -5;
	runs->run[runs->count].first = first;
	runs->run[runs->count++].count = count;
	return 0;
}

static void assert_run(const struct runs *runs, unsigned i, uint64_t first, uint64_t count)
{
	cr_assert_lt(i, runs->count);
	cr_assert_eq(runs->run[i].first, first);
	cr_assert_eq(runs->run[i].count, count);
}

Test(page_set, takes_runs_in_order_and_empties)
{
	struct page_set set;
	struct runs runs = {0};
	uint64_t taken;
	cr_assert_eq(page_set_init(&set, 1u << 20, NULL), 0);
	const uint64_t pages[] = {63, 0, 64, 1, 65, 500000, (1u << 20) - 1};
	for (unsigned i = 0; i < 7; i++)
		cr_assert(page_set_add(&set, pages[i]));
	cr_assert_not(page_set_add(&set, 64));
	cr_assert_eq(page_set_count(&set), 7);
	cr_assert_eq(page_set_take(&set, 0, note, &runs, &taken), 0);
	cr_assert_eq(taken, 7);
	cr_assert_eq(runs.count, 4);
	assert_run(&runs, 0, 0, 2);
	assert_run(&runs, 1, 63, 3);
	assert_run(&runs, 2, 500000, 1);
	assert_run(&runs, 3, (1u << 20) - 1, 1);
	cr_assert_eq(page_set_count(&set), 0);
	runs.count = 0;
	cr_assert_eq(page_set_take(&set, 0, note, &runs, NULL), 0);
	cr_assert_eq(runs.count, 0);
	page_set_free(&set);
}

Test(page_set, joins_across_gaps)
{
	struct page_set set;
	struct runs runs = {0};
	cr_assert_eq(page_set_init(&set, 4096, NULL), 0);
	page_set_add(&set, 10);
	page_set_add(&set, 15); /* four between */
	page_set_add(&set, 21); /* five between */
	cr_assert_eq(page_set_take(&set, 4, note, &runs, NULL), 0);
	cr_assert_eq(runs.count, 2);
	assert_run(&runs, 0, 10, 6);
	assert_run(&runs, 1, 21, 1);
	page_set_free(&set);
}

Test(page_set, ends_at_the_first_failure)
{
	struct page_set set;
	struct runs runs = {.fail_at = 2};
	cr_assert_eq(page_set_init(&set, 4096, NULL), 0);
	for (uint64_t page = 0; page < 4096; page += 100)
		page_set_add(&set, page);
	cr_assert_eq(page_set_take(&set, 0, note, &runs, NULL), -5);
	cr_assert_eq(runs.count, 1);
	page_set_free(&set);
}

Test(page_set, zero_test_sees_every_byte)
{
	uint8_t *page = aligned_alloc(4096, 4096), *copy = aligned_alloc(4096, 4096);
	memset(page, 0, 4096);
	cr_assert(page_is_zero(page));
	for (unsigned i = 0; i < 4096; i++) {
		page[i] = 1;
		cr_assert_not(page_is_zero(page), "byte %u", i);
		page[i] = 0;
	}
	for (unsigned i = 0; i < 4096; i++)
		page[i] = (uint8_t)(i * 7 + i / 256);
	page_copy(copy, page);
	cr_assert_eq(memcmp(copy, page, 4096), 0);
	free(page);
	free(copy);
}
