/*
 * Virtio network card (virtio 1.2, 5.1) on a backend of net/: pairs of queues and a control queue, mergeable receive buffers, checksum and
 * segmentation offloads, filters, announcement.
 *
 * Pairs (5.1.6.5.5): what the guest sends by one of them goes to the backend's lane of that number, and what comes by the lane to the pair, where the backend has
 * lanes for all; where it has one, frames come to the active pairs by their flows' hash. All pairs are served by the one I/O thread, under one lock.
 *
 * Over a checkpoint: nothing of the card is ever in flight, as frames are moved within one turn of the loop. A card that is put back drops what was
 * on its way (net_restart) and announces itself where the guest was live: by frames that it sends in the guest's name (RARP, and ARP where
 * the guest's address was seen), and by VIRTIO_NET_S_ANNOUNCE where negotiated.
 *
 * Limits are token buckets, of a tenth of a second at least: frames that are to be sent stay in the ring meanwhile, those that come stay with the backend.
 */
#ifndef VMCP_DEVICES_VIRTIO_NET_H
#define VMCP_DEVICES_VIRTIO_NET_H

#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/pci.h"
#include "net/net.h"
#include "vmm/memory.h"

struct virtio_net;

struct virtio_net_config {
	const char *name; /* of the card, for messages: "lan" */
	uint8_t mac[6];
	unsigned pairs; /* of queues, as the backend was told; 0: 1 */
	uint64_t send_rate, receive_rate; /* bytes a second of all pairs, as the guest sees it; 0: no limit */
};

struct virtio_net_stats {
	uint64_t sent_frames, sent_bytes, received_frames, received_bytes;
	uint64_t send_errors;	 /* frames that were none */
	uint64_t receive_drops; /* did not fit into the guest's buffer */
	uint64_t filtered;	 /* not for this card */
};

/* The backend stays the machine's, and the card its only listener. Before VM and loop run. */
int virtio_net_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct net *net, const struct virtio_net_config *config,
		      struct virtio_net **out, struct err *err);
void virtio_net_destroy(struct virtio_net *n); /* VM and loop do not run. NULL is allowed. */
/* After the bus's component in the machine's list. */
struct component virtio_net_component(struct virtio_net *n, uint32_t instance);
/* Its PCI device on bus 0. */
unsigned virtio_net_slot(const struct virtio_net *n);
/* Any thread. */
void virtio_net_get_stats(struct virtio_net *n, struct virtio_net_stats *out);

#endif
