#include "devices/virtio.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/log.h"
#include "devices/virtio_internal.h"

#define STATUS_KNOWN                                                                                                   \
	(VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER | VIRTIO_STATUS_DRIVER_OK | VIRTIO_STATUS_FEATURES_OK |      \
	 VIRTIO_STATUS_NEEDS_RESET | VIRTIO_STATUS_FAILED)
#define BREAKS_LOGGED 16u /* a guest that goes on and on must not fill the log */
#define DRAIN_WARN_NS 5000000000ull

void virtio_lock(struct virtio_device *vdev) { pthread_mutex_lock(&vdev->lock); }
void virtio_unlock(struct virtio_device *vdev) { pthread_mutex_unlock(&vdev->lock); }
const char *virtio_name(const struct virtio_device *vdev) { return vdev->name; }
unsigned virtio_pci_slot(const struct virtio_device *vdev) { return pci_device_slot(vdev->pci); }
struct virtqueue *virtio_queue(struct virtio_device *vdev, unsigned queue) { return &vdev->slots[queue].q; }
bool virtio_is_resetting(const struct virtio_device *vdev) { return vdev->resetting; }

bool virtio_is_live(const struct virtio_device *vdev)
{
	return (vdev->status & (VIRTIO_STATUS_DRIVER_OK | VIRTIO_STATUS_NEEDS_RESET)) == VIRTIO_STATUS_DRIVER_OK &&
	       !vdev->resetting && !vdev->dormant;
}

bool virtio_has_feature(const struct virtio_device *vdev, uint64_t bits)
{
	return (vdev->driver_features & bits) == bits;
}

struct virtio_slot *virtio_selected(struct virtio_device *vdev)
{
	return vdev->queue_select < vdev->about.queues ? &vdev->slots[vdev->queue_select] : NULL;
}

/* --- waiting --- */

void virtio_wake(struct virtio_device *vdev) { pthread_cond_broadcast(&vdev->changed); }

void virtio_wait(struct virtio_device *vdev, unsigned milliseconds)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += milliseconds / 1000;
	until.tv_nsec += (long)(milliseconds % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_cond_timedwait(&vdev->changed, &vdev->lock, &until);
}

/* --- interrupts --- */

static void interrupt(struct virtio_device *vdev, uint16_t vector, uint8_t cause)
{
	if (pci_msix_enabled(vdev->pci)) {
		if (vector != VIRTQ_NO_VECTOR)
			pci_msix_trigger(vdev->pci, vector);
		return;
	}
	vdev->isr |= cause;
	pci_intx_set(vdev->pci, true);
}

/* Reading clears it and lowers the line (4.1.4.5). */
uint8_t virtio_read_isr(struct virtio_device *vdev)
{
	uint8_t isr = vdev->isr;

	vdev->isr = 0;
	pci_intx_set(vdev->pci, false);
	return isr;
}

void virtio_signal(struct virtio_device *vdev, unsigned queue)
{
	struct virtqueue *q = &vdev->slots[queue].q;

	if (virtio_is_live(vdev) && virtq_wants_interrupt(q))
		interrupt(vdev, q->s.vector, VIRTIO_ISR_QUEUE);
}

void virtio_publish(struct virtio_device *vdev, unsigned queue)
{
	struct err err = ERR_INIT;

	if (!virtio_is_live(vdev))
		return;
	if (virtq_publish_put(&vdev->slots[queue].q, &err) < 0)
		virtio_break(vdev, &err);
	virtio_signal(vdev, queue);
}

void virtio_config_changed(struct virtio_device *vdev)
{
	vdev->generation++;
	if (vdev->status & VIRTIO_STATUS_DRIVER_OK)
		interrupt(vdev, vdev->config_vector, VIRTIO_ISR_CONFIG);
}

void virtio_break(struct virtio_device *vdev, const struct err *reason)
{
	if (vdev->status & VIRTIO_STATUS_NEEDS_RESET)
		return;
	vdev->status |= VIRTIO_STATUS_NEEDS_RESET;
	if (vdev->breaks++ < BREAKS_LOGGED)
		log_warn("%s: stopped until the guest resets it: %s%s", vdev->name, reason->message,
			 vdev->breaks == BREAKS_LOGGED ? " (not reported again)" : "");
	if (vdev->status & VIRTIO_STATUS_DRIVER_OK)
		interrupt(vdev, vdev->config_vector, VIRTIO_ISR_CONFIG);
	virtio_kick(vdev, 0); /* to cancel what was begun and not started; not here, under the feet of the caller */
}

/* --- queues and requests --- */

void virtio_kick(struct virtio_device *vdev, unsigned queue)
{
	/* Fails only when the counter is full: then it is signalled already. */
	if (eventfd_write(vdev->slots[queue].kick_fd, 1) < 0)
		return;
}

