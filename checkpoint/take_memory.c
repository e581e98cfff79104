/*
 * The memory's part of a checkpoint: what must be saved, and how the instant is held. docs/memory-cow.md says which is chosen when.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/host.h"
#include "base/log.h"
#include "checkpoint/engine_internal.h"

#define STAGE_MAX_PASSES 8u
/* In longer times a guest writes the same pages again: what it wrote then says little about the last, short passes, and counts only where it is more
 * than was known. */
#define RATE_MIN_NS 300000u
#define RATE_MAX_NS 5000000u
/* Of passes that bring a quarter less each there is no use: docs/memory-cow.md. */
#define PASS_NO_USE(count, before) ((count) > (before) / 4 * 3)
#define PROTECT_MAX_PASSES   8u
#define PROTECT_ENOUGH_PAGES 64u
/* Passes over memory that is written to the file under the running guest go on until so little is left that it is staged, or until
 * they bring less and less, and what is left still fits into the buffers. */
#define SETTLE_ENOUGH_PAGES 2048u
#define SETTLE_ROOM_PAGES   8192u /* there are always buffers for them, twice */
#define SETTLE_MAX_PASSES   12u

/* True if this checkpoint can do with what was written since the parent. */
static bool load_parent(struct take *take)
{
	struct ckpt_engine *engine = take->engine;
	struct store_checkpoint parent;
	struct err err = ERR_INIT;
	if (take->full || !tracker_has_base(engine->tracker))
		return false;
	if (engine_take_base(engine, take->result.parent, &take->parent_index))
		return true;
	int r = store_checkpoint_get(engine->store, take->result.parent, &parent, &err);
	if (r == 0) {
		r = engine_read_index(engine, &parent, &take->parent_index, &err);
		store_checkpoint_free(&parent);
	}
	if (r != 0)
		log_warn("checkpoint %.8s: all memory is saved, as its parent %.8s cannot be read: %s", take->result.id,
			 take->result.parent, err.message);
	return r == 0;
}

typedef int begin_fn(struct memcow *cow, const struct memcow_target *target, struct err *err);

/* Begins to hold memory as planned. */
static int begin(struct take *take, begin_fn *fn, struct err *err)
{
	bool incremental = take->plan_case.incremental;
	struct memcow_target target = {
		.fd = take->fd,
		.sums_fd = take->sums_fd,
		.cipher = take->cipher,
		.scope = incremental ? tracker_since(take->engine->tracker) : NULL,
		.max_rate = take->max_rate,
		.buffer_pages = take->plan.buffer_pages,
		.cancel = &take->engine->cancel,
	};
	take->result.plan = planner_name(take->plan.way, incremental);
	/* Of what is saved whole, and protected or standing still, it need not be known. */
	take->needs_written = incremental || fn == memcow_settle;
	int r = fn(take->engine->memcow, &target, err);
	take->armed = r == 0;
	return r;
}

/* What was staged so far, since the last time. */
static void note_copies(struct take *take, struct memcow_stats *before)
{
	struct memcow_stats now;
	memcow_get_stats(take->engine->memcow, &now);
	planner_note_pages(&take->engine->costs.copy_page_ns, (double)(now.copy_ns - before->copy_ns), now.copied_pages - before->copied_pages);
	planner_note_pages(&take->engine->costs.touch_page_ns, (double)(now.touch_ns - before->touch_ns), now.touched_pages - before->touched_pages);
	*before = now;
}

/* What was written since the last harvest. */
static int harvest(struct take *take, uint64_t *count, struct err *err)
{
	struct tracker *tracker = take->engine->tracker;
	struct planner_costs *costs = &take->engine->costs;
	*count = 0;
	int r = tracker_harvest(tracker, count, err);
	if (r != 0)
		return r;
	struct tracker_timing timing = tracker_timing(tracker);
	planner_note(&costs->log_read_ns, (double)timing.read_ns);
	planner_note_pages(&costs->log_page_ns, (double)timing.log_ns, *count);
	return 0;
}

static int stage_fresh(struct ckpt_engine *engine, struct err *err)
{
	struct page_words fresh = tracker_fresh_words(engine->tracker);
	return memcow_stage_more(engine->memcow, &fresh, err);
}

