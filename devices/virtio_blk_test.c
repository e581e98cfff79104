/* The block device: requests of every kind, good and bad. */
#include "devices/virtio_blk_test.h"

Test(virtio_blk, features_and_configuration)
{
	struct setup *s = setup_create();
	uint64_t features = rig_features(&s->rig, SLOT);
	cr_expect_eq(rig_config_read(&s->rig, SLOT, 0, 4), 0x10421af4);
	cr_expect_eq(features & 0xffffff, 1u << 2 | 1u << 6 | 1u << 9 | 1u << 10 | 1u << 13 | 1u << 14);
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2000, 8), DISK_BYTES / 512);
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x200c, 4), 254, "segments");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2014, 4), 512, "block size");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2018, 1), 3, "physical block 4096");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x201c, 4), 128, "optimal I/O");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2022, 2), 1, "queues");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2028, 4), 1);
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2038, 4), 1, "may unmap");
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x203c, 4), 0, "beyond the configuration");
	setup_destroy(s);

	s = setup_create_with(&(struct virtio_blk_config){.name = "data", .readonly = true, .queues = 4}, false);
	features = rig_features(&s->rig, SLOT);
	cr_expect_eq(features & 0xffffff, 1u << 2 | 1u << 5 | 1u << 6 | 1u << 9 | 1u << 10 | 1u << 12);
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_NUM_QUEUES, 2), 4);
	cr_expect_eq(rig_reg(&s->rig, SLOT, 0x2022, 2), 4);
	setup_destroy(s);
}

Test(virtio_blk, requests_of_every_kind)
{
	struct setup *s = setup_create();
	start(s);
	cr_expect_eq(do_request(s, IN, 7, 1024), 0);
	cr_expect(filled(at(s, data_of(0)), 8, 512) && filled(at(s, data_of(0) + 512), 9, 512));
	uint32_t written;
	rig_used_id(&s->q, 0, &written);
	cr_expect_eq(written, 1025);
	cr_expect_eq(s->rig.msis[21], 1);

	memset(at(s, data_of(1)), 0xaa, 1024);
	cr_expect_eq(do_request(s, OUT, 10, 1024), 0);
	cr_expect(filled(s->disk.data + 5120, 0xaa, 1024));
	rig_used_id(&s->q, 1, &written);
	cr_expect_eq(written, 1);
	cr_expect_eq(s->disk.flushes, 0);
	cr_expect_eq(do_request(s, FLUSH, 0, 0), 0);
	cr_expect_eq(s->disk.flushes, 1);
	cr_expect_eq(do_request(s, GET_ID, 0, 20), 0);
	cr_expect_eq(memcmp(at(s, data_of(3)), "serial-number-of-the", 20), 0);
	range(s, 10, 1, 0);
	cr_expect_eq(do_request(s, DISCARD, 0, 16), 0);
	cr_expect(filled(s->disk.data + 5120, 0, 512));
	range(s, 11, 1, 1);
	cr_expect_eq(do_request(s, WRITE_ZEROES, 0, 16), 0);
	cr_expect(filled(s->disk.data + 5120, 0, 1024));
	cr_expect_eq(rig_used_idx(&s->q), 6);
	setup_destroy(s);
}

Test(virtio_blk, what_ends_together_is_one_interrupt)
{
	struct setup *s = setup_create();
	start(s);
	hold(s);
	for (unsigned i = 0; i < 5; i++)
		request(s, IN, i, 512);
	go(s);
	cr_expect_eq(s->disk.submitted, 5);
	cr_expect_eq(rig_used_idx(&s->q), 0);
	release(s);
	cr_expect_eq(rig_used_idx(&s->q), 5);
	cr_expect_eq(s->rig.msis[21], 1);
	/* Some end at once, as they are refused. */
	request(s, IN, DISK_BYTES / 512, 512);
	request(s, 99, 0, 512);
	go(s);
	cr_expect_eq(rig_used_idx(&s->q), 7);
	cr_expect_eq(s->rig.msis[21], 2);
	setup_destroy(s);
}

