/* Where two images, with their chains, read differently. */
#ifndef VMCP_COWDISK_COMPARE_H
#define VMCP_COWDISK_COMPARE_H

#include "cowdisk/block.h"

struct cow_compare {
	const char *paths[2];
	int formats[2]; /* as for cow_open_as */
	/* A range that differs, in ascending order, ranges that touch put together; whole sectors. What one of the two is longer differs. */
	void (*differs)(void *opaque, uint64_t offset, uint64_t length);
	void (*progress)(void *opaque, uint64_t done_bytes, uint64_t total_bytes); /* NULL: none */
	void *opaque;
	const volatile bool *cancel; /* turning true ends it with -ECANCELED; NULL: never */
	/* results */
	uint64_t size_bytes[2], differing_bytes;
	uint64_t read_bytes; /* of each: what is not from the same place of the same file in both, nor zero in both */
};
/* Opens both read-only; they may be in use as backing files. Any thread but one that serves a ring. */
int cow_compare(struct cow_compare *compare, struct err *err);

#endif
