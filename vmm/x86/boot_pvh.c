/*
 * ELF kernels with a PVH entry: the "x86/HVM direct boot ABI" of Xen (docs/misc/pvh.pandoc,
 * public/arch-x86/hvm/start_info.h).
 *
 * The file names its 32-bit entry in a note; it is loaded at the physical addresses of its PT_LOAD segments. ELF fields
 * are read by their offsets, the same code for both classes.
 */
#include <elf.h>
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "vmm/acpi.h"
#include "vmm/x86/boot_internal.h"

#define PHDRS_MAX	  128u
#define NOTES_MAX_BYTES	  (1u << 20)
#define NOTE_HEADER_BYTES 12u
#define NOTE_PHYS32_ENTRY 18u /* XEN_ELFNOTE_PHYS32_ENTRY */

#define START_INFO_MAGIC 0x336ec578u
#define START_INFO_BYTES 56u
#define MODULE_BYTES	 32u
#define MAP_ENTRY_BYTES	 24u
#define MODULES_GPA	 (BOOT_START_INFO_GPA + 64u)
#define MAP_GPA		 (BOOT_START_INFO_GPA + 128u)

struct segment {
	uint32_t type;
	uint64_t offset, paddr, file_bytes, memory_bytes, alignment;
};

struct elf {
	const struct boot_image *image;
	struct segment segments[PHDRS_MAX];
	unsigned count;
	uint64_t entry; /* of the note */
	bool has_entry;
	uint64_t low_end_gpa; /* end of the highest segment below the hole, where the initrd must stay above */
};

int boot_pvh_probe(const uint8_t *head, uint64_t bytes)
{
	return bytes >= sizeof(Elf32_Ehdr) && memcmp(head, ELFMAG, SELFMAG) == 0;
}

static int refuse_damaged(struct err *err, const char *why)
{
	err_set(err, ERR_DAMAGED, EINVAL, "damaged ELF file: %s", why);
	return err_hint(err, "build or copy the kernel again");
}

static void parse_phdr(const uint8_t *p, bool wide, struct segment *out)
{
	if (wide) {
		*out = (struct segment){.type = get_le32(p + offsetof(Elf64_Phdr, p_type)),
					.offset = get_le64(p + offsetof(Elf64_Phdr, p_offset)),
					.paddr = get_le64(p + offsetof(Elf64_Phdr, p_paddr)),
					.file_bytes = get_le64(p + offsetof(Elf64_Phdr, p_filesz)),
					.memory_bytes = get_le64(p + offsetof(Elf64_Phdr, p_memsz)),
					.alignment = get_le64(p + offsetof(Elf64_Phdr, p_align))};
	} else {
		*out = (struct segment){.type = get_le32(p + offsetof(Elf32_Phdr, p_type)),
					.offset = get_le32(p + offsetof(Elf32_Phdr, p_offset)),
					.paddr = get_le32(p + offsetof(Elf32_Phdr, p_paddr)),
					.file_bytes = get_le32(p + offsetof(Elf32_Phdr, p_filesz)),
					.memory_bytes = get_le32(p + offsetof(Elf32_Phdr, p_memsz)),
					.alignment = get_le32(p + offsetof(Elf32_Phdr, p_align))};
	}
}

/* Reads ELF header and program headers. */
static int read_headers(struct elf *elf, struct err *err)
{
	uint8_t head[sizeof(Elf64_Ehdr)] = {0};
	uint8_t phdrs[PHDRS_MAX * sizeof(Elf64_Phdr)];

	int r = boot_image_read(elf->image, 0, head, min_u64(sizeof(head), elf->image->bytes), err);
	if (r < 0)
		return r;
	bool wide = head[EI_CLASS] == ELFCLASS64;
	if ((!wide && head[EI_CLASS] != ELFCLASS32) || head[EI_DATA] != ELFDATA2LSB)
		return refuse_damaged(err, "neither 32 nor 64 bits, little endian");
	unsigned machine = get_le16(head + offsetof(Elf64_Ehdr, e_machine));
	if (machine != EM_386 && machine != EM_X86_64) {
		return err_set(err, ERR_USAGE, ENOEXEC, "an ELF file for another processor (machine %u), not x86",
			       machine);
	}
	uint64_t offset =
		wide ? get_le64(head + offsetof(Elf64_Ehdr, e_phoff)) : get_le32(head + offsetof(Elf32_Ehdr, e_phoff));
	size_t step = get_le16(head + (wide ? offsetof(Elf64_Ehdr, e_phentsize) : offsetof(Elf32_Ehdr, e_phentsize)));
	elf->count = get_le16(head + (wide ? offsetof(Elf64_Ehdr, e_phnum) : offsetof(Elf32_Ehdr, e_phnum)));
	if (elf->count == 0)
		return 0; /* an object file: it has no note either, which is what the caller says */
	if (elf->count > PHDRS_MAX || step != (wide ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)))
		return refuse_damaged(err, "impossible program headers");
	r = boot_image_read(elf->image, offset, phdrs, elf->count * step, err);
	if (r < 0)
		return r;
	for (unsigned i = 0; i < elf->count; i++)
		parse_phdr(phdrs + i * step, wide, &elf->segments[i]);
	return 0;
}

