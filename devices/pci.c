#include "devices/pci.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "devices/pci_internal.h"
#include "vmm/acpi.h"

#define CONFIG_PORT	  0xcf8u /* address register, 4 bytes, then data, 4 bytes */
#define CONFIG_PORT_BYTES 8u
#define CONFIG_ENABLE	  0x80000000u
#define CONFIG_SETTABLE	  0x80fffffcu
#define RESET_CPU	  4u /* of the reset control register */
#define GIB		  (1ull << 30)

_Static_assert(CONFIG_PORT + 1 == ACPI_RESET_PORT, "the reset register of the ACPI tables is the one served here");

/* --- BARs --- */

static uint64_t bar_address(const struct pci_device *dev, unsigned bar)
{
	const struct pci_bar *b = &dev->bars[bar];
	const uint8_t *reg = dev->config + PCI_BAR0 + 4 * bar;
	uint64_t address = get_le32(reg) & ~0xfu;
	uint64_t end;

	if (!(get_le16(dev->config + PCI_COMMAND) & PCI_COMMAND_MEMORY))
		return PCI_UNMAPPED;
	if (b->is_64bit)
		address |= (uint64_t)get_le32(reg + 4) << 32;
	if (address == 0 || add_overflows(address, b->bytes, &end))
		return PCI_UNMAPPED;
	return !b->is_64bit && end > 4 * GIB ? PCI_UNMAPPED : address;
}

static void bar_unmap(struct pci_device *dev, unsigned bar)
{
	struct pci_bar *b = &dev->bars[bar];

	if (b->mapped_at == PCI_UNMAPPED)
		return;
	if (dev->about.bar_moved != NULL)
		dev->about.bar_moved(dev->about.opaque, bar, PCI_UNMAPPED);
	bus_remove(dev->bus->platform.mmio, b->mapped_at, b->opaque);
	b->mapped_at = PCI_UNMAPPED;
}

static int bar_map(struct pci_device *dev, unsigned bar, uint64_t address, struct err *err)
{
	struct pci_bar *b = &dev->bars[bar];

	if (bus_add(dev->bus->platform.mmio, dev->about.name, address, b->bytes, b->ops, b->opaque, err) < 0)
		return err_prefix(err, "%s: BAR %u", dev->about.name, bar);
	b->mapped_at = address;
	if (dev->about.bar_moved != NULL)
		dev->about.bar_moved(dev->about.opaque, bar, address);
	return 0;
}

/* Where the guest puts a BAR over something else, the BAR stays unmapped, and is tried again at the next change. */
static int bars_update(struct pci_device *dev, struct err *err)
{
	int ret = 0;

	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (dev->bars[i].bytes == 0)
			continue;
		uint64_t want = bar_address(dev, i);
		if (want == dev->bars[i].mapped_at)
			continue;
		bar_unmap(dev, i);
		if (want == PCI_UNMAPPED)
			continue;
		int mapped = bar_map(dev, i, want, ret == 0 ? err : NULL);
		ret = ret == 0 ? mapped : ret;
	}
	return ret;
}

static void bars_unmap(struct pci_device *dev)
{
	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (dev->bars[i].bytes != 0)
			bar_unmap(dev, i);
	}
}

bool pci_bar_access(struct pci_device *dev, unsigned bar, uint64_t offset, uint8_t *data, unsigned size, bool write)
{
	if (bar >= PCI_BARS || !range_within(offset, size, dev->bars[bar].bytes))
		return false;
	const struct pci_bar *b = &dev->bars[bar];
	if (write)
		b->ops->write(b->opaque, offset, data, size);
	else
		b->ops->read(b->opaque, offset, data, size);
	return true;
}

/* --- configuration space --- */

