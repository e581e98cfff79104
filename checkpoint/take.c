/* Taking a checkpoint: stage and pause. What comes after is in persist.c. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/priority.h"
#include "checkpoint/engine_internal.h"
#include "checkpoint/operation.h"

/* Taken early, as a save of minutes that ends with "the tag is taken" helps nobody. The commit looks again. */
static int check_tag(struct ckpt_engine *engine, const char *tag, struct err *err)
{
	struct store_checkpoint *list;
	size_t count;
	int r = store_check_name("tag", tag, err);
	if (r == 0)
		r = store_checkpoint_list(engine->store, NULL, &list, &count, err);
	if (r != 0)
		return r;
	for (size_t i = 0; i < count; i++) {
		if (r == 0 && strcmp(list[i].tag, tag) == 0) {
			err_set(err, ERR_STATE, EEXIST, "tag '%s': it names checkpoint %.8s already", tag, list[i].id);
			r = err_hint(err, "choose another tag");
		}
		store_checkpoint_free(&list[i]);
	}
	free(list);
	return r;
}

static struct take *take_new(struct ckpt_engine *engine, const struct ckpt_request *request)
{
	struct take *take = xcalloc(1, sizeof(*take));
	take->engine = engine;
	take->live = request->live;
	take->full = request->full;
	take->periodic = request->periodic;
	take->max_rate = request->max_rate;
	take->settled = request->instant == CKPT_INSTANT_SETTLED;
	take->tag = request->tag ? xstrdup(request->tag) : NULL;
	take->message = request->message ? xstrdup(request->message) : NULL;
	take->group = request->group;
	take->fd = take->sums_fd = -1;
	take->start_ns = clock_now_ns();
	take->result.live = request->live;
	ckpt_position(engine, take->result.parent);
	return take;
}

static int check_request(struct ckpt_engine *engine, const struct ckpt_request *request, struct err *err)
{
	for (unsigned i = 0; i < engine->disk_count; i++) {
		if (engine->disks[i].unsafe) {
			err_set(err, ERR_STATE, EIO, "disk %s: an earlier checkpoint could not make its layer durable",
				engine->disks[i].name);
			return err_hint(err,
					"see why the disk's filesystem fails, stop the VM and run `qemu-img check %s`",
					engine->disks[i].path);
		}
	}
	return request->tag ? check_tag(engine, request->tag, err) : 0;
}

static int stage(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	int r = store_draft_begin(engine->store, &take->draft, err);
	if (r != 0)
		return r;
	snprintf(take->result.id, sizeof(take->result.id), "%s", store_draft_id(take->draft));
	pthread_mutex_lock(&engine->lock);
	memcpy(engine->progress.id, take->result.id, sizeof(engine->progress.id));
	pthread_mutex_unlock(&engine->lock);
	r = store_draft_memory_layer(take->draft, take->memory_layer, &take->fd, &take->sums_fd, err);
	if (r != 0)
		take->fd = take->sums_fd = -1; /* closed by whom failed */
	else
		r = store_layer_cipher(engine->store, take->memory_layer, true, &take->cipher, err);
	if (r == 0)
		r = take_stage_disks(take, err);
	if (r == 0)
		r = engine_check_cancel(engine, err);
	/* Last, as from here on the guest pays for its writes. */
	if (r == 0)
		r = take_stage_memory(take, err);
	if (r == 0)
		r = engine_check_cancel(engine, err);
	return r == 0 ? fault_check(FAULT_TAKE_STAGED, err) : r;
}

/*
 * The loop stands before the vCPUs do: each vCPU thread saves its local APIC on its way out, so an interrupt that a
 * device raised after that would be in the virtqueue's used ring but in no saved state, and a guest that goes back
 * would wait for it for ever.
 */
static int stop_machine(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	loop_park_request(engine->loop);
	loop_park_wait(engine->loop);
	take->parked = true;
	take->pause_start_ns = clock_now_ns();
	if (vm_is_quiesced(engine->vm))
		return 0;
	take->stopped = true;
	vm_quiesce_request(engine->vm);
	return vm_quiesce_wait(engine->vm, err);
}

static void count_inflight(struct take *take)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		const struct component *c = &take->engine->components[take->disks[i].disk->component];
		struct component_inflight inflight = {0};
		if (c->inflight)
			c->inflight(c->opaque, &inflight);
		take->disks[i].layer.inflight_reads = inflight.reads;
		take->disks[i].layer.inflight_writes = inflight.writes;
	}
}

