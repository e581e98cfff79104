#include "net/fragments.h"

#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "net/net_internal.h"

#define IP_AT	     14u
#define IP_BYTES     20u
#define ROOM_BYTES   (IP_AT + 65535u)
#define MORE_FLAG    0x2000u
#define OFFSET_MASK  0x1fffu

/* Addresses, protocol and identification say which packet a fragment is of (RFC 791, 3.2). */
static bool same_packet(const uint8_t *a, const uint8_t *b)
{
	return memcmp(a + IP_AT + 12, b + IP_AT + 12, 8) == 0 && a[IP_AT + 9] == b[IP_AT + 9] && memcmp(a + IP_AT + 4, b + IP_AT + 4, 2) == 0;
}

static struct fragments_packet *find(struct fragments *f, const uint8_t *frame)
{
	for (unsigned i = 0; i < FRAGMENTS_PACKETS; i++)
		if (f->packets[i].bytes > 0 && same_packet(f->packets[i].frame, frame))
			return &f->packets[i];
	return NULL;
}

static struct fragments_packet *begin(struct fragments *f, const uint8_t *frame, size_t bytes)
{
	struct fragments_packet *p = find(f, frame);

	if (p == NULL)
		p = &f->packets[f->next++ % FRAGMENTS_PACKETS];
	if (p->frame == NULL)
		p->frame = xcalloc(1, ROOM_BYTES);
	memcpy(p->frame, frame, bytes);
	p->bytes = bytes;
	return p;
}

/* Now it is a packet of its own: whole, with a new checksum. */
static size_t finish(struct fragments_packet *p, const uint8_t **frame)
{
	uint8_t header[NET_HEADER_BYTES + IP_AT + IP_BYTES] = {NET_F_NEEDS_CSUM}, *ip = header + NET_HEADER_BYTES + IP_AT;
	size_t bytes = p->bytes;

	memcpy(ip, p->frame + IP_AT, IP_BYTES);
	put_be16(ip + 2, (uint16_t)(bytes - IP_AT));
	put_be16(ip + 6, 0);
	put_be16(ip + 10, 0);
	put_le16(header + NET_H_CSUM_START, IP_AT);
	put_le16(header + NET_H_CSUM_OFFSET, 10);
	net_fill_checksum(header, sizeof(header));
	memcpy(p->frame + IP_AT, ip, IP_BYTES);
	*frame = p->frame;
	p->bytes = 0;
	return bytes;
}

size_t fragments_take(struct fragments *f, const uint8_t **frame, size_t bytes)
{
	const uint8_t *ip = *frame + IP_AT;

	if (bytes < IP_AT + IP_BYTES || get_be16(*frame + 12) != 0x0800 || (get_be16(ip + 6) & (MORE_FLAG | OFFSET_MASK)) == 0)
		return bytes;
	size_t length = get_be16(ip + 2), at = (get_be16(ip + 6) & OFFSET_MASK) * 8u;
	bool more = get_be16(ip + 6) & MORE_FLAG;
	/* Without options; all but the last hold a multiple of 8. */
	if (ip[0] != 0x45 || length <= IP_BYTES || length > bytes - IP_AT || (more && (length - IP_BYTES) % 8 != 0))
		return 0;
	struct fragments_packet *p = at == 0 ? begin(f, *frame, IP_AT + length) : find(f, *frame);
	if (p == NULL || at == 0)
		return 0;
	if (p->bytes != IP_AT + IP_BYTES + at || p->bytes + length - IP_BYTES > ROOM_BYTES) {
		p->bytes = 0;
		return 0;
	}
	memcpy(p->frame + p->bytes, ip + IP_BYTES, length - IP_BYTES);
	p->bytes += length - IP_BYTES;
	return more ? 0 : finish(p, frame);
}

void fragments_clear(struct fragments *f)
{
	for (unsigned i = 0; i < FRAGMENTS_PACKETS; i++)
		free(f->packets[i].frame);
	*f = (struct fragments){0};
}
