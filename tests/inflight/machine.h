/*
 * A machine without KVM: real memory, I/O loop, PCI, virtio disks, images, store and checkpoint engine, on the block layer of test_layer.h.
 * The test itself is the guest, and stands still while it calls. All that the guest knows (rings, buffers, the journal of what it
 * issued and saw complete) is in guest memory, so that it goes back with the machine.
 */
#ifndef VMCP_TESTS_INFLIGHT_MACHINE_H
#define VMCP_TESTS_INFLIGHT_MACHINE_H

#include <stdio.h>
#include <stdlib.h>

#define cr_assert(condition, ...) ((condition) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), abort()))
#define cr_assert_eq(a, b, ...)	  cr_assert((a) == (b), "")
#include "devices/virtio_test.h"

#include "checkpoint/checkpoint.h"
#include "devices/virtio_blk.h"
#include "tests/inflight/history.h"
#include "tests/inflight/test_layer.h"

enum {
	MACHINE_DISKS = 3,
	MACHINE_QUEUES = 4,
	GUEST_SLOTS = 512, /* requests in flight, of all disks */
	GUEST_SECTORS = 16 /* of data in a request */
};

enum guest_type { GUEST_READ = 0, GUEST_WRITE = 1, GUEST_FLUSH = 4, GUEST_DISCARD = 11, GUEST_ZEROES = 13 };

struct guest_slot {
	bool busy, quiet; /* quiet: in the ring, but the device has not been told */
	uint8_t disk, queue;
	uint16_t descriptor;
	uint32_t type;
	uint64_t sector, count, version;
	uint64_t since;	 /* the moment of issue */
	unsigned number; /* in the disk's history */
};

/* In guest memory. */
struct guest {
	struct rig_queue queues[MACHINE_DISKS][MACHINE_QUEUES];
	uint16_t owner[MACHINE_DISKS][MACHINE_QUEUES][256]; /* of a descriptor: slot + 1 */
	struct guest_slot slots[GUEST_SLOTS];
	bool untold[MACHINE_DISKS][MACHINE_QUEUES]; /* the device is to be notified */
	unsigned busy;
	uint64_t issued, completed;
};

/* What the guest saw of a request: the same in every copy of it. */
struct outcome {
	bool seen;
	uint8_t status;
	uint32_t written; /* as the used ring says */
	uint64_t data;	  /* checksum of what was read */
};

struct vm {
	struct mem *mem;
	_Atomic uint64_t *log; /* the dirty log */
	_Atomic bool standing;
};

struct machine {
	char dir[64];
	struct rig rig;
	struct vm vm;
	struct store *store;
	struct store_vm_lock *vm_lock;
	struct ckpt_engine *engine;
	struct cow_io *io;
	struct test_layer *layer;
	unsigned disk_count, queue_count;
	bool flushes; /* the driver knows flushes */
	struct {
		char *path;
		struct cow_disk *disk;
		struct virtio_blk *blk;
		uint64_t sectors, cluster_sectors;
		struct history *history;
		uint64_t moment; /* of the last machine_mark, in its history; 0: what is in flight was issued later */
	} disks[MACHINE_DISKS];
	struct guest *guest;
	uint64_t version;
	bool may_fail;	 /* requests, as the layer injects errors */
	struct outcome outcomes[GUEST_SLOTS]; /* of the requests that were in flight at the last machine_mark */
	bool comparing;			      /* with those: the guest went back there */
};

struct machine_shape {
	unsigned disks, queues;
	uint32_t cluster_bytes; /* 0: raw images */
	uint64_t sectors;	/* of each disk */
	bool without_flush;
	uint64_t seed; /* also tells whether the I/O thread polls */
};

struct machine *machine_start(const struct machine_shape *shape);
void machine_end(struct machine *m);

/* Calls into the block layer, in the I/O thread. */
void machine_set_rules(struct machine *m, const struct test_rule *rules, unsigned count);
void machine_end_some(struct machine *m, unsigned count);
unsigned machine_held(struct machine *m);
/* All that the devices were told of has been begun, and all that has ended is in the rings. No device looks at its queues before something ends or it is
 * notified. */
void machine_settle(struct machine *m);

/*
 * Offers a request. The device takes it when it looks at the ring, at the latest when it is notified. NULL: no slot or descriptor is free.
 * quiet: it does not look before, as it was settled, nothing else is offered, and nothing in flight ends; so the request is issued with the notification,
 * perhaps behind a checkpoint.
 */
struct guest_slot *guest_offer(struct machine *m, unsigned disk, unsigned queue, enum guest_type type, uint64_t sector, uint64_t count, bool quiet);
void guest_notify(struct machine *m); /* of all that was offered */
/* Takes and checks what has completed; returns how many. */
unsigned guest_reap(struct machine *m);
/* Until nothing is in flight. False if something does not end. */
bool guest_drain(struct machine *m);
/* The moment of a checkpoint: what is in flight now is its, what comes later is not. */
void machine_mark(struct machine *m);
/* What the layers of a checkpoint hold, which must be what was issued before machine_mark. Free it. */
void machine_check_layers(struct machine *m, const char *checkpoint, uint8_t *layers[MACHINE_DISKS]);
/*
 * Goes back to it. What was in flight completes once, as it did before, though the disks do not answer: but for what the checkpoint does not hold the
 * completion of, which is issued again. Returns how many those were. At the end nothing is in flight, and the disks are right.
 */
unsigned machine_go_back(struct machine *m, const char *checkpoint, uint8_t *const layers[MACHINE_DISKS]);
/* The block layer lets everything pass, and nothing is in flight at the end. */
void machine_end_everything(struct machine *m);
/* Reads all of a disk, past the guest. Free it. */
uint8_t *machine_read_disk(struct machine *m, unsigned disk);
/* Each sector is one that the history allows. */
void machine_check_sectors(struct machine *m, const char *what, unsigned disk, const uint8_t *data, uint64_t sector, uint64_t count,
			   uint64_t from, uint64_t moment);
/* The disks hold what the guest wrote; from now on that is where their histories begin. Nothing is in flight. */
void machine_check_disks(struct machine *m);

#endif
