/* What an image file and its backing chain are. */
#ifndef VMCP_COWDISK_INFO_H
#define VMCP_COWDISK_INFO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cowdisk/block.h"

struct cow_info {
	char *path;
	enum cow_format format;
	uint64_t size_bytes;	 /* of the virtual disk */
	uint64_t file_bytes;	 /* length of the file */
	uint64_t occupied_bytes; /* of the file system */
	char *backing;		 /* name in the header, NULL if none */
	/* qcow2 */
	unsigned version, refcount_bits, snapshots;
	uint32_t cluster_bytes;
	bool zstd, dirty, corrupt, bitmaps;
};
/* From `path` down to the base; malloced. `format`: as for cow_open_as. Takes no locks: the image may be in use. Any thread but one that serves a ring. */
int cow_info(const char *path, int format, struct cow_info **out, size_t *count, struct err *err);
void cow_info_free(struct cow_info *info, size_t count);

#endif
