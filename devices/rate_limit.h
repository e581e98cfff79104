/* A limit in bytes a second, with a burst of a tenth of a second or two frames of the largest kind, whichever is more. Header only. */
#ifndef VMCP_DEVICES_RATE_LIMIT_H
#define VMCP_DEVICES_RATE_LIMIT_H

#include <stdint.h>

#include "base/bytes.h"

#define RATE_LIMIT_BURST_BYTES (128ull << 10)
#define RATE_LIMIT_BURST_NS    100000000ull

struct rate_limit {
	uint64_t bytes_per_s; /* 0: none */
	uint64_t due_ns;      /* when all that was taken would have passed at this rate */
};

/* How long the next must wait at `now_ns`, 0: not at all. */
static inline uint64_t rate_limit_wait_ns(const struct rate_limit *limit, uint64_t now_ns)
{
	if (limit->bytes_per_s == 0)
		return 0;
	uint64_t burst_ns = max_u64(RATE_LIMIT_BURST_NS, RATE_LIMIT_BURST_BYTES * 1000000000ull / limit->bytes_per_s);
	return limit->due_ns > now_ns + burst_ns ? limit->due_ns - now_ns - burst_ns : 0;
}

/* `bytes`: at most 1 MiB. */
static inline void rate_limit_take(struct rate_limit *limit, uint64_t now_ns, uint64_t bytes)
{
	if (limit->bytes_per_s != 0)
		limit->due_ns = max_u64(limit->due_ns, now_ns) + bytes * 1000000000ull / limit->bytes_per_s;
}

#endif
