#include "devices/virtqueue.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"

/* Ring layout (2.7.5, 2.7.6, 2.7.8), little endian. */
#define DESC_BYTES	     16u
#define AVAIL_FLAGS	     0u
#define AVAIL_IDX	     2u
#define AVAIL_RING	     4u
#define USED_FLAGS	     0u
#define USED_IDX	     2u
#define USED_RING	     4u
#define USED_ENTRY_BYTES     8u
#define DESC_F_NEXT	     1u
#define DESC_F_WRITE	     2u
#define DESC_F_INDIRECT	     4u
#define AVAIL_F_NO_INTERRUPT 1u
#define USED_F_NO_NOTIFY     1u

struct descriptor {
	uint64_t gpa;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

static const struct codec_field state_fields[] = {
	CODEC_INT(struct virtq_state, size, CODEC_U16),
	CODEC_INT(struct virtq_state, vector, CODEC_U16),
	CODEC_INT(struct virtq_state, enabled, CODEC_U8),
	CODEC_INT(struct virtq_state, desc_gpa, CODEC_U64),
	CODEC_INT(struct virtq_state, avail_gpa, CODEC_U64),
	CODEC_INT(struct virtq_state, used_gpa, CODEC_U64),
	CODEC_INT(struct virtq_state, next_avail, CODEC_U16),
	CODEC_INT(struct virtq_state, next_used, CODEC_U16),
	CODEC_INT(struct virtq_state, signalled, CODEC_U16),
	CODEC_INT(struct virtq_state, signalled_valid, CODEC_U8),
	CODEC_END,
};
const struct codec_table virtq_state_table = {"virtqueue", sizeof(struct virtq_state), state_fields};

/* Guest memory may change under us: these read exactly once. */
static uint16_t load16(const uint8_t *p)
{
	return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED);
}
static uint16_t load16_acquire(const uint8_t *p)
{
	return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_ACQUIRE);
}

static struct descriptor load_descriptor(const uint8_t *p)
{
	uint8_t raw[DESC_BYTES];

	memcpy(raw, p, sizeof(raw));
	__asm__ volatile("" ::: "memory"); /* raw is what was read above, not what is there when a field is used */
	return (struct descriptor){get_le64(raw), get_le32(raw + 8), get_le16(raw + 12), get_le16(raw + 14)};
}

static uint64_t desc_bytes(uint16_t size) { return (uint64_t)DESC_BYTES * size; }
static uint64_t avail_bytes(uint16_t size) { return AVAIL_RING + 2u * size + 2u; }
static uint64_t used_bytes(uint16_t size) { return USED_RING + (uint64_t)USED_ENTRY_BYTES * size + 2u; }

/* --- set-up --- */

void virtq_init(struct virtqueue *q, struct mem *mem, uint16_t max_size)
{
	*q = (struct virtqueue){.mem = mem, .max_size = max_size};
	virtq_reset(q);
}

void virtq_reset(struct virtqueue *q)
{
	q->s = (struct virtq_state){.size = q->max_size, .vector = VIRTQ_NO_VECTOR};
	q->event_idx = q->indirect = false;
	q->put = 0;
	q->desc = q->avail = NULL;
}

static int check_ring(struct mem *mem, const char *what, uint64_t gpa, uint64_t bytes, unsigned alignment,
		      struct err *err)
{
	if (gpa % alignment != 0)
		return err_set(err, ERR_FAILED, EPROTO, "%s at 0x%llx is not aligned to %u", what,
			       (unsigned long long)gpa, alignment);
	if (mem_at(mem, gpa, bytes, false) == NULL)
		return err_set(err, ERR_FAILED, EPROTO, "%s at 0x%llx is not in memory", what, (unsigned long long)gpa);
	return 0;
}

int virtq_check(const struct virtqueue *q, const struct virtq_state *s, struct err *err)
{
	if (s->size == 0 || s->size > q->max_size || (s->size & (s->size - 1)) != 0)
		return err_set(err, ERR_FAILED, EPROTO, "queue size %u", s->size);
	int ret = check_ring(q->mem, "descriptor table", s->desc_gpa, desc_bytes(s->size), 16, err);
	if (ret == 0)
		ret = check_ring(q->mem, "available ring", s->avail_gpa, avail_bytes(s->size), 2, err);
	if (ret == 0)
		ret = check_ring(q->mem, "used ring", s->used_gpa, used_bytes(s->size), 4, err);
	return ret;
}

