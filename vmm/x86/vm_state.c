/* The x86 parts that belong to the whole VM: set-up, irqchips, PIT, clock, and the list of components. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <x86intrin.h>

#include "base/buf.h"
#include "vmm/x86/state.h"

/* Three pages and one that KVM uses for itself on old processors; in the hole, below the flash. */
#define IDENTITY_MAP_GPA 0xfffbc000ull
#define TSS_GPA		 0xfffbd000ul

static int call(struct vm *vm, unsigned long request, void *argument, const char *name, struct err *err)
{
	if (ioctl(vm->fd, request, argument) < 0)
		return err_sys(err, errno, "%s", name);
	return 0;
}
#define CLOCK_TRIES 8u

#define CALL(vm, request, argument, err) call(vm, request, argument, #request, err)

/* --- set-up --- */

static int enable(struct vm *vm, uint32_t cap, uint64_t argument, const char *name, struct err *err)
{
	struct kvm_enable_cap enable = {.cap = cap, .args = {argument}};
	if (ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, (unsigned long)cap) <= 0)
		return 0;
	return call(vm, KVM_ENABLE_CAP, &enable, name, err);
}

int vm_arch_create(struct vm *vm, struct err *err)
{
	uint64_t identity_map = IDENTITY_MAP_GPA;
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
	int r;
	vm->arch = xcalloc(1, sizeof(*vm->arch));
	if ((r = CALL(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map, err)) < 0)
		return r;
	if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_GPA) < 0)
		return err_sys(err, errno, "KVM_SET_TSS_ADDR");
	if ((r = CALL(vm, KVM_CREATE_IRQCHIP, NULL, err)) < 0 || (r = CALL(vm, KVM_CREATE_PIT2, &pit, err)) < 0)
		return r;
	/* Exceptions with payload and a pending triple fault are then part of the events that are saved. The
	 * counters are not offered by the CPUID policy; without them there are fewer MSRs to save. */
	if ((r = enable(vm, KVM_CAP_EXCEPTION_PAYLOAD, 1, "KVM_CAP_EXCEPTION_PAYLOAD", err)) < 0 ||
	    (r = enable(vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1, "KVM_CAP_X86_TRIPLE_FAULT_EVENT", err)) < 0)
		return r;
	return enable(vm, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, "KVM_CAP_PMU_CAPABILITY", err);
}

#define SYNCED (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS)

static int find_sizes(struct vm *vm, struct err *err)
{
	struct vm_arch *arch = vm->arch;
	int sets = ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
	arch->synced = sets > 0 && ((unsigned)sets & SYNCED) == SYNCED ? SYNCED : 0;
	int bytes = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	if (bytes < 4096)
		bytes = 4096;
	if (bytes > STATE_MAX_XSAVE)
		return err_set(err, ERR_HOST, ENOTSUP, "extended registers of %d bytes, more than %d", bytes,
			       STATE_MAX_XSAVE);
	arch->xsave_bytes = (uint32_t)bytes;
	int khz = ioctl(vm->vcpu[0].fd, KVM_GET_TSC_KHZ, 0);
	if (khz <= 0)
		return err_set(err, ERR_HOST, ENOTSUP, "KVM does not know the TSC's rate");
	arch->tsc_khz = (uint32_t)khz;
	return 0;
}

/* One machine-check bank, the fewest there can be, instead of KVM's 32 with their four MSRs each to save. */
static void limit_machine_checks(struct vm *vm)
{
	uint64_t mcg_cap = 1;
	for (unsigned i = 0; i < vm->cpus; i++)
		(void)ioctl(vm->vcpu[i].fd, KVM_X86_SETUP_MCE, &mcg_cap);
}

