/* Copying what some layers of one disk hold into another disk: merges and exports. */
#ifndef VMCP_COWDISK_COPY_INTERNAL_H
#define VMCP_COWDISK_COPY_INTERNAL_H

#include "cowdisk/image_internal.h"
#include "cowdisk/merge.h"

/* Both disks are on one ring, which nobody else serves. */
struct copy_job {
	struct cow_disk *from;
	const struct image *stop; /* of from's chain: it and what is below are not copied; NULL: all are */
	struct cow_disk *to;	  /* new: reads as `stop` (as zeroes without one) */
	bool keeps; /* `to` is not new, but holds what lies below what is copied: zeroes are written too */
	uint64_t bytes_per_second; /* 0: as fast as it goes */
	const volatile bool *cancel;
	cow_progress_fn *progress;
	void *opaque;
	uint64_t data_bytes; /* out: written */
};
int cow_copy(struct copy_job *job, struct err *err);

#endif