int virtq_enable(struct virtqueue *q, struct err *err)
{
	int ret = virtq_check(q, &q->s, err);
	if (ret < 0)
		return ret;
	q->desc = mem_at(q->mem, q->s.desc_gpa, desc_bytes(q->s.size), false);
	q->avail = mem_at(q->mem, q->s.avail_gpa, avail_bytes(q->s.size), false);
	q->s.enabled = 1;
	return 0;
}

int virtq_load(struct virtqueue *q, const struct virtq_state *s, struct err *err)
{
	q->s = *s;
	q->s.enabled = 0;
	q->put = 0;
	q->desc = q->avail = NULL;
	return s->enabled ? virtq_enable(q, err) : 0;
}

/* --- chains --- */

static int add_segment(struct virtqueue *q, struct virtq_chain *chain, const struct descriptor *d, struct err *err)
{
	bool write = d->flags & DESC_F_WRITE;
	unsigned n = chain->out_count + chain->in_count;
	uint64_t *total = write ? &chain->in_bytes : &chain->out_bytes;

	if (n == VIRTQ_MAX_SEGMENTS)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u has more than %u segments", chain->head,
			       VIRTQ_MAX_SEGMENTS);
	if (!write && chain->in_count != 0)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u has a readable segment after a writable one",
			       chain->head);
	if (d->length == 0 || *total + d->length > UINT32_MAX)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u has a segment of %u bytes after %llu", chain->head,
			       d->length, (unsigned long long)*total);
	void *at = mem_at(q->mem, d->gpa, d->length, write);
	if (at == NULL)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u: %u bytes at 0x%llx are not in memory", chain->head,
			       d->length, (unsigned long long)d->gpa);
	chain->iov[n] = (struct iovec){.iov_base = at, .iov_len = d->length};
	chain->gpa[n] = d->gpa;
	*total += d->length;
	if (write)
		chain->in_count++;
	else
		chain->out_count++;
	return 0;
}

/* Follows descriptors from `index` in a table of `size` of them. An indirect one is handed out in *indirect and ends
 * the walk. */
static int walk_table(struct virtqueue *q, const uint8_t *table, uint32_t size, uint16_t index,
		      struct virtq_chain *chain, struct descriptor *indirect, struct err *err)
{
	for (uint32_t steps = 0;; steps++) {
		if (index >= size)
			return err_set(err, ERR_FAILED, EPROTO, "chain %u: descriptor %u of %u", chain->head, index,
				       size);
		if (steps == size)
			return err_set(err, ERR_FAILED, EPROTO, "chain %u is a loop", chain->head);
		struct descriptor d = load_descriptor(table + (size_t)index * DESC_BYTES);
		if (d.flags & DESC_F_INDIRECT) {
			if (indirect == NULL || !q->indirect || (d.flags & DESC_F_NEXT))
				return err_set(err, ERR_FAILED, EPROTO, "chain %u: indirect descriptor with flags 0x%x",
					       chain->head, d.flags);
			*indirect = d;
			return 0;
		}
		int ret = add_segment(q, chain, &d, err);
		if (ret < 0 || !(d.flags & DESC_F_NEXT))
			return ret;
		index = d.next;
	}
}

/* Indirect tables may be longer than the queue (Linux makes such), up to VIRTQ_MAX_SEGMENTS. */
static int walk_indirect(struct virtqueue *q, const struct descriptor *d, struct virtq_chain *chain, struct err *err)
{
	uint32_t size = d->length / DESC_BYTES;

	if (d->length % DESC_BYTES != 0 || size == 0 || size > VIRTQ_MAX_SEGMENTS)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u: indirect table of %u bytes", chain->head, d->length);
	const uint8_t *table = mem_at(q->mem, d->gpa, d->length, false);
	if (table == NULL)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u: indirect table at 0x%llx is not in memory",
			       chain->head, (unsigned long long)d->gpa);
	return walk_table(q, table, size, 0, chain, NULL, err);
}

