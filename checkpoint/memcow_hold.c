/*
 * Copies of single pages that the fault path made, held until the sweeper comes by their block: it then writes the block whole. Scattered pages
 * cost the disk as much each as a whole block does, and leave holes in the blocks around them that make these several writes as well.
 *
 *     free --hold_copy--> held --hold_take--> in a segment's entries --(written) hold_put--> free
 *
 * A place per page would be all memory once more: there are as many slots as one page in HOLD_PART. Where they run out, the fault path fills segments
 * of its own, as scattered as they are. A slot's memory exists once it was used, or hold_touch saw to it.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "checkpoint/memcow_internal.h"

#define HOLD_PART 16u
/* Touched with one call: it holds the lock of the address space. */
#define TOUCH_SLOTS 64u

int hold_create(struct hold *hold, uint64_t pages, struct err *err)
{
	*hold = (struct hold){.slots = (uint32_t)(pages / HOLD_PART)};
	hold->memory_bytes = hold->slots * (size_t)PAGE_BYTES;
	hold->map_bytes = hold->memory_bytes + pages * sizeof(*hold->slot_of) + hold->slots * sizeof(*hold->free);
	void *map = mmap(NULL, hold->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		return err_sys(err, errno, "cannot allocate %zu bytes of copy buffers", hold->map_bytes);
	hold->memory = map;
	hold->slot_of = (void *)(hold->memory + hold->memory_bytes);
	hold->free = (void *)(hold->memory + hold->memory_bytes + pages * sizeof(*hold->slot_of));
	pthread_mutex_init(&hold->lock, NULL);
	return 0;
}

void hold_free(struct hold *hold)
{
	if (!hold->memory)
		return;
	munmap(hold->memory, hold->map_bytes);
	pthread_mutex_destroy(&hold->lock);
	*hold = (struct hold){0};
}

static uint8_t *slot_data(const struct hold *hold, uint32_t slot) { return hold->memory + slot * (size_t)PAGE_BYTES; }

/* A free slot: one that was used before, else the next one. */
static bool get_slot(struct hold *hold, uint32_t *slot)
{
	pthread_mutex_lock(&hold->lock);
	bool there = hold->free_count > 0 || hold->used < hold->slots;
	if (hold->free_count > 0)
		*slot = hold->free[--hold->free_count];
	else if (there)
		*slot = hold->used++;
	pthread_mutex_unlock(&hold->lock);
	return there;
}

static void put_slot_locked(struct hold *hold, uint32_t slot) { hold->free[hold->free_count++] = slot; }

bool hold_copy(struct hold *hold, uint64_t page, const void *source)
{
	uint32_t slot;
	if (!hold->slots || !get_slot(hold, &slot))
		return false;
	page_copy(slot_data(hold, slot), source);
	/* Before the page is claimed: who sees the claim sees this. */
	atomic_store_explicit(&hold->slot_of[page], slot + 1, memory_order_release);
	return true;
}

uint8_t *hold_take(struct hold *hold, uint64_t page)
{
	if (!hold->slots || atomic_load_explicit(&hold->slot_of[page], memory_order_acquire) == 0)
		return NULL;
	uint32_t slot = atomic_exchange_explicit(&hold->slot_of[page], 0, memory_order_acq_rel);
	return slot_data(hold, slot - 1);
}

void hold_drop(struct hold *hold, uint64_t page)
{
	uint32_t slot = atomic_exchange_explicit(&hold->slot_of[page], 0, memory_order_acq_rel);
	pthread_mutex_lock(&hold->lock);
	put_slot_locked(hold, slot - 1);
	pthread_mutex_unlock(&hold->lock);
}

bool hold_has(const struct hold *hold, uint64_t first, uint64_t end)
{
	uint32_t any = 0;
	for (uint64_t page = first; page < end && hold->slots; page++)
		any |= atomic_load_explicit(&hold->slot_of[page], memory_order_acquire);
	return any != 0;
}

void hold_put(struct hold *hold, const struct segment *segment)
{
	if (!hold->slots)
		return;
	pthread_mutex_lock(&hold->lock);
	for (uint32_t i = 0; i < segment->count; i++) {
		const uint8_t *data = segment->entries[i].data;
		if (data >= hold->memory && data < hold->memory + hold->memory_bytes)
			put_slot_locked(hold, (uint32_t)((size_t)(data - hold->memory) / PAGE_BYTES));
	}
	pthread_mutex_unlock(&hold->lock);
}

void hold_touch(struct hold *hold, uint32_t ahead)
{
	if (hold->touched == hold->slots)
		return;
	pthread_mutex_lock(&hold->lock);
	uint64_t until = min_u64((uint64_t)hold->used + ahead, hold->slots);
	pthread_mutex_unlock(&hold->lock);
	while (hold->touched < until) {
		uint32_t count = (uint32_t)min_u64(hold->slots - hold->touched, TOUCH_SLOTS);
		uint8_t *at = slot_data(hold, hold->touched);
#ifdef MADV_POPULATE_WRITE
		if (madvise(at, count * (size_t)PAGE_BYTES, MADV_POPULATE_WRITE) != 0)
			hold->touched = hold->slots - count; /* this kernel cannot: each is had when it is used */
#else
		(void)at;
#endif
		hold->touched += count;
	}
}
