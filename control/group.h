/*
 * Several VMs of one store at one instant: this process leads, each VM's own does the work (control/group_member.h).
 *
 *     take     all are staged; each stops and is captured; when the last one stands, all go on; all are saved; one transaction commits them (store/group.h)
 *     revert   of those that run everything that can be refused is checked; those that do not are started, standing still; all that ran stop; all are put back; all go on
 *     clone    a new VM of each is started, standing still; all go on
 *
 * Called by a process that has one thread.
 */
#ifndef VMCP_CONTROL_GROUP_H
#define VMCP_CONTROL_GROUP_H

#include <jansson.h>

#include "base/err.h"
#include "checkpoint/store/group.h"
#include "control/clone.h"

struct group_take_options {
	const char *store_path;
	char *const *vms; /* names; each once */
	unsigned count;
	const char *tag, *message, *instant; /* or NULL */
	bool full;
	uint64_t max_rate;
	uint64_t timeout_ns;		     /* for all of it; 0: none */
	const volatile bool *cancel;
	void (*progress)(void *opaque, const json_t *params); /* as control_progress_fn; or NULL */
	void *opaque;
};
/* All or none. *result: {"group","tag","message","created","live","durability","pause_ns","durable_ns","checkpoints":[as of `checkpoint --json`]}. */
int group_take(const struct group_take_options *options, json_t **result, struct err *err);

struct group_revert_options {
	const char *store_path;
	struct store_key *store_key; /* of an encrypted store, for VMs that are started; NULL: none */
	const char *group; /* its id */
	const volatile bool *cancel;
};
/*
 * Until the first VM is changed a failure is without effect. Behind that each VM comes to its checkpoint by itself, and what failed is named. *result: {"group","revert_ns",
 * "vms":[as of `revert --json`]}.
 */
int group_revert(const struct group_revert_options *options, json_t **result, struct err *err);

/* `options` as for clones_start, but for checkpoint: of each of the group's. Those of the first member come first. All or none. *count: how many. */
int group_clone(const struct store_group *group, const struct clone_options *options, struct clone **out, size_t *count, struct err *err);

#endif
