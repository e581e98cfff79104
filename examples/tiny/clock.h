/* Time: the TSC, its frequency, and the gaps that somebody tore into it. */
#ifndef TINY_CLOCK_H
#define TINY_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

struct clock {
	uint64_t khz;
	uint64_t start_tsc;
	bool measured; /* false: told by the command line, or a guess because the PIT does not count */
};

/* told_khz 0: measure against channel 2 of the PIT, which takes about 60 ms. */
void clock_start(struct clock *clock, uint64_t told_khz);
uint64_t clock_to_ns(const struct clock *clock, uint64_t cycles);
uint64_t clock_to_ms(const struct clock *clock, uint64_t cycles);
uint64_t clock_from_us(const struct clock *clock, uint64_t us);

/* How long something is waited for awake. A pause, and the time from a checkpoint to a start from it, count as one small step. */
struct patience {
	uint64_t last_tsc, waited; /* cycles */
};

void patience_begin(struct patience *patience);
/* In each turn of the waiting; true once it has waited for `us` in all. */
bool patience_ends(struct patience *patience, const struct clock *clock, uint64_t us);

#define GAP_LIMITS 6

/*
 * A gap is the time between two consecutive steps: a step is a page write, or the rest of a turn of the main loop.
 * Everything is inside: disk requests, port and device accesses, faults, interrupts of the host, and any pause of the
 * VM that lets the TSC run on. Only what gap_restart() follows is left out.
 */
struct gap {
	uint64_t last_tsc;
	uint64_t max_cycles;
	uint64_t max_at_tsc;
	uint64_t steps;
	uint64_t backward; /* times that the TSC went back: must stay 0 */
	uint64_t limit_cycles[GAP_LIMITS];
	uint64_t over[GAP_LIMITS]; /* gaps above each limit; a gap counts under every limit that it passes */
};

extern const uint32_t gap_limits_us[GAP_LIMITS];

void gap_reset(struct gap *gap, const struct clock *clock);
void gap_restart(struct gap *gap);
void gap_note_long(struct gap *gap, uint64_t now, uint64_t cycles);

static inline void gap_note(struct gap *gap, uint64_t now)
{
	uint64_t cycles = now - gap->last_tsc;

	gap->last_tsc = now;
	gap->steps++;
	if (cycles > gap->max_cycles)
		gap_note_long(gap, now, cycles);
	else if (cycles > gap->limit_cycles[0])
		gap_note_long(gap, now, cycles);
}

#endif
