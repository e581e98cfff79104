#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "base/nearest.h"
#include "cli/cli.h"
#include "control/client.h"

#define GLOBAL_OPTIONS 6
#define MAX_KEY_BYTES  4096

const struct cli_option cli_global_options[GLOBAL_OPTIONS + 1] = {
	{"json", 0, NULL, "one JSON document on stdout"},
	{"store", 0, "DIR", "the store (default: $VMCP_STORE, else /var/lib/vmcp for root, else $XDG_STATE_HOME/vmcp)", "@dir"},
	{"store-key", 0, "FILE", "the key of an encrypted store, - to be asked for it (default: $VMCP_STORE_KEY); a store that is made is encrypted with it", "@file"},
	{"quiet", 'q', NULL, "say only what was asked for"},
	{"verbose", 'v', NULL, "say more on stderr"},
	{"help", 'h', NULL, "this text"},
	{0},
};

const struct cli_command *const cli_commands[] = {
#define GROUP(title)
#define COMMAND(name) &cli_##name,
#include "cli/commands.def"
#undef COMMAND
#undef GROUP
	NULL,
};

const struct cli_listed cli_listed[] = {
#define GROUP(title) {title, NULL},
#define COMMAND(name) {NULL, &cli_##name},
#include "cli/commands.def"
#undef COMMAND
#undef GROUP
	{0},
};

const struct cli_command *cli_find_command(const char *name)
{
	for (size_t i = 0; cli_commands[i]; i++)
		if (!strcmp(cli_commands[i]->name, name))
			return cli_commands[i];
	return NULL;
}

int cli_unknown_command(const char *name, struct err *err)
{
	struct nearest nearest = nearest_to(name);

	for (size_t i = 0; cli_commands[i]; i++)
		if (!cli_commands[i]->hidden)
			nearest_try(&nearest, cli_commands[i]->name);
	err_set(err, ERR_USAGE, EINVAL, "%s: there is no such command", name);
	if (nearest.name[0])
		return err_hint(err, "did you mean `vmcp %s`?", nearest.name);
	return err_hint(err, "`vmcp help` lists them");
}

int cli_unknown_verb(const struct cli *cli, struct err *err)
{
	const struct cli_command *command = cli->command;
	struct nearest nearest = nearest_to(cli->arguments[0]);
	CLEANUP_FREE char *words = xasprintf("%.*s", (int)strcspn(command->words, " "), command->words);
	char *rest;

	err_set(err, ERR_USAGE, EINVAL, "%s: '%s' is none of %s", command->name, cli->arguments[0], words);
	for (const char *word = strtok_r(words, "|", &rest); word; word = strtok_r(NULL, "|", &rest))
		nearest_try(&nearest, word);
	if (nearest.name[0])
		return err_hint(err, "did you mean `vmcp %s %s`?", command->name, nearest.name);
	return err_hint(err, "usage: vmcp %s %s", command->name, command->synopsis);
}

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
		for (const struct cli_option *o = pass ? own : cli_global_options; o->name; o++, n++) {
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
		for (const struct cli_option *o = pass ? own : cli_global_options; o->name; o++, n++)
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
		cli->store_key_path = value;
		break;
	case 3:
		cli->quiet = true;
		log_set_level(LOG_LEVEL_WARN);
		break;
	case 4:
		log_set_level(log_get_level() == LOG_LEVEL_INFO ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO);
		break;
	default:
		*help = true;
	}
}

