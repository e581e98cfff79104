#include "devices/acpi_pm.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "vmm/acpi.h"

#define EVENT_PORTS   4u
#define CONTROL_PORTS 2u
#define TIMER_PORTS   4u
#define KEYBOARD_PORT 0x64u

#define TIMER_HZ	 3579545u
#define TIMER_MASK	 0xffffffu
#define TIMER_HALF_SHIFT 23 /* every change of the count's top bit sets TMR_STS */

/* PM1 status and enable (4.8.3.1). */
#define PM1_TIMER	 0x0001
#define PM1_POWER_BUTTON 0x0100
#define PM1_STATUS_BITS	 0x8731
#define PM1_ENABLE_BITS	 0x0721
#define PM1_INTERRUPTS	 (PM1_POWER_BUTTON)

/* PM1 control (4.8.3.2). */
#define CONTROL_SCI_ENABLED	 0x0001
#define CONTROL_KEPT		 0x1c02 /* SLP_TYP, BM_RLD */
#define CONTROL_SLEEP_TYPE_SHIFT 10
#define CONTROL_SLEEP_TYPE_MASK	 7u
#define CONTROL_SLEEP_ENABLE	 0x2000

#define RESET_NOW	     0x04 /* bit of port 0xcf9 that resets; bit 1 says how thoroughly */
#define KEYBOARD_PULSE_RESET 0xfe
/* Output buffer always full: a driver that drains it gives up at once. Input buffer empty: a guest that wants to reset
 * by it need not wait. */
#define KEYBOARD_STATUS 0xfd

struct acpi_pm_state {
	uint16_t status, enable, control;
	uint64_t timer;		/* ticks at the capture, of which the guest sees 24 bits */
	uint64_t timer_checked; /* ticks up to which TMR_STS is right */
};

static const struct codec_field acpi_pm_fields[] = {
	CODEC_INT(struct acpi_pm_state, status, CODEC_U16),
	CODEC_INT(struct acpi_pm_state, enable, CODEC_U16),
	CODEC_INT(struct acpi_pm_state, control, CODEC_U16),
	CODEC_INT(struct acpi_pm_state, timer, CODEC_U64),
	CODEC_INT(struct acpi_pm_state, timer_checked, CODEC_U64),
	CODEC_END,
};
static const struct codec_table acpi_pm_table = {"acpi-pm", sizeof(struct acpi_pm_state), acpi_pm_fields};

struct acpi_pm {
	struct isa_platform platform; /* immutable */
	bool reset_port;	      /* immutable, as the next two */
	void (*applied)(void *opaque);
	void *opaque;
	pthread_mutex_t
		lock; /* a leaf but for the interrupt line, which is set under it so that levels come in order */
	struct acpi_pm_state state; /* under lock; `timer` counts up to timer_base_ns */
	uint64_t timer_base_ns;	    /* under lock */
};

/* --- under lock --- */

static uint64_t timer_ticks(struct acpi_pm *pm)
{
	uint64_t ns = pm->platform.now_ns(pm->platform.opaque) - pm->timer_base_ns;

	/* In two steps, as the product of years overflows. */
	return pm->state.timer + ns / 1000000000u * TIMER_HZ + ns % 1000000000u * TIMER_HZ / 1000000000u;
}

static void update_timer_status(struct acpi_pm *pm)
{
	uint64_t ticks = timer_ticks(pm);

	if (ticks >> TIMER_HALF_SHIFT != pm->state.timer_checked >> TIMER_HALF_SHIFT)
		pm->state.status |= PM1_TIMER;
	pm->state.timer_checked = ticks;
}

static void update_sci(struct acpi_pm *pm)
{
	bool level = pm->state.status & pm->state.enable & PM1_INTERRUPTS;

	pm->platform.irq_set(pm->platform.opaque, ACPI_SCI_GSI, level);
}

/* --- guest accesses. The registers are wider than a byte and may be accessed by bytes, so accesses go over an image of
 * them. --- */

static void read_event(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint8_t image[EVENT_PORTS];

	pthread_mutex_lock(&pm->lock);
	update_timer_status(pm);
	put_le16(image, pm->state.status);
	put_le16(image + 2, pm->state.enable);
	pthread_mutex_unlock(&pm->lock);
	memcpy(data, image + offset, size);
}

