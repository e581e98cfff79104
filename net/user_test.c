/* Backend user against libslirp and the host's sockets, with frames made by hand. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>

#include "net/net_test.h"

#define GUEST 0x0a00020fu
#define HOST  0x0a000202u
enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16 };

/* A socket of the host on a port that is free; `type` SOCK_STREAM listens. */
static int host_socket(int type, uint16_t *port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(at);
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
	cr_assert_geq(fd, 0);
	cr_assert_eq(bind(fd, (struct sockaddr *)&at, sizeof(at)), 0);
	if (type == SOCK_STREAM)
		cr_assert_eq(listen(fd, 8), 0);
	cr_assert_eq(getsockname(fd, (struct sockaddr *)&at, &length), 0);
	*port = ntohs(at.sin_port);
	return fd;
}
static uint16_t free_port(int type)
{
	uint16_t port;
	close(host_socket(type, &port));
	return port;
}
static int host_connect(uint16_t port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(connect(fd, (struct sockaddr *)&at, sizeof(at)), 0);
	return fd;
}
/* What a read gives within five seconds; -ETIMEDOUT. */
static ssize_t host_read(int fd, void *data, size_t bytes)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	if (poll(&p, 1, 5000) != 1)
		return -ETIMEDOUT;
	ssize_t got = read(fd, data, bytes);
	return got < 0 ? -errno : got;
}

static struct net_config config_user(void) { return (struct net_config){.name = "lan", .mode = NET_USER}; }
static void add_forward(struct net_config *config, bool udp, uint16_t host, uint16_t guest)
{
	config->forwards[config->forward_count++] =
		(struct net_forward){.udp = udp, .host_address = {127, 0, 0, 1}, .host_port = host, .guest_port = guest};
}
static struct card *start(const struct net_config *config)
{
	struct err err = ERR_INIT;
	struct card *card = card_create(config, &err);
	cr_assert_not_null(card, "%s", err.message);
	return card;
}

static bool is_arp_answer(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0806 && get_be16(f + 20) == 2; }
static bool is_arp_question(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0806 && get_be16(f + 20) == 1; }
static bool is_udp(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0800 && f[23] == 17; }
static bool is_tcp(const uint8_t *f, size_t n) { return n >= 54 && get_be16(f + 12) == 0x0800 && f[23] == 6; }

/* The guest says who it is, as it does when it comes up; libslirp then knows where to send. */
static void say_hello(struct card *card, uint8_t host_mac[6])
{
	uint8_t arp[42];
	make_arp(arp, everybody, 1, GUEST, HOST);
	cr_assert_eq(card_send(card, arp, sizeof(arp)), 0);
	const uint8_t *answer = card_wait(card, is_arp_answer, NULL);
	cr_assert_not_null(answer, "no answer to ARP");
	cr_expect_eq(get_be32(answer + 28), HOST);
	memcpy(host_mac, answer + 22, 6);
}

static void send_udp(struct card *card, const uint8_t to_mac[6], uint32_t from, uint32_t to, uint16_t from_port, uint16_t to_port, const void *data,
		     size_t bytes)
{
	uint8_t frame[1500] = {0};
	make_ethernet(frame, to_mac, 0x0800);
	make_ip(frame, 17, from, to, 8 + bytes);
	put_be16(frame + 34, from_port);
	put_be16(frame + 36, to_port);
	put_be16(frame + 38, (uint16_t)(8 + bytes));
	memcpy(frame + 42, data, bytes);
	cr_assert_eq(card_send(card, frame, 42 + bytes), 0);
}

