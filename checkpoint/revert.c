/*
 * Going back to a checkpoint, in place or in a machine that was just built.
 *
 *     check     manifest, state, index, layers, every memory page that is needed    the VM runs; fails without effect
 *     stage     fresh overlays made beside the disks' paths                         the same
 *     stop      vCPUs stand, devices drained, loop parked                           behind the drain a failure is sticky
 *     put back  memory, states, disks, completion logs
 *     resume
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
#include "checkpoint/engine_internal.h"
#include "checkpoint/operation.h"

struct revert {
	struct ckpt_engine *engine;
	struct store_pin *pin; /* it must not be removed half way */
	struct store_checkpoint checkpoint;
	struct page_index index;
	struct restore_layers layers;
	struct state_set states;
	char *layer_paths[CKPT_MAX_DISKS]; /* by the engine's disks */
	char *temp_paths[CKPT_MAX_DISKS];
	unsigned staged; /* how many overlays were made */
	/* The pages that differ from the checkpoint: no other need be looked at. NULL: not known. */
	uint64_t *which;
	uint64_t changed_pages;
};

static void revert_free(struct revert *rv)
{
	for (unsigned i = 0; i < rv->engine->disk_count; i++) {
		if (i < rv->staged && rv->temp_paths[i])
			unlink(rv->temp_paths[i]); /* renamed by now, if all went well */
		free(rv->layer_paths[i]);
		free(rv->temp_paths[i]);
	}
	free(rv->which);
	restore_close(&rv->layers);
	page_index_free(&rv->index);
	state_set_free(&rv->states);
	store_checkpoint_free(&rv->checkpoint);
	store_unpin(rv->pin);
}

/* --- check --- */

static const struct store_disk_layer *find_layer(const struct store_checkpoint *checkpoint, const char *disk)
{
	for (uint32_t i = 0; i < checkpoint->disk_count; i++) {
		if (strcmp(checkpoint->disks[i].disk, disk) == 0)
			return &checkpoint->disks[i];
	}
	return NULL;
}