/* Nothing from here to the end of the pause allocates or touches a file. */
static int pause_and_capture(struct take *take, struct err *err)
{
	struct ckpt_engine *engine = take->engine;
	struct ckpt_result *result = &take->result;
	int r = stop_machine(take, err);
	if (r == 0)
		r = fault_check(FAULT_TAKE_QUIESCED, err);
	uint64_t quiesced_ns = clock_now_ns();
	if (r == 0)
		r = state_set_capture(&engine->captured, err);
	if (r == 0) {
		count_inflight(take);
		r = take_check_disks(take, err);
	}
	if (r == 0)
		r = fault_check(FAULT_TAKE_CAPTURED, err);
	uint64_t state_ns = clock_now_ns();
	/* Memory before the disks, as it can fail and they cannot: until the switch a failure is without any effect. */
	if (r == 0)
		r = take_capture_memory(take, err);
	uint64_t memory_ns = clock_now_ns();
	/* The others' stops take their time, in which this one is captured. It asks the kernel to send and to receive, as there is no other way to wait for processes. */
	if (r == 0)
		r = engine_meet(engine, take->group, CKPT_MEET_STOPPED, result->id, err);
	uint64_t met_ns = clock_now_ns();
	if (r != 0)
		return r;
	for (unsigned i = 0; i < take->disk_count; i++) {
		if (take->disks[i].unchanged)
			continue;
		take->disks[i].disk->sealed_at[0] = '\0';
		cow_overlay_switch(take->disks[i].overlay);
	}
	take->switched = true;
	uint64_t disks_ns = clock_now_ns();
	/* A checkpoint that is not live saves memory before completions of requests in flight can change it: the loop
	 * stays parked. */
	uint64_t end_ns = take->live ? take_release_machine(take) : clock_now_ns();
	result->quiesce_ns = quiesced_ns - take->pause_start_ns;
	result->state_ns = state_ns - quiesced_ns;
	result->memory_ns = memory_ns - state_ns;
	result->group_ns = met_ns - memory_ns;
	result->disks_ns = disks_ns - met_ns;
	result->resume_ns = end_ns - disks_ns;
	result->pause_start_ns = take->pause_start_ns;
	result->pause_ns = end_ns - take->pause_start_ns;
	result->captured_ns = end_ns - take->start_ns;
	result->created_wall_ns = clock_wall_ns();
	return 0;
}

static void fill_captured(struct take *take)
{
	struct memcow_stats stats;
	struct ckpt_result *result = &take->result;
	store_draft_switched(take->draft);
	if (take->live)
		histogram_record(&take->engine->pauses, result->pause_ns);
	memcow_get_stats(take->engine->memcow, &stats);
	result->total_pages = stats.total_pages;
	result->armed_again_pages = stats.armed_again_pages;
	result->stage_ns = stats.arm_ns;
	result->stage_passes = stats.arm_passes;
	result->disk_count = take->disk_count;
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct ckpt_disk_result *disk = &result->disks[i];
		const struct store_disk_layer *layer = &take->disks[i].layer;
		_Static_assert(sizeof(disk->name) >= sizeof(layer->disk), "a disk's name fits");
		memcpy(disk->name, layer->disk, sizeof(layer->disk));
		memcpy(disk->layer, layer->layer, sizeof(layer->layer));
		disk->inflight_writes = layer->inflight_writes;
		disk->inflight_reads = layer->inflight_reads;
	}
}

/* The guest stands: nobody may come between. */
static int pause_urgently(struct take *take, struct err *err)
{
	int nice = priority_urgent();
	int r = pause_and_capture(take, err);
	priority_restore(nice);
	return r;
}

/* The VM runs on while what the first pause found wanting is made ready. */
static int pause_again(struct take *take, int (*restage)(struct take *take, struct err *err), struct err *err)
{
	take_release_machine(take);
	if (err)
		*err = ERR_INIT;
	int r = restage(take, err);
	return r == 0 ? pause_urgently(take, err) : r;
}

static int capture(struct take *take, struct err *err)
{
	int r = stage(take, err);
	if (r == 0)
		r = engine_meet(take->engine, take->group, CKPT_MEET_STAGED, take->result.id, err);
	if (r != 0)
		return r;
	engine_set_phase(take->engine, "pause");
	r = pause_urgently(take, err);
	/* Disks are looked at first, and only once. */
	if (r == -ESTALE)
		r = pause_again(take, take_restage_disks, err);
	if (r == -ENOBUFS)
		r = pause_again(take, take_restage_memory, err);
	if (take->switched)
		fill_captured(take);
	return r == 0 ? fault_check(FAULT_TAKE_RESUMED, err) : r;
}

/* This thread makes room often, and with a short slice has its processor back at once. */
static void prepare_scheduling(struct ckpt_engine *engine, cpu_set_t *before)
{
	cpu_set_t busy;
	bool shared = scheduling_leave_vcpus(engine->vm, before, &busy);
	priority_short_slice();
	memcow_set_processors(engine->memcow, &busy, shared);
	tracker_make_room(engine->tracker, shared ? 0 : SCHEDULING_ROOM_EACH_NS);
}

int ckpt_take(struct ckpt_engine *engine, const struct ckpt_request *request, struct ckpt_result *result,
	      struct err *err)
{
	int r = operation_begin(engine, OPERATION_TAKE, "", err);
	if (r != 0)
		return r;
	r = check_request(engine, request, err);
	if (r != 0) {
		operation_end(engine);
		return r;
	}
	pthread_mutex_lock(&engine->lock);
	engine->periodic = request->periodic;
	engine->deadline_ns = request->deadline_ns;
	pthread_mutex_unlock(&engine->lock);
	struct take *take = take_new(engine, request);
	cpu_set_t before;
	int nice = priority_nice();
	prepare_scheduling(engine, &before);
	r = capture(take, err);
	scheduling_restore(&before);
	priority_restore(nice);
	if (r == 0 && take->live && request->wait == CKPT_WAIT_CAPTURED) {
		*result = take->result;
		/* The thread ends the operation and frees the take. Without a thread the rest happens here. */
		if (engine_run_background(engine, take, NULL) == 0)
			return 0;
	}
	if (r == 0)
		r = take_persist(take, err);
	if (r != 0)
		take_fail(take);
	*result = take->result;
	take_free(take);
	operation_end(engine);
	return r;
}
