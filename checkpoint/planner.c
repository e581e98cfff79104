#include "checkpoint/planner.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "base/bytes.h"
#include "base/clock.h"

/* Bounds. Of what the host has free, copies may take a quarter; there is room for twice as many as are foreseen, and for 8 MiB, as it costs
 * little where it is not used. */
#define FREE_PART	   4
#define BUFFER_SPARE_PAGES 2048u
/* The instant should not be long behind the request. */
#define STAGE_MAX_NS 500e6
/* What is copied in the pause: passes end at so much, and a plan that leaves more is dropped for another one. */
#define PAUSE_ENOUGH_NS 50e3
#define PAUSE_MOST_NS	300e3
#define ENOUGH_MIN	32u
#define ENOUGH_MAX	512u
#define MAX_PASSES	8u
/* What passes to the file leave is copied at most so often: by them, by two passes of staging, in the pause. */
#define SETTLE_COPIES 4u
/* A pass that leaves more than this part of what it was about leads nowhere. */
#define CONVERGES 0.75

#define NOTE_MIN_COUNT	 32u
#define NOTE_UP		 0.25
#define NOTE_DOWN	 0.5
#define MEASURED_PAGES	 128u
/* Of what could not be staged three quarters may be tried next, and all of it again after some six checkpoints. */
#define FAILED_PART  0.75
#define FORGET_EACH  1.05
#define FORGOTTEN    1e12

void planner_note(double *cost, double measured)
{
	if (*cost <= 0)
		*cost = measured;
	else if (measured < *cost)
		*cost += (measured - *cost) * NOTE_DOWN;
	else
		*cost += ((measured < 2 * *cost ? measured : 2 * *cost) - *cost) * NOTE_UP;
}

void planner_note_rate(double *rate, double measured) { *rate = *rate > 0 ? (*rate + measured) / 2 : measured; }

void planner_note_pages(double *cost, double total, uint64_t count)
{
	if (count >= NOTE_MIN_COUNT)
		planner_note(cost, total / (double)count);
}

void planner_measure(struct planner_costs *costs)
{
	size_t bytes = MEASURED_PAGES * (size_t)PAGE_BYTES;
	uint8_t *pages = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		return; /* what is not known counts as nothing: staging is tried, and measured then */
	memset(pages, 1, bytes);
	uint64_t start_ns = clock_now_ns();
	memset(pages + bytes, 1, bytes);
	planner_note_pages(&costs->touch_page_ns, (double)(clock_now_ns() - start_ns), MEASURED_PAGES);
	start_ns = clock_now_ns();
	memcpy(pages + bytes, pages, bytes);
	planner_note_pages(&costs->copy_page_ns, (double)(clock_now_ns() - start_ns), MEASURED_PAGES);
	munmap(pages, 2 * bytes);
}

void planner_note_failed_staging(struct planner_costs *costs, uint64_t pages) { costs->stage_most_pages = (double)pages * FAILED_PART; }

void planner_age(struct planner_costs *costs)
{
	costs->stage_most_pages *= FORGET_EACH;
	if (costs->stage_most_pages > FORGOTTEN)
		costs->stage_most_pages = 0;
}

const char *planner_name(enum planner_way way, bool incremental)
{
	static const char *const names[][2] = {
		[PLANNER_NONE] = {"none", "none"},
		[PLANNER_STOPPED] = {"stopped-all", "stopped"},
		[PLANNER_STAGE] = {"stage-all", "stage"},
		[PLANNER_PROTECT] = {"protect-all", "protect"},
		[PLANNER_SETTLE] = {"settle-all", "settle"},
	};
	return names[way][incremental];
}

static double at_least(double value, double least) { return value > least ? value : least; }

/* What passes over what was written during the one before come to. False if they lead nowhere. */
static bool foresee_staging(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *plan)
{
	double copy_ns = at_least(costs->copy_page_ns, 1), pages = (double)c->pages, copies = 0, ns = 0, left = pages;
	plan->enough_pages = (uint64_t)(PAUSE_ENOUGH_NS / copy_ns);
	plan->enough_pages = max_u64(ENOUGH_MIN, min_u64(plan->enough_pages, ENOUGH_MAX));
	plan->most_left_pages = max_u64(plan->enough_pages, (uint64_t)(PAUSE_MOST_NS / copy_ns));
	for (unsigned pass = 0; pass < MAX_PASSES; pass++) {
		double now = left;
		double pass_ns = now * copy_ns + (pass ? now * costs->log_page_ns + costs->log_read_ns : 0);
		double kept = (double)c->kept_pages - copies;
		pass_ns += at_least(now - at_least(kept, 0), 0) * costs->touch_page_ns;
		copies += now;
		ns += pass_ns;
		left = pass_ns * costs->written_pages_per_s / 1e9;
		if (left > pages && pages > 0)
			left = at_least(pages, 1);
		if (now <= (double)plan->enough_pages || left > now * CONVERGES)
			break;
	}
	plan->stage_ns = (uint64_t)ns;
	plan->left_pages = (uint64_t)left;
	plan->pause_ns = (uint64_t)(left * copy_ns);
	plan->copied_pages = (uint64_t)(copies + left);
	plan->buffer_pages = 2 * plan->copied_pages + BUFFER_SPARE_PAGES;
	return left <= (double)plan->most_left_pages;
}

