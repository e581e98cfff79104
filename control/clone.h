/*
 * Clones: VMs that start from one checkpoint, or from each of several that belong together, each with its own identity. Memory is shared copy-on-write with the
 * checkpoint's layers and among them, disks are overlays; what else a VM has is as the rules say (control/clone_rules.h).
 *
 *     check      the rules, against the machines of all checkpoints: nothing has happened yet
 *     reserve    each clone's name, uuid and resources of the host, in the store's table. All or none
 *     start      one after the other. If one fails those before it are ended: all or none
 */
#ifndef VMCP_CONTROL_CLONE_H
#define VMCP_CONTROL_CLONE_H

#include "checkpoint/store/resources.h"
#include "control/process.h"

#define CLONE_MAX 1000u
#define CLONE_NETWORK_BYTES 9

struct clone_options {
	const char *store_path;
	struct store_key *store_key; /* of an encrypted store; NULL: none. The clones' processes have what it opened, and need no scrypt */
	const char *const *checkpoints; /* references */
	unsigned checkpoint_count;
	const char *
		pattern; /* of the names, with <VM> (the VM that was saved) and <N>; NULL: <VM>-<N>. Numbers of names that are known are left out */
	unsigned count; /* of copies: so many clones of each checkpoint. Those of one copy have the same number */
	const char *rules_what,
		*rules; /* what to call the rules in errors, and their text; NULL: those of the template, or none */
	bool clock_of_checkpoint;
	bool held; /* they stand still until vm.resume (process.h) */
	bool same_addresses; /* of network cards, where no rule says another thing */
	const char (*networks)[CLONE_NETWORK_BYTES]; /* for each copy: what makes its networks of mode group others than the origin's; NULL: they are the same */
};

struct clone {
	char name[STORE_NAME_BYTES];
	char uuid[37];
	struct process_result result;
	struct store_resource *resources;
	size_t resource_count;
	/* while it is made */
	char *config_text;
	struct store_vm_lock *reservation;
};

/* On success *out is an array of clones that run, options->count of each checkpoint, for clones_free. Must be called before the program has other threads. */
int clones_start(const struct clone_options *options, struct clone **out, struct err *err);
/* They never were: those that run are ended, and their disks, records and folders are removed. */
void clones_undo(const char *store_path, struct clone *clones, size_t count);
void clones_free(struct clone *clones, size_t count); /* the VMs run on. NULL is allowed */

/* Makes the checkpoint the origin of clones: it is tagged `name`, and the rules are kept with it, unevaluated. Refused, ERR_USAGE, if it has a resource that
 * by these rules can be neither shared nor virtualised. *id: the checkpoint. */
int clone_template(const char *store_path, const char *checkpoint, const char *name, const char *rules_what,
		   const char *rules, char id[STORE_ID_BYTES], struct err *err);

#endif
