#include "cpu.h"
#include "image.h"
#include "tiny.h"

#define FAULTS_SHOWN 8u

static uint64_t per_second(const struct clock *clock, uint64_t count, uint64_t cycles)
{
	uint64_t us = clock_to_ns(clock, cycles) / 1000;

	return us ? count * 1000000 / us : 0;
}

void report_ready(struct tiny *tiny)
{
	struct line *line = &tiny->line;

	line_start(line, "ready");
	line_number(line, "ram_bytes", tiny->ram.total_bytes);
	line_number(line, "set_pages", tiny->mem.pages);
	line_number(line, "disk_blocks", tiny->disk.sectors / DISK_BLOCK_SECTORS);
	line_number(line, "qd", tiny->disk.depth);
	line_number(line, "tsc_khz", tiny->clock.khz);
	line_string(line, "tsc_from", tiny->options.tsc_khz ? "option" : tiny->clock.measured ? "pit" : "guess");
	line_string(line, "mode", options_mode_name(tiny->mem.mode));
	line_number(line, "rate", tiny->options.rate);
	line_number(line, "seed", tiny->options.seed);
	line_number(line, "start_ms", clock_to_ms(&tiny->clock, cpu_tsc() - tiny->clock.start_tsc));
	tiny_print(tiny);
}

void report_status(struct tiny *tiny)
{
	struct line *line = &tiny->line;
	uint64_t now = cpu_tsc(), cycles = now - tiny->status_tsc;

	line_start(line, "status");
	line_number(line, "t_ms", clock_to_ms(&tiny->clock, now - tiny->clock.start_tsc));
	line_number(line, "steps", tiny->gap.steps);
	line_number(line, "writes", tiny->mem.writes);
	line_number(line, "writes_per_s", per_second(&tiny->clock, tiny->mem.writes - tiny->status_writes, cycles));
	line_number(line, "gap_max_ns", clock_to_ns(&tiny->clock, tiny->gap.max_cycles));
	if (tiny->disk.there) {
		line_number(line, "disk_writes", tiny->disk.writes);
		line_number(line, "disk_writes_per_s",
			    per_second(&tiny->clock, tiny->disk.writes - tiny->status_disk_writes, cycles));
		line_number(line, "disk_reads", tiny->disk.reads);
		line_number(line, "disk_flushes", tiny->disk.flushes);
		line_number(line, "disk_errors", tiny->disk.errors);
		line_number(line, "in_flight", tiny->disk.in_flight);
	}
	line_number(line, "bad", tiny->mem.caught + tiny->disk.bad_sectors);
	line_number(line, "epoch", tiny->stamps.epoch);
	tiny->status_tsc = now;
	tiny->status_writes = tiny->mem.writes;
	tiny->status_disk_writes = tiny->disk.writes;
	tiny_print(tiny);
}

void report_gap(struct tiny *tiny)
{
	static const char *const names[GAP_LIMITS] = {
		"over_100us", "over_300us", "over_1ms", "over_2ms", "over_5ms", "over_10ms",
	};
	struct line *line = &tiny->line;
	unsigned int i;

	line_start(line, "gap");
	line_number(line, "max_ns", clock_to_ns(&tiny->clock, tiny->gap.max_cycles));
	line_number(line, "max_at_ms",
		    tiny->gap.max_at_tsc ? clock_to_ms(&tiny->clock, tiny->gap.max_at_tsc - tiny->clock.start_tsc) : 0);
	line_number(line, "steps", tiny->gap.steps);
	for (i = 0; i < GAP_LIMITS; i++)
		line_number(line, names[i], tiny->gap.over[i]);
	line_number(line, "tsc_back", tiny->gap.backward);
	tiny_print(tiny);
	gap_reset(&tiny->gap, &tiny->clock);
}

