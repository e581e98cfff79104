#include "options.h"

#include <stddef.h>

#include "net.h"
#include "text.h"

static const char *const mode_names[] = {
	[MEM_UNIFORM] = "uniform",
	[MEM_ZIPF] = "zipf",
	[MEM_HOT] = "hot",
	[MEM_SEQ] = "seq",
};

void options_default(struct options *options)
{
	*options = (struct options){
		.set_bytes = 64u << 20,
		.hot_pages = 256,
		.mode = MEM_UNIFORM,
		.disk_fill = true,
		.disk_mixed = true,
		.disk_blocks = 4096,
		.queue_depth = 8,
		.spare_bytes = 16u << 20,
		.seed = 1,
		.report_ms = 1000,
	};
}

bool options_parse_mode(const char *text, enum mem_mode *mode)
{
	unsigned int i;

	for (i = 0; i < sizeof(mode_names) / sizeof(mode_names[0]); i++) {
		if (text_equal(text, mode_names[i])) {
			*mode = (enum mem_mode)i;
			return true;
		}
	}
	return false;
}

const char *options_mode_name(enum mem_mode mode) { return mode_names[mode]; }

static bool parse_flag(const char *text, bool *flag)
{
	*flag = text_equal(text, "1");
	return *flag || text_equal(text, "0");
}

static bool parse_limited(const char *text, uint64_t low, uint64_t high, uint64_t *number)
{
	return text_to_number(text, number) && *number >= low && *number <= high;
}

static bool parse_set(const char *text, uint64_t *bytes)
{
	*bytes = OPTIONS_SET_ALL;
	return text_equal(text, "all") || parse_limited(text, 4096, UINT64_MAX - 1, bytes);
}

static bool parse_sizes(const char *text, bool *mixed)
{
	*mixed = text_equal(text, "mixed");
	return *mixed || text_equal(text, "4k");
}

static bool parse_word(struct options *o, const char *word)
{
	const char *value;

	if ((value = text_after(word, "set=")))
		return parse_set(value, &o->set_bytes);
	if ((value = text_after(word, "hot=")))
		return parse_limited(value, 1, UINT32_MAX, &o->hot_pages);
	if ((value = text_after(word, "rate=")))
		return parse_limited(value, 0, 1000000000, &o->rate);
	if ((value = text_after(word, "mode=")))
		return options_parse_mode(value, &o->mode);
	if ((value = text_after(word, "full=")))
		return parse_flag(value, &o->full);
	if ((value = text_after(word, "disk=")))
		return parse_limited(value, 0, 2, &o->disks);
	if ((value = text_after(word, "bench=")))
		return parse_flag(value, &o->bench);
	if ((value = text_after(word, "disk_fill=")))
		return parse_flag(value, &o->disk_fill);
	if ((value = text_after(word, "disk_sizes=")))
		return parse_sizes(value, &o->disk_mixed);
	if ((value = text_after(word, "disk_blocks=")))
		return parse_limited(value, 16, 1u << 24, &o->disk_blocks);
	if ((value = text_after(word, "disk_rate=")))
		return parse_limited(value, 0, 1000000000, &o->disk_rate);
	if ((value = text_after(word, "qd=")))
		return parse_limited(value, 1, 32, &o->queue_depth);
	if ((value = text_after(word, "balloon=")))
		return parse_flag(value, &o->balloon);
	if ((value = text_after(word, "net=")))
		return parse_limited(value, 0, NET_PAIRS, &o->net);
	if ((value = text_after(word, "beat=")))
		return parse_limited(value, 0, 1000000, &o->beat_rate);
	if ((value = text_after(word, "random=")))
		return parse_limited(value, 0, 100000, &o->random_rate);
	if ((value = text_after(word, "spare=")))
		return parse_limited(value, 256u << 10, 1ull << 36, &o->spare_bytes);
	if ((value = text_after(word, "report_rate=")))
		return parse_limited(value, 0, 1000000, &o->report_rate);
	if ((value = text_after(word, "seed=")))
		return parse_limited(value, 0, UINT64_MAX, &o->seed);
	if ((value = text_after(word, "report=")))
		return parse_limited(value, 0, 1000000000, &o->report_ms);
	if ((value = text_after(word, "tsc_khz=")))
		return parse_limited(value, 1000, 100000000, &o->tsc_khz);
	if ((value = text_after(word, "idle=")))
		return parse_flag(value, &o->idle);
	if ((value = text_after(word, "paused=")))
		return parse_flag(value, &o->paused);
	o->unknown = word;
	return true;
}

const char *options_parse(struct options *options, char *text)
{
	char *word;

	while (*text) {
		if (*text == ' ') {
			text++;
			continue;
		}
		word = text;
		while (*text && *text != ' ')
			text++;
		if (*text)
			*text++ = '\0';
		if (!parse_word(options, word))
			return word;
	}
	return NULL;
}
