/*
 * Where threads that work for a checkpoint run: docs/memory-cow.md, "Processors".
 *
 * Threads: each function is about the calling one.
 */
#ifndef VMCP_CHECKPOINT_SCHEDULING_H
#define VMCP_CHECKPOINT_SCHEDULING_H

#include <sched.h>
#include <stdbool.h>

#include "vmm/vm.h"

/* Threads that share no processor with the vCPUs, as far as is known, make room this often (priority_give_way_each): vCPUs may move. */
#define SCHEDULING_ROOM_EACH_NS 200000u

/*
 * The calling thread, and those that it starts, keep off the processors on which vCPUs run, as long as others are left. A guest's processor
 * that such a thread has taken is not had back before the next tick, or before the kernel is through with the thread's system call:
 * milliseconds. Returns true if it shares them, as no others are left. *before, if not NULL, is for scheduling_restore; *busy, if not
 * NULL: those of the vCPUs.
 */
bool scheduling_leave_vcpus(struct vm *vm, cpu_set_t *before, cpu_set_t *busy);
void scheduling_restore(const cpu_set_t *before);

#endif
