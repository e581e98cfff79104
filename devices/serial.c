#include "devices/serial.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"

#define PORTS	   8u
#define FIFO_BYTES 16u

/* Registers. */
enum {
	REG_DATA = 0,
	REG_IER = 1,
	REG_IIR_FCR = 2,
	REG_LCR = 3,
	REG_MCR = 4,
	REG_LSR = 5,
	REG_MSR = 6,
	REG_SCRATCH = 7
};

#define IER_RECEIVED	      0x01
#define IER_TRANSMITTER_EMPTY 0x02
#define IER_LINE_STATUS	      0x04
#define IER_MODEM_STATUS      0x08
#define IER_MASK	      0x0f

#define IIR_NONE	      0x01
#define IIR_MODEM_STATUS      0x00
#define IIR_TRANSMITTER_EMPTY 0x02
#define IIR_RECEIVED	      0x04
#define IIR_LINE_STATUS	      0x06
#define IIR_TIME_OUT	      0x0c
#define IIR_FIFO_ENABLED      0xc0

#define FCR_ENABLE	   0x01
#define FCR_CLEAR_RECEIVER 0x02
#define FCR_TRIGGER_SHIFT  6
#define FCR_KEPT	   0xc9 /* enable, DMA mode, trigger level */

#define LCR_DIVISOR_ACCESS 0x80

#define MCR_DTR	 0x01
#define MCR_RTS	 0x02
#define MCR_OUT1 0x04
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10
#define MCR_MASK 0x1f

#define LSR_DATA_READY	      0x01
#define LSR_OVERRUN	      0x02
#define LSR_TRANSMITTER_EMPTY 0x60 /* holding register and shift register */

#define MSR_CTS	     0x10
#define MSR_DSR	     0x20
#define MSR_RI	     0x40
#define MSR_DCD	     0x80
#define MSR_DELTA_RI 0x04 /* set by the trailing edge only; the other deltas by both */

/* What a guest can see. */
struct serial_state {
	uint8_t ier, fcr, lcr, mcr, scratch, divisor_low, divisor_high;
	uint8_t msr_delta;
	uint8_t overrun;	   /* 0 or 1 */
	uint8_t transmitter_empty; /* 0 or 1: the interrupt of that name waits */
	uint32_t received_count;
	uint8_t received[FIFO_BYTES]; /* oldest first */
};

static const struct codec_field serial_fields[] = {
	CODEC_INT(struct serial_state, ier, CODEC_U8),
	CODEC_INT(struct serial_state, fcr, CODEC_U8),
	CODEC_INT(struct serial_state, lcr, CODEC_U8),
	CODEC_INT(struct serial_state, mcr, CODEC_U8),
	CODEC_INT(struct serial_state, scratch, CODEC_U8),
	CODEC_INT(struct serial_state, divisor_low, CODEC_U8),
	CODEC_INT(struct serial_state, divisor_high, CODEC_U8),
	CODEC_INT(struct serial_state, msr_delta, CODEC_U8),
	CODEC_INT(struct serial_state, overrun, CODEC_U8),
	CODEC_INT(struct serial_state, transmitter_empty, CODEC_U8),
	CODEC_VRAW(struct serial_state, received, received_count),
	CODEC_END,
};
static const struct codec_table serial_table = {"serial", sizeof(struct serial_state), serial_fields};

struct serial {
	struct isa_platform platform; /* immutable */
	struct serial_config config;  /* immutable */
	pthread_mutex_t
		lock; /* a leaf but for the interrupt line, which is set under it so that levels come in order */
	struct serial_state state; /* under lock */
	bool line;		   /* under lock: the level as last set */
	bool starved;		   /* under lock: serial_input left bytes behind */
};

static unsigned fifo_capacity(const struct serial_state *s) { return s->fcr & FCR_ENABLE ? FIFO_BYTES : 1; }

static unsigned trigger_level(const struct serial_state *s)
{
	static const uint8_t levels[] = {1, 4, 8, 14};

	return s->fcr & FCR_ENABLE ? levels[s->fcr >> FCR_TRIGGER_SHIFT] : 1;
}

/* The waiting interrupt of the highest priority (data sheet, table IV). */
static uint8_t interrupt_id(const struct serial_state *s)
{
	if ((s->ier & IER_LINE_STATUS) && s->overrun)
		return IIR_LINE_STATUS;
	if ((s->ier & IER_RECEIVED) && s->received_count > 0)
		return s->received_count >= trigger_level(s) ? IIR_RECEIVED : IIR_TIME_OUT;
	if ((s->ier & IER_TRANSMITTER_EMPTY) && s->transmitter_empty)
		return IIR_TRANSMITTER_EMPTY;
	if ((s->ier & IER_MODEM_STATUS) && s->msr_delta)
		return IIR_MODEM_STATUS;
	return IIR_NONE;
}

