/*
 * KVM's dirty log against its dirty ring on this host: what finding the written pages costs, what having their next writes found again costs,
 * and what a write that is found costs the guest. A guest of a few instructions writes pages at a given rate; ten times a second what it wrote is
 * harvested while it runs.
 *
 *     tracker_bench [SECONDS [GUEST_MIB [SET_MIB]]]      2, 1024 and 256 if not given
 *
 * Prints a line for each tracker and rate: medians over the harvests. Takes nothing but /dev/kvm.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"

/* Guest memory: tables, code, what host and guest share, a stack; the working set from 16 MiB on. */
#define TABLES_GPA 0x100000u
#define CODE_GPA   0x200000u
#define SHARED_GPA 0x201000u
#define STACK_GPA  0x210000u
#define SET_GPA	   0x1000000u

#define RING_ENTRIES   65536u
#define CLEAR_PAGES    512u /* as checkpoint/tracker.c */
#define INTERVAL_NS    100000000u
#define MAX_HARVESTS   4096u
#define SLOW_TSC_TICKS 3000u /* a write that took longer met a fault */

/* Written by the guest, but for rate_ticks and pages. */
struct shared {
	uint64_t period_ticks, pages; /* 0: all pages once, in order, then stop */
	uint64_t writes, slow_writes, slow_ticks, filled;
};

struct bench {
	int kvm, vm, vcpu, memfd;
	uint8_t *memory;
	uint64_t memory_bytes, set_pages;
	struct kvm_run *run;
	size_t run_bytes;
	pthread_t thread;
	atomic_bool quit, failed, ring_full;
	volatile struct shared *shared;
	bool ring;
	struct kvm_dirty_gfn *entries;
	uint32_t next; /* of the ring */
	uint64_t *bitmap;
	double ns_per_tick;
};

struct sample {
	double pages, read_us, again_us;
};

static void die(const char *what)
{
	fprintf(stderr, "tracker_bench: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* --- the guest --- */

#define GUEST_CODE __attribute__((section("guest_code"), used, noinline, no_stack_protector))
extern const uint8_t __start_guest_code[], __stop_guest_code[];

GUEST_CODE static void guest_main(volatile struct shared *s)
{
	uint64_t random = 88172645463325252ull, due = 0, pages = s->pages;
	for (uint64_t i = 0; i < pages; i++)
		*(volatile uint64_t *)(SET_GPA + i * 4096) = i + 1;
	s->filled = 1;
	for (;;) {
		uint64_t period = s->period_ticks, before = __builtin_ia32_rdtsc();
		if (before < due)
			continue;
		due = due + period > before - period * 64 ? due + period : before;
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		uint64_t page = (uint64_t)(((unsigned __int128)random * pages) >> 64);
		*(volatile uint64_t *)(SET_GPA + page * 4096) = random;
		uint64_t took = __builtin_ia32_rdtsc() - before;
		s->writes++;
		if (took > SLOW_TSC_TICKS) {
			s->slow_writes++;
			s->slow_ticks += took;
		}
	}
}

/* Long mode at CPL 3, all memory one to one in pages of 2 MiB: the one kind of code that every KVM runs at full speed. */
static void set_registers(struct bench *b)
{
	uint64_t *table = (uint64_t *)(void *)(b->memory + TABLES_GPA), gib = (b->memory_bytes + (1u << 30) - 1) >> 30;
	table[0] = (TABLES_GPA + 0x1000) | 7;
	for (uint64_t g = 0; g < gib; g++) {
		table[512 + g] = (TABLES_GPA + 0x2000 + g * 0x1000) | 7;
		for (uint64_t i = 0; i < 512; i++)
			table[1024 + g * 512 + i] = (g << 30 | i << 21) | 0x87;
	}
	struct kvm_sregs s;
	if (ioctl(b->vcpu, KVM_GET_SREGS, &s) < 0)
		die("KVM_GET_SREGS");
	struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1};
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.cs = data;
	s.cs.selector = 0x33;
	s.cs.type = 11;
	s.cs.db = 0;
	s.cs.l = 1;
	s.cr0 = 0x80050033;
	s.cr3 = TABLES_GPA;
	s.cr4 = 0x20;
	s.efer = 0x500;
	if (ioctl(b->vcpu, KVM_SET_SREGS, &s) < 0)
		die("KVM_SET_SREGS");
	struct kvm_regs r = {
		.rip = CODE_GPA + (uint64_t)((const uint8_t *)(uintptr_t)guest_main - __start_guest_code),
		.rdi = SHARED_GPA,
		.rsp = STACK_GPA - 8,
		.rflags = 2,
	};
	if (ioctl(b->vcpu, KVM_SET_REGS, &r) < 0)
		die("KVM_SET_REGS");
}

static void on_signal(int number) { (void)number; }

static void *vcpu_main(void *opaque)
{
	struct bench *b = opaque;
	while (!atomic_load(&b->quit)) {
		if (ioctl(b->vcpu, KVM_RUN, 0) < 0 && errno != EINTR && errno != EAGAIN)
			break;
		if (b->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
			atomic_store(&b->ring_full, true);
			while (atomic_load(&b->ring_full) && !atomic_load(&b->quit))
				usleep(20);
		} else if (b->run->exit_reason != KVM_EXIT_INTR && b->run->exit_reason != KVM_EXIT_IRQ_WINDOW_OPEN) {
			fprintf(stderr, "tracker_bench: exit %u\n", b->run->exit_reason);
			break;
		}
	}
	atomic_store(&b->failed, !atomic_load(&b->quit));
	return NULL;
}

/* --- the VM --- */

static void enable_tracker(struct bench *b)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL, .args = {RING_ENTRIES * sizeof(struct kvm_dirty_gfn)}};
	if (!b->ring) {
		cap.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
		cap.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	} else if (ioctl(b->vm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) <= 0) {
		cap.cap = KVM_CAP_DIRTY_LOG_RING;
	}
	if (ioctl(b->vm, KVM_ENABLE_CAP, &cap) < 0)
		die(b->ring ? "dirty ring" : "dirty log");
}

