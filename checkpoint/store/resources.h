/*
 * The table of resources: what of the host stands behind what a guest knows.
 *
 *     virtual   (VM, type, name): unique within its VM only. `guest` is what the guest knows it by: a port, an address, a number, a serial
 *     host      (type, host): a port, a tap device, a socket, a file. Exclusive ones have one VM, the others any number, which is counted
 *
 * A VM's process binds all that it has before it opens any of it, in one transaction, and frees it when it ends. What a process that was killed left
 * is freed by whoever wants it, by the VM's next start, and by store_resources_collect. Nothing of this is in a checkpoint.
 *
 * Threads: any, with a handle each or shared.
 */
#ifndef VMCP_CHECKPOINT_STORE_RESOURCES_H
#define VMCP_CHECKPOINT_STORE_RESOURCES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "checkpoint/store/store.h"

#define STORE_RESOURCE_TYPE_BYTES 16

struct store_resource {
	char vm[STORE_NAME_BYTES]; /* of those that store_resources_list gives */
	char type[STORE_RESOURCE_TYPE_BYTES];
	char *name;  /* which of the VM's resources of this type; malloc, as the next two */
	char *guest; /* as the guest knows it, "" if it does not */
	char *host;  /* "": there is nothing of the host behind it */
	bool exclusive;
	/* Not 0: one of the numbers from..to is to be chosen, and put behind what `host` is. The caller may look at each (pool_free): is it free on the host
	 * itself? */
	uint32_t pool_from, pool_to;
	bool pool_of_ip; /* these are IPv4 addresses, and written so */
	uint64_t refs; /* of those that store_resources_list gives: how many name this host resource */
};
void store_resource_free(struct store_resource *resource);
void store_resources_free_list(struct store_resource *list, size_t count);

/* Adds to a list (malloc, grows): texts are copied. */
struct store_resource *store_resources_add(struct store_resource **list, size_t *count, const char *type,
					   const char *name, const char *guest, const char *host, bool exclusive);

/* True if nobody outside of this store has it. */
typedef bool store_pool_free_fn(void *opaque, const struct store_resource *resource, uint32_t number);

/*
 * What the VM has from now on, all of it or none; what it had is freed. The caller holds the VM's lock or its reservation. A chosen number is put into
 * `host`. -EBUSY, ERR_STATE: another VM has an exclusive one, which is named; -ENOSPC, ERR_STATE: all numbers of a pool are taken. Then *failed is
 * the index of the resource.
 */
int store_resources_bind(struct store *store, const char *vm, struct store_resource *list, size_t count,
			 store_pool_free_fn *pool_free, void *opaque, size_t *failed, struct err *err);
int store_resources_free(struct store *store, const char *vm, struct err *err);
/* Of one VM, or of all (NULL), by VM, type and name. */
int store_resources_list(struct store *store, const char *vm, struct store_resource **list, size_t *count,
			 struct err *err);
/* Frees what VMs have that nobody runs or has reserved, and removes sockets in the store that their processes left. *freed: how many resources. */
int store_resources_collect(struct store *store, uint64_t *freed, struct err *err);

/*
 * The VM's uuid: the one that it has; else `wanted` ("" for none), if no VM and no checkpoint of this store has that; else a new one, which none has. It is the
 * VM's from then on as long as it has resources or a record. The caller holds the VM's lock or its reservation.
 */
int store_vm_uuid(struct store *store, const char *vm, const char *wanted, char uuid[37], struct err *err);

/* Keeps a name for a VM that is about to be started by another process: until store_vm_unlock or death. -EBUSY, ERR_STATE: it is reserved or runs. */
int store_vm_reserve(struct store *store, const char *name, struct store_vm_lock **out, struct err *err);

/* --- templates: checkpoints that VMs are cloned from --- */

/* Gives the checkpoint the tag `name`, and keeps `rules` (text, "" for none) with it. -EEXIST as store_tag; again for the same checkpoint: new rules. */
int store_template_put(struct store *store, const char *id, const char *name, const char *rules, struct err *err);
/* 1 and the rules (malloc) if the checkpoint is a template, under any name; 0 if it is none. */
int store_template_get(struct store *store, const char *id, char **rules, struct err *err);

#endif
