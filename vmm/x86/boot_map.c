/* The machine as a kernel finds it: memory map, descriptor table, page tables, processor modes. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "vmm/acpi.h"
#include "vmm/x86/boot_internal.h"

#define CR0_PE	     (1ull << 0)
#define CR0_ET	     (1ull << 4)
#define CR0_PG	     (1ull << 31)
#define CR4_PAE	     (1ull << 5)
#define EFER_LME     (1ull << 8)
#define EFER_LMA     (1ull << 10)
#define RFLAGS_FIXED 2ull /* bit 1 is always set */

/* Selectors as of Linux' boot protocol: __BOOT_CS 0x10, __BOOT_DS 0x18, and a task segment that KVM wants in protected
 * mode. */
enum { GDT_CODE = 2, GDT_DATA = 3, GDT_TASK = 4, GDT_ENTRIES = 6 };

#define PTE_PRESENT	 1ull
#define PTE_WRITE	 2ull
#define PTE_LARGE	 0x80ull
#define LARGE_PAGE_BYTES (2ull << 20)
#define MAPPED_GIB	 4u

/* Addresses of the chipset: IOAPIC, HPET's place, LAPIC, KVM's own pages, the reset vector. */
#define CHIPSET_BASE 0xfec00000u

unsigned boot_memory_map(const struct mem *mem, struct boot_range out[BOOT_MAP_MAX])
{
	struct mem_region regions[2];
	unsigned n = 0, region_count = mem_regions(mem, regions);
	uint64_t low_end = regions[0].gpa + regions[0].bytes;

	out[n++] = (struct boot_range){0, BOOT_LOW_MEMORY_END, BOOT_RAM};
	out[n++] = (struct boot_range){BOOT_LOW_MEMORY_END, 0xa0000 - BOOT_LOW_MEMORY_END, BOOT_RESERVED};
	out[n++] = (struct boot_range){ACPI_TABLES_GPA, BOOT_HIGH_MEMORY_GPA - ACPI_TABLES_GPA, BOOT_RESERVED};
	out[n++] = (struct boot_range){BOOT_HIGH_MEMORY_GPA, low_end - BOOT_HIGH_MEMORY_GPA, BOOT_RAM};
	out[n++] = (struct boot_range){CHIPSET_BASE, MEM_HOLE_END - CHIPSET_BASE, BOOT_RESERVED};
	if (region_count == 2)
		out[n++] = (struct boot_range){regions[1].gpa, regions[1].bytes, BOOT_RAM};
	return n;
}

/* An 8-byte descriptor with base 0 and limit 4 GiB, from what KVM wants to know of the segment. */
static uint64_t pack_descriptor(const struct kvm_segment *s)
{
	uint64_t limit = s->g ? s->limit >> 12 : s->limit;

	return (limit & 0xffff) | (s->base & 0xffffff) << 16 |
	       (uint64_t)(s->type | s->s << 4 | s->dpl << 5 | s->present << 7) << 40 | (limit >> 16 & 0xf) << 48 |
	       (uint64_t)(s->avl | s->l << 1 | s->db << 2 | s->g << 3) << 52 | (s->base >> 24 & 0xff) << 56;
}

/* Fills the segment registers and the GDT that they were "loaded" from. */
static int set_segments(struct mem *mem, struct kvm_sregs *sregs, bool long_mode, struct err *err)
{
	struct kvm_segment code = {
		.limit = 0xffffffff, .selector = GDT_CODE * 8, .type = 0xb, .present = 1, .s = 1, .g = 1};
	struct kvm_segment data = {
		.limit = 0xffffffff, .selector = GDT_DATA * 8, .type = 3, .present = 1, .s = 1, .g = 1, .db = 1};
	struct kvm_segment task = {.limit = 0x67, .selector = GDT_TASK * 8, .type = 0xb, .present = 1};
	uint64_t gdt[GDT_ENTRIES] = {0};

	code.l = long_mode;
	code.db = !long_mode;
	gdt[GDT_CODE] = pack_descriptor(&code);
	gdt[GDT_DATA] = pack_descriptor(&data);
	gdt[GDT_TASK] = pack_descriptor(&task); /* 16 bytes in long mode; the upper half is the zero entry behind it */

	sregs->cs = code;
	sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
	sregs->tr = task;
	sregs->ldt = (struct kvm_segment){.type = 2, .unusable = 1};
	sregs->gdt = (struct kvm_dtable){.base = BOOT_GDT_GPA, .limit = sizeof(gdt) - 1};
	sregs->idt = (struct kvm_dtable){0}; /* an exception before the kernel has its own table is a triple fault */
	return mem_write(mem, BOOT_GDT_GPA, gdt, sizeof(gdt), err);
}

static int write_page_tables(struct mem *mem, struct err *err)
{
	uint8_t *tables = mem_at(mem, BOOT_PAGE_TABLES_GPA, (2 + MAPPED_GIB) * PAGE_BYTES, true);

	if (!tables)
		return err_set(err, ERR_FAILED, EFAULT, "no guest memory for page tables at 0x%x",
			       BOOT_PAGE_TABLES_GPA);
	memset(tables, 0, (2 + MAPPED_GIB) * PAGE_BYTES);
	put_le64(tables, (BOOT_PAGE_TABLES_GPA + PAGE_BYTES) | PTE_PRESENT | PTE_WRITE);
	for (unsigned gib = 0; gib < MAPPED_GIB; gib++) {
		uint64_t directory = BOOT_PAGE_TABLES_GPA + (2 + gib) * PAGE_BYTES;
		put_le64(tables + PAGE_BYTES + 8 * gib, directory | PTE_PRESENT | PTE_WRITE);
	}
	for (unsigned i = 0; i < MAPPED_GIB * 512; i++)
		put_le64(tables + 2 * PAGE_BYTES + 8 * i, i * LARGE_PAGE_BYTES | PTE_PRESENT | PTE_WRITE | PTE_LARGE);
	return 0;
}

int boot_cpu_long_mode(struct mem *mem, struct boot_cpu *cpu, struct err *err)
{
	int r = set_segments(mem, &cpu->sregs, true, err);

	if (r < 0)
		return r;
	r = write_page_tables(mem, err);
	if (r < 0)
		return r;
	cpu->sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
	cpu->sregs.cr3 = BOOT_PAGE_TABLES_GPA;
	cpu->sregs.cr4 = CR4_PAE;
	cpu->sregs.efer = EFER_LME | EFER_LMA;
	cpu->regs = (struct kvm_regs){.rsp = BOOT_STACK_TOP_GPA, .rflags = RFLAGS_FIXED};
	return 0;
}

int boot_cpu_protected_mode(struct mem *mem, struct boot_cpu *cpu, struct err *err)
{
	int r = set_segments(mem, &cpu->sregs, false, err);

	if (r < 0)
		return r;
	cpu->sregs.cr0 = CR0_PE | CR0_ET;
	cpu->sregs.cr3 = 0;
	cpu->sregs.cr4 = 0;
	cpu->sregs.efer = 0;
	cpu->regs = (struct kvm_regs){.rsp = BOOT_STACK_TOP_GPA, .rflags = RFLAGS_FIXED};
	return 0;
}
