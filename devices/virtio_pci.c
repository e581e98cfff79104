/* Registers of a virtio device on PCI (virtio 1.2, 4.1): capabilities, common configuration, notification. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "devices/virtio_internal.h"

#define VENDOR_VIRTIO	    0x1af4u
#define DEVICE_MODERN_BASE  0x1040u
#define SUBSYSTEM	    0x40u
#define CAP_ID_VENDOR	    0x09u
#define CAP_BYTES	    16u
#define CAP_NOTIFY_BYTES    20u
#define CAP_WINDOW_BYTES    20u
#define DEVICE_CONFIG_BYTES 0x1000u

enum { CFG_COMMON = 1, CFG_NOTIFY = 2, CFG_ISR = 3, CFG_DEVICE = 4, CFG_PCI = 5 };

/* Fields of a capability, from its start (4.1.4). */
enum { CAP_LENGTH = 2, CAP_TYPE = 3, CAP_BAR = 4, CAP_OFFSET = 8, CAP_SIZE = 12, CAP_MULTIPLIER = 16, CAP_DATA = 16 };

/* struct virtio_pci_common_cfg (4.1.4.3), without the fields of features that are not offered. */
enum {
	COMMON_DEVICE_FEATURE_SELECT = 0,
	COMMON_DEVICE_FEATURE = 4,
	COMMON_DRIVER_FEATURE_SELECT = 8,
	COMMON_DRIVER_FEATURE = 12,
	COMMON_CONFIG_VECTOR = 16,
	COMMON_NUM_QUEUES = 18,
	COMMON_STATUS = 20,
	COMMON_GENERATION = 21,
	COMMON_QUEUE_SELECT = 22,
	COMMON_QUEUE_SIZE = 24,
	COMMON_QUEUE_VECTOR = 26,
	COMMON_QUEUE_ENABLE = 28,
	COMMON_QUEUE_NOTIFY_OFF = 30,
	COMMON_QUEUE_DESC = 32,
	COMMON_QUEUE_DRIVER = 40,
	COMMON_QUEUE_DEVICE = 48,
	COMMON_BYTES = 56,
};

/* --- common configuration --- */

static uint32_t feature_half(uint64_t features, uint32_t select)
{
	return select < 2 ? (uint32_t)(features >> (32 * select)) : 0;
}

static void common_read(struct virtio_device *vdev, uint64_t offset, uint8_t *data, unsigned size)
{
	uint8_t image[COMMON_BYTES] = {0};
	const struct virtio_slot *slot = virtio_selected(vdev);

	put_le32(image + COMMON_DEVICE_FEATURE_SELECT, vdev->device_feature_select);
	put_le32(image + COMMON_DEVICE_FEATURE, feature_half(vdev->features, vdev->device_feature_select));
	put_le32(image + COMMON_DRIVER_FEATURE_SELECT, vdev->driver_feature_select);
	put_le32(image + COMMON_DRIVER_FEATURE, feature_half(vdev->driver_features, vdev->driver_feature_select));
	put_le16(image + COMMON_CONFIG_VECTOR, vdev->config_vector);
	put_le16(image + COMMON_NUM_QUEUES, (uint16_t)vdev->about.queues);
	image[COMMON_STATUS] = vdev->status;
	image[COMMON_GENERATION] = vdev->generation;
	put_le16(image + COMMON_QUEUE_SELECT, vdev->queue_select);
	if (slot != NULL) {
		put_le16(image + COMMON_QUEUE_SIZE, slot->q.s.size);
		put_le16(image + COMMON_QUEUE_VECTOR, slot->q.s.vector);
		put_le16(image + COMMON_QUEUE_ENABLE, slot->q.s.enabled);
		put_le16(image + COMMON_QUEUE_NOTIFY_OFF, (uint16_t)slot->index);
		put_le64(image + COMMON_QUEUE_DESC, slot->q.s.desc_gpa);
		put_le64(image + COMMON_QUEUE_DRIVER, slot->q.s.avail_gpa);
		put_le64(image + COMMON_QUEUE_DEVICE, slot->q.s.used_gpa);
	}
	if (range_within(offset, size, COMMON_BYTES))
		memcpy(data, image + offset, size);
}

