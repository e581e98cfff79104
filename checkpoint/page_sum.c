/* Where libxxhash does not choose by the processor: see x86/page_sum.c. */
#include <xxhash.h>

#include "base/bytes.h"
#include "checkpoint/sums.h"

uint64_t page_sum(uint64_t page, const void *data) { return XXH3_64bits_withSeed(data, PAGE_BYTES, page); }
