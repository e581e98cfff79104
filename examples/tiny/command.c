#include "text.h"
#include "tiny.h"

#define UNMAPPED 0x7f0000000000ull

static void print_ok(struct tiny *tiny, const char *key, const char *value)
{
	line_start(&tiny->line, "ok");
	line_string(&tiny->line, key, value);
	tiny_print(tiny);
}

static void print_ok_number(struct tiny *tiny, const char *key, uint64_t value)
{
	line_start(&tiny->line, "ok");
	line_number(&tiny->line, key, value);
	tiny_print(tiny);
}

static void print_refused(struct tiny *tiny, const char *text)
{
	line_start(&tiny->line, "refused");
	line_string(&tiny->line, "command", text);
	tiny_print(tiny);
}

/* A new epoch also turns the random choices another way, so that two histories part for good. */
static void set_epoch(struct tiny *tiny, uint64_t epoch)
{
	tiny->stamps.epoch = epoch;
	random_start(&tiny->mem.random, tiny->mem.random.state ^ pattern_mix(epoch));
	random_start(&tiny->disk.random, tiny->disk.random.state ^ pattern_mix(epoch));
	random_start(&tiny->balloon.random, tiny->balloon.random.state ^ pattern_mix(epoch));
	print_ok_number(tiny, "epoch", epoch);
}

static void set_rate(struct tiny *tiny, uint64_t rate)
{
	pace_set(&tiny->mem_pace, &tiny->clock, rate);
	print_ok_number(tiny, "rate", rate);
}

static void set_disk_rate(struct tiny *tiny, uint64_t rate)
{
	pace_set(&tiny->disk_pace, &tiny->clock, rate);
	print_ok_number(tiny, "disk_rate", rate);
}

static void set_report_rate(struct tiny *tiny, uint64_t rate)
{
	tiny->options.report_rate = rate;
	pace_set(&tiny->balloon_pace, &tiny->clock, rate);
	print_ok_number(tiny, "report_rate", rate);
}

static void set_beat(struct tiny *tiny, uint64_t rate)
{
	tiny->options.beat_rate = rate;
	pace_set(&tiny->beat_pace, &tiny->clock, rate);
	print_ok_number(tiny, "beat", rate);
}

static void set_stream(struct tiny *tiny, uint64_t frames)
{
	if (tiny->net.there && net_stream(&tiny->net, frames))
		print_ok_number(tiny, "stream", frames);
	else
		print_refused(tiny, "stream: nobody was heard");
}

static void set_disk(struct tiny *tiny, uint64_t writing)
{
	tiny->disk.writing = writing;
	print_ok_number(tiny, "disk", writing);
}

/* What stands still is all of it: the last request has come back before the answer goes out. */
static void set_running(struct tiny *tiny, bool running)
{
	tiny->running = running;
	if (!running && tiny->disk.there && !disk_drain(&tiny->disk, &tiny->clock)) {
		print_refused(tiny, "pause: a disk request is lost");
		return;
	}
	if (!running && tiny->balloon.there && !balloon_drain(&tiny->balloon, &tiny->clock)) {
		print_refused(tiny, "pause: the balloon does not answer");
		return;
	}
	print_ok(tiny, "work", running ? "goes" : "paused");
}

static void run_bench(struct tiny *tiny, const char *text)
{
	struct bench_run run;

	if (!tiny->bench.there || !bench_parse(&tiny->bench, text, &run))
		print_refused(tiny, "bench");
	else if (!bench_go(&tiny->bench, &tiny->clock, &run))
		print_refused(tiny, "bench: a disk request is lost");
	else
		report_bench(tiny, &run);
}

static void print_help(struct tiny *tiny)
{
	line_start(&tiny->line,
		   "help: check status gap sum balloon net random epoch=N rate=N mode=uniform|zipf|hot|seq disk=0|1 disk_rate=N "
		   "report_rate=N beat=N stream=N report=MS "
		   "bench=KIND BYTES DEPTH REQUESTS MS pause go crash quit help (a space does for the =)");
	tiny_print(tiny);
}

static bool run_word(struct tiny *tiny, const char *text)
{
	if (text_equal(text, "check"))
		report_check(tiny);
	else if (text_equal(text, "status"))
		report_status(tiny);
	else if (text_equal(text, "gap"))
		report_gap(tiny);
	else if (text_equal(text, "sum"))
		report_sum(tiny);
	else if (text_equal(text, "balloon"))
		report_balloon(tiny);
	else if (text_equal(text, "net"))
		report_net(tiny);
	else if (text_equal(text, "random"))
		report_random(tiny);
	else if (text_equal(text, "pause"))
		set_running(tiny, false);
	else if (text_equal(text, "go"))
		set_running(tiny, true);
	else if (text_equal(text, "help"))
		print_help(tiny);
	else if (text_equal(text, "crash"))
		(void)*(volatile uint64_t *)UNMAPPED;
	else if (text_equal(text, "quit"))
		tiny_power_off(tiny);
	else
		return false;
	return true;
}

/* The value behind "name " or "name=", NULL if text is another command. */
static const char *argument(const char *text, const char *name)
{
	const char *at = text_after(text, name);

	return at && (*at == ' ' || *at == '=') ? at + 1 : NULL;
}

static bool run_with_number(struct tiny *tiny, const char *text)
{
	static const struct {
		const char *name;
		void (*run)(struct tiny *tiny, uint64_t number);
	} commands[] = {
		{"epoch", set_epoch},
		{"rate", set_rate},
		{"disk_rate", set_disk_rate},
		{"disk", set_disk},
		{"report_rate", set_report_rate},
		{"beat", set_beat},
		{"stream", set_stream},
	};
	const char *value;
	uint64_t number;
	unsigned int i;

	for (i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		value = argument(text, commands[i].name);
		if (value && text_to_number(value, &number)) {
			commands[i].run(tiny, number);
			return true;
		}
	}
	return false;
}

void command_run(struct tiny *tiny, const char *text)
{
	const char *value;
	enum mem_mode mode;
	uint64_t number;

	if (run_word(tiny, text) || run_with_number(tiny, text))
		return;
	value = argument(text, "mode");
	if (value && options_parse_mode(value, &mode)) {
		tiny->mem.mode = mode;
		print_ok(tiny, "mode", value);
		return;
	}
	value = argument(text, "bench");
	if (value) {
		run_bench(tiny, value);
		return;
	}
	value = argument(text, "report");
	if (value && text_to_number(value, &number) && number <= 1000000000) {
		tiny->options.report_ms = number;
		print_ok_number(tiny, "report", number);
		return;
	}
	print_refused(tiny, text);
}