static void cancel(struct virtio_device *vdev)
{
	if (vdev->about.ops->cancel != NULL)
		vdev->about.ops->cancel(vdev->about.opaque);
}

void virtio_expect(struct virtio_device *vdev, unsigned queue)
{
	struct virtio_slot *slot = &vdev->slots[queue];

	if (slot->hot || !slot->q.s.enabled)
		return;
	slot->hot = true;
	virtq_disarm(&slot->q);
	loop_poller_heat(vdev->poller);
}

bool virtio_rearm(struct virtio_device *vdev, unsigned queue)
{
	struct virtio_slot *slot = &vdev->slots[queue];

	return slot->hot ? virtq_has_chain(&slot->q) : virtq_rearm(&slot->q);
}

void virtio_stall(struct virtio_device *vdev, unsigned queue) { vdev->slots[queue].stalled = true; }

static void kicked(void *opaque, uint32_t events)
{
	struct virtio_slot *slot = opaque;
	struct virtio_device *vdev = slot->vdev;
	eventfd_t count;
	(void)events;

	if (eventfd_read(slot->kick_fd, &count) < 0)
		return;
	virtio_lock(vdev);
	if (!virtio_is_live(vdev)) {
		cancel(vdev);
	} else if (slot->q.s.enabled) {
		slot->stalled = false;
		if (vdev->poller != NULL)
			virtio_expect(vdev, slot->index);
		vdev->about.ops->notify(vdev->about.opaque, slot->index);
	}
	virtio_unlock(vdev);
}

/* --- polling (loop_poller_ops) --- */

static bool poll_queues(void *opaque)
{
	struct virtio_device *vdev = opaque;
	bool found = false;

	virtio_lock(vdev);
	for (unsigned i = 0; i < vdev->about.queues && virtio_is_live(vdev); i++) {
		struct virtio_slot *slot = &vdev->slots[i];
		if (!slot->hot || slot->stalled || !virtq_has_chain(&slot->q))
			continue;
		found = true;
		vdev->about.ops->notify(vdev->about.opaque, i);
	}
	virtio_unlock(vdev);
	return found;
}

static bool rest_queues(void *opaque)
{
	struct virtio_device *vdev = opaque;
	bool found = false;

	virtio_lock(vdev);
	for (unsigned i = 0; i < vdev->about.queues; i++) {
		struct virtio_slot *slot = &vdev->slots[i];
		if (!slot->hot)
			continue;
		/* One that is not live is kicked when it lives (again). */
		slot->hot = virtio_is_live(vdev) && virtq_rearm(&slot->q) && !slot->stalled;
		found = found || slot->hot;
	}
	virtio_unlock(vdev);
	return found;
}

static const struct loop_poller_ops poller_ops = {.poll = poll_queues, .rest = rest_queues};

void virtio_request_begin(struct virtio_device *vdev) { vdev->inflight++; }

static void finish_reset(struct virtio_device *vdev)
{
	for (unsigned i = 0; i < vdev->about.queues; i++)
		virtq_reset(&vdev->slots[i].q);
	vdev->driver_features = 0;
	vdev->device_feature_select = vdev->driver_feature_select = 0;
	vdev->config_vector = VIRTQ_NO_VECTOR;
	vdev->queue_select = 0;
	vdev->status = vdev->isr = 0;
	vdev->resetting = false;
	pci_intx_set(vdev->pci, false);
}

void virtio_request_end(struct virtio_device *vdev)
{
	if (--vdev->inflight == 0 && vdev->resetting)
		finish_reset(vdev);
	virtio_wake(vdev);
}

/* --- status (2.1, 3.1.1) --- */

static bool features_acceptable(const struct virtio_device *vdev)
{
	return (vdev->driver_features & ~vdev->features) == 0 && (vdev->driver_features & VIRTIO_F_VERSION_1);
}

static void apply_features(struct virtio_device *vdev)
{
	for (unsigned i = 0; i < vdev->about.queues; i++) {
		vdev->slots[i].q.event_idx = vdev->driver_features & VIRTIO_F_EVENT_IDX;
		vdev->slots[i].q.indirect = vdev->driver_features & VIRTIO_F_INDIRECT_DESC;
	}
}

static void kick_all(struct virtio_device *vdev)
{
	for (unsigned i = 0; i < vdev->about.queues; i++)
		virtio_kick(vdev, i);
}

