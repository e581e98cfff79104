/* A network card with several pairs of queues: on a group's network, where a peer sends what the test wants, and on a tap device, where the kernel steers. */
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "devices/virtio_net_test.h"
#include "net/flow_hash.h"
#include "net/tap_test.h"

#define F_MQ	      (1ull << 22)
#define MANY_RINGS    0x400000u
#define MANY_BUFFERS  0x800000u
#define BUFFER_BYTES  0x200u
#define BUFFERS	      256u
#define MAX_PAIRS     16u
#define FRAME_BYTES   60u
#define SEQUENCE_AT   42u
#define GUEST_ADDRESS 0x0a630002u /* 10.99.0.2 */
#define HOST_ADDRESS  0x0a630001u

static const uint8_t peer_mac[6] = {0x52, 0x56, 9, 9, 9, 9};
static char folder[] = "/tmp/vmcp-net-pairs-XXXXXX";

static void make_folder(void) { cr_assert_not_null(mkdtemp(folder)); }
static void remove_folder(void)
{
	char command[100];
	snprintf(command, sizeof(command), "rm -rf %s", folder);
	cr_expect_eq(system(command), 0);
}
TestSuite(net_pairs, .init = make_folder, .fini = remove_folder, .timeout = 60);

struct pairs {
	struct setup *s;
	unsigned count;
	struct rig_queue q[2 * MAX_PAIRS];
	uint16_t seen[MAX_PAIRS]; /* of what was received */
	struct net *peer;
	unsigned heard; /* by the peer, in the loop's thread */
	uint8_t frame[NET_BUFFER_BYTES];
};

static struct net_config group_port(const char *port)
{
	return (struct net_config){.name = "lan", .mode = NET_GROUP, .folder = folder, .network = "lan", .port = port};
}
static void peer_hears(void *opaque, unsigned lane)
{
	struct pairs *p = opaque;
	while (net_receive(p->peer, lane, p->frame) > 0)
		p->heard++;
}
static void open_peer(void *opaque)
{
	static const struct net_events events = {.readable = peer_hears};
	struct pairs *p = opaque;
	const struct net_config config = group_port("peer.0");
	struct err err = ERR_INIT;
	cr_assert_eq(net_open(&config, p->s->rig.loop, &p->peer, &err), 0, "%s", err.message);
	net_listen(p->peer, &events, p);
	net_want(p->peer, 0, true);
}
static struct pairs *pairs_on(struct net_config backend, struct virtio_net_config config)
{
	struct pairs *p = xcalloc(1, sizeof(*p));
	memcpy(config.mac, mac, sizeof(mac));
	config.name = "lan";
	p->count = backend.pairs = config.pairs;
	p->s = setup_on(&backend, &config);
	if (backend.mode == NET_GROUP)
		loop_call(p->s->rig.loop, open_peer, p);
	return p;
}
static struct pairs *pairs_create(unsigned count) { return pairs_on(group_port("card.0"), (struct virtio_net_config){.pairs = count}); }
static void close_peer(void *opaque) { net_close(((struct pairs *)opaque)->peer); }
static void pairs_destroy(struct pairs *p)
{
	loop_call(p->s->rig.loop, close_peer, p);
	setup_destroy(p->s);
	free(p);
}
static void pairs_offer(struct pairs *p, unsigned pair, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		rig_add(&p->q[2 * pair], (struct rig_segment[]){{MANY_BUFFERS + (pair * BUFFERS + p->q[2 * pair].next_desc) * BUFFER_BYTES, BUFFER_BYTES, true}}, 1);
	rig_kick(&p->q[2 * pair]);
	rig_settle(&p->s->rig);
}
/* All queues, and the control queue where it is with these features. */
static void pairs_negotiate(struct pairs *p, uint64_t features)
{
	cr_assert(rig_negotiate(&p->s->rig, SLOT, features | VIRTIO_F_VERSION_1));
	for (unsigned i = 0; i < 2 * p->count; i++)
		rig_queue_init(&p->s->rig, SLOT, i, BUFFERS, MANY_RINGS + i * 0x10000, &p->q[i]);
	rig_queue_init(&p->s->rig, SLOT, features & F_MQ ? 2 * p->count : 2, 64, RINGS, &p->s->control);
	memset(p->seen, 0, sizeof(p->seen));
}
static void pairs_start(struct pairs *p)
{
	pairs_negotiate(p, F_ALL | (p->count > 1 ? F_MQ : 0));
	rig_driver_ok(&p->s->rig, SLOT);
	for (unsigned i = 0; i < p->count; i++)
		pairs_offer(p, i, BUFFERS);
}
static uint8_t set_pairs(struct pairs *p, uint16_t pairs)
{
	uint8_t raw[2];
	put_le16(raw, pairs);
	return command(p->s, 4, 0, raw, 2);
}

