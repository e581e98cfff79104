/* Looking at a qcow2 file without changing it: its consistency (reference counts against what the tables use), its backing file. */
#ifndef VMCP_COWDISK_CHECK_H
#define VMCP_COWDISK_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct cow_check {
	uint64_t allocated_clusters; /* data clusters in use by the active table */
	uint64_t leaks;		     /* clusters counted but not used: wasted space */
	uint64_t corruptions;	     /* used but not counted, overlapping, or out of the file */
	char first[256];	     /* the first corruption in words */
};
int cow_check(const char *path, struct cow_check *out, struct err *err);

/*
 * Writes the reference counts anew, from what the tables refer to, beside the old ones, and turns the header to them; then sets the copied flags
 * right, and clears the marks "dirty" and "corrupt" if nothing is wrong any more. Nothing that an entry of a table refers to is freed, moved or
 * overwritten; entries that lead nowhere stay as they are, and are counted in *after. Where a table cannot be followed counts are only raised. A crash
 * leaves the file no worse than it was. Needs the file to itself (-EBUSY).
 */
int cow_repair(const char *path, struct cow_check *before, struct cow_check *after, struct err *err);

/* The backing file that the image's header names, relative names resolved (malloc); NULL if it has none, or is raw. `format`: as for cow_open_as. Reads the header
 * only, takes no lock, so that it works on images in use. -ENOTSUP: the backing is no local file. Any thread. */
int cow_backing(const char *path, int format, char **backing, struct err *err);
/* The same, and whether a merge of the image loses nothing: it has no internal snapshots and no bitmaps. */
int cow_look(const char *path, int format, char **backing, bool *plain, struct err *err);
/* 1 if somebody has the image open, this process included, by QEMU's lock bytes; 0, -errno. Any thread. */
int cow_is_open(const char *path, struct err *err);

struct cow_second_opinion {
	uint64_t compared_bytes, different_bytes;
	uint64_t skipped_bytes;	   /* what libqcow is known to misread */
	uint64_t first_difference; /* offset on the disk */
};
/*
 * Reads the chain through libqcow too, and compares. `format`: as for cow_open_as. -ENOTSUP, ERR_FAILED with the reason where it must not be asked: see second_opinion.c. Damage that
 * only libqcow sees is an error (ERR_DAMAGED), a difference is not: it is in *out.
 */
int cow_second_opinion(const char *path, int format, struct cow_second_opinion *out, struct err *err);

#endif
