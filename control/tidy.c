#include "control/tidy.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/priority.h"
#include "control/server.h"

/* All headers are read for it, so not more often; but where merges leave many files behind, as often as that takes a small part of the time. */
#define SWEEP_NS    30000000000ull
#define SWEEP_MANY  64u
#define SWEEP_SHARE 20u
/* While somebody else merges. */
#define BUSY_NS 2000000000ull
/* Between two looks, however often it is woken. */
#define REST_NS 500000000ull

struct tidy {
	struct control_target *target; /* immutable */
	pthread_t thread;
	bool runs;
	_Atomic bool stop; /* set once */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	/* under lock */
	bool woken;
	struct ckpt_disk_merge merged; /* in all */
	uint64_t swept_layers;
	char problem[sizeof(((struct err *)0)->message)];
	/* owner: the thread */
	bool sweep_due;
	uint64_t swept_ns, sweep_took_ns, superfluous; /* files that merges have left since the last sweep */
};

struct tidy *tidy_create(struct control_target *target)
{
	struct tidy *t = xcalloc(1, sizeof(*t));

	t->target = target;
	pthread_mutex_init(&t->lock, NULL);
	clock_cond_init(&t->changed);
	return t;
}

void tidy_wake(struct tidy *t)
{
	if (!t)
		return;
	pthread_mutex_lock(&t->lock);
	t->woken = true;
	pthread_cond_broadcast(&t->changed);
	pthread_mutex_unlock(&t->lock);
}

/* Under lock. Until it is woken, or then; 0: with no end. Not woken by a wake if `rest`. */
static void wait_until(struct tidy *t, uint64_t at_ns, bool rest)
{
	struct timespec at = clock_timespec(at_ns);

	while (!t->stop && (rest || !t->woken)) {
		if (at_ns == 0)
			pthread_cond_wait(&t->changed, &t->lock);
		else if (pthread_cond_timedwait(&t->changed, &t->lock, &at) == ETIMEDOUT)
			break;
	}
}

/* A machine that ends, or is replaced as the guest resets, takes its merge with it: the rest is done the next time. *any: there may be more. */
static int merge(struct tidy *t, bool *any, struct err *err)
{
	struct control_target *target = t->target;
	struct ckpt_disk_merge done = {0};
	int rc = 0;

	pthread_rwlock_rdlock(&target->machine_lock);
	if (target->machine && !atomic_load(&target->ending))
		rc = ckpt_merge_disks(machine_engine(target->machine), &target->ending, &done, err);
	pthread_rwlock_unlock(&target->machine_lock);
	*any = done.runs > 0;
	t->sweep_due |= *any;
	t->superfluous += done.layers - done.runs;
	pthread_mutex_lock(&t->lock);
	t->merged.runs += done.runs;
	t->merged.layers += done.layers;
	t->merged.copied_bytes += done.copied_bytes;
	t->merged.followed += done.followed;
	pthread_mutex_unlock(&t->lock);
	return rc;
}

static int sweep(struct tidy *t, struct err *err)
{
	struct store_gc_result result;
	uint64_t began = clock_now_ns();
	int rc = store_gc(t->target->store, &result, err);

	t->sweep_due = false;
	t->superfluous = 0;
	t->swept_ns = clock_now_ns();
	t->sweep_took_ns = t->swept_ns - began;
	pthread_mutex_lock(&t->lock);
	t->swept_layers += result.disk_layers;
	pthread_mutex_unlock(&t->lock);
	return rc;
}

static uint64_t next_sweep(const struct tidy *t)
{
	return t->swept_ns + (t->superfluous < SWEEP_MANY ? SWEEP_NS : min_u64(SWEEP_SHARE * t->sweep_took_ns, SWEEP_NS));
}

static void note(struct tidy *t, const struct err *err)
{
	pthread_mutex_lock(&t->lock);
	bool changed = strcmp(t->problem, err->message) != 0;
	snprintf(t->problem, sizeof(t->problem), "%s", err->message);
	pthread_mutex_unlock(&t->lock);
	if (changed && err->message[0])
		log_warn("disk layers: %s", err->message);
}

/* Returns when to look again though nobody wakes it; 0: never. */
static uint64_t work(struct tidy *t)
{
	struct err err = ERR_INIT;
	uint64_t now = clock_now_ns(), again = 0;
	bool any = false;
	int rc = merge(t, &any, &err);

	if (rc == -EBUSY || rc == -ECANCELED) {
		err = ERR_INIT;
		again = rc == -EBUSY ? now + BUSY_NS : 0;
		rc = 0;
	}
	if (!rc && t->sweep_due && !t->stop && clock_now_ns() >= next_sweep(t))
		rc = sweep(t, &err);
	if (t->sweep_due && !again)
		again = next_sweep(t);
	if (!rc && any)
		again = now;
	note(t, rc ? &err : &ERR_INIT);
	return again;
}

static void *main_of(void *opaque)
{
	struct tidy *t = opaque;
	uint64_t again = 0;

	pthread_setname_np(pthread_self(), "vmcp-tidy");
	priority_background();
	pthread_mutex_lock(&t->lock);
	while (!t->stop) {
		wait_until(t, again, false);
		/* Somebody's removals may have left some. */
		t->sweep_due |= t->woken;
		t->woken = false;
		pthread_mutex_unlock(&t->lock);
		again = t->stop ? 0 : work(t);
		pthread_mutex_lock(&t->lock);
		wait_until(t, clock_now_ns() + REST_NS, true);
	}
	pthread_mutex_unlock(&t->lock);
	return NULL;
}

int tidy_begin(struct tidy *t, struct err *err)
{
	int rc = pthread_create(&t->thread, NULL, main_of, t);

	t->runs = rc == 0;
	return rc ? err_sys(err, rc, "thread that tidies the store") : 0;
}

void tidy_end(struct tidy *t)
{
	if (!t)
		return;
	pthread_mutex_lock(&t->lock);
	t->stop = true;
	pthread_cond_broadcast(&t->changed);
	pthread_mutex_unlock(&t->lock);
}

void tidy_destroy(struct tidy *t)
{
	if (!t)
		return;
	if (t->runs)
		pthread_join(t->thread, NULL);
	pthread_cond_destroy(&t->changed);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

json_t *tidy_to_json(struct tidy *t)
{
	if (!t)
		return json_null();
	pthread_mutex_lock(&t->lock);
	json_t *result = json_pack("{s:I, s:I, s:I, s:I, s:I, s:o}", "merges", (json_int_t)t->merged.runs, "merged_layers",
				   (json_int_t)t->merged.layers, "copied_bytes", (json_int_t)t->merged.copied_bytes, "followed",
				   (json_int_t)t->merged.followed, "removed_layers", (json_int_t)t->swept_layers, "problem",
				   t->problem[0] ? json_string(t->problem) : json_null());
	pthread_mutex_unlock(&t->lock);
	return result;
}
