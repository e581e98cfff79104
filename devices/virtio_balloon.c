#include "devices/virtio_balloon.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "devices/virtio.h"

#define CLASS_OTHER 0xff0000u
#define QUEUE_SIZE  128u /* Linux wants room for 32 segments to report */

enum {
	QUEUE_INFLATE,
	QUEUE_DEFLATE,
	/* The specification numbers the reporting queue 4; drivers leave out the numbers of queues that they do not use, and so name it 2
	 * (Linux), as 2 and 3 are of features that are not offered. Both lead there. */
	QUEUE_REPORT_PACKED,
	QUEUE_NONE,
	QUEUE_REPORT,
	QUEUES,
};

/* Feature bits (5.5.3). */
#define F_MUST_TELL_HOST (1ull << 0)
#define F_DEFLATE_ON_OOM (1ull << 2)
#define F_REPORTING	 (1ull << 5)

#define CONFIG_BYTES	   8u /* num_pages, actual (5.5.4) */
#define CONFIG_ACTUAL	   4u
#define REQUESTS_IN_A_TURN 8u
#define PFNS_AT_ONCE	   512u
#define REQUEST_MAX_BYTES  (4u * 65536) /* drivers send 1 KiB to 32 KiB */
/* What is given back in one turn of the loop: a pause may have to wait for it. */
#define TURN_BYTES (8ull << 20)
#define TURN_RUNS  64u

/* What a checkpoint saves. */
struct balloon_state {
	struct virtio_state virtio;
	uint32_t num_pages, actual;
};
static const struct codec_field state_fields[] = {
	CODEC_SUB(struct balloon_state, virtio, &virtio_state_table),
	CODEC_INT(struct balloon_state, num_pages, CODEC_U32),
	CODEC_INT(struct balloon_state, actual, CODEC_U32),
	CODEC_END,
};
static const struct codec_table state_table = {"virtio-balloon", sizeof(struct balloon_state), state_fields};

struct virtio_balloon {
	struct virtio_device *vdev; /* immutable, as the next three */
	struct mem *mem;
	struct loop *loop;
	uint64_t words; /* of the bitmap */

	/* under the device's lock */
	uint32_t num_pages, actual;
	uint64_t *pending; /* one bit a ram page: in the balloon, to be given back */
	uint64_t pending_pages, sweep_word;
	/* The report under way: popped, not answered. `at`: bytes of `segment` that are dealt with. */
	bool reporting;
	unsigned report_queue, segment;
	uint64_t at;
	uint64_t given_back_bytes, reported_bytes, kept_bytes;
	bool warned;

	struct virtq_chain request, report; /* owner: I/O thread */
};

/* --- the balloon --- */

static void forget_pending(struct virtio_balloon *b)
{
	if (b->pending_pages > 0)
		memset(b->pending, 0, b->words * sizeof(*b->pending));
	b->pending_pages = 0;
}

static void warn_once(struct virtio_balloon *b, const struct err *err)
{
	if (!b->warned)
		log_warn("%s: %s (not reported again)", virtio_name(b->vdev), err->message);
	b->warned = true;
}

/* What is no page of RAM is left alone: the guest hurts only itself. */
static void note_page(struct virtio_balloon *b, uint32_t pfn, bool inflate)
{
	uint64_t offset;

	if (!mem_ram_offset(b->mem, (uint64_t)pfn << PAGE_SHIFT, &offset))
		return;
	uint64_t page = offset >> PAGE_SHIFT, bit = (uint64_t)1 << (page % 64);
	bool noted = b->pending[page / 64] & bit;
	if (inflate && !noted && virtio_has_feature(b->vdev, F_MUST_TELL_HOST)) {
		b->pending[page / 64] |= bit;
		b->pending_pages++;
	} else if (!inflate && noted) {
		b->pending[page / 64] &= ~bit;
		b->pending_pages--;
	}
}