Test(virtio_blk, zeroes_are_detected_where_asked_for)
{
	for (int detect = 0; detect < 2; detect++) {
		struct setup *s = setup_create_with(&(struct virtio_blk_config){.name = "root", .detect_zeroes = detect}, false);
		start(s);
		memset(at(s, data_of(0)), 0, 4096);
		cr_expect_eq(do_request(s, OUT, 8, 4096), 0);
		cr_expect_eq(s->disk.last_op, detect ? COW_WRITE_ZEROES : COW_WRITE);
		cr_expect(!detect || s->disk.last_may_unmap);
		cr_expect(filled(s->disk.data + 4096, 0, 4096));
		memset(at(s, data_of(1)), 0, 4096);
		*at(s, data_of(1) + 4095) = 1;
		cr_expect_eq(do_request(s, OUT, 8, 4096), 0);
		cr_expect_eq(s->disk.last_op, COW_WRITE);
		cr_expect_eq(s->disk.data[8191], 1);
		cr_expect_eq(do_request(s, FLUSH, 0, 0), 0);
		cr_expect_eq(s->disk.last_op, COW_FLUSH);
		setup_destroy(s);
	}
}

/* A driver that notifies only when it is asked to loses nothing, and is seldom asked. */
Test(virtio_blk, polling)
{
	enum { ROUNDS = 2000 };
	struct setup *s = setup_create();
	unsigned kicks = 0;
	rig_stop(&s->rig);
	loop_set_spare(s->rig.loop, 2);
	rig_run(&s->rig);
	start(s);
	const uint16_t *flags = mem_at(s->rig.mem, s->q.used, 2, false);
	for (unsigned i = 0; i < ROUNDS; i++) {
		s->requests = 0;
		request(s, IN, i % 100, 512);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (!(__atomic_load_n(flags, __ATOMIC_RELAXED) & 1)) {
			kicks++;
			rig_kick(&s->q);
		}
		for (unsigned n = 0; n < 100000 && rig_used_idx(&s->q) != (uint16_t)(i + 1); n++)
			usleep(n > 1000 ? 100 : 0);
		cr_assert_eq(rig_used_idx(&s->q), (uint16_t)(i + 1));
	}
	cr_expect_lt(kicks, ROUNDS, "the device never looked by itself");
	rig_settle(&s->rig);
	for (unsigned n = 0; n < 1000 && __atomic_load_n(flags, __ATOMIC_RELAXED); n++)
		usleep(1000);
	cr_expect_eq(*flags, 0, "idle, and not to be notified");
	setup_destroy(s);
}

Test(virtio_blk, bad_requests_get_their_status)
{
	struct setup *s = setup_create();
	start(s);
	cr_expect_eq(do_request(s, 77, 0, 0), 2, "unknown");
	cr_expect_eq(do_request(s, IN, DISK_BYTES / 512, 512), 1, "beyond the end");
	cr_expect_eq(do_request(s, IN, DISK_BYTES / 512 - 1, 1024), 1, "across the end");
	cr_expect_eq(do_request(s, OUT, UINT64_MAX, 512), 1, "sector overflow");
	cr_expect_eq(do_request(s, IN, 0, 100), 1, "no whole sector");
	range(s, 0, 1, 1);
	cr_expect_eq(do_request(s, DISCARD, 0, 16), 2, "unmap flag of a discard");
	range(s, 0, 1, 2);
	cr_expect_eq(do_request(s, WRITE_ZEROES, 0, 16), 2, "unknown flag");
	range(s, 0, 1, 0);
	cr_expect_eq(do_request(s, DISCARD, 0, 32), 1, "two ranges");
	range(s, 0, 0xffffffff, 0);
	cr_expect_eq(do_request(s, DISCARD, 0, 16), 1, "too long");
	range(s, UINT64_MAX, 1, 0);
	cr_expect_eq(do_request(s, WRITE_ZEROES, 0, 16), 1, "range beyond the end");
	cr_expect_eq(s->disk.submitted, 0);
	s->disk.result = -EIO;
	cr_expect_eq(do_request(s, IN, 0, 512), 1);
	s->disk.result = -ENOSPC;
	cr_expect_eq(do_request(s, OUT, 0, 512), 1);
	s->disk.result = -ENOTSUP;
	cr_expect_eq(do_request(s, FLUSH, 0, 0), 2);
	s->disk.result = 0;
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	setup_destroy(s);

	s = setup_create_with(&(struct virtio_blk_config){.name = "data"}, true);
	start(s);
	cr_expect_eq(do_request(s, OUT, 0, 512), 1, "read-only");
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	setup_destroy(s);
}

