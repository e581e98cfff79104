/*
 * Checkpoints of a block device: requests in flight are listed at the capture, their completions collected for the
 * log, and both put back.
 *
 * The log is a sequence of entries in order of completion, each: header length (4 bytes, little endian), the header
 * in CBOR (log_table), then as many bytes of data as the header says: for a read that succeeded, what it read. A
 * completion that does not fit LOG_MAX_BYTES is left out: its request is then issued again, as if it had still been
 * in flight.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "devices/virtio_blk_internal.h"

#define MAX_INFLIGHT	 (VIRTIO_BLK_MAX_QUEUES * VIRTQ_MAX_SIZE)
#define LOG_MAX_BYTES	 (64ull << 20)
#define LOG_LENGTH_BYTES 4u

struct blk_state {
	struct virtio_state virtio;
	uint32_t inflight_count;
	struct blk_inflight inflight[MAX_INFLIGHT];
};

static const struct codec_field inflight_fields[] = {
	CODEC_INT(struct blk_inflight, queue, CODEC_U16), CODEC_INT(struct blk_inflight, head, CODEC_U16),
	CODEC_INT(struct blk_inflight, type, CODEC_U32),  CODEC_INT(struct blk_inflight, sector, CODEC_U64),
	CODEC_INT(struct blk_inflight, bytes, CODEC_U64), CODEC_END,
};
static const struct codec_table inflight_table = {"request-in-flight", sizeof(struct blk_inflight), inflight_fields};
static const struct codec_field state_fields[] = {
	CODEC_SUB(struct blk_state, virtio, &virtio_state_table),
	CODEC_VSUBS(struct blk_state, inflight, inflight_count, &inflight_table),
	CODEC_END,
};
static const struct codec_table state_table = {"virtio-blk", sizeof(struct blk_state), state_fields};

struct log_header {
	uint32_t index; /* in the state's list of requests in flight */
	uint8_t status;
	uint32_t written; /* length in the used ring */
	uint64_t data_bytes;
};
static const struct codec_field log_fields[] = {
	CODEC_INT(struct log_header, index, CODEC_U32),
	CODEC_INT(struct log_header, status, CODEC_U8),
	CODEC_INT(struct log_header, written, CODEC_U32),
	CODEC_INT(struct log_header, data_bytes, CODEC_U64),
	CODEC_END,
};
static const struct codec_table log_table = {"virtio-blk-completion", sizeof(struct log_header), log_fields};

/* --- capture --- */

static void forget_records(struct virtio_blk *blk)
{
	for (struct blk_request *r = blk->first; r != NULL; r = r->next)
		r->recorded = false;
	blk->captured = (struct component_inflight){0};
	blk->recorded_pending = 0;
	blk->log.length = 0; /* the memory stays: nothing is allocated or freed in the pause */
}

/*
 * One that was never started is listed, and its completion not logged: it will be started after the switch, so what it writes goes to the new
 * overlay, and what it reads may have been written later. Whoever goes back issues it again.
 */
static void record(struct virtio_blk *blk, struct blk_request *r, struct blk_state *state)
{
	r->recorded = !r->deferred;
	r->index = state->inflight_count;
	state->inflight[state->inflight_count++] = (struct blk_inflight){
		.queue = r->queue, .head = r->chain.head, .type = r->type, .sector = r->sector, .bytes = r->bytes};
	blk->recorded_pending += r->recorded;
	if (r->type == BLK_IN)
		blk->captured.reads++;
	else
		blk->captured.writes++;
}

static int capture(void *opaque, void *out, struct err *err)
{
	struct virtio_blk *blk = opaque;
	struct blk_state *state = out;
	(void)err;

	virtio_capture(blk->vdev, &state->virtio);
	virtio_lock(blk->vdev);
	state->inflight_count = 0;
	forget_records(blk);
	/* A device that is being reset or is broken gives no completions any more. */
	if (virtio_is_live(blk->vdev)) {
		for (struct blk_request *r = blk->first; r != NULL; r = r->next)
			record(blk, r, state);
	}
	virtio_unlock(blk->vdev);
	return 0;
}

static void inflight(void *opaque, struct component_inflight *out)
{
	struct virtio_blk *blk = opaque;

	virtio_lock(blk->vdev);
	*out = blk->captured;
	virtio_unlock(blk->vdev);
}

/* --- the completion log --- */

static int append_entry(struct buf *log, struct blk_request *r, const struct log_header *header)
{
	CLEANUP_BUF struct buf map = BUF_INIT;
	uint8_t length[LOG_LENGTH_BYTES];

	int ret = codec_encode(&log_table, header, &map, NULL);
	if (ret < 0)
		return ret;
	if (log->length + sizeof(length) + map.length + header->data_bytes > LOG_MAX_BYTES)
		return -ENOSPC;
	put_le32(length, (uint32_t)map.length);
	if ((ret = buf_append(log, length, sizeof(length), NULL)) < 0 ||
	    (ret = buf_append(log, map.data, map.length, NULL)) < 0 ||
	    (ret = buf_append(log, NULL, header->data_bytes, NULL)) < 0)
		return ret;
	virtq_read_back(&r->chain, 0, log->data + log->length - header->data_bytes, header->data_bytes);
	return 0;
}

