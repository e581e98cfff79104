/* Sizes as people write them: digits, then nothing or K, M, G, T in either case, powers of 1024. */
#ifndef VMCP_BASE_SIZE_H
#define VMCP_BASE_SIZE_H

#include <stdbool.h>
#include <stdint.h>

/* False, and *bytes as it was, if the text is no size or the size does not fit. */
bool size_parse(const char *text, uint64_t *bytes);
#define SIZE_HINT "write a number with K, M, G or T, for example 512M"

#endif
