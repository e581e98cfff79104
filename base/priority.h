/*
 * How the scheduler treats the calling thread. Real-time priority needs CAP_SYS_NICE; where it is refused the thread goes
 * on as it was: all of this is about time only.
 */
#ifndef VMCP_BASE_PRIORITY_H
#define VMCP_BASE_PRIORITY_H

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Levels of real-time priority; within one, first come, first served. */
enum priority_level { PRIORITY_URGENT = 1, PRIORITY_FAULT = 2 };

/*
 * Ahead of all ordinary threads, for a stretch of microseconds, or with sleep between such: a guest waits for this thread,
 * and a preempted one would make it wait for others' time slices, milliseconds. Not to be nested.
 */
static inline void priority_begin(enum priority_level level)
{
	struct sched_param param = {.sched_priority = (int)level};
	sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &param);
}

/* Back to SCHED_OTHER or SCHED_BATCH, with the niceness of before. */
static inline void priority_end(int policy)
{
	struct sched_param param = {.sched_priority = 0};
	sched_setscheduler(0, policy, &param);
}

/*
 * For a thread that works in the background. SCHED_BATCH: waking up preempts nobody. Not SCHED_IDLE: a thread that never
 * gets to run would keep the kernel's locks that it holds, and a vCPU that faults needs the same ones.
 */
static inline void priority_background(int nice)
{
	priority_end(SCHED_BATCH);
	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), nice);
}

/*
 * For a vCPU: it wakes often, from exits and faults, and must then preempt a background thread that took its CPU meanwhile. Since
 * Linux 6.12 a thread with a shorter slice does so at once; else it waits for the end of the other's slice or the next
 * tick, 2 to 4 ms. Older kernels ignore it.
 */
static inline void priority_short_slice(void)
{
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime_ns, deadline_ns, period_ns;
	} attr = {.size = sizeof(attr), .policy = SCHED_OTHER, .runtime_ns = 100000};
	attr.nice = getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid));
	syscall(SYS_sched_setattr, 0, &attr, 0);
}

/* A mutex that threads of different priority share: whoever holds it runs at the priority of whoever waits for it. */
static inline void priority_mutex_init(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(mutex, &attr);
	pthread_mutexattr_destroy(&attr);
}

#endif