static void start(struct bench *b, uint64_t memory_bytes, uint64_t set_bytes)
{
	b->memory_bytes = memory_bytes;
	b->set_pages = set_bytes / PAGE_BYTES;
	b->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	b->vm = b->kvm < 0 ? -1 : ioctl(b->kvm, KVM_CREATE_VM, 0);
	if (b->vm < 0)
		die("/dev/kvm");
	enable_tracker(b);
	b->memfd = memfd_create("guest", MFD_CLOEXEC);
	if (b->memfd < 0 || ftruncate(b->memfd, (off_t)memory_bytes) != 0)
		die("memfd");
	b->memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->memfd, 0);
	b->bitmap = calloc(memory_bytes / PAGE_BYTES / 64, 8);
	if (b->memory == MAP_FAILED || !b->bitmap)
		die("guest memory");
	struct kvm_userspace_memory_region region = {
		.flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = memory_bytes, .userspace_addr = (uintptr_t)b->memory};
	if (ioctl(b->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		die("KVM_SET_USER_MEMORY_REGION");
	b->vcpu = ioctl(b->vm, KVM_CREATE_VCPU, 0);
	b->run_bytes = (size_t)ioctl(b->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	b->run = b->vcpu < 0 ? MAP_FAILED : mmap(NULL, b->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->vcpu, 0);
	if (b->run == MAP_FAILED)
		die("vCPU");
	if (b->ring) {
		b->entries = mmap(NULL, RING_ENTRIES * sizeof(*b->entries), PROT_READ | PROT_WRITE, MAP_SHARED, b->vcpu,
				  (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_BYTES);
		if (b->entries == MAP_FAILED)
			die("mapping the ring");
	}
	memcpy(b->memory + CODE_GPA, __start_guest_code, (size_t)(__stop_guest_code - __start_guest_code));
	b->shared = (volatile struct shared *)(void *)(b->memory + SHARED_GPA);
	b->shared->pages = b->set_pages;
	set_registers(b);
	if (pthread_create(&b->thread, NULL, vcpu_main, b) != 0)
		die("thread");
}

static void stop(struct bench *b)
{
	atomic_store(&b->quit, true);
	b->run->immediate_exit = 1;
	pthread_kill(b->thread, SIGUSR1);
	pthread_join(b->thread, NULL);
	munmap(b->run, b->run_bytes);
	if (b->entries)
		munmap(b->entries, RING_ENTRIES * sizeof(*b->entries));
	close(b->vcpu);
	close(b->vm);
	close(b->kvm);
	munmap(b->memory, b->memory_bytes);
	close(b->memfd);
	free(b->bitmap);
}

/* --- harvests --- */

static void harvest_log(struct bench *b, struct sample *s)
{
	uint64_t words = b->memory_bytes / PAGE_BYTES / 64, pages = 0;
	uint64_t start_ns = clock_now_ns();
	struct kvm_dirty_log log = {.dirty_bitmap = b->bitmap};
	if (ioctl(b->vm, KVM_GET_DIRTY_LOG, &log) < 0)
		die("KVM_GET_DIRTY_LOG");
	uint64_t read_ns = clock_now_ns();
	for (uint64_t first = 0; first < words;) {
		uint64_t end = first, some = 0;
		while (end < words && some < CLEAR_PAGES)
			some += (uint64_t)__builtin_popcountll(b->bitmap[end++]);
		struct kvm_clear_dirty_log clear = {
			.first_page = first * 64, .num_pages = (uint32_t)(end - first) * 64, .dirty_bitmap = b->bitmap + first};
		if (some && ioctl(b->vm, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
			die("KVM_CLEAR_DIRTY_LOG");
		pages += some;
		first = end;
	}
	*s = (struct sample){.pages = (double)pages, .read_us = (double)(read_ns - start_ns) / 1e3, .again_us = (double)(clock_now_ns() - read_ns) / 1e3};
}

static void harvest_ring(struct bench *b, struct sample *s)
{
	uint64_t start_ns = clock_now_ns(), pages = 0;
	for (;; pages++) {
		struct kvm_dirty_gfn *entry = &b->entries[b->next % RING_ENTRIES];
		if (pages == RING_ENTRIES || !(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			break;
		b->bitmap[entry->offset / 64] |= (uint64_t)1 << entry->offset % 64;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		b->next++;
	}
	uint64_t read_ns = clock_now_ns();
	if (pages && ioctl(b->vm, KVM_RESET_DIRTY_RINGS, 0) < 0)
		die("KVM_RESET_DIRTY_RINGS");
	atomic_store(&b->ring_full, false);
	*s = (struct sample){.pages = (double)pages, .read_us = (double)(read_ns - start_ns) / 1e3, .again_us = (double)(clock_now_ns() - read_ns) / 1e3};
}

static void harvest(struct bench *b, struct sample *s)
{
	if (b->ring)
		harvest_ring(b, s);
	else
		harvest_log(b, s);
	if (atomic_load(&b->failed))
		exit(1);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

static double median(const struct sample *samples, unsigned count, size_t offset)
{
	static double values[MAX_HARVESTS];
	for (unsigned i = 0; i < count; i++)
		memcpy(&values[i], (const char *)&samples[i] + offset, sizeof(values[i]));
	qsort(values, count, sizeof(values[0]), compare);
	return values[count / 2];
}

static void measure(struct bench *b, uint64_t rate, unsigned seconds)
{
	static struct sample samples[MAX_HARVESTS];
	unsigned count = 0;
	b->shared->period_ticks = (uint64_t)(1e9 / (double)rate / b->ns_per_tick);
	usleep(300000);
	harvest(b, &samples[0]);
	uint64_t start_ns = clock_now_ns(), writes = b->shared->writes, slow = b->shared->slow_writes, ticks = b->shared->slow_ticks;
	for (uint64_t due = start_ns + INTERVAL_NS; count < MAX_HARVESTS && due <= start_ns + seconds * 1000000000ull; due += INTERVAL_NS) {
		uint64_t now = clock_now_ns();
		if (due > now)
			usleep((useconds_t)((due - now) / 1000));
		harvest(b, &samples[count++]);
	}
	double took = (double)(clock_now_ns() - start_ns);
	writes = b->shared->writes - writes;
	slow = b->shared->slow_writes - slow;
	ticks = b->shared->slow_ticks - ticks;
	double pages = median(samples, count, offsetof(struct sample, pages)), read = median(samples, count, offsetof(struct sample, read_us)),
	       again = median(samples, count, offsetof(struct sample, again_us));
	printf("%-4s %7llu/s  %6.0f pages  found in %7.1f us  again %7.1f us, %5.2f us a page  slow writes %6llu, %5.1f us each  guest at %3.0f %%\n",
	       b->ring ? "ring" : "log", (unsigned long long)rate, pages, read, again, pages > 0 ? again / pages : 0, (unsigned long long)slow,
	       slow ? (double)ticks * b->ns_per_tick / 1e3 / (double)slow : 0, (double)writes * 1e11 / took / (double)rate);
	fflush(stdout);
}

static double calibrate(void)
{
	uint64_t ns = clock_now_ns(), ticks = __builtin_ia32_rdtsc();
	usleep(50000);
	return (double)(clock_now_ns() - ns) / (double)(__builtin_ia32_rdtsc() - ticks);
}

int main(int argc, char **argv)
{
	static const uint64_t rates[] = {1000, 10000, 100000};
	unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 2;
	uint64_t memory_mib = argc > 2 ? strtoull(argv[2], NULL, 10) : 1024, set_mib = argc > 3 ? strtoull(argv[3], NULL, 10) : 256;
	if (seconds < 1 || memory_mib < 64 || memory_mib > 65536 || set_mib < 1 || set_mib + 16 > memory_mib) {
		fprintf(stderr, "usage: tracker_bench [SECONDS [GUEST_MIB [SET_MIB]]]\n");
		return 2;
	}
	signal(SIGUSR1, on_signal);
	for (int ring = 0; ring < 2; ring++) {
		struct bench b = {.ring = ring, .ns_per_tick = calibrate()};
		struct sample ignored;
		start(&b, memory_mib << 20, set_mib << 20);
		while (!b.shared->filled) {
			usleep(1000);
			harvest(&b, &ignored);
		}
		for (size_t i = 0; i < sizeof(rates) / sizeof(rates[0]); i++)
			measure(&b, rates[i], seconds);
		stop(&b);
	}
	return 0;
}
