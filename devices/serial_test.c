#include "devices/isa_test.h"
#include "devices/serial.h"

#define COM1 SERIAL_COM1_PORT
#define GSI  SERIAL_COM1_GSI

struct fixture {
	struct test_machine m;
	struct serial *serial;
	struct component component;
	char out[256];
	size_t out_length;
	int rooms;
};

static void output(void *opaque, const uint8_t *data, size_t length)
{
	struct fixture *f = opaque;

	cr_assert_lt(f->out_length + length, sizeof(f->out));
	memcpy(f->out + f->out_length, data, length);
	f->out_length += length;
}

static void room(void *opaque) { ((struct fixture *)opaque)->rooms++; }

static void init(struct fixture *f)
{
	struct err err = ERR_INIT;

	memset(f, 0, sizeof(*f));
	test_machine_init(&f->m);
	struct serial_config config = {.port = COM1, .gsi = GSI, .output = output, .room = room, .opaque = f};
	cr_assert_eq(serial_create(&f->m.platform, &config, &f->serial, &err), 0, "%s", err.message);
	f->component = serial_component(f->serial, 0);
}

static void end(struct fixture *f)
{
	serial_destroy(f->serial);
	test_machine_end(&f->m);
}

static uint8_t in(struct fixture *f, unsigned reg) { return (uint8_t)test_in(&f->m, (uint16_t)(COM1 + reg), 1); }
static void out(struct fixture *f, unsigned reg, uint8_t value) { test_out(&f->m, (uint16_t)(COM1 + reg), 1, value); }
static size_t type(struct fixture *f, const char *text)
{
	return serial_input(f->serial, (const uint8_t *)text, strlen(text));
}

Test(serial, writes_come_out_in_order)
{
	struct fixture f;

	init(&f);
	for (const char *p = "hello"; *p; p++) {
		cr_expect_eq(in(&f, 5), 0x60);
		out(&f, 0, (uint8_t)*p);
	}
	cr_expect_str_eq(f.out, "hello");
	cr_expect_eq(f.m.edges[GSI], 0, "no interrupt is enabled");
	/* A wide write: the first byte goes out, the second is the next register. */
	test_out(&f.m, COM1, 2, 0x0f21);
	cr_expect_str_eq(f.out, "hello!");
	cr_expect_eq(in(&f, 1), 0x0f);
	end(&f);
}

Test(serial, divisor_latch_hides_data_and_ier)
{
	struct fixture f;

	init(&f);
	out(&f, 1, 0x05);
	out(&f, 3, 0x83);
	out(&f, 0, 0x34);
	out(&f, 1, 0x12);
	cr_expect_eq(in(&f, 0), 0x34);
	cr_expect_eq(in(&f, 1), 0x12);
	out(&f, 3, 0x03);
	cr_expect_eq(in(&f, 1), 0x05);
	cr_expect_eq(f.out_length, 0);
	out(&f, 7, 0x5a);
	cr_expect_eq(in(&f, 7), 0x5a);
	out(&f, 1, 0xff);
	cr_expect_eq(in(&f, 1), 0x0f, "the upper half of IER is not there");
	end(&f);
}

/* What Linux' 8250 driver looks at to tell a 16550A. */
Test(serial, is_recognised_as_16550a)
{
	struct fixture f;

	init(&f);
	out(&f, 4, 0x1a);
	cr_expect_eq(in(&f, 6) & 0xf0, 0x90, "loopback: OUT2 to DCD, RTS to CTS");
	out(&f, 4, 0x00);
	cr_expect_eq(in(&f, 6) & 0xf0, 0xb0);
	cr_expect_eq(in(&f, 2), 0x01, "no FIFO bits before the FIFO is on");
	out(&f, 2, 0x01);
	cr_expect_eq(in(&f, 2), 0xc1);
	out(&f, 2, 0x21);
	cr_expect_eq(in(&f, 2) & 0xe0, 0xc0, "not a 16750");
	end(&f);
}

Test(serial, transmitter_interrupt)
{
	struct fixture f;

	init(&f);
	out(&f, 1, 0x02);
	cr_expect(f.m.line[GSI], "it is empty when the interrupt is enabled");
	cr_expect_eq(in(&f, 2), 0x02);
	cr_expect_not(f.m.line[GSI], "reading IIR answers it");
	cr_expect_eq(in(&f, 2), 0x01);
	out(&f, 0, 'x');
	cr_expect(f.m.line[GSI]);
	out(&f, 1, 0x00);
	cr_expect_not(f.m.line[GSI]);
	out(&f, 1, 0x02);
	cr_expect(f.m.line[GSI], "enabling it again raises it again");
	end(&f);
}

Test(serial, input_without_fifo)
{
	struct fixture f;

	init(&f);
	out(&f, 1, 0x01);
	cr_expect_eq(type(&f, "ab"), 1);
	cr_expect(f.m.line[GSI]);
	cr_expect_eq(in(&f, 2), 0x04);
	cr_expect_eq(in(&f, 5), 0x61);
	cr_expect_eq(f.rooms, 0);
	cr_expect_eq(in(&f, 0), 'a');
	cr_expect_eq(f.rooms, 1);
	cr_expect_not(f.m.line[GSI]);
	cr_expect_eq(in(&f, 5), 0x60);
	cr_expect_eq(in(&f, 0), 0, "nothing is there");
	end(&f);
}

