/* ACPI tables in guest memory. Offsets of fields are those of ACPI 6.4, chapter 5.2. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "vmm/x86/acpi_internal.h"

#define TABLES_END ACPI_GENERATION_GPA

/* What the page of the generation id begins with; the id follows. Whoever finds it in a checkpoint's memory may write the id. */
static const char generation_mark[] = "VMCP generation";
#define GENERATION_ID_OFFSET sizeof(generation_mark)

#define HEADER_BYTES 36u
#define RSDP_BYTES   36u
#define FADT_BYTES   276u
#define FACS_BYTES   64u
#define XSDT_TABLES  2u

#define LAPIC_GPA  0xfee00000u
#define IOAPIC_GPA 0xfec00000u

/* FADT flags (table 5.10) and IA-PC boot architecture flags (table 5.11). */
#define FADT_WBINVD	       (1u << 0)
#define FADT_PROC_C1	       (1u << 2)
#define FADT_NO_SLEEP_BUTTON   (1u << 5)
#define FADT_NO_FIXED_RTC_WAKE (1u << 6)
#define FADT_RESET_REGISTER    (1u << 10)
#define BOOT_LEGACY_DEVICES    (1u << 0)
#define BOOT_NO_VGA	       (1u << 2)
#define BOOT_NO_CMOS_RTC       (1u << 5)
#define CMOS_CENTURY	       0x32
#define LATENCY_NO_C2	       101u
#define LATENCY_NO_C3	       1001u
#define RESET_VALUE	       6u

#define MADT_PCAT_COMPAT 1u
#define MADT_ENABLED	 1u
#define MADT_ALL_CPUS	 0xff
#define MADT_HIGH_LEVEL	 0xd /* active high, level triggered */
#define MADT_MAX_BYTES	 (HEADER_BYTES + 8 + 8 * VM_MAX_CPUS + 12 + 10 + 6)

/* Where the next table goes. */
struct layout {
	struct mem *mem;
	uint64_t next_gpa;
};

static void set_checksum(uint8_t *data, size_t bytes, uint8_t *checksum)
{
	uint8_t sum = 0;

	*checksum = 0;
	for (size_t i = 0; i < bytes; i++)
		sum = (uint8_t)(sum + data[i]);
	*checksum = (uint8_t)-sum;
}

/* Puts a table without a standard header in place; *gpa is where. */
static int place_raw(struct layout *layout, const void *data, uint64_t bytes, uint64_t alignment, uint64_t *gpa,
		     struct err *err)
{
	*gpa = round_up(layout->next_gpa, alignment);
	if (bytes > TABLES_END - *gpa) {
		return err_set(err, ERR_USAGE, ENOSPC,
			       "ACPI: the tables do not fit below 1 MiB (%llu bytes are left for one of %llu)",
			       (unsigned long long)(TABLES_END - *gpa), (unsigned long long)bytes);
	}
	layout->next_gpa = *gpa + bytes;
	return mem_write(layout->mem, *gpa, data, bytes, err);
}

/* Completes the header of a table and puts it in place. */
static int place_table(struct layout *layout, uint8_t *table, uint32_t bytes, const char *signature, uint8_t revision,
		       uint64_t *gpa, struct err *err)
{
	memcpy(table, signature, 4);
	put_le32(table + 4, bytes);
	table[8] = revision;
	memcpy(table + 10, "VMCP  ", 6);
	memcpy(table + 16, "VMCPVMCP", 8);
	put_le32(table + 24, 1); /* OEM revision */
	memcpy(table + 28, "VMCP", 4);
	put_le32(table + 32, 1); /* creator revision */
	set_checksum(table, bytes, table + 9);
	return place_raw(layout, table, bytes, 16, gpa, err);
}

/* Generic address of an I/O port (5.2.3.2). */
static void put_port(uint8_t *gas, uint16_t port, uint8_t bits, uint8_t access_size)
{
	gas[0] = 1; /* system I/O */
	gas[1] = bits;
	gas[2] = 0;
	gas[3] = access_size;
	put_le64(gas + 4, port);
}

enum { ACCESS_BYTE = 1, ACCESS_WORD = 2, ACCESS_DWORD = 3 };

