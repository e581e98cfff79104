/*
 * Stress of memory copy-on-write with writer threads in the guest's place: they write random pages all the time, stand
 * still for the instant only, and every checkpoint's file must equal the memory of that instant. Plain program, so that
 * it also runs under ThreadSanitizer.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/memcow.h"
#include "checkpoint/sums.h"
#include "tests/lib/check.h"

#define MEMORY_BYTES (32ull << 20)
#define WRITERS	     3
#define ROUNDS	     12
#define GIVE_BACK_PAGES 8u

struct machine {
	struct mem *mem;
	uint8_t *base;
	uint64_t pages;
	pthread_t threads[WRITERS];
	pthread_mutex_t lock;
	pthread_cond_t cond;
	unsigned standing; /* under lock */
	bool stop, quit;   /* under lock */
	atomic_bool asked; /* stop or quit is set */
	atomic_bool calm;  /* few writes, to few pages */
	_Atomic uint64_t steps, given_back;

	/* In the place of checkpoint/tracker.h. */
	_Atomic uint64_t *log;	 /* pages written; set behind the write */
	uint64_t *since, *fresh; /* the main thread's */
	uint32_t *list;		 /* words of `fresh` that are not 0 */
	struct page_words written;
	uint8_t *image;		 /* the memory that the layers made so far hold together; the main thread's */
};

