/*
 * The VM's life: start, quiesce, resume, and the end that the guest chooses.
 *
 *                 vm_quiesce_request           last vCPU stands           vm_quiesce_wait
 *     RUNNING ------------------------> STOPPING ----------------> STANDING ---------------> QUIESCED
 *        ^                                                                                       |
 *        +------------------------------------- vm_resume ---------------------------------------+
 *
 * vm_start goes the same way from the first step on. A guest that ends (VM_HOLD_STOP) makes the vCPUs stand too, and a
 * resume leaves them standing until another state was applied.
 */
#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "vmm/vm_internal.h"

/* A guest that stood still for longer is told so: a soft lockup watchdog barks after 20 s, some after much less. */
#define EXCUSE_AFTER_NS 1000000000ull

/* Longer than a pause. */
#define SPIN_NS 500000u

void vm_hold(struct vm *vm, unsigned bit)
{
	vcpu_set_immediate_exit(vm, true);
	atomic_fetch_or(&vm->hold, bit);
	vcpu_kick_all(vm);
}

int vm_start(struct vm *vm, struct err *err)
{
	if (vm->started)
		return err_set(err, ERR_STATE, EINVAL, "the VM is started already");
	vm_quiesce_request(vm);
	/* From here on vm_destroy ends what threads there are. */
	for (unsigned i = 0; i < vm->cpus; i++) {
		int r = vcpu_start_thread(&vm->vcpu[i], err);
		if (r < 0)
			return r;
	}
	vm->started = true;
	return vm_quiesce_wait(vm, err);
}

void vm_quiesce_request(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	if (!(atomic_load(&vm->hold) & VM_HOLD_QUIESCE))
		vm_hold(vm, VM_HOLD_QUIESCE);
	pthread_mutex_unlock(&vm->lock);
}

void vm_spin_until(const struct vm *vm, const _Atomic unsigned *value, unsigned to)
{
	/* Before it has run first it stands for no pause, and other VMs may be starting too. */
	uint64_t until = clock_now_ns() + (vm->spins && atomic_load(&vm->resume_count) > 0 ? SPIN_NS : 0);
	while (atomic_load(value) != to && clock_now_ns() < until)
		__builtin_ia32_pause();
}

static void wait_until_standing(struct vm *vm)
{
	vm_spin_until(vm, &vm->standing, vm->cpus);
	pthread_mutex_lock(&vm->lock);
	while (vm->standing < vm->cpus)
		pthread_cond_wait(&vm->stand_cond, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
}

int vm_quiesce_wait(struct vm *vm, struct err *err)
{
	if (!vm->started)
		return err_set(err, ERR_STATE, EINVAL, "the VM is not started");
	if (vm->quiesced)
		return 0;
	vm_quiesce_request(vm);
	wait_until_standing(vm);
	/* In this order, for vm_time_ns in an I/O thread that is not parked. */
	vm->stood_ns = clock_now_ns();
	vm->quiesced = true;
	int r = vm_arch_save(vm, err);
	for (unsigned i = 0; i < vm->cpus && r == 0; i++) {
		const struct err *failed = &vm->vcpu[i].save_err;
		if (failed->number == 0)
			continue;
		if (err)
			*err = *failed;
		r = -failed->number;
	}
	return r;
}

int vm_quiesce_discard(struct vm *vm, struct err *err)
{
	if (!vm->started)
		return err_set(err, ERR_STATE, EINVAL, "the VM is not started");
	if (vm->quiesced)
		return 0;
	atomic_store(&vm->discard, true);
	vm_quiesce_request(vm);
	wait_until_standing(vm);
	atomic_store(&vm->discard, false);
	vm->stood_ns = clock_now_ns();
	vm->quiesced = true;
	for (unsigned i = 0; i < vm->cpus; i++)
		vm->vcpu[i].state_broken = true;
	return 0;
}

static void wait_until_left(struct vm *vm)
{
	vm_spin_until(vm, &vm->leaving, 0);
	pthread_mutex_lock(&vm->lock);
	while (vm->leaving > 0)
		pthread_cond_wait(&vm->stand_cond, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
}

static void release(struct vm *vm, bool wait)
{
	pthread_mutex_lock(&vm->lock);
	bool go = (atomic_fetch_and(&vm->hold, ~(unsigned)VM_HOLD_QUIESCE) & ~(unsigned)VM_HOLD_QUIESCE) == 0;
	if (go) {
		vcpu_set_immediate_exit(vm, false);
		vm->standing = 0;
		vm->leaving = vm->cpus;
		vm->resume_count++;
		pthread_cond_broadcast(&vm->resume_cond);
	}
	pthread_mutex_unlock(&vm->lock);
	if (go && wait)
		wait_until_left(vm);
}

void vm_resume(struct vm *vm, bool wait)
{
	if (!vm->started || !(atomic_load(&vm->hold) & VM_HOLD_QUIESCE))
		return;
	/* A request that nobody waited for is taken back. */
	if (!vm->quiesced) {
		wait_until_standing(vm);
		vm->stood_ns = clock_now_ns();
	}
	/* Before the vCPUs go, as it asks for them. */
	if (clock_now_ns() - vm->stood_ns > EXCUSE_AFTER_NS)
		vm_arch_excuse_pause(vm);
	vm->quiesced = false;
	release(vm, wait);
}

uint64_t vm_resumed_ns(const struct vm *vm) { return vm->resumed_ns; }

uint64_t vm_time_ns(const struct vm *vm) { return vm->quiesced ? vm->stood_ns : clock_now_ns(); }

/* --- the guest ends --- */

static void stop(struct vm *vm, enum vm_stop_reason reason, const struct err *err)
{
	pthread_mutex_lock(&vm->lock);
	if (!(atomic_load(&vm->hold) & VM_HOLD_STOP)) {
		vm->stop_reason = reason;
		vm->stop_err = err ? *err : ERR_INIT;
		vm->stop_reported = false;
		vm_hold(vm, VM_HOLD_STOP);
	}
	pthread_mutex_unlock(&vm->lock);
}

void vm_request_stop(struct vm *vm, enum vm_stop_reason reason)
{
	struct err err = ERR_INIT;
	if (reason == VM_STOP_ERROR)
		err_set(&err, ERR_FAILED, EIO, "a device cannot go on");
	stop(vm, reason, &err);
}

void vm_fail(struct vm *vm, const struct err *err)
{
	log_error("%s", err->message);
	stop(vm, VM_STOP_ERROR, err);
}

bool vm_has_stopped(struct vm *vm, enum vm_stop_reason *reason, struct err *err)
{
	pthread_mutex_lock(&vm->lock);
	bool stopped = atomic_load(&vm->hold) & VM_HOLD_STOP;
	if (stopped)
		*reason = vm->stop_reason;
	if (stopped && err && vm->stop_reason == VM_STOP_ERROR)
		*err = vm->stop_err;
	pthread_mutex_unlock(&vm->lock);
	return stopped;
}

void vm_clear_stop(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	atomic_fetch_and(&vm->hold, ~(unsigned)VM_HOLD_STOP);
	pthread_mutex_unlock(&vm->lock);
}
