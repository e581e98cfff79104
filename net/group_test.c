/* Backend group: networks of VMs, in a scratch folder. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "net/net_test.h"
#include "net/segment.h"

#define MAX_CARDS 3

static char folder[] = "/tmp/vmcp-net-group-XXXXXX";
static uint8_t macs[MAX_CARDS][6] = {{0x52, 0x56, 0, 0, 0, 1}, {0x52, 0x56, 0, 0, 0, 2}, {0x52, 0x56, 0, 0, 0, 3}};

static void make_folder(void) { cr_assert_not_null(mkdtemp(folder)); }
static void remove_folder(void)
{
	char command[100];

	snprintf(command, sizeof(command), "rm -rf %s", folder);
	cr_assert_eq(system(command), 0);
	memcpy(strrchr(folder, '-'), "-XXXXXX", 7);
}
TestSuite(group, .init = make_folder, .fini = remove_folder, .timeout = 60);

static struct card *start(const char *network, const char *port, bool deaf)
{
	struct net_config config = {.name = "lan", .mode = NET_GROUP, .folder = folder, .port = port, .deaf = deaf};
	struct err err = ERR_INIT;

	snprintf(config.network, sizeof(config.network), "%s", network);
	struct card *card = card_create(&config, &err);
	cr_assert_not_null(card, "%s", err.message);
	return card;
}

/* From card `from` to `to`, with a number in it. */
static int send_number(struct card *card, unsigned from, const uint8_t to[6], uint8_t number)
{
	uint8_t frame[60] = {0};

	make_ethernet(frame, to, 0x88b5);
	memcpy(frame + 6, macs[from], 6);
	frame[14] = number;
	return card_send(card, frame, sizeof(frame));
}
static bool is_ours(const uint8_t *f, size_t n) { return n >= 60 && get_be16(f + 12) == 0x88b5; }
static int number_of_next(struct card *card)
{
	const uint8_t *got = card_wait(card, is_ours, NULL);

	return got ? got[14] : -1;
}
static void expect_silence(struct card *card) { cr_expect_null(card_wait_for(card, is_ours, NULL, 50000000), "a frame came"); }

Test(group, learns_as_a_switch_does)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", false), *c = start("lan", "c.0", false);

	cr_expect_str_eq(net_interface(a->net), "");
	send_number(a, 0, everybody, 1);
	cr_expect_eq(number_of_next(b), 1);
	cr_expect_eq(number_of_next(c), 1);
	send_number(b, 1, macs[0], 2);
	cr_expect_eq(number_of_next(a), 2);
	expect_silence(c);
	send_number(a, 0, macs[1], 3);
	cr_expect_eq(number_of_next(b), 3);
	/* Nobody has said that it has this one: to all. */
	send_number(a, 0, macs[2], 4);
	cr_expect_eq(number_of_next(c), 4);
	cr_expect_eq(number_of_next(b), 4);
	/* It goes, and another one has its address. */
	card_destroy(b);
	send_number(a, 0, macs[1], 5);
	cr_expect_eq(number_of_next(c), 5);
	card_destroy(a);
	card_destroy(c);
}

Test(group, another_network_hears_nothing)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan@00112233", "a.0", false), *c = start("lan", "c.0", false);

	for (uint8_t i = 0; i < 10; i++)
		send_number(a, 0, i % 2 ? everybody : macs[1], i);
	for (int i = 0; i < 10; i++)
		cr_expect_eq(number_of_next(c), i);
	expect_silence(b);
	card_destroy(a);
	card_destroy(b);
	card_destroy(c);
}

static void do_hear(void *opaque) { net_hear(((struct card *)opaque)->net); }

Test(group, what_was_sent_before_is_not_heard)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", true);
	struct net_connections none = {0};

	send_number(a, 0, everybody, 1);
	expect_silence(b);
	loop_call(b->loop, do_hear, b);
	send_number(a, 0, everybody, 2);
	cr_expect_eq(number_of_next(b), 2);
	loop_park_request(b->loop);
	loop_park_wait(b->loop);
	for (uint8_t i = 3; i < 8; i++)
		send_number(a, 0, everybody, i);
	net_restart(b->net, macs[1], &none);
	loop_unpark(b->loop);
	send_number(a, 0, everybody, 9);
	cr_expect_eq(number_of_next(b), 9, "frames of another life");
	card_destroy(a);
	card_destroy(b);
}

