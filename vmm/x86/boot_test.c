/* Loaders, without KVM: kernels made here, whole and damaged, into memory of several sizes. */
#include <criterion/criterion.h>
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "vmm/acpi.h"
#include "vmm/x86/boot_internal.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

/* A file that lives in memory, with a path. */
struct test_file {
	int fd;
	char path[64];
};

static struct test_file make_file(const void *data, size_t bytes)
{
	struct test_file file = {.fd = memfd_create("boot-test", MFD_CLOEXEC)};

	cr_assert_geq(file.fd, 0);
	snprintf(file.path, sizeof(file.path), "/proc/self/fd/%d", file.fd);
	cr_assert_eq(write(file.fd, data, bytes), (ssize_t)bytes);
	return file;
}

static struct mem *make_memory(uint64_t bytes)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(mem_create(bytes, &mem, &err), 0, "%s", err.message);
	return mem;
}

/* --- a bzImage with 4 setup sectors and a payload whose byte i is i * 7 --- */

#define SETUP_BYTES   (5u * 512)
#define PAYLOAD_BYTES 0x3000u

struct test_bzimage {
	uint8_t bytes[SETUP_BYTES + PAYLOAD_BYTES];
};

static void make_bzimage(struct test_bzimage *k)
{
	memset(k, 0, sizeof(*k));
	k->bytes[0x1f1] = 4;
	put_le32(k->bytes + 0x1f4, PAYLOAD_BYTES / 16);
	put_le16(k->bytes + 0x1fe, 0xaa55);
	k->bytes[0x200] = 0xeb;
	k->bytes[0x201] = 0x6a;
	memcpy(k->bytes + 0x202, "HdrS", 4);
	put_le16(k->bytes + 0x206, 0x20f);
	k->bytes[0x211] = 0x41;
	put_le32(k->bytes + 0x22c, 0x7fffffff);
	put_le32(k->bytes + 0x230, 0x200000);
	k->bytes[0x234] = 1;
	put_le16(k->bytes + 0x236, 0x7f);
	put_le32(k->bytes + 0x238, 255);
	put_le64(k->bytes + 0x258, 0x1000000);
	put_le32(k->bytes + 0x260, 0x800000);
	for (unsigned i = 0; i < PAYLOAD_BYTES; i++)
		k->bytes[SETUP_BYTES + i] = (uint8_t)(i * 7);
}

struct load_result {
	int r;
	struct err err;
	struct boot_cpu cpu;
};

static struct load_result load(struct mem *mem, const void *kernel, size_t kernel_bytes, const char *initrd,
			       const char *cmdline)
{
	struct test_file file = make_file(kernel, kernel_bytes);
	struct load_result out = {.err = ERR_INIT};
	struct boot_config config = {.kernel = file.path, .initrd = initrd, .cmdline = cmdline};

	out.r = boot_load_memory(mem, &config, &out.cpu, &out.err);
	if (out.r < 0) {
		cr_assert_eq(out.r, -out.err.number);
		cr_assert_neq(out.err.message[0], '\0');
	}
	close(file.fd);
	return out;
}

static void expect_failure(const void *kernel, size_t bytes, enum err_class class, const char *text)
{
	struct mem *mem = make_memory(128 * MIB);
	struct load_result l = load(mem, kernel, bytes, NULL, "");

	cr_expect_lt(l.r, 0, "loaded, but should say \"%s\"", text);
	cr_expect(strstr(l.err.message, text), "got \"%s\", not \"%s\"", l.err.message, text);
	cr_expect(strstr(l.err.message, "kernel /proc/self/fd/"), "\"%s\" does not name the file", l.err.message);
	cr_expect_eq(l.err.class, class, "class %d for \"%s\"", (int)l.err.class, text);
	mem_destroy(mem);
}

