/* What the parts of the engine share: engine.c (life, locking), take.c (stage, pause), take_disks.c, persist.c (save,
 * commit), revert.c. */
#ifndef VMCP_CHECKPOINT_ENGINE_INTERNAL_H
#define VMCP_CHECKPOINT_ENGINE_INTERNAL_H

#include <pthread.h>

#include "checkpoint/checkpoint.h"
#include "checkpoint/consolidate.h"
#include "checkpoint/histogram.h"
#include "checkpoint/index.h"
#include "checkpoint/loader.h"
#include "checkpoint/memcow.h"
#include "checkpoint/planner.h"
#include "checkpoint/restore.h"
#include "checkpoint/scheduling.h"
#include "checkpoint/state_set.h"
#include "checkpoint/tracker.h"

struct engine_disk {
	char *name;
	struct cow_disk *disk;
	unsigned component;
	char *path; /* absolute, links resolved: a rename onto it must replace the image, not a link to it */
	/* owner: the operation under way */
	struct cow_overlay *unsealed; /* of a checkpoint that was given up: its layer must be sealed before the next */
	bool unsafe; /* the chain holds a layer of which it is unknown whether it is whole on the disk */
	/* What checkpoint `sealed_at` holds of it ("": none that counts): the layer under the present top, if the VM has not gone elsewhere. */
	char sealed_at[STORE_ID_BYTES];
	struct store_disk_layer sealed;
};

/*
 *     FREE --operation_begin--> BUSY --operation_end--> FREE
 *                               BUSY --(the background thread was started)--> BACKGROUND --(it ends)--> FREE
 */
enum engine_activity { ENGINE_FREE, ENGINE_BUSY, ENGINE_BACKGROUND };

struct ckpt_engine {
	/* immutable */
	struct vm *vm;
	struct loop *loop;
	struct store *store;
	struct mem *mem;
	char *vm_name, *vm_uuid, *config_text;
	struct component *components;
	unsigned component_count, disk_count;
	struct engine_disk disks[CKPT_MAX_DISKS];

	/* owner: the operation under way */
	struct memcow *memcow;
	struct loader *loader;	      /* of a VM that was started from a checkpoint, else NULL */
	struct tracker *tracker;      /* its base, if it has one, is the position */
	struct planner_costs costs;   /* measured so far */
	_Atomic uint64_t written_rate; /* costs.written_pages_per_s, for any thread to read */
	bool staged_last;	      /* so what copying costs is known */
	struct histogram pauses;      /* of live checkpoints; read by any thread */
	struct revert_cache *reverts; /* NULL before the first revert in place */
	bool position_unrecorded;     /* the store could not be told of it */
	char base_id[STORE_ID_BYTES]; /* of base_index, "" for none: the newest checkpoint's, which the next one begins with */
	struct page_index base_index;
	struct err live_error;	   /* why memory cannot be protected on this host; number 0 if it can */
	struct state_set captured; /* the buffers of the pause */
	/* owner: who consolidates */
	char spoilt_layers[16][STORE_ID_BYTES]; /* found damaged, the newest ones */
	unsigned spoilt_count;

	/* owner: the operation under way */
	struct store_pin *pin;	   /* holds the position's checkpoint; NULL if there is none */

	pthread_mutex_t lock; /* all below; a leaf */
	pthread_cond_t changed;
	enum engine_activity activity;
	bool cancellable;
	bool periodic; /* the checkpoint under way was asked for by a timer */
	uint64_t deadline_ns; /* the checkpoint under way was given, 0: none */
	char position[STORE_ID_BYTES];
	struct consolidated *consolidated; /* waits for the next checkpoint, or NULL */
	struct err broken;   /* sticky: a revert failed half way */
	bool thread_started; /* the background thread is to be joined */
	pthread_t thread;
	bool have_last; /* the result of the last background checkpoint was not asked for yet */
	struct ckpt_result last;
	struct err last_err;
	struct ckpt_progress progress;
	uint64_t operations; /* that have begun */

	volatile bool cancel; /* set by any thread, cleared by operation_begin; a flag, orders nothing */
};

struct revert_cache;

struct take_disk {
	struct engine_disk *disk;
	struct store_disk_layer layer;
	char *layer_path, *temp_path;
	struct cow_overlay *overlay;
	bool renamed; /* the overlay stands at the disk's path */
	bool unchanged; /* since the parent: that one's layer is named again, and the overlay stays */
};

