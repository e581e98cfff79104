#include "devices/virtio_blk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "devices/virtio_blk_internal.h"

#define F_SEG_MAX      (1ull << 2)
#define F_RO	       (1ull << 5)
#define F_BLK_SIZE     (1ull << 6)
#define F_FLUSH	       (1ull << 9)
#define F_TOPOLOGY     (1ull << 10)
#define F_MQ	       (1ull << 12)
#define F_DISCARD      (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)

/* Device configuration (5.2.4). */
enum {
	CONFIG_CAPACITY = 0,
	CONFIG_SEG_MAX = 12,
	CONFIG_BLK_SIZE = 20,
	CONFIG_PHYSICAL_EXP = 24,
	CONFIG_MIN_IO = 26,
	CONFIG_OPT_IO = 28,
	CONFIG_NUM_QUEUES = 34,
	CONFIG_MAX_DISCARD = 36,
	CONFIG_MAX_DISCARD_SEG = 40,
	CONFIG_DISCARD_ALIGNMENT = 44,
	CONFIG_MAX_WRITE_ZEROES = 48,
	CONFIG_MAX_WRITE_ZEROES_SEG = 52,
	CONFIG_MAY_UNMAP = 56,
};

#define CLASS_STORAGE	   0x018000u
#define HEADER_BYTES	   16u
#define RANGE_BYTES	   16u /* of discard and write zeroes: sector, count, flags */
#define RANGE_F_UNMAP	   1u
#define MAX_RANGE_SECTORS  (1u << 21) /* 1 GiB: bounds the work of one request */
#define PHYSICAL_EXPONENT  3u	      /* log2 of sectors */
#define PHYSICAL_BYTES	   (COW_SECTOR_BYTES << PHYSICAL_EXPONENT)
#define OPTIMAL_BYTES	   65536u
#define REQUESTS_IN_A_TURN 64u	      /* then the loop may park, or serve others ... */
#define BYTES_IN_A_TURN	   (2u << 20) /* ... and what is in the page cache is copied before it may */
#define ERRORS_LOGGED	   16u

bool blk_is_write(uint32_t type) { return type == BLK_OUT || type == BLK_DISCARD || type == BLK_WRITE_ZEROES; }

const char *blk_type_name(uint32_t type)
{
	switch (type) {
	case BLK_IN:
		return "read";
	case BLK_OUT:
		return "write";
	case BLK_FLUSH:
		return "flush";
	case BLK_GET_ID:
		return "identification";
	case BLK_DISCARD:
		return "discard";
	case BLK_WRITE_ZEROES:
		return "write of zeroes";
	default:
		return "unknown request";
	}
}

/* --- requests: taken, in flight, free --- */

struct blk_request *blk_take(struct virtio_blk *blk, unsigned queue)
{
	struct blk_queue *q = &blk->queues[queue];
	struct blk_request *r = q->free;

	if (r != NULL)
		q->free = r->next;
	else if (q->fresh < VIRTQ_MAX_SIZE)
		r = &q->requests[q->fresh++];
	else
		return NULL;
	r->blk = blk;
	r->queue = (uint16_t)queue;
	r->prev = r->next = NULL;
	r->deferred = r->flushing = r->recorded = false;
	return r;
}

void blk_release(struct blk_request *r)
{
	struct blk_queue *q = &r->blk->queues[r->queue];

	r->next = q->free;
	q->free = r;
	if (q->starved) {
		q->starved = false;
		virtio_kick(r->blk->vdev, r->queue);
	}
}

void blk_link(struct blk_request *r)
{
	struct virtio_blk *blk = r->blk;

	r->prev = blk->last;
	if (blk->last != NULL)
		blk->last->next = r;
	else
		blk->first = r;
	blk->last = r;
	r->since_ns = clock_coarse_ns();
	virtio_request_begin(blk->vdev);
}

void blk_end(struct blk_request *r)
{
	struct virtio_blk *blk = r->blk;

	if (r->prev != NULL)
		r->prev->next = r->next;
	else
		blk->first = r->next;
	if (r->next != NULL)
		r->next->prev = r->prev;
	else
		blk->last = r->prev;
	blk_release(r);
	virtio_request_end(blk->vdev);
}

/* --- a request's way --- */

/* Shortens the readable part by the header: segments may be cut anywhere (2.7.4.2). Returns the first that still
 * holds something. */