struct tcp {
	struct card *card;
	uint8_t mac[6];
	uint16_t guest_port, peer_port;
	uint32_t sequence, acknowledge;
};
/* A segment of the guest; with `open` its checksum is left to the backend. */
static void send_tcp(struct tcp *t, uint8_t flags, const void *data, size_t bytes, bool open)
{
	CLEANUP_FREE uint8_t *buffer = xcalloc(1, NET_HEADER_BYTES + 54 + bytes);
	uint8_t *frame = buffer + NET_HEADER_BYTES, *tcp = frame + 34;
	make_ethernet(frame, t->mac, 0x0800);
	make_ip(frame, 6, GUEST, HOST, 20 + bytes);
	put_be16(tcp, t->guest_port);
	put_be16(tcp + 2, t->peer_port);
	put_be32(tcp + 4, t->sequence);
	put_be32(tcp + 8, t->acknowledge);
	tcp[12] = 5 << 4;
	tcp[13] = flags;
	put_be16(tcp + 14, 0xffff);
	if (bytes)
		memcpy(frame + 54, data, bytes);
	if (open) {
		buffer[NET_H_FLAGS] = NET_F_NEEDS_CSUM;
		buffer[NET_H_GSO_TYPE] = NET_GSO_TCPV4;
		put_le16(buffer + NET_H_GSO_SIZE, 1460);
		put_le16(buffer + NET_H_CSUM_START, 34);
		put_le16(buffer + NET_H_CSUM_OFFSET, 16);
		put_be16(tcp + 16, (uint16_t)~checksum(pseudo_sum(frame, 20 + bytes), NULL, 0));
	} else {
		put_be16(tcp + 16, checksum(pseudo_sum(frame, 20 + bytes), tcp, 20 + bytes));
	}
	cr_assert_eq(card_send_raw(t->card, buffer, NET_HEADER_BYTES + 54 + bytes), 0);
	t->sequence += (uint32_t)bytes + !!(flags & (SYN | FIN));
}
static const uint8_t *wait_tcp(struct tcp *t, uint8_t flags, size_t *payload)
{
	const uint8_t *frame;
	while ((frame = card_wait(t->card, is_tcp, NULL)) != NULL) {
		cr_expect_eq(checksum(pseudo_sum(frame, get_be16(frame + 16) - 20u), frame + 34, get_be16(frame + 16) - 20u), 0);
		if ((frame[47] & flags) != flags || (t->peer_port && get_be16(frame + 34) != t->peer_port))
			continue;
		size_t header = 20u + (frame[46] >> 4) * 4u, bytes = get_be16(frame + 16) - header;
		t->peer_port = get_be16(frame + 34);
		t->acknowledge = get_be32(frame + 38) + (uint32_t)bytes + !!(frame[47] & (SYN | FIN));
		if (payload)
			*payload = bytes;
		return frame + 14 + header;
	}
	return NULL;
}
/* A connection from the guest to the host; returns the host's end. */
static int open_from_guest(struct tcp *t, int listener, uint16_t port)
{
	t->guest_port = 40000;
	t->peer_port = port;
	t->sequence = 1000;
	send_tcp(t, SYN, NULL, 0, false);
	cr_assert_not_null(wait_tcp(t, SYN | ACK, NULL), "no SYN, ACK");
	send_tcp(t, ACK, NULL, 0, false);
	int fd = accept(listener, NULL, NULL);
	cr_assert_geq(fd, 0);
	return fd;
}

Test(user, arp_and_dhcp)
{
	struct net_config config = config_user();
	struct card *card = start(&config);
	uint8_t mac[6], message[300] = {1, 1, 6, 0, 1, 2, 3, 4};
	say_hello(card, mac);
	memcpy(message + 28, guest_mac, 6);
	put_be32(message + 236, 0x63825363);
	memcpy(message + 240, (const uint8_t[]){53, 1, 1, 255}, 4); /* discover */
	send_udp(card, everybody, 0, 0xffffffff, 68, 67, message, sizeof(message));
	const uint8_t *offer = card_wait(card, is_udp, NULL);
	cr_assert_not_null(offer, "no offer");
	cr_expect_eq(get_be16(offer + 36), 68);
	cr_expect_eq(get_be32(offer + 42 + 16), GUEST);
	card_destroy(card);
}

Test(user, udp_there_and_back)
{
	struct net_config config = config_user();
	struct card *card = start(&config);
	struct sockaddr_in from;
	socklen_t length = sizeof(from);
	uint16_t port;
	char text[16] = {0};
	uint8_t mac[6];
	int fd = host_socket(SOCK_DGRAM, &port);
	say_hello(card, mac);
	send_udp(card, mac, GUEST, HOST, 5555, port, "question", 8);
	struct pollfd p = {.fd = fd, .events = POLLIN};
	cr_assert_eq(poll(&p, 1, 5000), 1);
	cr_assert_eq(recvfrom(fd, text, sizeof(text), 0, (struct sockaddr *)&from, &length), 8);
	cr_expect_str_eq(text, "question");
	cr_assert_eq(sendto(fd, "answer", 6, 0, (struct sockaddr *)&from, length), 6);
	const uint8_t *answer = card_wait(card, is_udp, NULL);
	cr_assert_not_null(answer);
	cr_expect(get_be16(answer + 34) == port && get_be16(answer + 36) == 5555 && memcmp(answer + 42, "answer", 6) == 0);
	close(fd);
	card_destroy(card);
}