static void config_read(struct pci_device *dev, unsigned offset, uint8_t *data, unsigned size)
{
	uint8_t shown[PCI_CONFIG_BYTES];

	if (dev->about.config_access != NULL)
		dev->about.config_access(dev->about.opaque, offset, size, false);
	memcpy(shown + offset, dev->config + offset, size);
	pthread_mutex_lock(&dev->irq_lock);
	if (offset <= PCI_STATUS && PCI_STATUS < offset + size && dev->intx_wish)
		shown[PCI_STATUS] |= PCI_STATUS_INTERRUPT;
	pthread_mutex_unlock(&dev->irq_lock);
	memcpy(data, shown + offset, size);
}

static void config_write(struct pci_device *dev, unsigned offset, const uint8_t *data, unsigned size)
{
	struct err err = ERR_INIT;

	for (unsigned i = 0; i < size; i++) {
		uint8_t mask = dev->writable[offset + i];
		dev->config[offset + i] = (uint8_t)((dev->config[offset + i] & ~mask) | (data[i] & mask));
	}
	pci_irq_config_changed(dev);
	if (bars_update(dev, &err) < 0 && !dev->warned_bar) {
		dev->warned_bar = true;
		log_warn("%s; the guest cannot reach it there", err.message);
	}
	if (dev->about.config_access != NULL)
		dev->about.config_access(dev->about.opaque, offset, size, true);
}

/* Type 1 addresses of bus 0 (PCI 3.2.2.3.2); NULL if nothing is there. */
static struct pci_device *addressed(const struct pci_bus *bus)
{
	uint32_t address = bus->config_address;

	if (!(address & CONFIG_ENABLE) || (address >> 16 & 0xff) != 0 || (address >> 8 & 7) != 0)
		return NULL;
	return bus->devices[address >> 11 & 0x1f];
}

static void port_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct pci_bus *bus = opaque;

	memset(data, 0xff, size);
	pthread_mutex_lock(&bus->config_lock);
	struct pci_device *dev = addressed(bus);
	if (offset >= 4 && dev != NULL)
		config_read(dev, (bus->config_address & 0xfc) + (unsigned)(offset - 4), data, size);
	else if (offset == 0 && size == 4)
		put_le32(data, bus->config_address);
	else if (offset + size <= 4)
		memset(data, 0, size);
	pthread_mutex_unlock(&bus->config_lock);
}

static void port_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct pci_bus *bus = opaque;

	if (offset == 1 && size == 1) {
		if (data[0] & RESET_CPU)
			bus->platform.reset(bus->platform.opaque);
		return;
	}
	pthread_mutex_lock(&bus->config_lock);
	struct pci_device *dev = addressed(bus);
	if (offset >= 4 && dev != NULL)
		config_write(dev, (bus->config_address & 0xfc) + (unsigned)(offset - 4), data, size);
	else if (offset == 0 && size == 4)
		bus->config_address = get_le32(data) & CONFIG_SETTABLE;
	pthread_mutex_unlock(&bus->config_lock);
}

static const struct bus_ops port_ops = {.read = port_read, .write = port_write};

/* --- building a function --- */

