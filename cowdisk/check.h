/* Consistency of a qcow2 file, read-only: reference counts against what the tables use. */
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

#endif
