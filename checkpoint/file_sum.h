/* The checksum of a whole file: XXH3, 64 bits, seed 0. */
#ifndef VMCP_CHECKPOINT_FILE_SUM_H
#define VMCP_CHECKPOINT_FILE_SUM_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

/* Told of each piece that was hashed, and whether it had to be read, as holes are not. False: stop. */
typedef bool (*file_sum_step)(void *opaque, uint64_t bytes, bool read);

/* Of the first `size` bytes. `step` may be NULL. -ECANCELED if step said so; the file ends before that: -ENODATA. Any thread. */
int file_sum(int fd, uint64_t size, file_sum_step step, void *opaque, uint64_t *sum, struct err *err);

#endif
