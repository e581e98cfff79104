/*
 * Named CPU models: what every processor of a level has, and nothing more, so that a checkpoint can go on on any host of that level of the same
 * vendor. The levels are those of the x86-64 psABI (System V ABI, AMD64 supplement, section 3.1.1, micro-architecture levels); beside their features
 * the guest keeps what KVM emulates whatever the host is, and what all 64-bit processors have. Names of features are those of Linux.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/buf.h"
#include "vmm/x86/state.h"

enum level { LEVEL_ALWAYS, LEVEL_1, LEVEL_2, LEVEL_3, LEVEL_NONE };

static const struct {
	const char *name;
	enum level level;
} models[] = {{"x86-64-v1", LEVEL_1}, {"x86-64-v2", LEVEL_2}, {"x86-64-v3", LEVEL_3}};

enum cpuid_register { EAX, EBX, ECX, EDX };

/* The level that a feature belongs to; LEVEL_ALWAYS: every model shows it if it is there; LEVEL_NONE: no model shows it, its name is for messages. */
static const struct feature {
	uint32_t function, index;
	enum cpuid_register reg;
	unsigned bit;
	enum level level;
	const char *name;
} features[] = {
	{0x1, 0, EDX, 0, LEVEL_1, "fpu"},
	{0x1, 0, EDX, 1, LEVEL_ALWAYS, "vme"},
	{0x1, 0, EDX, 2, LEVEL_ALWAYS, "de"},
	{0x1, 0, EDX, 3, LEVEL_ALWAYS, "pse"},
	{0x1, 0, EDX, 4, LEVEL_ALWAYS, "tsc"},
	{0x1, 0, EDX, 5, LEVEL_ALWAYS, "msr"},
	{0x1, 0, EDX, 6, LEVEL_ALWAYS, "pae"},
	{0x1, 0, EDX, 7, LEVEL_ALWAYS, "mce"},
	{0x1, 0, EDX, 8, LEVEL_1, "cx8"},
	{0x1, 0, EDX, 9, LEVEL_ALWAYS, "apic"},
	{0x1, 0, EDX, 11, LEVEL_ALWAYS, "sep"},
	{0x1, 0, EDX, 12, LEVEL_ALWAYS, "mtrr"},
	{0x1, 0, EDX, 13, LEVEL_ALWAYS, "pge"},
	{0x1, 0, EDX, 14, LEVEL_ALWAYS, "mca"},
	{0x1, 0, EDX, 15, LEVEL_1, "cmov"},
	{0x1, 0, EDX, 16, LEVEL_ALWAYS, "pat"},
	{0x1, 0, EDX, 17, LEVEL_ALWAYS, "pse36"},
	{0x1, 0, EDX, 19, LEVEL_ALWAYS, "clflush"},
	{0x1, 0, EDX, 23, LEVEL_1, "mmx"},
	{0x1, 0, EDX, 24, LEVEL_1, "fxsr"},
	{0x1, 0, EDX, 25, LEVEL_1, "sse"},
	{0x1, 0, EDX, 26, LEVEL_1, "sse2"},
	{0x1, 0, ECX, 0, LEVEL_2, "sse3"},
	{0x1, 0, ECX, 1, LEVEL_NONE, "pclmulqdq"},
	{0x1, 0, ECX, 9, LEVEL_2, "ssse3"},
	{0x1, 0, ECX, 12, LEVEL_3, "fma"},
	{0x1, 0, ECX, 13, LEVEL_2, "cx16"},
	{0x1, 0, ECX, 17, LEVEL_NONE, "pcid"},
	{0x1, 0, ECX, 19, LEVEL_2, "sse4_1"},
	{0x1, 0, ECX, 20, LEVEL_2, "sse4_2"},
	{0x1, 0, ECX, 21, LEVEL_ALWAYS, "x2apic"},
	{0x1, 0, ECX, 22, LEVEL_3, "movbe"},
	{0x1, 0, ECX, 23, LEVEL_2, "popcnt"},
	{0x1, 0, ECX, 24, LEVEL_ALWAYS, "tsc_deadline_timer"},
	{0x1, 0, ECX, 25, LEVEL_NONE, "aes"},
	{0x1, 0, ECX, 26, LEVEL_3, "xsave"},
	{0x1, 0, ECX, 27, LEVEL_NONE, "osxsave"},
	{0x1, 0, ECX, 28, LEVEL_3, "avx"},
	{0x1, 0, ECX, 29, LEVEL_3, "f16c"},
	{0x1, 0, ECX, 30, LEVEL_NONE, "rdrand"},
	{0x1, 0, ECX, 31, LEVEL_ALWAYS, "hypervisor"},
	{0x7, 0, EBX, 0, LEVEL_NONE, "fsgsbase"},
	{0x7, 0, EBX, 1, LEVEL_NONE, "tsc_adjust"},
	{0x7, 0, EBX, 3, LEVEL_3, "bmi1"},
	{0x7, 0, EBX, 4, LEVEL_NONE, "hle"},
	{0x7, 0, EBX, 5, LEVEL_3, "avx2"},
	{0x7, 0, EBX, 7, LEVEL_NONE, "smep"},
	{0x7, 0, EBX, 8, LEVEL_3, "bmi2"},
	{0x7, 0, EBX, 9, LEVEL_NONE, "erms"},
	{0x7, 0, EBX, 10, LEVEL_NONE, "invpcid"},
	{0x7, 0, EBX, 11, LEVEL_NONE, "rtm"},
	{0x7, 0, EBX, 16, LEVEL_NONE, "avx512f"},
	{0x7, 0, EBX, 17, LEVEL_NONE, "avx512dq"},
	{0x7, 0, EBX, 18, LEVEL_NONE, "rdseed"},
	{0x7, 0, EBX, 19, LEVEL_NONE, "adx"},
	{0x7, 0, EBX, 20, LEVEL_NONE, "smap"},
	{0x7, 0, EBX, 23, LEVEL_NONE, "clflushopt"},
	{0x7, 0, EBX, 24, LEVEL_NONE, "clwb"},
	{0x7, 0, EBX, 28, LEVEL_NONE, "avx512cd"},
	{0x7, 0, EBX, 29, LEVEL_NONE, "sha_ni"},
	{0x7, 0, EBX, 30, LEVEL_NONE, "avx512bw"},
	{0x7, 0, EBX, 31, LEVEL_NONE, "avx512vl"},
	{0x7, 0, ECX, 1, LEVEL_NONE, "avx512vbmi"},
	{0x7, 0, ECX, 2, LEVEL_NONE, "umip"},
	{0x7, 0, ECX, 3, LEVEL_NONE, "pku"},
	{0x7, 0, ECX, 8, LEVEL_NONE, "gfni"},
	{0x7, 0, ECX, 9, LEVEL_NONE, "vaes"},
	{0x7, 0, ECX, 10, LEVEL_NONE, "vpclmulqdq"},
	{0x7, 0, ECX, 11, LEVEL_NONE, "avx512_vnni"},
	{0x7, 0, ECX, 16, LEVEL_NONE, "la57"},
	{0x7, 0, ECX, 22, LEVEL_NONE, "rdpid"},
	{0x7, 0, EDX, 4, LEVEL_NONE, "fsrm"},
	{0x7, 0, EDX, 10, LEVEL_NONE, "md_clear"},
	{0x7, 0, EDX, 14, LEVEL_NONE, "serialize"},
	{0x7, 0, EDX, 23, LEVEL_NONE, "avx512_fp16"},
	{0x7, 0, EDX, 26, LEVEL_NONE, "spec_ctrl"},
	{0x7, 0, EDX, 27, LEVEL_NONE, "intel_stibp"},
	{0x7, 0, EDX, 28, LEVEL_NONE, "flush_l1d"},
	{0x7, 0, EDX, 29, LEVEL_NONE, "arch_capabilities"},
	{0x7, 0, EDX, 31, LEVEL_NONE, "spec_ctrl_ssbd"},
	{0xd, 0, EAX, 0, LEVEL_3, "xsave of x87"},
	{0xd, 0, EAX, 1, LEVEL_3, "xsave of sse"},
	{0xd, 0, EAX, 2, LEVEL_3, "xsave of avx"},
	{0xd, 0, EAX, 5, LEVEL_NONE, "xsave of avx512 masks"},
	{0xd, 0, EAX, 6, LEVEL_NONE, "xsave of avx512 (0-15)"},
	{0xd, 0, EAX, 7, LEVEL_NONE, "xsave of avx512 (16-31)"},
	{0xd, 0, EAX, 9, LEVEL_NONE, "xsave of pkru"},
	{0xd, 1, EAX, 0, LEVEL_NONE, "xsaveopt"},
	{0xd, 1, EAX, 1, LEVEL_NONE, "xsavec"},
	{0xd, 1, EAX, 2, LEVEL_NONE, "xgetbv1"},
	{0xd, 1, EAX, 3, LEVEL_NONE, "xsaves"},
	{0x80000001, 0, EDX, 11, LEVEL_1, "syscall"},
	{0x80000001, 0, EDX, 20, LEVEL_ALWAYS, "nx"},
	{0x80000001, 0, EDX, 26, LEVEL_NONE, "pdpe1gb"},
	{0x80000001, 0, EDX, 27, LEVEL_NONE, "rdtscp"},
	{0x80000001, 0, EDX, 29, LEVEL_1, "lm"},
	{0x80000001, 0, ECX, 0, LEVEL_2, "lahf_lm"},
	{0x80000001, 0, ECX, 1, LEVEL_ALWAYS, "cmp_legacy"},
	{0x80000001, 0, ECX, 4, LEVEL_NONE, "cr8_legacy"},
	{0x80000001, 0, ECX, 5, LEVEL_3, "abm"},
	{0x80000001, 0, ECX, 6, LEVEL_NONE, "sse4a"},
	{0x80000001, 0, ECX, 7, LEVEL_NONE, "misalignsse"},
	{0x80000001, 0, ECX, 8, LEVEL_NONE, "3dnowprefetch"},
	{0x80000001, 0, ECX, 9, LEVEL_NONE, "osvw"},
	{0x80000001, 0, ECX, 22, LEVEL_NONE, "topoext"},
	{0x80000001, 0, EDX, 22, LEVEL_NONE, "mmxext"},
	{0x80000001, 0, EDX, 25, LEVEL_NONE, "fxsr_opt"},
	{0x80000007, 0, EDX, 8, LEVEL_NONE, "nonstop_tsc"},
	{0x80000008, 0, EBX, 0, LEVEL_NONE, "clzero"},
	{0x80000008, 0, EBX, 2, LEVEL_NONE, "xsaveerptr"},
	{0x80000008, 0, EBX, 12, LEVEL_NONE, "ibpb"},
	{0x80000008, 0, EBX, 14, LEVEL_NONE, "ibrs"},
	{0x80000008, 0, EBX, 15, LEVEL_NONE, "stibp"},
	{0x80000008, 0, EBX, 17, LEVEL_NONE, "stibp always on"},
	{0x80000008, 0, EBX, 24, LEVEL_NONE, "amd_ssbd"},
	{0x80000008, 0, EBX, 25, LEVEL_NONE, "virt_ssbd"},
	{0x80000008, 0, EBX, 28, LEVEL_NONE, "psfd"},
	{0x80000021, 0, EAX, 2, LEVEL_NONE, "lfence serializing"},
	/* KVM's own, of kernels of the last ten years. */
	{0x40000001, 0, EAX, 0, LEVEL_ALWAYS, "kvmclock (old)"},
	{0x40000001, 0, EAX, 1, LEVEL_ALWAYS, "kvm nop_io_delay"},
	{0x40000001, 0, EAX, 3, LEVEL_ALWAYS, "kvmclock"},
	{0x40000001, 0, EAX, 5, LEVEL_ALWAYS, "kvm steal_time"},
	{0x40000001, 0, EAX, 6, LEVEL_ALWAYS, "kvm pv_eoi"},
	{0x40000001, 0, EAX, 7, LEVEL_ALWAYS, "kvm pv_unhalt"},
	{0x40000001, 0, EAX, 9, LEVEL_NONE, "kvm pv_tlb_flush"},
	{0x40000001, 0, EAX, 11, LEVEL_NONE, "kvm pv_send_ipi"},
	{0x40000001, 0, EAX, 12, LEVEL_NONE, "kvm poll_control"},
	{0x40000001, 0, EAX, 13, LEVEL_NONE, "kvm pv_sched_yield"},
	{0x40000001, 0, EAX, 15, LEVEL_NONE, "kvm msi_ext_dest_id"},
	{0x40000001, 0, EAX, 24, LEVEL_ALWAYS, "kvmclock stable"},
};

