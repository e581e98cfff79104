/* The codec tables of the processor side. Field names are the format (docs/format.md). */
#include "vmm/x86/state.h"

#define U8(s, f)  CODEC_INT(s, f, CODEC_U8)
#define U16(s, f) CODEC_INT(s, f, CODEC_U16)
#define U32(s, f) CODEC_INT(s, f, CODEC_U32)
#define U64(s, f) CODEC_INT(s, f, CODEC_U64)
/* A member of a struct within: its name has a dot. */
#define NAMED(s, n, f, t)                                                                                              \
	{                                                                                                              \
		.name = n, .type = (t), .offset = offsetof(s, f), .size = sizeof(((s *)0)->f)                          \
	}

static const struct codec_field cpuid_fields[] = {
	U32(struct kvm_cpuid_entry2, function), U32(struct kvm_cpuid_entry2, index),
	U32(struct kvm_cpuid_entry2, flags),	U32(struct kvm_cpuid_entry2, eax),
	U32(struct kvm_cpuid_entry2, ebx),	U32(struct kvm_cpuid_entry2, ecx),
	U32(struct kvm_cpuid_entry2, edx),	CODEC_END,
};
static const struct codec_table cpuid_table = {"cpuid", sizeof(struct kvm_cpuid_entry2), cpuid_fields};

static const struct codec_field regs_fields[] = {
	U64(struct kvm_regs, rax),
	U64(struct kvm_regs, rbx),
	U64(struct kvm_regs, rcx),
	U64(struct kvm_regs, rdx),
	U64(struct kvm_regs, rsi),
	U64(struct kvm_regs, rdi),
	U64(struct kvm_regs, rsp),
	U64(struct kvm_regs, rbp),
	U64(struct kvm_regs, r8),
	U64(struct kvm_regs, r9),
	U64(struct kvm_regs, r10),
	U64(struct kvm_regs, r11),
	U64(struct kvm_regs, r12),
	U64(struct kvm_regs, r13),
	U64(struct kvm_regs, r14),
	U64(struct kvm_regs, r15),
	U64(struct kvm_regs, rip),
	U64(struct kvm_regs, rflags),
	CODEC_END,
};
static const struct codec_table regs_table = {"regs", sizeof(struct kvm_regs), regs_fields};

static const struct codec_field segment_fields[] = {
	U64(struct kvm_segment, base),
	U32(struct kvm_segment, limit),
	U16(struct kvm_segment, selector),
	U8(struct kvm_segment, type),
	U8(struct kvm_segment, present),
	U8(struct kvm_segment, dpl),
	U8(struct kvm_segment, db),
	U8(struct kvm_segment, s),
	U8(struct kvm_segment, l),
	U8(struct kvm_segment, g),
	U8(struct kvm_segment, avl),
	U8(struct kvm_segment, unusable),
	CODEC_END,
};
static const struct codec_table segment_table = {"segment", sizeof(struct kvm_segment), segment_fields};

static const struct codec_field dtable_fields[] = {U64(struct kvm_dtable, base), U16(struct kvm_dtable, limit),
						   CODEC_END};
static const struct codec_table dtable_table = {"dtable", sizeof(struct kvm_dtable), dtable_fields};

#define SEGMENT(f) CODEC_SUB(struct kvm_sregs2, f, &segment_table)
static const struct codec_field sregs_fields[] = {
	SEGMENT(cs),
	SEGMENT(ds),
	SEGMENT(es),
	SEGMENT(fs),
	SEGMENT(gs),
	SEGMENT(ss),
	SEGMENT(tr),
	SEGMENT(ldt),
	CODEC_SUB(struct kvm_sregs2, gdt, &dtable_table),
	CODEC_SUB(struct kvm_sregs2, idt, &dtable_table),
	U64(struct kvm_sregs2, cr0),
	U64(struct kvm_sregs2, cr2),
	U64(struct kvm_sregs2, cr3),
	U64(struct kvm_sregs2, cr4),
	U64(struct kvm_sregs2, cr8),
	U64(struct kvm_sregs2, efer),
	U64(struct kvm_sregs2, apic_base),
	U64(struct kvm_sregs2, flags),
	CODEC_INTS(struct kvm_sregs2, pdptrs, CODEC_U64),
	CODEC_END,
};
static const struct codec_table sregs_table = {"sregs", sizeof(struct kvm_sregs2), sregs_fields};

static const struct codec_field debugregs_fields[] = {
	CODEC_INTS(struct kvm_debugregs, db, CODEC_U64),
	U64(struct kvm_debugregs, dr6),
	U64(struct kvm_debugregs, dr7),
	U64(struct kvm_debugregs, flags),
	CODEC_END,
};
static const struct codec_table debugregs_table = {"debugregs", sizeof(struct kvm_debugregs), debugregs_fields};

#define EVENT(n, f, t) NAMED(struct kvm_vcpu_events, n, f, t)
static const struct codec_field events_fields[] = {
	EVENT("exception.injected", exception.injected, CODEC_U8),
	EVENT("exception.nr", exception.nr, CODEC_U8),
	EVENT("exception.has_error_code", exception.has_error_code, CODEC_U8),
	EVENT("exception.pending", exception.pending, CODEC_U8),
	EVENT("exception.error_code", exception.error_code, CODEC_U32),
	EVENT("exception.has_payload", exception_has_payload, CODEC_U8),
	EVENT("exception.payload", exception_payload, CODEC_U64),
	EVENT("interrupt.injected", interrupt.injected, CODEC_U8),
	EVENT("interrupt.nr", interrupt.nr, CODEC_U8),
	EVENT("interrupt.soft", interrupt.soft, CODEC_U8),
	EVENT("interrupt.shadow", interrupt.shadow, CODEC_U8),
	EVENT("nmi.injected", nmi.injected, CODEC_U8),
	EVENT("nmi.pending", nmi.pending, CODEC_U8),
	EVENT("nmi.masked", nmi.masked, CODEC_U8),
	EVENT("sipi_vector", sipi_vector, CODEC_U32),
	EVENT("flags", flags, CODEC_U32),
	EVENT("smi.smm", smi.smm, CODEC_U8),
	EVENT("smi.pending", smi.pending, CODEC_U8),
	EVENT("smi.inside_nmi", smi.smm_inside_nmi, CODEC_U8),
	EVENT("smi.latched_init", smi.latched_init, CODEC_U8),
	EVENT("triple_fault.pending", triple_fault.pending, CODEC_U8),
	CODEC_END,
};
static const struct codec_table events_table = {"events", sizeof(struct kvm_vcpu_events), events_fields};