/* One request: page numbers, each 4 bytes. 1, 0 if there was none, or -errno. */
static int take_pages(struct virtio_balloon *b, struct virtqueue *q, bool inflate, struct err *err)
{
	uint8_t pfns[PFNS_AT_ONCE * 4];
	uint64_t n;

	int ret = virtq_pop(q, &b->request, err);
	if (ret != 1)
		return ret;
	if (b->request.in_count > 0 || b->request.out_bytes > REQUEST_MAX_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u has %u writable segments and %llu bytes", b->request.head,
			       b->request.in_count, (unsigned long long)b->request.out_bytes);
	for (uint64_t at = 0; (n = virtq_copy_from(&b->request, at, pfns, sizeof(pfns))) >= 4; at += sizeof(pfns)) {
		for (uint64_t i = 0; i + 4 <= n; i += 4)
			note_page(b, get_le32(pfns + i), inflate);
	}
	ret = virtq_push(q, b->request.head, 0, err);
	return ret < 0 ? ret : 1;
}

/* Gives back a run of pending pages, within one word of the bitmap or over several whole ones. False: not now. */
static bool give_back_run(struct virtio_balloon *b, uint64_t word, uint64_t *bytes)
{
	struct err err = ERR_INIT;
	unsigned first = (unsigned)__builtin_ctzll(b->pending[word]);
	uint64_t rest = ~(b->pending[word] >> first), end_word = word;
	uint64_t count = rest == 0 ? 64 : (unsigned)__builtin_ctzll(rest);

	if (first + count == 64) {
		while (++end_word < b->words && b->pending[end_word] == UINT64_MAX && count * PAGE_BYTES < TURN_BYTES)
			count += 64;
	}
	*bytes = count * PAGE_BYTES;
	int ret = mem_give_back(b->mem, (word * 64 + first) << PAGE_SHIFT, *bytes, &err);
	if (ret == -EBUSY)
		return false;
	if (ret == 0)
		b->given_back_bytes += *bytes;
	else
		warn_once(b, &err);
	for (uint64_t page = word * 64 + first; page < word * 64 + first + count; page++)
		b->pending[page / 64] &= ~((uint64_t)1 << (page % 64));
	b->pending_pages -= count;
	return true;
}

/* A slice of what is pending; more is asked for with a kick. Where discards are held their release kicks. */
static void sweep(struct virtio_balloon *b)
{
	uint64_t bytes = 0, run;

	for (unsigned runs = 0; b->pending_pages > 0 && runs < TURN_RUNS && bytes < TURN_BYTES; runs++) {
		while (b->pending[b->sweep_word] == 0)
			b->sweep_word = (b->sweep_word + 1) % b->words;
		if (!give_back_run(b, b->sweep_word, &run))
			return;
		bytes += run;
	}
	if (b->pending_pages > 0)
		virtio_kick(b->vdev, QUEUE_INFLATE);
}

static int serve_balloon(struct virtio_balloon *b, unsigned queue, struct err *err)
{
	struct virtqueue *q = virtio_queue(b->vdev, queue);
	bool more = true;

	for (unsigned turn = 0; turn < REQUESTS_IN_A_TURN && more; turn++) {
		int ret = take_pages(b, q, queue == QUEUE_INFLATE, err);
		if (ret < 0)
			return ret;
		more = ret == 1 || virtq_rearm(q);
	}
	virtio_signal(b->vdev, queue);
	if (more)
		virtio_kick(b->vdev, queue);
	return 0;
}

/* --- free page reporting --- */

/* The next piece of the segment, whole pages only. False at its end. */
static bool report_piece(struct virtio_balloon *b, uint64_t *bytes)
{
	struct err err = ERR_INIT;
	uint64_t gpa = b->report.gpa[b->segment], end = gpa + b->report.iov[b->segment].iov_len, offset;
	uint64_t from = round_up(gpa, PAGE_BYTES) + b->at;

	end = round_down(end, PAGE_BYTES);
	if (from >= end || !mem_ram_offset(b->mem, from, &offset))
		return false;
	uint64_t n = min_u64(end - from, TURN_BYTES);
	int ret = mem_give_back(b->mem, offset, n, &err);
	if (ret == 0)
		b->reported_bytes += n;
	else
		b->kept_bytes += n;
	if (ret != 0 && ret != -EBUSY)
		warn_once(b, &err);
	b->at += n;
	*bytes += ret == 0 ? n : 0;
	return true;
}

