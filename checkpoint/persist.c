/* From the end of the pause to the commit, and what to do when it fails. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "checkpoint/engine_internal.h"

#define RATE_MIN_BYTES (32u << 20)

static void unpark(struct take *take)
{
	if (take->parked)
		loop_unpark(take->engine->loop);
	take->parked = false;
}

uint64_t take_release_machine(struct take *take)
{
	unpark(take);
	if (!take->stopped)
		return clock_now_ns();
	take->stopped = false;
	vm_resume(take->engine->vm, true);
	return vm_resumed_ns(take->engine->vm);
}

static int save_memory(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct ckpt_result *result = &take->result;
	struct memcow_stats stats;
	uint64_t start_ns = clock_now_ns();
	engine_set_phase(engine, "memory");
	memcow_save(engine->memcow);
	int r = memcow_finish(engine->memcow, &engine->cancel, err);
	if (r != 0)
		return err_prefix(err, "memory");
	take->armed = false;
	/* Not live: only now may completions of requests in flight reach the guest's memory. */
	unpark(take);
	memcow_get_stats(engine->memcow, &stats);
	result->saved_pages = stats.saved_pages;
	result->zero_pages = stats.zero_pages;
	result->parent_pages = stats.total_pages - stats.scope_pages;
	result->cow_faults = stats.cow_faults;
	result->cow_fault_p50_ns = stats.cow_fault_p50_ns;
	result->cow_fault_p99_ns = stats.cow_fault_p99_ns;
	result->cow_fault_p999_ns = stats.cow_fault_p999_ns;
	result->cow_fault_max_ns = stats.cow_fault_max_ns;
	result->throttled = stats.throttled;
	result->throttled_ns = stats.throttled_ns;
	result->written_bytes = stats.written_bytes;
	r = fault_check(FAULT_TAKE_MEMORY_SAVED, err);
	if (r != 0)
		return r;
	/* For the planner: a few pages, or a limited rate, say nothing about what the disk can do. */
	bool measure = take->max_rate == 0 && stats.written_bytes >= RATE_MIN_BYTES;
	r = measure ? store_draft_sync_layers(take->draft, err) : 0;
	if (r != 0)
		return r;
	if (measure)
		planner_note_rate(&engine->costs.saved_bytes_per_s, (double)stats.written_bytes * 1e9 / (double)(clock_now_ns() - start_ns));
	if (stats.cow_faults > 0)
		planner_note(&engine->costs.fault_ns, (double)stats.cow_fault_p50_ns);
	return 0;
}

static int finish_requests(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	engine_set_phase(engine, "in-flight I/O");
	for (unsigned i = 0; i < engine->component_count; i++) {
		const struct component *c = &engine->components[i];
		struct buf *log = &engine->captured.logs[i];
		buf_free(log);
		const struct wait wait = {.cancel = &engine->cancel, .report = engine_report, .opaque = engine};
		int r = c->finish ? c->finish(c->opaque, log, &wait, err) : 0;
		if (r != 0)
			return err_prefix(err, "%s %u", c->id, c->instance);
	}
	return fault_check(FAULT_TAKE_REQUESTS_ENDED, err);
}

/* The checkpoint's index. Pages that were consolidated since are taken from where they are now; the layer then is this checkpoint's. */
static int build_index(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct page_index *index = &take->index;
	struct page_index merged = {0};
	struct page_index_saved saved = {
		.layer = take->memory_layer,
		.scope = memcow_scope(engine->memcow),
		.zero = memcow_zero_map(engine->memcow),
	};
	const struct page_index *parent = take->parent_index.page_count ? &take->parent_index : NULL;
	pthread_mutex_lock(&engine->lock);
	struct consolidated *c = take->consolidated = engine->consolidated;
	engine->consolidated = NULL;
	pthread_mutex_unlock(&engine->lock);
	int r = c && parent ? page_index_replace(&merged, parent, &c->from, c->layer, err) : 0;
	if (r == 0)
		r = page_index_build(index, &saved, merged.page_count ? &merged : parent, mem_pages(engine->mem), err);
	page_index_free(&merged);
	if (r != 0 || !c || !page_index_names(index, c->layer))
		return r;
	r = store_draft_adopt(take->draft, c->draft, err);
	c->draft = NULL;
	return r == 0 ? fault_check(FAULT_CONSOLIDATE_ADOPTED, err) : r;
}

static int put_state(struct take *take, uint64_t *bytes, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	CLEANUP_BUF struct buf state = BUF_INIT;
	CLEANUP_BUF struct buf file = BUF_INIT;
	int r = state_set_encode(&engine->captured, &state, err);
	if (r == 0)
		r = store_draft_put(take->draft, "state", state.data, state.length, err);
	if (r == 0)
		r = build_index(take, err);
	if (r == 0)
		r = page_index_encode(&take->index, &file, err);
	if (r == 0)
		r = store_draft_put(take->draft, "index", file.data, file.length, err);
	*bytes = state.length + file.length;
	return r;
}

