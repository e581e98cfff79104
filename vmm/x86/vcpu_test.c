/* vCPUs in earnest: run, quiesce, save, load, stop. Needs /dev/kvm, of any kind. */
#include <criterion/criterion.h>
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>

#include "base/buf.h"
#include "base/clock.h"
#include "vmm/x86/state.h"
#include "vmm/x86/test_guest.h"

#define MEMORY_BYTES (32ull << 20)
#define NEED_KVM()                                                                                                     \
	do                                                                                                             \
		if (!test_have_kvm())                                                                                  \
			test_skip("/dev/kvm cannot be opened");                                                        \
	while (0)

struct machine {
	struct vm *vm;
	_Atomic unsigned outs, ins, mmio_writes, stops;
	_Atomic uint32_t last_out, last_mmio;
	enum vm_stop_reason reason;
	struct err stop_err;
	struct component component[VM_MAX_CPUS + 8];
	void *state[VM_MAX_CPUS + 8];
	unsigned components;
};

static void port_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct machine *m = opaque;
	(void)offset;
	uint32_t value = atomic_fetch_add(&m->ins, 1) + 1;
	memcpy(data, &value, size);
}

static void port_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct machine *m = opaque;
	uint32_t value = 0;
	memcpy(&value, data, size);
	atomic_store(&m->last_out, value);
	atomic_fetch_add(&m->outs, 1);
	if (offset == 4)
		vm_request_stop(m->vm, VM_STOP_POWER_OFF);
}

static void mmio_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct machine *m = opaque;
	uint32_t value = 0;
	(void)offset;
	memcpy(&value, data, size < 4 ? size : 4);
	atomic_store(&m->last_mmio, value);
	atomic_fetch_add(&m->mmio_writes, 1);
}

static const struct bus_ops port_ops = {.read = port_read, .write = port_write};
static const struct bus_ops mmio_ops = {.read = port_read, .write = mmio_write};

static void on_stop(void *opaque, enum vm_stop_reason reason, const struct err *err)
{
	struct machine *m = opaque;
	m->reason = reason;
	if (err)
		m->stop_err = *err;
	atomic_fetch_add(&m->stops, 1);
}

static void setup(struct machine *m, unsigned cpus, const uint8_t *code, size_t bytes)
{
	struct err err = ERR_INIT;
	*m = (struct machine){0};
	struct vm_config config = {.memory_bytes = MEMORY_BYTES, .cpus = cpus, .stopped = on_stop, .opaque = m};
	cr_assert_eq(vm_create(&config, &m->vm, &err), 0, "%s", err.message);
	cr_assert_eq(bus_add(vm_pio(m->vm), "port", 0x10, 8, &port_ops, m, &err), 0);
	cr_assert_eq(bus_add(vm_mmio(m->vm), "page", 0xd0000000, 4096, &mmio_ops, m, &err), 0);
	m->components = vm_components(m->vm, m->component);
	for (unsigned i = 0; i < m->components; i++)
		m->state[i] = xcalloc(1, m->component[i].table->size);
	if (!code)
		return;
	cr_assert_eq(test_load_guest(m->vm, code, bytes, &err), 0, "%s", err.message);
	cr_assert_eq(vm_start(m->vm, &err), 0, "%s", err.message);
	cr_assert(vm_is_quiesced(m->vm));
}

static void teardown(struct machine *m)
{
	vm_destroy(m->vm);
	for (unsigned i = 0; i < m->components; i++)
		free(m->state[i]);
}

static void quiesce(struct machine *m)
{
	struct err err = ERR_INIT;
	vm_quiesce_request(m->vm);
	cr_assert_eq(vm_quiesce_wait(m->vm, &err), 0, "%s", err.message);
}

static void capture(struct machine *m)
{
	for (unsigned i = 0; i < m->components; i++)
		cr_assert_eq(m->component[i].capture(m->component[i].opaque, m->state[i], NULL), 0);
}

static void apply(struct machine *to, const struct machine *from)
{
	struct err err = ERR_INIT;
	for (unsigned i = 0; i < to->components; i++) {
		const struct component *c = &to->component[i];
		if (c->validate)
			cr_assert_eq(c->validate(c->opaque, from->state[i], &err), 0, "%s: %s", c->id, err.message);
	}
	for (unsigned i = 0; i < to->components; i++) {
		const struct component *c = &to->component[i];
		cr_assert_eq(c->apply(c->opaque, from->state[i], &err), 0, "%s: %s", c->id, err.message);
	}
}

