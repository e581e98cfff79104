/*
 * vCPU threads: in and out of KVM_RUN.
 *
 *     vcpu_thread:  stand_still -> run ... run -> stand_still -> run ...       (stands still while vm->hold is not 0)
 *
 * Every stop ends the instruction whose exit was handled last: KVM keeps the rest of an I/O instruction to itself until
 * the next KVM_RUN, so a state saved before that would lose it or do it twice.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/priority.h"
#include "vmm/vm_internal.h"

#define KICK_SIGNAL SIGRTMIN
#define STACK_BYTES (256u << 10)

/* Counters have one writer, so they need no locked instruction. */
static void count(_Atomic uint64_t *counter)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* --- kick --- */

static void handle_kick(int number) { (void)number; }

int vcpu_init_kick(struct err *err)
{
	/* SA_RESTART: a kick that arrives while a device handler is in a system call must not disturb it. KVM_RUN
	 * returns EINTR anyway. */
	struct sigaction action = {.sa_handler = handle_kick, .sa_flags = SA_RESTART};
	sigemptyset(&action.sa_mask);
	if (sigaction(KICK_SIGNAL, &action, NULL) < 0)
		return err_sys(err, errno, "install the handler of signal %d", KICK_SIGNAL);
	return 0;
}

void vcpu_set_immediate_exit(struct vm *vm, bool on)
{
	for (unsigned i = 0; i < vm->cpus; i++) {
		vcpu_arch_expect_stop(&vm->vcpu[i], on);
		__atomic_store_n(&vm->vcpu[i].run->immediate_exit, on, __ATOMIC_SEQ_CST);
	}
}

void vcpu_kick_all(struct vm *vm)
{
	for (unsigned i = 0; i < vm->cpus; i++)
		if (vm->vcpu[i].thread_started && !pthread_equal(vm->vcpu[i].thread, pthread_self()))
			pthread_kill(vm->vcpu[i].thread, KICK_SIGNAL);
}

/* --- exits --- */

static void fail_vcpu(struct vcpu *vcpu, int number, const char *what)
{
	char where[160];
	struct err err = ERR_INIT;
	vcpu_arch_describe(vcpu, where, sizeof(where));
	err_set(&err, ERR_FAILED, number, "vCPU %u: %s; %s", vcpu->index, what, where);
	vm_fail(vcpu->vm, &err);
}

static void handle_io(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
		if (run->io.direction == KVM_EXIT_IO_OUT)
			bus_write(vcpu->vm->pio, run->io.port, data, run->io.size);
		else
			bus_read(vcpu->vm->pio, run->io.port, data, run->io.size);
	}
	count(&vcpu->io_exits);
}

static void handle_mmio(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	if (run->mmio.is_write)
		bus_write(vcpu->vm->mmio, run->mmio.phys_addr, run->mmio.data, run->mmio.len);
	else
		bus_read(vcpu->vm->mmio, run->mmio.phys_addr, run->mmio.data, run->mmio.len);
	count(&vcpu->mmio_exits);
}

static void handle_internal_error(struct vcpu *vcpu)
{
	const struct kvm_run *run = vcpu->run;
	char text[200];
	int at = snprintf(text, sizeof(text), "KVM internal error, suberror %u%s", run->internal.suberror,
			  run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? " (instruction emulation failed)"
										 : "");
	if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata >= 1 &&
	    (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) {
		at += snprintf(text + at, sizeof(text) - (size_t)at, ", instruction");
		for (unsigned i = 0; i < run->emulation_failure.insn_size && i < 15; i++)
			at += snprintf(text + at, sizeof(text) - (size_t)at, " %02x",
				       run->emulation_failure.insn_bytes[i]);
	}
	fail_vcpu(vcpu, EIO, text);
}

static void handle_system_event(struct vcpu *vcpu)
{
	switch (vcpu->run->system_event.type) {
	case KVM_SYSTEM_EVENT_SHUTDOWN:
		vm_request_stop(vcpu->vm, VM_STOP_POWER_OFF);
		break;
	case KVM_SYSTEM_EVENT_RESET:
		vm_request_stop(vcpu->vm, VM_STOP_RESET);
		break;
	default:
		fail_vcpu(vcpu, EIO, "the guest reported a crash to KVM");
	}
}

