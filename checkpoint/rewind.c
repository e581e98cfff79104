/*
 * Going back to a checkpoint in place.
 *
 *     check      manifest, state, index, components; pages known to differ           the VM runs
 *     stop       vCPUs stand, loop parked
 *     gather     what was written is read from the layers and checked, overlays are made     a failure has no effect up to here
 *     settle     requests in flight end; a cancel lets the VM go on
 *     drain      what the devices still hold is dropped                               behind it a failure is sticky
 *     put back   memory, states, disks, completion logs
 *     resume
 *
 * The VM stops as early as that, though much could be read before: what the guest would do meanwhile is to be undone, and would be more to put back.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/priority.h"
#include "checkpoint/operation.h"
#include "checkpoint/revert_internal.h"

struct rewind {
	struct ckpt_engine *engine;
	struct store_pin *pin; /* it must not be removed half way; NULL: the engine's holds it */
	struct revert_node *node;
	struct revert_cache *cache;
	const struct ckpt_group *group; /* or NULL */
	bool ran;    /* the VM, before */
	bool all;    /* every page is looked at: it is not known which differ */
	bool many;   /* more pages than the stash takes: they are read twice */
	uint32_t count; /* else: pages in cache->pages */
	uint64_t changed_pages;
	char *temp_paths[CKPT_MAX_DISKS]; /* new overlays; NULL: none was made */
	bool replaced;
	int nice;    /* before it was urgent */
	bool urgent; /* the guest stands and waits for us */
	uint64_t at_ns; /* the end of the part before */
	struct ckpt_revert_result *result;
};

static void end_part(struct rewind *rw, uint64_t *part_ns)
{
	uint64_t now = clock_now_ns();
	*part_ns += now - rw->at_ns;
	rw->at_ns = now;
}

/* Nobody may come between while the guest stands for a moment. Reading much takes long, and others need the processor too. */
static void set_urgent(struct rewind *rw, bool urgent)
{
	if (urgent && !rw->urgent)
		rw->nice = priority_urgent();
	if (!urgent && rw->urgent)
		priority_restore(rw->nice);
	rw->urgent = urgent;
}

/* --- which pages --- */

/* The pages of cache->which, as a list if they are not too many. Returns their number, of many at least one too many. */
static uint32_t list_pages(struct rewind *rw)
{
	const uint64_t *which = rw->cache->which;
	uint64_t words = tracker_words(rw->engine->tracker);
	uint32_t count = 0;
	for (uint64_t w = 0; w < words; w++) {
		for (uint64_t bits = which[w]; bits; bits &= bits - 1) {
			if (count == STASH_PAGES)
				return count + 1;
			rw->cache->pages[count++] = (uint32_t)(w * 64 + (unsigned)__builtin_ctzll(bits));
		}
	}
	return count;
}

/* Reads and checks the pages of cache->which, into memory if there is room; else only those of `fresh`, which were not looked at before (NULL: all). */
static int gather_pages(struct rewind *rw, const uint64_t *fresh, struct err *err)
{
	CLEANUP_FREE uint8_t *chunk = NULL;
	if (!rw->many) {
		rw->count = list_pages(rw);
		rw->many = rw->count > STASH_PAGES;
	}
	if (!rw->many)
		return stash_fill(&rw->node->stash, &rw->node->layers, rw->cache->pages, rw->count, err);
	set_urgent(rw, false);
	chunk = restore_alloc_chunk(err);
	return chunk ? restore_verify(&rw->node->layers, fresh, 0, rw->node->index.page_count, chunk, err) : -ENOMEM;
}

/* The pages in which the checkpoint differs from where the VM stood before the guest wrote. */
static int gather_differing(struct rewind *rw, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	const struct revert_node *to = rw->node;
	uint64_t *which = rw->cache->which;
	uint64_t bytes = tracker_words(engine->tracker) * sizeof(*which);
	char at[STORE_ID_BYTES];
	ckpt_position(engine, at);
	memset(which, 0, bytes);
	rw->all = !tracker_has_base(engine->tracker);
	if (!rw->all && strcmp(at, to->checkpoint.id) == 0)
		return 0;
	const struct page_index *kept = rw->all ? NULL : revert_node_index(engine, at);
	struct store_checkpoint from = {0};
	struct page_index read = {0};
	struct err unknown = ERR_INIT;
	if (!rw->all && !kept) {
		int r = store_checkpoint_get(engine->store, at, &from, &unknown);
		if (r == 0)
			r = engine_read_index(engine, &from, &read, &unknown);
		store_checkpoint_free(&from);
		rw->all = r != 0;
		if (rw->all)
			log_debug("revert to %.8s: all pages are looked at: %s", to->checkpoint.id, unknown.message);
	}
	rw->many = rw->all;
	if (rw->all)
		memset(which, 0xff, bytes);
	else
		page_index_diff(kept ? kept : &read, &to->index, which);
	page_index_free(&read);
	return gather_pages(rw, rw->all ? NULL : which, err);
}

