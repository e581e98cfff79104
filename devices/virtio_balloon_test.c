#include "devices/virtio_balloon.h"

#include "devices/virtio_test.h"

#define SLOT  1u
#define RINGS 0x10000u
#define PFNS  0x80000u
#define AREA  0x400000u /* 4 MiB: pages to give away */
#define F_MUST_TELL_HOST (1ull << 0)
#define F_REPORTING	 (1ull << 5)
#define NUM_PAGES (VIRTIO_PCI_DEVICE + 0)
#define ACTUAL	  (VIRTIO_PCI_DEVICE + 4)
#define REPORTING 4u

struct setup {
	struct rig rig;
	struct virtio_balloon *balloon;
	struct component component;
	struct rig_queue inflate, deflate, report;
};

static struct setup *setup_create(void)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	rig_create(&s->rig);
	cr_assert_eq(virtio_balloon_create(s->rig.pci, s->rig.mem, s->rig.loop, &s->balloon, &err), 0, "%s", err.message);
	s->component = virtio_balloon_component(s->balloon, 0);
	rig_run(&s->rig);
	return s;
}
static void setup_destroy(struct setup *s)
{
	rig_stop(&s->rig);
	virtio_balloon_destroy(s->balloon);
	rig_destroy(&s->rig);
	free(s);
}
static void start_with(struct setup *s, uint64_t features, unsigned report_queue)
{
	cr_assert(rig_negotiate(&s->rig, SLOT, features | VIRTIO_F_VERSION_1));
	rig_queue_init(&s->rig, SLOT, 0, 64, RINGS, &s->inflate);
	rig_queue_init(&s->rig, SLOT, 1, 64, RINGS + 0x10000, &s->deflate);
	rig_queue_init(&s->rig, SLOT, report_queue, 64, RINGS + 0x20000, &s->report);
	rig_driver_ok(&s->rig, SLOT);
}
static void start(struct setup *s) { start_with(s, F_MUST_TELL_HOST | F_REPORTING, REPORTING); }

static void fill(struct setup *s) { memset(mem_at(s->rig.mem, AREA, 8u << 20, true), 0x5a, 8u << 20); }
static uint8_t byte(struct setup *s, uint64_t gpa) { return *(uint8_t *)mem_at(s->rig.mem, gpa, 1, false); }
static bool is_zero(struct setup *s, uint64_t page) { return byte(s, AREA + page * PAGE_BYTES) == 0; }

/* One request with the pages [first, first + count) of AREA, from the last to the first. */
static void tell(struct setup *s, struct rig_queue *q, unsigned first, unsigned count)
{
	uint8_t *pfns = mem_at(s->rig.mem, PFNS, 4 * count, true);
	for (unsigned i = 0; i < count; i++)
		put_le32(pfns + 4 * i, AREA / PAGE_BYTES + first + count - 1 - i);
	rig_add(q, (struct rig_segment[]){{PFNS, 4 * count, false}}, 1);
	rig_kick(q);
	rig_settle(&s->rig);
}
static struct virtio_balloon_stats stats(struct setup *s)
{
	struct virtio_balloon_stats out;
	virtio_balloon_get_stats(s->balloon, &out);
	return out;
}

Test(balloon, what_it_offers)
{
	struct setup *s = setup_create();
	cr_expect_eq(rig_config_read(&s->rig, SLOT, 0, 4), 0x10451af4);
	cr_expect_eq(rig_features(&s->rig, SLOT) & 0xffff, 1 | 4 | 32, "told first, deflated on OOM, reporting; no poison, no hints");
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_NUM_QUEUES, 2), 5);
	setup_destroy(s);
}

Test(balloon, configuration)
{
	struct setup *s = setup_create();
	start(s);
	virtio_balloon_set_target(s->balloon, 5 * PAGE_BYTES + 17);
	cr_expect_eq(rig_reg(&s->rig, SLOT, NUM_PAGES, 4), 5);
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_GENERATION, 1), 1);
	cr_expect(s->rig.lines[PCI_INTX_GSI(SLOT)]);
	rig_set_reg(&s->rig, SLOT, ACTUAL, 3, 4);
	rig_set_reg(&s->rig, SLOT, NUM_PAGES, 9, 4);
	cr_expect_eq(rig_reg(&s->rig, SLOT, NUM_PAGES, 4), 5, "is the device's");
	cr_expect_eq(rig_reg(&s->rig, SLOT, ACTUAL, 4), 3);
	rig_set_reg(&s->rig, SLOT, ACTUAL + 1, 1, 1);
	cr_expect_eq(rig_reg(&s->rig, SLOT, NUM_PAGES, 8), 5 | 0x103ull << 32);
	cr_expect_eq(stats(s).balloon_bytes, 0x103 * PAGE_BYTES);
	cr_expect_eq(stats(s).target_bytes, 5 * PAGE_BYTES);
	virtio_balloon_set_target(s->balloon, UINT64_MAX);
	cr_expect_eq(stats(s).target_bytes, RIG_MEMORY_BYTES);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	cr_expect_eq(stats(s).balloon_bytes, 0, "after a reset the guest has all of its memory");
	setup_destroy(s);
}

