/*
 * The PCI devices that a machine of some configuration has, in the order of their slots on bus 0. It follows from the configuration alone, so that a guest finds a
 * device where it was, whatever the host and the VM's name are.
 */
#ifndef VMCP_MACHINE_SLOTS_H
#define VMCP_MACHINE_SLOTS_H

#include "machine/config.h"

enum slot_kind { SLOT_DISK, SLOT_RNG, SLOT_BALLOON, SLOT_NET, SLOT_VSOCK };

struct slot {
	enum slot_kind kind;
	unsigned index;	 /* of the disk or the card in the configuration */
	unsigned number; /* from 1 on: 0 is the host bridge */
};

#define SLOTS_MAX (CONFIG_MAX_DISKS + CONFIG_MAX_NETS + 3)

/* Returns how many there are. More than a bus has slots (devices/pci.h) are no machine. */
unsigned slots_list(const struct machine_config *config, struct slot out[SLOTS_MAX]);

#endif
