/*
 * libvmcp: vmcp's VMs and checkpoints, from C programs. The client's side only: VMs run in processes of their own (`vmcp run`).
 *
 *     struct vmcp_store *store;
 *     struct vmcp_vm *vm;
 *     struct vmcp_error error;
 *
 *     if (vmcp_open(NULL, &store, &error) || vmcp_connect(store, "web", &vm, &error))
 *         errx(1, "%s", error.message);
 *
 * Functions return 0, or a negative errno with *error filled in, if it is not NULL: a message "WHAT: WHY", a hint ("" if none is known), and the class,
 * which is the exit status of the vmcp command. Times are nanoseconds, sizes bytes. Text that is handed out belongs to the caller's struct.
 *
 * A store may be used by several threads at once; a VM's connection by one at a time, each thread with its own. A connection waits for as long as
 * what was asked for takes; it does not survive a fork. The store must stay open while connections to its VMs are made.
 *
 * pkg-config: vmcp. VMCP_API is the version of this interface, and of the library that has it: programs of another one do not link.
 */
#ifndef VMCP_H
#define VMCP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMCP_API 0

#define VMCP_ID_BYTES	33 /* 32 hexadecimal digits and NUL */
#define VMCP_NAME_BYTES 64

enum vmcp_class {
	VMCP_FAILED = 1,
	VMCP_USAGE = 2,
	VMCP_NOT_FOUND = 3, /* no such VM, checkpoint or file */
	VMCP_STATE = 4,	    /* not possible in the present state: it does not run, something else is under way */
	VMCP_DAMAGED = 5,
	VMCP_HOST = 6, /* this host lacks something */
};

struct vmcp_error {
	int number; /* positive errno */
	enum vmcp_class error_class;
	char message[512], hint[256];
};

struct vmcp_store;
struct vmcp_vm;

const char *vmcp_version(void);

/* --- the store --- */

/* path NULL: as the vmcp command chooses it (VMCP_STORE, /var/lib/vmcp for root, else $XDG_STATE_HOME/vmcp). It must exist: VMCP_NOT_FOUND. */
int vmcp_open(const char *path, struct vmcp_store **out, struct vmcp_error *error);
void vmcp_close(struct vmcp_store *store); /* NULL is allowed */

struct vmcp_vm_info {
	char name[VMCP_NAME_BYTES];
	char state[16];		/* "running", "paused", "stopped", "crashed" */
	int pid;		/* 0: it does not run */
	char at[VMCP_ID_BYTES]; /* the checkpoint it stands at, "" */
	uint64_t memory_bytes;
	uint32_t cpus;
};
/* All VMs that are known, by name. *list is freed by free(). */
int vmcp_list_vms(struct vmcp_store *store, struct vmcp_vm_info **list, size_t *count, struct vmcp_error *error);

struct vmcp_checkpoint_info {
	char id[VMCP_ID_BYTES], parent[VMCP_ID_BYTES]; /* parent: "" for a root */
	char vm[VMCP_NAME_BYTES], tag[VMCP_NAME_BYTES]; /* tag: "" if none */
	char message[256];				/* "" if none; cut off if it is longer */
	uint64_t created_ns;				/* since 1970, UTC */
	uint64_t size_bytes;				/* what it occupies itself */
};
/* The durable checkpoints of a VM, or of all (vm NULL), the oldest first. *list is freed by free(). */
int vmcp_list_checkpoints(struct vmcp_store *store, const char *vm, struct vmcp_checkpoint_info **list, size_t *count, struct vmcp_error *error);

/* --- a running VM --- */

/* VMCP_STATE: it is known, but does not run. */
int vmcp_connect(struct vmcp_store *store, const char *name, struct vmcp_vm **out, struct vmcp_error *error);
void vmcp_disconnect(struct vmcp_vm *vm); /* NULL is allowed. The VM runs on */

enum vmcp_wait { VMCP_DURABLE, VMCP_WRITTEN, VMCP_CAPTURED };
struct vmcp_checkpoint_options {
	bool stopped;	     /* the VM stands still for the whole save; else it runs on (live) */
	enum vmcp_wait wait; /* what has to be reached before the function returns */
	const char *tag, *message; /* NULL: none */
	uint64_t timeout_ns; /* cancelled if it is not there by then; 0: never */
};
struct vmcp_checkpoint_result {
	char id[VMCP_ID_BYTES], parent[VMCP_ID_BYTES];
	char durability[16]; /* "durable", "written" or "captured" */
	uint64_t pause_ns;   /* how long the VM stood still */
	uint64_t durable_ns; /* from the request until it was on stable storage; 0: it is not yet */
	uint64_t total_pages, saved_pages;
};
/* options NULL: live and durable. result may be NULL. */
int vmcp_checkpoint(struct vmcp_vm *vm, const struct vmcp_checkpoint_options *options, struct vmcp_checkpoint_result *result, struct vmcp_error *error);

struct vmcp_revert_result {
	char checkpoint[VMCP_ID_BYTES];
	uint64_t restored_pages, revert_ns;
};
/* In place. checkpoint: an id, 4 or more of its first digits, a tag, a VM's name (its newest) or NAME~N. result may be NULL. */
int vmcp_revert(struct vmcp_vm *vm, const char *checkpoint, struct vmcp_revert_result *result, struct vmcp_error *error);

int vmcp_pause(struct vmcp_vm *vm, struct vmcp_error *error);
int vmcp_resume(struct vmcp_vm *vm, struct vmcp_error *error);

struct vmcp_event {
	uint64_t number;
	char time[40];			/* RFC 3339 */
	char type[16];			/* "checkpoint", "reverted", "paused", "resumed", "reset", "ended" */
	char checkpoint[VMCP_ID_BYTES]; /* of the first two, else "" */
	uint64_t lost;			/* events between the one before and this that were too long ago */
};
/* The next event after the last one that this connection handed out, beginning with vmcp_connect. Waits up to timeout_ns (at most an hour): -ETIMEDOUT,
 * VMCP_FAILED if none came. After "ended" the connection is of no use any more. */
int vmcp_next_event(struct vmcp_vm *vm, uint64_t timeout_ns, struct vmcp_event *event, struct vmcp_error *error);

#ifdef __cplusplus
}
#endif

#endif