static void encode(struct machine *m, struct buf *out)
{
	for (unsigned i = 0; i < m->components; i++)
		cr_assert_eq(codec_encode(m->component[i].table, m->state[i], out, NULL), 0);
}

static struct vcpu_state *vcpu_state(struct machine *m, unsigned cpu) { return m->state[3 + cpu]; }

static uint32_t data(struct machine *m, unsigned cpu, unsigned word)
{
	uint32_t value = 0;
	cr_assert_eq(mem_read(vm_memory(m->vm), TEST_DATA_GPA + cpu * 0x100 + word * 4, &value, 4, NULL), 0);
	return value;
}

#define WAIT_FOR(condition)                                                                                            \
	do {                                                                                                           \
		uint64_t end_ = clock_now_ns() + 60000000000ull;                                                       \
		while (!(condition) && clock_now_ns() < end_)                                                          \
			usleep(200);                                                                                   \
		cr_assert(condition);                                                                                  \
	} while (0)

/* mov al,0x41; out dx,al; in eax,dx; mov [ebx],eax; mov dword [0xd0000010],0x1234; hlt; jmp $-1 */
static const uint8_t io_guest[] = {0xb0, 0x41, 0xee, 0xed, 0x89, 0x03, 0xc7, 0x05, 0x10, 0x00,
				   0x00, 0xd0, 0x34, 0x12, 0x00, 0x00, 0xf4, 0xeb, 0xfd};

Test(vcpu, runs_io_mmio_and_halts, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 1, io_guest, sizeof(io_guest));
	cr_expect_eq(vm_first_entry_ns(m.vm), 0);
	uint64_t before = clock_now_ns();
	vm_resume(m.vm, true);
	WAIT_FOR(m.mmio_writes == 1);
	/* Some instructions later. */
	do {
		vm_resume(m.vm, true);
		usleep(20000);
		quiesce(&m);
		capture(&m);
	} while (vcpu_state(&m, 0)->mp_state != KVM_MP_STATE_HALTED && clock_now_ns() < before + 30000000000ull);
	cr_expect_eq(m.last_out, 0x41);
	cr_expect_eq(m.last_mmio, 0x1234);
	cr_expect_eq(data(&m, 0, 0), 1);
	cr_expect_eq(vcpu_state(&m, 0)->mp_state, KVM_MP_STATE_HALTED, "a halted vCPU can be stopped");
	cr_expect(vm_first_entry_ns(m.vm) >= before && vm_first_entry_ns(m.vm) <= clock_now_ns());
	struct vm_counters counters;
	vm_get_counters(m.vm, &counters);
	cr_expect(counters.io_exits == 2 && counters.mmio_exits == 1);
	teardown(&m);
}

/* loop: in eax,dx; inc ecx; mov [ebx],eax; mov [ebx+4],ecx; jmp loop */
static const uint8_t count_guest[] = {0xed, 0x41, 0x89, 0x03, 0x89, 0x4b, 0x04, 0xeb, 0xf7};

/* No `in` is lost or done twice, wherever the kick hits. */
static void stress_kicks(unsigned cpus, unsigned rounds)
{
	struct machine m;
	setup(&m, cpus, count_guest, sizeof(count_guest));
	for (unsigned round = 0; round < rounds; round++) {
		vm_resume(m.vm, round & 1);
		if (round % 3 == 0)
			usleep(round % 200);
		quiesce(&m);
		capture(&m);
		uint64_t sum = 0;
		for (unsigned i = 0; i < cpus; i++)
			/* Read and not yet counted: the instruction is done, rip is behind it. */
			sum += vcpu_state(&m, i)->regs.rcx + (vcpu_state(&m, i)->regs.rip == TEST_CODE_GPA + 1);
		cr_assert_eq(sum, m.ins, "round %u: %llu counted, %u read", round, (unsigned long long)sum, m.ins);
	}
	cr_expect_gt(m.ins, 0);
	teardown(&m);
}

Test(vcpu, kick_is_never_lost_1, .timeout = 120)
{
	NEED_KVM();
	stress_kicks(1, 2000);
}

