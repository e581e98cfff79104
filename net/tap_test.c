/*
 * Backends tap and bridge, in a network namespace of the test's own. Where the kernel or the user's rights do not allow one, a test says SKIP and
 * why.
 */
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <linux/if_packet.h>
#include <poll.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "net/net_test.h"
#include "net/tap_test.h"

#define HOST_ADDRESS  0x0a630001u /* 10.99.0.1 */
#define GUEST_ADDRESS 0x0a630002u

static struct net_config config_of(enum net_mode mode, const char *interface)
{
	struct net_config config = {.name = "lan", .mode = mode};
	snprintf(config.interface, sizeof(config.interface), "%s", interface);
	return config;
}
static struct card *start_with(enum net_mode mode, const char *interface, unsigned pairs)
{
	struct net_config config = config_of(mode, interface);
	struct err err = ERR_INIT;
	config.pairs = pairs;
	struct card *card = card_create(&config, &err);
	cr_assert_not_null(card, "%s", err.message);
	return card;
}
static struct card *start(enum net_mode mode, const char *interface) { return start_with(mode, interface, 0); }
static void fails_with(enum net_mode mode, const char *interface, unsigned pairs, enum err_class class, const char *text)
{
	struct net_config config = config_of(mode, interface);
	struct err err = ERR_INIT;
	config.pairs = pairs;
	cr_assert_null(card_create(&config, &err), "%s", interface);
	cr_expect_eq(err.class, class, "%s: class %d", err.message, err.class);
	cr_expect(strstr(err.message, text) && strstr(err.message, interface), "%s", err.message);
	cr_expect(err.hint[0], "%s", err.message);
}
static void fails(enum net_mode mode, const char *interface, enum err_class class, const char *text) { fails_with(mode, interface, 0, class, text); }

static bool is_arp_answer(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0806 && get_be16(f + 20) == 2; }
static bool is_udp(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0800 && f[23] == 17 && get_be16(f + 36) == 7777; }

static void find_host(struct card *card, uint8_t mac[6])
{
	const uint8_t *answer = NULL;
	uint8_t arp[42];
	make_arp(arp, everybody, 1, GUEST_ADDRESS, HOST_ADDRESS);
	/* The kernel takes up to a second to see that the link is there. */
	for (int i = 0; i < 600 && answer == NULL; i++) {
		cr_assert_eq(card_send(card, arp, sizeof(arp)), 0);
		answer = card_wait_for(card, is_arp_answer, NULL, 100000000);
	}
	cr_assert_not_null(answer, "the host does not answer");
	memcpy(mac, answer + 22, 6);
}
static int host_udp(void)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(7778), .sin_addr.s_addr = htonl(HOST_ADDRESS)};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	cr_assert_eq(bind(fd, (struct sockaddr *)&at, sizeof(at)), 0);
	return fd;
}
static void host_sends_to(int fd, uint16_t port, const char *text)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(GUEST_ADDRESS)};
	cr_assert_eq(sendto(fd, text, strlen(text), 0, (struct sockaddr *)&to, sizeof(to)), (ssize_t)strlen(text));
}
static void host_sends(int fd, const char *text) { host_sends_to(fd, 7777, text); }
static void set_offloads(void *opaque) { net_set_offloads(((struct card *)opaque)->net, NET_OFFLOAD_CSUM | NET_OFFLOAD_TSO4); }

