#include "rng.h"

#include <stddef.h>

#include "text.h"

#define ID_RNG	   0x1044
#define ID_RNG_OLD 0x1005
#define QUEUE_SIZE 2u

const char *rng_start(struct rng *rng, struct ram *ram)
{
	memset(rng, 0, sizeof(*rng));
	if (virtio_start(&rng->virtio, ID_RNG, ID_RNG_OLD, 0) || virtio_accept(&rng->virtio, 0))
		return "no-entropy-device";
	rng->log = ram_take(ram, RNG_LOG_PAGES * PAGE_BYTES);
	if (!rng->log || !virtio_queue_start(&rng->virtio, &rng->queue, ram, 0, QUEUE_SIZE))
		return "no-memory-for-entropy";
	memset((void *)(uintptr_t)rng->log, 0, sizeof(*rng->log));
	virtio_go(&rng->virtio);
	rng->there = true;
	return NULL;
}

bool rng_turn(struct rng *rng, bool due)
{
	uint32_t head;

	if (rng->drawing && virtio_poll(&rng->queue, &head)) {
		rng->drawing = false;
		rng->log->count++;
	}
	if (rng->drawing || !due)
		return false;
	volatile uint64_t *place = &rng->log->number[rng->log->count % RNG_KEPT];
	*place = 0;
	virtio_describe(&rng->queue, 0, place, sizeof(*place), VIRTQ_DEVICE_WRITE);
	virtio_offer(&rng->queue, 0);
	virtio_notify(&rng->queue);
	rng->drawing = true;
	return true;
}
