/*
 * Loaders of kernels: they work on guest memory and plain register structs, so that they run without KVM.
 *
 * What lies where below 1 MiB. The guest may overwrite all of it but the ACPI tables once it has read it:
 *
 *     0x00000500  GDT
 *     0x00006000  PVH: hvm_start_info, module list, memory map     (one page)
 *     0x00007000  Linux: boot_params, the "zero page"              (one page)
 *     0x00008000  stack, growing down from the end of the page     (one page)
 *     0x00009000  identity page tables of the first 4 GiB          (six pages)
 *     0x00020000  command line
 *     0x0009fc00  end of usable memory: firmware area from here to 1 MiB
 *     0x000e0000  ACPI tables (vmm/acpi.h)
 *     0x00100000  kernels, initrd
 */
#ifndef VMCP_VMM_X86_BOOT_INTERNAL_H
#define VMCP_VMM_X86_BOOT_INTERNAL_H

#include <linux/kvm.h>
#include <stdint.h>

#include "base/err.h"
#include "vmm/boot.h"
#include "vmm/memory.h"

#define BOOT_GDT_GPA	     0x500u
#define BOOT_START_INFO_GPA  0x6000u
#define BOOT_PARAMS_GPA	     0x7000u
#define BOOT_STACK_TOP_GPA   0x9000u
#define BOOT_PAGE_TABLES_GPA 0x9000u
#define BOOT_CMDLINE_GPA     0x20000u
#define BOOT_LOW_MEMORY_END  0x9fc00u
#define BOOT_HIGH_MEMORY_GPA 0x100000u

#define BOOT_CMDLINE_MAX_BYTES 2047u /* without the NUL */

/* A file that is being loaded. */
struct boot_image {
	int fd;
	const char *path;
	uint64_t bytes;
};

/* First registers of vCPU 0: the caller fills in what the VM has after reset, the loaders change what the protocol
 * fixes. */
struct boot_cpu {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
};

/* --- boot_load.c --- */

/* Loads what the config names: the part of boot_load that needs no VM. */
int boot_load_memory(struct mem *mem, const struct boot_config *config, struct boot_cpu *cpu, struct err *err);

/* --- boot_image.c --- */

/* Opens a regular file that is not empty. `what` ("kernel", "initrd") goes into messages. */
int boot_image_open(const char *what, const char *path, struct boot_image *out, struct err *err);
void boot_image_close(struct boot_image *image);
/* [offset, offset + bytes) of the file to a buffer; -ENODATA if the file is shorter. */
int boot_image_read(const struct boot_image *image, uint64_t offset, void *data, uint64_t bytes, struct err *err);
/* The same straight into guest memory, which the range must be (the caller has said so in its own words if not). */
int boot_image_load(const struct boot_image *image, uint64_t offset, struct mem *mem, uint64_t gpa, uint64_t bytes,
		    struct err *err);

/* Guest-physical end of the RAM below the hole. */
uint64_t boot_low_ram_end(const struct mem *mem);

struct boot_blob {
	uint64_t gpa, bytes; /* bytes == 0: none */
};
/* Loads the initrd `path` (NULL: none) as high as possible, page-aligned, between `floor` and `ceiling` (both gpa, in
 * the RAM below the hole). */
int boot_load_initrd(struct mem *mem, const char *path, uint64_t floor, uint64_t ceiling, struct boot_blob *out,
		     struct err *err);
/* Puts the command line in place; it may have `max_bytes` bytes without its NUL. */
int boot_load_cmdline(struct mem *mem, const char *cmdline, uint64_t max_bytes, struct err *err);

/* --- boot_map.c --- */

/* Types as of e820; PVH's are the same. */
enum { BOOT_RAM = 1, BOOT_RESERVED = 2 };
struct boot_range {
	uint64_t gpa, bytes;
	uint32_t type;
};
#define BOOT_MAP_MAX 8
/* What firmware would tell of memory, ascending and without overlap. Returns the number of ranges. */
unsigned boot_memory_map(const struct mem *mem, struct boot_range out[BOOT_MAP_MAX]);

/* 64-bit mode with paging on and the first 4 GiB mapped one to one: writes GDT and page tables. */
int boot_cpu_long_mode(struct mem *mem, struct boot_cpu *cpu, struct err *err);
/* 32-bit protected mode, flat segments, no paging: writes the GDT. */
int boot_cpu_protected_mode(struct mem *mem, struct boot_cpu *cpu, struct err *err);

/* --- boot_linux.c, boot_pvh.c --- */

/* Whether the first `bytes` bytes of a file look like the format. */
int boot_linux_probe(const uint8_t *head, uint64_t bytes);
int boot_pvh_probe(const uint8_t *head, uint64_t bytes);
#define BOOT_PROBE_BYTES 1024u

int boot_linux_load(struct mem *mem, const struct boot_image *kernel, const struct boot_config *config,
		    struct boot_cpu *cpu, struct err *err);
int boot_pvh_load(struct mem *mem, const struct boot_image *kernel, const struct boot_config *config,
		  struct boot_cpu *cpu, struct err *err);

#endif