static void fill_header(struct pci_device *dev)
{
	const struct pci_config *about = &dev->about;
	uint8_t *c = dev->config;

	put_le16(c + PCI_VENDOR_ID, about->vendor);
	put_le16(c + PCI_DEVICE_ID, about->device);
	c[PCI_REVISION] = about->revision;
	c[PCI_CLASS] = (uint8_t)about->class_code;
	put_le16(c + PCI_CLASS + 1, (uint16_t)(about->class_code >> 8));
	put_le16(c + PCI_SUBSYSTEM_VENDOR_ID, about->subsystem_vendor);
	put_le16(c + PCI_SUBSYSTEM_ID, about->subsystem);
	if (about->intx) {
		c[PCI_INTERRUPT_PIN] = 1;
		c[PCI_INTERRUPT_LINE] = (uint8_t)PCI_INTX_GSI(dev->slot);
	}
	put_le16(dev->writable + PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
						      PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	dev->writable[PCI_CACHE_LINE] = 0xff;
	dev->writable[PCI_LATENCY] = 0xff;
	dev->writable[PCI_INTERRUPT_LINE] = 0xff;
}

int pci_device_create(struct pci_bus *bus, const struct pci_config *config, struct pci_device **out, struct err *err)
{
	unsigned slot = 0;

	while (slot < PCI_DEVICES && bus->devices[slot] != NULL)
		slot++;
	if (slot == PCI_DEVICES)
		return err_set(err, ERR_USAGE, ENOSPC, "%s: all %u slots of the PCI bus are taken", config->name,
			       PCI_DEVICES);
	struct pci_device *dev = xcalloc(1, sizeof(*dev));
	*dev = (struct pci_device){.bus = bus,
				   .about = *config,
				   .slot = slot,
				   .next_capability = PCI_FIRST_CAPABILITY,
				   .last_link = PCI_CAPABILITIES};
	pthread_mutex_init(&dev->irq_lock, NULL);
	for (unsigned i = 0; i < PCI_BARS; i++)
		dev->bars[i].mapped_at = PCI_UNMAPPED;
	fill_header(dev);
	bus->devices[slot] = dev;
	*out = dev;
	return 0;
}

void pci_device_destroy(struct pci_device *dev)
{
	if (dev == NULL)
		return;
	pci_intx_set(dev, false);
	pthread_mutex_lock(&dev->bus->config_lock);
	bars_unmap(dev);
	dev->bus->devices[dev->slot] = NULL;
	pthread_mutex_unlock(&dev->bus->config_lock);
	pthread_mutex_destroy(&dev->irq_lock);
	free(dev);
}

unsigned pci_device_slot(const struct pci_device *dev) { return dev->slot; }
uint8_t *pci_device_config(struct pci_device *dev) { return dev->config; }

void pci_device_set_writable(struct pci_device *dev, unsigned offset, const void *mask, unsigned length)
{
	memcpy(dev->writable + offset, mask, length);
}

int pci_device_add_bar(struct pci_device *dev, unsigned bar, bool is_64bit, uint64_t bytes, const struct bus_ops *ops,
		       void *opaque, struct err *err)
{
	struct pci_bus *bus = dev->bus;
	uint64_t address = round_up(bus->next_bar, bytes);
	unsigned reg = PCI_BAR0 + 4 * bar;

	if (bytes > PCI_MMIO32_END - PCI_MMIO32_BASE || address + bytes > PCI_MMIO32_END)
		return err_set(err, ERR_USAGE, ENOSPC, "%s: no room for BAR %u below 0x%x", dev->about.name, bar,
			       PCI_MMIO32_END);
	bus->next_bar = address + bytes;
	dev->bars[bar] = (struct pci_bar){
		.bytes = bytes, .is_64bit = is_64bit, .ops = ops, .opaque = opaque, .mapped_at = PCI_UNMAPPED};
	/* Sizing: address bits below the size read as zero whatever is written (PCI 6.2.5.1). */
	put_le32(dev->writable + reg, (uint32_t) ~(bytes - 1));
	put_le32(dev->config + reg, (uint32_t)address | (is_64bit ? PCI_BAR_64BIT : 0));
	if (is_64bit)
		put_le32(dev->writable + reg + 4, (uint32_t)(~(bytes - 1) >> 32));
	return 0;
}

int pci_device_add_capability(struct pci_device *dev, uint8_t id, const void *data, unsigned length, unsigned *offset,
			      struct err *err)
{
	unsigned at = dev->next_capability;

	if (length < 2 || length > PCI_CONFIG_BYTES - at)
		return err_set(err, ERR_FAILED, ENOSPC, "%s: no room for capability 0x%x", dev->about.name, id);
	dev->config[dev->last_link] = (uint8_t)at;
	dev->config[at] = id;
	memcpy(dev->config + at + 2, data, length - 2);
	dev->config[PCI_STATUS] |= PCI_STATUS_CAPABILITIES;
	dev->last_link = at + 1;
	dev->next_capability = (unsigned)round_up(at + length, 4);
	*offset = at;
	return 0;
}

int pci_device_place(struct pci_device *dev, struct err *err)
{
	pthread_mutex_lock(&dev->bus->config_lock);
	put_le16(dev->config + PCI_COMMAND, PCI_COMMAND_MEMORY);
	int ret = bars_update(dev, err);
	pthread_mutex_unlock(&dev->bus->config_lock);
	return ret;
}

int pci_ioeventfd(struct pci_device *dev, uint64_t address, int fd, bool add, struct err *err)
{
	return dev->bus->platform.ioeventfd(dev->bus->platform.opaque, address, fd, add, err);
}

/* --- the bus --- */

int pci_bus_create_on(const struct pci_platform *platform, struct pci_bus **out, struct err *err)
{
	const struct pci_config bridge = {
		.name = "PCI host bridge",
		.vendor = 0x1b36,
		.device = 0x0008,
		.class_code = 0x060000,
		.subsystem_vendor = 0x1af4,
		.subsystem = 0x1100,
	};
	struct pci_bus *bus = xcalloc(1, sizeof(*bus));
	struct pci_device *dev;

	bus->platform = *platform;
	bus->next_bar = PCI_MMIO32_BASE;
	pthread_mutex_init(&bus->config_lock, NULL);
	pthread_mutex_init(&bus->line_lock, NULL);
	int ret = pci_device_create(bus, &bridge, &dev, err);
	if (ret == 0)
		ret = bus_add(platform->pio, "PCI configuration", CONFIG_PORT, CONFIG_PORT_BYTES, &port_ops, bus, err);
	if (ret < 0) {
		pci_bus_destroy(bus);
		return ret;
	}
	*out = bus;
	return 0;
}

void pci_bus_destroy(struct pci_bus *bus)
{
	if (bus == NULL)
		return;
	pci_device_destroy(bus->devices[0]);
	bus_remove(bus->platform.pio, CONFIG_PORT, bus);
	pthread_mutex_destroy(&bus->config_lock);
	pthread_mutex_destroy(&bus->line_lock);
	free(bus);
}

/* --- state --- */

static const struct codec_field vector_fields[] = {
	CODEC_INT(struct pci_vector_state, address, CODEC_U64),
	CODEC_INT(struct pci_vector_state, data, CODEC_U32),
	CODEC_INT(struct pci_vector_state, control, CODEC_U32),
	CODEC_END,
};
static const struct codec_table vector_table = {"msix-vector", sizeof(struct pci_vector_state), vector_fields};
static const struct codec_field state_fields[] = {
	CODEC_RAW(struct pci_state, config),
	CODEC_VSUBS(struct pci_state, vectors, vector_count, &vector_table),
	CODEC_INT(struct pci_state, pending, CODEC_U64),
	CODEC_INT(struct pci_state, intx_wish, CODEC_U8),
	CODEC_END,
};
const struct codec_table pci_state_table = {"pci", sizeof(struct pci_state), state_fields};

void pci_capture(struct pci_device *dev, struct pci_state *state)
{
	pthread_mutex_lock(&dev->bus->config_lock);
	memcpy(state->config, dev->config, sizeof(state->config));
	pci_irq_capture(dev, state);
	pthread_mutex_unlock(&dev->bus->config_lock);
}

int pci_validate(struct pci_device *dev, const struct pci_state *state, struct err *err)
{
	for (unsigned i = 0; i < PCI_CONFIG_BYTES; i++) {
		if ((state->config[i] ^ dev->config[i]) & ~dev->writable[i])
			return err_set(err, ERR_DAMAGED, EINVAL,
				       "%s: PCI configuration byte 0x%02x is 0x%02x, the device has 0x%02x",
				       dev->about.name, i, state->config[i], dev->config[i]);
	}
	if (state->vector_count != dev->vector_count)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: %u interrupt vectors, the device has %u", dev->about.name,
			       state->vector_count, dev->vector_count);
	if (dev->vector_count < PCI_MAX_VECTORS && state->pending >> dev->vector_count != 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: pending bits 0x%llx of vectors that are not there",
			       dev->about.name, (unsigned long long)state->pending);
	return 0;
}

