/* Imports: see transfer.h. One thread reads frames, all processors unpack and check them, the calling thread takes them in order. */
#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/store/import_internal.h"

#define MAX_HEAD_BYTES (1u << 16)

/* --- reading --- */

static int read_whole(struct import *im, void *data, size_t length, struct err *err)
{
	size_t got;
	int rc = transfer_read(&im->in, data, length, &got, err);

	if (rc || got == length)
		return rc;
	err_set(err, ERR_DAMAGED, ENODATA, "it ends too early, after %llu bytes", (unsigned long long)im->in.bytes);
	return err_hint(err, "export it once more; an interrupted export can be gone on with: vmcp export --resume");
}

/* Behind the last chunk: the table that other tools seek by, as we would have written it, and nothing more. */
static int read_table(struct import *im, struct err *err)
{
	CLEANUP_BUF struct buf want = BUF_INIT, got = BUF_INIT;
	uint8_t more;
	size_t n;
	int rc = transfer_ledger_table(&im->ledger, &want, err);

	if (!rc)
		rc = buf_append(&got, NULL, want.length, err);
	if (!rc)
		rc = read_whole(im, got.data, got.length, err);
	if (!rc && memcmp(want.data, got.data, want.length) != 0)
		rc = err_set(err, ERR_DAMAGED, EBADMSG, "damaged: the table at its end");
	if (!rc)
		rc = transfer_read(&im->in, &more, 1, &n, err);
	if (!rc && n)
		rc = err_set(err, ERR_DAMAGED, EBADMSG, "damaged: something follows its end");
	return rc;
}

static int read_chunk(struct import *im, struct transfer_pipe *pipe, bool *last, struct err *err)
{
	uint8_t header[TRANSFER_HEADER_BYTES];
	struct transfer_slot *slot = transfer_pipe_get(pipe);

	if (!slot)
		return -ECANCELED;
	int rc = read_whole(im, header, sizeof(header), err);
	if (!rc)
		rc = transfer_get_header(header, im->ledger.chunks, &slot->header, err);
	if (!rc)
		rc = read_whole(im, slot->packed, slot->header.packed_bytes, err);
	if (rc)
		return rc;
	*last = slot->header.kind == TRANSFER_END;
	if (*last)
		transfer_ledger_end(&im->ledger, im->end);
	rc = transfer_ledger_add(&im->ledger, &slot->header, err);
	if (!rc)
		transfer_pipe_put(pipe, slot);
	return rc;
}

/* Where an encrypted stream begins, the one in it does; with a key no other is taken: it could be anybody's. */
static int open_seal(struct import *im, uint8_t start[TRANSFER_START_BYTES], struct err *err)
{
	const struct transfer_key *key = im->options->key;

	if (transfer_is_sealed(start)) {
		int rc = transfer_seal_open(&im->in, start, key, err);
		return rc ? rc : read_whole(im, start, TRANSFER_START_BYTES, err);
	}
	if (!key)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "it is not encrypted");
	return err_hint(err, "leave out --key-file, if this is the file that you mean");
}

static int produce(struct transfer_pipe *pipe, void *opaque, struct err *err)
{
	uint8_t start[TRANSFER_START_BYTES];
	struct import *im = opaque;
	bool last = false;
	size_t got;
	int rc = transfer_read(&im->in, start, sizeof(start), &got, err);

	memset(start + got, 0, sizeof(start) - got);
	if (!rc)
		rc = open_seal(im, start, err);
	if (!rc)
		rc = transfer_check_start(start, err);
	while (!rc && !last)
		rc = read_chunk(im, pipe, &last, err);
	return rc ? rc : read_table(im, err);
}

/* --- taking --- */

static int gather(struct buf *out, const struct transfer_slot *slot, uint64_t limit, const char *what, struct err *err)
{
	if (slot->header.content_bytes > limit - out->length)
		return err_set(err, ERR_DAMAGED, EFBIG, "damaged: its %s is too long", what);
	return buf_append(out, slot->content, slot->header.content_bytes, err);
}

