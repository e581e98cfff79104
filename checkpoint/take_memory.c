/*
 * The memory's part of a checkpoint: what must be saved, and how the instant is held. docs/memory-cow.md says which is chosen when.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/log.h"
#include "checkpoint/engine_internal.h"

/* What is staged must fit into memory beside the guest's: at most 128 MiB, and an eighth of the guest's. */
#define STAGE_MAX_PAGES 32768u
#define STAGE_MAX_PART	8u
/* Staging goes on until so few pages were written meanwhile: about what the guest writes in the time that a pass takes at least, and
 * what the pause has time to copy. */
#define STAGE_ENOUGH_PAGES 128u
#define STAGE_MAX_PASSES   6u
/* Passes over memory that is written to the file under the running guest go on until so little is left that it is staged, or until
 * they bring less and less, and what is left still fits into the buffers. */
#define SETTLE_ENOUGH_PAGES 2048u
#define SETTLE_MOST_PAGES   8192u
#define SETTLE_MAX_PASSES   12u

/* True if this checkpoint can do with what was written since the parent. */
static bool load_parent(struct take *take)
{
	struct ckpt_engine *engine = take->engine;
	struct store_checkpoint parent;
	struct err err = ERR_INIT;
	if (take->full || !tracker_has_base(engine->tracker))
		return false;
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

/* Begins to hold memory in one of the ways; `plan` is its name, `plan_all` that for all memory. */
static int begin(struct take *take, begin_fn *fn, const char *plan, const char *plan_all, struct err *err)
{
	bool incremental = take->parent_index.page_count != 0;
	struct memcow_target target = {
		.fd = take->fd,
		.sums_fd = take->sums_fd,
		.scope = incremental ? tracker_since(take->engine->tracker) : NULL,
		.max_rate = take->max_rate,
		.cancel = &take->engine->cancel,
	};
	take->result.plan = incremental ? plan : plan_all;
	/* Of what is saved whole, and protected or standing still, it need not be known. */
	take->needs_written = incremental || fn == memcow_settle;
	int r = fn(take->engine->memcow, &target, err);
	take->armed = r == 0;
	return r;
}

/* What was written since the last harvest. Cancelling is looked at. */
static int harvest(struct take *take, uint64_t *count, struct err *err)
{
	int r = engine_check_cancel(take->engine, err);
	*count = 0;
	return r == 0 ? tracker_harvest(take->engine->tracker, count, err) : r;
}

static int stage_fresh(struct ckpt_engine *engine, struct err *err)
{
	struct page_words fresh = tracker_fresh_words(engine->tracker);
	return memcow_stage_more(engine->memcow, &fresh, err);
}

/* Several passes, each over what was written during the one before it, until little is. */
static int stage_rest(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t before = UINT64_MAX, count = 0;
	int r = 0;
	for (unsigned pass = 1; pass < STAGE_MAX_PASSES && r == 0; pass++) {
		r = harvest(take, &count, err);
		if (r == 0)
			r = stage_fresh(engine, err);
		if (count <= STAGE_ENOUGH_PAGES || count >= before)
			break;
		before = count;
	}
	return r;
}

static int stage_memory(struct take *take, struct err *err)
{
	int r = begin(take, memcow_stage, "stage", NULL, err); /* never all memory */
	return r == 0 ? stage_rest(take, err) : r;
}

static int settle_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t before = UINT64_MAX, count = 0;
	int r = begin(take, memcow_settle, "settle", "settle-all", err);
	for (unsigned pass = 1; r == 0; pass++) {
		r = harvest(take, &count, err);
		if (r != 0 || count <= SETTLE_ENOUGH_PAGES || (count <= SETTLE_MOST_PAGES && count > before / 2))
			break;
		if (pass == SETTLE_MAX_PASSES) {
			err_set(err, ERR_FAILED, EAGAIN, "the guest writes its memory faster than it can be saved");
			err_hint(err, "use --instant now if this host can (vmcp doctor), or leave out --live");
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

int take_stage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t limit = min_u64(STAGE_MAX_PAGES, mem_pages(engine->mem) / STAGE_MAX_PART), count;
	struct err unknown = ERR_INIT;
	bool incremental = load_parent(take);
	if (incremental && tracker_harvest(engine->tracker, &count, &unknown) != 0) {
		page_index_free(&take->parent_index);
		incremental = false;
	}
	if (unknown.number == 0)
		tracker_start(engine->tracker, true, &unknown);
	if (unknown.number != 0) /* the next one saves all memory too */
		log_debug("checkpoint %.8s: what the guest writes is not tracked: %s", take->result.id, unknown.message);
	if (!take->live)
		return begin(take, memcow_arm_stopped, "stopped", "stopped-all", err);
	bool can_protect = memcow_can_protect(engine->memcow);
	if (!can_protect && !tracker_is_on(engine->tracker))
		return cannot_be_live(take, err);
	int r = -ENOBUFS;
	if (incremental && tracker_since_count(engine->tracker) <= limit)
		r = stage_memory(take, err);
	if (r != -ENOBUFS)
		return r;
	return take_restage_memory(take, err);
}

int take_restage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	bool settle = take->settled || !memcow_can_protect(engine->memcow);
	memcow_abandon(engine->memcow);
	take->armed = false;
	if (err)
		*err = ERR_INIT;
	if (settle && tracker_is_on(engine->tracker))
		return settle_memory(take, err);
	return begin(take, memcow_arm, "protect", "protect-all", err);
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
