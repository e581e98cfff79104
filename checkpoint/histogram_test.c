#include <criterion/criterion.h>

#include "checkpoint/histogram.h"

static struct histogram h;

Test(histogram, empty_is_zero)
{
	histogram_reset(&h);
	cr_assert_eq(histogram_percentile(&h, 500), 0);
	cr_assert_eq(histogram_percentile(&h, 1000), 0);
}

Test(histogram, small_values_are_exact)
{
	histogram_reset(&h);
	for (uint64_t v = 0; v < 10; v++)
		histogram_record(&h, v);
	cr_assert_eq(histogram_percentile(&h, 500), 4);
	cr_assert_eq(histogram_percentile(&h, 100), 0);
	cr_assert_eq(histogram_percentile(&h, 1000), 9);
}

Test(histogram, a_single_value_is_every_percentile)
{
	histogram_reset(&h);
	histogram_record(&h, 12345);
	cr_assert_eq(histogram_percentile(&h, 1), 12345);
	cr_assert_eq(histogram_percentile(&h, 999), 12345);
	cr_assert_eq(h.max, 12345);
}

Test(histogram, right_within_a_sixteenth_over_all_octaves)
{
	for (unsigned shift = 0; shift < 63; shift++) {
		uint64_t value = ((uint64_t)1 << shift) + ((uint64_t)1 << shift) / 3;
		histogram_reset(&h);
		histogram_record(&h, value);
		histogram_record(&h, UINT64_MAX);
		uint64_t got = histogram_percentile(&h, 500);
		cr_assert(got >= value && got - value <= value / 16, "%llu for %llu", (unsigned long long)got,
			  (unsigned long long)value);
	}
}

Test(histogram, extremes_have_a_bucket)
{
	histogram_reset(&h);
	histogram_record(&h, 0);
	histogram_record(&h, UINT64_MAX);
	cr_assert_eq(histogram_percentile(&h, 500), 0);
	cr_assert_eq(histogram_percentile(&h, 1000), UINT64_MAX);
}

Test(histogram, counts_below_powers_of_two)
{
	histogram_reset(&h);
	histogram_record(&h, 0);
	histogram_record(&h, 1023);
	histogram_record(&h, 1024);
	histogram_record(&h, UINT64_MAX / 2);
	cr_assert_eq(histogram_count_below(&h, 0), 1);
	cr_assert_eq(histogram_count_below(&h, 10), 2);
	cr_assert_eq(histogram_count_below(&h, 11), 3);
	cr_assert_eq(histogram_count_below(&h, 62), 3);
	cr_assert_eq(histogram_count_below(&h, 64), 4);
	cr_assert_eq(h.sum, 1023 + 1024 + UINT64_MAX / 2);
}
