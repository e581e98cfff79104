#include "bench.h"

#include <stddef.h>

#include "cpu.h"
#include "pattern.h"
#include "text.h"

#define BLOCK_BYTES   4096u
#define BENCH_MAGIC   0x68636e6562796e74ull
#define NOT_READ      0x6461657220746f6eull
#define JUMP	      0x9e3779b1u /* odd, so that a power of two of blocks is visited whole before any comes again */
#define LOST_AFTER_US 30000000ull

static const char *const kind_names[BENCH_KINDS] = {
	[BENCH_READ] = "read",		 [BENCH_WRITE] = "write",	  [BENCH_SYNC] = "sync",
	[BENCH_SEQ_READ] = "seqread", [BENCH_SEQ_WRITE] = "seqwrite",
};

const char *bench_kind_name(enum bench_kind kind) { return kind_names[kind]; }

const char *bench_start(struct bench *bench, struct ram *ram)
{
	const char *wrong = virtio_blk_start(&bench->blk, ram, 0);
	uint8_t *data;
	unsigned int i;

	if (wrong)
		return wrong;
	if (bench->blk.capacity_sectors < BENCH_LARGEST_BYTES / VIRTIO_BLK_SECTOR_BYTES)
		return "disk-too-small";
	data = ram_take(ram, (uint64_t)bench->blk.slots * BENCH_LARGEST_BYTES);
	if (!data)
		return "no-memory-for-bench";
	memset(data, 0x5a, (uint64_t)bench->blk.slots * BENCH_LARGEST_BYTES);
	for (i = 0; i < bench->blk.slots; i++)
		bench->slot[i].data = data + (uint64_t)i * BENCH_LARGEST_BYTES;
	bench->there = true;
	return NULL;
}

/* The next word of *text as a number. */
static bool take_number(const char **text, uint64_t *number)
{
	char word[24];
	size_t length = 0;

	while (**text == ' ')
		(*text)++;
	for (; **text && **text != ' '; (*text)++) {
		if (length + 1 == sizeof(word))
			return false;
		word[length++] = **text;
	}
	word[length] = '\0';
	return text_to_number(word, number);
}

bool bench_parse(const struct bench *bench, const char *text, struct bench_run *run)
{
	uint64_t bytes, depth;
	const char *rest = NULL;
	unsigned int kind;

	memset(run, 0, sizeof(*run));
	for (kind = 0; kind < BENCH_KINDS; kind++) {
		rest = text_after(text, kind_names[kind]);
		if (rest && *rest == ' ')
			break;
	}
	if (kind == BENCH_KINDS || !take_number(&rest, &bytes) || !take_number(&rest, &depth) ||
	    !take_number(&rest, &run->requests) || !take_number(&rest, &run->ms) || *rest)
		return false;
	run->kind = (enum bench_kind)kind;
	run->bytes = (uint32_t)bytes;
	run->depth = (unsigned int)depth;
	return bytes && bytes % BLOCK_BYTES == 0 && bytes <= BENCH_LARGEST_BYTES && depth && depth <= bench->blk.slots &&
	       run->requests && run->ms && run->ms <= 3600000 && (run->kind != BENCH_SYNC || bench->blk.has_flush);
}

static bool is_write(const struct bench_run *run)
{
	return run->kind == BENCH_WRITE || run->kind == BENCH_SYNC || run->kind == BENCH_SEQ_WRITE;
}

static uint64_t next_sector(struct bench *bench, const struct bench_run *run)
{
	bool sequence = run->kind == BENCH_SEQ_READ || run->kind == BENCH_SEQ_WRITE;
	uint64_t sectors = run->bytes / VIRTIO_BLK_SECTOR_BYTES, blocks = bench->blk.capacity_sectors / sectors;
	uint64_t number = bench->cursor[sequence]++;

	while (!sequence && blocks & (blocks - 1))
		blocks &= blocks - 1;
	return (sequence ? number % blocks : number * JUMP & (blocks - 1)) * sectors;
}

static volatile uint64_t *block_word(const struct bench_slot *slot, uint32_t at)
{
	return (volatile uint64_t *)(slot->data + at);
}

static uint64_t right_word(const struct bench_slot *slot, uint32_t at)
{
	return pattern_mix(BENCH_MAGIC ^ (slot->sector + at / VIRTIO_BLK_SECTOR_BYTES));
}

static void issue(struct bench *bench, const struct bench_run *run, unsigned int number)
{
	struct bench_slot *slot = &bench->slot[number];
	bool write = is_write(run);
	uint32_t at;

	slot->busy = true;
	slot->sector = next_sector(bench, run);
	for (at = 0; at < run->bytes; at += BLOCK_BYTES)
		*block_word(slot, at) = write ? right_word(slot, at) : NOT_READ;
	virtio_blk_submit(&bench->blk, number, write ? VIRTIO_BLK_WRITE : VIRTIO_BLK_READ, slot->sector, slot->data, run->bytes, 0);
}

static void compare(const struct bench_slot *slot, struct bench_run *run)
{
	uint64_t got;
	uint32_t at;

	for (at = 0; at < run->bytes; at += BLOCK_BYTES) {
		got = *block_word(slot, at);
		run->wrong += got && got != right_word(slot, at);
	}
}

/* Takes one finished request, if there is one. True: a slot is free. */
static bool reap(struct bench *bench, struct bench_run *run, unsigned int *number)
{
	struct bench_slot *slot;
	bool good;

	if (!virtio_blk_poll(&bench->blk, number, &good))
		return false;
	slot = &bench->slot[*number < bench->blk.slots ? *number : 0];
	if (!good || !slot->busy)
		run->errors++;
	if (good && run->kind == BENCH_SYNC && !slot->flushing) {
		slot->flushing = true;
		virtio_blk_submit(&bench->blk, *number, VIRTIO_BLK_FLUSH, 0, slot->data, 0, 0);
		return false;
	}
	if (good && !is_write(run))
		compare(slot, run);
	slot->busy = slot->flushing = false;
	run->done++;
	return true;
}

bool bench_go(struct bench *bench, const struct clock *clock, struct bench_run *run)
{
	uint64_t begin = cpu_tsc(), end = begin + clock_from_us(clock, run->ms * 1000), issued = 0, seen = begin, done = 0;
	unsigned int number;

	for (; issued < run->depth && issued < run->requests; issued++)
		issue(bench, run, (unsigned int)issued);
	while (run->done < issued) {
		while (reap(bench, run, &number)) {
			if (issued == run->requests || (int64_t)(cpu_tsc() - end) >= 0)
				continue;
			issue(bench, run, number);
			issued++;
		}
		virtio_blk_notify(&bench->blk);
		if (run->done != done) {
			done = run->done;
			seen = cpu_tsc();
		} else if (cpu_tsc() - seen > clock_from_us(clock, LOST_AFTER_US)) {
			return false;
		}
		cpu_relax();
	}
	run->ns = clock_to_ns(clock, cpu_tsc() - begin);
	return true;
}
