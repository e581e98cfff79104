/*
 * Virtio block device (virtio 1.2, 5.2) on a cowdisk.
 *
 * Requests in flight over a checkpoint, as base/component.h says. capture() lists them in the state: listed, or not
 * yet popped, never both. A listed request completes for the running guest as any other; its completion also goes
 * into the completion log: status, length, and for a read the data, copied before the guest can see the completion
 * (from then on it may change its buffer). What is not in the log when a checkpoint is put back is issued again,
 * which is always right: the device had not answered yet.
 */
#ifndef VMCP_DEVICES_VIRTIO_BLK_H
#define VMCP_DEVICES_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "cowdisk/block.h"
#include "devices/pci.h"
#include "devices/virtio.h"
#include "vmm/memory.h"

#define VIRTIO_BLK_MAX_QUEUES 8u

struct virtio_blk;

struct virtio_blk_config {
	const char *name;   /* of the disk, for messages: "root" */
	const char *serial; /* at most 20 bytes reach the guest; NULL: none */
	bool readonly;
	bool detect_zeroes; /* a write of nothing but zeroes is carried out as one of zeroes that need no space */
	unsigned queues; /* 1..VIRTIO_BLK_MAX_QUEUES; 0: 1 */
};

/* The disk stays the machine's and the same object for the device's life (also across cow_replace). io_loop is the
 * disk's loop. Before VM and loop run. */
int virtio_blk_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct cow_disk *disk,
		      const struct virtio_blk_config *config, struct virtio_blk **out, struct err *err);
/* Nothing in flight (drained, or never run), VM and loop do not run. NULL is allowed. */
void virtio_blk_destroy(struct virtio_blk *blk);
/* After the bus's component in the machine's list. */
struct component virtio_blk_component(struct virtio_blk *blk, uint32_t instance);
/* Requests in flight now. Any thread. */
unsigned virtio_blk_inflight(struct virtio_blk *blk);
/* What the guest was answered since the device was made: requests done, and those that failed. Any thread. */
struct virtio_blk_stats {
	uint64_t reads, read_bytes, writes, written_bytes; /* writes: of zeroes too */
	uint64_t flushes, discards, errors;
};
void virtio_blk_get_stats(struct virtio_blk *blk, struct virtio_blk_stats *out);

#endif