/* What the guest wrote. vCPUs stand, the loop is parked. */
static int gather_written(struct rewind *rw, struct err *err)
{
	struct tracker *tracker = rw->engine->tracker;
	uint64_t words = tracker_words(tracker), count;
	uint64_t *which = rw->cache->which, *late = rw->cache->late;
	if (rw->all)
		return 0;
	int r = tracker_collect(tracker, &count, err);
	if (r != 0)
		return r;
	const uint64_t *since = tracker_since(tracker);
	for (uint64_t w = 0; w < words; w++) {
		if (since[w] == 0)
			continue;
		late[w] = since[w] & ~which[w];
		which[w] |= since[w];
	}
	r = gather_pages(rw, late, err);
	for (uint64_t w = 0; w < words; w++) {
		if (since[w] != 0)
			late[w] = 0;
	}
	return r;
}

/* What requests that ended in the drain wrote. */
static int gather_drained(struct rewind *rw, struct err *err)
{
	uint64_t words = tracker_words(rw->engine->tracker);
	uint64_t *which = rw->cache->which, *late = rw->cache->late;
	if (rw->all || !tracker_collect_marks(rw->engine->tracker, late))
		return 0;
	for (uint64_t w = 0; w < words; w++) {
		late[w] &= ~which[w];
		which[w] |= late[w];
	}
	int r = gather_pages(rw, late, err);
	memset(late, 0, words * sizeof(*late));
	return r;
}

/* --- disks --- */

static bool is_fresh(const struct rewind *rw, unsigned i)
{
	const struct engine_disk *disk = &rw->engine->disks[i];
	return !disk->unsealed && !disk->unsafe && cow_is_empty_overlay(disk->disk, disk->path, rw->node->layer_paths[i]);
}

/* A new overlay beside each disk that does not stand on an untouched one. The loop is parked. */
static int stage_disks(struct rewind *rw, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	for (unsigned i = 0; i < engine->disk_count; i++) {
		if (rw->temp_paths[i] || is_fresh(rw, i))
			continue;
		const struct store_disk_layer *layer = revert_find_layer(&rw->node->checkpoint, engine->disks[i].name);
		rw->temp_paths[i] = disk_temp_path(engine->disks[i].path);
		int r = revert_make_overlay(rw->temp_paths[i], rw->node->layer_paths[i], layer, err);
		if (r != 0)
			return err_prefix(err, "disk %s: new overlay", engine->disks[i].name);
	}
	return 0;
}

/* The disk first stands on the new overlay, then the path is given to it: if opening it fails, the path still is the
 * old image. */
static int replace_disk(struct rewind *rw, unsigned i, struct err *err)
{
	struct engine_disk *disk = &rw->engine->disks[i];
	int r = cow_replace(disk->disk, rw->temp_paths[i], err);
	if (r != 0)
		return r;
	rw->replaced = true;
	disk->unsealed = NULL; /* gone with the old chain */
	disk->unsafe = false;
	r = fault_check(FAULT_REVERT_DISK_REPLACED, err);
	if (r != 0)
		return r;
	if (rename(rw->temp_paths[i], disk->path) != 0)
		return err_sys(err, errno, "rename %s to %s", rw->temp_paths[i], disk->path);
	return fault_check(FAULT_REVERT_DISK_RENAMED, err);
}

