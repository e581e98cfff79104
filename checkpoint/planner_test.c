#include "checkpoint/planner.h"

#include <criterion/criterion.h>
#include <string.h>

#define GIB (1ull << 30)

/* As measured on a software KVM with two processors. */
static const struct planner_costs usual = {
	.copy_page_ns = 700,
	.touch_page_ns = 300,
	.log_page_ns = 300,
	.log_read_ns = 100000,
	.protect_page_ns = 30,
	.fault_ns = 40000,
	.written_pages_per_s = 50000,
	.saved_bytes_per_s = 300e6,
};

static struct planner_case an_incremental(uint64_t pages)
{
	return (struct planner_case){.live = true, .incremental = true, .can_protect = true, .tracked = true, .pages = pages, .free_bytes = 8 * GIB};
}

static struct planner_plan chosen(struct planner_case c, struct planner_costs costs)
{
	struct planner_plan plan;
	planner_choose(&c, &costs, &plan);
	cr_assert(plan.reason[0] != '\0' || plan.way == PLANNER_NONE);
	return plan;
}

Test(planner, stages_what_was_written_if_passes_converge)
{
	struct planner_plan plan = chosen(an_incremental(10000), usual);
	cr_assert_eq(plan.way, PLANNER_STAGE, "%s", plan.reason);
	cr_assert(plan.left_pages < plan.enough_pages, "%llu", (unsigned long long)plan.left_pages);
	cr_assert(plan.copied_pages > 10000 && plan.copied_pages < 12000);
	cr_assert(plan.buffer_pages > 20000 && plan.buffer_pages < 30000);
	cr_assert(plan.stage_ns > 10000000 && plan.stage_ns < 20000000);
	cr_assert(plan.pause_ns < 100000);
	struct planner_case c = an_incremental(10000);
	c.kept_pages = 100000; /* no memory to be had first */
	cr_assert(chosen(c, usual).stage_ns < plan.stage_ns - 2500000);
}

Test(planner, a_large_set_is_staged_where_memory_and_time_suffice)
{
	cr_assert_eq(chosen(an_incremental(100000), usual).way, PLANNER_STAGE);
	struct planner_case c = an_incremental(100000);
	c.free_bytes = GIB;
	cr_assert_eq(chosen(c, usual).way, PLANNER_PROTECT);
	cr_assert_eq(chosen(an_incremental(1000000), usual).way, PLANNER_PROTECT); /* 1 s */
	struct planner_costs scattered = usual;
	scattered.protect_page_ns = 10000; /* would take longer */
	c.free_bytes = 64 * GIB;
	c.pages = 1000000;
	cr_assert_eq(chosen(c, scattered).way, PLANNER_STAGE);
}

Test(planner, a_guest_that_rewrites_faster_than_it_is_copied_is_held_up)
{
	struct planner_costs costs = usual;
	costs.written_pages_per_s = 2000000;
	struct planner_plan plan = chosen(an_incremental(16384), costs);
	cr_assert_eq(plan.way, PLANNER_PROTECT, "%s", plan.reason);
	cr_assert_eq(plan.faults, 16384);
	cr_assert(plan.save_ns > 200000000 && plan.save_ns < 250000000);
}

Test(planner, few_pages_are_staged_however_fast_the_guest_writes_them)
{
	struct planner_costs costs = usual;
	costs.written_pages_per_s = 2000000;
	cr_assert_eq(chosen(an_incremental(300), costs).way, PLANNER_STAGE);
}

Test(planner, staging_that_failed_is_not_tried_again)
{
	struct planner_case c = an_incremental(10000);
	c.staging_failed = true;
	cr_assert_eq(chosen(c, usual).way, PLANNER_PROTECT);
	c.can_protect = false;
	struct planner_plan plan = chosen(c, usual);
	cr_assert_eq(plan.way, PLANNER_SETTLE);
	cr_assert(plan.buffer_pages >= 10000);
	c.memory_pages = 100000; /* all of which it may write meanwhile */
	cr_assert(chosen(c, usual).settled_pages >= 100000);
	c.staging_failed = false;
	cr_assert(chosen(c, usual).buffer_pages >= 400000);
	c.free_bytes = GIB;
	cr_assert_eq(chosen(c, usual).buffer_pages, GIB / 4 / 4096);
}

