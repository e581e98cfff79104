/* Which files of an ext filesystem two states of a disk have different. */
#ifndef VMCP_CLI_DIFF_FILES_H
#define VMCP_CLI_DIFF_FILES_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct file_change {
	char *path; /* with "pN:" before it where the filesystem is on partition N */
	const char *change; /* "added", "removed", "changed" */
	uint64_t size_bytes; /* in the later state; of one that was removed, before */
};

struct file_diff {
	const char *paths[2]; /* images, with their chains */
	int formats[2]; /* as for cow_open_as */
	/* True if the disks differ within that range. */
	int (*differs)(void *opaque, uint64_t offset, uint64_t length);
	void *opaque;
	/* results */
	unsigned filesystems; /* that were compared */
	struct file_change *changes; /* malloc, by path */
	size_t count;
};
/* A file has changed if its inode says so, or a block of its content differs. Failed: nothing to free. -ENOSYS, ERR_HOST where vmcp was built without
 * libext2fs. */
int diff_files(struct file_diff *diff, struct err *err);
void file_diff_free(struct file_diff *diff);

#endif
