/*
 * The inside of struct vm: for vmm/ only.
 *
 * Locks: vm->lock (who stands still) and each MSI route's lock are leaves; no function holds two of them. Everything
 * else is immutable after vm_create or has one owner, named at the field.
 *
 * Holds. A vCPU runs while vm->hold is 0. Its bits are changed under vm->lock only, together with immediate_exit of
 * every kvm_run area, which is 1 whenever a hold is set. That is what makes a kick impossible to lose: a vCPU that
 * looked at `hold` too early is turned back by KVM_RUN itself, and one that is inside the guest by the signal.
 */
#ifndef VMCP_VMM_VM_INTERNAL_H
#define VMCP_VMM_VM_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#include "base/err.h"
#include "vmm/vm.h"

struct vcpu_state; /* vmm/x86/state.h */
struct vm_arch;

enum vm_hold {
	VM_HOLD_QUIESCE = 1, /* between vm_quiesce_request and vm_resume */
	VM_HOLD_STOP = 2,    /* the guest ended; until another state is applied */
	VM_HOLD_EXIT = 4,    /* vm_destroy: threads end */
};

struct vcpu {
	struct vm *vm;	     /* immutable */
	unsigned index;	     /* immutable; also the APIC id */
	int fd;		     /* immutable */
	struct kvm_run *run; /* the vCPU's thread; immediate_exit, kvm_valid_regs: under vm->lock */
	pthread_t thread;
	bool thread_started; /* controlling thread */
	_Atomic pid_t tid;   /* of the thread, 0 until it runs */

	bool io_unfinished; /* vCPU's thread: the last exit is handled, but KVM has not ended its instruction yet */
	struct vcpu_state *state; /* vCPU's thread while it stops, the controlling thread while it stands still */
	bool state_applied;	  /* `state` was applied and the vCPU has not run since: nothing to save. As `state` */
	bool state_broken;	  /* an apply failed half-way, or nothing was saved: `state` is not what KVM holds. As `state` */
	struct err save_err;	  /* of the last stop. As `state` */
	struct kvm_msrs *msr_buffer; /* as `state` */
	_Atomic bool has_run;	     /* KVM refuses some settings from then on */

	/* Written by the vCPU's thread alone. */
	_Atomic uint64_t exits, io_exits, mmio_exits, halts, signals;
};

struct vm {
	/* Immutable after vm_create. */
	int kvm_fd, fd;
	unsigned cpus;
	const char *cpu_model; /* a constant: see vm_config */
	size_t run_bytes;
	struct mem *memory;
	struct bus *pio, *mmio;
	struct vm_arch *arch; /* contents: controlling thread, vCPUs standing still */
	void (*stopped)(void *opaque, enum vm_stop_reason reason, const struct err *err);
	void *opaque;

	pthread_mutex_t lock;
	pthread_cond_t stand_cond;  /* the last vCPU stands still, or the last one left */
	pthread_cond_t resume_cond; /* resume_count changed */
	_Atomic unsigned hold;	    /* changed under lock */
	_Atomic unsigned standing;  /* changed under lock: vCPU threads that stand still */
	bool spins;		    /* immutable: there are processors to spare for waiting awake */
	_Atomic unsigned leaving;   /* changed under lock: woken by a resume, not yet past the wait */
	uint64_t resumed_ns;	    /* under lock: when `leaving` came to 0 */
	_Atomic unsigned resume_count; /* changed under lock; may wrap */

	bool stop_reported;		 /* under lock */
	enum vm_stop_reason stop_reason; /* under lock; meaningful while VM_HOLD_STOP */
	struct err stop_err;		 /* as stop_reason */

	bool logged; /* controlling thread: KVM logs writes to memory */
	/* Controlling thread; vm_time_ns reads the atomic ones in any. */
	bool started;
	_Atomic bool quiesced;
	_Atomic bool discard;	   /* vCPUs that stop need save nothing */
	_Atomic uint64_t stood_ns; /* since when the guest's time and the host's agree no more */