static const struct codec_field xcr_fields[] = {U32(struct kvm_xcr, xcr), U64(struct kvm_xcr, value), CODEC_END};
static const struct codec_table xcr_table = {"xcr", sizeof(struct kvm_xcr), xcr_fields};

static const struct codec_field msr_fields[] = {U32(struct kvm_msr_entry, index), U64(struct kvm_msr_entry, data),
						CODEC_END};
static const struct codec_table msr_table = {"msr", sizeof(struct kvm_msr_entry), msr_fields};

static const struct codec_field vcpu_fields[] = {
	CODEC_VSUBS(struct vcpu_state, cpuid, cpuid_count, &cpuid_table),
	U32(struct vcpu_state, mp_state),
	U32(struct vcpu_state, tsc_khz),
	U64(struct vcpu_state, tsc),
	CODEC_SUB(struct vcpu_state, regs, &regs_table),
	CODEC_SUB(struct vcpu_state, sregs, &sregs_table),
	CODEC_SUB(struct vcpu_state, debugregs, &debugregs_table),
	CODEC_SUB(struct vcpu_state, events, &events_table),
	CODEC_VSUBS(struct vcpu_state, xcr, xcr_count, &xcr_table),
	CODEC_RAW(struct vcpu_state, lapic),
	CODEC_VRAW(struct vcpu_state, xsave, xsave_bytes),
	CODEC_VSUBS(struct vcpu_state, msr, msr_count, &msr_table),
	CODEC_END,
};
const struct codec_table vcpu_state_table = {"vcpu", sizeof(struct vcpu_state), vcpu_fields};

static const struct codec_field clock_fields[] = {U64(struct clock_state, kvmclock_ns), CODEC_END};
const struct codec_table clock_state_table = {"kvm-clock", sizeof(struct clock_state), clock_fields};

static const struct codec_field pic_fields[] = {
	U8(struct kvm_pic_state, last_irr),
	U8(struct kvm_pic_state, irr),
	U8(struct kvm_pic_state, imr),
	U8(struct kvm_pic_state, isr),
	U8(struct kvm_pic_state, priority_add),
	U8(struct kvm_pic_state, irq_base),
	U8(struct kvm_pic_state, read_reg_select),
	U8(struct kvm_pic_state, poll),
	U8(struct kvm_pic_state, special_mask),
	U8(struct kvm_pic_state, init_state),
	U8(struct kvm_pic_state, auto_eoi),
	U8(struct kvm_pic_state, rotate_on_auto_eoi),
	U8(struct kvm_pic_state, special_fully_nested_mode),
	U8(struct kvm_pic_state, init4),
	U8(struct kvm_pic_state, elcr),
	U8(struct kvm_pic_state, elcr_mask),
	CODEC_END,
};
static const struct codec_table pic_table = {"pic", sizeof(struct kvm_pic_state), pic_fields};

static const struct codec_field ioapic_fields[] = {
	U64(struct kvm_ioapic_state, base_address),
	U32(struct kvm_ioapic_state, ioregsel),
	U32(struct kvm_ioapic_state, id),
	U32(struct kvm_ioapic_state, irr),
	CODEC_INTS(struct kvm_ioapic_state, redirtbl, CODEC_U64),
	CODEC_END,
};
static const struct codec_table ioapic_table = {"ioapic", sizeof(struct kvm_ioapic_state), ioapic_fields};

static const struct codec_field irqchip_fields[] = {CODEC_SUBS(struct irqchip_state, pic, &pic_table),
						    CODEC_SUB(struct irqchip_state, ioapic, &ioapic_table), CODEC_END};
const struct codec_table irqchip_state_table = {"irqchip", sizeof(struct irqchip_state), irqchip_fields};

static const struct codec_field pit_channel_fields[] = {
	U32(struct kvm_pit_channel_state, count),
	U16(struct kvm_pit_channel_state, latched_count),
	U8(struct kvm_pit_channel_state, count_latched),
	U8(struct kvm_pit_channel_state, status_latched),
	U8(struct kvm_pit_channel_state, status),
	U8(struct kvm_pit_channel_state, read_state),
	U8(struct kvm_pit_channel_state, write_state),
	U8(struct kvm_pit_channel_state, write_latch),
	U8(struct kvm_pit_channel_state, rw_mode),
	U8(struct kvm_pit_channel_state, mode),
	U8(struct kvm_pit_channel_state, bcd),
	U8(struct kvm_pit_channel_state, gate),
	CODEC_END,
};
static const struct codec_table pit_channel_table = {"pit channel", sizeof(struct kvm_pit_channel_state),
						     pit_channel_fields};

static const struct codec_field pit_fields[] = {CODEC_SUBS(struct kvm_pit_state2, channels, &pit_channel_table),
						U32(struct kvm_pit_state2, flags), CODEC_END};
const struct codec_table pit_state_table = {"pit", sizeof(struct kvm_pit_state2), pit_fields};