Test(vcpu, kick_is_never_lost_4, .timeout = 120)
{
	NEED_KVM();
	stress_kicks(4, 500);
}

Test(vcpu, captures_of_one_quiesce_are_identical, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 2, count_guest, sizeof(count_guest));
	vm_resume(m.vm, true);
	WAIT_FOR(m.ins > 100);
	quiesce(&m);
	CLEANUP_BUF struct buf first = BUF_INIT, second = BUF_INIT, third = BUF_INIT;
	capture(&m);
	encode(&m, &first);
	usleep(20000);
	quiesce(&m);
	capture(&m);
	encode(&m, &second);
	cr_expect(first.length == second.length && memcmp(first.data, second.data, first.length) == 0);
	/* A state that was loaded and did not run is that state. */
	apply(&m, &m);
	capture(&m);
	encode(&m, &third);
	cr_expect(first.length == third.length && memcmp(first.data, third.data, first.length) == 0);
	teardown(&m);
}

/* What was saved, and what KVM's ioctls say of the vCPU that stands still. Returns whether KVM_RUN left it in the run area: a vCPU that is asked to
 * stand before it has run again has nothing there. */
static bool compare_registers(struct machine *m, unsigned cpu, bool more)
{
	struct vcpu *vcpu = &m->vm->vcpu[cpu];
	uint64_t left = vcpu->run->s.regs.regs.rflags;
	struct kvm_regs regs = {0};
	struct kvm_sregs2 sregs = {0};
	cr_assert_eq(ioctl(vcpu->fd, KVM_GET_REGS, &regs), 0);
	cr_assert_eq(ioctl(vcpu->fd, KVM_GET_SREGS2, &sregs), 0);
	cr_expect(left == 0 || left == regs.rflags);
	cr_expect_eq(!!(sregs.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID), more);
	cr_expect_eq(memcmp(&vcpu->state->regs, &regs, sizeof(regs)), 0, "vCPU %u", cpu);
	cr_expect_eq(memcmp(&vcpu->state->sregs, &sregs, sizeof(sregs)), 0, "vCPU %u", cpu);
	return left != 0;
}

Test(vcpu, registers_come_with_the_last_exit, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	unsigned came = 0;
	setup(&m, 2, count_guest, sizeof(count_guest));
	if (!m.vm->arch->synced)
		fprintf(stderr, "SKIP: this KVM leaves no registers in the run area\n");
	for (unsigned round = 0; round < 50; round++) {
		vm_resume(m.vm, true);
		unsigned start = m.ins;
		WAIT_FOR(m.ins > start + round % 5);
		quiesce(&m);
		for (unsigned cpu = 0; cpu < 2; cpu++)
			came += compare_registers(&m, cpu, false);
	}
	cr_expect_eq(came > 0, m.vm->arch->synced != 0, "in %u of 100 stops", came);
	teardown(&m);
}

/* jmp $, with PAE paging: four page directory pointers, the first of which leads to a page of 2 MiB. */
Test(vcpu, pae_pointers_are_saved, .timeout = 60)
{
	NEED_KVM();
	static const uint8_t code[] = {0xeb, 0xfe};
	const uint64_t pointers[4] = {0x11001, 0x11001, 0x11001, 0x11001}, directory = 0x83;
	struct machine m;
	struct kvm_sregs sregs;
	setup(&m, 1, code, sizeof(code));
	cr_assert_eq(mem_write(vm_memory(m.vm), 0x10000, pointers, sizeof(pointers), NULL), 0);
	cr_assert_eq(mem_write(vm_memory(m.vm), 0x11000, &directory, sizeof(directory), NULL), 0);
	cr_assert_eq(ioctl(m.vm->vcpu[0].fd, KVM_GET_SREGS, &sregs), 0);
	sregs.cr3 = 0x10000;
	sregs.cr4 |= 0x20;
	sregs.cr0 |= 0x80000000;
	cr_assert_eq(ioctl(m.vm->vcpu[0].fd, KVM_SET_SREGS, &sregs), 0);
	for (unsigned round = 0; round < 5; round++) {
		vm_resume(m.vm, true);
		usleep(2000);
		quiesce(&m);
		if (m.stops > 0) {
			fprintf(stderr, "SKIP: the registers of PAE paging: this KVM runs no such guest (kvm_pvm)\n");
			break;
		}
		compare_registers(&m, 0, true);
		cr_expect_eq(m.vm->vcpu[0].state->sregs.pdptrs[3], 0x11001);
	}
	teardown(&m);
}

