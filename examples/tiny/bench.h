/*
 * A benchmark of the first virtio disk, which it has for itself and overwrites: so many requests of one kind and size in flight, and how long they take by
 * the TSC. The first word of each 4 KiB that it writes follows from its place, and is compared by every read.
 */
#ifndef TINY_BENCH_H
#define TINY_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"
#include "virtio_blk.h"

#define BENCH_LARGEST_BYTES (1u << 20) /* one request */

/* BENCH_SYNC: writes at random, each followed by a flush before it counts. */
enum bench_kind { BENCH_READ, BENCH_WRITE, BENCH_SYNC, BENCH_SEQ_READ, BENCH_SEQ_WRITE, BENCH_KINDS };

struct bench_slot {
	bool busy;
	bool flushing;
	uint64_t sector;
	uint8_t *data;
};

struct bench {
	bool there;
	uint64_t cursor[2]; /* requests so far, at random and in sequence: the next run goes on from there */
	struct virtio_blk blk;
	struct bench_slot slot[VIRTIO_BLK_SLOTS];
};

struct bench_run {
	enum bench_kind kind;
	uint32_t bytes; /* of a request: a multiple of 4096, at most BENCH_LARGEST_BYTES */
	unsigned int depth;
	uint64_t requests, ms; /* it ends with the first of the two */
	/* out */
	uint64_t done, ns;
	uint64_t errors; /* requests that the device failed */
	uint64_t wrong;	 /* 4 KiB blocks read that were neither as written nor zero */
};

/* Returns NULL, or what is wrong. */
const char *bench_start(struct bench *bench, struct ram *ram);

/* Takes "KIND BYTES DEPTH REQUESTS MS" apart. False: wrong. */
bool bench_parse(const struct bench *bench, const char *text, struct bench_run *run);
const char *bench_kind_name(enum bench_kind kind);

/* False if a request does not come back within 30 s. */
bool bench_go(struct bench *bench, const struct clock *clock, struct bench_run *run);

#endif