Test(boot_linux, loads_and_enters_64_bit)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(128 * MIB);
	uint8_t initrd_data[5000];

	make_bzimage(&k);
	memset(initrd_data, 0x5a, sizeof(initrd_data));
	struct test_file initrd = make_file(initrd_data, sizeof(initrd_data));
	struct load_result l = load(mem, &k, sizeof(k), initrd.path, "console=ttyS0");
	cr_assert_eq(l.r, 0, "%s", l.err.message);

	cr_expect_eq(memcmp(mem_at(mem, 0x1000000, PAYLOAD_BYTES, false), k.bytes + SETUP_BYTES, PAYLOAD_BYTES), 0);
	const uint8_t *p = mem_at(mem, BOOT_PARAMS_GPA, PAGE_BYTES, false);
	cr_expect_eq(get_le16(p + 0x1fe), 0xaa55);
	cr_expect_eq(memcmp(p + 0x202, "HdrS", 4), 0);
	cr_expect_eq(p[0x210], 0xff);
	cr_expect_eq(p[0x211], 1);
	cr_expect_str_eq((const char *)mem_at(mem, get_le32(p + 0x228), 14, false), "console=ttyS0");
	cr_expect_eq(get_le64(p + 0x70), ACPI_TABLES_GPA);
	/* As high as it goes: the last page boundary that leaves room. */
	cr_expect_eq(get_le32(p + 0x218), 128 * MIB - 8192);
	cr_expect_eq(get_le32(p + 0x21c), sizeof(initrd_data));
	cr_expect_eq(
		memcmp(mem_at(mem, get_le32(p + 0x218), sizeof(initrd_data), false), initrd_data, sizeof(initrd_data)),
		0);

	cr_expect_eq(l.cpu.regs.rip, 0x1000200);
	cr_expect_eq(l.cpu.regs.rsi, BOOT_PARAMS_GPA);
	cr_expect_eq(l.cpu.regs.rflags, 2);
	cr_expect_eq(l.cpu.sregs.cs.selector, 0x10);
	cr_expect_eq(l.cpu.sregs.ds.selector, 0x18);
	cr_expect_eq(l.cpu.sregs.efer, 0x500);
	cr_expect_eq(l.cpu.sregs.cs.l, 1);
	close(initrd.fd);
	mem_destroy(mem);
}

Test(boot_linux, descriptors_and_page_tables_say_what_the_registers_say)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(128 * MIB);

	make_bzimage(&k);
	struct load_result l = load(mem, &k, sizeof(k), NULL, "");
	cr_assert_eq(l.r, 0, "%s", l.err.message);
	const uint8_t *gdt = mem_at(mem, l.cpu.sregs.gdt.base, l.cpu.sregs.gdt.limit + 1u, false);
	cr_assert_not_null(gdt);
	cr_expect_eq(get_le64(gdt + 0x10), 0x00af9b000000ffff, "64-bit code, got %lx", get_le64(gdt + 0x10));
	cr_expect_eq(get_le64(gdt + 0x18), 0x00cf93000000ffff, "data, got %lx", get_le64(gdt + 0x18));
	cr_expect_eq(get_le64(gdt + 0x20), 0x00008b0000000067, "task, got %lx", get_le64(gdt + 0x20));
	/* Walk some addresses of the first 4 GiB. */
	for (uint64_t va = 0; va < 4 * GIB; va += 0x12345678) {
		uint64_t pml4e = get_le64(mem_at(mem, l.cpu.sregs.cr3, 8, false));
		uint64_t pdpte = get_le64(mem_at(mem, (pml4e & ~0xfffull) + 8 * (va >> 30), 8, false));
		uint64_t pde = get_le64(mem_at(mem, (pdpte & ~0xfffull) + 8 * (va >> 21 & 511), 8, false));
		cr_assert_eq(pml4e & pdpte & pde & 3, 3);
		cr_assert_eq(pde & 0x80, 0x80);
		cr_assert_eq(pde & ~0x1fffffull, va & ~0x1fffffull);
	}
	mem_destroy(mem);
}

