/*
 * CPUID policy: what the host's KVM supports, less what a checkpoint could not carry, shaped as one socket of N cores.
 *
 * Leaf numbers and bits: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; KVM's leaves: Linux
 * Documentation/virt/kvm/x86/cpuid.rst.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/buf.h"
#include "vmm/x86/state.h"

#define BIT(n)		   (1u << (n))
#define KVM_LEAF_SIGNATURE 0x40000000u
#define KVM_LEAF_FEATURES  0x40000001u
#define KVM_LEAF_TIMING	   0x40000010u
#define APIC_BUS_KHZ	   1000000u /* KVM's LAPIC timer counts nanoseconds */

struct kvm_cpuid_entry2 *cpuid_find(struct kvm_cpuid2 *cpuid, uint32_t function, uint32_t index)
{
	for (uint32_t i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == function && cpuid->entries[i].index == index)
			return &cpuid->entries[i];
	return NULL;
}

/* The policy has room for the few leaves that are added: see get_supported. */
static struct kvm_cpuid_entry2 *need_leaf(struct kvm_cpuid2 *cpuid, uint32_t function, uint32_t index, uint32_t flags)
{
	struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, function, index);
	if (!leaf)
		leaf = &cpuid->entries[cpuid->nent++];
	*leaf = (struct kvm_cpuid_entry2){.function = function, .index = index, .flags = flags};
	return leaf;
}

/* A leaf that is all zero says the same as one that is not there. */
static void drop_leaves(struct kvm_cpuid2 *cpuid, bool (*drop)(const struct kvm_cpuid_entry2 *))
{
	uint32_t kept = 0;
	for (uint32_t i = 0; i < cpuid->nent; i++)
		if (!drop(&cpuid->entries[i]))
			cpuid->entries[kept++] = cpuid->entries[i];
	cpuid->nent = kept;
}

static bool is_unwanted(const struct kvm_cpuid_entry2 *leaf)
{
	switch (leaf->function) {
	case 0x5: /* MONITOR/MWAIT */
	case 0xa: /* performance counters */
	case 0xb: /* topology: made anew */
	case 0xf: /* cache monitoring and allocation */
	case 0x10:
	case 0x12: /* SGX */
	case 0x14: /* processor trace */
	case 0x1c: /* last branch records */
	case 0x1d: /* AMX */
	case 0x1e:
	case 0x1f:	 /* topology v2: leaf 0xb says it all for one socket without dies */
	case 0x8000000a: /* SVM */
	case 0x8000001b: /* IBS */
	case 0x8000001f: /* SEV */
	case 0x80000022: /* performance counters v2 */
	case KVM_LEAF_TIMING:
		return true;
	case 0xd: /* save areas of CET (11, 12), PASID (10), LBR (15), AMX (17, 18) */
		return leaf->index == 10 || leaf->index == 11 || leaf->index == 12 || leaf->index == 15 ||
		       leaf->index == 17 || leaf->index == 18;
	default:
		return false;
	}
}

static bool is_empty(const struct kvm_cpuid_entry2 *leaf)
{
	/* Leaf 0xd's subleaves 0 and 1 are looked at by KVM itself. */
	return !(leaf->eax | leaf->ebx | leaf->ecx | leaf->edx) && leaf->function != 0xd;
}

struct mask {
	uint32_t function, index;
	uint32_t eax, ebx, ecx, edx; /* bits to clear */
};

static const struct mask masks[] = {
	/* DTES64, MONITOR, DS-CPL, VMX, SMX, PDCM; DS, ACPI thermal, TM */
	{0x1, 0, 0, 0, BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(15), BIT(21) | BIT(22) | BIT(29)},
	{0x6, 0, ~BIT(2), ~0u, ~0u, ~0u}, /* all but ARAT */
	/* SGX, RDT-M, RDT-A, PT; WAITPKG, shadow stacks (no ioctl of ours saves SSP), TME, ENQCMD, SGX-LC; arch LBR,
	 * IBT, AMX */
	{0x7, 0, 0, BIT(2) | BIT(12) | BIT(15) | BIT(25), BIT(5) | BIT(7) | BIT(13) | BIT(29) | BIT(30),
	 BIT(19) | BIT(20) | BIT(22) | BIT(24) | BIT(25)},
	{0x7, 1, BIT(21), 0, 0, BIT(4) | BIT(5) | BIT(8)}, /* AMX's later parts */
	{0xd, 0, BIT(17) | BIT(18), 0, 0, 0},
	{0xd, 1, BIT(4), 0, BIT(10) | BIT(11) | BIT(12) | BIT(15), 0}, /* XFD; supervisor states as above */
	/* SVM, IBS, SKINIT, WDT, LWP, counters, MWAITX */
	{0x80000001, 0, 0, 0,
	 BIT(2) | BIT(10) | BIT(12) | BIT(13) | BIT(15) | BIT(23) | BIT(24) | BIT(26) | BIT(27) | BIT(28) | BIT(29), 0},
	/* Asynchronous page faults: KVM keeps outstanding ones where no ioctl shows them. */
	{KVM_LEAF_FEATURES, 0, BIT(4) | BIT(10) | BIT(14), 0, 0, ~0u},
};

