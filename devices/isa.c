#include "devices/isa.h"

#include "base/clock.h"

static void irq_set(void *opaque, unsigned gsi, bool level) { vm_irq_set(opaque, gsi, level); }
static void stop(void *opaque, enum vm_stop_reason reason) { vm_request_stop(opaque, reason); }

static uint64_t now_ns(void *opaque) { return vm_time_ns(opaque); }

static uint64_t wall_ns(void *opaque)
{
	(void)opaque;
	return clock_wall_ns();
}

struct isa_platform isa_platform_of(struct vm *vm)
{
	return (struct isa_platform){.pio = vm_pio(vm),
				     .irq_set = irq_set,
				     .stop = stop,
				     .now_ns = now_ns,
				     .wall_ns = wall_ns,
				     .opaque = vm};
}
