/*
 * __complete: what may stand at the end of an unfinished command line. The completion scripts of the shells (cli/completions/) ask it, so that they
 * know nothing themselves.
 *
 *     vmcp __complete -- WORD...      the words behind "vmcp", the last of which is being written (and may be "")
 *
 * Prints candidates that begin with that word, one a line: the candidate, a tab, what it is. A line ":file" or ":dir" says that files or folders may stand
 * there too. Never fails: a store that cannot be opened has nothing to offer.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "cli/cli.h"

#define SHOWN_IDS 50u /* the newest: more is no help to anyone */

struct typed {
	const char *store_path;
	const struct cli_command *command; /* NULL: not written yet */
	const struct cli_option *awaited;  /* the option whose value the last word is */
	const char *word;		   /* the last one, or its part behind "--option=" */
	char *before;			   /* that part: goes in front of candidates again. malloc, or NULL */
	unsigned arguments;		   /* whole ones before it */
	bool options_end;
};

static bool begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static void offer(const struct typed *typed, const char *candidate, const char *what)
{
	if (begins(candidate, typed->word))
		printf("%s%s\t%s\n", typed->before ? typed->before : "", candidate, what);
}

/* --- what was typed --- */

static const struct cli_option *in_table(const struct cli_option *options, const char *name, size_t length)
{
	for (; options && options->name; options++)
		if (strlen(options->name) == length && !strncmp(options->name, name, length))
			return options;
	return NULL;
}

/* "--name", "--name=value" or "-x"; NULL if it is none. */
static const struct cli_option *find_option(const struct typed *typed, const char *word)
{
	const struct cli_option *own = typed->command ? typed->command->options : NULL;

	if (begins(word, "--")) {
		size_t length = strcspn(word + 2, "=");
		const struct cli_option *found = in_table(own, word + 2, length);

		return found ? found : in_table(cli_global_options, word + 2, length);
	}
	for (const struct cli_option *o = own; o && o->name; o++)
		if (o->letter && o->letter == word[1] && !word[2])
			return o;
	return NULL;
}

static void take_word(struct typed *typed, const char *word)
{
	if (typed->awaited) {
		if (!strcmp(typed->awaited->name, "store"))
			typed->store_path = word;
		typed->awaited = NULL;
	} else if (!typed->options_end && !strcmp(word, "--")) {
		typed->options_end = true;
	} else if (!typed->options_end && word[0] == '-' && word[1]) {
		const struct cli_option *option = find_option(typed, word);

		if (option && option->argument && !strchr(word, '='))
			typed->awaited = option;
		else if (option && !strcmp(option->name, "store"))
			typed->store_path = strchr(word, '=') + 1;
	} else if (!typed->command) {
		typed->command = cli_find_command(word);
		typed->options_end = !typed->command; /* nothing is known of it: nothing is offered */
	} else {
		typed->arguments++;
	}
}

/* The last word may be an option's value behind its name: "--tag=bef". */
static void take_last(struct typed *typed, const char *word)
{
	const char *equals = begins(word, "--") && !typed->awaited && !typed->options_end ? strchr(word, '=') : NULL;

	typed->word = word;
	if (!equals)
		return;
	typed->awaited = find_option(typed, word);
	typed->before = xasprintf("%.*s", (int)(equals + 1 - word), word);
	typed->word = equals + 1;
}

/* --- what may stand there --- */

static void offer_vms(const struct typed *typed, bool alive, const char *behind)
{
	struct store_vm *list;
	struct store *store;
	size_t count;

	if (store_open(typed->store_path, false, &store, NULL))
		return;
	if (store_vm_list(store, &list, &count, NULL) == 0) {
		for (size_t i = 0; i < count; i++) {
			CLEANUP_FREE char *name = xasprintf("%s%s", list[i].name, behind);

			if (list[i].alive || !alive)
				offer(typed, name, list[i].state);
			store_vm_free(&list[i]);
		}
		free(list);
	}
	store_close(store);
}

static void offer_checkpoint(const struct typed *typed, const struct store_checkpoint *c, bool with_id, const char *behind)
{
	CLEANUP_FREE char *tag = xasprintf("%s%s", c->tag, behind), *id = xasprintf("%.12s%s", c->id, behind);
	CLEANUP_FREE char *what = xasprintf("of %s%s%s", c->vm, c->message ? ": " : "", c->message ? c->message : "");

	for (char *p = what; *p; p++)
		if ((unsigned char)*p < 0x20)
			*p = ' ';
	if (c->tag[0])
		offer(typed, tag, what);
	if (with_id)
		offer(typed, id, what);
}

