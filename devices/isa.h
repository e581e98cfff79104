/* What a device with fixed ports and an interrupt line needs of the machine below it. A test offers its own. */
#ifndef VMCP_DEVICES_ISA_H
#define VMCP_DEVICES_ISA_H

#include <stdbool.h>
#include <stdint.h>

#include "vmm/bus.h"
#include "vmm/vm.h"

struct isa_platform {
	struct bus *pio;
	void (*irq_set)(void *opaque, unsigned gsi, bool level);
	void (*stop)(void *opaque, enum vm_stop_reason reason);
	/* Nanoseconds of the guest's own time, which goes on from the saved value after a load; any zero. */
	uint64_t (*now_ns)(void *opaque);
	/* Nanoseconds since 1970, UTC. */
	uint64_t (*wall_ns)(void *opaque);
	void *opaque;
};

/* The platform that a real VM is. */
struct isa_platform isa_platform_of(struct vm *vm);

#endif
