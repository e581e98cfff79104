/* The socket device, from its driver's side and from that of the host's programs. */
#include "devices/virtio_vsock.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "devices/virtio_test.h"

#define SLOT	1u
#define RINGS	0x10000u
#define RECEIVE 0x100000u
#define SEND	0x200000u
#define EVENTS	0x300000u
#define CID	7u
#define HEADER	44u
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct setup {
	struct rig rig;
	struct virtio_vsock *vsock;
	struct component component;
	struct rig_queue receive, send, event;
	char folder[32], path[64];
	uint16_t seen, sent;
	uint32_t buffer, forwarded; /* what the guest says of its credit */
};

static struct setup *setup_create(void)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	strcpy(s->folder, "/tmp/vsock-test-XXXXXX");
	cr_assert_not_null(mkdtemp(s->folder));
	snprintf(s->path, sizeof(s->path), "%s/s", s->folder);
	rig_create(&s->rig);
	cr_assert_eq(virtio_vsock_create(s->rig.pci, s->rig.mem, s->rig.loop, CID, s->path, &s->vsock, &err), 0, "%s", err.message);
	s->component = virtio_vsock_component(s->vsock, 0);
	s->buffer = 1 << 20;
	rig_run(&s->rig);
	return s;
}
static void setup_destroy(struct setup *s)
{
	rig_stop(&s->rig);
	virtio_vsock_destroy(s->vsock);
	rig_destroy(&s->rig);
	cr_expect_eq(access(s->path, F_OK), -1, "the socket is left");
	cr_expect_eq(rmdir(s->folder), 0);
	free(s);
}
static void start(struct setup *s)
{
	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1));
	rig_queue_init(&s->rig, SLOT, 0, 128, RINGS, &s->receive);
	rig_queue_init(&s->rig, SLOT, 1, 128, RINGS + 0x10000, &s->send);
	rig_queue_init(&s->rig, SLOT, 2, 8, RINGS + 0x20000, &s->event);
	rig_driver_ok(&s->rig, SLOT);
	s->seen = s->sent = 0;
	for (unsigned i = 0; i < 64; i++)
		rig_add(&s->receive, (struct rig_segment[]){{RECEIVE + i * 0x1000, 4096, true}}, 1);
	rig_kick(&s->receive);
	rig_add(&s->event, (struct rig_segment[]){{EVENTS, 4, true}}, 1);
	rig_kick(&s->event);
	rig_settle(&s->rig);
}

/* The next packet to the guest within a minute; NULL. Its buffer is offered again. */
static const uint8_t *next(struct setup *s)
{
	static uint8_t copy[4096];
	uint32_t written;
	for (uint64_t until = clock_now_ns() + 60000000000ull; rig_used_idx(&s->receive) == s->seen; usleep(200))
		if (clock_now_ns() > until)
			return NULL;
	uint32_t id = rig_used_id(&s->receive, s->seen++, &written);
	memcpy(copy, mem_at(s->rig.mem, RECEIVE + id * 0x1000, 4096, false), 4096);
	cr_expect_eq(written, HEADER + get_le32(copy + 24));
	rig_offer(&s->receive, (uint16_t)id);
	rig_kick(&s->receive);
	return copy;
}
static uint32_t host_port_of(const uint8_t *p) { return get_le32(p + 16); }
static const uint8_t *expect(struct setup *s, uint16_t op)
{
	const uint8_t *p = next(s);
	cr_assert_not_null(p, "no packet, op %u is awaited", op);
	cr_assert_eq(get_le16(p + 30), op, "op %u, not %u", get_le16(p + 30), op);
	cr_expect(get_le64(p) == 2 && get_le64(p + 8) == CID && get_le16(p + 28) == 1);
	return p;
}
static void say_raw(struct setup *s, uint16_t op, uint32_t host_port, uint32_t guest_port, uint32_t flags, const void *data, uint32_t bytes, uint32_t claimed)
{
	uint64_t gpa = SEND + (s->sent % 64) * 0x10000u;
	uint8_t *p = mem_at(s->rig.mem, gpa % (RIG_MEMORY_BYTES - 0x20000), HEADER + bytes, true);
	gpa %= RIG_MEMORY_BYTES - 0x20000;
	memset(p, 0, HEADER);
	put_le64(p, CID);
	put_le64(p + 8, 2);
	put_le32(p + 16, guest_port);
	put_le32(p + 20, host_port);
	put_le32(p + 24, claimed);
	put_le16(p + 28, 1);
	put_le16(p + 30, op);
	put_le32(p + 32, flags);
	put_le32(p + 36, s->buffer);
	put_le32(p + 40, s->forwarded);
	if (bytes)
		memcpy(p + HEADER, data, bytes);
	rig_add(&s->send, (struct rig_segment[]){{gpa, HEADER + bytes, false}}, 1);
	s->sent++;
	rig_kick(&s->send);
	rig_settle(&s->rig);
}
static void say(struct setup *s, uint16_t op, uint32_t host_port, uint32_t guest_port, const void *data, uint32_t bytes)
{
	say_raw(s, op, host_port, guest_port, 0, data, bytes, bytes);
	cr_expect_eq(rig_used_idx(&s->send), s->sent);
}