static bool bars_stand(const struct pci_device *dev)
{
	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (dev->bars[i].bytes != 0 && dev->bars[i].mapped_at != bar_address(dev, i))
			return false;
	}
	return true;
}

static void unmap_stale(struct pci_bus *bus)
{
	for (unsigned i = 0; i < PCI_DEVICES; i++) {
		if (bus->devices[i] != NULL && bus->devices[i]->stale)
			bars_unmap(bus->devices[i]);
	}
}

int pci_apply(struct pci_device *dev, const struct pci_state *state, struct err *err)
{
	struct err unreachable = ERR_INIT;
	(void)err;

	pthread_mutex_lock(&dev->bus->config_lock);
	memcpy(dev->config, state->config, sizeof(dev->config));
	/* BARs move as if none had been mapped, so that none is in another's old place. But taking a doorbell out of KVM and putting it in
	 * again costs 2 ms, and mostly nothing has moved. */
	if (!bars_stand(dev))
		unmap_stale(dev->bus);
	dev->stale = false;
	/* A guest may have laid two BARs over each other. That must not make its checkpoint one that nobody can go back to. */
	if (bars_update(dev, &unreachable) < 0)
		log_warn("%s; the guest cannot reach it there", unreachable.message);
	pci_irq_apply(dev, state);
	pthread_mutex_unlock(&dev->bus->config_lock);
	return 0;
}