/* `word` as it was written: "--liev", "--liev=x", "-x" among other letters. */
static int unknown_option(const struct cli *cli, const struct cli_option *own, const char *word, struct err *err)
{
	const char *name = !strncmp(word, "--", 2) ? word + 2 : "", *command = cli->command ? cli->command->name : "";
	CLEANUP_FREE char *wanted = xasprintf("%.*s", (int)strcspn(name, "="), name);
	struct nearest nearest = nearest_to(wanted);

	for (unsigned pass = 0; *wanted && pass < 2; pass++)
		for (const struct cli_option *o = pass ? cli_global_options : own; o->name; o++)
			nearest_try(&nearest, o->name);
	err_set(err, ERR_USAGE, EINVAL, "%s: there is no such option", word);
	if (!*command && cli_find_command(wanted))
		return err_hint(err, "did you mean `vmcp %s`?", wanted);
	if (nearest.name[0])
		return err_hint(err, "did you mean --%s? See `vmcp help%s%s`", nearest.name, *command ? " " : "", command);
	return err_hint(err, "see `vmcp help%s%s`", *command ? " " : "", command);
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

		if (c == '?')
			return unknown_option(cli, own, word, err);
		if (c == ':') {
			err_set(err, ERR_USAGE, EINVAL, "%s: the option needs a value", word);
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

/* Whether `word` is one of the alternatives that the command's first argument may be. */
static bool is_verb(const struct cli_command *command, const char *word, size_t length)
{
	const char *at = command->words ? command->words : "";

	while (*at && *at != ' ') {
		size_t n = strcspn(at, "| ");

		if (n == length && !strncmp(at, word, n))
			return true;
		at += n + (at[n] == '|');
	}
	return false;
}

/* Options whose help begins with a verb and a colon are for that verb. */
static int check_verb_options(const struct cli *cli, struct err *err)
{
	const struct cli_command *command = cli->command;
	const char *verb = cli->argument_count ? cli->arguments[0] : "";
	unsigned count = command->options && is_verb(command, verb, strlen(verb)) ? option_count(command->options) : 0;

	for (unsigned i = 0; i < count; i++) {
		const char *help = command->options[i].help;
		size_t length = strcspn(help, ":");

		if (!cli->values[i] || !help[length] || !is_verb(command, help, length) || (length == strlen(verb) && !strncmp(help, verb, length)))
			continue;
		err_set(err, ERR_USAGE, EINVAL, "--%s: has no effect with %s %s: it is for %s %.*s", command->options[i].name, command->name, verb, command->name,
			(int)length, help);
		return err_hint(err, "leave --%s out", command->options[i].name);
	}
	return 0;
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

int cli_open_store(const struct cli *cli, struct store **out, struct err *err)
{
	return store_open(cli->store_path, false, out, err);
}

int cli_read_store_key(const char *option, const char *path, bool is_new, struct store_key **out, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = cli_read_key_file(option, path, is_new, &text, err);

	if (!rc)
		*out = store_key_new(text.data, text.length, 0);
	if (text.data)
		explicit_bzero(text.data, text.capacity);
	return rc;
}

int cli_store_key(struct cli *cli, struct store_key **out, struct err *err)
{
	CLEANUP_FREE char *format = xasprintf("%s/format", cli->store_path);
	int rc = 0;

	if (cli->store_key_path && !cli->store_key)
		rc = cli_read_store_key("--store-key", cli->store_key_path, access(format, F_OK) != 0, &cli->store_key, err);
	*out = cli->store_key;
	return rc;
}

int cli_open_store_with_key(struct cli *cli, bool create, struct store **out, struct err *err)
{
	struct store_key *key;
	int rc = cli_store_key(cli, &key, err);

	if (!rc)
		rc = store_open_with_key(cli->store_path, create, key, out, err);
	if (rc)
		return rc;
	rc = store_check_key(*out, err);
	if (rc)
		store_close(*out);
	return rc;
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

volatile bool cli_interrupted;

static void on_interrupt(int number)
{
	(void)number;
	cli_interrupted = true;
}

void cli_catch_interrupts(void)
{
	signal(SIGINT, on_interrupt);
	signal(SIGTERM, on_interrupt);
}

int cli_replace_file(const char *path, const char *text, size_t length, struct err *err)
{
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = slash ? xasprintf("%.*s", (int)(slash - path) + 1, path) : xstrdup(".");
	CLEANUP_CLOSE int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir < 0)
		return err_sys(err, errno, "%s", path);
	return file_write_atomic(dir, slash ? slash + 1 : path, text, length, 0644, err);
}

int cli_read_key_file(const char *option, const char *path, bool is_new, struct buf *out, struct err *err)
{
	if (!strcmp(path, "-"))
		return cli_ask_key(option, is_new, out, err);
	int rc = file_read_all(AT_FDCWD, path, MAX_KEY_BYTES, out, err);
	if (rc)
		return err_prefix(err, "%s", option);
	if (out->length && out->data[out->length - 1] == '\n')
		out->length--;
	if (out->length && out->data[out->length - 1] == '\r')
		out->length--;
	if (out->length)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "%s: %s is empty", option, path);
	return err_hint(err, "it holds a passphrase, or random bytes: head -c 32 /dev/urandom | base64 >FILE");
}

/* Options may stand before the command: its name is the first word that is none. */
static int find_command_word(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--store") || !strcmp(argv[i], "--store-key"))
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

		cli->command = cli_find_command(name);
		if (!cli->command)
			return cli_unknown_command(name, err);
		/* Its options stand on both sides of it: take the word out. */
		memmove(argv + word, argv + word + 1, (size_t)(argc - word) * sizeof(*argv));
		argc--;
	}
	int rc = parse_options(cli, argc, argv, &help, err);
	if (rc)
		return rc;
	if (!cli->command) {
		cli_print_help();
		if (help)
			return 0;
		err_set(err, ERR_USAGE, EINVAL, "%s", "");
		return -EINVAL;
	}
	if (help) {
		cli_print_command_help(cli->command);
		return 0;
	}
	rc = check_arguments(cli, err);
	if (!rc)
		rc = check_verb_options(cli, err);
	return rc ? rc : cli->command->run(cli, err);
}

/* Before main the dynamic loader has run, for some milliseconds, of which nothing tells but the processor time that the process has had. */
static uint64_t exec_ns(void)
{
	struct timespec used;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
	return clock_now_ns() - ((uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec);
}

int main(int argc, char **argv)
{
	struct cli cli = {.started_ns = exec_ns()};
	struct err error = ERR_INIT;

	log_set_level(LOG_LEVEL_WARN);
	cli.store_path = control_default_store();
	cli.store_key_path = getenv("VMCP_STORE_KEY");
	if (cli.store_key_path && !*cli.store_key_path)
		cli.store_key_path = NULL;
	/* Seen early, so that an error in the rest of the command line is told in this form too. */
	for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
		cli.json |= !strcmp(argv[i], "--json");
	int rc = fault_init(&error);
	if (!rc)
		rc = run(&cli, argc, argv, &error);
	if (rc && error.message[0])
		cli_print_error(&cli, &error);
	store_key_free(cli.store_key);
	free(cli.store_path);
	if (fflush(stdout) && !rc) {
		fprintf(stderr, "vmcp: stdout: %s\n", strerror(errno));
		return ERR_FAILED;
	}
	if (rc)
		return error.class ? (int)error.class : ERR_FAILED;
	return 0;
}