static struct sockaddr_un address_of(const struct setup *s, const char *suffix)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	snprintf(a.sun_path, sizeof(a.sun_path), "%s%s", s->path, suffix);
	return a;
}
static int host_connect(struct setup *s, const char *line)
{
	struct sockaddr_un a = address_of(s, "");
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(connect(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	cr_assert_eq(write(fd, line, strlen(line)), (ssize_t)strlen(line));
	return fd;
}
static ssize_t host_read(int fd, void *data, size_t bytes)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	return poll(&p, 1, 5000) == 1 ? read(fd, data, bytes) : -ETIMEDOUT;
}
/* The guest accepts the host's connection to its port 1234. */
static void accept_host(struct setup *s, int fd, uint32_t *host_port)
{
	char line[32] = {0}, want[32];
	const uint8_t *p = expect(s, REQUEST);
	cr_expect_eq(get_le32(p + 20), 1234);
	*host_port = host_port_of(p);
	say(s, RESPONSE, *host_port, 1234, NULL, 0);
	snprintf(want, sizeof(want), "OK %u\n", *host_port);
	cr_assert_eq(host_read(fd, line, sizeof(line) - 1), (ssize_t)strlen(want));
	cr_expect_str_eq(line, want);
}
/* A host's connection to port 1234 of the guest, open. */
static int open_to_guest(struct setup *s, uint32_t *host_port)
{
	int fd = host_connect(s, "CONNECT 1234\n");
	accept_host(s, fd, host_port);
	return fd;
}

Test(vsock, what_it_offers)
{
	struct setup *s = setup_create();
	cr_expect_eq(rig_config_read(&s->rig, SLOT, 0, 4), 0x10531af4);
	cr_expect_eq(rig_reg(&s->rig, SLOT, R_NUM_QUEUES, 2), 3);
	cr_expect_eq(rig_reg(&s->rig, SLOT, VIRTIO_PCI_DEVICE, 8), CID);
	setup_destroy(s);
}

Test(vsock, from_host_to_guest)
{
	struct setup *s = setup_create();
	char text[16] = {0};
	uint32_t port;
	start(s);
	int fd = open_to_guest(s, &port);
	cr_assert_eq(write(fd, "question", 8), 8);
	const uint8_t *p = expect(s, RW);
	cr_expect(get_le32(p + 24) == 8 && memcmp(p + HEADER, "question", 8) == 0);
	say(s, RW, port, 1234, "answer", 6);
	cr_expect_eq(host_read(fd, text, sizeof(text)), 6);
	cr_expect_str_eq(text, "answer");
	/* The host ends its way; the guest still speaks, then ends. */
	shutdown(fd, SHUT_WR);
	p = expect(s, SHUTDOWN);
	cr_expect_eq(get_le32(p + 32), 2);
	say(s, RW, port, 1234, "last", 4);
	say_raw(s, SHUTDOWN, port, 1234, 3, NULL, 0, 0);
	expect(s, RST);
	memset(text, 0, sizeof(text));
	cr_expect_eq(host_read(fd, text, sizeof(text)), 4);
	cr_expect_eq(host_read(fd, text, sizeof(text)), 0);
	close(fd);
	setup_destroy(s);
}

Test(vsock, the_host_goes)
{
	struct setup *s = setup_create();
	uint32_t port;
	start(s);
	int fd = open_to_guest(s, &port);
	cr_assert_eq(write(fd, "bye", 3), 3);
	close(fd);
	const uint8_t *p = expect(s, RW);
	cr_expect(memcmp(p + HEADER, "bye", 3) == 0, "what it said last arrives");
	while (get_le16((p = next(s)) + 30) == SHUTDOWN)
		;
	cr_expect_eq(get_le16(p + 30), RST);
	/* Before the guest has answered. */
	fd = host_connect(s, "CONNECT 5\n");
	port = host_port_of(expect(s, REQUEST));
	close(fd);
	expect(s, RST);
	say(s, RESPONSE, port, 5, NULL, 0);
	expect(s, RST);
	setup_destroy(s);
}

Test(vsock, refused_and_bad_lines)
{
	struct setup *s = setup_create();
	static const char *const bad[] = {"\n", "CONNECT\n", "CONNECT x\n", "CONNECT 5 6\n", "GET / HTTP/1.1\n", "CONNECT 00000000000000000000000000000005\n"};
	char byte;
	start(s);
	int fd = host_connect(s, "CONNECT 99\n");
	uint32_t port = host_port_of(expect(s, REQUEST));
	say(s, RST, port, 99, NULL, 0);
	cr_expect_leq(host_read(fd, &byte, 1), 0, "refused: it ends");
	close(fd);
	for (unsigned i = 0; i < ARRAY_LENGTH(bad); i++) {
		fd = host_connect(s, bad[i]);
		ssize_t got = host_read(fd, &byte, 1);
		cr_expect(got <= 0 && got != -ETIMEDOUT, "%u", i);
		close(fd);
	}
	cr_expect_eq(rig_used_idx(&s->receive), s->seen);
	setup_destroy(s);
}

Test(vsock, from_guest_to_host)
{
	struct setup *s = setup_create();
	struct sockaddr_un a = address_of(s, "_80");
	char text[16] = {0};
	start(s);
	say(s, REQUEST, 80, 5000, NULL, 0);
	expect(s, RST); /* nobody listens */
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(bind(listener, (struct sockaddr *)&a, sizeof(a)), 0);
	cr_assert_eq(listen(listener, 8), 0);
	say(s, REQUEST, 80, 5000, NULL, 0);
	const uint8_t *p = expect(s, RESPONSE);
	cr_expect(host_port_of(p) == 80 && get_le32(p + 20) == 5000 && get_le32(p + 36) > 0);
	int fd = accept(listener, NULL, NULL);
	say(s, RW, 80, 5000, "hello", 5);
	cr_expect_eq(host_read(fd, text, sizeof(text)), 5);
	cr_assert_eq(write(fd, "hi", 2), 2);
	expect(s, RW);
	say(s, RST, 80, 5000, NULL, 0);
	cr_expect_leq(host_read(fd, text, 1), 0);
	close(fd);
	close(listener);
	unlink(a.sun_path);
	setup_destroy(s);
}

/* The device sends no more than the guest has room for, and takes no more than it offered; more is told in time. */
Test(vsock, credit)
{
	struct setup *s = setup_create();
	static uint8_t data[200000], got[200000];
	uint32_t port, sum = 0;
	start(s);
	s->buffer = 6000;
	int fd = open_to_guest(s, &port);
	cr_assert_eq(write(fd, data, 10000), 10000);
	while (sum < 6000)
		sum += get_le32(expect(s, RW) + 24);
	cr_expect_eq(sum, 6000);
	usleep(20000);
	cr_expect_eq(rig_used_idx(&s->receive), s->seen, "no room");
	s->forwarded = 6000;
	say(s, CREDIT_UPDATE, port, 1234, NULL, 0);
	while (sum < 10000)
		sum += get_le32(expect(s, RW) + 24);
	cr_expect_eq(sum, 10000);
	say(s, CREDIT_REQUEST, port, 1234, NULL, 0);
	const uint8_t *p = expect(s, CREDIT_UPDATE);
	uint32_t room = get_le32(p + 36);
	cr_expect_eq(get_le32(p + 40), 0);
	/* The other way, all that is allowed at once; what is told then allows more. */
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i ^ i >> 8);
	uint32_t told = 0, done = 0;
	size_t taken = 0;
	while (taken < sizeof(data)) {
		uint32_t n = (uint32_t)min_u64(min_u64(16384, sizeof(data) - done), room - (done - told));
		if (n > 0) {
			say(s, RW, port, 1234, data + done, n);
			done += n;
		}
		struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
		if (poll(&poll_fd, 1, 0) == 1)
			taken += (size_t)read(fd, got + taken, sizeof(got) - taken);
		if (rig_used_idx(&s->receive) != s->seen)
			told = get_le32(expect(s, CREDIT_UPDATE) + 40);
	}
	cr_expect(memcmp(data, got, sizeof(data)) == 0);
	/* More than was offered, with a host that does not read. */
	for (unsigned i = 0; i < 40; i++)
		say(s, RW, port, 1234, data, 16384);
	while (get_le16((p = next(s)) + 30) == CREDIT_UPDATE)
		;
	cr_expect_eq(get_le16(p + 30), RST);
	close(fd);
	setup_destroy(s);
}

