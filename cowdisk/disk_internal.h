/* What disk.c does for others. */
#ifndef VMCP_COWDISK_DISK_INTERNAL_H
#define VMCP_COWDISK_DISK_INTERNAL_H

#include "cowdisk/image_internal.h"
#include "cowdisk/overlay.h"

/* Drives the ring until all that was written is on stable storage. */
int cow_disk_make_clean(struct image *image);
/* Drives the ring until no metadata of the disk is on its way. */
void cow_disk_wait_idle(struct cow_disk *disk);

#endif
