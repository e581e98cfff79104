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

/* As if it had lost its processor often: the thread's own count of that is what it is compared with. */
Test(spin, who_waits_for_its_processor_stops_for_a_while)
{
	struct spin spin = {.waits = -100000};
	uint64_t now_ns = 1;
	while (!spin_in_vain(&spin, 50000, now_ns) && now_ns < 1000)
		now_ns++;
	cr_expect_lt(now_ns, 1000u);
	cr_expect_eq(spin_begin(&spin, now_ns), 0u);
	cr_expect_gt(spin_begin(&spin, now_ns + 1000000000u), 0u);
}