/* A segment of 60,000 bytes whose checksum is open goes in as one. */
/* A datagram in three fragments arrives as one; with one missing, twice or out of order it does not. */
Test(user, fragments)
{
	struct net_config config = config_user();
	struct card *card = start(&config);
	static const unsigned orders[][4] = {{0, 2}, {1, 2, 0}, {0, 1, 1, 2}, {0, 1, 2}};
	static const unsigned counts[] = {2, 3, 4, 3};
	uint8_t packet[34 + 3000], mac[6], got[4000];
	uint16_t port;
	int fd = host_socket(SOCK_DGRAM, &port);
	say_hello(card, mac);
	for (unsigned order = 0; order < ARRAY_LENGTH(orders); order++) {
		for (unsigned k = 0; k < counts[order]; k++) {
			unsigned piece = orders[order][k];
			make_ethernet(packet, mac, 0x0800);
			make_ip(packet, 17, GUEST, HOST, 1000);
			memset(packet + 34, 'a' + (int)piece, 1000);
			if (piece == 0) {
				put_be16(packet + 34, 5555);
				put_be16(packet + 36, port);
				put_be16(packet + 38, 3000);
				put_be16(packet + 40, 0); /* no checksum */
			}
			put_be16(packet + 18, (uint16_t)order);
			put_be16(packet + 20, (uint16_t)((piece < 2 ? 0x2000 : 0) | piece * 125));
			put_be16(packet + 24, 0);
			put_be16(packet + 24, checksum(0, packet + 14, 20));
			cr_assert_eq(card_send(card, packet, 34 + 1000), 0);
		}
		struct pollfd p = {.fd = fd, .events = POLLIN};
		bool whole = order == 3;
		cr_expect_eq(poll(&p, 1, whole ? 5000 : 50), whole, "order %u", order);
	}
	cr_expect_eq(recv(fd, got, sizeof(got), 0), 2992);
	cr_expect(got[0] == 'a' && got[992] == 'b' && got[2991] == 'c');
	close(fd);
	card_destroy(card);
}

Test(user, tcp_with_offloads)
{
	struct net_config config = config_user();
	struct tcp t = {.card = start(&config)};
	static uint8_t data[60000], got[60000];
	uint16_t port;
	int listener = host_socket(SOCK_STREAM, &port);
	say_hello(t.card, t.mac);
	int fd = open_from_guest(&t, listener, port);
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 7 + i / 251);
	send_tcp(&t, ACK | PSH, data, sizeof(data), true);
	for (size_t done = 0; done < sizeof(got);) {
		ssize_t n = host_read(fd, got + done, sizeof(got) - done);
		cr_assert_gt(n, 0, "%zd after %zu", n, done);
		done += (size_t)n;
	}
	cr_expect(memcmp(data, got, sizeof(got)) == 0);
	cr_assert_eq(write(fd, "back", 4), 4);
	size_t bytes = 0;
	const uint8_t *back = NULL;
	while ((back = wait_tcp(&t, ACK, &bytes)) != NULL && bytes == 0)
		;
	cr_assert_not_null(back);
	cr_expect(bytes == 4 && memcmp(back, "back", 4) == 0);
	close(fd);
	close(listener);
	card_destroy(t.card);
}

/* Datagrams that came before the guest was known: all of them when it is, with nothing else that would wake libslirp. */
Test(user, datagrams_that_waited)
{
	struct net_config config = config_user();
	uint16_t port = free_port(SOCK_DGRAM), own;
	uint8_t mac[6];
	add_forward(&config, true, port, 7);
	struct card *card = start(&config);
	int fd = host_socket(SOCK_DGRAM, &own);
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	for (unsigned i = 0; i < 5; i++)
		cr_assert_eq(sendto(fd, "early", 5, 0, (struct sockaddr *)&to, sizeof(to)), 5);
	cr_assert_not_null(card_wait(card, is_arp_question, NULL));
	usleep(20000);
	say_hello(card, mac);
	for (unsigned i = 0; i < 5; i++)
		cr_expect_not_null(card_wait(card, is_udp, NULL), "datagram %u", i);
	close(fd);
	card_destroy(card);
}

static void want_nothing(void *opaque) { net_want(((struct card *)opaque)->net, 0, false); }

