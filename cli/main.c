#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "cli/cli.h"

#define GLOBAL_OPTIONS 5

static const struct cli_option global_options[GLOBAL_OPTIONS + 1] = {
	{"json", 0, NULL, "one JSON document on stdout"},
	{"store", 0, "DIR", "the store (default: $VMCP_STORE, else /var/lib/vmcp for root, else $XDG_STATE_HOME/vmcp)"},
	{"quiet", 'q', NULL, "say only what was asked for"},
	{"verbose", 'v', NULL, "say more on stderr"},
	{"help", 'h', NULL, "this text"},
	{0},
};

const struct cli_command *const cli_commands[] = {
	&cli_run,  &cli_ps,	    &cli_console, &cli_pause,	&cli_resume, &cli_stop,
	&cli_kill, &cli_checkpoint, &cli_cancel,  &cli_revert,	&cli_log,    &cli_show,
	&cli_tag,  &cli_rm,	    &cli_gc,	  &cli_verify, &cli_diff, &cli_dump,
	&cli_export, &cli_import, &cli_disk,	&cli_stats,  &cli_balloon,
	&cli_config, &cli_doctor, &cli_version,  &cli_help,    NULL,
};

/* Commands of the contract that this version does not have: said plainly, rather than "unknown". */
static const char *const later_commands[] = {"clone", "suspend", NULL};

static const struct cli_command *find_command(const char *name)
{
	for (size_t i = 0; cli_commands[i]; i++)
		if (!strcmp(cli_commands[i]->name, name))
			return cli_commands[i];
	return NULL;
}

static int unknown_command(const char *name, struct err *err)
{
	for (size_t i = 0; later_commands[i]; i++)
		if (!strcmp(later_commands[i], name)) {
			err_set(err, ERR_FAILED, ENOSYS, "%s: this version does not have it yet", name);
			return err_hint(err, "`vmcp help` lists what there is");
		}
	err_set(err, ERR_USAGE, EINVAL, "%s: there is no such command", name);
	return err_hint(err, "`vmcp help` lists them");
}

/* --- help --- */

static void print_options(const struct cli_option *options)
{
	for (; options && options->name; options++) {
		char left[48];

		snprintf(left, sizeof(left), "%c%c%c --%s%s%s", options->letter ? '-' : ' ',
			 options->letter ? options->letter : ' ', options->letter ? ',' : ' ', options->name,
			 options->argument ? " " : "", options->argument ? options->argument : "");
		printf("  %-28s %s\n", left, options->help);
	}
}

static void print_command_help(const struct cli_command *command)
{
	printf("vmcp %s%s%s\n\n%s\n", command->name, *command->synopsis ? " " : "", command->synopsis,
	       command->summary);
	if (command->help)
		printf("\n%s\n", command->help);
	if (command->options && command->options->name) {
		printf("\nOptions:\n");
		print_options(command->options);
	}
	printf("\nEverywhere:\n");
	print_options(global_options);
}

static void print_help(void)
{
	printf("vmcp: checkpoints of whole virtual machines, taken while they run\n\nusage: vmcp COMMAND [OPTIONS] "
	       "[ARGUMENTS]\n\n");
	for (size_t i = 0; cli_commands[i]; i++)
		printf("  %-11s %s\n", cli_commands[i]->name, cli_commands[i]->summary);
	printf("\nCKPT is an id, 4 or more of its first digits, a tag, a VM's name (its newest checkpoint) or VM~N (N "
	       "before it).\n"
	       "`vmcp help COMMAND` tells more. Everywhere:\n");
	print_options(global_options);
}

static int run_help(struct cli *cli, struct err *err)
{
	if (cli->argument_count == 0) {
		print_help();
		return 0;
	}
	const struct cli_command *command = find_command(cli->arguments[0]);
	if (!command)
		return unknown_command(cli->arguments[0], err);
	print_command_help(command);
	return 0;
}

const struct cli_command cli_help = {.name = "help",
				     .synopsis = "[COMMAND]",
				     .summary = "what vmcp can do, or what one command does",
				     .max_arguments = 1,
				     .run = run_help};

static int run_version(struct cli *cli, struct err *err)
{
	(void)err;
	if (cli->json)
		cli_print_json(json_pack("{s:s}", "version", VMCP_VERSION));
	else
		printf("vmcp %s\n", VMCP_VERSION);
	return 0;
}

