/* Checkpoints of the block device with requests in flight. */
#include "devices/virtio_blk_test.h"

#include <stdio.h>

struct saved {
	struct buf state, log;
	uint8_t *memory;
	struct component_inflight inflight;
};

static void park(struct setup *s)
{
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
}
static void capture(struct setup *s, struct saved *saved)
{
	void *state = xcalloc(1, s->component.table->size);
	struct err err = ERR_INIT;
	*saved = (struct saved){.memory = malloc(RIG_MEMORY_BYTES)};
	park(s);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	s->component.inflight(s->component.opaque, &saved->inflight);
	memcpy(saved->memory, mem_base(s->rig.mem), RIG_MEMORY_BYTES);
	loop_unpark(s->rig.loop);
	cr_assert_eq(codec_encode(s->component.table, state, &saved->state, &err), 0, "%s", err.message);
	free(state);
}
static void finish(struct setup *s, struct saved *saved)
{
	struct err err = ERR_INIT;
	cr_assert_eq(s->component.finish(s->component.opaque, &saved->log, NULL, &err), 0, "%s", err.message);
}
static int apply(struct setup *s, const struct saved *saved, struct err *err)
{
	memcpy(mem_base(s->rig.mem), saved->memory, RIG_MEMORY_BYTES);
	return rig_put_back(&s->component, &saved->state, err);
}
/* The whole way, on another machine or on the same. */
static void restore(struct setup *s, const struct setup *from, const struct saved *saved)
{
	struct err err = ERR_INIT;
	s->q = from->q;
	s->q.rig = &s->rig;
	s->requests = from->requests;
	cr_assert_eq(apply(s, saved, &err), 0, "%s", err.message);
	cr_assert_eq(s->component.apply_log(s->component.opaque, saved->log.data, saved->log.length, &err), 0, "%s",
		     err.message);
}
static void saved_free(struct saved *saved)
{
	buf_free(&saved->state);
	buf_free(&saved->log);
	free(saved->memory);
}

Test(virtio_blk, in_flight_requests_end_in_both_copies)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	unsigned read = request(s, IN, 5, 1024);
	memset(at(s, data_of(1)), 0x77, 512);
	unsigned write = request(s, OUT, 9, 512);
	unsigned flush = request(s, FLUSH, 0, 0);
	go(s);
	unsigned late = request(s, IN, 40, 512); /* offered, the notification is not out yet */
	capture(s, &saved);
	cr_expect_eq(saved.inflight.reads, 1);
	cr_expect_eq(saved.inflight.writes, 2);
	go(s);
	release(s);
	finish(s, &saved);
	cr_expect_eq(rig_used_idx(&s->q), 4, "the running guest got all");
	/* What the guest does to its buffers from now on does not change the checkpoint. */
	memset(at(s, data_of(read)), 0, 1024);
	memset(s->disk.data, 0xff, DISK_BYTES);

	restore(other, s, &saved);
	cr_expect_eq(*at(other, STATUSES + read), 0);
	cr_expect(filled(at(other, data_of(read)), 6, 512) && filled(at(other, data_of(read) + 512), 7, 512));
	cr_expect_eq(*at(other, STATUSES + write), 0);
	cr_expect_eq(*at(other, STATUSES + flush), 0);
	cr_expect_geq(other->rig.msis[21], 1);
	rig_settle(&other->rig);
	cr_expect_eq(rig_used_idx(&other->q), 4);
	cr_expect_eq(*at(other, STATUSES + late), 0);
	cr_expect(filled(at(other, data_of(late)), 41, 512), "what was not popped is served by the new machine");
	cr_expect_eq(other->disk.submitted, 1, "nothing that was logged is issued again");
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio_blk, what_the_log_lacks_is_issued_again)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	memset(at(s, data_of(1)), 0x77, 512);
	request(s, OUT, 9, 512);
	go(s);
	capture(s, &saved); /* and the machine is gone before finish */
	restore(other, s, &saved);
	rig_settle(&other->rig);
	cr_expect_eq(other->disk.submitted, 2);
	cr_expect_eq(rig_used_idx(&other->q), 2);
	cr_expect(filled(at(other, data_of(0)), 6, 512));
	cr_expect(filled(other->disk.data + 9 * 512, 0x77, 512));
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio_blk, errors_end_alike_in_both_copies)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	request(s, OUT, 5, 512);
	go(s);
	capture(s, &saved);
	s->disk.result = -EIO;
	release(s);
	finish(s, &saved);
	restore(other, s, &saved);
	for (unsigned i = 0; i < 2; i++) {
		cr_expect_eq(*at(s, STATUSES + i), 1);
		cr_expect_eq(*at(other, STATUSES + i), 1);
	}
	cr_expect_eq(other->disk.submitted, 0);
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

