/*
 * The vmcp program: one table of commands, each with its table of options. Parsing, help and errors are made from these tables.
 */
#ifndef VMCP_CLI_CLI_H
#define VMCP_CLI_CLI_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "checkpoint/store/store.h"

#define CLI_MAX_OPTIONS	  12
#define CLI_MAX_ARGUMENTS 64

/* An option beyond the ones that every command takes. */
struct cli_option {
	const char *name;     /* long name; NULL ends the table */
	char letter;	      /* short name, 0 for none */
	const char *argument; /* its name in the help, NULL for a switch */
	const char *help;
};

struct cli {
	bool json, quiet;
	char *store_path; /* absolute or as given; never NULL */
	uint64_t started_ns;
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
	const char *help;     /* more, with examples */
	const struct cli_option *options;
	int min_arguments, max_arguments;
	/* 0, or -errno with err set. A command that has printed an answer but fails all the same leaves err->message empty and sets err->class. */
	int (*run)(struct cli *cli, struct err *err);
};

extern const struct cli_command *const cli_commands[]; /* NULL at the end */
/* Value of the option, NULL if it was not given. The name must be in the command's table. */
const char *cli_value(const struct cli *cli, const char *name);
bool cli_given(const struct cli *cli, const char *name);
/* Opens the store that the command line names; it must exist. */
int cli_open_store(const struct cli *cli, struct store **out, struct err *err);
/* The VM that is meant: `name`, or the only one that runs. */
int cli_choose_vm(struct store *store, const char *name, char out[STORE_NAME_BYTES], struct err *err);
/* Both, for a command whose first argument may name a VM. On failure nothing is open. */
int cli_open_vm(const struct cli *cli, struct store **out, char name[STORE_NAME_BYTES], struct err *err);
/* For a command that opens many layers: as many descriptors as this process may have. */
void cli_allow_many_files(void);
/* Names of VMs and checkpoints differ: a whole number of seconds such as "30" or "30s" for --timeout. */
int cli_parse_seconds(const char *option, const char *text, unsigned *out, struct err *err);

/* output.c */
void cli_print_json(json_t *document); /* steals it */
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
};
struct cli_progress cli_progress_begin(const struct cli *cli, const char *what);
void cli_progress_update(struct cli_progress *progress, const char *phase, uint64_t done, uint64_t total); /* any unit; total 0: not known */
void cli_progress_show(void *progress, const json_t *params); /* a control_progress_fn */
void cli_progress_end(struct cli_progress *progress);

/* the commands, by file */
extern const struct cli_command cli_run, cli_ps, cli_console, cli_pause, cli_resume, cli_stop, cli_kill, cli_stats, cli_balloon;
extern const struct cli_command cli_checkpoint, cli_cancel, cli_revert, cli_tag;
extern const struct cli_command cli_rm, cli_gc, cli_verify, cli_diff, cli_dump;
extern const struct cli_command cli_export, cli_import;
extern const struct cli_command cli_config, cli_disk, cli_log, cli_show, cli_doctor, cli_version, cli_help;

#endif