static unsigned strip_header(struct virtq_chain *chain)
{
	uint64_t skip = HEADER_BYTES;
	unsigned i = 0;

	while (i < chain->out_count && skip >= chain->iov[i].iov_len) {
		skip -= chain->iov[i].iov_len;
		chain->iov[i++].iov_len = 0;
	}
	if (skip > 0) {
		chain->iov[i].iov_base = (uint8_t *)chain->iov[i].iov_base + skip;
		chain->iov[i].iov_len -= skip;
		chain->gpa[i] += skip;
	}
	chain->out_bytes -= HEADER_BYTES;
	return i;
}

/* The status is the last byte of the writable part. */
static void strip_status(struct blk_request *r)
{
	struct virtq_chain *chain = &r->chain;
	unsigned last = chain->out_count + chain->in_count - 1;

	chain->iov[last].iov_len--;
	chain->in_bytes--;
	r->status = (uint8_t *)chain->iov[last].iov_base + chain->iov[last].iov_len;
	r->status_gpa = chain->gpa[last] + chain->iov[last].iov_len;
	if (chain->iov[last].iov_len == 0)
		chain->in_count--;
}

/* A discard or write of zeroes names its range in its data; one a request, as the configuration says. */
static void read_range(struct blk_request *r)
{
	uint8_t range[RANGE_BYTES];

	if (r->data_bytes != RANGE_BYTES)
		return;
	virtq_copy_from(&r->chain, 0, range, sizeof(range));
	r->sector = get_le64(range);
	r->bytes = (uint64_t)get_le32(range + 8) * COW_SECTOR_BYTES;
	r->flags = get_le32(range + 12);
}

int blk_prepare(struct blk_request *r, struct err *err)
{
	struct virtq_chain *chain = &r->chain;
	uint8_t header[HEADER_BYTES];

	if (virtq_copy_from(chain, 0, header, sizeof(header)) < sizeof(header) || chain->in_bytes == 0)
		return err_set(err, ERR_FAILED, EPROTO,
			       "chain %u: no room for header and status in %llu and %llu bytes", chain->head,
			       (unsigned long long)chain->out_bytes, (unsigned long long)chain->in_bytes);
	r->type = get_le32(header);
	r->sector = get_le64(header + 8);
	r->in_bytes = (uint32_t)chain->in_bytes;
	unsigned first = strip_header(chain);
	strip_status(r);

	bool in = r->type == BLK_IN;
	r->data_first = in ? chain->out_count : first;
	r->data_count = in ? chain->in_count : chain->out_count - first;
	r->data_bytes = r->bytes = in ? chain->in_bytes : chain->out_bytes;
	r->flags = 0;
	if (r->type == BLK_DISCARD || r->type == BLK_WRITE_ZEROES)
		read_range(r);
	return 0;
}

void blk_put(struct blk_request *r, uint8_t status)
{
	struct virtio_blk *blk = r->blk;
	struct virtqueue *q = virtio_queue(blk->vdev, r->queue);
	struct err err = ERR_INIT;

	if (!virtio_is_live(blk->vdev))
		return;
	mem_mark_dirty(q->mem, r->status_gpa, 1);
	*r->status = status;
	if (virtq_put(q, r->chain.head, r->in_bytes, &err) < 0)
		virtio_break(blk->vdev, &err);
}

static void publish_all(struct virtio_blk *blk)
{
	for (unsigned i = 0; blk->unpublished != 0; i++) {
		if (!(blk->unpublished & 1u << i))
			continue;
		blk->unpublished &= ~(1u << i);
		virtio_publish(blk->vdev, i);
		virtio_expect(blk->vdev, i);
	}
}

/* The guest sees at once all that ended in a turn of the ring, and is interrupted once. */
static void turn_ends(struct cow_turn *turn)
{
	struct virtio_blk *blk = container_of(turn, struct virtio_blk, turn);

	virtio_lock(blk->vdev);
	publish_all(blk);
	virtio_unlock(blk->vdev);
}

static void count_request(struct virtio_blk_stats *stats, const struct blk_request *r, uint8_t status)
{
	if (status != BLK_S_OK) {
		stats->errors++;
		return;
	}
	switch (r->type) {
	case BLK_IN:
		stats->reads++;
		stats->read_bytes += r->bytes;
		break;
	case BLK_OUT:
	case BLK_WRITE_ZEROES:
		stats->writes++;
		stats->written_bytes += r->bytes;
		break;
	case BLK_FLUSH:
		stats->flushes++;
		break;
	case BLK_DISCARD:
		stats->discards++;
		break;
	default:
		break;
	}
}

