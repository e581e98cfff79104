/*
 * Interrupts from devices to the guest, and doorbells from the guest to devices.
 *
 * MSIs are sent by KVM_SIGNAL_MSI and not through an irqfd: an irqfd may hand the interrupt to a kernel worker, which
 * would deliver it after the vCPU's interrupt state was saved, so that a checkpoint would lose it. The ioctl has
 * delivered when it returns, costs the same system call, and needs no rewriting of the routing table when the guest
 * moves a vector.
 */
#include <errno.h>
#include <sys/ioctl.h>

#include "base/log.h"
#include "vmm/vm_internal.h"

void vm_irq_set(struct vm *vm, unsigned gsi, bool level)
{
	struct kvm_irq_level line = {.irq = gsi, .level = level};
	if (gsi >= VM_GSI_PINS || ioctl(vm->fd, KVM_IRQ_LINE, &line) < 0)
		log_error("interrupt line %u: KVM_IRQ_LINE failed: errno %d", gsi, errno);
}

int vm_msi_send(struct vm *vm, uint64_t address, uint32_t data, struct err *err)
{
	struct kvm_msi msi = {.address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};
	/* 0 means that the guest blocked it, as it may. */
	if (ioctl(vm->fd, KVM_SIGNAL_MSI, &msi) < 0)
		return err_sys(err, errno, "MSI address 0x%llx data 0x%x", (unsigned long long)address, data);
	return 0;
}

int vm_ioeventfd(struct vm *vm, bool pio, uint64_t address, unsigned size, int fd, bool add, struct err *err)
{
	struct kvm_ioeventfd io = {.addr = address, .len = size, .fd = fd};
	if (pio)
		io.flags |= KVM_IOEVENTFD_FLAG_PIO;
	if (!add)
		io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	if (ioctl(vm->fd, KVM_IOEVENTFD, &io) < 0)
		return err_sys(err, errno, "%s doorbell at %s 0x%llx, %u bytes", add ? "add" : "remove",
			       pio ? "port" : "address", (unsigned long long)address, size);
	return 0;
}