int virtq_walk(struct virtqueue *q, uint16_t head, struct virtq_chain *chain, struct err *err)
{
	struct descriptor indirect = {0};

	chain->head = head;
	chain->out_count = chain->in_count = 0;
	chain->out_bytes = chain->in_bytes = 0;
	if (!q->s.enabled)
		return err_set(err, ERR_FAILED, EPROTO, "chain %u of a queue that is not enabled", head);
	int ret = walk_table(q, q->desc, q->s.size, head, chain, &indirect, err);
	if (ret == 0 && indirect.flags != 0)
		ret = walk_indirect(q, &indirect, chain, err);
	return ret;
}

int virtq_pop(struct virtqueue *q, struct virtq_chain *chain, struct err *err)
{
	if (!q->s.enabled)
		return 0;
	uint16_t index = load16_acquire(q->avail + AVAIL_IDX);
	uint16_t waiting = (uint16_t)(index - q->s.next_avail);
	if (waiting == 0)
		return 0;
	if (waiting > q->s.size)
		return err_set(err, ERR_FAILED, EPROTO, "available index went from %u to %u in a queue of %u",
			       q->s.next_avail, index, q->s.size);
	uint16_t head = load16(q->avail + AVAIL_RING + 2u * (q->s.next_avail % q->s.size));
	q->s.next_avail++;
	int ret = virtq_walk(q, head, chain, err);
	return ret < 0 ? ret : 1;
}

/* --- the used ring and notifications --- */

static uint8_t *used_at(struct virtqueue *q, uint64_t offset, uint64_t length)
{
	return mem_at(q->mem, q->s.used_gpa + offset, length, true);
}

int virtq_fill(struct virtqueue *q, uint16_t ahead, uint16_t head, uint32_t written, struct err *err)
{
	uint64_t slot = (uint16_t)(q->s.next_used + ahead) % q->s.size;
	uint8_t *entry = used_at(q, USED_RING + USED_ENTRY_BYTES * slot, USED_ENTRY_BYTES);

	if (!q->s.enabled || entry == NULL)
		return err_set(err, ERR_FAILED, EPROTO, "no used ring for chain %u", head);
	put_le32(entry, head);
	put_le32(entry + 4, written);
	return 0;
}

int virtq_publish(struct virtqueue *q, uint16_t count, struct err *err)
{
	uint8_t *index = used_at(q, USED_IDX, 2);

	if (!q->s.enabled || index == NULL)
		return err_set(err, ERR_FAILED, EPROTO, "no used ring for %u chains", count);
	q->s.next_used = (uint16_t)(q->s.next_used + count);
	/* The driver reads the entries, and what the chains hold, after it sees the index. */
	__atomic_store_n((uint16_t *)(void *)index, q->s.next_used, __ATOMIC_RELEASE);
	return 0;
}

int virtq_push(struct virtqueue *q, uint16_t head, uint32_t written, struct err *err)
{
	int ret = virtq_fill(q, 0, head, written, err);

	return ret < 0 ? ret : virtq_publish(q, 1, err);
}

int virtq_put(struct virtqueue *q, uint16_t head, uint32_t written, struct err *err)
{
	int ret = virtq_fill(q, q->put, head, written, err);

	q->put = (uint16_t)(q->put + (ret == 0));
	return ret;
}

int virtq_publish_put(struct virtqueue *q, struct err *err)
{
	uint16_t count = q->put;

	q->put = 0;
	return count == 0 ? 0 : virtq_publish(q, count, err);
}

void virtq_unpop(struct virtqueue *q, uint16_t count) { q->s.next_avail = (uint16_t)(q->s.next_avail - count); }

