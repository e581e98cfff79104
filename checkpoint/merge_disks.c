/* Merging the layers below the disks of a running machine that no checkpoint names any more. See store/merge.c for the order. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/log.h"
#include "checkpoint/engine_internal.h"
#include "cowdisk/merge.h"

/* Fewer are not worth the copying: a byte is copied once for each such step up in size. */
#define LEAST_LAYERS 8u
/* Beside a guest; but where layers come faster than that merges them, the chain must not grow without bound. */
#define BYTES_PER_SECOND (64u << 20)
#define HURRY_LAYERS	 64u

static int adopt(struct ckpt_engine *engine, const struct cow_merged *merged, struct err *err)
{
	for (unsigned i = 0; i < engine->disk_count; i++) {
		struct err why = ERR_INIT;
		int r = cow_merge_adopt(merged, engine->disks[i].disk, &why);
		/* Not below this disk, or not any more. */
		if (r == 0 || r == -ESTALE)
			continue;
		if (err)
			*err = why;
		return err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return 0;
}

static int merge_run(struct ckpt_engine *engine, struct store_merging *merging, const struct store_run *run, const _Atomic bool *stop,
		     struct ckpt_disk_merge *done, struct err *err)
{
	const struct cow_merge merge = {
		.path = run->path,
		.layers = run->layers,
		.bytes_per_second = run->layers < HURRY_LAYERS ? BYTES_PER_SECOND : 0,
		.cancel = (const volatile bool *)stop,
	};
	struct cow_merged *merged;
	int r = cow_merge_prepare(&merge, &merged, err);
	if (r != 0)
		return r;
	r = store_merge_commit(merging, merged, err);
	if (r == 0) {
		done->layers += run->layers;
		done->runs++;
		done->copied_bytes += cow_merged_data_bytes(merged);
		r = adopt(engine, merged, err);
	}
	cow_merge_free(merged);
	return r;
}

static int find_runs(struct ckpt_engine *engine, struct store_merging *merging, struct store_run **list, size_t *count, struct err *err)
{
	const char *images[CKPT_MAX_DISKS];
	for (unsigned i = 0; i < engine->disk_count; i++)
		images[i] = engine->disks[i].path;
	return store_merge_runs(merging, images, engine->disk_count, LEAST_LAYERS, list, count, err);
}

/* One look, and what it found. *any: something was merged, so that there may be more by now. */
static int merge_some(struct ckpt_engine *engine, struct store_merging *merging, const _Atomic bool *stop, struct ckpt_disk_merge *done,
		      bool *any, struct err *err)
{
	struct store_run *list;
	size_t count;
	int r = find_runs(engine, merging, &list, &count, err);
	if (r != 0)
		return r;
	for (size_t i = 0; i < count && r == 0; i++) {
		struct err why = ERR_INIT;
		uint64_t before = done->runs;
		r = merge_run(engine, merging, &list[i], stop, done, &why);
		*any |= done->runs > before;
		if (store_merge_passes(r)) {
			log_debug("%s: not merged: %s", list[i].path, why.message);
			r = 0;
		} else if (r != 0 && err) {
			*err = why;
		}
	}
	store_runs_free(list, count);
	return r;
}

static int follow(struct ckpt_engine *engine, struct ckpt_disk_merge *done, struct err *err)
{
	int r = 0;
	for (unsigned i = 0; i < engine->disk_count && r == 0; i++) {
		unsigned turned;
		r = cow_merge_follow(engine->disks[i].disk, &turned, err);
		done->followed += turned;
		if (r != 0)
			err_prefix(err, "disk %s", engine->disks[i].name);
	}
	return r;
}

int ckpt_merge_disks(struct ckpt_engine *engine, const _Atomic bool *stop, struct ckpt_disk_merge *done, struct err *err)
{
	struct store_merging *merging;
	cpu_set_t before;
	bool any = true;
	*done = (struct ckpt_disk_merge){0};
	if (engine->disk_count == 0)
		return 0;
	int r = follow(engine, done, err);
	if (r == 0)
		r = store_merge_begin(engine->store, &merging, err);
	if (r != 0)
		return r;
	scheduling_leave_vcpus(engine->vm, &before, NULL);
	/* Not for ever where layers come as fast as they are merged: the caller has to remove what that leaves. */
	while (r == 0 && any && done->layers < HURRY_LAYERS && !atomic_load(stop)) {
		any = false;
		r = merge_some(engine, merging, stop, done, &any, err);
	}
	scheduling_restore(&before);
	store_merge_end(merging);
	if (done->runs > 0)
		log_debug("%llu disk layers merged into %llu", (unsigned long long)done->layers, (unsigned long long)done->runs);
	return r;
}