/* A capture right after a restore, before anything ran, is the same state: what is to be issued again counts as in
 * flight. */
Test(virtio_blk, captures_of_one_instant_are_identical)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved, again, restored;
	start(s);
	hold(s);
	for (unsigned i = 0; i < 20; i++)
		request(s, i % 2 ? OUT : IN, i, 512);
	range(s, 30, 1, 0);
	request(s, DISCARD, 0, 16);
	go(s);
	capture(s, &saved);
	capture(s, &again);
	cr_assert_eq(saved.state.length, again.state.length);
	cr_expect_arr_eq(saved.state.data, again.state.data, saved.state.length);

	park(other);
	restore(other, s, &saved);
	capture(other, &restored);
	cr_expect_eq(restored.inflight.reads, 10);
	cr_expect_eq(restored.inflight.writes, 11);
	cr_assert_eq(saved.state.length, restored.state.length);
	cr_expect_arr_eq(saved.state.data, restored.state.data, saved.state.length);
	cr_expect_arr_eq(saved.memory, restored.memory, RIG_MEMORY_BYTES);
	loop_unpark(other->rig.loop);
	finish(other, &restored);
	cr_expect_eq(restored.log.length, 0, "they were not started yet: the layer of that checkpoint will not hold what they write");
	rig_settle(&other->rig);
	cr_expect_eq(rig_used_idx(&other->q), 21);
	saved_free(&saved);
	saved_free(&again);
	saved_free(&restored);
	setup_destroy(other);
	setup_destroy(s);
}

enum { REPORTS = 3 };

struct reports {
	volatile bool *cancel;
	unsigned count;
	char last[WAIT_TEXT_BYTES];
};

static void on_report(void *opaque, const char *waits_for)
{
	struct reports *reports = opaque;
	snprintf(reports->last, sizeof(reports->last), "%s", waits_for);
	if (++reports->count == REPORTS)
		__atomic_store_n(reports->cancel, true, __ATOMIC_RELAXED);
}

Test(virtio_blk, cancel_names_what_it_waits_for)
{
	struct setup *s = setup_create();
	struct saved saved;
	struct err err = ERR_INIT;
	volatile bool cancel = false;
	struct reports reports = {.cancel = &cancel};
	const struct wait wait = {.cancel = &cancel, .report = on_report, .opaque = &reports};
	start(s);
	hold(s);
	request(s, OUT, 123, 512);
	request(s, FLUSH, 0, 0);
	go(s);
	capture(s, &saved);
	cr_expect_eq(s->component.finish(s->component.opaque, &saved.log, &wait, &err), -ECANCELED);
	cr_expect_eq(reports.count, REPORTS);
	cr_expect_not_null(strstr(reports.last, "disk root: a write of 512 bytes at sector 123, for 0."), "%s", reports.last);
	cr_expect_not_null(strstr(reports.last, " s, and 1 others"), "%s", reports.last);
	cr_expect_not_null(strstr(err.message, "disk root: a write of 512 bytes at sector 123, for 0."), "%s", err.message);
	/* The next checkpoint starts from scratch, with the request still in flight. */
	saved_free(&saved);
	capture(s, &saved);
	cr_expect_eq(saved.inflight.writes, 2);
	release(s);
	finish(s, &saved);
	cr_expect_gt(saved.log.length, 0);
	saved_free(&saved);
	setup_destroy(s);
}

Test(virtio_blk, reset_after_the_capture_does_not_take_from_the_log)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	go(s);
	capture(s, &saved);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	release(s);
	finish(s, &saved);
	restore(other, s, &saved);
	cr_expect_eq(*at(other, STATUSES), 0);
	cr_expect(filled(at(other, data_of(0)), 6, 512));
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio_blk, capture_during_a_reset)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	go(s);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	capture(s, &saved);
	cr_expect_eq(saved.inflight.reads, 0);
	finish(s, &saved);
	restore(other, s, &saved);
	cr_expect_eq(rig_status(&other->rig, SLOT), 0, "the reset is over");
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

static void *release_soon(void *opaque)
{
	usleep(50000);
	release(opaque);
	return NULL;
}