int vm_arch_create_vcpus(struct vm *vm, struct err *err)
{
	struct vm_arch *arch = vm->arch;
	int r = find_sizes(vm, err);
	if (r < 0)
		return r;
	r = cpuid_make_policy(vm->kvm_fd, vm->cpu_model, vm->cpus, arch->tsc_khz, &arch->cpuid, err);
	if (r < 0)
		return r;
	for (unsigned i = 0; i < vm->cpus; i++) {
		struct vcpu *vcpu = &vm->vcpu[i];
		vcpu->state = aligned_alloc(alignof(struct vcpu_state), sizeof(*vcpu->state));
		if (!vcpu->state)
			return err_sys(err, ENOMEM, "vCPU %u: room for its state", i);
		memset(vcpu->state, 0, sizeof(*vcpu->state));
		vcpu->state->tsc_khz = arch->tsc_khz;
		if ((r = cpuid_fill(arch->cpuid, i, vcpu->state, err)) < 0 ||
		    (r = cpuid_set(vcpu, vcpu->state, err)) < 0)
			return r;
	}
	limit_machine_checks(vm);
	if (strcmp(vm->cpu_model, "host") != 0)
		msr_hide_host(vm);
	return msr_choose(vm, err);
}

void vm_arch_destroy(struct vm *vm)
{
	if (!vm->arch)
		return;
	free(vm->arch->cpuid);
	free(vm->arch);
}

/* --- save --- */

static int get_chip(struct vm *vm, uint32_t id, struct kvm_irqchip *chip, struct err *err)
{
	memset(chip, 0, sizeof(*chip));
	chip->chip_id = id;
	return CALL(vm, KVM_GET_IRQCHIP, chip, err);
}

static int save_irqchips(struct vm *vm, struct err *err)
{
	struct irqchip_state *state = &vm->arch->irqchip;
	struct kvm_irqchip chip;
	int r;
	for (uint32_t i = 0; i < 2; i++) {
		if ((r = get_chip(vm, i, &chip, err)) < 0)
			return r;
		state->pic[i] = chip.chip.pic;
	}
	if ((r = get_chip(vm, KVM_IRQCHIP_IOAPIC, &chip, err)) < 0)
		return r;
	state->ioapic = chip.chip.ioapic;
	state->ioapic.pad = 0;
	return 0;
}

static int save_pit(struct vm *vm, struct err *err)
{
	struct kvm_pit_state2 *pit = &vm->arch->pit;
	memset(pit, 0, sizeof(*pit));
	int r = CALL(vm, KVM_GET_PIT2, pit, err);
	if (r < 0)
		return r;
	memset(pit->reserved, 0, sizeof(pit->reserved));
	for (unsigned i = 0; i < ARRAY_LENGTH(pit->channels); i++)
		pit->channels[i].count_load_time = 0; /* host time; KVM sets its own on loading */
	return 0;
}

static int save_clock(struct vm *vm, struct err *err)
{
	struct kvm_clock_data data = {0};
	uint64_t tsc = __rdtsc();
	int r = CALL(vm, KVM_GET_CLOCK, &data, err);
	if (r < 0)
		return r;
	vm->arch->clock.kvmclock_ns = data.clock;
	vm->arch->host_tsc = data.flags & KVM_CLOCK_HOST_TSC ? data.host_tsc : tsc;
	return 0;
}

static bool all_applied(const struct vm *vm)
{
	for (unsigned i = 0; i < vm->cpus; i++)
		if (!vm->vcpu[i].state_applied)
			return false;
	return true;
}

/* In the direction in which interrupts travel: one that is on its way may be seen twice, never missed. */
int vm_arch_save(struct vm *vm, struct err *err)
{
	int r;
	/* Nothing ran since a state was applied: the copy of that is the state. */
	if (all_applied(vm))
		return 0;
	if ((r = save_clock(vm, err)) < 0 || (r = save_pit(vm, err)) < 0 || (r = save_irqchips(vm, err)) < 0)
		return r;
	for (unsigned i = 0; i < vm->cpus; i++)
		if ((r = vcpu_save_rest(&vm->vcpu[i], err)) < 0)
			return r;
	return 0;
}

