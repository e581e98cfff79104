/*
 * A random workload on a disk, checked sector by sector against what the program itself issued.
 *
 * Every written sector says which write it came from (sector number and version, the rest derived from both), so
 * that a sector can be judged without a copy of the data, after a crash as well: the journal (a shared mapping that
 * survives kill -9) says per sector what the newest durable version is and what was issued later.
 */
#ifndef VMCP_TESTS_DISK_STRESS_H
#define VMCP_TESTS_DISK_STRESS_H

#include <stdbool.h>
#include <stdint.h>

struct stress {
	const char *image;
	const char *initial; /* raw content at the start; NULL: zeroes */
	const char *journal; /* NULL: none */
	const char *expect;  /* raw file to be written with what the disk must hold; NULL: none */
	const char *layers;  /* prefix of overlays' names; NULL: no overlays */
	uint64_t seed;
	unsigned operations;
	unsigned depth;	       /* requests in flight */
	unsigned switch_every; /* operations; 0: never */
	unsigned merge_every;  /* operations; 0: never. Needs overlays */
	unsigned flush_every;  /* about */
	unsigned max_sectors;  /* of a request */
	bool threads;	       /* not io_uring */
	bool tolerate;	       /* requests may fail: what a failed one wrote is unknown */
	bool no_discard;
};

/* 0 if all was well. */
int stress_run(const struct stress *s);
/* Judges the raw file against the journal of a run that was killed. */
int stress_verify(const char *journal, const char *raw);
/* Writes a raw file of random runs of version-1 sectors and zeroes. */
int stress_pattern(const char *raw, uint64_t bytes, uint64_t seed);

#endif
