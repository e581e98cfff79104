#include "virtio_blk.h"

#include <stddef.h>

#include "cpu.h"
#include "pci.h"
#include "text.h"

#define VENDOR_VIRTIO	  0x1af4
#define ID_BLK_MODERN	  0x1042
#define ID_BLK_EITHER	  0x1001
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

#define FEATURE_READ_ONLY 0x00000020u /* bit 5 */
#define FEATURE_FLUSH	  0x00000200u /* bit 9 */
#define FEATURE_VERSION_1 0x00000001u /* bit 32 */

#define DESCRIPTOR_NEXT		1
#define DESCRIPTOR_DEVICE_WRITE 2
#define AVAILABLE_NO_INTERRUPT	1
#define USED_NO_NOTIFY		1

#define RESET_POLLS_AT_MOST 100000u

struct notify_place {
	volatile uint8_t *base;
	uint32_t factor;
};

static bool find_places(struct virtio_blk *blk, struct pci_function at, struct notify_place *notify)
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
		if (type == CAP_COMMON && !blk->common) {
			blk->common = place;
		} else if (type == CAP_DEVICE && !blk->device) {
			blk->device = place;
		} else if (type == CAP_NOTIFY && !notify->base) {
			notify->base = place;
			notify->factor = pci_read32(at, (uint8_t)(cap + CAP_NOTIFY_FACTOR));
		}
	}
	return blk->common && blk->device && notify->base;
}

static void set_status(struct virtio_blk *blk, uint8_t status)
{
	mmio_write8(blk->common + COMMON_DEVICE_STATUS, status);
}

static bool reset(struct virtio_blk *blk)
{
	unsigned int i;

	set_status(blk, 0);
	for (i = 0; i < RESET_POLLS_AT_MOST; i++) {
		if (!mmio_read8(blk->common + COMMON_DEVICE_STATUS))
			return true;
	}
	return false;
}

static uint32_t offered(struct virtio_blk *blk, uint32_t select)
{
	mmio_write32(blk->common + COMMON_DEVICE_FEATURE_SELECT, select);
	return mmio_read32(blk->common + COMMON_DEVICE_FEATURE);
}

static void accept(struct virtio_blk *blk, uint32_t select, uint32_t features)
{
	mmio_write32(blk->common + COMMON_DRIVER_FEATURE_SELECT, select);
	mmio_write32(blk->common + COMMON_DRIVER_FEATURE, features);
}

static const char *negotiate(struct virtio_blk *blk)
{
	uint32_t low = offered(blk, 0), high = offered(blk, 1);
	uint8_t status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;

	if (!(high & FEATURE_VERSION_1))
		return "disk-not-virtio-1";
	if (low & FEATURE_READ_ONLY)
		return "disk-read-only";
	blk->has_flush = low & FEATURE_FLUSH;
	accept(blk, 0, low & FEATURE_FLUSH);
	accept(blk, 1, FEATURE_VERSION_1);
	set_status(blk, status | STATUS_FEATURES_OK);
	if (!(mmio_read8(blk->common + COMMON_DEVICE_STATUS) & STATUS_FEATURES_OK))
		return "disk-refuses-features";
	return NULL;
}

static void set_address(struct virtio_blk *blk, unsigned int offset, const volatile void *place)
{
	uint64_t gpa = (uintptr_t)place;

	mmio_write32(blk->common + offset, (uint32_t)gpa);
	mmio_write32(blk->common + offset + 4, (uint32_t)(gpa >> 32));
}

static const char *set_up_queue(struct virtio_blk *blk, struct ram *ram, const struct notify_place *notify)
{
	uint16_t largest;
	uint8_t *tables;

	mmio_write16(blk->common + COMMON_QUEUE_SELECT, 0);
	largest = mmio_read16(blk->common + COMMON_QUEUE_SIZE);
	blk->slots = largest / VIRTIO_BLK_DESCRIPTORS;
	if (blk->slots > VIRTIO_BLK_SLOTS)
		blk->slots = VIRTIO_BLK_SLOTS;
	if (!blk->slots)
		return "disk-queue-too-small";
	for (blk->queue_size = 1; blk->queue_size < blk->slots * VIRTIO_BLK_DESCRIPTORS;)
		blk->queue_size = (uint16_t)(blk->queue_size * 2);
	if (blk->queue_size > largest)
		blk->queue_size = largest;

	tables = ram_take(ram,
			  4 * PAGE_BYTES); /* one page for each of: descriptors, available, used, headers and status */
	if (!tables)
		return "no-memory-for-disk";
	memset(tables, 0, 4 * PAGE_BYTES);
	blk->descriptors = (struct virtq_descriptor *)tables;
	blk->available = (struct virtq_available *)(tables + PAGE_BYTES);
	blk->used = (volatile struct virtq_used *)(tables + 2 * PAGE_BYTES);
	blk->headers = (struct virtio_blk_header *)(tables + 3 * PAGE_BYTES);
	blk->status = tables + 3 * PAGE_BYTES + VIRTIO_BLK_SLOTS * sizeof(struct virtio_blk_header);
	blk->available->flags = AVAILABLE_NO_INTERRUPT;

	mmio_write16(blk->common + COMMON_QUEUE_SIZE, blk->queue_size);
	set_address(blk, COMMON_QUEUE_DESC, blk->descriptors);
	set_address(blk, COMMON_QUEUE_DRIVER, blk->available);
	set_address(blk, COMMON_QUEUE_DEVICE, blk->used);
	blk->notify_at = notify->base + (uint32_t)mmio_read16(blk->common + COMMON_QUEUE_NOTIFY_OFF) * notify->factor;
	mmio_write16(blk->common + COMMON_QUEUE_ENABLE, 1);
	return NULL;
}