Test(vcpu, goes_back_in_place, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 2, count_guest, sizeof(count_guest));
	for (unsigned round = 0; round < 20; round++) {
		vm_resume(m.vm, true);
		unsigned start = m.ins;
		WAIT_FOR(m.ins > start + 20);
		quiesce(&m);
		capture(&m);
		uint64_t rcx[2] = {vcpu_state(&m, 0)->regs.rcx, vcpu_state(&m, 1)->regs.rcx};
		vm_resume(m.vm, true);
		start = m.ins;
		WAIT_FOR(m.ins > start + 20);
		quiesce(&m);
		apply(&m, &m);
		start = m.ins;
		vm_resume(m.vm, true);
		WAIT_FOR(m.ins > start + 20);
		quiesce(&m);
		capture(&m);
		uint64_t more = vcpu_state(&m, 0)->regs.rcx - rcx[0] + vcpu_state(&m, 1)->regs.rcx - rcx[1];
		uint64_t least = m.ins - start;
		cr_assert(more + 2 >= least && more <= least + 2, "%llu counted after %llu reads",
			  (unsigned long long)more, (unsigned long long)least);
	}
	teardown(&m);
}

/* Where the state is to be replaced it need not be saved; a VM that is resumed instead has noticed nothing. */
Test(vcpu, a_quiesce_that_saves_nothing, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	struct err err = ERR_INIT;
	setup(&m, 2, count_guest, sizeof(count_guest));
	vm_resume(m.vm, true);
	for (unsigned round = 0; round < 20; round++) {
		unsigned start = m.ins;
		WAIT_FOR(m.ins > start + 20);
		quiesce(&m);
		capture(&m);
		uint64_t rcx[2] = {vcpu_state(&m, 0)->regs.rcx, vcpu_state(&m, 1)->regs.rcx};
		start = m.ins;
		vm_resume(m.vm, true);
		WAIT_FOR(m.ins > start + 20);
		cr_assert_eq(vm_quiesce_discard(m.vm, &err), 0, "%s", err.message);
		cr_assert(vm_is_quiesced(m.vm));
		if (round % 2 == 0)
			apply(&m, &m);
		unsigned counted = round % 2 == 0 ? 0 : m.ins - start;
		start = m.ins;
		vm_resume(m.vm, true);
		WAIT_FOR(m.ins > start + 20);
		quiesce(&m);
		capture(&m);
		uint64_t more = vcpu_state(&m, 0)->regs.rcx - rcx[0] + vcpu_state(&m, 1)->regs.rcx - rcx[1];
		uint64_t least = m.ins - start + counted;
		cr_assert(more + 4 >= least && more <= least + 4, "round %u: %llu counted after %llu reads", round,
			  (unsigned long long)more, (unsigned long long)least);
		vm_resume(m.vm, true);
	}
	/* One that stands already keeps what it has saved. */
	quiesce(&m);
	CLEANUP_BUF struct buf first = BUF_INIT, second = BUF_INIT;
	capture(&m);
	encode(&m, &first);
	cr_assert_eq(vm_quiesce_discard(m.vm, &err), 0);
	capture(&m);
	encode(&m, &second);
	cr_expect(first.length == second.length && memcmp(first.data, second.data, first.length) == 0);
	teardown(&m);
}

