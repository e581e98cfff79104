/*
 * The checkpoint engine: takes a machine's checkpoints and puts them back.
 *
 * It sees the machine as a VM, its I/O loop, an ordered list of components and a list of disks, nothing else. The order
 * of a live checkpoint is that of docs/architecture.md:
 *
 *     stage    space, layer files, overlays, memory protected in chunks           VM runs; fails without effect
 *     quiesce  I/O loop parked, vCPUs stopped                                      pause begins
 *     capture  state copied, pages written since arming settled, disks switched    allocates nothing, touches no file
 *     resume                                                                       pause ends: CAPTURED
 *     persist  memory, state, disks, completion logs to stable storage
 *     commit   checksums, manifest, one rename, one catalogue transaction          DURABLE
 *
 * A failure or cancel before commit leaves the VM running and older checkpoints valid.
 *
 * Threads: one controlling thread at a time calls checkpoint_take, checkpoint_revert, engine_load (the engine locks
 * itself: a second caller gets -EBUSY, ERR_STATE). checkpoint_cancel and checkpoint_progress from any thread.
 */
#ifndef VMCP_CHECKPOINT_CHECKPOINT_H
#define VMCP_CHECKPOINT_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/component.h"
#include "base/event.h"
#include "checkpoint/memcow.h"
#include "checkpoint/planner.h"
#include "checkpoint/store/store.h"
#include "cowdisk/overlay.h"
#include "vmm/vm.h"

#define CKPT_MAX_DISKS 26

/* A disk of the machine as the engine needs it. Read-only disks are not listed: they do not change. */
struct ckpt_disk {
	const char *name;      /* "root": from [disk root] */
	struct cow_disk *disk; /* the machine's handle; stays the same object through checkpoints and reverts */
	const char *path;   /* absolute: where the user finds the disk's present state; links in it are resolved once */
	unsigned component; /* index in the engine's list of the device that serves it, for counting its requests in
			       flight */
};

struct ckpt_engine;

struct ckpt_engine_config {
	struct vm *vm;
	struct loop *io_loop;
	struct store *store;
	const char *vm_name;
	const char *vm_uuid;
	const struct component *components; /* in the order of application; the engine copies the list */
	unsigned component_count;
	const struct ckpt_disk *disks;
	unsigned disk_count;
	/* The machine's configuration as text (guest.cfg form, disks by name), kept in every manifest, so that `run
	 * --from` can build the same machine. */
	const char *config_text;
	/* The checkpoint that the machine was started from, "" if it was booted: the parent of the first one. */
	const char *parent_id;
};

int ckpt_engine_create(const struct ckpt_engine_config *config, struct ckpt_engine **out, struct err *err);
/* Cancels and waits for a checkpoint under way. The VM is stopped or quiesced. */
void ckpt_engine_destroy(struct ckpt_engine *engine);

/*
 * How safe a checkpoint is. CAPTURED: it is whole in this process, and dies with it. WRITTEN: all is handed to the filesystem, though not synced; it comes to be
 * by its commit. DURABLE: committed; a crash of the host does not hurt it.
 */
enum ckpt_level { CKPT_NOTHING, CKPT_CAPTURED, CKPT_WRITTEN, CKPT_DURABLE };
const char *ckpt_level_name(enum ckpt_level level); /* "captured", ...; "" for nothing */

enum ckpt_wait { CKPT_WAIT_CAPTURED, CKPT_WAIT_DURABLE, CKPT_WAIT_WRITTEN };

/* When the instant of a live checkpoint comes: as soon as can be, at the price of write faults until all is saved; or at the end
 * of the save, with the guest at its speed meanwhile. */
enum ckpt_instant { CKPT_INSTANT_NOW, CKPT_INSTANT_SETTLED };

/*
 * Where an operation of one VM waits for those of the other VMs of its group. Called in the thread that works; 0: go on; -errno: it is given up, with what each
 * operation's failure at that place means.
 *
 *     take    STAGED    the VM runs, all is ready for the pause
 *             STOPPED   it stands and is captured. Not one VM goes on before all are here; so no frame that one got is missing from what another had sent
 *             PREPARED  it runs again, all is durable but for the commit. 0: the group is committed (store_group_settle)
 *     revert  CHECKED   the VM runs, what can be refused was checked
 *             PARKED    it stands, and sends nothing. From here on it goes on, whatever is returned
 *             RESTORED  it is back, and does not run yet
 *
 * At STOPPED, PARKED and RESTORED the VM stands still: the wait must have an end there.
 */
enum ckpt_meeting { CKPT_MEET_STAGED, CKPT_MEET_STOPPED, CKPT_MEET_PREPARED, CKPT_MEET_CHECKED, CKPT_MEET_PARKED, CKPT_MEET_RESTORED };
struct ckpt_group {
	const char *id, *tag; /* of the group; of a take only. tag: "" if none */
	const char *members;  /* names of its VMs, with spaces between; of a take only */
	/* `cancel` turns true when the operation is cancelled. `checkpoint` is its id. */
	int (*meet)(void *opaque, enum ckpt_meeting where, const char *checkpoint, const volatile bool *cancel, struct err *err);
	void *opaque;
};

