/* Any bytes as the journal of an ext4 filesystem. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cli/ext4_journal.h"
#include "fuzz/fuzz.h"

enum { BLOCK_BYTES = 1024 };

struct input {
	const uint8_t *data;
	size_t size;
	unsigned long applied;
};

static int read_block(void *opaque, uint32_t number, uint8_t *data, struct err *err)
{
	const struct input *input = opaque;
	(void)err;
	if (((size_t)number + 1) * BLOCK_BYTES > input->size)
		return -EINVAL;
	memcpy(data, input->data + (size_t)number * BLOCK_BYTES, BLOCK_BYTES);
	return 0;
}

static int apply(void *opaque, uint64_t number, const uint8_t *data, struct err *err)
{
	struct input *input = opaque;
	(void)number, (void)data, (void)err;
	input->applied++;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {.data = data, .size = size};
	const struct journal_reader reader = {.read = read_block, .apply = apply, .opaque = &input, .block_bytes = BLOCK_BYTES};
	journal_replay(&reader, NULL);
	return 0;
}