Test(vcpu, a_fresh_vm_takes_the_state, .timeout = 60)
{
	NEED_KVM();
	struct machine a, b;
	setup(&a, 2, count_guest, sizeof(count_guest));
	vm_resume(a.vm, true);
	WAIT_FOR(a.ins > 100);
	quiesce(&a);
	capture(&a);
	/* Through the codec, as from a file. */
	CLEANUP_BUF struct buf file = BUF_INIT, again = BUF_INIT;
	struct err err = ERR_INIT;
	setup(&b, 2, NULL, 0);
	memcpy(mem_base(vm_memory(b.vm)), mem_base(vm_memory(a.vm)), MEMORY_BYTES);
	for (unsigned i = 0; i < a.components; i++) {
		size_t at = file.length;
		const struct codec_table *table = a.component[i].table;
		cr_assert_eq(codec_encode(table, a.state[i], &file, NULL), 0);
		cr_assert_eq(codec_decode(table, file.data + at, file.length - at, b.state[i], &err), 0, "%s",
			     err.message);
	}
	apply(&b, &b);
	cr_assert_eq(vm_start(b.vm, &err), 0, "%s", err.message);
	capture(&b);
	encode(&b, &again);
	cr_expect(file.length == again.length && memcmp(file.data, again.data, file.length) == 0);
	uint64_t rcx = vcpu_state(&a, 0)->regs.rcx + vcpu_state(&a, 1)->regs.rcx;
	vm_resume(b.vm, true);
	WAIT_FOR(b.ins > 100);
	quiesce(&b);
	capture(&b);
	uint64_t now = vcpu_state(&b, 0)->regs.rcx + vcpu_state(&b, 1)->regs.rcx;
	cr_expect(now + 2 >= rcx + b.ins && now <= rcx + b.ins + 2);
	teardown(&a);
	teardown(&b);
}

/* loop: rdtsc; mov [ebx],eax; mov [ebx+4],edx; jmp loop */
static const uint8_t tsc_guest[] = {0x0f, 0x31, 0x89, 0x03, 0x89, 0x53, 0x04, 0xeb, 0xf7};

static uint64_t guest_tsc(struct machine *m, unsigned cpu) { return data(m, cpu, 0) | (uint64_t)data(m, cpu, 1) << 32; }

static bool tsc_can_move(struct machine *m)
{
	uint64_t offset = 0;
	struct kvm_device_attr attr = {
		.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offset};
	cr_assert_eq(ioctl(m->vm->vcpu[0].fd, KVM_GET_DEVICE_ATTR, &attr), 0);
	return offset == m->vm->arch->tsc_offset[0];
}

Test(vcpu, tsc_goes_on_from_the_saved_value, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 2, tsc_guest, sizeof(tsc_guest));
	vm_resume(m.vm, true);
	usleep(50000);
	quiesce(&m);
	capture(&m);
	uint64_t khz = vcpu_state(&m, 0)->tsc_khz, saved = vcpu_state(&m, 0)->tsc;
	cr_expect_eq(saved, vcpu_state(&m, 1)->tsc, "the TSCs of one VM are in step");
	cr_expect(guest_tsc(&m, 0) <= saved && guest_tsc(&m, 0) + 5000 * khz > saved, "guest %llu, saved %llu",
		  (unsigned long long)guest_tsc(&m, 0), (unsigned long long)saved);
	vm_resume(m.vm, true);
	/* Less than a second: KVM would call that "in step" if the TSC were written. */
	usleep(300000);
	quiesce(&m);
	uint64_t applied = clock_now_ns();
	apply(&m, &m);
	if (!tsc_can_move(&m)) {
		fprintf(stderr, "SKIP: half of the test: this KVM shows the guest the host's TSC whatever its offset "
				"(kvm_pvm)\n");
		teardown(&m);
		return;
	}
	vm_resume(m.vm, true);
	usleep(20000);
	quiesce(&m);
	uint64_t since_ms = (clock_now_ns() - applied) / 1000000;
	for (unsigned i = 0; i < 2; i++)
		cr_expect(guest_tsc(&m, i) >= saved && guest_tsc(&m, i) < saved + (since_ms + 50) * khz, "vCPU %u: %lld ms off", i,
			  (long long)(guest_tsc(&m, i) - saved) / (long long)khz);
	capture(&m);
	cr_expect_eq(vcpu_state(&m, 0)->tsc, vcpu_state(&m, 1)->tsc, "still in step");
	teardown(&m);
}

Test(vcpu, clock_goes_back, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 1, count_guest, sizeof(count_guest));
	vm_resume(m.vm, true);
	quiesce(&m);
	capture(&m);
	uint64_t saved = ((struct clock_state *)m.state[0])->kvmclock_ns;
	vm_resume(m.vm, true);
	usleep(300000);
	quiesce(&m);
	uint64_t applied = clock_now_ns();
	apply(&m, &m);
	vm_resume(m.vm, true);
	quiesce(&m);
	capture(&m);
	uint64_t now = ((struct clock_state *)m.state[0])->kvmclock_ns, since = clock_now_ns() - applied;
	cr_expect(now >= saved && now < saved + since + 50000000, "%lld ns off", (long long)(now - saved));
	teardown(&m);
}