Test(boot_linux, initrd_stays_below_initrd_addr_max)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(3 * GIB);
	struct test_file initrd = make_file("0123456789", 10);

	make_bzimage(&k);
	struct load_result l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_assert_eq(l.r, 0, "%s", l.err.message);
	const uint8_t *p = mem_at(mem, BOOT_PARAMS_GPA, PAGE_BYTES, false);
	cr_expect_eq(get_le32(p + 0x218), 0x7ffff000);
	put_le32(k.bytes + 0x22c, 0xffffffff);
	l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_assert_eq(l.r, 0, "%s", l.err.message);
	cr_expect_eq(get_le32(p + 0x218), 3 * GIB - 4096, "below the hole");
	put_le32(k.bytes + 0x22c, 0x1000);
	l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_expect_lt(l.r, 0, "no room at all below initrd_addr_max");
	close(initrd.fd);
	mem_destroy(mem);
}

Test(boot_linux, header_matrix)
{
	static const struct {
		const char *text;
		enum err_class class;
		unsigned offset, bytes;
		uint64_t value;
	} cases[] = {
		{"without a 64-bit entry", ERR_USAGE, 0x206, 2, 0x20b},
		{"without a 64-bit entry", ERR_USAGE, 0x236, 2, 0x7e},
		{"not loaded high", ERR_DAMAGED, 0x211, 1, 0},
		{"length is impossible", ERR_DAMAGED, 0x201, 1, 0x10},
		{"length is impossible", ERR_DAMAGED, 0x201, 1, 0xff},
		{"no room for the 64-bit entry", ERR_DAMAGED, 0x1f4, 4, 0},
		{"truncated", ERR_DAMAGED, 0x1f4, 4, PAYLOAD_BYTES / 16 + 1},
		{"truncated", ERR_DAMAGED, 0x1f4, 4, 0xffffffff},
		{"truncated", ERR_DAMAGED, 0x1f1, 1, 0xff},
		{"no power of two", ERR_DAMAGED, 0x230, 4, 0},
		{"no power of two", ERR_DAMAGED, 0x230, 4, 0x300000},
		{"needs 8 MiB", ERR_USAGE, 0x258, 8, 0x8000000},
		{"needs 8 MiB", ERR_USAGE, 0x258, 8, 0x100000000},
		{"absurd", ERR_DAMAGED, 0x258, 8, UINT64_MAX},
		{"needs 4096 MiB", ERR_USAGE, 0x260, 4, 0xffffffff},
		{"needs 8 MiB", ERR_USAGE, 0x230, 4, 0x80000000},
		{"neither a Linux bzImage nor an ELF with a PVH note", ERR_USAGE, 0x202, 1, 'X'},
		{"neither a Linux bzImage nor an ELF with a PVH note", ERR_USAGE, 0x1fe, 2, 0},
	};
	struct test_bzimage k;

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		uint8_t value[8];
		make_bzimage(&k);
		put_le64(value, cases[i].value);
		memcpy(k.bytes + cases[i].offset, value, cases[i].bytes);
		expect_failure(&k, sizeof(k), cases[i].class, cases[i].text);
	}
}

Test(boot_linux, a_kernel_that_does_not_relocate_goes_where_it_wants)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(128 * MIB);

	make_bzimage(&k);
	k.bytes[0x234] = 0;
	put_le64(k.bytes + 0x258, 0x1100000); /* not aligned to kernel_alignment, and need not be */
	struct load_result l = load(mem, &k, sizeof(k), NULL, "");
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	cr_expect_eq(l.cpu.regs.rip, 0x1100200);
	k.bytes[0x234] = 1;
	l = load(mem, &k, sizeof(k), NULL, "");
	cr_expect_eq(l.cpu.regs.rip, 0x1200200);
	k.bytes[0x234] = 0;
	put_le64(k.bytes + 0x258, 0x10000);
	l = load(mem, &k, sizeof(k), NULL, "");
	cr_expect_lt(l.r, 0);
	mem_destroy(mem);
}

Test(boot_linux, truncated_anywhere)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(128 * MIB);

	make_bzimage(&k);
	for (size_t bytes = 1; bytes < sizeof(k) - 15; bytes += bytes < 0x300 ? 1 : 97) {
		struct load_result l = load(mem, &k, bytes, NULL, "");
		cr_assert_lt(l.r, 0, "loaded %zu of %zu bytes", bytes, sizeof(k));
	}
	/* syssize counts units of 16 bytes: the last may be short. */
	struct load_result l = load(mem, &k, sizeof(k) - 15, NULL, "");
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	/* Signatures follow the image in signed kernels. */
	uint8_t longer[sizeof(k) + 1472] = {0};
	memcpy(longer, &k, sizeof(k));
	l = load(mem, longer, sizeof(longer), NULL, "");
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	mem_destroy(mem);
}

