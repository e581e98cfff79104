#include "net/segment.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "net/net_internal.h"

#define IP	    (NET_HEADER_BYTES + NET_ETHERNET_BYTES)
#define IPV4_TCP    6
#define IPV6_BYTES  40u
#define TCP_BYTES   20u
#define TCP_FIN	    0x01u
#define TCP_PUSH    0x08u
#define TCP_CWR	    0x80u

/* Places in the headers of IP and TCP. */
enum { V4_LENGTH = 2, V4_ID = 4, V4_PROTOCOL = 9, V4_CHECKSUM = 10, V4_SOURCE = 12, V6_LENGTH = 4, V6_NEXT = 6, V6_SOURCE = 8 };
enum { TCP_SEQUENCE = 4, TCP_OFFSET = 12, TCP_FLAGS = 13, TCP_CHECKSUM = 16 };

int segmenter_begin(struct segmenter *s, size_t bytes)
{
	uint8_t *ip = s->frame + IP;
	uint8_t type = s->frame[NET_H_GSO_TYPE] & (uint8_t)~NET_GSO_ECN;
	size_t header;

	s->bytes = 0;
	s->ipv6 = type == NET_GSO_TCPV6;
	s->size = get_le16(s->frame + NET_H_GSO_SIZE);
	if (s->size == 0 || bytes < IP + IPV6_BYTES + TCP_BYTES || bytes > sizeof(s->frame))
		return -EINVAL;
	header = s->ipv6 ? IPV6_BYTES : (ip[0] & 0x0fu) * 4u;
	if (get_be16(ip - 2) != (s->ipv6 ? 0x86dd : 0x0800) || ip[0] >> 4 != (s->ipv6 ? 6 : 4) || header < 20 || ip[s->ipv6 ? V6_NEXT : V4_PROTOCOL] != IPV4_TCP)
		return -EINVAL;
	s->tcp = IP + header;
	if (s->tcp + TCP_BYTES > bytes)
		return -EINVAL;
	s->data = s->at = s->tcp + (s->frame[s->tcp + TCP_OFFSET] >> 4) * 4u;
	if (s->data < s->tcp + TCP_BYTES || s->data >= bytes)
		return -EINVAL;
	s->bytes = bytes;
	s->pieces = 0;
	return 0;
}

/* The checksum of what has these sums. */
static uint16_t fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

static void set_ip(const struct segmenter *s, uint8_t *ip, size_t bytes)
{
	if (s->ipv6) {
		put_be16(ip + V6_LENGTH, (uint16_t)(bytes - IPV6_BYTES));
		return;
	}
	put_be16(ip + V4_LENGTH, (uint16_t)bytes);
	put_be16(ip + V4_ID, (uint16_t)(get_be16(ip + V4_ID) + s->pieces));
	put_be16(ip + V4_CHECKSUM, 0);
	put_le16(ip + V4_CHECKSUM, fold(net_sum(ip, s->tcp - IP)));
}

static void set_tcp(const struct segmenter *s, uint8_t *out, size_t bytes, bool last)
{
	uint8_t *tcp = out + s->tcp;
	size_t length = bytes - s->tcp, addresses = s->ipv6 ? 32 : 8;
	uint8_t pseudo[8] = {[7] = IPV4_TCP}; /* beside the addresses */

	put_be32(tcp + TCP_SEQUENCE, get_be32(tcp + TCP_SEQUENCE) + (uint32_t)(s->at - s->data));
	if (!last)
		tcp[TCP_FLAGS] &= (uint8_t)~(TCP_FIN | TCP_PUSH);
	if (s->pieces)
		tcp[TCP_FLAGS] &= (uint8_t)~TCP_CWR;
	put_be16(tcp + TCP_CHECKSUM, 0);
	put_be32(pseudo, (uint32_t)length);
	uint32_t sum = (uint32_t)net_sum(pseudo, sizeof(pseudo)) + net_sum(out + IP + (s->ipv6 ? V6_SOURCE : V4_SOURCE), addresses);
	put_le16(tcp + TCP_CHECKSUM, fold(sum + net_sum(tcp, length)));
}

size_t segmenter_next(struct segmenter *s, uint8_t *out)
{
	if (!s->bytes)
		return 0;
	size_t left = s->bytes - s->at, now = left < s->size ? left : s->size, bytes = s->data + now;

	memcpy(out, s->frame, s->data);
	memset(out, 0, NET_HEADER_BYTES);
	memcpy(out + s->data, s->frame + s->at, now);
	set_ip(s, out + IP, bytes - IP);
	set_tcp(s, out, bytes, now == left);
	s->pieces++;
	s->at += now;
	if (s->at == s->bytes)
		s->bytes = 0;
	return bytes;
}