/* Says only changes: most accesses are single bytes of output, and each word to the kernel costs a system call. */
static void update_line(struct serial *serial)
{
	bool level = interrupt_id(&serial->state) != IIR_NONE;

	if (level != serial->line)
		serial->platform.irq_set(serial->platform.opaque, serial->config.gsi, level);
	serial->line = level;
}

/* A byte that arrives, from outside or looped back. */
static void receive(struct serial_state *s, uint8_t byte)
{
	if (s->received_count < fifo_capacity(s))
		s->received[s->received_count++] = byte;
	else
		s->overrun = 1;
}

static uint8_t take_received(struct serial_state *s)
{
	uint8_t byte = s->received[0];

	if (s->received_count == 0)
		return 0;
	s->received_count--;
	memmove(s->received, s->received + 1, s->received_count);
	return byte;
}

/* Modem lines: those of the partner, or in loopback our own outputs (data sheet, 8.6). */
static uint8_t modem_lines(const struct serial_state *s)
{
	uint8_t lines = 0;

	if (!(s->mcr & MCR_LOOP))
		return MSR_DCD | MSR_DSR | MSR_CTS;
	lines |= s->mcr & MCR_RTS ? MSR_CTS : 0;
	lines |= s->mcr & MCR_DTR ? MSR_DSR : 0;
	lines |= s->mcr & MCR_OUT1 ? MSR_RI : 0;
	lines |= s->mcr & MCR_OUT2 ? MSR_DCD : 0;
	return lines;
}

static void write_mcr(struct serial_state *s, uint8_t value)
{
	uint8_t before = modem_lines(s);

	s->mcr = value & MCR_MASK;
	uint8_t after = modem_lines(s), changed = (uint8_t)((before ^ after) >> 4);
	if (after & MSR_RI)
		changed &= (uint8_t)~MSR_DELTA_RI;
	s->msr_delta |= changed;
}

static void write_fcr(struct serial_state *s, uint8_t value)
{
	/* Switching the FIFOs on or off empties them. */
	if ((value & FCR_CLEAR_RECEIVER) || ((value ^ s->fcr) & FCR_ENABLE))
		s->received_count = 0;
	s->fcr = value & FCR_ENABLE ? value & FCR_KEPT : 0;
}

/* --- guest accesses, under lock --- */

static uint8_t read_register(struct serial_state *s, unsigned reg)
{
	uint8_t value;

	switch (reg) {
	case REG_DATA:
		return s->lcr & LCR_DIVISOR_ACCESS ? s->divisor_low : take_received(s);
	case REG_IER:
		return s->lcr & LCR_DIVISOR_ACCESS ? s->divisor_high : s->ier;
	case REG_IIR_FCR:
		value = interrupt_id(s);
		/* Reading it answers this one interrupt. */
		if (value == IIR_TRANSMITTER_EMPTY)
			s->transmitter_empty = 0;
		return value | (s->fcr & FCR_ENABLE ? IIR_FIFO_ENABLED : 0);
	case REG_LCR:
		return s->lcr;
	case REG_MCR:
		return s->mcr;
	case REG_LSR:
		value = LSR_TRANSMITTER_EMPTY;
		value |= s->received_count > 0 ? LSR_DATA_READY : 0;
		value |= s->overrun ? LSR_OVERRUN : 0;
		s->overrun = 0;
		return value;
	case REG_MSR:
		value = modem_lines(s) | s->msr_delta;
		s->msr_delta = 0;
		return value;
	default:
		return s->scratch;
	}
}

/* True if the byte goes out. */
static bool write_register(struct serial_state *s, unsigned reg, uint8_t value)
{
	switch (reg) {
	case REG_DATA:
		if (s->lcr & LCR_DIVISOR_ACCESS) {
			s->divisor_low = value;
			return false;
		}
		s->transmitter_empty = 1; /* again, at once */
		if (s->mcr & MCR_LOOP) {
			receive(s, value);
			return false;
		}
		return true;
	case REG_IER:
		if (s->lcr & LCR_DIVISOR_ACCESS) {
			s->divisor_high = value;
			return false;
		}
		/* Enabling the interrupt finds the transmitter empty. */
		if ((value & IER_TRANSMITTER_EMPTY) && !(s->ier & IER_TRANSMITTER_EMPTY))
			s->transmitter_empty = 1;
		s->ier = value & IER_MASK;
		return false;
	case REG_IIR_FCR:
		write_fcr(s, value);
		return false;
	case REG_LCR:
		s->lcr = value;
		return false;
	case REG_MCR:
		write_mcr(s, value);
		return false;
	case REG_SCRATCH:
		s->scratch = value;
		return false;
	default:
		return false; /* LSR and MSR are read only */
	}
}

