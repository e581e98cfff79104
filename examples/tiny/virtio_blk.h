/*
 * A virtio block device: OASIS virtio 1.2, section 5.2, on one queue of virtio.h. It knows slots, not blocks: what is read
 * and written when is disk.c's business.
 */
#ifndef TINY_VIRTIO_BLK_H
#define TINY_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "ram.h"
#include "virtio.h"

#define VIRTIO_BLK_SLOTS	32u
#define VIRTIO_BLK_DESCRIPTORS	4u /* of one slot: header, data, more data, status */
#define VIRTIO_BLK_SECTOR_BYTES 512u

enum virtio_blk_kind { VIRTIO_BLK_READ = 0, VIRTIO_BLK_WRITE = 1, VIRTIO_BLK_FLUSH = 4 };

/* A layout that the device reads. */
struct virtio_blk_header {
	uint32_t type;
	uint32_t reserved;
	uint64_t sector;
};

struct virtio_blk {
	struct virtio virtio;
	struct virtio_queue queue;
	uint64_t capacity_sectors;
	bool has_flush;
	unsigned int slots; /* how many requests the queue can hold, at most VIRTIO_BLK_SLOTS */
	struct virtio_blk_header *headers; /* one for each slot */
	volatile uint8_t *status;	   /* likewise */
};

/* Disk `number`, from 0. Returns NULL, or what is wrong. */
const char *virtio_blk_start(struct virtio_blk *blk, struct ram *ram, unsigned int number);

/* Puts a request into the ring without telling the device. split_bytes > 0: the data go as two descriptors. */
void virtio_blk_submit(struct virtio_blk *blk, unsigned int slot, enum virtio_blk_kind kind, uint64_t sector,
		       void *data, uint32_t bytes, uint32_t split_bytes);

/* Tells the device if there is something new. One device access at most. */
void virtio_blk_notify(struct virtio_blk *blk);

/* One finished request, if there is one. *good: the device says that it went well. */
bool virtio_blk_poll(struct virtio_blk *blk, unsigned int *slot, bool *good);

#endif
