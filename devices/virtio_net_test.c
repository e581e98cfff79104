/* The network card, from its driver's side, on the backend user: what the guest sends is answered by libslirp. */
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "devices/virtio_net_test.h"

static void offer(struct setup *s, unsigned count, uint32_t bytes)
{
	for (unsigned i = 0; i < count; i++)
		rig_add(&s->receive, (struct rig_segment[]){{RECEIVE + i * 0x1000, bytes, true}}, 1);
	rig_kick(&s->receive);
	rig_settle(&s->rig);
}
/* An ARP question for the host, which libslirp answers at once. Header and frame in one segment, or two. */
static void ask(struct setup *s, bool split)
{
	uint8_t *frame = at(s, SEND, 64) + 12;
	memset(frame - 12, 0, 64);
	memset(frame, 0xff, 6);
	memcpy(frame + 6, mac, 6);
	put_be16(frame + 12, 0x0806);
	put_be16(frame + 14, 1);
	put_be16(frame + 16, 0x0800);
	frame[18] = 6;
	frame[19] = 4;
	put_be16(frame + 20, 1);
	memcpy(frame + 22, mac, 6);
	put_be32(frame + 28, GUEST);
	put_be32(frame + 38, HOST);
	if (split)
		rig_add(&s->send, (struct rig_segment[]){{SEND, 20, false}, {SEND + 20, 34, false}}, 2);
	else
		rig_add(&s->send, (struct rig_segment[]){{SEND, 54, false}}, 1);
	rig_kick(&s->send);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->send), (uint16_t)++s->sent);
}

Test(net, what_it_offers)
{
	struct setup *s = setup_create();
	cr_expect_eq(rig_config_read(&s->rig, SLOT, 0, 4), 0x10411af4);
	cr_expect_eq(rig_features(&s->rig, SLOT) & F_ALL, F_ALL);
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_NUM_QUEUES, 2), 3);
	for (unsigned i = 0; i < 6; i++)
		cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_MAC + i, 1), mac[i]);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_STATUS, 2), 1, "link up");
	setup_destroy(s);
}

Test(net, a_frame_each_way)
{
	for (unsigned split = 0; split < 2; split++) {
		struct setup *s = setup_create();
		uint32_t written;
		start(s, split ? F_ALL : F_GUEST_CSUM);
		offer(s, 2, 1600);
		ask(s, split);
		cr_expect_eq(rig_used_idx(&s->receive), 1);
		rig_used_id(&s->receive, 0, &written);
		const uint8_t *got = at(s, RECEIVE, 64);
		cr_expect_geq(written, 54);
		cr_expect_eq(got[0], 2, "its checksum needs no look");
		cr_expect_eq(get_le16(got + 10), 1, "one buffer");
		cr_expect(memcmp(got + 12, mac, 6) == 0 && get_be16(got + 12 + 20) == 2 && get_be32(got + 12 + 28) == HOST);
		cr_expect_eq(stats(s).sent_frames, 1);
		cr_expect_eq(stats(s).received_frames, 1);
		setup_destroy(s);
	}
}

Test(net, checksum_flags_only_for_those_who_know_them)
{
	struct setup *s = setup_create();
	start(s, F_MRG_RXBUF);
	offer(s, 1, 1600);
	ask(s, false);
	cr_expect_eq(*at(s, RECEIVE, 1), 0);
	setup_destroy(s);
}

/* Buffers of 20 bytes: the frame lies in several, all of which are seen at once, and the first says how many. */
Test(net, merged_buffers)
{
	struct setup *s = setup_create();
	uint32_t written, sum = 0;
	start(s, F_ALL);
	offer(s, 2, 20);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 0, "does not fit yet");
	offer(s, 2, 20);
	unsigned used = rig_used_idx(&s->receive);
	cr_expect_geq(used, 3);
	cr_expect_eq(get_le16(at(s, RECEIVE, 20) + 10), used);
	uint8_t frame[80];
	for (unsigned i = 0; i < used; i++) {
		uint32_t id = rig_used_id(&s->receive, (uint16_t)i, &written);
		uint64_t gpa = RECEIVE + (id % 2) * 0x1000; /* each offer() begins anew */
		if (i < 2)
			memcpy(frame + sum, at(s, gpa, 20), written);
		sum += written;
	}
	cr_expect_geq(sum, 54);
	setup_destroy(s);
}