/* Looks for the entry note in one PT_NOTE segment. */
static int scan_notes(struct elf *elf, const struct segment *s, struct err *err)
{
	CLEANUP_BUF struct buf notes = BUF_INIT;
	uint64_t alignment = s->alignment == 8 ? 8 : 4;

	if (s->file_bytes > NOTES_MAX_BYTES)
		return refuse_damaged(err, "notes of impossible size");
	int r = buf_append(&notes, NULL, s->file_bytes, err);
	if (r == 0)
		r = boot_image_read(elf->image, s->offset, notes.data, s->file_bytes, err);
	if (r < 0)
		return r;
	for (uint64_t at = 0; range_within(at, NOTE_HEADER_BYTES, notes.length);) {
		const uint8_t *note = notes.data + at;
		uint64_t name_bytes = get_le32(note), desc_bytes = get_le32(note + 4);
		/* 32-bit sizes: the sums cannot overflow. */
		uint64_t desc_at = round_up(at + NOTE_HEADER_BYTES + name_bytes, alignment);
		if (!range_within(desc_at, desc_bytes, notes.length))
			return refuse_damaged(err, "a note runs past its segment");
		if (get_le32(note + 8) == NOTE_PHYS32_ENTRY && name_bytes == 4 &&
		    memcmp(note + NOTE_HEADER_BYTES, "Xen", 4) == 0) {
			if (desc_bytes != 4 && desc_bytes != 8)
				return refuse_damaged(err, "a PVH entry note of impossible size");
			elf->entry = desc_bytes == 8 ? get_le64(notes.data + desc_at) : get_le32(notes.data + desc_at);
			elf->has_entry = true;
			return 0;
		}
		at = round_up(desc_at + desc_bytes, alignment);
	}
	return 0;
}

static int check_segment(const struct elf *elf, unsigned index, struct mem *mem, struct err *err)
{
	const struct segment *s = &elf->segments[index];

	if (s->file_bytes > s->memory_bytes)
		return refuse_damaged(err, "a segment larger in the file than in memory");
	if (!range_within(s->offset, s->file_bytes, elf->image->bytes)) {
		err_set(err, ERR_DAMAGED, ENODATA,
			"truncated: segment %u needs %llu bytes at offset %llu, the file has %llu", index,
			(unsigned long long)s->file_bytes, (unsigned long long)s->offset,
			(unsigned long long)elf->image->bytes);
		return err_hint(err, "build or copy the kernel again");
	}
	if (!mem_at(mem, s->paddr, s->memory_bytes, false)) {
		err_set(err, ERR_USAGE, ENOMEM,
			"segment %u (%llu bytes at physical address 0x%llx) lies outside the guest's %llu MiB of "
			"memory",
			index, (unsigned long long)s->memory_bytes, (unsigned long long)s->paddr,
			(unsigned long long)mem_size(mem) >> 20);
		return err_hint(err, "give the guest more memory, or link the kernel for an address from 1 MiB on");
	}
	if (s->paddr < BOOT_HIGH_MEMORY_GPA) {
		err_set(err, ERR_USAGE, EINVAL,
			"segment %u at physical address 0x%llx lies below 1 MiB, where the boot tables are", index,
			(unsigned long long)s->paddr);
		return err_hint(err, "link the kernel for an address from 1 MiB on");
	}
	for (unsigned i = 0; i < index; i++) {
		const struct segment *other = &elf->segments[i];
		if (other->type == PT_LOAD &&
		    ranges_overlap(s->paddr, s->memory_bytes, other->paddr, other->memory_bytes))
			return refuse_damaged(err, "two segments overlap in memory");
	}
	return 0;
}

/* Checks everything before it loads anything. The rest of a segment beyond its file part needs no clearing: memory is
 * fresh. */
