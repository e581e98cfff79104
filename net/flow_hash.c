#include "net/flow_hash.h"

#include <stdbool.h>

#include "base/bytes.h"
#include "net/net.h"

#define ETHER_VLAN 0x8100u
#define VLAN_BYTES 4u
#define ETHER_IPV4 0x0800u
#define ETHER_IPV6 0x86ddu
#define IPV4_BYTES 20u
#define IPV6_BYTES 40u
#define PORT_BYTES 4u
enum { PROTOCOL_TCP = 6, PROTOCOL_UDP = 17 };
enum { V4_FRAGMENT = 6, V4_PROTOCOL = 9, V4_ADDRESSES = 12, V6_NEXT = 6, V6_ADDRESSES = 8 };

/* FNV-1a. */
static uint32_t mix(uint32_t hash, const uint8_t *data, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		hash = (hash ^ data[i]) * 0x01000193u;
	return hash;
}

static uint32_t mix_ports(uint32_t hash, uint8_t protocol, const uint8_t *frame, size_t at, size_t bytes)
{
	bool has_ports = (protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP) && range_within(at, PORT_BYTES, bytes);

	hash = mix(hash, &protocol, 1);
	if (has_ports)
		hash = mix(hash, frame + at, PORT_BYTES);
	/* The low bits choose the queue, and have seen only the low bits of what went in. */
	return hash ^ hash >> 16 ^ hash >> 8;
}

static uint32_t hash_ipv4(const uint8_t *frame, size_t at, size_t bytes)
{
	const uint8_t *ip = frame + at;
	uint32_t hash = mix(0x811c9dc5u, ip + V4_ADDRESSES, 8);
	bool is_fragment = get_be16(ip + V4_FRAGMENT) & 0x3fff; /* more are to come, or it is not the first */

	return mix_ports(hash, ip[V4_PROTOCOL], frame, is_fragment ? bytes : at + (ip[0] & 15u) * 4u, bytes);
}

uint32_t net_flow_hash(const uint8_t *frame, size_t bytes)
{
	size_t at = NET_ETHERNET_BYTES;

	if (bytes < at)
		return 0;
	if (get_be16(frame + at - 2) == ETHER_VLAN && bytes >= at + VLAN_BYTES)
		at += VLAN_BYTES;
	unsigned kind = get_be16(frame + at - 2);
	if (kind == ETHER_IPV4 && range_within(at, IPV4_BYTES, bytes))
		return hash_ipv4(frame, at, bytes);
	if (kind != ETHER_IPV6 || !range_within(at, IPV6_BYTES, bytes))
		return 0;
	return mix_ports(mix(0x811c9dc5u, frame + at + V6_ADDRESSES, 32), frame[at + V6_NEXT], frame, at + IPV6_BYTES, bytes);
}
