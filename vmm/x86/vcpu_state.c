/*
 * Saving and loading a vCPU.
 *
 * A save has two halves. Most of a vCPU's state is changed by the vCPU alone; each thread saves that for itself as it
 * stops. Interrupt state (LAPIC, events, whether it halts or waits for SIPI) is also changed by other vCPUs that still
 * run, by timers and by the I/O thread. It is read when all of them stand still; an INIT that arrived in between has
 * reset the registers, and then the first half is repeated.
 *
 * Reading order, so that nothing is lost (at worst it happens twice): the TSC deadline before the LAPIC, as an expiring
 * timer moves from the first to the second. Asking for the MP state makes KVM take a pending INIT or SIPI, so in the second half it comes
 * before the registers, which tell whether the first half is still right. What they do not tell is a second SIPI, to another place, of
 * a vCPU that has not run since the first: from its first instruction's place, 0, all is read again.
 *
 * Registers that KVM_RUN left in the run area (KVM_CAP_SYNC_REGS) are those of the ioctls, without these: in some KVMs each takes microseconds.
 *
 * TSC. A written TSC is rounded by KVM to "in step with the others" where it is less than a second off, so that going
 * back by half a second would not go back at all. Offsets are exact: all vCPUs' TSCs are saved for one host TSC, and
 * restored against one.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "vmm/x86/state.h"

uint64_t tsc_scale(uint64_t host_ticks, uint32_t host_khz, uint32_t guest_khz)
{
	if (host_khz == guest_khz)
		return host_ticks;
	__extension__ typedef unsigned __int128 wide;
	return (uint64_t)((wide)host_ticks * guest_khz / host_khz);
}

#define CR0_PG	 0x80000000u
#define CR4_PAE	 0x20u
#define EFER_LMA 0x400u

static int call(struct vcpu *vcpu, unsigned long request, void *argument, const char *name, struct err *err)
{
	if (ioctl(vcpu->fd, request, argument) < 0)
		return err_sys(err, errno, "vCPU %u: %s", vcpu->index, name);
	return 0;
}
#define CALL(vcpu, request, argument, err) call(vcpu, request, argument, #request, err)

static int access_tsc_offset(struct vcpu *vcpu, unsigned long request, uint64_t *offset, struct err *err)
{
	struct kvm_device_attr attr = {
		.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset};
	return call(vcpu, request, &attr, "KVM_VCPU_TSC_OFFSET", err);
}

/* --- save --- */

static int save_xcrs(struct vcpu *vcpu, struct err *err)
{
	struct kvm_xcrs xcrs;
	memset(&xcrs, 0, sizeof(xcrs));
	int r = CALL(vcpu, KVM_GET_XCRS, &xcrs, err);
	if (r < 0)
		return r;
	vcpu->state->xcr_count = xcrs.nr_xcrs;
	memcpy(vcpu->state->xcr, xcrs.xcrs, sizeof(xcrs.xcrs));
	return 0;
}

void vcpu_arch_expect_stop(struct vcpu *vcpu, bool on)
{
	if (!on)
		vcpu->run->s.regs.regs.rflags = 0; /* none there: bit 1 is always set */
	__atomic_store_n(&vcpu->run->kvm_valid_regs, on ? vcpu->vm->arch->synced : 0, __ATOMIC_SEQ_CST);
}

static int save_registers(struct vcpu *vcpu, bool from_run_area, struct err *err)
{
	struct vcpu_state *state = vcpu->state;
	const struct kvm_sync_regs *run = &vcpu->run->s.regs;
	_Static_assert(offsetof(struct kvm_sregs2, flags) == offsetof(struct kvm_sregs, interrupt_bitmap), "else the same");
	/* KVM leaves some reserved bytes as they were. */
	memset(&state->regs, 0, sizeof(state->regs));
	memset(&state->sregs, 0, sizeof(state->sregs));
	if (!from_run_area || run->regs.rflags == 0) {
		int r = CALL(vcpu, KVM_GET_REGS, &state->regs, err);
		return r < 0 ? r : CALL(vcpu, KVM_GET_SREGS2, &state->sregs, err);
	}
	state->regs = run->regs;
	/* With PAE paging there is more than in the run area. */
	if ((run->sregs.cr0 & CR0_PG) && (run->sregs.cr4 & CR4_PAE) && !(run->sregs.efer & EFER_LMA))
		return CALL(vcpu, KVM_GET_SREGS2, &state->sregs, err);
	memcpy(&state->sregs, &run->sregs, offsetof(struct kvm_sregs2, flags));
	return 0;
}

