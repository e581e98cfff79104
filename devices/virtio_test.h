/* For tests of PCI and virtio devices: guest memory, buses and an I/O thread without KVM, and a driver's side of
 * both. */
#ifndef VMCP_DEVICES_VIRTIO_TEST_H
#define VMCP_DEVICES_VIRTIO_TEST_H

#ifndef cr_assert /* a plain program brings its own, and cr_assert_eq */
#include <criterion/criterion.h>
#endif
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "devices/pci.h"
#include "devices/virtio.h"

#define RIG_MEMORY_BYTES  (16u << 20)
#define RIG_MAX_DOORBELLS 64u
#define RIG_MSI_ADDRESS	  0xfee00000ull

struct rig_doorbell {
	uint64_t address;
	int fd;
};

struct rig {
	struct mem *mem;
	struct bus *pio, *mmio;
	struct loop *loop;
	struct pci_bus *pci;
	pthread_t thread;
	_Atomic bool lines[24];
	_Atomic unsigned msis[64]; /* by data */
	_Atomic unsigned resets;
	_Atomic bool runs;
	struct rig_doorbell doorbells[RIG_MAX_DOORBELLS];
	unsigned doorbell_count;
};

static void rig_irq_set(void *opaque, unsigned gsi, bool level)
{
	atomic_store(&((struct rig *)opaque)->lines[gsi], level);
}
static void rig_reset(void *opaque) { atomic_fetch_add(&((struct rig *)opaque)->resets, 1); }
static int rig_msi_send(void *opaque, uint64_t address, uint32_t data, struct err *err)
{
	if (address != RIG_MSI_ADDRESS || data >= 64)
		return err_set(err, ERR_FAILED, EINVAL, "no APIC at 0x%llx", (unsigned long long)address);
	atomic_fetch_add(&((struct rig *)opaque)->msis[data], 1);
	return 0;
}
static int rig_ioeventfd(void *opaque, uint64_t address, int fd, bool add, struct err *err)
{
	struct rig *rig = opaque;
	for (unsigned i = 0; i < rig->doorbell_count; i++) {
		if (rig->doorbells[i].address != address)
			continue;
		if (add)
			return err_set(err, ERR_FAILED, EEXIST, "doorbell");
		rig->doorbells[i] = rig->doorbells[--rig->doorbell_count];
		return 0;
	}
	if (!add || rig->doorbell_count == RIG_MAX_DOORBELLS)
		return err_set(err, ERR_FAILED, ENOENT, "doorbell");
	rig->doorbells[rig->doorbell_count++] = (struct rig_doorbell){address, fd};
	return 0;
}

static inline void rig_create(struct rig *rig)
{
	struct err err = ERR_INIT;
	memset(rig, 0, sizeof(*rig));
	cr_assert_eq(mem_create(RIG_MEMORY_BYTES, &rig->mem, &err), 0, "%s", err.message);
	cr_assert_eq(bus_create("port", &rig->pio, &err), 0);
	cr_assert_eq(bus_create("memory", &rig->mmio, &err), 0);
	cr_assert_eq(loop_create(&rig->loop, &err), 0);
	const struct pci_platform platform = {.pio = rig->pio,
					      .mmio = rig->mmio,
					      .irq_set = rig_irq_set,
					      .msi_send = rig_msi_send,
					      .ioeventfd = rig_ioeventfd,
					      .reset = rig_reset,
					      .opaque = rig};
	cr_assert_eq(pci_bus_create_on(&platform, &rig->pci, &err), 0, "%s", err.message);
}

/* Devices are gone, the loop does not run. */
static inline void rig_destroy(struct rig *rig)
{
	pci_bus_destroy(rig->pci);
	cr_assert_eq(rig->doorbell_count, 0);
	loop_destroy(rig->loop);
	bus_destroy(rig->mmio);
	bus_destroy(rig->pio);
	mem_destroy(rig->mem);
}