struct ckpt_request {
	bool live;	     /* false: the VM stands still until the checkpoint is durable */
	bool full;	     /* save all memory, though a parent has most of it */
	bool periodic;	     /* taken by a timer: marked so, for `keep` */
	enum ckpt_instant instant;
	uint64_t max_rate;   /* of writing memory, bytes a second; 0: as fast as it goes */
	const char *tag;     /* NULL: none. Must be free: -EEXIST, ERR_STATE */
	const char *message; /* NULL: none */
	/* CAPTURED: return after resume; the rest goes on in the background. WRITTEN is machine_checkpoint's: here it is as DURABLE. */
	enum ckpt_wait wait;
	uint64_t deadline_ns; /* clock_now_ns; 0: none. It only tells ckpt_cancel_late */
	const struct ckpt_group *group; /* NULL: none. Must be live, and is used until the checkpoint is durable or has failed: who asks waits for that */
};

struct ckpt_disk_result {
	char name[64];
	char layer[STORE_ID_BYTES];
	uint32_t inflight_writes, inflight_reads;
};

/* As `checkpoint --json` of the command line. Times in ns. */
struct ckpt_result {
	char id[STORE_ID_BYTES], parent[STORE_ID_BYTES];
	bool live, durable;
	bool written; /* what ckpt_wait_written waited for */
	uint64_t created_wall_ns;
	uint64_t pause_start_ns; /* CLOCK_MONOTONIC */
	uint64_t group_ns;	 /* of the pause: waiting for the other VMs of the group */
	uint64_t pause_ns, quiesce_ns, state_ns, disks_ns, memory_ns, resume_ns;
	uint64_t captured_ns; /* request to captured */
	uint64_t durable_ns;  /* request to durable; 0 while it is not */
	uint64_t total_pages, saved_pages, zero_pages, parent_pages;
	uint64_t cow_faults, cow_fault_p50_ns, cow_fault_p99_ns, cow_fault_p999_ns, cow_fault_max_ns;
	uint64_t throttled, throttled_ns; /* faults that waited for a buffer, and how long in all */
	uint64_t written_bytes;
	uint64_t armed_again_pages; /* settled in the pause: see memcow.h */
	/* How memory was held, and "-all" if all of it was saved: docs/memory-cow.md. A constant. */
	const char *plan;
	struct planner_plan planned; /* the reason, and what was foreseen */
	struct planner_costs costs;  /* that it was foreseen from */
	uint64_t free_bytes;	     /* the host's, then */
	uint64_t stage_ns, stage_passes; /* until the pause: holding memory */
	uint32_t disk_count;
	struct ckpt_disk_result disks[CKPT_MAX_DISKS];
};

/*
 * Takes a checkpoint. Works on a running and on a paused (vm_is_quiesced) VM, and leaves it as it was. With
 * CKPT_WAIT_CAPTURED the result is that of the instant of capture; checkpoint_wait waits for the rest.
 */
int ckpt_take(struct ckpt_engine *engine, const struct ckpt_request *request, struct ckpt_result *result,
	      struct err *err);
/* Waits for a checkpoint that runs in the background, and gives its final result; 0 and result->id "" if there is none.
 */
int ckpt_wait(struct ckpt_engine *engine, struct ckpt_result *result, struct err *err);
/* The same until all is written; *result of the capture is kept, marked written. One that is durable or failed by then is told as by ckpt_wait. */
int ckpt_wait_written(struct ckpt_engine *engine, struct ckpt_result *result, struct err *err);
struct ckpt_progress {
	uint64_t number; /* of the operation, of this engine's */
	bool active;
	bool reverts; /* a revert is under way; else a checkpoint */
	enum ckpt_level level;
	uint64_t created_wall_ns; /* the instant that it shows, once it is captured */
	char id[STORE_ID_BYTES];  /* of the checkpoint that is made, or gone back to */
	const char *phase; /* "stage", "pause", "memory", "in-flight I/O", "disks", "commit"; of a revert: "check", "in-flight I/O" */
	uint64_t done_pages, total_pages; /* that are in the file or zero, of those to be saved; the VM's, before it is known which */
	char waits_for[WAIT_TEXT_BYTES]; /* what it has waited for a while by now: disk, request, range, age; "": nothing */
};
void ckpt_progress(struct ckpt_engine *engine, struct ckpt_progress *out);

/* Asks the checkpoint under way to stop: it then fails with -ECANCELED and leaves nothing behind. Or the revert, as long as it waits for requests in
 * flight: the VM then goes on as if nothing had been. False if there is none. *what (NULL: not asked for): which it is, and what it was at; the id is "" if it had none yet. */
bool ckpt_cancel(struct ckpt_engine *engine, struct ckpt_progress *what);
/* Returns when that operation, as ckpt_cancel told, has ended: what it had made is undone, and the next may begin. */
void ckpt_wait_end(struct ckpt_engine *engine, const struct ckpt_progress *what);

