#include "pci.h"

#include "cpu.h"

enum {
	PORT_ADDRESS = 0xcf8,
	PORT_DATA = 0xcfc,
	OFFSET_IDS = 0x00,
	OFFSET_COMMAND = 0x04,
	OFFSET_STATUS = 0x06,
	OFFSET_HEADER_TYPE = 0x0e,
	OFFSET_BAR0 = 0x10,
	OFFSET_CAPABILITIES = 0x34,
};

#define COMMAND_MEMORY	     0x0002u
#define COMMAND_MASTER	     0x0004u
#define COMMAND_NO_INTERRUPT 0x0400u
#define STATUS_CAPABILITIES  0x0010u
#define CAPABILITIES_AT_MOST 48

#define UNPLACED_BARS_GPA 0xe8000000u /* where BARs go that nobody placed: 1 MiB for each slot */

static void select_register(struct pci_function at, uint8_t offset)
{
	outl(PORT_ADDRESS, 0x80000000u | (uint32_t)at.device << 11 | (uint32_t)at.function << 8 | (offset & 0xfcu));
}

uint32_t pci_read32(struct pci_function at, uint8_t offset)
{
	select_register(at, offset);
	return inl(PORT_DATA);
}

uint16_t pci_read16(struct pci_function at, uint8_t offset)
{
	return (uint16_t)(pci_read32(at, offset) >> (offset & 2) * 8);
}

uint8_t pci_read8(struct pci_function at, uint8_t offset)
{
	return (uint8_t)(pci_read32(at, offset) >> (offset & 3) * 8);
}

static void pci_write32(struct pci_function at, uint8_t offset, uint32_t value)
{
	select_register(at, offset);
	outl(PORT_DATA, value);
}

bool pci_find(uint16_t vendor, uint16_t id_a, uint16_t id_b, unsigned int number, struct pci_function *found)
{
	struct pci_function at;
	uint16_t id;
	uint32_t ids;

	for (at.device = 0; at.device < 32; at.device++) {
		for (at.function = 0; at.function < 8; at.function++) {
			ids = pci_read32(at, OFFSET_IDS);
			id = (uint16_t)(ids >> 16);
			if ((ids & 0xffff) == vendor && (id == id_a || id == id_b) && !number--) {
				*found = at;
				return true;
			}
			if (at.function == 0 &&
			    ((ids & 0xffff) == 0xffff || !(pci_read8(at, OFFSET_HEADER_TYPE) & 0x80)))
				break;
		}
	}
	return false;
}

void pci_enable(struct pci_function at)
{
	uint32_t command = pci_read16(at, OFFSET_COMMAND);

	pci_write32(at, OFFSET_COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTERRUPT);
}

bool pci_bar(struct pci_function at, unsigned int bar, uint64_t *gpa)
{
	uint8_t offset = (uint8_t)(OFFSET_BAR0 + bar * 4);
	uint32_t low = pci_read32(at, offset);
	bool wide = (low & 0x6) == 0x4;

	if (bar > 5 || (wide && bar == 5) || (low & 1))
		return false;
	*gpa = low & ~0xfu;
	if (wide)
		*gpa |= (uint64_t)pci_read32(at, (uint8_t)(offset + 4)) << 32;
	if (!*gpa) {
		*gpa = UNPLACED_BARS_GPA + ((uint64_t)at.device * 8 + bar) * 0x100000;
		pci_write32(at, offset, (uint32_t)*gpa);
	}
	return true;
}

uint8_t pci_capability(struct pci_function at, uint8_t id, uint8_t after)
{
	uint8_t offset;
	unsigned int i;

	if (!(pci_read16(at, OFFSET_STATUS) & STATUS_CAPABILITIES))
		return 0;
	offset = pci_read8(at, after ? (uint8_t)(after + 1) : OFFSET_CAPABILITIES) & 0xfc;
	for (i = 0; offset && i < CAPABILITIES_AT_MOST; i++) {
		if (pci_read8(at, offset) == id)
			return offset;
		offset = pci_read8(at, (uint8_t)(offset + 1)) & 0xfc;
	}
	return 0;
}