Test(net, merged_header_split_and_rest)
{
	struct setup *s = setup_create();
	start(s, F_ALL);
	/* The header in pieces, the frame in three chains. */
	rig_add(&s->receive, (struct rig_segment[]){{RECEIVE, 11, true}, {RECEIVE + 0x100, 9, true}}, 2);
	rig_add(&s->receive, (struct rig_segment[]){{RECEIVE + 0x200, 10, true}}, 1);
	rig_add(&s->receive, (struct rig_segment[]){{RECEIVE + 0x300, 100, true}}, 1);
	rig_kick(&s->receive);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 3);
	cr_expect_eq(*at(s, RECEIVE + 10, 1), 3);
	cr_expect_eq(*at(s, RECEIVE + 0x100, 1), 0);
	cr_expect(memcmp(at(s, RECEIVE + 0x101, 6), mac, 6) == 0);
	setup_destroy(s);
}

Test(net, what_can_never_fit_is_dropped)
{
	struct setup *s = setup_create();
	start(s, 0);
	offer(s, 1, 30);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 0);
	cr_expect_eq(stats(s).receive_drops, 1);
	offer(s, 1, 1600);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 0, "the small buffer is still the first");
	cr_expect_eq(stats(s).receive_drops, 2);
	setup_destroy(s);
}

static bool wants_to_be_told(struct rig_queue *q) { return get_le16(mem_at(q->rig->mem, q->used, 2, false)) == 0; }

/* Each telling is an exit of the guest: of buffers only where they were missing. */
Test(net, asks_for_buffers_only_where_they_are_missing)
{
	struct setup *s = setup_create();
	start(s, F_ALL);
	offer(s, 2, 1600);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 1);
	cr_expect_not(wants_to_be_told(&s->receive), "one is left");
	cr_expect(wants_to_be_told(&s->send), "all is sent");
	ask(s, false);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 2);
	cr_expect(wants_to_be_told(&s->receive), "a frame waits");
	offer(s, 2, 1600);
	cr_expect_eq(rig_used_idx(&s->receive), 3);
	cr_expect_not(wants_to_be_told(&s->receive));
	setup_destroy(s);
}

Test(net, frames_wait_for_buffers)
{
	struct setup *s = setup_create();
	start(s, F_ALL);
	for (unsigned i = 0; i < 5; i++)
		ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 0);
	offer(s, 3, 1600);
	cr_expect_eq(rig_used_idx(&s->receive), 3);
	offer(s, 3, 1600);
	cr_expect_eq(rig_used_idx(&s->receive), 5);
	setup_destroy(s);
}

Test(net, filters)
{
	struct setup *s = setup_create();
	static const uint8_t other[6] = {0x52, 0x56, 9, 9, 9, 9};
	uint8_t table[8 + 12] = {0};
	start(s, F_ALL);
	offer(s, 16, 1600);
	cr_expect_eq(command(s, 0, 0, "\0", 1), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 1, "it is for this card");
	cr_expect_eq(command(s, 1, 1, other, 6), 0);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_MAC + 5, 1), 9);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 1, "no more");
	cr_expect_eq(stats(s).filtered, 1);
	put_le32(table, 1);
	memcpy(table + 4, mac, 6);
	cr_expect_eq(command(s, 1, 0, table, 14), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 2, "listed");
	cr_expect_eq(command(s, 0, 4, "\1", 1), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 2, "no unicast at all");
	cr_expect_eq(command(s, 0, 4, "\0", 1), 0);
	memset(table, 0, sizeof(table));
	cr_expect_eq(command(s, 1, 0, table, 8), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 2);
	cr_expect_eq(command(s, 0, 0, "\1", 1), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 3, "promiscuous");
	/* A reset is a new start. */
	start(s, F_ALL);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_MAC + 5, 1), 4);
	setup_destroy(s);
}

Test(net, commands_that_are_none)
{
	struct setup *s = setup_create();
	uint8_t table[64] = {0};
	start(s, F_ALL);
	cr_expect_eq(command(s, 0, 6, "\1", 1), 1);
	cr_expect_eq(command(s, 0, 0, NULL, 0), 1);
	cr_expect_eq(command(s, 0, 0, "\2", 1), 1);
	cr_expect_eq(command(s, 1, 1, "\1\2\3\4\5\6", 6), 1, "a group's address");
	cr_expect_eq(command(s, 1, 1, mac, 5), 1);
	cr_expect_eq(command(s, 1, 0, table, 7), 1);
	put_le32(table, 0xffffffff);
	cr_expect_eq(command(s, 1, 0, table, 64), 1);
	cr_expect_eq(command(s, 2, 0, "\0\0", 2), 1, "no VLAN filters");
	cr_expect_eq(command(s, 3, 0, NULL, 0), 1, "nothing was announced");
	cr_expect_eq(command(s, 77, 0, NULL, 0), 1);
	start(s, F_CTRL_VQ);
	cr_expect_eq(command(s, 0, 0, "\1", 1), 1, "not negotiated");
	cr_expect_eq(command(s, 1, 1, mac, 6), 1);
	setup_destroy(s);
}