static void *rig_loop(void *opaque)
{
	loop_run(((struct rig *)opaque)->loop, NULL);
	return NULL;
}
static void rig_says_that_it_runs(void *opaque) { atomic_store(&((struct rig *)opaque)->runs, true); }
static inline void rig_run(struct rig *rig)
{
	atomic_store(&rig->runs, false);
	cr_assert_eq(loop_post(rig->loop, rig_says_that_it_runs, rig), 0);
	cr_assert_eq(pthread_create(&rig->thread, NULL, rig_loop, rig), 0);
	while (!atomic_load(&rig->runs))
		sched_yield();
}
static inline void rig_stop(struct rig *rig)
{
	loop_stop(rig->loop);
	pthread_join(rig->thread, NULL);
}
static void rig_nothing(void *opaque) { (void)opaque; }
/* The I/O thread has handled what was signalled before: each call takes a turn of the loop. */
static inline void rig_settle(struct rig *rig)
{
	for (int i = 0; i < 12; i++)
		loop_call(rig->loop, rig_nothing, NULL);
}

/* --- the guest's side of PCI --- */

static inline void rig_select(struct rig *rig, unsigned slot, unsigned offset)
{
	uint8_t address[4];
	put_le32(address, 0x80000000u | slot << 11 | (offset & 0xfcu));
	bus_write(rig->pio, 0xcf8, address, 4);
}
static inline uint32_t rig_config_read(struct rig *rig, unsigned slot, unsigned offset, unsigned size)
{
	uint8_t data[4] = {0};
	rig_select(rig, slot, offset);
	bus_read(rig->pio, 0xcfc + (offset & 3), data, size);
	return get_le32(data);
}
static inline void rig_config_write(struct rig *rig, unsigned slot, unsigned offset, uint32_t value, unsigned size)
{
	uint8_t data[4];
	put_le32(data, value);
	rig_select(rig, slot, offset);
	bus_write(rig->pio, 0xcfc + (offset & 3), data, size);
}
static inline uint64_t rig_bar(struct rig *rig, unsigned slot, unsigned bar)
{
	uint32_t low = rig_config_read(rig, slot, 0x10 + 4 * bar, 4);
	uint64_t high = (low & 6) == 4 ? rig_config_read(rig, slot, 0x14 + 4 * bar, 4) : 0;
	return (low & ~0xfu) | high << 32;
}
static inline unsigned rig_capability(struct rig *rig, unsigned slot, uint8_t id, unsigned type)
{
	unsigned at = rig_config_read(rig, slot, 0x34, 1);
	for (; at != 0; at = rig_config_read(rig, slot, at + 1, 1)) {
		if (rig_config_read(rig, slot, at, 1) == id &&
		    (type == 0 || rig_config_read(rig, slot, at + 3, 1) == type))
			return at;
	}
	return 0;
}
static inline uint64_t rig_mmio_read(struct rig *rig, uint64_t address, unsigned size)
{
	uint8_t data[8] = {0};
	bus_read(rig->mmio, address, data, size);
	return get_le64(data);
}
static inline void rig_mmio_write(struct rig *rig, uint64_t address, uint64_t value, unsigned size)
{
	uint8_t data[8];
	for (unsigned i = 0; i < rig->doorbell_count; i++) {
		if (rig->doorbells[i].address == address) {
			eventfd_write(rig->doorbells[i].fd, 1);
			return;
		}
	}
	put_le64(data, value);
	bus_write(rig->mmio, address, data, size);
}

/* --- the guest's side of virtio --- */

enum {
	R_DEVICE_FEATURE_SELECT = 0,
	R_DEVICE_FEATURE = 4,
	R_DRIVER_FEATURE_SELECT = 8,
	R_DRIVER_FEATURE = 12,
	R_CONFIG_VECTOR = 16,
	R_NUM_QUEUES = 18,
	R_STATUS = 20,
	R_GENERATION = 21,
	R_QUEUE_SELECT = 22,
	R_QUEUE_SIZE = 24,
	R_QUEUE_VECTOR = 26,
	R_QUEUE_ENABLE = 28,
	R_NOTIFY_OFF = 30,
	R_DESC = 32,
	R_DRIVER = 40,
	R_DEVICE = 48,
};