struct writer_args {
	struct machine *m;
	unsigned number;
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* True when the thread is to end. */
static bool stand_still(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	m->standing++;
	pthread_cond_broadcast(&m->cond);
	while (m->stop && !m->quit)
		pthread_cond_wait(&m->cond, &m->lock);
	m->standing--;
	bool quit = m->quit;
	pthread_mutex_unlock(&m->lock);
	return quit;
}

/* As a balloon does. While a checkpoint protects memory it is refused. */
static int give_back(struct machine *m, uint64_t page)
{
	int r = mem_give_back(m->mem, page * PAGE_BYTES, GIVE_BACK_PAGES * PAGE_BYTES, NULL);
	for (unsigned i = 0; i < GIVE_BACK_PAGES && r == 0; i++)
		bitmap_claim(m->log, page + i);
	return r;
}

static void *writer_main(void *opaque)
{
	struct writer_args args = *(struct writer_args *)opaque;
	struct machine *m = args.m;
	uint64_t random = 0x9e3779b97f4a7c15ull * (args.number + 1);
	for (;;) {
		if (atomic_load(&m->asked) && stand_still(m))
			return NULL;
		uint64_t r = next_random(&random);
		/* A quarter of the memory is hot, the last quarter is rarely touched and starts unpopulated. */
		uint64_t span = r & 1 ? m->pages / 4 : r & 62 ? m->pages * 3 / 4 : m->pages;
		if (atomic_load(&m->calm)) {
			span = m->pages / 16;
			usleep(20);
		}
		uint64_t page = (r >> 8) % span;
		/* Each writer has its own words of a page, so that the threads do not race among themselves. */
		uint64_t *word = (uint64_t *)(void *)(m->base + page * PAGE_BYTES) + args.number * 64 + (r >> 48) % 64;
		__atomic_store_n(word, (r & 0x700) == 0 ? 0 : r, __ATOMIC_RELAXED);
		if ((r & 0xff000000000) == 0)
			__atomic_store_n(word, 0, __ATOMIC_RELAXED);
		bitmap_claim(m->log, page);
		if ((r & 0x1ff000000000) == 0 && give_back(m, page < span - GIVE_BACK_PAGES ? page : 0) == 0)
			atomic_fetch_add_explicit(&m->given_back, 1, memory_order_relaxed);
		atomic_fetch_add_explicit(&m->steps, 1, memory_order_relaxed);
		if ((r & 0xff) == 0)
			(void)*(volatile uint8_t *)(m->base + ((r >> 20) % m->pages) * PAGE_BYTES +
						    3000); /* reads populate */
	}
}

static void machine_stop(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	m->stop = true;
	atomic_store(&m->asked, true);
	while (m->standing < WRITERS)
		pthread_cond_wait(&m->cond, &m->lock);
	pthread_mutex_unlock(&m->lock);
}

static void machine_go(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	m->stop = false;
	atomic_store(&m->asked, m->quit);
	pthread_cond_broadcast(&m->cond);
	pthread_mutex_unlock(&m->lock);
}

static int make_file(void)
{
	char path[] = "memcow_test.XXXXXX"; /* in the build tree: a real filesystem, so that O_DIRECT is met */
	int fd = mkstemp(path);
	if (fd >= 0)
		unlink(path);
	return fd;
}

static bool test_page_zero(const uint8_t *page)
{
	static const uint8_t zero[PAGE_BYTES];
	return memcmp(page, zero, PAGE_BYTES) == 0;
}

static void harvest(struct machine *m)
{
	m->written = (struct page_words){.words = m->fresh, .list = m->list};
	for (uint64_t w = 0; w < m->pages / 64; w++) {
		m->fresh[w] = atomic_exchange(&m->log[w], 0);
		m->since[w] |= m->fresh[w];
		if (m->fresh[w])
			m->list[m->written.count++] = (uint32_t)w;
	}
}

/* Adds the layer to the image, checking it against its sums and maps. */
static void apply_layer(struct machine *m, struct memcow *cow, int fd, int sums_fd)
{
	const _Atomic uint64_t *zero = memcow_zero_map(cow);
	const uint64_t *scope = memcow_scope(cow);
	struct page_sums sums;
	struct page_entry entry;
	uint64_t wrong_sums = 0, wrong_zero = 0;
	CHECK(page_sums_open(&sums, sums_fd, NULL) == 0);
	for (uint64_t p = 0; p < m->pages; p++) {
		uint8_t *page = m->image + p * PAGE_BYTES;
		if (!(scope[p / 64] >> (p % 64) & 1)) {
			wrong_zero += bitmap_test(zero, p);
		} else if (bitmap_test(zero, p)) {
			memset(page, 0, PAGE_BYTES);
		} else {
			CHECK(page_sums_read(&sums, p, 1, &entry, NULL) == 0);
			CHECK(pread(fd, page, PAGE_BYTES, (off_t)(entry.place * PAGE_BYTES)) == PAGE_BYTES);
			wrong_sums += entry.sum != page_sum(p, page);
			wrong_zero += test_page_zero(page);
		}
	}
	page_sums_close(&sums);
	CHECK(wrong_sums == 0);
	CHECK(wrong_zero == 0);
}

enum way { PROTECT, STAGE, STOPPED, SETTLE };

static void print_stats(enum way way, bool all, const struct memcow_stats *stats)
{
	static const char *const names[] = {"protect", "stage", "stopped", "settle"};
	printf("%s%s: scope %llu saved %llu zero %llu again %llu passes %llu arm faults %llu cow faults %llu (p50 %llu "
	       "p99 "
	       "%llu max %llu ns) throttled %llu\n",
	       names[way], all ? " all" : "", (unsigned long long)stats->scope_pages,
	       (unsigned long long)stats->saved_pages, (unsigned long long)stats->zero_pages,
	       (unsigned long long)stats->armed_again_pages, (unsigned long long)stats->arm_passes,
	       (unsigned long long)stats->arm_faults, (unsigned long long)stats->cow_faults,
	       (unsigned long long)stats->cow_fault_p50_ns, (unsigned long long)stats->cow_fault_p99_ns,
	       (unsigned long long)stats->cow_fault_max_ns, (unsigned long long)stats->throttled);
}

/* Up to the instant; the machine stands then. */
static int take(struct machine *m, struct memcow *cow, enum way way, bool all, int fd, int sums_fd, struct err *err)
{
	struct memcow_target target = {.fd = fd, .sums_fd = sums_fd, .scope = all ? NULL : m->since};
	int r;
	harvest(m);
	if (way == STOPPED)
		r = memcow_arm_stopped(cow, &target, err);
	else if (way == SETTLE)
		r = memcow_settle(cow, &target, err);
	else
		r = way == STAGE ? memcow_stage(cow, &target, err) : memcow_arm(cow, &target, err);
	for (unsigned pass = 0; pass < 2 && way == PROTECT && !all && r == 0; pass++) {
		uint64_t left;
		harvest(m);
		r = memcow_arm_more(cow, &m->written, &left, err);
	}
	for (unsigned pass = 0; pass < 2 && way == SETTLE && r == 0; pass++) {
		harvest(m);
		r = memcow_settle_more(cow, &m->written, err);
	}
	for (unsigned pass = 0; pass < 2 && (way == STAGE || way == SETTLE) && r == 0; pass++) {
		harvest(m);
		r = memcow_stage_more(cow, &m->written, err);
	}
	machine_stop(m);
	harvest(m);
	return r == 0 ? memcow_instant(cow, all && way != SETTLE ? NULL : &m->written, err) : r;
}

static void run_round(struct machine *m, struct memcow *cow, enum way way, bool all, uint8_t *reference)
{
	struct err err = ERR_INIT;
	struct memcow_stats stats;
	int fd = make_file(), sums_fd = make_file();
	CHECK(fd >= 0 && sums_fd >= 0);
	int r = take(m, cow, way, all, fd, sums_fd, &err);
	if (r == -ENOBUFS) {
		printf("stage: %s\n", err.message);
		err = ERR_INIT;
		way = PROTECT;
		machine_go(m);
		memcow_abandon(cow);
		r = take(m, cow, way, all, fd, sums_fd, &err);
	}
	CHECK(r == 0);
	memcpy(reference, m->base, m->pages * PAGE_BYTES);
	if (way != STOPPED)
		machine_go(m);
	memcow_save(cow);
	CHECK(memcow_finish(cow, NULL, &err) == 0);
	memset(m->since, 0, m->pages / 8);
	memcow_get_stats(cow, &stats);
	CHECK(stats.saved_pages + stats.zero_pages == stats.scope_pages);
	CHECK(!all || stats.scope_pages == stats.total_pages);
	CHECK(way == SETTLE ? stats.written_bytes >= stats.saved_pages * PAGE_BYTES
			    : stats.written_bytes == stats.saved_pages * PAGE_BYTES);
	if (err.number)
		fprintf(stderr, "error: %s\n", err.message);
	print_stats(way, all, &stats);
	apply_layer(m, cow, fd, sums_fd);
	CHECK(memcmp(m->image, reference, m->pages * PAGE_BYTES) == 0);
	if (way == STOPPED)
		machine_go(m);
	close(fd);
	close(sums_fd);
}

/* The writers must go on after whatever happened. */
static void check_progress(struct machine *m)
{
	uint64_t before = atomic_load(&m->steps);
	uint64_t until = clock_now_ns() + 60000000000ull;
	while (atomic_load(&m->steps) < before + 1000 && clock_now_ns() < until)
		usleep(1000);
	CHECK(atomic_load(&m->steps) >= before + 1000);
}

/* Gives up at each stage. */
static void run_abandon(struct machine *m, struct memcow *cow, unsigned stage, bool stage_way)
{
	struct err err = ERR_INIT;
	int fd = make_file(), sums_fd = make_file();
	struct memcow_target target = {.fd = fd, .sums_fd = sums_fd, .scope = stage_way ? m->since : NULL};
	volatile bool cancel = true;
	harvest(m);
	CHECK((stage_way ? memcow_stage(cow, &target, &err) : memcow_arm(cow, &target, &err)) == 0);
	if (stage >= 1) {
		machine_stop(m);
		CHECK(memcow_instant(cow, NULL, &err) == 0);
		machine_go(m);
	}
	if (stage >= 2)
		memcow_save(cow);
	if (stage >= 3)
		usleep(3000);
	if (stage >= 4) {
		int r = memcow_finish(cow, &cancel, &err);
		CHECK(r == -ECANCELED || r == 0);
	}
	/* Nothing is taken away while it is protected. */
	bool held = !stage_way && stage < 4;
	if (held)
		CHECK(give_back(m, 0) == -EBUSY);
	memcow_abandon(cow);
	CHECK(give_back(m, 0) == 0);
	close(fd);
	close(sums_fd);
	check_progress(m);
}

/* The layer's file cannot be written: the checkpoint fails, the writers do not. */
static void run_write_error(struct machine *m, struct memcow *cow)
{
	struct err err = ERR_INIT;
	int sums_fd = make_file();
	int fd = make_file();
	struct memcow_target target = {.fd = fd, .sums_fd = sums_fd};
	struct rlimit before, none;
	CHECK(fd >= 0 && ftruncate(fd, (off_t)(m->pages * PAGE_BYTES)) == 0);
	CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
	none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
	signal(SIGXFSZ, SIG_IGN);
	CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
	CHECK(memcow_arm(cow, &target, &err) == 0);
	machine_stop(m);
	CHECK(memcow_instant(cow, NULL, &err) == 0);
	machine_go(m);
	memcow_save(cow);
	CHECK(memcow_finish(cow, NULL, &err) == -EFBIG);
	check_progress(m);
	memcow_abandon(cow);
	check_progress(m);
	CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
	close(fd);
	close(sums_fd);
}

static void start(struct machine *m, struct writer_args *args)
{
	pthread_mutex_init(&m->lock, NULL);
	pthread_cond_init(&m->cond, NULL);
	for (unsigned i = 0; i < WRITERS; i++) {
		args[i] = (struct writer_args){.m = m, .number = i};
		CHECK(pthread_create(&m->threads[i], NULL, writer_main, &args[i]) == 0);
	}
}

static void end(struct machine *m)
{
	pthread_mutex_lock(&m->lock);
	m->quit = true;
	atomic_store(&m->asked, true);
	pthread_cond_broadcast(&m->cond);
	pthread_mutex_unlock(&m->lock);
	for (unsigned i = 0; i < WRITERS; i++)
		pthread_join(m->threads[i], NULL);
}

struct one_page {
	uint64_t *word;
	_Atomic unsigned written, wanted;
};

/* Writes 1, 2, ... into the page, each when it is wanted. */
static void *one_page_main(void *opaque)
{
	struct one_page *one = opaque;
	for (uint64_t value = 1; value <= 2; value++) {
		while (atomic_load(&one->wanted) < value)
			usleep(100);
		__atomic_store_n(one->word, value, __ATOMIC_RELAXED);
		atomic_store(&one->written, (unsigned)value);
	}
	return NULL;
}

#define RACE_PAGE 5u
#define RACE_STALL "204:1:sleep=200" /* FAULT_MEMCOW_RELEASE */

/* Invariant 3: the fault thread stalls where it releases a page while memory is armed, and the engine arms again meanwhile. What is written after the
 * instant must meet the protection then. */
static void run_release_stalled(void)
{
	struct err err = ERR_INIT;
	struct memcow *cow;
	struct mem *mem;
	struct one_page one = {0};
	pthread_t thread;
	uint64_t scope[MEMORY_BYTES / PAGE_BYTES / 64] = {~0ull}, left, saved = 0;
	const struct page_words none = {0};
	int fd = make_file(), sums_fd = make_file();
	CHECK(setenv("VMCP_FAULT", RACE_STALL, 1) == 0 && fault_init(&err) == 0);
	CHECK(mem_create(MEMORY_BYTES, &mem, &err) == 0);
	if (memcow_create(mem, true, &cow, &err) == 0) {
		memset(mem_base(mem), 0x55, 64 * PAGE_BYTES);
		one.word = (uint64_t *)(void *)((uint8_t *)mem_base(mem) + RACE_PAGE * PAGE_BYTES);
		CHECK(memcow_arm(cow, &(struct memcow_target){.fd = fd, .sums_fd = sums_fd, .scope = scope}, &err) == 0);
		CHECK(pthread_create(&thread, NULL, one_page_main, &one) == 0);
		atomic_store(&one.wanted, 1);
		for (; atomic_load(&one.written) < 1; usleep(1000))
			CHECK(memcow_arm_more(cow, &none, &left, &err) == 0);
		CHECK(memcow_instant(cow, &none, &err) == 0);
		atomic_store(&one.wanted, 2);
		pthread_join(thread, NULL);
		memcow_save(cow);
		CHECK(memcow_finish(cow, NULL, &err) == 0);
		struct page_sums sums;
		struct page_entry entry;
		CHECK(page_sums_open(&sums, sums_fd, NULL) == 0 && page_sums_read(&sums, RACE_PAGE, 1, &entry, NULL) == 0);
		CHECK(pread(fd, &saved, sizeof(saved), (off_t)(entry.place * PAGE_BYTES)) == sizeof(saved));
		CHECK(saved == 1);
		page_sums_close(&sums);
		memcow_destroy(cow);
	}
	mem_destroy(mem);
	close(fd);
	close(sums_fd);
	CHECK(unsetenv("VMCP_FAULT") == 0);
}

int main(void)
{
	if (!getenv("VMCP_FAULT"))
		run_release_stalled();
	struct machine m = {0};
	struct err err = ERR_INIT;
	struct memcow *cow;
	struct writer_args args[WRITERS];
	if (fault_init(&err) != 0 || mem_create(MEMORY_BYTES, &m.mem, &err) != 0) {
		fprintf(stderr, "%s\n", err.message);
		return 1;
	}
	m.base = mem_base(m.mem);
	m.pages = mem_pages(m.mem);
	m.log = calloc(m.pages / 64, sizeof(*m.log));
	m.since = calloc(m.pages / 64, sizeof(*m.since));
	m.fresh = calloc(m.pages / 64, sizeof(*m.fresh));
	m.list = calloc(m.pages / 64, sizeof(*m.list));
	m.image = malloc(MEMORY_BYTES);
	uint8_t *reference = malloc(MEMORY_BYTES);
	bool live = memcow_create(m.mem, true, &cow, &err) == 0;
	if (!live) {
		printf("SKIP the live rounds: %s\n", err.message);
		CHECK(memcow_create(m.mem, false, &cow, &err) == 0);
	}
	start(&m, args);
	/* The first saves all; then in turn what was written and all again. */
	for (unsigned i = 0; i < ROUNDS; i++) {
		atomic_store(&m.calm, i % 8 < 4);
		enum way way = i % 4 == 3 ? STOPPED : i % 4 == 2 ? STAGE : PROTECT;
		run_round(&m, cow, live || way == STAGE ? way : STOPPED, i % 4 == 0, reference);
	}
	for (unsigned i = 0; i < 4; i++) {
		atomic_store(&m.calm, i < 2);
		run_round(&m, cow, SETTLE, i % 2 == 0, reference);
	}
	for (unsigned i = 0; i < 10; i++) {
		if (live || i % 2 == 1)
			run_abandon(&m, cow, i / 2, i % 2 == 1);
	}
	if (live)
		run_write_error(&m, cow);
	atomic_store(&m.calm, true);
	run_round(&m, cow, STAGE, false, reference);
	run_round(&m, cow, live ? PROTECT : STOPPED, false, reference);
	end(&m);
	printf("given back %llu times\n", (unsigned long long)m.given_back);
	CHECK(m.given_back > 0);
	free((void *)m.log);
	free(m.since);
	free(m.fresh);
	free(m.list);
	free(m.image);
	memcow_destroy(cow);
	mem_destroy(m.mem);
	free(reference);
	return check_report();
}