void blk_record_end(struct blk_request *r, bool logged, uint8_t status)
{
	struct virtio_blk *blk = r->blk;
	size_t before = blk->log.length;
	const struct log_header header = {
		.index = r->index,
		.status = status,
		.written = r->in_bytes,
		.data_bytes = r->type == BLK_IN && status == BLK_S_OK ? r->data_bytes : 0,
	};

	r->recorded = false;
	if (logged && append_entry(&blk->log, r, &header) < 0)
		blk->log.length = before;
	blk->recorded_pending--;
	virtio_wake(blk->vdev);
}

/* Those that are waited for: recorded by a capture, or all. */
static unsigned count_pending(const struct virtio_blk *blk, bool recorded)
{
	unsigned count = 0;

	if (recorded)
		return blk->recorded_pending;
	for (const struct blk_request *r = blk->first; r != NULL; r = r->next)
		count++;
	return count;
}

/* The oldest of them: there is one. */
static void describe_pending(const struct virtio_blk *blk, bool recorded, char text[WAIT_TEXT_BYTES])
{
	const struct blk_request *r = blk->first;
	size_t length = (size_t)snprintf(text, WAIT_TEXT_BYTES, "%s: ", virtio_name(blk->vdev));

	while (recorded && !r->recorded)
		r = r->next;
	wait_describe_request(text + length, WAIT_TEXT_BYTES - length, blk_type_name(r->type), r->type == BLK_FLUSH ? 0 : r->bytes, r->sector,
			      r->since_ns, count_pending(blk, recorded) - 1);
}

/* Locked. */
static int wait_pending(struct virtio_blk *blk, bool recorded, const struct wait *wait, struct err *err)
{
	char pending[WAIT_TEXT_BYTES];

	for (unsigned polls = 0; count_pending(blk, recorded) > 0; polls++) {
		if (wait_is_cancelled(wait)) {
			describe_pending(blk, recorded, pending);
			return err_set(err, ERR_STATE, ECANCELED, "cancelled while it waited for %s", pending);
		}
		if (wait_reports(wait, polls)) {
			describe_pending(blk, recorded, pending);
			virtio_unlock(blk->vdev);
			wait->report(wait->opaque, pending);
			virtio_lock(blk->vdev);
		} else {
			virtio_wait(blk->vdev, WAIT_POLL_MS);
		}
	}
	return 0;
}

static int finish(void *opaque, struct buf *log, const struct wait *wait, struct err *err)
{
	struct virtio_blk *blk = opaque;

	virtio_lock(blk->vdev);
	int ret = wait_pending(blk, true, wait, err);
	if (ret == 0 && blk->log.length > 0)
		ret = buf_append(log, blk->log.data, blk->log.length, err);
	if (ret == 0)
		buf_free(&blk->log);
	virtio_unlock(blk->vdev);
	return ret;
}

/* --- putting back --- */

static int validate(void *opaque, const void *in, struct err *err)
{
	struct virtio_blk *blk = opaque;
	const struct blk_state *state = in;
	unsigned used[VIRTIO_BLK_MAX_QUEUES] = {0};

	int ret = virtio_validate(blk->vdev, &state->virtio, err);
	if (ret < 0)
		return ret;
	for (uint32_t i = 0; i < state->inflight_count; i++) {
		const struct blk_inflight *r = &state->inflight[i];
		if (r->queue >= blk->queue_count || !state->virtio.queues[r->queue].enabled ||
		    r->head >= state->virtio.queues[r->queue].size || ++used[r->queue] > VIRTQ_MAX_SIZE)
			return err_set(err, ERR_DAMAGED, EINVAL, "%s: request in flight %u: queue %u, head %u",
				       virtio_name(blk->vdev), i, r->queue, r->head);
	}
	return 0;
}

static int apply(void *opaque, const void *in, struct err *err)
{
	struct virtio_blk *blk = opaque;
	const struct blk_state *state = in;

	int ret = virtio_apply(blk->vdev, &state->virtio, err);
	if (ret < 0)
		return ret;
	virtio_lock(blk->vdev);
	forget_records(blk);
	free(blk->restored);
	blk->restored_count = state->inflight_count;
	blk->restored = xcalloc(state->inflight_count + 1, sizeof(*blk->restored));
	memcpy(blk->restored, state->inflight, state->inflight_count * sizeof(*blk->restored));
	virtio_unlock(blk->vdev);
	return 0;
}

