/* What libFuzzer calls, and replay.c. */
#ifndef VMCP_FUZZ_FUZZ_H
#define VMCP_FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
