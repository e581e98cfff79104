/* Random schedules: each is wholly told by its seed, so that a failing one can be run again alone. */
#ifndef VMCP_TESTS_INFLIGHT_SCHEDULES_H
#define VMCP_TESTS_INFLIGHT_SCHEDULES_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/disk/sectors.h"
#include "tests/lib/check.h"

static inline uint64_t schedules_env(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);
	return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

/* A schedule that hangs says which it is, and ends the program. */
static volatile unsigned long long schedules_seed;
static inline void schedules_hang(int number)
{
	char text[96];
	int length = snprintf(text, sizeof(text), "hangs with INFLIGHT_SEED=%llu INFLIGHT_SCHEDULES=1\n", schedules_seed);
	(void)number;
	if (length < 0 || write(STDERR_FILENO, text, (size_t)length) < 0)
		_exit(3);
	_exit(2);
}

/* INFLIGHT_SEED: of the first schedule; INFLIGHT_SCHEDULES: how many; INFLIGHT_SCALE: how many times `count`. Stops at the first that fails. */
static inline void schedules_run(const char *name, uint64_t count, void (*run)(uint64_t seed))
{
	uint64_t first = schedules_env("INFLIGHT_SEED", 1);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	count /= 5; /* each takes that much longer */
#endif
	count = schedules_env("INFLIGHT_SCHEDULES", count * schedules_env("INFLIGHT_SCALE", 1));
	for (uint64_t seed = first; seed < first + count; seed++) {
		unsigned long before = atomic_load(&check_failures);
		schedules_seed = seed;
		signal(SIGALRM, schedules_hang);
		alarm(120);
		run(seed);
		alarm(0);
		if (atomic_load(&check_failures) != before) {
			fprintf(stderr, "%s: failed with INFLIGHT_SEED=%llu INFLIGHT_SCHEDULES=1\n", name, (unsigned long long)seed);
			return;
		}
	}
	printf("%s: %llu schedules\n", name, (unsigned long long)count);
}

/* How many were asked for is not what the program's figures are made for. */
static inline bool schedules_asked_for(void) { return getenv("INFLIGHT_SCHEDULES") != NULL; }

static inline uint64_t pick_below(uint64_t *random, uint64_t below) { return next_random(random) % below; }

#endif
