#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "vmm/x86/state.h"
#include "vmm/x86/test_guest.h"

/* A processor that has everything, even what does not exist. */
static struct kvm_cpuid2 *make_all(void)
{
	static const uint32_t leaves[][2] = {{0, 0},	      {1, 0},	       {4, 0},	       {7, 0},	       {7, 1},	       {0xd, 0},
					     {0xd, 1},	      {0xd, 2},	       {0xd, 5},       {0x14, 0},      {0x15, 0},      {0x40000001, 0},
					     {0x80000001, 0}, {0x80000007, 0}, {0x80000008, 0}, {0x80000021, 0}};
	struct kvm_cpuid2 *cpuid = xcalloc(1, sizeof(*cpuid) + 32 * sizeof(cpuid->entries[0]));
	for (size_t i = 0; i < ARRAY_LENGTH(leaves); i++)
		cpuid->entries[cpuid->nent++] = (struct kvm_cpuid_entry2){
			.function = leaves[i][0], .index = leaves[i][1], .eax = ~0u, .ebx = ~0u, .ecx = ~0u, .edx = ~0u};
	return cpuid;
}

Test(cpu_model, a_level_shows_its_features_and_nothing_else)
{
	static const struct {
		const char *name;
		uint32_t ecx1, ebx7, xcr0, ext_ecx;
	} want[] = {
		{"x86-64-v1", 1u << 21 | 1u << 24 | 1u << 31, 0, 0, 1u << 1},
		{"x86-64-v2", 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 21 | 1u << 23 | 1u << 24 | 1u << 31, 0, 0, 1u << 0 | 1u << 1},
		{"x86-64-v3",
		 1u << 0 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 21 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 26 | 1u << 28 |
			 1u << 29 | 1u << 31,
		 1u << 3 | 1u << 5 | 1u << 8, 7, 1u << 0 | 1u << 1 | 1u << 5},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(want); i++) {
		CLEANUP_FREE struct kvm_cpuid2 *cpuid = make_all();
		struct err err = ERR_INIT;
		cr_assert_eq(cpuid_apply_model(want[i].name, cpuid, &err), 0, "%s", err.message);
		const struct kvm_cpuid_entry2 *leaf = cpuid_find(cpuid, 1, 0);
		cr_expect_eq(leaf->ecx, want[i].ecx1, "%s: 0x%x", want[i].name, leaf->ecx);
		cr_expect_eq(leaf->edx, 0x078bfbffu, "%s: 0x%x", want[i].name, leaf->edx);
		leaf = cpuid_find(cpuid, 7, 0);
		cr_expect(leaf->eax == 0 && leaf->ebx == want[i].ebx7 && !leaf->ecx && !leaf->edx, "%s", want[i].name);
		leaf = cpuid_find(cpuid, 0x80000001, 0);
		cr_expect_eq(leaf->ecx, want[i].ext_ecx, "%s: 0x%x", want[i].name, leaf->ecx);
		cr_expect_eq(leaf->edx, 0x0183f3ffu | 1u << 11 | 1u << 20 | 1u << 29, "%s: 0x%x", want[i].name, leaf->edx);
		leaf = cpuid_find(cpuid, 0xd, 0);
		cr_expect_eq(leaf != NULL, want[i].xcr0 != 0, "%s", want[i].name);
		if (leaf)
			cr_expect(leaf->eax == want[i].xcr0 && leaf->ecx == 832 && leaf->edx == 0, "%s", want[i].name);
		cr_expect_null(cpuid_find(cpuid, 0xd, 5));
		cr_expect_null(cpuid_find(cpuid, 7, 1));
		cr_expect_null(cpuid_find(cpuid, 0x14, 0));
		cr_expect_null(cpuid_find(cpuid, 0x80000021, 0));
		cr_expect_not_null(cpuid_find(cpuid, 4, 0), "caches stay");
		cr_expect_eq(cpuid_find(cpuid, 0, 0)->eax, 0xd);
		cr_expect_eq(cpuid_find(cpuid, 0x80000007, 0)->edx, 0);
		cr_expect_eq(cpuid_find(cpuid, 0x40000001, 0)->eax, 0x010000ebu);
	}
}