/* The same, but only for one that was asked for as periodic. */
bool ckpt_cancel_periodic(struct ckpt_engine *engine);

/* The same, but only for one whose deadline has passed. */
bool ckpt_cancel_late(struct ckpt_engine *engine);

struct ckpt_revert_result {
	char id[STORE_ID_BYTES];
	uint64_t restored_pages; /* pages whose content changed */
	uint64_t revert_ns;	 /* request until the VM runs again */
	/* Its parts: what can be checked while the VM runs; until it stands; finding, reading and checking pages; requests in flight; putting
	 * pages back; states of vCPUs and devices; fresh overlays and completion logs; until the VM runs. */
	uint64_t check_ns, stop_ns, pages_ns, drain_ns, memory_ns, state_ns, disks_ns, resume_ns;
};

/*
 * Takes the running (or paused) VM back to checkpoint `id`, in place: stop, gather, settle (ckpt_cancel ends it up to here), drain, put pages back, load state, fresh
 * overlays, apply the completion log, resume (a paused VM stays paused: `resume` says whether to run). Everything that
 * can be refused is checked (checksums of state, index and pages included) before the machine is touched. Fails after that
 * point: the VM stays quiesced, sticky; only another revert or its end is possible, and the message says so. What was read of the
 * checkpoint is kept, up to 4 of them, with up to 4 MiB of pages each.
 */
int ckpt_revert(struct ckpt_engine *engine, const char *id, bool resume, struct ckpt_revert_result *result,
		struct err *err);
/* The same together with other VMs. */
int ckpt_revert_in_group(struct ckpt_engine *engine, const char *id, bool resume, const struct ckpt_group *group,
			 struct ckpt_revert_result *result, struct err *err);

/* The same for a machine that was just built and never ran (run --from): memory, state, disks (already opened on fresh
 * overlays by the machine) and the completion log. */
int ckpt_load(struct ckpt_engine *engine, const char *id, struct err *err);

/* 0, or the error of the revert that failed half way: the machine must not run until another revert succeeds. */
int ckpt_check(struct ckpt_engine *engine, struct err *err);

struct ckpt_consolidation {
	uint64_t layers, pages; /* merged, copied; 0: nothing was worth it */
	uint64_t shared_pages;	/* of those copied: the filesystem has them once for both layers */
};
/*
 * Copies what is still needed of old memory layers into a new one, if that pays (consolidate.h); the next checkpoint's index names it. For a
 * background thread: works beside checkpoints and reverts, with one caller at a time; *stop turning true ends it with -ECANCELED.
 */
int ckpt_consolidate(struct ckpt_engine *engine, const _Atomic bool *stop, struct ckpt_consolidation *done, struct err *err);

struct ckpt_disk_merge {
	uint64_t runs, layers, copied_bytes; /* so many layers became so many, and what was copied for that */
	uint64_t followed;		     /* merges of other processes that the disks turned to */
};
/*
 * Merges layers below the machine's disks that no checkpoint names any more, as far as that pays, and turns the disks to what was merged. Layers that
 * nothing stands on then are left to store_gc: it returns after some merges, and is called again until it makes none. For a background thread: works
 * beside checkpoints and reverts; *stop turning true ends it with -ECANCELED. -EBUSY: somebody else merges in this store.
 */
int ckpt_merge_disks(struct ckpt_engine *engine, const _Atomic bool *stop, struct ckpt_disk_merge *done, struct err *err);

/* Counters of the memory side of the checkpoint under way, or of the last one. */
void ckpt_memory_stats(struct ckpt_engine *engine, struct memcow_stats *out);

/* How long guests waited, over all live checkpoints since the engine was made. */
#define CKPT_LATENCY_FIRST_POWER 14 /* 16 us */
#define CKPT_LATENCY_BUCKETS	  21 /* to 17 s */
struct ckpt_latency {
	uint64_t count, sum_ns, p50_ns, p99_ns, p999_ns, max_ns;
	uint64_t below[CKPT_LATENCY_BUCKETS]; /* how many took less than 2^(CKPT_LATENCY_FIRST_POWER + i) ns */
};
struct ckpt_history {
	struct ckpt_latency pauses;
	struct ckpt_latency cow_faults; /* seen by the fault thread until released */
	uint64_t throttled, throttled_ns; /* of them, those that waited for a buffer, and how long in all */
	uint64_t written_pages_per_s;	  /* different pages that the guest wrote, as measured for the last checkpoints; 0: not yet */
};
void ckpt_history(struct ckpt_engine *engine, struct ckpt_history *out);

/* Where the VM stands: the newest checkpoint that it took or went back to, "" if none. Copied. */
void ckpt_position(struct ckpt_engine *engine, char id[STORE_ID_BYTES]);

/* Makes, at `path`, a fresh overlay on the layer that checkpoint `id` holds for disk `disk_name`, durable, by rename
 * over what is there. For starting a machine from a checkpoint. */
int ckpt_make_overlay(struct store *store, const char *id, const char *disk_name, const char *path, struct err *err);

#endif
