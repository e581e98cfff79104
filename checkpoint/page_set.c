/* Page primitives of memcow: a two-level set, zero test and copy. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "checkpoint/memcow_internal.h"

#if defined(__SANITIZE_THREAD__)
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define UNWATCHED
#endif

/* 32 bytes as a compiler vector: SSE2 pairs or AVX2, as the target allows. */
typedef uint64_t page_vec __attribute__((vector_size(32), may_alias, aligned(32)));

UNWATCHED bool page_is_zero(const void *page)
{
	const page_vec *v = __builtin_assume_aligned(page, 4096);
	/* Most pages that are not zero show it in their first bytes. */
	for (unsigned i = 0; i < 4096 / sizeof(*v); i += 8) {
		page_vec any = v[i] | v[i + 1] | v[i + 2] | v[i + 3] | v[i + 4] | v[i + 5] | v[i + 6] | v[i + 7];
		if (any[0] | any[1] | any[2] | any[3])
			return false;
	}
	return true;
}

UNWATCHED void page_copy(void *to, const void *from)
{
	const page_vec *s = __builtin_assume_aligned(from, 4096);
	page_vec *d = __builtin_assume_aligned(to, 4096);
	for (unsigned i = 0; i < 4096 / sizeof(*s); i += 4) {
		page_vec a = s[i], b = s[i + 1], c = s[i + 2], e = s[i + 3];
		d[i] = a;
		d[i + 1] = b;
		d[i + 2] = c;
		d[i + 3] = e;
	}
}

int page_set_init(struct page_set *set, uint64_t pages, struct err *err)
{
	set->word_count = BITMAP_WORDS(pages);
	set->summary_count = BITMAP_WORDS(set->word_count);
	set->words = calloc(set->word_count + set->summary_count, sizeof(uint64_t));
	if (!set->words)
		return err_sys(err, ENOMEM, "cannot allocate a bitmap of %llu pages", (unsigned long long)pages);
	set->summary = set->words + set->word_count;
	return 0;
}

void page_set_free(struct page_set *set)
{
	free((void *)set->words);
	set->words = set->summary = NULL;
}

bool page_set_add(struct page_set *set, uint64_t page)
{
	if (!bitmap_claim(set->words, page))
		return false;
	/* Second, so that a taker who clears the summary first either sees the word's bit or leaves this summary bit
	 * for the next time. */
	bitmap_claim(set->summary, page / 64);
	return true;
}

uint64_t page_set_count(const struct page_set *set)
{
	uint64_t count = 0;
	for (uint64_t s = 0; s < set->summary_count; s++) {
		uint64_t bits = atomic_load_explicit(&set->summary[s], memory_order_acquire);
		for (; bits; bits &= bits - 1)
			count += popcount64(set->words[s * 64 + (unsigned)__builtin_ctzll(bits)]);
	}
	return count;
}

struct taking {
	uint64_t gap, first, end, taken; /* the run so far: [first, end), none if end == 0 */
	page_run_fn *fn;
	void *opaque;
};

static int take_page(struct taking *t, uint64_t page)
{
	t->taken++;
	if (t->end != 0 && page <= t->end + t->gap) {
		t->end = page + 1;
		return 0;
	}
	int r = t->end != 0 ? t->fn(t->opaque, t->first, t->end - t->first) : 0;
	t->first = page;
	t->end = page + 1;
	return r;
}

int page_set_take(struct page_set *set, uint64_t gap, page_run_fn *fn, void *opaque, uint64_t *taken)
{
	struct taking t = {.gap = gap, .fn = fn, .opaque = opaque};
	int r = 0;
	for (uint64_t s = 0; s < set->summary_count && r == 0; s++) {
		if (atomic_load_explicit(&set->summary[s], memory_order_relaxed) == 0)
			continue;
		uint64_t words = atomic_exchange_explicit(&set->summary[s], 0, memory_order_acq_rel);
		for (; words && r == 0; words &= words - 1) {
			uint64_t word = s * 64 + (unsigned)__builtin_ctzll(words);
			uint64_t bits = atomic_exchange_explicit(&set->words[word], 0, memory_order_acq_rel);
			for (; bits && r == 0; bits &= bits - 1)
				r = take_page(&t, word * 64 + (unsigned)__builtin_ctzll(bits));
		}
	}
	if (r == 0 && t.end != 0)
		r = fn(opaque, t.first, t.end - t.first);
	if (taken)
		*taken = t.taken;
	return r;
}

void page_set_clear(struct page_set *set)
{
	for (uint64_t w = 0; w < set->word_count + set->summary_count; w++)
		atomic_store_explicit(&set->words[w], 0, memory_order_relaxed);
}
