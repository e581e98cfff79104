/*
 * Buses: who answers a guest access to an I/O port or to a physical address that is not RAM.
 *
 * Handlers run in the vCPU thread that made the access, several at once for different vCPUs; a device locks itself.
 * Reads of nothing give all ones, writes to nothing are dropped, as on hardware. Ranges are added before the VM runs,
 * or by a handler of the same bus while it runs (a PCI BAR that moves): lookups are safe against that. A handler of a
 * range that was removed may still be running in another vCPU thread, so `opaque` must live as long as the vCPU threads
 * do.
 */
#ifndef VMCP_VMM_BUS_H
#define VMCP_VMM_BUS_H

#include <stdint.h>

#include "base/err.h"

struct bus;

struct bus_ops {
	/* offset is from the start of the range; size is 1, 2, 4 or 8; the access lies wholly within the range. data
	 * is little endian, `size` bytes. */
	void (*read)(void *opaque, uint64_t offset, uint8_t *data, unsigned size);
	void (*write)(void *opaque, uint64_t offset, const uint8_t *data, unsigned size);
};

int bus_create(const char *name, struct bus **out, struct err *err);
void bus_destroy(struct bus *bus);
/* -EBUSY if the range overlaps another. `name` and `ops` must outlive the bus. */
int bus_add(struct bus *bus, const char *name, uint64_t base, uint64_t bytes, const struct bus_ops *ops, void *opaque,
	    struct err *err);
/* Removes the range that starts at base and belongs to opaque; nothing happens if there is none. */
void bus_remove(struct bus *bus, uint64_t base, void *opaque);

void bus_read(struct bus *bus, uint64_t address, uint8_t *data, unsigned size);
void bus_write(struct bus *bus, uint64_t address, const uint8_t *data, unsigned size);

#endif