/* UDP to the guest, of one flow of many. */
static void make_frame(uint8_t *frame, uint16_t flow, uint32_t sequence)
{
	memset(frame, 0, FRAME_BYTES);
	memcpy(frame, mac, 6);
	memcpy(frame + 6, peer_mac, 6);
	put_be16(frame + 12, 0x0800);
	frame[14] = 0x45;
	frame[23] = 17;
	put_be32(frame + 26, HOST_ADDRESS);
	put_be32(frame + 30, GUEST_ADDRESS);
	put_be16(frame + 34, flow);
	put_be16(frame + 36, 7777);
	put_be32(frame + SEQUENCE_AT, sequence);
}
static unsigned queue_of(uint16_t flow, unsigned active)
{
	uint8_t frame[FRAME_BYTES];
	make_frame(frame, flow, 0);
	return net_flow_hash(frame, FRAME_BYTES) % active;
}
static void peer_sends(void *opaque)
{
	struct pairs *p = opaque;
	const struct iovec iov = {p->frame, NET_HEADER_BYTES + FRAME_BYTES};
	cr_expect_eq(net_send(p->peer, 0, &iov, 1, iov.iov_len), 0);
}
static void arrive(struct pairs *p, uint16_t flow, uint32_t sequence)
{
	memset(p->frame, 0, NET_HEADER_BYTES);
	make_frame(p->frame + NET_HEADER_BYTES, flow, sequence);
	loop_call(p->s->rig.loop, peer_sends, p);
	rig_settle(&p->s->rig);
}
/* The next frame that the pair got: false if there is none. */
static bool next_frame(struct pairs *p, unsigned pair, uint16_t *flow, uint32_t *sequence)
{
	if (p->seen[pair] == rig_used_idx(&p->q[2 * pair]))
		return false;
	uint32_t id = rig_used_id(&p->q[2 * pair], p->seen[pair]++, NULL);
	const uint8_t *frame = at(p->s, MANY_BUFFERS + (pair * BUFFERS + id) * BUFFER_BYTES, BUFFER_BYTES) + NET_HEADER_BYTES;
	*flow = get_be16(frame + 34);
	*sequence = get_be32(frame + SEQUENCE_AT);
	return true;
}
/* 32 flows, three frames of each: they come by the queues of their flows, in order, and by no other. */
static void expect_spread(struct pairs *p, unsigned active)
{
	uint32_t next[32] = {0}, sequence;
	uint16_t flow;
	unsigned got = 0;
	for (uint32_t i = 0; i < 3; i++)
		for (uint16_t f = 0; f < 32; f++)
			arrive(p, f, i);
	for (unsigned pair = 0; pair < p->count; pair++) {
		unsigned before = got;
		for (; next_frame(p, pair, &flow, &sequence); got++) {
			cr_assert_lt(flow, 32);
			cr_expect_eq(queue_of(flow, active), pair, "flow %u by pair %u of %u", flow, pair, active);
			cr_expect_eq(sequence, next[flow]++, "flow %u", flow);
		}
		cr_expect_eq(got > before, pair < active, "pair %u of %u", pair, active);
	}
	cr_expect_eq(got, 96);
}

