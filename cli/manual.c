/* __man: the manual pages of section 1, from the tables and from what stands here. The build writes them; docs/ has those of section 5. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "base/file.h"
#include "cli/cli.h"

/* One word of roff, or a line of it: nothing of it is taken for a request or an escape. `code` is what stands between backquotes. */
static void put_text(FILE *out, const char *text, size_t length)
{
	bool code = false;

	if (length && (text[0] == '.' || text[0] == '\''))
		fputs("\\&", out);
	for (size_t i = 0; i < length; i++)
		switch (text[i]) {
		case '\\':
			fputs("\\e", out);
			break;
		case '-':
			fputs("\\-", out);
			break;
		case '~':
			fputs("\\(ti", out);
			break;
		case '^':
			fputs("\\(ha", out);
			break;
		case '\'':
			fputs("\\(aq", out);
			break;
		case '`':
			fputs(code ? "\\fR" : "\\fB", out);
			code = !code;
			break;
		default:
			fputc(text[i], out);
		}
	if (code)
		fputs("\\fR", out);
}

static void put_line(FILE *out, const char *text)
{
	put_text(out, text, strlen(text));
	fputc('\n', out);
}

static void put_title(FILE *out, const char *name, const char *summary)
{
	CLEANUP_FREE char *upper = xstrdup(name);

	for (char *p = upper; *p; p++)
		*p = *p >= 'a' && *p <= 'z' ? (char)(*p - 'a' + 'A') : *p;
	fprintf(out, ".TH ");
	put_text(out, upper, strlen(upper));
	fprintf(out, " 1 \"\" \"vmcp %s\" \"vmcp\"\n.SH NAME\n", VMCP_VERSION);
	put_text(out, name, strlen(name));
	fprintf(out, " \\- ");
	put_line(out, summary);
}

/* Lines that begin with a space stand as they are, an empty one ends a paragraph, "Examples:" begins that section. */
static void put_help(FILE *out, const char *help)
{
	bool verbatim = false;

	while (*help) {
		size_t length = strcspn(help, "\n");
		bool spaced = length && help[0] == ' ';

		if (spaced && !verbatim)
			fprintf(out, ".PP\n.EX\n");
		if (!spaced && verbatim && length)
			fprintf(out, ".EE\n.PP\n"), verbatim = false;
		verbatim |= spaced;
		if (!strncmp(help, "Example", 7) && length && help[length - 1] == ':') {
			fprintf(out, ".SH EXAMPLES\n");
		} else if (length) {
			put_text(out, help, length);
			fputc('\n', out);
		} else {
			fprintf(out, verbatim ? "\n" : ".PP\n");
		}
		help += length + (help[length] ? 1 : 0);
	}
	if (verbatim)
		fprintf(out, ".EE\n");
}

static void put_options(FILE *out, const struct cli_option *options)
{
	for (; options && options->name; options++) {
		fprintf(out, ".TP\n");
		if (options->letter)
			fprintf(out, "\\fB\\-%c\\fR, ", options->letter);
		fprintf(out, "\\fB");
		CLEANUP_FREE char *name = xasprintf("--%s", options->name);
		put_text(out, name, strlen(name));
		fprintf(out, "\\fR%s", options->argument ? " \\fI" : "");
		if (options->argument) {
			put_text(out, options->argument, strlen(options->argument));
			fprintf(out, "\\fR");
		}
		fputc('\n', out);
		put_line(out, options->help);
	}
}

static void put_status(FILE *out)
{
	static const char *const meanings[] = {
		"done",
		"it failed",
		"wrong usage: command line or configuration",
		"no such VM, checkpoint or file",
		"not possible in the present state: already running, in use, busy",
		"damaged data",
		"this host lacks something (see `vmcp doctor`)",
	};

	fprintf(out, ".SH EXIT STATUS\n");
	for (unsigned i = 0; i < ARRAY_LENGTH(meanings); i++) {
		fprintf(out, ".TP 4\n%u\n", i);
		put_line(out, meanings[i]);
	}
	fprintf(out, ".PP\nAn error is one line on standard error, \\(lqvmcp: WHAT: WHY\\(rq, and a second line \\(lqhint: ...\\(rq where something can be "
		     "done about it. With\n.B \\-\\-json\nit is also a document on standard output, with the fields code, message and hint.\n");
}

/* Alternatives on lines of their own. */
static void put_json(FILE *out, const char *json)
{
	if (!json)
		return;
	fprintf(out, ".SH JSON\nWith\n.B \\-\\-json\nthe answer has the fields\n");
	while (*json) {
		size_t length = strcspn(json, "|");

		fprintf(out, ".IP\n");
		put_text(out, json, length);
		fputc('\n', out);
		json += length;
		json += strspn(json, "| ");
	}
	fprintf(out, ".PP\nIn {} are those of an object, in [] those of each object of a list; ? stands behind what is not always there. Times end with _ns, sizes with "
		     "_bytes. More fields may come.\n");
}

