/*
 * Memory copy-on-write for one checkpoint: every page of guest memory as it was at one instant is written to a layer
 * file, while the guest runs on.
 *
 * userfaultfd write protection on the memory's memfd mapping. Armed ahead of the instant in chunks while the guest
 * runs; pages written meanwhile are noted and armed again, in further bounded passes and finally in the pause. After
 * the instant whoever meets a page first, the fault path (a guest or VMM write met the protection) or the sweeper,
 * copies it to a preallocated buffer and *then* claims its bit; only a claimed page is released. A writer takes the
 * buffers to the file. So nobody ever waits for storage, nor for the sweeper; when buffers run out, faults wait for the
 * writer and the wait is counted.
 *
 *     IDLE --arm--> ARMED --instant--> CAPTURED --save--> SAVING --finish--> IDLE        any --abandon--> IDLE
 *     IDLE --arm_stopped--> CAPTURED: the memory stands still until finish, nothing is protected
 *
 * Threads: arm, instant, save, finish, abandon from the engine's thread, one at a time; get_stats from any. Fault
 * thread (one, lives as long as the memcow), sweeper and writer (one checkpoint long) are its own. The fault thread
 * takes no lock of a device, writes no guest memory, allocates nothing.
 */
#ifndef VMCP_CHECKPOINT_MEMCOW_H
#define VMCP_CHECKPOINT_MEMCOW_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "vmm/memory.h"

struct memcow;

/* `protect`: opens userfaultfd (ERR_HOST with a hint if the host has none, or it lacks write protection of memfds) and
 * registers the memory, for good. Without it only memcow_arm_stopped works. */
int memcow_create(struct mem *mem, bool protect, struct memcow **out, struct err *err);
/* Abandons what is under way. Nobody may touch the memory's protected pages from here on but through this memcow's end:
 * vCPUs are stopped or gone. */
void memcow_destroy(struct memcow *cow);

/*
 * Arms all memory while the VM runs. fd: the layer file, written at natural offsets (page p at p * 4096); sums_fd: its
 * page checksums (xxh3-64 of each saved page, LE64 at p * 8, 0 for the others), -1 for none. Both stay the caller's and
 * must stay open until finish or abandon; fd is switched to O_DIRECT meanwhile where the filesystem takes it. Space is
 * reserved for all populated memory where the filesystem can: -ENOSPC. Fails without effect.
 */
int memcow_arm(struct memcow *cow, int fd, int sums_fd, struct err *err);
/* The same for memory that stands still until memcow_finish returns: no protection, and the instant is now. Next is
 * memcow_save. */
int memcow_arm_stopped(struct memcow *cow, int fd, int sums_fd, struct err *err);
/* In the pause: copies (few) or arms again (many) the pages written since. Allocates nothing, touches no file. On
 * failure the checkpoint must be abandoned. */
int memcow_instant(struct memcow *cow, struct err *err);
/* Starts to save. After the pause. */
void memcow_save(struct memcow *cow);
/* Waits until all pages are in the file (not synced). *cancel (may be NULL) turning true ends the wait: -ECANCELED. An
 * I/O error: that error. On failure call memcow_abandon then; on success the memcow is idle again. */
int memcow_finish(struct memcow *cow, const volatile bool *cancel, struct err *err);
/* Drops the checkpoint in any state: protection off, nobody waits any more. The descriptors may be closed after it.
 * Idle: nothing. */
void memcow_abandon(struct memcow *cow);

struct memcow_stats {
	uint64_t total_pages, saved_pages, zero_pages; /* of the checkpoint; saved + zero = total when finished */
	uint64_t armed_again_pages;		       /* written after arming: copied or armed again in the pause */
	uint64_t arm_ns, arm_passes, arm_faults; /* arm_faults: writes that met the protection before the instant */
	uint64_t cow_faults, cow_fault_p50_ns, cow_fault_p99_ns, cow_fault_p999_ns,
		cow_fault_max_ns; /* fault seen by the handler to release */
	uint64_t throttled;	  /* faults that waited for a buffer */
	uint64_t written_bytes;
};
void memcow_get_stats(struct memcow *cow, struct memcow_stats *out);
/* One bit a page: set if the page is all zeroes at the instant (not in the file). Valid after finish until the next
 * arm. */
const _Atomic uint64_t *memcow_zero_map(const struct memcow *cow);

#endif