static int place_fadt(struct layout *layout, const struct acpi_config *config, uint64_t facs, uint64_t dsdt,
		      uint64_t *gpa, struct err *err)
{
	uint8_t t[FADT_BYTES] = {0};

	put_le32(t + 36, (uint32_t)facs);
	put_le32(t + 40, (uint32_t)dsdt);
	put_le16(t + 46, ACPI_SCI_GSI);
	/* SMI_CMD stays 0: the machine is in ACPI mode from the start. */
	put_le32(t + 56, ACPI_PM1A_EVT_PORT);
	put_le32(t + 64, ACPI_PM1A_CNT_PORT);
	put_le32(t + 76, ACPI_PM_TIMER_PORT);
	t[88] = 4;
	t[89] = 2;
	t[91] = 4;
	put_le16(t + 96, LATENCY_NO_C2);
	put_le16(t + 98, LATENCY_NO_C3);
	t[108] = CMOS_CENTURY;
	/* No 8042: a kernel need not look for one. */
	put_le16(t + 109, (uint16_t)(BOOT_LEGACY_DEVICES | BOOT_NO_VGA | (config->rtc ? 0 : BOOT_NO_CMOS_RTC)));
	/* The power button is a fixed one, as its "is a control method" flag is clear. */
	put_le32(t + 112,
		 FADT_WBINVD | FADT_PROC_C1 | FADT_NO_SLEEP_BUTTON | FADT_NO_FIXED_RTC_WAKE | FADT_RESET_REGISTER);
	put_port(t + 116, ACPI_RESET_PORT, 8, ACCESS_BYTE);
	t[128] = RESET_VALUE;
	t[131] = 4; /* 6.4 */
	put_le64(t + 140, dsdt);
	put_port(t + 148, ACPI_PM1A_EVT_PORT, 32, ACCESS_WORD);
	put_port(t + 172, ACPI_PM1A_CNT_PORT, 16, ACCESS_WORD);
	put_port(t + 208, ACPI_PM_TIMER_PORT, 32, ACCESS_DWORD);
	return place_table(layout, t, FADT_BYTES, "FACP", 6, gpa, err);
}

/* Interrupt source override (5.2.12.5) of an ISA interrupt. */
static uint8_t *put_override(uint8_t *p, uint8_t irq, uint32_t gsi, uint16_t flags)
{
	p[0] = 2;
	p[1] = 10;
	p[2] = 0; /* ISA */
	p[3] = irq;
	put_le32(p + 4, gsi);
	put_le16(p + 8, flags);
	return p + 10;
}

static int place_madt(struct layout *layout, unsigned cpus, uint64_t *gpa, struct err *err)
{
	uint8_t t[MADT_MAX_BYTES] = {0}, *p = t + HEADER_BYTES;

	put_le32(p, LAPIC_GPA);
	put_le32(p + 4, MADT_PCAT_COMPAT); /* two 8259s as well */
	p += 8;
	for (unsigned i = 0; i < cpus; i++, p += 8) {
		p[0] = 0;
		p[1] = 8;
		p[2] = (uint8_t)i; /* processor UID, as in the DSDT */
		p[3] = (uint8_t)i; /* APIC id */
		put_le32(p + 4, MADT_ENABLED);
	}
	p[0] = 1;
	p[1] = 12;
	put_le32(p + 4, IOAPIC_GPA); /* id 0, first GSI 0 */
	p += 12;
	/* None for the PIT: KVM wires it to pin 0 as well as to the 8259, and not to pin 2 as PCs have it. */
	p = put_override(p, ACPI_SCI_GSI, ACPI_SCI_GSI, MADT_HIGH_LEVEL);
	p[0] = 4; /* NMI of the local APICs: LINT1 */
	p[1] = 6;
	p[2] = MADT_ALL_CPUS;
	p[5] = 1;
	p += 6;
	return place_table(layout, t, (uint32_t)(p - t), "APIC", 5, gpa, err);
}

static int place_dsdt(struct layout *layout, unsigned cpus, const struct acpi_config *config, uint64_t *gpa,
		      struct err *err)
{
	struct aml aml = AML_INIT;
	int r;

