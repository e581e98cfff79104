/*
 * Any bytes as a checkpoint's state file, and as the body of a vCPU, the largest of its sections: that alone too, as hardly any mutation of a body gets past the
 * checksum of its section.
 */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/state_file.h"
#include "fuzz/fuzz.h"
#include "vmm/core.h"

static void decode_bodies(const struct state_section *sections, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		struct buf notes = BUF_INIT;
		if (strcmp(sections[i].id, core_vcpu_id()) == 0)
			core_add_vcpu(sections[i].body, sections[i].length, sections[i].instance, &notes, NULL);
		buf_free(&notes);
	}
}

/* What was accepted is written again, and must be accepted again. */
static void write_again(const struct state_section *sections, size_t count)
{
	struct buf out = BUF_INIT;
	struct state_section *again;
	size_t found;
	if (state_file_start(&out, count, NULL) != 0)
		abort();
	for (size_t i = 0; i < count; i++)
		if (state_file_add(&out, &sections[i], NULL) != 0)
			abort();
	if (state_file_parse(out.data, out.length, &again, &found, NULL) != 0 || found != count)
		abort();
	free(again);
	buf_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct state_section *sections;
	size_t count;
	if (state_file_parse(data, size, &sections, &count, NULL) == 0) {
		decode_bodies(sections, count);
		write_again(sections, count);
		free(sections);
	}
	/* As a body alone: no checksum stands before it. */
	struct buf notes = BUF_INIT;
	core_add_vcpu(data, size, 0, &notes, NULL);
	buf_free(&notes);
	return 0;
}