/* Registers in which each bit is a feature: what a model does not name it takes away. */
static const struct {
	uint32_t function, index;
	enum cpuid_register reg;
} masked[] = {
	{0x1, 0, ECX}, {0x1, 0, EDX}, {0x7, 0, EBX}, {0x7, 0, ECX}, {0x7, 0, EDX}, {0xd, 0, EAX}, {0xd, 0, EDX}, {0xd, 1, EAX}, {0xd, 1, ECX}, {0xd, 1, EDX},
	{0x80000001, 0, ECX}, {0x80000001, 0, EDX}, {0x80000007, 0, EDX}, {0x80000008, 0, EBX}, {0x40000001, 0, EAX},
};

#define XSAVE_BYTES  832u /* legacy area, header, AVX */

static enum level level_of(const char *name)
{
	for (size_t i = 0; i < ARRAY_LENGTH(models); i++)
		if (!strcmp(models[i].name, name))
			return models[i].level;
	return LEVEL_NONE;
}

bool vm_knows_cpu_model(const char *name) { return !strcmp(name, "host") || level_of(name) != LEVEL_NONE; }

const char *vm_cpu_model_name(const char *name)
{
	for (size_t i = 0; name && i < ARRAY_LENGTH(models); i++)
		if (!strcmp(models[i].name, name))
			return models[i].name;
	return "host";
}

