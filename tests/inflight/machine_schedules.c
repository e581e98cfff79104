/*
 * Random schedules of a whole machine: several disks with several queues, 1 to 512 requests of all kinds in flight, live checkpoints while
 * they are held, more requests behind them, errors, short transfers, cancelled checkpoints, and the way back. Checked each time: what the
 * checkpoint says was in flight; that each request completes once, in the running VM and after the revert, with the same status and the same
 * data; that the completions of the latter come from the checkpoint and not from the disk; that the sealed layers hold what was issued before
 * the checkpoint, and nothing else.
 *
 * Which operation ends when is told by the seed, but not at which instruction of the other threads: a schedule that failed fails again
 * mostly, not always.
 */
#include "tests/inflight/machine.h"

#include <errno.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "tests/inflight/schedules.h"

enum { SCHEDULES = 50, ROUNDS = 12 };

static unsigned long checkpoints, in_flight, given_up, failed, reverts, again, errors, cuts;

struct play {
	struct machine *m;
	uint64_t random;
	struct test_rule rules[2];
	bool held;  /* nothing ends by itself */
	bool broken; /* a checkpoint failed: its disk takes no further one */
};

static uint64_t pick(struct play *p, uint64_t below) { return pick_below(&p->random, below); }

static void offer_one(struct play *p, bool quiet)
{
	static const enum guest_type types[] = {GUEST_READ,  GUEST_READ,  GUEST_READ,	 GUEST_WRITE, GUEST_WRITE,
						GUEST_WRITE, GUEST_WRITE, GUEST_DISCARD, GUEST_ZEROES, GUEST_FLUSH};
	struct machine *m = p->m;
	unsigned disk = (unsigned)pick(p, m->disk_count), queue = (unsigned)pick(p, m->queue_count);
	enum guest_type type = types[pick(p, ARRAY_LENGTH(types) - !m->flushes)];
	uint64_t sectors = m->disks[disk].sectors, cluster = m->disks[disk].cluster_sectors;
	bool range = type == GUEST_DISCARD || type == GUEST_ZEROES;
	uint64_t count = 1 + pick(p, range ? 3 * cluster : GUEST_SECTORS);
	uint64_t sector = pick(p, pick(p, 2) ? sectors - count + 1 : min_u64(4 * cluster, sectors - count + 1));
	if (pick(p, 3) == 0)
		sector = round_down(sector, cluster);
	if (type == GUEST_FLUSH)
		sector = count = 0;
	guest_offer(m, disk, queue, type, sector, count, quiet);
}

static void choose_rules(struct play *p)
{
	struct test_rule *r = &p->rules[1];
	p->held = pick(p, 3) != 0;
	*r = (struct test_rule){.kinds = RULE_ALL, .hold = p->held, .most_ns = 2000000, .short_percent = pick(p, 2) ? 30 : 0};
	p->rules[0] = *r;
	p->rules[0].kinds = RULE_KIND(pick(p, 4) ? IO_READ : IO_WRITE);
	if (pick(p, 3) == 0) {
		p->rules[0].error_percent = 1 + (unsigned)pick(p, 20);
		p->rules[0].error = EIO;
		p->m->may_fail = true;
	}
	machine_set_rules(p->m, p->rules, 2);
}

static void make_traffic(struct play *p, unsigned wanted)
{
	for (unsigned n = 2 * wanted; n > 0 && p->m->guest->busy < wanted; n--) {
		offer_one(p, false);
		if (pick(p, 4) == 0)
			guest_notify(p->m);
		if (pick(p, 16) == 0) {
			machine_end_some(p->m, (unsigned)pick(p, 4));
			guest_reap(p->m);
		}
	}
	guest_notify(p->m);
	machine_settle(p->m);
}

static void check_counts(struct play *p, const struct ckpt_result *result, const unsigned *inflight)
{
	for (unsigned d = 0; d < p->m->disk_count; d++) {
		unsigned said = result->disks[d].inflight_reads + result->disks[d].inflight_writes;
		in_flight += said;
		if (p->held)
			CHECK(said == inflight[d]);
	}
}

/* New requests behind the checkpoint, while those before it end one by one. */
static void go_on(struct play *p)
{
	guest_notify(p->m);
	for (uint64_t n = pick(p, 60); n > 0; n--) {
		if (pick(p, 2) && p->m->guest->busy < GUEST_SLOTS / 2)
			offer_one(p, false);
		if (pick(p, 4) == 0)
			guest_notify(p->m);
		machine_end_some(p->m, (unsigned)pick(p, 4));
		guest_reap(p->m);
	}
	guest_notify(p->m);
}