static int save_own(struct vcpu *vcpu, bool from_run_area, struct err *err)
{
	struct vcpu_state *state = vcpu->state;
	struct vm_arch *arch = vcpu->vm->arch;
	int r;
	memset(&state->debugregs, 0, sizeof(state->debugregs));
	state->xsave_bytes = arch->xsave_bytes;
	if ((r = save_registers(vcpu, from_run_area, err)) < 0 || (r = CALL(vcpu, KVM_GET_XSAVE2, state->xsave, err)) < 0 ||
	    (r = save_xcrs(vcpu, err)) < 0 || (r = CALL(vcpu, KVM_GET_DEBUGREGS, &state->debugregs, err)) < 0 || (r = msr_save(vcpu, err)) < 0)
		return r;
	return access_tsc_offset(vcpu, KVM_GET_DEVICE_ATTR, &arch->tsc_offset[vcpu->index], err);
}

int vcpu_arch_save(struct vcpu *vcpu, struct err *err) { return save_own(vcpu, true, err); }

int vcpu_save_rest(struct vcpu *vcpu, struct err *err)
{
	struct vcpu_state *state = vcpu->state;
	struct vm_arch *arch = vcpu->vm->arch;
	struct kvm_mp_state mp = {0};
	struct kvm_regs regs;
	int r;
	memset(&regs, 0, sizeof(regs));
	if ((r = CALL(vcpu, KVM_GET_MP_STATE, &mp, err)) < 0 || (r = CALL(vcpu, KVM_GET_REGS, &regs, err)) < 0)
		return r;
	bool again = vcpu->state_applied || vcpu->state_broken || regs.rip == 0 || memcmp(&regs, &state->regs, sizeof(regs)) != 0;
	if (again && (r = save_own(vcpu, false, err)) < 0)
		return r;
	vcpu->state_applied = vcpu->state_broken = false;
	state->mp_state = mp.mp_state;
	memset(&state->events, 0, sizeof(state->events));
	if ((r = CALL(vcpu, KVM_GET_VCPU_EVENTS, &state->events, err)) < 0 ||
	    (r = CALL(vcpu, KVM_GET_LAPIC, state->lapic, err)) < 0)
		return r;
	state->tsc = tsc_scale(arch->host_tsc, arch->tsc_khz, state->tsc_khz) + arch->tsc_offset[vcpu->index];
	return 0;
}

int vcpu_capture(void *opaque, void *state, struct err *err)
{
	struct vcpu *vcpu = opaque;
	(void)err;
	memcpy(state, vcpu->state, sizeof(*vcpu->state));
	return 0;
}

/* --- load --- */

#define TSC_TOLERANCE 4000 /* a 4000th: KVM's own, 250 ppm */

/* Without scaling in hardware KVM lets a guest's TSC run at the host's rate, or catch up with a faster one. */
static int check_rate(const struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	uint32_t host = vcpu->vm->arch->tsc_khz;
	if (state->tsc_khz == 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "vCPU %u: its TSC does not run", vcpu->index);
	if (state->tsc_khz >= host - host / TSC_TOLERANCE || ioctl(vcpu->vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_CONTROL) > 0)
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "vCPU %u: the state's TSC runs at %u kHz, this host's at %u, and it cannot scale", vcpu->index,
		state->tsc_khz, host);
	return err_hint(err, "start it on a host like the one where it was saved");
}

