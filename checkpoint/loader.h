/*
 * The memory of a VM that starts from a checkpoint. The layers' files are mapped into the guest's memory privately, by the extents of the
 * index, so that the guest runs at once, whatever its size, and shares what it does not write with every VM that started from the same
 * checkpoint, through the page cache. Short runs, of which a mapping each would cost more, are copied in and checked: before the start if they are few, else
 * while the guest runs (filler.h).
 *
 * A thread of low priority then reads every mapped page and checks it against its checksum: first those that an earlier start
 * touched (working_set.h), which are read ahead before the guest asks for them, then the rest. A page that does not check stops the VM: the
 * guest may have seen it. A page that cannot be read stops it as well: vmm/memory_guard.h for the VMM's accesses, KVM's error for the guest's.
 * A start that finds no working set records one. Of several VMs that start from one checkpoint at about the same time only one checks at a time, and the
 * others go by it if it began after they had mapped their memory (check_turn.h).
 *
 * What is encrypted cannot be mapped: all of it is copied in while the guest runs, as short runs are, and no working set is recorded.
 *
 *     loader_start -> loader_destroy       from the controlling thread
 */
#ifndef VMCP_CHECKPOINT_LOADER_H
#define VMCP_CHECKPOINT_LOADER_H

#include "checkpoint/index.h"
#include "checkpoint/store/store.h"
#include "vmm/vm.h"

struct loader;

struct loader_config {
	struct vm *vm; /* of private memory, all zero; never ran */
	struct store *store;
	const char *checkpoint; /* id */
	/* In the loader's thread, once, before the VM is stopped: why its memory is not that of the checkpoint. */
	void (*damaged)(void *opaque, const struct err *err);
	void *opaque;
};

/* Fills the VM's memory, shows it to the guest, and begins to check. Takes over *index, also on failure. */
int loader_start(const struct loader_config *config, struct page_index *index, struct loader **out, struct err *err);
/* Waits until all pages are there: before memory is changed other than by writing to it. NULL is allowed. */
void loader_wait_filled(struct loader *loader);
/* Ends the thread. The memory stays as it is. NULL is allowed. */
void loader_destroy(struct loader *loader);

#endif
