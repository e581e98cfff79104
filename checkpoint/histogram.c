#include "checkpoint/histogram.h"

#define SUB_COUNT (1u << HISTOGRAM_SUB_BITS)

/* Values below 16 have a bucket each; above, the octave and the 4 bits below the leading one choose. */
static unsigned bucket_of(uint64_t value)
{
	if (value < SUB_COUNT)
		return (unsigned)value;
	unsigned shift = 63u - (unsigned)__builtin_clzll(value) - HISTOGRAM_SUB_BITS;
	return ((shift + 1) << HISTOGRAM_SUB_BITS) + (unsigned)((value >> shift) & (SUB_COUNT - 1));
}

static uint64_t bucket_last(unsigned bucket)
{
	if (bucket < SUB_COUNT)
		return bucket;
	unsigned shift = (bucket >> HISTOGRAM_SUB_BITS) - 1;
	uint64_t first = (uint64_t)(SUB_COUNT + (bucket & (SUB_COUNT - 1))) << shift;
	return first + (((uint64_t)1 << shift) - 1);
}

void histogram_reset(struct histogram *h)
{
	atomic_store_explicit(&h->count, 0, memory_order_relaxed);
	atomic_store_explicit(&h->max, 0, memory_order_relaxed);
	atomic_store_explicit(&h->sum, 0, memory_order_relaxed);
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
		atomic_store_explicit(&h->buckets[i], 0, memory_order_relaxed);
}

void histogram_record(struct histogram *h, uint64_t value)
{
	atomic_fetch_add_explicit(&h->buckets[bucket_of(value)], 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&h->count, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&h->sum, value, memory_order_relaxed);
	uint64_t max = atomic_load_explicit(&h->max, memory_order_relaxed);
	while (value > max &&
	       !atomic_compare_exchange_weak_explicit(&h->max, &max, value, memory_order_relaxed, memory_order_relaxed))
		;
}

uint64_t histogram_percentile(const struct histogram *h, unsigned permille)
{
	uint64_t count = atomic_load_explicit(&h->count, memory_order_relaxed);
	uint64_t max = atomic_load_explicit(&h->max, memory_order_relaxed);
	uint64_t wanted = (count * permille + 999) / 1000;
	uint64_t seen = 0;
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS && count != 0; i++) {
		seen += atomic_load_explicit(&h->buckets[i], memory_order_relaxed);
		if (seen >= wanted && seen != 0)
			return bucket_last(i) < max ? bucket_last(i) : max;
	}
	return max;
}

uint64_t histogram_count_below(const struct histogram *h, unsigned power)
{
	unsigned end = power < 64 ? bucket_of((uint64_t)1 << power) : HISTOGRAM_BUCKETS;
	uint64_t count = 0;

	for (unsigned i = 0; i < end; i++)
		count += atomic_load_explicit(&h->buckets[i], memory_order_relaxed);
	return count;
}