const struct cli_command cli_version = {
	.name = "version", .synopsis = "", .summary = "the version of vmcp", .run = run_version};

/* --- the command line --- */

static const struct cli_option no_options[] = {{0}};

static unsigned option_count(const struct cli_option *options)
{
	unsigned n = 0;

	while (options[n].name)
		n++;
	return n;
}

/* getopt's view of the global and the command's options. `val` is 256 + index, globals first. */
static void make_getopt(const struct cli_option *own, struct option *longs, char *shorts)
{
	unsigned n = 0;

	*shorts++ = ':'; /* tells a missing argument from an unknown option */
	for (unsigned pass = 0; pass < 2; pass++)
		for (const struct cli_option *o = pass ? own : global_options; o->name; o++, n++) {
			longs[n] = (struct option){o->name, o->argument ? required_argument : no_argument, NULL,
						   (int)(256 + n)};
			if (!o->letter)
				continue;
			*shorts++ = o->letter;
			if (o->argument)
				*shorts++ = ':';
		}
	longs[n] = (struct option){0};
	*shorts = '\0';
}

static int index_of_letter(const struct cli_option *own, int letter)
{
	int n = 0;

	for (unsigned pass = 0; pass < 2; pass++)
		for (const struct cli_option *o = pass ? own : global_options; o->name; o++, n++)
			if (o->letter == letter)
				return n;
	return -1;
}

static void take_global(struct cli *cli, int index, const char *value, bool *help)
{
	switch (index) {
	case 0:
		cli->json = true;
		break;
	case 1:
		free(cli->store_path);
		cli->store_path = xstrdup(value);
		break;
	case 2:
		cli->quiet = true;
		log_set_level(LOG_LEVEL_WARN);
		break;
	case 3:
		log_set_level(log_get_level() == LOG_LEVEL_INFO ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO);
		break;
	default:
		*help = true;
	}
}

static int parse_options(struct cli *cli, int argc, char **argv, bool *help, struct err *err)
{
	const struct cli_option *own = cli->command && cli->command->options ? cli->command->options : no_options;
	struct option longs[GLOBAL_OPTIONS + CLI_MAX_OPTIONS + 1];
	char shorts[2 * (GLOBAL_OPTIONS + CLI_MAX_OPTIONS) + 2];
	int c;

	make_getopt(own, longs, shorts);
	opterr = 0;
	optind = 0;
	while ((c = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
		const char *word = argv[optind - 1];

		if (c == '?' || c == ':') {
			err_set(err, ERR_USAGE, EINVAL,
				c == ':' ? "%s: the option needs a value" : "%s: there is no such option", word);
			return err_hint(err, "see `vmcp help%s%s`", cli->command ? " " : "",
					cli->command ? cli->command->name : "");
		}
		int index = c >= 256 ? c - 256 : index_of_letter(own, c);
		if (index < GLOBAL_OPTIONS)
			take_global(cli, index, optarg, help);
		else
			cli->values[index - GLOBAL_OPTIONS] = optarg ? optarg : "";
	}
	cli->arguments = argv + optind;
	cli->argument_count = argc - optind;
	return 0;
}

static int check_arguments(const struct cli *cli, struct err *err)
{
	const struct cli_command *command = cli->command;

	if (cli->argument_count < command->min_arguments)
		err_set(err, ERR_USAGE, EINVAL, "%s: something is missing", command->name);
	else if (cli->argument_count > command->max_arguments)
		err_set(err, ERR_USAGE, EINVAL, "%s: '%s' is one word too many", command->name,
			cli->arguments[command->max_arguments]);
	else
		return 0;
	return err_hint(err, "usage: vmcp %s %s", command->name, command->synopsis);
}

const char *cli_value(const struct cli *cli, const char *name)
{
	for (unsigned i = 0; i < option_count(cli->command->options); i++)
		if (!strcmp(cli->command->options[i].name, name))
			return cli->values[i];
	return NULL;
}

bool cli_given(const struct cli *cli, const char *name) { return cli_value(cli, name) != NULL; }

int cli_parse_seconds(const char *option, const char *text, unsigned *out, struct err *err)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (isdigit((unsigned char)text[0]) && (!*end || !strcmp(end, "s")) && value <= 86400) {
		*out = (unsigned)value;
		return 0;
	}
	err_set(err, ERR_USAGE, EINVAL, "%s: '%s' is no time", option, text);
	return err_hint(err, "a number of seconds, for example 30");
}