Test(group, waits_a_moment_for_who_does_not_take_what_comes)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", false);
	unsigned sent = 0;
	int rc = 0;

	send_number(b, 1, everybody, 0);
	cr_expect_eq(number_of_next(a), 0);
	loop_park_request(b->loop);
	loop_park_wait(b->loop);
	while (sent < CARD_FRAMES - 10 && (rc = send_number(a, 0, macs[1], (uint8_t)sent)) == 0)
		sent++;
	if (rc == 0)
		fprintf(stderr, "SKIP: the queue of a socket takes %u frames here\n", sent);
	else
		cr_expect_eq(rc, -EAGAIN);
	/* It is told to try again, until it is too long: then what comes is lost at once. */
	for (uint64_t until = clock_now_ns() + WAIT_NS; rc == -EAGAIN && clock_now_ns() < until; usleep(100)) {
		if (atomic_exchange(&a->writable, 0) > 0)
			rc = send_number(a, 0, macs[1], 255);
	}
	cr_expect_eq(rc, 0, "it waits for ever");
	cr_expect_eq(send_number(a, 0, macs[1], 255), 0);
	loop_unpark(b->loop);
	for (unsigned i = 0; i < sent; i++)
		cr_expect_eq(number_of_next(b), (int)i);
	expect_silence(b);
	/* As one that takes frames it is waited for again. */
	send_number(a, 0, macs[1], 200);
	cr_expect_eq(number_of_next(b), 200);
	loop_park_request(b->loop);
	loop_park_wait(b->loop);
	for (sent = 0; sent < 50 && (rc = send_number(a, 0, macs[1], (uint8_t)sent)) == 0;)
		sent++;
	loop_unpark(b->loop);
	for (uint64_t until = clock_now_ns() + WAIT_NS; rc == -EAGAIN && clock_now_ns() < until; usleep(100)) {
		if (atomic_exchange(&a->writable, 0) > 0)
			rc = send_number(a, 0, macs[1], (uint8_t)sent);
	}
	for (unsigned i = 0; i < sent + (sent < 50); i++)
		cr_expect_eq(number_of_next(b), (int)i);
	card_destroy(a);
	card_destroy(b);
}

static unsigned count_entries(const char *path)
{
	DIR *stream = opendir(path);
	unsigned count = 0;
	struct dirent *entry;

	while (stream && (entry = readdir(stream)))
		count += entry->d_name[0] != '.';
	if (stream)
		closedir(stream);
	return count;
}

Test(group, leaves_nothing_and_takes_away_what_the_dead_left)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char network[100];
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(network, sizeof(network), "%s/lan", folder);
	cr_assert_eq(mkdir(network, 0700), 0);
	snprintf(address.sun_path, sizeof(address.sun_path), "%s/lan/dead.0", folder);
	cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	close(fd);
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", false);
	cr_expect_eq(count_entries(network), 2);
	card_destroy(a);
	cr_expect_eq(count_entries(network), 1);
	card_destroy(b);
	cr_expect_eq(count_entries(folder), 0);
}

Test(group, a_frame_that_is_none_is_dropped)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", false);
	uint8_t raw[NET_HEADER_BYTES + 60] = {NET_F_NEEDS_CSUM};

	make_ethernet(raw + NET_HEADER_BYTES, everybody, 0x88b5);
	put_le16(raw + NET_H_CSUM_START, 50);
	put_le16(raw + NET_H_CSUM_OFFSET, 10); /* behind the end */
	cr_expect_eq(card_send_raw(a, raw, sizeof(raw)), -EINVAL);
	raw[NET_H_FLAGS] = 0;
	raw[NET_H_GSO_TYPE] = NET_GSO_TCPV4; /* with a checksum that is there */
	put_le16(raw + NET_H_GSO_SIZE, 10);
	cr_expect_eq(card_send_raw(a, raw, sizeof(raw)), -EINVAL);
	expect_silence(b);
	card_destroy(a);
	card_destroy(b);
}

/* --- segments --- */

#define DATA 5000u
#define SIZE 1448u

