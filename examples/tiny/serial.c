#include "serial.h"

#include "cpu.h"

enum {
	COM1_DATA = 0x3f8,
	COM1_INTERRUPTS = 0x3f9,
	COM1_FIFO = 0x3fa,
	COM1_LINE_CONTROL = 0x3fb,
	COM1_MODEM_CONTROL = 0x3fc,
	COM1_LINE_STATUS = 0x3fd,
};

#define LINE_STATUS_INPUT     0x01
#define LINE_STATUS_OUT_EMPTY 0x20
#define TRANSMIT_FIFO_BYTES   16u

void serial_start(struct serial *serial)
{
	serial->head = serial->tail = 0;
	serial->room_bytes = 0;
	serial->command_bytes = 0;
	serial->input_waits = false;
	outb(COM1_INTERRUPTS, 0);
	outb(COM1_LINE_CONTROL, 0x03); /* 8 bits, no parity, one stop bit */
	outb(COM1_FIFO, 0x01);
	outb(COM1_MODEM_CONTROL, 0x03);
}

static void read_status(struct serial *serial)
{
	uint8_t status = inb(COM1_LINE_STATUS);

	serial->input_waits = status & LINE_STATUS_INPUT;
	if (status & LINE_STATUS_OUT_EMPTY)
		serial->room_bytes = TRANSMIT_FIFO_BYTES;
}

static void send_byte(struct serial *serial)
{
	outb(COM1_DATA, (uint8_t)serial->ring[serial->tail++ % SERIAL_RING_BYTES]);
	serial->room_bytes--;
}

static void send_turn(struct serial *serial)
{
	if (serial->room_bytes)
		send_byte(serial);
	else
		read_status(serial);
}

void serial_drain(struct serial *serial)
{
	while (serial->tail != serial->head)
		send_turn(serial);
}

bool serial_print(struct serial *serial, struct line *line)
{
	bool waited = false;
	size_t i;

	line_finish(line);
	if (SERIAL_RING_BYTES - (serial->head - serial->tail) < line->length) {
		serial_drain(serial);
		waited = true;
	}
	for (i = 0; i < line->length; i++)
		serial->ring[serial->head++ % SERIAL_RING_BYTES] = line->text[i];
	return waited;
}

bool serial_busy(const struct serial *serial) { return serial->tail != serial->head || serial->input_waits; }

static const char *take_byte(struct serial *serial)
{
	char c = (char)inb(COM1_DATA);

	if (c != '\n' && c != '\r') {
		if (serial->command_bytes + 1 < sizeof(serial->command))
			serial->command[serial->command_bytes++] = c;
		return NULL;
	}
	if (!serial->command_bytes)
		return NULL;
	serial->command[serial->command_bytes] = '\0';
	serial->command_bytes = 0;
	return serial->command;
}

const char *serial_turn(struct serial *serial, bool look)
{
	const char *command = NULL;

	if (look || serial->input_waits) {
		read_status(serial);
		if (serial->input_waits)
			command = take_byte(serial);
	} else if (serial->tail != serial->head) {
		send_turn(serial);
	}
	return command;
}
