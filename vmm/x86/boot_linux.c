/*
 * Linux bzImage by the 64-bit boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).
 *
 * A bzImage is a real-mode part of 1 + setup_sects sectors, whose header at 0x1f1 describes the image, and the
 * protected-mode part, entered 0x200 bytes from its start.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "vmm/acpi.h"
#include "vmm/x86/boot_internal.h"

/* The setup header: offsets are the same in the file and in boot_params. */
#define HDR_SETUP_SECTS	     0x1f1
#define HDR_SYSSIZE	     0x1f4
#define HDR_VID_MODE	     0x1fa
#define HDR_BOOT_FLAG	     0x1fe
#define HDR_JUMP_LENGTH	     0x201
#define HDR_MAGIC	     0x202
#define HDR_VERSION	     0x206
#define HDR_TYPE_OF_LOADER   0x210
#define HDR_LOADFLAGS	     0x211
#define HDR_CODE32_START     0x214
#define HDR_RAMDISK_IMAGE    0x218
#define HDR_RAMDISK_SIZE     0x21c
#define HDR_CMD_LINE_PTR     0x228
#define HDR_INITRD_ADDR_MAX  0x22c
#define HDR_KERNEL_ALIGNMENT 0x230
#define HDR_RELOCATABLE	     0x234
#define HDR_XLOADFLAGS	     0x236
#define HDR_CMDLINE_SIZE     0x238
#define HDR_PREF_ADDRESS     0x258
#define HDR_INIT_SIZE	     0x260
#define HDR_FIXED_END	     0x264 /* end of what protocol 2.12 has */

#define LOADED_HIGH	     0x01
#define XLF_KERNEL_64	     0x01
#define VERSION_64_BIT_ENTRY 0x20c
#define LOADER_UNDEFINED     0xff /* "no assigned id" */
#define VID_MODE_NORMAL	     0xffff

/* Fields of boot_params outside the header. */
#define BP_ACPI_RSDP_ADDR   0x070
#define BP_E820_ENTRIES	    0x1e8
#define BP_HDR_MAX_END	    0x290
#define BP_E820_TABLE	    0x2d0
#define BP_E820_ENTRY_BYTES 20

#define SECTOR_BYTES	512u
#define ENTRY_64_OFFSET 0x200u

struct linux_image {
	uint8_t head[BOOT_PROBE_BYTES];
	uint64_t header_end;	 /* of the setup header in `head` */
	uint64_t payload_offset; /* in the file */
	uint64_t payload_bytes;
	uint64_t load_gpa;
	uint64_t runtime_end_gpa; /* the kernel uses memory up to here before it reads the memory map */
};

int boot_linux_probe(const uint8_t *head, uint64_t bytes)
{
	return bytes >= HDR_FIXED_END && get_le16(head + HDR_BOOT_FLAG) == 0xaa55 &&
	       memcmp(head + HDR_MAGIC, "HdrS", 4) == 0;
}

static int refuse(struct err *err, const char *why)
{
	err_set(err, ERR_DAMAGED, EINVAL, "damaged bzImage header: %s", why);
	return err_hint(err, "check that the kernel file is complete, for example by unpacking its package again");
}

/* Takes what the loader needs from the header, and refuses what cannot be. */
static int parse_header(const struct boot_image *kernel, struct linux_image *image, struct err *err)
{
	const uint8_t *head = image->head;
	uint64_t setup_sects = head[HDR_SETUP_SECTS] ? head[HDR_SETUP_SECTS] : 4; /* 0 means 4, for kernels of old */

	if (get_le16(head + HDR_VERSION) < VERSION_64_BIT_ENTRY || !(get_le16(head + HDR_XLOADFLAGS) & XLF_KERNEL_64)) {
		err_set(err, ERR_USAGE, ENOEXEC, "a Linux kernel without a 64-bit entry (boot protocol %u.%02u)",
			head[HDR_VERSION + 1], head[HDR_VERSION]);
		return err_hint(err, "use an x86-64 kernel, Linux 3.8 or later");
	}
	if (!(head[HDR_LOADFLAGS] & LOADED_HIGH))
		return refuse(err, "not a bzImage (the kernel is not loaded high)");
	image->header_end = HDR_MAGIC + (uint64_t)head[HDR_JUMP_LENGTH];
	if (image->header_end < HDR_FIXED_END || image->header_end > BP_HDR_MAX_END)
		return refuse(err, "its length is impossible");
	image->payload_offset = (setup_sects + 1) * SECTOR_BYTES;
	image->payload_bytes = (uint64_t)get_le32(head + HDR_SYSSIZE) * 16;
	if (image->payload_bytes <= ENTRY_64_OFFSET)
		return refuse(err, "no room for the 64-bit entry");
	/* syszize is in units of 16 bytes, so the last unit may be cut short. */
	if (image->payload_offset + ENTRY_64_OFFSET >= kernel->bytes ||
	    image->payload_offset + image->payload_bytes - 15 > kernel->bytes) {
		err_set(err, ERR_DAMAGED, ENODATA, "truncated: the header tells of %llu bytes, the file has %llu",
			(unsigned long long)(image->payload_offset + image->payload_bytes),
			(unsigned long long)kernel->bytes);
		return err_hint(err, "unpack or copy the kernel again");
	}
	image->payload_bytes = min_u64(image->payload_bytes, kernel->bytes - image->payload_offset);
	return 0;
}