static void apply_masks(struct kvm_cpuid2 *cpuid)
{
	for (size_t i = 0; i < ARRAY_LENGTH(masks); i++) {
		struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, masks[i].function, masks[i].index);
		if (!leaf)
			continue;
		leaf->eax &= ~masks[i].eax;
		leaf->ebx &= ~masks[i].ebx;
		leaf->ecx &= ~masks[i].ecx;
		leaf->edx &= ~masks[i].edx;
	}
}

/* Bits of the APIC id that number cores. */
static uint32_t core_bits(unsigned cpus)
{
	uint32_t bits = 0;
	while ((1u << bits) < cpus)
		bits++;
	return bits;
}

/* Caches of leaf 4 or 0x8000001d: levels 1 and 2 belong to a core, level 3 to the socket. */
static void shape_caches(struct kvm_cpuid2 *cpuid, uint32_t function, unsigned cpus)
{
	uint32_t ids = (1u << core_bits(cpus)) - 1;
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *leaf = &cpuid->entries[i];
		if (leaf->function != function || (leaf->eax & 0x1f) == 0)
			continue;
		uint32_t level = (leaf->eax >> 5) & 7;
		leaf->eax &= 0x3fffu;
		leaf->eax |= (level >= 3 ? ids : 0) << 14;
		if (function == 4)
			leaf->eax |= ids << 26;
	}
}

static void shape_topology(struct kvm_cpuid2 *cpuid, unsigned cpus)
{
	struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, 0x1, 0);
	if (leaf) {
		leaf->ebx = (leaf->ebx & 0xff00u) | cpus << 16;
		leaf->edx = cpus > 1 ? leaf->edx | BIT(28) : leaf->edx & ~BIT(28);
		leaf->ecx |= BIT(31); /* a hypervisor is here */
	}
	leaf = cpuid_find(cpuid, 0x0, 0);
	if (leaf && leaf->eax >= 0xb) {
		leaf = need_leaf(cpuid, 0xb, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
		leaf->ebx = 1;
		leaf->ecx = 1u << 8; /* threads: one in a core */
		leaf = need_leaf(cpuid, 0xb, 1, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
		leaf->eax = core_bits(cpus);
		leaf->ebx = cpus;
		leaf->ecx = 2u << 8 | 1; /* cores */
	}
	leaf = cpuid_find(cpuid, 0x80000001, 0);
	if (leaf)
		leaf->ecx = cpus > 1 ? leaf->ecx | BIT(1) : leaf->ecx & ~BIT(1);
	leaf = cpuid_find(cpuid, 0x80000008, 0);
	if (leaf)
		leaf->ecx = core_bits(cpus) << 12 | (cpus - 1);
	leaf = cpuid_find(cpuid, 0x8000001e, 0);
	if (leaf)
		leaf->eax = leaf->ebx = leaf->ecx = leaf->edx = 0;
	shape_caches(cpuid, 0x4, cpus);
	shape_caches(cpuid, 0x8000001d, cpus);
}

static int get_supported(int kvm_fd, struct kvm_cpuid2 **out, struct err *err)
{
	for (uint32_t room = STATE_MAX_CPUID; room <= 16 * STATE_MAX_CPUID; room *= 2) {
		/* 8 for the leaves that are added. */
		struct kvm_cpuid2 *cpuid = xcalloc(1, sizeof(*cpuid) + (room + 8) * sizeof(cpuid->entries[0]));
		cpuid->nent = room;
		if (ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) == 0) {
			*out = cpuid;
			return 0;
		}
		int number = errno;
		free(cpuid);
		if (number != E2BIG)
			return err_sys(err, number, "KVM_GET_SUPPORTED_CPUID");
	}
	return err_set(err, ERR_HOST, E2BIG, "KVM_GET_SUPPORTED_CPUID: too many leaves");
}

