/*
 * A wait for others that may last: how it is told to end, and who hears what it waits for.
 */
#ifndef VMCP_BASE_WAIT_H
#define VMCP_BASE_WAIT_H

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "base/clock.h"

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

/* A request to a disk that is waited for, and how many others are; bytes 0: it has no range. since_ns: by clock_coarse_ns. */
static inline void wait_describe_request(char *text, size_t size, const char *kind, uint64_t bytes, uint64_t sector, uint64_t since_ns, unsigned others)
{
	char range[64] = "", more[48] = "";
	if (bytes > 0)
		snprintf(range, sizeof(range), " of %" PRIu64 " bytes at sector %" PRIu64, bytes, sector);
	if (others > 0)
		snprintf(more, sizeof(more), ", and %u others", others);
	snprintf(text, size, "a %s%s, for %.1f s%s", kind, range, (double)(clock_coarse_ns() - since_ns) / 1e9, more);
}

#endif
