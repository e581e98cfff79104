/* Virtio entropy device (virtio 1.2, 5.4): bytes of getrandom(2). After a revert the guest gets fresh ones. */
#ifndef VMCP_DEVICES_VIRTIO_RNG_H
#define VMCP_DEVICES_VIRTIO_RNG_H

#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/pci.h"
#include "vmm/memory.h"

struct virtio_rng;

/* Before VM and loop run. */
int virtio_rng_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct virtio_rng **out,
		      struct err *err);
/* VM and loop do not run. NULL is allowed. */
void virtio_rng_destroy(struct virtio_rng *rng);
/* After the bus's component in the machine's list. */
struct component virtio_rng_component(struct virtio_rng *rng, uint32_t instance);

#endif
