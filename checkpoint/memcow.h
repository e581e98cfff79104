/*
 * Memory copy-on-write for one checkpoint: the pages of its scope, as they were at one instant, are written to a layer
 * file, while the guest runs on. The scope is all memory, or what was written since the parent (checkpoint/tracker.h).
 *
 * Three ways to hold the instant; whoever takes the checkpoint chooses:
 *
 * - protect, for much memory: userfaultfd write protection on the memory's memfd mapping. Armed ahead of the instant in
 *   chunks while the guest runs; pages written meanwhile are noted and armed again, in further bounded passes and
 *   finally in the pause. After the instant whoever meets a page first, the fault path (a guest or VMM write met the
 *   protection) or the sweeper, copies it to a preallocated buffer and *then* claims its bit; only a claimed page is
 *   released. A writer takes the buffers to the file. So nobody ever waits for storage, nor for the sweeper; when
 *   buffers run out, faults wait for the writer and the wait is counted.
 * - stage, for little: pages are copied to buffers while the guest runs, those that it writes again once more, and the
 *   last few in the pause. Of several copies of a page the newest counts. Nothing is protected, no write waits.
 * - settle, without protection: the scope is written to the file while the guest runs, in passes, each over what was
 *   written during the one before, until so little is left that it can be staged. The instant comes at the end of the
 *   save, the guest pays nothing but what finding its writes costs.
 * - stopped: the memory stands still until it is saved.
 *
 *     IDLE --arm--> ARMED --arm_more--> ARMED
 *     ARMED --instant--> CAPTURED --save--> SAVING --finish--> IDLE        any --abandon--> IDLE
 *     IDLE --stage--> STAGED --stage_more--> STAGED --instant--> CAPTURED
 *     IDLE --settle--> SETTLING --settle_more--> SETTLING --stage_more--> STAGED
 *     IDLE --arm_stopped--> STOPPED --instant--> CAPTURED
 *
 * Bitmaps have one bit a ram page, mem_pages / 64 words, rounded up.
 *
 * Threads: get_stats from any; all else from the engine's thread, one at a time. Fault thread (one, lives as long as the
 * memcow), sweeper and writer (one checkpoint long) are its own. The fault thread takes no lock of a device, writes no
 * guest memory, allocates nothing.
 */
#ifndef VMCP_CHECKPOINT_MEMCOW_H
#define VMCP_CHECKPOINT_MEMCOW_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "checkpoint/histogram.h"
#include "checkpoint/page_words.h"
#include "vmm/memory.h"

struct memcow;
struct seal_pages;

/* `protect`: opens userfaultfd (ERR_HOST with a hint if the host has none, or it lacks write protection of memfds) and
 * registers the memory, for good. Without it only memcow_arm_stopped works. */
int memcow_create(struct mem *mem, bool protect, struct memcow **out, struct err *err);
/* Abandons what is under way. Nobody may touch the memory's protected pages from here on but through this memcow's end:
 * vCPUs are stopped or gone. */
void memcow_destroy(struct memcow *cow);

/*
 * Before a checkpoint: where vCPUs run, and whether the caller and the threads that inherit its affinity share those processors.
 * There faults are answered: a vCPU that faults sleeps, so the fault thread can have its processor at once, while another one may
 * have to be woken from idleness first. Threads that share them make room for the vCPUs after each block of pages.
 */
void memcow_set_processors(struct memcow *cow, const cpu_set_t *busy, bool shared);

/* Whether memcow_arm can work: not without userfaultfd, nor after protection was given up for good. */
bool memcow_can_protect(struct memcow *cow);

/* For how many pages there are buffers already. */
uint64_t memcow_kept_pages(const struct memcow *cow);

struct memcow_target {
	int fd;		       /* the layer file, empty */
	int sums_fd;	       /* empty: gets the places and checksums of its pages (checkpoint/sums.h); -1 for none, which no reader can do without */
	struct seal_pages *cipher; /* encrypts what goes to the file; its checksums are of that. NULL: none. The writer's until finish or abandon */
	const uint64_t *scope; /* bitmap of the pages to save, copied; NULL: all */
	uint64_t max_rate;     /* bytes a second to the file at most; 0: as fast as it goes */
	uint64_t buffer_pages; /* stage and settle: how many copies there may be at a time; 0: a quarter more than the scope has, and 8 MiB */
	const volatile bool *cancel; /* settle: turning true ends it with -ECANCELED; NULL: none */
};

