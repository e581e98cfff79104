#include "vmm/dirty_log.h"

#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "base/bytes.h"
#include "vmm/vm_internal.h"

#define WORD_BYTES (64 * (uint64_t)PAGE_BYTES)

static int enable_manual(struct vm *vm, uint64_t how, struct err *err)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {how}};
	int has = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (has >= 0 && (how & ~(uint64_t)has) == 0 && ioctl(vm->fd, KVM_ENABLE_CAP, &cap) == 0)
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "/dev/kvm: this kernel's KVM has no dirty log that is cleared by hand");
	return err_hint(err, "Linux 5.6 and later have it; without it every checkpoint saves all memory");
}

int vm_map_private_memory(struct vm *vm, struct err *err)
{
	/* Not initially set: there is nothing to protect yet, and nothing to clear page by page before the first instruction. */
	vm->logged = enable_manual(vm, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, NULL) == 0;
	return vm_map_memory(vm, vm->logged, err);
}

int vm_dirty_log_start(struct vm *vm, bool *all_set, struct err *err)
{
	*all_set = !vm->logged;
	if (vm->logged)
		return 0;
	int r = enable_manual(vm, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET, err);
	if (r != 0)
		return r;
	r = vm_map_memory(vm, true, err);
	if (r != 0)
		vm_dirty_log_stop(vm);
	vm->logged = r == 0;
	return r;
}

void vm_dirty_log_stop(struct vm *vm)
{
	vm->logged = false;
	vm_map_memory(vm, false, NULL);
}

int vm_dirty_log_get(struct vm *vm, uint64_t *words, struct err *err)
{
	struct mem_region region[2];
	unsigned slots = mem_regions(vm->memory, region);
	for (unsigned slot = 0; slot < slots; slot++) {
		struct kvm_dirty_log log = {
			.slot = slot,
			.dirty_bitmap = words + region[slot].ram_offset / WORD_BYTES,
		};
		if (ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log) < 0)
			return err_sys(err, errno, "KVM_GET_DIRTY_LOG");
	}
	return 0;
}

int vm_dirty_log_clear(struct vm *vm, uint64_t first, uint64_t count, const uint64_t *words, struct err *err)
{
	struct mem_region region[2];
	unsigned slots = mem_regions(vm->memory, region);
	for (unsigned slot = 0; slot < slots; slot++) {
		uint64_t slot_first = region[slot].ram_offset / WORD_BYTES;
		uint64_t slot_end = slot_first + region[slot].bytes / WORD_BYTES;
		uint64_t from = max_u64(first, slot_first), to = min_u64(first + count, slot_end);
		if (from >= to)
			continue;
		struct kvm_clear_dirty_log clear = {
			.slot = slot,
			.first_page = (from - slot_first) * 64,
			.num_pages = (uint32_t)((to - from) * 64),
			.dirty_bitmap = (void *)(uintptr_t)(words + (from - first)),
		};
		if (ioctl(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
			return err_sys(err, errno, "KVM_CLEAR_DIRTY_LOG");
	}
	return 0;
}