Test(net_pairs, what_it_offers)
{
	static const unsigned counts[] = {1, 2, 16};
	for (unsigned i = 0; i < ARRAY_LENGTH(counts); i++) {
		struct pairs *p = pairs_create(counts[i]);
		struct rig *rig = &p->s->rig;
		unsigned cap = rig_capability(rig, SLOT, 9, 4);
		cr_expect_eq(rig_features(rig, SLOT) & F_MQ, counts[i] > 1 ? F_MQ : 0);
		cr_expect_eq(rig_reg(rig, SLOT, R_NUM_QUEUES, 2), 2 * counts[i] + 1);
		cr_expect_eq(rig_config_read(rig, SLOT, rig_capability(rig, SLOT, 0x11, 0) + 2, 2), 2 * counts[i] + 1, "vectors, less one");
		cr_expect_eq(rig_config_read(rig, SLOT, cap + 12, 4), counts[i] > 1 ? 10 : 8, "a card of one pair is what it always was");
		cr_expect_eq(rig_reg(rig, SLOT, CONFIG_STATUS + 2, 2), counts[i] > 1 ? counts[i] : 0);
		pairs_destroy(p);
	}
}

Test(net_pairs, flows_keep_to_the_active_pairs)
{
	struct pairs *p = pairs_create(4);
	for (unsigned again = 0; again < 2; again++) {
		pairs_start(p);
		expect_spread(p, 1);
		cr_expect_eq(set_pairs(p, 4), 0);
		expect_spread(p, 4);
		pairs_start(p); /* a reset */
		cr_expect_eq(set_pairs(p, 3), 0);
		expect_spread(p, 3);
		cr_expect_eq(set_pairs(p, 2), 0);
		expect_spread(p, 2);
	}
	pairs_destroy(p);
}

Test(net_pairs, numbers_that_are_none)
{
	struct pairs *p = pairs_create(4);
	pairs_start(p);
	cr_expect_eq(set_pairs(p, 0), 1);
	cr_expect_eq(set_pairs(p, 5), 1);
	cr_expect_eq(set_pairs(p, 0x8000), 1);
	cr_expect_eq(command(p->s, 4, 0, "\2", 1), 1, "cut off");
	cr_expect_eq(command(p->s, 4, 1, "\2\0", 2), 1);
	expect_spread(p, 1);
	/* Two of the four are set up. */
	cr_assert(rig_negotiate(&p->s->rig, SLOT, F_ALL | F_MQ | VIRTIO_F_VERSION_1));
	for (unsigned i = 0; i < 4; i++)
		rig_queue_init(&p->s->rig, SLOT, i, BUFFERS, MANY_RINGS + i * 0x10000, &p->q[i]);
	rig_queue_init(&p->s->rig, SLOT, 8, 64, RINGS, &p->s->control);
	rig_driver_ok(&p->s->rig, SLOT);
	cr_expect_eq(set_pairs(p, 3), 1);
	cr_expect_eq(set_pairs(p, 2), 0);
	pairs_destroy(p);
}

/* A driver that knows nothing of pairs finds the control queue behind the first. */
Test(net_pairs, drivers_of_one_pair)
{
	struct pairs *p = pairs_create(4);
	cr_assert(rig_negotiate(&p->s->rig, SLOT, F_ALL | VIRTIO_F_VERSION_1));
	for (unsigned i = 0; i < 2; i++)
		rig_queue_init(&p->s->rig, SLOT, i, BUFFERS, MANY_RINGS + i * 0x10000, &p->q[i]);
	rig_queue_init(&p->s->rig, SLOT, 2, 64, RINGS, &p->s->control);
	rig_driver_ok(&p->s->rig, SLOT);
	pairs_offer(p, 0, BUFFERS);
	cr_expect_eq(command(p->s, 1, 1, peer_mac, 6), 0);
	cr_expect_eq(set_pairs(p, 1), 1, "not negotiated");
	uint16_t flow;
	uint32_t sequence;
	arrive(p, 5, 6);
	cr_expect(next_frame(p, 0, &flow, &sequence) && flow == 5 && sequence == 6);
	pairs_destroy(p);
}

