#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "control/protocol.h"

#define BAR_WIDTH 30

void cli_print_json(json_t *document)
{
	char *text = json_dumps(document, JSON_INDENT(2)); /* at once: json_dumpf writes piece by piece */

	if (text)
		puts(text);
	free(text);
	json_decref(document);
}

void cli_print_error(const struct cli *cli, const struct err *err)
{
	fprintf(stderr, "vmcp: %s\n", err->message);
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

void cli_progress_update(struct cli_progress *progress, const char *phase, uint64_t done, uint64_t total)
{
	if (progress->cli->quiet)
		return;
	if (!progress->terminal) {
		if (strcmp(progress->phase, phase))
			fprintf(stderr, "vmcp: %s: %s\n", progress->what, phase);
		snprintf(progress->phase, sizeof(progress->phase), "%s", phase);
		return;
	}
	double part = total > 0 && done <= total ? (double)done / (double)total : 0;
	int filled = (int)(part * BAR_WIDTH);
	fprintf(stderr, "\r[%.*s%*s] %3.0f %% %-16s", filled, "##############################", BAR_WIDTH - filled, "",
		part * 100, phase);
	progress->drawn = true;
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
		cli_progress_update(progress, phase, done < 0 ? 0 : (uint64_t)done, total < 0 ? 0 : (uint64_t)total);
}

void cli_progress_end(struct cli_progress *progress)
{
	if (progress->drawn)
		fprintf(stderr, "\r%*s\r", BAR_WIDTH + 26, "");
	progress->drawn = false;
}
