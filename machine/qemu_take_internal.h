/* A checkpoint of a domain while it is taken: qemu_take.c, and qemu_persist.c for what comes once QEMU has saved its memory. */
#ifndef VMCP_MACHINE_QEMU_TAKE_INTERNAL_H
#define VMCP_MACHINE_QEMU_TAKE_INTERNAL_H

#include "machine/qemu_internal.h"

struct qemu_take_disk {
	const struct qemu_disk *disk;
	struct store_disk_layer layer;
	char *overlay, *layer_path;
	bool made;
};

struct qemu_take {
	struct store *store;
	const struct qemu_request *request;
	struct qemu_result *result;
	struct libvirt *libvirt;
	struct libvirt_guest *guest;
	struct store_vm_lock *lock;
	struct store_pin *parent_pin;
	struct store_draft *draft;
	struct qemu_domain domain;
	struct libvirt_guest_state state;
	char *xml; /* as it ran before */
	struct qemu_take_disk disks[CONFIG_MAX_DISKS];
	unsigned disk_count;
	char layer[STORE_ID_BYTES];
	int fd, sums_fd;
	uint64_t start_ns, pages;
	bool capability, stopped, turned, saving;
};

/* -ECANCELED once it is asked for. */
int qemu_check_cancel(const struct qemu_take *take, struct err *err);
void qemu_tell(const struct qemu_take *take, const char *phase, uint64_t done_bytes, uint64_t total_bytes);

/* In this order. */
int qemu_put_stream(struct qemu_take *take, struct err *err);
int qemu_measure_layers(struct qemu_take *take, struct err *err);
/* The draft is gone then, in every case but a failure before the commit. */
int qemu_commit(struct qemu_take *take, struct err *err);

#endif