/* Nothing is lost, and the order stays, where a queue has no buffers for a while. */
Test(net_pairs, frames_wait_for_buffers_of_their_queue)
{
	struct pairs *p = pairs_create(2);
	uint16_t flows[2], flow = 0;
	uint32_t sequence;
	for (unsigned i = 0; i < 2; i++, flow++) {
		while (queue_of(flow, 2) != i)
			flow++;
		flows[i] = flow;
	}
	pairs_negotiate(p, F_ALL | F_MQ);
	rig_driver_ok(&p->s->rig, SLOT);
	pairs_offer(p, 0, 16);
	cr_expect_eq(set_pairs(p, 2), 0);
	for (uint32_t i = 0; i < 3; i++) {
		arrive(p, flows[1], i);
		arrive(p, flows[0], i);
	}
	cr_expect_eq(rig_used_idx(&p->q[2]), 0);
	pairs_offer(p, 1, 1);
	cr_expect_eq(rig_used_idx(&p->q[2]), 1);
	pairs_offer(p, 1, 15);
	for (unsigned i = 0; i < 2; i++)
		for (uint32_t expected = 0; expected < 3; expected++)
			cr_expect(next_frame(p, i, &flow, &sequence) && flow == flows[i] && sequence == expected, "pair %u, frame %u", i, expected);
	pairs_destroy(p);
}

static void put_send(struct pairs *p, unsigned pair, uint32_t bytes)
{
	rig_add(&p->q[2 * pair + 1], (struct rig_segment[]){{SEND, bytes, false}}, 1);
	rig_kick(&p->q[2 * pair + 1]);
}
static void forget_heard(void *opaque) { ((struct pairs *)opaque)->heard = 0; }

/* Also those of pairs that are not active (any more): the driver may have filled them before it asked for fewer. */
Test(net_pairs, frames_from_all_queues)
{
	struct pairs *p = pairs_create(4);
	pairs_start(p);
	for (uint16_t active = 4; active == 4 || active == 1; active = (uint16_t)(active - 3)) {
		cr_expect_eq(set_pairs(p, active), 0);
		memset(at(p->s, SEND, 200), 0, 200);
		memcpy(at(p->s, SEND + 12, 6), peer_mac, 6);
		loop_call(p->s->rig.loop, forget_heard, p);
		for (unsigned i = 0; i < 4; i++) {
			put_send(p, i, 72);
			rig_settle(&p->s->rig);
		}
		cr_expect_eq(p->heard, 4);
		for (unsigned i = 0; i < 4; i++)
			cr_expect_eq(rig_used_idx(&p->q[2 * i + 1]), active == 4 ? 1 : 2);
	}
	cr_expect_eq(stats(p->s).sent_frames, 8);
	pairs_destroy(p);
}

/* Each queue interrupts by its own vector; those from 32 on have pending bits, too. */
Test(net_pairs, vectors)
{
	struct pairs *p = pairs_create(16);
	struct rig *rig = &p->s->rig;
	pairs_start(p);
	rig_msix(rig, SLOT, 33, 10);
	cr_expect_eq(set_pairs(p, 16), 0);
	cr_expect_eq(rig->msis[10 + 33], 1, "control");
	for (uint16_t flow = 0; flow < 64; flow++) {
		unsigned pair = queue_of(flow, 16), before = rig->msis[10 + 1 + 2 * pair];
		arrive(p, flow, 0);
		cr_expect_eq(rig->msis[10 + 1 + 2 * pair], before + 1, "flow %u, pair %u", flow, pair);
	}
	uint64_t table = rig_bar(rig, SLOT, VIRTIO_PCI_MSIX_BAR);
	rig_mmio_write(rig, table + 16 * 33 + 12, 1, 4);
	cr_expect_eq(set_pairs(p, 8), 0);
	cr_expect_eq(rig->msis[10 + 33], 1);
	cr_expect_eq(rig_mmio_read(rig, table + 0x800, 8), 1ull << 33);
	cr_expect_eq(rig_mmio_read(rig, table + 0x804, 4), 2);
	rig_mmio_write(rig, table + 16 * 33 + 12, 0, 4);
	cr_expect_eq(rig->msis[10 + 33], 2);
	cr_expect_eq(rig_mmio_read(rig, table + 0x800, 8), 0);
	pairs_destroy(p);
}

