/*
 * The TCP connections of a guest, learned from the frames that pass (IPv4). After a return to a checkpoint nobody answers for the guest's
 * connections; a guest that only waits for data would wait for ever. So each is shaken: a SYN on it makes every TCP ask its peer
 * whether it lives (RFC 9293, 3.10.7.4), and the backend, which knows of no such connection, answers that with a reset.
 *
 * Threads: one at a time.
 */
#ifndef VMCP_NET_FLOWS_H
#define VMCP_NET_FLOWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "net/net.h"

#define FLOWS_SYN_BYTES 54u /* Ethernet, IP, TCP */

struct flow {
	uint8_t guest[4], peer[4];
	uint16_t guest_port, peer_port;
	uint8_t closed; /* FIN seen: 1 from the guest, 2 from the peer */
};

struct flows {
	unsigned count, next_victim;
	struct flow flow[NET_MAX_CONNECTIONS];
};

/* A frame (without virtio's header) from or to the guest. Untrusted; what is no TCP over IPv4 is left alone. Of more than
 * NET_MAX_CONNECTIONS at a time some are forgotten. */
void flows_see(struct flows *flows, const uint8_t *frame, size_t bytes, bool from_guest);
void flows_save(const struct flows *flows, struct net_connections *out);
/* -EINVAL: no such bytes can be. */
int flows_load(struct flows *flows, const struct net_connections *in);
/* The SYN that shakes a connection. */
void flows_make_syn(const struct flow *flow, const uint8_t guest_mac[6], const uint8_t peer_mac[6], uint8_t out[FLOWS_SYN_BYTES]);

#endif
