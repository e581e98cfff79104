/*
 * The memory's part of a checkpoint: what must be saved, and how the instant is held.
 *
 *     no base to be incremental to, or --full  all memory, protected
 *     few pages written since the base         staged: copied while the guest runs, the last ones in the pause
 *     many, or more than staging kept up with  those pages, protected
 *     not live                                 the same pages, with nobody to protect them from
 */
#include <errno.h>

#include "base/buf.h"
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

int engine_read_index(struct ckpt_engine *engine, const struct store_checkpoint *checkpoint, struct page_index *out,
		      struct err *err)
{
	CLEANUP_BUF struct buf file = BUF_INIT;
	int r = store_checkpoint_read(engine->store, checkpoint, "index", &file, err);
	if (r == 0)
		r = page_index_decode(file.data, file.length, out, err);
	if (r != 0 || out->page_count == mem_pages(engine->mem))
		return r;
	err_set(err, ERR_DAMAGED, EINVAL, "index: %llu pages instead of %llu", (unsigned long long)out->page_count,
		(unsigned long long)mem_pages(engine->mem));
	page_index_free(out);
	return -EINVAL;
}

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

static struct memcow_target target_of(const struct take *take)
{
	bool incremental = take->parent_index.page_count != 0;
	return (struct memcow_target){
		.fd = take->fd,
		.sums_fd = take->sums_fd,
		.scope = incremental ? tracker_since(take->engine->tracker) : NULL,
	};
}

/* Several passes, each over what was written during the one before it, until little is. */
static int stage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct memcow_target target = target_of(take);
	uint64_t before = UINT64_MAX, count = 0;
	int r = memcow_stage(engine->memcow, &target, err);
	take->armed = r == 0;
	for (unsigned pass = 1; pass < STAGE_MAX_PASSES && r == 0; pass++) {
		r = engine_check_cancel(engine, err);
		if (r == 0)
			r = tracker_harvest(engine->tracker, &count, err);
		if (r == 0)
			r = memcow_stage_more(engine->memcow, tracker_fresh(engine->tracker), err);
		if (count <= STAGE_ENOUGH_PAGES || count >= before)
			break;
		before = count;
	}
	return r;
}

static int protect_memory(struct take *take, struct err *err)
{
	struct memcow_target target = target_of(take);
	int r = memcow_arm(take->engine->memcow, &target, err);
	take->armed = r == 0;
	take->result.plan = target.scope ? "protect" : "protect-all";
	return r;
}

static int stop_memory(struct take *take, struct err *err)
{
	struct memcow_target target = target_of(take);
	int r = memcow_arm_stopped(take->engine->memcow, &target, err);
	take->armed = r == 0;
	take->result.plan = target.scope ? "stopped" : "stopped-all";
	return r;
}

int take_stage_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	uint64_t limit = min_u64(STAGE_MAX_PAGES, mem_pages(engine->mem) / STAGE_MAX_PART), count;
	bool incremental = load_parent(take);
	int r = 0;
	if (incremental)
		r = tracker_harvest(engine->tracker, &count, err);
	else if (tracker_start(engine->tracker, err) != 0)
		log_debug("checkpoint %.8s: %s", take->result.id, err->message); /* the next one saves all memory too */
	if (r != 0)
		return r;
	if (!take->live)
		return stop_memory(take, err);
	if (!incremental || tracker_since_count(engine->tracker) > limit)
		return protect_memory(take, err);
	take->result.plan = "stage";
	r = stage_memory(take, err);
	return r == -ENOBUFS ? take_restage_memory(take, err) : r;
}

int take_restage_memory(struct take *take, struct err *err)
{
	memcow_abandon(take->engine->memcow);
	take->armed = false;
	if (err)
		*err = ERR_INIT;
	return protect_memory(take, err);
}

int take_capture_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	const uint64_t *written = NULL;
	uint64_t count;
	int r = 0;
	/* Of what is saved whole it need not be known. */
	if (take->parent_index.page_count != 0) {
		r = tracker_collect(engine->tracker, &count, err);
		written = tracker_fresh(engine->tracker);
	}
	return r == 0 ? memcow_instant(engine->memcow, written, err) : r;
}