void vm_arch_excuse_pause(struct vm *vm)
{
	/* EINVAL: this vCPU's guest has not set up kvm-clock. */
	for (unsigned i = 0; i < vm->cpus; i++)
		(void)ioctl(vm->vcpu[i].fd, KVM_KVMCLOCK_CTRL, 0);
}

/* --- load --- */

static int clock_capture(void *opaque, void *state, struct err *err)
{
	struct vm *vm = opaque;
	(void)err;
	*(struct clock_state *)state = vm->arch->clock;
	return 0;
}

/* The guest's time goes on from here: its TSCs are set against the same instant, see apply_tsc. */
static int clock_apply(void *opaque, const void *state, struct err *err)
{
	struct vm *vm = opaque;
	const struct clock_state *clock = state;
	struct kvm_clock_data data = {.clock = clock->kvmclock_ns};
	/* A thread that loses its processor between the two would set clock and TSC apart, which the guest's watchdog of clocks notices
	 * from some 0.2 ms on: then once more. */
	for (unsigned try = 0; try < CLOCK_TRIES; try++) {
		vm->arch->host_tsc = __rdtsc();
		int r = CALL(vm, KVM_SET_CLOCK, &data, err);
		if (r < 0)
			return r;
		if (__rdtsc() - vm->arch->host_tsc <= vm->arch->tsc_khz / 20) /* 50 us */
			break;
	}
	vm->arch->clock = *clock;
	return 0;
}

static int irqchip_capture(void *opaque, void *state, struct err *err)
{
	struct vm *vm = opaque;
	(void)err;
	*(struct irqchip_state *)state = vm->arch->irqchip;
	return 0;
}

static int irqchip_apply(void *opaque, const void *opaque_state, struct err *err)
{
	struct vm *vm = opaque;
	const struct irqchip_state *state = opaque_state;
	struct kvm_irqchip chip;
	for (uint32_t i = 0; i < 3; i++) {
		memset(&chip, 0, sizeof(chip));
		chip.chip_id = i;
		if (i == KVM_IRQCHIP_IOAPIC)
			chip.chip.ioapic = state->ioapic;
		else
			chip.chip.pic = state->pic[i];
		int r = CALL(vm, KVM_SET_IRQCHIP, &chip, err);
		if (r < 0)
			return r;
	}
	vm->arch->irqchip = *state;
	return 0;
}

static int pit_capture(void *opaque, void *state, struct err *err)
{
	struct vm *vm = opaque;
	(void)err;
	*(struct kvm_pit_state2 *)state = vm->arch->pit;
	return 0;
}

static int pit_apply(void *opaque, const void *state, struct err *err)
{
	struct vm *vm = opaque;
	struct kvm_pit_state2 pit = *(const struct kvm_pit_state2 *)state;
	int r = CALL(vm, KVM_SET_PIT2, &pit, err);
	if (r < 0)
		return r;
	vm->arch->pit = pit;
	return 0;
}

unsigned vm_arch_components(struct vm *vm, struct component *out)
{
	unsigned n = 0;
	out[n++] = (struct component){.id = "kvm-clock",
				      .version = 1,
				      .table = &clock_state_table,
				      .opaque = vm,
				      .capture = clock_capture,
				      .apply = clock_apply};
	out[n++] = (struct component){.id = "irqchip",
				      .version = 1,
				      .table = &irqchip_state_table,
				      .opaque = vm,
				      .capture = irqchip_capture,
				      .apply = irqchip_apply};
	out[n++] = (struct component){.id = "pit",
				      .version = 1,
				      .table = &pit_state_table,
				      .opaque = vm,
				      .capture = pit_capture,
				      .apply = pit_apply};
	for (unsigned i = 0; i < vm->cpus; i++)
		out[n++] = (struct component){.id = "vcpu",
					      .instance = i,
					      .version = 1,
					      .table = &vcpu_state_table,
					      .opaque = &vm->vcpu[i],
					      .capture = vcpu_capture,
					      .validate = vcpu_validate,
					      .needs = i == 0 ? vcpu_needs : NULL,
					      .apply = vcpu_apply};
	return n;
}
