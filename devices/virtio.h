/*
 * The part that all virtio devices share (virtio 1.2): a modern PCI function (4.1) with status, features, queues and
 * interrupts.
 *
 *     reset --ACKNOWLEDGE, DRIVER--> FEATURES_OK --DRIVER_OK--> live --ring breaks the rules--> NEEDS_RESET
 *       ^                                                         |                                 |
 *       '------- nothing in flight any more <---- resetting <-----+------- status written 0 --------'
 *
 * Resetting: with requests in flight a reset ends only when the last of them has (the kernel may still be writing
 * guest memory). Nobody waits for that: the status register reads non-zero until then, and the driver polls it
 * (4.1.4.3.2). A vCPU thread that waited for the I/O thread here would deadlock with a pause, which parks the I/O
 * thread while vCPUs leave their handlers.
 *
 * Threads: `notify`, completions and everything on queues run in the I/O thread with the device lock held; register
 * accesses run in vCPU threads with the device lock held. The lock is never held while waiting for anything. Lock
 * order: see devices/pci.h.
 */
#ifndef VMCP_DEVICES_VIRTIO_H
#define VMCP_DEVICES_VIRTIO_H

#include <stdbool.h>
#include <stdint.h>

#include "base/codec.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/pci.h"
#include "devices/virtqueue.h"
#include "vmm/memory.h"

#define VIRTIO_MAX_QUEUES 33u /* of a network card with 16 pairs */

enum { VIRTIO_ID_NET = 1, VIRTIO_ID_BLK = 2, VIRTIO_ID_CONSOLE = 3, VIRTIO_ID_RNG = 4, VIRTIO_ID_BALLOON = 5, VIRTIO_ID_VSOCK = 19 };

/* Device status (2.1). */
enum {
	VIRTIO_STATUS_ACKNOWLEDGE = 1,
	VIRTIO_STATUS_DRIVER = 2,
	VIRTIO_STATUS_DRIVER_OK = 4,
	VIRTIO_STATUS_FEATURES_OK = 8,
	VIRTIO_STATUS_NEEDS_RESET = 64,
	VIRTIO_STATUS_FAILED = 128,
};

/* Feature bits of all devices (6); the transport offers these three itself. */
#define VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_F_EVENT_IDX     (1ull << 29)
#define VIRTIO_F_VERSION_1     (1ull << 32)

/* Layout of the transport's BAR (4.1.4). */
#define VIRTIO_PCI_BAR		 4u
#define VIRTIO_PCI_MSIX_BAR	 0u
#define VIRTIO_PCI_BAR_BYTES	 0x4000u
#define VIRTIO_PCI_COMMON	 0x0000u
#define VIRTIO_PCI_ISR		 0x1000u
#define VIRTIO_PCI_DEVICE	 0x2000u
#define VIRTIO_PCI_NOTIFY	 0x3000u
#define VIRTIO_PCI_NOTIFY_STRIDE 4u

struct virtio_device;

/* All called with the device lock held. */
struct virtio_ops {
	/* The driver notified the queue, or it must be looked at again. I/O thread; only while the device is live.
	 * Must end soon: a pause waits for it. What it leaves undone it asks for with virtio_kick. */
	void (*notify)(void *opaque, unsigned queue);
	/* Drops requests that were begun but are not with the backend yet (virtio_request_end for each). Any thread.
	 * Optional. */
	void (*cancel)(void *opaque);
	/* Device configuration (2.5); beyond config_bytes the transport answers. vCPU thread. config_write is
	 * optional. */
	void (*config_read)(void *opaque, uint64_t offset, uint8_t *data, unsigned size);
	void (*config_write)(void *opaque, uint64_t offset, const uint8_t *data, unsigned size);
};

struct virtio_config {
	const char *name; /* for messages; copied */
	uint16_t device_id;
	uint32_t class_code;
	uint64_t features; /* the device's own; the transport's are added */
	unsigned queues;
	uint16_t queue_size;
	uint32_t config_bytes;
	/* For devices with many requests: while there is work, queues are looked at and the driver is asked not to notify (loop_poller). Then `notify` comes
	 * without notifications, too, and asks for them by virtio_rearm. */
	bool polls;
	const struct virtio_ops *ops;
	void *opaque;
};