static bool names_pairs(const struct buf *state) { return memmem(state->data, state->length, "more_pairs", 10) != NULL; }

/* The device and its driver at an instant. */
struct moment {
	struct buf state;
	struct pairs driver;
	struct rig_queue control;
	uint8_t rings[2 * MAX_PAIRS * 0x10000], control_rings[0x10000];
};

static struct moment *moment_take(struct pairs *p)
{
	struct moment *m = xcalloc(1, sizeof(*m));
	park(p->s);
	save(p->s, &m->state);
	m->driver = *p;
	m->control = p->s->control;
	memcpy(m->rings, at(p->s, MANY_RINGS, sizeof(m->rings)), sizeof(m->rings));
	memcpy(m->control_rings, at(p->s, RINGS, sizeof(m->control_rings)), sizeof(m->control_rings));
	loop_unpark(p->s->rig.loop);
	return m;
}
static void moment_return(struct pairs *p, const struct moment *m)
{
	struct err err = ERR_INIT;
	cr_assert_eq(p->s->component.drain(p->s->component.opaque, &err), 0);
	park(p->s);
	memcpy(at(p->s, MANY_RINGS, sizeof(m->rings)), m->rings, sizeof(m->rings));
	memcpy(at(p->s, RINGS, sizeof(m->control_rings)), m->control_rings, sizeof(m->control_rings));
	memcpy(p->q, m->driver.q, sizeof(p->q));
	memcpy(p->seen, m->driver.seen, sizeof(p->seen));
	p->s->control = m->control;
	cr_assert_eq(put_back(p->s, &m->state, &err), 0, "%s", err.message);
	loop_unpark(p->s->rig.loop);
	rig_settle(&p->s->rig);
}
static void moment_free(struct moment *m)
{
	buf_free(&m->state);
	free(m);
}

Test(net_pairs, state_goes_there_and_back)
{
	struct pairs *p = pairs_create(4);
	pairs_start(p);
	struct moment *one = moment_take(p);
	cr_expect_not(names_pairs(&one->state), "one is active");
	cr_expect_eq(set_pairs(p, 3), 0);
	struct moment *three = moment_take(p);
	cr_expect(names_pairs(&three->state));
	for (uint16_t other = 1; other <= 4; other += 3) {
		cr_expect_eq(set_pairs(p, other), 0);
		expect_spread(p, other);
		moment_return(p, three);
		cr_expect_eq(rig_reg(&p->s->rig, SLOT, CONFIG_STATUS, 2), 3, "up, and to be announced");
		expect_spread(p, 3);
		moment_return(p, one);
		expect_spread(p, 1);
	}
	moment_free(one);
	moment_free(three);
	pairs_destroy(p);
}

/* A guest that has counted its pairs cannot go on with others. */
Test(net_pairs, states_of_other_cards)
{
	for (unsigned from = 1; from <= 4; from += 3) {
		CLEANUP_BUF struct buf saved = BUF_INIT;
		struct err err = ERR_INIT;
		struct pairs *p = pairs_create(from);
		pairs_start(p);
		if (from > 1)
			cr_expect_eq(set_pairs(p, 2), 0);
		park(p->s);
		save(p->s, &saved);
		loop_unpark(p->s->rig.loop);
		pairs_destroy(p);
		cr_expect_eq(names_pairs(&saved), from > 1, "the state of a card with one pair is what it always was");
		p = pairs_create(5 - from);
		park(p->s);
		cr_expect_eq(put_back(p->s, &saved, &err), -EINVAL);
		loop_unpark(p->s->rig.loop);
		cr_expect_eq(err.class, ERR_STATE);
		cr_expect(strstr(err.message, from == 1 ? "has 1 pairs of queues, this one has 4" : "has 4 pairs of queues, this one has 1"), "%s", err.message);
		cr_expect(strstr(err.hint, from == 1 ? "`queues = 1`" : "`queues = 4`"), "%s", err.hint);
		pairs_destroy(p);
	}
}

