/*
 * An ext2, ext3 or ext4 filesystem on a disk image, read through libext2fs as it would be after a mount: what its journal holds is applied, in memory.
 * Nothing is written. One thread.
 */
#ifndef VMCP_CLI_EXT4_VIEW_H
#define VMCP_CLI_EXT4_VIEW_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "cowdisk/block.h"

struct ext4_view;

/* Where filesystems may be on a disk: all of it, or partitions of an MBR or a GPT. */
struct ext4_place {
	unsigned partition; /* from 1; 0: the whole disk */
	uint64_t offset_bytes;
};
#define EXT4_MAX_PLACES 128u
/* Those that hold an ext filesystem. The disk is open read-only, and nobody serves its ring. */
int ext4_find(struct cow_disk *disk, struct ext4_place places[EXT4_MAX_PLACES], unsigned *count, struct err *err);

/* -ENOSYS, ERR_HOST: libext2fs is not there. -ENOTSUP, ERR_FAILED: a filesystem with what libext2fs does not read, or with its journal on another device. Damaged: ERR_DAMAGED. */
int ext4_open(struct cow_disk *disk, uint64_t offset_bytes, struct ext4_view **out, struct err *err);
void ext4_close(struct ext4_view *view); /* NULL is allowed */

struct ext4_file {
	const char *path; /* "/etc/hosts" */
	uint32_t inode;
	uint64_t size_bytes;
	uint64_t print; /* a hash of all that the inode says: owner, mode, times, size, blocks */
};
/* Calls `fn` with every file, folder and link below the root; a non-zero result ends the walk and is returned. */
int ext4_walk(struct ext4_view *view, int (*fn)(void *opaque, const struct ext4_file *file), void *opaque, struct err *err);
/* True if `touches` says so of some block of the file's content, given as a range of the disk. */
bool ext4_any_block(struct ext4_view *view, uint32_t inode, bool (*touches)(void *opaque, uint64_t offset, uint64_t length), void *opaque);

#endif