Test(planner, staging_that_failed_is_tried_with_less_or_later)
{
	struct planner_case c = an_incremental(10000);
	struct planner_costs costs = usual;
	planner_note_failed_staging(&costs, 10000);
	cr_assert_eq(chosen(c, costs).way, PLANNER_PROTECT);
	cr_assert_eq(chosen(an_incremental(7000), costs).way, PLANNER_STAGE);
	c.can_protect = false; /* there is no better way */
	cr_assert_eq(chosen(c, costs).way, PLANNER_STAGE);
	c.can_protect = true;
	for (unsigned i = 0; i < 3; i++)
		planner_age(&costs);
	cr_assert_eq(chosen(c, costs).way, PLANNER_PROTECT);
	for (unsigned i = 0; i < 4; i++)
		planner_age(&costs);
	cr_assert_eq(chosen(c, costs).way, PLANNER_STAGE);
	for (unsigned i = 0; i < 1000; i++)
		planner_age(&costs);
	cr_assert_eq(costs.stage_most_pages, 0);
}

Test(planner, without_protection_it_settles_or_pauses_longer)
{
	struct planner_case c = an_incremental(60000);
	struct planner_costs costs = usual;
	c.can_protect = false;
	cr_assert_eq(chosen(c, costs).way, PLANNER_STAGE);
	costs.copy_page_ns = 50000; /* staging does not converge, saving does */
	costs.saved_bytes_per_s = 3e9;
	costs.written_pages_per_s = 30000;
	cr_assert_eq(chosen(c, costs).way, PLANNER_SETTLE);
	costs.copy_page_ns = 700; /* neither does: what is left is copied in the pause */
	costs.saved_bytes_per_s = 100e6;
	costs.written_pages_per_s = 3000000;
	struct planner_plan plan = chosen(c, costs);
	cr_assert_eq(plan.way, PLANNER_STAGE, "%s", plan.reason);
	cr_assert_eq(plan.most_left_pages, UINT64_MAX);
	cr_assert(plan.buffer_pages >= 2 * 60000);
}

Test(planner, all_memory)
{
	struct planner_case c = an_incremental(GIB / 4096);
	c.incremental = false;
	struct planner_plan plan = chosen(c, usual);
	cr_assert_eq(plan.way, PLANNER_PROTECT);
	cr_assert_str_eq(planner_name(plan.way, c.incremental), "protect-all");
	c.can_protect = false;
	cr_assert_eq(chosen(c, usual).way, PLANNER_SETTLE);
	c.tracked = false;
	cr_assert_eq(chosen(c, usual).way, PLANNER_NONE);
	c.live = false;
	cr_assert_eq(chosen(c, usual).way, PLANNER_STOPPED);
}

Test(planner, what_was_asked_for_comes_first)
{
	struct planner_case c = an_incremental(100);
	c.settled = true;
	struct planner_plan plan = chosen(c, usual);
	cr_assert_eq(plan.way, PLANNER_SETTLE);
	cr_assert(strstr(plan.reason, "settled") != NULL);
	c.tracked = c.incremental = false; /* cannot be settled */
	cr_assert_eq(chosen(c, usual).way, PLANNER_PROTECT);
	c.live = false;
	cr_assert_eq(chosen(c, usual).way, PLANNER_STOPPED);
}

Test(planner, with_nothing_known_it_stages)
{
	struct planner_costs nothing = {0};
	cr_assert_eq(chosen(an_incremental(10000), nothing).way, PLANNER_STAGE);
	cr_assert_eq(chosen(an_incremental(0), nothing).way, PLANNER_STAGE);
}

Test(planner, notes_measurements)
{
	double cost = 0;
	planner_note_pages(&cost, 1000, 10); /* too few */
	cr_assert_eq(cost, 0);
	planner_note_pages(&cost, 6400, 64);
	cr_assert_float_eq(cost, 100, 1e-9);
	planner_note_pages(&cost, 12800, 64); /* up by a quarter */
	cr_assert_float_eq(cost, 125, 1e-9);
	planner_note(&cost, 75); /* down by half */
	cr_assert_float_eq(cost, 100, 1e-9);
	planner_note(&cost, 1000000); /* as 200 */
	cr_assert_float_eq(cost, 125, 1e-9);
	planner_note_rate(&cost, 10125);
	cr_assert_float_eq(cost, 5125, 1e-9);
	planner_note_rate(&cost, 0);
	cr_assert_float_eq(cost, 2562.5, 1e-9);
	struct planner_costs costs = {0};
	planner_measure(&costs);
	cr_assert(costs.copy_page_ns > 0);
	double much = costs.copy_page_ns = 1e9; /* is not believed for ever */
	planner_measure(&costs);
	cr_assert(costs.copy_page_ns < much * 0.6);
}
