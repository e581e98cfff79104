#include "checkpoint/tracker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/priority.h"
#include "vmm/dirty_log.h"

/* Pages and words of the bitmap cleared with one call: KVM holds the lock of the VM's page tables, and a guest that faults waits. */
#define CLEAR_PAGES 512u
#define CLEAR_WORDS 1024u
/* Words without a page in between that cost less than another call. */
#define CLEAR_GAP_WORDS 2048u

struct tracker {
	struct vm *vm;
	struct mem *mem;
	struct loop *loop;
	uint64_t words;
	uint64_t *since, *fresh, *again; /* one mapping: untouched parts cost nothing */
	uint32_t *list;			 /* in it too: the words of `fresh` that are not 0 */
	uint64_t list_count;
	/* Pages that changed before the last rewind: set in `again`. */
	uint32_t *again_pages;
	uint32_t again_count, again_room;
	size_t mapped_bytes;
	bool on, base;
	uint64_t room_each_ns;
	struct tracker_timing timing;
};

int tracker_create(struct vm *vm, struct loop *loop, struct tracker **out, struct err *err)
{
	struct tracker *t = xcalloc(1, sizeof(*t));
	t->vm = vm;
	t->mem = vm_memory(vm);
	t->loop = loop;
	t->words = BITMAP_WORDS(mem_pages(t->mem));
	t->mapped_bytes = t->words * (3 * sizeof(uint64_t) + sizeof(*t->list));
	void *maps = mmap(NULL, t->mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (maps == MAP_FAILED) {
		free(t);
		return err_sys(err, ENOMEM, "cannot allocate bitmaps of written pages");
	}
	t->since = maps;
	t->fresh = t->since + t->words;
	t->again = t->fresh + t->words;
	t->list = (uint32_t *)(t->again + t->words);
	*out = t;
	return 0;
}

void tracker_destroy(struct tracker *t)
{
	if (!t)
		return;
	if (t->on)
		vm_dirty_log_stop(t->vm);
	munmap(t->since, t->mapped_bytes);
	free(t->again_pages);
	free(t);
}

void tracker_make_room(struct tracker *t, uint64_t each_ns) { t->room_each_ns = each_ns; }

struct tracker_timing tracker_timing(const struct tracker *t) { return t->timing; }

bool tracker_is_on(const struct tracker *t) { return t->on; }
bool tracker_has_base(const struct tracker *t) { return t->base; }
uint64_t tracker_words(const struct tracker *t) { return t->words; }
const uint64_t *tracker_since(const struct tracker *t) { return t->since; }
const uint64_t *tracker_fresh(const struct tracker *t) { return t->fresh; }

struct page_words tracker_fresh_words(const struct tracker *t)
{
	return (struct page_words){.words = t->fresh, .list = t->list, .count = t->list_count};
}

uint64_t tracker_since_count(const struct tracker *t)
{
	uint64_t pages = 0;
	for (uint64_t w = 0; w < t->words; w++)
		pages += (uint64_t)__builtin_popcountll(t->since[w]);
	return pages;
}

/* Clears the log for the pages of `fresh`, a bounded number with each call. */
static int clear_fresh(struct tracker *t, bool politely, struct err *err)
{
	struct priority_room room = {0};
	int r = 0;
	for (uint64_t first = 0; first < t->words && r == 0;) {
		uint64_t end = first, pages = 0;
		while (end < t->words && end - first < CLEAR_WORDS && pages < CLEAR_PAGES)
			pages += (uint64_t)__builtin_popcountll(t->fresh[end++]);
		if (pages > 0) {
			r = vm_dirty_log_clear(t->vm, first, end - first, t->fresh + first, err);
			if (politely)
				priority_give_way_each(t->room_each_ns, &room);
		}
		first = end;
	}
	return r;
}

int tracker_start(struct tracker *t, bool vm_runs, struct err *err)
{
	if (t->on)
		return 0;
	t->base = false;
	bool all_set;
	int r = vm_dirty_log_start(t->vm, &all_set, err);
	if (r != 0)
		return r;
	if (all_set) {
		memset(t->fresh, 0xff, t->words * sizeof(uint64_t));
		r = clear_fresh(t, vm_runs, err);
	}
	if (r != 0)
		vm_dirty_log_stop(t->vm);
	t->on = r == 0;
	return r;
}

/* Adds `fresh` to `since` and lists its words; returns how many pages it holds. */
static uint64_t note_fresh(struct tracker *t)
{
	uint64_t pages = 0, count = 0, w = 0;
	while (w < t->words) {
		/* Mostly zero, and in the pause: eight words at a time. */
		const uint64_t *f = t->fresh + w;
		if (w + 8 <= t->words && (f[0] | f[1] | f[2] | f[3] | f[4] | f[5] | f[6] | f[7]) == 0) {
			w += 8;
			continue;
		}
		for (uint64_t end = min_u64(w + 8, t->words); w < end; w++) {
			if (t->fresh[w] == 0)
				continue;
			t->list[count++] = (uint32_t)w;
			t->since[w] |= t->fresh[w];
			pages += (uint64_t)__builtin_popcountll(t->fresh[w]);
		}
	}
	t->list_count = count;
	return pages;
}

int tracker_harvest(struct tracker *t, uint64_t *count, struct err *err)
{
	int r = fault_check(FAULT_TRACKER_HARVEST, err);
	uint64_t start_ns = clock_now_ns();
	if (r == 0)
		r = vm_dirty_log_get(t->vm, t->fresh, err);
	uint64_t got_ns = clock_now_ns();
	if (r == 0)
		r = clear_fresh(t, true, err);
	if (r != 0) {
		tracker_drop_base(t); /* what was cleared is known to nobody */
		return r;
	}
	uint64_t cleared_ns = clock_now_ns();
	/* Only with the loop parked is what was marked also written. */
	loop_park_request(t->loop);
	loop_park_wait(t->loop);
	mem_take_dirty(t->mem, t->fresh);
	loop_unpark(t->loop);
	*count = note_fresh(t);
	t->timing = (struct tracker_timing){
		.at_ns = start_ns,
		.read_ns = got_ns - start_ns + clock_now_ns() - cleared_ns,
		.log_ns = cleared_ns - got_ns,
	};
	return 0;
}

int tracker_peek(struct tracker *t, uint64_t *count, struct err *err)
{
	int r = vm_dirty_log_get(t->vm, t->fresh, err);
	*count = 0;
	for (uint64_t w = 0; w < t->words && r == 0; w++)
		*count += (uint64_t)__builtin_popcountll(t->fresh[w]);
	memset(t->fresh, 0, t->words * sizeof(uint64_t));
	t->list_count = 0;
	return r;
}

int tracker_collect(struct tracker *t, uint64_t *count, struct err *err)
{
	int r = fault_check(FAULT_TRACKER_COLLECT, err);
	if (r == 0)
		r = vm_dirty_log_get(t->vm, t->fresh, err);
	if (r != 0)
		return r;
	mem_take_dirty(t->mem, t->fresh);
	*count = note_fresh(t);
	return 0;
}

void tracker_set_base(struct tracker *t)
{
	memset(t->since, 0, t->words * sizeof(uint64_t));
	t->base = t->on;
}

int tracker_rewind(struct tracker *t, struct err *err)
{
	int r = vm_dirty_log_get(t->vm, t->fresh, err);
	if (r == 0)
		r = clear_fresh(t, false, err);
	mem_take_dirty(t->mem, t->fresh);
	if (r == 0)
		tracker_set_base(t);
	else
		tracker_drop_base(t);
	return r;
}

bool tracker_collect_marks(struct tracker *t, uint64_t *words)
{
	bool any = mem_take_dirty(t->mem, words);
	for (uint64_t w = 0; any && w < t->words; w++) {
		t->since[w] |= words[w];
		t->fresh[w] |= words[w];
	}
	return any;
}

static uint64_t bit_of(uint32_t page) { return (uint64_t)1 << (page % 64); }

/* Those that changed become `again`. */
static void note_again(struct tracker *t, const uint32_t *pages, uint32_t count, const bool *changed)
{
	for (uint32_t i = 0; i < t->again_count; i++)
		t->again[t->again_pages[i] / 64] &= ~bit_of(t->again_pages[i]);
	t->again_count = 0;
	if (count > t->again_room) {
		free(t->again_pages);
		t->again_room = count * 2;
		t->again_pages = xcalloc(t->again_room, sizeof(*t->again_pages));
	}
	for (uint32_t i = 0; i < count; i++) {
		if (!changed[i])
			continue;
		t->again_pages[t->again_count++] = pages[i];
		t->again[pages[i] / 64] |= bit_of(pages[i]);
	}
}

/* The next stretch of words of `fresh` with pages in them, to be cleared by one call: [*first, *end). */
static bool next_stretch(const struct tracker *t, const uint32_t *pages, uint32_t count, uint32_t *at, uint64_t *first, uint64_t *end)
{
	*first = *end = 0;
	for (; *at < count; ++*at) {
		uint64_t w = pages[*at] / 64;
		if (t->fresh[w] == 0)
			continue;
		if (*end == 0)
			*first = w;
		else if (w > *end + CLEAR_GAP_WORDS)
			break;
		*end = w + 1;
	}
	return *end != 0;
}

int tracker_rewind_pages(struct tracker *t, const uint32_t *pages, uint32_t count, const bool *changed, struct err *err)
{
	uint64_t first, end;
	uint32_t at = 0;
	int r = 0;
	/* `fresh` holds nothing but these pages. */
	for (uint32_t i = 0; i < count; i++) {
		t->since[pages[i] / 64] &= ~bit_of(pages[i]);
		if (changed[i] && t->again[pages[i] / 64] & bit_of(pages[i]))
			t->fresh[pages[i] / 64] &= ~bit_of(pages[i]);
	}
	while (r == 0 && next_stretch(t, pages, count, &at, &first, &end))
		r = vm_dirty_log_clear(t->vm, first, end - first, t->fresh + first, err);
	if (r == 0)
		note_again(t, pages, count, changed);
	t->base = r == 0 && t->on;
	return r;
}

void tracker_drop_base(struct tracker *t) { t->base = false; }
