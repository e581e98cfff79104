#include "checkpoint/memcow.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/priority.h"
#include "checkpoint/memcow_internal.h"
#include "checkpoint/scheduling.h"
#include "checkpoint/uffd.h"

/*
 * Pages protected with one call. A call takes the page table locks, has KVM drop its mappings of the range and flushes
 * TLBs; a guest that touches the range meanwhile waits for all of it. docs/memory-cow.md has the measurements.
 */
#define ARM_CHUNK_PAGES 128u
/* Pages released with one call where nobody is in a hurry. */
#define RELEASE_CHUNK_PAGES 4096u
/* Passes over what was written during arming, and how little is left for the pause when they end. */
#define ARM_MAX_PASSES	 8u
#define ARM_ENOUGH_PAGES 64u
/* Protecting a page that is protected already costs nanoseconds, a call microseconds: runs are joined across gaps. */
#define ARM_GAP_PAGES 64u
/* In the pause a page is copied in 0.4 us, while a call to protect takes 2 us and more, and the guest's next write to
 * the page a fault besides: so what was written since arming is copied, up to this many pages, a quarter of the buffers; the rest is protected.
 */
#define INSTANT_COPY_PAGES 4096u
/* Of a scope that is not all memory, runs are joined across fewer pages than a block has: so each block that is protected
 * holds a page of the scope, and the sweeper comes by and releases it. */
#define SCOPE_GAP_PAGES 32u
/* While the guest runs: pages copied before others may have the CPU. */
#define STAGE_CHUNK_PAGES 256u

static void free_memory(struct memcow *cow)
{
	pool_destroy(cow->kept);
	memcow_free_ring(cow);
	page_set_free(&cow->dirty);
	free((void *)cow->claimed);
	free((void *)cow->zero);
	free(cow->scope);
	pthread_mutex_destroy(&cow->lock);
	pthread_mutex_destroy(&cow->done_lock);
	pthread_cond_destroy(&cow->done_cond);
	free(cow);
}

static int start_protection(struct memcow *cow, struct err *err)
{
	int r = fault_check(FAULT_MEMCOW_CREATE, err);
	if (r != 0)
		return r;
	/* It can be protected, but by whole huge pages: each fault would copy 512 pages. docs/memory-cow.md has what that means. */
	if (mem_backing(cow->mem) == MEM_BACKING_HUGETLB)
		return err_set(err, ERR_HOST, ENOTSUP, "huge pages of the pool are not write-protected");
	cow->uffd = uffd_open(err);
	if (cow->uffd < 0)
		return cow->uffd;
	r = uffd_register(cow->uffd, cow->base, cow->pages * PAGE_BYTES, err);
	if (r != 0)
		goto out_uffd;
	cow->stop_event = eventfd(0, EFD_CLOEXEC);
	if (cow->stop_event < 0) {
		r = err_sys(err, errno, "eventfd");
		goto out_uffd;
	}
	r = pthread_create(&cow->fault_thread, NULL, memcow_fault_main, cow);
	if (r == 0)
		return 0;
	r = err_sys(err, r, "cannot start the fault thread");
	close(cow->stop_event);
out_uffd:
	close(cow->uffd);
	cow->uffd = -1;
	return r;
}

int memcow_create(struct mem *mem, bool protect, struct memcow **out, struct err *err)
{
	struct memcow *cow = xcalloc(1, sizeof(*cow));
	cow->mem = mem;
	cow->base = mem_base(mem);
	cow->pages = mem_pages(mem);
	cow->blocks = BITMAP_WORDS(cow->pages);
	cow->uffd = cow->stop_event = -1;
	pthread_mutex_init(&cow->lock, NULL);
	pthread_mutex_init(&cow->done_lock, NULL);
	clock_cond_init(&cow->done_cond);
	cow->claimed = calloc(cow->blocks, sizeof(uint64_t));
	cow->zero = calloc(cow->blocks, sizeof(uint64_t));
	cow->scope = calloc(cow->blocks, sizeof(uint64_t));
	int r = page_set_init(&cow->dirty, cow->pages, err);
	if (r == 0 && (!cow->claimed || !cow->zero || !cow->scope))
		r = err_sys(err, ENOMEM, "cannot allocate bitmaps of %llu pages", (unsigned long long)cow->pages);
	if (r == 0 && protect)
		r = start_protection(cow, err);
	if (r != 0) {
		free_memory(cow);
		return r;
	}
	*out = cow;
	return 0;
}