/* Before VM and loop run. */
int virtio_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, const struct virtio_config *config,
		  struct virtio_device **out, struct err *err);
/* Nothing in flight, VM and loop do not run (any more). NULL is allowed. */
void virtio_destroy(struct virtio_device *vdev);

unsigned virtio_pci_slot(const struct virtio_device *vdev); /* any thread */
void virtio_lock(struct virtio_device *vdev);
void virtio_unlock(struct virtio_device *vdev);

/* --- for devices, with the lock held --- */
const char *virtio_name(const struct virtio_device *vdev);
struct virtqueue *virtio_queue(struct virtio_device *vdev, unsigned queue);
/* DRIVER_OK, no reset or drain under way, not broken: chains may be popped, pushed and signalled. */
bool virtio_is_live(const struct virtio_device *vdev);
bool virtio_is_resetting(const struct virtio_device *vdev);
bool virtio_has_feature(const struct virtio_device *vdev, uint64_t bits);
/* A chain was popped and its end will come later / has come. The last end completes a reset and wakes those that
 * wait. */
void virtio_request_begin(struct virtio_device *vdev);
void virtio_request_end(struct virtio_device *vdev);
/* Interrupts the driver if it wants to know of what was pushed. */
void virtio_signal(struct virtio_device *vdev, unsigned queue);
/* I/O thread: all that was available is popped. Asks the driver for a notification of the next chain, unless the queue is looked at anyway. True if
 * one came meanwhile. */
bool virtio_rearm(struct virtio_device *vdev, unsigned queue);
/* I/O thread, devices that poll: something was given back, so the driver may soon offer more. */
void virtio_expect(struct virtio_device *vdev, unsigned queue);
/* I/O thread: there are chains that cannot be taken now. Whoever can kicks the queue. */
void virtio_stall(struct virtio_device *vdev, unsigned queue);
/* Shows what was put, and interrupts the driver if it wants to know. */
void virtio_publish(struct virtio_device *vdev, unsigned queue);
/* Calls `notify` for the queue again, from the loop. */
void virtio_kick(struct virtio_device *vdev, unsigned queue);
/* The driver broke the rules: NEEDS_RESET, configuration interrupt, one line in the log (2.1.2). */
void virtio_break(struct virtio_device *vdev, const struct err *reason);
/* The device's configuration changed: generation counter and interrupt (2.5). */
void virtio_config_changed(struct virtio_device *vdev);
/* Waits (unlocking meanwhile) until virtio_wake or a request's end, at most `milliseconds`. Never in the I/O thread. */
void virtio_wait(struct virtio_device *vdev, unsigned milliseconds);
void virtio_wake(struct virtio_device *vdev);

/* --- checkpoints: the shared part of a device's component; they lock --- */
struct virtio_state {
	struct pci_state pci;
	uint64_t driver_features;
	uint32_t device_feature_select, driver_feature_select;
	uint16_t config_vector, queue_select;
	uint8_t status, isr, generation, resetting;
	uint32_t queue_count;
	struct virtq_state queues[VIRTIO_MAX_QUEUES];
};
extern const struct codec_table virtio_state_table;

/* Allocates nothing, waits for nothing; I/O thread parked. */
void virtio_capture(struct virtio_device *vdev, struct virtio_state *state);
int virtio_validate(struct virtio_device *vdev, const struct virtio_state *state, struct err *err);
/* Nothing in flight (-EBUSY). The device stays dead until virtio_activate, so that nothing new is popped before what
 * was in flight is back. */
int virtio_apply(struct virtio_device *vdev, const struct virtio_state *state, struct err *err);
/* After virtio_apply, with the lock held: the device lives. Every queue is looked at once when the loop runs, as
 * notifications may have been on their way; and interrupts that may have been on theirs when the vCPUs' state was
 * saved are sent (again: drivers bear spurious ones). */
void virtio_activate(struct virtio_device *vdev);
/* Pops nothing more, waits until nothing is in flight, drops completions. Until virtio_activate the device is dead.
 * vCPUs stopped, loop runs. */
int virtio_drain(struct virtio_device *vdev, struct err *err);

#endif
