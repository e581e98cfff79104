#include "vmm/bus.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"

struct bus_range {
	uint64_t base, bytes;
	const char *name;
	const struct bus_ops *ops;
	void *opaque;
};

struct bus {
	const char *name;
	/* Held for the lookup, never while a handler runs: a handler may add and remove ranges itself. */
	pthread_rwlock_t lock;
	struct bus_range *range; /* under lock: sorted by base, none overlap */
	size_t count, capacity;	 /* under lock */
};

int bus_create(const char *name, struct bus **out, struct err *err)
{
	struct bus *bus = xcalloc(1, sizeof(*bus));
	int number = pthread_rwlock_init(&bus->lock, NULL);
	if (number != 0) {
		free(bus);
		return err_sys(err, number, "%s bus: make a lock", name);
	}
	bus->name = name;
	*out = bus;
	return 0;
}

void bus_destroy(struct bus *bus)
{
	if (!bus)
		return;
	pthread_rwlock_destroy(&bus->lock);
	free(bus->range);
	free(bus);
}

/* How many ranges start at or below the address. Under lock. */
static size_t count_up_to(const struct bus *bus, uint64_t address)
{
	size_t low = 0, high = bus->count;
	while (low < high) {
		size_t middle = low + (high - low) / 2;
		if (bus->range[middle].base <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int insert_range(struct bus *bus, const struct bus_range *new, struct err *err)
{
	size_t at = count_up_to(bus, new->base);
	const struct bus_range *before = at > 0 ? &bus->range[at - 1] : NULL;
	const struct bus_range *after = at < bus->count ? &bus->range[at] : NULL;
	if (before && new->base - before->base >= before->bytes)
		before = NULL;
	if (after && after->base - new->base >= new->bytes)
		after = NULL;
	const struct bus_range *other = before ? before : after;
	if (other)
		return err_set(err, ERR_STATE, EBUSY,
			       "%s bus: %s at 0x%llx, %llu bytes: overlaps %s at 0x%llx, %llu bytes", bus->name,
			       new->name, (unsigned long long)new->base, (unsigned long long)new->bytes, other->name,
			       (unsigned long long)other->base, (unsigned long long)other->bytes);
	if (bus->count == bus->capacity) {
		size_t capacity = bus->capacity ? 2 * bus->capacity : 16;
		struct bus_range *range = realloc(bus->range, capacity * sizeof(*range));
		if (!range)
			return err_sys(err, ENOMEM, "%s bus: add %s", bus->name, new->name);
		bus->range = range;
		bus->capacity = capacity;
	}
	memmove(&bus->range[at + 1], &bus->range[at], (bus->count - at) * sizeof(*bus->range));
	bus->range[at] = *new;
	bus->count++;
	return 0;
}

int bus_add(struct bus *bus, const char *name, uint64_t base, uint64_t bytes, const struct bus_ops *ops, void *opaque,
	    struct err *err)
{
	uint64_t last;
	/* The last byte must have an address; a range may end at the very top. */
	if (bytes == 0 || add_overflows(base, bytes - 1, &last))
		return err_set(err, ERR_FAILED, EINVAL, "%s bus: %s at 0x%llx: impossible length %llu", bus->name, name,
			       (unsigned long long)base, (unsigned long long)bytes);
	struct bus_range new = {.base = base, .bytes = bytes, .name = name, .ops = ops, .opaque = opaque};
	pthread_rwlock_wrlock(&bus->lock);
	int r = insert_range(bus, &new, err);
	pthread_rwlock_unlock(&bus->lock);
	return r;
}

void bus_remove(struct bus *bus, uint64_t base, void *opaque)
{
	pthread_rwlock_wrlock(&bus->lock);
	size_t at = count_up_to(bus, base);
	if (at > 0 && bus->range[at - 1].base == base && bus->range[at - 1].opaque == opaque) {
		memmove(&bus->range[at - 1], &bus->range[at], (bus->count - at) * sizeof(*bus->range));
		bus->count--;
	}
	pthread_rwlock_unlock(&bus->lock);
}

static bool find_range(struct bus *bus, uint64_t address, unsigned size, struct bus_range *out)
{
	bool found = false;
	pthread_rwlock_rdlock(&bus->lock);
	size_t at = count_up_to(bus, address);
	if (at > 0 && range_within(address - bus->range[at - 1].base, size, bus->range[at - 1].bytes)) {
		*out = bus->range[at - 1];
		found = true;
	}
	pthread_rwlock_unlock(&bus->lock);
	return found;
}

void bus_read(struct bus *bus, uint64_t address, uint8_t *data, unsigned size)
{
	struct bus_range range;
	if (find_range(bus, address, size, &range))
		range.ops->read(range.opaque, address - range.base, data, size);
	else
		memset(data, 0xff, size);
}

void bus_write(struct bus *bus, uint64_t address, const uint8_t *data, unsigned size)
{
	struct bus_range range;
	if (find_range(bus, address, size, &range))
		range.ops->write(range.opaque, address - range.base, data, size);
}
