#include "mem.h"

#include <stddef.h>

#define PAGE_WORDS   512u
#define HEADER_WORDS 5u
#define SPOTS	     2u
#define PAGE_MAGIC   0x31656761706e7974ull /* "tynpage1" */
#define HOT_PERCENT  90

enum header_word { WORD_MAGIC, WORD_SEED, WORD_INDEX, WORD_STAMP, WORD_SUM };

static uint64_t page_gpa(const struct mem *mem, uint64_t index)
{
	uint64_t offset = index * PAGE_BYTES, size;
	unsigned int i;

	for (i = 0; i + 1 < mem->ranges; i++) {
		size = mem->range[i].end_gpa - mem->range[i].start_gpa;
		if (offset < size)
			break;
		offset -= size;
	}
	return mem->range[i].start_gpa + offset;
}

static uint64_t *page_words(const struct mem *mem, uint64_t index)
{
	return (uint64_t *)(uintptr_t)page_gpa(mem, index);
}

static uint64_t header_word(const struct mem *mem, uint64_t index, uint64_t stamp, unsigned int word)
{
	switch (word) {
	case WORD_MAGIC:
		return PAGE_MAGIC;
	case WORD_SEED:
		return mem->seed;
	case WORD_INDEX:
		return index;
	case WORD_STAMP:
		return stamp;
	default:
		return pattern_mix(pattern_base(mem->seed, index, stamp) ^ PAGE_MAGIC);
	}
}

static unsigned int spot_word(uint64_t stamp_base, unsigned int spot)
{
	return HEADER_WORDS +
	       (unsigned int)((stamp_base >> (spot * 32) & 0xffffffff) * (PAGE_WORDS - HEADER_WORDS) >> 32);
}

static void write_header(const struct mem *mem, uint64_t *words, uint64_t index, uint64_t stamp)
{
	unsigned int i;

	for (i = 0; i < HEADER_WORDS; i++)
		words[i] = header_word(mem, index, stamp, i);
}

static void write_body(uint64_t *words, uint64_t base)
{
	unsigned int i;

	for (i = HEADER_WORDS; i < PAGE_WORDS; i++)
		words[i] = pattern_word(base, i);
}

static void write_spots(uint64_t *words, uint64_t where_base, uint64_t what_base)
{
	unsigned int i, word;

	for (i = 0; i < SPOTS; i++) {
		word = spot_word(where_base, i);
		words[word] = pattern_word(what_base, word);
	}
}

/* The base of the words outside the spots. */
static uint64_t ground_base(const struct mem *mem, uint64_t index, uint64_t stamp_base)
{
	return mem->full ? stamp_base : pattern_base(mem->seed, index, 0);
}

static void limit_ranges(struct mem *mem, uint64_t bytes)
{
	uint64_t left = bytes, size;
	unsigned int i;

	for (i = 0; i < mem->ranges && left; i++) {
		size = mem->range[i].end_gpa - mem->range[i].start_gpa;
		if (size > left) {
			size = left;
			mem->range[i].end_gpa = mem->range[i].start_gpa + left;
		}
		left -= size;
	}
	mem->ranges = i;
	mem->pages = (bytes - left) / PAGE_BYTES;
}

bool mem_start(struct mem *mem, struct ram *ram, const struct options *options)
{
	uint64_t room = ram_free_bytes(ram), bytes = options->set_bytes;
	uint64_t with_ledger = room / (PAGE_BYTES + sizeof(uint64_t)) * PAGE_BYTES;
	unsigned int i;

	if (with_ledger < 2 * PAGE_BYTES)
		return false;
	with_ledger -= PAGE_BYTES; /* the ledger is rounded up to a page */
	if (bytes > with_ledger)
		bytes = with_ledger;
	bytes &= ~(uint64_t)(PAGE_BYTES - 1);
	*mem = (struct mem){
		.seed = options->seed,
		.full = options->full,
		.mode = options->mode,
		.ledger = ram_take(ram, bytes / PAGE_BYTES * sizeof(uint64_t)),
		.ranges = ram->ranges,
	};
	if (!mem->ledger || !bytes)
		return false;
	for (i = 0; i < ram->ranges; i++)
		mem->range[i] = ram->range[i];
	limit_ranges(mem, bytes);
	while (mem->pages >> mem->page_bits)
		mem->page_bits++;
	mem->hot_pages = options->hot_pages < mem->pages ? options->hot_pages : mem->pages;
	random_start(&mem->random, options->seed);
	return mem->pages != 0;
}

