#include "net/flow_hash.h"

#include <criterion/criterion.h>
#include <stdbool.h>
#include <string.h>

#include "base/bytes.h"

#define BYTES 80u

static void make(uint8_t frame[BYTES], bool ipv6, bool tagged, uint8_t protocol, uint16_t port)
{
	uint8_t *ip = frame + 14 + (tagged ? 4 : 0);

	memset(frame, 0, BYTES);
	put_be16(frame + 12, 0x8100);
	put_be16(ip - 2, ipv6 ? 0x86dd : 0x0800);
	ip[0] = ipv6 ? 0x60 : 0x45;
	ip[ipv6 ? 6 : 9] = protocol;
	put_be32(ip + (ipv6 ? 8 : 12), 0x0a000202);
	put_be32(ip + (ipv6 ? 24 : 16), 0x0a00020f);
	put_be16(ip + (ipv6 ? 40 : 20), port);
	put_be16(ip + (ipv6 ? 42 : 22), 80);
}

/* A queue of `queues` for each of 1024 ports: none has more than half as much again as its share, and none less than half. */
static void spreads(bool ipv6, bool tagged, uint8_t protocol)
{
	for (unsigned queues = 2; queues <= 16; queues++) {
		unsigned count[16] = {0};
		uint8_t frame[BYTES];

		for (uint16_t port = 40000; port < 41024; port++) {
			make(frame, ipv6, tagged, protocol, port);
			uint32_t hash = net_flow_hash(frame, BYTES);
			memset(frame + BYTES - 4, 0xff, 4); /* data, which is not the flow's */
			cr_expect_eq(net_flow_hash(frame, BYTES), hash);
			count[hash % queues]++;
		}
		for (unsigned i = 0; i < queues; i++)
			cr_expect(count[i] * queues > 512 && count[i] * queues < 1536, "%u of %u queues: %u", i, queues, count[i]);
	}
}

Test(flow_hash, spreads_flows)
{
	for (unsigned i = 0; i < 8; i++)
		spreads(i & 1, i & 2, i & 4 ? 17 : 6);
}

Test(flow_hash, fragments_of_a_packet_stay_together)
{
	uint8_t first[BYTES], next[BYTES];

	make(first, false, false, 17, 40000);
	put_be16(first + 14 + 6, 0x2000);
	make(next, false, false, 17, 50000); /* it is data what lies there */
	put_be16(next + 14 + 6, 0x0010);
	cr_expect_eq(net_flow_hash(first, BYTES), net_flow_hash(next, BYTES));
	next[14 + 15]++;
	cr_expect_neq(net_flow_hash(first, BYTES), net_flow_hash(next, BYTES), "of another sender");
}

/* However short, and with a header that says it is longer. A sanitizer sees what is read beyond. */
Test(flow_hash, what_is_cut_off)
{
	for (unsigned kind = 0; kind < 4; kind++) {
		for (size_t bytes = 0; bytes <= BYTES; bytes++) {
			uint8_t whole[BYTES], *cut = malloc(bytes + 1);
			make(whole, kind & 1, kind & 2, 6, 1);
			whole[14 + (kind & 2 ? 4 : 0)] |= 15;
			memcpy(cut + 1, whole, bytes);
			uint32_t hash = net_flow_hash(cut + 1, bytes);
			cr_expect(bytes >= 34 || hash == 0);
			free(cut);
		}
	}
	cr_expect_eq(net_flow_hash((const uint8_t[42]){[12] = 8, 6}, 42), 0, "ARP");
}
