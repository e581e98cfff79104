/*
 * ACPI tables (ACPI 6.4): RSDP, XSDT, FADT (reset register, no hardware-reduced mode), FACS, MADT, DSDT.
 *
 * The fixed hardware that the tables describe is emulated by devices/acpi_pm.c; the two agree through the numbers
 * below. The values of the PM block are those of QEMU's PIIX4/q35, so that a small guest may power off by writing
 * 0x2000 to port 0x604 under both.
 */
#ifndef VMCP_VMM_ACPI_H
#define VMCP_VMM_ACPI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "vmm/vm.h"

#define ACPI_PM1A_EVT_PORT 0x600u /* 4 bytes: status, enable */
#define ACPI_PM1A_CNT_PORT 0x604u /* 2 bytes */
#define ACPI_PM_TIMER_PORT 0x608u /* 4 bytes, 24-bit, 3.579545 MHz */
#define ACPI_RESET_PORT	   0xcf9u /* value 6 resets */
#define ACPI_SCI_GSI	   9u	  /* active high, level: vm_irq_set */
#define ACPI_S5_SLEEP_TYPE 0u
#define ACPI_GENERATION_GSI 20u	  /* edge, active high: the generation id has changed */

/* Where things of the machine are. */
#define ACPI_TABLES_GPA	 0xe0000u
#define ACPI_GENERATION_GPA 0xff000u /* a page of its own, behind the tables */
#define ACPI_GENERATION_BYTES 16u
#define PCI_MMIO32_BASE	 0xc0000000u /* window for 32-bit BARs, up to ... */
#define PCI_MMIO32_END	 0xe0000000u
#define PCI_MMIO64_BYTES (16ull << 30) /* the window for 64-bit BARs: where it is, says acpi_pci_mmio64_base */

/* The GSI of pin 0-3 (INTA-INTD) of a device on bus 0, as the _PRT has it: level triggered, vm_irq_set with true
 * asserts. */
static inline unsigned acpi_pci_gsi(unsigned device, unsigned pin) { return 16 + (device + pin) % 4; }
/* Base of the window for 64-bit BARs above RAM, *bytes long; both 0 if this processor has no address space left there.
 */
uint64_t acpi_pci_mmio64_base(const struct mem *mem, uint64_t *bytes);

struct acpi_config {
	bool serial; /* COM1: PNP0501 at 0x3f8, GSI 4 */
	bool rtc;    /* PNP0B00 at 0x70, GSI 8 */
	bool pci;    /* root bridge PNP0A03, configuration by 0xcf8, _PRT: device d, pin p -> GSI 16 + (d + p) % 4 */
	const uint8_t *generation_id; /* ACPI_GENERATION_BYTES: a device "VM generation counter" and the event that tells of a new id; NULL: none */
	const uint8_t *aml; /* further AML objects for the DSDT (\_SB scope; vmm/x86/aml.h writes them), NULL if none */
	size_t aml_bytes;
};

/* Writes the tables into guest memory at ACPI_TABLES_GPA (RSDP first, where legacy scans find it too). */
int acpi_build(struct vm *vm, const struct acpi_config *config, struct err *err);

/* Gives the guest another generation id. False, and nothing is changed, if its tables name none, as those of checkpoints of older versions. Who asks
 * pulses ACPI_GENERATION_GSI then. The VM stands still. */
bool acpi_set_generation(struct mem *mem, const uint8_t id[ACPI_GENERATION_BYTES]);
bool acpi_get_generation(struct mem *mem, uint8_t id[ACPI_GENERATION_BYTES]);

#endif