	_Atomic uint64_t first_entry_ns;
	struct vcpu vcpu[VM_MAX_CPUS]; /* the first `cpus` */
};

/* --- vm.c --- */
/* Shows memory to the guest, a slot for each of its regions in order; or changes whether writes to it are logged. */
int vm_map_memory(struct vm *vm, bool log_writes, struct err *err);
/* The same, and has writes logged, if KVM can. */
int vm_map_private_memory(struct vm *vm, struct err *err);

/* --- vcpu.c --- */
int vcpu_create(struct vm *vm, unsigned index, struct err *err);
void vcpu_destroy(struct vcpu *vcpu);
int vcpu_start_thread(struct vcpu *vcpu, struct err *err);
/* Installs the handler of the signal that gets vCPU threads out of the guest. */
int vcpu_init_kick(struct err *err);
/* Of every vCPU. Under vm->lock; false: all stand still. */
void vcpu_set_immediate_exit(struct vm *vm, bool on);
/* Gets every vCPU out of the guest. Under vm->lock. */
void vcpu_kick_all(struct vm *vm);

/* --- quiesce.c --- */
/*
 * A pause is shorter than falling asleep and being woken again, which takes a processor out of idleness. So both sides first wait
 * awake for as long as a pause may take, for `*value` to become `to`.
 */
void vm_spin_until(const struct vm *vm, const _Atomic unsigned *value, unsigned to);
/* Sets a bit of vm->hold and kicks. Under vm->lock. */
void vm_hold(struct vm *vm, unsigned bit);
/* Forgets that the guest ended: another state was applied. Controlling thread. */
void vm_clear_stop(struct vm *vm);

/* vm.c: appends the names of the capabilities of KVM without which no machine is made. */
int vm_name_capabilities(struct buf *out, struct err *err);

/* --- x86/: what differs between architectures --- */

/* Before the first vCPU: capabilities, irqchip, timer. Sets vm->arch. */
int vm_arch_create(struct vm *vm, struct err *err);
/* The name as a constant; of one that vm_knows_cpu_model knows, or NULL. */
const char *vm_cpu_model_name(const char *name);
/* After the last vCPU: CPUID, what state there is to save. */
int vm_arch_create_vcpus(struct vm *vm, struct err *err);
void vm_arch_destroy(struct vm *vm);
/* While on, KVM_RUN leaves what registers it can in the run area as it comes back, which spares an ioctl for each kind of them. Off: it stands still. */
void vcpu_arch_expect_stop(struct vcpu *vcpu, bool on);
/* Saves the part of a vCPU's state that only the vCPU itself changes. In its own thread, out of KVM_RUN. */
int vcpu_arch_save(struct vcpu *vcpu, struct err *err);
/* Saves the rest, which other vCPUs, timers and the I/O thread change: interrupts, clock. All stand still. */
int vm_arch_save(struct vm *vm, struct err *err);
/* The guest stood still for long and is to go on: its watchdogs should know. */
void vm_arch_excuse_pause(struct vm *vm);
/* Appends "rip 0x... cr3 0x..." or the like to a message about this vCPU. In its thread. */
void vcpu_arch_describe(struct vcpu *vcpu, char *text, size_t bytes);
unsigned vm_arch_components(struct vm *vm, struct component *out);

/* --- for boot --- */

/* The registers that vCPU `cpu` has now: after vm_create those of a processor after reset. */
int vm_get_boot_regs(struct vm *vm, unsigned cpu, struct kvm_regs *regs, struct kvm_sregs *sregs, struct err *err);
/* Sets them, and makes the vCPU runnable (other vCPUs than 0 otherwise wait for INIT and SIPI). Before vm_start. */
int vm_set_boot_regs(struct vm *vm, unsigned cpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs,
		     struct err *err);

#endif
