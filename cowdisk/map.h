/* Where the bytes of a disk are, for those who copy or compare disks without reading what need not be read. */
#ifndef VMCP_COWDISK_MAP_H
#define VMCP_COWDISK_MAP_H

#include <stdbool.h>
#include <stdint.h>

#include "cowdisk/block.h"

struct cow_run {
	bool data;	 /* false: reads as zeroes */
	uint64_t length; /* bytes for which this holds, at least 1 */
	/* Of data: the file that holds them and where in it. Two runs of which all of this agrees are the same bytes. */
	uint64_t device, inode, place;
	bool compressed; /* place is the table's entry: only runs of which offset and length agree, too, compare */
};

/* What the disk is from `offset` on, at most `length` bytes (within the disk). As cow_read_sync: only while no loop serves the ring. */
int cow_map(struct cow_disk *disk, uint64_t offset, uint64_t length, struct cow_run *out, struct err *err);

/* Makes a range read as zeroes, its space given back where that can be. Synchronous, as cow_write_sync. */
int cow_zero_sync(struct cow_disk *disk, uint64_t offset, uint64_t length, struct err *err);

#endif