/* True if passes that go on to shrink as the last one did leave more than may be left for the pause. */
static bool staging_falls_behind(const struct take *take, uint64_t count, uint64_t before, unsigned pass)
{
	double shrinks = (double)count / (double)max_u64(before, 1), left = (double)count;
	for (; pass < STAGE_MAX_PASSES && left > (double)take->plan.most_left_pages; pass++)
		left *= shrinks;
	return left > (double)take->plan.most_left_pages;
}

static void note_written(struct ckpt_engine *engine, uint64_t pages, uint64_t took_ns)
{
	double rate = (double)pages * 1e9 / (double)took_ns;
	if (took_ns > RATE_MAX_NS && rate <= engine->costs.written_pages_per_s)
		return;
	planner_note_rate(&engine->costs.written_pages_per_s, rate);
	engine->written_rate = (uint64_t)engine->costs.written_pages_per_s;
}

/* Several passes, each over what was written during the one before it, until little is. */
static int stage_rest(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct memcow_stats stats;
	uint64_t before = tracker_since_count(engine->tracker), count = 0, since_ns = tracker_timing(engine->tracker).at_ns;
	int r = 0;
	memcow_get_stats(engine->memcow, &stats);
	for (unsigned pass = 1; pass < STAGE_MAX_PASSES && r == 0; pass++) {
		r = engine_check_cancel(engine, err);
		if (r == 0)
			r = harvest(take, &count, err);
		if (r != 0)
			break;
		uint64_t at_ns = tracker_timing(engine->tracker).at_ns;
		if (pass == 1) /* a pass of more than a few pages */
			note_written(engine, count, at_ns - since_ns);
		since_ns = at_ns;
		/* Not stopped only after all passes: each of them takes longer than protecting what is left. */
		if (staging_falls_behind(take, count, before, pass))
			break;
		r = stage_fresh(engine, err);
		note_copies(take, &stats);
		if (count <= take->plan.enough_pages || (count <= take->plan.most_left_pages && PASS_NO_USE(count, before)))
			break;
		before = count;
	}
	if (r == 0 && count > take->plan.most_left_pages)
		return err_set(err, ERR_FAILED, ENOBUFS, "the guest writes its memory faster than it is copied");
	return r;
}

static int stage_memory(struct take *take, struct err *err)
{
	struct memcow_stats none = {0};
	int r = begin(take, memcow_stage, err);
	if (r != 0)
		return r;
	note_copies(take, &none);
	take->engine->staged_last = true;
	return stage_rest(take, err);
}

static int settle_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t before = UINT64_MAX, count = 0, room = max_u64(take->plan.settled_pages, SETTLE_ROOM_PAGES);
	int r = begin(take, memcow_settle, err);
	for (unsigned pass = 1; r == 0; pass++) {
		r = engine_check_cancel(engine, err);
		if (r == 0)
			r = harvest(take, &count, err);
		if (r != 0 || count <= SETTLE_ENOUGH_PAGES || (count <= room && PASS_NO_USE(count, before)))
			break;
		if (pass == SETTLE_MAX_PASSES && count <= room)
			break;
		if (pass == SETTLE_MAX_PASSES) {
			err_set(err, ERR_FAILED, EAGAIN, "the guest writes its memory faster than it can be saved, and the host has no memory for a copy of it");
			err_hint(err, "leave out --live, or free %llu MiB of the host's memory", (unsigned long long)(count * 16 * PAGE_BYTES >> 20));
			return -EAGAIN;
		}
		before = count;
		struct page_words fresh = tracker_fresh_words(engine->tracker);
		r = memcow_settle_more(engine->memcow, &fresh, err);
	}
	if (r == 0)
		r = stage_fresh(engine, err);
	return r == 0 ? stage_rest(take, err) : r;
}

/* While the scope is armed the guest writes other pages: they join it, in passes, until few are left for the pause. */
static int protect_rest(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t before = UINT64_MAX, count, left = 0;
	int r = 0;
	for (unsigned pass = 0; pass < PROTECT_MAX_PASSES && r == 0; pass++) {
		r = engine_check_cancel(engine, err);
		if (r == 0)
			r = harvest(take, &count, err);
		if (r != 0)
			break;
		struct page_words fresh = tracker_fresh_words(engine->tracker);
		r = memcow_arm_more(engine->memcow, &fresh, &left, err);
		if (left <= PROTECT_ENOUGH_PAGES || PASS_NO_USE(left, before))
			break;
		before = left;
	}
	return r;
}

