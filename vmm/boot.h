/*
 * Boot: puts a kernel, its command line, initrd, boot tables and first registers in place.
 *
 * Kernel formats: Linux bzImage by its 64-bit entry (Documentation/arch/x86/boot.rst, protocol 2.06 or later with
 * XLF_KERNEL_64), and ELF with a PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY; struct hvm_start_info of Xen's
 * public/arch-x86/hvm/start_info.h). Files are untrusted: what does not fit is refused with an error that names the
 * file.
 */
#ifndef VMCP_VMM_BOOT_H
#define VMCP_VMM_BOOT_H

#include "base/err.h"
#include "vmm/vm.h"

struct boot_config {
	const char *kernel;  /* path */
	const char *initrd;  /* path or NULL */
	const char *cmdline; /* "" if none; at most 2047 bytes and what the kernel takes */
};

/* Fills memory and the registers of vCPU 0; the others wait for INIT/SIPI. Before vm_start. ACPI tables are in place
 * (acpi.h). */
int boot_load(struct vm *vm, const struct boot_config *config, struct err *err);

#endif