static uint32_t *register_of(struct kvm_cpuid_entry2 *leaf, enum cpuid_register reg)
{
	uint32_t *const registers[] = {&leaf->eax, &leaf->ebx, &leaf->ecx, &leaf->edx};
	return registers[reg];
}

static void add_name(char *text, size_t size, const char *name)
{
	size_t used = strlen(text);
	if (used + strlen(name) + 8 < size)
		snprintf(text + used, size - used, "%s%s", used ? ", " : "", name);
	else if (used < 4 || strcmp(text + used - 3, "...") != 0)
		snprintf(text + used, size - used, ", ...");
}

void cpuid_name_features(uint32_t function, uint32_t index, unsigned reg, uint32_t bits, char *text, size_t size)
{
	static const char *const names[] = {"eax", "ebx", "ecx", "edx"};
	for (unsigned bit = 0; bit < 32; bit++) {
		char number[48];
		const char *name = number;
		if (!(bits >> bit & 1))
			continue;
		snprintf(number, sizeof(number), "CPUID 0x%x.%u %s bit %u", function, index, names[reg], bit);
		for (size_t i = 0; i < ARRAY_LENGTH(features); i++)
			if (features[i].function == function && features[i].index == index && features[i].reg == reg && features[i].bit == bit)
				name = features[i].name;
		add_name(text, size, name);
	}
}

