/*
 * Encrypted exports: the stream of an export in pieces, each encrypted and authenticated with AES-256-GCM. docs/format.md, "Encrypted exports".
 *
 * The key comes from the user's by scrypt and a random salt, so it is that of this one file. The nonce of a piece is its number and whether it is the last one: pieces
 * cannot be changed, left out, put in another order or cut off at the end. Nothing of a piece is used before its tag was checked.
 *
 * A file that was interrupted is gone on with behind a whole piece by a start of its own, with another salt and so another key: no nonce comes twice with one key. The tag of that
 * start is over the tag of the piece before it, too: nothing but what was written there can follow that piece.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/store/seal_crypto.h"
#include "checkpoint/store/transfer_internal.h"

#define SEAL_VERSION 1
#define SEAL_RESUMED 2	 /* version of a file that may have more than one start */
#define FIELDS_BYTES 40u /* of the start, before its tag */
#define START_BYTES  (FIELDS_BYTES + SEAL_TAG_BYTES)
#define LENGTH_BYTES 4u
#define PIECE_BYTES  (256u << 10)
#define LAST_PIECE   0x80000000u
#define NEXT_START   0x40000000u /* in the place of a length */
#define CHECK_NUMBER UINT64_MAX /* no piece has it: the tag of the start */

static const char start_text[12] = "vmcp-sealed\n";

struct transfer_seal {
	struct seal_crypto *crypto;
	uint64_t number;	 /* of the next piece */
	uint8_t *plain, *sealed; /* PIECE_BYTES; the same with length and tag */
	size_t used, at;	 /* bytes in `plain`, and reading: how many of them are taken */
	bool ended;
	/* reading */
	const struct transfer_key *key; /* of the caller of transfer_seal_open */
	bool resumable;
	uint64_t piece_at; /* in the file, where the piece in `plain` begins, with the start before it if there is one; 0: with the file */
	uint8_t tag[SEAL_TAG_BYTES], tag_before[SEAL_TAG_BYTES]; /* of that piece, and of the one before */
};

bool transfer_is_sealed(const uint8_t start[TRANSFER_START_BYTES])
{
	return memcmp(start, start_text, sizeof(start_text)) == 0;
}

static int failed(struct err *err) { return err_set(err, ERR_FAILED, EIO, "encryption: libcrypto %s", seal_why_not()); }

static struct seal_message message_of(uint64_t number, bool last, uint8_t *tag)
{
	struct seal_message m = {.tag = tag};

	put_le64(m.nonce, number);
	m.nonce[SEAL_NONCE_BYTES - 1] = last;
	return m;
}

/* The tag of a start says nothing but that the key is the one, the start what it was, and what is before it; NULL: nothing. */
struct start_extra {
	uint8_t bytes[FIELDS_BYTES + SEAL_TAG_BYTES];
};
static struct seal_message start_message(uint8_t start[START_BYTES], const uint8_t before[SEAL_TAG_BYTES], struct start_extra *extra)
{
	struct seal_message m = message_of(CHECK_NUMBER, false, start + FIELDS_BYTES);

	memcpy(extra->bytes, start, FIELDS_BYTES);
	if (before)
		memcpy(extra->bytes + FIELDS_BYTES, before, SEAL_TAG_BYTES);
	m.extra = extra->bytes;
	m.extra_bytes = FIELDS_BYTES + (before ? SEAL_TAG_BYTES : 0);
	return m;
}

/* In s->sealed: its length, its text, its tag. */
static struct seal_message piece_message(const struct transfer_seal *s, size_t bytes, bool last)
{
	struct seal_message m = message_of(s->number, last, s->sealed + LENGTH_BYTES + bytes);

	m.extra = s->sealed;
	m.extra_bytes = LENGTH_BYTES;
	m.bytes = bytes;
	return m;
}

static int make_seal(struct transfer_seal **out, struct err *err)
{
	struct transfer_seal *s = xcalloc(1, sizeof(*s));

	s->crypto = seal_crypto_new();
	s->plain = malloc(PIECE_BYTES);
	s->sealed = malloc(LENGTH_BYTES + PIECE_BYTES + SEAL_TAG_BYTES);
	*out = s;
	if (!s->crypto)
		return failed(err);
	return s->plain && s->sealed ? 0 : err_sys(err, ENOMEM, "encryption");
}

void transfer_seal_free(struct transfer_io *io)
{
	struct transfer_seal *s = io->seal;

	if (!s)
		return;
	seal_crypto_free(s->crypto);
	if (s->plain)
		explicit_bzero(s->plain, PIECE_BYTES);
	free(s->plain);
	free(s->sealed);
	free(s);
	io->seal = NULL;
}

static int derive_key(struct transfer_seal *s, const struct transfer_key *key, const uint8_t fields[FIELDS_BYTES],
		      struct err *err)
{
	unsigned log_n = fields[32], r = fields[33], p = fields[34];

