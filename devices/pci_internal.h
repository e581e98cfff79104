/* What pci.c (configuration, BARs) and pci_irq.c (MSI-X, INTx) share. */
#ifndef VMCP_DEVICES_PCI_INTERNAL_H
#define VMCP_DEVICES_PCI_INTERNAL_H

#include <pthread.h>

#include "devices/pci.h"

/* Configuration space, type 0 header (PCI 6.1). */
enum {
	PCI_VENDOR_ID = 0x00,
	PCI_DEVICE_ID = 0x02,
	PCI_COMMAND = 0x04,
	PCI_STATUS = 0x06,
	PCI_REVISION = 0x08,
	PCI_CLASS = 0x09,
	PCI_CACHE_LINE = 0x0c,
	PCI_LATENCY = 0x0d,
	PCI_BAR0 = 0x10,
	PCI_SUBSYSTEM_VENDOR_ID = 0x2c,
	PCI_SUBSYSTEM_ID = 0x2e,
	PCI_CAPABILITIES = 0x34,
	PCI_INTERRUPT_LINE = 0x3c,
	PCI_INTERRUPT_PIN = 0x3d,
	PCI_FIRST_CAPABILITY = 0x40,
};
enum {
	PCI_COMMAND_MEMORY = 0x0002,
	PCI_COMMAND_MASTER = 0x0004,
	PCI_COMMAND_PARITY = 0x0040,
	PCI_COMMAND_SERR = 0x0100,
	PCI_COMMAND_INTX_DISABLE = 0x0400,
	PCI_STATUS_INTERRUPT = 0x0008,
	PCI_STATUS_CAPABILITIES = 0x0010,
	PCI_BAR_64BIT = 0x4,
	PCI_CAP_ID_MSIX = 0x11,
	PCI_MSIX_ENABLE = 0x8000, /* message control, PCI 6.8.2.3 */
	PCI_MSIX_FUNCTION_MASK = 0x4000,
};
#define PCI_VECTOR_MASKED 1u
#define PCI_LINES	  4u

struct pci_bar {
	uint64_t bytes; /* 0: there is none */
	bool is_64bit;
	const struct bus_ops *ops;
	void *opaque;
	uint64_t mapped_at; /* under config_lock; PCI_UNMAPPED while not decoded */
};

struct pci_device {
	struct pci_bus *bus;	  /* immutable */
	struct pci_config about;  /* immutable */
	unsigned slot;		  /* immutable */
	unsigned msix_capability; /* immutable once placed; 0: none */
	unsigned vector_count;	  /* immutable once placed */

	/* under config_lock */
	uint8_t config[PCI_CONFIG_BYTES];
	uint8_t writable[PCI_CONFIG_BYTES];
	unsigned next_capability; /* where the next one goes */
	unsigned last_link;	  /* offset of the byte that will point to it */
	struct pci_bar bars[PCI_BARS];
	bool warned_bar;
	bool stale; /* the bus's state was put back, this function's was not yet: its BARs are where they were before */

	pthread_mutex_t irq_lock;
	/* under irq_lock */
	struct pci_vector_state vectors[PCI_MAX_VECTORS];
	uint64_t pending;
	bool msix_enabled, function_masked, intx_disabled; /* copies of bits in config */
	bool intx_wish;
	bool warned_msi;

	bool line_on; /* under line_lock: counts in bus->line_users */
};

struct pci_bus {
	struct pci_platform platform;		 /* immutable */
	struct pci_device *devices[PCI_DEVICES]; /* immutable while the VM runs */
	uint64_t next_bar;			 /* where the next BAR is placed at creation */

	pthread_mutex_t config_lock;
	uint32_t config_address; /* under config_lock */

	pthread_mutex_t line_lock;
	unsigned line_users[PCI_LINES]; /* under line_lock: functions that assert the line */
};

extern const struct bus_ops pci_msix_ops; /* opaque: the pci_device */

/* The bits of configuration space that interrupts depend on may have changed. Under config_lock. */
void pci_irq_config_changed(struct pci_device *dev);
void pci_irq_capture(struct pci_device *dev, struct pci_state *state);
/* config is in place. */
void pci_irq_apply(struct pci_device *dev, const struct pci_state *state);

#endif