Test(cpu_model, host_takes_nothing_away)
{
	CLEANUP_FREE struct kvm_cpuid2 *cpuid = make_all(), *before = make_all();
	cr_expect_eq(cpuid_apply_model("host", cpuid, NULL), 0);
	cr_expect_eq(cpuid_apply_model(NULL, cpuid, NULL), 0);
	cr_expect_eq(memcmp(cpuid, before, sizeof(*cpuid) + cpuid->nent * sizeof(cpuid->entries[0])), 0);
	cr_expect(vm_knows_cpu_model("host") && vm_knows_cpu_model("x86-64-v2") && !vm_knows_cpu_model("x86-64") && !vm_knows_cpu_model(""));
}

Test(cpu_model, names_what_the_host_lacks)
{
	CLEANUP_FREE struct kvm_cpuid2 *cpuid = make_all();
	struct err err = ERR_INIT;
	cpuid_find(cpuid, 7, 0)->ebx &= ~(1u << 5);
	cpuid_find(cpuid, 1, 0)->ecx &= ~(1u << 12);
	cr_expect_eq(cpuid_apply_model("x86-64-v3", cpuid, &err), -ENOTSUP);
	cr_expect_eq(err.class, ERR_HOST);
	cr_expect_str_eq(err.message, "cpu_model = x86-64-v3: this host lacks fma, avx2");
	cr_expect_not_null(strstr(err.hint, "x86-64-v2"));
	cr_expect_eq(cpuid_apply_model("x86-64-v2", cpuid, &err), 0, "the level below is there");
	err = ERR_INIT;
	cr_expect_eq(cpuid_apply_model("z80", cpuid, &err), -EINVAL);
	cr_expect_eq(err.class, ERR_USAGE);
	cpuid->nent = 0;
	err = ERR_INIT;
	cr_expect_eq(cpuid_apply_model("x86-64-v3", cpuid, &err), -ENOTSUP);
	cr_expect_lt(strlen(err.message), sizeof(err.message) - 1, "a long list ends: %s", err.message);
}

/* A vCPU of each level takes a lower level's state for its own, and refuses a higher one's before anything is applied. */
Test(cpu_model, states_go_up_not_down, .timeout = 60)
{
	static const char *const names[] = {"x86-64-v1", "x86-64-v2", "x86-64-v3", "host"};
	struct vm *vms[4] = {NULL};
	unsigned made = 0;
	if (!test_have_kvm())
		test_skip("/dev/kvm cannot be opened");
	for (unsigned i = 0; i < 4; i++) {
		struct vm_config config = {.memory_bytes = 64 << 20, .cpus = 1, .cpu_model = names[i]};
		struct err err = ERR_INIT;
		int r = vm_create(&config, &vms[i], &err);
		cr_assert(r == 0 || (r == -ENOTSUP && err.class == ERR_HOST), "%s", err.message);
		if (r != 0)
			fprintf(stderr, "SKIP: %s: %s\n", names[i], err.message);
		made += r == 0;
	}
	cr_assert_not_null(vms[3]);
	for (unsigned i = 0; i < 4; i++)
		for (unsigned k = 0; k < 4 && vms[i]; k++) {
			struct err err = ERR_INIT;
			if (!vms[k])
				continue;
			int r = vcpu_validate(&vms[k]->vcpu[0], vms[i]->vcpu[0].state, &err);
			bool more = !cpuid_equal(vms[i]->vcpu[0].state, vms[k]->vcpu[0].state) && i > k;
			cr_expect_eq(r, more ? -ENOTSUP : 0, "%s on %s: %s", names[i], names[k], err.message);
			cr_expect(!more || err.class == ERR_HOST);
		}
	for (unsigned i = 0; i < 4; i++)
		if (vms[i])
			vm_destroy(vms[i]);
	cr_expect_geq(made, 2, "no level at all is there");
}
