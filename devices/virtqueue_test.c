#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "devices/virtqueue.h"

#define DESC	 0x1000u
#define AVAIL	 0x2000u
#define USED	 0x3000u
#define INDIRECT 0x4000u
#define DATA	 0x100000u
#define MEMORY	 (16u << 20)

enum { NEXT = 1, WRITE = 2, INDIRECT_TABLE = 4 };

struct ring {
	struct mem *mem;
	struct virtqueue q;
	uint16_t avail_idx;
	struct virtq_chain chain;
	struct err err;
};

static struct ring *ring_create(uint16_t size, bool event_idx)
{
	struct ring *r = calloc(1, sizeof(*r));
	cr_assert_eq(mem_create(MEMORY, &r->mem, NULL), 0);
	virtq_init(&r->q, r->mem, VIRTQ_MAX_SIZE);
	r->q.event_idx = event_idx;
	r->q.indirect = true;
	r->q.s.size = size;
	r->q.s.desc_gpa = DESC;
	r->q.s.avail_gpa = AVAIL;
	r->q.s.used_gpa = USED;
	cr_assert_eq(virtq_enable(&r->q, &r->err), 0, "%s", r->err.message);
	return r;
}
static void ring_destroy(struct ring *r)
{
	mem_destroy(r->mem);
	free(r);
}
static void put16(struct ring *r, uint64_t gpa, uint16_t v) { put_le16(mem_at(r->mem, gpa, 2, true), v); }
static uint16_t get16(struct ring *r, uint64_t gpa) { return get_le16(mem_at(r->mem, gpa, 2, false)); }
static void desc(struct ring *r, uint64_t table, unsigned i, uint64_t gpa, uint32_t bytes, unsigned flags,
		 unsigned next)
{
	uint8_t *d = mem_at(r->mem, table + 16 * i, 16, true);
	put_le64(d, gpa);
	put_le32(d + 8, bytes);
	put_le16(d + 12, (uint16_t)flags);
	put_le16(d + 14, (uint16_t)next);
}
static void offer(struct ring *r, uint16_t head)
{
	put16(r, AVAIL + 4 + 2u * (r->avail_idx % r->q.s.size), head);
	put16(r, AVAIL + 2, ++r->avail_idx);
}
static int pop(struct ring *r) { return virtq_pop(&r->q, &r->chain, &r->err); }

Test(virtqueue, chain_of_both_kinds)
{
	struct ring *r = ring_create(8, false);
	desc(r, DESC, 3, DATA, 10, NEXT, 5);
	desc(r, DESC, 5, DATA + 100, 20, NEXT | WRITE, 1);
	desc(r, DESC, 1, DATA + 200, 30, WRITE, 0);
	cr_expect_eq(pop(r), 0);
	offer(r, 3);
	cr_assert_eq(pop(r), 1, "%s", r->err.message);
	cr_expect_eq(r->chain.head, 3);
	cr_expect_eq(r->chain.out_count, 1);
	cr_expect_eq(r->chain.in_count, 2);
	cr_expect_eq(r->chain.out_bytes, 10);
	cr_expect_eq(r->chain.in_bytes, 50);
	cr_expect_eq(pop(r), 0);

	char text[50];
	memset(text, 'x', sizeof(text));
	cr_expect_eq(virtq_copy_to(&r->chain, 15, text, 50), 35, "ends where the chain ends");
	cr_expect_eq(*(char *)mem_at(r->mem, DATA + 114, 1, false), 0);
	cr_expect_eq(*(char *)mem_at(r->mem, DATA + 115, 1, false), 'x');
	cr_expect_eq(*(char *)mem_at(r->mem, DATA + 229, 1, false), 'x');
	cr_expect_eq(*(char *)mem_at(r->mem, DATA + 230, 1, false), 0);
	cr_expect_eq(virtq_read_back(&r->chain, 14, text, 2), 2);
	cr_expect(text[0] == 0 && text[1] == 'x');
	cr_expect_eq(virtq_copy_from(&r->chain, 4, text, 50), 6);

	cr_expect_eq(virtq_push(&r->q, 3, 50, &r->err), 0);
	cr_expect_eq(get16(r, USED + 2), 1);
	cr_expect_eq(get_le32(mem_at(r->mem, USED + 4, 4, false)), 3);
	cr_expect_eq(get_le32(mem_at(r->mem, USED + 8, 4, false)), 50);
	ring_destroy(r);
}

