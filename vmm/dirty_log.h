/*
 * KVM's dirty log of all guest memory: which pages the guest, or KVM itself, wrote. What the VMM writes is not in it:
 * see mem_take_dirty.
 *
 * Manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, initially set; Documentation/virt/kvm/api.rst): a page counts as
 * written from vm_dirty_log_start on, unless *all_set says otherwise, until it is cleared. Clearing protects it; the next write faults in KVM, is logged, and
 * goes on. Reading clears nothing. Who reads, clears what was read and *then* copies loses no write: a later one is logged again.
 *
 * Bitmaps have one bit a ram page (vmm/memory.h), mem_pages / 64 words, rounded up.
 *
 * Threads: start, stop and clear from the controlling thread; get from any, one at a time. The VM may run.
 */
#ifndef VMCP_VMM_DIRTY_LOG_H
#define VMCP_VMM_DIRTY_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "vmm/vm.h"

/* ERR_HOST if this kernel's KVM cannot. On failure it is off. *all_set: every page counts as written. Not so in a VM of private memory that
 * never ran: its log begins with the VM, when nothing is written yet. */
int vm_dirty_log_start(struct vm *vm, bool *all_set, struct err *err);
/* The guest pays for its writes no more. */
void vm_dirty_log_stop(struct vm *vm);
/* Fills `words` with the pages written since they were cleared. Memory-bound: 32 KiB to copy for 1 GiB of guest. */
int vm_dirty_log_get(struct vm *vm, uint64_t *words, struct err *err);
/* Clears, for words [first, first + count) of the bitmap, the pages set in words[0..count). Takes KVM's lock of the VM's
 * page tables for all of it: a guest that faults meanwhile waits, so keep it short while the guest runs. */
int vm_dirty_log_clear(struct vm *vm, uint64_t first, uint64_t count, const uint64_t *words, struct err *err);

#endif