static int take(struct play *p, struct ckpt_result *result, struct err *err)
{
	struct machine *m = p->m;
	unsigned inflight[MACHINE_DISKS] = {0};
	struct ckpt_request request = {.live = true, .wait = CKPT_WAIT_CAPTURED};
	for (unsigned d = 0; d < m->disk_count; d++)
		inflight[d] = virtio_blk_inflight(m->disks[d].blk);
	/* The VM stands until it is durable: only where requests end by themselves. */
	if (!p->held && pick(p, 4) == 0)
		request = (struct ckpt_request){.wait = CKPT_WAIT_DURABLE};
	/* Where something ends meanwhile, the device looks at the queue and may take them before the checkpoint. */
	for (uint64_t n = p->held && pick(p, 3) == 0 ? pick(p, 6) : 0; n > 0; n--)
		offer_one(p, true);
	machine_mark(m);
	int r = ckpt_take(m->engine, &request, result, err);
	if (r == 0)
		check_counts(p, result, inflight);
	return r;
}

/* Nothing is in flight, and nothing is held. */
static int take_plain(struct play *p, struct ckpt_result *result)
{
	const struct ckpt_request request = {.live = true, .wait = CKPT_WAIT_DURABLE};
	struct err err = ERR_INIT;
	machine_mark(p->m);
	int r = ckpt_take(p->m->engine, &request, result, &err);
	CHECK(r == 0 || (r == -EIO && p->m->may_fail));
	return r;
}

/* One checkpoint, and back to it. */
static void round_once(struct play *p)
{
	struct machine *m = p->m;
	struct ckpt_result result, last;
	struct err err = ERR_INIT;
	uint8_t *layers[MACHINE_DISKS] = {0};
	unsigned long before = given_up;
	bool cancels = pick(p, 8) == 0, pending;
	choose_rules(p);
	make_traffic(p, 1 + (unsigned)pick(p, pick(p, 4) ? 32 : GUEST_SLOTS));
	int r = take(p, &result, &err);
	pending = p->held && m->guest->busy > 0;
	if (r == 0)
		go_on(p);
	if (cancels)
		ckpt_cancel(m->engine, NULL);
	if (cancels && r == 0 && pending)
		r = ckpt_wait(m->engine, &last, &err);
	machine_end_everything(m);
	if (r == 0)
		r = ckpt_wait(m->engine, &last, &err);
	if (r == 0)
		machine_check_layers(m, result.id, layers);
	machine_check_disks(m);
	checkpoints++;
	given_up += r == -ECANCELED;
	failed += r != 0 && r != -ECANCELED;
	CHECK(r == 0 || (r == -ECANCELED && cancels) || (r == -EIO && m->may_fail));
	/* The next stands on the layer of the one that was given up. */
	if (r == -ECANCELED)
		r = take_plain(p, &result);
	if (r == 0 && given_up != before)
		machine_check_layers(m, result.id, layers);
	p->broken = r != 0;
	reverts += r == 0;
	if (r == 0)
		again += machine_go_back(m, result.id, layers);
	for (unsigned d = 0; d < MACHINE_DISKS; d++)
		free(layers[d]);
}

static void run(uint64_t seed)
{
	static const uint32_t clusters[] = {0, 512, 4096, 65536, 65536};
	struct play p = {.random = seed};
	const struct machine_shape shape = {
		.disks = 1 + (unsigned)pick(&p, MACHINE_DISKS),
		.queues = 1 + (unsigned)pick(&p, MACHINE_QUEUES),
		.cluster_bytes = clusters[pick(&p, ARRAY_LENGTH(clusters))],
		.sectors = 1024 + pick(&p, 512),
		.without_flush = pick(&p, 5) == 0,
		.seed = next_random(&p.random),
	};
	p.m = machine_start(&shape);
	for (unsigned i = 0; i < ROUNDS && !p.broken && atomic_load(&check_failures) == 0; i++)
		round_once(&p);
	errors += test_layer_errors(p.m->layer);
	cuts += test_layer_cuts(p.m->layer);
	machine_end(p.m);
}

int main(void)
{
	log_set_level(getenv("INFLIGHT_VERBOSE") ? LOG_LEVEL_INFO : LOG_LEVEL_ERROR);
	schedules_run("machine schedules", SCHEDULES, run);
	printf("%lu checkpoints (%lu cancelled, %lu failed), %lu requests in flight in them, %lu reverts, %lu requests issued again, %lu operations "
	       "failed, %lu cut short\n",
	       checkpoints, given_up, failed, in_flight, reverts, again, errors, cuts);
	CHECK(schedules_asked_for() || (given_up && in_flight && reverts && again && errors && cuts));
	return check_report();
}
