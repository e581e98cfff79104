/*
 * The sweeper: walks over the scope, a block of 64 pages at a time, copies what nobody claimed yet, claims, releases. What
 * was staged is copied already: of that it only chooses the newest copy of each page.
 *
 * Why no race is lost. After the instant every page is protected (invariant 3), and released only when claimed
 * (invariant 2).
 *
 * - Populated pages. The block is copied, then its whole word of `claimed` is claimed at once. A bit that was already
 * set belongs to the fault path, which may have released the page in the middle of our copy: that copy may be torn and
 * is dropped. A bit that we set tells that the page was not released before, so no write has reached it: our copy,
 * older than the claim, is that of the instant.
 * - Holes. SEEK_DATA says at some time after the instant that a page is not populated, so it reads as zero then. If we
 * win the claim later, no writer has been let in between the instant and the claim (a write to an unpopulated page
 * meets the page table marker), so it was zero at the instant as well. If the guest populates it by a write, the fault
 * path claims it first, reads a fresh zero page, and we lose the claim. If the guest (or the fault path) populates it
 * by a read, it stays zero. A page that is populated between SEEK_DATA and our claim without being claimed can only
 * have been populated by a read. We never read a hole ourselves, so the sweep populates nothing.
 * - What was found to be populated stays so (invariant 6): one answer holds for all pages that it names, however late we come to them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/priority.h"
#include "checkpoint/memcow_internal.h"
#include "checkpoint/uffd.h"

/* Unpopulated pages released with one call. */
#define HOLE_RELEASE_BLOCKS 16u

struct sweep {
	struct memcow *cow;
	struct segment *segment; /* empty, at hand */
	struct populated at;
	struct priority_room room;
};

static int release_blocks(struct sweep *s, uint64_t block, uint64_t count)
{
	struct memcow *cow = s->cow;
	if (!cow->protecting)
		return 0;
	uint64_t first = block * 64, end = min_u64((block + count) * 64, cow->pages);
	return uffd_release(cow->uffd, cow->base + first * PAGE_BYTES, (end - first) * PAGE_BYTES);
}

/* Claims `mask` of the block; returns the bits that were ours to claim, of which those in `zero` are noted as zero pages. */
static uint64_t claim_block(struct memcow *cow, uint64_t block, uint64_t mask, uint64_t zero)
{
	uint64_t mine = mask & ~atomic_fetch_or_explicit(&cow->claimed[block], mask, memory_order_acq_rel);
	zero &= mine;
	atomic_fetch_or_explicit(&cow->zero[block], zero, memory_order_relaxed);
	atomic_fetch_add_explicit(&cow->zero_pages, popcount64(zero), memory_order_relaxed);
	atomic_fetch_add_explicit(&cow->saved_pages, popcount64(mine & ~zero), memory_order_relaxed);
	return mine;
}

/* Copies the pages of `want` into the segment, each to the slot of its place in the block. Returns which of them are
 * zero. */
static int copy_block(struct sweep *s, uint64_t block, uint64_t want, uint64_t *zero)
{
	*zero = 0;
	for (uint64_t bits = want; bits; bits &= bits - 1) {
		unsigned slot = (unsigned)__builtin_ctzll(bits);
		uint64_t page = block * 64 + slot;
		const uint8_t *source = s->cow->base + page * PAGE_BYTES;
		int r = find_populated(s->cow, page, &s->at);
		if (r != 0)
			return r;
		if (page < s->at.first || page_is_zero(source))
			*zero |= (uint64_t)1 << slot;
		else
			page_copy(s->segment->data + (size_t)slot * PAGE_BYTES, source);
	}
	return 0;
}

/*
 * What is to be written with the segment: the pages of the block that we copied and claimed, and those that the fault path claimed and holds. Not what
 * it may be about to hold of a page that we claimed: that copy is too late.
 */