struct pci_bus_state {
	uint32_t config_address;
	struct pci_state bridge;
};
static const struct codec_field bus_fields[] = {
	CODEC_INT(struct pci_bus_state, config_address, CODEC_U32),
	CODEC_SUB(struct pci_bus_state, bridge, &pci_state_table),
	CODEC_END,
};
static const struct codec_table bus_table = {"pci-bus", sizeof(struct pci_bus_state), bus_fields};

static int bus_capture(void *opaque, void *state, struct err *err)
{
	struct pci_bus *bus = opaque;
	struct pci_bus_state *s = state;
	(void)err;

	pthread_mutex_lock(&bus->config_lock);
	s->config_address = bus->config_address;
	pthread_mutex_unlock(&bus->config_lock);
	pci_capture(bus->devices[0], &s->bridge);
	return 0;
}

static int bus_validate(void *opaque, const void *state, struct err *err)
{
	struct pci_bus *bus = opaque;
	const struct pci_bus_state *s = state;

	if (s->config_address & ~CONFIG_SETTABLE)
		return err_set(err, ERR_DAMAGED, EINVAL, "PCI configuration address 0x%x", s->config_address);
	return pci_validate(bus->devices[0], &s->bridge, err);
}

static int bus_apply(void *opaque, const void *state, struct err *err)
{
	struct pci_bus *bus = opaque;
	const struct pci_bus_state *s = state;

	pthread_mutex_lock(&bus->config_lock);
	bus->config_address = s->config_address;
	for (unsigned i = 0; i < PCI_DEVICES; i++) {
		if (bus->devices[i] != NULL)
			bus->devices[i]->stale = true;
	}
	pthread_mutex_unlock(&bus->config_lock);
	return pci_apply(bus->devices[0], &s->bridge, err);
}

struct component pci_bus_component(struct pci_bus *bus)
{
	return (struct component){
		.id = "pci-bus",
		.version = 1,
		.table = &bus_table,
		.opaque = bus,
		.capture = bus_capture,
		.validate = bus_validate,
		.apply = bus_apply,
	};
}
