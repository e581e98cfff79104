#include "net/flows.h"

#include <errno.h>

#include "net/net_test.h"

#define GUEST 0x0a00020fu
#define PEER  0x0a000202u
enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

static void segment(uint8_t frame[54], bool from_guest, uint16_t guest_port, uint16_t peer_port, uint8_t flags)
{
	memset(frame, 0, 54);
	make_ethernet(frame, everybody, 0x0800);
	make_ip(frame, 6, from_guest ? GUEST : PEER, from_guest ? PEER : GUEST, 20);
	put_be16(frame + 34, from_guest ? guest_port : peer_port);
	put_be16(frame + 36, from_guest ? peer_port : guest_port);
	frame[46] = 5 << 4;
	frame[47] = flags;
}
static void see(struct flows *f, bool from_guest, uint16_t guest_port, uint16_t peer_port, uint8_t flags)
{
	uint8_t frame[54];
	segment(frame, from_guest, guest_port, peer_port, flags);
	flows_see(f, frame, sizeof(frame), from_guest);
}

Test(flows, a_connection_from_its_first_segment_to_its_last)
{
	struct flows f = {0};
	see(&f, false, 80, 5000, SYN);
	cr_expect_eq(f.count, 0, "the guest has said nothing yet");
	see(&f, true, 80, 5000, SYN | ACK);
	cr_expect_eq(f.count, 1);
	see(&f, true, 81, 5000, SYN | ACK);
	see(&f, true, 80, 5001, SYN | ACK);
	cr_expect_eq(f.count, 3);
	see(&f, true, 80, 5000, FIN | ACK);
	cr_expect_eq(f.count, 3, "half of it is open");
	see(&f, false, 80, 5000, FIN | ACK);
	cr_expect_eq(f.count, 2);
	see(&f, false, 81, 5000, RST);
	cr_expect_eq(f.count, 1);
	see(&f, true, 80, 5001, RST | ACK);
	cr_expect_eq(f.count, 0);
	see(&f, true, 80, 5001, RST);
	cr_expect_eq(f.count, 0);
}

Test(flows, there_and_back)
{
	struct flows f = {0}, g;
	struct net_connections saved;
	for (uint16_t i = 0; i < 300; i++)
		see(&f, true, (uint16_t)(1000 + i), 443, ACK);
	cr_expect_eq(f.count, NET_MAX_CONNECTIONS);
	see(&f, false, 1299, 443, FIN);
	flows_save(&f, &saved);
	cr_expect_eq(saved.bytes, NET_MAX_CONNECTIONS * NET_CONNECTION_BYTES);
	cr_expect_eq(flows_load(&g, &saved), 0);
	cr_expect_eq(g.count, f.count);
	for (unsigned i = 0; i < f.count; i++)
		cr_expect(memcmp(&f.flow[i], &g.flow[i], sizeof(struct flow)) == 0, "%u", i);
	saved.bytes--;
	cr_expect_eq(flows_load(&g, &saved), -EINVAL);
	saved.bytes = sizeof(saved.data) + NET_CONNECTION_BYTES;
	cr_expect_eq(flows_load(&g, &saved), -EINVAL);
}

Test(flows, strange_frames_are_left_alone)
{
	struct flows f = {0};
	uint8_t frame[54], cut[54];
	segment(frame, true, 80, 5000, ACK);
	for (size_t bytes = 0; bytes < sizeof(frame); bytes++) {
		CLEANUP_FREE uint8_t *exact = xcalloc(1, bytes + 1);
		memcpy(exact, frame, bytes);
		flows_see(&f, exact, bytes, true);
	}
	cr_expect_eq(f.count, 0);
	static const struct {
		unsigned at;
		uint8_t value;
	} changes[] = {{12, 0x86}, {14, 0x65}, {14, 0x44}, {14, 0x4f}, {23, 17}, {21, 1}};
	for (unsigned i = 0; i < ARRAY_LENGTH(changes); i++) {
		memcpy(cut, frame, sizeof(cut));
		cut[changes[i].at] = changes[i].value;
		flows_see(&f, cut, sizeof(cut), true);
		cr_expect_eq(f.count, 0, "%u", i);
	}
	flows_see(&f, frame, sizeof(frame), true);
	cr_expect_eq(f.count, 1);
}

Test(flows, the_syn_is_a_good_segment)
{
	struct flows f = {0};
	uint8_t syn[FLOWS_SYN_BYTES];
	static const uint8_t peer_mac[6] = {2, 2, 2, 2, 2, 2};
	see(&f, true, 80, 5000, ACK);
	flows_make_syn(&f.flow[0], guest_mac, peer_mac, syn);
	cr_expect(memcmp(syn, guest_mac, 6) == 0 && memcmp(syn + 6, peer_mac, 6) == 0);
	cr_expect_eq(checksum(0, syn + 14, 20), 0);
	cr_expect_eq(checksum(pseudo_sum(syn, 20), syn + 34, 20), 0);
	cr_expect_eq(get_be32(syn + 26), PEER);
	cr_expect_eq(get_be32(syn + 30), GUEST);
	cr_expect_eq(get_be16(syn + 34), 5000);
	cr_expect_eq(get_be16(syn + 36), 80);
	cr_expect_eq(syn[47], SYN);
}
