#include "net/flows.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "net/net_internal.h"

#define IP_AT	    14u
#define IP_BYTES    20u
#define TCP_BYTES   20u
#define PROTOCOL_TCP 6u
enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };
enum { CLOSED_BY_GUEST = 1, CLOSED_BY_PEER = 2 };

/* The TCP header in a frame, NULL if there is none. */
static const uint8_t *find_tcp(const uint8_t *frame, size_t bytes)
{
	if (bytes < IP_AT + IP_BYTES + TCP_BYTES || get_be16(frame + 12) != 0x0800 || frame[IP_AT] >> 4 != 4 ||
	    frame[IP_AT + 9] != PROTOCOL_TCP || (get_be16(frame + IP_AT + 6) & 0x1fff) != 0)
		return NULL;
	size_t at = IP_AT + (frame[IP_AT] & 15u) * 4u;
	return at >= IP_AT + IP_BYTES && range_within(at, TCP_BYTES, bytes) ? frame + at : NULL;
}

static struct flow *find(struct flows *flows, const struct flow *key)
{
	for (unsigned i = 0; i < flows->count; i++) {
		struct flow *flow = &flows->flow[i];
		if (flow->guest_port == key->guest_port && flow->peer_port == key->peer_port && memcmp(flow->peer, key->peer, 4) == 0 &&
		    memcmp(flow->guest, key->guest, 4) == 0)
			return flow;
	}
	return NULL;
}

static struct flow *add(struct flows *flows, const struct flow *key)
{
	struct flow *flow;

	if (flows->count < NET_MAX_CONNECTIONS)
		flow = &flows->flow[flows->count++];
	else
		flow = &flows->flow[flows->next_victim++ % NET_MAX_CONNECTIONS];
	*flow = *key;
	return flow;
}

void flows_see(struct flows *flows, const uint8_t *frame, size_t bytes, bool from_guest)
{
	const uint8_t *tcp = find_tcp(frame, bytes);
	struct flow key = {0};

	if (tcp == NULL)
		return;
	memcpy(key.guest, frame + IP_AT + (from_guest ? 12 : 16), 4);
	memcpy(key.peer, frame + IP_AT + (from_guest ? 16 : 12), 4);
	key.guest_port = get_be16(tcp + (from_guest ? 0 : 2));
	key.peer_port = get_be16(tcp + (from_guest ? 2 : 0));
	uint8_t flags = tcp[13];
	struct flow *flow = find(flows, &key);
	/* A connection is one from the guest's first segment on that acknowledges something, or opens it. */
	if (flow == NULL && from_guest && !(flags & TCP_RST))
		flow = add(flows, &key);
	if (flow == NULL)
		return;
	if (flags & TCP_SYN)
		flow->closed = 0;
	if (flags & TCP_FIN)
		flow->closed |= from_guest ? CLOSED_BY_GUEST : CLOSED_BY_PEER;
	if ((flags & TCP_RST) || flow->closed == (CLOSED_BY_GUEST | CLOSED_BY_PEER))
		*flow = flows->flow[--flows->count];
}

void flows_save(const struct flows *flows, struct net_connections *out)
{
	uint8_t *at = out->data;

	out->bytes = flows->count * NET_CONNECTION_BYTES;
	for (unsigned i = 0; i < flows->count; i++, at += NET_CONNECTION_BYTES) {
		const struct flow *flow = &flows->flow[i];
		memcpy(at, flow->guest, 4);
		memcpy(at + 4, flow->peer, 4);
		put_le16(at + 8, flow->guest_port);
		put_le16(at + 10, flow->peer_port);
		at[12] = flow->closed;
	}
}

int flows_load(struct flows *flows, const struct net_connections *in)
{
	*flows = (struct flows){0};
	if (in->bytes > sizeof(in->data) || in->bytes % NET_CONNECTION_BYTES != 0)
		return -EINVAL;
	for (const uint8_t *at = in->data; at < in->data + in->bytes; at += NET_CONNECTION_BYTES) {
		struct flow *flow = &flows->flow[flows->count++];
		memcpy(flow->guest, at, 4);
		memcpy(flow->peer, at + 4, 4);
		flow->guest_port = get_le16(at + 8);
		flow->peer_port = get_le16(at + 10);
		flow->closed = at[12];
	}
	return 0;
}

static void fill_checksum(uint8_t *frame, size_t bytes, unsigned start, unsigned offset)
{
	uint8_t copy[NET_HEADER_BYTES + FLOWS_SYN_BYTES] = {NET_F_NEEDS_CSUM};

	put_le16(copy + NET_H_CSUM_START, (uint16_t)start);
	put_le16(copy + NET_H_CSUM_OFFSET, (uint16_t)offset);
	memcpy(copy + NET_HEADER_BYTES, frame, bytes);
	net_fill_checksum(copy, NET_HEADER_BYTES + bytes);
	memcpy(frame, copy + NET_HEADER_BYTES, bytes);
}

void flows_make_syn(const struct flow *flow, const uint8_t guest_mac[6], const uint8_t peer_mac[6], uint8_t out[FLOWS_SYN_BYTES])
{
	uint8_t *ip = out + IP_AT, *tcp = ip + IP_BYTES;
	uint32_t pseudo = PROTOCOL_TCP + TCP_BYTES;

	memset(out, 0, FLOWS_SYN_BYTES);
	memcpy(out, guest_mac, 6);
	memcpy(out + 6, peer_mac, 6);
	put_be16(out + 12, 0x0800);
	ip[0] = 0x45;
	put_be16(ip + 2, IP_BYTES + TCP_BYTES);
	ip[8] = 64;
	ip[9] = PROTOCOL_TCP;
	memcpy(ip + 12, flow->peer, 4);
	memcpy(ip + 16, flow->guest, 4);
	fill_checksum(out, IP_AT + IP_BYTES, IP_AT, 10);
	put_be16(tcp, flow->peer_port);
	put_be16(tcp + 2, flow->guest_port);
	tcp[12] = 5 << 4;
	tcp[13] = TCP_SYN;
	put_be16(tcp + 14, 0xffff);
	for (unsigned i = 12; i < 20; i += 2)
		pseudo += get_be16(ip + i);
	while (pseudo >> 16)
		pseudo = (pseudo & 0xffff) + (pseudo >> 16);
	put_be16(tcp + 16, (uint16_t)pseudo);
	fill_checksum(out, FLOWS_SYN_BYTES, IP_AT + IP_BYTES, 16);
}
