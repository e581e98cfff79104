/*
 * An event loop: one thread, epoll, callbacks per descriptor, and a parking place for the checkpoint's pause.
 *
 * Threads: loop_add, loop_modify and loop_remove only from the loop's own thread (or before loop_run); loop_modify also while the loop is parked;
 * loop_park, loop_unpark, loop_post and loop_stop from any other thread.
 */
#ifndef VMCP_BASE_EVENT_H
#define VMCP_BASE_EVENT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/spin.h"

struct loop;
struct loop_source;

/* `events` are the epoll bits that are ready. */
typedef void loop_fn(void *opaque, uint32_t events);
typedef void loop_task_fn(void *opaque);

int loop_create(struct loop **out, struct err *err);
void loop_destroy(struct loop *loop); /* the loop does not run; frees its sources, closes no descriptor of theirs */

/* Calls fn in the loop's thread while `events` (EPOLLIN, ...) are ready. The descriptor stays the caller's. */
int loop_add(struct loop *loop, int fd, uint32_t events, loop_fn *fn, void *opaque, struct loop_source **out,
	     struct err *err);
/* Other events from now on; 0: only EPOLLERR and EPOLLHUP, which always count. */
int loop_modify(struct loop *loop, struct loop_source *source, uint32_t events, struct err *err);
/* No callback of the source runs after this returns. NULL is allowed. */
void loop_remove(struct loop *loop, struct loop_source *source);

/*
 * Polling, for work that is cheaper to find by looking than to be told of: a notification costs the teller a system call, a guest an exit. While a
 * poller is hot the loop looks instead of sleeping, until nothing has come for a short time (50 us); then the poller rests, and its descriptor tells
 * of work, as for all others. A loop that looked in vain several times rests at once mostly, and so does one whose thread was made to wait for a
 * processor.
 *
 * All run in the loop's thread, like callbacks; between any two the loop may park.
 */
struct loop_poller;
struct loop_poller_ops {
	bool (*poll)(void *opaque); /* looks, and does what it finds. True: there was something */
	bool (*rest)(
		void *opaque); /* from here on a descriptor tells of work. True: there is some already, and the poller stays hot */
	bool (*helped)(
		void *opaque); /* optional. True: it waits for other threads of this process, which need a processor too */
};
void loop_add_poller(struct loop *loop, const struct loop_poller_ops *ops, void *opaque,
		     struct loop_poller **out);				/* as loop_add */
void loop_remove_poller(struct loop *loop, struct loop_poller *poller); /* as loop_remove */
/* Something may come that no descriptor tells of: the poller is hot until it rests. In the loop's thread, or while the loop does not run. */
void loop_poller_heat(struct loop_poller *poller);
/*
 * How many processors this thread and its helpers may keep busy without taking one from a vCPU. 0, as it is at first: hot pollers look, and rest as soon as
 * they find nothing. 1: the loop looks, but sleeps while its pollers are helped. Before loop_run.
 */
void loop_set_spare(struct loop *loop, unsigned processors);
/*
 * fn(opaque) moves the calling thread to another processor, if it is on a vCPU's: who looks for work there keeps the vCPU from offering any, and the kernel wakes a
 * thread where it ran last, or where the vCPU is that woke it, so it would stay. Called where looking was in vain, in the loop's thread, at most each 50 ms. Before loop_run.
 */
void loop_set_aside(struct loop *loop, loop_task_fn *fn, void *opaque);
unsigned loop_spare(const struct loop *loop);

/*
 * A glance, for an answer that may come within microseconds of what a callback has just done, sooner than this thread would have fallen asleep and been woken:
 * up to 10 us of looking. Not where no processor is spare, while a poller is hot, or where glances of this kind are in vain more often than they pay: then one of 16.
 * In the loop's thread.
 */
struct loop_glance { /* of one kind; zeroes at first */
	struct tries tries;
};
bool loop_may_glance(const struct loop *loop, struct loop_glance *glance); /* to be asked once for each */
/* What `look` said last. Ends at once where the loop is to park. */
bool loop_glance(const struct loop *loop, struct loop_glance *glance, bool (*look)(void *opaque), void *opaque);

/* Runs until loop_stop; returns 0, or -errno of a failing epoll_wait. Tasks posted but not yet run stay for the next
 * loop_run. */
int loop_run(struct loop *loop, struct err *err);
/* The loop ends after the callback it is in. Before loop_run: the next loop_run returns at once. A parked loop ends
 * when unparked. */
void loop_stop(struct loop *loop);
bool loop_in_thread(const struct loop *loop); /* true in the thread that runs the loop */

/* Runs fn(opaque) once in the loop's thread, between callbacks; order is kept. Copies nothing; allocates a node. */
int loop_post(struct loop *loop, loop_task_fn *fn, void *opaque);
/* The same, and returns when fn has run. Runs it directly in the loop's own thread, and where the loop does not run
 * (yet). Waits out a park, but for one case: the thread that parked a loop that does not run may call. Whoever parked
 * a running loop must not loop_call before loop_unpark. */
void loop_call(struct loop *loop, loop_task_fn *fn, void *opaque);

/*
 * The pause. loop_park_request returns at once; loop_park_wait returns when the loop's thread stands at its parking
 * place, between callbacks. Neither allocates. Nothing of the loop runs until loop_unpark. Parks nest (a count).
 * A loop that is not running counts as parked.
 */
void loop_park_request(struct loop *loop);
void loop_park_wait(struct loop *loop);
void loop_unpark(struct loop *loop);

#endif
