/* The PCI bus on a real VM: its buses and interrupts. Apart from pci.c, so that tests need no KVM. */
#include "devices/pci.h"

static void irq_set(void *opaque, unsigned gsi, bool level) { vm_irq_set(opaque, gsi, level); }

static int msi_send(void *opaque, uint64_t address, uint32_t data, struct err *err)
{
	return vm_msi_send(opaque, address, data, err);
}

/* Size 0: any, as drivers differ in how wide they notify, and the kernel handles those fastest. */
static int ioeventfd(void *opaque, uint64_t address, int fd, bool add, struct err *err)
{
	return vm_ioeventfd(opaque, false, address, 0, fd, add, err);
}

static void reset(void *opaque) { vm_request_stop(opaque, VM_STOP_RESET); }

int pci_bus_create(struct vm *vm, struct pci_bus **out, struct err *err)
{
	const struct pci_platform platform = {
		.pio = vm_pio(vm),
		.mmio = vm_mmio(vm),
		.irq_set = irq_set,
		.msi_send = msi_send,
		.ioeventfd = ioeventfd,
		.reset = reset,
		.opaque = vm,
	};

	return pci_bus_create_on(&platform, out, err);
}
