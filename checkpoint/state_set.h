/* The states of all components of a machine together: captured, as a file, decoded again. */
#ifndef VMCP_CHECKPOINT_STATE_SET_H
#define VMCP_CHECKPOINT_STATE_SET_H

#include "base/component.h"

struct state_set {
	const struct component *components; /* the engine's */
	unsigned count;
	void **states;	  /* one for each component, of its table's size */
	struct buf *logs; /* completion logs of those that have any */
};

/* Allocates, and touches, everything that a capture needs. */
int state_set_init(struct state_set *set, const struct component *components, unsigned count, struct err *err);
void state_set_free(struct state_set *set);

/* In the pause: allocates nothing. */
int state_set_capture(struct state_set *set, struct err *err);
int state_set_encode(const struct state_set *set, struct buf *out, struct err *err);
/*
 * Checks all checksums, then decodes all sections into `set` (from state_set_init), then lets every component validate
 * its own. Each component must have its section, and each section its component. The components are not changed.
 */
int state_set_decode(struct state_set *set, const void *data, size_t length, struct err *err);
/* Has every component look at its state once more: what was decoded is kept, and the machine may have changed since. */
int state_set_validate(const struct state_set *set, struct err *err);
/* What a host must have to take these states, and the components with their versions: lines as of struct component, with a last NUL. */
int state_set_needs(const struct state_set *set, struct buf *out, struct err *err);
/* Applies all states, in order. */
int state_set_apply(const struct state_set *set, struct err *err);
/* Applies the completion logs, in order. */
int state_set_apply_logs(const struct state_set *set, struct err *err);

#endif