	if (buf_append(&aml.buf, NULL, HEADER_BYTES, NULL) < 0)
		aml.failed = true;
	acpi_write_dsdt(&aml, layout->mem, cpus, config);
	if (aml.failed)
		r = err_set(err, ERR_FAILED, ENOMEM, "ACPI: no memory for the DSDT");
	else
		r = place_table(layout, aml.buf.data, (uint32_t)aml.buf.length, "DSDT", 2, gpa, err);
	aml_free(&aml);
	return r;
}

static int place_facs(struct layout *layout, uint64_t *gpa, struct err *err)
{
	uint8_t t[FACS_BYTES] = {0};

	memcpy(t, "FACS", 4);
	put_le32(t + 4, FACS_BYTES);
	t[32] = 2; /* version */
	return place_raw(layout, t, FACS_BYTES, FACS_BYTES, gpa, err);
}

static int place_generation(struct mem *mem, const uint8_t *id, struct err *err)
{
	int r = mem_write(mem, ACPI_GENERATION_GPA, generation_mark, sizeof(generation_mark), err);

	return r < 0 ? r : mem_write(mem, acpi_generation_gpa(), id, ACPI_GENERATION_BYTES, err);
}

/* Last: a kernel that scans finds the tables complete or not at all. */
static int write_rsdp(struct mem *mem, uint64_t xsdt, struct err *err)
{
	uint8_t t[RSDP_BYTES] = {0};

	memcpy(t, "RSD PTR ", 8);
	memcpy(t + 9, "VMCP  ", 6);
	t[15] = 2; /* revision */
	put_le32(t + 20, RSDP_BYTES);
	put_le64(t + 24, xsdt); /* no RSDT: the XSDT has been enough since ACPI 2.0 */
	set_checksum(t, 20, t + 8);
	set_checksum(t, RSDP_BYTES, t + 32);
	return mem_write(mem, ACPI_TABLES_GPA, t, RSDP_BYTES, err);
}

int acpi_build_tables(struct mem *mem, unsigned cpus, const struct acpi_config *config, struct err *err)
{
	struct layout layout = {.mem = mem, .next_gpa = ACPI_TABLES_GPA + RSDP_BYTES};
	uint64_t facs, dsdt, fadt, madt, xsdt_gpa;
	uint8_t xsdt[HEADER_BYTES + XSDT_TABLES * 8] = {0};

	if (cpus == 0 || cpus > VM_MAX_CPUS)
		return err_set(err, ERR_USAGE, EINVAL, "ACPI: %u processors, 1 to %u are possible", cpus, VM_MAX_CPUS);
	int r = place_facs(&layout, &facs, err);
	if (r == 0)
		r = place_dsdt(&layout, cpus, config, &dsdt, err);
	if (r == 0)
		r = place_fadt(&layout, config, facs, dsdt, &fadt, err);
	if (r == 0)
		r = place_madt(&layout, cpus, &madt, err);
	if (r == 0 && config->generation_id)
		r = place_generation(mem, config->generation_id, err);
	if (r < 0)
		return r;
	put_le64(xsdt + HEADER_BYTES, fadt);
	put_le64(xsdt + HEADER_BYTES + 8, madt);
	r = place_table(&layout, xsdt, sizeof(xsdt), "XSDT", 1, &xsdt_gpa, err);
	if (r < 0)
		return r;
	return write_rsdp(mem, xsdt_gpa, err);
}

int acpi_build(struct vm *vm, const struct acpi_config *config, struct err *err)
{
	return acpi_build_tables(vm_memory(vm), vm_cpus(vm), config, err);
}

uint64_t acpi_generation_gpa(void) { return ACPI_GENERATION_GPA + GENERATION_ID_OFFSET; }

static bool has_generation(struct mem *mem)
{
	char mark[sizeof(generation_mark)];

	return mem_read(mem, ACPI_GENERATION_GPA, mark, sizeof(mark), NULL) == 0 && memcmp(mark, generation_mark, sizeof(mark)) == 0;
}

bool acpi_set_generation(struct mem *mem, const uint8_t id[ACPI_GENERATION_BYTES])
{
	return has_generation(mem) && mem_write(mem, acpi_generation_gpa(), id, ACPI_GENERATION_BYTES, NULL) == 0;
}

bool acpi_get_generation(struct mem *mem, uint8_t id[ACPI_GENERATION_BYTES])
{
	return has_generation(mem) && mem_read(mem, acpi_generation_gpa(), id, ACPI_GENERATION_BYTES, NULL) == 0;
}
