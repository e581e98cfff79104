/* The entropy device: random numbers of the host's, drawn one after the other and kept, so that machines that come from one checkpoint can be compared. */
#ifndef TINY_RNG_H
#define TINY_RNG_H

#include <stdbool.h>
#include <stdint.h>

#include "ram.h"
#include "virtio.h"

#define RNG_LOG_PAGES 16
#define RNG_KEPT      (RNG_LOG_PAGES * PAGE_BYTES / 8 - 1)

/* Number i is in number[i % RNG_KEPT], where the device itself has put it. */
struct rng_log {
	uint64_t count; /* that were taken note of */
	uint64_t number[RNG_KEPT];
};

struct rng {
	bool there;
	bool drawing;
	struct virtio virtio;
	struct virtio_queue queue;
	volatile struct rng_log *log; /* whole pages */
};

/* NULL, or what is wrong. */
const char *rng_start(struct rng *rng, struct ram *ram);

/* Takes note of the number that has come. With `due`, and if none is awaited, asks for the next; true: it did. */
bool rng_turn(struct rng *rng, bool due);

#endif
