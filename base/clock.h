/* Time. Header only. */
#ifndef VMCP_BASE_CLOCK_H
#define VMCP_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Monotonic nanoseconds; never goes back; not comparable between boots. */
static inline uint64_t clock_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
/* The same clock, a few milliseconds late at most: for what happens often and is asked for in tenths of seconds. */
static inline uint64_t clock_coarse_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
/* Nanoseconds since 1970, UTC. */
static inline uint64_t clock_wall_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