Test(virtqueue, indirect_table_after_direct_descriptors)
{
	struct ring *r = ring_create(4, false);
	desc(r, DESC, 0, DATA, 16, NEXT, 1);
	desc(r, DESC, 1, INDIRECT, 16 * 9, INDIRECT_TABLE, 0);
	for (unsigned i = 0; i < 9; i++) /* longer than the queue: allowed in a table */
		desc(r, INDIRECT, i, DATA + 0x1000 * (i + 1), 512, WRITE | (i < 8 ? NEXT : 0), i + 1);
	offer(r, 0);
	cr_assert_eq(pop(r), 1, "%s", r->err.message);
	cr_expect_eq(r->chain.out_count, 1);
	cr_expect_eq(r->chain.in_count, 9);
	cr_expect_eq(r->chain.in_bytes, 9 * 512);
	uint16_t position = r->q.s.next_avail;
	cr_expect_eq(virtq_walk(&r->q, 0, &r->chain, &r->err), 0);
	cr_expect_eq(r->chain.in_count, 9);
	cr_expect_eq(r->q.s.next_avail, position, "walking does not pop");
	ring_destroy(r);
}

Test(virtqueue, indices_wrap)
{
	struct ring *r = ring_create(4, false);
	desc(r, DESC, 2, DATA, 16, WRITE, 0);
	for (unsigned i = 0; i < 70000; i++) {
		offer(r, 2);
		cr_assert_eq(pop(r), 1);
		cr_assert_eq(pop(r), 0);
		cr_assert_eq(virtq_push(&r->q, 2, i, &r->err), 0);
		cr_assert_eq(get16(r, USED + 2), (uint16_t)(i + 1));
		cr_assert_eq(get_le32(mem_at(r->mem, USED + 4 + 8 * (i % 4) + 4, 4, false)), i);
	}
	ring_destroy(r);
}

struct hostile {
	const char *what;
	uint64_t gpa;
	uint32_t bytes;
	uint16_t flags, next;
	uint16_t flags2; /* of descriptor 1, at DATA, 16 bytes, next 0 */
};

Test(virtqueue, hostile_chains_are_refused)
{
	static const struct hostile cases[] = {
		{"loop", DATA, 16, NEXT, 1, NEXT},
		{"self loop", DATA, 16, NEXT, 0, 0},
		{"next out of range", DATA, 16, NEXT, 8, 0},
		{"next far out of range", DATA, 16, NEXT, 65535, 0},
		{"beyond memory", MEMORY, 1, 0, 0, 0},
		{"across the end of memory", MEMORY - 8, 16, 0, 0, 0},
		{"address overflow", UINT64_MAX - 8, 16, 0, 0, 0},
		{"in the hole", 0xfee00000, 16, WRITE, 0, 0},
		{"readable after writable", DATA, 16, NEXT | WRITE, 1, 0},
		{"empty segment", DATA, 0, 0, 0, 0},
		{"indirect with next", INDIRECT, 16, INDIRECT_TABLE | NEXT, 1, 0},
		{"indirect table of odd length", INDIRECT, 24, INDIRECT_TABLE, 0, 0},
		{"empty indirect table", INDIRECT, 0, INDIRECT_TABLE, 0, 0},
		{"indirect table too long", INDIRECT, 16 * 257, INDIRECT_TABLE, 0, 0},
		{"indirect table beyond memory", MEMORY - 16, 32, INDIRECT_TABLE, 0, 0},
		{"nested indirect", INDIRECT + 0x100, 16, INDIRECT_TABLE, 0, 0},
		{"indirect next out of range", INDIRECT + 0x200, 16, INDIRECT_TABLE, 0, 0},
		{"indirect loop", INDIRECT + 0x300, 32, INDIRECT_TABLE, 0, 0},
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ring *r = ring_create(8, false);
		const struct hostile *c = &cases[i];
		desc(r, INDIRECT + 0x100, 0, INDIRECT, 16, INDIRECT_TABLE, 0);
		desc(r, INDIRECT + 0x200, 0, DATA, 16, NEXT, 1);
		desc(r, INDIRECT + 0x300, 0, DATA, 16, NEXT, 1);
		desc(r, INDIRECT + 0x300, 1, DATA, 16, NEXT, 0);
		desc(r, DESC, 0, c->gpa, c->bytes, c->flags, c->next);
		desc(r, DESC, 1, DATA, 16, c->flags2, 0);
		offer(r, 0);
		cr_expect_eq(pop(r), -EPROTO, "%s", c->what);
		cr_expect_neq(r->err.message[0], 0, "%s", c->what);
		ring_destroy(r);
	}
}

