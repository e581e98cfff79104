/*
 * An event loop: one thread, epoll, callbacks per descriptor, and a parking place for the checkpoint's pause.
 *
 * Threads: loop_add, loop_modify and loop_remove only from the loop's own thread (or before loop_run);
 * loop_park, loop_unpark, loop_post and loop_stop from any other thread.
 */
#ifndef VMCP_BASE_EVENT_H
#define VMCP_BASE_EVENT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

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
/* Other events from now on; 0: only EPOLLERR and EPOLLHUP, which always count. From the loop's own thread. */
int loop_modify(struct loop *loop, struct loop_source *source, uint32_t events, struct err *err);
/* No callback of the source runs after this returns. NULL is allowed. */
void loop_remove(struct loop *loop, struct loop_source *source);

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