void report_sum(struct tiny *tiny)
{
	struct line *line = &tiny->line;
	uint64_t mem_sum = 0, disk_sum = 0, i;

	for (i = 0; i < tiny->mem.pages; i++)
		mem_sum += pattern_base(tiny->mem.seed, i, tiny->mem.ledger[i]);
	for (i = 0; i < tiny->disk.sectors; i++) {
		if (tiny->disk.issued[i])
			disk_sum += pattern_base(tiny->disk.seed, i, tiny->disk.issued[i]);
	}
	line_start(line, "sum");
	line_hex(line, "mem", mem_sum);
	line_hex(line, "disk", disk_sum);
	line_number(line, "sequence", tiny->stamps.sequence);
	line_number(line, "writes", tiny->mem.writes);
	line_number(line, "disk_writes", tiny->disk.writes);
	line_number(line, "epoch", tiny->stamps.epoch);
	line_string(line, "ledger", mem_sum == tiny->mem.sum && disk_sum == tiny->disk.sum ? "ok" : "BAD");
	tiny_print(tiny);
	gap_restart(&tiny->gap);
}

void report_net(struct tiny *tiny)
{
	const struct net *net = &tiny->net;
	static const char *const pairs[NET_PAIRS] = {"pair0", "pair1", "pair2", "pair3"};
	struct line *line = &tiny->line;
	unsigned int i;

	line_start(line, "net");
	line_number(line, "arps", net->arps);
	line_number(line, "pings", net->pings);
	line_number(line, "datagrams", net->datagrams);
	line_number(line, "lost", net->lost);
	line_number(line, "beats", net->beats);
	line_number(line, "heard", net->heard);
	line_number(line, "behind", net->behind);
	line_number(line, "sunk", net->sunk);
	line_number(line, "taken", net->tcp.taken);
	line_number(line, "left", net->stream_left);
	for (i = 0; i < net->pair_count; i++)
		line_number(line, pairs[i], net->pairs[i].came);
	tiny_print(tiny);
}

void report_balloon(struct tiny *tiny)
{
	const struct balloon *b = &tiny->balloon;
	struct line *line = &tiny->line;
	uint64_t held = 0, i;

	for (i = 0; i < b->chunks; i++)
		held += b->state[i] == BALLOON_HELD;
	line_start(line, "balloon");
	line_number(line, "pages", b->chunks * BALLOON_CHUNK_PAGES);
	line_number(line, "target", b->target * BALLOON_CHUNK_PAGES);
	line_number(line, "out", b->out * BALLOON_CHUNK_PAGES);
	line_number(line, "held", held * BALLOON_CHUNK_PAGES);
	line_number(line, "reports", b->reports);
	line_number(line, "zeroed", b->zeroed);
	line_number(line, "kept", b->kept);
	line_number(line, "bad", b->bad);
	tiny_print(tiny);
}

void report_random(struct tiny *tiny)
{
	const struct rng *rng = &tiny->rng;
	struct line *line = &tiny->line;

	line_start(line, "random");
	line_number(line, "count", rng->there ? rng->log->count : 0);
	line_number(line, "kept", RNG_KEPT);
	line_hex(line, "gpa", (uintptr_t)rng->log);
	tiny_print(tiny);
}

void report_bench(struct tiny *tiny, const struct bench_run *run)
{
	struct line *line = &tiny->line;

	line_start(line, "bench");
	line_string(line, "kind", bench_kind_name(run->kind));
	line_number(line, "bytes", run->bytes);
	line_number(line, "depth", run->depth);
	line_number(line, "requests", run->done);
	line_number(line, "ns", run->ns);
	line_number(line, "errors", run->errors);
	line_number(line, "wrong", run->wrong);
	tiny_print(tiny);
	gap_restart(&tiny->gap);
}

struct verdict {
	uint64_t bad_pages;
	uint64_t bad_sectors;
	bool ledger_right;
	bool disk_ledger_right;
	bool disk_answers;
	bool image_right;
	bool balloon_right;
	struct mem_fault fault[FAULTS_SHOWN];
};

