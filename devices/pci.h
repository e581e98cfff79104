/*
 * PCI (PCI Local Bus 3.0): one bus behind a host bridge, configuration mechanism #1, memory BARs, MSI-X and INTx.
 *
 * There is no firmware: BARs are placed when a function is created, within PCI_MMIO32_BASE..PCI_MMIO32_END, memory
 * decoding is on and the interrupt line register is set, as firmware would leave it. The guest may size and move BARs
 * (PCI 6.2.5.1). Port 0xcf9 (reset control) lies inside the configuration address register, so the bus serves it:
 * value 6 resets the machine.
 *
 * Threads: configuration accesses come from vCPU threads; pci_msix_trigger and pci_intx_set from any thread.
 *
 * Lock order, outermost first:
 *     pci_bus.config_lock     configuration space and BAR placement of all functions; held across `bar_moved` and
 * `config_access`
 *     the device's own lock   (virtio_device.lock)
 *     pci_device.irq_lock     MSI-X table, pending bits, INTx wish of one function
 *     pci_bus.line_lock       the four INTx lines
 */
#ifndef VMCP_DEVICES_PCI_H
#define VMCP_DEVICES_PCI_H

#include <stdbool.h>
#include <stdint.h>

#include "base/codec.h"
#include "base/component.h"
#include "base/err.h"
#include "vmm/bus.h"
#include "vmm/vm.h"

#define PCI_CONFIG_BYTES     256u
#define PCI_BARS	     6u
#define PCI_MAX_VECTORS	     64u
#define PCI_DEVICES	     32u
#define PCI_INTX_GSI(device) (16u + (device) % 4u) /* INTA of a device, as the _PRT of vmm/acpi.h says */

struct pci_bus;
struct pci_device;

/* What the bus needs of the machine below it. A test offers its own. */
struct pci_platform {
	struct bus *pio, *mmio;
	void (*irq_set)(void *opaque, unsigned gsi, bool level);
	int (*msi_send)(void *opaque, uint64_t address, uint32_t data, struct err *err);
	int (*ioeventfd)(void *opaque, uint64_t address, int fd, bool add, struct err *err); /* a write of any size */
	void (*reset)(void *opaque); /* the guest asked for a reset through port 0xcf9 */
	void *opaque;
};

/* The bus with its host bridge (device 0) on the VM's buses; takes ports 0xcf8-0xcff. Before the VM runs. */
int pci_bus_create(struct vm *vm, struct pci_bus **out, struct err *err);
int pci_bus_create_on(const struct pci_platform *platform, struct pci_bus **out, struct err *err);
/* All functions have been destroyed. NULL is allowed. */
void pci_bus_destroy(struct pci_bus *bus);

/* State of the bus itself. In the machine's list it comes *before* all PCI devices: its apply takes all BARs off the
 * MMIO bus, so that theirs can put them to places that others had. */
struct component pci_bus_component(struct pci_bus *bus);

struct pci_config {
	const char *name; /* for messages; must outlive the device */
	uint16_t vendor, device, subsystem_vendor, subsystem;
	uint32_t class_code; /* 24 bits: class, subclass, interface */
	uint8_t revision;
	bool intx; /* has pin INTA */
	void *opaque;
	/* BAR `bar` is now at `address` (decoding switched on, or moved), or nowhere (PCI_UNMAPPED). Called with
	 * config_lock held. Optional. */
	void (*bar_moved)(void *opaque, unsigned bar, uint64_t address);
	/* The guest reads or writes [offset, offset + size) of configuration space: called before a read is answered
	 * and after a write has taken place, for capabilities with a side effect. Called with config_lock held.
	 * Optional. */
	void (*config_access)(void *opaque, unsigned offset, unsigned size, bool write);
};

#define PCI_UNMAPPED UINT64_MAX

/* A function in the next free slot. Before the VM runs. */
int pci_device_create(struct pci_bus *bus, const struct pci_config *config, struct pci_device **out, struct err *err);
/* Its BARs leave the MMIO bus. The VM does not run. NULL is allowed. */
void pci_device_destroy(struct pci_device *dev);
unsigned pci_device_slot(const struct pci_device *dev);
uint8_t *
pci_device_config(struct pci_device *dev); /* its configuration space; under config_lock, or before the VM runs */

/* Adds a memory BAR of `bytes` (a power of two, at least 4096). A 64-bit BAR takes two registers and is placed below
 * 4 GiB too. */
int pci_device_add_bar(struct pci_device *dev, unsigned bar, bool is_64bit, uint64_t bytes, const struct bus_ops *ops,
		       void *opaque, struct err *err);
/* Adds a capability of `length` bytes, id and next included (data: what follows those two), and gives its offset. */
int pci_device_add_capability(struct pci_device *dev, uint8_t id, const void *data, unsigned length, unsigned *offset,
			      struct err *err);
/* Bits of configuration space that the guest may write. */
void pci_device_set_writable(struct pci_device *dev, unsigned offset, const void *mask, unsigned length);
/* MSI-X with its table and pending bits in a BAR of 4 KiB of its own. */
int pci_device_add_msix(struct pci_device *dev, unsigned bar, unsigned vectors, struct err *err);
/* Puts BARs into their first places; after all pci_device_add_*. */
int pci_device_place(struct pci_device *dev, struct err *err);

bool pci_msix_enabled(struct pci_device *dev);
/* Sends the vector's message, or sets its pending bit while it is masked (PCI 6.8.2.9). Nothing while MSI-X is off. */
void pci_msix_trigger(struct pci_device *dev, unsigned vector);
/* The level the device wants on its INTA; it reaches the line unless MSI-X is on or the guest disabled INTx. */
void pci_intx_set(struct pci_device *dev, bool level);
/* Platform's ioeventfd. */
int pci_ioeventfd(struct pci_device *dev, uint64_t address, int fd, bool add, struct err *err);

/* Access to a BAR as if by the guest, for capabilities that give a window into it (virtio 1.2, 4.1.4.9). False if
 * outside. */
bool pci_bar_access(struct pci_device *dev, unsigned bar, uint64_t offset, uint8_t *data, unsigned size, bool write);

/* --- saved state of a function, part of its device's state --- */
struct pci_vector_state {
	uint64_t address;
	uint32_t data;
	uint32_t control; /* bit 0: masked */
};
struct pci_state {
	uint8_t config[PCI_CONFIG_BYTES]; /* BAR placement, command, MSI-X control included */
	uint32_t vector_count;
	struct pci_vector_state vectors[PCI_MAX_VECTORS];
	uint64_t pending;  /* one bit a vector */
	uint8_t intx_wish; /* level that the device wants */
};
extern const struct codec_table pci_state_table;

void pci_capture(struct pci_device *dev, struct pci_state *state);
/* Refuses the state of another kind of function: read-only bits of configuration space differ, other number of
 * vectors. */
int pci_validate(struct pci_device *dev, const struct pci_state *state, struct err *err);
/* Places BARs (which calls bar_moved), sets the INTx line. The VM does not run. */
int pci_apply(struct pci_device *dev, const struct pci_state *state, struct err *err);

#endif
