/*
 * Which MSRs are saved, and how they go back.
 *
 * The list is KVM's own (KVM_GET_MSR_INDEX_LIST), and what KVM emulates but older kernels leave out of it: MTRRs and
 * the machine-check banks. It is tried out once, so that a pause makes one ioctl with MSRs known to be good.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/buf.h"
#include "vmm/x86/state.h"

#define MSR_TSC		   0x10u
#define MSR_WALL_CLOCK_OLD 0x11u
#define MSR_PLATFORM_INFO  0xceu
#define MSR_ARCH_CAPABILITIES 0x10au
#define MSR_MCG_CAP	   0x179u
#define MSR_MTRR_PHYS	   0x200u /* 8 pairs */
#define MSR_MTRR_DEFAULT   0x2ffu
#define MTRR_ON_WRITE_BACK 0xc06ull /* enabled, fixed ranges enabled, default type write-back */
#define MTRR_FIXED_WRITE_BACK 0x0606060606060606ull
#define MSR_MC0		   0x400u /* 4 for each bank */
#define MSR_TSC_DEADLINE   0x6e0u
#define MSR_WALL_CLOCK	   0x4b564d00u
#define MSR_ASYNC_PF_ACK   0x4b564d07u

static const uint32_t fixed_mtrrs[] = {0x250, 0x258, 0x259, 0x268, 0x269, 0x26a,
				       0x26b, 0x26c, 0x26d, 0x26e, 0x26f, MSR_MTRR_DEFAULT};

/* MSRs of features that the CPUID policy does not offer: the guest cannot have changed them. */
static const struct {
	uint32_t first, last;
} not_offered[] = {
	{0x8c, 0x8f}, /* SGX */
	{0xc1, 0xc8}, /* performance counters: Intel */
	{0x186, 0x18d},
	{0x309, 0x30c},
	{0x345, 0x345},
	{0x38d, 0x390},
	{0x3f1, 0x3f2},
	{0x480, 0x491}, /* VMX */
	{0x4c1, 0x4c8},
	{0x560, 0x58f},		  /* processor trace */
	{0x14ce, 0x14cf},	  /* last branch records */
	{0x40000000, 0x400001ff}, /* Hyper-V's own */
	{0xc0000300, 0xc0000302}, /* performance counters: AMD */
	{0xc0010000, 0xc0010007},
	{0xc0010114, 0xc0010117}, /* SVM */
	{0xc0010200, 0xc001020b},
};

static bool is_saved(uint32_t index)
{
	switch (index) {
	case MSR_TSC: /* kept exact through its offset, see vcpu_state.c */
		return false;
	/* Commands rather than state: a write makes KVM store the time in guest memory, or is an acknowledgement. */
	case MSR_WALL_CLOCK_OLD:
	case MSR_WALL_CLOCK:
	case MSR_ASYNC_PF_ACK:
		return false;
	default:
		break;
	}
	for (size_t i = 0; i < ARRAY_LENGTH(not_offered); i++)
		if (index >= not_offered[i].first && index <= not_offered[i].last)
			return false;
	return true;
}

static void add_index(struct vm_arch *arch, uint32_t index)
{
	for (uint32_t i = 0; i < arch->msr_count; i++)
		if (arch->msr_index[i] == index)
			return;
	if (arch->msr_count < STATE_MAX_MSRS)
		arch->msr_index[arch->msr_count++] = index;
}

static int list_kvm_msrs(struct vm *vm, struct err *err)
{
	struct vm_arch *arch = vm->arch;
	struct kvm_msr_list probe = {.nmsrs = 0};
	if (ioctl(vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &probe) < 0 && errno != E2BIG)
		return err_sys(err, errno, "KVM_GET_MSR_INDEX_LIST");
	CLEANUP_FREE struct kvm_msr_list *list = xcalloc(1, sizeof(*list) + probe.nmsrs * sizeof(list->indices[0]));
	list->nmsrs = probe.nmsrs;
	if (ioctl(vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, list) < 0)
		return err_sys(err, errno, "KVM_GET_MSR_INDEX_LIST");
	uint32_t saved = 0;
	for (uint32_t i = 0; i < list->nmsrs; i++)
		saved += is_saved(list->indices[i]);
	if (saved > STATE_MAX_MSRS)
		return err_set(err, ERR_HOST, E2BIG, "this KVM has %u MSRs to save, more than %d", saved,
			       STATE_MAX_MSRS);
	for (uint32_t i = 0; i < list->nmsrs; i++)
		if (is_saved(list->indices[i]))
			add_index(arch, list->indices[i]);
	return 0;
}

/* One MSR. False if KVM refuses. */
static bool access_msr(int fd, unsigned long request, uint32_t index, uint64_t *data)
{
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entry;
	} one = {.header.nmsrs = 1, .entry = {.index = index, .data = *data}};
	if (ioctl(fd, request, &one) != 1)
		return false;
	*data = one.entry.data;
	return true;
}

