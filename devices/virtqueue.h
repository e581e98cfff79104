/*
 * Split virtqueues, device side (virtio 1.2, 2.7), with indirect descriptors and event index.
 *
 * Everything in the rings is the guest's and may be hostile or change under our hands: each field is read once. A
 * function that meets a ring which breaks the rules returns -EPROTO with the reason in err; the caller then declares
 * the device broken (DEVICE_NEEDS_RESET).
 *
 * Threads: none of its own; the caller holds the device's lock.
 */
#ifndef VMCP_DEVICES_VIRTQUEUE_H
#define VMCP_DEVICES_VIRTQUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/codec.h"
#include "base/err.h"
#include "vmm/memory.h"

#define VIRTQ_MAX_SIZE	   256u
#define VIRTQ_MAX_SEGMENTS 256u /* of one chain, indirect ones included */
#define VIRTQ_NO_VECTOR	   0xffffu

/* What a checkpoint saves of a queue. */
struct virtq_state {
	uint16_t size;	 /* entries; the guest may lower it before it enables the queue */
	uint16_t vector; /* MSI-X vector or VIRTQ_NO_VECTOR */
	uint8_t enabled;
	uint64_t desc_gpa, avail_gpa, used_gpa;
	uint16_t next_avail; /* first entry of the available ring that was not popped */
	uint16_t next_used;  /* our used index */
	uint16_t signalled;  /* used index at the last interrupt */
	uint8_t signalled_valid;
};
extern const struct codec_table virtq_state_table;

struct virtqueue {
	struct mem *mem;   /* immutable */
	uint16_t max_size; /* immutable */
	bool event_idx;	   /* VIRTIO_F_EVENT_IDX was negotiated */
	bool indirect;	   /* VIRTIO_F_INDIRECT_DESC was negotiated */
	uint16_t put;	   /* chains that the driver does not see given back yet */
	struct virtq_state s;
	const uint8_t *desc, *avail; /* host addresses while enabled */
};

/* One chain of buffers: `out_count` segments that the device reads, then `in_count` that it writes. */
struct virtq_chain {
	uint16_t head;
	unsigned out_count, in_count;
	uint64_t out_bytes, in_bytes; /* each at most UINT32_MAX */
	struct iovec iov[VIRTQ_MAX_SEGMENTS];
	uint64_t gpa[VIRTQ_MAX_SEGMENTS];
};

void virtq_init(struct virtqueue *q, struct mem *mem, uint16_t max_size);
/* Back to the state after a device reset. */
void virtq_reset(struct virtqueue *q);
/* Checks size, alignment and place of the rings (2.7: 16, 2 and 4 bytes). */
int virtq_check(const struct virtqueue *q, const struct virtq_state *s, struct err *err);
/* The rings become live: checks them and keeps their addresses. */
int virtq_enable(struct virtqueue *q, struct err *err);
/* Takes over a saved state, enabled or not. */
int virtq_load(struct virtqueue *q, const struct virtq_state *s, struct err *err);

/* Takes the next chain from the available ring: 1, or 0 if there is none, or -EPROTO. Segments to be written are
 * marked dirty. */
int virtq_pop(struct virtqueue *q, struct virtq_chain *chain, struct err *err);
/* Reads the chain that starts at `head` once more, without touching the ring: for requests that a checkpoint
 * recorded. 0 or -EPROTO. */
int virtq_walk(struct virtqueue *q, uint16_t head, struct virtq_chain *chain, struct err *err);
/* True if the driver has made a chain available that was not popped. */
bool virtq_has_chain(const struct virtqueue *q);
/* Gives the chain back with `written` bytes (2.7.8). */
int virtq_push(struct virtqueue *q, uint16_t head, uint32_t written, struct err *err);
/* The same in two steps, for chains that the driver must see given back at once: fill 0, 1, 2 ... ahead, then publish
 * how many. */
int virtq_fill(struct virtqueue *q, uint16_t ahead, uint16_t head, uint32_t written, struct err *err);
int virtq_publish(struct virtqueue *q, uint16_t count, struct err *err);
/* And where nobody wants to count: all that were put. None stays put while the loop is parked. */
int virtq_put(struct virtqueue *q, uint16_t head, uint32_t written, struct err *err);
int virtq_publish_put(struct virtqueue *q, struct err *err);
/* The last `count` chains were not popped after all; nothing of them is kept. */
void virtq_unpop(struct virtqueue *q, uint16_t count);
/* After pushes: must the driver be interrupted (2.7.7)? Remembers that it was. */
bool virtq_wants_interrupt(struct virtqueue *q);
/* The driver may not know of all that was pushed: it has not said that it has seen it. For queues put back from a
 * checkpoint. */
bool virtq_may_owe_interrupt(const struct virtqueue *q);
/* The queue is looked at: the driver need not notify (a hint, 2.7.10), until virtq_rearm. */
void virtq_disarm(struct virtqueue *q);
/* All that was available is popped: asks the driver for a notification of the next chain (2.7.10). True if one came
 * meanwhile. */
bool virtq_rearm(struct virtqueue *q);
/* How many chains the driver has made available, popped or not, modulo 2^16; 0 of a queue that is not enabled. */
uint16_t virtq_offered(const struct virtqueue *q);
/* As virtq_rearm, with chains left that nobody is to pop now: asks for a notification of the one after `offered` (of virtq_offered). */
bool virtq_rearm_after(struct virtqueue *q, uint16_t offered);

/* Copies from the readable / into the writable part of a chain, at `offset` of it; returns bytes copied (less at its
 * end). */
uint64_t virtq_copy_from(const struct virtq_chain *chain, uint64_t offset, void *data, uint64_t length);
uint64_t virtq_copy_to(const struct virtq_chain *chain, uint64_t offset, const void *data, uint64_t length);
/* Copies what is in the writable part. */
uint64_t virtq_read_back(const struct virtq_chain *chain, uint64_t offset, void *data, uint64_t length);
/* Marks [offset, offset + length) of the writable part dirty once more, after asynchronous I/O into it. */
void virtq_mark_dirty(const struct virtqueue *q, const struct virtq_chain *chain, uint64_t offset, uint64_t length);

#endif
