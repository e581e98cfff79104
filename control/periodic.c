#include "control/periodic.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/priority.h"
#include "control/events.h"
#include "control/server.h"
#include "control/tidy.h"
#include "machine/config.h"

/* Removals in one go: who takes a checkpoint may have to wait for them, for some milliseconds. What is left over comes next time. */
#define MOST_REMOVALS 16
/* So many wait to be removed, at most: on a busy host taking them is faster than removing, and the store must stay bounded. Intervals are skipped then. */
#define MOST_WAITING 40
#define HOUSE_WAIT_NS 200000000ull

struct periodic {
	struct control_target *target; /* immutable, like the next three */
	uint64_t every_ns;
	struct store_keep keep;
	bool runs;
	pthread_t taker, keeper;
	_Atomic bool stop; /* set once; read without the lock while work is under way */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	/* under lock */
	bool work;	  /* for the keeper */
	uint64_t waiting; /* to be removed: what the keeper found, and what was taken since */
	uint64_t taken, skipped, failed, cancelled, removed, removed_bytes;
	uint64_t consolidations, merged_layers, copied_pages, shared_pages;
	char last[STORE_ID_BYTES];
	char problem[512], house_problem[512]; /* the present ones, "" if all is well */
};

int periodic_override(struct machine_config *config, const char *every, const char *keep, struct err *err)
{
	if (every && !config_parse_every(every, &config->every_ns)) {
		err_set(err, ERR_USAGE, EINVAL, "--every: '%s' is no time between checkpoints", every);
		err_hint(err, CONFIG_EVERY_HINT);
		return -EINVAL;
	}
	if (keep && !config_parse_keep(keep, &config->keep)) {
		err_set(err, ERR_USAGE, EINVAL, "--keep: '%s' is no number of checkpoints", keep);
		err_hint(err, CONFIG_KEEP_HINT);
		return -EINVAL;
	}
	return 0;
}

struct periodic *periodic_create(struct control_target *target, const struct machine_config *config)
{

	if (config->every_ns == 0)
		return NULL;
	struct periodic *p = xcalloc(1, sizeof(*p));
	p->target = target;
	p->every_ns = config->every_ns;
	p->keep = (struct store_keep){config->keep, config->keep_hourly, config->keep_daily};
	pthread_mutex_init(&p->lock, NULL);
	clock_cond_init(&p->changed);
	return p;
}

/* Under lock: waits until then, or the end, or with `for_work` until there is work. */
static void wait_until(struct periodic *p, uint64_t at_ns, bool for_work)
{
	struct timespec at = clock_timespec(at_ns);

	while (!p->stop && !(for_work && p->work))
		if (pthread_cond_timedwait(&p->changed, &p->lock, &at) == ETIMEDOUT)
			break;
}

/* The machine, held, or NULL: there is none, or it is about to go. */
static struct machine *hold_machine(struct control_target *target)
{
	pthread_rwlock_rdlock(&target->machine_lock);
	if (target->machine && !atomic_load(&target->ending))
		return target->machine;
	pthread_rwlock_unlock(&target->machine_lock);
	return NULL;
}

static void release_machine(struct control_target *target) { pthread_rwlock_unlock(&target->machine_lock); }

/* Tells a problem when it appears, changes or goes away. */
static void note_problem(struct periodic *p, char problem[512], const char *what, const struct err *err)
{
	char text[512] = "";

	if (err)
		snprintf(text, sizeof(text), "%s: %.400s", what, err->message);
	pthread_mutex_lock(&p->lock);
	bool changed = strcmp(problem, text) != 0;
	snprintf(problem, 512, "%s", text);
	/* The record has room for one. */
	snprintf(text, sizeof(text), "%s", p->problem[0] ? p->problem : p->house_problem);
	pthread_mutex_unlock(&p->lock);
	if (!changed)
		return;
	if (err)
		log_warn("%s: %s%s%s", what, err->message, err->hint[0] ? "; " : "", err->hint);
	else
		log_info("%s: all is well again", what);
	store_vm_set_note(p->target->store, p->target->name, text, NULL);
}

/* --- taking --- */

static int take(struct machine *machine, struct ckpt_result *result, struct err *err)
{
	const struct ckpt_request request = {.live = true, .periodic = true, .wait = CKPT_WAIT_DURABLE};

	return machine_checkpoint(machine, &request, result, err);
}

static void take_one(struct periodic *p)
{
	struct machine *machine = hold_machine(p->target);
	struct ckpt_result result;
	struct err err = ERR_INIT;

	if (!machine)
		return;
	int rc = machine_is_paused(machine) ? -EAGAIN : take(machine, &result, &err);
	release_machine(p->target);
	pthread_mutex_lock(&p->lock);
	if (rc == 0) {
		p->taken++;
		p->waiting++;
		memcpy(p->last, result.id, sizeof(p->last));
		p->work = true;
		pthread_cond_broadcast(&p->changed);
		events_post(p->target->events, "checkpoint",
			    json_pack("{s:s, s:s, s:b}", "checkpoint", result.id, "durability", "durable", "periodic", true));
	} else if (rc == -EBUSY) {
		p->skipped++; /* a user's operation goes ahead */
	} else if (rc == -ECANCELED) {
		p->cancelled++;
	} else if (rc != -EAGAIN || err.number) {
		p->failed++;
	}
	pthread_mutex_unlock(&p->lock);
	if (rc && rc != -EAGAIN && rc != -EBUSY)
		tidy_wake(p->target->tidy); /* it may have left layers */
	if (rc == 0 || (err.number && rc != -EBUSY && rc != -ECANCELED))
		note_problem(p, p->problem, "periodic checkpoint", rc ? &err : NULL);
}