/* Bytes left outside may come now. When all were read, and not one by one: a guest then gets a whole FIFO each time. */
static bool wants_more(struct serial *serial)
{
	if (!serial->starved || serial->state.received_count > 0 || (serial->state.mcr & MCR_LOOP))
		return false;
	serial->starved = false;
	return true;
}

static void read_ports(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct serial *serial = opaque;

	pthread_mutex_lock(&serial->lock);
	for (unsigned i = 0; i < size; i++)
		data[i] = read_register(&serial->state, (unsigned)offset + i);
	update_line(serial);
	bool room = wants_more(serial);
	pthread_mutex_unlock(&serial->lock);
	if (room && serial->config.room)
		serial->config.room(serial->config.opaque);
}

static void write_ports(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct serial *serial = opaque;
	bool out = false;

	pthread_mutex_lock(&serial->lock);
	/* Only the first of the ports can send. */
	for (unsigned i = 0; i < size; i++)
		out |= write_register(&serial->state, (unsigned)offset + i, data[i]);
	update_line(serial);
	bool room = wants_more(serial);
	pthread_mutex_unlock(&serial->lock);
	if (out && serial->config.output)
		serial->config.output(serial->config.opaque, data, 1);
	if (room && serial->config.room)
		serial->config.room(serial->config.opaque);
}

size_t serial_input(struct serial *serial, const uint8_t *data, size_t length)
{
	size_t taken = 0;

	pthread_mutex_lock(&serial->lock);
	struct serial_state *s = &serial->state;
	/* In loopback the receiver hears only its own transmitter: what comes from outside waits there. */
	while (taken < length && s->received_count < fifo_capacity(s) && !(s->mcr & MCR_LOOP))
		receive(s, data[taken++]);
	serial->starved = taken < length;
	if (taken > 0)
		update_line(serial);
	pthread_mutex_unlock(&serial->lock);
	return taken;
}

/* --- life and state --- */

static const struct bus_ops serial_ops = {.read = read_ports, .write = write_ports};

int serial_create(const struct isa_platform *platform, const struct serial_config *config, struct serial **out,
		  struct err *err)
{
	struct serial *serial = xcalloc(1, sizeof(*serial));

	serial->platform = *platform;
	serial->config = *config;
	pthread_mutex_init(&serial->lock, NULL);
	serial->state.divisor_low = 1; /* 115200 baud */
	int r = bus_add(platform->pio, "serial", config->port, PORTS, &serial_ops, serial, err);
	if (r < 0) {
		pthread_mutex_destroy(&serial->lock);
		free(serial);
		return r;
	}
	*out = serial;
	return 0;
}

void serial_destroy(struct serial *serial)
{
	if (!serial)
		return;
	bus_remove(serial->platform.pio, serial->config.port, serial);
	pthread_mutex_destroy(&serial->lock);
	free(serial);
}

static int capture(void *opaque, void *state, struct err *err)
{
	struct serial *serial = opaque;

	(void)err;
	pthread_mutex_lock(&serial->lock);
	*(struct serial_state *)state = serial->state;
	pthread_mutex_unlock(&serial->lock);
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	const struct serial_state *s = state;

	(void)opaque;
	if (s->received_count > fifo_capacity(s) || (s->ier & ~IER_MASK) || (s->mcr & ~MCR_MASK) ||
	    (s->fcr & ~FCR_KEPT))
		return err_set(err, ERR_DAMAGED, EINVAL, "serial: impossible register values");
	return 0;
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct serial *serial = opaque;

	(void)err;
	pthread_mutex_lock(&serial->lock);
	serial->state = *(const struct serial_state *)state;
	/* Whatever level the line had; an edge that the irqchip's state has seen already does not count twice. */
	serial->line = interrupt_id(&serial->state) != IIR_NONE;
	serial->platform.irq_set(serial->platform.opaque, serial->config.gsi, serial->line);
	bool room = wants_more(serial);
	pthread_mutex_unlock(&serial->lock);
	if (room && serial->config.room)
		serial->config.room(serial->config.opaque);
	return 0;
}

struct component serial_component(struct serial *serial, uint32_t instance)
{
	return (struct component){
		.id = "serial",
		.instance = instance,
		.version = 1,
		.table = &serial_table,
		.opaque = serial,
		.capture = capture,
		.validate = validate,
		.apply = apply,
	};
}