/* One slice of the report under way. True at its end. */
static bool report_slice(struct virtio_balloon *b)
{
	uint64_t bytes = 0;

	while (b->segment < b->report.in_count) {
		if (bytes >= TURN_BYTES)
			return false;
		if (report_piece(b, &bytes))
			continue;
		b->segment++;
		b->at = 0;
	}
	return true;
}

/* 1: answered one, or has not finished with it yet; 0: there is none; or -errno. */
static int serve_report(struct virtio_balloon *b, unsigned queue, struct err *err)
{
	struct virtqueue *q = virtio_queue(b->vdev, queue);

	if (!b->reporting) {
		int ret = virtq_pop(q, &b->report, err);
		if (ret != 1)
			return ret;
		if (b->report.out_count > 0)
			return err_set(err, ERR_FAILED, EPROTO, "chain %u has a readable segment", b->report.head);
		b->reporting = true;
		b->report_queue = queue;
		b->segment = 0;
		b->at = 0;
	}
	if (!report_slice(b))
		return 1;
	b->reporting = false;
	int ret = virtq_push(q, b->report.head, 0, err);
	return ret < 0 ? ret : 1;
}

static int serve_reports(struct virtio_balloon *b, unsigned queue, struct err *err)
{
	/* Only one of the two queues is a driver's; of a strange one the other waits. */
	if (b->reporting && b->report_queue != queue) {
		virtio_kick(b->vdev, queue);
		return 0;
	}
	int ret = serve_report(b, queue, err);
	if (ret < 0)
		return ret;
	if (!b->reporting)
		virtio_signal(b->vdev, queue);
	if (ret == 1 || virtq_rearm(virtio_queue(b->vdev, queue)))
		virtio_kick(b->vdev, queue);
	return 0;
}

/* --- the device --- */

static void notify(void *opaque, unsigned queue)
{
	struct virtio_balloon *b = opaque;
	struct err err = ERR_INIT;
	int ret = 0;

	if (queue == QUEUE_INFLATE || queue == QUEUE_DEFLATE) {
		ret = serve_balloon(b, queue, &err);
		if (ret == 0 && queue == QUEUE_INFLATE)
			sweep(b);
	} else if (virtio_has_feature(b->vdev, F_REPORTING)) {
		ret = serve_reports(b, queue, &err);
	}
	if (ret < 0)
		virtio_break(b->vdev, &err);
}

/* After a reset the guest has all of its pages. */
static void cancel(void *opaque)
{
	struct virtio_balloon *b = opaque;

	forget_pending(b);
	b->reporting = false;
	if (virtio_is_resetting(b->vdev))
		b->actual = 0;
}

static void config_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct virtio_balloon *b = opaque;
	uint8_t config[CONFIG_BYTES];

	put_le32(config, b->num_pages);
	put_le32(config + CONFIG_ACTUAL, b->actual);
	memcpy(data, config + offset, size);
}

static void config_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct virtio_balloon *b = opaque;
	uint8_t config[CONFIG_BYTES];

	put_le32(config + CONFIG_ACTUAL, b->actual);
	memcpy(config + offset, data, size);
	b->actual = get_le32(config + CONFIG_ACTUAL);
}

static const struct virtio_ops ops = {
	.notify = notify, .cancel = cancel, .config_read = config_read, .config_write = config_write};

/* Of mem_on_release: in the engine's thread, without the device's lock. */
static void discards_released(void *opaque)
{
	struct virtio_balloon *b = opaque;

	virtio_kick(b->vdev, QUEUE_INFLATE);
}

int virtio_balloon_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct virtio_balloon **out,
			  struct err *err)
{
	struct virtio_balloon *b = xcalloc(1, sizeof(*b));
	const struct virtio_config about = {
		.name = "balloon",
		.device_id = VIRTIO_ID_BALLOON,
		.class_code = CLASS_OTHER,
		.features = F_MUST_TELL_HOST | F_DEFLATE_ON_OOM | F_REPORTING,
		.queues = QUEUES,
		.queue_size = QUEUE_SIZE,
		.config_bytes = CONFIG_BYTES,
		.ops = &ops,
		.opaque = b,
	};