static void *taker_main(void *opaque)
{
	struct periodic *p = opaque;
	uint64_t next = clock_now_ns();

	pthread_setname_np(pthread_self(), "vmcp-periodic");
	pthread_mutex_lock(&p->lock);
	for (;;) {
		uint64_t now = clock_now_ns();

		next += p->every_ns;
		/* One that is late is taken at once, so that a slow one now and then costs none. */
		if (now >= next + p->every_ns) {
			uint64_t missed = (now - next) / p->every_ns;

			p->skipped += missed;
			next += missed * p->every_ns;
		}
		wait_until(p, next, false);
		if (p->stop)
			break;
		if (p->waiting >= MOST_WAITING) {
			p->skipped++;
			continue;
		}
		pthread_mutex_unlock(&p->lock);
		take_one(p);
		pthread_mutex_lock(&p->lock);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* --- keeping house --- */

/* What a look at the store found: all that waits, unless it is as many as were asked for. */
static void note_waiting(struct periodic *p, size_t found)
{
	pthread_mutex_lock(&p->lock);
	if (found < MOST_REMOVALS || found > p->waiting)
		p->waiting = found;
	pthread_mutex_unlock(&p->lock);
}

static int remove_surplus(struct periodic *p, struct err *err)
{
	struct store *store = p->target->store;
	struct store_freed freed = {0};
	char(*ids)[STORE_ID_BYTES];
	size_t count;
	int rc = store_surplus(store, p->target->name, &p->keep, MOST_REMOVALS, &ids, &count, err);

	if (rc)
		return rc;
	note_waiting(p, count);
	rc = store_checkpoints_remove(store, (const char(*)[STORE_ID_BYTES])ids, count, &freed, err);
	free(ids);
	if (freed.disk_layers)
		tidy_wake(p->target->tidy);
	pthread_mutex_lock(&p->lock);
	p->waiting -= min_u64(p->waiting, count);
	p->removed += freed.checkpoints;
	p->removed_bytes += freed.bytes;
	pthread_mutex_unlock(&p->lock);
	return rc;
}

static int consolidate(struct periodic *p, struct err *err)
{
	struct machine *machine = hold_machine(p->target);
	struct ckpt_consolidation done = {0};

	if (!machine)
		return 0;
	int rc = ckpt_consolidate(machine_engine(machine), &p->target->ending, &done, err);
	release_machine(p->target);
	pthread_mutex_lock(&p->lock);
	p->consolidations += done.layers > 0;
	p->merged_layers += done.layers;
	p->copied_pages += done.pages;
	p->shared_pages += done.shared_pages;
	pthread_mutex_unlock(&p->lock);
	return rc == -ECANCELED ? 0 : rc;
}

static void *keeper_main(void *opaque)
{
	struct periodic *p = opaque;

	pthread_setname_np(pthread_self(), "vmcp-keep");
	priority_background();
	pthread_mutex_lock(&p->lock);
	while (!p->stop) {
		wait_until(p, UINT64_MAX / 2, true);
		p->work = false;
		pthread_mutex_unlock(&p->lock);
		struct err err = ERR_INIT;
		int rc = p->stop ? 0 : remove_surplus(p, &err);

		if (!rc && !p->stop)
			rc = consolidate(p, &err);
		note_problem(p, p->house_problem, "old checkpoints", rc ? &err : NULL);
		pthread_mutex_lock(&p->lock);
		/* Not for each one of 20 a second: several at once cost less. */
		if (!p->stop)
			wait_until(p, clock_now_ns() + HOUSE_WAIT_NS, false);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* --- life --- */

int periodic_begin(struct periodic *p, struct err *err)
{
	if (!p)
		return 0;
	int rc = pthread_create(&p->taker, NULL, taker_main, p);
	if (rc)
		return err_sys(err, rc, "thread of the periodic checkpoints");
	rc = pthread_create(&p->keeper, NULL, keeper_main, p);
	if (rc) {
		periodic_end(p);
		pthread_join(p->taker, NULL);
		return err_sys(err, rc, "thread of the periodic checkpoints");
	}
	p->runs = true;
	return 0;
}

void periodic_end(struct periodic *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	p->stop = true;
	pthread_cond_broadcast(&p->changed);
	pthread_mutex_unlock(&p->lock);
}

void periodic_destroy(struct periodic *p)
{
	if (!p)
		return;
	if (p->runs) {
		pthread_join(p->taker, NULL);
		pthread_join(p->keeper, NULL);
	}
	pthread_cond_destroy(&p->changed);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

json_t *periodic_to_json(struct periodic *p)
{
	pthread_mutex_lock(&p->lock);
	const char *problem = p->problem[0] ? p->problem : p->house_problem;
	json_t *result = json_pack(
		"{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o}", "every_ns", (json_int_t)p->every_ns, "keep",
		(json_int_t)p->keep.newest, "keep_hourly", (json_int_t)p->keep.hourly, "keep_daily", (json_int_t)p->keep.daily, "taken", (json_int_t)p->taken, "skipped", (json_int_t)p->skipped, "failed", (json_int_t)p->failed,
		"cancelled", (json_int_t)p->cancelled, "removed", (json_int_t)p->removed, "removed_bytes", (json_int_t)p->removed_bytes,
		"consolidations", (json_int_t)p->consolidations, "merged_layers", (json_int_t)p->merged_layers, "copied_pages",
		(json_int_t)p->copied_pages, "shared_pages", (json_int_t)p->shared_pages, "last_checkpoint", p->last[0] ? json_string(p->last) : json_null(), "problem",
		problem[0] ? json_string(problem) : json_null());
	pthread_mutex_unlock(&p->lock);
	return result;
}