static int replace_disks(struct rewind *rw, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	int r = 0;
	for (unsigned i = 0; i < engine->disk_count && r == 0; i++) {
		r = rw->temp_paths[i] ? replace_disk(rw, i, err) : 0;
		if (r != 0)
			err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return r;
}

/* --- the machine --- */

/* A request that does not end may be waited for long: it is told which, and a cancel still is without effect. The loop runs. */
static int settle(struct ckpt_engine *engine, struct err *err)
{
	const struct wait wait = {.cancel = &engine->cancel, .report = engine_report, .opaque = engine};
	int r = 0;
	engine_set_phase(engine, "in-flight I/O");
	for (unsigned i = 0; i < engine->component_count && r == 0; i++) {
		const struct component *c = &engine->components[i];
		r = c->settle ? c->settle(c->opaque, &wait, err) : 0;
		if (r != 0)
			err_prefix(err, "%s %u", c->id, c->instance);
	}
	if (r == 0)
		r = engine_end_cancellable(engine, err);
	return r;
}

static int drain(struct ckpt_engine *engine, struct err *err)
{
	for (unsigned i = 0; i < engine->component_count; i++) {
		const struct component *c = &engine->components[i];
		int r = c->drain ? c->drain(c->opaque, err) : 0;
		if (r != 0)
			return err_prefix(err, "%s %u: drain", c->id, c->instance);
	}
	return fault_check(FAULT_REVERT_STOPPED, err);
}

static int put_back_memory(struct rewind *rw, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	struct revert_cache *cache = rw->cache;
	struct err none = ERR_INIT;
	int r = 0;
	if (rw->many) {
		r = restore_memory(engine->mem, &rw->node->layers, rw->all ? NULL : cache->which, false, &rw->changed_pages, err);
		if (r != 0)
			return r;
		r = tracker_start(engine->tracker, false, &none);
		if (r == 0)
			r = tracker_rewind(engine->tracker, &none);
	} else {
		rw->changed_pages = stash_put_back(&rw->node->stash, engine->mem, cache->pages, rw->count, cache->changed);
		r = tracker_rewind_pages(engine->tracker, cache->pages, rw->count, cache->changed, &none);
	}
	/* Before states are applied: these, and completion logs, write to memory. */
	if (r != 0)
		log_debug("written pages are not tracked: %s", none.message);
	return fault_check(FAULT_REVERT_MEMORY, err);
}

/* vCPUs stand, the loop is parked. */
static int put_back(struct rewind *rw, struct err *err)
{
	struct ckpt_revert_result *result = rw->result;
	int r = put_back_memory(rw, err);
	end_part(rw, &result->memory_ns);
	if (r == 0)
		r = state_set_apply(&rw->node->states, err);
	end_part(rw, &result->state_ns);
	if (r == 0)
		r = replace_disks(rw, err);
	/* After the disks, as requests without a logged completion are issued again, on the new chain, once the loop
	 * goes on. */
	if (r == 0)
		r = state_set_apply_logs(&rw->node->states, err);
	end_part(rw, &result->disks_ns);
	return r;
}

/* The loop runs before, and is parked after. */
static int drain_and_put_back(struct rewind *rw, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	int r = drain(engine, err);
	loop_park_request(engine->loop);
	loop_park_wait(engine->loop);
	/* What others of the group sent before is in the backends of cards by now, which forget it as states are applied. */
	if (r == 0)
		engine_meet(engine, rw->group, CKPT_MEET_PARKED, rw->node->checkpoint.id, NULL);
	if (r == 0)
		r = gather_drained(rw, err);
	/* A request that was started or ended in the drain may have written. */
	if (r == 0)
		r = stage_disks(rw, err);
	end_part(rw, &rw->result->drain_ns);
	return r == 0 ? put_back(rw, err) : r;
}

static int check(struct rewind *rw, const char *id, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	char at[STORE_ID_BYTES];
	ckpt_position(engine, at);
	int r = engine->pin && strcmp(at, id) == 0 ? 0 : store_pin(engine->store, id, &rw->pin, err);
	if (r == 0)
		r = revert_node_get(engine, id, &rw->node, err);
	if (r == 0) {
		rw->cache = engine->reverts;
		r = gather_differing(rw, err);
	}
	if (r == 0)
		r = fault_check(FAULT_REVERT_CHECKED, err);
	return r == 0 ? 0 : err_prefix(err, "checkpoint %.8s", id);
}

/* As if nothing had been. */
static void let_go_on(struct rewind *rw)
{
	if (rw->ran && rw->engine->broken.number == 0)
		vm_resume(rw->engine->vm, false);
}

/* Stops the VM and gathers what else is needed. On failure the machine is as it was. */
static int stop(struct rewind *rw, const char *id, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	rw->ran = !vm_is_quiesced(engine->vm);
	set_urgent(rw, !rw->many);
	int r = vm_quiesce_discard(engine->vm, err);
	loop_park_request(engine->loop);
	loop_park_wait(engine->loop);
	end_part(rw, &rw->result->stop_ns);
	if (r == 0 && (r = gather_written(rw, err)) != 0)
		err_prefix(err, "checkpoint %.8s", id);
	end_part(rw, &rw->result->pages_ns);
	if (r == 0)
		r = stage_disks(rw, err);
	if (r == 0)
		r = fault_check(FAULT_REVERT_STAGED, err);
	end_part(rw, &rw->result->disks_ns);
	if (r == 0)
		return 0;
	loop_unpark(engine->loop);
	let_go_on(rw);
	return r;
}

/* What must be durable, but need not hold up the guest. A crash before it leaves each path with one image or the other,
 * both whole. */
static void record(struct rewind *rw)
{
	struct ckpt_engine *engine = rw->engine;
	const char *id = rw->node->checkpoint.id;
	struct err err = ERR_INIT;
	char at[STORE_ID_BYTES];
	ckpt_position(engine, at);
	int r = fault_check(FAULT_REVERT_DONE, &err);
	for (unsigned i = 0; i < engine->disk_count && r == 0; i++)
		r = rw->temp_paths[i] ? disk_sync_folder(engine->disks[i].path, &err) : 0;
	if (r == 0 && (engine->position_unrecorded || strcmp(at, id) != 0))
		r = store_vm_set_position(engine->store, engine->vm_name, id, &err);
	engine->position_unrecorded = r != 0;
	if (r != 0)
		log_warn("revert to %.8s: done, but not recorded: %s", id, err.message);
	engine_set_position(engine, id);
}

static int rewind_machine(struct rewind *rw, const char *id, bool resume, struct err *err)
{
	struct ckpt_engine *engine = rw->engine;
	int r = check(rw, id, err);
	if (r == 0)
		r = engine_meet(engine, rw->group, CKPT_MEET_CHECKED, id, err);
	end_part(rw, &rw->result->check_ns);
	if (r == 0)
		r = stop(rw, id, err);
	if (r != 0)
		return r;
	loop_unpark(engine->loop);
	r = settle(engine, err);
	if (r != 0) {
		let_go_on(rw);
		return r;
	}
	r = drain_and_put_back(rw, err);
	loop_unpark(engine->loop);
	if (r != 0)
		return revert_half_way(engine, id, err);
	engine_set_broken(engine, NULL);
	engine_meet(engine, rw->group, CKPT_MEET_RESTORED, id, NULL);
	if (resume)
		vm_resume(engine->vm, true);
	end_part(rw, &rw->result->resume_ns);
	return 0;
}

int ckpt_revert(struct ckpt_engine *engine, const char *id, bool resume, struct ckpt_revert_result *result, struct err *err)
{
	return ckpt_revert_in_group(engine, id, resume, NULL, result, err);
}

int ckpt_revert_in_group(struct ckpt_engine *engine, const char *id, bool resume, const struct ckpt_group *group,
			 struct ckpt_revert_result *result, struct err *err)
{
	uint64_t start_ns = clock_now_ns();
	struct rewind rw = {.engine = engine, .group = group, .at_ns = start_ns, .result = result};
	*result = (struct ckpt_revert_result){0};
	int r = operation_begin(engine, OPERATION_REVERT, id, err);
	if (r != 0)
		return r;
	loader_wait_filled(engine->loader);
	r = rewind_machine(&rw, id, resume, err);
	set_urgent(&rw, false);
	if (r == 0) {
		result->revert_ns = rw.at_ns - start_ns;
		result->restored_pages = rw.changed_pages;
		snprintf(result->id, sizeof(result->id), "%s", rw.node->checkpoint.id);
		record(&rw);
	}
	for (unsigned i = 0; i < engine->disk_count; i++) {
		if (rw.temp_paths[i])
			unlink(rw.temp_paths[i]); /* renamed by now, if all went well */
		free(rw.temp_paths[i]);
	}
	if (rw.node)
		revert_node_rest(engine, rw.node);
	store_unpin(rw.pin);
	operation_end(engine);
	return r;
}
