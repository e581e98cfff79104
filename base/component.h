/*
 * A component: a part of the machine with state that a checkpoint holds. The checkpoint engine knows machines only as
 * an ordered list of these; devices, vCPUs and the irqchip each offer one.
 *
 * State is a POD struct described by a codec table. In the pause it is only copied (capture); it is encoded later.
 * Loading first decodes and validates the state of every component, then applies them in list order, so that
 * a damaged checkpoint changes nothing.
 *
 * Requests that were in flight at the capture: a component that has such requests records them in capture, and goes on
 * with them after the pause. finish() waits until all of them ended and hands out the completion log: whatever
 * apply_log() needs to give the restored guest the same completions (status, data, used ring, interrupt).
 */
#ifndef VMCP_BASE_COMPONENT_H
#define VMCP_BASE_COMPONENT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/codec.h"
#include "base/err.h"
#include "base/wait.h"

struct component_inflight {
	uint32_t reads;	 /* requests recorded at the last capture, by kind */
	uint32_t writes; /* writes, discards, write-zeroes, flushes */
};

struct component {
	const char *id;	   /* stable name in the saved state: "vcpu", "virtio-blk", ... */
	uint32_t instance; /* tells components of one id apart */
	uint32_t version;  /* of the state's meaning; a load refuses a newer one */
	const struct codec_table *table;
	void *opaque;

	/* Copies the state into `state` (table->size bytes). Called with vCPUs stopped and the I/O thread parked.
	 * Allocates nothing, touches no file, takes no lock that another thread may hold for long. */
	int (*capture)(void *opaque, void *state, struct err *err);
	/* Refuses a decoded state that this machine cannot take (ring outside memory, more vCPUs, unknown feature).
	 * Optional. */
	int (*validate)(void *opaque, const void *state, struct err *err);
	/* Appends what a host must have to take that state, lines of a word, ": " and a list: for people, and for programs that compare. Optional. */
	int (*needs)(void *opaque, const void *state, struct buf *lines, struct err *err);
	/* Puts the state in place. The machine is stopped (or has never run), guest memory is already the
	 * checkpoint's. */
	int (*apply)(void *opaque, const void *state, struct err *err);

	/* Optional, all three or none: requests in flight. */
	void (*inflight)(void *opaque, struct component_inflight *out); /* of the last capture; I/O thread parked */
	/* Waits until every request recorded by the last capture ended, then appends the completion log to *log.
	 * A cancelled wait: -ECANCELED, the message names the oldest request that is waited for, as reports do. Any thread
	 * but the I/O thread. `wait` may be NULL. */
	int (*finish)(void *opaque, struct buf *log, const struct wait *wait, struct err *err);
	/* After apply: gives the guest the logged completions; issues again what the state lists in flight and the
	 * log lacks. The log is untrusted. Runs before the first instruction, interrupts may be raised. */
	int (*apply_log)(void *opaque, const uint8_t *log, size_t length, struct err *err);

	/* Optional: waits until nothing is in flight, without any other effect: completions reach the guest's memory. vCPUs are stopped, so nothing
	 * new comes. The I/O thread is not parked. A cancelled wait as in `finish`. */
	int (*settle)(void *opaque, const struct wait *wait, struct err *err);
	/* Optional: before a revert, ends everything in flight and drops the completions: after it returns nothing
	 * of the device writes guest memory or raises an interrupt. vCPUs are stopped, the I/O thread is *not*
	 * parked. */
	int (*drain)(void *opaque, struct err *err);
};

#endif