Test(boot_linux, initrd_too_big_and_not_there)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(32 * MIB);
	struct test_file initrd = make_file("", 0);

	make_bzimage(&k);
	/* The kernel takes 16 to 24 MiB: 8 MiB are left. */
	cr_assert_eq(ftruncate(initrd.fd, 8 * MIB), 0);
	struct load_result l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	cr_assert_eq(ftruncate(initrd.fd, 8 * MIB + 1), 0);
	l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_expect_lt(l.r, 0);
	cr_expect(strstr(l.err.message, initrd.path), "%s", l.err.message);
	cr_expect(strstr(l.err.hint, "more memory"));
	cr_assert_eq(ftruncate(initrd.fd, (off_t)(100 * GIB)), 0);
	l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_expect_lt(l.r, 0);
	cr_assert_eq(ftruncate(initrd.fd, 0), 0);
	l = load(mem, &k, sizeof(k), initrd.path, "");
	cr_expect(strstr(l.err.message, "empty"), "%s", l.err.message);
	l = load(mem, &k, sizeof(k), "/nonexistent/initrd", "");
	cr_expect_eq(l.r, -ENOENT);
	cr_expect_eq(l.err.class, ERR_NOT_FOUND);
	l = load(mem, &k, sizeof(k), "/", "");
	cr_expect(strstr(l.err.message, "not a regular file"), "%s", l.err.message);
	close(initrd.fd);
	mem_destroy(mem);
}

Test(boot_linux, command_line_length)
{
	struct test_bzimage k;
	struct mem *mem = make_memory(128 * MIB);
	char text[3000];

	make_bzimage(&k);
	memset(text, 'a', sizeof(text));
	text[255] = '\0';
	struct load_result l = load(mem, &k, sizeof(k), NULL, text);
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	text[255] = 'a';
	text[256] = '\0';
	l = load(mem, &k, sizeof(k), NULL, text);
	cr_expect_lt(l.r, 0);
	cr_expect(strstr(l.err.message, "256 bytes, the kernel takes 255"), "%s", l.err.message);
	put_le32(k.bytes + 0x238, 0xffffffff);
	text[256] = 'a';
	text[2048] = '\0';
	l = load(mem, &k, sizeof(k), NULL, text);
	cr_expect_lt(l.r, 0);
	cr_expect_eq(l.err.class, ERR_USAGE);
	text[2047] = '\0';
	l = load(mem, &k, sizeof(k), NULL, text);
	cr_expect_eq(l.r, 0, "%s", l.err.message);
	mem_destroy(mem);
}

/* --- memory map --- */

Test(boot_map, e820_of_every_size)
{
	static const struct {
		uint64_t memory, low_end, high_bytes;
	} cases[] = {
		{128 * MIB, 128 * MIB, 0},   {3 * GIB, 3 * GIB, 0},	    {3 * GIB + 2 * MIB, 3 * GIB, 2 * MIB},
		{4 * GIB, 3 * GIB, 1 * GIB}, {16 * GIB, 3 * GIB, 13 * GIB},
	};
	struct test_bzimage k;

	make_bzimage(&k);
	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		struct mem *mem = make_memory(cases[i].memory);
		struct load_result l = load(mem, &k, sizeof(k), NULL, "");
		uint64_t ram = 0, end = 0, high = 0;
		cr_assert_eq(l.r, 0, "%s", l.err.message);
		const uint8_t *p = mem_at(mem, BOOT_PARAMS_GPA, PAGE_BYTES, false);
		for (unsigned n = 0; n < p[0x1e8]; n++) {
			const uint8_t *e = p + 0x2d0 + 20 * n;
			uint64_t gpa = get_le64(e), bytes = get_le64(e + 8);
			cr_expect_geq(gpa, end, "ascending, without overlap");
			end = gpa + bytes;
			if (get_le32(e + 16) != BOOT_RAM)
				continue;
			ram += bytes;
			cr_expect_not_null(mem_at(mem, gpa, bytes, false), "what is called RAM is RAM");
			if (gpa == MIB)
				cr_expect_eq(end, cases[i].low_end);
			if (gpa == MEM_HOLE_END)
				high = bytes;
		}
		cr_expect_eq(high, cases[i].high_bytes);
		/* All but the firmware area below 1 MiB. */
		cr_expect_eq(ram, cases[i].memory - (MIB - BOOT_LOW_MEMORY_END));
		mem_destroy(mem);
	}
}