Test(vsock, strange_packets)
{
	struct setup *s = setup_create();
	uint32_t port;
	start(s);
	say(s, RW, 5, 6, "x", 1);
	cr_expect_eq(host_port_of(expect(s, RST)), 5, "of no connection");
	say(s, RST, 5, 6, NULL, 0);
	int fd = open_to_guest(s, &port);
	say(s, 77, port, 1234, NULL, 0);
	expect(s, RST);
	close(fd);
	fd = open_to_guest(s, &port);
	say(s, REQUEST, port, 1234, NULL, 0);
	expect(s, RST);
	close(fd);
	cr_expect_eq(rig_status(&s->rig, SLOT), 15);
	setup_destroy(s);
}

Test(vsock, bad_chains)
{
	struct setup *s = setup_create();
	int level = (int)log_get_level();
	static const struct {
		unsigned queue;
		struct rig_segment segment;
	} bad[] = {
		{0, {RECEIVE, 44, true}}, {0, {RECEIVE, 100, false}}, {1, {SEND, 43, false}}, {1, {SEND, 100, true}},
		{1, {SEND, 200000, false}}, {1, {RIG_MEMORY_BYTES, 44, false}},
	};
	log_set_level(LOG_LEVEL_ERROR);
	for (unsigned i = 0; i < ARRAY_LENGTH(bad); i++) {
		cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1));
		rig_queue_init(&s->rig, SLOT, 0, 8, RINGS, &s->receive);
		rig_queue_init(&s->rig, SLOT, 1, 8, RINGS + 0x10000, &s->send);
		rig_driver_ok(&s->rig, SLOT);
		struct rig_queue *q = bad[i].queue == 0 ? &s->receive : &s->send;
		rig_add(q, &bad[i].segment, 1);
		rig_kick(q);
		rig_settle(&s->rig);
		cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET, "%u", i);
	}
	start(s);
	say_raw(s, RW, 5, 6, 0, "abc", 3, 4); /* says that it holds more than it does */
	cr_expect_eq(rig_status(&s->rig, SLOT) & VIRTIO_STATUS_NEEDS_RESET, VIRTIO_STATUS_NEEDS_RESET);
	start(s);
	uint32_t port;
	close(open_to_guest(s, &port));
	log_set_level((enum log_level)level);
	setup_destroy(s);
}

