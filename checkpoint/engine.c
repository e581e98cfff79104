#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "checkpoint/engine_internal.h"
#include "checkpoint/operation.h"

static void free_engine(struct ckpt_engine *engine)
{
	loader_destroy(engine->loader);
	consolidated_free(engine->consolidated);
	store_unpin(engine->pin);
	page_index_free(&engine->base_index);
	memcow_destroy(engine->memcow);
	revert_cache_free(engine);
	tracker_destroy(engine->tracker);
	state_set_free(&engine->captured);
	for (unsigned i = 0; i < engine->disk_count; i++) {
		free(engine->disks[i].name);
		free(engine->disks[i].path);
	}
	free(engine->components);
	free(engine->vm_name);
	free(engine->vm_uuid);
	free(engine->config_text);
	pthread_mutex_destroy(&engine->lock);
	pthread_cond_destroy(&engine->changed);
	free(engine);
}

static int copy_disks(struct ckpt_engine *engine, const struct ckpt_engine_config *config, struct err *err)
{
	if (config->disk_count > CKPT_MAX_DISKS)
		return err_set(err, ERR_USAGE, E2BIG, "%u disks: at most %d can be checkpointed", config->disk_count,
			       CKPT_MAX_DISKS);
	for (unsigned i = 0; i < config->disk_count; i++) {
		const struct ckpt_disk *from = &config->disks[i];
		struct engine_disk *to = &engine->disks[i];
		to->name = xstrdup(from->name);
		to->disk = from->disk;
		to->component = from->component < config->component_count ? from->component : 0;
		engine->disk_count = i + 1;
		to->path = realpath(from->path, NULL);
		if (!to->path)
			return err_sys(err, errno, "disk %s: %s", from->name, from->path);
		int r = store_note_image(engine->store, to->path, err);
		if (r != 0)
			return err_prefix(err, "disk %s", from->name);
	}
	return 0;
}

/* Without userfaultfd, which takes no mapping of a file, what the guest writes is still tracked. */
static int create_memcow(struct ckpt_engine *engine, struct err *err)
{
	if (mem_fd(engine->mem) < 0)
		err_set(&engine->live_error, ERR_HOST, ENOTSUP, "memory that is mapped from a checkpoint cannot be write-protected");
	else if (memcow_create(engine->mem, true, &engine->memcow, &engine->live_error) == 0)
		return 0;
	engine->live_error.class = ERR_HOST;
	return memcow_create(engine->mem, false, &engine->memcow, err);
}

int ckpt_engine_create(const struct ckpt_engine_config *config, struct ckpt_engine **out, struct err *err)
{
	struct ckpt_engine *engine = xcalloc(1, sizeof(*engine));
	pthread_mutex_init(&engine->lock, NULL);
	pthread_cond_init(&engine->changed, NULL);
	engine->vm = config->vm;
	engine->loop = config->io_loop;
	engine->store = config->store;
	engine->mem = vm_memory(config->vm);
	engine->vm_name = xstrdup(config->vm_name);
	engine->vm_uuid = xstrdup(config->vm_uuid);
	engine->config_text = xstrdup(config->config_text ? config->config_text : "");
	engine->component_count = config->component_count;
	engine->components = xcalloc(config->component_count + 1, sizeof(*engine->components));
	memcpy(engine->components, config->components, config->component_count * sizeof(*engine->components));
	engine_set_position(engine, config->parent_id ? config->parent_id : "");
	int r = copy_disks(engine, config, err);
	if (r == 0)
		r = state_set_init(&engine->captured, engine->components, engine->component_count, err);
	if (r == 0)
		r = create_memcow(engine, err);
	if (r == 0)
		r = tracker_create(engine->vm, engine->loop, &engine->tracker, err);
	if (r != 0) {
		free_engine(engine);
		return r;
	}
	*out = engine;
	return 0;
}

void ckpt_engine_destroy(struct ckpt_engine *engine)
{
	if (!engine)
		return;
	ckpt_cancel(engine, NULL);
	ckpt_wait(engine, NULL, NULL);
	free_engine(engine);
}

/* --- one operation at a time --- */

static int busy(const struct ckpt_engine *engine, struct err *err)
{
	err_set(err, ERR_STATE, EBUSY, "%s: a checkpoint or revert is under way", engine->vm_name);
	return err_hint(err, "wait for it, or end it with `vmcp cancel %s`", engine->vm_name);
}

