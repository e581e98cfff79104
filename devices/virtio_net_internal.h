/* What the parts of the network card share: virtio_net.c (queues, life), virtio_net_control.c (control queue, filters), virtio_net_state.c. */
#ifndef VMCP_DEVICES_VIRTIO_NET_INTERNAL_H
#define VMCP_DEVICES_VIRTIO_NET_INTERNAL_H

#include <stdbool.h>

#include "base/codec.h"
#include "devices/rate_limit.h"
#include "devices/virtio.h"
#include "devices/virtio_net.h"

/* Two queues for each pair, then that for control (5.1.2). */
#define NET_QUEUE_RECEIVE(pair) (2u * (pair))
#define NET_QUEUE_SEND(pair)	(2u * (pair) + 1u)
#define NET_QUEUES(pairs)	(2u * (pairs) + 1u)

/* Feature bits (5.1.3). */
#define NET_F_CSUM	     (1ull << 0)
#define NET_F_GUEST_CSUM     (1ull << 1)
#define NET_F_MAC	     (1ull << 5)
#define NET_F_GUEST_TSO4     (1ull << 7)
#define NET_F_GUEST_TSO6     (1ull << 8)
#define NET_F_GUEST_ECN	     (1ull << 9)
#define NET_F_HOST_TSO4	     (1ull << 11)
#define NET_F_HOST_TSO6	     (1ull << 12)
#define NET_F_HOST_ECN	     (1ull << 13)
#define NET_F_MRG_RXBUF	     (1ull << 15)
#define NET_F_STATUS	     (1ull << 16)
#define NET_F_CTRL_VQ	     (1ull << 17)
#define NET_F_CTRL_RX	     (1ull << 18)
#define NET_F_CTRL_RX_EXTRA  (1ull << 20)
#define NET_F_GUEST_ANNOUNCE (1ull << 21)
#define NET_F_MQ	     (1ull << 22)
#define NET_F_CTRL_MAC_ADDR  (1ull << 23)

/* Status field of the configuration (5.1.4). */
enum { NET_S_LINK_UP = 1, NET_S_ANNOUNCE = 2 };

#define NET_FILTER_ADDRESSES 64u

/* Which frames reach the guest. One bool or list for each command (5.1.6.5.1, 5.1.6.5.2). */
struct net_filter {
	bool promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast;
	bool unicast_overflow, multicast_overflow; /* the lists were too long: all pass */
	uint32_t unicast_bytes, multicast_bytes;
	uint8_t unicast[6 * NET_FILTER_ADDRESSES], multicast[6 * NET_FILTER_ADDRESSES];
};

/* What a checkpoint saves. */
struct net_state {
	struct virtio_state virtio;
	uint8_t mac[6];
	uint16_t status;
	uint8_t ipv4[4]; /* the guest's, as its ARP last said; zeroes: not seen */
	struct net_filter filter;
	struct net_connections connections;
	uint8_t more_pairs; /* that are active, beside the first */
};
extern const struct codec_table net_state_table;

/* Of the backend. */
struct net_lane {
	size_t frame_bytes; /* a frame that the guest had no buffers for, in `frame`. Under the device's lock */
	uint8_t frame[NET_BUFFER_BYTES];
};

struct virtio_net {
	struct virtio_device *vdev; /* immutable, as down to own_mac */
	struct net *net;
	struct loop *loop;
	char name[64];
	uint8_t own_mac[6]; /* after a reset */
	unsigned pairs;
	int timer_fd;
	struct loop_source *timer;

	/* under the device's lock */
	uint8_t mac[6], ipv4[4];
	uint16_t status;
	struct net_filter filter;
	unsigned active;    /* pairs that the guest uses: frames come to no other. 1 after a reset */
	unsigned lanes;	    /* of the backend that are in use */
	unsigned blocked;   /* pairs, by bit, that wait for room in the backend */
	bool configured; /* the backend knows what the driver negotiated */
	bool moved;	 /* the machine was put back: it is to be announced before anything else in the loop */
	struct rate_limit send_limit, receive_limit;
	uint64_t look_ns; /* when the timer is set to; 0: it is not */
	struct virtio_net_stats stats;

	struct virtq_chain chain; /* owner: I/O thread, as the next two */
	struct loop_glance glance; /* at what the guest answers */
	unsigned first;		  /* pair that has its turn first where there is a limit, modulo how many there are */

	struct net_lane lane[]; /* as many as the backend has */
};

/* All with the lock held. */

/* The loop looks at the card, and all its queues, again after this time at the latest. Any thread. */
void net_look_later(struct virtio_net *n, uint64_t wait_ns);
/* So many pairs are active from here on. I/O thread. */
void net_activate_pairs(struct virtio_net *n, unsigned pairs);
/* Frames that wait for buffers are lost. */
void net_drop_waiting(struct virtio_net *n);
/* A device after a reset: own MAC, one pair, all frames pass. */
void net_reset_settings(struct virtio_net *n);
bool net_passes_filter(const struct virtio_net *n, const uint8_t *frame);
/* One command of the control queue: 1, 0 if there is none, or -EPROTO. */
int net_control(struct virtio_net *n, struct virtqueue *q, struct err *err);

#endif