static void list_other_msrs(struct vm *vm)
{
	for (size_t i = 0; i < ARRAY_LENGTH(fixed_mtrrs); i++)
		add_index(vm->arch, fixed_mtrrs[i]);
	for (uint32_t i = 0; i < 16; i++)
		add_index(vm->arch, MSR_MTRR_PHYS + i);
	uint64_t cap = 0;
	if (!access_msr(vm->vcpu[0].fd, KVM_GET_MSRS, MSR_MCG_CAP, &cap))
		return;
	for (uint32_t i = 0; i < 4 * (uint32_t)(cap & 0xff) && i < 128; i++)
		add_index(vm->arch, MSR_MC0 + i);
}

/* Those that KVM refuses are no more in the list: it stops at each. */
static int access_msrs(const struct vcpu *vcpu, unsigned long request, struct kvm_msrs *list, struct err *err)
{
	for (;;) {
		int done = ioctl(vcpu->fd, request, list);
		if (done < 0)
			return err_sys(err, errno, "vCPU %u: MSRs", vcpu->index);
		if ((uint32_t)done >= list->nmsrs)
			return 0;
		list->nmsrs--;
		memmove(&list->entries[done], &list->entries[done + 1], (list->nmsrs - (uint32_t)done) * sizeof(list->entries[0]));
	}
}

/* What firmware leaves behind: MTRRs on, all memory write-back. Without it Linux does without PAT. A KVM without MTRRs
 * refuses, and its guests see none. */
static int set_firmware_mtrrs(struct vcpu *vcpu, struct err *err)
{
	struct kvm_msrs *list = vcpu->msr_buffer;

	list->nmsrs = ARRAY_LENGTH(fixed_mtrrs);
	for (size_t i = 0; i < ARRAY_LENGTH(fixed_mtrrs); i++)
		list->entries[i] = (struct kvm_msr_entry){
			.index = fixed_mtrrs[i], .data = fixed_mtrrs[i] == MSR_MTRR_DEFAULT ? MTRR_ON_WRITE_BACK : MTRR_FIXED_WRITE_BACK};
	return access_msrs(vcpu, KVM_SET_MSRS, list, err);
}

/* Of the list, those that can be read, and written with what was read. Some at a time, as KVM takes fewer than there may be before this. */
static int keep_good(struct vcpu *vcpu, struct err *err)
{
	struct vm_arch *arch = vcpu->vm->arch;
	struct kvm_msrs *some = vcpu->msr_buffer;
	uint32_t good = 0, count = arch->msr_count;

	for (uint32_t i = 0; i < count;) {
		for (some->nmsrs = 0; i < count && some->nmsrs < STATE_MAX_MSRS / 2; i++)
			some->entries[some->nmsrs++] = (struct kvm_msr_entry){.index = arch->msr_index[i]};
		int r = access_msrs(vcpu, KVM_GET_MSRS, some, err);
		if (r == 0)
			r = access_msrs(vcpu, KVM_SET_MSRS, some, err);
		if (r < 0)
			return r;
		for (uint32_t k = 0; k < some->nmsrs; k++)
			arch->msr_index[good++] = some->entries[k].index;
	}
	arch->msr_count = good;
	return 0;
}

int msr_choose(struct vm *vm, struct err *err)
{
	int r = list_kvm_msrs(vm, err);
	if (r < 0)
		return r;
	list_other_msrs(vm);
	for (unsigned i = 0; i < vm->cpus; i++)
		vm->vcpu[i].msr_buffer =
			xcalloc(1, sizeof(struct kvm_msrs) + STATE_MAX_MSRS * sizeof(struct kvm_msr_entry));
	r = keep_good(&vm->vcpu[0], err);
	for (unsigned i = 0; i < vm->cpus && r == 0; i++)
		r = set_firmware_mtrrs(&vm->vcpu[i], err);
	return r;
}

int msr_save(struct vcpu *vcpu, struct err *err)
{
	const struct vm_arch *arch = vcpu->vm->arch;
	struct kvm_msrs *buffer = vcpu->msr_buffer;
	memset(buffer, 0, sizeof(*buffer) + arch->msr_count * sizeof(buffer->entries[0]));
	buffer->nmsrs = arch->msr_count;
	for (uint32_t i = 0; i < arch->msr_count; i++)
		buffer->entries[i].index = arch->msr_index[i];
	int done = ioctl(vcpu->fd, KVM_GET_MSRS, buffer);
	if (done < 0)
		return err_sys(err, errno, "vCPU %u: KVM_GET_MSRS", vcpu->index);
	if ((uint32_t)done != arch->msr_count)
		return err_set(err, ERR_FAILED, EIO, "vCPU %u: MSR 0x%x cannot be read any more", vcpu->index,
			       arch->msr_index[done]);
	vcpu->state->msr_count = arch->msr_count;
	memcpy(vcpu->state->msr, buffer->entries, arch->msr_count * sizeof(buffer->entries[0]));
	return 0;
}

