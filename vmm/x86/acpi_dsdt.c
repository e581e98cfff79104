/* The DSDT: what a kernel cannot find by probing: processors, the PCI root and its interrupts, serial port, RTC,
 * soft-off. */
#include <cpuid.h>
#include <stdio.h>

#include "base/bytes.h"
#include "vmm/x86/acpi_internal.h"

#define PCI_CONFIG_PORT 0xcf8
#define PCI_DEVICES	32u
#define PCI_PINS	4u

#define CPUID_ADDRESS_SIZES 0x80000008u

/* The window must lie where the processor can reach it: a checkpoint carries it along in guest memory, so a later host
 * needs no say. */
uint64_t acpi_pci_mmio64_base(const struct mem *mem, uint64_t *bytes)
{
	struct mem_region regions[2];
	unsigned a = 0, b, c, d, last = mem_regions(mem, regions) - 1;
	uint64_t base = round_up(max_u64(regions[last].gpa + regions[last].bytes, MEM_HOLE_END), PCI_MMIO64_BYTES);

	if (!__get_cpuid(CPUID_ADDRESS_SIZES, &a, &b, &c, &d) || (a & 0xff) < 36)
		a = 36;
	*bytes = base + PCI_MMIO64_BYTES <= 1ull << (a & 0xff) ? PCI_MMIO64_BYTES : 0;
	return *bytes ? base : 0;
}

static void write_hid(struct aml *aml, const char id[7], unsigned uid)
{
	aml_name(aml, "_HID");
	aml_eisa_id(aml, id);
	aml_name(aml, "_UID");
	aml_integer(aml, uid);
}

static void write_cpus(struct aml *aml, unsigned cpus)
{
	for (unsigned i = 0; i < cpus; i++) {
		char name[8];
		snprintf(name, sizeof(name), "C%03X", i & 0xfff);
		size_t device = aml_device_begin(aml, name);
		aml_name(aml, "_HID");
		aml_string(aml, "ACPI0007");
		aml_name(aml, "_UID"); /* the MADT's processor UID */
		aml_integer(aml, i);
		aml_end(aml, device);
	}
}

static void write_isa_device(struct aml *aml, const char *name, const char id[7], uint16_t port, uint8_t ports,
			     unsigned irq)
{
	size_t device = aml_device_begin(aml, name);

	write_hid(aml, id, 0);
	aml_name(aml, "_CRS");
	size_t resources = aml_resources_begin(aml);
	aml_res_io(aml, port, ports);
	aml_res_irq(aml, irq);
	aml_resources_end(aml, resources);
	aml_end(aml, device);
}

/* Pins go straight to IOAPIC pins, without link devices: level triggered, and active low as PCI has it, which KVM's
 * IOAPIC does not look at. */
static void write_prt(struct aml *aml)
{
	aml_name(aml, "_PRT");
	size_t table = aml_package_begin(aml, PCI_DEVICES * PCI_PINS);
	for (unsigned device = 0; device < PCI_DEVICES; device++) {
		for (unsigned pin = 0; pin < PCI_PINS; pin++) {
			size_t entry = aml_package_begin(aml, 4);
			aml_integer(aml, (uint64_t)device << 16 | 0xffff); /* any function */
			aml_integer(aml, pin);
			aml_integer(aml, 0); /* no link: the next is a GSI */
			aml_integer(aml, acpi_pci_gsi(device, pin));
			aml_end(aml, entry);
		}
	}
	aml_end(aml, table);
}

static void write_pci_root(struct aml *aml, const struct mem *mem)
{
	uint64_t bytes64, base64 = acpi_pci_mmio64_base(mem, &bytes64);
	size_t device = aml_device_begin(aml, "PCI0");

	write_hid(aml, "PNP0A03", 0);
	aml_name(aml, "_BBN");
	aml_integer(aml, 0);
	aml_name(aml, "_CRS");
	size_t resources = aml_resources_begin(aml);
	aml_res_bus_window(aml, 0, 0); /* one bus: no bridges below */
	aml_res_io(aml, PCI_CONFIG_PORT, 8);
	aml_res_io_window(aml, 0, PCI_CONFIG_PORT - 1);
	aml_res_io_window(aml, PCI_CONFIG_PORT + 8, UINT16_MAX);
	aml_res_mem32_window(aml, PCI_MMIO32_BASE, PCI_MMIO32_END - 1);
	if (bytes64)
		aml_res_mem64_window(aml, base64, base64 + bytes64 - 1);
	aml_resources_end(aml, resources);
	write_prt(aml);
	aml_end(aml, device);
}

/* SLP_TYP values for PM1a and PM1b, then two reserved. */
static void write_soft_off(struct aml *aml)
{
	aml_name(aml, "\\_S5");
	size_t package = aml_package_begin(aml, 4);
	aml_integer(aml, ACPI_S5_SLEEP_TYPE);
	for (int i = 0; i < 3; i++)
		aml_integer(aml, 0);
	aml_end(aml, package);
}

/*
 * Microsoft's "Virtual Machine Generation ID": the device says where the id is, and is notified (0x80) when it changes. That comes by a Generic Event
 * Device (5.6.9), whose interrupt needs no register to be read.
 */
static void write_generation(struct aml *aml)
{
	size_t device = aml_device_begin(aml, "VGEN");

	aml_name(aml, "_HID");
	aml_string(aml, "VMCP0002");
	aml_name(aml, "_CID");
	aml_string(aml, "VMGENCTR"); /* which Linux looks for */
	aml_name(aml, "_DDN");
	aml_string(aml, "VM_Gen_Counter");
	aml_name(aml, "ADDR");
	size_t address = aml_package_begin(aml, 2);
	aml_integer(aml, acpi_generation_gpa());
	aml_integer(aml, 0);
	aml_end(aml, address);
	aml_end(aml, device);

	device = aml_device_begin(aml, "GED0");
	aml_name(aml, "_HID");
	aml_string(aml, "ACPI0013");
	aml_name(aml, "_UID");
	aml_integer(aml, 0);
	aml_name(aml, "_CRS");
	size_t resources = aml_resources_begin(aml);
	aml_res_gsi(aml, ACPI_GENERATION_GSI);
	aml_resources_end(aml, resources);
	size_t method = aml_method_begin(aml, "_EVT", 1);
	aml_notify(aml, "\\_SB.VGEN", 0x80);
	aml_end(aml, method);
	aml_end(aml, device);
}

void acpi_write_dsdt(struct aml *aml, const struct mem *mem, unsigned cpus, const struct acpi_config *config)
{
	write_soft_off(aml);
	size_t scope = aml_scope_begin(aml, "\\_SB");
	write_cpus(aml, cpus);
	if (config->pci)
		write_pci_root(aml, mem);
	if (config->serial)
		write_isa_device(aml, "COM1", "PNP0501", 0x3f8, 8, 4);
	if (config->rtc)
		write_isa_device(aml, "RTC0", "PNP0B00", 0x70, 2, 8);
	if (config->generation_id)
		write_generation(aml);
	if (config->aml && !aml->failed && buf_append(&aml->buf, config->aml, config->aml_bytes, NULL) < 0)
		aml->failed = true;
	aml_end(aml, scope);
}
