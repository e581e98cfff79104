#include "balloon.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"

#define ID_BALLOON	 0x1045
#define ID_BALLOON_OLD	 0x1002
#define FEATURE_TELL	 0x00000001u /* bit 0: MUST_TELL_HOST */
#define FEATURE_REPORT	 0x00000020u /* bit 5: REPORTING */
#define QUEUE_SIZE	 16u
#define QUEUE_REPORT	 2u /* as Linux numbers it where the device has no queue for statistics */
#define CONFIG_NUM_PAGES 0
#define CONFIG_ACTUAL	 4
#define BALLOON_NONE	 UINT32_MAX
#define BALLOON_MAGIC	 0x316f6f6c6c616274ull /* "tballoo1" */
#define CHUNK_BYTES	 (BALLOON_CHUNK_PAGES * PAGE_BYTES)
#define PAGE_WORDS	 (PAGE_BYTES / 8)
#define LOST_AFTER_US	 30000000ull

static uint64_t *page_words(const struct balloon *b, uint32_t chunk, unsigned int page)
{
	return (uint64_t *)(b->area + (uint64_t)chunk * CHUNK_BYTES + (uint64_t)page * PAGE_BYTES);
}

static uint64_t page_base(const struct balloon *b, uint32_t chunk, unsigned int page)
{
	return pattern_base(b->seed ^ BALLOON_MAGIC, (uint64_t)chunk * BALLOON_CHUNK_PAGES + page, b->stamp[chunk]);
}

static uint64_t ledger_term(const struct balloon *b, uint32_t chunk)
{
	return pattern_base(b->seed, chunk, b->stamp[chunk] ^ (uint64_t)b->state[chunk] << 60);
}

static void set_state(struct balloon *b, uint32_t chunk, enum balloon_state state)
{
	b->sum -= ledger_term(b, chunk);
	b->state[chunk] = (uint8_t)state;
	b->sum += ledger_term(b, chunk);
}

static void fill(struct balloon *b, uint32_t chunk, struct stamp_source *stamps)
{
	unsigned int page, i;
	uint64_t base, *words;

	b->sum -= ledger_term(b, chunk);
	b->stamp[chunk] = stamp_next(stamps);
	b->state[chunk] = BALLOON_HELD;
	b->sum += ledger_term(b, chunk);
	for (page = 0; page < BALLOON_CHUNK_PAGES; page++) {
		base = page_base(b, chunk, page);
		words = page_words(b, chunk, page);
		for (i = 0; i < PAGE_WORDS; i++)
			words[i] = pattern_word(base, i);
	}
}

/* Word 0 of the pattern may be zero by chance, the whole page not. */
static void look_at_page(struct balloon *b, uint32_t chunk, unsigned int page, bool may_be_zero)
{
	const uint64_t *words = page_words(b, chunk, page);
	uint64_t base = page_base(b, chunk, page);
	bool zero = true, old = true;
	unsigned int i;

	for (i = 0; i < PAGE_WORDS; i++) {
		zero = zero && words[i] == 0;
		old = old && words[i] == pattern_word(base, i);
	}
	if (may_be_zero && zero)
		b->zeroed++;
	else if (may_be_zero && old)
		b->kept++;
	else if (!old)
		b->bad++;
}

static void look_at_chunk(struct balloon *b, uint32_t chunk)
{
	unsigned int page;

	for (page = 0; page < BALLOON_CHUNK_PAGES; page++)
		look_at_page(b, chunk, page, b->state[chunk] == BALLOON_FREE);
}

static const char *start_device(struct balloon *b, struct ram *ram)
{
	if (virtio_start(&b->virtio, ID_BALLOON, ID_BALLOON_OLD, 0) != VIRTIO_GOOD || !b->virtio.device)
		return "no-balloon-found";
	if (!(virtio_offered(&b->virtio) & FEATURE_REPORT) ||
	    virtio_accept(&b->virtio, FEATURE_TELL | FEATURE_REPORT) != VIRTIO_GOOD)
		return "balloon-refuses-features";
	if (virtio_queue_limit(&b->virtio, 0) < QUEUE_SIZE || virtio_queue_limit(&b->virtio, QUEUE_REPORT) < QUEUE_SIZE)
		return "balloon-queue-too-small";
	if (!virtio_queue_start(&b->virtio, &b->inflate, ram, 0, QUEUE_SIZE) ||
	    !virtio_queue_start(&b->virtio, &b->deflate, ram, 1, QUEUE_SIZE) ||
	    !virtio_queue_start(&b->virtio, &b->report, ram, QUEUE_REPORT, QUEUE_SIZE))
		return "no-memory-for-balloon";
	virtio_go(&b->virtio);
	return NULL;
}

const char *balloon_start(struct balloon *b, struct ram *ram, const struct options *options, struct stamp_source *stamps)
{
	const char *wrong;
	uint32_t chunk;

	memset(b, 0, sizeof(*b));
	wrong = start_device(b, ram);
	if (wrong)
		return wrong;
	b->seed = options->seed;
	b->chunks = options->spare_bytes / CHUNK_BYTES;
	b->moving = b->reported = BALLOON_NONE;
	b->pfns = ram_take(ram, PAGE_BYTES);
	b->stamp = ram_take(ram, b->chunks * sizeof(*b->stamp));
	b->state = ram_take(ram, b->chunks);
	b->area = ram_take(ram, b->chunks * CHUNK_BYTES);
	if (!b->pfns || !b->stamp || !b->state || !b->area)
		return "no-memory-for-balloon";
	memset(b->stamp, 0, b->chunks * sizeof(*b->stamp));
	memset(b->state, 0, b->chunks);
	for (chunk = 0; chunk < b->chunks; chunk++)
		b->sum += ledger_term(b, chunk);
	for (chunk = 0; chunk < b->chunks; chunk++)
		fill(b, chunk, stamps);
	random_start(&b->random, options->seed ^ BALLOON_MAGIC);
	b->there = true;
	return NULL;
}

