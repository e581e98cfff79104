/*
 * Going on with an export that was interrupted. What the file holds is checked chunk by chunk, as an import does it, and must be of the same
 * checkpoint: the head and the manifest are compared byte by byte. The first chunk that is not whole ends it. What a checkpoint holds never
 * changes, so that the stream may go on behind the last run of the last whole chunk; a read-only disk is not the store's, and is begun anew.
 */
#include <errno.h>
#include <unistd.h>

#include "checkpoint/store/export_internal.h"

struct scan {
	struct export *x;
	struct transfer_io in;
	void *context;
	struct transfer_slot slot;
	struct buf head, manifest;
	uint64_t state_bytes;
	uint32_t kind, object; /* of the last chunk with runs */
	uint64_t next;	       /* where its runs ended */
};

static bool same(const struct buf *a, const struct buf *b) { return a->length == b->length && memcmp(a->data, b->data, a->length) == 0; }

/* Whether the chunk in the slot belongs here, and where the stream is behind it. */
static bool take_runs(struct scan *s)
{
	struct export *x = s->x;
	struct export_position *at = &x->from;
	bool memory = s->slot.header.kind == TRANSFER_MEMORY;
	struct transfer_runs runs;
	uint32_t object = s->slot.header.content_bytes >= TRANSFER_RUNS_BYTES ? get_le32(s->slot.content + 4) : ~0u;

	if (!same(&s->head, &x->head_text) || !same(&s->manifest, &x->manifest) || s->state_bytes != x->state.length)
		return false;
	if (memory ? object != 0 || s->kind == TRANSFER_DISK
		   : object >= x->head.disk_count || x->head.disks[object].readonly || object < at->disk)
		return false;
	if (s->kind != s->slot.header.kind || s->object != object)
		s->next = 0;
	s->kind = s->slot.header.kind;
	s->object = object;
	uint64_t limit = memory ? x->own.index.page_count : x->head.disks[object].size_bytes;
	if (transfer_get_runs(s->slot.content, s->slot.header.content_bytes, memory ? PAGE_BYTES : 1, limit, &s->next, &runs, NULL))
		return false;
	at->started = true;
	at->page = memory ? s->next : x->own.index.page_count;
	at->disk = memory ? 0 : object;
	at->offset = memory ? 0 : s->next;
	*(memory ? &x->result->pages : &x->result->disk_bytes) += memory ? runs.data_bytes / PAGE_BYTES : runs.data_bytes;
	return true;
}

static bool take_chunk(struct scan *s)
{
	const struct transfer_header *h = &s->slot.header;

	switch (h->kind) {
	case TRANSFER_HEAD:
		return buf_append(&s->head, s->slot.content, h->content_bytes, NULL) == 0;
	case TRANSFER_MANIFEST:
		return buf_append(&s->manifest, s->slot.content, h->content_bytes, NULL) == 0;
	case TRANSFER_STATE:
		s->state_bytes += h->content_bytes;
		return true;
	case TRANSFER_MEMORY:
	case TRANSFER_DISK:
		return take_runs(s);
	default:
		return false;
	}
}

static bool read_whole(struct scan *s, void *data, size_t length)
{
	size_t got;

	return transfer_read(&s->in, data, length, &got, NULL) == 0 && got == length;
}

static bool read_chunk(struct scan *s)
{
	uint8_t header[TRANSFER_HEADER_BYTES];
	struct transfer_header *h = &s->slot.header;

	return read_whole(s, header, sizeof(header)) && transfer_get_header(header, s->x->ledger.chunks, h, NULL) == 0 &&
	       read_whole(s, s->slot.packed, h->packed_bytes) && transfer_unpack(&s->slot, s->context, NULL) == 0;
}

/* Of an encrypted file: what is encrypted in it. *usable: it can be gone on with. */
static int open_seal(struct scan *s, const uint8_t start[TRANSFER_START_BYTES], bool *usable, struct err *err)
{
	struct err why = ERR_INIT;
	int rc = transfer_seal_open(&s->in, start, s->x->options->key, &why);

	*usable = !rc && transfer_seal_is_resumable(&s->in);
	if (rc != -EKEYREJECTED)
		return 0;
	err_set(err, ERR_FAILED, EKEYREJECTED, "%s: the key does not fit", s->in.what);
	err_hint(err, "name the key that it was begun with; or remove the file, to begin anew");
	return -EKEYREJECTED;
}

/* A plain one in its place is not what somebody wants who only forgot the key. */
static int key_is_missing(const struct scan *s, struct err *err)
{
	err_set(err, ERR_USAGE, EINVAL, "%s: it is encrypted", s->in.what);
	err_hint(err, "name the key that it was begun with: --key-file FILE; or remove the file, to begin anew");
	return -EINVAL;
}

/* *usable: what follows is chunks. */
static int read_start(struct scan *s, bool *usable, struct err *err)
{
	uint8_t start[TRANSFER_START_BYTES];
	bool whole = read_whole(s, start, sizeof(start)), sealed = whole && transfer_is_sealed(start);
	int rc = 0;

	if (sealed && !s->x->options->key)
		return key_is_missing(s, err);
	*usable = whole && sealed == (s->x->options->key != NULL);
	if (*usable && sealed) {
		rc = open_seal(s, start, usable, err);
		*usable = *usable && read_whole(s, start, sizeof(start));
	}
	*usable = *usable && transfer_check_start(start, NULL) == 0;
	return rc;
}

static int scan_all(struct scan *s, struct err *err)
{
	bool usable;
	int rc = read_start(s, &usable, err);

	while (!rc && usable && read_chunk(s) && take_chunk(s)) {
		transfer_mark(&s->in, &s->x->mark);
		s->x->result->content_bytes += s->slot.header.content_bytes;
		rc = transfer_ledger_add(&s->x->ledger, &s->slot.header, err);
	}
	/* What was not read for that is no damage. */
	return !rc && transfer_is_cancelled(s->x->options->cancel, err) ? -ECANCELED : rc;
}

/* Nothing of it can be used. */
static int begin_anew(struct export *x, struct err *err)
{
	transfer_ledger_free(&x->ledger);
	x->from = (struct export_position){0};
	x->result->pages = x->result->disk_bytes = x->result->content_bytes = 0;
	x->mark.bytes = 0;
	return transfer_ledger_init(&x->ledger, err);
}

int export_resume(struct export *x, int fd, const char *path, struct err *err)
{
	struct scan s = {.x = x, .in = {.fd = fd, .what = path, .cancel = x->options->cancel}, .context = transfer_make_unpacker()};
	int rc = 0;

	s.slot.content = malloc(TRANSFER_MAX_CONTENT);
	s.slot.packed = malloc(transfer_packed_bound());
	if (!s.context || !s.slot.content || !s.slot.packed)
		rc = err_sys(err, ENOMEM, "buffers");
	if (!rc)
		rc = scan_all(&s, err);
	if (!rc && (!x->from.started || !x->mark.bytes))
		rc = begin_anew(x, err);
	if (!rc && (ftruncate(fd, (off_t)x->mark.bytes) || lseek(fd, (off_t)x->mark.bytes, SEEK_SET) < 0))
		rc = err_sys(err, errno, "%s", path);
	x->next_number = x->ledger.chunks;
	x->result->resumed_bytes = x->mark.bytes;
	transfer_seal_free(&s.in);
	if (s.context)
		transfer_free_unpacker(s.context);
	free(s.slot.content);
	free(s.slot.packed);
	buf_free(&s.head);
	buf_free(&s.manifest);
	return rc;
}
