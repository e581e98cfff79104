/*
 * kvm_floor - what a pause of one vCPU costs at least on this host, without vmcp
 *
 *   kvm_floor [SAMPLES]
 *
 * Does what no checkpoint of a running VM can do without: kicks a vCPU out of guest code that never exits by itself,
 * reads its state and that of the in-kernel interrupt controllers, timer and clock, and lets it enter the guest again. The vCPU's
 * own thread reads its state; the other thread waits awake. Nothing of vmcp is used.
 *
 * Writes one JSON document: for each sample `kick_ns` (request until the vCPU is out), `ioctls_ns` (all state) and
 * `floor_ns` (request until it enters the guest again).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	MEMORY_BYTES = 2 << 20,
	PML4 = 0x1000,
	PDPT = 0x2000,
	DIRECTORY = 0x3000,
	CODE = 0x10000,
	TSS_GPA = 0xfffbd000,
	IDENTITY_MAP_GPA = 0xfffbc000,
	MOST_SAMPLES = 10000,
	MOST_MSRS = 1024,
	MOST_CPUID = 256,
	XSAVE_BYTES = 16384,
	BETWEEN_US = 3000, /* the guest runs for so long between two samples */
};

enum phase { RUN, STOP, SAVED, GO };

struct machine {
	int kvm, vm, vcpu;
	struct kvm_run *run;
	size_t run_bytes;
	uint8_t *memory;
	struct kvm_msr_list *msr_list;
	struct kvm_msrs *msrs;
	uint8_t xsave[XSAVE_BYTES];
	bool xsave2;
	pthread_t thread;
	_Atomic enum phase phase;
	atomic_bool done;
	uint64_t out_ns, saved_ns, enter_ns; /* written by the vCPU's thread before it changes the phase */
};

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "kvm_floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int must(int r, const char *what)
{
	if (r < 0)
		die(what);
	return r;
}

static void *must_alloc(size_t bytes)
{
	void *p = calloc(1, bytes);
	if (!p)
		die("memory");
	return p;
}

/* A spin at CPL 3 in 64-bit mode: the one mode that every kind of KVM runs at full speed. */
static void load_guest(struct machine *m)
{
	static const uint8_t spin[] = {0xf3, 0x90, 0xeb, 0xfc}; /* 1: pause; jmp 1b */
	const uint64_t entry[3][2] = {{PML4, PDPT | 7}, {PDPT, DIRECTORY | 7}, {DIRECTORY, 0x87}};
	for (int i = 0; i < 3; i++)
		memcpy(m->memory + entry[i][0], &entry[i][1], sizeof(uint64_t));
	memcpy(m->memory + CODE, spin, sizeof(spin));
}

