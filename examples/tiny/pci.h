/* PCI configuration space through ports 0xcf8/0xcfc, bus 0 only. */
#ifndef TINY_PCI_H
#define TINY_PCI_H

#include <stdbool.h>
#include <stdint.h>

struct pci_function {
	uint8_t device;
	uint8_t function;
};

uint32_t pci_read32(struct pci_function at, uint8_t offset);
uint16_t pci_read16(struct pci_function at, uint8_t offset);
uint8_t pci_read8(struct pci_function at, uint8_t offset);

/* Function `number`, from 0, of those of this vendor with one of the two device ids. */
bool pci_find(uint16_t vendor, uint16_t id_a, uint16_t id_b, unsigned int number, struct pci_function *found);

/* Lets the function answer memory accesses and access memory; no interrupt line. */
void pci_enable(struct pci_function at);

/*
 * The address of memory BAR `bar`. One that no firmware has placed is placed here, in the gap below 4 GiB.
 * False if it is no memory BAR.
 */
bool pci_bar(struct pci_function at, unsigned int bar, uint64_t *gpa);

/* The next capability with this id after offset `after` (0: the first one). 0 if there is none. */
uint8_t pci_capability(struct pci_function at, uint8_t id, uint8_t after);

#endif