Test(balloon, inflated_pages_are_given_back)
{
	struct setup *s = setup_create();
	start(s);
	fill(s);
	tell(s, &s->inflate, 1, 200);
	cr_expect_eq(rig_used_idx(&s->inflate), 1);
	for (unsigned page = 0; page < 202; page++)
		cr_expect_eq(is_zero(s, page), page >= 1 && page <= 200, "page %u", page);
	cr_expect_eq(stats(s).given_back_bytes, 200 * PAGE_BYTES);
	cr_expect_eq(stats(s).pending_bytes, 0);
	uint64_t *words = xcalloc(mem_pages(s->rig.mem) / 64, sizeof(*words));
	mem_take_dirty(s->rig.mem, words);
	cr_expect(words[AREA / PAGE_BYTES / 64] & 2, "they count as written");
	free(words);
	tell(s, &s->deflate, 1, 200);
	cr_expect_eq(rig_used_idx(&s->deflate), 1);
	setup_destroy(s);
}

Test(balloon, much_at_once)
{
	struct setup *s = setup_create();
	start(s);
	fill(s);
	for (unsigned i = 0; i < 2; i++)
		tell(s, &s->inflate, i * 1024, 1024);
	for (unsigned wait = 0; stats(s).pending_bytes > 0 && wait < 1000; wait++)
		rig_settle(&s->rig);
	cr_expect_eq(stats(s).given_back_bytes, 8u << 20);
	cr_expect(is_zero(s, 0) && is_zero(s, 2047));
	setup_destroy(s);
}

Test(balloon, held_pages_wait_unless_they_leave_the_balloon)
{
	struct setup *s = setup_create();
	start(s);
	fill(s);
	mem_hold_discards(s->rig.mem);
	tell(s, &s->inflate, 0, 100);
	cr_expect_eq(rig_used_idx(&s->inflate), 1, "the guest need not wait");
	cr_expect(!is_zero(s, 0) && !is_zero(s, 99));
	cr_expect_eq(stats(s).pending_bytes, 100 * PAGE_BYTES);
	tell(s, &s->deflate, 10, 20);
	cr_expect_eq(stats(s).pending_bytes, 80 * PAGE_BYTES);
	mem_release_discards(s->rig.mem);
	rig_settle(&s->rig);
	for (unsigned page = 0; page < 101; page++)
		cr_expect_eq(is_zero(s, page), page < 10 || (page >= 30 && page < 100), "page %u", page);
	cr_expect_eq(stats(s).pending_bytes, 0);
	setup_destroy(s);
}

Test(balloon, pages_that_wait_are_forgotten_at_a_reset)
{
	struct setup *s = setup_create();
	start(s);
	fill(s);
	mem_hold_discards(s->rig.mem);
	tell(s, &s->inflate, 0, 100);
	rig_set_reg(&s->rig, SLOT, R_STATUS, 0, 1);
	start(s);
	mem_release_discards(s->rig.mem);
	rig_settle(&s->rig);
	cr_expect(!is_zero(s, 0) && !is_zero(s, 99));
	setup_destroy(s);
}

Test(balloon, a_driver_that_does_not_tell_first_keeps_its_pages)
{
	struct setup *s = setup_create();
	start_with(s, F_REPORTING, REPORTING);
	fill(s);
	tell(s, &s->inflate, 0, 100);
	cr_expect_eq(rig_used_idx(&s->inflate), 1);
	cr_expect(!is_zero(s, 0));
	setup_destroy(s);
}

static void report(struct setup *s, const struct rig_segment *segments, unsigned count)
{
	rig_add(&s->report, segments, count);
	rig_kick(&s->report);
	rig_settle(&s->rig);
}

