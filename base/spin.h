/*
 * How long a thread may look for work, awake, instead of sleeping. For threads that have a processor to spare; in one thread.
 *
 * A phase of looking ends when there is work, or with its budget. Where looking was in vain several times in a row it becomes the exception, and it stops for a while
 * when the thread had to wait for its processor: others need it. Involuntary switches do not tell: a helper that the thread wakes takes the processor, too.
 */
#ifndef VMCP_BASE_SPIN_H
#define VMCP_BASE_SPIN_H

#include <stdbool.h>
#include <stdint.h>

/* Tries of one kind, in a row: those that are mostly in vain become the exception, one of 16. {0} at first. */
struct tries {
	unsigned vain, skipped;
};

/* To be asked once for each. */
bool tries_worth(struct tries *tries);
void tries_in_vain(struct tries *tries);

/* {0} at first. */
struct spin {
	struct tries phases;
	uint64_t spun_ns;	/* looked in vain for so long ... */
	unsigned waits;		/* ... and so many looks took so long that the thread was off its processor */
	uint64_t crowded_until_ns;
};

/* A phase begins. Returns its budget: ns to look after the last work; 0: not at all. */
uint64_t spin_begin(struct spin *spin, uint64_t now_ns);
/* One look, in vain, took spun_ns, until now. True: others need the processor, and the phase is to end. */
bool spin_in_vain(struct spin *spin, uint64_t spun_ns, uint64_t now_ns);
/* A phase that had a budget ends. paid: something came while it looked. */
void spin_end(struct spin *spin, bool paid);

#endif
