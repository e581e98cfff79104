/*
 * Checkpoints of domains that QEMU runs below libvirt, in the store beside all others.
 *
 * Taking one, in this order:
 *
 *     stage (domain runs)   each disk's image is linked into the store as a layer; an empty overlay on that layer is made beside it. Nothing of the domain is changed
 *     stop                  libvirt stops the processors
 *     turn                  libvirt turns all disks to their overlays at once
 *     start                 QEMU begins a background snapshot: it saves the devices, protects memory, and lets the processors run: the pause ends
 *     persist               QEMU writes memory into the layer file; checksums, index, manifest, commit
 *
 * One that is not live is a plain migration into the layer file between turn and start, which needs nothing of the kernel.
 *
 * A failure before `turn` has no effect; later on the domain runs on, and what its overlays hold is merged back into the images that it had.
 *
 * The stream that QEMU writes is kept as the pages of a memory layer, so that verify, export, import, rm and gc need to know nothing of it; the section `qemu` of the
 * state has the domain's definition as it ran. Only QEMU can go on with it: vmcp does not start it.
 *
 * Threads: each function is one caller's; a domain is locked against a second one by its VM's lock in the store.
 */
#ifndef VMCP_MACHINE_QEMU_H
#define VMCP_MACHINE_QEMU_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "checkpoint/store/store.h"
#include "machine/config.h"

struct qemu_request {
	const char *connect, *domain; /* URI, and name or UUID */
	const char *tag, *message;    /* or NULL */
	bool live;		      /* else the domain stands still until QEMU has written all memory */
	const volatile bool *cancel;  /* or NULL */
	void (*progress)(void *opaque, const char *phase, uint64_t done_bytes, uint64_t total_bytes); /* or NULL; total 0: not known */
	void *opaque;
};

struct qemu_result {
	char id[STORE_ID_BYTES], parent[STORE_ID_BYTES];
	char vm[STORE_NAME_BYTES];
	uint64_t created_wall_ns;
	/* From the request to stop to the first answer that the processors run: stop, turn, save (the handing over of it, where it is live) and start. */
	uint64_t pause_ns, stop_ns, turn_ns, save_ns, start_ns;
	uint64_t stream_bytes, saved_pages, zero_pages, durable_ns;
	uint32_t disk_count;
	struct store_disk_layer disks[CONFIG_MAX_DISKS];
};

/* Unknown domain: ERR_NOT_FOUND; off, paused, or busy with a job: ERR_STATE; what this QEMU, libvirt or host cannot: ERR_HOST. -ECANCELED. */
int qemu_checkpoint(struct store *store, const struct qemu_request *request, struct qemu_result *result, struct err *err);

struct qemu_revert_result {
	char vm[STORE_NAME_BYTES];
	uint64_t revert_ns;
};
/* Takes the domain back: it is ended if it runs, and started by libvirt from the checkpoint's stream, on fresh overlays. All is read and checked before the domain is
 * ended. Not a checkpoint of QEMU: ERR_USAGE. */
int qemu_revert(struct store *store, const char *connect, const char *id, struct qemu_revert_result *result, struct err *err);

#endif