	b->mem = mem;
	b->loop = io_loop;
	b->words = BITMAP_WORDS(mem_pages(mem));
	b->pending = xcalloc(b->words, sizeof(*b->pending));
	int ret = virtio_create(bus, mem, io_loop, &about, &b->vdev, err);
	if (ret < 0) {
		free(b->pending);
		free(b);
		return ret;
	}
	mem_on_release(mem, discards_released, b);
	*out = b;
	return 0;
}

void virtio_balloon_destroy(struct virtio_balloon *b)
{
	if (b == NULL)
		return;
	mem_on_release(b->mem, NULL, NULL);
	virtio_destroy(b->vdev);
	free(b->pending);
	free(b);
}

struct target {
	struct virtio_balloon *balloon;
	uint32_t num_pages;
};

/* In the I/O thread, as the interrupt must not come while a checkpoint is captured. */
static void set_target(void *opaque)
{
	struct target *target = opaque;
	struct virtio_balloon *b = target->balloon;

	virtio_lock(b->vdev);
	b->num_pages = target->num_pages;
	virtio_config_changed(b->vdev);
	virtio_unlock(b->vdev);
}

void virtio_balloon_set_target(struct virtio_balloon *b, uint64_t bytes)
{
	struct target target = {.balloon = b, .num_pages = (uint32_t)min_u64(bytes >> PAGE_SHIFT, mem_pages(b->mem))};

	loop_call(b->loop, set_target, &target);
}

void virtio_balloon_get_stats(struct virtio_balloon *b, struct virtio_balloon_stats *out)
{
	virtio_lock(b->vdev);
	*out = (struct virtio_balloon_stats){
		.target_bytes = (uint64_t)b->num_pages << PAGE_SHIFT,
		.balloon_bytes = (uint64_t)b->actual << PAGE_SHIFT,
		.pending_bytes = b->pending_pages << PAGE_SHIFT,
		.given_back_bytes = b->given_back_bytes,
		.reported_bytes = b->reported_bytes,
		.kept_bytes = b->kept_bytes,
	};
	virtio_unlock(b->vdev);
}

/* --- state --- */

static int capture(void *opaque, void *state, struct err *err)
{
	struct virtio_balloon *b = opaque;
	struct balloon_state *s = state;
	(void)err;

	virtio_capture(b->vdev, &s->virtio);
	virtio_lock(b->vdev);
	s->num_pages = b->num_pages;
	s->actual = b->actual;
	/* A report under way was not answered: whoever goes on from here gets it from the ring again. */
	if (b->reporting)
		s->virtio.queues[b->report_queue].next_avail--;
	virtio_unlock(b->vdev);
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	struct virtio_balloon *b = opaque;
	const struct balloon_state *s = state;

	if (s->num_pages > mem_pages(b->mem))
		return err_set(err, ERR_DAMAGED, EINVAL, "balloon: a target of %u pages, the machine has %llu", s->num_pages,
			       (unsigned long long)mem_pages(b->mem));
	return virtio_validate(b->vdev, &s->virtio, err);
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct virtio_balloon *b = opaque;
	const struct balloon_state *s = state;

	int ret = virtio_apply(b->vdev, &s->virtio, err);
	if (ret < 0)
		return ret;
	virtio_lock(b->vdev);
	b->num_pages = s->num_pages;
	b->actual = s->actual;
	/* These were given by a guest that is no more. */
	forget_pending(b);
	b->reporting = false;
	virtio_activate(b->vdev);
	/* News of the target may have been on its way. */
	if (b->num_pages != b->actual)
		virtio_config_changed(b->vdev);
	virtio_unlock(b->vdev);
	return 0;
}

static int drain(void *opaque, struct err *err)
{
	struct virtio_balloon *b = opaque;

	return virtio_drain(b->vdev, err);
}

struct component virtio_balloon_component(struct virtio_balloon *b, uint32_t instance)
{
	return (struct component){
		.id = "virtio-balloon",
		.instance = instance,
		.version = 1,
		.table = &state_table,
		.opaque = b,
		.capture = capture,
		.validate = validate,
		.apply = apply,
		.drain = drain,
	};
}