Test(net_pairs, damaged_state_is_refused)
{
	struct pairs *p = pairs_create(2);
	struct component *c = &p->s->component;
	struct err err = ERR_INIT;
	const struct codec_field *field = c->table->fields;
	uint8_t *state = xcalloc(1, c->table->size);
	while (strcmp(field->name, "more_pairs") != 0)
		field++;
	for (unsigned mq = 0; mq < 2; mq++) {
		pairs_negotiate(p, mq ? F_ALL | F_MQ : F_CTRL_VQ);
		rig_driver_ok(&p->s->rig, SLOT);
		park(p->s);
		cr_assert_eq(c->capture(c->opaque, state, &err), 0);
		loop_unpark(p->s->rig.loop);
		for (uint8_t more = 0; more < 4; more++) {
			state[field->offset] = more;
			bool good = more == 0 || (mq && more == 1);
			cr_expect_eq(c->validate(c->opaque, state, &err), good ? 0 : -EINVAL, "%u more, MQ %u", more, mq);
		}
	}
	cr_expect_eq(err.class, ERR_DAMAGED);
	free(state);
	pairs_destroy(p);
}

/* 640 KiB at 1 MiB/s by two queues, of which 128 KiB go at once: not below 500 ms, and behind these each queue has its share. */
Test(net_pairs, one_limit_for_all_queues)
{
	struct pairs *p = pairs_on(group_port("card.0"), (struct virtio_net_config){.pairs = 2, .send_rate = 1 << 20});
	unsigned least = 8;
	pairs_start(p);
	cr_expect_eq(set_pairs(p, 2), 0);
	memset(at(p->s, SEND, 40960), 0, 40960);
	uint64_t began = clock_now_ns();
	for (unsigned i = 0; i < 16; i++)
		put_send(p, i % 2, 40960);
	for (bool all = false; !all && clock_now_ns() - began < 60000000000ull; usleep(500)) {
		unsigned a = rig_used_idx(&p->q[1]), b = rig_used_idx(&p->q[3]);
		least = (a == 8 || b == 8) && least == 8 ? (a < b ? a : b) : least;
		all = a == 8 && b == 8;
	}
	uint64_t ns = clock_now_ns() - began;
	cr_expect_eq(stats(p->s).sent_frames, 16);
	cr_expect_geq(ns, 400000000ull);
	cr_expect_leq(ns, 60000000000ull);
	cr_expect_geq(least, 3, "one queue had sent all, the other %u of 8", least);
	pairs_destroy(p);
}

/* What must wait a minute on its way to the guest holds up nothing that the guest sends, however often the guest asks. */
Test(net_pairs, one_limit_does_not_wait_for_the_other)
{
	struct pairs *p = pairs_on(group_port("card.0"), (struct virtio_net_config){.pairs = 1, .send_rate = 1 << 20, .receive_rate = 1});
	unsigned came = 0;
	pairs_start(p);
	do {
		for (; p->seen[0] != rig_used_idx(&p->q[0]); came++)
			rig_offer(&p->q[0], (uint16_t)rig_used_id(&p->q[0], p->seen[0]++, NULL));
		arrive(p, 1, came);
	} while (p->seen[0] != rig_used_idx(&p->q[0]));
	cr_expect_geq(came, 1500, "128 KiB come at once, and %u frames did", came);
	memset(at(p->s, SEND, 40960), 0, 40960);
	for (unsigned i = 0; i < 10; i++)
		put_send(p, 0, 40960);
	for (uint64_t began = clock_now_ns(); rig_used_idx(&p->q[1]) < 10 && clock_now_ns() - began < 30000000000ull; usleep(500))
		rig_kick(&p->q[0]);
	cr_expect_eq(rig_used_idx(&p->q[1]), 10);
	pairs_destroy(p);
}

