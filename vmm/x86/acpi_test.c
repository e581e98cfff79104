/* ACPI tables: found from the RSDP, checksums, values that devices rely on, and Intel's own compiler as the judge of
 * the AML. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "vmm/x86/acpi_internal.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

static const uint8_t generation[ACPI_GENERATION_BYTES] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
static const struct acpi_config full_config = {.serial = true, .rtc = true, .pci = true, .generation_id = generation};

static struct mem *build(uint64_t memory_bytes, unsigned cpus, const struct acpi_config *config)
{
	struct mem *mem = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(mem_create(memory_bytes, &mem, &err), 0, "%s", err.message);
	cr_assert_eq(acpi_build_tables(mem, cpus, config, &err), 0, "%s", err.message);
	return mem;
}

static uint8_t sum(const uint8_t *data, size_t bytes)
{
	uint8_t total = 0;

	for (size_t i = 0; i < bytes; i++)
		total = (uint8_t)(total + data[i]);
	return total;
}

/* The table at gpa; checks what every table has. */
static const uint8_t *get_table(struct mem *mem, uint64_t gpa, const char *signature)
{
	const uint8_t *t = mem_at(mem, gpa, 36, false);

	cr_assert_not_null(t, "%s", signature);
	cr_assert_eq(memcmp(t, signature, 4), 0, "%.4s instead of %s", (const char *)t, signature);
	cr_assert_leq(gpa + get_le32(t + 4), 0x100000);
	if (strcmp(signature, "FACS") != 0)
		cr_assert_eq(sum(t, get_le32(t + 4)), 0, "checksum of %s", signature);
	return t;
}

static uint64_t xsdt_gpa(struct mem *mem)
{
	const uint8_t *rsdp = mem_at(mem, ACPI_TABLES_GPA, 36, false);

	cr_assert_eq(memcmp(rsdp, "RSD PTR ", 8), 0);
	cr_assert_eq(sum(rsdp, 20), 0);
	cr_assert_eq(sum(rsdp, 36), 0);
	return get_le64(rsdp + 24);
}

static const uint8_t *get_fadt(struct mem *mem)
{
	return get_table(mem, get_le64(get_table(mem, xsdt_gpa(mem), "XSDT") + 36), "FACP");
}
static const uint8_t *get_madt(struct mem *mem)
{
	return get_table(mem, get_le64(get_table(mem, xsdt_gpa(mem), "XSDT") + 44), "APIC");
}

Test(acpi, fadt_says_what_the_devices_do)
{
	struct mem *mem = build(128 * MIB, 1, &full_config);
	const uint8_t *fadt = get_fadt(mem);
	uint32_t flags = get_le32(fadt + 112);

	cr_expect_eq(get_le32(get_table(mem, get_le32(fadt + 36), "FACS") + 4), 64);
	cr_expect_eq(get_le32(fadt + 36) % 64, 0);
	get_table(mem, get_le64(fadt + 140), "DSDT");
	cr_expect_eq(get_le64(fadt + 140), get_le32(fadt + 40));
	cr_expect_eq(get_le32(fadt + 56), 0x600);
	cr_expect_eq(get_le64(fadt + 152), 0x600);
	cr_expect_eq(get_le32(fadt + 64), 0x604);
	cr_expect_eq(get_le32(fadt + 76), 0x608);
	cr_expect_eq(get_le16(fadt + 46), 9);
	cr_expect_eq(get_le64(fadt + 120), 0xcf9);
	cr_expect_eq(fadt[128], 6);
	cr_expect(flags & 1u << 10, "reset register");
	cr_expect_not(flags & 1u << 4, "fixed power button");
	cr_expect_not(flags & 1u << 8, "24-bit PM timer");
	cr_expect_not(flags & 1u << 20, "not hardware-reduced");
	cr_expect_eq(get_le16(fadt + 109), 5, "legacy devices, no 8042, no VGA, RTC, MSI allowed");
	mem_destroy(mem);
	mem = build(128 * MIB, 1, &(struct acpi_config){0});
	cr_expect_eq(get_le16(get_fadt(mem) + 109), 0x25, "no RTC");
	mem_destroy(mem);
}