void virtio_set_status(struct virtio_device *vdev, uint8_t status)
{
	if (vdev->resetting)
		return;
	if (status == 0) {
		vdev->resetting = true;
		cancel(vdev);
		if (vdev->resetting && vdev->inflight == 0)
			finish_reset(vdev);
		return;
	}
	uint8_t added = status & STATUS_KNOWN & (uint8_t) ~(vdev->status | VIRTIO_STATUS_NEEDS_RESET);
	if (added & VIRTIO_STATUS_FEATURES_OK) {
		if (features_acceptable(vdev))
			apply_features(vdev);
		else
			added &= (uint8_t)~VIRTIO_STATUS_FEATURES_OK;
	}
	if (!((vdev->status | added) & VIRTIO_STATUS_FEATURES_OK))
		added &= (uint8_t)~VIRTIO_STATUS_DRIVER_OK;
	vdev->status |= added; /* a driver never clears a bit but by a reset */
	if (added & VIRTIO_STATUS_DRIVER_OK)
		kick_all(vdev); /* notifications before this were not looked at */
}

/* --- life --- */

static int create_slots(struct virtio_device *vdev, struct err *err)
{
	for (unsigned i = 0; i < vdev->about.queues; i++) {
		struct virtio_slot *slot = &vdev->slots[i];
		virtq_init(&slot->q, vdev->mem, vdev->about.queue_size);
		slot->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (slot->kick_fd < 0)
			return err_sys(err, errno, "%s: eventfd", vdev->name);
		int ret = loop_add(vdev->loop, slot->kick_fd, EPOLLIN, kicked, slot, &slot->source, err);
		if (ret < 0)
			return err_prefix(err, "%s", vdev->name);
	}
	return 0;
}

int virtio_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, const struct virtio_config *config,
		  struct virtio_device **out, struct err *err)
{

	if (config->queues == 0 || config->queues > VIRTIO_MAX_QUEUES)
		return err_set(err, ERR_USAGE, EINVAL, "%s: %u queues: 1 to %u are possible", config->name,
			       config->queues, VIRTIO_MAX_QUEUES);
	struct virtio_device *vdev = xcalloc(1, sizeof(*vdev));
	snprintf(vdev->name, sizeof(vdev->name), "%s", config->name);
	vdev->about = *config;
	vdev->about.name = vdev->name;
	vdev->mem = mem;
	vdev->loop = io_loop;
	vdev->features = config->features | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;
	vdev->notify_at = PCI_UNMAPPED;
	vdev->config_vector = VIRTQ_NO_VECTOR;
	pthread_mutex_init(&vdev->lock, NULL);
	clock_cond_init(&vdev->changed);
	for (unsigned i = 0; i < VIRTIO_MAX_QUEUES; i++)
		vdev->slots[i] = (struct virtio_slot){.vdev = vdev, .index = i, .kick_fd = -1};
	if (config->polls)
		loop_add_poller(io_loop, &poller_ops, vdev, &vdev->poller);
	int ret = create_slots(vdev, err);
	if (ret == 0)
		ret = virtio_pci_create(vdev, bus, err);
	if (ret < 0) {
		virtio_destroy(vdev);
		return ret;
	}
	*out = vdev;
	return 0;
}

void virtio_destroy(struct virtio_device *vdev)
{
	if (vdev == NULL)
		return;
	pci_device_destroy(vdev->pci);
	loop_remove_poller(vdev->loop, vdev->poller);
	for (unsigned i = 0; i < VIRTIO_MAX_QUEUES; i++) {
		loop_remove(vdev->loop, vdev->slots[i].source);
		if (vdev->slots[i].kick_fd >= 0)
			close(vdev->slots[i].kick_fd);
	}
	pthread_cond_destroy(&vdev->changed);
	pthread_mutex_destroy(&vdev->lock);
	free(vdev);
}

/* --- state --- */

static const struct codec_field state_fields[] = {
	CODEC_SUB(struct virtio_state, pci, &pci_state_table),
	CODEC_INT(struct virtio_state, driver_features, CODEC_U64),
	CODEC_INT(struct virtio_state, device_feature_select, CODEC_U32),
	CODEC_INT(struct virtio_state, driver_feature_select, CODEC_U32),
	CODEC_INT(struct virtio_state, config_vector, CODEC_U16),
	CODEC_INT(struct virtio_state, queue_select, CODEC_U16),
	CODEC_INT(struct virtio_state, status, CODEC_U8),
	CODEC_INT(struct virtio_state, isr, CODEC_U8),
	CODEC_INT(struct virtio_state, generation, CODEC_U8),
	CODEC_INT(struct virtio_state, resetting, CODEC_U8),
	CODEC_VSUBS(struct virtio_state, queues, queue_count, &virtq_state_table),
	CODEC_END,
};
const struct codec_table virtio_state_table = {"virtio", sizeof(struct virtio_state), state_fields};