Test(virtqueue, hostile_rings_are_refused)
{
	struct ring *r = ring_create(8, false);
	put16(r, AVAIL + 2, 9);
	cr_expect_eq(pop(r), -EPROTO, "more available than the queue has");
	put16(r, AVAIL + 2, 0xffff);
	cr_expect_eq(pop(r), -EPROTO, "index went back");
	put16(r, AVAIL + 2, 1);
	put16(r, AVAIL + 4, 8);
	cr_expect_eq(pop(r), -EPROTO, "head out of range");
	ring_destroy(r);

	r = ring_create(8, false);
	for (unsigned i = 0; i < 8; i++)
		desc(r, DESC, i, DATA, UINT32_MAX / 2, WRITE | (i < 7 ? NEXT : 0), i + 1);
	offer(r, 0);
	cr_expect_eq(pop(r), -EPROTO, "more than fits the used ring's length");
	r->q.indirect = false;
	desc(r, DESC, 0, INDIRECT, 16, INDIRECT_TABLE, 0);
	offer(r, 0);
	cr_expect_eq(pop(r), -EPROTO, "indirect was not negotiated");
	ring_destroy(r);
}

Test(virtqueue, rings_must_lie_in_memory_and_be_aligned)
{
	struct ring *r = ring_create(8, false);
	struct virtq_state s = r->q.s;
	const struct virtq_state good = s;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), 0);
	s.size = 0;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s.size = 6;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s.size = 512;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s = good;
	s.desc_gpa += 8;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s = good;
	s.avail_gpa += 1;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s = good;
	s.used_gpa += 2;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s = good;
	s.desc_gpa = MEMORY - 64;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	s = good;
	s.used_gpa = UINT64_MAX - 3;
	cr_expect_eq(virtq_check(&r->q, &s, NULL), -EPROTO);
	cr_expect_eq(virtq_load(&r->q, &good, NULL), 0);
	cr_expect_eq(virtq_load(&r->q, &s, NULL), -EPROTO);
	cr_expect_eq(pop(r), 0, "not enabled: nothing to pop");
	cr_expect_eq(virtq_push(&r->q, 0, 0, NULL), -EPROTO);
	ring_destroy(r);
}

Test(virtqueue, interrupts_by_flag)
{
	struct ring *r = ring_create(8, false);
	cr_expect(virtq_wants_interrupt(&r->q));
	put16(r, AVAIL, 1);
	cr_expect(!virtq_wants_interrupt(&r->q));
	cr_expect(!virtq_may_owe_interrupt(&r->q));
	put16(r, AVAIL, 0);
	cr_expect(virtq_may_owe_interrupt(&r->q));
	ring_destroy(r);
}

Test(virtqueue, what_was_put_is_shown_at_once)
{
	struct ring *r = ring_create(8, false);
	virtq_publish_put(&r->q, NULL);
	cr_expect_eq(get16(r, USED + 2), 0);
	for (uint16_t i = 0; i < 3; i++)
		cr_expect_eq(virtq_put(&r->q, i, 0, NULL), 0);
	cr_expect_eq(get16(r, USED + 2), 0);
	virtq_publish_put(&r->q, NULL);
	cr_expect_eq(get16(r, USED + 2), 3);
	cr_expect_eq(get_le32(mem_at(r->mem, USED + 4 + 8 * 2, 4, false)), 2);
	/* What was put before a reset is nothing to the driver after it. */
	virtq_put(&r->q, 3, 0, NULL);
	virtq_reset(&r->q);
	virtq_publish_put(&r->q, NULL);
	cr_expect_eq(get16(r, USED + 2), 3);
	ring_destroy(r);
}

Test(virtqueue, notifications_are_asked_for_and_not)
{
	struct ring *r = ring_create(8, false);
	virtq_disarm(&r->q);
	cr_expect_eq(get16(r, USED), 1, "VIRTQ_USED_F_NO_NOTIFY");
	cr_expect(!virtq_has_chain(&r->q));
	desc(r, DESC, 0, DATA, 16, 0, 0);
	offer(r, 0);
	cr_expect(virtq_has_chain(&r->q));
	cr_expect(virtq_rearm(&r->q), "one came meanwhile");
	cr_expect_eq(get16(r, USED), 0);
	ring_destroy(r);

	/* A driver notifies when its index passes the event index: 2.7.10.1. */
	r = ring_create(8, true);
	virtq_disarm(&r->q);
	uint16_t event = get16(r, USED + 4 + 8 * 8);
	for (uint16_t old = 0; old < 100; old++)
		cr_expect((uint16_t)(old + 1 - event - 1) >= (uint16_t)(old + 1 - old), "notifies of %u", old);
	virtq_rearm(&r->q);
	cr_expect_eq(get16(r, USED + 4 + 8 * 8), 0);
	ring_destroy(r);
}

