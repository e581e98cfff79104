/*
 * Pages that are copied into memory while the guest runs already: of an index whose pages lie scattered over many layers, as after a hundred checkpoints,
 * so that a mapping for each would be too dear, and so would copying all of them before the start.
 *
 * Their memory is registered with userfaultfd. One thread copies them in order, each checked against its checksum, and in between answers
 * whoever misses a page by filling that one first. When all are there the registration is dropped.
 */
#ifndef VMCP_CHECKPOINT_FILLER_H
#define VMCP_CHECKPOINT_FILLER_H

#include <stdint.h>

#include "base/err.h"
#include "checkpoint/restore.h"
#include "vmm/memory.h"

struct filler;

/*
 * From here on whoever touches one of the pages waits for filler_run. `pages`: bitmap of ram pages, whole extents of the layers' index, in private memory. `mapped`:
 * bitmap of those at which a file will be mapped: after this call, and before any page is touched. What lies between pages to be filled may be touched at any time,
 * and then waits as well. All stay the caller's, unchanged until filler_destroy. ERR_HOST if this host has no userfaultfd for us: nothing is changed then.
 */
int filler_create(struct mem *mem, struct restore_layers *layers, const uint64_t *pages, const uint64_t *mapped,
		  struct filler **out, struct err *err);
/* Fills all pages. On failure threads may wait for pages that nobody can fill: only the end of the process helps them. */
int filler_run(struct filler *filler, struct err *err);
/* NULL is allowed. After filler_run, or before anybody touched a page. */
void filler_destroy(struct filler *filler);

#endif