/* --- on a tap device: the kernel gives what comes for a flow to the pair that it was last sent by --- */

/* UDP of the guest's port 9000 + pair, which the host answers. */
static void expect_steered(struct pairs *p, int host, unsigned pair, unsigned expected)
{
	uint8_t *frame = at(p->s, SEND, NET_HEADER_BYTES + FRAME_BYTES) + NET_HEADER_BYTES, text[32];
	struct sockaddr_in from;
	socklen_t length = sizeof(from);
	struct pollfd ready = {.fd = host, .events = POLLIN};
	uint16_t before = rig_used_idx(&p->q[2 * expected]);
	make_frame(frame, (uint16_t)(9000 + pair), 1);
	memcpy(frame + 6, mac, 6);
	memcpy(frame, (const uint8_t[6]){0x52, 0x56, 8, 8, 8, 8}, 6);
	put_be16(frame + 16, 46);
	frame[22] = 64;
	put_be32(frame + 26, GUEST_ADDRESS);
	put_be32(frame + 30, HOST_ADDRESS);
	put_be16(frame + 38, 26);
	uint32_t sum = 0;
	for (unsigned i = 14; i < 34; i += 2)
		sum += get_be16(frame + i);
	put_be16(frame + 24, (uint16_t)~((sum & 0xffff) + (sum >> 16)));
	put_send(p, pair, NET_HEADER_BYTES + FRAME_BYTES);
	cr_assert_eq(poll(&ready, 1, 5000), 1, "the host did not get what pair %u sent", pair);
	cr_assert_geq(recvfrom(host, text, sizeof(text), 0, (struct sockaddr *)&from, &length), 0);
	cr_assert_eq(sendto(host, "answer", 6, 0, (struct sockaddr *)&from, length), 6);
	for (uint64_t until = clock_now_ns() + 5000000000ull; clock_now_ns() < until && rig_used_idx(&p->q[2 * expected]) == before; usleep(200))
		;
	cr_expect_eq(rig_used_idx(&p->q[2 * expected]), (uint16_t)(before + 1), "the answer to pair %u is not with %u", pair, expected);
}

Test(net_pairs, steered_by_a_tap_device)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap multi_queue && ip link set vmtap0 address 52:56:08:08:08:08 &&"
		      "sysctl -qw net.ipv6.conf.vmtap0.disable_ipv6=1 && ip addr add 10.99.0.1/24 dev vmtap0 &&"
		      "ip neigh replace 10.99.0.2 lladdr 52:56:01:02:03:04 dev vmtap0 nud permanent"));
	struct pairs *p = pairs_on((struct net_config){.name = "lan", .mode = NET_TAP, .interface = "vmtap0"}, (struct virtio_net_config){.pairs = 4});
	struct sockaddr_in host = {.sin_family = AF_INET, .sin_port = htons(7777), .sin_addr.s_addr = htonl(HOST_ADDRESS)};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(bind(fd, (struct sockaddr *)&host, sizeof(host)), 0);
	pairs_start(p);
	expect_steered(p, fd, 0, 0);
	cr_expect_eq(set_pairs(p, 4), 0);
	for (unsigned again = 0; again < 2; again++)
		for (unsigned i = 0; i < 4; i++)
			expect_steered(p, fd, i, i);
	struct moment *four = moment_take(p);
	cr_expect_eq(set_pairs(p, 1), 0);
	expect_steered(p, fd, 0, 0);
	expect_steered(p, fd, 3, 0); /* what is left in a queue goes out by the first */
	moment_return(p, four);
	for (unsigned i = 0; i < 4; i++)
		expect_steered(p, fd, i, i);
	cr_expect_eq(rig_status(&p->s->rig, SLOT), 15);
	moment_free(four);
	close(fd);
	setup_destroy(p->s);
	free(p);
}