int vcpu_validate(void *opaque, const void *opaque_state, struct err *err)
{
	const struct vcpu *vcpu = opaque;
	const struct vcpu_state *state = opaque_state;
	struct vm_arch *arch = vcpu->vm->arch;
	if (state->cpuid_count > STATE_MAX_CPUID || state->msr_count > STATE_MAX_MSRS ||
	    state->xcr_count > KVM_MAX_XCRS || state->xsave_bytes > STATE_MAX_XSAVE)
		return err_set(err, ERR_DAMAGED, EINVAL, "vCPU %u: impossible counts in the state", vcpu->index);
	if (state->xsave_bytes > arch->xsave_bytes)
		return err_set(err, ERR_HOST, ENOTSUP, "vCPU %u: %u bytes of extended registers, this host has %u",
			       vcpu->index, state->xsave_bytes, arch->xsave_bytes);
	if (atomic_load(&vcpu->has_run) && !cpuid_equal(state, vcpu->state))
		return err_set(err, ERR_STATE, EINVAL,
			       "vCPU %u: the state shows the guest another processor than this VM has", vcpu->index);
	CLEANUP_FREE struct vcpu_state *host = xcalloc(1, sizeof(*host));
	int r = cpuid_fill(arch->cpuid, vcpu->index, host, err);
	if (r == 0)
		r = cpuid_check(state, host, err);
	if (r == 0)
		r = msr_check(vcpu, state, err);
	return r == 0 ? check_rate(vcpu, state, err) : r;
}

int vcpu_needs(void *opaque, const void *state, struct buf *lines, struct err *err)
{
	(void)opaque;
	int r = cpuid_needs(state, lines, err);
	if (r == 0)
		r = msr_needs(state, lines, err);
	if (r == 0)
		r = buf_append(lines, "kvm: ", 5, err);
	if (r == 0)
		r = vm_name_capabilities(lines, err);
	return r == 0 ? buf_append(lines, "\n", 1, err) : r;
}

static int apply_cpuid_and_rate(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	int r;
	if (!cpuid_equal(state, vcpu->state) && (r = cpuid_set(vcpu, state, err)) < 0)
		return r;
	if (state->tsc_khz == vcpu->state->tsc_khz)
		return 0;
	if (ioctl(vcpu->fd, KVM_SET_TSC_KHZ, (unsigned long)state->tsc_khz) < 0) {
		err_set(err, ERR_HOST, ENOTSUP, "vCPU %u: the state's TSC runs at %u kHz, this host's at %u",
			vcpu->index, state->tsc_khz, vcpu->vm->arch->tsc_khz);
		return err_hint(err, "start it on a host like the one where it was saved");
	}
	return 0;
}

/* Guest memory has been replaced, so every cached translation is wrong; KVM throws them away when the paging
 * registers change, and only then. Hence the detour over another CR3. */
static int apply_sregs(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	struct kvm_sregs2 other = state->sregs;
	other.cr3 ^= PAGE_BYTES;
	int r = CALL(vcpu, KVM_SET_SREGS2, &other, err);
	if (r < 0)
		return r;
	other = state->sregs;
	return CALL(vcpu, KVM_SET_SREGS2, &other, err);
}

static int apply_extended(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	struct kvm_xcrs xcrs;
	alignas(64) uint8_t xsave[STATE_MAX_XSAVE];
	memset(&xcrs, 0, sizeof(xcrs));
	xcrs.nr_xcrs = state->xcr_count;
	memcpy(xcrs.xcrs, state->xcr, sizeof(xcrs.xcrs));
	int r = CALL(vcpu, KVM_SET_XCRS, &xcrs, err);
	if (r < 0)
		return r;
	memset(xsave, 0, sizeof(xsave));
	memcpy(xsave, state->xsave, state->xsave_bytes);
	return CALL(vcpu, KVM_SET_XSAVE, xsave, err);
}

static int apply_tsc(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	struct vm_arch *arch = vcpu->vm->arch;
	uint64_t offset = state->tsc - tsc_scale(arch->host_tsc, arch->tsc_khz, state->tsc_khz);
	arch->tsc_offset[vcpu->index] = offset;
	return access_tsc_offset(vcpu, KVM_SET_DEVICE_ATTR, &offset, err);
}

/* The order: what others are checked against first (CPUID, control registers with the APIC's mode, the timer's mode
 * in the LAPIC, the TSC), events last, as setting registers clears them. */