Test(acpi, madt_lists_every_processor_once)
{
	for (unsigned cpus = 1; cpus <= VM_MAX_CPUS; cpus += cpus < 4 ? 1 : 15) {
		struct mem *mem = build(128 * MIB, cpus, &full_config);
		const uint8_t *madt = get_madt(mem);
		unsigned lapics = 0, overrides = 0, ioapics = 0, nmis = 0;
		size_t at = 44;
		for (; at < get_le32(madt + 4); at += madt[at + 1]) {
			cr_assert_gt(madt[at + 1], 1);
			if (madt[at] == 0) {
				cr_expect_eq(madt[at + 3], lapics);
				lapics++;
			}
			ioapics += madt[at] == 1;
			overrides += madt[at] == 2;
			nmis += madt[at] == 4;
		}
		cr_expect_eq(at, get_le32(madt + 4));
		cr_expect_eq(lapics, cpus);
		cr_expect_eq(ioapics, 1);
		cr_expect_eq(overrides, 1, "the SCI; KVM has the PIT at pin 0");
		cr_expect_eq(nmis, 1);
		mem_destroy(mem);
	}
}

Test(acpi, generation_id_is_where_the_tables_say)
{
	struct mem *mem = build(128 * MIB, 1, &full_config);
	uint8_t id[ACPI_GENERATION_BYTES], other[ACPI_GENERATION_BYTES];
	const uint8_t *dsdt = get_table(mem, get_le64(get_fadt(mem) + 140), "DSDT");
	const uint8_t *name = memmem(dsdt, get_le32(dsdt + 4), "ADDR", 4);

	cr_assert_not_null(name);
	/* Package, its length, two elements, DWordPrefix, the address, ZeroOp. */
	cr_assert(name[4] == 0x12 && name[6] == 2 && name[7] == 0x0c && name[12] == 0);
	uint64_t gpa = get_le32(name + 8);
	cr_expect_eq(gpa % 8, 0);
	cr_assert_eq(mem_read(mem, gpa, id, sizeof(id), NULL), 0);
	cr_expect(memcmp(id, generation, sizeof(id)) == 0);
	memset(other, 0xab, sizeof(other));
	cr_expect(acpi_set_generation(mem, other));
	cr_assert_eq(mem_read(mem, gpa, id, sizeof(id), NULL), 0);
	cr_expect(memcmp(id, other, sizeof(id)) == 0);
	cr_expect(acpi_get_generation(mem, id) && memcmp(id, other, sizeof(id)) == 0);
	mem_destroy(mem);
	/* A guest whose tables name none: nothing of its memory is touched. */
	mem = build(128 * MIB, 1, &(struct acpi_config){0});
	cr_expect_not(acpi_set_generation(mem, other));
	cr_expect_not(acpi_get_generation(mem, id));
	const uint8_t *page = mem_at(mem, ACPI_GENERATION_GPA, 4096, false);
	for (size_t i = 0; i < 4096; i++)
		cr_assert_eq(page[i], 0);
	mem_destroy(mem);
}

Test(acpi, refuses_what_does_not_fit)
{
	static uint8_t large[0x20000];
	struct acpi_config config = {.aml = large, .aml_bytes = sizeof(large)};
	struct mem *mem = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(mem_create(128 * MIB, &mem, &err), 0);
	cr_expect_eq(acpi_build_tables(mem, 1, &config, &err), -ENOSPC);
	cr_expect_eq(acpi_build_tables(mem, 0, &full_config, &err), -EINVAL);
	cr_expect_eq(acpi_build_tables(mem, VM_MAX_CPUS + 1, &full_config, &err), -EINVAL);
	mem_destroy(mem);
}

Test(acpi, mmio64_window_lies_above_ram)
{
	static const uint64_t sizes[] = {128 * MIB, 3 * GIB, 4 * GIB, 15 * GIB, 16 * GIB, 17 * GIB};

	for (size_t i = 0; i < ARRAY_LENGTH(sizes); i++) {
		struct mem_region regions[2];
		struct mem *mem = build(sizes[i], 1, &full_config);
		unsigned last = mem_regions(mem, regions) - 1;
		uint64_t bytes, base = acpi_pci_mmio64_base(mem, &bytes);
		cr_assert_eq(bytes, PCI_MMIO64_BYTES);
		cr_expect_geq(base, regions[last].gpa + regions[last].bytes);
		cr_expect_geq(base, 4 * GIB);
		cr_expect_eq(base % bytes, 0);
		mem_destroy(mem);
	}
}

