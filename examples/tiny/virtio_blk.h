/*
 * A virtio 1.x block device over modern PCI: one split queue, polled, no interrupts. Source: OASIS virtio 1.2,
 * sections 2.7 (split queues), 4.1 (PCI) and 5.2 (block). It knows slots, not blocks: what is read and written
 * when is disk.c's business.
 */
#ifndef TINY_VIRTIO_BLK_H
#define TINY_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "ram.h"

#define VIRTIO_BLK_SLOTS	32u
#define VIRTIO_BLK_DESCRIPTORS	4u /* of one slot: header, data, more data, status */
#define VIRTIO_BLK_SECTOR_BYTES 512u

enum virtio_blk_kind { VIRTIO_BLK_READ = 0, VIRTIO_BLK_WRITE = 1, VIRTIO_BLK_FLUSH = 4 };

/* Layouts that the device reads and writes. */
struct virtq_descriptor {
	uint64_t gpa;
	uint32_t bytes;
	uint16_t flags;
	uint16_t next;
};

struct virtq_available {
	uint16_t flags;
	uint16_t index;
	uint16_t ring[];
};

struct virtq_used_element {
	uint32_t id;
	uint32_t bytes;
};

struct virtq_used {
	uint16_t flags;
	uint16_t index;
	struct virtq_used_element ring[];
};

struct virtio_blk_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct virtio_blk {
	volatile uint8_t *common;
	volatile uint8_t *device;
	volatile uint8_t *notify_at;
	uint64_t capacity_sectors;
	bool has_flush;
	unsigned int slots; /* how many requests the queue can hold, at most VIRTIO_BLK_SLOTS */
	uint16_t queue_size;
	uint16_t available_index;
	uint16_t used_index;
	bool notify_due;
	struct virtq_descriptor *descriptors;
	struct virtq_available *available;
	volatile struct virtq_used *used;
	struct virtio_blk_header *headers; /* one for each slot */
	volatile uint8_t *status;	   /* likewise */
};

/* Returns NULL, or what is wrong. */
const char *virtio_blk_start(struct virtio_blk *blk, struct ram *ram);

/* Puts a request into the ring without telling the device. split_bytes > 0: the data go as two descriptors. */
void virtio_blk_submit(struct virtio_blk *blk, unsigned int slot, enum virtio_blk_kind kind, uint64_t sector,
		       void *data, uint32_t bytes, uint32_t split_bytes);

/* Tells the device if there is something new. One device access at most. */
void virtio_blk_notify(struct virtio_blk *blk);

/* One finished request, if there is one. *good: the device says that it went well. */
bool virtio_blk_poll(struct virtio_blk *blk, unsigned int *slot, bool *good);

#endif
