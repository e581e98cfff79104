/*
 * A 16550A UART (PC16550D data sheet) at the ports of COM1.
 *
 * It is infinitely fast: the transmitter is always empty, and received bytes that do not reach the trigger level are
 * announced at once by the time-out interrupt. Modem lines say that a partner is there and ready.
 *
 * Threads: serial_input from any thread; callbacks come from the thread that caused them, without a lock of the port's
 * held.
 */
#ifndef VMCP_DEVICES_SERIAL_H
#define VMCP_DEVICES_SERIAL_H

#include <stddef.h>
#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "devices/isa.h"

#define SERIAL_COM1_PORT 0x3f8u
#define SERIAL_COM1_GSI	 4u

struct serial;

struct serial_config {
	uint16_t port; /* of 8 */
	unsigned gsi;
	/* The guest's output, in order for each vCPU. Must not block. */
	void (*output)(void *opaque, const uint8_t *data, size_t length);
	/* There is room again after serial_input took less than it was given. Must not block; may call serial_input.
	 * Optional. */
	void (*room)(void *opaque);
	void *opaque;
};

/* Before the VM runs. */
int serial_create(const struct isa_platform *platform, const struct serial_config *config, struct serial **out,
		  struct err *err);
/* The VM does not run. NULL is allowed. */
void serial_destroy(struct serial *serial);
/* Bytes for the guest; returns how many were taken, which may be none. */
size_t serial_input(struct serial *serial, const uint8_t *data, size_t length);

struct component serial_component(struct serial *serial, uint32_t instance);

#endif