/* --- an ELF kernel with one PT_LOAD of code, one that is half zero, and the note --- */

#define CODE_GPA  0x200000u
#define DATA_GPA  0x300000u
#define ENTRY_GPA (CODE_GPA + 0x40)

struct test_elf {
	bool wide;
	uint8_t bytes[0x3000];
};

/* Offset of a field of program header `index`; 64-bit files put p_flags elsewhere, hence two columns. */
#define PHDR_AT(k, index, field)                                                                                       \
	((k)->wide ? sizeof(Elf64_Ehdr) + (index) * sizeof(Elf64_Phdr) + offsetof(Elf64_Phdr, field)                   \
		   : sizeof(Elf32_Ehdr) + (index) * sizeof(Elf32_Phdr) + offsetof(Elf32_Phdr, field))

static void put_native(struct test_elf *k, size_t at, uint64_t value)
{
	if (k->wide)
		put_le64(k->bytes + at, value);
	else
		put_le32(k->bytes + at, (uint32_t)value);
}

static void set_phdr(struct test_elf *k, unsigned index, uint32_t type, uint64_t offset, uint64_t paddr,
		     uint64_t file_bytes, uint64_t memory_bytes)
{
	put_le32(k->bytes + PHDR_AT(k, index, p_type), type);
	put_native(k, PHDR_AT(k, index, p_offset), offset);
	put_native(k, PHDR_AT(k, index, p_paddr), paddr);
	put_native(k, PHDR_AT(k, index, p_filesz), file_bytes);
	put_native(k, PHDR_AT(k, index, p_memsz), memory_bytes);
	put_native(k, PHDR_AT(k, index, p_align), 4);
}

static void set_phnum(struct test_elf *k, uint16_t n)
{
	put_le16(k->bytes + (k->wide ? offsetof(Elf64_Ehdr, e_phnum) : offsetof(Elf32_Ehdr, e_phnum)), n);
}

static void make_elf(struct test_elf *k, bool wide)
{
	memset(k, 0, sizeof(*k));
	k->wide = wide;
	memcpy(k->bytes, ELFMAG, SELFMAG);
	k->bytes[EI_CLASS] = wide ? ELFCLASS64 : ELFCLASS32;
	k->bytes[EI_DATA] = ELFDATA2LSB;
	put_le16(k->bytes + offsetof(Elf64_Ehdr, e_machine), wide ? EM_X86_64 : EM_386);
	put_native(k, wide ? offsetof(Elf64_Ehdr, e_phoff) : offsetof(Elf32_Ehdr, e_phoff),
		   wide ? sizeof(Elf64_Ehdr) : sizeof(Elf32_Ehdr));
	put_le16(k->bytes + (wide ? offsetof(Elf64_Ehdr, e_phentsize) : offsetof(Elf32_Ehdr, e_phentsize)),
		 wide ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr));
	set_phnum(k, 3);
	set_phdr(k, 0, PT_LOAD, 0x1000, CODE_GPA, 0x1000, 0x1000);
	set_phdr(k, 1, PT_LOAD, 0x2000, DATA_GPA, 0x800, 0x20000);
	set_phdr(k, 2, PT_NOTE, 0x2800, 0, 48, 48);
	memset(k->bytes + 0x1000, 0xcc, 0x1000);
	memset(k->bytes + 0x2000, 0xdd, 0x800);
	/* Another note first, of an odd size, to be skipped. */
	put_le32(k->bytes + 0x2800, 4);
	put_le32(k->bytes + 0x2804, 5);
	put_le32(k->bytes + 0x2808, NT_VERSION);
	memcpy(k->bytes + 0x280c, "GNU", 4);
	put_le32(k->bytes + 0x2818, 4);
	put_le32(k->bytes + 0x281c, wide ? 8 : 4);
	put_le32(k->bytes + 0x2820, 18);
	memcpy(k->bytes + 0x2824, "Xen", 4);
	put_native(k, 0x2828, ENTRY_GPA);
}