static void write_driver_features(struct virtio_device *vdev, uint32_t value)
{
	unsigned shift = 32 * vdev->driver_feature_select;

	if (vdev->driver_feature_select > 1 || (vdev->status & VIRTIO_STATUS_FEATURES_OK))
		return;
	vdev->driver_features &= ~(0xffffffffull << shift);
	vdev->driver_features |= (uint64_t)value << shift;
}

/* A vector that is not there reads back as none (4.1.5.1.2.1). */
static uint16_t vector_or_none(const struct virtio_device *vdev, uint16_t vector)
{
	return vector <= vdev->about.queues ? vector : VIRTQ_NO_VECTOR;
}

/* Addresses may be written as a whole or in halves (4.1.3.1). */
static void write_address(uint64_t *address, uint64_t offset, const uint8_t *data, unsigned size)
{
	uint8_t bytes[8];

	if (!range_within(offset, size, sizeof(bytes)))
		return;
	put_le64(bytes, *address);
	memcpy(bytes + offset, data, size);
	*address = get_le64(bytes);
}

static void queue_enable(struct virtio_device *vdev, struct virtio_slot *slot)
{
	struct err err = ERR_INIT;

	if (virtq_enable(&slot->q, &err) < 0) {
		err_prefix(&err, "queue %u", slot->index);
		virtio_break(vdev, &err);
		return;
	}
	virtio_kick(vdev, slot->index);
}

/* What describes a live queue is not changed any more (4.1.4.3.2); only its vector is. */
static void queue_write(struct virtio_device *vdev, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct virtio_slot *slot = virtio_selected(vdev);

	if (slot == NULL || vdev->resetting)
		return;
	if (offset == COMMON_QUEUE_VECTOR && size == 2) {
		slot->q.s.vector = vector_or_none(vdev, get_le16(data));
		return;
	}
	if (slot->q.s.enabled)
		return;
	if (offset == COMMON_QUEUE_SIZE && size == 2)
		slot->q.s.size = get_le16(data);
	else if (offset == COMMON_QUEUE_ENABLE && size == 2 && get_le16(data) == 1)
		queue_enable(vdev, slot);
	else if (offset >= COMMON_QUEUE_DEVICE)
		write_address(&slot->q.s.used_gpa, offset - COMMON_QUEUE_DEVICE, data, size);
	else if (offset >= COMMON_QUEUE_DRIVER)
		write_address(&slot->q.s.avail_gpa, offset - COMMON_QUEUE_DRIVER, data, size);
	else if (offset >= COMMON_QUEUE_DESC)
		write_address(&slot->q.s.desc_gpa, offset - COMMON_QUEUE_DESC, data, size);
}

static void common_write(struct virtio_device *vdev, uint64_t offset, const uint8_t *data, unsigned size)
{
	if (offset == COMMON_DEVICE_FEATURE_SELECT && size == 4)
		vdev->device_feature_select = get_le32(data);
	else if (offset == COMMON_DRIVER_FEATURE_SELECT && size == 4)
		vdev->driver_feature_select = get_le32(data);
	else if (offset == COMMON_DRIVER_FEATURE && size == 4)
		write_driver_features(vdev, get_le32(data));
	else if (offset == COMMON_CONFIG_VECTOR && size == 2)
		vdev->config_vector = vector_or_none(vdev, get_le16(data));
	else if (offset == COMMON_STATUS && size == 1)
		virtio_set_status(vdev, data[0]);
	else if (offset == COMMON_QUEUE_SELECT && size == 2)
		vdev->queue_select = get_le16(data);
	else if (offset >= COMMON_QUEUE_SIZE)
		queue_write(vdev, offset, data, size);
}

/* --- the BAR --- */

