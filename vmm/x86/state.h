/* What a checkpoint holds of an x86 machine's processor side. For vmm/x86/ only. */
#ifndef VMCP_VMM_X86_STATE_H
#define VMCP_VMM_X86_STATE_H

#include <linux/kvm.h>
#include <stdalign.h>
#include <stdint.h>

#include "base/codec.h"
#include "vmm/vm_internal.h"

#define STATE_MAX_CPUID 160
#define STATE_MAX_MSRS	256
#define STATE_MAX_XSAVE 16384

/* One vCPU. No nested state: the CPUID policy gives the guest neither VMX nor SVM. */
struct vcpu_state {
	uint32_t cpuid_count;
	struct kvm_cpuid_entry2 cpuid[STATE_MAX_CPUID]; /* as set at creation; `padding` is not state */
	uint32_t mp_state;
	uint32_t tsc_khz;
	uint64_t tsc; /* at the instant of the clock, the same for all vCPUs */
	struct kvm_regs regs;
	struct kvm_sregs2 sregs;
	struct kvm_debugregs debugregs;
	struct kvm_vcpu_events events;
	uint32_t xcr_count;
	struct kvm_xcr xcr[KVM_MAX_XCRS];
	uint8_t lapic[KVM_APIC_REG_SIZE];
	uint32_t xsave_bytes;
	alignas(64) uint8_t xsave[STATE_MAX_XSAVE];
	uint32_t msr_count;
	struct kvm_msr_entry msr[STATE_MAX_MSRS]; /* TSC is not among them, TSC_DEADLINE is */
};

struct clock_state {
	uint64_t kvmclock_ns;
};

struct irqchip_state {
	struct kvm_pic_state pic[2];
	struct kvm_ioapic_state ioapic;
};

struct vm_arch {
	struct kvm_cpuid2 *cpuid; /* immutable: policy, without what differs between vCPUs */
	uint32_t tsc_khz;	  /* of the host; immutable */
	uint32_t xsave_bytes;	  /* immutable */
	uint64_t synced;	  /* immutable: KVM_SYNC_X86_* that vcpu_arch_expect_stop asks for; 0: this KVM lacks some */
	uint32_t msr_count;	  /* immutable: MSRs that this host can save and restore */
	uint32_t msr_index[STATE_MAX_MSRS];

	/* Of the last quiesce or apply. */
	uint64_t host_tsc; /* when the clock had the value below, and each vCPU's TSC that of its state */
	struct clock_state clock;
	struct irqchip_state irqchip;
	struct kvm_pit_state2 pit; /* count_load_time is the host's, always 0 here */
	uint64_t tsc_offset[VM_MAX_CPUS];
};

extern const struct codec_table vcpu_state_table, clock_state_table, irqchip_state_table, pit_state_table;

/* Bits of 0x80000001's edx in which AMD repeats those of leaf 1. */
#define CPUID_AMD_REPEATED 0x0183f3ffu

/* --- cpuid.c --- */
/* Makes the policy of this host, as `model` has it (NULL: host), for so many vCPUs. Freed by free(). The host lacks something of the model:
 * -ENOTSUP, ERR_HOST. */
int cpuid_make_policy(int kvm_fd, const char *model, unsigned cpus, uint32_t tsc_khz, struct kvm_cpuid2 **out, struct err *err);
struct kvm_cpuid_entry2 *cpuid_find(struct kvm_cpuid2 *cpuid, uint32_t function, uint32_t index); /* NULL: none */
/* Appends what vCPU `index` sees to the state's cpuid array. */
int cpuid_fill(const struct kvm_cpuid2 *policy, unsigned index, struct vcpu_state *state, struct err *err);
int cpuid_set(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err);
bool cpuid_equal(const struct vcpu_state *a, const struct vcpu_state *b);
/* -ENOTSUP, ERR_HOST, with the list, if a guest that saw `saved` could miss something where `host` is shown. */
int cpuid_check(const struct vcpu_state *saved, const struct vcpu_state *host, struct err *err);

/* Appends what such a check asks for: lines as of struct component. */
int cpuid_needs(const struct vcpu_state *saved, struct buf *lines, struct err *err);

/* --- cpu_model.c --- */
/* Takes away what the model does not have. -ENOTSUP, ERR_HOST with the list if it has more than there is. "host", NULL: nothing. */
int cpuid_apply_model(const char *name, struct kvm_cpuid2 *cpuid, struct err *err);
/* Appends the names of the features that are set in `bits` of register `reg` (0 eax to 3 edx) to `text`, which it ends with "..." when full. */
void cpuid_name_features(uint32_t function, uint32_t index, unsigned reg, uint32_t bits, char *text, size_t size);

/* --- msr.c --- */
/* -ENOTSUP, ERR_HOST, with the list, if the state has values in MSRs that this KVM does not know. */
int msr_check(const struct vcpu *vcpu, const struct vcpu_state *state, struct err *err);
/* Appends a line with those. */
int msr_needs(const struct vcpu_state *state, struct buf *lines, struct err *err);
/* Of a guest with a named model: nothing of what this very processor says of itself. */
void msr_hide_host(struct vm *vm);
/* Finds out, with vCPU 0, which MSRs can be saved and restored here. */
int msr_choose(struct vm *vm, struct err *err);
int msr_save(struct vcpu *vcpu, struct err *err);
/* Writes the MSRs of `state`, those that `now` has with the same value excepted (NULL: all). TSC_DEADLINE last. */
int msr_apply(struct vcpu *vcpu, const struct vcpu_state *state, const struct vcpu_state *now, struct err *err);

/* --- vcpu_state.c --- */
int vcpu_capture(void *opaque, void *state, struct err *err);
int vcpu_validate(void *opaque, const void *state, struct err *err);
/* Of vCPU 0, for all. */
int vcpu_needs(void *opaque, const void *state, struct buf *lines, struct err *err);
int vcpu_apply(void *opaque, const void *state, struct err *err);
/* The half of the save for when all vCPUs stand still; repeats the other half where it was overtaken. */
int vcpu_save_rest(struct vcpu *vcpu, struct err *err);

/* The guest's TSC ticks in so many of the host's. */
uint64_t tsc_scale(uint64_t host_ticks, uint32_t host_khz, uint32_t guest_khz);

#endif
