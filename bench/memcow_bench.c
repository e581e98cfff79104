/*
 * What memory copy-on-write costs by itself, without a VM: one thread writes pages of a memfd at a given rate and
 * measures the longest gap between two of its steps; checkpoints are taken meanwhile. Prints one line per memory size
 * with medians and worst cases, and the ratio to the first size.
 *
 *     memcow_bench FILE [ROUNDS [PAGES_PER_SECOND [MIB...]]]     FILE: a scratch layer file on the filesystem to be
 * measured
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/memcow.h"

enum stage { STAGE_REST, STAGE_ARM, STAGE_INSTANT, STAGE_SAVE, STAGE_COUNT };
static const char *const stage_names[STAGE_COUNT] = {"rest", "arm", "instant", "save"};

struct guest {
	uint8_t *base;
	uint64_t pages, rate;
	pthread_t thread;
	sem_t go;
	atomic_int stage;
	atomic_bool stop, standing, quit;
	_Atomic uint64_t gap[STAGE_COUNT], steps;
};

#define MAX_ROUNDS 1000
struct sample {
	uint64_t instant_ns, pause_ns, arm_ns, durable_ns, again, passes, arm_faults, faults, p50, p99, p999, max,
		throttled;
	uint64_t gap[STAGE_COUNT];
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* 90 of 100 writes go to a sixteenth of the working set, which is at most 512 MiB. */
static uint64_t choose_page(const struct guest *g, uint64_t r)
{
	uint64_t set = min_u64(g->pages * 3 / 4, (512u << 20) / PAGE_BYTES);
	return (r >> 16) % (r % 100 < 90 ? set / 16 : set);
}

static void *guest_main(void *opaque)
{
	struct guest *g = opaque;
	uint64_t random = 88172645463325252ull, last = clock_now_ns(), due = last;
	while (!atomic_load_explicit(&g->quit, memory_order_relaxed)) {
		if (atomic_load_explicit(&g->stop, memory_order_acquire)) {
			atomic_store(&g->standing, true);
			sem_wait(&g->go); /* asleep, as a stopped vCPU */
			atomic_store(&g->standing, false);
			due = clock_now_ns();
		}
		uint64_t now = clock_now_ns();
		int stage = atomic_load_explicit(&g->stage, memory_order_relaxed);
		if (now - last > atomic_load_explicit(&g->gap[stage], memory_order_relaxed))
			atomic_store_explicit(&g->gap[stage], now - last, memory_order_relaxed);
		last = now;
		if (now < due)
			continue;
		due = max_u64(due + 1000000000 / g->rate, now - 1000000);
		uint64_t r = next_random(&random);
		*(volatile uint64_t *)(void *)(g->base + choose_page(g, r) * PAGE_BYTES + (r >> 52) / 8 * 8) = r | 1;
		atomic_fetch_add_explicit(&g->steps, 1, memory_order_relaxed);
	}
	return NULL;
}

static void set_stage(struct guest *g, enum stage stage) { atomic_store(&g->stage, stage); }

