/* Disks that are slow, stuck or broken while a machine takes checkpoints. See machine.h. */
#include "tests/inflight/machine.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/log.h"
#include "tests/lib/check.h"

#define SECOND_NS     1000000000ull
#define HELD_NS	      (2 * SECOND_NS)
#define IN_FLIGHT     256u
#define TAKES	      9u
#define LONG_ENOUGH_NS (20 * SECOND_NS)

static struct machine *start(uint32_t cluster_bytes)
{
	return machine_start(&(struct machine_shape){.disks = 2, .queues = 2, .cluster_bytes = cluster_bytes, .sectors = 4096, .seed = 1});
}

/* All kinds, on all disks and queues. */
static void issue(struct machine *m, unsigned count)
{
	static const enum guest_type types[] = {GUEST_READ, GUEST_WRITE, GUEST_FLUSH, GUEST_DISCARD, GUEST_ZEROES};
	for (unsigned i = 0; i < count; i++) {
		enum guest_type type = types[i / 4 % 5];
		uint64_t sectors = type == GUEST_FLUSH ? 0 : type == GUEST_DISCARD ? 128 : 8;
		guest_offer(m, i % 2, i / 2 % 2, type, sectors ? i * 13 % 3900 : 0, sectors, false);
	}
	guest_notify(m);
	machine_settle(m);
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static int take(struct machine *m, enum ckpt_wait wait, struct ckpt_result *result, struct err *err)
{
	const struct ckpt_request request = {.live = true, .wait = wait};
	machine_mark(m);
	return ckpt_take(m->engine, &request, result, err);
}

static void finish_and_go_back(struct machine *m, const char *id)
{
	uint8_t *layers[MACHINE_DISKS] = {0};
	machine_check_layers(m, id, layers);
	machine_check_disks(m);
	CHECK(machine_go_back(m, id, layers) == 0);
	for (unsigned d = 0; d < MACHINE_DISKS; d++)
		free(layers[d]);
}

/* Returns the median of the pauses; longest request-to-captured in *captured_ns. */
static uint64_t measure_pauses(const struct test_rule *rule, unsigned count, uint64_t *captured_ns)
{
	uint64_t pauses[TAKES];
	struct machine *m = start(65536);
	*captured_ns = 0;
	for (unsigned i = 0; i < TAKES; i++) {
		struct ckpt_result result, last;
		struct err err = ERR_INIT;
		unsigned recorded = 0;
		machine_set_rules(m, rule, rule ? 1 : 0);
		uint64_t issued_ns = clock_now_ns();
		issue(m, count);
		CHECK(take(m, CKPT_WAIT_CAPTURED, &result, &err) == 0);
		uint64_t taken_ns = clock_now_ns();
		for (unsigned d = 0; d < m->disk_count; d++)
			recorded += result.disks[d].inflight_reads + result.disks[d].inflight_writes;
		CHECK(recorded <= count && (!rule || recorded > 0));
		pauses[i] = result.pause_ns;
		*captured_ns = result.captured_ns > *captured_ns ? result.captured_ns : *captured_ns;
		/* In the last one the requests end at their disks' speed. */
		bool hurry = i < TAKES - 1;
		if (hurry)
			machine_set_rules(m, NULL, 0);
		guest_drain(m);
		machine_set_rules(m, NULL, 0);
		CHECK(ckpt_wait(m->engine, &last, &err) == 0);
		/* The requests are held from when they were issued, which was before the checkpoint was asked for. */
		CHECK(!rule || hurry || taken_ns + last.durable_ns >= issued_ns + HELD_NS);
		if (i == TAKES - 1)
			finish_and_go_back(m, result.id);
	}
	machine_end(m);
	qsort(pauses, TAKES, sizeof(pauses[0]), compare);
	return pauses[TAKES / 2];
}

/* With each operation of the disks lasting two seconds, a pause is what it is on fast ones. */
static void test_pause_does_not_wait(void)
{
	const struct test_rule slow = {.kinds = RULE_ALL, .least_ns = HELD_NS, .most_ns = HELD_NS};
	const unsigned counts[] = {1, IN_FLIGHT};
	for (unsigned i = 0; i < 2; i++) {
		uint64_t captured_fast_ns, captured_ns;
		uint64_t fast_ns = measure_pauses(NULL, counts[i], &captured_fast_ns);
		uint64_t slow_ns = measure_pauses(&slow, counts[i], &captured_ns);
		printf("%u in flight: median pause %.0f us on fast disks, %.0f us with every operation held for 2 s; captured after %.1f and %.1f ms "
		       "at most\n",
		       counts[i], (double)fast_ns / 1e3, (double)slow_ns / 1e3, (double)captured_fast_ns / 1e6, (double)captured_ns / 1e6);
		/* Twice, and a scheduler's slice for a host that does other things too: far from 2 s. */
		CHECK(slow_ns <= 2 * fast_ns + 10000000);
		CHECK(captured_ns < HELD_NS / 2);
	}
}

/* What the progress says, as soon as it says that something is waited for. */
static bool wait_for_report(struct machine *m, struct ckpt_progress *progress)
{
	uint64_t until = clock_now_ns() + LONG_ENOUGH_NS;
	do {
		usleep(1000);
		ckpt_progress(m->engine, progress);
	} while (progress->waits_for[0] == '\0' && clock_now_ns() < until);
	return progress->waits_for[0] != '\0';
}

static void check_text(const char *got, const char *wanted)
{
	CHECK(strstr(got, wanted) != NULL);
	if (!strstr(got, wanted))
		fprintf(stderr, "'%s' lacks '%s'\n", got, wanted);
}

struct taking {
	struct machine *m;
	struct ckpt_result result;
	struct err err;
	int r;
};

static void *take_in_thread(void *opaque)
{
	struct taking *t = opaque;
	t->r = ckpt_take(t->m->engine, &(struct ckpt_request){.live = true}, &t->result, &t->err);
	return NULL;
}

/* A disk whose writes do not end: the rest of the machine goes on, and a checkpoint says what it waits for, until it is cancelled. */
static void test_stuck_write(void)
{
	static const char stuck[] = "disk d1: a write of 4096 bytes at sector 640, for ";
	const struct test_rule hold = {.kinds = RULE_KIND(IO_WRITE), .file = "/d1.img", .hold = true};
	struct machine *m = start(0);
	struct ckpt_progress progress, what;
	struct ckpt_result result, last;
	struct store_checkpoint none;
	struct err err = ERR_INIT;
	struct taking again = {.m = m};
	pthread_t thread;
	machine_set_rules(m, &hold, 1);
	guest_offer(m, 1, 0, GUEST_WRITE, 640, 8, false);
	guest_offer(m, 1, 1, GUEST_WRITE, 8, 8, false);
	guest_offer(m, 1, 1, GUEST_READ, 8, 8, false);
	guest_offer(m, 0, 0, GUEST_WRITE, 640, 8, false);
	guest_notify(m);
	machine_settle(m);
	CHECK(take(m, CKPT_WAIT_CAPTURED, &result, &err) == 0);
	CHECK(wait_for_report(m, &progress));
	check_text(progress.waits_for, stuck);
	check_text(progress.waits_for, " s, and 1 others");
	CHECK(strcmp(progress.phase, "in-flight I/O") == 0 && strcmp(progress.id, result.id) == 0);
	CHECK(guest_reap(m) == 2 && m->guest->busy == 2);
	/* Its age is that of the request. */
	usleep(1100000);
	ckpt_progress(m->engine, &progress);
	CHECK(strtod(strstr(progress.waits_for, "for ") + 4, NULL) >= 1.0);
	CHECK(ckpt_cancel(m->engine, &what));
	CHECK(strcmp(what.id, result.id) == 0);
	check_text(what.waits_for, stuck);
	CHECK(ckpt_wait(m->engine, &last, &err) == -ECANCELED);
	check_text(err.message, stuck);
	CHECK(store_checkpoint_get(m->store, result.id, &none, &err) == -ENOENT);
	CHECK(m->guest->busy == 2);

	/* The next waits for the same, before its instant. */
	CHECK(pthread_create(&thread, NULL, take_in_thread, &again) == 0);
	CHECK(wait_for_report(m, &progress));
	check_text(progress.waits_for, stuck);
	CHECK(strcmp(progress.phase, "stage") == 0);
	CHECK(ckpt_cancel(m->engine, NULL));
	pthread_join(thread, NULL);
	CHECK(again.r == -ECANCELED);
	check_text(again.err.message, "a write of 4096 bytes at sector 640, for ");

	machine_end_everything(m);
	CHECK(take(m, CKPT_WAIT_DURABLE, &result, &err) == 0);
	finish_and_go_back(m, result.id);
	machine_end(m);
}

/* All requests have ended, but what makes the layer durable does not. */
static void test_stuck_sync(void)
{
	const struct test_rule hold = {.kinds = RULE_KIND(IO_SYNC), .hold = true};
	struct machine *m = start(65536);
	struct ckpt_progress what;
	struct ckpt_result result, last;
	struct err err = ERR_INIT;
	CHECK(take(m, CKPT_WAIT_DURABLE, &result, &err) == 0);
	guest_offer(m, 0, 0, GUEST_WRITE, 0, 8, false);
	guest_drain(m);
	machine_set_rules(m, &hold, 1);
	CHECK(take(m, CKPT_WAIT_CAPTURED, &result, &err) == 0);
	CHECK(wait_for_report(m, &what));
	check_text(what.waits_for, "disk d0: its metadata");
	CHECK(strcmp(what.phase, "disks") == 0);
	CHECK(ckpt_cancel(m->engine, &what));
	check_text(what.waits_for, "disk d0: its metadata");
	CHECK(ckpt_wait(m->engine, &last, &err) == -ECANCELED);
	check_text(err.message, "its metadata");
	machine_end_everything(m);
	CHECK(take(m, CKPT_WAIT_DURABLE, &result, &err) == 0);
	finish_and_go_back(m, result.id);
	machine_end(m);
}

struct reverting {
	struct machine *m;
	const char *id;
	struct ckpt_revert_result result;
	struct err err;
	int r;
};

static void *revert_in_thread(void *opaque)
{
	struct reverting *t = opaque;
	t->r = ckpt_revert(t->m->engine, t->id, true, &t->result, &t->err);
	return NULL;
}

/* A revert waits for a write that does not end, says so, and can be given up: the guest goes on, and hears of the write when it ends. */
static void test_stuck_revert(void)
{
	static const char stuck[] = "disk d1: a write of 4096 bytes at sector 640, for ";
	const struct test_rule hold = {.kinds = RULE_KIND(IO_WRITE), .hold = true};
	struct machine *m = start(0);
	struct ckpt_progress progress, what;
	struct ckpt_result result, next;
	struct err err = ERR_INIT;
	pthread_t thread;
	CHECK(take(m, CKPT_WAIT_DURABLE, &result, &err) == 0);
	struct reverting back = {.m = m, .id = result.id};
	machine_set_rules(m, &hold, 1);
	guest_offer(m, 1, 0, GUEST_WRITE, 640, 8, false);
	guest_offer(m, 0, 0, GUEST_READ, 8, 8, false);
	guest_notify(m);
	machine_settle(m);
	CHECK(pthread_create(&thread, NULL, revert_in_thread, &back) == 0);
	CHECK(wait_for_report(m, &progress));
	CHECK(progress.active && progress.reverts && strcmp(progress.id, result.id) == 0 && strcmp(progress.phase, "in-flight I/O") == 0);
	check_text(progress.waits_for, stuck);
	CHECK(m->vm.standing);
	CHECK(ckpt_cancel(m->engine, &what) && what.reverts);
	check_text(what.waits_for, stuck);
	pthread_join(thread, NULL);
	CHECK(back.r == -ECANCELED);
	check_text(back.err.message, stuck);
	CHECK(!m->vm.standing && ckpt_check(m->engine, &err) == 0);
	CHECK(!ckpt_cancel(m->engine, NULL));
	/* As if nothing had been. */
	guest_reap(m);
	CHECK(m->guest->busy == 1);
	machine_end_everything(m);
	CHECK(m->guest->busy == 0);
	CHECK(take(m, CKPT_WAIT_DURABLE, &next, &err) == 0);
	CHECK(strcmp(next.parent, result.id) == 0);
	finish_and_go_back(m, next.id);
	machine_end(m);
}

static bool is_sealed(struct machine *m, const struct ckpt_disk_result *disk)
{
	struct cow_disk *opened;
	struct cow_io *io;
	char *path = NULL;
	struct err err = ERR_INIT;
	CHECK(store_disk_layer_path(m->store, disk->layer, "qcow2", &path, &err) == 0);
	CHECK(cow_io_create(NULL, &io, &err) == 0);
	/* Whoever may still write a layer holds its lock. */
	int r = cow_open(io, path, COW_OPEN_READONLY, &opened, &err);
	CHECK(r == 0 || r == -EBUSY);
	if (r == 0)
		cow_close(opened, NULL);
	cow_io_destroy(io);
	free(path);
	return r == 0;
}

/* The layer of one disk cannot be made durable for now: those of the others are sealed meanwhile. */
static void test_disks_are_sealed_together(void)
{
	/* As the kernel calls an image from whose name the overlay's rename has taken it. */
	const struct test_rule hold = {.kinds = RULE_KIND(IO_SYNC), .file = "/d0.img (deleted)", .hold = true};
	struct machine *m = start(65536);
	struct ckpt_progress progress;
	struct ckpt_result result, last;
	struct err err = ERR_INIT;
	guest_offer(m, 0, 0, GUEST_WRITE, 0, 8, false);
	guest_offer(m, 1, 0, GUEST_WRITE, 0, 8, false);
	guest_drain(m);
	machine_set_rules(m, &hold, 1);
	CHECK(take(m, CKPT_WAIT_CAPTURED, &result, &err) == 0);
	CHECK(wait_for_report(m, &progress));
	check_text(progress.waits_for, "disk d0: its metadata");
	uint64_t until = clock_now_ns() + LONG_ENOUGH_NS;
	while (!is_sealed(m, &result.disks[1]) && clock_now_ns() < until)
		usleep(1000);
	CHECK(is_sealed(m, &result.disks[1]));
	CHECK(!is_sealed(m, &result.disks[0]));
	machine_end_everything(m);
	CHECK(ckpt_wait(m->engine, &last, &err) == 0 && last.durable);
	finish_and_go_back(m, last.id);
	machine_end(m);
}

/* More requests than the ring's submission queue takes hang on one disk: the other does not hear of it. */
static void test_stuck_disk_holds_up_no_other(void)
{
	const struct test_rule hold = {.kinds = RULE_ALL, .file = "/d0.img", .hold = true};
	struct machine *m = start(0);
	machine_set_rules(m, &hold, 1);
	for (unsigned i = 0; i < 400; i++)
		guest_offer(m, 0, i % 2, i % 3 ? GUEST_READ : GUEST_WRITE, i * 8, 8, false);
	guest_notify(m);
	machine_settle(m);
	CHECK(machine_held(m) == 400);
	for (unsigned i = 0; i < 50; i++)
		guest_offer(m, 1, i % 2, i % 3 ? GUEST_READ : GUEST_WRITE, i * 8, 8, false);
	guest_notify(m);
	uint64_t until = clock_now_ns() + LONG_ENOUGH_NS;
	while (m->guest->busy > 400 && clock_now_ns() < until) {
		guest_reap(m);
		usleep(100);
	}
	CHECK(m->guest->busy == 400);
	machine_end_everything(m);
	machine_check_disks(m);
	machine_end(m);
}

/* Requests that were in flight fail: the guest that goes back hears the same. */
static void test_errors_in_both_copies(uint32_t cluster_bytes)
{
	const struct test_rule hold = {.kinds = RULE_ALL, .hold = true};
	const struct test_rule fail = {.kinds = RULE_KIND(IO_READ) | RULE_KIND(IO_WRITE), .error_percent = 100, .error = EIO};
	struct machine *m = start(cluster_bytes);
	struct ckpt_result result, last;
	struct err err = ERR_INIT;
	unsigned good = 0, bad = 0;
	machine_set_rules(m, &hold, 1);
	for (unsigned i = 0; i < 20; i++)
		guest_offer(m, i % 2, 0, i % 4 < 2 ? GUEST_READ : GUEST_WRITE, 200 * i, 8, false);
	guest_notify(m);
	machine_settle(m);
	unsigned held = machine_held(m);
	CHECK(held > 0);
	CHECK(take(m, CKPT_WAIT_CAPTURED, &result, &err) == 0);
	m->may_fail = true;
	machine_set_rules(m, &fail, 1);
	machine_end_everything(m);
	m->may_fail = false;
	CHECK(ckpt_wait(m->engine, &last, &err) == 0);
	for (unsigned i = 0; i < GUEST_SLOTS; i++) {
		good += m->outcomes[i].seen && m->outcomes[i].status == 0;
		bad += m->outcomes[i].seen && m->outcomes[i].status == 1;
	}
	CHECK(good + bad == 20 && bad >= 10);
	m->may_fail = true; /* they do again */
	finish_and_go_back(m, result.id);
	machine_end(m);
}

int main(void)
{
	log_set_level(LOG_LEVEL_ERROR);
	test_pause_does_not_wait();
	test_stuck_write();
	test_stuck_sync();
	test_stuck_revert();
	test_disks_are_sealed_together();
	test_stuck_disk_holds_up_no_other();
	test_errors_in_both_copies(0);
	test_errors_in_both_copies(65536);
	return check_report();
}
