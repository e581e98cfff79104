/* A machine of its own for tests of devices/isa.h's devices: real buses, recorded lines, a clock that stands still. */
#ifndef VMCP_DEVICES_ISA_TEST_H
#define VMCP_DEVICES_ISA_TEST_H

#include <criterion/criterion.h>
#include <string.h>

#include "base/buf.h"
#include "devices/isa.h"

struct test_machine {
	struct isa_platform platform;
	bool line[VM_GSI_PINS];
	unsigned edges[VM_GSI_PINS]; /* times a line rose */
	int stops;
	enum vm_stop_reason stop_reason;
	uint64_t now_ns, wall_ns;
};

static inline void test_irq_set(void *opaque, unsigned gsi, bool level)
{
	struct test_machine *m = opaque;

	m->edges[gsi] += level && !m->line[gsi];
	m->line[gsi] = level;
}

static inline void test_stop(void *opaque, enum vm_stop_reason reason)
{
	struct test_machine *m = opaque;

	m->stops++;
	m->stop_reason = reason;
}

static inline uint64_t test_now_ns(void *opaque) { return ((struct test_machine *)opaque)->now_ns; }
static inline uint64_t test_wall_ns(void *opaque) { return ((struct test_machine *)opaque)->wall_ns; }

static inline void test_machine_init(struct test_machine *m)
{
	struct err err = ERR_INIT;

	*m = (struct test_machine){.platform = {.irq_set = test_irq_set,
						.stop = test_stop,
						.now_ns = test_now_ns,
						.wall_ns = test_wall_ns,
						.opaque = m}};
	cr_assert_eq(bus_create("test", &m->platform.pio, &err), 0, "%s", err.message);
}

static inline void test_machine_end(struct test_machine *m) { bus_destroy(m->platform.pio); }

static inline uint32_t test_in(struct test_machine *m, uint16_t port, unsigned size)
{
	uint8_t data[4] = {0};

	bus_read(m->platform.pio, port, data, size);
	return (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
}

static inline void test_out(struct test_machine *m, uint16_t port, unsigned size, uint32_t value)
{
	uint8_t data[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};

	bus_write(m->platform.pio, port, data, size);
}

/* Carries a device's state to another one the way a checkpoint does: captured, encoded, decoded, validated, applied. */
static inline void test_carry_state(const struct component *from, const struct component *to)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	void *state = xcalloc(1, from->table->size);
	struct err err = ERR_INIT;

	cr_assert_eq(from->capture(from->opaque, state, &err), 0);
	cr_assert_eq(codec_encode(from->table, state, &buf, &err), 0, "%s", err.message);
	memset(state, 0xa5, from->table->size);
	cr_assert_eq(codec_decode(to->table, buf.data, buf.length, state, &err), 0, "%s", err.message);
	cr_assert_eq(to->validate(to->opaque, state, &err), 0, "%s", err.message);
	cr_assert_eq(to->apply(to->opaque, state, &err), 0, "%s", err.message);
	free(state);
}

#endif