struct rig_queue {
	struct rig *rig;
	unsigned slot, index;
	uint16_t size;
	uint64_t desc, avail, used, indirect; /* gpa */
	uint16_t next_desc, avail_idx, seen;
};

struct rig_segment {
	uint64_t gpa;
	uint32_t bytes;
	bool write;
};

static inline uint64_t rig_reg(struct rig *rig, unsigned slot, unsigned reg, unsigned size)
{
	return rig_mmio_read(rig, rig_bar(rig, slot, VIRTIO_PCI_BAR) + reg, size);
}
static inline void rig_set_reg(struct rig *rig, unsigned slot, unsigned reg, uint64_t value, unsigned size)
{
	rig_mmio_write(rig, rig_bar(rig, slot, VIRTIO_PCI_BAR) + reg, value, size);
}
static inline unsigned rig_status(struct rig *rig, unsigned slot) { return (unsigned)rig_reg(rig, slot, R_STATUS, 1); }
static inline uint64_t rig_features(struct rig *rig, unsigned slot)
{
	rig_set_reg(rig, slot, R_DEVICE_FEATURE_SELECT, 0, 4);
	uint64_t features = rig_reg(rig, slot, R_DEVICE_FEATURE, 4);
	rig_set_reg(rig, slot, R_DEVICE_FEATURE_SELECT, 1, 4);
	return features | rig_reg(rig, slot, R_DEVICE_FEATURE, 4) << 32;
}
/* Up to FEATURES_OK; true if the device took them. */
static inline bool rig_negotiate(struct rig *rig, unsigned slot, uint64_t features)
{
	rig_set_reg(rig, slot, R_STATUS, 0, 1);
	rig_set_reg(rig, slot, R_STATUS, 1, 1);
	rig_set_reg(rig, slot, R_STATUS, 3, 1);
	rig_set_reg(rig, slot, R_DRIVER_FEATURE_SELECT, 0, 4);
	rig_set_reg(rig, slot, R_DRIVER_FEATURE, (uint32_t)features, 4);
	rig_set_reg(rig, slot, R_DRIVER_FEATURE_SELECT, 1, 4);
	rig_set_reg(rig, slot, R_DRIVER_FEATURE, features >> 32, 4);
	rig_set_reg(rig, slot, R_STATUS, 11, 1);
	return rig_status(rig, slot) & VIRTIO_STATUS_FEATURES_OK;
}
/* Rings of 16 KiB at `base`, all memory of which is cleared. */
static inline void rig_queue_init(struct rig *rig, unsigned slot, unsigned index, uint16_t size, uint64_t base,
				  struct rig_queue *q)
{
	*q = (struct rig_queue){.rig = rig,
				.slot = slot,
				.index = index,
				.size = size,
				.desc = base,
				.avail = base + 0x1000,
				.used = base + 0x2000,
				.indirect = base + 0x4000};
	memset(mem_at(rig->mem, base, 0x10000, true), 0, 0x10000);
	rig_set_reg(rig, slot, R_QUEUE_SELECT, index, 2);
	rig_set_reg(rig, slot, R_QUEUE_SIZE, size, 2);
	rig_set_reg(rig, slot, R_DESC, q->desc, 4);
	rig_set_reg(rig, slot, R_DESC + 4, 0, 4);
	rig_set_reg(rig, slot, R_DRIVER, q->avail, 8);
	rig_set_reg(rig, slot, R_DEVICE, q->used, 4);
	rig_set_reg(rig, slot, R_QUEUE_ENABLE, 1, 2);
}
static inline void rig_driver_ok(struct rig *rig, unsigned slot) { rig_set_reg(rig, slot, R_STATUS, 15, 1); }

/* Switches MSI-X on with every vector v unmasked and sending data `base + v`; configuration: vector 0, queue i: i +
 * 1. */