static void device_read(struct virtio_device *vdev, uint64_t offset, uint8_t *data, unsigned size)
{
	if (range_within(offset, size, vdev->about.config_bytes))
		vdev->about.ops->config_read(vdev->about.opaque, offset, data, size);
}

static void bar_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct virtio_device *vdev = opaque;

	memset(data, 0, size);
	virtio_lock(vdev);
	if (offset < VIRTIO_PCI_COMMON + COMMON_BYTES)
		common_read(vdev, offset, data, size);
	else if (offset == VIRTIO_PCI_ISR)
		data[0] = virtio_read_isr(vdev);
	else if (offset >= VIRTIO_PCI_DEVICE && offset < VIRTIO_PCI_DEVICE + DEVICE_CONFIG_BYTES)
		device_read(vdev, offset - VIRTIO_PCI_DEVICE, data, size);
	virtio_unlock(vdev);
}

static void bar_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct virtio_device *vdev = opaque;

	if (offset >= VIRTIO_PCI_NOTIFY) {
		/* Without an ioeventfd, or through the window of configuration space. */
		uint64_t queue = (offset - VIRTIO_PCI_NOTIFY) / VIRTIO_PCI_NOTIFY_STRIDE;
		if (queue < vdev->about.queues)
			virtio_kick(vdev, (unsigned)queue);
		return;
	}
	virtio_lock(vdev);
	if (offset < VIRTIO_PCI_COMMON + COMMON_BYTES)
		common_write(vdev, offset, data, size);
	else if (offset >= VIRTIO_PCI_DEVICE && offset < VIRTIO_PCI_DEVICE + DEVICE_CONFIG_BYTES &&
		 vdev->about.ops->config_write != NULL &&
		 range_within(offset - VIRTIO_PCI_DEVICE, size, vdev->about.config_bytes))
		vdev->about.ops->config_write(vdev->about.opaque, offset - VIRTIO_PCI_DEVICE, data, size);
	virtio_unlock(vdev);
}

static const struct bus_ops bar_ops = {.read = bar_read, .write = bar_write};

/* A queue without an ioeventfd still works, by exits: bar_write. */
static void bar_moved(void *opaque, unsigned bar, uint64_t address)
{
	struct virtio_device *vdev = opaque;
	struct err err = ERR_INIT;

	if (bar != VIRTIO_PCI_BAR)
		return;
	uint64_t old = vdev->notify_at;
	vdev->notify_at = address == PCI_UNMAPPED ? PCI_UNMAPPED : address + VIRTIO_PCI_NOTIFY;
	for (unsigned i = 0; i < vdev->about.queues; i++) {
		uint64_t step = (uint64_t)i * VIRTIO_PCI_NOTIFY_STRIDE;
		int fd = vdev->slots[i].kick_fd;
		if (old != PCI_UNMAPPED)
			pci_ioeventfd(vdev->pci, old + step, fd, false, NULL);
		if (vdev->notify_at == PCI_UNMAPPED)
			continue;
		if (pci_ioeventfd(vdev->pci, vdev->notify_at + step, fd, true, &err) < 0 && !vdev->warned_ioeventfd) {
			vdev->warned_ioeventfd = true;
			log_warn("%s: notifications take the slow way: %s", vdev->name, err.message);
		}
	}
}

/* The window (4.1.4.9): reading or writing its data field reaches into the BAR that its other fields name. */
static void config_access(void *opaque, unsigned offset, unsigned size, bool write)
{
	struct virtio_device *vdev = opaque;
	uint8_t *cap = pci_device_config(vdev->pci) + vdev->window;
	uint32_t at = get_le32(cap + CAP_OFFSET), width = get_le32(cap + CAP_SIZE);

	if (vdev->window == 0 || !ranges_overlap(offset, size, vdev->window + CAP_DATA, 4))
		return;
	if ((width != 1 && width != 2 && width != 4) || at % width != 0)
		return;
	pci_bar_access(vdev->pci, cap[CAP_BAR], at, cap + CAP_DATA, width, write);
}

