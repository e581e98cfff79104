/* What overlay.c and disk.c do for each other. */
#ifndef VMCP_COWDISK_DISK_INTERNAL_H
#define VMCP_COWDISK_DISK_INTERNAL_H

#include "cowdisk/image_internal.h"
#include "cowdisk/overlay.h"

/* Drives the ring until no metadata of the disk is on its way. */
void cow_disk_wait_idle(struct cow_disk *disk);

#endif