Test(boot_pvh, loads_both_classes)
{
	uint8_t initrd_data[3] = {1, 2, 3};
	struct test_file initrd = make_file(initrd_data, sizeof(initrd_data));

	for (int wide = 0; wide < 2; wide++) {
		struct test_elf k;
		struct mem *mem = make_memory(128 * MIB);
		make_elf(&k, wide);
		struct load_result l = load(mem, k.bytes, sizeof(k.bytes), initrd.path, "a=b");
		cr_assert_eq(l.r, 0, "%s", l.err.message);
		cr_expect_eq(memcmp(mem_at(mem, CODE_GPA, 0x1000, false), k.bytes + 0x1000, 0x1000), 0);
		const uint8_t *data = mem_at(mem, DATA_GPA, 0x20000, false);
		cr_expect_eq(data[0x7ff], 0xdd);
		cr_expect_eq(data[0x800], 0);

		cr_expect_eq(l.cpu.regs.rip, ENTRY_GPA);
		cr_expect_eq(l.cpu.sregs.cr0 & 0x80000001, 1, "protected mode, no paging");
		cr_expect_eq(l.cpu.sregs.cr4, 0);
		cr_expect_eq(l.cpu.sregs.cs.db, 1);
		cr_expect_eq(l.cpu.sregs.cs.limit, 0xffffffff);
		cr_expect_eq(l.cpu.sregs.tr.limit, 0x67);
		const uint8_t *info = mem_at(mem, l.cpu.regs.rbx, 56, false);
		cr_assert_not_null(info);
		cr_expect_eq(get_le32(info), 0x336ec578);
		cr_expect_eq(get_le32(info + 4), 1);
		cr_expect_eq(get_le32(info + 12), 1);
		const uint8_t *module = mem_at(mem, get_le64(info + 16), 32, false);
		cr_expect_eq(get_le64(module + 8), 3);
		cr_expect_eq(get_le64(module), 128 * MIB - 4096);
		cr_expect_eq(memcmp(mem_at(mem, get_le64(module), 3, false), initrd_data, 3), 0);
		cr_expect_str_eq((const char *)mem_at(mem, get_le64(info + 24), 4, false), "a=b");
		cr_expect_eq(get_le64(info + 32), ACPI_TABLES_GPA);
		const uint8_t *map = mem_at(mem, get_le64(info + 40), 24 * get_le32(info + 48), false);
		cr_assert_not_null(map);
		cr_expect_eq(get_le64(map + 8), BOOT_LOW_MEMORY_END);
		cr_expect_eq(get_le32(map + 16), BOOT_RAM);
		mem_destroy(mem);
	}
	close(initrd.fd);
}

Test(boot_pvh, damaged_segments)
{
	struct test_elf k;

	for (int wide = 0; wide < 2; wide++) {
		make_elf(&k, wide);
		set_phdr(&k, 1, PT_LOAD, 0x2000, 0x0, 0x800, 0x800);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "below 1 MiB");
		set_phdr(&k, 1, PT_LOAD, 0x2000, 128 * MIB - 0x1000, 0x800, 0x1001);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "outside the guest's 128 MiB");
		set_phdr(&k, 1, PT_LOAD, 0x2000, 0xfffff000, 0x800, 0xfffff000);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "outside the guest's 128 MiB");
		set_phdr(&k, 1, PT_LOAD, 0x2000, CODE_GPA + 0xfff, 0x800, 0x800);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "overlap");
		set_phdr(&k, 1, PT_LOAD, 0x2000, DATA_GPA, 0x801, 0x800);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "larger in the file");
		set_phdr(&k, 1, PT_LOAD, 0xfffff000, DATA_GPA, 0x800, 0x800);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "truncated");
		set_phdr(&k, 1, PT_NULL, 0, 0, 0, 0);
		set_phdr(&k, 0, PT_NULL, 0, 0, 0, 0);
		expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "lies in no segment");
	}
	make_elf(&k, true);
	set_phdr(&k, 1, PT_LOAD, 0x2000, UINT64_MAX - 0x7ff, 0x800, 0x800);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "outside");
	set_phdr(&k, 1, PT_LOAD, UINT64_MAX - 0x100, DATA_GPA, 0x800, 0x800);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "truncated");
}