struct completion {
	bool logged;
	struct log_header header;
	const uint8_t *data;
};

static int parse_entry(struct virtio_blk *blk, const uint8_t **at, const uint8_t *end, struct completion *completions,
		       struct err *err)
{
	struct log_header header;
	size_t left = (size_t)(end - *at);

	if (left < LOG_LENGTH_BYTES || get_le32(*at) > left - LOG_LENGTH_BYTES)
		return err_set(err, ERR_DAMAGED, EINVAL, "an entry is cut off");
	const uint8_t *map = *at + LOG_LENGTH_BYTES;
	uint32_t length = get_le32(*at);
	int ret = codec_decode(&log_table, map, length, &header, err);
	if (ret < 0)
		return ret;
	const uint8_t *data = map + length;
	if (header.data_bytes > (uint64_t)(end - data))
		return err_set(err, ERR_DAMAGED, EINVAL, "the data of entry %u is cut off", header.index);
	if (header.index >= blk->restored_count || completions[header.index].logged || header.status > BLK_S_UNSUPP)
		return err_set(err, ERR_DAMAGED, EINVAL, "entry %u of %u, status %u", header.index, blk->restored_count,
			       header.status);
	completions[header.index] = (struct completion){.logged = true, .header = header, .data = data};
	*at = data + header.data_bytes;
	return 0;
}

/* The descriptors are read again; the guest may have changed them since it gave them to us. What does not fit is its
 * fault. */
static int deliver(struct blk_request *r, const struct completion *c, struct err *err)
{
	bool has_data = r->type == BLK_IN && c->header.status == BLK_S_OK;

	if (c->header.written != r->in_bytes || c->header.data_bytes != (has_data ? r->data_bytes : 0))
		return err_set(err, ERR_FAILED, EPROTO, "chain %u is not what it was when it was given to the device",
			       r->chain.head);
	if (has_data)
		virtq_copy_to(&r->chain, 0, c->data, c->header.data_bytes);
	blk_put(r, c->header.status);
	virtio_publish(r->blk->vdev, r->queue);
	return 0;
}

/* A completion that the log has is given to the guest; else the request is in flight again, and the I/O thread starts
 * it. */
static void restore(struct virtio_blk *blk, const struct blk_inflight *in, const struct completion *c)
{
	struct blk_request *r = blk_take(blk, in->queue);
	struct err err = ERR_INIT;

	if (r == NULL)
		return; /* validate saw to it that there are enough */
	int ret = virtq_walk(virtio_queue(blk->vdev, in->queue), in->head, &r->chain, &err);
	if (ret == 0)
		ret = blk_prepare(r, &err);
	if (ret == 0 && c->logged) {
		ret = deliver(r, c, &err);
	} else if (ret == 0) {
		r->deferred = true;
		blk_link(r);
		virtio_kick(blk->vdev, in->queue);
		return;
	}
	blk_release(r);
	if (ret < 0)
		virtio_break(blk->vdev, &err);
}

static int apply_log(void *opaque, const uint8_t *log, size_t length, struct err *err)
{
	struct virtio_blk *blk = opaque;
	int ret = 0;

	virtio_lock(blk->vdev);
	struct completion *completions = xcalloc(blk->restored_count + 1, sizeof(*completions));
	for (const uint8_t *at = log, *end = log + length; length > 0 && at < end && ret == 0;)
		ret = parse_entry(blk, &at, end, completions, err);
	if (ret == 0)
		virtio_activate(blk->vdev);
	for (uint32_t i = 0; i < blk->restored_count && ret == 0; i++) {
		if (virtio_is_live(blk->vdev))
			restore(blk, &blk->restored[i], &completions[i]);
	}
	free(completions);
	if (ret < 0) {
		err_prefix(err, "%s: completion log", virtio_name(blk->vdev));
	} else {
		free(blk->restored);
		blk->restored = NULL;
		blk->restored_count = 0;
	}
	virtio_unlock(blk->vdev);
	return ret;
}

static int settle(void *opaque, const struct wait *wait, struct err *err)
{
	struct virtio_blk *blk = opaque;

	virtio_lock(blk->vdev);
	int ret = wait_pending(blk, false, wait, err);
	virtio_unlock(blk->vdev);
	return ret;
}

static int drain(void *opaque, struct err *err)
{
	struct virtio_blk *blk = opaque;

	return virtio_drain(blk->vdev, err);
}

struct component virtio_blk_component(struct virtio_blk *blk, uint32_t instance)
{
	return (struct component){
		.id = "virtio-blk",
		.instance = instance,
		.version = 1,
		.table = &state_table,
		.opaque = blk,
		.capture = capture,
		.validate = validate,
		.apply = apply,
		.inflight = inflight,
		.finish = finish,
		.apply_log = apply_log,
		.settle = settle,
		.drain = drain,
	};
}
