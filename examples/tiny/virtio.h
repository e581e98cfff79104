/*
 * What all virtio 1.x devices over modern PCI have in common: finding and starting one, and split queues, polled, without
 * interrupts. Source: OASIS virtio 1.2, sections 2.7 (split queues), 3.1 (start) and 4.1 (PCI).
 */
#ifndef TINY_VIRTIO_H
#define TINY_VIRTIO_H

#include <stdbool.h>
#include <stdint.h>

#include "ram.h"

#define VIRTQ_NEXT	   1
#define VIRTQ_DEVICE_WRITE 2

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

struct virtio {
	volatile uint8_t *common;
	volatile uint8_t *device; /* its configuration; NULL if it has none */
	volatile uint8_t *notify;
	uint32_t notify_factor;
};

struct virtio_queue {
	volatile uint8_t *notify_at;
	uint16_t number;
	uint16_t size;
	uint16_t available_index;
	uint16_t used_index;
	bool notify_due;
	struct virtq_descriptor *descriptors;
	struct virtq_available *available;
	volatile struct virtq_used *used;
};

enum virtio_wrong { VIRTIO_GOOD, VIRTIO_NOT_FOUND, VIRTIO_NOT_MODERN, VIRTIO_NO_RESET, VIRTIO_NOT_1, VIRTIO_REFUSES };

/* Finds device `number`, from 0, of those with one of the two ids and resets it: it knows that it has a driver. */
enum virtio_wrong virtio_start(struct virtio *virtio, uint16_t id_modern, uint16_t id_either, unsigned int number);

/* Features 0 to 31 that the device offers. */
uint32_t virtio_offered(struct virtio *virtio);

/* Takes these, and VERSION_1. */
enum virtio_wrong virtio_accept(struct virtio *virtio, uint32_t features);

/* The most entries that a queue can have; 0: there is no such queue. */
uint16_t virtio_queue_limit(struct virtio *virtio, uint16_t number);

/* size: a power of two below the limit, or the limit; at most 128. False: no memory. */
bool virtio_queue_start(struct virtio *virtio, struct virtio_queue *queue, struct ram *ram, uint16_t number, uint16_t size);

/* After all queues. */
void virtio_go(struct virtio *virtio);

void virtio_describe(struct virtio_queue *queue, unsigned int index, const volatile void *place, uint32_t bytes, unsigned int flags);

/* Puts the chain that begins at descriptor `head` into the ring, without telling the device. */
void virtio_offer(struct virtio_queue *queue, unsigned int head);

/* Tells the device if there is something new. One device access at most. */
void virtio_notify(struct virtio_queue *queue);

/* One finished chain, if there is one. */
bool virtio_poll(struct virtio_queue *queue, uint32_t *head);

#endif