int msr_check(const struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	const struct vm_arch *arch = vcpu->vm->arch;
	char missing[200] = "";
	size_t used = 0;
	for (uint32_t i = 0; i < state->msr_count; i++) {
		const struct kvm_msr_entry *entry = &state->msr[i];
		uint64_t data = 0;
		bool known = entry->data == 0 || !is_saved(entry->index) || (i < arch->msr_count && arch->msr_index[i] == entry->index);
		for (uint32_t k = 0; !known && k < arch->msr_count; k++)
			known = arch->msr_index[k] == entry->index;
		if (known || access_msr(vcpu->fd, KVM_GET_MSRS, entry->index, &data))
			continue;
		if (used < sizeof(missing) - 16)
			used += (size_t)snprintf(missing + used, sizeof(missing) - used, "%s0x%x", used ? ", " : "", entry->index);
	}
	if (!missing[0])
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "vCPU %u: this host's KVM does not have the MSRs of the state: %s", vcpu->index, missing);
	return err_hint(err, "start it on a host like the one where it was saved, or boot the guest with a lower cpu_model for checkpoints that travel");
}

int msr_needs(const struct vcpu_state *state, struct buf *lines, struct err *err)
{
	int r = buf_append(lines, "msrs: ", 6, err);
	bool first = true;
	for (uint32_t i = 0; i < state->msr_count && r == 0; i++) {
		char name[24];
		if (state->msr[i].data == 0 || !is_saved(state->msr[i].index))
			continue;
		int length = snprintf(name, sizeof(name), "%s0x%x", first ? "" : ", ", state->msr[i].index);
		r = buf_append(lines, name, (size_t)length, err);
		first = false;
	}
	return r == 0 ? buf_append(lines, "\n", 1, err) : r;
}

void msr_hide_host(struct vm *vm)
{
	for (unsigned i = 0; i < vm->cpus; i++) {
		uint64_t none = 0;
		/* A KVM without it refuses, and then there is nothing to hide. */
		access_msr(vm->vcpu[i].fd, KVM_SET_MSRS, MSR_ARCH_CAPABILITIES, &none);
		access_msr(vm->vcpu[i].fd, KVM_SET_MSRS, MSR_PLATFORM_INFO, &none);
	}
}

/* The value of an MSR in a state. The lists nearly always agree, so look at the same place first. */
static bool has_value(const struct vcpu_state *state, uint32_t at, const struct kvm_msr_entry *entry)
{
	return state && at < state->msr_count && state->msr[at].index == entry->index &&
	       state->msr[at].data == entry->data;
}

/* Writes buffer entries from `first` on. */
static int write_buffer(struct vcpu *vcpu, struct err *err)
{
	struct kvm_msrs *buffer = vcpu->msr_buffer;
	while (buffer->nmsrs > 0) {
		int done = ioctl(vcpu->fd, KVM_SET_MSRS, buffer);
		if (done < 0)
			return err_sys(err, errno, "vCPU %u: KVM_SET_MSRS", vcpu->index);
		if ((uint32_t)done == buffer->nmsrs)
			return 0;
		const struct kvm_msr_entry *bad = &buffer->entries[done];
		/* 0 is what an MSR holds that the guest never used; a host without it loses nothing. */
		if (bad->data != 0) {
			err_set(err, ERR_HOST, EINVAL, "vCPU %u: this host's KVM refuses MSR 0x%x = 0x%llx",
				vcpu->index, bad->index, (unsigned long long)bad->data);
			return err_hint(err, "the state is of another kind of host, or damaged");
		}
		buffer->nmsrs -= (uint32_t)done + 1;
		memmove(buffer->entries, bad + 1, buffer->nmsrs * sizeof(*bad));
	}
	return 0;
}

int msr_apply(struct vcpu *vcpu, const struct vcpu_state *state, const struct vcpu_state *now, struct err *err)
{
	struct kvm_msrs *buffer = vcpu->msr_buffer;
	struct kvm_msr_entry deadline = {0};
	buffer->nmsrs = buffer->pad = 0;
	for (uint32_t i = 0; i < state->msr_count; i++) {
		const struct kvm_msr_entry *entry = &state->msr[i];
		if (!is_saved(entry->index))
			continue;
		if (entry->index == MSR_TSC_DEADLINE)
			deadline = *entry;
		else if (!has_value(now, i, entry))
			buffer->entries[buffer->nmsrs++] =
				(struct kvm_msr_entry){.index = entry->index, .data = entry->data};
	}
	/* Always: the timer that it starts depends on the TSC, which has changed. It needs the LAPIC's timer mode. */
	if (deadline.index && buffer->nmsrs < STATE_MAX_MSRS)
		buffer->entries[buffer->nmsrs++] = deadline;
	return write_buffer(vcpu, err);
}
