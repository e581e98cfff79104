#include <criterion/criterion.h>
#include <errno.h>

#include "base/buf.h"
#include "vmm/x86/state.h"
#include "vmm/x86/test_guest.h"

static const struct kvm_cpuid_entry2 *leaf_of(const struct vcpu_state *state, uint32_t function, uint32_t index)
{
	for (uint32_t i = 0; i < state->cpuid_count; i++)
		if (state->cpuid[i].function == function && state->cpuid[i].index == index)
			return &state->cpuid[i];
	return NULL;
}

static struct vcpu_state *make(unsigned cpus, unsigned index)
{
	struct kvm_cpuid2 *policy = NULL;
	struct err err = ERR_INIT;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	cr_assert_eq(cpuid_make_policy(kvm, NULL, cpus, 2000000, &policy, &err), 0, "%s", err.message);
	struct vcpu_state *state = xcalloc(1, sizeof(*state));
	cr_assert_eq(cpuid_fill(policy, index, state, &err), 0);
	free(policy);
	close(kvm);
	return state;
}

Test(cpuid, one_socket_of_n_cores)
{
	static const unsigned counts[] = {1, 2, 4};
	if (!test_have_kvm())
		test_skip("/dev/kvm cannot be opened");
	for (unsigned i = 0; i < 3; i++) {
		unsigned cpus = counts[i], last = cpus - 1;
		CLEANUP_FREE struct vcpu_state *state = make(cpus, last);
		const struct kvm_cpuid_entry2 *leaf = leaf_of(state, 1, 0);
		cr_assert_not_null(leaf);
		cr_expect_eq(leaf->ebx >> 24, last);
		cr_expect_eq(leaf->ebx >> 16 & 0xff, cpus);
		cr_expect_eq(leaf->edx >> 28 & 1, cpus > 1);
		cr_expect_eq(leaf->ecx >> 31, 1u, "a hypervisor is here");
		leaf = leaf_of(state, 0xb, 1);
		cr_assert_not_null(leaf);
		cr_expect_eq(leaf->eax, i, "core bits of the APIC id");
		cr_expect_eq(leaf->ebx, cpus);
		cr_expect_eq(leaf->edx, last);
		leaf = leaf_of(state, 0x80000008, 0);
		cr_assert_not_null(leaf);
		cr_expect_eq(leaf->ecx & 0xff, last);
	}
}

Test(cpuid, offers_nothing_that_a_checkpoint_cannot_carry)
{
	if (!test_have_kvm())
		test_skip("/dev/kvm cannot be opened");
	CLEANUP_FREE struct vcpu_state *state = make(2, 0);
	const struct kvm_cpuid_entry2 *leaf = leaf_of(state, 1, 0);
	cr_expect_eq(leaf->ecx & (1u << 5 | 1u << 3), 0, "VMX, MONITOR");
	leaf = leaf_of(state, 0x80000001, 0);
	cr_assert_not_null(leaf);
	cr_expect_eq(leaf->ecx & 1u << 2, 0, "SVM");
	cr_expect_null(leaf_of(state, 0x8000000a, 0));
	cr_expect_null(leaf_of(state, 0xa, 0));
	leaf = leaf_of(state, 0x40000001, 0);
	cr_assert_not_null(leaf);
	cr_expect_eq(leaf->eax & 1u << 4, 0, "asynchronous page faults");
	cr_expect_eq(leaf->eax & 1u << 3, 1u << 3, "kvm-clock");
	leaf = leaf_of(state, 0x40000010, 0);
	cr_assert_not_null(leaf);
	cr_expect_eq(leaf->eax, 2000000);
	cr_expect_geq(leaf_of(state, 0x40000000, 0)->eax, 0x40000010);
}

static void set_leaf(struct vcpu_state *state, uint32_t function, uint32_t ecx)
{
	state->cpuid[state->cpuid_count++] = (struct kvm_cpuid_entry2){.function = function, .ecx = ecx};
}

Test(cpuid, a_state_needs_its_features)
{
	CLEANUP_FREE struct vcpu_state *saved = xcalloc(1, sizeof(*saved)), *host = xcalloc(1, sizeof(*host));
	struct err err = ERR_INIT;
	set_leaf(saved, 0, 7);
	set_leaf(host, 0, 7);
	set_leaf(saved, 1, 0x10);
	set_leaf(host, 1, 0x30);
	cr_expect_eq(cpuid_check(saved, host, &err), 0);
	cr_expect_eq(cpuid_check(host, saved, &err), -ENOTSUP);
	cr_expect_eq(err.class, ERR_HOST);
	/* All of them, by name, and the way out. */
	saved->cpuid[1].ecx = 1u << 12 | 1u << 25 | 1u << 16;
	saved->cpuid[saved->cpuid_count++] = (struct kvm_cpuid_entry2){.function = 7, .ebx = 1u << 5 | 1u << 16};
	err = ERR_INIT;
	cr_expect_eq(cpuid_check(saved, host, &err), -ENOTSUP);
	cr_expect_str_eq(err.message, "this host lacks processor features of the state: fma, CPUID 0x1.0 ecx bit 16, aes, avx2, avx512f");
	cr_expect_not_null(strstr(err.hint, "cpu_model"));
	CLEANUP_BUF struct buf lines = BUF_INIT;
	saved->tsc_khz = 2000000;
	cr_assert_eq(cpuid_needs(saved, &lines, &err), 0);
	cr_assert_eq(buf_append(&lines, "", 1, &err), 0);
	cr_expect_str_eq((const char *)lines.data, "processor: , addresses of 0 bits, TSC of 2000000 kHz, 0 bytes of extended registers\n"
						   "features: fma, CPUID 0x1.0 ecx bit 16, aes, avx2, avx512f\n");
	saved->cpuid[1].ecx = 0;
	saved->cpuid_count = 2;
	saved->cpuid[saved->cpuid_count++] = (struct kvm_cpuid_entry2){.function = 0x80000008, .eax = 46};
	host->cpuid[host->cpuid_count++] = (struct kvm_cpuid_entry2){.function = 0x80000008, .eax = 39};
	cr_expect_eq(cpuid_check(saved, host, &err), -ENOTSUP, "wider addresses");
	cr_expect_eq(cpuid_check(host, saved, &err), -ENOTSUP, "what leaf 1 has");
	host->cpuid[1].ecx = 0;
	cr_expect_eq(cpuid_check(host, saved, &err), 0, "narrower addresses");
	saved->cpuid[0].ecx = 8;
	cr_expect_eq(cpuid_check(saved, host, &err), -ENOTSUP, "another vendor");
	host->cpuid[0].ebx = 0x756e6547, host->cpuid[0].edx = 0x49656e69, host->cpuid[0].ecx = 0x6c65746e;
	err = ERR_INIT;
	cr_expect_eq(cpuid_check(host, saved, &err), -ENOTSUP);
	cr_expect_not_null(strstr(err.message, "a processor of GenuineIntel"), "%s", err.message);
}
