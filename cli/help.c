/* help and version: what people, and the scripts of shells and editors, may know of the tables. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/terminal.h"
#include "cli/cli.h"
#include "control/protocol.h"

#define LEFT_COLUMNS 30 /* of an option's name */
#define MIN_COLUMNS  40
#define MAX_COLUMNS  100

static unsigned columns(void)
{
	unsigned all = terminal_size(STDOUT_FILENO).columns;

	return all < MIN_COLUMNS ? MIN_COLUMNS : all > MAX_COLUMNS ? MAX_COLUMNS : all;
}

/* The text in lines of at most `width` columns, the first of which begins at `column`, the others at `indent`. */
static void print_wrapped(const char *text, unsigned column, unsigned indent, unsigned width)
{
	bool first = true;

	while (*text) {
		unsigned length = (unsigned)strcspn(text, " ");

		if (!first && column + 1 + length > width) {
			printf("\n%*s", (int)indent, "");
			column = indent;
			first = true;
		}
		printf("%s%.*s", first ? "" : " ", (int)length, text);
		column += length + (first ? 0 : 1);
		first = false;
		text += length;
		while (*text == ' ')
			text++;
	}
	putchar('\n');
}

static void print_options(const struct cli_option *options)
{
	unsigned width = columns();
	unsigned indent = width < 64 ? 10 : LEFT_COLUMNS + 2;

	for (; options && options->name; options++) {
		char left[64];

		snprintf(left, sizeof(left), "%c%c%c --%s%s%s", options->letter ? '-' : ' ', options->letter ? options->letter : ' ',
			 options->letter ? ',' : ' ', options->name, options->argument ? " " : "", options->argument ? options->argument : "");
		if (2 + strlen(left) < indent)
			printf("  %-*s", (int)indent - 2, left);
		else
			printf("  %s\n%*s", left, (int)indent, "");
		print_wrapped(options->help, indent, indent, width);
	}
}

static bool stands_as_it_is(const char *line) { return *line == ' ' || *line == '\n' || !*line; }

/* Lines that follow each other are a paragraph, wrapped anew; those that begin with a space stand as they are. */
static void print_text(const char *text, unsigned width)
{
	while (*text) {
		size_t length = strcspn(text, "\n");

		if (!stands_as_it_is(text))
			while (text[length] && !stands_as_it_is(text + length + 1))
				length += 1 + strcspn(text + length + 1, "\n");
		char *copy = strndup(text, length);
		for (char *p = copy; p && *p; p++)
			*p = *p == '\n' ? ' ' : *p;
		if (!copy || stands_as_it_is(copy))
			puts(copy ? copy : "");
		else
			print_wrapped(copy, 0, 0, width);
		free(copy);
		text += length + (text[length] ? 1 : 0);
	}
}

void cli_print_command_help(const struct cli_command *command)
{
	unsigned width = columns();

	printf("vmcp %s%s", command->name, *command->synopsis ? " " : "");
	print_wrapped(command->synopsis, 6 + (unsigned)strlen(command->name), 8, width);
	printf("\n%s\n", command->summary);
	if (command->help) {
		putchar('\n');
		print_text(command->help, width);
	}
	if (command->options && command->options->name) {
		printf("\nOptions:\n");
		print_options(command->options);
	}
	printf("\nEverywhere:\n");
	print_options(cli_global_options);
}

void cli_print_help(void)
{
	unsigned width = columns();

	printf("vmcp: checkpoints of whole virtual machines, taken while they run\n\nusage: vmcp COMMAND [OPTIONS] [ARGUMENTS]\n");
	for (const struct cli_listed *l = cli_listed; l->group || l->command; l++)
		if (l->group) {
			printf("\n%s\n", l->group);
		} else if (!l->command->hidden) {
			printf("  %-11s ", l->command->name);
			print_wrapped(l->command->summary, 14, 14, width);
		}
	putchar('\n');
	print_wrapped("CKPT is an id, 4 or more of its first digits, a tag, a VM's name (its newest checkpoint) or VM~N (N before it). "
		      "`vmcp help COMMAND` tells more. Everywhere:",
		      0, 0, width);
	print_options(cli_global_options);
}

/* --- as JSON --- */

static json_t *options_to_json(const struct cli_option *options)
{
	json_t *list = json_array();

	for (; options && options->name; options++) {
		char letter[2] = {options->letter, '\0'};

		json_array_append_new(list, json_pack("{s:s, s:o, s:o, s:s, s:o}", "name", options->name, "letter", control_text_or_null(letter), "argument",
						      control_text_or_null(options->argument), "help", options->help, "words",
						      control_text_or_null(options->words)));
	}
	return list;
}

static json_t *command_to_json(const struct cli_command *command)
{
	return json_pack("{s:s, s:s, s:s, s:o, s:o, s:o, s:i, s:i, s:o}", "name", command->name, "synopsis", command->synopsis, "summary",
			 command->summary, "help", control_text_or_null(command->help), "words", control_text_or_null(command->words), "json",
			 control_text_or_null(command->json), "min_arguments", command->min_arguments, "max_arguments", command->max_arguments, "options", options_to_json(command->options));
}

static json_t *all_to_json(void)
{
	json_t *list = json_array();
	const char *group = "";

	for (const struct cli_listed *l = cli_listed; l->group || l->command; l++) {
		if (l->group)
			group = l->group;
		if (l->group || l->command->hidden)
			continue;
		json_t *one = command_to_json(l->command);
		json_object_set_new(one, "group", json_string(group));
		json_array_append_new(list, one);
	}
	return json_pack("{s:s, s:o, s:o}", "version", VMCP_VERSION, "everywhere", options_to_json(cli_global_options), "commands", list);
}

static int run_help(struct cli *cli, struct err *err)
{
	const struct cli_command *command = cli->argument_count ? cli_find_command(cli->arguments[0]) : NULL;

	if (cli->argument_count && !command)
		return cli_unknown_command(cli->arguments[0], err);
	if (cli->json)
		cli_print_json(command ? command_to_json(command) : all_to_json());
	else if (command)
		cli_print_command_help(command);
	else
		cli_print_help();
	return 0;
}

static int run_version(struct cli *cli, struct err *err)
{
	(void)err;
	if (cli->json)
		cli_print_json(json_pack("{s:s}", "version", VMCP_VERSION));
	else
		printf("vmcp %s\n", VMCP_VERSION);
	return 0;
}

const struct cli_command cli_help = {
	.name = "help",
	.synopsis = "[COMMAND]",
	.summary = "what vmcp can do, or what one command does",
	.help = "With --json the tables that the commands are made of: options, arguments, what may be written for each, and the fields of answers.",
	.words = "@command",
	.max_arguments = 1,
	.run = run_help,
};
const struct cli_command cli_version = {.name = "version", .synopsis = "", .summary = "the version of vmcp", .json = "version", .run = run_version};
