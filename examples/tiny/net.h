/*
 * A virtio network card (OASIS virtio 1.2, section 5.1), polled, and just enough of a host on it: 10.0.2.15, which answers ARP, ICMP echo, and
 * every UDP datagram to port 7 with the same datagram. Datagrams to port 9 are counted; one to port 19 that begins with a decimal number is answered with as many
 * like it, as fast as the card takes them. With several pairs of queues an answer goes out by the pair that its question came by. Frames of Ethernet type 0x88b6 are counted with those of port 9. TCP: tcp.h.
 *
 * Beats: numbered frames to everybody, of Ethernet type 0x88b5 (IEEE 802, for local experiments). What came of each sender is remembered: a number that is not
 * above all that came before says that two machines do not agree on what was.
 */
#ifndef TINY_NET_H
#define TINY_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "ram.h"
#include "tcp.h"
#include "virtio.h"

#define NET_BUFFERS	 32u
#define NET_BUFFER_BYTES 2048u

#define NET_SENDERS 4u
#define NET_PAIRS   4u

struct net_sender {
	bool known;
	uint8_t mac[6];
	uint64_t last;
};

struct net_pair {
	uint8_t *receive_buffers, *send_buffers; /* NET_BUFFERS each */
	uint32_t free_sends;			 /* a bit for each send buffer */
	uint64_t came;				 /* frames */
	struct virtio_queue receive, send;
};

struct net {
	bool there;
	uint8_t mac[6];
	unsigned int pair_count;
	struct net_pair pairs[NET_PAIRS];
	uint64_t arps, pings, datagrams;	 /* answered */
	uint64_t lost;				 /* no buffer to answer with */
	uint64_t beats;				 /* sent: the number of the last */
	uint64_t heard, behind;			 /* beats that came; of them, those whose number had come before */
	uint64_t sunk;				 /* to port 9, and frames of a stream */
	struct tcp tcp;
	bool cuts;				 /* the card cuts long segments of TCP (5.1.6.2.2) */
	uint8_t *filler;			 /* TCP_LONGEST bytes of TCP_FILLER */
	uint64_t stream_left;			 /* frames that are still to be sent */
	uint32_t stream_bytes;
	uint8_t stream[NET_BUFFER_BYTES];	 /* each of them */
	struct net_sender senders[NET_SENDERS];	 /* of the first that were heard */
	struct virtio virtio;
	struct virtio_queue control;
};

/* With so many pairs of queues, if the card has them. Returns NULL, or what is wrong. */
const char *net_start(struct net *net, struct ram *ram, unsigned int pairs);

/* Answers what came. Two device accesses a pair at most. */
void net_turn(struct net *net, const struct clock *clock, uint64_t now);

/* One more beat. It counts as sent before the card knows of it. */
void net_beat(struct net *net);

/* So many frames of 1514 bytes to the first machine whose beats were heard, at full speed. False: there is none. */
bool net_stream(struct net *net, uint64_t frames);

#endif
