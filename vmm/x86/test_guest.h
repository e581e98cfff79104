/* Tiny hand-assembled guests for tests: flat 32-bit protected mode, no paging, interrupts off. For tests in vmm/ only.
 * */
#ifndef VMCP_VMM_X86_TEST_GUEST_H
#define VMCP_VMM_X86_TEST_GUEST_H

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "vmm/vm_internal.h"

#define TEST_CODE_GPA 0x1000u
#define TEST_DATA_GPA 0x8000u /* each vCPU has 0x100 bytes here, its ebx points there */

/* Criterion alone would say nothing. */
#define test_skip(why)                                                                                                 \
	do {                                                                                                           \
		fprintf(stderr, "SKIP: %s\n", (why));                                                                  \
		cr_skip_test(why);                                                                                     \
	} while (0)

static inline bool test_have_kvm(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return false;
	close(fd);
	return true;
}

static inline struct kvm_segment test_flat_segment(uint8_t type, uint16_t selector)
{
	return (struct kvm_segment){
		.limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .db = 1, .s = 1, .g = 1};
}

/* Puts `code` in place and every vCPU at its start: ebx = its data, edx = port 0x10. */
static inline int test_load_guest(struct vm *vm, const uint8_t *code, size_t bytes, struct err *err)
{
	int r = mem_write(vm_memory(vm), TEST_CODE_GPA, code, bytes, err);
	for (unsigned i = 0; i < vm_cpus(vm) && r == 0; i++) {
		struct kvm_regs regs;
		struct kvm_sregs sregs;
		r = vm_get_boot_regs(vm, i, &regs, &sregs, err);
		if (r < 0)
			break;
		regs = (struct kvm_regs){.rip = TEST_CODE_GPA,
					 .rbx = TEST_DATA_GPA + i * 0x100,
					 .rdx = 0x10,
					 .rsp = 0x7000,
					 .rflags = 2};
		sregs.cs = test_flat_segment(0xb, 0x8);
		sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = test_flat_segment(0x3, 0x10);
		sregs.cr0 |= 1;
		r = vm_set_boot_regs(vm, i, &regs, &sregs, err);
	}
	return r;
}

#endif
