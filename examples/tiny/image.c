#include "image.h"

#include "pattern.h"

extern const uint8_t image_start[], image_fixed_end[];

uint64_t image_sum(void)
{
	const uint8_t *at;
	uint64_t sum = 0;

	for (at = image_start; at < image_fixed_end; at++)
		sum = pattern_word(sum, *at);
	return sum;
}
