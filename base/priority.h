/*
 * How the scheduler treats the calling thread, by sched_setattr(2). More than the default needs CAP_SYS_NICE; where it is refused
 * the thread goes on as it was: all of this is about time only.
 *
 * No real-time policy: since Linux 6.12 the fair server runs ordinary threads ahead of real-time ones for up to 50 ms in a
 * second. A real-time thread that was woken on a CPU with a busy background thread waited there for milliseconds, though
 * another CPU was idle.
 */
#ifndef VMCP_BASE_PRIORITY_H
#define VMCP_BASE_PRIORITY_H

#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

#define PRIORITY_SHORT_SLICE_NS 100000u

static inline int priority_nice(void) { return getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid)); }

#define PRIORITY_NOT_INHERITED 1u /* SCHED_FLAG_RESET_ON_FORK */

static inline int priority_set_flags(int policy, int nice, uint64_t slice_ns, uint64_t flags)
{
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime_ns, deadline_ns, period_ns;
	} attr = {.size = sizeof(attr), .policy = (uint32_t)policy, .flags = flags, .nice = nice, .runtime_ns = slice_ns};
	return (int)syscall(SYS_sched_setattr, 0, &attr, 0);
}

/* slice_ns: 0 for the kernel's own. Linux before 6.12 ignores it. 0, or -1 with errno. */
static inline int priority_set(int policy, int nice, uint64_t slice_ns) { return priority_set_flags(policy, nice, slice_ns, 0); }

/*
 * For a vCPU: it wakes often, from exits and faults, and must then preempt a background thread that took its CPU meanwhile. A
 * thread with a shorter slice does so at once; else it waits for the end of the other's slice or the next tick, 2 to 4 ms.
 */
static inline void priority_short_slice(void)
{
	priority_set(SCHED_OTHER, priority_nice(), PRIORITY_SHORT_SLICE_NS);
}

/* For a thread that a vCPU waits for, some microseconds each time: it does not wait in turn for the slice of that vCPU, should it find itself on its CPU. */
static inline void priority_awaited(void)
{
	priority_set(SCHED_OTHER, priority_nice(), PRIORITY_SHORT_SLICE_NS / 2);
}

/*
 * Ahead of other threads, for a stretch of microseconds, or with sleep between such: a guest waits for this thread, and a
 * preempted one would make it wait for others' time slices, milliseconds. Returns the niceness of before, for
 * priority_restore.
 */
static inline int priority_urgent(void)
{
	int before = priority_nice();
	if (priority_set(SCHED_OTHER, -20, PRIORITY_SHORT_SLICE_NS) != 0)
		priority_short_slice();
	return before;
}

static inline void priority_restore(int nice) { priority_set(SCHED_OTHER, nice, 0); }

/*
 * Makes room for a vCPU that shares the CPU: a moment's sleep, some 50 us. Not sched_yield, which gives away a whole turn: on
 * a host without an idle CPU, a thread of little weight that yields 256 times is gone for 20 s.
 */
static inline void priority_give_way(void) { nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL); }

/* When a thread makes room. {0} at first. */
struct priority_room {
	uint64_t next_ns;
};

#define PRIORITY_ROOM_WORK 4u

/*
 * The same, if every_ns went by since the last time. Where no CPU idles, a thread that sleeps comes back a tick or several later: it then works so
 * much longer before it sleeps again that no more than a fifth of its time goes away, and leaves the rest to the scheduler.
 */
static inline void priority_give_way_each(uint64_t every_ns, struct priority_room *room)
{
	uint64_t now_ns = clock_now_ns();
	if (now_ns < room->next_ns)
		return;
	priority_give_way();
	uint64_t back_ns = clock_now_ns(), work_ns = PRIORITY_ROOM_WORK * (back_ns - now_ns);
	room->next_ns = back_ns + (work_ns > every_ns ? work_ns : every_ns);
}

/*
 * For a thread that works in the background. SCHED_BATCH: waking up preempts nobody. A tenth of a vCPU's weight, so
 * that a host full of vCPUs still brings a checkpoint to its end. Not SCHED_IDLE: a thread that never gets to run would
 * keep the kernel's locks that it holds, and a vCPU that faults needs the same ones.
 *
 * What weight a thread has counts when the next one is chosen, and that may be a tick, 4 ms, away: a new thread, which may have
 * taken a vCPU's CPU, first leaves it.
 */
static inline void priority_background(void)
{
	int nice = priority_nice();
	priority_set(SCHED_BATCH, nice > 10 ? nice : 10, 0);
	nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

#endif