void memcow_destroy(struct memcow *cow)
{
	if (!cow)
		return;
	memcow_abandon(cow);
	if (cow->stop_event >= 0) {
		uint64_t one = 1;
		while (write(cow->stop_event, &one, sizeof(one)) < 0 && errno == EINTR)
			;
		pthread_join(cow->fault_thread, NULL);
		close(cow->stop_event);
	}
	if (cow->uffd >= 0) {
		if (!cow->uffd_lost)
			uffd_unregister(cow->uffd, cow->base, cow->pages * PAGE_BYTES);
		close(cow->uffd);
	}
	free_memory(cow);
}

void memcow_fail(struct memcow *cow, const struct err *err)
{
	pthread_mutex_lock(&cow->done_lock);
	if (cow->error.number == 0)
		cow->error = *err;
	atomic_store_explicit(&cow->failed, true, memory_order_release);
	/* Under the lock: abandon frees the pool only after it set `active` false here. */
	if (cow->active)
		pool_fail(cow->pool);
	pthread_cond_broadcast(&cow->done_cond);
	pthread_mutex_unlock(&cow->done_lock);
}

static void set_scope(struct memcow *cow, const uint64_t *scope)
{
	uint64_t count = 0;
	cow->whole = !scope;
	for (uint64_t w = 0; w < cow->blocks; w++) {
		uint64_t there = cow->pages - w * 64 >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << cow->pages % 64) - 1;
		cow->scope[w] = scope ? scope[w] & there : there;
		count += popcount64(cow->scope[w]);
		atomic_store_explicit(&cow->claimed[w], ~cow->scope[w], memory_order_relaxed);
		atomic_store_explicit(&cow->zero[w], 0, memory_order_relaxed);
	}
	cow->scope_pages = count;
}

/* At the instant or before: pages of `written` join the scope. note_dirty: those that were not in it are yet to be settled. */
static void widen_scope(struct memcow *cow, const struct page_words *written, bool note_dirty)
{
	for (uint64_t i = 0; written && i < written->count && !cow->whole; i++) {
		uint64_t w = written->list[i], joins = written->words[w] & ~cow->scope[w];
		if (joins == 0)
			continue;
		cow->scope[w] |= joins;
		cow->scope_pages += popcount64(joins);
		atomic_fetch_and_explicit(&cow->claimed[w], ~joins, memory_order_acq_rel);
		for (; joins && note_dirty; joins &= joins - 1)
			page_set_add(&cow->dirty, w * 64 + (unsigned)__builtin_ctzll(joins));
	}
}

static void reset_counters(struct memcow *cow)
{
	page_set_clear(&cow->dirty);
	histogram_reset(&cow->latency);
	cow->saved_pages = cow->zero_pages = cow->written_bytes = cow->throttled = cow->throttled_ns = cow->arm_faults = 0;
	cow->armed_again_pages = cow->arm_ns = cow->arm_passes = cow->copied_pages = cow->copy_ns = 0;
	cow->touched_pages = cow->touch_ns = 0;
	cow->error = ERR_INIT;
	cow->failed = false;
	cow->writer_ready = cow->save = cow->stop = cow->writer_done = false;
}

/* The last one's, if it fits. */
static bool reuse_pool(struct memcow *cow, unsigned segments)
{
	struct pool *kept = cow->kept;
	cow->kept = NULL;
	if (kept && pool_segments(kept) >= segments && pool_segments(kept) / 4 <= segments) {
		pool_reuse(kept, 0);
		cow->pool = kept;
		return true;
	}
	pool_destroy(kept);
	return false;
}

static int create_pool(struct memcow *cow, uint64_t pages, struct err *err)
{
	unsigned segments = POOL_SEGMENTS, reserve = cow->way == MEMCOW_PROTECT ? POOL_RESERVE : 0;
	if (cow->way == MEMCOW_STAGE && pages == 0)
		pages = cow->scope_pages + cow->scope_pages / 4 + STAGE_SPARE_PAGES;
	if (cow->way == MEMCOW_STAGE) {
		segments = (unsigned)(pages / SEGMENT_PAGES + 1);
		if (reuse_pool(cow, segments))
			return 0;
	} else if (cow->way == MEMCOW_SETTLE && pages / SEGMENT_PAGES > POOL_SEGMENTS) {
		/* Passes to the file take turns with the usual number; the rest is for what is left in the end. */
		reserve = (unsigned)(pages / SEGMENT_PAGES) - POOL_SEGMENTS;
		segments += reserve;
	}
	return pool_create(segments, reserve, &cow->pool, err);
}

