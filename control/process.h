/*
 * The process of one VM: `vmcp run` is this. Builds the machine, serves its control socket, keeps its record in the store, and ends with it.
 *
 * A guest that resets is built again in the same process; a guest that powers off ends it with 0; a machine that KVM cannot run on ends it with an error, and the
 * record says "crashed".
 */
#ifndef VMCP_CONTROL_PROCESS_H
#define VMCP_CONTROL_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "checkpoint/store/store.h"
#include "machine/machine.h"

#define PROCESS_HELD_NS (60 * 1000000000ull)

struct process_options {
	const char *store_path;
	struct store_key *store_key; /* of an encrypted store; NULL: none */
	const char *config_path; /* guest.cfg or domain XML, or NULL with `from`; with `connect` a domain's name */
	const char *connect;	 /* --connect: URI of the libvirt that has the domain, or NULL */
	const char *from;	 /* a reference to a checkpoint, or NULL */
	const char *name;	 /* --name, or NULL: the configuration's */
	const char *memory_backing; /* --memory-backing, or NULL: the configuration's */
	const char *every;	 /* --every, or NULL: the configuration's */
	const char *keep;	 /* --keep, or NULL */
	const char *net;	 /* --net: settings of network cards beside the configuration's (config_set_nets), or NULL */
	const char *config_text; /* with `from` and a `name`: what to run, instead of the checkpoint's configuration (config_to_text), or NULL */
	bool clock_of_checkpoint; /* with `from`: the real-time clock goes on from the checkpoint's time; else it shows the host's */
	bool detach;
	bool held;   /* with `from` and `detach`: it stands still, deaf to its networks, until vm.resume; and no longer than PROCESS_HELD_NS */
	uint64_t started_ns;	 /* CLOCK_MONOTONIC at the exec of this program, or a clone's beginning */
};

struct process_result {
	char vm[STORE_NAME_BYTES];
	char checkpoint[STORE_ID_BYTES]; /* what `from` meant, "" otherwise */
	char uuid[37];
	char generation[MACHINE_GENERATION_BYTES]; /* at the start: a revert gives another one */
	int pid;
	char *socket;	  /* malloc: path of the control socket; NULL when the VM has ended */
	uint64_t boot_ns; /* started_ns to the first guest instruction */
};

/*
 * Runs the VM. In the foreground it returns when the VM has ended: 0 for a power off, or an error. With `detach` the VM lives in a child of its own
 * session, whose stderr goes to vms/NAME/log, and this returns once the guest's first instruction ran (*result set), or with the child's error.
 * Must be called before the program has other threads.
 */
int process_run(const struct process_options *options, struct process_result *result, struct err *err);

/* The machine that process_run would build, with all that can be found wrong without starting it: *plan (a new reference) has its settings as a document,
 * and under "config" as the text of a guest.cfg. Changes nothing. */
int process_plan(const struct process_options *options, json_t **plan, struct err *err);

#endif