Test(boot_pvh, damaged_headers_and_notes)
{
	struct test_elf k;

	make_elf(&k, true);
	put_le32(k.bytes + 0x2820, 17); /* another Xen note */
	expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "neither a Linux bzImage nor an ELF with a PVH note");
	make_elf(&k, true);
	memcpy(k.bytes + 0x2824, "Zen", 4);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "neither a Linux bzImage nor an ELF with a PVH note");
	make_elf(&k, true);
	put_le32(k.bytes + 0x281c, 2);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "entry note of impossible size");
	make_elf(&k, true);
	put_le32(k.bytes + 0x2804, 0xffffffff);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "note runs past");
	make_elf(&k, true);
	put_le32(k.bytes + 0x2800, 0xffffffff);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "note runs past");
	make_elf(&k, true);
	put_le64(k.bytes + 0x2828, 0x100000000ull + ENTRY_GPA);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "PVH entry");
	make_elf(&k, true);
	set_phdr(&k, 2, PT_NOTE, 0x2800, 0, UINT64_MAX, 0);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "notes of impossible size");
	make_elf(&k, true);
	set_phnum(&k, 0xffff);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "program headers");
	make_elf(&k, true);
	put_le64(k.bytes + offsetof(Elf64_Ehdr, e_phoff), UINT64_MAX);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "truncated");
	make_elf(&k, true);
	put_le16(k.bytes + offsetof(Elf64_Ehdr, e_machine), EM_AARCH64);
	expect_failure(k.bytes, sizeof(k.bytes), ERR_USAGE, "another processor");
	make_elf(&k, true);
	k.bytes[EI_DATA] = ELFDATA2MSB;
	expect_failure(k.bytes, sizeof(k.bytes), ERR_DAMAGED, "little endian");
}

Test(boot_pvh, truncated_anywhere)
{
	struct test_elf k;

	for (int wide = 0; wide < 2; wide++) {
		struct mem *mem = make_memory(16 * MIB);
		make_elf(&k, wide);
		for (size_t bytes = 1; bytes < 0x2800 + 44; bytes += bytes < 0x200 ? 1 : 61) {
			struct load_result l = load(mem, k.bytes, bytes, NULL, "");
			cr_assert_lt(l.r, 0, "loaded %zu bytes", bytes);
		}
		mem_destroy(mem);
	}
}

Test(boot, files_that_are_no_kernel)
{
	struct mem *mem = make_memory(16 * MIB);
	struct boot_cpu cpu;
	struct err err = ERR_INIT;
	struct boot_config config = {.kernel = "/nonexistent/kernel", .cmdline = ""};

	expect_failure("hello", 5, ERR_USAGE, "neither a Linux bzImage nor an ELF with a PVH note");
	expect_failure("\x1f\x8b\x08\x00", 4, ERR_USAGE, "neither a Linux bzImage nor an ELF with a PVH note");
	expect_failure("", 0, ERR_USAGE, "empty");
	cr_expect_eq(boot_load_memory(mem, &config, &cpu, &err), -ENOENT);
	cr_expect_eq(err.class, ERR_NOT_FOUND);
	config.kernel = "/tmp";
	err = ERR_INIT;
	cr_expect_lt(boot_load_memory(mem, &config, &cpu, &err), 0);
	cr_expect(strstr(err.message, "kernel /tmp: not a regular file"), "%s", err.message);
	mem_destroy(mem);
}