static bool is_good(const struct tiny *tiny, const struct verdict *v)
{
	return !v->bad_pages && !v->bad_sectors && v->ledger_right && v->disk_ledger_right && v->disk_answers &&
	       v->image_right && v->balloon_right && !tiny->balloon.bad && !tiny->mem.caught && !tiny->disk.errors;
}

static void print_faults(struct tiny *tiny, const struct verdict *v)
{
	struct line *line = &tiny->line;
	unsigned int i;

	for (i = 0; i < FAULTS_SHOWN && i < v->bad_pages; i++) {
		line_start(line, "bad");
		line_number(line, "page", v->fault[i].page);
		line_hex(line, "gpa", v->fault[i].gpa);
		line_number(line, "word", v->fault[i].word);
		line_hex(line, "want", v->fault[i].want);
		line_hex(line, "got", v->fault[i].got);
		tiny_print(tiny);
	}
	if (tiny->disk.fault_seen) {
		line_start(line, "bad");
		line_number(line, "sector", tiny->disk.fault.sector);
		line_number(line, "word", tiny->disk.fault.word);
		line_hex(line, "want", tiny->disk.fault.want);
		line_hex(line, "got", tiny->disk.fault.got);
		tiny_print(tiny);
	}
}

static void print_failed(struct tiny *tiny, const struct verdict *v)
{
	struct line *line = &tiny->line;

	print_faults(tiny, v);
	line_start(line, "check FAILED");
	if (v->bad_pages) {
		line_number(line, "page", v->fault[0].page);
		line_hex(line, "want", v->fault[0].want);
		line_hex(line, "got", v->fault[0].got);
	}
	line_number(line, "bad_pages", v->bad_pages);
	line_number(line, "bad_sectors", v->bad_sectors);
	line_number(line, "caught", tiny->mem.caught);
	line_number(line, "disk_errors", tiny->disk.errors);
	line_string(line, "ledger", v->ledger_right ? "ok" : "BAD");
	line_string(line, "disk_ledger", v->disk_ledger_right ? "ok" : "BAD");
	line_string(line, "disk", v->disk_answers ? "ok" : "LOST");
	line_string(line, "image", v->image_right ? "ok" : "BAD");
	line_string(line, "balloon", v->balloon_right ? "ok" : "BAD");
	line_number(line, "bad_spare", tiny->balloon.bad);
	line_number(line, "epoch", tiny->stamps.epoch);
}

void report_check(struct tiny *tiny)
{
	struct verdict v = {.disk_ledger_right = true, .disk_answers = true, .balloon_right = true};
	uint64_t start = cpu_tsc();

	v.image_right = image_sum() == tiny->image_sum;
	v.bad_pages = mem_check(&tiny->mem, v.fault, FAULTS_SHOWN, &v.ledger_right);
	if (tiny->disk.there) {
		v.disk_answers = disk_drain(&tiny->disk, &tiny->clock) &&
				 disk_check(&tiny->disk, &tiny->clock, &v.disk_ledger_right);
		v.bad_sectors = tiny->disk.bad_sectors;
	}
	if (tiny->balloon.there)
		v.balloon_right = balloon_check(&tiny->balloon, &tiny->clock);
	if (is_good(tiny, &v)) {
		line_start(&tiny->line, "check ok");
		line_number(&tiny->line, "pages", tiny->mem.pages);
		line_number(&tiny->line, "disk_blocks", tiny->disk.sectors / DISK_BLOCK_SECTORS);
		line_number(&tiny->line, "epoch", tiny->stamps.epoch);
	} else {
		print_failed(tiny, &v);
	}
	line_number(&tiny->line, "ms", clock_to_ms(&tiny->clock, cpu_tsc() - start));
	tiny_print(tiny);
	gap_restart(&tiny->gap);
}