static void say_hello(struct card *card, const uint8_t mac[6], int fd, uint16_t port)
{
	uint8_t raw[NET_HEADER_BYTES + 47] = {NET_F_NEEDS_CSUM}, *frame = raw + NET_HEADER_BYTES;
	char text[16] = {0};
	make_ethernet(frame, mac, 0x0800);
	make_ip(frame, 17, GUEST_ADDRESS, HOST_ADDRESS, 13);
	put_be16(frame + 34, port);
	put_be16(frame + 36, 7778);
	put_be16(frame + 38, 13);
	memcpy(frame + 42, "hello", 5);
	put_be16(frame + 40, (uint16_t)~checksum(pseudo_sum(frame, 13), NULL, 0));
	put_le16(raw + NET_H_CSUM_START, 34);
	put_le16(raw + NET_H_CSUM_OFFSET, 6);
	cr_assert_eq(card_send_raw(card, raw, sizeof(raw)), 0);
	struct pollfd p = {.fd = fd, .events = POLLIN};
	cr_assert_eq(poll(&p, 1, 5000), 1, "the host did not get it");
	cr_expect_eq(recv(fd, text, sizeof(text), 0), 5);
	cr_expect_str_eq(text, "hello");
}
/* Both ways, with a checksum that the kernel fills in, and one that it leaves open. */
static void exchange(struct card *card)
{
	uint8_t mac[6];
	int fd = host_udp();
	find_host(card, mac);
	say_hello(card, mac, fd, 7777);
	for (int open = 0; open < 2; open++) {
		if (open)
			loop_call(card->loop, set_offloads, card);
		host_sends(fd, "back!");
		const uint8_t *got = card_wait(card, is_udp, NULL);
		cr_assert_not_null(got);
		cr_expect(memcmp(got + 42, "back!", 5) == 0);
		cr_expect_eq(got[-(int)NET_HEADER_BYTES] & NET_F_NEEDS_CSUM, open ? NET_F_NEEDS_CSUM : 0);
		if (!open)
			cr_expect_eq(checksum(pseudo_sum(got, 13), got + 34, 13), 0);
	}
	close(fd);
}

Test(tap, frames_both_ways)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap && ip addr add 10.99.0.1/24 dev vmtap0"));
	struct card *card = start(NET_TAP, "vmtap0"); /* it is down: the card sets it up */
	cr_expect_str_eq(net_interface(card->net), "vmtap0");
	exchange(card);
	fails(NET_TAP, "vmtap0", ERR_STATE, "in use");
	card_destroy(card);
	cr_expect(run("ip link show vmtap0 >/dev/null"), "it was there before");
	card = start(NET_TAP, "vmtap0");
	card_destroy(card);
}

Test(tap, what_is_none)
{
	if (!own_namespace())
		return;
	fails(NET_TAP, "vmtap7", ERR_NOT_FOUND, "no tap device");
	cr_expect(!run("ip link show vmtap7 >/dev/null 2>&1"), "none was made");
	fails(NET_BRIDGE, "br7", ERR_NOT_FOUND, "no bridge");
	fails(NET_TAP, "lo", ERR_STATE, "no tap device");
	fails(NET_BRIDGE, "lo", ERR_STATE, "no bridge");
	cr_assert(run("ip tuntap add tun0 mode tun"));
	fails(NET_TAP, "tun0", ERR_STATE, "no tap device");
}

Test(tap, restart_drops_what_waits)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap && ip addr add 10.99.0.1/24 dev vmtap0 && ip link set vmtap0 up"));
	struct card *card = start(NET_TAP, "vmtap0");
	struct net_connections none = {0};
	uint8_t mac[6];
	find_host(card, mac);
	int fd = host_udp();
	/* One that waits for its answer meanwhile would come later. */
	cr_assert(run("ip neigh replace 10.99.0.2 lladdr 52:56:01:02:03:04 dev vmtap0 nud permanent"));
	loop_park_request(card->loop);
	loop_park_wait(card->loop);
	for (int i = 0; i < 20; i++)
		host_sends(fd, "old");
	net_restart(card->net, guest_mac, &none);
	loop_unpark(card->loop);
	host_sends(fd, "new");
	const uint8_t *got = card_wait(card, is_udp, NULL);
	cr_assert_not_null(got);
	cr_expect(memcmp(got + 42, "new", 3) == 0, "%.3s", (const char *)got + 42);
	close(fd);
	card_destroy(card);
}

