#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/terminal.h"
#include "cli/cli.h"
#include "control/protocol.h"

#define BAR_WIDTH     30
#define RATE_AFTER_NS 500000000ull /* of a phase: before that a rate says little */

void cli_print_json(json_t *document)
{
	char *text = json_dumps(document, JSON_INDENT(2)); /* at once: json_dumpf writes piece by piece */

	if (text)
		puts(text);
	free(text);
	json_decref(document);
}

bool cli_colour(int fd)
{
	const char *no = getenv("NO_COLOR"), *term = getenv("TERM");

	return isatty(fd) && !(no && *no) && !(term && !strcmp(term, "dumb"));
}

void cli_print_error(const struct cli *cli, const struct err *err)
{
	bool colour = cli_colour(STDERR_FILENO);

	fprintf(stderr, "%svmcp: %s%s\n", colour ? "\033[31m" : "", err->message, colour ? "\033[0m" : "");
	if (err->hint[0])
		fprintf(stderr, "hint: %s\n", err->hint);
	if (cli->json)
		cli_print_json(json_pack("{s:o}", "error", control_error_to_json(err)));
}

void cli_format_size(char out[16], uint64_t bytes)
{
	static const char units[] = "BKMGTPE";
	double value = (double)bytes;
	size_t unit = 0;

	while (value >= 1024 && unit + 2 < sizeof(units)) {
		value /= 1024;
		unit++;
	}
	if (unit == 0)
		snprintf(out, 16, "%" PRIu64 "B", bytes);
	else
		snprintf(out, 16, value < 10 ? "%.1f%c" : "%.0f%c", value, units[unit]);
}

void cli_format_age(char out[16], uint64_t ns)
{
	uint64_t seconds = ns / 1000000000u;

	if (seconds < 60)
		snprintf(out, 16, "%" PRIu64 "s", seconds);
	else if (seconds < 3600)
		snprintf(out, 16, "%" PRIu64 "m", seconds / 60);
	else if (seconds < 2 * 86400)
		snprintf(out, 16, "%" PRIu64 "h", seconds / 3600);
	else
		snprintf(out, 16, "%" PRIu64 "d", seconds / 86400);
}

void cli_format_duration(char out[24], uint64_t ns)
{
	if (ns < 1000000)
		snprintf(out, 24, "%.0f us", (double)ns / 1e3);
	else if (ns < 1000000000)
		snprintf(out, 24, "%.2f ms", (double)ns / 1e6);
	else
		snprintf(out, 24, "%.2f s", (double)ns / 1e9);
}

struct cli_progress cli_progress_begin(const struct cli *cli, const char *what)
{
	return (struct cli_progress){.cli = cli, .what = what, .terminal = isatty(STDERR_FILENO)};
}

/* "1.2G/s, 12 s left", once that can be said. */
static void describe_rate(const struct cli_progress *progress, uint64_t done, uint64_t total, char out[48])
{
	uint64_t took_ns = clock_now_ns() - progress->phase_ns;
	char size[16];

	out[0] = '\0';
	if (took_ns < RATE_AFTER_NS || done <= progress->first_bytes || total <= done)
		return;
	double rate = (double)(done - progress->first_bytes) * 1e9 / (double)took_ns;
	double left = (double)(total - done) / rate;
	cli_format_size(size, (uint64_t)rate);
	if (left < 120)
		snprintf(out, 48, "%s/s, %.0f s left", size, left);
	else
		snprintf(out, 48, "%s/s, %.0f min left", size, left / 60);
}

/* As much as the terminal's width takes: the bar goes first, then the rate. */
static void draw(struct cli_progress *progress, const char *phase, uint64_t done, uint64_t total)
{
	double part = total > 0 && done <= total ? (double)done / (double)total : 0;
	unsigned columns = terminal_size(STDERR_FILENO).columns;
	char line[160], rate[48], bar[BAR_WIDTH + 1] = "";
	bool wide = columns > BAR_WIDTH + 46;

	describe_rate(progress, done, total, rate);
	memset(bar, ' ', BAR_WIDTH);
	memset(bar, '#', (size_t)(part * BAR_WIDTH));
	snprintf(line, sizeof(line), "%s%s%s%3.0f %% %s  %s", wide ? "[" : "", wide ? bar : "", wide ? "] " : "", part * 100, phase, rate);
	fprintf(stderr, "\r%.*s\033[K", (int)columns - 1, line);
	progress->drawn = true;
}

void cli_progress_update(struct cli_progress *progress, const char *phase, uint64_t done_bytes, uint64_t total_bytes)
{
	bool begins = strncmp(progress->phase, phase, sizeof(progress->phase) - 1) != 0;

	if (progress->cli->quiet)
		return;
	if (begins) {
		progress->phase_ns = clock_now_ns();
		progress->first_bytes = done_bytes;
		snprintf(progress->phase, sizeof(progress->phase), "%s", phase);
	}
	if (progress->terminal)
		draw(progress, phase, done_bytes, total_bytes);
	else if (begins)
		fprintf(stderr, "vmcp: %s: %s\n", progress->what, phase);
}

/* Once: the line of the bar has no room for it. */
static void show_wait(struct cli_progress *progress, const char *waits_for)
{
	if (waits_for && !progress->waits) {
		cli_progress_end(progress);
		fprintf(stderr, "vmcp: %s: waits for %s\n", progress->what, waits_for);
	}
	progress->waits = waits_for != NULL;
}

void cli_progress_show(void *opaque, const json_t *params)
{
	struct cli_progress *progress = opaque;
	const char *phase = json_string_value(json_object_get(params, "phase"));
	json_int_t done = json_integer_value(json_object_get(params, "done_pages"));
	json_int_t total = json_integer_value(json_object_get(params, "total_pages"));

	if (progress->cli->quiet || !phase)
		return;
	if (!progress->terminal)
		cli_progress_update(progress, phase, 0, 0);
	show_wait(progress, json_string_value(json_object_get(params, "waits_for")));
	if (progress->terminal)
		cli_progress_update(progress, phase, done < 0 ? 0 : (uint64_t)done * PAGE_BYTES, total < 0 ? 0 : (uint64_t)total * PAGE_BYTES);
}

void cli_progress_end(struct cli_progress *progress)
{
	if (progress->drawn)
		fprintf(stderr, "\r\033[K");
	progress->drawn = false;
}
