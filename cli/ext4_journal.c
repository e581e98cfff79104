/*
 * jbd2, as described in the kernel's Documentation/filesystems/ext4/journal.rst: all fields are big endian. Three passes, as a mount makes them: find the last
 * transaction that was committed, collect revoked blocks, apply the others.
 */
#include "cli/ext4_journal.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"

#define MAGIC		0xc03b3998u
#define HEADER_BYTES	12u
#define REVOKE_HEADER	16u
#define MAX_BLOCK_BYTES 65536u

enum block_type { DESCRIPTOR = 1, COMMIT = 2, SUPERBLOCK_V1 = 3, SUPERBLOCK_V2 = 4, REVOKE = 5 };
enum { FEATURE_64BIT = 2, FEATURE_CSUM_V2 = 8, FEATURE_CSUM_V3 = 16 };
enum { TAG_ESCAPE = 1, TAG_SAME_UUID = 2, TAG_LAST = 8 };
enum pass { FIND_END, FIND_REVOKED, APPLY };

struct revoked {
	uint64_t block;
	uint32_t sequence;
};

struct replay {
	const struct journal_reader *reader;
	uint32_t first, length, start, sequence, features; /* of the journal's superblock */
	uint32_t end;					   /* the first sequence that was not committed */
	struct revoked *revoked;
	size_t revoked_count;
	uint8_t *block, *data;
	struct err *err;
};

static int damaged(struct replay *r, const char *what) { return err_set(r->err, ERR_DAMAGED, EINVAL, "its journal: %s", what); }

static int read_superblock(struct replay *r)
{
	int rc = r->reader->read(r->reader->opaque, 0, r->block, r->err);
	if (rc != 0)
		return rc;
	uint32_t type = get_be32(r->block + 4);
	if (get_be32(r->block) != MAGIC || (type != SUPERBLOCK_V1 && type != SUPERBLOCK_V2))
		return damaged(r, "no superblock");
	r->length = get_be32(r->block + 16);
	r->first = get_be32(r->block + 20);
	r->sequence = get_be32(r->block + 24);
	r->start = get_be32(r->block + 28);
	r->features = type == SUPERBLOCK_V2 ? get_be32(r->block + 40) : 0;
	if (get_be32(r->block + 12) != r->reader->block_bytes || r->first == 0 || r->first >= r->length || r->start >= r->length)
		return damaged(r, "a superblock that makes no sense");
	return 0;
}

static uint32_t next_block(const struct replay *r, uint32_t at) { return at + 1 >= r->length ? r->first : at + 1; }

static bool is_revoked(const struct replay *r, uint64_t block, uint32_t sequence)
{
	for (size_t i = 0; i < r->revoked_count; i++)
		if (r->revoked[i].block == block && (int32_t)(r->revoked[i].sequence - sequence) >= 0)
			return true;
	return false;
}

static int add_revoked(struct replay *r, uint32_t sequence)
{
	uint32_t used = get_be32(r->block + HEADER_BYTES), size = r->features & FEATURE_64BIT ? 8 : 4;
	if (used < REVOKE_HEADER || used > r->reader->block_bytes)
		return damaged(r, "a revocation that makes no sense");
	struct revoked *grown = realloc(r->revoked, (r->revoked_count + used / size + 1) * sizeof(*grown));
	if (!grown)
		return err_sys(r->err, ENOMEM, "journal");
	r->revoked = grown;
	for (uint32_t at = REVOKE_HEADER; at + size <= used; at += size)
		grown[r->revoked_count++] = (struct revoked){size == 8 ? get_be64(r->block + at) : get_be32(r->block + at), sequence};
	return 0;
}

struct tag {
	uint64_t block;
	uint32_t flags, bytes; /* bytes: up to the next tag */
};

static bool read_tag(const struct replay *r, uint32_t at, struct tag *out)
{
	bool v3 = r->features & FEATURE_CSUM_V3, wide = r->features & FEATURE_64BIT;
	uint32_t bytes = v3 ? 16 : wide ? 12 : 8, room = r->reader->block_bytes;
	if (r->features & (FEATURE_CSUM_V2 | FEATURE_CSUM_V3))
		room -= 4; /* the checksum at the end */
	if (at + bytes > room)
		return false;
	const uint8_t *tag = r->block + at;
	out->flags = v3 ? get_be32(tag + 4) : get_be16(tag + 6);
	out->block = get_be32(tag) | (wide ? (uint64_t)get_be32(tag + 8) << 32 : 0);
	out->bytes = bytes + (out->flags & TAG_SAME_UUID ? 0 : 16);
	return true;
}

static int apply_tag(struct replay *r, const struct tag *tag, uint32_t at, uint32_t sequence)
{
	int rc = r->reader->read(r->reader->opaque, at, r->data, r->err);
	if (rc != 0 || is_revoked(r, tag->block, sequence))
		return rc;
	if (tag->flags & TAG_ESCAPE)
		put_be32(r->data, MAGIC);
	return r->reader->apply(r->reader->opaque, tag->block, r->data, r->err);
}

/* Walks over the blocks that a descriptor, in r->block, tells of. *at: of the descriptor, then behind the last of them. */
static int walk_tags(struct replay *r, enum pass pass, uint32_t sequence, uint32_t *at)
{
	struct tag tag = {0};
	int rc = 0;
	*at = next_block(r, *at);
	for (uint32_t offset = HEADER_BYTES; rc == 0 && !(tag.flags & TAG_LAST) && read_tag(r, offset, &tag); offset += tag.bytes) {
		if (pass == APPLY)
			rc = apply_tag(r, &tag, *at, sequence);
		*at = next_block(r, *at);
	}
	return rc;
}

/* *behind: the first sequence of which no commit was found. */
static int walk(struct replay *r, enum pass pass, uint32_t *behind)
{
	uint32_t at = r->start, sequence = r->sequence;
	int rc = 0;
	for (uint32_t steps = 0; rc == 0 && steps < r->length && (pass == FIND_END || sequence != r->end); steps++) {
		rc = r->reader->read(r->reader->opaque, at, r->block, r->err);
		if (rc != 0 || get_be32(r->block) != MAGIC || get_be32(r->block + 8) != sequence)
			break;
		uint32_t type = get_be32(r->block + 4);
		if (type == DESCRIPTOR) {
			rc = walk_tags(r, pass, sequence, &at);
			continue;
		}
		if (type == COMMIT)
			sequence++;
		else if (type == REVOKE)
			rc = pass == FIND_REVOKED ? add_revoked(r, sequence) : 0;
		else
			break;
		at = next_block(r, at);
	}
	*behind = sequence;
	return rc;
}

static int replay(struct replay *r)
{
	uint32_t ignored;
	int rc = read_superblock(r);
	if (rc != 0 || r->start == 0)
		return rc;
	rc = walk(r, FIND_END, &r->end);
	if (rc == 0)
		rc = walk(r, FIND_REVOKED, &ignored);
	return rc == 0 ? walk(r, APPLY, &ignored) : rc;
}

int journal_replay(const struct journal_reader *reader, struct err *err)
{
	struct replay r = {.reader = reader, .err = err};
	if (reader->block_bytes < 1024 || reader->block_bytes > MAX_BLOCK_BYTES)
		return damaged(&r, "an impossible block size");
	r.block = xcalloc(1, reader->block_bytes);
	r.data = xcalloc(1, reader->block_bytes);
	int rc = replay(&r);
	free(r.block);
	free(r.data);
	free(r.revoked);
	return rc;
}
