#include "vmm/bus.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

struct probe {
	struct bus *bus;
	uint64_t offset;
	unsigned size, reads, writes;
	uint64_t move_from, move_to; /* in write, if not equal */
};

static void probe_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct probe *probe = opaque;
	probe->offset = offset;
	probe->size = size;
	probe->reads++;
	memset(data, 0x5a, size);
}

static const struct bus_ops probe_ops;

static void probe_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct probe *probe = opaque;
	(void)data;
	probe->offset = offset;
	probe->size = size;
	probe->writes++;
	if (probe->move_from != probe->move_to) {
		bus_remove(probe->bus, probe->move_from, probe);
		cr_expect_eq(bus_add(probe->bus, "moved", probe->move_to, 0x100, &probe_ops, probe, NULL), 0);
		probe->move_from = probe->move_to;
	}
}

static const struct bus_ops probe_ops = {.read = probe_read, .write = probe_write};

static struct bus *create(void)
{
	struct bus *bus = NULL;
	cr_assert_eq(bus_create("test", &bus, NULL), 0);
	return bus;
}

Test(bus, dispatches_to_the_range_with_its_offset)
{
	struct bus *bus = create();
	struct probe a = {.bus = bus}, b = {.bus = bus};
	uint8_t data[8];
	cr_assert_eq(bus_add(bus, "b", 0x3f8, 8, &probe_ops, &b, NULL), 0);
	cr_assert_eq(bus_add(bus, "a", 0x60, 1, &probe_ops, &a, NULL), 0);
	bus_read(bus, 0x3fc, data, 4);
	cr_expect(b.reads == 1 && b.offset == 4 && b.size == 4 && data[3] == 0x5a);
	bus_write(bus, 0x60, data, 1);
	cr_expect(a.writes == 1 && a.offset == 0);
	bus_destroy(bus);
}

Test(bus, nothing_answers_with_ones)
{
	struct bus *bus = create();
	struct probe a = {.bus = bus};
	uint8_t data[8] = {0};
	cr_assert_eq(bus_add(bus, "a", 0x100, 4, &probe_ops, &a, NULL), 0);
	bus_read(bus, 0x50, data, 8);
	cr_expect(data[0] == 0xff && data[7] == 0xff);
	bus_read(bus, 0x103, data, 2);
	bus_write(bus, 0xff, data, 2);
	bus_write(bus, UINT64_MAX, data, 8);
	cr_expect(a.reads == 0 && a.writes == 0, "an access that is not wholly within goes nowhere");
	bus_destroy(bus);
}

Test(bus, refuses_overlap_and_impossible_ranges)
{
	struct bus *bus = create();
	struct probe a = {.bus = bus};
	struct err err = ERR_INIT;
	cr_assert_eq(bus_add(bus, "a", 0x100, 0x10, &probe_ops, &a, NULL), 0);
	cr_expect_eq(bus_add(bus, "over", 0xff, 2, &probe_ops, &a, &err), -EBUSY);
	cr_expect_not_null(strstr(err.message, "over"));
	cr_expect_eq(bus_add(bus, "over", 0x10f, 1, &probe_ops, &a, NULL), -EBUSY);
	cr_expect_eq(bus_add(bus, "over", 0x0, 0x1000, &probe_ops, &a, NULL), -EBUSY);
	cr_expect_eq(bus_add(bus, "empty", 0x200, 0, &probe_ops, &a, NULL), -EINVAL);
	cr_expect_eq(bus_add(bus, "round", UINT64_MAX, 2, &probe_ops, &a, NULL), -EINVAL);
	cr_expect_eq(bus_add(bus, "top", UINT64_MAX, 1, &probe_ops, &a, NULL), 0);
	cr_expect_eq(bus_add(bus, "next", 0x110, 0x10, &probe_ops, &a, NULL), 0);
	cr_expect_eq(bus_add(bus, "before", 0xf0, 0x10, &probe_ops, &a, NULL), 0);
	bus_destroy(bus);
}

Test(bus, many_ranges_are_found)
{
	struct bus *bus = create();
	static struct probe probe[100];
	uint8_t data[4];
	for (unsigned i = 0; i < 100; i++)
		cr_assert_eq(bus_add(bus, "p", (i * 37 % 100) * 0x1000, 0x1000, &probe_ops, &probe[i * 37 % 100], NULL),
			     0);
	for (unsigned i = 0; i < 100; i++)
		bus_read(bus, i * 0x1000 + i, data, 4);
	for (unsigned i = 0; i < 100; i++)
		cr_expect(probe[i].reads == 1 && probe[i].offset == i);
	bus_remove(bus, 50 * 0x1000, &probe[49]);
	bus_read(bus, 50 * 0x1000, data, 4);
	cr_expect_eq(probe[50].reads, 2, "only its owner removes a range");
	bus_remove(bus, 50 * 0x1000, &probe[50]);
	bus_read(bus, 50 * 0x1000, data, 4);
	cr_expect_eq(probe[50].reads, 2);
	bus_destroy(bus);
}

Test(bus, a_handler_may_move_its_range, .timeout = 10)
{
	struct bus *bus = create();
	struct probe a = {.bus = bus, .move_from = 0x1000, .move_to = 0x2000};
	uint8_t data[4] = {0};
	cr_assert_eq(bus_add(bus, "a", 0x1000, 0x100, &probe_ops, &a, NULL), 0);
	bus_write(bus, 0x1000, data, 4);
	bus_read(bus, 0x2004, data, 4);
	cr_expect_eq(a.reads, 1);
	bus_read(bus, 0x1004, data, 4);
	cr_expect_eq(a.reads, 1);
	bus_destroy(bus);
}
