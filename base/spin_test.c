#include "base/spin.h"

#include <criterion/criterion.h>

Test(spin, in_vain_it_becomes_the_exception_and_what_pays_goes_on)
{
	struct spin spin = {0};
	unsigned looked = 0;
	for (unsigned i = 0; i < 8 + 160; i++) {
		uint64_t budget_ns = spin_begin(&spin, 1);
		looked += budget_ns > 0;
		if (budget_ns > 0)
			spin_end(&spin, false);
	}
	cr_expect_eq(looked, 8u + 10u);
	while (spin_begin(&spin, 1) == 0)
		;
	spin_end(&spin, true);
	for (unsigned i = 0; i < 8; i++) {
		cr_expect_gt(spin_begin(&spin, 1), 0u);
		spin_end(&spin, false);
	}
	cr_expect_eq(spin_begin(&spin, 1), 0u);
}

/* Looks of 10 us; of a hundred of them some take a tick. */
static bool looks_on(struct spin *spin, unsigned long_looks, uint64_t now_ns)
{
	bool crowded = false;
	for (unsigned i = 0; i < 600 && !crowded; i++)
		crowded = spin_in_vain(spin, i < long_looks ? 4000000 : 10000, now_ns);
	return !crowded;
}

Test(spin, who_waits_for_its_processor_stops_for_a_while)
{
	struct spin spin = {0};
	uint64_t now_ns = 1;
	cr_expect(looks_on(&spin, 2, now_ns));
	spin = (struct spin){0};
	cr_assert(!looks_on(&spin, 3, now_ns));
	cr_expect_eq(spin_begin(&spin, now_ns), 0u);
	cr_expect_gt(spin_begin(&spin, now_ns + 1000000000u), 0u);
}
