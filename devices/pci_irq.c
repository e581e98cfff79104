/*
 * Interrupts of PCI functions: MSI-X (PCI 6.8.2) and INTx.
 *
 * Messages are sent by a call that returns when the interrupt is in the vCPU's local APIC. An irqfd would be as
 * cheap, but the kernel may hand its signal to a work queue: a checkpoint taken in between would hold the used ring
 * without the interrupt, and its guest would wait for ever.
 */
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "devices/pci_internal.h"

#define VECTOR_BYTES  16u
#define PENDING_BASE  0x800u
#define TABLE_BYTES   4096u
#define PENDING_BYTES 8u

/* --- MSI-X --- */

static bool is_masked(const struct pci_device *dev, unsigned vector)
{
	return dev->function_masked || (dev->vectors[vector].control & PCI_VECTOR_MASKED);
}

static void send(struct pci_device *dev, unsigned vector)
{
	const struct pci_platform *platform = &dev->bus->platform;
	struct err err = ERR_INIT;

	if (platform->msi_send(platform->opaque, dev->vectors[vector].address, dev->vectors[vector].data, &err) < 0 &&
	    !dev->warned_msi) {
		dev->warned_msi = true;
		log_warn("%s: interrupt vector %u: %s", dev->about.name, vector, err.message);
	}
}

static void send_pending(struct pci_device *dev)
{
	if (!dev->msix_enabled)
		return;
	for (unsigned i = 0; i < dev->vector_count; i++) {
		if ((dev->pending >> i & 1) && !is_masked(dev, i)) {
			dev->pending &= ~(1ull << i);
			send(dev, i);
		}
	}
}

bool pci_msix_enabled(struct pci_device *dev)
{
	pthread_mutex_lock(&dev->irq_lock);
	bool enabled = dev->msix_enabled;
	pthread_mutex_unlock(&dev->irq_lock);
	return enabled;
}

void pci_msix_trigger(struct pci_device *dev, unsigned vector)
{
	if (vector >= dev->vector_count)
		return;
	pthread_mutex_lock(&dev->irq_lock);
	if (dev->msix_enabled) {
		if (is_masked(dev, vector))
			dev->pending |= 1ull << vector;
		else
			send(dev, vector);
	}
	pthread_mutex_unlock(&dev->irq_lock);
}

static void table_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct pci_device *dev = opaque;
	uint8_t entry[VECTOR_BYTES] = {0};
	unsigned vector = (unsigned)(offset / VECTOR_BYTES);

	pthread_mutex_lock(&dev->irq_lock);
	if (vector < dev->vector_count) {
		put_le64(entry, dev->vectors[vector].address);
		put_le32(entry + 8, dev->vectors[vector].data);
		put_le32(entry + 12, dev->vectors[vector].control);
	} else if (offset >= PENDING_BASE && offset < PENDING_BASE + PENDING_BYTES) {
		put_le64(entry, dev->pending);
	}
	pthread_mutex_unlock(&dev->irq_lock);
	memset(data, 0, size);
	offset %= VECTOR_BYTES;
	memcpy(data, entry + offset, min_u64(size, VECTOR_BYTES - offset));
}

static void table_write_dword(struct pci_device *dev, uint64_t offset, uint32_t value)
{
	struct pci_vector_state *v = &dev->vectors[offset / VECTOR_BYTES];

	switch (offset % VECTOR_BYTES) {
	case 0:
		v->address = (v->address & ~0xffffffffull) | value;
		break;
	case 4:
		v->address = (v->address & 0xffffffffull) | (uint64_t)value << 32;
		break;
	case 8:
		v->data = value;
		break;
	default:
		v->control = value & PCI_VECTOR_MASKED;
		break;
	}
}

/* Only aligned accesses of 4 and 8 bytes are defined (PCI 6.8.2); others do nothing. */
static void table_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct pci_device *dev = opaque;

	if (size < 4 || offset % size != 0 || offset / VECTOR_BYTES >= dev->vector_count)
		return;
	pthread_mutex_lock(&dev->irq_lock);
	for (unsigned i = 0; i < size; i += 4)
		table_write_dword(dev, offset + i, get_le32(data + i));
	send_pending(dev);
	pthread_mutex_unlock(&dev->irq_lock);
}

