/*
 * The vmcp program: one table of commands, each with its table of options. Parsing, `vmcp help`, its JSON, the man pages and the completions of the
 * shells are all made from these tables, and nothing else: what is not in a table is not there. tests/cli/manual_test.py holds them against each other.
 *
 * To add an option: one line in the command's table, its name in the `synopsis`, what its value may be in `words`, cli_value() or cli_given() where it acts.
 * To add a command: a line in commands.def, a cmd_NAME.c (or a neighbour's) that defines `const struct cli_command cli_NAME`, its file in CMakeLists.txt.
 */
#ifndef VMCP_CLI_CLI_H
#define VMCP_CLI_CLI_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/buf.h"
#include "base/err.h"
#include "checkpoint/store/store.h"

#define CLI_MAX_OPTIONS	  16
#define CLI_MAX_ARGUMENTS 64

/* An option beyond the ones that every command takes. */
struct cli_option {
	const char *name;     /* long name; NULL ends the table */
	char letter;	      /* short name, 0 for none */
	const char *argument; /* its name in the help, NULL for a switch */
	const char *help; /* "VERB: ..." is refused with another first argument than that one of `words` */
	const char *words; /* what its value may be: see below; NULL: anything */
};

/*
 * `words` of a value or argument, for completion: alternatives with | between them, each a word that is meant literally, or one of
 *     @vm @running @ckpt @disk @file @dir @command @any    names of VMs, of those that run, of checkpoints (tags, ids, VMs), VM:DISK and CKPT:DISK, ...
 * Of a command's arguments: one such for each, with a space between; the last one holds for all that follow.
 */

/*
 * `json`: names of fields. Behind one its fields, in {} of an object, in [] of each object of a list; a ? behind one that is not always there; "..." for more
 * that docs/control.md tells of; | between documents of which it is one.
 */

struct cli {
	bool json, quiet;
	char *store_path; /* absolute or as given; never NULL */
	const char *store_key_path; /* NULL: no key was named */
	struct store_key *store_key; /* once it was read */
	uint64_t started_ns; /* CLOCK_MONOTONIC of this program's exec */
	const struct cli_command *command;
	/* of the present command line: value by index in the command's option table (a switch given has "") */
	const char *values[CLI_MAX_OPTIONS];
	int argument_count;
	char **arguments;
};

struct cli_command {
	const char *name;
	const char *synopsis; /* behind the name */
	const char *summary;  /* one line */
	/* More, with examples: lines begin without a space, save those that stand as they are. "Example:" or "Examples:" alone begins the last part. */
	const char *help;
	const char *words; /* of the arguments, see above; NULL: anything */
	const char *json;  /* what its document has, see below; NULL: it answers with none */
	const struct cli_option *options;
	int min_arguments, max_arguments;
	bool hidden; /* for vmcp's own scripts, not for people */
	/* 0, or -errno with err set. A command that has printed an answer but fails all the same leaves err->message empty and sets err->class. */
	int (*run)(struct cli *cli, struct err *err);
};

extern const struct cli_command *const cli_commands[]; /* NULL at the end; in groups as commands.def has them */
/* The same with the headings of their groups, for who prints them: `command` is NULL in a heading. */
struct cli_listed {
	const char *group;
	const struct cli_command *command;
};
extern const struct cli_listed cli_listed[]; /* both NULL at the end */
extern const struct cli_option cli_global_options[]; /* that every command takes */
/* NULL: there is none. */
const struct cli_command *cli_find_command(const char *name);
int cli_unknown_command(const char *name, struct err *err);
/* The command's first argument is none of the words that it may be. */
int cli_unknown_verb(const struct cli *cli, struct err *err);
/* Value of the option, NULL if it was not given. The name must be in the command's table. */
const char *cli_value(const struct cli *cli, const char *name);
bool cli_given(const struct cli *cli, const char *name);
/* Opens the store that the command line names; it must exist. */
int cli_open_store(const struct cli *cli, struct store **out, struct err *err);
/* The key of a store that is in a file which `option` names: for store_key_free. */
int cli_read_store_key(const char *option, const char *path, bool is_new, struct store_key **out, struct err *err);
/* The key of the store that the command line names, which stays cli's; NULL: it names none. */
int cli_store_key(struct cli *cli, struct store_key **out, struct err *err);
/* Opens the store for what needs its key where it is encrypted: then one must be named. create: it is made, encrypted if a key is named. */
int cli_open_store_with_key(struct cli *cli, bool create, struct store **out, struct err *err);
/* The VM that is meant: `name`, or the only one that runs. */
int cli_choose_vm(struct store *store, const char *name, char out[STORE_NAME_BYTES], struct err *err);
/* Both, for a command whose first argument may name a VM. On failure nothing is open. */
int cli_open_vm(const struct cli *cli, struct store **out, char name[STORE_NAME_BYTES], struct err *err);
/* Calls one method of the process of the VM that the first argument names, or the only one that runs, whose name is put into `name`. `params` is stolen;
 * `result` may be NULL. */
