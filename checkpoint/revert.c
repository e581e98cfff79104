/* A checkpoint in a machine that was just built, and what this shares with going back in place: rewind.c. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fault.h"
#include "base/log.h"
#include "checkpoint/operation.h"
#include "checkpoint/revert_internal.h"

struct revert {
	struct ckpt_engine *engine;
	struct store_pin *pin; /* it must not be removed half way */
	struct store_checkpoint checkpoint;
	struct page_index index;
	struct state_set states;
	char *layer_paths[CKPT_MAX_DISKS]; /* by the engine's disks */
};

static void revert_free(struct revert *rv)
{
	for (unsigned i = 0; i < rv->engine->disk_count; i++)
		free(rv->layer_paths[i]);
	page_index_free(&rv->index);
	state_set_free(&rv->states);
	store_checkpoint_free(&rv->checkpoint);
	store_unpin(rv->pin);
}

/* --- check --- */

const struct store_disk_layer *revert_find_layer(const struct store_checkpoint *checkpoint, const char *disk)
{
	for (uint32_t i = 0; i < checkpoint->disk_count; i++) {
		if (strcmp(checkpoint->disks[i].disk, disk) == 0)
			return &checkpoint->disks[i];
	}
	return NULL;
}

int revert_check_machine(struct ckpt_engine *engine, const struct store_checkpoint *c, char *layer_paths[CKPT_MAX_DISKS],
			 struct err *err)
{
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
		const struct store_disk_layer *layer = revert_find_layer(c, engine->disks[i].name);
		if (!layer || layer->size_bytes != cow_size(engine->disks[i].disk))
			return err_set(err, ERR_STATE, EINVAL, "disk %s: %s", engine->disks[i].name,
				       layer ? "its size differs from the checkpoint's"
					     : "the checkpoint does not hold it");
		int r = store_disk_layer_path(engine->store, layer->layer, layer->format, &layer_paths[i], err);
		if (r != 0)
			return err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return 0;
}

int revert_read_state(struct ckpt_engine *engine, const struct store_checkpoint *checkpoint, struct page_index *index,
		      struct state_set *states, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	int r = engine_read_index(engine, checkpoint, index, err);
	if (r == 0)
		r = store_checkpoint_read(engine->store, checkpoint, "state", &state, err);
	if (r == 0)
		r = state_set_init(states, engine->components, engine->component_count, err);
	return r == 0 ? state_set_decode(states, state.data, state.length, err) : r;
}

/* Everything that can be refused, without touching the machine; but memory is checked as it is read, as nothing runs
 * yet that a failure half way could hurt. */
static int check(struct revert *rv, const char *id, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	int r = store_pin(engine->store, id, &rv->pin, err);
	if (r == 0)
		r = store_checkpoint_get(engine->store, id, &rv->checkpoint, err);
	if (r != 0)
		return r;
	r = revert_check_machine(engine, &rv->checkpoint, rv->layer_paths, err);
	if (r == 0)
		r = revert_read_state(engine, &rv->checkpoint, &rv->index, &rv->states, err);
	if (r == 0)
		r = fault_check(FAULT_REVERT_CHECKED, err);
	return r == 0 ? 0 : err_prefix(err, "checkpoint %.8s", id);
}

/* --- disks --- */

/* What a start checks of a seal: the file is there as far as it was. Its checksum would take as long as the disk is large. */
static int check_length(const char *path, const struct store_disk_layer *layer, struct err *err)
{
	struct stat st;
	if (stat(path, &st) != 0)
		return err_sys(err, errno, "disk %s: %s", layer->disk, path);
	if ((uint64_t)st.st_size >= layer->file_bytes || !S_ISREG(st.st_mode))
		return 0;
	err_set(err, ERR_DAMAGED, EBADMSG, "disk %s: %s is cut off: it has %llu bytes, and had %llu when it was sealed", layer->disk, path,
		(unsigned long long)st.st_size, (unsigned long long)layer->file_bytes);
	return err_hint(err, "`vmcp verify` says which checkpoints need it, and which are whole");
}

int revert_make_overlay(const char *temp_path, const char *layer_path, const struct store_disk_layer *layer, struct err *err)
{
	struct cow_create create = {
		.size_bytes = layer->size_bytes,
		.backing = layer_path,
		.backing_format = store_disk_layer_format(layer),
		.temporary = true,
	};
	int r = check_length(layer_path, layer, err);
	if (r != 0)
		return r;
	unlink(temp_path); /* of a process that died here */
	return cow_create(temp_path, &create, err);
}

/* --- put back --- */

/* Mapped from the layers, or read from them where huge pages leave no choice. */
static int fill_memory(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	struct restore_layers layers;
	uint64_t changed;
	if (mem_fd(engine->mem) < 0)
		return engine_map_memory(engine, rv->checkpoint.id, &rv->index, err);
	int r = restore_init(&layers, engine->store, &rv->index, err);
	if (r == 0)
		r = restore_memory(engine->mem, &layers, NULL, true, &changed, err);
	restore_close(&layers);
	return r;
}

static int put_back_memory(struct revert *rv, struct err *err)
{
	struct ckpt_engine *engine = rv->engine;
	struct err none = ERR_INIT;
	int r = fill_memory(rv, err);
	if (r != 0)
		return r;
	/* Before states are applied: these, and completion logs, write to memory. */
	if (tracker_start(engine->tracker, false, &none) != 0 || tracker_rewind(engine->tracker, &none) != 0)
		log_debug("written pages are not tracked: %s", none.message);
	return 0;
}

/* vCPUs stand, the loop is parked. */
static int put_back(struct revert *rv, struct err *err)
{
	int r = put_back_memory(rv, err);
	if (r == 0)
		r = fault_check(FAULT_REVERT_MEMORY, err);
	if (r == 0)
		r = state_set_apply(&rv->states, err);
	/* Requests without a logged completion are issued again once the loop goes on. */
	return r == 0 ? state_set_apply_logs(&rv->states, err) : r;
}

int revert_half_way(struct ckpt_engine *engine, const char *id, struct err *err)
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

int ckpt_load(struct ckpt_engine *engine, const char *id, struct err *err)
{
	struct revert rv = {.engine = engine};
	int r = operation_begin(engine, OPERATION_REVERT, id, err);
	if (r != 0)
		return r;
	r = check(&rv, id, err);
	if (r == 0) {
		loop_park_request(engine->loop);
		loop_park_wait(engine->loop);
		r = put_back(&rv, err);
		loop_unpark(engine->loop);
		if (r == 0)
			engine_set_position(engine, rv.checkpoint.id);
		else
			revert_half_way(engine, id, err);
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
	const struct store_disk_layer *layer = revert_find_layer(&checkpoint, disk_name);
	if (!layer)
		r = err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %.8s holds no disk '%s'", id, disk_name);
	if (r == 0)
		r = store_disk_layer_path(store, layer->layer, layer->format, &layer_path, err);
	if (r == 0)
		r = revert_make_overlay(temp_path, layer_path, layer, err);
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