Test(balloon, reported_pages_are_given_back)
{
	for (unsigned queue = 2; queue <= 4; queue += 2) { /* numbered by drivers, and by the specification */
		struct setup *s = setup_create();
		start_with(s, F_MUST_TELL_HOST | F_REPORTING, queue);
		fill(s);
		report(s, (struct rig_segment[]){{AREA, 2 * PAGE_BYTES, true}, {AREA + 4 * PAGE_BYTES + 100, 3 * PAGE_BYTES, true}, {AREA + 9 * PAGE_BYTES + 1, 4000, true}}, 3);
		cr_expect_eq(rig_used_idx(&s->report), 1);
		for (unsigned page = 0; page < 12; page++)
			cr_expect_eq(is_zero(s, page), page < 2 || page == 5 || page == 6, "page %u: whole ones only", page);
		cr_expect_eq(stats(s).reported_bytes, 4 * PAGE_BYTES);
		mem_hold_discards(s->rig.mem);
		report(s, (struct rig_segment[]){{AREA + (4u << 20), 2u << 20, true}}, 1);
		cr_expect_eq(rig_used_idx(&s->report), 2);
		cr_expect(!is_zero(s, 1024));
		cr_expect_eq(stats(s).kept_bytes, 2u << 20);
		mem_release_discards(s->rig.mem);
		rig_settle(&s->rig);
		cr_expect(!is_zero(s, 1024), "never after the answer");
		setup_destroy(s);
	}
}

Test(balloon, bad_requests)
{
	struct setup *s = setup_create();
	int level = (int)log_get_level();
	log_set_level(LOG_LEVEL_ERROR);
	start(s);
	fill(s);
	/* Pages outside memory, odd lengths, duplicates: nothing happens, or what makes sense. */
	uint8_t *pfns = mem_at(s->rig.mem, PFNS, 64, true);
	static const uint32_t numbers[] = {0xffffffff, RIG_MEMORY_BYTES / PAGE_BYTES, 0x80000, AREA / PAGE_BYTES, AREA / PAGE_BYTES};
	for (unsigned i = 0; i < ARRAY_LENGTH(numbers); i++)
		put_le32(pfns + 4 * i, numbers[i]);
	rig_add(&s->inflate, (struct rig_segment[]){{PFNS, sizeof(numbers) - 2, false}, {PFNS + sizeof(numbers) - 2, 3, false}}, 2);
	rig_kick(&s->inflate);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->inflate), 1);
	cr_expect(is_zero(s, 0) && !is_zero(s, 1));
	cr_expect_eq(stats(s).given_back_bytes, PAGE_BYTES);
	tell(s, &s->deflate, 500, 3); /* never were in it */
	cr_expect_eq(rig_used_idx(&s->deflate), 1);
	cr_expect_eq(rig_status(&s->rig, SLOT), 15);

	static const struct {
		unsigned queue;
		struct rig_segment segment;
	} bad[] = {
		{0, {PFNS, 4, true}},
		{0, {PFNS, 1u << 20, false}},
		{1, {PFNS, 4, true}},
		{2, {PFNS, 4, false}},
		{2, {RIG_MEMORY_BYTES - PAGE_BYTES, 2 * PAGE_BYTES, true}},
	};
	for (unsigned i = 0; i < ARRAY_LENGTH(bad); i++) {
		start(s);
		struct rig_queue *q = bad[i].queue == 0 ? &s->inflate : bad[i].queue == 1 ? &s->deflate : &s->report;
		rig_add(q, &bad[i].segment, 1);
		rig_kick(q);
		rig_settle(&s->rig);
		cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET, "%u", i);
	}
	start(s);
	tell(s, &s->inflate, 1, 1);
	cr_expect(is_zero(s, 1), "works again");
	log_set_level((enum log_level)level);
	setup_destroy(s);
}

static void park(struct setup *s)
{
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
}
static void encode(struct setup *s, struct buf *out)
{
	void *state = xcalloc(1, s->component.table->size);
	struct err err = ERR_INIT;
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	cr_assert_eq(codec_encode(s->component.table, state, out, &err), 0, "%s", err.message);
	free(state);
}
static int apply(struct setup *s, const struct buf *in, struct err *err)
{
	return rig_put_back(&s->component, in, err);
}

