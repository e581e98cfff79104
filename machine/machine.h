/*
 * The machine: lays out and builds a VM with its devices from a configuration. The only folder that names concrete devices.
 *
 * machine_create builds everything and loads either the kernel or a checkpoint; the VM stands still until machine_resume. The I/O thread runs from
 * machine_create to machine_destroy.
 *
 * Threads: any, except that machine_create and machine_destroy are called once, by one thread, with no other call under way. Calls that stop or start the VM
 * (pause, resume, checkpoint's pause, revert) take turns through a lock of the machine.
 */
#ifndef VMCP_MACHINE_MACHINE_H
#define VMCP_MACHINE_MACHINE_H

#include <stdbool.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/store/store.h"
#include "devices/virtio_balloon.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_net.h"
#include "machine/config.h"
#include "machine/console.h"

struct machine;

struct machine_options {
	struct machine_config *config; /* base disks get their `path` here; must outlive the machine */
	struct store *store;
	const char *uuid;
	const char *from;	       /* checkpoint to start from, NULL: boot */
	struct console *console;
	bool held; /* it stands still for a while, and networks of mode group are not heard until machine_resume */
	uint64_t clock_back_ns;	       /* with `from`: the real-time clock shows so much less than the host's time; 0: what it showed is right again */
	/* As vm_config.stopped: from a vCPU thread, must not block. */
	void (*stopped)(void *opaque, enum vm_stop_reason reason, const struct err *err);
	void *opaque;
};

int machine_create(const struct machine_options *options, struct machine **out, struct err *err);
/* Stops the VM, cancels a checkpoint under way, writes back and closes the disks. The error, if any, is of the disks: the machine is gone in any case. */
int machine_destroy(struct machine *machine, struct err *err);

/* Does once, for many processes that are to be forked, what each would do again: loads the libraries that such a machine needs. What is not there its start tells. */
void machine_preload(const struct machine_config *config);

/* Gives each card without an address one: the same at every start of the VM with this uuid, another one in each VM. */
void machine_choose_macs(struct machine_config *config, const char *uuid);

/* Lets the VM run. -EALREADY, ERR_STATE if it runs. After a revert that failed half way both fail with its error. */
int machine_resume(struct machine *machine, struct err *err);
int machine_pause(struct machine *machine, struct err *err);
bool machine_is_paused(struct machine *machine);
/* Presses the ACPI power button. A paused machine: ERR_STATE. */
int machine_power_button(struct machine *machine, struct err *err);
/* CLOCK_MONOTONIC of the first instruction; waits for it up to a second; 0 if it did not come. */
uint64_t machine_first_entry_ns(struct machine *machine);

/* ckpt_take and ckpt_wait, with turns taken only up to the capture of a live checkpoint. -EBUSY, ERR_STATE while another
 * one is under way. One that is periodic gives way to others: they wait for it a second, then cancel it (-ECANCELED for whom asked for
 * it), and it is refused while they wait. A revert cancels it at once. */
int machine_checkpoint(struct machine *machine, const struct ckpt_request *request, struct ckpt_result *result, struct err *err);
int machine_revert(struct machine *machine, const char *id, struct ckpt_revert_result *result, struct err *err);
/* The same together with other VMs. */
int machine_revert_in_group(struct machine *machine, const char *id, const struct ckpt_group *group, struct ckpt_revert_result *result, struct err *err);
/* Asks the guest to make do with `bytes` of memory: the rest goes into its balloon, in the guest's own time. -ENODEV, ERR_STATE without a
 * balloon; -EINVAL, ERR_USAGE below MEM_MIN_BYTES or above what the guest has. */
int machine_set_balloon(struct machine *machine, uint64_t bytes, struct err *err);
/* False without a balloon. */
bool machine_balloon_stats(struct machine *machine, struct virtio_balloon_stats *out);
/* Of disk `index`; false if there is none. The name is the machine's. */
bool machine_disk_stats(struct machine *machine, unsigned index, const char **name, struct virtio_blk_stats *out);
/* Of network card `index`; false if there is none. Names are the machine's. */
struct machine_net_stats {
	const char *name, *mode, *interface; /* interface: of the host, "" of mode user */
	unsigned slot;			     /* PCI device on bus 0 */
	uint8_t mac[6];			     /* as configured */
	char ip[CONFIG_IP_BYTES];	     /* ADDRESS/LENGTH that the agent in the guest gives it, or "" */
	struct virtio_net_stats traffic;
};
bool machine_net_stats(struct machine *machine, unsigned index, struct machine_net_stats *out);
/* The guest's generation id in hexadecimal: another one at each boot, start from a checkpoint and revert. "" if the guest, of an older version's
 * checkpoint, has none. */
#define MACHINE_GENERATION_BYTES 33
void machine_generation(struct machine *machine, char out[MACHINE_GENERATION_BYTES]);
struct ckpt_engine *machine_engine(struct machine *machine);
struct vm *machine_vm(struct machine *machine);

#endif
