/* Content that can be computed again: every word of a page or sector follows from its place and its stamp. */
#ifndef TINY_PATTERN_H
#define TINY_PATTERN_H

#include <stdint.h>

static inline uint64_t pattern_mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* What identifies one unit (page or sector) with one stamp: the seed of its words, and its term in the sums. */
static inline uint64_t pattern_base(uint64_t seed, uint64_t index, uint64_t stamp)
{
	return pattern_mix(pattern_mix(seed + index * 0x9e3779b97f4a7c15ull) ^ stamp);
}

static inline uint64_t pattern_word(uint64_t base, uint64_t word)
{
	uint64_t x = base + word * 0x9e3779b97f4a7c15ull;

	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	return x ^ x >> 29;
}

struct random {
	uint64_t state; /* never 0 */
};

static inline void random_start(struct random *random, uint64_t seed)
{
	random->state = pattern_mix(seed + 0x9e3779b97f4a7c15ull) | 1;
}

static inline uint64_t random_next(struct random *random) /* xorshift64* */
{
	uint64_t x = random->state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	random->state = x;
	return x * 0x2545f4914f6cdd1dull;
}

/* Evenly from 0 to limit-1, for limits below 2^32. */
static inline uint64_t random_below(struct random *random, uint64_t limit)
{
	return (random_next(random) >> 32) * limit >> 32;
}

/*
 * Stamps tell every write of this guest's life from every other: the epoch in the upper 16 bits, below it a
 * number that counts up by one at each write to memory or disk. The host gives a new epoch after a revert, so
 * that two histories with the same parent never use a stamp for different content.
 */
struct stamp_source {
	uint64_t epoch; /* as the host gave it; its low 16 bits go into the stamps */
	uint64_t sequence;
};

static inline uint64_t stamp_next(struct stamp_source *source) { return source->epoch << 48 | ++source->sequence; }

#endif
