/*
 * A ring of slots between one that makes chunks, the processors that pack or unpack them, and one that takes them in order.
 *
 *     FREE --put--> FILLED --a worker--> WORKED_ON --> DONE --consumed--> FREE
 *
 * Slot n of the ring holds chunk n, n + count, ...: the order is that of the ring. The first failure of any ends all.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include <zstd.h>

#include "checkpoint/store/transfer_internal.h"

#define MAX_WORKERS 64

struct transfer_pipe {
	const struct transfer_pipe_ops *ops;
	void *opaque;
	pthread_mutex_t lock; /* all below */
	pthread_cond_t changed;
	struct transfer_slot *slots;
	unsigned count;
	uint64_t put, taken, consumed; /* chunks so far */
	bool ended;		       /* nothing more is put */
	int rc;			       /* of the first failure */
	struct err err;
};

size_t transfer_packed_bound(void) { return ZSTD_COMPRESSBOUND((size_t)TRANSFER_MAX_CONTENT); }

static void fail(struct transfer_pipe *pipe, int rc, const struct err *err)
{
	pthread_mutex_lock(&pipe->lock);
	if (!pipe->rc) {
		pipe->rc = rc;
		pipe->err = *err;
	}
	pthread_cond_broadcast(&pipe->changed);
	pthread_mutex_unlock(&pipe->lock);
}

struct transfer_slot *transfer_pipe_get(struct transfer_pipe *pipe)
{
	pthread_mutex_lock(&pipe->lock);
	struct transfer_slot *slot = &pipe->slots[pipe->put % pipe->count];
	while (!pipe->rc && slot->state != SLOT_FREE)
		pthread_cond_wait(&pipe->changed, &pipe->lock);
	bool failed = pipe->rc != 0;
	pthread_mutex_unlock(&pipe->lock);
	return failed ? NULL : slot;
}

void transfer_pipe_put(struct transfer_pipe *pipe, struct transfer_slot *slot)
{
	pthread_mutex_lock(&pipe->lock);
	slot->state = SLOT_FILLED;
	pipe->put++;
	pthread_cond_broadcast(&pipe->changed);
	pthread_mutex_unlock(&pipe->lock);
}

static void *producer_main(void *opaque)
{
	struct transfer_pipe *pipe = opaque;
	struct err err = ERR_INIT;
	int rc = pipe->ops->produce(pipe, pipe->opaque, &err);

	if (rc)
		fail(pipe, rc, &err);
	pthread_mutex_lock(&pipe->lock);
	pipe->ended = true;
	pthread_cond_broadcast(&pipe->changed);
	pthread_mutex_unlock(&pipe->lock);
	return NULL;
}

/* The next chunk that nobody works on; NULL at the end. */
static struct transfer_slot *take_work(struct transfer_pipe *pipe)
{
	struct transfer_slot *slot = NULL;

	pthread_mutex_lock(&pipe->lock);
	while (!pipe->rc && pipe->taken == pipe->put && !pipe->ended)
		pthread_cond_wait(&pipe->changed, &pipe->lock);
	if (!pipe->rc && pipe->taken < pipe->put) {
		slot = &pipe->slots[pipe->taken++ % pipe->count];
		slot->state = SLOT_WORKED_ON;
	}
	pthread_mutex_unlock(&pipe->lock);
	return slot;
}

static void *worker_main(void *opaque)
{
	struct transfer_pipe *pipe = opaque;
	struct transfer_slot *slot;
	struct err err = ERR_INIT;
	void *context = pipe->ops->make_context();
	int rc = context ? 0 : err_sys(&err, ENOMEM, "compression");

	while (!rc && (slot = take_work(pipe))) {
		rc = pipe->ops->work(slot, context, &err);
		if (rc)
			break; /* nobody consumes that one */
		pthread_mutex_lock(&pipe->lock);
		slot->state = SLOT_DONE;
		pthread_cond_broadcast(&pipe->changed);
		pthread_mutex_unlock(&pipe->lock);
	}
	if (rc)
		fail(pipe, rc, &err);
	if (context)
		pipe->ops->free_context(context);
	return NULL;
}

/* False at the end, or when somebody failed. */
static bool consume_next(struct transfer_pipe *pipe)
{
	struct transfer_slot *slot = &pipe->slots[pipe->consumed % pipe->count];
	struct err err = ERR_INIT;

	pthread_mutex_lock(&pipe->lock);
	while (!pipe->rc && slot->state != SLOT_DONE && !(pipe->ended && pipe->consumed == pipe->put))
		pthread_cond_wait(&pipe->changed, &pipe->lock);
	bool more = !pipe->rc && slot->state == SLOT_DONE;
	pthread_mutex_unlock(&pipe->lock);
	if (!more)
		return false;
	int rc = pipe->ops->consume(slot, pipe->opaque, &err);
	if (rc) {
		fail(pipe, rc, &err);
		return false;
	}
	pthread_mutex_lock(&pipe->lock);
	slot->state = SLOT_FREE;
	pipe->consumed++;
	pthread_cond_broadcast(&pipe->changed);
	pthread_mutex_unlock(&pipe->lock);
	return true;
}