Test(net, bad_chains)
{
	struct setup *s = setup_create();
	int level = (int)log_get_level();
	static const struct {
		unsigned queue;
		struct rig_segment segments[2];
		unsigned count;
	} bad[] = {
		{0, {{RECEIVE, 64, false}}, 1},
		{0, {{RECEIVE, 11, true}}, 1},
		{0, {{RECEIVE, 64, false}, {RECEIVE, 64, true}}, 2},
		{0, {{RIG_MEMORY_BYTES - 10, 100, true}}, 1},
		{1, {{SEND, 64, true}}, 1},
		{1, {{SEND, 11, false}}, 1},
		{1, {{SEND, 64, false}, {SEND, 64, true}}, 2},
		{1, {{SEND, 65536 + 64, false}}, 1},
		{1, {{RIG_MEMORY_BYTES, 64, false}}, 1},
		{2, {{CONTROL, 1, false}, {CONTROL + 64, 1, true}}, 2},
		{2, {{CONTROL, 2, false}}, 1},
		{2, {{CONTROL, 1 << 20, false}, {CONTROL + 64, 1, true}}, 2},
	};
	log_set_level(LOG_LEVEL_ERROR);
	for (unsigned i = 0; i < ARRAY_LENGTH(bad); i++) {
		start(s, F_ALL);
		s->sent = 0;
		struct rig_queue *q = bad[i].queue == 0 ? &s->receive : bad[i].queue == 1 ? &s->send : &s->control;
		rig_add(q, bad[i].segments, bad[i].count);
		rig_kick(q);
		if (bad[i].queue == 0)
			ask(s, false); /* a frame that wants in */
		rig_settle(&s->rig);
		cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET, "%u", i);
	}
	/* Frames that are none are lost, as on a wire. */
	start(s, F_ALL);
	s->sent = 0;
	memset(at(s, SEND, 64), 0xff, 64);
	rig_add(&s->send, (struct rig_segment[]){{SEND, 12, false}}, 1);
	rig_add(&s->send, (struct rig_segment[]){{SEND, 64, false}}, 1);
	rig_kick(&s->send);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->send), 2);
	cr_expect_eq(stats(s).send_errors, 2);
	cr_expect_eq(rig_status(&s->rig, SLOT), 15);
	s->sent = 2;
	offer(s, 1, 1600);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 1, "works again");
	log_set_level((enum log_level)level);
	setup_destroy(s);
}

/* The filters come back, a frame that waited does not, the card announces itself, and goes on. */
Test(net, state_goes_there_and_back)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf saved = BUF_INIT;
	struct err err = ERR_INIT;
	static const uint8_t other[6] = {0x52, 0x56, 9, 9, 9, 9};
	start(s, F_ALL);
	cr_expect_eq(command(s, 1, 1, other, 6), 0);
	cr_expect_eq(command(s, 0, 0, "\0", 1), 0);
	ask(s, false); /* no answer comes through: it is for another address */
	park(s);
	save(s, &saved);
	uint8_t *rings = xcalloc(1, 0x30000);
	memcpy(rings, at(s, RINGS, 0x30000), 0x30000);
	loop_unpark(s->rig.loop);

	cr_expect_eq(command(s, 1, 1, mac, 6), 0);
	ask(s, false); /* waits for a buffer */
	s->sent--;
	cr_assert_eq(s->component.drain(s->component.opaque, &err), 0);
	park(s);
	memcpy(at(s, RINGS, 0x30000), rings, 0x30000);
	rig_reg(&s->rig, SLOT, VIRTIO_PCI_ISR, 1);
	cr_assert_eq(put_back(s, &saved, &err), 0, "%s", err.message);
	loop_unpark(s->rig.loop);
	free(rings);
	rig_settle(&s->rig);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_MAC + 5, 1), 9);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_STATUS, 2), 3, "up, and to be announced");
	cr_expect_eq(rig_reg(&s->rig, SLOT, VIRTIO_PCI_ISR, 1) & 2, 2, "which an interrupt says");
	/* The driver's rings stand where they stood at the checkpoint. */
	s->control.avail_idx = rig_used_idx(&s->control);
	s->control.next_desc = (uint16_t)(2 * s->control.avail_idx);
	s->send.avail_idx = rig_used_idx(&s->send);
	offer(s, 2, 1600);
	cr_expect_eq(rig_used_idx(&s->receive), 0, "nothing of the other life");
	cr_expect_eq(command(s, 3, 0, NULL, 0), 0);
	cr_expect_eq(rig_reg(&s->rig, SLOT, CONFIG_STATUS, 2), 1);
	cr_expect_eq(command(s, 1, 1, mac, 6), 0);
	ask(s, false);
	cr_expect_eq(rig_used_idx(&s->receive), 1);
	setup_destroy(s);
}

