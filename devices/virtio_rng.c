#include "devices/virtio_rng.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "devices/virtio.h"

#define CLASS_OTHER	   0xff0000u
#define QUEUE_SIZE	   64u
#define REQUEST_MAX_BYTES  4096u /* the device may give less than asked for (5.4.6.2) */
#define REQUESTS_IN_A_TURN 8u

struct virtio_rng {
	struct virtio_device *vdev; /* immutable */
	struct virtq_chain chain;   /* of the request at hand; owner: I/O thread */
	uint8_t bytes[REQUEST_MAX_BYTES];
};

static uint32_t fill(struct virtio_rng *rng)
{
	uint64_t want = min_u64(rng->chain.in_bytes, sizeof(rng->bytes));
	ssize_t got;

	do {
		got = getrandom(rng->bytes, want, 0);
	} while (got < 0 && errno == EINTR);
	uint64_t n = got < 0 ? 0 : virtq_copy_to(&rng->chain, 0, rng->bytes, (uint64_t)got);
	explicit_bzero(rng->bytes, sizeof(rng->bytes));
	return (uint32_t)n;
}

/* 1, 0 if there was no chain, or -errno: the device is broken. */
static int serve(struct virtio_rng *rng, struct virtqueue *q)
{
	struct err err = ERR_INIT;

	int ret = virtq_pop(q, &rng->chain, &err);
	if (ret == 0)
		return 0;
	if (ret == 1 && rng->chain.out_count > 0)
		ret = err_set(&err, ERR_FAILED, EPROTO, "chain %u has a readable segment", rng->chain.head);
	if (ret == 1)
		ret = virtq_push(q, rng->chain.head, fill(rng), &err);
	if (ret < 0) {
		virtio_break(rng->vdev, &err);
		return ret;
	}
	return 1;
}

static void notify(void *opaque, unsigned queue)
{
	struct virtio_rng *rng = opaque;
	struct virtqueue *q = virtio_queue(rng->vdev, queue);
	bool more = true;

	for (unsigned turn = 0; turn < REQUESTS_IN_A_TURN && more; turn++) {
		int ret = serve(rng, q);
		if (ret < 0)
			return;
		more = ret == 1 || virtq_rearm(q);
	}
	virtio_signal(rng->vdev, queue);
	if (more)
		virtio_kick(rng->vdev, queue);
}

static const struct virtio_ops ops = {.notify = notify};

int virtio_rng_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct virtio_rng **out,
		      struct err *err)
{
	struct virtio_rng *rng = xcalloc(1, sizeof(*rng));
	const struct virtio_config about = {
		.name = "rng",
		.device_id = VIRTIO_ID_RNG,
		.class_code = CLASS_OTHER,
		.queues = 1,
		.queue_size = QUEUE_SIZE,
		.ops = &ops,
		.opaque = rng,
	};

	int ret = virtio_create(bus, mem, io_loop, &about, &rng->vdev, err);
	if (ret < 0) {
		free(rng);
		return ret;
	}
	*out = rng;
	return 0;
}

void virtio_rng_destroy(struct virtio_rng *rng)
{
	if (rng == NULL)
		return;
	virtio_destroy(rng->vdev);
	free(rng);
}

static int capture(void *opaque, void *state, struct err *err)
{
	struct virtio_rng *rng = opaque;
	(void)err;

	virtio_capture(rng->vdev, state);
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	struct virtio_rng *rng = opaque;

	return virtio_validate(rng->vdev, state, err);
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct virtio_rng *rng = opaque;

	int ret = virtio_apply(rng->vdev, state, err);
	if (ret < 0)
		return ret;
	virtio_lock(rng->vdev);
	virtio_activate(rng->vdev);
	virtio_unlock(rng->vdev);
	return 0;
}

static int drain(void *opaque, struct err *err)
{
	struct virtio_rng *rng = opaque;

	return virtio_drain(rng->vdev, err);
}

struct component virtio_rng_component(struct virtio_rng *rng, uint32_t instance)
{
	return (struct component){
		.id = "virtio-rng",
		.instance = instance,
		.version = 1,
		.table = &virtio_state_table,
		.opaque = rng,
		.capture = capture,
		.validate = validate,
		.apply = apply,
		.drain = drain,
	};
}