/* The background thread ended: its last act was to set the engine free. Under lock, which it does not take any more. */
static void join_background(struct ckpt_engine *engine)
{
	if (engine->thread_started && engine->activity != ENGINE_BACKGROUND)
		pthread_join(engine->thread, NULL);
	if (engine->activity != ENGINE_BACKGROUND)
		engine->thread_started = false;
}

int operation_begin(struct ckpt_engine *engine, enum operation_kind kind, const char *id, struct err *err)
{
	int r = 0;
	pthread_mutex_lock(&engine->lock);
	while (kind == OPERATION_REVERT && engine->activity == ENGINE_BACKGROUND)
		pthread_cond_wait(&engine->changed, &engine->lock);
	if (engine->activity != ENGINE_FREE) {
		r = busy(engine, err);
	} else if (kind == OPERATION_TAKE && engine->broken.number != 0) {
		if (err)
			*err = engine->broken;
		r = -engine->broken.number;
	} else {
		join_background(engine);
		engine->activity = ENGINE_BUSY;
		engine->cancellable = true;
		engine->periodic = false;
		engine->deadline_ns = 0;
		__atomic_store_n(&engine->cancel, false, __ATOMIC_RELAXED);
		engine->progress = (struct ckpt_progress){
			.number = ++engine->operations, .active = true, .reverts = kind == OPERATION_REVERT, .phase = kind == OPERATION_REVERT ? "check" : "stage"};
		snprintf(engine->progress.id, sizeof(engine->progress.id), "%s", id);
	}
	pthread_mutex_unlock(&engine->lock);
	return r;
}

void operation_end(struct ckpt_engine *engine)
{
	pthread_mutex_lock(&engine->lock);
	engine->activity = ENGINE_FREE;
	engine->cancellable = false;
	engine->progress = (struct ckpt_progress){.phase = ""};
	pthread_cond_broadcast(&engine->changed);
	pthread_mutex_unlock(&engine->lock);
}

/* --- the background thread --- */

static void *background_main(void *opaque)
{
	struct take *take = opaque;
	struct ckpt_engine *engine = take->engine;
	struct err err = ERR_INIT;
	pthread_setname_np(pthread_self(), "vmcp-persist");
	if (take_persist(take, &err) != 0) {
		take_fail(take);
		if (err.number != ECANCELED)
			log_error("checkpoint %.8s: %s", take->result.id, err.message);
	}
	struct ckpt_result result = take->result;
	take_free(take);
	pthread_mutex_lock(&engine->lock);
	engine->last = result;
	engine->last_err = err;
	engine->have_last = true;
	pthread_mutex_unlock(&engine->lock);
	operation_end(engine);
	return NULL;
}

int engine_run_background(struct ckpt_engine *engine, struct take *take, struct err *err)
{
	pthread_mutex_lock(&engine->lock);
	engine->have_last = false;
	/* Before the thread starts, as it may end at once. */
	engine->activity = ENGINE_BACKGROUND;
	int r = pthread_create(&engine->thread, NULL, background_main, take);
	engine->thread_started = r == 0;
	if (r != 0)
		engine->activity = ENGINE_BUSY;
	pthread_mutex_unlock(&engine->lock);
	return r == 0 ? 0 : err_sys(err, r, "cannot start a thread");
}

int ckpt_wait(struct ckpt_engine *engine, struct ckpt_result *result, struct err *err)
{
	int r = 0;
	if (result)
		*result = (struct ckpt_result){0};
	pthread_mutex_lock(&engine->lock);
	while (engine->activity == ENGINE_BACKGROUND)
		pthread_cond_wait(&engine->changed, &engine->lock);
	join_background(engine);
	if (engine->have_last) {
		if (result)
			*result = engine->last;
		if (err)
			*err = engine->last_err;
		r = -engine->last_err.number;
		engine->have_last = false;
	}
	pthread_mutex_unlock(&engine->lock);
	return r;
}

int ckpt_wait_written(struct ckpt_engine *engine, struct ckpt_result *result, struct err *err)
{
	pthread_mutex_lock(&engine->lock);
	while (engine->activity == ENGINE_BACKGROUND && engine->progress.level < CKPT_WRITTEN)
		pthread_cond_wait(&engine->changed, &engine->lock);
	bool under_way = engine->activity == ENGINE_BACKGROUND;
	pthread_mutex_unlock(&engine->lock);
	result->written = under_way;
	return under_way ? 0 : ckpt_wait(engine, result, err);
}