static int load_segments(struct elf *elf, struct mem *mem, struct err *err)
{
	bool entry_found = false;
	int r;

	for (unsigned i = 0; i < elf->count; i++) {
		const struct segment *s = &elf->segments[i];
		if (s->type != PT_LOAD || s->memory_bytes == 0)
			continue;
		r = check_segment(elf, i, mem, err);
		if (r < 0)
			return r;
		if (s->paddr + s->memory_bytes <= boot_low_ram_end(mem))
			elf->low_end_gpa = max_u64(elf->low_end_gpa, s->paddr + s->memory_bytes);
		entry_found |= elf->entry >= s->paddr && elf->entry - s->paddr < s->memory_bytes;
	}
	if (!entry_found || elf->entry > UINT32_MAX)
		return refuse_damaged(err, "the PVH entry lies in no segment below 4 GiB");
	for (unsigned i = 0; i < elf->count; i++) {
		const struct segment *s = &elf->segments[i];
		if (s->type != PT_LOAD || s->file_bytes == 0)
			continue;
		r = boot_image_load(elf->image, s->offset, mem, s->paddr, s->file_bytes, err);
		if (r < 0)
			return r;
	}
	return 0;
}

static int write_start_info(struct mem *mem, const struct boot_blob *initrd, struct err *err)
{
	struct boot_range map[BOOT_MAP_MAX];
	unsigned n = boot_memory_map(mem, map);
	uint8_t *page = mem_at(mem, BOOT_START_INFO_GPA, PAGE_BYTES, true);

	if (!page)
		return err_set(err, ERR_FAILED, EFAULT, "no guest memory for start info at 0x%x", BOOT_START_INFO_GPA);
	memset(page, 0, PAGE_BYTES);
	put_le32(page, START_INFO_MAGIC);
	put_le32(page + 4, 1); /* version: with memory map */
	put_le32(page + 12, initrd->bytes ? 1 : 0);
	put_le64(page + 16, initrd->bytes ? MODULES_GPA : 0);
	put_le64(page + 24, BOOT_CMDLINE_GPA);
	put_le64(page + 32, ACPI_TABLES_GPA);
	put_le64(page + 40, MAP_GPA);
	put_le32(page + 48, n);
	if (initrd->bytes) {
		uint8_t *module = page + (MODULES_GPA - BOOT_START_INFO_GPA);
		put_le64(module, initrd->gpa);
		put_le64(module + 8, initrd->bytes);
	}
	for (unsigned i = 0; i < n; i++) {
		uint8_t *entry = page + (MAP_GPA - BOOT_START_INFO_GPA) + i * MAP_ENTRY_BYTES;
		put_le64(entry, map[i].gpa);
		put_le64(entry + 8, map[i].bytes);
		put_le32(entry + 16, map[i].type);
	}
	return 0;
}
_Static_assert(START_INFO_BYTES <= 64 && MODULE_BYTES <= 64, "start info, module and map must not overlap");
_Static_assert(128 + BOOT_MAP_MAX * MAP_ENTRY_BYTES <= PAGE_BYTES, "the memory map must fit into the page");

static int load_kernel(struct elf *elf, struct mem *mem, struct err *err)
{
	int r = read_headers(elf, err);

	for (unsigned i = 0; r == 0 && i < elf->count && !elf->has_entry; i++) {
		if (elf->segments[i].type == PT_NOTE)
			r = scan_notes(elf, &elf->segments[i], err);
	}
	if (r < 0)
		return r;
	if (!elf->has_entry) {
		err_set(err, ERR_USAGE, ENOEXEC, "neither a Linux bzImage nor an ELF with a PVH note");
		return err_hint(
			err, "the ELF file has no PVH entry note; Linux has one with CONFIG_PVH=y, or use its bzImage");
	}
	return load_segments(elf, mem, err);
}

int boot_pvh_load(struct mem *mem, const struct boot_image *kernel, const struct boot_config *config,
		  struct boot_cpu *cpu, struct err *err)
{
	struct elf elf = {.image = kernel};
	struct boot_blob initrd;

	int r = load_kernel(&elf, mem, err);
	if (r < 0)
		return err_prefix(err, "kernel %s", kernel->path);
	uint64_t floor = max_u64(elf.low_end_gpa, BOOT_HIGH_MEMORY_GPA);
	r = boot_load_initrd(mem, config->initrd, floor, boot_low_ram_end(mem), &initrd, err);
	if (r < 0)
		return r;
	r = boot_load_cmdline(mem, config->cmdline, BOOT_CMDLINE_MAX_BYTES, err);
	if (r < 0)
		return r;
	r = write_start_info(mem, &initrd, err);
	if (r < 0)
		return r;
	r = boot_cpu_protected_mode(mem, cpu, err);
	if (r < 0)
		return r;
	cpu->regs.rip = elf.entry;
	cpu->regs.rbx = BOOT_START_INFO_GPA;
	return 0;
}
