/* Looking at a qcow2 file without changing it: its consistency (reference counts against what the tables use), its backing file. */
#ifndef VMCP_COWDISK_CHECK_H
#define VMCP_COWDISK_CHECK_H

#include <stdint.h>

#include "base/err.h"

struct cow_check {
	uint64_t allocated_clusters; /* data clusters in use by the active table */
	uint64_t leaks;		     /* clusters counted but not used: wasted space */
	uint64_t corruptions;	     /* used but not counted, overlapping, or out of the file */
	char first[256];	     /* the first corruption in words */
};
int cow_check(const char *path, struct cow_check *out, struct err *err);

/* The backing file that the image's header names, relative names resolved (malloc); NULL if it has none, or is no qcow2 image. Reads the header
 * only, takes no lock, so that it works on images in use. -ENOTSUP: the backing is no local file. Any thread. */
int cow_backing(const char *path, char **backing, struct err *err);

#endif