	if (!seal_may_derive(log_n, r, p) || fields[35])
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: how its key is made from yours");
	return seal_derive(s->crypto, key->data, key->bytes, fields + 16, SEAL_SALT_BYTES, log_n, r, p) ? 0 : failed(err);
}

/* --- writing --- */

static int write_start(struct transfer_io *io, const struct transfer_key *key, uint32_t version, const uint8_t before[SEAL_TAG_BYTES], struct err *err)
{
	uint8_t start[START_BYTES] = {0};
	struct start_extra extra;
	struct transfer_seal *s;
	int rc = make_seal(&s, err);

	io->seal = NULL;
	memcpy(start, start_text, sizeof(start_text));
	put_le32(start + 12, version);
	if (!rc && !seal_random(start + 16, SEAL_SALT_BYTES))
		rc = failed(err);
	start[32] = key->log_n ? (uint8_t)key->log_n : SEAL_LOG_N;
	start[33] = SEAL_R;
	start[34] = SEAL_P;
	put_le32(start + 36, PIECE_BYTES);
	if (!rc)
		rc = derive_key(s, key, start, err);
	const struct seal_message message = start_message(start, before, &extra);
	if (!rc && !seal_encrypt(s->crypto, &message))
		rc = failed(err);
	if (!rc)
		rc = transfer_write_raw(io, start, sizeof(start), err);
	io->seal = s;
	return rc;
}

int transfer_seal_begin(struct transfer_io *io, const struct transfer_key *key, bool resumable, struct err *err)
{
	return write_start(io, key, resumable ? SEAL_RESUMED : SEAL_VERSION, NULL, err);
}

int transfer_seal_go_on(struct transfer_io *io, const struct transfer_key *key, const struct transfer_mark *mark, struct err *err)
{
	uint8_t next[LENGTH_BYTES];

	put_le32(next, NEXT_START);
	int rc = transfer_write_raw(io, next, sizeof(next), err);
	if (!rc)
		rc = write_start(io, key, SEAL_RESUMED, mark->tag, err);
	if (rc)
		return rc;
	memcpy(io->seal->plain, mark->text, mark->text_bytes);
	io->seal->used = mark->text_bytes;
	return 0;
}

static int write_piece(struct transfer_io *io, bool last, struct err *err)
{
	struct transfer_seal *s = io->seal;
	struct seal_message message = piece_message(s, s->used, last);

	message.in = s->plain;
	message.out = s->sealed + LENGTH_BYTES;
	put_le32(s->sealed, (uint32_t)s->used | (last ? LAST_PIECE : 0));
	if (!seal_encrypt(s->crypto, &message))
		return failed(err);
	int rc = transfer_write_raw(io, s->sealed, LENGTH_BYTES + s->used + SEAL_TAG_BYTES, err);
	s->number++;
	s->used = 0;
	return rc;
}

/* Only a full piece that more follows is written: the last one is known as such. */
int transfer_seal_write(struct transfer_io *io, const void *data, size_t length, struct err *err)
{
	struct transfer_seal *s = io->seal;
	const uint8_t *from = data;
	int rc = 0;

	while (!rc && length > 0) {
		if (s->used == PIECE_BYTES)
			rc = write_piece(io, false, err);
		size_t n = min_u64(length, PIECE_BYTES - s->used);
		memcpy(s->plain + s->used, from, n);
		s->used += n;
		from += n;
		length -= n;
	}
	return rc;
}

int transfer_seal_end(struct transfer_io *io, struct err *err) { return io->seal ? write_piece(io, true, err) : 0; }

/* --- reading --- */

static int read_whole(struct transfer_io *io, void *data, size_t length, struct err *err)
{
	size_t got;
	int rc = transfer_read_raw(io, data, length, &got, err);

	return rc || got == length ? rc
				   : err_set(err, ERR_DAMAGED, ENODATA, "it ends too early, after %llu bytes",
					     (unsigned long long)io->bytes);
}

/* The rest of a start, of which `have` bytes are there. before: as start_message. */
static int read_start(struct transfer_io *io, uint8_t start[START_BYTES], size_t have, const uint8_t before[SEAL_TAG_BYTES], struct err *err)
{
	struct transfer_seal *s = io->seal;
	struct start_extra extra;
	int rc = read_whole(io, start + have, START_BYTES - have, err);
	uint32_t version = rc ? 0 : get_le32(start + 12);

	if (!rc && (!transfer_is_sealed(start) || version < (before ? SEAL_RESUMED : SEAL_VERSION) || version > SEAL_RESUMED || get_le32(start + 36) != PIECE_BYTES))
		rc = err_set(err, ERR_DAMAGED, EINVAL, "damaged: the start of the encryption");
	if (!rc)
		rc = derive_key(s, s->key, start, err);
	if (rc)
		return rc;
	const struct seal_message message = start_message(start, before, &extra);
	int good = seal_decrypt(s->crypto, &message);
	if (good < 0)
		return failed(err);
	s->resumable = version == SEAL_RESUMED;
	return good ? 0 : -EKEYREJECTED;
}