/*
 * Arms the scope while the VM runs. The descriptors stay the caller's and must stay open until finish or abandon; fd is
 * switched to O_DIRECT meanwhile where the filesystem takes it. -ENOSPC if the filesystem has less space free than the scope may take. Fails
 * without effect.
 */
int memcow_arm(struct memcow *cow, const struct memcow_target *target, struct err *err);
/* Once more while the VM runs, for a scope that is not all memory: pages of `written` join it, and what was written since is armed again.
 * *left: how many these were. On failure the checkpoint must be abandoned. */
int memcow_arm_more(struct memcow *cow, const struct page_words *written, uint64_t *left, struct err *err);
/* The same as memcow_arm for memory that stands still from memcow_instant until memcow_finish returns: no protection. */
int memcow_arm_stopped(struct memcow *cow, const struct memcow_target *target, struct err *err);
/* Copies the scope, which must be given, while the VM runs. Fails without effect. */
int memcow_stage(struct memcow *cow, const struct memcow_target *target, struct err *err);
/* Copies the pages of `written`, those of the scope once more. -ENOBUFS if the buffers do not suffice. On failure the checkpoint
 * must be abandoned. */
int memcow_stage_more(struct memcow *cow, const struct page_words *written, struct err *err);
/* Writes the scope to the file, while the VM runs; returns when all is written. The VM's writes are being logged already.
 * Fails without effect. */
int memcow_settle(struct memcow *cow, const struct memcow_target *target, struct err *err);
/* Writes the pages of `written` once more. Not after memcow_stage_more. On failure the checkpoint must be abandoned. */
int memcow_settle_more(struct memcow *cow, const struct page_words *written, struct err *err);
/* In the pause. written: pages that the tracker found in it, or NULL; those outside the scope join it. Staged:
 * copies them; -ENOBUFS as above. Armed: copies (few) or arms again (many) what was written since. Allocates nothing,
 * touches no file. On failure the checkpoint must be abandoned. */
int memcow_instant(struct memcow *cow, const struct page_words *written, struct err *err);
/* Starts to save. After the pause. */
void memcow_save(struct memcow *cow);
/* Waits until all pages are in the file (not synced). *cancel (may be NULL) turning true ends the wait: -ECANCELED. An
 * I/O error: that error. On failure call memcow_abandon then; on success the memcow is idle again. */
int memcow_finish(struct memcow *cow, const volatile bool *cancel, struct err *err);
/* Drops the checkpoint in any state: protection off, nobody waits any more. The descriptors may be closed after it.
 * Idle: nothing. */
void memcow_abandon(struct memcow *cow);

struct memcow_stats {
	uint64_t total_pages, scope_pages, saved_pages, zero_pages; /* saved + zero = scope when finished */
	uint64_t armed_again_pages; /* settled in the pause: written after arming or staging, copied or armed again */
	uint64_t copied_pages, copy_ns;	  /* staged while the VM runs, breaks for others included */
	uint64_t touched_pages, touch_ns; /* of them, memory had for the first time: not in copy_ns */
	uint64_t arm_ns, arm_passes, arm_faults; /* arm_faults: writes that met the protection before the instant */
	uint64_t cow_faults, cow_fault_p50_ns, cow_fault_p99_ns, cow_fault_p999_ns,
		cow_fault_max_ns; /* fault seen by the handler to release */
	uint64_t throttled, throttled_ns; /* faults that waited for a buffer, and how long in all */
	uint64_t written_bytes;
};
void memcow_get_stats(struct memcow *cow, struct memcow_stats *out);
/* Of all checkpoints of this memcow. *faults lives as long as it does. */
void memcow_get_history(struct memcow *cow, const struct histogram **faults, uint64_t *throttled, uint64_t *throttled_ns);
/* Bitmaps: the pages of the scope, and those of them that were all zeroes at the instant and so are not in the file. Valid
 * after finish until the next checkpoint. */
const uint64_t *memcow_scope(const struct memcow *cow);
const _Atomic uint64_t *memcow_zero_map(const struct memcow *cow);

#endif
