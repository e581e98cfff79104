/* File I/O that finishes what it starts: whole reads and writes, atomic replacement, durable names. */
#ifndef VMCP_BASE_FILE_H
#define VMCP_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/buf.h"
#include "base/err.h"

/* Reads exactly `length` bytes at `offset`, through EINTR and short reads. End of file before that: -ENODATA. */
int file_pread_full(int fd, void *data, size_t length, uint64_t offset, struct err *err);
/* Writes exactly `length` bytes at `offset`. */
int file_pwrite_full(int fd, const void *data, size_t length, uint64_t offset, struct err *err);
/* Whether a file keeps no blocks at `at`, and so reads as zeroes there; up to *end, past `at`, it stays so (UINT64_MAX: nothing is known of an end). What the
 * filesystem cannot tell is data. Moves the descriptor's position. */
bool file_is_hole(int fd, uint64_t at, uint64_t *end);

/* Reads the whole file `name` (relative to dirfd, AT_FDCWD allowed) into *out (BUF_INIT before; to be freed by
 * buf_free; a NUL byte is kept after the data, not counted). More than `limit` bytes: -EFBIG, ERR_DAMAGED. Only
 * regular files: a FIFO or device would not end. */
int file_read_all(int dirfd, const char *name, size_t limit, struct buf *out, struct err *err);

/* Replaces `name` in the folder dirfd with `data`, so that after a crash at any instant either the old or the new
 * content is there, whole: temporary file, write, fsync, rename, fsync of the folder. The commit point is the rename:
 * an error after it (the message says so) leaves the new content. `name` has no slash. A crash may leave the
 * temporary, FILE_TEMP_PREFIX and 16 hex digits, which nobody needs. mode is subject to the umask. */
#define FILE_TEMP_PREFIX ".tmp-"
int file_write_atomic(int dirfd, const char *name, const void *data, size_t length, mode_t mode, struct err *err);

/* fsync of a folder given by descriptor. */
int file_sync_dir(int dirfd, struct err *err);
/* Opens (O_DIRECTORY | O_CLOEXEC) `path` relative to dirfd, making it and its parents if `create` (durably; mode 0700,
 * as what vmcp keeps holds guest memory). Returns a descriptor or -errno. */
int file_open_dir(int dirfd, const char *path, int create, struct err *err);
/* Removes a folder and everything below it; what is not there is no error. Never follows links. Folders nested deeper
 * than 64: -ELOOP. Not durable until the folder that held it is synced. */
int file_remove_tree(int dirfd, const char *name, struct err *err);

#endif
