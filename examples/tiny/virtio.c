#include "virtio.h"

#include <stddef.h>

#include "cpu.h"
#include "pci.h"
#include "text.h"

#define VENDOR_VIRTIO	  0x1af4
#define CAPABILITY_VIRTIO 0x09

enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_DEVICE = 4 };

/* struct virtio_pci_cap */
enum { CAP_TYPE = 3, CAP_BAR = 4, CAP_OFFSET = 8, CAP_LENGTH = 12, CAP_NOTIFY_FACTOR = 16 };

/* struct virtio_pci_common_cfg */
enum {
	COMMON_DEVICE_FEATURE_SELECT = 0,
	COMMON_DEVICE_FEATURE = 4,
	COMMON_DRIVER_FEATURE_SELECT = 8,
	COMMON_DRIVER_FEATURE = 12,
	COMMON_DEVICE_STATUS = 20,
	COMMON_QUEUE_SELECT = 22,
	COMMON_QUEUE_SIZE = 24,
	COMMON_QUEUE_ENABLE = 28,
	COMMON_QUEUE_NOTIFY_OFF = 30,
	COMMON_QUEUE_DESC = 32,
	COMMON_QUEUE_DRIVER = 40,
	COMMON_QUEUE_DEVICE = 48,
};

#define STATUS_ACKNOWLEDGE 0x01
#define STATUS_DRIVER	   0x02
#define STATUS_DRIVER_OK   0x04
#define STATUS_FEATURES_OK 0x08

#define FEATURE_VERSION_1 0x00000001u /* bit 32 */

#define AVAILABLE_NO_INTERRUPT 1
#define USED_NO_NOTIFY	       1

#define RESET_POLLS_AT_MOST 100000u

static bool find_places(struct virtio *virtio, struct pci_function at)
{
	volatile uint8_t *place;
	uint64_t bar_gpa;
	uint8_t cap, type;

	for (cap = pci_capability(at, CAPABILITY_VIRTIO, 0); cap; cap = pci_capability(at, CAPABILITY_VIRTIO, cap)) {
		type = pci_read8(at, (uint8_t)(cap + CAP_TYPE));
		if (type != CAP_COMMON && type != CAP_NOTIFY && type != CAP_DEVICE)
			continue;
		if (!pci_bar(at, pci_read8(at, (uint8_t)(cap + CAP_BAR)), &bar_gpa))
			continue;
		place = ram_map_device(bar_gpa + pci_read32(at, (uint8_t)(cap + CAP_OFFSET)),
				       pci_read32(at, (uint8_t)(cap + CAP_LENGTH)));
		if (!place)
			return false;
		if (type == CAP_COMMON && !virtio->common) {
			virtio->common = place;
		} else if (type == CAP_DEVICE && !virtio->device) {
			virtio->device = place;
		} else if (type == CAP_NOTIFY && !virtio->notify) {
			virtio->notify = place;
			virtio->notify_factor = pci_read32(at, (uint8_t)(cap + CAP_NOTIFY_FACTOR));
		}
	}
	return virtio->common && virtio->notify;
}

static void set_status(struct virtio *virtio, uint8_t status) { mmio_write8(virtio->common + COMMON_DEVICE_STATUS, status); }

static bool reset(struct virtio *virtio)
{
	unsigned int i;

	set_status(virtio, 0);
	for (i = 0; i < RESET_POLLS_AT_MOST; i++) {
		if (!mmio_read8(virtio->common + COMMON_DEVICE_STATUS))
			return true;
	}
	return false;
}

enum virtio_wrong virtio_start(struct virtio *virtio, uint16_t id_modern, uint16_t id_either, unsigned int number)
{
	struct pci_function at;