static inline void rig_msix(struct rig *rig, unsigned slot, unsigned queues, unsigned base)
{
	uint64_t table = rig_bar(rig, slot, VIRTIO_PCI_MSIX_BAR);
	unsigned cap = rig_capability(rig, slot, 0x11, 0);
	for (unsigned v = 0; v <= queues; v++) {
		rig_mmio_write(rig, table + 16 * v, RIG_MSI_ADDRESS, 8);
		rig_mmio_write(rig, table + 16 * v + 8, base + v, 4);
		rig_mmio_write(rig, table + 16 * v + 12, 0, 4);
	}
	rig_config_write(rig, slot, cap + 2, 0x8000, 2);
	rig_set_reg(rig, slot, R_CONFIG_VECTOR, 0, 2);
	for (unsigned i = 0; i < queues; i++) {
		rig_set_reg(rig, slot, R_QUEUE_SELECT, i, 2);
		rig_set_reg(rig, slot, R_QUEUE_VECTOR, i + 1, 2);
	}
}

static inline void rig_descriptor(struct rig *rig, uint64_t table, unsigned i, uint64_t gpa, uint32_t bytes,
				  uint16_t flags, uint16_t next)
{
	uint8_t d[16];
	put_le64(d, gpa);
	put_le32(d + 8, bytes);
	put_le16(d + 12, flags);
	put_le16(d + 14, next);
	cr_assert_eq(mem_write(rig->mem, table + 16 * i, d, 16, NULL), 0);
}
static inline void rig_offer(struct rig_queue *q, uint16_t head)
{
	uint8_t v[2];
	put_le16(v, head);
	mem_write(q->rig->mem, q->avail + 4 + 2u * (q->avail_idx % q->size), v, 2, NULL);
	uint16_t *index = mem_at(q->rig->mem, q->avail + 2, 2, true);
	__atomic_store_n(index, ++q->avail_idx, __ATOMIC_RELEASE);
}
/* A chain of direct descriptors; returns its head. */
static inline uint16_t rig_add(struct rig_queue *q, const struct rig_segment *s, unsigned count)
{
	uint16_t head = q->next_desc;
	for (unsigned i = 0; i < count; i++) {
		uint16_t next = (uint16_t)((q->next_desc + 1) % q->size);
		rig_descriptor(q->rig, q->desc, q->next_desc, s[i].gpa, s[i].bytes,
			       (uint16_t)((s[i].write ? 2 : 0) | (i + 1 < count ? 1 : 0)), next);
		q->next_desc = next;
	}
	rig_offer(q, head);
	return head;
}
static inline void rig_kick(struct rig_queue *q)
{
	uint64_t at =
		rig_bar(q->rig, q->slot, VIRTIO_PCI_BAR) + VIRTIO_PCI_NOTIFY + VIRTIO_PCI_NOTIFY_STRIDE * q->index;
	rig_mmio_write(q->rig, at, q->index, 2);
}
static inline uint16_t rig_used_idx(struct rig_queue *q)
{
	uint8_t v[2];
	mem_read(q->rig->mem, q->used + 2, v, 2, NULL);
	return get_le16(v);
}
static inline uint32_t rig_used_id(struct rig_queue *q, uint16_t index, uint32_t *written)
{
	uint8_t v[8];
	mem_read(q->rig->mem, q->used + 4 + 8u * (index % q->size), v, 8, NULL);
	if (written != NULL)
		*written = get_le32(v + 4);
	return get_le32(v);
}

/* Decodes a state and puts it in place, as far as it goes. */
static inline int rig_put_back(const struct component *component, const struct buf *in, struct err *err)
{
	void *state = xcalloc(1, component->table->size);
	int ret = codec_decode(component->table, in->data, in->length, state, err);
	if (ret == 0)
		ret = component->validate(component->opaque, state, err);
	if (ret == 0)
		ret = component->apply(component->opaque, state, err);
	free(state);
	return ret;
}

#endif
