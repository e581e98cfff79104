/*
 * A KVM virtual machine: the kernel's VM with its irqchip and PIT, memory, buses and vCPU threads.
 *
 *     CREATED --vm_start--> QUIESCED <--vm_resume / vm_quiesce*--> RUNNING     any --> vm_destroy
 *
 * Quiescing stops every vCPU at an instruction boundary with no half-done I/O exit; each vCPU thread saves its own
 * registers on its way out, and the VM's irqchips and clock are saved once all stand still. Until vm_resume that saved
 * state *is* the VM's state: checkpoints of a VM that stands still all see the same instant.
 *
 * State is applied (see vm_components) in CREATED or QUIESCED, directly by the calling thread, which gets the errors.
 * It is then the VM's state, and the guest's time runs on from it. After a failed apply the VM's state is unknown:
 * apply another or destroy.
 *
 * A guest that ends (VM_STOP_*) makes the vCPUs stand still by themselves. Such a VM can be quiesced, its state
 * captured and another applied, which makes it runnable again; vm_resume alone does not.
 *
 * A plain pause does not stop the guest's clocks. After more than a second the guest is told (KVM_KVMCLOCK_CTRL), so
 * that its watchdogs keep quiet.
 *
 * Threads: vm_start, vm_quiesce*, vm_resume, vm_state_* from one controlling thread at a time (never a vCPU or the I/O
 * thread).
 */
#ifndef VMCP_VMM_VM_H
#define VMCP_VMM_VM_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "vmm/bus.h"
#include "vmm/memory.h"

#define VM_MAX_CPUS 64

/* Interrupt lines (GSI) 0-23: the IOAPIC's pins. */
#define VM_GSI_PINS 24

enum vm_stop_reason {
	VM_STOP_POWER_OFF, /* the guest powered off */
	VM_STOP_RESET,	   /* the guest asked for a reset, or a triple fault */
	VM_STOP_ERROR,	   /* KVM cannot go on; the error says why */
};

struct vm;

struct vm_config {
	uint64_t memory_bytes;
	enum mem_backing memory_backing; /* not of private memory, whose pages are small */
	bool private_memory; /* mem_create_private: files will be mapped into it */
	unsigned cpus;
	const char *cpu_model; /* one of VM_CPU_MODELS, NULL: host. Another: ERR_USAGE; more than this host has: ERR_HOST with the list */
	/* Called once from a vCPU thread each time the guest stops by itself; err is set for VM_STOP_ERROR, else
	 * NULL. Must not block, nor call functions of the controlling thread. */
	void (*stopped)(void *opaque, enum vm_stop_reason reason, const struct err *err);
	void *opaque;
};

#define VM_CPU_MODELS "host, x86-64-v1, x86-64-v2 or x86-64-v3"
bool vm_knows_cpu_model(const char *name);

/* Opens /dev/kvm, makes the VM, its memory, irqchip, PIT and vCPUs (not running). KVM logs writes to private memory from here on,
 * if it can. No usable KVM: ERR_HOST with a hint. */
int vm_create(const struct vm_config *config, struct vm **out, struct err *err);
/* Stops and joins the vCPU threads if they run. */
void vm_destroy(struct vm *vm);

struct mem *vm_memory(struct vm *vm);
struct bus *vm_pio(struct vm *vm);
struct bus *vm_mmio(struct vm *vm);
unsigned vm_cpus(const struct vm *vm);

/* Threads of the vCPUs come to life, quiesced: vm_resume lets them run. Boot state or an applied state is in place
 * by then. */
int vm_start(struct vm *vm, struct err *err);

/* Asks every vCPU to stop: returns at once. Allocates nothing. */
void vm_quiesce_request(struct vm *vm);
/* Waits until all stand still and have saved their state, then saves interrupt state, irqchips, PIT and clock. I/O
 * threads must be parked by then, else an interrupt that one of them raises may be in memory but not in the saved
 * state. On failure the VM is still quiesced and may be resumed. Idempotent: quiesces nest not; a second call while
 * quiesced does nothing. */
int vm_quiesce_wait(struct vm *vm, struct err *err);
/*
 * Quiesces a running VM whose state is about to be replaced: request and wait, but nothing is saved. The caller either applies
 * a state to every one of vm_components, or resumes the VM, which goes on as if nothing had been; it captures nothing before.
 * A VM that is quiesced already stays as it is. Allocates nothing.
 */
int vm_quiesce_discard(struct vm *vm, struct err *err);
/* All vCPUs run again. Allocates nothing. `wait`: return only when the last vCPU thread is on its way into the
 * guest; that takes a scheduler's time slices where there are more vCPUs than host processors, though the others run
 * meanwhile. Does nothing to a VM that was not asked to quiesce. */
void vm_resume(struct vm *vm, bool wait);
/* CLOCK_MONOTONIC of the last vCPU's leaving for the guest at the last vm_resume that waited. */
uint64_t vm_resumed_ns(const struct vm *vm);
bool vm_is_quiesced(const struct vm *vm);
/* CLOCK_MONOTONIC, held at the instant of the quiesce while the VM stands: for devices that count time, so that all captures of one
 * quiesce see the same. Any thread while the VM runs; the controlling one while it stands. */
uint64_t vm_time_ns(const struct vm *vm);
/* CLOCK_MONOTONIC of the first entry into the guest after vm_start, 0 before. */
uint64_t vm_first_entry_ns(const struct vm *vm);

/* The host's processors on which vCPUs run at this moment; halted and waiting ones are left out. For threads that would rather be
 * elsewhere. Any thread; reads procfs, some 20 us a vCPU. */
void vm_busy_processors(const struct vm *vm, cpu_set_t *out);

/* The VM's own components, in the order in which they are applied: "kvm-clock", "irqchip", "pit", then "vcpu"
 * 0..n-1. capture copies what the last quiesce saved. Returns how many; out has room for VM_MAX_CPUS + 8. The tables
 * are the VM's. */
unsigned vm_components(struct vm *vm, struct component *out);

/* --- interrupts --- */

/* Level of a line; thread-safe. Used by ISA devices and INTx. GSI n is IOAPIC pin n, below 16 the PICs' input n too
 * (so ISA interrupt 0, the PIT, is IOAPIC pin 0). The level of a line is not part of the irqchip's state: a device
 * drives its line anew in apply. */
void vm_irq_set(struct vm *vm, unsigned gsi, bool level);
/* Sends one MSI, from any thread. It is delivered when this returns, so a checkpoint cannot fall between. */
int vm_msi_send(struct vm *vm, uint64_t address, uint32_t data, struct err *err);

/* A guest write of `size` bytes (1, 2, 4; 0: any size) to a port or address signals `fd` in the kernel, without an
 * exit. Undo with add = false. */
int vm_ioeventfd(struct vm *vm, bool pio, uint64_t address, unsigned size, int fd, bool add, struct err *err);

/* --- for devices that end the machine --- */
void vm_request_stop(struct vm *vm, enum vm_stop_reason reason); /* from a bus handler or any thread */
/* Stops the VM for a reason that only KVM or the VMM knows: VM_STOP_ERROR. Any thread; the first call wins. */
void vm_fail(struct vm *vm, const struct err *err);
/* True if the guest stopped by itself and no other state was applied since; why goes to *reason and, for VM_STOP_ERROR,
 * *err. Any thread. */
bool vm_has_stopped(struct vm *vm, enum vm_stop_reason *reason, struct err *err);

/* --- counters, for stats --- */
struct vm_counters {
	uint64_t exits, io_exits, mmio_exits, halts, signals;
};
void vm_get_counters(const struct vm *vm, struct vm_counters *out);

#endif
