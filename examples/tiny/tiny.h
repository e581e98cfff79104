/* The whole guest: one of these exists, and everything else is reached from it. */
#ifndef TINY_TINY_H
#define TINY_TINY_H

#include <stdbool.h>
#include <stdint.h>

#include "balloon.h"
#include "bench.h"
#include "clock.h"
#include "disk.h"
#include "mem.h"
#include "net.h"
#include "options.h"
#include "pattern.h"
#include "ram.h"
#include "rng.h"
#include "serial.h"

/* Lets something happen so many times a second. What it falls behind by more than 20 ms is forgotten. */
struct pace {
	uint64_t interval_cycles; /* 0 = no limit */
	uint64_t catch_up_cycles;
	uint64_t next_tsc;
};

void pace_set(struct pace *pace, const struct clock *clock, uint64_t rate);

static inline bool pace_due(const struct pace *pace, uint64_t now)
{
	return !pace->interval_cycles || (int64_t)(now - pace->next_tsc) >= 0;
}

static inline void pace_take(struct pace *pace, uint64_t now)
{
	pace->next_tsc += pace->interval_cycles;
	if ((int64_t)(now - pace->next_tsc) > (int64_t)pace->catch_up_cycles)
		pace->next_tsc = now;
}

struct tiny {
	struct options options;
	struct serial serial;
	struct clock clock;
	struct gap gap;
	struct ram ram;
	struct stamp_source stamps;
	struct mem mem;
	struct disk disk;
	struct bench bench;
	struct balloon balloon;
	struct net net;
	struct rng rng;
	struct pace mem_pace;
	struct pace disk_pace;
	struct pace balloon_pace;
	struct pace beat_pace;
	struct pace random_pace;
	bool running; /* pause and go */
	uint64_t image_sum;
	uint64_t look_tsc;   /* when to look for input next */
	uint64_t report_tsc; /* when to print the next status line */
	uint64_t status_tsc; /* of the last status line, with the counts of then */
	uint64_t status_writes;
	uint64_t status_disk_writes;
	struct line line;
	char command_line[2048];
};

/* Queues tiny->line. */
void tiny_print(struct tiny *tiny);

/* Prints "tiny: error reason=..." and switches the machine off. */
_Noreturn void tiny_fail(struct tiny *tiny, const char *reason, const char *detail);

/* All output leaves, then ACPI S5, then QEMU's isa-debug-exit; if neither is there, stays for ever. */
_Noreturn void tiny_power_off(struct tiny *tiny);

/* report.c: the lines about the state of things. */
void report_ready(struct tiny *tiny);
void report_status(struct tiny *tiny);
void report_gap(struct tiny *tiny); /* and begins anew */
void report_sum(struct tiny *tiny);
void report_check(struct tiny *tiny);
void report_balloon(struct tiny *tiny);
void report_net(struct tiny *tiny);
void report_random(struct tiny *tiny);
void report_bench(struct tiny *tiny, const struct bench_run *run);

/* command.c: carries out one line from the serial port. */
void command_run(struct tiny *tiny, const char *text);

/* exception.c: makes every exception end in a line of output; or a vector come to `code`, at CPL 0 and with interrupts off. */
void exception_start(void);
void exception_gate(unsigned int vector, const char *code);

/* idle.c: idle_sleep returns when the timer's next interrupt has come, at most 55 ms later. */
void idle_start(void);
void idle_sleep(void);

#endif