static uint64_t occupied(int fd)
{
	struct stat st;
	return fstat(fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

/* Freed by the caller, failed or not. */
static int describe(const struct take *take, uint64_t put_bytes, struct store_checkpoint *out, struct err *err)
{
	CLEANUP_BUF struct buf needs = BUF_INIT;
	const struct ckpt_engine *engine = take->engine;
	const struct ckpt_result *result = &take->result;
	*out = (struct store_checkpoint){
		.message = take->message ? xstrdup(take->message) : NULL,
		.created_wall_ns = result->created_wall_ns,
		.live = take->live,
		.periodic = take->periodic,
		.memory_bytes = mem_size(engine->mem),
		.saved_pages = result->saved_pages,
		.zero_pages = result->zero_pages,
		.parent_pages = result->parent_pages,
		.written_bytes = result->written_bytes,
		.pause_ns = result->pause_ns,
		.durable_ns = clock_now_ns() - take->start_ns,
		.cpus = vm_cpus(engine->vm),
		.disk_count = take->disk_count,
		.disks = xcalloc(take->disk_count + 1, sizeof(*out->disks)),
		.config_text = xstrdup(engine->config_text),
		.size_bytes = occupied(take->fd) + occupied(take->sums_fd) + put_bytes,
	};
	snprintf(out->id, sizeof(out->id), "%s", result->id);
	snprintf(out->parent, sizeof(out->parent), "%s", result->parent);
	snprintf(out->vm, sizeof(out->vm), "%s", engine->vm_name);
	snprintf(out->vm_uuid, sizeof(out->vm_uuid), "%s", engine->vm_uuid);
	snprintf(out->tag, sizeof(out->tag), "%s", take->tag ? take->tag : "");
	snprintf(out->memory_layer, sizeof(out->memory_layer), "%s", take->memory_layer);
	if (take->group) {
		snprintf(out->group.id, sizeof(out->group.id), "%s", take->group->id);
		snprintf(out->group.tag, sizeof(out->group.tag), "%s", take->group->tag);
		out->group.members = xstrdup(take->group->members);
	}
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct stat st;
		out->disks[i] = take->disks[i].layer;
		if (!take->disks[i].unchanged && stat(take->disks[i].layer_path, &st) == 0)
			out->size_bytes += (uint64_t)st.st_blocks * 512;
	}
	int r = state_set_needs(&engine->captured, &needs, err);
	if (r == 0)
		out->needs = xstrdup((const char *)needs.data);
	return r;
}

/* What is behind the commit point of its group cannot fail any more. */
static int commit_with_group(struct take *take, struct store_checkpoint *checkpoint, struct err *err)
{
	int r = store_draft_prepare(take->draft, checkpoint, err);
	if (r != 0) {
		take->draft = NULL; /* freed */
		return r;
	}
	r = engine_meet(take->engine, take->group, CKPT_MEET_PREPARED, take->result.id, err);
	if (r != 0)
		return r;
	store_draft_finish(take->draft, checkpoint);
	take->draft = NULL;
	return 0;
}

static int commit(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct store_checkpoint checkpoint;
	uint64_t put_bytes;
	engine_set_phase(engine, "commit");
	int r = put_state(take, &put_bytes, err);
	if (r == 0)
		engine_set_level(engine, CKPT_WRITTEN, take->result.created_wall_ns);
	if (r == 0)
		r = engine_check_cancel(engine, err);
	if (r == 0)
		r = fault_check(FAULT_TAKE_BEFORE_COMMIT, err);
	if (r != 0)
		return r;
	r = describe(take, put_bytes, &checkpoint, err);
	if (r == 0 && take->group) {
		r = commit_with_group(take, &checkpoint, err);
	} else if (r == 0) {
		r = store_draft_commit(take->draft, &checkpoint, err);
		take->draft = NULL; /* freed in every case */
	}
	store_checkpoint_free(&checkpoint);
	return r;
}

int take_persist(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct ckpt_result *result = &take->result;
	engine_set_level(engine, CKPT_CAPTURED, result->created_wall_ns);
	int r = save_memory(take, err);
	if (r == 0)
		r = finish_requests(take, err);
	if (r == 0) {
		engine_set_phase(engine, "disks");
		r = take_seal_disks(take, err);
	}
	if (r == 0)
		r = fault_check(FAULT_TAKE_DISKS_SEALED, err);
	if (r == 0)
		r = commit(take, err);
	if (r != 0)
		return r;
	/* It exists: nothing fails from here on. */
	result->durable = true;
	result->durable_ns = clock_now_ns() - take->start_ns;
	take_note_disks(take);
	tracker_set_base(engine->tracker);
	engine_keep_base(engine, result->id, &take->index);
	engine_set_position(engine, result->id);
	struct err ignored = ERR_INIT;
	fault_check(FAULT_TAKE_COMMITTED, &ignored);
	if (!take->live) {
		uint64_t resume_ns = clock_now_ns();
		uint64_t end_ns = take_release_machine(take);
		result->resume_ns = end_ns - resume_ns;
		result->pause_ns = end_ns - take->pause_start_ns;
	}
	return 0;
}

void take_fail(struct take *take)
{
	struct ckpt_engine *engine = take->engine;
	/* The guest first. */
	if (take->armed)
		memcow_abandon(engine->memcow);
	take->armed = false;
	take_release_machine(take);
	if (take->switched)
		take_settle_disks(take);
	else
		take_unstage_disks(take);
	store_draft_abort(take->draft);
	take->draft = NULL;
}

void take_free(struct take *take)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		free(take->disks[i].layer_path);
		free(take->disks[i].temp_path);
	}
	if (take->fd >= 0)
		close(take->fd);
	if (take->sums_fd >= 0)
		close(take->sums_fd);
	seal_pages_free(take->cipher);
	page_index_free(&take->parent_index);
	page_index_free(&take->index);
	consolidated_free(take->consolidated);
	free(take->tag);
	free(take->message);
	free(take);
}