/* Of what is done, or given up. The threads are gone. Whoever stages again soon has the buffers at hand. */
static void give_pool_up(struct memcow *cow, struct pool *pool, bool finished)
{
	uint64_t now_ns = clock_now_ns();
	bool often = cow->finished_ns != 0 && now_ns - cow->finished_ns < KEEP_POOL_NS;
	if (cow->way == MEMCOW_STAGE && finished) {
		cow->finished_ns = now_ns;
		if (often) {
			pool_rest(pool);
			cow->kept = pool;
			return;
		}
	}
	pool_destroy(pool);
}

/* Buffers, counters and threads of a checkpoint. memcow_abandon undoes it. */
static int begin(struct memcow *cow, const struct memcow_target *target, enum memcow_way way, struct err *err)
{
	if (cow->active)
		return err_set(err, ERR_STATE, EBUSY, "memory is being saved already");
	reset_counters(cow);
	set_scope(cow, target->scope);
	cow->way = way;
	cow->staged = NULL;
	cow->cancel = target->cancel;
	cow->max_rate = target->max_rate;
	int r = create_pool(cow, target->buffer_pages, err);
	if (r == 0 && way == MEMCOW_PROTECT)
		r = hold_create(&cow->hold, cow->pages, err);
	if (r != 0) {
		pool_destroy(cow->pool);
		cow->pool = NULL;
		return r;
	}
	cow->sums_bytes = round_up(cow->pages * 8, PAGE_BYTES);
	cow->sums = NULL;
	if (target->sums_fd >= 0) {
		/* Touched only where pages are saved. */
		void *sums = mmap(NULL, cow->sums_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (sums == MAP_FAILED) {
			r = err_sys(err, errno, "cannot allocate %zu bytes for page checksums", cow->sums_bytes);
			hold_free(&cow->hold);
			pool_destroy(cow->pool);
			cow->pool = NULL;
			return r;
		}
		cow->sums = sums;
	}
	cow->fd = target->fd;
	cow->sums_fd = target->sums_fd;
	cow->cipher = target->cipher;
	/* Before anything is protected, until nothing is. The other ways do without: to them it is a write like any other. */
	if (way == MEMCOW_PROTECT)
		mem_hold_discards(cow->mem);
	pthread_mutex_lock(&cow->done_lock);
	cow->active = true;
	pthread_mutex_unlock(&cow->done_lock);
	r = pthread_create(&cow->writer, NULL, memcow_writer_main, cow);
	if (r == 0) {
		cow->writer_started = true;
		r = pthread_create(&cow->sweeper, NULL, memcow_sweeper_main, cow);
		cow->sweeper_started = r == 0;
	}
	if (r != 0) {
		err_sys(err, r, "cannot start the threads that save memory");
		memcow_abandon(cow);
		return -r;
	}
	return 0;
}

static int wait_writer_ready(struct memcow *cow, struct err *err)
{
	pthread_mutex_lock(&cow->done_lock);
	while (!cow->writer_ready)
		pthread_cond_wait(&cow->done_cond, &cow->done_lock);
	int r = cow->error.number ? -cow->error.number : 0;
	if (r != 0 && err)
		*err = cow->error;
	pthread_mutex_unlock(&cow->done_lock);
	return r;
}

int find_populated(const struct memcow *cow, uint64_t page, struct populated *at)
{
	if (page < at->end)
		return 0;
	return mem_find_populated(cow->mem, page, 64 - page % 64, &at->first, &at->end);
}

/* What failed first, in the fault thread or the writer, is the cause; else `r` as it is. */
static int first_error(struct memcow *cow, int r, const char *what, struct err *err)
{
	pthread_mutex_lock(&cow->done_lock);
	struct err first = cow->error;
	pthread_mutex_unlock(&cow->done_lock);
	if (first.number == 0)
		return err_sys(err, r, "%s", what);
	if (err)
		*err = first;
	return -first.number;
}

static int protect_run(void *opaque, uint64_t first, uint64_t count)
{
	struct memcow *cow = opaque;
	uint64_t end = min_u64(first + count, cow->pages);
	for (; first < end; first += ARM_CHUNK_PAGES) {
		uint64_t pages = min_u64(end - first, ARM_CHUNK_PAGES);
		int r = uffd_protect(cow->uffd, cow->base + first * PAGE_BYTES, pages * PAGE_BYTES);
		if (r != 0)
			return r;
	}
	return 0;
}

/* While the guest runs: lets its vCPUs have this CPU between chunks, if they share it. */
static int protect_run_politely(void *opaque, uint64_t first, uint64_t count)
{
	struct memcow *cow = opaque;
	uint64_t end = min_u64(first + count, cow->pages);
	int r = 0;
	for (; first < end && r == 0; first += ARM_CHUNK_PAGES) {
		r = protect_run(cow, first, min_u64(end - first, ARM_CHUNK_PAGES));
		priority_give_way_each(cow->room_each_ns, &cow->room);
	}
	return r;
}

struct instant {
	struct memcow *cow;
	uint64_t copied;
};

/* Under lock, in the pause. A page that is left unprotected is claimed (invariant 2). */
static int settle_run(void *opaque, uint64_t first, uint64_t count)
{
	struct instant *instant = opaque;
	if (instant->copied + count > INSTANT_COPY_PAGES)
		return protect_run(instant->cow, first, count);
	for (uint64_t page = first; page < first + count; page++) {
		if (!memcow_copy_page(instant->cow, page))
			return -EIO;
	}
	instant->copied += count;
	return 0;
}

static int set_phase(struct memcow *cow, enum memcow_phase phase, struct err *err)
{
	pthread_mutex_lock(&cow->lock);
	int r = cow->uffd_lost ? -EIO : 0;
	if (r == 0)
		cow->phase = phase;
	pthread_mutex_unlock(&cow->lock);
	if (r == 0)
		return 0;
	err_set(err, ERR_HOST, EIO, "memory protection was lost by an earlier failure");
	return err_hint(err, "leave out --live, or start the VM again from such a checkpoint");
}

void memcow_set_processors(struct memcow *cow, const cpu_set_t *busy, bool shared)
{
	cow->room_each_ns = shared ? 0 : SCHEDULING_ROOM_EACH_NS;
	if (cow->stop_event >= 0 && CPU_COUNT(busy) > 0)
		pthread_setaffinity_np(cow->fault_thread, sizeof(*busy), busy);
}

/* How many pages may lie between those that are protected with one call. */
static uint64_t run_gap(const struct memcow *cow) { return cow->whole ? ARM_GAP_PAGES : SCOPE_GAP_PAGES; }

/* All pages of the scope count as written before they are protected for the first time. */
static int protect_scope(struct memcow *cow)
{
	if (cow->whole)
		return protect_run_politely(cow, 0, cow->pages);
	for (uint64_t w = 0; w < cow->blocks; w++)
		for (uint64_t bits = cow->scope[w]; bits; bits &= bits - 1)
			page_set_add(&cow->dirty, w * 64 + (unsigned)__builtin_ctzll(bits));
	return page_set_take(&cow->dirty, run_gap(cow), protect_run_politely, cow, NULL);
}

uint64_t memcow_kept_pages(const struct memcow *cow) { return cow->kept ? (uint64_t)pool_segments(cow->kept) * SEGMENT_PAGES : 0; }

bool memcow_can_protect(struct memcow *cow)
{
	pthread_mutex_lock(&cow->lock);
	bool can = cow->stop_event >= 0 && !cow->uffd_lost;
	pthread_mutex_unlock(&cow->lock);
	return can;
}

int memcow_arm(struct memcow *cow, const struct memcow_target *target, struct err *err)
{
	if (cow->stop_event < 0)
		return err_set(err, ERR_HOST, ENOTSUP, "memory cannot be write-protected on this host");
	uint64_t start_ns = clock_now_ns();
	int r = begin(cow, target, MEMCOW_PROTECT, err);
	if (r != 0)
		return r;
	r = set_phase(cow, MEMCOW_ARMED, err);
	if (r != 0)
		goto fail;
	cow->protecting = true;
	/* The buffers first: what is written while they are made need not be armed again. */
	r = wait_writer_ready(cow, err);
	if (r == 0)
		r = fault_check(FAULT_MEMCOW_ARM, err);
	if (r != 0)
		goto fail;
	r = protect_scope(cow);
	cow->arm_passes = 1;
	while (r == 0 && cow->arm_passes < ARM_MAX_PASSES && page_set_count(&cow->dirty) > ARM_ENOUGH_PAGES) {
		r = page_set_take(&cow->dirty, run_gap(cow), protect_run_politely, cow, NULL);
		cow->arm_passes++;
	}
	if (r != 0) {
		r = first_error(cow, r, "cannot write-protect guest memory", err);
		goto fail;
	}
	cow->arm_ns = clock_now_ns() - start_ns;
	return 0;
fail:
	memcow_abandon(cow);
	return r;
}

int memcow_arm_more(struct memcow *cow, const struct page_words *written, uint64_t *left, struct err *err)
{
	uint64_t start_ns = clock_now_ns();
	widen_scope(cow, written, true);
	int r = page_set_take(&cow->dirty, run_gap(cow), protect_run_politely, cow, left);
	cow->arm_passes++;
	cow->arm_ns += clock_now_ns() - start_ns;
	return r == 0 ? 0 : first_error(cow, r, "cannot write-protect guest memory", err);
}

int memcow_arm_stopped(struct memcow *cow, const struct memcow_target *target, struct err *err)
{
	int r = begin(cow, target, MEMCOW_STOPPED, err);
	if (r != 0)
		return r;
	r = wait_writer_ready(cow, err);
	if (r != 0)
		memcow_abandon(cow);
	return r;
}

/* A slot for a copy of the page, behind all copies made so far; NULL if there is none. */
static uint8_t *stage_slot(struct memcow *cow, uint64_t page, struct err *err)
{
	struct segment *segment = cow->staged;
	if (!segment || segment->count == SEGMENT_PAGES) {
		segment = pool_try_get(cow->pool);
		if (!segment) {
			err_set(err, ERR_FAILED, ENOBUFS, "the guest writes its memory faster than it is copied");
			err_hint(err, "use --instant now if this host can (vmcp doctor), or leave out --live");
			return NULL;
		}
		segment->next = cow->staged;
		cow->staged = segment;
		if (!segment->touched) {
			uint64_t start_ns = clock_now_ns();
			segment_touch(segment);
			cow->touch_ns += clock_now_ns() - start_ns;
			cow->touched_pages += SEGMENT_PAGES;
		}
	}
	uint8_t *data = segment->data + (size_t)segment->count * PAGE_BYTES;
	segment->entries[segment->count++] = (struct segment_entry){.page = page, .data = data};
	return data;
}

/*
 * Whether the page was given back by the guest: then it is not looked at, which would make it exist again, but claimed as zero. A copy that
 * an earlier pass made of it then counts no more; that of a later one counts again.
 */
static int stage_hole(struct memcow *cow, uint64_t page, struct populated *at, bool *hole)
{
	int r = find_populated(cow, page, at);
	*hole = r == 0 && page < at->first;
	if (*hole) {
		bitmap_claim(cow->claimed, page);
		bitmap_claim(cow->zero, page);
	}
	return r;
}

/* Copies the pages, behind all copies made so far; *copied: how many. */
static int stage_pages(struct memcow *cow, const struct page_words *pages, bool politely, uint64_t *copied, struct err *err)
{
	/* In the pause only if something was given back since the last pass began. */
	uint64_t given_back = mem_given_back(cow->mem);
	bool look = given_back != 0 && (politely || given_back != cow->given_back), hole = false;
	struct populated at = {.first = 0};
	cow->given_back = given_back;
	*copied = 0;
	for (uint64_t i = 0; i < pages->count; i++) {
		uint64_t w = pages->list[i];
		for (uint64_t bits = pages->words[w]; bits; bits &= bits - 1) {
			uint64_t page = w * 64 + (unsigned)__builtin_ctzll(bits);
			int r = look ? stage_hole(cow, page, &at, &hole) : 0;
			if (r != 0)
				return err_sys(err, r, "guest memory: cannot find populated pages");
			if (hole)
				continue;
			uint8_t *to = stage_slot(cow, page, err);
			if (!to)
				return -ENOBUFS;
			if (bitmap_test(cow->claimed, page))
				bitmap_clear(cow->claimed, page);
			page_copy(to, cow->base + page * PAGE_BYTES);
			if (++*copied % STAGE_CHUNK_PAGES == 0 && politely)
				priority_give_way_each(cow->room_each_ns, &cow->room);
		}
	}
	return 0;
}

/* A copy of the page into `segment`, unless it is zero: then it is noted. Whoever writes it meanwhile is found by the next pass. */
static void settle_page(struct memcow *cow, uint64_t page, bool populated, struct segment *segment)
{
	uint8_t *to = segment->data + (size_t)segment->count * PAGE_BYTES;
	if (populated)
		page_copy(to, cow->base + page * PAGE_BYTES);
	if (!populated || page_is_zero(to)) {
		bitmap_claim(cow->zero, page);
		return;
	}
	bitmap_clear(cow->zero, page);
	segment->entries[segment->count++] = (struct segment_entry){.page = page, .data = to};
	atomic_fetch_add_explicit(&cow->saved_pages, 1, memory_order_relaxed);
}

/* Through the buffers to the file. Waits for the writer where these run out, and for the end of it: a later pass may write the
 * same pages. */
static int settle_pages(struct memcow *cow, const struct page_words *pages, struct err *err)
{
	struct segment *segment = NULL;
	struct populated at = {.first = 0};
	int r = 0;
	for (uint64_t i = 0; i < pages->count && r == 0; i++) {
		uint64_t w = pages->list[i];
		for (uint64_t bits = pages->words[w]; bits && r == 0; bits &= bits - 1) {
			uint64_t page = w * 64 + (unsigned)__builtin_ctzll(bits);
			if (!segment)
				segment = pool_get(cow->pool, false, NULL);
			if (!segment)
				return first_error(cow, ECANCELED, "saving memory", err);
			r = find_populated(cow, page, &at);
			if (r != 0)
				break;
			settle_page(cow, page, page >= at.first && page < at.end, segment);
			if (segment->count == SEGMENT_PAGES) {
				pool_push(cow->pool, segment);
				segment = NULL;
				priority_give_way_each(cow->room_each_ns, &cow->room);
			}
		}
		if (cow->cancel && __atomic_load_n(cow->cancel, __ATOMIC_RELAXED))
			r = -ECANCELED;
	}
	if (segment)
		pool_push(cow->pool, segment);
	if (r == -ECANCELED)
		return err_set(err, ERR_FAILED, ECANCELED, "cancelled while memory was being saved");
	if (r != 0)
		return err_sys(err, -r, "guest memory: cannot find populated pages");
	return pool_drain(cow->pool) ? 0 : first_error(cow, EIO, "saving memory", err);
}

static int copy_pages(struct memcow *cow, const struct page_words *pages, bool stage, struct err *err)
{
	uint64_t start_ns = clock_now_ns(), touched_ns = cow->touch_ns, copied;
	int r;
	if (stage) {
		r = stage_pages(cow, pages, true, &copied, err);
		cow->copied_pages += copied;
		cow->copy_ns += clock_now_ns() - start_ns - (cow->touch_ns - touched_ns);
		pool_touch_next(cow->pool, STAGE_READY_PAGES / SEGMENT_PAGES);
	} else {
		r = settle_pages(cow, pages, err);
	}
	cow->arm_passes++;
	cow->arm_ns += clock_now_ns() - start_ns;
	return r;
}

/* Its words, of which `list`, the caller's to free, holds the numbers. */
static uint32_t *list_scope(const struct memcow *cow, struct page_words *pages)
{
	uint32_t *list = xcalloc(cow->blocks, sizeof(*list));
	*pages = (struct page_words){.words = cow->scope, .list = list};
	for (uint64_t w = 0; w < cow->blocks; w++)
		if (cow->scope[w])
			list[pages->count++] = (uint32_t)w;
	return list;
}

static int copy_scope(struct memcow *cow, const struct memcow_target *target, enum memcow_way way, struct err *err)
{
	int r = begin(cow, target, way, err);
	if (r != 0)
		return r;
	r = wait_writer_ready(cow, err);
	if (r == 0)
		r = fault_check(FAULT_MEMCOW_ARM, err);
	struct page_words pages;
	CLEANUP_FREE uint32_t *list = list_scope(cow, &pages);
	(void)list; /* pages points into it */
	if (r == 0)
		r = copy_pages(cow, &pages, way == MEMCOW_STAGE, err);
	if (r != 0)
		memcow_abandon(cow);
	return r;
}

int memcow_stage(struct memcow *cow, const struct memcow_target *target, struct err *err)
{
	return copy_scope(cow, target, MEMCOW_STAGE, err);
}

int memcow_settle(struct memcow *cow, const struct memcow_target *target, struct err *err)
{
	return copy_scope(cow, target, MEMCOW_SETTLE, err);
}

int memcow_stage_more(struct memcow *cow, const struct page_words *written, struct err *err)
{
	widen_scope(cow, written, false);
	return copy_pages(cow, written, true, err);
}

int memcow_settle_more(struct memcow *cow, const struct page_words *written, struct err *err)
{
	widen_scope(cow, written, false);
	return copy_pages(cow, written, false, err);
}

static int instant_staged(struct memcow *cow, const struct page_words *written, struct err *err)
{
	if (!written)
		return 0;
	uint64_t copied;
	widen_scope(cow, written, false);
	int r = stage_pages(cow, written, false, &copied, err);
	cow->armed_again_pages = copied;
	return r;
}

int memcow_instant(struct memcow *cow, const struct page_words *written, struct err *err)
{
	int r = fault_check(FAULT_MEMCOW_INSTANT, err);
	if (r != 0)
		return r;
	if (cow->way == MEMCOW_STAGE || cow->way == MEMCOW_SETTLE)
		return instant_staged(cow, written, err);
	widen_scope(cow, written, cow->way == MEMCOW_PROTECT);
	if (cow->way == MEMCOW_STOPPED)
		return 0;
	/* With the lock held the fault thread is not between releasing a page and noting it (invariant 4). No vCPU
	 * runs, but io_uring's workers may fault: these wait. */
	pthread_mutex_lock(&cow->lock);
	if (cow->phase != MEMCOW_ARMED)
		r = -EIO;
	/* Few pages are copied one by one; runs of many are joined across gaps and protected. */
	struct instant instant = {.cow = cow};
	uint64_t gap = page_set_count(&cow->dirty) > INSTANT_COPY_PAGES ? run_gap(cow) : 0, settled = 0;
	if (r == 0)
		r = page_set_take(&cow->dirty, gap, settle_run, &instant, &settled);
	cow->armed_again_pages = settled;
	if (r == 0)
		cow->phase = MEMCOW_CAPTURED;
	pthread_mutex_unlock(&cow->lock);
	return r == 0 ? 0 : first_error(cow, r, "cannot write-protect guest memory at the instant", err);
}

void memcow_save(struct memcow *cow)
{
	pthread_mutex_lock(&cow->done_lock);
	cow->save = true;
	pthread_cond_broadcast(&cow->done_cond);
	pthread_mutex_unlock(&cow->done_lock);
}

static void join_threads(struct memcow *cow)
{
	if (cow->sweeper_started)
		pthread_join(cow->sweeper, NULL);
	if (cow->writer_started)
		pthread_join(cow->writer, NULL);
	cow->sweeper_started = cow->writer_started = false;
}

/* The threads are gone, the phase is IDLE. */
static void free_checkpoint(struct memcow *cow, bool finished)
{
	struct pool *pool = cow->pool;
	pthread_mutex_lock(&cow->done_lock);
	cow->active = false;
	cow->pool = NULL;
	pthread_mutex_unlock(&cow->done_lock);
	give_pool_up(cow, pool, finished);
	hold_free(&cow->hold);
	if (cow->sums)
		munmap(cow->sums, cow->sums_bytes);
	cow->sums = NULL;
	cow->staged = NULL;
	cow->protecting = false;
	if (cow->way == MEMCOW_PROTECT)
		mem_release_discards(cow->mem);
}

/* Waits for the writer's end, looking at *cancel now and then. */
static int wait_done(struct memcow *cow, const volatile bool *cancel, struct err *err)
{
	int r = 0;
	pthread_mutex_lock(&cow->done_lock);
	while (!cow->writer_done && cow->error.number == 0 && r == 0) {
		struct timespec until;
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += 10 * 1000 * 1000;
		if (until.tv_nsec >= 1000000000) {
			until.tv_sec++;
			until.tv_nsec -= 1000000000;
		}
		pthread_cond_timedwait(&cow->done_cond, &cow->done_lock, &until);
		if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED))
			r = -ECANCELED;
	}
	if (cow->error.number != 0) {
		r = -cow->error.number;
		if (err)
			*err = cow->error;
	} else if (r != 0) {
		err_set(err, ERR_FAILED, ECANCELED, "cancelled while memory was being saved");
	}
	pthread_mutex_unlock(&cow->done_lock);
	return r;
}

