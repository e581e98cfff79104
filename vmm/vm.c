#include "vmm/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/buf.h"
#include "vmm/vm_internal.h"

/* --- creation --- */

static int open_kvm(struct vm *vm, struct err *err)
{
	vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm_fd < 0) {
		int number = errno;
		err_sys(err, number, "/dev/kvm");
		if (err)
			err->class = ERR_HOST;
		if (number == EACCES || number == EPERM)
			return err_hint(err,
					"join the group kvm (usermod -aG kvm USER, then log in again), or run as root");
		return err_hint(err, "load kvm_intel or kvm_amd, or run inside a machine that has it; see vmcp doctor");
	}
	int version = ioctl(vm->kvm_fd, KVM_GET_API_VERSION, 0);
	if (version != KVM_API_VERSION)
		return err_set(err, ERR_HOST, ENOTSUP, "/dev/kvm: API version %d, not %d", version, KVM_API_VERSION);
	int bytes = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (bytes < (int)sizeof(struct kvm_run))
		return err_set(err, ERR_HOST, ENOTSUP, "/dev/kvm: run area of %d bytes", bytes);
	vm->run_bytes = (size_t)bytes;
	return 0;
}

/* What each machine needs, and each state. */
static const struct {
	int number;
	const char *name;
} needed[] = {
	{KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"},
	{KVM_CAP_PIT2, "KVM_CAP_PIT2"},
	{KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2"},
	{KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"},
	{KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"},
	{KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"},
	{KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"},
	{KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"},
	{KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"},
	{KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"},
	{KVM_CAP_XCRS, "KVM_CAP_XCRS"},
	{KVM_CAP_SREGS2, "KVM_CAP_SREGS2"},
	{KVM_CAP_XSAVE2, "KVM_CAP_XSAVE2"},
	{KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ"},
	{KVM_CAP_VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES"},
};

int vm_name_capabilities(struct buf *out, struct err *err)
{
	int r = 0;
	for (size_t i = 0; i < ARRAY_LENGTH(needed) && r == 0; i++) {
		r = i ? buf_append(out, ", ", 2, err) : 0;
		r = r ? r : buf_append(out, needed[i].name, strlen(needed[i].name), err);
	}
	return r;
}

static int check_capabilities(struct vm *vm, struct err *err)
{
	for (size_t i = 0; i < ARRAY_LENGTH(needed); i++) {
		if (ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, needed[i].number) > 0)
			continue;
		err_set(err, ERR_HOST, ENOTSUP, "/dev/kvm: this kernel's KVM has no %s", needed[i].name);
		return err_hint(err, "Linux 5.17 or later has all that vmcp needs; see vmcp doctor");
	}
	return 0;
}

static int check_config(const struct vm_config *config, struct err *err)
{
	if (config->cpus < 1 || config->cpus > VM_MAX_CPUS)
		return err_set(err, ERR_USAGE, EINVAL, "%u vCPUs: not from 1 to %d", config->cpus, VM_MAX_CPUS);
	if (config->cpu_model && !vm_knows_cpu_model(config->cpu_model)) {
		err_set(err, ERR_USAGE, EINVAL, "CPU model '%s' is not known", config->cpu_model);
		return err_hint(err, "use " VM_CPU_MODELS);
	}
	return 0;
}

/*
 * Before any device is put on KVM's buses: each of those makes Linux 6.18 begin a grace period of SRCU that is in no hurry, and a slot that comes behind
 * it waits for its end, 6.7 ms instead of 0.2. What is mapped into private memory later costs KVM a look at each page, 0.2 ms for 4 GiB.
 */
static int create_memory(struct vm *vm, const struct vm_config *config, struct err *err)
{
	int r = config->private_memory ? mem_create_private(config->memory_bytes, &vm->memory, err)
				       : mem_create_backed(config->memory_bytes, config->memory_backing, &vm->memory, err);
	if (r < 0)
		return r;
	return config->private_memory ? vm_map_private_memory(vm, err) : vm_map_memory(vm, false, err);
}

static int create_kvm_vm(struct vm *vm, struct err *err)
{
	do
		vm->fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0ul);
	while (vm->fd < 0 && errno == EINTR);
	if (vm->fd < 0)
		return err_sys(err, errno, "KVM_CREATE_VM");
	int max = ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
	if (max > 0 && vm->cpus > (unsigned)max)
		return err_set(err, ERR_HOST, EINVAL, "%u vCPUs: this host's KVM has at most %d in a VM", vm->cpus,
			       max);
	return 0;
}

int vm_map_memory(struct vm *vm, bool log_writes, struct err *err)
{
	struct mem_region region[2];
	unsigned n = mem_regions(vm->memory, region);
	for (unsigned slot = 0; slot < n; slot++) {
		struct kvm_userspace_memory_region slot_region = {
			.slot = slot,
			.flags = log_writes ? KVM_MEM_LOG_DIRTY_PAGES : 0,
			.guest_phys_addr = region[slot].gpa,
			.memory_size = region[slot].bytes,
			.userspace_addr = (uintptr_t)(mem_base(vm->memory) + region[slot].ram_offset),
		};
		if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &slot_region) < 0)
			return err_sys(err, errno, "show %llu bytes of memory to the guest at 0x%llx",
				       (unsigned long long)region[slot].bytes, (unsigned long long)region[slot].gpa);
	}
	return 0;
}

static int init_locks(struct vm *vm, struct err *err)
{
	int number = pthread_mutex_init(&vm->lock, NULL);
	if (number == 0)
		number = pthread_cond_init(&vm->stand_cond, NULL);
	if (number == 0)
		number = pthread_cond_init(&vm->resume_cond, NULL);
	return number == 0 ? 0 : err_sys(err, number, "make the VM's locks");
}

static int build(struct vm *vm, const struct vm_config *config, struct err *err)
{
	int r;
	if ((r = init_locks(vm, err)) < 0 || (r = open_kvm(vm, err)) < 0 || (r = check_capabilities(vm, err)) < 0 ||
	    (r = create_kvm_vm(vm, err)) < 0 || (r = create_memory(vm, config, err)) < 0 ||
	    (r = bus_create("I/O port", &vm->pio, err)) < 0 ||
	    (r = bus_create("MMIO", &vm->mmio, err)) < 0 || (r = vm_arch_create(vm, err)) < 0)
		return r;
	for (unsigned i = 0; i < vm->cpus; i++)
		if ((r = vcpu_create(vm, i, err)) < 0)
			return r;
	if ((r = vm_arch_create_vcpus(vm, err)) < 0)
		return r;
	return vcpu_init_kick(err);
}

static bool spare_processors(unsigned vcpus)
{
	cpu_set_t allowed;
	return sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && (unsigned)CPU_COUNT(&allowed) > vcpus;
}

int vm_create(const struct vm_config *config, struct vm **out, struct err *err)
{
	int r = check_config(config, err);
	if (r < 0)
		return r;
	struct vm *vm = xcalloc(1, sizeof(*vm));
	vm->kvm_fd = vm->fd = -1;
	vm->cpus = config->cpus;
	vm->cpu_model = vm_cpu_model_name(config->cpu_model);
	vm->spins = spare_processors(config->cpus);
	vm->stopped = config->stopped;
	vm->opaque = config->opaque;
	for (unsigned i = 0; i < VM_MAX_CPUS; i++)
		vm->vcpu[i].fd = -1;
	r = build(vm, config, err);
	if (r < 0) {
		vm_destroy(vm);
		return r;
	}
	*out = vm;
	return 0;
}

static void end_threads(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm_hold(vm, VM_HOLD_EXIT);
	pthread_cond_broadcast(&vm->resume_cond);
	pthread_mutex_unlock(&vm->lock);
	for (unsigned i = 0; i < vm->cpus; i++)
		if (vm->vcpu[i].thread_started)
			pthread_join(vm->vcpu[i].thread, NULL);
}

void vm_destroy(struct vm *vm)
{
	if (!vm)
		return;
	if (vm->vcpu[0].thread_started)
		end_threads(vm);
	for (unsigned i = 0; i < vm->cpus; i++)
		vcpu_destroy(&vm->vcpu[i]);
	vm_arch_destroy(vm);
	bus_destroy(vm->pio);
	bus_destroy(vm->mmio);
	if (vm->fd >= 0)
		close(vm->fd);
	if (vm->kvm_fd >= 0)
		close(vm->kvm_fd);
	/* After KVM's last reference to the mapping. */
	mem_destroy(vm->memory);
	pthread_cond_destroy(&vm->resume_cond);
	pthread_cond_destroy(&vm->stand_cond);
	pthread_mutex_destroy(&vm->lock);
	free(vm);
}

/* --- accessors --- */

struct mem *vm_memory(struct vm *vm) { return vm->memory; }
struct bus *vm_pio(struct vm *vm) { return vm->pio; }
struct bus *vm_mmio(struct vm *vm) { return vm->mmio; }
unsigned vm_cpus(const struct vm *vm) { return vm->cpus; }
bool vm_is_quiesced(const struct vm *vm) { return vm->quiesced; }
uint64_t vm_first_entry_ns(const struct vm *vm) { return atomic_load(&vm->first_entry_ns); }
unsigned vm_components(struct vm *vm, struct component *out) { return vm_arch_components(vm, out); }

/* State and processor of a thread of ours: fields 3 and 39 of its stat, see proc(5). */
static bool find_processor(pid_t tid, int *processor)
{
	char path[64], text[512], state;
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = '\0';
	/* Behind the name, which may hold anything. */
	const char *at = strrchr(text, ')');
	return at && sscanf(at + 1, " %c%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s%*s"
				    "%*s%*s%*s%*s%*s%*s%*s%*s%*s %d", &state, processor) == 2 && state == 'R';
}

void vm_busy_processors(const struct vm *vm, cpu_set_t *out)
{
	CPU_ZERO(out);
	for (unsigned i = 0; i < vm->cpus; i++) {
		int processor;
		pid_t tid = atomic_load(&vm->vcpu[i].tid);
		if (tid != 0 && find_processor(tid, &processor) && processor >= 0 && processor < CPU_SETSIZE)
			CPU_SET((unsigned)processor, out);
	}
}

void vm_get_counters(const struct vm *vm, struct vm_counters *out)
{
	*out = (struct vm_counters){0};
	for (unsigned i = 0; i < vm->cpus; i++) {
		const struct vcpu *vcpu = &vm->vcpu[i];
		out->exits += atomic_load_explicit(&vcpu->exits, memory_order_relaxed);
		out->io_exits += atomic_load_explicit(&vcpu->io_exits, memory_order_relaxed);
		out->mmio_exits += atomic_load_explicit(&vcpu->mmio_exits, memory_order_relaxed);
		out->halts += atomic_load_explicit(&vcpu->halts, memory_order_relaxed);
		out->signals += atomic_load_explicit(&vcpu->signals, memory_order_relaxed);
	}
}