/* Those of the level must all be there. */
static int check_level(const char *name, enum level level, struct kvm_cpuid2 *cpuid, struct err *err)
{
	char missing[300] = "";
	for (size_t i = 0; i < ARRAY_LENGTH(features); i++) {
		const struct feature *f = &features[i];
		if (f->level == LEVEL_ALWAYS || f->level > level)
			continue;
		struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, f->function, f->index);
		if (!leaf || !(*register_of(leaf, f->reg) >> f->bit & 1))
			add_name(missing, sizeof(missing), f->name);
	}
	if (!missing[0])
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "cpu_model = %s: this host lacks %s", name, missing);
	if (level == LEVEL_1)
		return err_hint(err, "use cpu_model = host");
	return err_hint(err, "choose a lower one, such as %s", models[level - LEVEL_2].name);
}

static void mask_registers(enum level level, struct kvm_cpuid2 *cpuid)
{
	for (size_t i = 0; i < ARRAY_LENGTH(masked); i++) {
		struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, masked[i].function, masked[i].index);
		uint32_t keep = masked[i].function == 0x80000001 && masked[i].reg == EDX ? CPUID_AMD_REPEATED : 0;
		for (size_t k = 0; k < ARRAY_LENGTH(features); k++) {
			const struct feature *f = &features[k];
			if (f->function == masked[i].function && f->index == masked[i].index && f->reg == masked[i].reg && f->level <= level)
				keep |= 1u << f->bit;
		}
		if (leaf)
			*register_of(leaf, masked[i].reg) &= keep;
	}
}

/* Leaves that tell of a particular processor and say nothing that a level promises: gone, or of the size that fits. */
static void shape_leaves(enum level level, struct kvm_cpuid2 *cpuid)
{
	uint32_t kept = 0;
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *leaf = &cpuid->entries[i];
		uint32_t f = leaf->function;
		bool xsave = f == 0xd, gone = (f > 0xd && f < 0x40000000) || (f == 0x7 && leaf->index) || f == 0x80000021 ||
					      (xsave && (level < LEVEL_3 || leaf->index > 2));
		if (f == 0)
			leaf->eax = leaf->eax > 0xd ? 0xd : leaf->eax;
		if (f == 0x7)
			leaf->eax = 0; /* no subleaves */
		if (xsave && leaf->index == 0) {
			leaf->ebx = leaf->ecx = XSAVE_BYTES;
		} else if (xsave && leaf->index == 1)
			leaf->ebx = 0;
		if (!gone)
			cpuid->entries[kept++] = *leaf;
	}
	cpuid->nent = kept;
}

int cpuid_apply_model(const char *name, struct kvm_cpuid2 *cpuid, struct err *err)
{
	if (!name || !strcmp(name, "host"))
		return 0;
	enum level level = level_of(name);
	if (level == LEVEL_NONE) {
		err_set(err, ERR_USAGE, EINVAL, "CPU model '%s' is not known", name);
		return err_hint(err, "use " VM_CPU_MODELS);
	}
	int r = check_level(name, level, cpuid, err);
	if (r < 0)
		return r;
	mask_registers(level, cpuid);
	shape_leaves(level, cpuid);
	return 0;
}
