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
	json_dumpf(document, stdout, JSON_INDENT(2));
	putchar('\n');
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

struct cli_progress cli_progress_begin(const struct cli *cli)
{
	return (struct cli_progress){.cli = cli, .terminal = isatty(STDERR_FILENO)};
}

void cli_progress_show(void *opaque, const json_t *params)
{
	struct cli_progress *progress = opaque;
	const char *phase = json_string_value(json_object_get(params, "phase"));
	const char *waits_for = json_string_value(json_object_get(params, "waits_for"));
	double done = (double)json_integer_value(json_object_get(params, "done_pages"));
	double total = (double)json_integer_value(json_object_get(params, "total_pages"));

	if (progress->cli->quiet || !phase)
		return;
	if (!progress->terminal) {
		if (strcmp(progress->phase, phase))
			fprintf(stderr, "vmcp: checkpoint: %s\n", phase);
		if (waits_for && !progress->waits)
			fprintf(stderr, "vmcp: checkpoint: waits for %s\n", waits_for);
		snprintf(progress->phase, sizeof(progress->phase), "%s", phase);
		progress->waits = waits_for != NULL;
		return;
	}
	/* Once: the line of the bar has no room for it. */
	if (waits_for && !progress->waits)
		fprintf(stderr, "\r%*s\rvmcp: checkpoint: waits for %s\n", BAR_WIDTH + 26, "", waits_for);
	progress->waits = waits_for != NULL;
	double part = total > 0 && done <= total ? done / total : 0;
	int filled = (int)(part * BAR_WIDTH);
	fprintf(stderr, "\r[%.*s%*s] %3.0f %% %-16s", filled, "##############################", BAR_WIDTH - filled, "",
		part * 100, phase);
	progress->drawn = true;
}

void cli_progress_end(struct cli_progress *progress)
{
	if (progress->drawn)
		fprintf(stderr, "\r%*s\r", BAR_WIDTH + 26, "");
	progress->drawn = false;
}