enum who { WHO_ANY, WHO_PERIODIC, WHO_LATE };

static bool cancel(struct ckpt_engine *engine, enum who who, struct ckpt_progress *what)
{
	pthread_mutex_lock(&engine->lock);
	bool there = engine->activity != ENGINE_FREE && engine->cancellable && (engine->periodic || who != WHO_PERIODIC) &&
		     (who != WHO_LATE || (engine->deadline_ns && clock_now_ns() >= engine->deadline_ns));
	if (there)
		__atomic_store_n(&engine->cancel, true, __ATOMIC_RELAXED);
	if (there && what)
		*what = engine->progress;
	pthread_mutex_unlock(&engine->lock);
	return there;
}

bool ckpt_cancel(struct ckpt_engine *engine, struct ckpt_progress *what) { return cancel(engine, WHO_ANY, what); }

void ckpt_wait_end(struct ckpt_engine *engine, const struct ckpt_progress *what)
{
	pthread_mutex_lock(&engine->lock);
	while (engine->progress.number == what->number)
		pthread_cond_wait(&engine->changed, &engine->lock);
	pthread_mutex_unlock(&engine->lock);
}

bool ckpt_cancel_periodic(struct ckpt_engine *engine) { return cancel(engine, WHO_PERIODIC, NULL); }

bool ckpt_cancel_late(struct ckpt_engine *engine) { return cancel(engine, WHO_LATE, NULL); }

/* --- what others ask --- */

void engine_set_phase(struct ckpt_engine *engine, const char *phase)
{
	pthread_mutex_lock(&engine->lock);
	engine->progress.phase = phase;
	engine->progress.waits_for[0] = '\0';
	pthread_mutex_unlock(&engine->lock);
}

void engine_set_level(struct ckpt_engine *engine, enum ckpt_level level, uint64_t created_wall_ns)
{
	pthread_mutex_lock(&engine->lock);
	engine->progress.level = level;
	engine->progress.created_wall_ns = created_wall_ns;
	pthread_cond_broadcast(&engine->changed);
	pthread_mutex_unlock(&engine->lock);
}

const char *ckpt_level_name(enum ckpt_level level)
{
	static const char *const names[] = {[CKPT_NOTHING] = "", [CKPT_CAPTURED] = "captured", [CKPT_WRITTEN] = "written", [CKPT_DURABLE] = "durable"};
	return names[level];
}

void engine_report(void *opaque, const char *waits_for)
{
	struct ckpt_engine *engine = opaque;
	pthread_mutex_lock(&engine->lock);
	snprintf(engine->progress.waits_for, sizeof(engine->progress.waits_for), "%s", waits_for);
	pthread_mutex_unlock(&engine->lock);
}

int engine_check_cancel(struct ckpt_engine *engine, struct err *err)
{
	return __atomic_load_n(&engine->cancel, __ATOMIC_RELAXED) ? err_set(err, ERR_FAILED, ECANCELED, "the checkpoint was cancelled") : 0;
}

int engine_meet(struct ckpt_engine *engine, const struct ckpt_group *group, enum ckpt_meeting where, const char *checkpoint, struct err *err)
{
	return group ? group->meet(group->opaque, where, checkpoint, &engine->cancel, err) : 0;
}

int engine_end_cancellable(struct ckpt_engine *engine, struct err *err)
{
	pthread_mutex_lock(&engine->lock);
	bool cancelled = __atomic_load_n(&engine->cancel, __ATOMIC_RELAXED);
	engine->cancellable = cancelled;
	pthread_mutex_unlock(&engine->lock);
	return cancelled ? err_set(err, ERR_FAILED, ECANCELED, "the %s was cancelled", engine->progress.reverts ? "revert" : "checkpoint") : 0;
}

void ckpt_progress(struct ckpt_engine *engine, struct ckpt_progress *out)
{
	struct memcow_stats stats;
	pthread_mutex_lock(&engine->lock);
	*out = engine->progress;
	pthread_mutex_unlock(&engine->lock);
	memcow_get_stats(engine->memcow, &stats);
	bool saves = out->active && !out->reverts && strcmp(out->phase, "stage") != 0;
	out->total_pages = saves ? stats.scope_pages : stats.total_pages;
	/* Saved is what was handed to the writer, which may be held back; written is more where pages are written again. */
	out->done_pages = saves ? min_u64(stats.saved_pages, stats.written_bytes / PAGE_BYTES) + stats.zero_pages : 0;
}

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