/* inc ecx; mov dx,0x14; out dx,al; hlt; jmp $-1 */
static const uint8_t power_off_guest[] = {0x41, 0x66, 0xba, 0x14, 0x00, 0xee, 0xf4, 0xeb, 0xfd};

Test(vcpu, stop_is_reported_once_and_ends_with_another_state, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 2, power_off_guest, sizeof(power_off_guest));
	capture(&m);
	for (unsigned round = 1; round <= 3; round++) {
		vm_resume(m.vm, true);
		WAIT_FOR(m.stops == round);
		cr_expect_eq(m.reason, VM_STOP_POWER_OFF);
		usleep(5000);
		quiesce(&m);
		vm_resume(m.vm, true);
		usleep(5000);
		cr_expect_eq(m.stops, round, "once");
		quiesce(&m);
		apply(&m, &m);
	}
	teardown(&m);
}

Test(vcpu, destroys_a_running_vm, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 4, count_guest, sizeof(count_guest));
	vm_resume(m.vm, false);
	teardown(&m);
	setup(&m, 1, io_guest, sizeof(io_guest));
	vm_resume(m.vm, true);
	WAIT_FOR(m.mmio_writes == 1);
	teardown(&m);
	setup(&m, 2, NULL, 0);
	teardown(&m);
}

/* lidt [ebx+0x80] (limit 0); ud2 */
static const uint8_t triple_fault_guest[] = {0x0f, 0x01, 0x9b, 0x80, 0x00, 0x00, 0x00, 0x0f, 0x0b};

Test(vcpu, a_triple_fault_is_a_reset, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	setup(&m, 1, triple_fault_guest, sizeof(triple_fault_guest));
	vm_resume(m.vm, true);
	WAIT_FOR(m.stops == 1);
	cr_expect_eq(m.reason, VM_STOP_RESET, "%s", m.stop_err.message);
	teardown(&m);
}

Test(vcpu, refuses_a_state_of_another_processor, .timeout = 60)
{
	NEED_KVM();
	struct machine m;
	struct err err = ERR_INIT;
	setup(&m, 1, count_guest, sizeof(count_guest));
	capture(&m);
	const struct component *c = &m.component[3];
	for (uint32_t i = 0; i < vcpu_state(&m, 0)->cpuid_count; i++)
		if (vcpu_state(&m, 0)->cpuid[i].function == 1)
			vcpu_state(&m, 0)->cpuid[i].ecx |= 1u << 5;
	cr_expect_eq(c->validate(c->opaque, vcpu_state(&m, 0), &err), -ENOTSUP);
	cr_expect_eq(err.class, ERR_HOST);
	capture(&m);
	vcpu_state(&m, 0)->xsave_bytes = STATE_MAX_XSAVE + 1;
	cr_expect_lt(c->validate(c->opaque, vcpu_state(&m, 0), &err), 0);
	teardown(&m);
}

Test(vcpu, refuses_bad_configurations)
{
	static const struct vm_config bad[] = {
		{.memory_bytes = MEMORY_BYTES, .cpus = 0},
		{.memory_bytes = MEMORY_BYTES, .cpus = VM_MAX_CPUS + 1},
		{.memory_bytes = MEMORY_BYTES, .cpus = 1, .cpu_model = "z80"},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		struct vm *vm = NULL;
		struct err err = ERR_INIT;
		cr_expect_eq(vm_create(&bad[i], &vm, &err), -EINVAL);
		cr_expect_eq(err.class, ERR_USAGE);
	}
}

/* In a mount namespace of its own, so that it runs where there is a /dev/kvm too. */
Test(vcpu, without_kvm_says_what_to_do)
{
	if (unshare(CLONE_NEWNS) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		test_skip("no mount namespace to hide /dev/kvm in");
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("none", "/dev", "tmpfs", 0, NULL) < 0)
		test_skip("/dev/kvm cannot be hidden");
	struct vm_config config = {.memory_bytes = MEMORY_BYTES, .cpus = 1};
	struct vm *vm = NULL;
	struct err err = ERR_INIT;
	cr_expect_eq(vm_create(&config, &vm, &err), -ENOENT);
	cr_expect_eq(err.class, ERR_HOST);
	cr_expect_not_null(strstr(err.hint, "kvm_intel"));
}