int transfer_seal_open(struct transfer_io *io, const uint8_t begun[TRANSFER_START_BYTES],
		       const struct transfer_key *key, struct err *err)
{
	uint8_t start[START_BYTES];

	if (!key) {
		err_set(err, ERR_USAGE, EINVAL, "it is encrypted");
		return err_hint(err, "name the file with its key: --key-file FILE");
	}
	memcpy(start, begun, TRANSFER_START_BYTES);
	if (get_le32(start + 12) > SEAL_RESUMED) {
		err_set(err, ERR_FAILED, ENOTSUP, "version %u of the encryption is newer than this vmcp knows (%d)",
			get_le32(start + 12), SEAL_RESUMED);
		err_hint(err, "use the newer vmcp that wrote it");
		return -ENOTSUP;
	}
	int rc = make_seal(&io->seal, err);
	io->seal->key = key;
	if (!rc)
		rc = read_start(io, start, TRANSFER_START_BYTES, NULL, err);
	if (rc == -EKEYREJECTED) {
		err_set(err, ERR_FAILED, EKEYREJECTED, "the key does not fit");
		err_hint(err, "name the key that it was exported with; if this is the one, the file is damaged "
			      "at its beginning");
	}
	return rc;
}

/* Behind a whole piece: what is written with another key. */
static int read_next_start(struct transfer_io *io, struct err *err)
{
	struct transfer_seal *s = io->seal;
	uint8_t start[START_BYTES];
	int rc = !s->resumable || s->number == 0 ? -EKEYREJECTED : read_start(io, start, 0, s->tag, err);

	s->number = 0;
	return rc == -EKEYREJECTED ? err_set(err, ERR_DAMAGED, EBADMSG, "damaged: a start in the middle of the encryption") : rc;
}

static int read_piece(struct transfer_io *io, struct err *err)
{
	struct transfer_seal *s = io->seal;
	uint8_t more;
	size_t got;

	s->piece_at = s->number ? io->bytes : 0;
	memcpy(s->tag_before, s->tag, sizeof(s->tag));
	int rc = read_whole(io, s->sealed, LENGTH_BYTES, err);
	if (!rc && get_le32(s->sealed) == NEXT_START) {
		rc = read_next_start(io, err);
		if (!rc)
			rc = read_whole(io, s->sealed, LENGTH_BYTES, err);
	}
	uint32_t length = rc ? 0 : get_le32(s->sealed);
	bool last = length & LAST_PIECE;

	length &= ~LAST_PIECE;
	if (!rc && (length > PIECE_BYTES || (!last && length != PIECE_BYTES)))
		rc = err_set(err, ERR_DAMAGED, EBADMSG, "damaged: the length of encrypted piece %llu",
			     (unsigned long long)s->number);
	if (!rc)
		rc = read_whole(io, s->sealed + LENGTH_BYTES, length + SEAL_TAG_BYTES, err);
	if (rc)
		return rc;
	struct seal_message message = piece_message(s, length, last);
	message.in = s->sealed + LENGTH_BYTES;
	message.out = s->plain;
	int good = seal_decrypt(s->crypto, &message);
	if (good < 0)
		return failed(err);
	if (good == 0)
		return err_set(err, ERR_DAMAGED, EBADMSG, "damaged: encrypted piece %llu was changed",
			       (unsigned long long)s->number);
	memcpy(s->tag, message.tag, sizeof(s->tag));
	s->number++;
	s->used = length;
	s->at = 0;
	s->ended = last;
	if (last)
		rc = transfer_read_raw(io, &more, 1, &got, err);
	return !rc && last && got ? err_set(err, ERR_DAMAGED, EBADMSG, "damaged: something follows its end") : rc;
}

int transfer_seal_read(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err)
{
	struct transfer_seal *s = io->seal;
	int rc = 0;

	*got = 0;
	while (*got < length) {
		if (s->at == s->used) {
			rc = s->ended ? 0 : read_piece(io, err);
			if (rc || s->at == s->used)
				return rc;
		}
		size_t n = min_u64(length - *got, s->used - s->at);
		memcpy((uint8_t *)data + *got, s->plain + s->at, n);
		s->at += n;
		*got += n;
	}
	return 0;
}

/* --- going on --- */

bool transfer_seal_is_resumable(const struct transfer_io *io) { return io->seal->resumable; }

void transfer_mark(const struct transfer_io *io, struct transfer_mark *mark)
{
	const struct transfer_seal *s = io->seal;

	mark->bytes = s ? s->piece_at : io->bytes;
	if (!s)
		return;
	if (!mark->text)
		mark->text = xcalloc(1, PIECE_BYTES);
	memcpy(mark->tag, s->tag_before, sizeof(mark->tag));
	memcpy(mark->text, s->plain, s->at);
	mark->text_bytes = s->at;
}

void transfer_mark_free(struct transfer_mark *mark)
{
	if (mark->text)
		explicit_bzero(mark->text, PIECE_BYTES);
	free(mark->text);
	*mark = (struct transfer_mark){0};
}
