/*
 * A latency histogram of fixed size: log2-linear buckets, 16 to an octave, so that a percentile is right within 1/16
 * over the whole range of 64 bits. Recording is one atomic increment: any thread, allocates nothing.
 */
#ifndef VMCP_CHECKPOINT_HISTOGRAM_H
#define VMCP_CHECKPOINT_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>

#define HISTOGRAM_SUB_BITS 4
#define HISTOGRAM_BUCKETS  ((64 - HISTOGRAM_SUB_BITS + 1) << HISTOGRAM_SUB_BITS)

struct histogram {
	_Atomic uint64_t count, max, sum;
	_Atomic uint32_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_reset(struct histogram *h); /* nobody records meanwhile */
void histogram_record(struct histogram *h, uint64_t value);
/* The value below or at which `permille` thousandths of the records lie: upper end of its bucket, never above the
 * maximum. 0 if empty. */
uint64_t histogram_percentile(const struct histogram *h, unsigned permille);
/* How many records are below 2^power. */
uint64_t histogram_count_below(const struct histogram *h, unsigned power);

#endif