const struct bus_ops pci_msix_ops = {.read = table_read, .write = table_write};

int pci_device_add_msix(struct pci_device *dev, unsigned bar, unsigned vectors, struct err *err)
{
	uint8_t capability[10];
	uint8_t writable[2];
	unsigned offset;

	put_le16(capability, (uint16_t)(vectors - 1));
	put_le32(capability + 2, bar);
	put_le32(capability + 6, PENDING_BASE | bar);
	int ret = pci_device_add_capability(dev, PCI_CAP_ID_MSIX, capability, sizeof(capability) + 2, &offset, err);
	if (ret < 0)
		return ret;
	put_le16(writable, PCI_MSIX_ENABLE | PCI_MSIX_FUNCTION_MASK);
	pci_device_set_writable(dev, offset + 2, writable, sizeof(writable));
	dev->msix_capability = offset;
	dev->vector_count = vectors;
	for (unsigned i = 0; i < vectors; i++)
		dev->vectors[i].control = PCI_VECTOR_MASKED; /* state after reset, PCI 6.8.2.9 */
	return pci_device_add_bar(dev, bar, false, TABLE_BYTES, &pci_msix_ops, dev, err);
}

/* --- INTx --- */

/* Under irq_lock. `force`: tell the line's level even if it is thought to be that already. */
static void line_update(struct pci_device *dev, bool force)
{
	struct pci_bus *bus = dev->bus;
	bool on = dev->about.intx && dev->intx_wish && !dev->msix_enabled && !dev->intx_disabled;
	unsigned line = dev->slot % PCI_LINES;

	pthread_mutex_lock(&bus->line_lock);
	bool was_high = bus->line_users[line] > 0;
	if (on != dev->line_on) {
		dev->line_on = on;
		bus->line_users[line] += on ? 1u : -1u;
	}
	bool is_high = bus->line_users[line] > 0;
	if (dev->about.intx && (force || was_high != is_high))
		bus->platform.irq_set(bus->platform.opaque, PCI_INTX_GSI(dev->slot), is_high);
	pthread_mutex_unlock(&bus->line_lock);
}

void pci_intx_set(struct pci_device *dev, bool level)
{
	pthread_mutex_lock(&dev->irq_lock);
	dev->intx_wish = level;
	line_update(dev, false);
	pthread_mutex_unlock(&dev->irq_lock);
}

/* --- configuration and state --- */

static void copy_config_bits(struct pci_device *dev)
{
	uint16_t control = 0;

	if (dev->msix_capability != 0)
		control = get_le16(dev->config + dev->msix_capability + 2);
	dev->msix_enabled = control & PCI_MSIX_ENABLE;
	dev->function_masked = control & PCI_MSIX_FUNCTION_MASK;
	dev->intx_disabled = get_le16(dev->config + PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE;
}

void pci_irq_config_changed(struct pci_device *dev)
{
	pthread_mutex_lock(&dev->irq_lock);
	copy_config_bits(dev);
	line_update(dev, false);
	send_pending(dev);
	pthread_mutex_unlock(&dev->irq_lock);
}

void pci_irq_capture(struct pci_device *dev, struct pci_state *state)
{
	pthread_mutex_lock(&dev->irq_lock);
	state->vector_count = dev->vector_count;
	memcpy(state->vectors, dev->vectors, sizeof(state->vectors));
	state->pending = dev->pending;
	state->intx_wish = dev->intx_wish;
	pthread_mutex_unlock(&dev->irq_lock);
}

void pci_irq_apply(struct pci_device *dev, const struct pci_state *state)
{
	pthread_mutex_lock(&dev->irq_lock);
	memcpy(dev->vectors, state->vectors, sizeof(dev->vectors));
	for (unsigned i = 0; i < PCI_MAX_VECTORS; i++)
		dev->vectors[i].control &= PCI_VECTOR_MASKED;
	dev->pending = state->pending;
	dev->intx_wish = state->intx_wish != 0;
	copy_config_bits(dev);
	line_update(dev, true);
	pthread_mutex_unlock(&dev->irq_lock);
}