static unsigned count_processors(void)
{
	cpu_set_t set;
	int n = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;

	return n < 1 ? 1 : n > MAX_WORKERS ? MAX_WORKERS : (unsigned)n;
}

static int make_slots(struct transfer_pipe *pipe, struct err *err)
{
	pipe->slots = xcalloc(pipe->count, sizeof(*pipe->slots));
	for (unsigned i = 0; i < pipe->count; i++) {
		void *content = NULL;

		/* Disks are read into it, and direct I/O wants that aligned. */
		if (posix_memalign(&content, PAGE_BYTES, TRANSFER_MAX_CONTENT) == 0)
			pipe->slots[i].content = content;
		pipe->slots[i].packed = malloc(transfer_packed_bound());
		if (!pipe->slots[i].content || !pipe->slots[i].packed)
			return err_sys(err, ENOMEM, "buffers");
	}
	return 0;
}

static void free_slots(struct transfer_pipe *pipe)
{
	for (unsigned i = 0; i < pipe->count; i++) {
		free(pipe->slots[i].content);
		free(pipe->slots[i].packed);
	}
	free(pipe->slots);
}

/* Starts all threads, consumes, and waits for them. */
static void run_threads(struct transfer_pipe *pipe, unsigned workers)
{
	pthread_t threads[MAX_WORKERS + 1];
	struct err err = ERR_INIT;
	unsigned started = 0;
	int number = 0;

	while (started <= workers && !number) {
		number = pthread_create(&threads[started], NULL, started == 0 ? producer_main : worker_main, pipe);
		started += number == 0;
	}
	if (number)
		fail(pipe, err_sys(&err, number, "thread"), &err);
	while (consume_next(pipe))
		;
	for (unsigned i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
}

int transfer_pipe_run(const struct transfer_pipe_ops *ops, void *opaque, struct err *err)
{
	unsigned workers = count_processors();
	struct transfer_pipe pipe = {.ops = ops, .opaque = opaque, .count = 2 * workers + 2};

	pthread_mutex_init(&pipe.lock, NULL);
	pthread_cond_init(&pipe.changed, NULL);
	int rc = make_slots(&pipe, err);
	if (!rc) {
		run_threads(&pipe, workers);
		rc = pipe.rc;
		if (rc && err)
			*err = pipe.err;
	}
	free_slots(&pipe);
	pthread_cond_destroy(&pipe.changed);
	pthread_mutex_destroy(&pipe.lock);
	return rc;
}

/* --- the work --- */

void *transfer_make_packer(void)
{
	ZSTD_CCtx *context = ZSTD_createCCtx();

	if (!context)
		return NULL;
	/* The frame's own checksum, so that other tools find damage, too. */
	if (ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 1)) ||
	    ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1))) {
		ZSTD_freeCCtx(context);
		return NULL;
	}
	return context;
}

void transfer_free_packer(void *context) { ZSTD_freeCCtx(context); }

int transfer_pack(struct transfer_slot *slot, void *context, struct err *err)
{
	slot->header.sum = transfer_sum(&slot->header, slot->content);
	size_t n = ZSTD_compress2(context, slot->packed, transfer_packed_bound(), slot->content, slot->header.content_bytes);

	if (ZSTD_isError(n))
		return err_set(err, ERR_FAILED, EIO, "compression: %s", ZSTD_getErrorName(n));
	slot->header.packed_bytes = (uint32_t)n;
	return 0;
}

void *transfer_make_unpacker(void) { return ZSTD_createDCtx(); }
void transfer_free_unpacker(void *context) { ZSTD_freeDCtx(context); }

int transfer_unpack(struct transfer_slot *slot, void *context, struct err *err)
{
	const struct transfer_header *h = &slot->header;

	/* One frame, and no other: what follows it would be nobody's. */
	if (h->packed_bytes < 4 || get_le32(slot->packed) != ZSTD_MAGICNUMBER ||
	    ZSTD_findFrameCompressedSize(slot->packed, h->packed_bytes) != h->packed_bytes ||
	    ZSTD_decompressDCtx(context, slot->content, h->content_bytes, slot->packed, h->packed_bytes) != h->content_bytes ||
	    transfer_sum(h, slot->content) != h->sum)
		return err_set(err, ERR_DAMAGED, EBADMSG, "damaged: chunk %u does not fit its checksum", h->number);
	return 0;
}