static void wait_for_link_change(const struct card *card)
{
	for (uint64_t until = clock_now_ns() + WAIT_NS; card->link_changes == 0 && clock_now_ns() < until; usleep(1000))
		;
}

Test(tap, a_device_that_goes_away)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap && ip link set vmtap0 up"));
	struct card *card = start(NET_TAP, "vmtap0");
	uint8_t arp[42];
	struct net_connections none = {0};
	make_arp(arp, everybody, 1, GUEST_ADDRESS, HOST_ADDRESS);
	cr_assert(run("ip link set vmtap0 down"));
	cr_expect_eq(card_send(card, arp, sizeof(arp)), 0, "down is like a cable without an end");
	usleep(20000);
	cr_expect_eq(card->link_changes, 0);
	cr_assert(run("ip link set vmtap0 up && ip link del vmtap0"));
	wait_for_link_change(card);
	cr_expect_eq(card->link_changes, 1);
	cr_expect_eq(card_send(card, arp, sizeof(arp)), 0);
	card_restart(card, &none);
	card_destroy(card);
}

Test(bridge, port_comes_and_goes)
{
	if (!own_namespace())
		return;
	if (!run("ip link add br0 mtu 1400 type bridge")) {
		fprintf(stderr, "SKIP: this kernel has no bridges\n");
		return;
	}
	cr_assert(run("ip addr add 10.99.0.1/24 dev br0 && ip link set br0 up"));
	struct card *card = start(NET_BRIDGE, "br0");
	char command[100];
	snprintf(command, sizeof(command), "ip -o link show master br0 | grep -q '%s.*mtu 1400'", net_interface(card->net));
	cr_expect(run(command));
	exchange(card);
	struct card *second = start(NET_BRIDGE, "br0");
	cr_expect_str_neq(net_interface(second->net), net_interface(card->net));
	card_destroy(second);
	card_destroy(card);
	cr_expect(!run("ip -o link show master br0 | grep -q ."), "a port was left");
}

/* --- several queues --- */

static bool is_any_udp(const uint8_t *f, size_t n) { return n >= 42 && get_be16(f + 12) == 0x0800 && f[23] == 17 && get_be16(f + 34) == 7778; }

static void use_lanes(struct card *card, unsigned lanes)
{
	card->lanes = lanes;
	loop_call(card->loop, card_begin, card);
	cr_assert_eq(card->lanes, lanes);
}
/* A flow of the guest's by each lane in use: what comes for it comes by the same. */
static void expect_steered(struct card *card, const uint8_t mac[6], int fd)
{
	for (unsigned i = 0; i < card->lanes; i++) {
		card->send_lane = i;
		say_hello(card, mac, fd, (uint16_t)(9000 + i));
		host_sends_to(fd, (uint16_t)(9000 + i), "back!");
		const uint8_t *got = card_wait(card, is_any_udp, NULL);
		cr_assert_not_null(got, "lane %u", i);
		cr_expect_eq(get_be16(got + 36), 9000 + i);
		cr_expect_eq(card->frames[card->taken - 1].lane, i);
	}
	card->send_lane = 0;
}
static void several_lanes(struct card *card)
{
	struct net_connections none = {0};
	uint8_t mac[6];
	int fd = host_udp();
	cr_expect_eq(net_lanes(card->net), 4);
	find_host(card, mac);
	/* Two are in use, all, one, and all again. */
	static const unsigned in_use[] = {2, 4, 1, 4};
	for (unsigned i = 0; i < 4; i++) {
		use_lanes(card, in_use[i]);
		expect_steered(card, mac, fd);
	}
	/* What comes for a flow of a lane that is no more in use comes by another. */
	use_lanes(card, 2);
	for (unsigned i = 0; i < 4; i++) {
		host_sends_to(fd, (uint16_t)(9000 + i), "again");
		cr_assert_not_null(card_wait(card, is_any_udp, NULL), "flow of lane %u", i);
		cr_expect_lt(card->frames[card->taken - 1].lane, 2);
	}
	card_restart(card, &none);
	expect_steered(card, mac, fd);
	close(fd);
}