/* --- what commands share --- */

static char *default_store(void)
{
	const char *given = getenv("VMCP_STORE"), *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");

	if (given && *given)
		return xstrdup(given);
	if (geteuid() == 0)
		return xstrdup("/var/lib/vmcp");
	if (state && *state)
		return xasprintf("%s/vmcp", state);
	return xasprintf("%s/.local/state/vmcp", home ? home : "");
}

int cli_open_store(const struct cli *cli, struct store **out, struct err *err)
{
	return store_open(cli->store_path, false, out, err);
}

void cli_allow_many_files(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

int cli_choose_vm(struct store *store, const char *name, char out[STORE_NAME_BYTES], struct err *err)
{
	struct store_vm *list;
	size_t count, alive = 0;

	if (name) {
		int rc = store_check_name("VM", name, err);

		if (!rc)
			snprintf(out, STORE_NAME_BYTES, "%s", name);
		return rc;
	}
	int rc = store_vm_list(store, &list, &count, err);
	if (rc)
		return rc;
	for (size_t i = 0; i < count; i++) {
		if (list[i].alive) {
			snprintf(out, STORE_NAME_BYTES, "%s", list[i].name);
			alive++;
		}
		store_vm_free(&list[i]);
	}
	free(list);
	if (alive == 1)
		return 0;
	if (alive == 0) {
		err_set(err, ERR_STATE, ESRCH, "VM: none runs");
		return err_hint(err, "start one with `vmcp run guest.cfg`");
	}
	err_set(err, ERR_USAGE, EINVAL, "VM: %zu run: say which", alive);
	return err_hint(err, "`vmcp ps` lists them");
}

int cli_open_vm(const struct cli *cli, struct store **out, char name[STORE_NAME_BYTES], struct err *err)
{
	int rc = cli_open_store(cli, out, err);

	if (rc)
		return rc;
	rc = cli_choose_vm(*out, cli->argument_count ? cli->arguments[0] : NULL, name, err);
	if (rc)
		store_close(*out);
	return rc;
}

/* Options may stand before the command: its name is the first word that is none. */
static int find_command_word(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--store"))
			i++;
		else if (argv[i][0] != '-')
			return i;
	}
	return 0;
}

static int run(struct cli *cli, int argc, char **argv, struct err *err)
{
	int word = find_command_word(argc, argv);
	bool help = false;

	if (word) {
		const char *name = argv[word];

		cli->command = find_command(name);
		if (!cli->command)
			return unknown_command(name, err);
		/* Its options stand on both sides of it: take the word out. */
		memmove(argv + word, argv + word + 1, (size_t)(argc - word) * sizeof(*argv));
		argc--;
	}
	int rc = parse_options(cli, argc, argv, &help, err);
	if (rc)
		return rc;
	if (!cli->command) {
		print_help();
		if (help)
			return 0;
		err_set(err, ERR_USAGE, EINVAL, "%s", "");
		return -EINVAL;
	}
	if (help) {
		print_command_help(cli->command);
		return 0;
	}
	rc = check_arguments(cli, err);
	return rc ? rc : cli->command->run(cli, err);
}

int main(int argc, char **argv)
{
	struct cli cli = {.started_ns = clock_now_ns()};
	struct err error = ERR_INIT;

	log_set_level(LOG_LEVEL_WARN);
	cli.store_path = default_store();
	/* Seen early, so that an error in the rest of the command line is told in this form too. */
	for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
		cli.json |= !strcmp(argv[i], "--json");
	int rc = fault_init(&error);
	if (!rc)
		rc = run(&cli, argc, argv, &error);
	if (rc && error.message[0])
		cli_print_error(&cli, &error);
	free(cli.store_path);
	if (fflush(stdout) && !rc) {
		fprintf(stderr, "vmcp: stdout: %s\n", strerror(errno));
		return ERR_FAILED;
	}
	if (rc)
		return error.class ? (int)error.class : ERR_FAILED;
	return 0;
}