Test(virtqueue, interrupts_by_event_index)
{
	struct ring *r = ring_create(8, true);
	uint64_t used_event = AVAIL + 4 + 2 * 8, avail_event = USED + 4 + 8 * 8;

	cr_expect(!virtq_may_owe_interrupt(&r->q));
	virtq_push(&r->q, 0, 0, NULL);
	cr_expect(virtq_wants_interrupt(&r->q), "the first");
	cr_expect(!virtq_wants_interrupt(&r->q), "nothing new");
	cr_expect(virtq_may_owe_interrupt(&r->q), "the driver has not said that it saw it");
	put16(r, used_event, 1);
	cr_expect(!virtq_may_owe_interrupt(&r->q));
	put16(r, used_event, 3);
	virtq_push(&r->q, 0, 0, NULL);
	cr_expect(!virtq_wants_interrupt(&r->q));
	virtq_push(&r->q, 0, 0, NULL);
	virtq_push(&r->q, 0, 0, NULL);
	cr_expect(virtq_wants_interrupt(&r->q), "index passed 3");
	/* Across the wrap. */
	r->q.s.next_used = r->q.s.signalled = 65534;
	put16(r, used_event, 65535);
	virtq_push(&r->q, 0, 0, NULL);
	cr_expect(!virtq_wants_interrupt(&r->q));
	virtq_push(&r->q, 0, 0, NULL);
	cr_expect(virtq_wants_interrupt(&r->q));

	cr_expect(!virtq_rearm(&r->q));
	desc(r, DESC, 0, DATA, 16, 0, 0);
	offer(r, 0);
	cr_expect(virtq_rearm(&r->q), "one came meanwhile");
	cr_expect_eq(pop(r), 1);
	cr_expect(!virtq_rearm(&r->q));
	cr_expect_eq(get16(r, avail_event), 1);
	/* Chains that wait and are not popped: only the one after them is told of. */
	offer(r, 0);
	offer(r, 0);
	uint16_t offered = virtq_offered(&r->q);
	cr_expect_eq(offered, 3);
	cr_expect(!virtq_rearm_after(&r->q, offered));
	cr_expect_eq(get16(r, avail_event), 3);
	offer(r, 0);
	cr_expect(virtq_rearm_after(&r->q, offered), "one came meanwhile");
	ring_destroy(r);
}

/* Rings full of noise with fixed seeds: every chain that comes out lies in memory, and nothing else happens. */
Test(virtqueue, noise)
{
	unsigned popped = 0;
	for (unsigned seed = 1; seed <= 300; seed++) {
		struct ring *r = ring_create((uint16_t)(1u << (seed % 9)), seed & 1);
		unsigned state = seed;
		uint8_t *at = mem_at(r->mem, DESC, 0x8000, true);
		for (unsigned i = 0; i < 0x8000; i++)
			at[i] = (uint8_t)rand_r(&state);
		for (unsigned i = 0; i < 256; i++) { /* addresses that often are good */
			uint8_t *d = at + 16 * i;
			put_le64(d, (uint64_t)rand_r(&state) % (MEMORY + 4096));
			put_le32(d + 8, (unsigned)rand_r(&state) % 8192);
			put_le16(d + 12, (uint16_t)(rand_r(&state) % 8));
			put_le16(d + 14, (uint16_t)(rand_r(&state) % (r->q.s.size + 1)));
		}
		for (unsigned i = 0; i < 2000; i++) {
			put16(r, AVAIL + 2, (uint16_t)(r->q.s.next_avail + rand_r(&state) % 3));
			if (r->q.s.size > 1)
				put16(r, AVAIL + 4 + 2u * (r->q.s.next_avail % r->q.s.size),
				      (uint16_t)(rand_r(&state) % (r->q.s.size + 1)));
			if (pop(r) != 1)
				continue;
			popped++;
			cr_assert_leq(r->chain.out_count + r->chain.in_count, VIRTQ_MAX_SEGMENTS);
			for (unsigned s = 0; s < r->chain.out_count + r->chain.in_count; s++)
				cr_assert_not_null(mem_at(r->mem, r->chain.gpa[s], r->chain.iov[s].iov_len, false));
			cr_assert_eq(virtq_push(&r->q, r->chain.head, 1, NULL), 0);
			virtq_wants_interrupt(&r->q);
			virtq_rearm(&r->q);
		}
		ring_destroy(r);
	}
	cr_expect_gt(popped, 1000, "%u", popped);
}