int cli_call_vm(struct cli *cli, const char *method, json_t *params, char name[STORE_NAME_BYTES], json_t **result, struct err *err);
/* For a command that opens many layers: as many descriptors as this process may have. */
void cli_allow_many_files(void);
/* Names of VMs and checkpoints differ: a whole number of seconds such as "30" or "30s" for --timeout. */
int cli_parse_seconds(const char *option, const char *text, unsigned *out, struct err *err);

/* cmd_read.c: the checkpoint is of a domain that QEMU runs; its memory is QEMU's stream. */
bool cli_is_of_qemu(const struct store_checkpoint *checkpoint);
/* cmd_clone.c: `show VM --resources` */
int cli_show_resources(struct cli *cli, struct err *err);

/* cmd_group.c. As store_resolve, and then a group: *is_group, and its id. */
int cli_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], bool *is_group, struct err *err);
/* `checkpoint --group`, and what revert and show do with a group. */
int cli_group_checkpoint(struct cli *cli, uint64_t max_rate, unsigned seconds, struct err *err);
int cli_group_revert(struct cli *cli, const char *id, struct err *err);
int cli_group_show(struct cli *cli, struct store *store, const char *id, struct err *err);

/* What SIGINT and SIGTERM set from cli_catch_interrupts on. */
extern volatile bool cli_interrupted;
void cli_catch_interrupts(void);
/* Replaces the file as a whole or not at all. */
int cli_replace_file(const char *path, const char *text, size_t length, struct err *err);
/* The file with a key that `option` names (BUF_INIT before, freed by the caller also after a failure): all of it but the end of its last line, which an editor may
 * have put there. One that holds nothing is an error. "-": cli_ask_key. is_new: something is going to be encrypted with it. */
int cli_read_key_file(const char *option, const char *path, bool is_new, struct buf *out, struct err *err);
/* ask.c: a line from the terminal, without showing it; twice, if it is new. Appends to *out. No terminal: -ENOTTY, ERR_USAGE. */
int cli_ask_key(const char *option, bool is_new, struct buf *out, struct err *err);

/* output.c */
void cli_print_json(json_t *document); /* steals it */
bool cli_colour(int fd); /* may be used there: a terminal, and NO_COLOR does not say otherwise */
void cli_print_error(const struct cli *cli, const struct err *err);
void cli_format_size(char out[16], uint64_t bytes);
void cli_format_age(char out[16], uint64_t ns);
void cli_format_duration(char out[24], uint64_t ns);
/* A progress line on stderr: a bar on a terminal, a line per phase elsewhere, nothing with -q. */
struct cli_progress {
	const struct cli *cli;
	const char *what; /* is under way: "checkpoint" */
	bool terminal, drawn, waits;
	char phase[32];
	uint64_t phase_ns, first_bytes; /* when the phase began, and with what done */
};
struct cli_progress cli_progress_begin(const struct cli *cli, const char *what);
void cli_progress_update(struct cli_progress *progress, const char *phase, uint64_t done_bytes, uint64_t total_bytes); /* total 0: not known */
void cli_progress_show(void *progress, const json_t *params); /* a control_progress_fn */
void cli_progress_end(struct cli_progress *progress);

/* help.c */
void cli_print_help(void);
void cli_print_command_help(const struct cli_command *command);

/* the commands */
#define GROUP(title)
#define COMMAND(name) extern const struct cli_command cli_##name;
#include "cli/commands.def"
#undef COMMAND
#undef GROUP

#endif