	memset(virtio, 0, sizeof(*virtio));
	if (!pci_find(VENDOR_VIRTIO, id_modern, id_either, number, &at))
		return VIRTIO_NOT_FOUND;
	if (!find_places(virtio, at))
		return VIRTIO_NOT_MODERN;
	pci_enable(at);
	if (!reset(virtio))
		return VIRTIO_NO_RESET;
	set_status(virtio, STATUS_ACKNOWLEDGE);
	set_status(virtio, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	return VIRTIO_GOOD;
}

static uint32_t offered(struct virtio *virtio, uint32_t select)
{
	mmio_write32(virtio->common + COMMON_DEVICE_FEATURE_SELECT, select);
	return mmio_read32(virtio->common + COMMON_DEVICE_FEATURE);
}

uint32_t virtio_offered(struct virtio *virtio) { return offered(virtio, 0); }

static void accept(struct virtio *virtio, uint32_t select, uint32_t features)
{
	mmio_write32(virtio->common + COMMON_DRIVER_FEATURE_SELECT, select);
	mmio_write32(virtio->common + COMMON_DRIVER_FEATURE, features);
}

enum virtio_wrong virtio_accept(struct virtio *virtio, uint32_t features)
{
	if (!(offered(virtio, 1) & FEATURE_VERSION_1))
		return VIRTIO_NOT_1;
	accept(virtio, 0, features);
	accept(virtio, 1, FEATURE_VERSION_1);
	set_status(virtio, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	if (!(mmio_read8(virtio->common + COMMON_DEVICE_STATUS) & STATUS_FEATURES_OK))
		return VIRTIO_REFUSES;
	return VIRTIO_GOOD;
}

uint16_t virtio_queue_limit(struct virtio *virtio, uint16_t number)
{
	mmio_write16(virtio->common + COMMON_QUEUE_SELECT, number);
	return mmio_read16(virtio->common + COMMON_QUEUE_SIZE);
}

static void set_address(struct virtio *virtio, unsigned int offset, const volatile void *place)
{
	uint64_t gpa = (uintptr_t)place;

	mmio_write32(virtio->common + offset, (uint32_t)gpa);
	mmio_write32(virtio->common + offset + 4, (uint32_t)(gpa >> 32));
}

bool virtio_queue_start(struct virtio *virtio, struct virtio_queue *queue, struct ram *ram, uint16_t number, uint16_t size)
{
	uint8_t *tables = ram_take(ram, 3 * PAGE_BYTES); /* a page for each of: descriptors, available, used */

	if (!tables)
		return false;
	memset(tables, 0, 3 * PAGE_BYTES);
	*queue = (struct virtio_queue){
		.number = number,
		.size = size,
		.descriptors = (struct virtq_descriptor *)tables,
		.available = (struct virtq_available *)(tables + PAGE_BYTES),
		.used = (volatile struct virtq_used *)(tables + 2 * PAGE_BYTES),
	};
	queue->available->flags = AVAILABLE_NO_INTERRUPT;
	mmio_write16(virtio->common + COMMON_QUEUE_SELECT, number);
	mmio_write16(virtio->common + COMMON_QUEUE_SIZE, size);
	set_address(virtio, COMMON_QUEUE_DESC, queue->descriptors);
	set_address(virtio, COMMON_QUEUE_DRIVER, queue->available);
	set_address(virtio, COMMON_QUEUE_DEVICE, queue->used);
	queue->notify_at =
		virtio->notify + (uint32_t)mmio_read16(virtio->common + COMMON_QUEUE_NOTIFY_OFF) * virtio->notify_factor;
	mmio_write16(virtio->common + COMMON_QUEUE_ENABLE, 1);
	return true;
}

void virtio_go(struct virtio *virtio)
{
	set_status(virtio, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

void virtio_describe(struct virtio_queue *queue, unsigned int index, const volatile void *place, uint32_t bytes,
		     unsigned int flags)
{
	queue->descriptors[index] = (struct virtq_descriptor){
		.gpa = (uintptr_t)place,
		.bytes = bytes,
		.flags = (uint16_t)flags,
		.next = (uint16_t)(flags & VIRTQ_NEXT ? index + 1 : 0),
	};
}

void virtio_offer(struct virtio_queue *queue, unsigned int head)
{
	queue->available->ring[queue->available_index % queue->size] = (uint16_t)head;
	cpu_barrier();
	*(volatile uint16_t *)&queue->available->index = ++queue->available_index;
	queue->notify_due = true;
}

void virtio_notify(struct virtio_queue *queue)
{
	if (!queue->notify_due)
		return;
	queue->notify_due = false;
	cpu_fence(); /* 2.7.13.4.1: the index must be out before the flag is looked at */
	if (!(queue->used->flags & USED_NO_NOTIFY))
		mmio_write16(queue->notify_at, queue->number);
}

bool virtio_poll(struct virtio_queue *queue, uint32_t *head)
{
	if (queue->used->index == queue->used_index)
		return false;
	cpu_barrier();
	*head = queue->used->ring[queue->used_index % queue->size].id;
	queue->used_index++;
	return true;
}
