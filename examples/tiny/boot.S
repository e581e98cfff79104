/*
 * From the PVH entry point (32-bit protected mode, paging off) to C code at CPL 3 with IOPL 3.
 *
 * The part at CPL 0 is kept as short as can be, because a software KVM emulates it: the page tables, the
 * GDT and the TSS are data of the image, and everything else (the gates of the IDT, mappings above 4 GiB) is
 * filled in later at CPL 3, where these tables are ordinary writable memory.
 *
 * Source of the entry state: Xen docs/misc/pvh.pandoc, "x86/HVM direct boot ABI". EBX = struct hvm_start_info.
 */

#define SEL_CODE0 0x08
#define SEL_CODE3 (0x10 | 3)
#define SEL_DATA3 (0x18 | 3)
#define SEL_TSS   0x20

#define EFER_MSR 0xc0000080
#define EFER_LME 0x100
#define CR4_PAE  0x20
#define CR0_PG   0x80000000

#define TSS_LIMIT (104 + 8192) /* offset of the last byte */

#define RFLAGS_IOPL3 0x3002 /* IOPL 3, interrupts off, the always-one bit */

#define PTE_TABLE 0x07 /* present, writable, user */
#define PTE_LARGE 0x87 /* the same, 2 MiB page */

/* ---- the note by which a loader finds the entry point ---------------------------------------------------- */
	.section .note.pvh, "a", @note
	.balign 4
	.long 4          /* name size */
	.long 8          /* descriptor size: 8 in an ELF64 file, as Linux has it and QEMU reads it */
	.long 18         /* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad pvh_entry

/* ---- CPL 0 ----------------------------------------------------------------------------------------------- */
	.text
	.code32
	.globl pvh_entry
pvh_entry:
	movl $pml4, %eax
	movl %eax, %cr3
	movl %cr4, %eax
	orl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $EFER_MSR, %ecx
	rdmsr
	orl $EFER_LME, %eax
	wrmsr
	movl %cr0, %eax
	orl $CR0_PG, %eax
	movl %eax, %cr0
	movl $tss, %eax /* the base of the TSS is scattered over its descriptor */
	movw %ax, gdt_tss + 2
	shrl $16, %eax
	movb %al, gdt_tss + 4
	movb %ah, gdt_tss + 7
	lgdt gdt_pointer
	ljmp $SEL_CODE0, $long_mode

	.code64
long_mode:
	lidt idt_pointer
	movl $SEL_TSS, %eax
	ltr %ax
	movl $SEL_DATA3, %eax
	movl %eax, %ds
	movl %eax, %es
	movl $stack0_top, %esp
	pushq $SEL_DATA3
	pushq $stack3_top
	pushq $RFLAGS_IOPL3
	pushq $SEL_CODE3
	pushq $user_entry
	iretq

/*
 * Exceptions: each vector pushes its number; the common part notes what happened and "returns" to
 * exception_entry at CPL 3 on a stack of its own, where C code reports it. Nothing is ever resumed.
 */
	.balign 16
	.globl exception_stubs
exception_stubs:
	.set vector, 0
	.rept 32
	.balign 16
	.if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
	pushq $0 /* the CPU pushes an error code for those others only */
	.endif
	pushq $vector
	jmp exception_common
	.set vector, vector + 1
	.endr

exception_common:
	popq fault_vector
	popq fault_error
	movq %cr2, %rax
	movq %rax, fault_address
	movq (%rsp), %rax
	movq %rax, fault_rip
	movq 24(%rsp), %rax
	movq %rax, fault_rsp
	movl $exception_entry, %eax
	movq %rax, (%rsp)
	movl $SEL_CODE3, %eax
	movq %rax, 8(%rsp)
	movl $RFLAGS_IOPL3, %eax
	movq %rax, 16(%rsp)
	movl $fault_stack_top, %eax
	movq %rax, 24(%rsp)
	movl $SEL_DATA3, %eax
	movq %rax, 32(%rsp)
	iretq

/*
 * Idle (idle.c): at CPL 3 hlt is a fault, which lands here. The processor sleeps until the timer's interrupt, the only one, whose frame is dropped: so
 * no other return than the one to CPL 3 behind the hlt is needed. Of anything else that faults it is told as above.
 */
	.balign 16
	.globl idle_fault, idle_interrupt
idle_fault:
	pushq %rax
	movq 16(%rsp), %rax /* above it are the error code and the address of the instruction */
	cmpb $0xf4, (%rax)
	jne 1f
	incq 16(%rsp)
	sti
	hlt
1:	popq %rax
	pushq $13
	jmp exception_common
	.balign 16
idle_interrupt:
	movb $0x20, %al /* end of interrupt, to the first PIC */
	outb %al, $0x20
	movq 24(%rsp), %rsp /* of before the interrupt */
	popq %rax
	addq $8, %rsp
	iretq

/* ---- CPL 3 ----------------------------------------------------------------------------------------------- */
user_entry:
	movl %ebx, %edi
	call tiny_main
1:  pause
	jmp 1b

exception_entry:
	call tiny_exception
1:  pause
	jmp 1b

/* ---- tables ---------------------------------------------------------------------------------------------- */
	.data
	.balign 4096
pml4:
	.quad pdpt + PTE_TABLE
	.fill 511, 8, 0
pdpt: /* 64 GiB of identity map and 1 GiB of window for device memory above it */
	.quad pd_low + PTE_TABLE, pd_low + 0x1000 + PTE_TABLE, pd_low + 0x2000 + PTE_TABLE, pd_low + 0x3000 + PTE_TABLE
	.set i, 0
	.rept 61
	.quad pd_high + i * 0x1000 + PTE_TABLE
	.set i, i + 1
	.endr
	.fill 512 - 65, 8, 0
pd_low: /* the first 4 GiB, devices included, are mapped from the start */
	.set i, 0
	.rept 2048
	.quad i * 0x200000 + PTE_LARGE
	.set i, i + 1
	.endr

	.balign 16
gdt:
	.quad 0
	.quad 0x00209b0000000000 /* 0x08: 64-bit code, CPL 0 */
	.quad 0x0020fb0000000000 /* 0x10: 64-bit code, CPL 3 */
	.quad 0x00cff3000000ffff /* 0x18: data, CPL 3 */
gdt_tss:                     /* 0x20: 64-bit TSS, 16 bytes */
	.quad 0x0000890000000000 + TSS_LIMIT
	.quad 0
gdt_end:

	.balign 16
tss:
	.long 0
	.quad stack0_top
	.fill 90, 1, 0
	.word io_bitmap - tss
io_bitmap: /* every port allowed, as IOPL 3 does already; but a software KVM loses the IOPL on iretq */
	.fill 8192, 1, 0
	.byte 0xff

	.balign 8
gdt_pointer:
	.word gdt_end - gdt - 1
	.quad gdt
	.balign 8
idt_pointer:
	.word 33 * 16 - 1
	.quad idt

	.bss
	.balign 4096
	.globl pd_high
pd_high:
	.skip 61 * 4096
	.globl idt
idt:
	.skip 33 * 16
	.globl fault_vector, fault_error, fault_address, fault_rip, fault_rsp
fault_vector:  .skip 8
fault_error:   .skip 8
fault_address: .skip 8
fault_rip:     .skip 8
fault_rsp:     .skip 8
	.balign 4096
	.skip 4096
stack0_top:
	.skip 16384
fault_stack_top:
	.skip 65536
stack3_top:

	.section .note.GNU-stack, "", @progbits