int cpuid_make_policy(int kvm_fd, const char *model, unsigned cpus, uint32_t tsc_khz, struct kvm_cpuid2 **out, struct err *err)
{
	struct kvm_cpuid2 *cpuid = NULL;
	int r = get_supported(kvm_fd, &cpuid, err);
	if (r < 0)
		return r;
	drop_leaves(cpuid, is_unwanted);
	apply_masks(cpuid);
	r = cpuid_apply_model(model, cpuid, err);
	if (r < 0) {
		free(cpuid);
		return r;
	}
	drop_leaves(cpuid, is_empty);
	shape_topology(cpuid, cpus);
	struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, 0x1, 0);
	/* KVM emulates both whatever the processor is, and lists the deadline timer as a capability instead. */
	if (leaf) {
		leaf->ecx |= BIT(21);
		if (ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0)
			leaf->ecx |= BIT(24);
	}
	leaf = cpuid_find(cpuid, KVM_LEAF_SIGNATURE, 0);
	if (leaf) {
		leaf->eax = KVM_LEAF_TIMING;
		leaf = need_leaf(cpuid, KVM_LEAF_TIMING, 0, 0);
		leaf->eax = tsc_khz;
		leaf->ebx = APIC_BUS_KHZ;
	}
	if (cpuid->nent > STATE_MAX_CPUID) {
		r = err_set(err, ERR_HOST, E2BIG, "%u CPUID leaves, more than %d", cpuid->nent, STATE_MAX_CPUID);
		free(cpuid);
		return r;
	}
	*out = cpuid;
	return 0;
}

int cpuid_fill(const struct kvm_cpuid2 *policy, unsigned index, struct vcpu_state *state, struct err *err)
{
	if (policy->nent > STATE_MAX_CPUID)
		return err_set(err, ERR_HOST, E2BIG, "%u CPUID leaves, more than %d", policy->nent, STATE_MAX_CPUID);
	state->cpuid_count = policy->nent;
	for (uint32_t i = 0; i < policy->nent; i++) {
		struct kvm_cpuid_entry2 *leaf = &state->cpuid[i];
		*leaf = policy->entries[i];
		memset(leaf->padding, 0, sizeof(leaf->padding));
		switch (leaf->function) {
		case 0x1:
			leaf->ebx |= index << 24;
			break;
		case 0xb:
			leaf->edx = index;
			break;
		case 0x8000001e:
			leaf->eax = leaf->ebx = index; /* APIC id; core id, one thread in it */
			break;
		default:
			break;
		}
	}
	return 0;
}

int cpuid_set(struct vcpu *vcpu, const struct vcpu_state *state, struct err *err)
{
	CLEANUP_FREE struct kvm_cpuid2 *cpuid =
		xcalloc(1, sizeof(*cpuid) + state->cpuid_count * sizeof(cpuid->entries[0]));
	cpuid->nent = state->cpuid_count;
	memcpy(cpuid->entries, state->cpuid, state->cpuid_count * sizeof(cpuid->entries[0]));
	if (ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0)
		return err_sys(err, errno, "vCPU %u: KVM_SET_CPUID2", vcpu->index);
	return 0;
}

bool cpuid_equal(const struct vcpu_state *a, const struct vcpu_state *b)
{
	return a->cpuid_count == b->cpuid_count &&
	       memcmp(a->cpuid, b->cpuid, a->cpuid_count * sizeof(a->cpuid[0])) == 0;
}

/* --- may a guest that saw one table go on with another host? --- */

static const struct kvm_cpuid_entry2 *state_leaf(const struct vcpu_state *state, uint32_t function, uint32_t index)
{
	static const struct kvm_cpuid_entry2 none;
	for (uint32_t i = 0; i < state->cpuid_count; i++)
		if (state->cpuid[i].function == function && state->cpuid[i].index == index)
			return &state->cpuid[i];
	return &none;
}

