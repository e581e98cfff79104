/* export, import. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/size.h"
#include "checkpoint/store/transfer.h"
#include "cli/cli.h"
#include "control/transfer_config.h"

#define SHOW_EVERY_NS 100000000ull

struct display {
	struct cli_progress progress;
	uint64_t shown_ns;
	struct buf key_text;
	struct transfer_key key;
};

static void show(void *opaque, uint64_t done, uint64_t total)
{
	struct display *display = opaque;
	uint64_t now = clock_now_ns();

	if (now - display->shown_ns < SHOW_EVERY_NS)
		return;
	display->shown_ns = now;
	cli_progress_update(&display->progress, "copying", done, total);
}

static void end(struct display *display)
{
	cli_progress_end(&display->progress);
	if (display->key_text.data)
		explicit_bzero(display->key_text.data, display->key_text.length);
	buf_free(&display->key_text);
}

static int begin(struct cli *cli, struct display *display, struct transfer_options *options, struct err *err)
{
	const char *rate = cli_value(cli, "max-rate");

	*display = (struct display){.progress = cli_progress_begin(cli, cli->command->name), .shown_ns = clock_now_ns()};
	*options = (struct transfer_options){
		.config = &control_transfer_config, .cancel = &cli_interrupted, .progress = show, .opaque = display};
	if (rate && (!size_parse(rate, &options->max_rate) || options->max_rate == 0)) {
		err_set(err, ERR_USAGE, EINVAL, "--max-rate: '%s' is no rate", rate);
		return err_hint(err, SIZE_HINT);
	}
	cli_catch_interrupts();
	signal(SIGPIPE, SIG_IGN);
	const char *key_file = cli_value(cli, "key-file");
	int rc = key_file ? cli_read_key_file("--key-file", key_file, cli->command == &cli_export, &display->key_text, err) : 0;
	if (!rc && key_file) {
		display->key = (struct transfer_key){.data = display->key_text.data, .bytes = display->key_text.length};
		options->key = &display->key;
	}
	return rc;
}

/* --- export --- */

static void print_export(const struct cli *cli, const char *path, const struct transfer_result *r)
{
	char stream[16], content[16];

	cli_format_size(stream, r->stream_bytes);
	cli_format_size(content, r->content_bytes);
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I}", "id", r->id, "vm", r->vm, "tag", r->tag, "since",
					 r->since, "file", path, "file_bytes", (json_int_t)r->stream_bytes, "content_bytes",
					 (json_int_t)r->content_bytes, "pages", (json_int_t)r->pages, "disk_bytes", (json_int_t)r->disk_bytes,
					 "resumed_bytes", (json_int_t)r->resumed_bytes));
	else
		printf("%.8s of %s is in %s: %s (%s uncompressed)\n", r->id, r->vm, path, stream, content);
}

static int export_to(struct cli *cli, struct store *store, const char *id, const char *since, const struct transfer_options *options,
		     struct transfer_result *result, struct err *err)
{
	const char *path = cli->arguments[1];
	bool pipe = !strcmp(path, "-"), resume = cli_given(cli, "resume");

	if (!pipe)
		return transfer_export_file(store, id, since, path, resume, options, result, err);
	if (resume)
		return err_set(err, ERR_USAGE, EINVAL, "--resume: what went into a pipe cannot be gone on with");
	if (isatty(STDOUT_FILENO)) {
		err_set(err, ERR_USAGE, EINVAL, "export: stdout is a terminal");
		return err_hint(err, "send it somewhere: vmcp export CKPT - | ssh HOST vmcp import -");
	}
	return transfer_export(store, id, since, STDOUT_FILENO, options, result, err);
}

static int run_export(struct cli *cli, struct err *err)
{
	const char *since = cli_value(cli, "since");
	char id[STORE_ID_BYTES], since_id[STORE_ID_BYTES];
	struct transfer_options options;
	struct transfer_result result;
	struct display display;
	struct store *store;
	int rc = begin(cli, &display, &options, err);

	if (!rc)
		rc = cli_open_store_with_key(cli, false, &store, err);
	if (rc) {
		end(&display);
		return rc;
	}
	rc = store_resolve(store, cli->arguments[0], id, err);
	if (!rc && since)
		rc = store_resolve(store, since, since_id, err);
	if (!rc && since && !strcmp(id, since_id))
		rc = err_set(err, ERR_USAGE, EINVAL, "--since: it is checkpoint %.8s itself", id);
	if (!rc)
		rc = export_to(cli, store, id, since ? since_id : NULL, &options, &result, err);
	end(&display);
	store_close(store);
	if (!rc && strcmp(cli->arguments[1], "-") != 0)
		print_export(cli, cli->arguments[1], &result);
	return rc;
}