static void put_command(FILE *out, const struct cli_command *command)
{
	CLEANUP_FREE char *name = xasprintf("vmcp-%s", command->name);

	put_title(out, name, command->summary);
	fprintf(out, ".SH SYNOPSIS\n.B vmcp ");
	put_line(out, command->name);
	put_line(out, command->synopsis);
	fprintf(out, ".SH DESCRIPTION\n");
	put_help(out, command->help ? command->help : command->summary);
	fprintf(out, ".SH OPTIONS\n");
	put_options(out, command->options);
	fprintf(out, ".SS Everywhere\n");
	put_options(out, cli_global_options);
	put_json(out, command->json);
	put_status(out);
	fprintf(out, ".SH SEE ALSO\n.BR vmcp (1)\n");
}

static void put_commands(FILE *out)
{
	fprintf(out, ".SH COMMANDS\n");
	for (const struct cli_listed *l = cli_listed; l->group || l->command; l++) {
		if (l->group) {
			fprintf(out, ".SS ");
			put_line(out, l->group);
		} else if (!l->command->hidden) {
			CLEANUP_FREE char *name = xasprintf("vmcp-%s", l->command->name);

			fprintf(out, ".TP\n.BR ");
			put_text(out, name, strlen(name));
			fprintf(out, " (1)\n");
			put_line(out, l->command->summary);
		}
	}
}

static const char overview[] =
	".SH SYNOPSIS\n"
	".B vmcp\n"
	"COMMAND [OPTIONS] [ARGUMENTS]\n"
	".SH DESCRIPTION\n"
	"vmcp runs virtual machines on KVM and checkpoints them while they run: registers, devices, memory and disks at one instant. Going back is one\n"
	"command, in place, as often as wanted, to any checkpoint of a tree.\n"
	".PP\n"
	"There is no daemon:\n"
	".B vmcp run\n"
	"is the process of its VM. Every other command talks to that process over its socket, or to the store if the VM does not run.\n";

static const char rest[] =
	".SH CHECKPOINTS\n"
	"Where a command takes CKPT, that is an id, four or more of its first digits, a tag, a VM\\(aqs name (its newest checkpoint), or VM\\(tiN (N before it).\n"
	"VM may be left out where one VM runs.\n"
	".SH OUTPUT\n"
	"Answers go to standard output, all else to standard error. Long work shows a bar on a terminal, plain lines elsewhere, and nothing with\n"
	".BR \\-q .\n"
	"With\n"
	".B \\-\\-json\n"
	"an answer is one JSON document; times end with _ns, sizes with _bytes.\n";

static const char files[] =
	".SH ENVIRONMENT\n"
	".TP\n.B VMCP_STORE\nthe store, where\n.B \\-\\-store\nis not given.\n"
	".TP\n.B VMCP_STORE_KEY\nthe file with the key of an encrypted store, where\n.B \\-\\-store\\-key\nis not given.\n"
	".TP\n.B XDG_STATE_HOME\nfor users other than root the store is its folder vmcp. Default: ~/.local/state.\n"
	".TP\n.B NO_COLOR\nif it is set and not empty, nothing is coloured. Elsewhere colour is for terminals only.\n"
	".SH FILES\n"
	".TP\n.I /var/lib/vmcp\nroot\\(aqs store. On the filesystem of the disk images: a layer that is sealed is a hard link.\n"
	".TP\n.I vms/NAME/control.sock\n(in the store) the socket of a VM that runs.\n"
	".TP\n.I vms/NAME/console.log, vms/NAME/log\n(in the store) what a detached VM\\(aqs guest said on its console, and what vmcp said of it.\n"
	".SH SEE ALSO\n.BR guest.cfg (5),\n.BR vmcp\\-store (5),\n.BR vmcp\\-formats (5)\n";

static void put_overview(FILE *out)
{
	put_title(out, "vmcp", "checkpoints of whole virtual machines, taken while they run");
	fputs(overview, out);
	put_commands(out);
	fprintf(out, ".SH OPTIONS\nEvery command takes\n");
	put_options(out, cli_global_options);
	fputs(rest, out);
	put_status(out);
	fputs(files, out);
}

static int write_page(int dir, const struct cli_command *command, struct err *err)
{
	CLEANUP_FREE char *name = command ? xasprintf("vmcp-%s.1", command->name) : xstrdup("vmcp.1");
	CLEANUP_FREE char *text = NULL;
	size_t length = 0;
	FILE *out = open_memstream(&text, &length);

	if (!out)
		return err_sys(err, errno, "%s", name);
	if (command)
		put_command(out, command);
	else
		put_overview(out);
	if (fclose(out))
		return err_sys(err, errno, "%s", name);
	return file_write_atomic(dir, name, text, length, 0644, err);
}

static int run_man(struct cli *cli, struct err *err)
{
	CLEANUP_CLOSE int dir = open(cli->arguments[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir < 0)
		return err_sys(err, errno, "%s", cli->arguments[0]);
	int rc = write_page(dir, NULL, err);
	for (size_t i = 0; !rc && cli_commands[i]; i++)
		if (!cli_commands[i]->hidden)
			rc = write_page(dir, cli_commands[i], err);
	return rc;
}

const struct cli_command cli_man = {
	.name = "__man",
	.synopsis = "DIR",
	.summary = "writes the manual pages of all commands into a folder",
	.min_arguments = 1,
	.max_arguments = 1,
	.hidden = true,
	.run = run_man,
};