static int take(struct guest *g, struct memcow *cow, int fd, int sums_fd, struct sample *s, struct err *err)
{
	for (int i = 0; i < STAGE_COUNT; i++)
		atomic_store(&g->gap[i], 0);
	set_stage(g, STAGE_REST);
	usleep(50000);
	uint64_t start = clock_now_ns();
	set_stage(g, STAGE_ARM);
	struct memcow_target target = {.fd = fd, .sums_fd = sums_fd};
	int r = memcow_arm(cow, &target, err);
	if (r != 0)
		return r;
	set_stage(g, STAGE_INSTANT);
	uint64_t t0 = clock_now_ns();
	atomic_store(&g->stop, true);
	while (!atomic_load(&g->standing))
		__builtin_ia32_pause();
	uint64_t t1 = clock_now_ns();
	r = memcow_instant(cow, NULL, err);
	uint64_t t2 = clock_now_ns();
	atomic_store(&g->stop, false);
	sem_post(&g->go);
	while (atomic_load(&g->standing))
		__builtin_ia32_pause();
	s->pause_ns = clock_now_ns() - t0;
	s->instant_ns = t2 - t1;
	set_stage(g, STAGE_SAVE);
	if (r != 0)
		return r;
	memcow_save(cow);
	r = memcow_finish(cow, NULL, err);
	if (r != 0)
		return r;
	fdatasync(fd);
	s->durable_ns = clock_now_ns() - start;
	set_stage(g, STAGE_REST);
	struct memcow_stats stats;
	memcow_get_stats(cow, &stats);
	s->arm_ns = stats.arm_ns;
	s->again = stats.armed_again_pages;
	s->passes = stats.arm_passes;
	s->arm_faults = stats.arm_faults;
	s->faults = stats.cow_faults;
	s->p50 = stats.cow_fault_p50_ns;
	s->p99 = stats.cow_fault_p99_ns;
	s->p999 = stats.cow_fault_p999_ns;
	s->max = stats.cow_fault_max_ns;
	s->throttled = stats.throttled;
	for (int i = 0; i < STAGE_COUNT; i++)
		s->gap[i] = atomic_load(&g->gap[i]);
	return 0;
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static struct {
	uint64_t median, worst;
} result;
static void summarise(const struct sample *samples, unsigned count, size_t offset)
{
	uint64_t values[MAX_ROUNDS];
	for (unsigned i = 0; i < count; i++)
		memcpy(&values[i], (const char *)&samples[i] + offset, sizeof(values[i]));
	qsort(values, count, sizeof(values[0]), compare_u64);
	result.median = values[count / 2];
	result.worst = values[count - 1];
}

static void print_us(const char *name, const struct sample *samples, unsigned count, size_t offset, double *median)
{
	summarise(samples, count, offset);
	printf("  %-22s median %10.1f us   worst %10.1f us", name, (double)result.median / 1e3,
	       (double)result.worst / 1e3);
	if (median && *median == 0)
		*median = (double)result.median;
	else if (median)
		printf("   %.2f x of the first size", (double)result.median / *median);
	printf("\n");
}

static void print_count(const char *name, const struct sample *samples, unsigned count, size_t offset)
{
	summarise(samples, count, offset);
	printf("  %-22s median %10llu      worst %10llu\n", name, (unsigned long long)result.median,
	       (unsigned long long)result.worst);
}

static double first_pause, first_instant;

static void report(uint64_t mib, const struct sample *s, unsigned n)
{
	printf("%llu MiB, %u checkpoints\n", (unsigned long long)mib, n);
	print_us("pause (no vCPU)", s, n, offsetof(struct sample, pause_ns), &first_pause);
	print_us("memcow_instant", s, n, offsetof(struct sample, instant_ns), &first_instant);
	for (int i = 0; i < STAGE_COUNT; i++) {
		char name[32];
		snprintf(name, sizeof(name), "longest gap, %s", stage_names[i]);
		print_us(name, s, n, offsetof(struct sample, gap) + (size_t)i * 8, NULL);
	}
	print_us("arm", s, n, offsetof(struct sample, arm_ns), NULL);
	print_us("fault p50", s, n, offsetof(struct sample, p50), NULL);
	print_us("fault p99", s, n, offsetof(struct sample, p99), NULL);
	print_us("fault p99.9", s, n, offsetof(struct sample, p999), NULL);
	print_us("fault max", s, n, offsetof(struct sample, max), NULL);
	print_us("durable", s, n, offsetof(struct sample, durable_ns), NULL);
	print_count("armed again in pause", s, n, offsetof(struct sample, again));
	print_count("arm passes", s, n, offsetof(struct sample, passes));
	print_count("arm faults", s, n, offsetof(struct sample, arm_faults));
	print_count("faults", s, n, offsetof(struct sample, faults));
	print_count("throttled", s, n, offsetof(struct sample, throttled));
	fflush(stdout);
}

static int open_scratch(const char *path, const char *suffix, uint64_t bytes)
{
	char name[4096];
	snprintf(name, sizeof(name), "%s%s", path, suffix);
	unlink(name);
	int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	unlink(name);
	return fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 ? fd : -1;
}

static int measure(const char *path, uint64_t mib, unsigned rounds, uint64_t rate, struct err *err)
{
	static struct sample samples[MAX_ROUNDS];
	struct guest guest = {.rate = rate};
	struct mem *mem;
	struct memcow *cow;
	int r = mem_create(mib << 20, &mem, err);
	if (r != 0)
		return r;
	guest.base = mem_base(mem);
	guest.pages = mem_pages(mem);
	/* Three quarters are populated; an eighth of these are zero. */
	for (uint64_t p = 0; p < guest.pages * 3 / 4; p++)
		*(volatile uint64_t *)(void *)(guest.base + p * PAGE_BYTES) = p % 8 ? p : 0;
	r = memcow_create(mem, true, &cow, err);
	if (r != 0)
		return r;
	sem_init(&guest.go, 0, 0);
	r = -pthread_create(&guest.thread, NULL, guest_main, &guest);
	for (unsigned i = 0; i < rounds && r == 0; i++) {
		int fd = open_scratch(path, "", mib << 20),
		    sums_fd = open_scratch(path, ".sums", (mib << 20) / PAGE_BYTES * 8);
		if (fd < 0 || sums_fd < 0)
			return err_sys(err, errno, "%s", path);
		r = take(&guest, cow, fd, sums_fd, &samples[i], err);
		close(fd);
		close(sums_fd);
	}
	atomic_store(&guest.quit, true);
	sem_post(&guest.go);
	pthread_join(guest.thread, NULL);
	if (r == 0)
		report(mib, samples, rounds);
	memcow_destroy(cow);
	mem_destroy(mem);
	return r;
}

int main(int argc, char **argv)
{
	static const char *const default_sizes[] = {"256", "1024", "4096"};
	struct err err = ERR_INIT;
	if (argc < 2) {
		fprintf(stderr, "usage: memcow_bench FILE [ROUNDS [PAGES_PER_SECOND [MIB...]]]\n");
		return 2;
	}
	unsigned rounds = argc > 2 ? (unsigned)atoi(argv[2]) : 20;
	uint64_t rate = argc > 3 ? (uint64_t)atoll(argv[3]) : 100000;
	if (rounds < 1 || rounds > MAX_ROUNDS || rate < 1 || fault_init(&err) != 0)
		return 2;
	int sizes = argc > 4 ? argc - 4 : 3;
	for (int i = 0; i < sizes; i++) {
		uint64_t mib = strtoull(argc > 4 ? argv[4 + i] : default_sizes[i], NULL, 10);
		if (measure(argv[1], mib, rounds, rate, &err) != 0) {
			fprintf(stderr, "memcow_bench: %s\n", err.message);
			return 1;
		}
	}
	return 0;
}