Test(balloon, state_goes_there_and_back)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf saved = BUF_INIT;
	struct err err = ERR_INIT;
	start(s);
	fill(s);
	virtio_balloon_set_target(s->balloon, 300 * PAGE_BYTES);
	rig_set_reg(&s->rig, SLOT, ACTUAL, 100, 4);
	park(s);
	encode(s, &saved);
	loop_unpark(s->rig.loop);
	/* What is given after the instant is not given any more when the machine goes back. */
	mem_hold_discards(s->rig.mem);
	tell(s, &s->inflate, 0, 100);
	virtio_balloon_set_target(s->balloon, 0);
	rig_set_reg(&s->rig, SLOT, ACTUAL, 0, 4);
	cr_assert_eq(s->component.drain(s->component.opaque, &err), 0);
	park(s);
	memset(mem_at(s->rig.mem, s->inflate.avail, 4096, true), 0, 4096);
	memset(mem_at(s->rig.mem, s->inflate.used, 4096, true), 0, 4096);
	bool line = s->rig.lines[PCI_INTX_GSI(SLOT)];
	rig_reg(&s->rig, SLOT, VIRTIO_PCI_ISR, 1);
	cr_expect_eq(apply(s, &saved, &err), 0, "%s", err.message);
	loop_unpark(s->rig.loop);
	mem_release_discards(s->rig.mem);
	rig_settle(&s->rig);
	cr_expect(line && s->rig.lines[PCI_INTX_GSI(SLOT)], "the guest is told of the target again");
	cr_expect(!is_zero(s, 0) && !is_zero(s, 99));
	cr_expect_eq(stats(s).target_bytes, 300 * PAGE_BYTES);
	cr_expect_eq(stats(s).balloon_bytes, 100 * PAGE_BYTES);
	setup_destroy(s);
}

/* A report that takes several turns of the loop is not in the state as answered, nor as begun. */
Test(balloon, report_under_way_comes_again)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf saved = BUF_INIT;
	struct err err = ERR_INIT;
	bool caught = false;
	start(s);
	struct rig_segment all[20];
	for (unsigned i = 0; i < ARRAY_LENGTH(all); i++)
		all[i] = (struct rig_segment){AREA, 8u << 20, true};
	for (unsigned tries = 0; tries < 200 && !caught; tries++) {
		fill(s);
		rig_add(&s->report, all, ARRAY_LENGTH(all));
		uint16_t before = rig_used_idx(&s->report);
		rig_kick(&s->report);
		while (stats(s).reported_bytes == 0)
			sched_yield();
		park(s);
		caught = rig_used_idx(&s->report) == before;
		if (caught)
			encode(s, &saved);
		uint16_t used = rig_used_idx(&s->report);
		uint8_t *rings = xcalloc(1, 0x10000);
		memcpy(rings, mem_at(s->rig.mem, RINGS + 0x20000, 0x10000, false), 0x10000);
		loop_unpark(s->rig.loop);
		while (rig_used_idx(&s->report) == before)
			rig_settle(&s->rig);
		if (caught) {
			cr_assert_eq(s->component.drain(s->component.opaque, &err), 0);
			park(s);
			memcpy(mem_at(s->rig.mem, RINGS + 0x20000, 0x10000, true), rings, 0x10000);
			fill(s);
			cr_expect_eq(rig_used_idx(&s->report), used);
			cr_expect_eq(apply(s, &saved, &err), 0, "%s", err.message);
			loop_unpark(s->rig.loop);
			for (unsigned wait = 0; rig_used_idx(&s->report) == before && wait < 1000; wait++)
				rig_settle(&s->rig);
			cr_expect_eq(rig_used_idx(&s->report), (uint16_t)(before + 1), "answered once");
			cr_expect(is_zero(s, 0) && is_zero(s, 2047));
		}
		free(rings);
	}
	cr_expect(caught, "no report was met under way");
	setup_destroy(s);
}

Test(balloon, damaged_state_is_refused)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf saved = BUF_INIT;
	struct err err = ERR_INIT;
	start(s);
	void *state = xcalloc(1, s->component.table->size);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	/* By its table, as the struct is the device's own. */
	uint32_t *num_pages = NULL;
	for (const struct codec_field *f = s->component.table->fields; f->name; f++)
		if (strcmp(f->name, "num_pages") == 0)
			num_pages = (uint32_t *)(void *)((uint8_t *)state + f->offset);
	cr_assert_not_null(num_pages);
	*num_pages = RIG_MEMORY_BYTES / PAGE_BYTES;
	cr_expect_eq(s->component.validate(s->component.opaque, state, &err), 0);
	++*num_pages;
	cr_expect_eq(s->component.validate(s->component.opaque, state, &err), -EINVAL);
	cr_expect_eq(err.class, ERR_DAMAGED);
	free(state);
	setup_destroy(s);
}