/* One checkpoint in the making. */
struct take {
	struct ckpt_engine *engine;
	bool live, full, settled, periodic;
	uint64_t max_rate;
	char *tag, *message;
	const struct ckpt_group *group; /* or NULL */
	struct store_draft *draft;
	char memory_layer[STORE_ID_BYTES];
	int fd, sums_fd;
	struct seal_pages *cipher; /* of that layer, in an encrypted store */
	/* The parent's, if only what was written since is saved; else page_count is 0. */
	struct page_index parent_index;
	struct page_index index; /* its own, once it was built */
	struct consolidated *consolidated; /* claimed from the engine */
	struct planner_case plan_case;
	struct planner_plan plan;
	bool needs_written; /* the instant: what the tracker finds in the pause */
	bool armed;    /* memcow must be abandoned */
	bool switched; /* the disks stand on their overlays */
	bool parked;   /* the loop */
	bool stopped;  /* the VM, by us */
	uint64_t start_ns, pause_start_ns;
	unsigned disk_count;
	struct take_disk disks[CKPT_MAX_DISKS];
	struct ckpt_result result;
};

/* --- engine.c --- */
/* Waits for the others of the group; 0 at once without one. */
int engine_meet(struct ckpt_engine *engine, const struct ckpt_group *group, enum ckpt_meeting where, const char *checkpoint, struct err *err);
/* Keeps a checkpoint's index, so that the next checkpoint need not read it. Takes over *index. */
void engine_keep_base(struct ckpt_engine *engine, const char *id, struct page_index *index);
/* Gives it out, if it is that of checkpoint `id`. The caller frees it. */
bool engine_take_base(struct ckpt_engine *engine, const char *id, struct page_index *out);
void engine_set_phase(struct ckpt_engine *engine, const char *phase);
/* Of the checkpoint under way, whose instant was `created_wall_ns`. */
void engine_set_level(struct ckpt_engine *engine, enum ckpt_level level, uint64_t created_wall_ns);
int engine_check_cancel(struct ckpt_engine *engine, struct err *err);
/* The same, and from here on the operation under way cannot be cancelled any more. */
int engine_end_cancellable(struct ckpt_engine *engine, struct err *err);
/* What the checkpoint under way waits for, for its progress; "": nothing any more. `opaque` is the engine: for struct wait. */
void engine_report(void *opaque, const char *waits_for);
void engine_set_position(struct ckpt_engine *engine, const char *id);
void engine_set_broken(struct ckpt_engine *engine, const struct err *err);
/* Runs `take` to its end in a thread of its own, which calls take_persist, then operation's end. Fails without effect.
 */
int engine_run_background(struct ckpt_engine *engine, struct take *take, struct err *err);

/* Reads a checkpoint's index and checks it against the machine's memory. */
int engine_read_index(struct ckpt_engine *engine, const struct store_checkpoint *checkpoint, struct page_index *out,
		      struct err *err);

/* Maps a checkpoint's memory into a VM that never ran. Takes over *index. */
int engine_map_memory(struct ckpt_engine *engine, const char *checkpoint, struct page_index *index, struct err *err);

/* --- take_memory.c --- */
/* Chooses how the instant of memory is held, and prepares it; the VM may run. take->armed tells whether to abandon. */
int take_stage_memory(struct take *take, struct err *err);
/* In the pause. -ENOBUFS: the guest wrote too much for the way that was chosen; take_restage_memory, then once more. */
int take_capture_memory(struct take *take, struct err *err);
/* After -ENOBUFS, while the VM runs again: a way that needs no buffers for all of it. */
int take_restage_memory(struct take *take, struct err *err);

/* --- take_disks.c --- */
/* The path's neighbour under which a new overlay is made. malloc. */
char *disk_temp_path(const char *path);
/* Makes the rename of `path` durable: syncs its folder. */
int disk_sync_folder(const char *path, struct err *err);
/* Links all disks' present images into the store and puts empty overlays in their place. */
int take_stage_disks(struct take *take, struct err *err);
/* In the pause: -ESTALE if a disk that was taken for unchanged is not, or has requests in flight; take_restage_disks, then once more. */
int take_check_disks(struct take *take, struct err *err);
/* After -ESTALE, while the VM runs again. */
int take_restage_disks(struct take *take, struct err *err);
/* After the commit. */
void take_note_disks(struct take *take);
/* Before the switch: the old images back in place. */
void take_unstage_disks(struct take *take);
/* Seals the layers and fills in their sizes and checksums. */
int take_seal_disks(struct take *take, struct err *err);
/* After a failure behind the switch: seals what it can, so that the chain is sound, and puts the layers back in the overlays' places. */
void take_settle_disks(struct take *take);

/* --- persist.c --- */
/* From the end of the pause to the commit. On failure the caller calls take_fail. */
int take_persist(struct take *take, struct err *err);
/* Sets the loop and the VM free, as far as this take holds them. Returns CLOCK_MONOTONIC of the instant when the last
 * vCPU left for the guest: the caller itself may be late, as the vCPUs take the CPUs. */
uint64_t take_release_machine(struct take *take);
/* Undoes everything that can be undone. The machine goes on. */
void take_fail(struct take *take);
void take_free(struct take *take);

/* --- revert_node.c --- */
void revert_cache_free(struct ckpt_engine *engine);

#endif