void mem_fill(struct mem *mem, struct stamp_source *stamps)
{
	uint64_t index, stamp, base, *words;

	for (index = 0; index < mem->pages; index++) {
		stamp = stamp_next(stamps);
		base = pattern_base(mem->seed, index, stamp);
		words = page_words(mem, index);
		mem->ledger[index] = stamp;
		mem->sum += base;
		write_header(mem, words, index, stamp);
		write_body(words, ground_base(mem, index, base));
		if (!mem->full)
			write_spots(words, base, base);
	}
}

/* About as likely as 1/rank: first how many bits the rank has, then the rank; ranks lie scattered over the set. */
static uint64_t pick_zipf(struct mem *mem)
{
	uint64_t bits, rank;

	do {
		bits = random_below(&mem->random, mem->page_bits);
		rank = (1ull << bits) + random_below(&mem->random, 1ull << bits) - 1;
	} while (rank >= mem->pages);
	return (uint32_t)(rank * 2654435761u) * mem->pages >> 32;
}

static uint64_t pick_hot(struct mem *mem)
{
	if (random_below(&mem->random, 100) >= HOT_PERCENT)
		return random_below(&mem->random, mem->pages);
	return random_below(&mem->random, mem->hot_pages) * mem->pages / mem->hot_pages;
}

static uint64_t pick_page(struct mem *mem)
{
	switch (mem->mode) {
	case MEM_ZIPF:
		return pick_zipf(mem);
	case MEM_HOT:
		return pick_hot(mem);
	case MEM_SEQ:
		return mem->next_page = mem->next_page + 1 < mem->pages ? mem->next_page + 1 : 0;
	default:
		return random_below(&mem->random, mem->pages);
	}
}

void mem_step(struct mem *mem, struct stamp_source *stamps)
{
	uint64_t index = pick_page(mem), stamp = stamp_next(stamps), old_stamp = mem->ledger[index];
	uint64_t base = pattern_base(mem->seed, index, stamp);
	uint64_t old_base = pattern_base(mem->seed, index, old_stamp);
	uint64_t ground = ground_base(mem, index, base);
	uint64_t *words = page_words(mem, index);

	if (words[WORD_STAMP] != old_stamp)
		mem->caught++;
	mem->ledger[index] = stamp;
	mem->sum += base - old_base;
	mem->writes++;
	write_header(mem, words, index, stamp);
	if (mem->full) {
		write_body(words, ground);
	} else {
		write_spots(words, old_base, ground);
		write_spots(words, base, base);
	}
}

static bool is_spot(uint64_t stamp_base, unsigned int word)
{
	unsigned int i;

	for (i = 0; i < SPOTS; i++) {
		if (spot_word(stamp_base, i) == word)
			return true;
	}
	return false;
}

static uint64_t expected_word(const struct mem *mem, uint64_t index, uint64_t stamp, unsigned int word)
{
	uint64_t base = pattern_base(mem->seed, index, stamp);

	if (word < HEADER_WORDS)
		return header_word(mem, index, stamp, word);
	if (is_spot(base, word))
		return pattern_word(base, word);
	return pattern_word(ground_base(mem, index, base), word);
}

/* The first wrong word of the page, the stamp before all others because it tells most; PAGE_WORDS if none is. */
static unsigned int wrong_word(const struct mem *mem, uint64_t index)
{
	const uint64_t *words = page_words(mem, index);
	uint64_t stamp = mem->ledger[index];
	uint64_t ground = ground_base(mem, index, pattern_base(mem->seed, index, stamp));
	unsigned int i, spot;

	if (words[WORD_STAMP] != stamp)
		return WORD_STAMP;
	for (i = 0; i < HEADER_WORDS; i++) {
		if (words[i] != header_word(mem, index, stamp, i))
			return i;
	}
	for (i = HEADER_WORDS; i < PAGE_WORDS; i++) {
		if (words[i] != pattern_word(ground, i) && words[i] != expected_word(mem, index, stamp, i))
			return i;
	}
	for (i = 0; i < SPOTS; i++) {
		spot = spot_word(pattern_base(mem->seed, index, stamp), i);
		if (words[spot] != expected_word(mem, index, stamp, spot))
			return spot;
	}
	return PAGE_WORDS;
}

uint64_t mem_check(const struct mem *mem, struct mem_fault *faults, unsigned int room, bool *sum_right)
{
	uint64_t index, sum = 0, wrong = 0;
	unsigned int word;

	for (index = 0; index < mem->pages; index++) {
		sum += pattern_base(mem->seed, index, mem->ledger[index]);
		word = wrong_word(mem, index);
		if (word == PAGE_WORDS)
			continue;
		if (wrong++ < room) {
			faults[wrong - 1] = (struct mem_fault){
				.page = index,
				.gpa = page_gpa(mem, index),
				.word = word,
				.want = expected_word(mem, index, mem->ledger[index], word),
				.got = page_words(mem, index)[word],
			};
		}
	}
	*sum_right = sum == mem->sum;
	return wrong;
}