/* A port of the host's that nobody has. */
static uint16_t free_port(int type)
{
	struct sockaddr_in host = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(host);
	int fd = socket(AF_INET, type, 0);
	cr_assert(bind(fd, (struct sockaddr *)&host, length) == 0 && getsockname(fd, (struct sockaddr *)&host, &length) == 0);
	close(fd);
	return ntohs(host.sin_port);
}
/* A card whose guest is reached at a port of the host. */
static struct net_config forwarding(bool udp, uint16_t host_port, uint16_t guest_port)
{
	return (struct net_config){.name = "lan",
				   .mode = NET_USER,
				   .forward_count = 1,
				   .forwards = {{.udp = udp, .host_address = {127, 0, 0, 1}, .host_port = host_port, .guest_port = guest_port}}};
}

static int connect_to(int type, uint16_t port)
{
	const struct sockaddr_in host = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, type, 0);
	cr_assert_eq(connect(fd, (const struct sockaddr *)&host, sizeof(host)), 0, "%s", strerror(errno));
	return fd;
}

/* Of two connections to a forwarded port the one from before the machine is put back is reset, and the one from behind is not, though the loop sees neither
 * in between. */
Test(net, connections_begin_with_the_state)
{
	const uint16_t port = free_port(SOCK_STREAM);
	const struct net_config backend = forwarding(false, port, 80);
	struct setup *s = setup_on(&backend, &(struct virtio_net_config){.name = "lan"});
	void *state = xcalloc(1, s->component.table->size);
	struct err err = ERR_INIT;
	start(s, F_ALL);
	park(s);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	int before = connect_to(SOCK_STREAM, port);
	cr_assert_eq(s->component.apply(s->component.opaque, state, &err), 0, "%s", err.message);
	free(state);
	int behind = connect_to(SOCK_STREAM, port);
	loop_unpark(s->rig.loop);
	rig_settle(&s->rig);
	struct pollfd fds[2] = {{.fd = before, .events = POLLIN}, {.fd = behind, .events = POLLIN}};
	cr_expect_eq(poll(&fds[0], 1, 5000), 1);
	cr_expect(fds[0].revents & POLLERR, "no reset");
	cr_expect_eq(poll(&fds[1], 1, 200), 0, "cut off");
	close(before);
	close(behind);
	setup_destroy(s);
}