/* Tags, then the newest ids; ids alone once digits are written. */
static void offer_checkpoints(const struct typed *typed, const char *behind)
{
	struct store_checkpoint *list;
	struct store *store;
	size_t count;

	if (store_open(typed->store_path, false, &store, NULL))
		return;
	if (store_checkpoint_list(store, NULL, &list, &count, NULL) == 0) {
		size_t left = SHOWN_IDS;

		for (size_t i = count; i-- > 0;) {
			bool with_id = left && begins(list[i].id, typed->word);

			offer_checkpoint(typed, &list[i], with_id, behind);
			left -= with_id;
			store_checkpoint_free(&list[i]);
		}
		free(list);
	}
	store_close(store);
}

static void offer_commands(const struct typed *typed)
{
	for (size_t i = 0; cli_commands[i]; i++)
		if (!cli_commands[i]->hidden)
			offer(typed, cli_commands[i]->name, cli_commands[i]->summary);
}

/* Disks of what stands before the colon: a VM, or a checkpoint. Without one, what may stand there. */
static void offer_disks(const struct typed *typed)
{
	const char *colon = strchr(typed->word, ':');
	struct store_checkpoint checkpoint;
	char id[STORE_ID_BYTES];
	struct store *store;

	if (!colon) {
		offer_vms(typed, false, ":");
		offer_checkpoints(typed, ":");
		return;
	}
	if (store_open(typed->store_path, false, &store, NULL))
		return;
	CLEANUP_FREE char *name = xasprintf("%.*s", (int)(colon - typed->word), typed->word);
	if (store_resolve(store, name, id, NULL) == 0 && store_checkpoint_get(store, id, &checkpoint, NULL) == 0) {
		for (uint32_t i = 0; i < checkpoint.disk_count; i++) {
			CLEANUP_FREE char *disk = xasprintf("%s:%s", name, checkpoint.disks[i].disk);

			offer(typed, disk, "disk");
		}
		store_checkpoint_free(&checkpoint);
	}
	store_close(store);
}

static void offer_one(const struct typed *typed, const char *word)
{
	if (word[0] != '@')
		offer(typed, word, "");
	else if (!strcmp(word, "@vm") || !strcmp(word, "@running"))
		offer_vms(typed, !strcmp(word, "@running"), "");
	else if (!strcmp(word, "@ckpt"))
		offer_checkpoints(typed, ""), offer_vms(typed, false, "");
	else if (!strcmp(word, "@disk"))
		offer_disks(typed);
	else if (!strcmp(word, "@command"))
		offer_commands(typed);
	else if (strcmp(word, "@any") != 0)
		printf(":%s\n", word + 1); /* @file, @dir: the shell's own affair */
}

static void offer_words(const struct typed *typed, const char *words, size_t length)
{
	CLEANUP_FREE char *copy = xasprintf("%.*s", (int)length, words);
	char *rest, *word;

	for (word = strtok_r(copy, "|", &rest); word; word = strtok_r(NULL, "|", &rest))
		offer_one(typed, word);
}

static void offer_argument(const struct typed *typed)
{
	const char *words = typed->command->words;

	if (!words || (int)typed->arguments >= typed->command->max_arguments)
		return;
	for (unsigned i = 0; i < typed->arguments && strchr(words, ' '); i++)
		words = strchr(words, ' ') + 1;
	offer_words(typed, words, strcspn(words, " "));
}

static void offer_options(const struct typed *typed)
{
	const struct cli_option *tables[] = {typed->command ? typed->command->options : NULL, cli_global_options};

	for (size_t i = 0; i < ARRAY_LENGTH(tables); i++)
		for (const struct cli_option *o = tables[i]; o && o->name; o++) {
			CLEANUP_FREE char *name = xasprintf("--%s", o->name);

			offer(typed, name, o->help);
		}
}

static int run_complete(struct cli *cli, struct err *err)
{
	struct typed typed = {.store_path = cli->store_path};

	(void)err;
	for (int i = 0; i + 1 < cli->argument_count; i++)
		take_word(&typed, cli->arguments[i]);
	take_last(&typed, cli->argument_count ? cli->arguments[cli->argument_count - 1] : "");
	if (typed.awaited)
		offer_words(&typed, typed.awaited->words ? typed.awaited->words : "", strlen(typed.awaited->words ? typed.awaited->words : ""));
	else if (typed.word[0] == '-' && !typed.options_end)
		offer_options(&typed);
	else if (typed.command)
		offer_argument(&typed);
	else if (!typed.options_end)
		offer_commands(&typed);
	free(typed.before);
	return 0;
}

const struct cli_command cli_complete = {
	.name = "__complete",
	.synopsis = "-- WORD...",
	.summary = "what may stand at the end of an unfinished command line",
	.max_arguments = 4096,
	.hidden = true,
	.run = run_complete,
};