Test(virtio_blk, revert_in_place_drains_first)
{
	struct setup *s = setup_create();
	struct saved saved;
	struct err err = ERR_INIT;
	pthread_t thread;
	start(s);
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	capture(s, &saved);
	finish(s, &saved);
	hold(s);
	request(s, IN, 5, 512);
	go(s);
	cr_expect_lt(apply(s, &saved, &err), 0, "not while something is in flight");
	cr_assert_eq(pthread_create(&thread, NULL, release_soon, s), 0);
	unsigned msis = s->rig.msis[21];
	cr_expect_eq(s->component.drain(s->component.opaque, &err), 0);
	cr_expect_eq(virtio_blk_inflight(s->blk), 0);
	cr_expect_eq(s->rig.msis[21], msis);
	pthread_join(thread, NULL);
	struct rig_queue q = s->q;
	s->q.avail_idx = q.avail_idx = 1;
	s->q.next_desc = 3;
	struct setup before = {.q = s->q, .requests = 1};
	restore(s, &before, &saved);
	cr_expect_eq(rig_used_idx(&s->q), 1);
	cr_expect_eq(do_request(s, IN, 6, 512), 0);
	cr_expect_eq(rig_used_idx(&s->q), 2);
	saved_free(&saved);
	setup_destroy(s);
}

/* What is to be issued again and never was is dropped by a drain. */
Test(virtio_blk, drain_of_restored_requests)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	go(s);
	capture(s, &saved);
	park(other);
	restore(other, s, &saved);
	cr_expect_eq(virtio_blk_inflight(other->blk), 1);
	cr_expect_eq(other->component.drain(other->component.opaque, NULL), 0);
	cr_expect_eq(virtio_blk_inflight(other->blk), 0);
	restore(other, s, &saved);
	loop_unpark(other->rig.loop);
	rig_settle(&other->rig);
	cr_expect_eq(rig_used_idx(&other->q), 1);
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio_blk, guest_that_changed_its_chain_breaks_only_its_disk)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	request(s, OUT, 5, 512);
	go(s);
	put_le32(at(s, RINGS + 16 + 8), 1024); /* length of the first request's data */
	capture(s, &saved);
	release(s);
	finish(s, &saved);
	restore(other, s, &saved);
	cr_expect_neq(rig_status(&other->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, 0);
	rig_settle(&other->rig);
	cr_expect_eq(virtio_blk_inflight(other->blk), 0);
	start(other);
	cr_expect_eq(do_request(other, IN, 0, 512), 0);
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}

Test(virtio_blk, damaged_logs_and_states)
{
	struct setup *s = setup_create(), *other = setup_create();
	struct saved saved;
	struct err err = ERR_INIT;
	unsigned refused = 0;
	start(s);
	hold(s);
	request(s, IN, 5, 512);
	request(s, OUT, 5, 512);
	go(s);
	capture(s, &saved);
	release(s);
	finish(s, &saved);
	other->q = s->q;
	other->q.rig = &other->rig;
	for (size_t length = 1; length < saved.log.length; length++) {
		cr_assert_eq(apply(other, &saved, &err), 0, "%s", err.message);
		int ret = other->component.apply_log(other->component.opaque, saved.log.data, length, &err);
		refused += ret < 0;
		if (ret == 0)
			other->component.drain(other->component.opaque, NULL);
	}
	cr_expect_geq(refused, saved.log.length - 3, "all but a cut between entries");
	for (size_t i = 0; i < saved.log.length; i++) {
		uint8_t bit = (uint8_t)(1u << i % 8);
		saved.log.data[i] ^= bit;
		cr_assert_eq(apply(other, &saved, &err), 0, "%s", err.message);
		if (other->component.apply_log(other->component.opaque, saved.log.data, saved.log.length, &err) == 0)
			other->component.drain(other->component.opaque, NULL);
		saved.log.data[i] ^= bit;
	}
	log_set_level(LOG_LEVEL_ERROR);
	for (size_t i = 0; i < saved.state.length; i++) {
		uint8_t bit = (uint8_t)(1u << i % 8);
		saved.state.data[i] ^= bit;
		if (apply(other, &saved, &err) == 0 &&
		    other->component.apply_log(other->component.opaque, saved.log.data, saved.log.length, &err) == 0)
			other->component.drain(other->component.opaque, NULL);
		saved.state.data[i] ^= bit;
	}
	saved_free(&saved);
	setup_destroy(other);
	setup_destroy(s);
}