static void finish(struct blk_request *r, uint8_t status)
{
	count_request(&r->blk->stats, r, status);
	/* The kernel wrote behind KVM's back, perhaps after the pages were saved: they are dirty since now. */
	if (r->type == BLK_IN)
		virtq_mark_dirty(virtio_queue(r->blk->vdev, r->queue), &r->chain, 0, r->data_bytes);
	/* Before the guest sees it: from then on the guest may write into its buffer. */
	if (r->recorded)
		blk_record_end(r, true, status);
	blk_put(r, status);
	if (r->blk->unpublished == 0)
		cow_io_at_turn_end(cow_disk_io(r->blk->disk), &r->blk->turn);
	r->blk->unpublished |= 1u << r->queue;
	blk_end(r);
}

static void report_error(struct blk_request *r, int result)
{
	struct virtio_blk *blk = r->blk;

	if (result == -EINVAL || blk->errors++ >= ERRORS_LOGGED) /* EINVAL: the guest asked for what is not there */
		return;
	log_warn("%s: %s at sector %llu, %llu bytes: %s%s", virtio_name(blk->vdev), blk_type_name(r->type),
		 (unsigned long long)r->sector, (unsigned long long)r->data_bytes, strerror(-result),
		 blk->errors == ERRORS_LOGGED ? " (further errors are not reported)" : "");
}

static void done(struct cow_request *cow, int result)
{
	struct blk_request *r = container_of(cow, struct blk_request, cow);
	struct virtio_blk *blk = r->blk;

	virtio_lock(blk->vdev);
	/* A driver that does not know flushes must find its data stable (5.2.6.2: write-through). */
	if (result == 0 && blk_is_write(r->type) && !r->flushing && !virtio_has_feature(blk->vdev, F_FLUSH)) {
		r->flushing = true;
		r->cow = (struct cow_request){.op = COW_FLUSH, .done = done};
		cow_submit(blk->disk, &r->cow);
		virtio_unlock(blk->vdev);
		return;
	}
	if (result < 0)
		report_error(r, result);
	finish(r, result == 0 ? BLK_S_OK : result == -ENOTSUP ? BLK_S_UNSUPP : BLK_S_IOERR);
	virtio_unlock(blk->vdev);
}

/* If the guest changes its buffer meanwhile, either is right. */
static bool is_all_zero(const struct blk_request *r)
{
	const struct iovec *iov = r->chain.iov + r->data_first;

	for (unsigned i = 0; i < r->data_count; i++)
		if (iov[i].iov_len > 0 && !bytes_are_zero(iov[i].iov_base, iov[i].iov_len))
			return false;
	return true;
}

static void submit(struct blk_request *r, enum cow_op op)
{
	uint64_t offset;

	if (mul_overflows(r->sector, COW_SECTOR_BYTES, &offset) || r->bytes % COW_SECTOR_BYTES != 0 ||
	    !range_within(offset, r->bytes, cow_size(r->blk->disk))) {
		finish(r, BLK_S_IOERR);
		return;
	}
	if (r->bytes == 0) {
		finish(r, BLK_S_OK);
		return;
	}
	bool zeroes = op == COW_WRITE && r->blk->detect_zeroes && is_all_zero(r);
	r->cow = (struct cow_request){.op = zeroes ? COW_WRITE_ZEROES : op, .may_unmap = zeroes || r->flags & RANGE_F_UNMAP,
				      .offset = offset, .length = r->bytes, .done = done};
	if (op == COW_READ || op == COW_WRITE) {
		r->cow.iov = r->chain.iov + r->data_first;
		r->cow.iov_count = r->data_count;
	}
	cow_submit(r->blk->disk, &r->cow);
}

static void submit_flush(struct blk_request *r)
{
	r->cow = (struct cow_request){.op = COW_FLUSH, .done = done};
	cow_submit(r->blk->disk, &r->cow);
}

/* Flags: 5.2.6.2. */
static void submit_range(struct blk_request *r)
{
	bool discard = r->type == BLK_DISCARD;

	if (r->data_bytes != RANGE_BYTES || r->bytes > (uint64_t)MAX_RANGE_SECTORS * COW_SECTOR_BYTES)
		finish(r, BLK_S_IOERR);
	else if ((r->flags & ~RANGE_F_UNMAP) || (discard && r->flags != 0))
		finish(r, BLK_S_UNSUPP);
	else
		submit(r, discard ? COW_DISCARD : COW_WRITE_ZEROES);
}