/* Where the kernel goes: its preferred address. A relocatable one below it would move itself there to decompress, so
 * nothing is won by loading lower, whatever the memory size. */
static int place_kernel(struct mem *mem, struct linux_image *image, struct err *err)
{
	const uint8_t *head = image->head;
	uint64_t gpa = get_le64(head + HDR_PREF_ADDRESS);
	uint64_t alignment = get_le32(head + HDR_KERNEL_ALIGNMENT);
	uint64_t needed = max_u64(get_le32(head + HDR_INIT_SIZE), image->payload_bytes);

	if (head[HDR_RELOCATABLE]) {
		if (alignment == 0 || (alignment & (alignment - 1)) != 0)
			return refuse(err, "kernel_alignment is no power of two");
		if (gpa > UINT64_MAX - alignment)
			return refuse(err, "pref_address is absurd");
		gpa = round_up(max_u64(gpa, BOOT_HIGH_MEMORY_GPA), alignment);
	} else if (gpa < BOOT_HIGH_MEMORY_GPA) {
		return refuse(err, "pref_address is below 1 MiB");
	}
	if (!range_within(gpa, needed, boot_low_ram_end(mem))) {
		err_set(err, ERR_USAGE, ENOMEM, "the kernel needs %llu MiB from 0x%llx on, the guest has %llu MiB",
			(unsigned long long)div_round_up(needed, 1 << 20), (unsigned long long)gpa,
			(unsigned long long)(mem_size(mem) >> 20));
		return err_hint(err, "give the guest more memory");
	}
	image->load_gpa = gpa;
	image->runtime_end_gpa = gpa + needed;
	return 0;
}

static void fill_memory_map(const struct mem *mem, uint8_t *params)
{
	struct boot_range map[BOOT_MAP_MAX];
	unsigned n = boot_memory_map(mem, map);

	params[BP_E820_ENTRIES] = (uint8_t)n;
	for (unsigned i = 0; i < n; i++) {
		uint8_t *entry = params + BP_E820_TABLE + i * BP_E820_ENTRY_BYTES;
		put_le64(entry, map[i].gpa);
		put_le64(entry + 8, map[i].bytes);
		put_le32(entry + 16, map[i].type);
	}
}

static int write_boot_params(struct mem *mem, const struct linux_image *image, const struct boot_blob *initrd,
			     struct err *err)
{
	uint8_t *params = mem_at(mem, BOOT_PARAMS_GPA, PAGE_BYTES, true);

	if (!params)
		return err_set(err, ERR_FAILED, EFAULT, "no guest memory for boot parameters at 0x%x", BOOT_PARAMS_GPA);
	memset(params, 0, PAGE_BYTES);
	memcpy(params + HDR_SETUP_SECTS, image->head + HDR_SETUP_SECTS, image->header_end - HDR_SETUP_SECTS);
	put_le16(params + HDR_VID_MODE, VID_MODE_NORMAL);
	params[HDR_TYPE_OF_LOADER] = LOADER_UNDEFINED;
	params[HDR_LOADFLAGS] = LOADED_HIGH; /* drops CAN_USE_HEAP, KEEP_SEGMENTS, QUIET: none applies to this entry */
	put_le32(params + HDR_CODE32_START, (uint32_t)image->load_gpa);
	put_le32(params + HDR_RAMDISK_IMAGE, (uint32_t)initrd->gpa);
	put_le32(params + HDR_RAMDISK_SIZE, (uint32_t)initrd->bytes);
	put_le32(params + HDR_CMD_LINE_PTR, BOOT_CMDLINE_GPA);
	put_le64(params + BP_ACPI_RSDP_ADDR, ACPI_TABLES_GPA);
	fill_memory_map(mem, params);
	return 0;
}

int boot_linux_load(struct mem *mem, const struct boot_image *kernel, const struct boot_config *config,
		    struct boot_cpu *cpu, struct err *err)
{
	struct linux_image image = {0};
	struct boot_blob initrd;
	int r;

	r = boot_image_read(kernel, 0, image.head, min_u64(kernel->bytes, sizeof(image.head)), err);
	if (r == 0)
		r = parse_header(kernel, &image, err);
	if (r == 0)
		r = place_kernel(mem, &image, err);
	if (r == 0)
		r = boot_image_load(kernel, image.payload_offset, mem, image.load_gpa, image.payload_bytes, err);
	if (r < 0)
		return err_prefix(err, "kernel %s", kernel->path);

	uint64_t ceiling = min_u64(boot_low_ram_end(mem), (uint64_t)get_le32(image.head + HDR_INITRD_ADDR_MAX) + 1);
	r = boot_load_initrd(mem, config->initrd, image.runtime_end_gpa, ceiling, &initrd, err);
	if (r < 0)
		return r;
	r = boot_load_cmdline(mem, config->cmdline, get_le32(image.head + HDR_CMDLINE_SIZE), err);
	if (r < 0)
		return r;
	r = write_boot_params(mem, &image, &initrd, err);
	if (r < 0)
		return r;
	r = boot_cpu_long_mode(mem, cpu, err);
	if (r < 0)
		return r;
	cpu->regs.rip = image.load_gpa + ENTRY_64_OFFSET;
	cpu->regs.rsi = BOOT_PARAMS_GPA;
	return 0;
}