Test(aml, package_lengths)
{
	/* Length of the content of a scope named "AAAA" (4 bytes), and of the PkgLength that it needs. */
	static const struct {
		size_t content, length_bytes;
	} cases[] = {{0, 1}, {58, 1}, {59, 2}, {4089, 2}, {4090, 3}, {1048568, 3}, {1048569, 4}};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		struct aml aml = AML_INIT;
		size_t mark = aml_scope_begin(&aml, "AAAA"), total;
		cr_assert_eq(buf_append(&aml.buf, NULL, cases[i].content, NULL), 0);
		aml_end(&aml, mark);
		cr_assert_not(aml.failed);
		const uint8_t *p = aml.buf.data + 1;
		size_t n = (size_t)(p[0] >> 6) + 1;
		total = n == 1 ? p[0] : p[0] & 0xfu;
		for (size_t k = 1; k < n; k++)
			total |= (size_t)p[k] << (8 * k - 4);
		cr_expect_eq(n, cases[i].length_bytes, "content %zu", cases[i].content);
		cr_expect_eq(total, aml.buf.length - 1, "content %zu", cases[i].content);
		aml_free(&aml);
	}
}

/* --- the compiler's opinion --- */

/* Runs a command in a shell; its output in *out. */
static int run(const char *command, char *out, size_t bytes)
{
	FILE *pipe = popen(command, "r");

	cr_assert_not_null(pipe);
	size_t n = fread(out, 1, bytes - 1, pipe);
	out[n] = '\0';
	return pclose(pipe);
}

static void write_table(const char *folder, const char *name, const uint8_t *table)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s.dat", folder, name);
	FILE *file = fopen(path, "w");
	cr_assert_not_null(file);
	cr_assert_eq(fwrite(table, 1, get_le32(table + 4), file), get_le32(table + 4));
	fclose(file);
}

static void judge(const char *folder, uint64_t memory_bytes, unsigned cpus, const struct acpi_config *config)
{
	static const char *const names[] = {"xsdt", "facp", "facs", "apic", "dsdt"};
	struct mem *mem = build(memory_bytes, cpus, config);
	const uint8_t *fadt = get_fadt(mem);
	char command[1024], out[65536];

	write_table(folder, "xsdt", get_table(mem, xsdt_gpa(mem), "XSDT"));
	write_table(folder, "facp", fadt);
	write_table(folder, "facs", get_table(mem, get_le32(fadt + 36), "FACS"));
	write_table(folder, "apic", get_madt(mem));
	write_table(folder, "dsdt", get_table(mem, get_le64(fadt + 140), "DSDT"));
	mem_destroy(mem);
	for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
		snprintf(command, sizeof(command), "cd '%s' && iasl -d %s.dat 2>&1", folder, names[i]);
		int status = run(command, out, sizeof(out));
		cr_expect_eq(status, 0, "iasl -d %s: %s", names[i], out);
		cr_expect(!strstr(out, "Warning") && !strstr(out, "Error") && !strstr(out, "Invalid"), "iasl -d %s: %s",
			  names[i], out);
	}
	/* And back: the compiler checks types, paths and required objects, which the disassembler does not. */
	snprintf(command, sizeof(command), "cd '%s' && iasl -we -p again dsdt.dsl 2>&1", folder);
	int status = run(command, out, sizeof(out));
	cr_expect_eq(status, 0, "iasl dsdt.dsl: %s", out);
	cr_expect(strstr(out, "0 Errors, 0 Warnings"), "iasl dsdt.dsl: %s", out);
}

Test(acpi, iasl_accepts_every_table)
{
	char folder[] = "/tmp/vmcp-acpi-XXXXXX", command[64], out[256];

	if (run("iasl -v 2>/dev/null", out, sizeof(out)) != 0)
		cr_skip_test("SKIP: iasl is not installed (Debian: acpica-tools)");
	cr_assert_not_null(mkdtemp(folder));
	struct aml extra = AML_INIT;
	size_t device = aml_device_begin(&extra, "XTRA");
	aml_name(&extra, "_HID");
	aml_string(&extra, "VMCP0001");
	aml_end(&extra, device);
	struct acpi_config config = full_config;
	config.aml = extra.buf.data;
	config.aml_bytes = extra.buf.length;
	judge(folder, 128 * MIB, 1, &config);
	judge(folder, 16 * GIB, VM_MAX_CPUS, &full_config);
	judge(folder, 4 * GIB, 2, &(struct acpi_config){0});
	aml_free(&extra);
	snprintf(command, sizeof(command), "rm -r '%s'", folder);
	cr_expect_eq(run(command, out, sizeof(out)), 0);
}