static void get_id(struct blk_request *r)
{
	virtq_copy_to(&r->chain, 0, r->blk->id, BLK_ID_BYTES);
	finish(r, BLK_S_OK);
}

/* I/O thread; r is in flight. */
static void start(struct blk_request *r)
{
	if (blk_is_write(r->type) && r->blk->readonly) {
		finish(r, BLK_S_IOERR);
		return;
	}
	switch (r->type) {
	case BLK_IN:
		submit(r, COW_READ);
		break;
	case BLK_OUT:
		submit(r, COW_WRITE);
		break;
	case BLK_FLUSH:
		submit_flush(r);
		break;
	case BLK_DISCARD:
	case BLK_WRITE_ZEROES:
		submit_range(r);
		break;
	case BLK_GET_ID:
		get_id(r);
		break;
	default:
		finish(r, BLK_S_UNSUPP);
		break;
	}
}

/* --- the device --- */

static void start_deferred(struct virtio_blk *blk, unsigned queue)
{
	struct blk_request *next;

	for (struct blk_request *r = blk->first; r != NULL; r = next) {
		next = r->next;
		if (r->deferred && r->queue == queue) {
			r->deferred = false;
			start(r);
		}
	}
}

/* Takes one chain: 1, 0 if there is none, or -errno (the device is broken, or has no request left). *bytes grows by its data. */
static int serve(struct virtio_blk *blk, unsigned queue, uint64_t *bytes)
{
	struct blk_request *r = blk_take(blk, queue);
	struct err err = ERR_INIT;

	if (r == NULL) {
		blk->queues[queue].starved = true;
		virtio_stall(blk->vdev, queue);
		return -EAGAIN;
	}
	int ret = virtq_pop(virtio_queue(blk->vdev, queue), &r->chain, &err);
	if (ret == 1 && blk_prepare(r, &err) < 0)
		ret = -EPROTO;
	if (ret < 1) {
		blk_release(r);
		if (ret < 0)
			virtio_break(blk->vdev, &err);
		return ret;
	}
	*bytes += r->data_bytes;
	blk_link(r);
	start(r);
	return 1;
}

/* True if more may be there. */
static bool serve_some(struct virtio_blk *blk, unsigned queue)
{
	uint64_t bytes = 0;

	for (unsigned n = 0; n < REQUESTS_IN_A_TURN && bytes < BYTES_IN_A_TURN; n++) {
		int ret = virtio_is_live(blk->vdev) ? serve(blk, queue, &bytes) : -EPROTO;
		if (ret < 0 || (ret == 0 && !virtio_rearm(blk->vdev, queue)))
			return false;
	}
	return true;
}

/* What the driver offered goes to the kernel together. */
static void notify(void *opaque, unsigned queue)
{
	struct virtio_blk *blk = opaque;
	struct cow_io *io = cow_disk_io(blk->disk);

	cow_io_plug(io);
	start_deferred(blk, queue);
	if (serve_some(blk, queue))
		virtio_kick(blk->vdev, queue);
	cow_io_unplug(io);
	publish_all(blk); /* what ended at once: nothing stays put while the loop is parked */
}

/* What was not started is not with the disk: it can be forgotten. */
static void cancel(void *opaque)
{
	struct virtio_blk *blk = opaque;
	struct blk_request *next;

	for (struct blk_request *r = blk->first; r != NULL; r = next) {
		next = r->next;
		if (!r->deferred)
			continue;
		if (r->recorded)
			blk_record_end(r, false, 0);
		blk_end(r);
	}
}

static void config_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	const struct virtio_blk *blk = opaque;

	memcpy(data, blk->config + offset, size);
}

static const struct virtio_ops ops = {.notify = notify, .cancel = cancel, .config_read = config_read};

