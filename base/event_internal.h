/* What event.c (descriptors, tasks, parking) and event_poll.c (polling) share. Everything belongs to the loop's thread. */
#ifndef VMCP_BASE_EVENT_INTERNAL_H
#define VMCP_BASE_EVENT_INTERNAL_H

#include "base/event.h"

struct loop_poller {
	struct polling *polling;
	const struct loop_poller_ops *ops;
	void *opaque;
	bool hot;
	struct loop_poller *next;
};

struct polling {
	struct loop *loop; /* immutable, as the next once the loop runs */
	unsigned spare;
	struct loop_poller *pollers;
	unsigned hot;
	bool told; /* descriptors had events since the last look */
	bool in_phase;
	bool in_vain;		/* the last look */
	bool paid;		/* in this phase: something came that was not there at the look before */
	uint64_t budget_ns;	/* of looking in vain */
	uint64_t since_ns;	/* the last work, or the beginning of the phase */
	struct spin spin;
	loop_task_fn *step_aside; /* immutable once the loop runs, as the next */
	void *aside_opaque;
	uint64_t aside_from_ns;
};

struct loop_poller *polling_add(struct polling *p, const struct loop_poller_ops *ops, void *opaque);
void polling_remove(struct polling *p, struct loop_poller *poller);
void polling_clear(struct polling *p);

/* Looks until nothing comes any more, or others must have their turn. True: a poller is hot, and the loop must not sleep; else all will be told. */
bool polling_look(struct polling *p);

bool polling_may_glance(const struct polling *p, struct loop_glance *glance);
bool polling_glance(const struct polling *p, struct loop_glance *glance, bool (*look)(void *opaque), void *opaque);

/* event.c */
bool loop_is_to_park(const struct loop *loop);
bool loop_park_point(struct loop *loop); /* a place between two callbacks. True: it was asked to stand */
bool loop_is_stopping(struct loop *loop);

#endif
