/* Finds out what a kernel file is, and has it loaded. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "vmm/vm_internal.h"
#include "vmm/x86/boot_internal.h"

static int refuse_unknown(const uint8_t *head, uint64_t bytes, struct err *err)
{
	err_set(err, ERR_USAGE, ENOEXEC, "neither a Linux bzImage nor an ELF with a PVH note");
	if (bytes >= 2 && head[0] == 0x1f && head[1] == 0x8b)
		return err_hint(err, "the file is compressed with gzip: unpack it first");
	if (bytes >= 4 && memcmp(head, "\x28\xb5\x2f\xfd", 4) == 0)
		return err_hint(err, "the file is compressed with zstd: unpack it first");
	return err_hint(err, "give a kernel such as Debian's /boot/vmlinuz-*, or an ELF file with a PVH entry note");
}

int boot_load_memory(struct mem *mem, const struct boot_config *config, struct boot_cpu *cpu, struct err *err)
{
	struct boot_image kernel;
	uint8_t head[BOOT_PROBE_BYTES];

	int r = boot_image_open("kernel", config->kernel, &kernel, err);
	if (r < 0)
		return r;
	uint64_t head_bytes = min_u64(sizeof(head), kernel.bytes);
	r = boot_image_read(&kernel, 0, head, head_bytes, err);
	if (r < 0)
		r = err_prefix(err, "kernel %s", kernel.path);
	else if (boot_linux_probe(head, head_bytes))
		r = boot_linux_load(mem, &kernel, config, cpu, err);
	else if (boot_pvh_probe(head, head_bytes))
		r = boot_pvh_load(mem, &kernel, config, cpu, err);
	else if ((r = refuse_unknown(head, head_bytes, err)) < 0)
		r = err_prefix(err, "kernel %s", kernel.path);
	boot_image_close(&kernel);
	return r;
}

int boot_load(struct vm *vm, const struct boot_config *config, struct err *err)
{
	struct boot_cpu cpu;

	int r = vm_get_boot_regs(vm, 0, &cpu.regs, &cpu.sregs, err);
	if (r < 0)
		return r;
	r = boot_load_memory(vm_memory(vm), config, &cpu, err);
	if (r < 0)
		return r;
	return vm_set_boot_regs(vm, 0, &cpu.regs, &cpu.sregs, err);
}