int memcow_finish(struct memcow *cow, const volatile bool *cancel, struct err *err)
{
	if (!cow->active)
		return err_set(err, ERR_STATE, EINVAL, "no memory is being saved");
	int r = wait_done(cow, cancel, err);
	if (r != 0)
		return r;
	join_threads(cow);
	pthread_mutex_lock(&cow->lock);
	cow->phase = MEMCOW_IDLE;
	pthread_mutex_unlock(&cow->lock);
	free_checkpoint(cow, true);
	return 0;
}

static void release_all(struct memcow *cow)
{
	for (uint64_t first = 0; first < cow->pages; first += RELEASE_CHUNK_PAGES) {
		uint64_t pages = min_u64(cow->pages - first, RELEASE_CHUNK_PAGES);
		pthread_mutex_lock(&cow->lock);
		int r = cow->uffd_lost ? 0
				       : uffd_release(cow->uffd, cow->base + first * PAGE_BYTES, pages * PAGE_BYTES);
		if (r != 0)
			memcow_lose_protection(cow, "cannot release memory", -r);
		pthread_mutex_unlock(&cow->lock);
	}
}

void memcow_abandon(struct memcow *cow)
{
	if (!cow->active)
		return;
	struct err err = ERR_INIT;
	err_set(&err, ERR_FAILED, ECANCELED, "the checkpoint was abandoned");
	/* First, as the fault thread may hold the lock and wait for a buffer. */
	memcow_fail(cow, &err);
	pthread_mutex_lock(&cow->done_lock);
	cow->stop = true;
	pthread_cond_broadcast(&cow->done_cond);
	pthread_mutex_unlock(&cow->done_lock);
	pthread_mutex_lock(&cow->lock);
	cow->phase = MEMCOW_IDLE;
	cow->fault_segment = NULL;
	pthread_mutex_unlock(&cow->lock);
	join_threads(cow);
	if (cow->protecting)
		release_all(cow);
	free_checkpoint(cow, false);
}