/* A machine that starts from the same checkpoint as another one has guest sockets of that one's connections: its own come from other ports. */
Test(vsock, ports_are_not_those_of_another_life)
{
	uint32_t ports[2];
	for (int i = 0; i < 2; i++) {
		struct setup *s = setup_create();
		struct err err = ERR_INIT;
		start(s);
		void *state = xcalloc(1, s->component.table->size);
		loop_park_request(s->rig.loop);
		loop_park_wait(s->rig.loop);
		cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
		loop_unpark(s->rig.loop);
		cr_assert_eq(s->component.drain(s->component.opaque, &err), 0);
		loop_park_request(s->rig.loop);
		loop_park_wait(s->rig.loop);
		cr_assert_eq(s->component.apply(s->component.opaque, state, &err), 0, "%s", err.message);
		loop_unpark(s->rig.loop);
		free(state);
		rig_settle(&s->rig);
		rig_offer(&s->event, 0);
		rig_kick(&s->event);
		close(open_to_guest(s, &ports[i]));
		setup_destroy(s);
	}
	cr_expect_neq(ports[0], ports[1]);
}

/* Back at a checkpoint: the host's connection has ended, the guest is told, a new one works. */
Test(vsock, state_goes_there_and_back)
{
	struct setup *s = setup_create();
	CLEANUP_BUF struct buf saved = BUF_INIT;
	struct err err = ERR_INIT;
	uint32_t port;
	char byte;
	start(s);
	int fd = open_to_guest(s, &port);
	void *state = xcalloc(1, s->component.table->size);
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
	cr_assert_eq(s->component.capture(s->component.opaque, state, &err), 0);
	cr_assert_eq(codec_encode(s->component.table, state, &saved, &err), 0, "%s", err.message);
	loop_unpark(s->rig.loop);
	cr_assert_eq(s->component.drain(s->component.opaque, &err), 0);
	loop_park_request(s->rig.loop);
	loop_park_wait(s->rig.loop);
	cr_assert_eq(codec_decode(s->component.table, saved.data, saved.length, state, &err), 0, "%s", err.message);
	cr_assert_eq(s->component.validate(s->component.opaque, state, &err), 0, "%s", err.message);
	cr_assert_eq(s->component.apply(s->component.opaque, state, &err), 0, "%s", err.message);
	*(uint32_t *)mem_at(s->rig.mem, EVENTS, 4, true) = 0xffffffff;
	loop_unpark(s->rig.loop);
	free(state);
	cr_expect_leq(host_read(fd, &byte, 1), 0, "the host's end");
	close(fd);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->event), 1, "the guest is told");
	cr_expect_eq(*(uint32_t *)mem_at(s->rig.mem, EVENTS, 4, false), 0);
	/* Until the guest has acted on that nothing new begins: the reset would end it. Of one that does not wait for it the guest hears nothing. */
	uint16_t seen = s->seen;
	fd = host_connect(s, "CONNECT 1234\n");
	close(host_connect(s, "CONNECT 99\n"));
	rig_kick(&s->receive);
	usleep(20000);
	rig_settle(&s->rig);
	cr_expect_eq(rig_used_idx(&s->receive), seen, "a connection begins before the guest has acted on the reset");
	cr_expect_eq(get_le16(mem_at(s->rig.mem, s->event.used, 2, false)), 0, "the driver is asked to notify");
	rig_offer(&s->event, 0);
	rig_kick(&s->event);
	accept_host(s, fd, &port);
	close(fd);
	while (get_le16(next(s) + 30) != RST)
		;
	close(open_to_guest(s, &port));
	setup_destroy(s);
}