static void write_event(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint8_t image[EVENT_PORTS];

	pthread_mutex_lock(&pm->lock);
	update_timer_status(pm);
	put_le16(image, 0); /* ones written to the status clear, so bytes not written are zero */
	put_le16(image + 2, pm->state.enable);
	memcpy(image + offset, data, size);
	pm->state.status &= (uint16_t)~get_le16(image);
	pm->state.enable = get_le16(image + 2) & PM1_ENABLE_BITS;
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

static void read_control(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint8_t image[CONTROL_PORTS];

	pthread_mutex_lock(&pm->lock);
	put_le16(image, pm->state.control | CONTROL_SCI_ENABLED);
	pthread_mutex_unlock(&pm->lock);
	memcpy(data, image + offset, size);
}

static void write_control(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint8_t image[CONTROL_PORTS];

	pthread_mutex_lock(&pm->lock);
	put_le16(image, pm->state.control);
	memcpy(image + offset, data, size);
	uint16_t value = get_le16(image);
	pm->state.control = value & CONTROL_KEPT;
	pthread_mutex_unlock(&pm->lock);
	if (!(value & CONTROL_SLEEP_ENABLE))
		return;
	unsigned type = value >> CONTROL_SLEEP_TYPE_SHIFT & CONTROL_SLEEP_TYPE_MASK;
	if (type == ACPI_S5_SLEEP_TYPE)
		pm->platform.stop(pm->platform.opaque, VM_STOP_POWER_OFF);
	else
		log_debug("ACPI: the guest wants sleep type %u, which the tables do not offer", type);
}

static void read_timer(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;
	uint8_t image[TIMER_PORTS];

	pthread_mutex_lock(&pm->lock);
	put_le32(image, timer_ticks(pm) & TIMER_MASK);
	pthread_mutex_unlock(&pm->lock);
	memcpy(data, image + offset, size);
}

static void write_reset(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;

	(void)offset;
	(void)size;
	if (data[0] & RESET_NOW)
		pm->platform.stop(pm->platform.opaque, VM_STOP_RESET);
}

static void write_keyboard(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct acpi_pm *pm = opaque;

	(void)offset;
	(void)size;
	if (data[0] == KEYBOARD_PULSE_RESET)
		pm->platform.stop(pm->platform.opaque, VM_STOP_RESET);
}

static void read_keyboard(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	(void)opaque;
	(void)offset;
	memset(data, KEYBOARD_STATUS, size);
}

static void read_zero(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	(void)opaque;
	(void)offset;
	memset(data, 0, size);
}

static void write_nothing(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	(void)opaque;
	(void)offset;
	(void)data;
	(void)size;
}

/* --- life and state --- */

static const struct {
	const char *name;
	uint16_t port;
	uint8_t ports;
	struct bus_ops ops;
} ranges[] = {
	{"ACPI events", ACPI_PM1A_EVT_PORT, EVENT_PORTS, {read_event, write_event}},
	{"ACPI control", ACPI_PM1A_CNT_PORT, CONTROL_PORTS, {read_control, write_control}},
	{"ACPI timer", ACPI_PM_TIMER_PORT, TIMER_PORTS, {read_timer, write_nothing}},
	{"keyboard controller", KEYBOARD_PORT, 1, {read_keyboard, write_keyboard}},
	{"reset control", ACPI_RESET_PORT, 1, {read_zero, write_reset}}, /* the last: not always there */
};

int acpi_pm_create(const struct isa_platform *platform, bool reset_port, struct acpi_pm **out, struct err *err)
{
	struct acpi_pm *pm = xcalloc(1, sizeof(*pm));

	pm->platform = *platform;
	pm->reset_port = reset_port;
	pthread_mutex_init(&pm->lock, NULL);
	pm->timer_base_ns = platform->now_ns(platform->opaque);
	for (size_t i = 0; i < ARRAY_LENGTH(ranges) - !reset_port; i++) {
		int r = bus_add(platform->pio, ranges[i].name, ranges[i].port, ranges[i].ports, &ranges[i].ops, pm,
				err);
		if (r < 0) {
			acpi_pm_destroy(pm);
			return r;
		}
	}
	*out = pm;
	return 0;
}

void acpi_pm_destroy(struct acpi_pm *pm)
{
	if (!pm)
		return;
	for (size_t i = 0; i < ARRAY_LENGTH(ranges); i++)
		bus_remove(pm->platform.pio, ranges[i].port, pm);
	pthread_mutex_destroy(&pm->lock);
	free(pm);
}

void acpi_pm_press_power_button(struct acpi_pm *pm)
{
	pthread_mutex_lock(&pm->lock);
	pm->state.status |= PM1_POWER_BUTTON;
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
}

void acpi_pm_on_apply(struct acpi_pm *pm, void (*applied)(void *opaque), void *opaque)
{
	pm->applied = applied;
	pm->opaque = opaque;
}

static int capture(void *opaque, void *state, struct err *err)
{
	struct acpi_pm *pm = opaque;
	struct acpi_pm_state *out = state;

	(void)err;
	pthread_mutex_lock(&pm->lock);
	*out = pm->state;
	out->timer = timer_ticks(pm);
	pthread_mutex_unlock(&pm->lock);
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	const struct acpi_pm_state *s = state;

	(void)opaque;
	if ((s->status & ~PM1_STATUS_BITS) || (s->enable & ~PM1_ENABLE_BITS) || (s->control & ~CONTROL_KEPT))
		return err_set(err, ERR_DAMAGED, EINVAL, "acpi-pm: impossible register values");
	return 0;
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct acpi_pm *pm = opaque;

	(void)err;
	pthread_mutex_lock(&pm->lock);
	pm->state = *(const struct acpi_pm_state *)state;
	pm->timer_base_ns = pm->platform.now_ns(pm->platform.opaque);
	update_sci(pm);
	pthread_mutex_unlock(&pm->lock);
	if (pm->applied)
		pm->applied(pm->opaque);
	return 0;
}

struct component acpi_pm_component(struct acpi_pm *pm)
{
	return (struct component){
		.id = "acpi-pm",
		.version = 1,
		.table = &acpi_pm_table,
		.opaque = pm,
		.capture = capture,
		.validate = validate,
		.apply = apply,
	};
}
