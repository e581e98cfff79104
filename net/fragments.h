/*
 * Puts fragmented IPv4 packets of a guest together, before libslirp sees them: that of Debian 12 (4.7.0) writes where it should not when
 * fragments are made with malice. Takes only what honest senders make: fragments in order, none missing, none twice; others are lost.
 *
 * Threads: one at a time.
 */
#ifndef VMCP_NET_FRAGMENTS_H
#define VMCP_NET_FRAGMENTS_H

#include <stddef.h>
#include <stdint.h>

#define FRAGMENTS_PACKETS 4u /* under way at a time; the oldest goes */

struct fragments_packet {
	uint8_t *frame; /* header and what came so far; NULL: none */
	size_t bytes;
};

struct fragments {
	struct fragments_packet packets[FRAGMENTS_PACKETS];
	unsigned next;
};

/*
 * A frame, without virtio's header, of at most 65535 + 14 bytes. What there is to pass on: *frame itself where it is no fragment; a whole packet with the
 * last of its fragments (valid until the next call); else 0. Returns its length. Untrusted.
 */
size_t fragments_take(struct fragments *f, const uint8_t **frame, size_t bytes);
void fragments_clear(struct fragments *f);

#endif