/* The driver's wish to tell of one more frame, as the card left it (2.7.10). */
static bool must_tell(struct rig_queue *q, bool event_idx)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	const uint8_t *event = mem_at(q->rig->mem, q->used + 4 + 8u * q->size, 2, false);
	return event_idx ? get_le16(event) == (uint16_t)(q->avail_idx - 1) : wants_to_be_told(q);
}
/* The datagram in the next used buffer goes back to where it came from. True: the card had to be told. */
static bool echo(struct setup *s, uint16_t number, bool event_idx)
{
	uint32_t bytes;
	uint64_t gpa = get_le64(at(s, s->receive.desc + 16 * rig_used_id(&s->receive, number, &bytes), 16));
	uint8_t *from = at(s, gpa, 2000) + 12, *to = at(s, SEND, 2000) + 12;
	static const unsigned swapped[][3] = {{0, 6, 6}, {26, 30, 4}, {34, 36, 2}}; /* addresses, and ports */

	cr_assert(bytes > 12 + 42 && bytes < 2000);
	memset(to - 12, 0, 12);
	memcpy(to, from, bytes - 12);
	for (unsigned i = 0; i < ARRAY_LENGTH(swapped); i++) {
		memcpy(to + swapped[i][0], from + swapped[i][1], swapped[i][2]);
		memcpy(to + swapped[i][1], from + swapped[i][0], swapped[i][2]);
	}
	rig_add(&s->receive, (struct rig_segment[]){{gpa, 1600, true}}, 1);
	rig_add(&s->send, (struct rig_segment[]){{SEND, bytes, false}}, 1);
	bool told = must_tell(&s->send, event_idx);
	if (told)
		rig_kick(&s->send);
	return told;
}
/* So many round trips at least, and until one of them needed no telling, if `until`: how many needed none. */
static unsigned answers_untold(struct setup *s, int client, unsigned trips, bool event_idx, bool until)
{
	struct pollfd fd = {.fd = client, .events = POLLIN};
	uint64_t end = clock_now_ns() + 60000000000ull;
	uint16_t seen = rig_used_idx(&s->receive);
	unsigned untold = 0;

	for (unsigned i = 0; i < trips || (until && untold == 0 && clock_now_ns() < end); i++, seen++) {
		unsigned got = 0;
		cr_assert_eq(send(client, &i, sizeof(i), 0), sizeof(i));
		while (rig_used_idx(&s->receive) == seen && clock_now_ns() < end)
			;
		cr_assert_neq(rig_used_idx(&s->receive), seen, "datagram %u does not come", i);
		untold += !echo(s, seen, event_idx);
		cr_assert_eq(poll(&fd, 1, 60000), 1, "answer %u is lost", i);
		cr_assert(recv(client, &got, sizeof(got), 0) == sizeof(got) && got == i);
	}
	return untold;
}

/* A driver that tells the card of what it sends only where it must loses nothing, and is spared it where a processor is to spare. */
Test(net, an_answer_at_once_needs_no_telling)
{
	const uint16_t port = free_port(SOCK_DGRAM);
	const struct net_config backend = forwarding(true, port, 7);
	for (unsigned spare = 0; spare < 2; spare++) {
		for (unsigned event_idx = 0; event_idx < 2; event_idx++) {
			struct virtio_net_config config = {.name = "lan"};
			memcpy(config.mac, mac, sizeof(mac));
			struct setup *s = setup_on(&backend, &config);
			rig_stop(&s->rig);
			loop_set_spare(s->rig.loop, spare);
			rig_run(&s->rig);
			start(s, F_ALL | (event_idx ? VIRTIO_F_EVENT_IDX : 0));
			offer(s, 16, 1600);
			ask(s, false); /* so that the address is known */
			int client = connect_to(SOCK_DGRAM, port);
			unsigned untold = answers_untold(s, client, 1000, event_idx, spare > 0);
			cr_expect_eq(untold > 0, spare > 0, "%u", untold);
			close(client);
			setup_destroy(s);
		}
	}
}

Test(net, damaged_state_is_refused)
{
	struct setup *s = setup_create();
	struct err err = ERR_INIT;
	start(s, F_ALL);
	uint8_t *state = xcalloc(1, s->component.table->size);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	cr_expect_eq(s->component.validate(s->component.opaque, state, &err), 0);
	for (const struct codec_field *f = s->component.table->fields; f->name; f++) {
		bool wrong = strcmp(f->name, "mac") == 0 || strcmp(f->name, "status") == 0;
		uint8_t before = state[f->offset];
		if (!wrong)
			continue;
		state[f->offset] = 0xff;
		cr_expect_eq(s->component.validate(s->component.opaque, state, &err), -EINVAL, "%s", f->name);
		cr_expect_eq(err.class, ERR_DAMAGED);
		state[f->offset] = before;
	}
	free(state);
	setup_destroy(s);
}

/* 400 KiB at 1 MiB/s, of which 128 KiB go at once: not below 250 ms. */
Test(net, limits)
{
	struct virtio_net_config config = {.name = "lan", .send_rate = 1 << 20};
	memcpy(config.mac, mac, sizeof(mac));
	struct setup *s = setup_with(&config);
	start(s, F_ALL);
	memset(at(s, SEND, 40960), 0, 40960);
	uint64_t began = clock_now_ns();
	for (unsigned i = 0; i < 10; i++)
		rig_add(&s->send, (struct rig_segment[]){{SEND, 40960, false}}, 1);
	rig_kick(&s->send);
	while (rig_used_idx(&s->send) < 10 && clock_now_ns() - began < 60000000000ull)
		usleep(1000);
	uint64_t ns = clock_now_ns() - began;
	cr_expect_eq(rig_used_idx(&s->send), 10);
	cr_expect_geq(ns, 200000000ull);
	cr_expect_leq(ns, 60000000000ull);
	setup_destroy(s);
}