/* While the guest takes nothing, no more is read for it than it will soon take; when it does, the rest follows, and what comes then. */
Test(user, what_is_not_taken_waits_in_the_socket)
{
	struct net_config config = config_user();
	uint16_t port = free_port(SOCK_DGRAM), own;
	uint8_t mac[6], data[1400];
	unsigned sent = 0, waited = 0;
	size_t bytes;
	add_forward(&config, true, port, 7);
	struct card *card = start(&config);
	int fd = host_socket(SOCK_DGRAM, &own);
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	cr_assert_eq(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
	say_hello(card, mac);
	loop_call(card->loop, want_nothing, card);
	for (; sent < 240; usleep(sent % 40 ? 0 : 20000)) {
		memset(data, (int)sent++, sizeof(data));
		cr_assert_eq(write(fd, data, sizeof(data)), sizeof(data));
	}
	loop_park_request(card->loop);
	loop_park_wait(card->loop);
	for (; (bytes = net_receive(card->net, 0, card->buffer)) > 0; waited++) {
		cr_assert_eq(bytes, NET_HEADER_BYTES + 42 + sizeof(data));
		cr_assert_eq(card->buffer[bytes - 1], waited, "in order, and none is missing");
	}
	cr_expect(waited > 0 && waited < 120, "%u were read", waited);
	loop_unpark(card->loop);
	loop_call(card->loop, card_begin, card);
	const uint8_t *next = card_wait(card, is_udp, &bytes);
	cr_assert_not_null(next);
	cr_expect_eq(next[bytes - 1], waited, "the first of those that waited in the socket");
	memset(data, 0xff, sizeof(data));
	cr_assert_eq(write(fd, data, sizeof(data)), sizeof(data));
	do
		next = card_wait(card, is_udp, &bytes);
	while (next && next[bytes - 1] != 0xff);
	cr_expect_not_null(next, "the last");
	close(fd);
	card_destroy(card);
}

Test(user, forwarded_ports)
{
	struct net_config config = config_user();
	uint16_t port = free_port(SOCK_STREAM), udp_port = free_port(SOCK_DGRAM);
	struct err err = ERR_INIT;
	add_forward(&config, false, port, 80);
	add_forward(&config, true, udp_port, 53);
	struct tcp t = {.card = start(&config)};
	/* The guest has said nothing yet: it is asked for. */
	int fd = host_connect(port);
	cr_assert_not_null(card_wait(t.card, is_arp_question, NULL));
	say_hello(t.card, t.mac);
	cr_assert_not_null(wait_tcp(&t, SYN, NULL), "no SYN of the forwarded connection");
	t.guest_port = 80;
	t.sequence = 7000;
	send_tcp(&t, SYN | ACK, NULL, 0, false);
	cr_assert_not_null(wait_tcp(&t, ACK, NULL));
	send_tcp(&t, ACK | PSH, "hello", 5, true);
	char text[8] = {0};
	cr_expect_eq(host_read(fd, text, sizeof(text)), 5);
	cr_expect_str_eq(text, "hello");
	/* Another card cannot have the same ports. */
	cr_assert_null(card_create(&config, &err));
	cr_expect_eq(err.class, ERR_STATE);
	cr_expect_eq(err.number, EADDRINUSE);
	char place[32];
	snprintf(place, sizeof(place), "127.0.0.1:%u", port);
	cr_expect_not_null(strstr(err.message, place), "%s", err.message);
	cr_expect(err.hint[0]);
	close(fd);
	card_destroy(t.card);
	/* It left them as they were. */
	struct card *again = start(&config);
	card_destroy(again);
}

/* When a VM ends: what the guest left open is reset, what it has ended itself stays ended. */
Test(user, the_end_of_a_card_resets_connections)
{
	for (int said_all = 0; said_all < 2; said_all++) {
		struct net_config config = config_user();
		struct tcp t = {.card = start(&config)};
		int error = -1;
		socklen_t length = sizeof(error);
		uint16_t port;
		char text[8] = {0};
		int listener = host_socket(SOCK_STREAM, &port);
		say_hello(t.card, t.mac);
		int fd = open_from_guest(&t, listener, port);
		send_tcp(&t, (uint8_t)(ACK | PSH | (said_all ? FIN : 0)), "bye", 3, true);
		cr_expect_eq(host_read(fd, text, sizeof(text)), 3);
		if (said_all)
			cr_expect_eq(host_read(fd, text, sizeof(text)), 0);
		card_destroy(t.card);
		if (!said_all)
			cr_expect_eq(host_read(fd, text, sizeof(text)), -ECONNRESET);
		cr_assert_eq(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length), 0);
		cr_expect_eq(error, 0, "%d", error);
		close(fd);
		close(listener);
	}
}

