/*
 * The cache of L2 tables and reference count blocks, in slices of up to 4 KiB, shared by all images of a ring.
 *
 *     clean (on the LRU list) --mark_dirty--> dirty (on its image's list) --begin_write--> writing --end_write--> clean
 *                                               ^------------ mark_dirty while writing, or the write failed -----'
 *
 * Only clean slices are dropped for want of room, so that a slice in memory is never older than the one in the file.
 * What is dirty is bounded by the rounds (qcow2_flush.c), which start when much is dirty and hold up writers when
 * too much is.
 */
#include <errno.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/image_internal.h"

enum { BUCKETS = 4096 };
#define CACHE_BYTES (8u << 20)

struct slice_cache {
	struct slice *buckets[BUCKETS];
	struct slice lru; /* ring: lru.lru_next was used last */
	uint64_t bytes;
};

struct slice_cache *slice_cache_create(void)
{
	struct slice_cache *cache = xcalloc(1, sizeof(*cache));
	cache->lru.lru_next = cache->lru.lru_prev = &cache->lru;
	return cache;
}

void slice_cache_destroy(struct slice_cache *cache) { free(cache); }

static unsigned bucket_of(const struct image *image, uint64_t offset)
{
	uint64_t x = (offset >> QCOW2_MIN_CLUSTER_BITS) ^ ((uint64_t)(uintptr_t)image >> 4) * 0x9e3779b97f4a7c15ull;
	return (unsigned)((x * 0x9e3779b97f4a7c15ull) >> 52) % BUCKETS;
}

static void lru_remove(struct slice *s)
{
	s->lru_prev->lru_next = s->lru_next;
	s->lru_next->lru_prev = s->lru_prev;
	s->lru_next = s->lru_prev = NULL;
}

static void lru_push(struct slice_cache *cache, struct slice *s)
{
	s->lru_next = cache->lru.lru_next;
	s->lru_prev = &cache->lru;
	s->lru_next->lru_prev = s;
	cache->lru.lru_next = s;
}

static void dirty_remove(struct slice *s)
{
	struct qcow2 *q = &s->image->q;
	if (s->dirty_prev)
		s->dirty_prev->dirty_next = s->dirty_next;
	else
		q->dirty_slices = s->dirty_next;
	if (s->dirty_next)
		s->dirty_next->dirty_prev = s->dirty_prev;
	s->dirty_next = s->dirty_prev = NULL;
	s->dirty = false;
	q->dirty_bytes -= q->slice_bytes;
}

static void drop(struct slice_cache *cache, struct slice *s)
{
	struct slice **p = &cache->buckets[bucket_of(s->image, s->offset)];
	while (*p != s)
		p = &(*p)->hash_next;
	*p = s->hash_next;
	if (s->dirty)
		dirty_remove(s);
	else if (!s->writing)
		lru_remove(s);
	s->image->q.slice_count--;
	cache->bytes -= s->image->q.slice_bytes;
	free(s);
}

static struct slice *find(struct slice_cache *cache, const struct image *image, uint64_t offset)
{
	for (struct slice *s = cache->buckets[bucket_of(image, offset)]; s; s = s->hash_next)
		if (s->image == image && s->offset == offset)
			return s;
	return NULL;
}

static int load(struct image *image, struct slice *s)
{
	size_t done = 0, length = image->q.slice_bytes;
	while (done < length) {
		ssize_t n = pread(image->fd, s->data + done, length - done, (off_t)(s->offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return qcow2_damaged(image, "the file ends within a table at offset 0x%llx",
					     (unsigned long long)s->offset);
		done += (size_t)n;
	}
	return 0;
}

int slice_get(struct image *image, uint64_t offset, bool counts, struct slice **out)
{
	struct slice_cache *cache = cow_io_cache(image->io);
	struct slice *s = find(cache, image, offset);
	if (s) {
		/* A damaged file may name one cluster as both kinds; whoever wrote through one would break the
		 * other. */
		if (s->counts != counts)
			return qcow2_damaged(image, "offset 0x%llx is both L2 table and reference count block",
					     (unsigned long long)offset);
		if (s->lru_next && cache->lru.lru_next != s) {
			lru_remove(s);
			lru_push(cache, s);
		}
		*out = s;
		return 0;
	}
	while (cache->bytes >= CACHE_BYTES && cache->lru.lru_prev != &cache->lru)
		drop(cache, cache->lru.lru_prev);
	s = malloc(sizeof(*s) + image->q.slice_bytes);
	if (!s)
		return -ENOMEM;
	*s = (struct slice){.image = image, .offset = offset, .counts = counts};
	int rc = load(image, s);
	if (rc < 0) {
		free(s);
		return rc;
	}
	struct slice **bucket = &cache->buckets[bucket_of(image, offset)];
	s->hash_next = *bucket;
	*bucket = s;
	lru_push(cache, s);
	image->q.slice_count++;
	cache->bytes += image->q.slice_bytes;
	*out = s;
	return 0;
}

void slice_mark_dirty(struct slice *s)
{
	if (s->dirty)
		return;
	struct qcow2 *q = &s->image->q;
	if (s->lru_next)
		lru_remove(s);
	s->dirty = true;
	s->dirty_prev = NULL;
	s->dirty_next = q->dirty_slices;
	if (s->dirty_next)
		s->dirty_next->dirty_prev = s;
	q->dirty_slices = s;
	q->dirty_bytes += q->slice_bytes;
}

void slice_begin_write(struct slice *s)
{
	s->writing = true;
	dirty_remove(s);
}

void slice_end_write(struct slice *s, bool written)
{
	s->writing = false;
	if (s->dirty)
		return;
	lru_push(cow_io_cache(s->image->io), s);
	if (!written)
		slice_mark_dirty(s);
}

void slice_drop(struct image *image, uint64_t offset, uint64_t length)
{
	struct slice_cache *cache = cow_io_cache(image->io);
	for (uint64_t at = offset; at < offset + length; at += image->q.slice_bytes) {
		struct slice *s = find(cache, image, at);
		/* Only in a damaged file can what is given up be on its way to the file. The round still needs it. */
		if (s && !s->writing)
			drop(cache, s);
	}
}

void slice_drop_image(struct image *image)
{
	if (image->q.slice_count == 0)
		return; /* also: such an image may be freed by any thread */
	struct slice_cache *cache = cow_io_cache(image->io);
	for (unsigned b = 0; b < BUCKETS; b++)
		for (struct slice *s = cache->buckets[b], *next; s; s = next) {
			next = s->hash_next;
			if (s->image == image)
				drop(cache, s);
		}
}
