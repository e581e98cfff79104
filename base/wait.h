/*
 * A wait for others that may last: how it is told to end, and who hears what it waits for.
 */
#ifndef VMCP_BASE_WAIT_H
#define VMCP_BASE_WAIT_H

#include <stdbool.h>
#include <stddef.h>

enum {
	WAIT_POLL_MS = 20,   /* how often whoever waits looks at *cancel */
	WAIT_REPORT_MS = 100 /* how long it waits before it reports, and between reports */
};

#define WAIT_TEXT_BYTES 160u /* of a report */

struct wait {
	const volatile bool *cancel; /* turning true ends the wait with -ECANCELED; NULL: never */
	/* Told now and then what is waited for: "a write of 4096 bytes at sector 8, for 1.2 s". In the waiting thread, with no lock held. NULL: nobody. */
	void (*report)(void *opaque, const char *waits_for);
	void *opaque;
};

static inline bool wait_is_cancelled(const struct wait *wait)
{
	return wait && wait->cancel && __atomic_load_n(wait->cancel, __ATOMIC_RELAXED);
}

/* `polls` is the caller's count of them; true where a report is due. */
static inline bool wait_reports(const struct wait *wait, unsigned polls)
{
	return wait && wait->report && polls % (WAIT_REPORT_MS / WAIT_POLL_MS) == WAIT_REPORT_MS / WAIT_POLL_MS - 1;
}

#endif
