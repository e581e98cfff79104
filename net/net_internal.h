/* What the backends share. */
#ifndef VMCP_NET_NET_INTERNAL_H
#define VMCP_NET_NET_INTERNAL_H

#include "net/net.h"

struct net_ops {
	void (*close)(struct net *net);
	unsigned (*use_lanes)(struct net *net, unsigned lanes); /* NULL: there is one */
	void (*want)(struct net *net, unsigned lane); /* what net_wants says has changed. NULL: all the same to it */
	bool (*waiting)(const struct net *net);
	size_t (*receive)(struct net *net, unsigned lane, uint8_t *buffer);
	int (*send)(struct net *net, unsigned lane, const struct iovec *iov, unsigned count, size_t bytes);
	void (*flush)(struct net *net); /* NULL: it keeps nothing back */
	void (*set_offloads)(struct net *net, unsigned offloads);
	void (*save_connections)(const struct net *net, struct net_connections *out); /* NULL: it knows of none */
	void (*restart)(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest);
	void (*hear)(struct net *net); /* NULL: it never is deaf */
};

/* First member of each backend. */
struct net {
	const struct net_ops *ops; /* immutable, as all down to the events */
	struct loop *loop;
	struct net_config config;
	char interface[NET_INTERFACE_BYTES];
	struct net_events events;
	void *opaque;
	unsigned wanted; /* lanes, by bit */
};

static inline bool net_wants(const struct net *net, unsigned lane) { return net->wanted >> lane & 1; }

int net_user_load(struct err *err);
int net_user_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err);
int net_group_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err);
int net_tap_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err);

/* The first `wanted` bytes of a frame, or as many as it has. Returns how many. */
size_t net_gather(const struct iovec *iov, unsigned count, uint8_t *out, size_t wanted);
/* The sum of 16-bit words in memory order (RFC 1071: the order of bytes does not matter to it): what is to be stored is got and put by le16. */
uint16_t net_sum(const uint8_t *data, size_t bytes);
/* Fills in the checksum that a header leaves open (virtio 1.2, 5.1.6.2); the header no more asks for it. -EINVAL where it lies outside of the frame. */
int net_fill_checksum(uint8_t *frame, size_t bytes);

#endif
