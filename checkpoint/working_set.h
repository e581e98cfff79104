/*
 * The working set of a checkpoint: the pages that a VM which was started from it touched in its first seconds. It is kept beside the
 * checkpoint, as a hint: a later start reads these pages first. docs/format.md describes the file byte by byte.
 *
 * Bitmaps have one bit a ram page (vmm/memory.h). Threads: any.
 */
#ifndef VMCP_CHECKPOINT_WORKING_SET_H
#define VMCP_CHECKPOINT_WORKING_SET_H

#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "vmm/memory.h"

#define WORKING_SET_MAX_BYTES (64u << 20)

int working_set_encode(const uint64_t *set, uint64_t pages, struct buf *out, struct err *err);
/* Decodes and validates [data, data + length), which is untrusted, into `set`, all zero before. -EINVAL, ERR_DAMAGED. */
int working_set_decode(const void *data, size_t length, uint64_t *set, uint64_t pages, struct err *err);
/* Sets, in `set`, those pages of `which` that this process has in its page tables: the guest touched them, or a page some few beside them
 * (the kernel maps neighbours that are in the page cache along with a page). */
int working_set_find(const struct mem *mem, const uint64_t *which, uint64_t *set, struct err *err);

#endif