static const struct cli_option export_options[] = {
	{"since", 0, "CKPT", "only what differs from this checkpoint, which the other side must have", "@ckpt"},
	{"resume", 0, NULL, "keep FILE.part when interrupted, and go on with one that is there; with the same key, if there is one"},
	{"key-file", 0, "FILE", "encrypt it with the key or passphrase in FILE, - to be asked for it", "@file"},
	{"max-rate", 0, "SIZE", "at most so many bytes a second, such as 10M"},
	{0},
};

const struct cli_command cli_export = {
	.name = "export",
	.synopsis = "CKPT FILE|- [--since CKPT] [--resume] [--key-file FILE] [--max-rate SIZE]",
	.summary = "write a checkpoint to one file, or to a pipe",
	.help = "The file holds memory, devices, and all disks as the checkpoint sees them, bases included; read-only disks as their files are\n"
		"now. It is compressed and checksummed; `zstd -t FILE` can check it, too. With --key-file\n"
		"it is encrypted (AES-256-GCM; the key by scrypt from what is in FILE), disks included, and only who has the key can read or change it. That has\n"
		"nothing to do with --store-key: what comes from an encrypted store is in the file as any other, encrypted with --key-file only.\n\n"
		"    head -c 32 /dev/urandom | base64 >web.key\n"
		"    vmcp export web web.vmcp --key-file web.key\n"
		"    vmcp export web web.vmcp\n"
		"    vmcp export web - | ssh other vmcp import -\n"
		"    vmcp export web --since web~1 - | ssh other vmcp import -",
	.options = export_options,
	.min_arguments = 2,
	.words = "@ckpt @file",
	.max_arguments = 2,
	.json = "id, vm, tag, since, file, file_bytes, content_bytes, pages, disk_bytes, resumed_bytes",
	.run = run_export,
};

/* --- import --- */

static void print_import(const struct cli *cli, const struct transfer_result *r)
{
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s, s:s, s:s, s:b, s:I, s:I, s:I, s:I, s:I}", "id", r->id, "vm", r->vm, "tag", r->tag, "since",
					 r->since, "present", r->present, "file_bytes", (json_int_t)r->stream_bytes, "content_bytes",
					 (json_int_t)r->content_bytes, "pages", (json_int_t)r->pages, "shared_pages",
					 (json_int_t)r->shared_pages, "disk_bytes", (json_int_t)r->disk_bytes));
	else
		printf("%s\n", r->id);
	if (r->present && !cli->json && !cli->quiet)
		fprintf(stderr, "vmcp: checkpoint %.8s: it was here already\n", r->id);
}

static int run_import(struct cli *cli, struct err *err)
{
	const char *path = cli->arguments[0];
	bool pipe = !strcmp(path, "-"), check = cli_given(cli, "check");
	CLEANUP_CLOSE int file = pipe ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	struct transfer_options options;
	struct transfer_result result;
	struct store *store = NULL;
	struct display display = {0};
	int rc = !pipe && file < 0 ? err_sys(err, errno, "%s", path) : begin(cli, &display, &options, err);

	if (!rc && pipe && isatty(STDIN_FILENO)) {
		err_set(err, ERR_USAGE, EINVAL, "import: stdin is a terminal");
		return err_hint(err, "name a file, or send it one: ssh HOST vmcp export CKPT - | vmcp import -");
	}
	if (!rc && !check)
		rc = cli_open_store_with_key(cli, true, &store, err);
	if (rc) {
		end(&display);
		return rc;
	}
	rc = transfer_import(store, pipe ? STDIN_FILENO : file, pipe ? "stdin" : path, cli_value(cli, "name"), &options, &result, err);
	end(&display);
	if (store)
		store_close(store);
	if (!rc)
		print_import(cli, &result);
	return rc;
}

static const struct cli_option import_options[] = {
	{"name", 0, "NAME", "name of the VM here (default: its own)"},
	{"check", 0, NULL, "read and check it, and change nothing"},
	{"key-file", 0, "FILE", "it is encrypted, with the key or passphrase in FILE, - to be asked for it", "@file"},
	{"max-rate", 0, "SIZE", "at most so many bytes a second, such as 10M"},
	{0},
};

const struct cli_command cli_import = {
	.name = "import",
	.synopsis = "FILE|- [--name NAME] [--check] [--key-file FILE] [--max-rate SIZE]",
	.summary = "take in what `vmcp export` wrote",
	.help = "All of it is checked before anything is kept. The checkpoint keeps its id, tag and message; its disks are in this store. Where its\n"
		"parent is here too, what they share is stored once. Prints the id.\n\n"
		"    vmcp import web.vmcp && vmcp run --from web --detach\n\n"
		"Kernel and initrd are files of the other host: a guest that resets here ends, unless its parent, and so their names, are here. In the\n"
		"same way cards are on the user network, without forwarded ports: `vmcp run --net` binds them.",
	.options = import_options,
	.min_arguments = 1,
	.words = "@file",
	.max_arguments = 1,
	.json = "id, vm, tag, since, present, file_bytes, content_bytes, pages, shared_pages, disk_bytes",
	.run = run_import,
};