const char *virtio_blk_start(struct virtio_blk *blk, struct ram *ram)
{
	struct notify_place notify = {NULL, 0};
	struct pci_function at;
	const char *wrong;

	memset(blk, 0, sizeof(*blk));
	if (!pci_find(VENDOR_VIRTIO, ID_BLK_MODERN, ID_BLK_EITHER, &at))
		return "no-disk-found";
	if (!find_places(blk, at, &notify))
		return "disk-has-no-modern-interface";
	pci_enable(at);
	if (!reset(blk))
		return "disk-does-not-reset";
	set_status(blk, STATUS_ACKNOWLEDGE);
	set_status(blk, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	wrong = negotiate(blk);
	if (!wrong)
		wrong = set_up_queue(blk, ram, &notify);
	if (wrong)
		return wrong;
	set_status(blk, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
	blk->capacity_sectors = mmio_read32(blk->device) | (uint64_t)mmio_read32(blk->device + 4) << 32;
	return NULL;
}

static void put_descriptor(struct virtio_blk *blk, unsigned int index, const volatile void *place, uint32_t bytes,
			   unsigned int flags)
{
	blk->descriptors[index] = (struct virtq_descriptor){
		.gpa = (uintptr_t)place,
		.bytes = bytes,
		.flags = (uint16_t)flags,
		.next = (uint16_t)(flags & DESCRIPTOR_NEXT ? index + 1 : 0),
	};
}

void virtio_blk_submit(struct virtio_blk *blk, unsigned int slot, enum virtio_blk_kind kind, uint64_t sector,
		       void *data, uint32_t bytes, uint32_t split_bytes)
{
	unsigned int head = slot * VIRTIO_BLK_DESCRIPTORS, at = head;
	unsigned int data_flags = DESCRIPTOR_NEXT | (kind == VIRTIO_BLK_READ ? DESCRIPTOR_DEVICE_WRITE : 0u);

	blk->headers[slot] = (struct virtio_blk_header){.type = (uint32_t)kind, .sector = sector};
	blk->status[slot] = 0xff;
	put_descriptor(blk, at++, &blk->headers[slot], sizeof(blk->headers[slot]), DESCRIPTOR_NEXT);
	if (split_bytes)
		put_descriptor(blk, at++, data, split_bytes, data_flags);
	if (bytes > split_bytes)
		put_descriptor(blk, at++, (uint8_t *)data + split_bytes, bytes - split_bytes, data_flags);
	put_descriptor(blk, at, &blk->status[slot], 1, DESCRIPTOR_DEVICE_WRITE);

	blk->available->ring[blk->available_index % blk->queue_size] = (uint16_t)head;
	cpu_barrier();
	*(volatile uint16_t *)&blk->available->index = ++blk->available_index;
	blk->notify_due = true;
}

void virtio_blk_notify(struct virtio_blk *blk)
{
	if (!blk->notify_due)
		return;
	blk->notify_due = false;
	cpu_fence(); /* 2.7.13.4.1: the index must be out before the flag is looked at */
	if (!(blk->used->flags & USED_NO_NOTIFY))
		mmio_write16(blk->notify_at, 0);
}

bool virtio_blk_poll(struct virtio_blk *blk, unsigned int *slot, bool *good)
{
	if (blk->used->index == blk->used_index)
		return false;
	cpu_barrier();
	*slot = blk->used->ring[blk->used_index % blk->queue_size].id / VIRTIO_BLK_DESCRIPTORS;
	blk->used_index++;
	*good = *slot < blk->slots && blk->status[*slot] == 0;
	return true;
}
