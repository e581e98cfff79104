/* Guest memory: what the loader says there is, handed out once and never given back. */
#ifndef TINY_RAM_H
#define TINY_RAM_H

#include <stdbool.h>
#include <stdint.h>

#include "pvh.h"

#define PAGE_BYTES     4096u
#define RAM_RANGES     32
#define RAM_MAPPED_END (64ull << 30) /* RAM from here on is left alone */

struct ram_range {
	uint64_t start_gpa; /* page aligned, as is the end; identity mapped */
	uint64_t end_gpa;
};

struct ram {
	uint64_t total_bytes; /* all that the map calls RAM */
	unsigned int ranges;
	struct ram_range range[RAM_RANGES]; /* still free: above 1 MiB, without our image */
};

/* False if the memory map is missing or useless. Copies what it needs: afterwards the loader's data may be overwritten. */
bool ram_start(struct ram *ram, const struct pvh_start_info *info);

uint64_t ram_free_bytes(const struct ram *ram);

/* Whole pages, contiguous, content unknown. NULL if no range is large enough. */
void *ram_take(struct ram *ram, uint64_t bytes);

/* An address through which the device memory at gpa can be reached. NULL if there is no room to map it. */
volatile uint8_t *ram_map_device(uint64_t gpa, uint64_t bytes);

#endif
