/* KVM's dirty log under a guest that writes to one page. Needs /dev/kvm, of any kind. */
#include "vmm/dirty_log.h"

#include <string.h>

#include "base/clock.h"
#include "vmm/x86/test_guest.h"

#define MEMORY_BYTES (32ull << 20)
#define WORDS	     (MEMORY_BYTES / 4096 / 64)
#define DATA_PAGE    (TEST_DATA_GPA / 4096)

/* inc dword [ebx]; jmp */
static const uint8_t writes_for_ever[] = {0xff, 0x03, 0xeb, 0xfc};

static uint64_t words[WORDS];

static struct vm *start_guest(void)
{
	struct vm *vm;
	struct err err = ERR_INIT;
	struct vm_config config = {.memory_bytes = MEMORY_BYTES, .cpus = 1};
	cr_assert_eq(vm_create(&config, &vm, &err), 0, "%s", err.message);
	cr_assert_eq(test_load_guest(vm, writes_for_ever, sizeof(writes_for_ever), &err), 0, "%s", err.message);
	cr_assert_eq(vm_start(vm, &err), 0, "%s", err.message);
	return vm;
}

static bool logged(struct vm *vm, uint64_t page)
{
	struct err err = ERR_INIT;
	cr_assert_eq(vm_dirty_log_get(vm, words, &err), 0, "%s", err.message);
	return words[page / 64] >> (page % 64) & 1;
}

static void clear_all(struct vm *vm)
{
	struct err err = ERR_INIT;
	memset(words, 0xff, sizeof(words));
	cr_assert_eq(vm_dirty_log_clear(vm, 0, WORDS, words, &err), 0, "%s", err.message);
}

static bool logged_soon(struct vm *vm, uint64_t page)
{
	uint64_t until = clock_now_ns() + 60000000000ull;
	while (!logged(vm, page) && clock_now_ns() < until)
		usleep(1000);
	return logged(vm, page);
}

Test(dirty_log, a_write_is_logged_until_it_is_cleared_and_again_after)
{
	if (!test_have_kvm())
		test_skip("/dev/kvm cannot be opened");
	struct err err = ERR_INIT;
	struct vm *vm = start_guest();
	bool all_set;
	int r = vm_dirty_log_start(vm, &all_set, &err);
	if (r != 0) {
		vm_destroy(vm);
		test_skip("this KVM has no dirty log");
	}
	cr_expect(logged(vm, 0) && logged(vm, WORDS * 64 - 1), "all pages count as written at first");
	vm_resume(vm, true);
	clear_all(vm);
	for (unsigned round = 0; round < 20; round++) {
		cr_assert(logged_soon(vm, DATA_PAGE), "round %u", round);
		cr_expect_not(logged(vm, DATA_PAGE + 100));
		vm_quiesce_request(vm);
		cr_assert_eq(vm_quiesce_wait(vm, &err), 0);
		/* Only the word of that page, as a tracker would. */
		uint64_t word = words[DATA_PAGE / 64];
		cr_assert_eq(vm_dirty_log_clear(vm, DATA_PAGE / 64, 1, &word, &err), 0);
		cr_expect_not(logged(vm, DATA_PAGE), "nobody writes while the vCPU stands");
		mem_write(vm_memory(vm), TEST_DATA_GPA + 4, "x", 1, NULL);
		cr_expect_not(logged(vm, DATA_PAGE), "what the VMM writes is not KVM's affair");
		vm_resume(vm, true);
	}
	vm_dirty_log_stop(vm);
	cr_expect_neq(vm_dirty_log_get(vm, words, NULL), 0);
	vm_destroy(vm);
}
