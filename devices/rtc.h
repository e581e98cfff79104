/*
 * A real-time clock with CMOS memory: MC146818A (its data sheet) at ports 0x70 and 0x71.
 *
 * It shows the host's UTC time of day plus an offset, which is 0 until the guest sets the clock; so after a revert it
 * is right again without help. Interrupts (alarm, end of update, periodic) come from a timer on an event loop; the
 * flags that a guest polls are right without.
 *
 * Threads: none of its own; the loop's thread and vCPU threads meet under its lock.
 */
#ifndef VMCP_DEVICES_RTC_H
#define VMCP_DEVICES_RTC_H

#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/isa.h"

#define RTC_PORT 0x70u
#define RTC_GSI	 8u

struct rtc;

struct rtc_config {
	uint64_t memory_bytes; /* for the bytes in which a PC's firmware leaves the memory size */
	struct loop *loop;     /* NULL: no interrupts */
};

/* Before the VM and the loop run (or in the loop's thread). */
int rtc_create(const struct isa_platform *platform, const struct rtc_config *config, struct rtc **out, struct err *err);
/* The VM does not run, nor does the loop (or in its thread). NULL is allowed. */
void rtc_destroy(struct rtc *rtc);

/* The clock shows `ns` less than it did, as if the guest had set it. Before the VM runs, after the load of a state. */
void rtc_set_back(struct rtc *rtc, uint64_t ns);

struct component rtc_component(struct rtc *rtc);

#endif
