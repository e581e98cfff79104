#include "checkpoint/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/buf.h"
#include "base/bytes.h"

struct pool {
	uint8_t *memory; /* immutable */
	size_t memory_bytes;
	struct segment *segments;
	unsigned segment_count, reserve;
	pthread_mutex_t lock; /* all below; a leaf: nothing else is taken under it */
	pthread_cond_t freed, filled;
	struct segment *free; /* a stack: what is warm in the cache comes first */
	unsigned free_count;
	struct segment *ready_head, **ready_tail;
	bool closed, failed;
};

int pool_create(unsigned segments, unsigned reserve, struct pool **out, struct err *err)
{
	struct pool *pool = xcalloc(1, sizeof(*pool));
	pool->memory_bytes = (size_t)segments * SEGMENT_BYTES;
	pool->memory = mmap(NULL, pool->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pool->memory == MAP_FAILED) {
		int number = errno;
		free(pool);
		return err_sys(err, number, "cannot allocate %zu bytes of copy buffers",
			       (size_t)segments * SEGMENT_BYTES);
	}
	pool->segments = xcalloc(segments, sizeof(*pool->segments));
	pool->segment_count = segments;
	pool->reserve = reserve;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->freed, NULL);
	pthread_cond_init(&pool->filled, NULL);
	pool->ready_tail = &pool->ready_head;
	for (unsigned i = segments; i-- > 0;) {
		pool->segments[i].data = pool->memory + (size_t)i * SEGMENT_BYTES;
		pool->segments[i].next = pool->free;
		pool->free = &pool->segments[i];
	}
	pool->free_count = segments;
	*out = pool;
	return 0;
}

void pool_destroy(struct pool *pool)
{
	if (!pool)
		return;
	munmap(pool->memory, pool->memory_bytes);
	free(pool->segments);
	pthread_mutex_destroy(&pool->lock);
	pthread_cond_destroy(&pool->freed);
	pthread_cond_destroy(&pool->filled);
	free(pool);
}

void pool_reuse(struct pool *pool, unsigned reserve)
{
	pool->reserve = reserve;
	pool->closed = pool->failed = false;
	for (unsigned i = 0; i < pool->segment_count; i++)
		pool->segments[i].touched = false;
}

void pool_rest(struct pool *pool) { madvise(pool->memory, pool->memory_bytes, MADV_FREE); }

unsigned pool_segments(const struct pool *pool) { return pool->segment_count; }

void segment_touch(struct segment *segment)
{
	if (segment->touched)
		return;
	for (size_t at = 0; at < SEGMENT_BYTES; at += 4096)
		((volatile uint8_t *)segment->data)[at] = 0;
	segment->touched = true;
}

void pool_touch_next(struct pool *pool, unsigned segments)
{
	pthread_mutex_lock(&pool->lock);
	for (struct segment *segment = pool->free; segment && segments-- > 0; segment = segment->next)
		segment_touch(segment);
	pthread_mutex_unlock(&pool->lock);
}

/* Under lock. */
static struct segment *take_free(struct pool *pool)
{
	struct segment *segment = pool->free;
	pool->free = segment->next;
	pool->free_count--;
	segment->next = NULL;
	segment->count = 0;
	return segment;
}

struct segment *pool_get(struct pool *pool, bool may_use_reserve, bool *waited)
{
	unsigned keep = may_use_reserve ? 0 : pool->reserve;
	struct segment *segment = NULL;
	if (waited)
		*waited = false;
	pthread_mutex_lock(&pool->lock);
	while (pool->free_count <= keep && !pool->failed) {
		if (waited)
			*waited = true;
		pthread_cond_wait(&pool->freed, &pool->lock);
	}
	if (!pool->failed)
		segment = take_free(pool);
	pthread_mutex_unlock(&pool->lock);
	return segment;
}

struct segment *pool_try_get(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	struct segment *segment = pool->failed || pool->free_count == 0 ? NULL : take_free(pool);
	pthread_mutex_unlock(&pool->lock);
	return segment;
}

void pool_put(struct pool *pool, struct segment *segment)
{
	pthread_mutex_lock(&pool->lock);
	segment->next = pool->free;
	pool->free = segment;
	pool->free_count++;
	/* Two kinds of waiters with different needs: a signal could reach the wrong one. */
	pthread_cond_broadcast(&pool->freed);
	pthread_mutex_unlock(&pool->lock);
}

void pool_push(struct pool *pool, struct segment *segment)
{
	pthread_mutex_lock(&pool->lock);
	segment->next = NULL;
	*pool->ready_tail = segment;
	pool->ready_tail = &segment->next;
	pthread_cond_signal(&pool->filled);
	pthread_mutex_unlock(&pool->lock);
}

struct segment *pool_pop(struct pool *pool, bool wait)
{
	pthread_mutex_lock(&pool->lock);
	while (wait && !pool->ready_head && !pool->closed && !pool->failed)
		pthread_cond_wait(&pool->filled, &pool->lock);
	struct segment *segment = pool->failed ? NULL : pool->ready_head;
	if (segment) {
		pool->ready_head = segment->next;
		if (!pool->ready_head)
			pool->ready_tail = &pool->ready_head;
		segment->next = NULL;
	}
	pthread_mutex_unlock(&pool->lock);
	return segment;
}

bool pool_is_short(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	bool is = pool->free_count < pool->reserve / 2;
	pthread_mutex_unlock(&pool->lock);
	return is;
}

bool pool_drain(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	while (pool->free_count < pool->segment_count && !pool->failed)
		pthread_cond_wait(&pool->freed, &pool->lock);
	bool whole = !pool->failed;
	pthread_mutex_unlock(&pool->lock);
	return whole;
}

void pool_close(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	pool->closed = true;
	pthread_cond_broadcast(&pool->filled);
	pthread_mutex_unlock(&pool->lock);
}

void pool_fail(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	pool->failed = true;
	pthread_cond_broadcast(&pool->filled);
	pthread_cond_broadcast(&pool->freed);
	pthread_mutex_unlock(&pool->lock);
}