/* The host's end sees a reset; the guest, that only waits, is asked and told. The ports are there at once. */
Test(user, restart_resets_connections)
{
	struct net_config config = config_user();
	uint16_t port, forwarded = free_port(SOCK_STREAM);
	struct net_connections saved;
	char byte;
	add_forward(&config, false, forwarded, 80);
	struct tcp t = {.card = start(&config)};
	int listener = host_socket(SOCK_STREAM, &port);
	say_hello(t.card, t.mac);
	int fd = open_from_guest(&t, listener, port);
	card_save(t.card, &saved);
	cr_expect_eq(saved.bytes, NET_CONNECTION_BYTES);
	for (int round = 0; round < 3; round++) {
		card_restart(t.card, &saved);
		if (round == 0)
			cr_expect_eq(host_read(fd, &byte, 1), -ECONNRESET);
		t.acknowledge = 0;
		cr_assert_not_null(wait_tcp(&t, SYN, NULL), "the guest is not asked");
		/* As its TCP does: "what I expect is this". */
		t.acknowledge = 4711;
		say_hello(t.card, t.mac);
		send_tcp(&t, ACK, NULL, 0, false);
		const uint8_t *reset = wait_tcp(&t, RST, NULL);
		cr_assert_not_null(reset, "no reset");
		cr_expect_eq(get_be32(reset - 20 + 4), 4711, "or the guest does not take it");
	}
	struct net_connections after;
	card_save(t.card, &after);
	cr_expect_eq(after.bytes, 0);
	int again = host_connect(forwarded);
	t.peer_port = 0;
	cr_expect_not_null(wait_tcp(&t, SYN, NULL));
	close(again);
	close(fd);
	close(listener);
	card_destroy(t.card);
}

/* Frames that wait for the guest are another guest's after a restart. */
Test(user, restart_drops_what_waits)
{
	struct net_config config = config_user();
	struct card *card = start(&config);
	struct net_connections none = {0};
	uint8_t mac[6], arp[42];
	say_hello(card, mac);
	make_arp(arp, everybody, 1, GUEST, HOST);
	uint8_t raw[NET_HEADER_BYTES + sizeof(arp)] = {0};
	memcpy(raw + NET_HEADER_BYTES, arp, sizeof(arp));
	struct iovec iov = {raw, sizeof(raw)};
	loop_park_request(card->loop);
	loop_park_wait(card->loop);
	cr_expect_eq(net_send(card->net, 0, &iov, 1, sizeof(raw)), 0);
	cr_expect(net_waiting(card->net));
	net_restart(card->net, guest_mac, &none);
	cr_expect(!net_waiting(card->net));
	loop_unpark(card->loop);
	card_destroy(card);
}

Test(user, bad_frames)
{
	struct net_config config = config_user();
	struct card *card = start(&config);
	uint8_t mac[6], frame[NET_HEADER_BYTES + 60] = {NET_F_NEEDS_CSUM};
	static const struct {
		uint16_t start, offset;
	} bad[] = {{0, 0}, {34, 30}, {60, 0}, {61, 0}, {0xffff, 0xffff}, {13, 2}, {34, 0xffff}};
	for (unsigned i = 0; i < ARRAY_LENGTH(bad); i++) {
		put_le16(frame + NET_H_CSUM_START, bad[i].start);
		put_le16(frame + NET_H_CSUM_OFFSET, bad[i].offset);
		cr_expect_eq(card_send_raw(card, frame, sizeof(frame)), -EINVAL, "%u", i);
	}
	cr_expect_eq(card_send_raw(card, frame, NET_HEADER_BYTES + NET_ETHERNET_BYTES - 1), -EINVAL);
	/* What makes no sense to IP is libslirp's affair: it must only live on. */
	uint32_t seed = 1;
	for (unsigned i = 0; i < 3000; i++) {
		uint8_t noise[200];
		for (unsigned j = 0; j < sizeof(noise); j++)
			noise[j] = (uint8_t)((seed = seed * 1103515245 + 12345) >> 16);
		make_ethernet(noise, everybody, i % 3 == 0 ? 0x0806 : 0x0800);
		/* Fragments among them, with which libslirp by itself would crash. */
		if (i % 3 == 1) {
			noise[14] = 0x45;
			put_be16(noise + 18, (uint16_t)(i % 5));
			put_be16(noise + 20, (uint16_t)((i % 2 ? 0x2000 : 0) | i % 40));
			put_be16(noise + 24, 0);
			put_be16(noise + 24, checksum(0, noise + 14, 20));
		}
		card_send(card, noise, 14 + seed % 180);
	}
	say_hello(card, mac);
	card_destroy(card);
}