static int check_machine(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	const struct store_checkpoint *c = &rv->checkpoint;
	if (c->memory_bytes != mem_size(engine->mem) || c->cpus != vm_cpus(engine->vm)) {
		err_set(err, ERR_STATE, EINVAL,
			"the checkpoint is of a machine with %llu MiB and %u CPUs, this one has %llu MiB and %u",
			(unsigned long long)(c->memory_bytes >> 20), c->cpus,
			(unsigned long long)(mem_size(engine->mem) >> 20), vm_cpus(engine->vm));
		return err_hint(err, "start it by itself: `vmcp run --from %.8s`", c->id);
	}
	if (c->disk_count != engine->disk_count)
		return err_set(err, ERR_STATE, EINVAL, "the checkpoint holds %u disks, this machine has %u",
			       c->disk_count, engine->disk_count);
	for (unsigned i = 0; i < engine->disk_count; i++) {
		const struct store_disk_layer *layer = find_layer(c, engine->disks[i].name);
		if (!layer || layer->size_bytes != cow_size(engine->disks[i].disk))
			return err_set(err, ERR_STATE, EINVAL, "disk %s: %s", engine->disks[i].name,
				       layer ? "its size differs from the checkpoint's"
					     : "the checkpoint does not hold it");
		int r = store_disk_layer_path(engine->store, layer->layer, layer->format, &rv->layer_paths[i], err);
		if (r != 0)
			return err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return 0;
}

static int read_state(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	CLEANUP_BUF struct buf state = BUF_INIT;
	int r = engine_read_index(engine, &rv->checkpoint, &rv->index, err);
	if (r == 0)
		r = store_checkpoint_read(engine->store, &rv->checkpoint, "state", &state, err);
	if (r == 0)
		r = state_set_init(&rv->states, engine->components, engine->component_count, err);
	return r == 0 ? state_set_decode(&rv->states, state.data, state.length, err) : r;
}

/* Where the memory that the VM has now differs from the checkpoint: what was written since its base, and where base and checkpoint
 * differ. Fails without effect: all pages are looked at then. */
static int find_changes(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	char base[STORE_ID_BYTES];
	uint64_t count;
	if (!tracker_has_base(engine->tracker))
		return 0;
	int r = tracker_harvest(engine->tracker, &count, err);
	if (r != 0)
		return r;
	rv->which = xcalloc(tracker_words(engine->tracker), sizeof(*rv->which));
	memcpy(rv->which, tracker_since(engine->tracker), tracker_words(engine->tracker) * sizeof(*rv->which));
	ckpt_position(engine, base);
	if (strcmp(base, rv->checkpoint.id) == 0)
		return 0;
	struct store_checkpoint from;
	struct page_index index = {0};
	r = store_checkpoint_get(engine->store, base, &from, err);
	if (r == 0) {
		r = engine_read_index(engine, &from, &index, err);
		store_checkpoint_free(&from);
	}
	if (r == 0)
		page_index_diff(&index, &rv->index, rv->which);
	page_index_free(&index);
	if (r == 0)
		return 0;
	free(rv->which);
	rv->which = NULL;
	return r;
}

/* Everything that can be refused, without touching the machine. `fresh`: memory is checked as it is read, as nothing runs
 * yet that a failure half way could hurt. */
static int check(struct revert *rv, const char *id, bool fresh, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	int r = store_pin(engine->store, id, &rv->pin, err);
	if (r == 0)
		r = store_checkpoint_get(engine->store, id, &rv->checkpoint, err);
	if (r != 0)
		return r;
	r = check_machine(rv, err);
	if (r == 0)
		r = read_state(rv, err);
	if (r == 0 && !fresh)
		r = restore_init(&rv->layers, engine->store, &rv->index, err);
	if (r == 0 && !fresh) {
		struct err unknown = ERR_INIT;
		if (find_changes(rv, &unknown) != 0)
			log_debug("revert to %.8s: all pages are looked at: %s", id, unknown.message);
		/* A pass of its own, while the VM runs: a bad page that is found half way through putting back would
		 * leave the machine neither here nor there. It also brings the layers into the page cache, for the
		 * pass that matters. */
		r = restore_verify(&rv->layers, rv->which, 0, rv->index.page_count, err);
	}
	if (r == 0)
		r = fault_check(FAULT_REVERT_CHECKED, err);
	return r == 0 ? 0 : err_prefix(err, "checkpoint %.8s", id);
}

/* --- stage --- */

static int make_overlay(const char *temp_path, const char *layer_path, const struct store_disk_layer *layer,
			struct err *err)
{
	struct cow_create create = {
		.size_bytes = layer->size_bytes,
		.backing = layer_path,
		.backing_format = strcmp(layer->format, "raw") == 0 ? COW_FORMAT_RAW : COW_FORMAT_QCOW2,
	};
	unlink(temp_path); /* of a process that died here */
	return cow_create(temp_path, &create, err);
}

static int stage(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	for (unsigned i = 0; i < engine->disk_count; i++) {
		const struct store_disk_layer *layer = find_layer(&rv->checkpoint, engine->disks[i].name);
		rv->temp_paths[i] = disk_temp_path(engine->disks[i].path);
		int r = make_overlay(rv->temp_paths[i], rv->layer_paths[i], layer, err);
		if (r != 0)
			return err_prefix(err, "disk %s: new overlay", engine->disks[i].name);
		rv->staged = i + 1;
	}
	return fault_check(FAULT_REVERT_STAGED, err);
}

/* --- put back --- */

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

/* The disk first stands on the new overlay, then the path is given to it: if opening it fails, the path still is the
 * old image. */
static int replace_disk(struct revert *rv, unsigned i, struct err *err)
{
	struct engine_disk *disk = &rv->engine->disks[i];
	int r = cow_replace(disk->disk, rv->temp_paths[i], err);
	if (r != 0)
		return r;
	disk->unsealed = NULL; /* gone with the old chain */
	disk->unsafe = false;
	r = fault_check(FAULT_REVERT_DISK_REPLACED, err);
	if (r != 0)
		return r;
	if (rename(rv->temp_paths[i], disk->path) != 0)
		return err_sys(err, errno, "rename %s to %s", rv->temp_paths[i], disk->path);
	return fault_check(FAULT_REVERT_DISK_RENAMED, err);
}

/* What the guest wrote after `check` found the changes. */
static int find_last_changes(struct revert *rv, struct err *err)
{
	struct tracker *tracker = rv->engine->tracker;
	uint64_t words = tracker_words(tracker), count;
	if (!rv->which)
		return 0;
	int r = tracker_collect(tracker, &count, err);
	if (r != 0)
		return r;
	CLEANUP_FREE uint64_t *late = xcalloc(words, sizeof(*late));
	for (uint64_t w = 0; w < words; w++) {
		late[w] = tracker_since(tracker)[w] & ~rv->which[w];
		rv->which[w] |= late[w];
	}
	return restore_verify(&rv->layers, late, 0, rv->index.page_count, err);
}

static int put_back_memory(struct revert *rv, bool fresh, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	struct err none = ERR_INIT;
	int r = fresh ? engine_map_memory(engine, rv->checkpoint.id, &rv->index, err)
		      : restore_memory(engine->mem, &rv->layers, rv->which, false, &rv->changed_pages, err);
	if (r != 0)
		return r;
	/* Before states are applied: these, and completion logs, write to memory. */
	if (tracker_start(engine->tracker, false, &none) != 0 || tracker_rewind(engine->tracker, &none) != 0)
		log_debug("written pages are not tracked: %s", none.message);
	return 0;
}

/* vCPUs stand, the loop is parked. */
static int put_back(struct revert *rv, bool fresh, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	int r = put_back_memory(rv, fresh, err);
	if (r == 0)
		r = fault_check(FAULT_REVERT_MEMORY, err);
	if (r == 0)
		r = state_set_apply(&rv->states, err);
	for (unsigned i = 0; i < engine->disk_count && r == 0 && !fresh; i++) {
		r = replace_disk(rv, i, err);
		if (r != 0)
			err_prefix(err, "disk %s", engine->disks[i].name);
	}
	/* After the disks, as requests without a logged completion are issued again, on the new chain, once the loop
	 * goes on. */
	return r == 0 ? state_set_apply_logs(&rv->states, err) : r;
}

static int stop_and_put_back(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	int r = drain(engine, err);
	if (r != 0)
		return r;
	loop_park_request(engine->loop);
	loop_park_wait(engine->loop);
	r = find_last_changes(rv, err);
	if (r == 0)
		r = put_back(rv, false, err);
	loop_unpark(engine->loop);
	return r;
}

static int half_way(struct ckpt_engine *engine, const char *id, struct err *err)
{
	struct err sticky = err && err->number ? *err : ERR_INIT;
	if (sticky.number == 0)
		err_set(&sticky, ERR_FAILED, EIO, "failed");
	err_prefix(&sticky, "revert to %.8s failed half way, the VM cannot run on", id);
	sticky.hint[0] = '\0';
	err_hint(&sticky, "revert to this or another checkpoint, or end the VM with `vmcp kill %s`", engine->vm_name);
	engine_set_broken(engine, &sticky);
	tracker_drop_base(engine->tracker);
	if (err)
		*err = sticky;
	return -sticky.number;
}

/* What must be durable, but need not hold up the guest. A crash before it leaves each path with one image or the other,
 * both whole. */
static void record(struct revert *rv)
{
	struct ckpt_engine *engine = rv->engine;
	struct err err = ERR_INIT;
	int r = fault_check(FAULT_REVERT_DONE, &err);
	for (unsigned i = 0; i < engine->disk_count && r == 0; i++)
		r = disk_sync_folder(engine->disks[i].path, &err);
	if (r == 0)
		r = store_vm_set_position(engine->store, engine->vm_name, rv->checkpoint.id, &err);
	if (r != 0)
		log_warn("revert to %.8s: done, but not recorded: %s", rv->checkpoint.id, err.message);
	engine_set_position(engine, rv->checkpoint.id);
}

static int revert(struct revert *rv, const char *id, bool resume, uint64_t *end_ns, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	bool ran = !vm_is_quiesced(engine->vm);
	int r = check(rv, id, false, err);
	if (r == 0)
		r = stage(rv, err);
	if (r != 0)
		return r;
	vm_quiesce_request(engine->vm);
	r = vm_quiesce_wait(engine->vm, err);
	if (r != 0) {
		if (ran && engine->broken.number == 0)
			vm_resume(engine->vm, false);
		return r;
	}
	r = stop_and_put_back(rv, err);
	if (r != 0)
		return half_way(engine, id, err);
	engine_set_broken(engine, NULL);
	if (resume)
		vm_resume(engine->vm, true);
	*end_ns = clock_now_ns();
	record(rv);
	return 0;
}

int ckpt_revert(struct ckpt_engine *engine, const char *id, bool resume, struct ckpt_revert_result *result,
		struct err *err)
{
	struct revert rv = {.engine = engine};
	uint64_t start_ns = clock_now_ns(), end_ns = 0;
	int r = operation_begin(engine, OPERATION_REVERT, err);
	if (r != 0)
		return r;
	loader_wait_filled(engine->loader);
	r = revert(&rv, id, resume, &end_ns, err);
	if (r == 0) {
		*result =
			(struct ckpt_revert_result){.restored_pages = rv.changed_pages, .revert_ns = end_ns - start_ns};
		snprintf(result->id, sizeof(result->id), "%s", rv.checkpoint.id);
	}
	revert_free(&rv);
	operation_end(engine);
	return r;
}

int ckpt_load(struct ckpt_engine *engine, const char *id, struct err *err)
{
	struct revert rv = {.engine = engine};
	int r = operation_begin(engine, OPERATION_REVERT, err);
	if (r != 0)
		return r;
	r = check(&rv, id, true, err);
	if (r == 0) {
		loop_park_request(engine->loop);
		loop_park_wait(engine->loop);
		r = put_back(&rv, true, err);
		loop_unpark(engine->loop);
		if (r == 0)
			engine_set_position(engine, rv.checkpoint.id);
		else
			half_way(engine, id, err);
	}
	revert_free(&rv);
	operation_end(engine);
	return r;
}

int ckpt_make_overlay(struct store *store, const char *id, const char *disk_name, const char *path, struct err *err)
{
	struct store_checkpoint checkpoint;
	CLEANUP_FREE char *layer_path = NULL;
	CLEANUP_FREE char *temp_path = disk_temp_path(path);
	int r = store_checkpoint_get(store, id, &checkpoint, err);
	if (r != 0)
		return r;
	r = store_note_image(store, path, err);
	if (r != 0) {
		store_checkpoint_free(&checkpoint);
		return r;
	}
	const struct store_disk_layer *layer = find_layer(&checkpoint, disk_name);
	if (!layer)
		r = err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %.8s holds no disk '%s'", id, disk_name);
	if (r == 0)
		r = store_disk_layer_path(store, layer->layer, layer->format, &layer_path, err);
	if (r == 0)
		r = make_overlay(temp_path, layer_path, layer, err);
	if (r == 0)
		r = fault_check(FAULT_OVERLAY_MADE, err);
	if (r == 0 && rename(temp_path, path) != 0)
		r = err_sys(err, errno, "rename %s to %s", temp_path, path);
	if (r == 0)
		r = disk_sync_folder(path, err);
	else
		unlink(temp_path);
	store_checkpoint_free(&checkpoint);
	return r;
}