static void set_cpuid(struct machine *m)
{
	struct kvm_cpuid2 *cpuid = must_alloc(sizeof(*cpuid) + MOST_CPUID * sizeof(cpuid->entries[0]));
	cpuid->nent = MOST_CPUID;
	must(ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	must(ioctl(m->vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

static void set_registers(struct machine *m)
{
	struct kvm_segment code = {
		.selector = 0x33, .limit = 0xffffffff, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
	struct kvm_segment data = {
		.selector = 0x2b, .limit = 0xffffffff, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1};
	struct kvm_segment task = {.selector = 0x40, .limit = 0x67, .type = 11, .present = 1};
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rsp = CODE};
	struct kvm_sregs sregs;
	must(ioctl(m->vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = task;
	sregs.cr0 = 0x80050033;
	sregs.cr3 = PML4;
	sregs.cr4 = 0x620;
	sregs.efer = 0xd01;
	must(ioctl(m->vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	must(ioctl(m->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void list_msrs(struct machine *m)
{
	m->msr_list = must_alloc(sizeof(*m->msr_list) + MOST_MSRS * sizeof(uint32_t));
	m->msr_list->nmsrs = MOST_MSRS;
	must(ioctl(m->kvm, KVM_GET_MSR_INDEX_LIST, m->msr_list), "KVM_GET_MSR_INDEX_LIST");
	m->msrs = must_alloc(sizeof(*m->msrs) + MOST_MSRS * sizeof(struct kvm_msr_entry));
	/* Only those that can be read here: KVM stops at the first that cannot. */
	for (uint32_t i = 0; i < m->msr_list->nmsrs; i++) {
		struct {
			struct kvm_msrs head;
			struct kvm_msr_entry entry;
		} one = {.head.nmsrs = 1, .entry.index = m->msr_list->indices[i]};
		if (ioctl(m->vcpu, KVM_GET_MSRS, &one) == 1)
			m->msrs->entries[m->msrs->nmsrs++].index = m->msr_list->indices[i];
	}
}

static void make_machine(struct machine *m)
{
	uint64_t identity = IDENTITY_MAP_GPA;
	struct kvm_pit_config pit = {0};
	m->kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	m->vm = must(ioctl(m->kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity), "KVM_SET_IDENTITY_MAP_ADDR");
	must(ioctl(m->vm, KVM_SET_TSS_ADDR, (unsigned long)TSS_GPA), "KVM_SET_TSS_ADDR");
	must(ioctl(m->vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	must(ioctl(m->vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
	m->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (m->memory == MAP_FAILED)
		die("guest memory");
	struct kvm_userspace_memory_region region = {.memory_size = MEMORY_BYTES,
						     .userspace_addr = (uintptr_t)m->memory};
	must(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	m->vcpu = must(ioctl(m->vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	m->run_bytes = (size_t)must(ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	m->run = mmap(NULL, m->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
	if (m->run == MAP_FAILED)
		die("kvm_run");
	int xsave_bytes = ioctl(m->vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	m->xsave2 = xsave_bytes > 0 && xsave_bytes <= XSAVE_BYTES;
	set_cpuid(m);
	load_guest(m);
	set_registers(m);
	list_msrs(m);
}

static void save_vcpu(struct machine *m)
{
	struct kvm_mp_state mp;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_vcpu_events events;
	struct kvm_lapic_state lapic;
	must(ioctl(m->vcpu, KVM_GET_MP_STATE, &mp), "KVM_GET_MP_STATE");
	must(ioctl(m->vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	must(ioctl(m->vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	must(ioctl(m->vcpu, m->xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, m->xsave), "KVM_GET_XSAVE");
	must(ioctl(m->vcpu, KVM_GET_XCRS, &xcrs), "KVM_GET_XCRS");
	must(ioctl(m->vcpu, KVM_GET_DEBUGREGS, &debugregs), "KVM_GET_DEBUGREGS");
	must(ioctl(m->vcpu, KVM_GET_MSRS, m->msrs), "KVM_GET_MSRS");
	must(ioctl(m->vcpu, KVM_GET_VCPU_EVENTS, &events), "KVM_GET_VCPU_EVENTS");
	must(ioctl(m->vcpu, KVM_GET_LAPIC, &lapic), "KVM_GET_LAPIC");
}

static void save_vm(struct machine *m)
{
	struct kvm_irqchip chip;
	struct kvm_pit_state2 pit;
	struct kvm_clock_data clock;
	for (uint32_t id = 0; id < 3; id++) {
		chip.chip_id = id;
		must(ioctl(m->vm, KVM_GET_IRQCHIP, &chip), "KVM_GET_IRQCHIP");
	}
	must(ioctl(m->vm, KVM_GET_PIT2, &pit), "KVM_GET_PIT2");
	must(ioctl(m->vm, KVM_GET_CLOCK, &clock), "KVM_GET_CLOCK");
}

static void on_kick(int number) { (void)number; }

static void *run_vcpu(void *arg)
{
	struct machine *m = arg;
	while (!atomic_load(&m->done)) {
		int r = ioctl(m->vcpu, KVM_RUN, 0);
		if (r == 0) {
			fprintf(stderr, "kvm_floor: the guest left its loop: exit reason %u\n", m->run->exit_reason);
			exit(1);
		}
		if (errno != EINTR)
			die("KVM_RUN");
		if (atomic_load(&m->phase) != STOP)
			continue;
		m->run->immediate_exit = 0;
		m->out_ns = now_ns();
		save_vcpu(m);
		m->saved_ns = now_ns();
		atomic_store(&m->phase, SAVED);
		while (atomic_load(&m->phase) != GO)
			;
		m->enter_ns = now_ns();
		atomic_store(&m->phase, RUN);
	}
	return NULL;
}

static void wait_for(struct machine *m, enum phase phase)
{
	while (atomic_load(&m->phase) != phase)
		;
}

static void take_sample(struct machine *m, bool last)
{
	usleep(BETWEEN_US);
	uint64_t asked = now_ns();
	atomic_store(&m->phase, STOP);
	m->run->immediate_exit = 1;
	pthread_kill(m->thread, SIGUSR1);
	wait_for(m, SAVED);
	uint64_t vm_from = now_ns();
	save_vm(m);
	uint64_t vm_to = now_ns();
	atomic_store(&m->phase, GO);
	wait_for(m, RUN);
	printf("\n{\"kick_ns\": %llu, \"ioctls_ns\": %llu, \"floor_ns\": %llu}%s",
	       (unsigned long long)(m->out_ns - asked), (unsigned long long)(m->saved_ns - m->out_ns + vm_to - vm_from),
	       (unsigned long long)(m->enter_ns - asked), last ? "" : ",");
}

int main(int argc, char **argv)
{
	long samples = argc > 1 ? strtol(argv[1], NULL, 10) : 100;
	struct machine *m = must_alloc(sizeof(*m));
	struct sigaction action = {.sa_handler = on_kick};
	if (argc > 2 || samples < 1 || samples > MOST_SAMPLES) {
		fprintf(stderr, "usage: kvm_floor [1 to %d samples]\n", MOST_SAMPLES);
		return 2;
	}
	make_machine(m);
	sigaction(SIGUSR1, &action, NULL);
	if (pthread_create(&m->thread, NULL, run_vcpu, m) != 0)
		die("thread");
	printf("{\"samples\": [");
	for (long i = 0; i < samples; i++)
		take_sample(m, i + 1 == samples);
	printf("\n]}\n");
	atomic_store(&m->done, true);
	m->run->immediate_exit = 1;
	pthread_kill(m->thread, SIGUSR1);
	pthread_join(m->thread, NULL);
	free(m->msr_list);
	free(m->msrs);
	free(m);
	return 0;
}