Test(serial, input_with_fifo_and_trigger)
{
	struct fixture f;

	init(&f);
	out(&f, 2, 0x81); /* trigger level 8 */
	out(&f, 1, 0x01);
	cr_expect_eq(type(&f, "1234567"), 7);
	cr_expect_eq(in(&f, 2), 0xcc, "below the level: time-out");
	cr_expect_eq(type(&f, "8"), 1);
	cr_expect_eq(in(&f, 2), 0xc4);
	cr_expect_eq(type(&f, "90abcdefXYZ"), 8, "sixteen in all");
	cr_expect_eq(type(&f, "XYZ"), 0);
	for (const char *p = "1234567890abcde"; *p; p++)
		cr_expect_eq(in(&f, 0), *p);
	cr_expect(f.m.line[GSI], "one is left");
	cr_expect_eq(f.rooms, 0, "room is told of when all were read");
	cr_expect_eq(in(&f, 0), 'f');
	cr_expect_eq(f.rooms, 1);
	cr_expect_not(f.m.line[GSI]);
	cr_expect_eq(type(&f, "XYZ"), 3);
	out(&f, 2, 0x83);
	cr_expect_not(f.m.line[GSI], "the FIFO was cleared");
	cr_expect_eq(in(&f, 5), 0x60);
	end(&f);
}

Test(serial, loopback_keeps_to_itself)
{
	struct fixture f;

	init(&f);
	out(&f, 4, 0x10);
	out(&f, 0, 'q');
	cr_expect_eq(f.out_length, 0);
	cr_expect_eq(type(&f, "z"), 0);
	cr_expect_eq(in(&f, 5), 0x61);
	out(&f, 0, 'r');
	cr_expect_eq(in(&f, 5), 0x63, "overrun");
	cr_expect_eq(in(&f, 5), 0x61, "reading clears it");
	cr_expect_eq(in(&f, 0), 'q');
	cr_expect_eq(f.rooms, 0);
	out(&f, 4, 0x00);
	cr_expect_eq(f.rooms, 1, "what waited outside may come now");
	end(&f);
}

Test(serial, modem_status_deltas_and_priorities)
{
	struct fixture f;

	init(&f);
	out(&f, 4, 0x10);
	in(&f, 6);
	out(&f, 1, 0x0f);
	in(&f, 2); /* answers the transmitter */
	out(&f, 4, 0x1f);
	cr_expect_eq(in(&f, 2), 0x00, "modem status");
	cr_expect_eq(in(&f, 6), 0xfb, "all lines up; RI counts when it falls");
	cr_expect_eq(in(&f, 6), 0xf0);
	out(&f, 4, 0x1b);
	cr_expect_eq(in(&f, 6), 0xb4);
	/* Everything at once: answered in the order of their priorities. */
	out(&f, 4, 0x10);
	out(&f, 0, 'a');
	out(&f, 0, 'b');
	cr_expect_eq(in(&f, 2), 0x06);
	in(&f, 5);
	cr_expect_eq(in(&f, 2), 0x04);
	in(&f, 0);
	cr_expect_eq(in(&f, 2), 0x02);
	cr_expect_eq(in(&f, 2), 0x00);
	in(&f, 6);
	cr_expect_eq(in(&f, 2), 0x01);
	cr_expect_not(f.m.line[GSI]);
	end(&f);
}

Test(serial, state_is_carried)
{
	struct fixture a, b;

	init(&a);
	init(&b);
	out(&a, 2, 0xc1);
	out(&a, 3, 0x03);
	out(&a, 1, 0x03);
	type(&a, "abc");
	type(&b, "other");
	test_carry_state(&a.component, &b.component);
	cr_expect(b.m.line[GSI]);
	for (const char *p = "abc"; *p; p++)
		cr_expect_eq(in(&b, 0), *p);
	cr_expect_eq(in(&b, 2), 0xc2);
	cr_expect_not(b.m.line[GSI]);
	/* And back to a state without an interrupt: the line falls. */
	type(&a, "d");
	cr_expect(a.m.line[GSI]);
	test_carry_state(&b.component, &a.component);
	cr_expect_not(a.m.line[GSI]);
	end(&a);
	end(&b);
}

Test(serial, damaged_state_is_refused)
{
	struct fixture f;
	uint8_t state[256] = {0};
	struct err err = ERR_INIT;

	init(&f);
	cr_assert_leq(f.component.table->size, sizeof(state));
	cr_expect_eq(f.component.validate(f.component.opaque, state, &err), 0);
	state[0] = 0xf0; /* IER */
	cr_expect_lt(f.component.validate(f.component.opaque, state, &err), 0);
	cr_expect_eq(err.class, ERR_DAMAGED);
	end(&f);
}