static void foresee_save(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *plan)
{
	if (costs->saved_bytes_per_s > 0)
		plan->save_ns = (uint64_t)((double)c->pages * PAGE_BYTES / costs->saved_bytes_per_s * 1e9);
	if (plan->way == PLANNER_PROTECT) {
		plan->stage_ns = (uint64_t)((double)c->pages * costs->protect_page_ns);
		plan->faults = min_u64(c->pages, (uint64_t)((double)plan->save_ns * costs->written_pages_per_s / 1e9));
		plan->left_pages = plan->pause_ns = 0;
	}
}

/* True if passes to the file get ahead of the guest. */
static bool settling_ends(const struct planner_costs *costs)
{
	double page_ns = costs->log_page_ns + (costs->saved_bytes_per_s > 0 ? PAGE_BYTES * 1e9 / costs->saved_bytes_per_s : 0);
	return page_ns * costs->written_pages_per_s / 1e9 < CONVERGES;
}

static unsigned long long mib(uint64_t bytes) { return (unsigned long long)(bytes >> 20); }

static void choose(struct planner_plan *plan, enum planner_way way, const char *reason)
{
	plan->way = way;
	snprintf(plan->reason, sizeof(plan->reason), "%s", reason);
}

/* Staging, or why not. */
static bool choose_staging(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *plan)
{
	char *why = plan->reason;
	if (!c->incremental || c->staging_failed) {
		snprintf(why, PLANNER_REASON_BYTES, "%s", c->incremental ? "the guest wrote faster than it was staged" : "all memory is to be saved");
		return false;
	}
	bool converges = foresee_staging(c, costs, plan);
	if (c->can_protect && costs->stage_most_pages > 0 && (double)c->pages > costs->stage_most_pages) {
		snprintf(why, PLANNER_REASON_BYTES, "staging of so much did not get ahead of the guest lately");
		return false;
	}
	uint64_t bytes = plan->copied_pages * PAGE_BYTES, room = c->free_bytes / FREE_PART;
	if (bytes > room)
		snprintf(why, PLANNER_REASON_BYTES, "staging would take %llu MiB of copies, and %llu MiB are free", mib(bytes), mib(c->free_bytes));
	else if ((double)plan->stage_ns > at_least(STAGE_MAX_NS, c->can_protect ? (double)c->pages * costs->protect_page_ns : 0))
		snprintf(why, PLANNER_REASON_BYTES, "staging would take %llu ms", (unsigned long long)(plan->stage_ns / 1000000));
	else if (!converges && c->can_protect)
		snprintf(why, PLANNER_REASON_BYTES, "staging would leave %llu pages for the pause", (unsigned long long)plan->left_pages);
	else if (!converges && settling_ends(costs))
		snprintf(why, PLANNER_REASON_BYTES, "staging would leave %llu pages for the pause, and saving gets ahead of the guest",
			 (unsigned long long)plan->left_pages);
	else {
		plan->way = PLANNER_STAGE;
		/* Where there is no other way, each pass may find all of memory written: what is not used costs nothing. */
		if (!c->can_protect)
			plan->buffer_pages = max_u64(plan->buffer_pages, MAX_PASSES * max_u64(c->pages, c->memory_pages) + BUFFER_SPARE_PAGES);
		plan->buffer_pages = min_u64(plan->buffer_pages, room / PAGE_BYTES);
		snprintf(why, PLANNER_REASON_BYTES, "%llu pages fit into memory, and copying them leaves about %llu for the pause",
			 (unsigned long long)c->pages, (unsigned long long)plan->left_pages);
		return true;
	}
	return false;
}

/* Copies for what is left when passes to the file end, be it all of memory, if the host has room. */
static void allow_settling_buffers(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *plan)
{
	struct planner_plan staging = *plan;
	foresee_staging(c, costs, &staging);
	plan->enough_pages = staging.enough_pages;
	plan->most_left_pages = UINT64_MAX; /* there is no other plan */
	plan->buffer_pages = min_u64(SETTLE_COPIES * max_u64(c->pages, c->memory_pages) + BUFFER_SPARE_PAGES, c->free_bytes / FREE_PART / PAGE_BYTES);
	plan->buffer_pages = min_u64(plan->buffer_pages, (uint64_t)(STAGE_MAX_NS / at_least(costs->copy_page_ns, 100)));
	plan->settled_pages = plan->buffer_pages / SETTLE_COPIES;
}

void planner_choose(const struct planner_case *c, const struct planner_costs *costs, struct planner_plan *out)
{
	*out = (struct planner_plan){.way = PLANNER_NONE};
	if (!c->live)
		choose(out, PLANNER_STOPPED, "the VM stands still for the whole save, as it was not asked to be live");
	else if (c->settled && c->tracked)
		choose(out, PLANNER_SETTLE, "asked for by --instant settled");
	else if (!choose_staging(c, costs, out)) {
		out->way = c->can_protect ? PLANNER_PROTECT : c->tracked ? PLANNER_SETTLE : PLANNER_NONE;
		if (!c->can_protect && c->tracked && !c->incremental)
			choose(out, out->way, "all memory is to be saved, and it cannot be write-protected");
	} else if (!c->can_protect)
		out->most_left_pages = UINT64_MAX;
	if (out->way == PLANNER_SETTLE)
		allow_settling_buffers(c, costs, out);
	foresee_save(c, costs, out);
}
