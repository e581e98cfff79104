/* What virtio_vsock.c (queues, life) and virtio_vsock_connection.c (connections) share. Everything with the device's lock held, in the I/O thread. */
#ifndef VMCP_DEVICES_VIRTIO_VSOCK_INTERNAL_H
#define VMCP_DEVICES_VIRTIO_VSOCK_INTERNAL_H

#include <stdbool.h>
#include <sys/un.h>

#include "devices/virtio.h"
#include "devices/virtio_vsock.h"

#define VSOCK_HEADER_BYTES    44u
#define VSOCK_MAX_CONNECTIONS 256u
#define VSOCK_BUFFER_BYTES    (64u << 10) /* what a guest may send ahead on one connection (buf_alloc) */
#define VSOCK_PACKET_BYTES    (64u << 10) /* data of one packet, at most */
#define VSOCK_HOST_CID	      2u

enum { VSOCK_RECEIVE, VSOCK_SEND, VSOCK_EVENT, VSOCK_QUEUES };

enum vsock_op {
	VSOCK_OP_REQUEST = 1,
	VSOCK_OP_RESPONSE,
	VSOCK_OP_RST,
	VSOCK_OP_SHUTDOWN,
	VSOCK_OP_RW,
	VSOCK_OP_CREDIT_UPDATE,
	VSOCK_OP_CREDIT_REQUEST,
};
enum { VSOCK_SHUT_RECEIVE = 1, VSOCK_SHUT_SEND = 2 };

/* A packet's header (5.10.6), decoded. */
struct vsock_header {
	uint64_t from_cid, to_cid;
	uint32_t from_port, to_port, bytes;
	uint16_t type, op;
	uint32_t flags, buffer_bytes, forwarded;
};

/*
 *     LINE ----"CONNECT PORT"----> ASKING --RESPONSE--> OPEN --SHUTDOWN of both, RST, end of the socket--> gone
 *     (host came)                                        ^
 *     REQUEST of the guest, PATH_P connected ------------'
 */
enum vsock_state { VSOCK_LINE, VSOCK_ASKING, VSOCK_OPEN };

struct vsock_connection {
	struct virtio_vsock *v;
	int fd;
	struct loop_source *source;
	uint32_t events; /* that the source waits for */
	enum vsock_state state;
	uint32_t host_port, guest_port;
	/* Credit (5.10.6.3), all modulo 2^32. */
	uint32_t guest_buffer, guest_forwarded, sent; /* of what goes to the guest */
	uint32_t received, forwarded, told;	      /* of what comes from it; `told`: it knows that so much was forwarded */
	bool readable, ended;			      /* the socket has data, or its end */
	bool hung;				      /* nobody is at its other end; it is not watched any more */
	bool request, response, credit, shutdown;     /* packets that the guest is to get */
	bool guest_ended;			      /* it sends no more */
	bool closing;				      /* both ways are shut: goes when all is written */
	uint8_t *buffer;			      /* what the socket had no room for */
	uint32_t buffer_head, buffer_used;
	char line[32];
	unsigned line_bytes;
};

/* A reset that belongs to no connection (any more). */
struct vsock_reset {
	uint32_t host_port, guest_port;
};

struct virtio_vsock {
	struct virtio_device *vdev; /* immutable, as down to the lock's part */
	struct loop *loop;
	uint64_t guest_cid;
	struct sockaddr_un address;
	int listen_fd;
	struct loop_source *listener;

	/* under the device's lock */
	bool restart;	  /* all connections are to end, before anything else in the loop: the device was reset, or put back */
	bool tell;	  /* with `restart`: the guest is to hear of it */
	bool event_due;	  /* TRANSPORT_RESET */
	bool held;	  /* the driver may not have acted on that event yet: no connection of the host is begun, as it would be ended too */
	uint16_t offered; /* buffers for events that the driver had offered when it got that one; one more, and it has acted */
	uint32_t next_port; /* of the host, less a constant; begins anywhere after each restart */
	struct vsock_connection *connections[VSOCK_MAX_CONNECTIONS];
	unsigned turn; /* of the connection that goes first next time */
	struct vsock_reset resets[VSOCK_MAX_CONNECTIONS];
	unsigned reset_count;

	struct virtq_chain chain; /* owner: I/O thread, as the next */
	uint8_t packet[VSOCK_HEADER_BYTES + VSOCK_PACKET_BYTES];
};

/* The listener has somebody. */
void vsock_accept(struct virtio_vsock *v);
/* A packet of the guest, with `data`. Untrusted. */
void vsock_take(struct virtio_vsock *v, const struct vsock_header *h, const uint8_t *data);
/* The next packet for the guest, with at most `room` bytes of data behind the header: false if there is none. */
bool vsock_next(struct virtio_vsock *v, size_t room, struct vsock_header *h, uint8_t *data);
void vsock_close_all(struct virtio_vsock *v);
/* virtio_vsock.c: packets for the guest may have come up. Looks at the queues soon. */
void vsock_wake(struct virtio_vsock *v);
/* virtio_vsock.c: with the lock not held; false where connections were just ended by a restart. */
bool vsock_enter(struct virtio_vsock *v);
void vsock_leave(struct virtio_vsock *v);

#endif