Test(vsock, one_path_one_device)
{
	struct setup *s = setup_create();
	struct rig other;
	struct virtio_vsock *second;
	struct err err = ERR_INIT;
	rig_create(&other);
	cr_expect_eq(virtio_vsock_create(other.pci, other.mem, other.loop, CID, s->path, &second, &err), -EADDRINUSE);
	cr_expect(err.class == ERR_STATE && strstr(err.message, s->path) && err.hint[0], "%s", err.message);
	cr_expect_eq(access(s->path, F_OK), 0, "the first one's is still there");
	/* One that a crash left is replaced. */
	char left[80];
	snprintf(left, sizeof(left), "%s_left", s->path);
	struct sockaddr_un a = address_of(s, "_left");
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	cr_assert_eq(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
	close(fd);
	cr_expect_eq(virtio_vsock_create(other.pci, other.mem, other.loop, CID, left, &second, &err), 0, "%s", err.message);
	virtio_vsock_destroy(second);
	char deep[200];
	snprintf(deep, sizeof(deep), "%s/%0150d", s->folder, 0);
	cr_expect_eq(virtio_vsock_create(other.pci, other.mem, other.loop, CID, deep, &second, &err), -ENAMETOOLONG);
	rig_destroy(&other);
	setup_destroy(s);
}