/* --- construction --- */

struct structure {
	uint8_t type;
	uint32_t offset, bytes;
	unsigned capability_bytes;
};

static int add_capability(struct virtio_device *vdev, const struct structure *s, unsigned *offset, struct err *err)
{
	uint8_t cap[CAP_NOTIFY_BYTES] = {0};

	cap[CAP_LENGTH] = (uint8_t)s->capability_bytes;
	cap[CAP_TYPE] = s->type;
	cap[CAP_BAR] = s->type == CFG_PCI ? 0 : VIRTIO_PCI_BAR;
	put_le32(cap + CAP_OFFSET, s->offset);
	put_le32(cap + CAP_SIZE, s->bytes);
	if (s->type == CFG_NOTIFY)
		put_le32(cap + CAP_MULTIPLIER, VIRTIO_PCI_NOTIFY_STRIDE);
	return pci_device_add_capability(vdev->pci, CAP_ID_VENDOR, cap + 2, s->capability_bytes, offset, err);
}

static int add_capabilities(struct virtio_device *vdev, struct err *err)
{
	static const uint8_t window_writable[CAP_WINDOW_BYTES] = {
		[CAP_BAR] = 0xff,
		[CAP_OFFSET] = 0xff,
		0xff,
		0xff,
		0xff,
		0xff,
		0xff,
		0xff,
		0xff, /* offset and length */
		[CAP_DATA] = 0xff,
		0xff,
		0xff,
		0xff,
	};
	const struct structure structures[] = {
		{CFG_COMMON, VIRTIO_PCI_COMMON, COMMON_BYTES, CAP_BYTES},
		{CFG_ISR, VIRTIO_PCI_ISR, 1, CAP_BYTES},
		{CFG_DEVICE, VIRTIO_PCI_DEVICE, vdev->about.config_bytes, CAP_BYTES},
		{CFG_NOTIFY, VIRTIO_PCI_NOTIFY, vdev->about.queues * VIRTIO_PCI_NOTIFY_STRIDE, CAP_NOTIFY_BYTES},
		{CFG_PCI, 0, 0, CAP_WINDOW_BYTES},
	};
	unsigned offset = 0;
	int ret = 0;

	for (size_t i = 0; i < ARRAY_LENGTH(structures) && ret == 0; i++) {
		if (structures[i].type != CFG_DEVICE || vdev->about.config_bytes > 0)
			ret = add_capability(vdev, &structures[i], &offset, err);
	}
	if (ret == 0) {
		pci_device_set_writable(vdev->pci, offset, window_writable, sizeof(window_writable));
		vdev->window = offset;
	}
	return ret;
}

int virtio_pci_create(struct virtio_device *vdev, struct pci_bus *bus, struct err *err)
{
	const struct pci_config config = {
		.name = vdev->name,
		.vendor = VENDOR_VIRTIO,
		.device = (uint16_t)(DEVICE_MODERN_BASE + vdev->about.device_id),
		.subsystem_vendor = VENDOR_VIRTIO,
		.subsystem = SUBSYSTEM,
		.class_code = vdev->about.class_code,
		.revision = 1,
		.intx = true,
		.opaque = vdev,
		.bar_moved = bar_moved,
		.config_access = config_access,
	};

	int ret = pci_device_create(bus, &config, &vdev->pci, err);
	if (ret == 0)
		ret = add_capabilities(vdev, err);
	if (ret == 0)
		ret = pci_device_add_msix(vdev->pci, VIRTIO_PCI_MSIX_BAR, vdev->about.queues + 1, err);
	if (ret == 0)
		ret = pci_device_add_bar(vdev->pci, VIRTIO_PCI_BAR, true, VIRTIO_PCI_BAR_BYTES, &bar_ops, vdev, err);
	if (ret == 0)
		ret = pci_device_place(vdev->pci, err);
	return ret;
}