/* Leaves whose every bit of the masked registers is a feature that the guest may be using. */
static const struct mask features[] = {
	{0x1, 0, 0, 0, ~0u, ~0u},
	{0x7, 0, 0, ~0u, ~0u, ~0u},
	{0x7, 1, ~0u, ~0u, 0, ~0u},
	{0x7, 2, 0, 0, 0, ~0u},
	{0xd, 0, ~0u, 0, 0, ~0u},
	{0xd, 1, ~0u, 0, ~0u, ~0u},
	{0x80000001, 0, 0, 0, ~0u, ~CPUID_AMD_REPEATED},
	{0x80000007, 0, 0, 0, 0, ~0u},
	{0x80000008, 0, 0, ~0u, 0, 0},
	{0x80000021, 0, ~0u, 0, 0, 0},
	{KVM_LEAF_FEATURES, 0, ~0u, 0, 0, 0},
};

/* The twelve letters of leaf 0. */
static void vendor_of(const struct vcpu_state *state, char out[13])
{
	const struct kvm_cpuid_entry2 *leaf = state_leaf(state, 0, 0);
	memcpy(out, &leaf->ebx, 4);
	memcpy(out + 4, &leaf->edx, 4);
	memcpy(out + 8, &leaf->ecx, 4);
	out[12] = '\0';
	for (char *c = out; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
}

static unsigned address_bits(const struct vcpu_state *state) { return state_leaf(state, 0x80000008, 0)->eax & 0xff; }

int cpuid_needs(const struct vcpu_state *saved, struct buf *lines, struct err *err)
{
	char vendor[13], names[8192] = "";
	vendor_of(saved, vendor);
	for (size_t i = 0; i < ARRAY_LENGTH(features); i++) {
		const struct mask *mask = &features[i];
		const struct kvm_cpuid_entry2 *leaf = state_leaf(saved, mask->function, mask->index);
		const uint32_t bits[4] = {leaf->eax & mask->eax, leaf->ebx & mask->ebx, leaf->ecx & mask->ecx, leaf->edx & mask->edx};
		for (unsigned reg = 0; reg < 4; reg++)
			cpuid_name_features(mask->function, mask->index, reg, bits[reg], names, sizeof(names));
	}
	CLEANUP_FREE char *text = xasprintf("processor: %s, addresses of %u bits, TSC of %u kHz, %u bytes of extended registers\nfeatures: %s\n", vendor,
					    address_bits(saved), saved->tsc_khz, saved->xsave_bytes, names);
	return buf_append(lines, text, strlen(text), err);
}

int cpuid_check(const struct vcpu_state *saved, const struct vcpu_state *host, struct err *err)
{
	const struct kvm_cpuid_entry2 *a = state_leaf(saved, 0, 0), *b = state_leaf(host, 0, 0);
	if (a->ebx != b->ebx || a->ecx != b->ecx || a->edx != b->edx) {
		char vendor[2][13];
		vendor_of(saved, vendor[0]);
		vendor_of(host, vendor[1]);
		err_set(err, ERR_HOST, ENOTSUP, "the state is of a processor of %s, this host's is of %s", vendor[0], vendor[1]);
		return err_hint(err, "start it on a host like the one where it was saved");
	}
	char missing[360] = "";
	for (size_t i = 0; i < ARRAY_LENGTH(features); i++) {
		const struct mask *mask = &features[i];
		a = state_leaf(saved, mask->function, mask->index);
		b = state_leaf(host, mask->function, mask->index);
		const uint32_t bits[4] = {a->eax & ~b->eax & mask->eax, a->ebx & ~b->ebx & mask->ebx, a->ecx & ~b->ecx & mask->ecx,
					  a->edx & ~b->edx & mask->edx};
		for (unsigned reg = 0; reg < 4; reg++)
			cpuid_name_features(mask->function, mask->index, reg, bits[reg], missing, sizeof(missing));
	}
	/* Its page tables may use all bits of an address that it was told of. */
	unsigned wide = address_bits(saved), here = address_bits(host);
	if (!missing[0] && wide <= here)
		return 0;
	if (missing[0])
		err_set(err, ERR_HOST, ENOTSUP, "this host lacks processor features of the state: %s", missing);
	else
		err_set(err, ERR_HOST, ENOTSUP, "this host's processor has addresses of %u bits, the state is of one with %u", here, wide);
	return err_hint(err, "start it on a host like the one where it was saved, or boot the guest with a lower cpu_model, such as x86-64-v2, for "
			     "checkpoints that travel");
}