static int load(struct vcpu *vcpu, const struct vcpu_state *state, const struct vcpu_state *now, struct err *err)
{
	struct kvm_mp_state mp = {.mp_state = state->mp_state};
	struct kvm_regs regs = state->regs;
	struct kvm_debugregs debugregs = state->debugregs;
	struct kvm_vcpu_events events = state->events;
	struct kvm_lapic_state lapic;
	memcpy(lapic.regs, state->lapic, sizeof(lapic.regs));
	int r;
	if ((r = apply_cpuid_and_rate(vcpu, state, err)) < 0 || (r = apply_sregs(vcpu, state, err)) < 0 ||
	    (r = CALL(vcpu, KVM_SET_REGS, &regs, err)) < 0 || (r = apply_extended(vcpu, state, err)) < 0 ||
	    (r = apply_tsc(vcpu, state, err)) < 0 || (r = CALL(vcpu, KVM_SET_LAPIC, &lapic, err)) < 0 ||
	    (r = msr_apply(vcpu, state, now, err)) < 0 || (r = CALL(vcpu, KVM_SET_DEBUGREGS, &debugregs, err)) < 0 ||
	    (r = CALL(vcpu, KVM_SET_MP_STATE, &mp, err)) < 0)
		return r;
	return CALL(vcpu, KVM_SET_VCPU_EVENTS, &events, err);
}

int vcpu_apply(void *opaque, const void *opaque_state, struct err *err)
{
	struct vcpu *vcpu = opaque;
	const struct vcpu_state *state = opaque_state;
	/* Between a quiesce and a resume `vcpu->state` is what KVM holds. */
	const struct vcpu_state *now = vcpu->vm->quiesced && !vcpu->state_broken ? vcpu->state : NULL;
	vcpu->state_broken = true;
	int r = load(vcpu, state, now, err);
	if (r < 0)
		return r;
	memcpy(vcpu->state, state, sizeof(*state));
	vcpu->state_applied = true;
	vcpu->state_broken = false;
	vm_clear_stop(vcpu->vm);
	return 0;
}

/* --- boot --- */

int vm_get_boot_regs(struct vm *vm, unsigned cpu, struct kvm_regs *regs, struct kvm_sregs *sregs, struct err *err)
{
	int r;
	if (cpu >= vm->cpus)
		return err_set(err, ERR_FAILED, EINVAL, "there is no vCPU %u", cpu);
	memset(regs, 0, sizeof(*regs));
	memset(sregs, 0, sizeof(*sregs));
	if ((r = CALL(&vm->vcpu[cpu], KVM_GET_REGS, regs, err)) < 0)
		return r;
	return CALL(&vm->vcpu[cpu], KVM_GET_SREGS, sregs, err);
}

int vm_set_boot_regs(struct vm *vm, unsigned cpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs,
		     struct err *err)
{
	struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	struct kvm_regs regs_copy = *regs;
	struct kvm_sregs sregs_copy = *sregs;
	int r;
	if (cpu >= vm->cpus || vm->started)
		return err_set(err, ERR_STATE, EINVAL, "vCPU %u: not the time to set boot registers", cpu);
	if ((r = CALL(&vm->vcpu[cpu], KVM_SET_SREGS, &sregs_copy, err)) < 0 ||
	    (r = CALL(&vm->vcpu[cpu], KVM_SET_REGS, &regs_copy, err)) < 0)
		return r;
	return CALL(&vm->vcpu[cpu], KVM_SET_MP_STATE, &runnable, err);
}

/* --- errors --- */

void vcpu_arch_describe(struct vcpu *vcpu, char *text, size_t bytes)
{
	struct kvm_regs regs = {0};
	struct kvm_sregs sregs = {0};
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) < 0 || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0) {
		snprintf(text, bytes, "its registers cannot be read");
		return;
	}
	snprintf(text, bytes, "rip 0x%llx rsp 0x%llx cs 0x%x cr0 0x%llx cr3 0x%llx cr4 0x%llx efer 0x%llx", regs.rip,
		 regs.rsp, sregs.cs.selector, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer);
}
