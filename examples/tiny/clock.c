#include "clock.h"

#include "cpu.h"

enum {
	PIT_CHANNEL2 = 0x42,
	PIT_COMMAND = 0x43,
	PIT_GATE = 0x61,
};

#define PIT_HZ	      1193182u
#define PIT_LATCH2    0x80
#define PIT_MODE2_CH2 0xb4	    /* channel 2, low then high byte, rate generator */
#define TRY_TICKS     (PIT_HZ / 50) /* 20 ms */
#define TRIES	      3
#define STUCK_AFTER   10000 /* samples with the same count: no counter is there */
#define GUESS_KHZ     1000000u

/* One reading of the counter, and the TSC before and after the access that froze it. */
struct sample {
	uint64_t middle_tsc;
	uint64_t width_cycles;
	uint16_t count;
};

static struct sample pit_sample(void)
{
	struct sample sample;
	uint64_t before = cpu_tsc(), after;
	uint8_t low, high;

	outb(PIT_COMMAND, PIT_LATCH2);
	after = cpu_tsc();
	low = inb(PIT_CHANNEL2);
	high = inb(PIT_CHANNEL2);
	sample.count = (uint16_t)(high << 8 | low);
	sample.width_cycles = after - before;
	sample.middle_tsc = before + sample.width_cycles / 2;
	return sample;
}

/* False if the counter does not run. */
static bool pit_try(uint64_t *khz, uint64_t *doubt_cycles)
{
	struct sample first = pit_sample(), last = first, next;
	unsigned int same = 0;
	uint32_t ticks;

	while (same < STUCK_AFTER) {
		next = pit_sample();
		same = next.count == last.count ? same + 1 : 0;
		last = next;
		ticks = (uint16_t)(first.count - last.count); /* it counts down and wraps after 55 ms */
		if (ticks >= TRY_TICKS) {
			*khz = (last.middle_tsc - first.middle_tsc) * PIT_HZ / ticks / 1000;
			*doubt_cycles = first.width_cycles + last.width_cycles;
			return true;
		}
	}
	return false;
}

/*
 * Of several tries the one whose end points are known most exactly. A try that was held up past the wrap of the
 * counter comes out far too high, so anything above 5/4 of the lowest is out of the question.
 */
static bool pit_measure(uint64_t *khz)
{
	uint64_t tried_khz[TRIES], doubt[TRIES], lowest = UINT64_MAX, best_doubt = UINT64_MAX;
	unsigned int i;

	outb(PIT_GATE, (uint8_t)((inb(PIT_GATE) & ~0x02) | 0x01)); /* gate on, speaker off */
	outb(PIT_COMMAND, PIT_MODE2_CH2);
	outb(PIT_CHANNEL2, 0);
	outb(PIT_CHANNEL2, 0);
	for (i = 0; i < TRIES; i++) {
		if (!pit_try(&tried_khz[i], &doubt[i]))
			return false;
		if (tried_khz[i] < lowest)
			lowest = tried_khz[i];
	}
	for (i = 0; i < TRIES; i++) {
		if (tried_khz[i] <= lowest + lowest / 4 && doubt[i] < best_doubt) {
			best_doubt = doubt[i];
			*khz = tried_khz[i];
		}
	}
	return lowest != 0;
}

void clock_start(struct clock *clock, uint64_t told_khz)
{
	clock->start_tsc = cpu_tsc();
	clock->khz = told_khz;
	clock->measured = false;
	if (told_khz)
		return;
	clock->measured = pit_measure(&clock->khz);
	if (!clock->measured)
		clock->khz = GUESS_KHZ;
}

uint64_t clock_to_ns(const struct clock *clock, uint64_t cycles)
{
	return cycles / clock->khz * 1000000 + cycles % clock->khz * 1000000 / clock->khz;
}

uint64_t clock_to_ms(const struct clock *clock, uint64_t cycles) { return cycles / clock->khz; }

uint64_t clock_from_us(const struct clock *clock, uint64_t us)
{
	return us / 1000 * clock->khz + us % 1000 * clock->khz / 1000;
}

const uint32_t gap_limits_us[GAP_LIMITS] = {100, 300, 1000, 2000, 5000, 10000};

void gap_reset(struct gap *gap, const struct clock *clock)
{
	unsigned int i;

	gap->max_cycles = 0;
	gap->max_at_tsc = 0;
	gap->steps = 0;
	gap->backward = 0;
	for (i = 0; i < GAP_LIMITS; i++) {
		gap->over[i] = 0;
		gap->limit_cycles[i] = clock_from_us(clock, gap_limits_us[i]);
	}
	gap_restart(gap);
}

void gap_restart(struct gap *gap) { gap->last_tsc = cpu_tsc(); }

void gap_note_long(struct gap *gap, uint64_t now, uint64_t cycles)
{
	unsigned int i;

	if (cycles >> 63) {
		gap->backward++;
		return;
	}
	if (cycles > gap->max_cycles) {
		gap->max_cycles = cycles;
		gap->max_at_tsc = now;
	}
	for (i = 0; i < GAP_LIMITS && cycles > gap->limit_cycles[i]; i++)
		gap->over[i]++;
}

#define LONGEST_STEP_US 10000

void patience_begin(struct patience *patience) { *patience = (struct patience){.last_tsc = cpu_tsc()}; }

bool patience_ends(struct patience *patience, const struct clock *clock, uint64_t us)
{
	uint64_t now = cpu_tsc(), step = now - patience->last_tsc, longest = clock_from_us(clock, LONGEST_STEP_US);

	patience->last_tsc = now;
	patience->waited += step < longest ? step : longest;
	return patience->waited > clock_from_us(clock, us);
}
