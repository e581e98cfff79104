/*
 * The host's side of a network card: where its frames go to and come from.
 *
 *     user    a network of its own inside this process (libslirp): NAT, DHCP, DNS, forwarded ports; no privileges
 *     tap     a tap device that somebody made
 *     bridge  a tap device made for this card, put into a bridge, gone with the card
 *     group   a network of VMs of one store, and nothing else
 *     libvirt the bridge of one of libvirt's networks: whoever opens it finds that bridge, and opens it as mode bridge
 *
 * Frames travel with a header of NET_HEADER_BYTES in front, that of virtio-net (virtio 1.2, 5.1.6, with num_buffers): every backend takes
 * frames whose checksum is still to be filled in and TCP segments of up to 64 KiB, and gives such only where net_set_offloads allows it. So
 * what a card offers to its guest does not depend on the backend.
 *
 * A tap device has as many lanes as the card has pairs of queues: the kernel gives what comes for a flow to the lane that the flow was last sent by. The other
 * backends have one.
 *
 * Nothing of the host is in what a checkpoint saves: a card that goes back to a checkpoint calls net_restart.
 *
 * Threads: net_open and net_close before and after the loop runs; all else in the loop's thread, but for net_save_connections and net_restart (loop
 * parked). Events come in the loop's thread, never from within a call.
 */
#ifndef VMCP_NET_NET_H
#define VMCP_NET_NET_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/err.h"
#include "base/event.h"

#define NET_HEADER_BYTES 12u
#define NET_ETHERNET_BYTES 14u
/* The largest frame with its header: 64 KiB of IP, and a VLAN tag. */
#define NET_BUFFER_BYTES (NET_HEADER_BYTES + NET_ETHERNET_BYTES + 4u + 65535u)
#define NET_MAX_FORWARDS 64u
#define NET_NETWORK_BYTES 64u
#define NET_PORT_BYTES 68u /* of a port's name in a network, with its end */
#define NET_INTERFACE_BYTES 16u /* of an interface's name, with its end */
#define NET_MAX_PAIRS	   16u

/* Fields of the header (little endian) and their values. */
enum {
	NET_H_FLAGS = 0,
	NET_H_GSO_TYPE = 1,
	NET_H_HEADER_BYTES = 2,
	NET_H_GSO_SIZE = 4,
	NET_H_CSUM_START = 6,
	NET_H_CSUM_OFFSET = 8,
	NET_H_NUM_BUFFERS = 10,
};
enum { NET_F_NEEDS_CSUM = 1, NET_F_DATA_VALID = 2 };
enum { NET_GSO_NONE = 0, NET_GSO_TCPV4 = 1, NET_GSO_TCPV6 = 4, NET_GSO_ECN = 0x80 };

/* What the guest can take. */
enum { NET_OFFLOAD_CSUM = 1, NET_OFFLOAD_TSO4 = 2, NET_OFFLOAD_TSO6 = 4, NET_OFFLOAD_ECN = 8 };

enum net_mode { NET_NONE, NET_USER, NET_TAP, NET_BRIDGE, NET_LIBVIRT, NET_GROUP };

struct net_forward {
	bool udp;
	uint8_t host_address[4]; /* of the host, where connections are taken */
	uint16_t host_port, guest_port;
};

struct net_config {
	const char *name; /* of the card, for messages; must outlive the backend */
	enum net_mode mode;
	unsigned pairs; /* of queues that the card has, 1..NET_MAX_PAIRS; 0: 1 */
	unsigned forward_count; /* user */
	struct net_forward forwards[NET_MAX_FORWARDS];
	char interface[NET_INTERFACE_BYTES]; /* tap: the device; bridge: the bridge */
	/* group: where networks are, copied; the network's name; the card's name in it, which nobody else has, copied; whether it hears nothing before net_hear. */
	const char *folder, *port;
	char network[NET_NETWORK_BYTES];
	bool deaf;
};

struct net_events {
	void (*readable)(void *opaque, unsigned lane); /* frames wait, and are wanted */
	void (*writable)(void *opaque, unsigned lane); /* after net_send had no room */
	void (*link)(void *opaque, bool up);
};

/* TCP connections that a guest has, as it knows them. Of its state: addresses and ports as the guest sees them. */
#define NET_MAX_CONNECTIONS 256u
#define NET_CONNECTION_BYTES 13u
struct net_connections {
	uint32_t bytes; /* a multiple of NET_CONNECTION_BYTES */
	uint8_t data[NET_MAX_CONNECTIONS * NET_CONNECTION_BYTES];
};

struct net;

/* Loads the libraries that cards of this mode need, so that processes forked from here on have them. ERR_HOST if one is not there. */
int net_load(enum net_mode mode, struct err *err);
/* Takes hold of the host's resources. An address or interface in use: -EADDRINUSE or -EBUSY, ERR_STATE; what the host lacks or does not allow:
 * ERR_HOST; no such interface: ERR_NOT_FOUND; each with a hint. mode: neither NET_NONE nor NET_LIBVIRT. */
int net_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err);
void net_close(struct net *net); /* NULL is allowed */
void net_listen(struct net *net, const struct net_events *events, void *opaque);
/* The interface of the host, "" of modes user and group. */
const char *net_interface(const struct net *net);

/* A card that was deaf hears from here on. In the loop's thread. */
void net_hear(struct net *net);

/* How many there may be in use. */
unsigned net_lanes(const struct net *net);
/* So many of them are in use from here on, at first one, and frames come by no other. How many are: fewer where the host fails, which the log tells. */
unsigned net_use_lanes(struct net *net, unsigned lanes);

/* All of lanes that are in use. */

/* `readable` comes while frames are wanted; not, at first. */
void net_want(struct net *net, unsigned lane, bool wanted);
bool net_waiting(const struct net *net); /* frames wait on lane 0 that came during net_send */
/* The next frame with its header into NET_BUFFER_BYTES at `buffer`: its length, 0 if there is none. */
size_t net_receive(struct net *net, unsigned lane, uint8_t *buffer);
/* A frame with its header, `bytes` in all, at most NET_BUFFER_BYTES. 0: taken, or lost as a network may; -EAGAIN: no room, `writable` will
 * tell; -EINVAL: the frame or its header is none, and was dropped. Untrusted. */
int net_send(struct net *net, unsigned lane, const struct iovec *iov, unsigned count, size_t bytes);
/* After a few net_send. */
void net_flush(struct net *net);
/* What frames to the guest may leave to it: NET_OFFLOAD_*. None at first. */
void net_set_offloads(struct net *net, unsigned offloads);

/* The guest's connections, for its state. Waits for nothing, allocates nothing. */
void net_save_connections(const struct net *net, struct net_connections *out);
/* The guest is another one from here on, whose connections are `guest`: frames on their way are dropped, connections of mode user are reset,
 * towards the host and towards the guest. */
void net_restart(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest);

#endif
