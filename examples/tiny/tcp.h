/*
 * As much of TCP (RFC 9293) as a stream needs: one connection, which the other side begins and ends. Port 5001 takes what comes; port 5002 sends without an end.
 * No options but the segment size, no urgent data; what is lost is sent again from there on, after three equal acknowledgements or a third of a second.
 */
#ifndef TINY_TCP_H
#define TINY_TCP_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"

#define TCP_SINK_PORT	5001u
#define TCP_SOURCE_PORT 5002u
#define TCP_SEGMENT	1460u
#define TCP_LONGEST	(22u * TCP_SEGMENT) /* that a card cuts into segments: two are under way in a window */
#define TCP_HEAD_MOST	58u		    /* Ethernet, IP, TCP with one option */
#define TCP_FILLER	0x5au		    /* every byte that is sent */

struct tcp {
	bool open;
	uint8_t mac[6], ip[4], own_mac[6], own_ip[4];
	uint16_t port, own_port;
	uint32_t next_in, next_out, unacked, first_out; /* sequence numbers; first_out: of our SYN */
	uint32_t window;
	unsigned int same_acks;
	uint64_t moved_tsc; /* when the other side last acknowledged something new, or nothing was under way */
	bool syn_due, ack_due, fin_due;
	uint64_t taken; /* bytes, of all connections */
};

/* What is to be sent: a frame's head, and so many bytes of TCP_FILLER behind it. */
struct tcp_out {
	uint8_t head[TCP_HEAD_MOST];
	uint32_t head_bytes, bytes;
	bool cut; /* the card is to cut it into segments, and to fill in their checksums */
};

/* A frame of IPv4 without options, to one of the two ports. */
void tcp_take(struct tcp *tcp, const uint8_t *frame, uint64_t now);
/* False: there is nothing to send. `can_cut`: the card cuts. */
bool tcp_next(struct tcp *tcp, const struct clock *clock, uint64_t now, bool can_cut, struct tcp_out *out);

#endif