/* Of more extents (24 MiB) it is not kept. */
#define KEEP_EXTENTS 0x100000u

void engine_keep_base(struct ckpt_engine *engine, const char *id, struct page_index *index)
{
	page_index_free(&engine->base_index);
	engine->base_id[0] = '\0';
	if (index->extent_count > KEEP_EXTENTS)
		return;
	snprintf(engine->base_id, sizeof(engine->base_id), "%s", id);
	engine->base_index = *index;
	*index = (struct page_index){0};
}

bool engine_take_base(struct ckpt_engine *engine, const char *id, struct page_index *out)
{
	if (!*id || strcmp(engine->base_id, id) != 0)
		return false;
	*out = engine->base_index;
	engine->base_index = (struct page_index){0};
	engine->base_id[0] = '\0';
	return true;
}

static void memory_damaged(void *opaque, const struct err *err) { engine_set_broken(opaque, err); }

int engine_map_memory(struct ckpt_engine *engine, const char *checkpoint, struct page_index *index, struct err *err)
{
	const struct loader_config config = {
		.vm = engine->vm,
		.store = engine->store,
		.checkpoint = checkpoint,
		.damaged = memory_damaged,
		.opaque = engine,
	};
	return loader_start(&config, index, &engine->loader, err);
}

/* It is held, so that it cannot be removed under the VM. If it is gone already, what was written since cannot be told from it. */
void engine_set_position(struct ckpt_engine *engine, const char *id)
{
	struct store_pin *before = engine->pin;
	struct err err = ERR_INIT;
	if (*id && strcmp(engine->position, id) == 0 && before)
		return;
	engine->pin = NULL;
	if (*id && store_pin(engine->store, id, &engine->pin, &err) != 0) {
		log_warn("%s: %s: the next checkpoint saves all memory", engine->vm_name, err.message);
		if (engine->tracker)
			tracker_drop_base(engine->tracker);
	}
	pthread_mutex_lock(&engine->lock);
	snprintf(engine->position, sizeof(engine->position), "%s", id);
	pthread_mutex_unlock(&engine->lock);
	store_unpin(before);
}

void ckpt_position(struct ckpt_engine *engine, char id[STORE_ID_BYTES])
{
	pthread_mutex_lock(&engine->lock);
	memcpy(id, engine->position, STORE_ID_BYTES);
	pthread_mutex_unlock(&engine->lock);
}

void engine_set_broken(struct ckpt_engine *engine, const struct err *err)
{
	pthread_mutex_lock(&engine->lock);
	engine->broken = err ? *err : ERR_INIT;
	pthread_mutex_unlock(&engine->lock);
}

int ckpt_check(struct ckpt_engine *engine, struct err *err)
{
	pthread_mutex_lock(&engine->lock);
	int r = -engine->broken.number;
	if (r != 0 && err)
		*err = engine->broken;
	pthread_mutex_unlock(&engine->lock);
	return r;
}

static struct ckpt_latency latency(const struct histogram *h)
{
	struct ckpt_latency out = {
		.count = h->count,
		.sum_ns = h->sum,
		.p50_ns = histogram_percentile(h, 500),
		.p99_ns = histogram_percentile(h, 990),
		.p999_ns = histogram_percentile(h, 999),
		.max_ns = h->max,
	};

	for (unsigned i = 0; i < CKPT_LATENCY_BUCKETS; i++)
		out.below[i] = histogram_count_below(h, CKPT_LATENCY_FIRST_POWER + i);
	return out;
}

void ckpt_history(struct ckpt_engine *engine, struct ckpt_history *out)
{
	const struct histogram *faults;
	*out = (struct ckpt_history){.pauses = latency(&engine->pauses)};
	memcow_get_history(engine->memcow, &faults, &out->throttled, &out->throttled_ns);
	out->cow_faults = latency(faults);
	out->written_pages_per_s = engine->written_rate;
}

void ckpt_memory_stats(struct ckpt_engine *engine, struct memcow_stats *out) { memcow_get_stats(engine->memcow, out); }