static size_t make_segment(uint8_t *raw)
{
	uint8_t *frame = raw + NET_HEADER_BYTES, *tcp = frame + 34;

	memset(raw, 0, NET_HEADER_BYTES + 54);
	make_ethernet(frame, everybody, 0x0800);
	make_ip(frame, 6, 0x0a000001, 0x0a000002, 20 + DATA);
	put_be32(tcp + 4, 1000);
	tcp[12] = 0x50;
	tcp[13] = 0x19; /* ACK, PSH, FIN */
	for (unsigned i = 0; i < DATA; i++)
		tcp[20 + i] = (uint8_t)(i * 7);
	raw[NET_H_FLAGS] = NET_F_NEEDS_CSUM;
	raw[NET_H_GSO_TYPE] = NET_GSO_TCPV4;
	put_le16(raw + NET_H_GSO_SIZE, SIZE);
	put_le16(raw + NET_H_CSUM_START, 34);
	put_le16(raw + NET_H_CSUM_OFFSET, 16);
	return NET_HEADER_BYTES + 54 + DATA;
}

static bool is_tcp(const uint8_t *f, size_t n) { return n >= 54 && get_be16(f + 12) == 0x0800 && f[23] == 6; }

static void expect_pieces(struct card *card)
{
	size_t bytes, done = 0;

	while (done < DATA) {
		const uint8_t *f = card_wait(card, is_tcp, &bytes);
		cr_assert_not_null(f);
		size_t now = bytes - 54;
		cr_expect_eq(now, DATA - done < SIZE ? DATA - done : SIZE);
		cr_expect_eq(get_be16(f + 16), 40 + now);
		cr_expect_eq(checksum(0, f + 14, 20), 0, "of IP");
		cr_expect_eq(checksum(pseudo_sum(f, 20 + now), f + 34, 20 + now), 0, "of TCP");
		cr_expect_eq(get_be32(f + 38), 1000 + done);
		cr_expect_eq(f[47] & 0x09, done + now == DATA ? 0x09 : 0, "PSH and FIN are the last one's");
		for (size_t i = 0; i < now; i++)
			cr_assert_eq(f[54 + i], (uint8_t)((done + i) * 7));
		done += now;
	}
}

static void set_offloads(void *opaque) { net_set_offloads(((struct card *)opaque)->net, NET_OFFLOAD_CSUM | NET_OFFLOAD_TSO4); }

Test(group, a_guest_gets_what_it_can_take)
{
	struct card *a = start("lan", "a.0", false), *b = start("lan", "b.0", false);
	CLEANUP_FREE uint8_t *raw = xcalloc(1, NET_BUFFER_BYTES);
	size_t bytes = make_segment(raw), got;

	cr_expect_eq(card_send_raw(a, raw, bytes), 0);
	expect_pieces(b);
	loop_call(b->loop, set_offloads, b);
	cr_expect_eq(card_send_raw(a, raw, bytes), 0);
	const uint8_t *whole = card_wait(b, is_tcp, &got);
	cr_assert_not_null(whole);
	cr_expect_eq(got, bytes - NET_HEADER_BYTES);
	cr_expect_eq(whole[-(int)NET_HEADER_BYTES] & NET_F_NEEDS_CSUM, NET_F_NEEDS_CSUM);
	card_destroy(a);
	card_destroy(b);
}

Test(segment, what_cannot_be_cut)
{
	struct segmenter *s = xcalloc(1, sizeof(*s));
	size_t bytes = make_segment(s->frame);

	cr_expect_eq(segmenter_begin(s, bytes), 0);
	cr_expect_eq(segmenter_begin(s, NET_HEADER_BYTES + 54), -EINVAL, "no data");
	s->frame[NET_HEADER_BYTES + 14] = 0x4f; /* a long header of IP */
	cr_expect_eq(segmenter_begin(s, bytes), 0);
	s->frame[NET_HEADER_BYTES + 14] = 0x44;
	cr_expect_eq(segmenter_begin(s, bytes), -EINVAL);
	make_segment(s->frame);
	s->frame[NET_HEADER_BYTES + 23] = 17;
	cr_expect_eq(segmenter_begin(s, bytes), -EINVAL, "no TCP");
	make_segment(s->frame);
	s->frame[NET_HEADER_BYTES + 46] = 0x40;
	cr_expect_eq(segmenter_begin(s, bytes), -EINVAL, "a header too short");
	make_segment(s->frame);
	put_le16(s->frame + NET_H_GSO_SIZE, 0);
	cr_expect_eq(segmenter_begin(s, bytes), -EINVAL);
	cr_expect_eq(segmenter_next(s, s->frame), 0);
	free(s);
}