void memcow_get_stats(struct memcow *cow, struct memcow_stats *out)
{
	*out = (struct memcow_stats){
		.total_pages = cow->pages,
		.scope_pages = cow->scope_pages,
		.saved_pages = cow->saved_pages,
		.zero_pages = cow->zero_pages,
		.armed_again_pages = cow->armed_again_pages,
		.copied_pages = cow->copied_pages,
		.copy_ns = cow->copy_ns,
		.touched_pages = cow->touched_pages,
		.touch_ns = cow->touch_ns,
		.arm_ns = cow->arm_ns,
		.arm_passes = cow->arm_passes,
		.arm_faults = cow->arm_faults,
		.cow_faults = cow->latency.count,
		.cow_fault_p50_ns = histogram_percentile(&cow->latency, 500),
		.cow_fault_p99_ns = histogram_percentile(&cow->latency, 990),
		.cow_fault_p999_ns = histogram_percentile(&cow->latency, 999),
		.cow_fault_max_ns = cow->latency.max,
		.throttled = cow->throttled,
		.throttled_ns = cow->throttled_ns,
		.written_bytes = cow->written_bytes,
	};
}

void memcow_get_history(struct memcow *cow, const struct histogram **faults, uint64_t *throttled, uint64_t *throttled_ns)
{
	*faults = &cow->all_latency;
	*throttled = cow->all_throttled;
	*throttled_ns = cow->all_throttled_ns;
}

const uint64_t *memcow_scope(const struct memcow *cow) { return cow->scope; }
const _Atomic uint64_t *memcow_zero_map(const struct memcow *cow) { return cow->zero; }