Test(virtio_blk, buffers_may_be_cut_anywhere)
{
	struct setup *s = setup_create();
	start(s);
	header(s, 0, OUT, 3);
	memset(at(s, DATA), 0x55, 512);
	memcpy(at(s, DATA - 6), at(s, HEADERS + 10), 6); /* the header's end and the data in one segment */
	rig_add(&s->q,
		(struct rig_segment[]){{HEADERS, 3, false},
				       {HEADERS + 3, 7, false},
				       {DATA - 6, 106, false},
				       {DATA + 100, 412, false},
				       {STATUSES, 1, true}},
		5);
	go(s);
	cr_expect_eq(*at(s, STATUSES), 0);
	cr_expect(filled(s->disk.data + 3 * 512, 0x55, 512));

	header(s, 1, IN, 20);
	rig_add(&s->q, (struct rig_segment[]){{HEADERS + 16, 16, false}, {DATA, 5, true}, {DATA + 5, 508, true}}, 3);
	*at(s, DATA + 512) = UNTOUCHED;
	go(s);
	cr_expect(filled(at(s, DATA), 21, 512));
	cr_expect_eq(*at(s, DATA + 512), 0, "status after the data in one segment");
	setup_destroy(s);
}

Test(virtio_blk, writes_are_stable_for_a_driver_without_flush)
{
	struct setup *s = setup_create();
	start_with(s, 0);
	cr_expect_eq(do_request(s, OUT, 0, 512), 0);
	cr_expect_eq(s->disk.flushes, 1);
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	cr_expect_eq(s->disk.flushes, 1);
	setup_destroy(s);
}

Test(virtio_blk, many_in_flight)
{
	struct setup *s = setup_create();
	start(s);
	hold(s);
	for (unsigned i = 0; i < 80; i++)
		request(s, IN, i, 512);
	go(s);
	cr_expect_eq(virtio_blk_inflight(s->blk), 80);
	cr_expect_eq(rig_used_idx(&s->q), 0);
	release(s);
	cr_expect_eq(rig_used_idx(&s->q), 80);
	for (unsigned i = 0; i < 80; i++)
		cr_expect(filled(at(s, data_of(i)), (uint8_t)(i + 1), 512) && *at(s, STATUSES + i) == 0, "%u", i);
	cr_expect_eq(virtio_blk_inflight(s->blk), 0);
	setup_destroy(s);
}

/* The same chain again and again, without waiting for the used ring: more than there are requests. */
Test(virtio_blk, more_requests_than_the_queue_holds)
{
	struct setup *s = setup_create();
	start(s);
	hold(s);
	unsigned head = request(s, IN, 0, 512);
	for (unsigned i = 1; i < 400; i++) {
		rig_offer(&s->q, (uint16_t)(3 * head));
		go(s);
	}
	cr_expect_eq(virtio_blk_inflight(s->blk), 256);
	release(s);
	cr_expect_eq(virtio_blk_inflight(s->blk), 0);
	cr_expect_eq(rig_used_idx(&s->q), 400);
	setup_destroy(s);
}

Test(virtio_blk, reset_ends_when_requests_have_ended)
{
	struct setup *s = setup_create();
	start(s);
	hold(s);
	request(s, IN, 0, 512);
	go(s);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	cr_expect_neq(rig_status(&s->rig, SLOT), 0, "not yet");
	rig_set_reg(&s->rig, SLOT, R_STATUS, 15, 1);
	request(s, IN, 1, 512);
	go(s);
	cr_expect_eq(virtio_blk_inflight(s->blk), 1, "nothing new");
	release(s);
	cr_expect_eq(rig_status(&s->rig, SLOT), 0);
	cr_expect_eq(rig_used_idx(&s->q), 0, "the completion was dropped");
	cr_expect_eq(*at(s, STATUSES), UNTOUCHED);
	start(s);
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	setup_destroy(s);
}

Test(virtio_blk, broken_chain_while_others_are_in_flight)
{
	struct setup *s = setup_create();
	start(s);
	hold(s);
	request(s, IN, 0, 512);
	rig_add(&s->q, (struct rig_segment[]){{HEADERS, 15, false}, {STATUSES, 1, true}}, 2);
	go(s);
	cr_expect_neq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, 0);
	release(s);
	cr_expect_eq(virtio_blk_inflight(s->blk), 0);
	cr_expect_eq(rig_used_idx(&s->q), 0);
	start(s);
	rig_add(&s->q, (struct rig_segment[]){{HEADERS, 16, false}}, 1); /* no room for a status */
	go(s);
	cr_expect_neq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, 0);
	start(s);
	cr_expect_eq(do_request(s, IN, 0, 512), 0);
	setup_destroy(s);
}
