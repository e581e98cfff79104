/* Bitmaps whose bits may be claimed by several threads. Header only. */
#ifndef VMCP_BASE_BITMAP_H
#define VMCP_BASE_BITMAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BITMAP_WORDS(bits) (((bits) + 63) / 64)

static inline bool bitmap_test(const _Atomic uint64_t *map, uint64_t bit)
{
	return (atomic_load_explicit(&map[bit / 64], memory_order_acquire) >> (bit % 64)) & 1;
}
/* Sets the bit; true if it was clear before: exactly one of several callers gets true. */
static inline bool bitmap_claim(_Atomic uint64_t *map, uint64_t bit)
{
	uint64_t mask = (uint64_t)1 << (bit % 64);
	return !(atomic_fetch_or_explicit(&map[bit / 64], mask, memory_order_acq_rel) & mask);
}
static inline void bitmap_clear(_Atomic uint64_t *map, uint64_t bit)
{
	atomic_fetch_and_explicit(&map[bit / 64], ~((uint64_t)1 << (bit % 64)), memory_order_acq_rel);
}

/* Of one owner. */
static inline bool bitmap_has(const uint64_t *map, uint64_t bit) { return map[bit / 64] >> (bit % 64) & 1; }
/* Of one owner: sets the bits [first, first + count). */
static inline void bitmap_fill(uint64_t *map, uint64_t first, uint64_t count)
{
	for (uint64_t bit = first, end = first + count; bit < end;) {
		uint64_t in_word = 64 - bit % 64, n = end - bit < in_word ? end - bit : in_word;
		map[bit / 64] |= (n == 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1) << (bit % 64);
		bit += n;
	}
}

#endif