static int take_end(struct import *im, const struct transfer_slot *slot, struct err *err)
{
	if (slot->header.content_bytes != TRANSFER_END_BYTES || memcmp(slot->content, im->end, TRANSFER_END_BYTES) != 0)
		return err_set(err, ERR_DAMAGED, EBADMSG, "damaged: its end is of other chunks than these");
	int rc = im->result->present ? 0 : import_disks_finish(im, err);
	im->whole = !rc;
	return rc;
}

static int take_content(struct import *im, const struct transfer_slot *slot, struct err *err)
{
	const struct transfer_header *h = &slot->header;
	int rc = im->begun ? 0 : import_begin(im, err);

	if (!rc && h->kind == TRANSFER_END)
		return take_end(im, slot, err);
	if (rc || im->result->present)
		return rc;
	rc = h->kind == TRANSFER_MEMORY ? import_memory_chunk(im, slot->content, h->content_bytes, err)
					: import_disk_chunk(im, slot->content, h->content_bytes, err);
	if (im->options->progress)
		im->options->progress(im->options->opaque, im->done_bytes, im->total_bytes);
	return rc;
}

static int consume(struct transfer_slot *slot, void *opaque, struct err *err)
{
	struct import *im = opaque;
	uint32_t kind = slot->header.kind, before = im->kind;

	if (transfer_is_cancelled(im->options->cancel, err))
		return -ECANCELED;
	/* In order, and none of the first three is missing. */
	if (im->whole || kind < before || (kind > before + 1 && before < TRANSFER_STATE))
		return err_set(err, ERR_DAMAGED, EINVAL, "damaged: chunk %u does not belong there", slot->header.number);
	im->kind = kind;
	im->result->content_bytes += slot->header.content_bytes;
	switch (kind) {
	case TRANSFER_HEAD:
		return gather(&im->head_text, slot, MAX_HEAD_BYTES, "head", err);
	case TRANSFER_MANIFEST:
		return gather(&im->manifest, slot, MANIFEST_MAX_BYTES, "manifest", err);
	case TRANSFER_STATE:
		return gather(&im->state, slot, TRANSFER_MAX_STATE, "state", err);
	default:
		return take_content(im, slot, err);
	}
}

static const struct transfer_pipe_ops unpacking = {
	.produce = produce,
	.work = transfer_unpack,
	.consume = consume,
	.make_context = transfer_make_unpacker,
	.free_context = transfer_free_unpacker,
};

/* --- all of it --- */

static int commit(struct import *im, struct err *err)
{
	int rc = fault_check(FAULT_IMPORT_READ, err);

	if (!rc)
		rc = import_memory_finish(im, err);
	if (!rc)
		rc = import_finish_manifest(im, err);
	if (rc)
		return rc;
	struct store_draft *draft = im->draft;
	im->draft = NULL; /* freed in any case */
	return store_draft_commit(draft, &im->checkpoint, err);
}

static void close_import(struct import *im)
{
	import_disks_close(im);
	import_memory_free(&im->memory);
	store_draft_abort(im->draft);
	transfer_side_close(&im->base);
	store_checkpoint_free(&im->checkpoint);
	buf_free(&im->head_text);
	buf_free(&im->manifest);
	buf_free(&im->state);
	transfer_ledger_free(&im->ledger);
	free(im);
}

int transfer_import(struct store *store, int fd, const char *what, const char *vm, const struct transfer_options *options,
		    struct transfer_result *result, struct err *err)
{
	struct import *im = xcalloc(1, sizeof(*im));

	*result = (struct transfer_result){0};
	*im = (struct import){.store = store, .options = options, .what = what, .wanted_vm = vm, .result = result};
	im->memory.fd = im->memory.sums_fd = -1;
	im->in = (struct transfer_io){
		.fd = fd, .what = "reading", .cancel = options->cancel, .max_rate = options->max_rate, .started_ns = clock_now_ns()};
	int rc = transfer_ledger_init(&im->ledger, err);
	if (!rc)
		rc = transfer_pipe_run(&unpacking, im, err);
	if (!rc && !im->whole)
		rc = err_set(err, ERR_DAMAGED, ENODATA, "it has no end");
	if (!rc && im->draft)
		rc = commit(im, err);
	result->stream_bytes = im->in.bytes;
	transfer_seal_free(&im->in);
	close_import(im);
	return rc ? err_prefix(err, "%s", what) : 0;
}