Test(tap, several_queues)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap multi_queue && ip addr add 10.99.0.1/24 dev vmtap0"));
	struct card *card = start_with(NET_TAP, "vmtap0", 4);
	several_lanes(card);
	fails_with(NET_TAP, "vmtap0", 4, ERR_STATE, "in use");
	fails_with(NET_TAP, "vmtap0", 1, ERR_STATE, "in use");
	use_lanes(card, 1); /* whoever tried is gone without a trace */
	card_destroy(card);
	card = start_with(NET_TAP, "vmtap0", 1); /* one of its queues will do */
	cr_expect_eq(net_lanes(card->net), 1);
	exchange(card);
	card_destroy(card);
	cr_expect(run("ip link show vmtap0 >/dev/null"));
}

static void *try_to_start(void *opaque)
{
	struct net_config config = config_of(NET_TAP, "vmtap0");
	pthread_barrier_t *together = opaque;
	config.pairs = 2;
	pthread_barrier_wait(together);
	return card_create(&config, NULL);
}

/* To the kernel all of them may have some of the device's queues. */
Test(tap, one_of_many_has_a_device_of_several_queues)
{
	enum { MANY = 6, ROUNDS = 30 };
	pthread_barrier_t together;
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap multi_queue"));
	pthread_barrier_init(&together, NULL, MANY);
	for (unsigned round = 0; round < ROUNDS; round++) {
		pthread_t threads[MANY];
		void *cards[MANY];
		unsigned have = 0;
		for (unsigned i = 0; i < MANY; i++)
			cr_assert_eq(pthread_create(&threads[i], NULL, try_to_start, &together), 0);
		for (unsigned i = 0; i < MANY; i++) {
			pthread_join(threads[i], &cards[i]);
			have += cards[i] != NULL;
		}
		cr_assert_eq(have, 1, "round %u: %u have it", round, have);
		for (unsigned i = 0; i < MANY; i++)
			if (cards[i])
				card_destroy(cards[i]);
	}
	/* Who keeps the turn for long is in nobody's way. */
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	cr_assert_eq(flock(fd, LOCK_EX), 0);
	card_destroy(start_with(NET_TAP, "vmtap0", 2));
	close(fd);
}

Test(tap, devices_of_one_queue)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap"));
	fails_with(NET_TAP, "vmtap0", 2, ERR_STATE, "no tap device of several queues");
	fails_with(NET_TAP, "lo", 2, ERR_STATE, "no tap device of several queues");
}

Test(tap, a_device_of_several_queues_that_goes_away)
{
	if (!own_namespace())
		return;
	cr_assert(run("ip tuntap add vmtap0 mode tap multi_queue && ip link set vmtap0 up"));
	struct card *card = start_with(NET_TAP, "vmtap0", 4);
	use_lanes(card, 3);
	cr_assert(run("ip link del vmtap0"));
	wait_for_link_change(card);
	usleep(20000);
	cr_expect_eq(card->link_changes, 1);
	card->lanes = 4;
	loop_call(card->loop, card_begin, card);
	cr_expect_eq(card->lanes, 3, "no more than there were");
	card_destroy(card);
}

Test(bridge, several_queues)
{
	if (!own_namespace())
		return;
	if (!run("ip link add br0 type bridge && ip addr add 10.99.0.1/24 dev br0 && ip link set br0 up")) {
		fprintf(stderr, "SKIP: this kernel has no bridges\n");
		return;
	}
	struct card *card = start_with(NET_BRIDGE, "br0", 4);
	several_lanes(card);
	card_destroy(card);
	cr_expect(!run("ip -o link show master br0 | grep -q ."), "a port was left");
}