static void list_block(struct sweep *s, uint64_t block, uint64_t mine, uint64_t zero)
{
	struct memcow *cow = s->cow;
	struct segment *segment = s->segment;
	for (uint64_t bits = cow->scope[block] & ~(mine & zero); bits; bits &= bits - 1) {
		unsigned slot = (unsigned)__builtin_ctzll(bits);
		uint64_t page = block * 64 + slot;
		uint8_t *data = mine >> slot & 1 ? segment->data + (size_t)slot * PAGE_BYTES : hold_take(&cow->hold, page);
		if (data)
			segment->entries[segment->count++] = (struct segment_entry){.page = page, .data = data};
	}
}

static int sweep_block(struct sweep *s, uint64_t block)
{
	struct memcow *cow = s->cow;
	uint64_t want = cow->scope[block] & ~atomic_load_explicit(&cow->claimed[block], memory_order_acquire);
	/* The fault path released each of them, but not what was protected between them. */
	if (want == 0 && !hold_has(&cow->hold, block * 64, min_u64(block * 64 + 64, cow->pages)))
		return cow->whole ? 0 : release_blocks(s, block, 1);
	if (!s->segment)
		s->segment = pool_get(cow->pool, false, NULL);
	if (!s->segment)
		return -ECANCELED;
	uint64_t zero;
	int r = copy_block(s, block, want, &zero);
	if (r != 0)
		return r;
	uint64_t mine = claim_block(cow, block, want, zero);
	r = release_blocks(s, block, 1);
	list_block(s, block, mine, zero);
	if (s->segment->count > 0) {
		pool_push(cow->pool, s->segment);
		s->segment = NULL;
	}
	return r;
}

/* From `block` on: claims up to HOLE_RELEASE_BLOCKS blocks that lie wholly in a hole. *count: how many. */
static int sweep_hole(struct sweep *s, uint64_t block, uint64_t *count)
{
	*count = 0;
	if (!s->cow->whole)
		return 0; /* its pages were written: there are hardly any holes */
	int r = find_populated(s->cow, block * 64, &s->at);
	if (r != 0)
		return r;
	while (*count < HOLE_RELEASE_BLOCKS && block + *count < s->cow->blocks) {
		uint64_t mask = s->cow->scope[block + *count];
		if ((block + *count) * 64 + popcount64(mask) > s->at.first)
			break;
		claim_block(s->cow, block + *count, mask, mask);
		++*count;
	}
	return *count ? release_blocks(s, block, *count) : 0;
}

static int sweep_all(struct sweep *s, struct err *err)
{
	struct memcow *cow = s->cow;
	uint64_t block = 0;
	while (block < cow->blocks) {
		if (cow->scope[block] == 0) {
			block++;
			continue;
		}
		if (atomic_load_explicit(&cow->failed, memory_order_acquire))
			return -ECANCELED;
		int r = fault_check(FAULT_MEMCOW_SWEEP, err);
		if (r != 0)
			return r;
		uint64_t count;
		r = sweep_hole(s, block, &count);
		if (r == 0 && count == 0) {
			r = sweep_block(s, block);
			count = 1;
		}
		if (r != 0)
			return err_sys(err, -r, "saving memory page %llu", (unsigned long long)block * 64);
		block += count;
		hold_touch(&cow->hold, HOLD_READY_PAGES);
		priority_give_way_each(cow->room_each_ns, &s->room); /* a tick is milliseconds */
	}
	return 0;
}

/* Adds the entries that are the newest copies of their pages, and not zero, to `kept`. Later segments were gone through before. */
static uint64_t claim_staged(struct memcow *cow, const struct segment *segment, struct segment_entry *kept)
{
	uint64_t count = 0;
	for (uint32_t i = segment->count; i-- > 0;) {
		struct segment_entry entry = segment->entries[i];
		if (!bitmap_claim(cow->claimed, entry.page))
			continue;
		if (page_is_zero(entry.data)) {
			bitmap_claim(cow->zero, entry.page);
		} else {
			bitmap_clear(cow->zero, entry.page); /* an earlier pass may have found it zero */
			kept[count++] = entry;
		}
	}
	return count;
}