/* None of it tells of the image's clusters: a disk that goes back, or starts from a checkpoint, stands on another layer. */
static void fill_config(struct virtio_blk *blk)
{
	uint8_t *c = blk->config;

	put_le64(c + CONFIG_CAPACITY, cow_size(blk->disk) / COW_SECTOR_BYTES);
	put_le32(c + CONFIG_SEG_MAX, VIRTQ_MAX_SEGMENTS - 2);
	put_le32(c + CONFIG_BLK_SIZE, COW_SECTOR_BYTES);
	c[CONFIG_PHYSICAL_EXP] = PHYSICAL_EXPONENT;
	put_le16(c + CONFIG_MIN_IO, (uint16_t)(PHYSICAL_BYTES / COW_SECTOR_BYTES));
	put_le32(c + CONFIG_OPT_IO, OPTIMAL_BYTES / COW_SECTOR_BYTES);
	put_le16(c + CONFIG_NUM_QUEUES, (uint16_t)blk->queue_count);
	put_le32(c + CONFIG_MAX_DISCARD, MAX_RANGE_SECTORS);
	put_le32(c + CONFIG_MAX_DISCARD_SEG, 1);
	put_le32(c + CONFIG_DISCARD_ALIGNMENT, PHYSICAL_BYTES / COW_SECTOR_BYTES);
	put_le32(c + CONFIG_MAX_WRITE_ZEROES, MAX_RANGE_SECTORS);
	put_le32(c + CONFIG_MAX_WRITE_ZEROES_SEG, 1);
	c[CONFIG_MAY_UNMAP] = 1;
}

static int allocate_requests(struct virtio_blk *blk, struct err *err)
{
	for (unsigned i = 0; i < blk->queue_count; i++) {
		blk->queues[i].requests = calloc(VIRTQ_MAX_SIZE, sizeof(struct blk_request));
		if (blk->queues[i].requests == NULL)
			return err_sys(err, ENOMEM, "requests of queue %u", i);
	}
	return 0;
}

int virtio_blk_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct cow_disk *disk,
		      const struct virtio_blk_config *config, struct virtio_blk **out, struct err *err)
{
	struct virtio_blk *blk = xcalloc(1, sizeof(*blk));
	char name[64];
	struct virtio_config about = {
		.name = name,
		.device_id = VIRTIO_ID_BLK,
		.class_code = CLASS_STORAGE,
		.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY,
		.queues = config->queues == 0 ? 1 : config->queues,
		.queue_size = VIRTQ_MAX_SIZE,
		.config_bytes = BLK_CONFIG_BYTES,
		.polls = true,
		.ops = &ops,
		.opaque = blk,
	};

	if (about.queues > VIRTIO_BLK_MAX_QUEUES) {
		free(blk);
		return err_set(err, ERR_USAGE, EINVAL, "disk %s: %u queues: 1 to %u are possible", config->name, about.queues, VIRTIO_BLK_MAX_QUEUES);
	}
	snprintf(name, sizeof(name), "disk %s", config->name);
	blk->disk = disk;
	blk->turn.fn = turn_ends;
	blk->queue_count = about.queues;
	blk->readonly = config->readonly || cow_is_readonly(disk);
	blk->detect_zeroes = config->detect_zeroes;
	about.features |= blk->readonly ? F_RO : F_DISCARD | F_WRITE_ZEROES;
	about.features |= blk->queue_count > 1 ? F_MQ : 0;
	if (config->serial != NULL)
		memcpy(blk->id, config->serial, strnlen(config->serial, BLK_ID_BYTES));
	fill_config(blk);
	int ret = virtio_create(bus, mem, io_loop, &about, &blk->vdev, err);
	if (ret == 0)
		ret = allocate_requests(blk, err);
	if (ret < 0) {
		virtio_blk_destroy(blk);
		return err_prefix(err, "disk %s", config->name);
	}
	*out = blk;
	return 0;
}

void virtio_blk_destroy(struct virtio_blk *blk)
{
	if (blk == NULL)
		return;
	cow_io_cancel_turn(cow_disk_io(blk->disk), &blk->turn);
	virtio_destroy(blk->vdev);
	for (unsigned i = 0; i < VIRTIO_BLK_MAX_QUEUES; i++)
		free(blk->queues[i].requests);
	buf_free(&blk->log);
	free(blk->restored);
	free(blk);
}

void virtio_blk_get_stats(struct virtio_blk *blk, struct virtio_blk_stats *out)
{
	virtio_lock(blk->vdev);
	*out = blk->stats;
	virtio_unlock(blk->vdev);
}

unsigned virtio_blk_inflight(struct virtio_blk *blk)
{
	unsigned n = 0;

	virtio_lock(blk->vdev);
	for (const struct blk_request *r = blk->first; r != NULL; r = r->next)
		n++;
	virtio_unlock(blk->vdev);
	return n;
}
