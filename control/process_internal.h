/* What the files of a VM's process share: process.c its life, process_asleep.c its sleep, process_detached.c how it comes to be in the background. */
#ifndef VMCP_CONTROL_PROCESS_INTERNAL_H
#define VMCP_CONTROL_PROCESS_INTERNAL_H

#include <pthread.h>

#include "control/hurry.h"
#include "control/process.h"
#include "control/server.h"

/* Why a guest stopped is asked of its machine: by the time the main thread comes to it, a revert may have undone it. */
enum event { EVENT_NONE, EVENT_STOPPED, EVENT_SUSPEND, EVENT_KILL };

struct process {
	const struct process_options *options;
	struct hurry hurry; /* until the guest of a detached VM runs */
	struct store *store;
	struct store_vm_lock *name_lock;
	int dir; /* of the VM in the store */
	struct machine_config config;
	struct store_vm record;
	char from[STORE_ID_BYTES]; /* "" when booting */
	char generation[MACHINE_GENERATION_BYTES]; /* as it starts: read before a client may revert */
	uint64_t clock_back_ns;	    /* of the start from it */
	bool bound;		    /* it has resources in the store's table */
	struct store_pin *from_pin; /* until the machine's engine and the VM's record hold it */
	struct console *console;
	struct console_log *console_log; /* of a detached VM */
	struct control_server *server;
	struct periodic *periodic;
	struct tidy *tidy;
	struct control_target target;
	pthread_t signal_thread;
	bool signal_thread_runs;
	/* what the main thread waits for */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum event event; /* under lock; a kill stays */
	int event_fd;	  /* readable while there is one */
	bool wanted;	  /* under lock: a suspended VM is to wake */
	char asleep_at[STORE_ID_BYTES]; /* under lock: the checkpoint that it is in */
};

/* process.c; all by the main thread, but for: EVENT_NONE if there is none, with `lock` held. */
enum event process_take_event_locked(struct process *process);
/* In the store's table: what the VM has of the host. */
int process_bind_resources(struct process *process, struct err *err);
/* From a checkpoint, or NULL: to boot. */
int process_build_machine(struct process *process, const char *from, struct err *err);
/* None is there: 0. */
int process_drop_machine(struct process *process, struct err *err);
/* Called with the result when the guest runs. */
typedef void process_running_fn(void *opaque, const struct process_result *result);
/* A VM's whole life, in this process. running: may be NULL. */
int process_run_here(const struct process_options *options, process_running_fn *running, void *opaque, struct process_result *result, struct err *err);

/* process_asleep.c: the machine is in a checkpoint: it goes, with all that it has of the host but its forwarded ports, until somebody wants it or the VM is killed. */
int process_sleep_until_wanted(struct process *process, struct err *err);

/* process_detached.c: in a child that outlives the caller; returns when its guest runs, or could not start. */
int process_run_detached(const struct process_options *options, struct process_result *result, struct err *err);

#endif