int memcow_compare_pages(const void *a, const void *b)
{
	uint64_t x = ((const struct segment_entry *)a)->page, y = ((const struct segment_entry *)b)->page;
	return x < y ? -1 : x > y;
}

/* Hands the entries to the writer in the order of their pages, whichever segments their data are in: so they are few and long writes. Nobody
 * takes a segment for another copy any more. */
static int push_sorted(struct memcow *cow, struct segment_entry *entries, uint64_t count)
{
	qsort(entries, count, sizeof(*entries), memcow_compare_pages);
	for (struct segment *segment = cow->staged, *next; segment; segment = next) {
		if (atomic_load_explicit(&cow->failed, memory_order_acquire))
			return -ECANCELED;
		next = segment->next;
		segment->count = (uint32_t)min_u64(count, SEGMENT_PAGES);
		memcpy(segment->entries, entries, segment->count * sizeof(*entries));
		entries += segment->count;
		count -= segment->count;
		pool_push(cow->pool, segment);
	}
	cow->staged = NULL;
	return 0;
}

/* The staged copies, from the newest on. */
static int push_staged(struct sweep *s, struct err *err)
{
	struct memcow *cow = s->cow;
	uint64_t most = 0, count = 0, zero = 0;
	for (const struct segment *segment = cow->staged; segment; segment = segment->next)
		most += segment->count;
	CLEANUP_FREE struct segment_entry *kept = malloc((most + 1) * sizeof(*kept));
	if (!kept)
		return err_sys(err, ENOMEM, "list of %llu pages", (unsigned long long)most);
	for (const struct segment *segment = cow->staged; segment; segment = segment->next) {
		int r = fault_check(FAULT_MEMCOW_SWEEP, err);
		if (r != 0)
			return r;
		count += claim_staged(cow, segment, kept + count);
		priority_give_way_each(cow->room_each_ns, &s->room);
	}
	for (uint64_t b = 0; b < cow->blocks; b++)
		zero += popcount64(cow->zero[b]);
	cow->zero_pages = zero;
	cow->saved_pages = cow->scope_pages - zero;
	return push_sorted(cow, kept, count);
}

/* The fault thread's half-filled segment. From here on it needs none: everything is claimed. */
static void flush_fault_segment(struct memcow *cow)
{
	pthread_mutex_lock(&cow->lock);
	struct segment *segment = cow->fault_segment;
	cow->fault_segment = NULL;
	pthread_mutex_unlock(&cow->lock);
	if (segment)
		pool_push(cow->pool, segment);
}

bool memcow_wait_for_save(struct memcow *cow)
{
	pthread_mutex_lock(&cow->done_lock);
	while (!cow->save && !cow->stop)
		pthread_cond_wait(&cow->done_cond, &cow->done_lock);
	bool go = cow->save && !cow->stop;
	pthread_mutex_unlock(&cow->done_lock);
	return go;
}

void *memcow_sweeper_main(void *opaque)
{
	struct memcow *cow = opaque;
	struct sweep sweep = {.cow = cow};
	struct err err = ERR_INIT;
	pthread_setname_np(pthread_self(), "vmcp-sweep");
	priority_background();
	if (!memcow_wait_for_save(cow))
		return NULL;
	bool staged = cow->way == MEMCOW_STAGE || cow->way == MEMCOW_SETTLE;
	int r = staged ? push_staged(&sweep, &err) : sweep_all(&sweep, &err);
	if (r != 0)
		memcow_fail(cow, &err);
	else
		flush_fault_segment(cow);
	if (sweep.segment)
		pool_put(cow->pool, sweep.segment);
	pool_close(cow->pool);
	return NULL;
}