static int protect_memory(struct take *take, struct err *err)
{
	struct memcow_stats stats;
	int r = begin(take, memcow_arm, err);
	if (r != 0 || !take->plan_case.incremental) /* of all memory many are protected with one call */
		return r;
	memcow_get_stats(take->engine->memcow, &stats);
	planner_note_pages(&take->engine->costs.protect_page_ns, (double)stats.arm_ns, stats.scope_pages);
	return protect_rest(take, err);
}

/* Neither way to follow the guest's writes. */
static int cannot_be_live(const struct take *take, struct err *err)
{
	const struct err *why = &take->engine->live_error;
	if (err && why->number != 0)
		*err = *why;
	else
		err_set(err, ERR_HOST, ENOTSUP, "memory protection was lost by an earlier failure");
	err_prefix(err, "a live checkpoint is not possible, as this KVM has no dirty log either");
	err_hint(err, "leave out --live: a checkpoint of a VM that stands still needs neither");
	return -ENOTSUP;
}

static int carry_out(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	if (!engine->staged_last)
		planner_measure(&engine->costs);
	engine->staged_last = false;
	take->plan_case.free_bytes = host_available_memory();
	take->plan_case.kept_pages = memcow_kept_pages(engine->memcow);
	planner_choose(&take->plan_case, &engine->costs, &take->plan);
	take->result.planned = take->plan;
	take->result.costs = engine->costs;
	take->result.free_bytes = take->plan_case.free_bytes;
	log_debug("checkpoint %.8s: memory is held by %s: %s", take->result.id,
		  planner_name(take->plan.way, take->plan_case.incremental), take->plan.reason);
	switch (take->plan.way) {
	case PLANNER_STOPPED:
		return begin(take, memcow_arm_stopped, err);
	case PLANNER_STAGE:
		return stage_memory(take, err);
	case PLANNER_PROTECT:
		return protect_memory(take, err);
	case PLANNER_SETTLE:
		return settle_memory(take, err);
	default:
		return cannot_be_live(take, err);
	}
}

/* How fast the guest writes now: what it wrote since the harvest. One that took next to no time says nothing. */
static void note_rate(struct take *take)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t count, at_ns = tracker_timing(engine->tracker).at_ns;
	uint64_t took_ns = clock_now_ns() - at_ns;
	if (took_ns >= RATE_MIN_NS && tracker_peek(engine->tracker, &count, NULL) == 0)
		note_written(engine, count, took_ns);
}

int take_stage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct planner_case *c = &take->plan_case;
	struct err unknown = ERR_INIT;
	uint64_t count;
	c->live = take->live;
	c->settled = take->settled;
	c->incremental = load_parent(take);
	int r = engine_check_cancel(engine, err);
	if (r != 0)
		return r;
	if (c->incremental && harvest(take, &count, &unknown) != 0) {
		page_index_free(&take->parent_index);
		c->incremental = false;
	}
	if (c->incremental)
		note_rate(take);
	if (unknown.number == 0)
		tracker_start(engine->tracker, true, &unknown);
	if (unknown.number != 0) /* the next one saves all memory too */
		log_debug("checkpoint %.8s: what the guest writes is not tracked: %s", take->result.id, unknown.message);
	c->tracked = tracker_is_on(engine->tracker);
	c->can_protect = memcow_can_protect(engine->memcow);
	c->memory_pages = mem_pages(engine->mem);
	c->pages = c->incremental ? tracker_since_count(engine->tracker) : c->memory_pages;
	planner_age(&engine->costs);
	r = carry_out(take, err);
	return r == -ENOBUFS ? take_restage_memory(take, err) : r;
}

int take_restage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	memcow_abandon(engine->memcow);
	take->armed = false;
	if (err)
		*err = ERR_INIT;
	take->plan_case.staging_failed = true;
	planner_note_failed_staging(&engine->costs, take->plan_case.pages);
	take->plan_case.pages = take->plan_case.incremental ? tracker_since_count(engine->tracker) : mem_pages(engine->mem);
	return carry_out(take, err);
}

int take_capture_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct page_words written = {0};
	uint64_t count;
	int r = 0;
	if (take->needs_written) {
		r = tracker_collect(engine->tracker, &count, err);
		written = tracker_fresh_words(engine->tracker);
	}
	return r == 0 ? memcow_instant(engine->memcow, take->needs_written ? &written : NULL, err) : r;
}
