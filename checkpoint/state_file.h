/*
 * The state file of a checkpoint: one section per component, and one per completion log. Described in docs/format.md.
 *
 * The file is one CBOR item: an array of a name, a version and the sections, each of which is an array of kind,
 * component id, instance, version, length, xxh3-64 of the body, and the body. Reading checks every checksum before any
 * body is decoded.
 */
#ifndef VMCP_CHECKPOINT_STATE_FILE_H
#define VMCP_CHECKPOINT_STATE_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

#define STATE_FILE_MAX_BYTES   (1ull << 30)
#define STATE_SECTION_ID_BYTES 32

enum state_section_kind {
	STATE_SECTION_STATE, /* "state": the component's struct, as its codec table says */
	STATE_SECTION_LOG,   /* "log": its completion log */
};

struct state_section {
	enum state_section_kind kind;
	char id[STATE_SECTION_ID_BYTES];
	uint32_t instance, version;
	const uint8_t *body; /* into the buffer that was parsed */
	size_t length;
};

/* Starts a file of `section_count` sections, which must follow. */
int state_file_start(struct buf *out, size_t section_count, struct err *err);
int state_file_add(struct buf *out, const struct state_section *section, struct err *err);

/* Untrusted input: -EINVAL, ERR_DAMAGED. *sections is malloc'ed, and points into data. */
int state_file_parse(const void *data, size_t length, struct state_section **sections, size_t *count, struct err *err);

#endif