static void move_chunk(struct balloon *b, struct virtio_queue *queue, uint32_t chunk, enum balloon_state state)
{
	uint64_t first = ((uintptr_t)b->area + (uint64_t)chunk * CHUNK_BYTES) / PAGE_BYTES;
	unsigned int i;

	for (i = 0; i < BALLOON_CHUNK_PAGES; i++)
		b->pfns[i] = (uint32_t)(first + i);
	set_state(b, chunk, state);
	b->moving = chunk;
	virtio_describe(queue, 0, b->pfns, BALLOON_CHUNK_PAGES * 4, 0);
	virtio_offer(queue, 0);
	virtio_notify(queue);
}

/* The next chunk in this state, from the one behind the last; BALLOON_NONE if there is none. */
static uint32_t find_chunk(struct balloon *b, enum balloon_state state)
{
	uint64_t i;

	for (i = 0; i < b->chunks; i++) {
		b->cursor = b->cursor + 1 < b->chunks ? b->cursor + 1 : 0;
		if (b->state[b->cursor] == state)
			return b->cursor;
	}
	return BALLOON_NONE;
}

static void move_on(struct balloon *b)
{
	uint32_t chunk;

	if (b->moving != BALLOON_NONE || b->out == b->target)
		return;
	chunk = find_chunk(b, b->out < b->target ? BALLOON_HELD : BALLOON_OUT);
	if (chunk == BALLOON_NONE)
		return;
	if (b->out < b->target)
		move_chunk(b, &b->inflate, chunk, BALLOON_LEAVING);
	else
		move_chunk(b, &b->deflate, chunk, BALLOON_RETURNING);
}

static void take_answers(struct balloon *b)
{
	uint32_t head;

	if (virtio_poll(&b->inflate, &head)) {
		set_state(b, b->moving, BALLOON_OUT);
		b->moving = BALLOON_NONE;
		b->out++;
		mmio_write32(b->virtio.device + CONFIG_ACTUAL, (uint32_t)b->out * BALLOON_CHUNK_PAGES);
	}
	if (virtio_poll(&b->deflate, &head)) {
		set_state(b, b->moving, BALLOON_FREE);
		b->moving = BALLOON_NONE;
		b->out--;
		mmio_write32(b->virtio.device + CONFIG_ACTUAL, (uint32_t)b->out * BALLOON_CHUNK_PAGES);
	}
	if (virtio_poll(&b->report, &head)) {
		set_state(b, b->reported, BALLOON_FREE);
		b->reported = BALLOON_NONE;
		b->reports++;
	}
}

void balloon_turn(struct balloon *b, struct stamp_source *stamps, bool look)
{
	uint32_t chunk;

	take_answers(b);
	if (look) {
		b->target = mmio_read32(b->virtio.device + CONFIG_NUM_PAGES) / BALLOON_CHUNK_PAGES;
		if (b->target > b->chunks)
			b->target = b->chunks;
		/* What came back must be filled before it can go again. */
		chunk = b->out < b->target ? find_chunk(b, BALLOON_HELD) : 0;
		if (chunk == BALLOON_NONE && (chunk = find_chunk(b, BALLOON_FREE)) != BALLOON_NONE) {
			look_at_chunk(b, chunk);
			fill(b, chunk, stamps);
		}
	}
	move_on(b);
}

void balloon_step(struct balloon *b, struct stamp_source *stamps)
{
	uint32_t chunk = (uint32_t)random_below(&b->random, b->chunks);

	if (b->state[chunk] == BALLOON_FREE) {
		look_at_chunk(b, chunk);
		fill(b, chunk, stamps);
	} else if (b->state[chunk] == BALLOON_HELD && b->reported == BALLOON_NONE) {
		set_state(b, chunk, BALLOON_REPORTED);
		b->reported = chunk;
		virtio_describe(&b->report, 0, page_words(b, chunk, 0), CHUNK_BYTES, VIRTQ_DEVICE_WRITE);
		virtio_offer(&b->report, 0);
		virtio_notify(&b->report);
	}
}

bool balloon_drain(struct balloon *b, const struct clock *clock)
{
	struct patience patience;

	patience_begin(&patience);
	while (b->moving != BALLOON_NONE || b->reported != BALLOON_NONE) {
		take_answers(b);
		if (patience_ends(&patience, clock, LOST_AFTER_US))
			return false;
		cpu_relax();
	}
	return true;
}

bool balloon_check(struct balloon *b, const struct clock *clock)
{
	uint64_t sum = 0;
	uint32_t chunk;

	if (!balloon_drain(b, clock))
		return false;
	for (chunk = 0; chunk < b->chunks; chunk++) {
		sum += ledger_term(b, chunk);
		if (b->state[chunk] != BALLOON_OUT)
			look_at_chunk(b, chunk);
	}
	return sum == b->sum;
}