void virtio_capture(struct virtio_device *vdev, struct virtio_state *state)
{
	pci_capture(vdev->pci, &state->pci);
	virtio_lock(vdev);
	state->driver_features = vdev->driver_features;
	state->device_feature_select = vdev->device_feature_select;
	state->driver_feature_select = vdev->driver_feature_select;
	state->config_vector = vdev->config_vector;
	state->queue_select = vdev->queue_select;
	state->status = vdev->status;
	state->isr = vdev->isr;
	state->generation = vdev->generation;
	state->resetting = vdev->resetting;
	state->queue_count = vdev->about.queues;
	for (unsigned i = 0; i < vdev->about.queues; i++)
		state->queues[i] = vdev->slots[i].q.s;
	virtio_unlock(vdev);
}

static bool vector_valid(const struct virtio_device *vdev, uint16_t vector)
{
	return vector == VIRTQ_NO_VECTOR || vector <= vdev->about.queues;
}

static int validate_queue(struct virtio_device *vdev, const struct virtio_state *state, unsigned i, struct err *err)
{
	const struct virtq_state *q = &state->queues[i];
	struct err cause = ERR_INIT;

	if (!vector_valid(vdev, q->vector))
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: queue %u has interrupt vector %u", vdev->name, i,
			       q->vector);
	if (q->enabled && virtq_check(&vdev->slots[i].q, q, &cause) < 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: queue %u: %s", vdev->name, i, cause.message);
	return 0;
}

int virtio_validate(struct virtio_device *vdev, const struct virtio_state *state, struct err *err)
{
	int ret = pci_validate(vdev->pci, &state->pci, err);
	if (ret < 0)
		return ret;
	if (state->driver_features & ~vdev->features)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: the guest uses features 0x%llx, the device has 0x%llx",
			       vdev->name, (unsigned long long)state->driver_features,
			       (unsigned long long)vdev->features);
	if (state->queue_count != vdev->about.queues)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: %u queues, the device has %u", vdev->name,
			       state->queue_count, vdev->about.queues);
	if ((state->status & ~STATUS_KNOWN) || (state->isr & ~(VIRTIO_ISR_QUEUE | VIRTIO_ISR_CONFIG)) ||
	    state->resetting > 1)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: status 0x%x, ISR 0x%x, resetting %u", vdev->name,
			       state->status, state->isr, state->resetting);
	if (!vector_valid(vdev, state->config_vector))
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: interrupt vector %u", vdev->name, state->config_vector);
	for (unsigned i = 0; i < vdev->about.queues && ret == 0; i++)
		ret = validate_queue(vdev, state, i, err);
	return ret;
}

static int load(struct virtio_device *vdev, const struct virtio_state *state, struct err *err)
{
	int ret = 0;

	vdev->driver_features = state->driver_features;
	vdev->device_feature_select = state->device_feature_select;
	vdev->driver_feature_select = state->driver_feature_select;
	vdev->config_vector = state->config_vector;
	vdev->queue_select = state->queue_select;
	vdev->status = state->status;
	vdev->isr = state->isr;
	vdev->generation = state->generation;
	vdev->resetting = state->resetting;
	for (unsigned i = 0; i < vdev->about.queues && ret == 0; i++)
		ret = virtq_load(&vdev->slots[i].q, &state->queues[i], err);
	apply_features(vdev);
	if (vdev->resetting)
		finish_reset(vdev); /* what it waited for is not in flight here */
	return ret;
}

int virtio_apply(struct virtio_device *vdev, const struct virtio_state *state, struct err *err)
{
	virtio_lock(vdev);
	unsigned inflight = vdev->inflight;
	virtio_unlock(vdev);
	if (inflight != 0)
		return err_set(err, ERR_STATE, EBUSY, "%s: %u requests in flight", vdev->name, inflight);
	int ret = pci_apply(vdev->pci, &state->pci, err);
	if (ret < 0)
		return ret;
	virtio_lock(vdev);
	vdev->dormant = true;
	ret = load(vdev, state, err);
	virtio_unlock(vdev);
	return ret < 0 ? err_prefix(err, "%s", vdev->name) : 0;
}

void virtio_activate(struct virtio_device *vdev)
{
	vdev->dormant = false;
	kick_all(vdev);
	if (!virtio_is_live(vdev))
		return;
	for (unsigned i = 0; i < vdev->about.queues; i++) {
		if (virtq_may_owe_interrupt(&vdev->slots[i].q))
			interrupt(vdev, vdev->slots[i].q.s.vector, VIRTIO_ISR_QUEUE);
	}
}

int virtio_drain(struct virtio_device *vdev, struct err *err)
{
	uint64_t warn_ns = clock_now_ns() + DRAIN_WARN_NS;
	(void)err;

	virtio_lock(vdev);
	vdev->dormant = true;
	cancel(vdev);
	while (vdev->inflight > 0) {
		virtio_wait(vdev, 1000);
		if (clock_now_ns() < warn_ns)
			continue;
		log_warn("%s: %u requests do not end; waiting for them", vdev->name, vdev->inflight);
		warn_ns += DRAIN_WARN_NS;
	}
	virtio_unlock(vdev);
	return 0;
}