static void handle_other_exit(struct vcpu *vcpu)
{
	const struct kvm_run *run = vcpu->run;
	char text[120];
	if (run->exit_reason == KVM_EXIT_FAIL_ENTRY)
		snprintf(text, sizeof(text), "the processor refused to enter the guest, hardware reason 0x%llx",
			 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
	else
		snprintf(text, sizeof(text), "unexpected KVM exit %u", run->exit_reason);
	fail_vcpu(vcpu, EIO, text);
}

static void handle_exit(struct vcpu *vcpu)
{
	count(&vcpu->exits);
	switch (vcpu->run->exit_reason) {
	case KVM_EXIT_IO:
		handle_io(vcpu);
		break;
	case KVM_EXIT_MMIO:
		handle_mmio(vcpu);
		break;
	case KVM_EXIT_HLT:
		count(&vcpu->halts);
		break;
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		break;
	case KVM_EXIT_SHUTDOWN:
		log_info("vCPU %u: triple fault", vcpu->index);
		vm_request_stop(vcpu->vm, VM_STOP_RESET);
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		handle_system_event(vcpu);
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		handle_internal_error(vcpu);
		break;
	default:
		handle_other_exit(vcpu);
	}
}

static void handle_run_error(struct vcpu *vcpu, int number)
{
	char text[160];
	switch (number) {
	case EFAULT:
		snprintf(text, sizeof(text),
			 "KVM cannot reach a page of guest memory: host memory or a layer file is bad or gone");
		break;
	case ENOMEM:
		snprintf(text, sizeof(text), "the host is out of memory");
		break;
	default:
		snprintf(text, sizeof(text), "KVM_RUN: %s", strerrordesc_np(number));
	}
	fail_vcpu(vcpu, number, text);
}

static void note_first_entry(struct vm *vm)
{
	uint64_t none = 0;
	if (atomic_load_explicit(&vm->first_entry_ns, memory_order_relaxed) == 0)
		atomic_compare_exchange_strong(&vm->first_entry_ns, &none, clock_now_ns());
}

/* Enters the guest once and handles what it comes back with. */
static void run_once(struct vcpu *vcpu)
{
	if (ioctl(vcpu->fd, KVM_RUN, NULL) == 0) {
		vcpu->io_unfinished = true;
		handle_exit(vcpu);
		return;
	}
	int number = errno;
	/* KVM ends a pending I/O instruction before it looks for reasons to come back. */
	vcpu->io_unfinished = false;
	if (number == EINTR)
		count(&vcpu->signals);
	else if (number != EAGAIN)
		handle_run_error(vcpu, number);
}

/* --- standing still --- */

/* immediate_exit is set, so KVM_RUN ends the instruction and comes back; an access in several parts exits for each
 * of them. */
static void finish_io(struct vcpu *vcpu)
{
	while (vcpu->io_unfinished)
		run_once(vcpu);
}

static void report_stop(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	bool ours = (atomic_load(&vm->hold) & VM_HOLD_STOP) && !vm->stop_reported;
	if (ours)
		vm->stop_reported = true;
	enum vm_stop_reason reason = vm->stop_reason;
	pthread_mutex_unlock(&vm->lock);
	/* stop_err does not change any more once it was reported and until another state is applied. */
	if (ours && vm->stopped)
		vm->stopped(vm->opaque, reason, reason == VM_STOP_ERROR ? &vm->stop_err : NULL);
}

static void stand_still(struct vcpu *vcpu)
{
	struct vm *vm = vcpu->vm;
	finish_io(vcpu);
	report_stop(vm);
	if (atomic_load(&vm->hold) & VM_HOLD_EXIT)
		return;
	vcpu->save_err = ERR_INIT;
	if (!vcpu->state_applied && !atomic_load(&vm->discard))
		vcpu_arch_save(vcpu, &vcpu->save_err);

	pthread_mutex_lock(&vm->lock);
	if (++vm->standing == vm->cpus)
		pthread_cond_broadcast(&vm->stand_cond);
	unsigned seen = vm->resume_count;
	pthread_mutex_unlock(&vm->lock);
	/* One resume at most: the next one waits for this vCPU to stand again. */
	vm_spin_until(vm, &vm->resume_count, seen + 1);
	pthread_mutex_lock(&vm->lock);
	while (vm->resume_count == seen && !(atomic_load(&vm->hold) & VM_HOLD_EXIT))
		pthread_cond_wait(&vm->resume_cond, &vm->lock);
	if (vm->leaving > 0 && --vm->leaving == 0) {
		vm->resumed_ns = clock_now_ns();
		pthread_cond_broadcast(&vm->stand_cond);
	}
	pthread_mutex_unlock(&vm->lock);
}

static void *run_thread(void *opaque)
{
	struct vcpu *vcpu = opaque;
	struct vm *vm = vcpu->vm;
	char name[16];
	snprintf(name, sizeof(name), "vcpu%u", vcpu->index);
	pthread_setname_np(pthread_self(), name);
	priority_short_slice();
	atomic_store(&vcpu->tid, gettid());
	for (;;) {
		unsigned hold = atomic_load(&vm->hold);
		if (hold & VM_HOLD_EXIT)
			return NULL;
		if (hold) {
			stand_still(vcpu);
			continue;
		}
		if (!atomic_load_explicit(&vcpu->has_run, memory_order_relaxed)) {
			note_first_entry(vm);
			atomic_store(&vcpu->has_run, true);
		}
		vcpu->state_applied = false;
		run_once(vcpu);
	}
}

/* --- life --- */

int vcpu_start_thread(struct vcpu *vcpu, struct err *err)
{
	sigset_t all_but_kick, before;
	pthread_attr_t attr;
	sigfillset(&all_but_kick);
	sigdelset(&all_but_kick, KICK_SIGNAL);
	int number = pthread_attr_init(&attr);
	if (number != 0)
		return err_sys(err, number, "vCPU %u: start its thread", vcpu->index);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	/* The thread inherits the mask: signals meant for the VMM are for its other threads. */
	pthread_sigmask(SIG_SETMASK, &all_but_kick, &before);
	number = pthread_create(&vcpu->thread, &attr, run_thread, vcpu);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	if (number != 0)
		return err_sys(err, number, "vCPU %u: start its thread", vcpu->index);
	vcpu->thread_started = true;
	return 0;
}

int vcpu_create(struct vm *vm, unsigned index, struct err *err)
{
	struct vcpu *vcpu = &vm->vcpu[index];
	vcpu->vm = vm;
	vcpu->index = index;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)index);
	if (vcpu->fd < 0)
		return err_sys(err, errno, "vCPU %u: KVM_CREATE_VCPU", index);
	void *run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (run == MAP_FAILED)
		return err_sys(err, errno, "vCPU %u: map its run area", index);
	vcpu->run = run;
	return 0;
}

void vcpu_destroy(struct vcpu *vcpu)
{
	if (vcpu->run)
		munmap(vcpu->run, vcpu->vm->run_bytes);
	if (vcpu->fd >= 0)
		close(vcpu->fd);
	free(vcpu->state);
	free(vcpu->msr_buffer);
}