bool virtq_wants_interrupt(struct virtqueue *q)
{
	if (!q->s.enabled)
		return false;
	/* The driver sets its wish, then looks at our index; we set the index, then look at its wish. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	uint16_t old = q->s.signalled, now = q->s.next_used;
	bool valid = q->s.signalled_valid;
	q->s.signalled = now;
	q->s.signalled_valid = 1;
	if (!q->event_idx)
		return !(load16(q->avail + AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT);
	uint16_t event = load16(q->avail + AVAIL_RING + 2u * q->s.size);
	return !valid || (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

/* With the event index a driver names the next completion that it waits for (2.7.7.2): once it has seen all, that is
 * our index. */
bool virtq_may_owe_interrupt(const struct virtqueue *q)
{
	if (!q->s.enabled || !q->s.signalled_valid)
		return false;
	if (!q->event_idx)
		return !(load16(q->avail + AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT);
	return load16(q->avail + AVAIL_RING + 2u * q->s.size) != q->s.next_used;
}

bool virtq_has_chain(const struct virtqueue *q)
{
	return q->s.enabled && load16_acquire(q->avail + AVAIL_IDX) != q->s.next_avail;
}

static void set_used_flags(struct virtqueue *q, uint16_t flags)
{
	const uint8_t *now = mem_at(q->mem, q->s.used_gpa + USED_FLAGS, 2, false);

	if (load16(now) != flags)
		__atomic_store_n((uint16_t *)(void *)used_at(q, USED_FLAGS, 2), flags, __ATOMIC_RELAXED);
}

static void set_avail_event(struct virtqueue *q, uint16_t event)
{
	uint8_t *at = used_at(q, USED_RING + (uint64_t)USED_ENTRY_BYTES * q->s.size, 2);

	if (at != NULL)
		__atomic_store_n((uint16_t *)(void *)at, event, __ATOMIC_RELAXED);
}

/* With the event index: a place that the driver has passed. */
void virtq_disarm(struct virtqueue *q)
{
	if (!q->s.enabled)
		return;
	if (q->event_idx)
		set_avail_event(q, (uint16_t)(q->s.next_avail - 1));
	else
		set_used_flags(q, USED_F_NO_NOTIFY);
}

bool virtq_rearm(struct virtqueue *q) { return virtq_rearm_after(q, q->s.next_avail); }

uint16_t virtq_offered(const struct virtqueue *q) { return q->s.enabled ? load16_acquire(q->avail + AVAIL_IDX) : 0; }

bool virtq_rearm_after(struct virtqueue *q, uint16_t offered)
{
	if (!q->s.enabled)
		return false;
	if (q->event_idx)
		set_avail_event(q, offered);
	else
		set_used_flags(q, 0);
	/* The driver makes a chain available, then looks at our wish; we set our wish, then look for a chain. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return virtq_offered(q) != offered;
}

/* --- data --- */

/* Copies between [offset, offset + length) of the segments [first, first + count) and data. */
static uint64_t copy(const struct virtq_chain *chain, unsigned first, unsigned count, uint64_t offset, uint8_t *out,
		     const uint8_t *in, uint64_t length)
{
	uint64_t done = 0;

	for (unsigned i = first; i < first + count && done < length; i++) {
		uint64_t bytes = chain->iov[i].iov_len;
		if (offset >= bytes) {
			offset -= bytes;
			continue;
		}
		uint64_t n = min_u64(bytes - offset, length - done);
		uint8_t *at = (uint8_t *)chain->iov[i].iov_base + offset;
		if (out != NULL)
			memcpy(out + done, at, n);
		else
			memcpy(at, in + done, n);
		done += n;
		offset = 0;
	}
	return done;
}

uint64_t virtq_copy_from(const struct virtq_chain *chain, uint64_t offset, void *data, uint64_t length)
{
	return copy(chain, 0, chain->out_count, offset, data, NULL, length);
}

uint64_t virtq_copy_to(const struct virtq_chain *chain, uint64_t offset, const void *data, uint64_t length)
{
	return copy(chain, chain->out_count, chain->in_count, offset, NULL, data, length);
}

uint64_t virtq_read_back(const struct virtq_chain *chain, uint64_t offset, void *data, uint64_t length)
{
	return copy(chain, chain->out_count, chain->in_count, offset, data, NULL, length);
}

void virtq_mark_dirty(const struct virtqueue *q, const struct virtq_chain *chain, uint64_t offset, uint64_t length)
{
	for (unsigned i = chain->out_count; i < chain->out_count + chain->in_count && length > 0; i++) {
		uint64_t bytes = chain->iov[i].iov_len;
		if (offset >= bytes) {
			offset -= bytes;
			continue;
		}
		uint64_t n = min_u64(bytes - offset, length);
		mem_mark_dirty(q->mem, chain->gpa[i] + offset, n);
		length -= n;
		offset = 0;
	}
}
