/* disk: info, check, export, resize. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "base/nearest.h"
#include "base/size.h"
#include "cli/cli.h"
#include "cowdisk/check.h"
#include "cowdisk/info.h"
#include "cowdisk/merge.h"

#define KNOWN_BYTES 160

/* What SRC means. */
struct source {
	char *path;
	bool sealed; /* a checkpoint's: never changes */
	int format;  /* which the checkpoint says, else -1 */
	char running[STORE_NAME_BYTES]; /* the VM that has it; "": none */
};

/* Where the VM keeps a disk: its configuration says so, or it is the VM's own layer over a base. */
static char *find_in_config(const struct store *store, const char *vm, const char *config, const char *disk)
{
	CLEANUP_FREE char *header = xasprintf("[disk %s]\n", disk);
	const char *section = config ? strstr(config, header) : NULL;

	if (!section)
		return NULL;
	const char *line = section + strlen(header), *end = strchr(line, '\n');
	int length = (int)(end ? (size_t)(end - line) : strlen(line));
	if (!strncmp(line, "path = ", 7))
		return xasprintf("%.*s", length - 7, line + 7);
	return store_vm_disk_path(store_path(store), vm, disk);
}

static int unknown_disk(const char *owner, const char *what, const struct nearest *nearest, const char *known, struct err *err)
{
	err_set(err, ERR_NOT_FOUND, ENOENT, "%s:%s: the %s has no such disk", owner, nearest->wanted, what);
	if (nearest->name[0])
		return err_hint(err, "did you mean %s:%s?", owner, nearest->name);
	return *known ? err_hint(err, "its disks: %s", known) : err_hint(err, "it has none");
}

/* Appends to a list that is shown: cut, where it is long. */
static void add_known(char known[KNOWN_BYTES], const char *name, struct nearest *nearest)
{
	size_t used = strlen(known);

	snprintf(known + used, KNOWN_BYTES - used, "%s%s", used ? ", " : "", name);
	nearest_try(nearest, name);
}

static int no_disk_of_vm(const struct store_vm *vm, const char *disk, struct err *err)
{
	struct nearest nearest = nearest_to(disk);
	char known[KNOWN_BYTES] = "", name[STORE_NAME_BYTES];

	for (const char *at = vm->config_text; at && (at = strstr(at, "[disk ")) != NULL; at++)
		if (sscanf(at, "[disk %63[^]]]", name) == 1)
			add_known(known, name, &nearest);
	return unknown_disk(vm->name, "VM", &nearest, known, err);
}

static int no_disk_of_checkpoint(const char *reference, const struct store_checkpoint *checkpoint, const char *disk, struct err *err)
{
	struct nearest nearest = nearest_to(disk);
	char known[KNOWN_BYTES] = "";

	for (uint32_t i = 0; i < checkpoint->disk_count; i++)
		add_known(known, checkpoint->disks[i].disk, &nearest);
	return unknown_disk(reference, "checkpoint", &nearest, known, err);
}

static int disk_of_vm(struct store *store, const struct store_vm *vm, const char *disk, struct source *out,
		      struct err *err)
{
	out->path = find_in_config(store, vm->name, vm->config_text, disk);
	return out->path ? 0 : no_disk_of_vm(vm, disk, err);
}

static int disk_of_checkpoint(struct store *store, const char *reference, const char *disk, struct source *out,
			      struct err *err)
{
	struct store_checkpoint checkpoint;
	char id[STORE_ID_BYTES];
	int rc = store_resolve(store, reference, id, err);

	if (!rc)
		rc = store_checkpoint_get(store, id, &checkpoint, err);
	if (rc)
		return rc;
	rc = -ENOENT;
	for (uint32_t i = 0; rc == -ENOENT && i < checkpoint.disk_count; i++)
		if (!strcmp(checkpoint.disks[i].disk, disk)) {
			rc = store_disk_layer_path(store, checkpoint.disks[i].layer, checkpoint.disks[i].format,
						   &out->path, err);
			out->format = store_disk_layer_format(&checkpoint.disks[i]);
		}
	if (rc == -ENOENT && !out->path)
		rc = no_disk_of_checkpoint(reference, &checkpoint, disk, err);
	store_checkpoint_free(&checkpoint);
	out->sealed = true;
	return rc;
}

/* A file of that name; else VM:DISK; else CKPT:DISK. */
static int find_source(const struct cli *cli, const char *text, struct source *out, struct err *err)
{
	struct err none = ERR_INIT;
	struct stat st;
	struct store *store;
	struct store_vm vm;
	const char *colon = strrchr(text, ':');

	*out = (struct source){.format = -1};
	if (stat(text, &st) == 0) {
		out->path = xstrdup(text);
		return 0;
	}
	if (!colon) {
		int number = errno;

		err_sys(err, number, "%s", text);
		err_hint(err, "an image file, VM:DISK or CKPT:DISK is meant");
		return -number;
	}
	int rc = cli_open_store(cli, &store, err);
	if (rc)
		return rc;
	CLEANUP_FREE char *name = xasprintf("%.*s", (int)(colon - text), text);
	rc = store_vm_get(store, name, &vm, &none);
	if (rc == 0) {
		rc = disk_of_vm(store, &vm, colon + 1, out, err);
		if (vm.alive)
			memcpy(out->running, vm.name, sizeof(out->running));
		store_vm_free(&vm);
	} else
		rc = disk_of_checkpoint(store, name, colon + 1, out, err);
	store_close(store);
	return rc;
}

static int refuse_sealed(const struct source *source, const char *text, struct err *err)
{
	if (!source->sealed)
		return 0;
	err_set(err, ERR_STATE, EROFS, "%s: a checkpoint's disk never changes", text);
	err_hint(err, "write it to a file of its own: vmcp disk export %s FILE", text);
	return -EROFS;
}

static const char *format_name(enum cow_format format) { return format == COW_FORMAT_RAW ? "raw" : "qcow2"; }

/* --- info --- */

static json_t *info_to_json(const struct cow_info *i)
{
	json_t *o = json_pack("{s:s, s:s, s:I, s:I, s:I}", "path", i->path, "format", format_name(i->format),
			      "size_bytes", (json_int_t)i->size_bytes, "file_bytes", (json_int_t)i->file_bytes,
			      "occupied_bytes", (json_int_t)i->occupied_bytes);

	json_object_set_new(o, "backing", i->backing ? json_string(i->backing) : json_null());
	if (i->format == COW_FORMAT_RAW)
		return o;
	json_t *more = json_pack("{s:i, s:I, s:i, s:i, s:s, s:b, s:b, s:b}", "version", (int)i->version,
				 "cluster_bytes", (json_int_t)i->cluster_bytes, "refcount_bits", (int)i->refcount_bits,
				 "snapshots", (int)i->snapshots, "compression", i->zstd ? "zstd" : "zlib", "dirty",
				 i->dirty, "corrupt", i->corrupt, "bitmaps", i->bitmaps);
	json_object_update(o, more);
	json_decref(more);
	return o;
}

static void print_info(const struct cow_info *i)
{
	char size[16], occupied[16], cluster[16];

	cli_format_size(size, i->size_bytes);
	cli_format_size(occupied, i->occupied_bytes);
	cli_format_size(cluster, i->cluster_bytes);
	printf("%s\n  %s", i->path, format_name(i->format));
	if (i->format == COW_FORMAT_QCOW2)
		printf(" version %u, clusters of %s, counts of %u bits", i->version, cluster, i->refcount_bits);
	printf("\n  size      %s (%" PRIu64 " bytes), occupies %s\n", size, i->size_bytes, occupied);
	if (i->snapshots)
		printf("  snapshots %u internal\n", i->snapshots);
	if (i->backing)
		printf("  backing   %s\n", i->backing);
	if (i->dirty || i->corrupt)
		printf("  marked    %s: cannot be written; see `vmcp disk check --repair`\n",
		       i->corrupt ? "corrupt" : "not closed cleanly");
}

static int run_info(struct cli *cli, const struct source *source, struct err *err)
{
	struct cow_info *chain;
	size_t count;
	int rc = cow_info(source->path, source->format, &chain, &count, err);

	if (rc)
		return rc;
	if (cli->json) {
		json_t *list = json_array();

		for (size_t i = 0; i < count; i++)
			json_array_append_new(list, info_to_json(&chain[i]));
		cli_print_json(json_pack("{s:o}", "chain", list));
	} else
		for (size_t i = 0; i < count; i++)
			print_info(&chain[i]);
	cow_info_free(chain, count);
	return 0;
}

/* --- check --- */

static json_t *check_to_json(const struct cow_check *c)
{
	return json_pack("{s:I, s:I, s:I, s:s}", "allocated_clusters", (json_int_t)c->allocated_clusters, "leaks",
			 (json_int_t)c->leaks, "corruptions", (json_int_t)c->corruptions, "first", c->first);
}

static void print_check(const char *when, const struct cow_check *c)
{
	printf("%s%" PRIu64 " clusters in use, %" PRIu64 " leaked, %" PRIu64 " corrupt%s%s\n", when,
	       c->allocated_clusters, c->leaks, c->corruptions, c->first[0] ? ": " : "", c->first);
}

static int ask_second(struct cli *cli, const struct source *source, json_t *answer, bool *ok, struct err *err)
{
	struct cow_second_opinion second;
	int rc = cow_second_opinion(source->path, source->format, &second, err);

	if (rc)
		return rc;
	*ok &= second.different_bytes == 0;
	json_object_set_new(answer, "second_opinion",
			    json_pack("{s:I, s:I, s:I}", "compared_bytes", (json_int_t)second.compared_bytes,
				      "skipped_bytes", (json_int_t)second.skipped_bytes, "different_bytes",
				      (json_int_t)second.different_bytes));
	if (!cli->json)
		printf("libqcow: %" PRIu64 " bytes compared, %" PRIu64 " not (it misreads such), %" PRIu64 " differ\n",
		       second.compared_bytes, second.skipped_bytes, second.different_bytes);
	return 0;
}

/* Each file of the chain; the counts of one say nothing about another. */
static int check_chain(struct cli *cli, const struct source *source, json_t *images, bool *ok, struct err *err)
{
	struct cow_info *chain;
	size_t count;
	int rc = cow_info(source->path, source->format, &chain, &count, err);

	if (rc)
		return rc;
	for (size_t i = 0; !rc && i < count; i++) {
		struct cow_check c = {0};

		if (chain[i].format == COW_FORMAT_QCOW2)
			rc = cow_check(chain[i].path, &c, err);
		if (rc)
			break;
		*ok &= c.corruptions == 0;
		json_t *one = check_to_json(&c);
		json_object_set_new(one, "path", json_string(chain[i].path));
		json_array_append_new(images, one);
		if (cli->json)
			continue;
		printf("%s: ", chain[i].path);
		if (chain[i].format == COW_FORMAT_QCOW2)
			print_check("", &c);
		else
			printf("raw: nothing to check\n");
	}
	cow_info_free(chain, count);
	return rc;
}

static int repair(struct cli *cli, const struct source *source, json_t *answer, struct err *err)
{
	struct cow_check before, after;
	int rc = cow_repair(source->path, &before, &after, err);

	if (rc)
		return rc;
	json_object_set_new(answer, "before", check_to_json(&before));
	json_object_set_new(answer, "after", check_to_json(&after));
	if (!cli->json) {
		print_check("before: ", &before);
		print_check("after:  ", &after);
	}
	return 0;
}

static int run_check(struct cli *cli, const struct source *source, struct err *err)
{
	json_t *answer = json_object(), *images = json_array();
	bool ok = true;
	int rc = cli_given(cli, "repair") ? refuse_sealed(source, cli->arguments[1], err) : 0;

	if (!rc && cli_given(cli, "repair"))
		rc = repair(cli, source, answer, err);
	if (!rc)
		rc = check_chain(cli, source, images, &ok, err);
	if (!rc && cli_given(cli, "second-opinion"))
		rc = ask_second(cli, source, answer, &ok, err);
	json_object_set_new(answer, "images", images);
	json_object_set_new(answer, "ok", json_boolean(ok));
	if (!rc && cli->json)
		cli_print_json(json_incref(answer));
	json_decref(answer);
	if (rc || ok)
		return rc;
	if (err)
		err->class = ERR_DAMAGED; /* said already */
	return -EINVAL;
}

/* --- export, resize --- */

static void show_progress(void *opaque, uint64_t done, uint64_t total) { cli_progress_update(opaque, "copying", done, total); }

static int run_export(struct cli *cli, const struct source *source, struct err *err)
{
	CLEANUP_BUF struct buf password = BUF_INIT;
	const char *format = cli_value(cli, "format");
	struct cli_progress progress = cli_progress_begin(cli, "disk");
	struct cow_export e = {.source = source->path,
			       .source_is_raw = source->format == COW_FORMAT_RAW,
			       .path = cli->arguments[2],
			       .format = COW_FORMAT_QCOW2,
			       .cancel = &cli_interrupted,
			       .progress = progress.terminal ? show_progress : NULL,
			       .opaque = &progress};

	if (format && strcmp(format, "raw") && strcmp(format, "qcow2")) {
		err_set(err, ERR_USAGE, EINVAL, "--format: '%s' is none", format);
		return err_hint(err, "qcow2 or raw");
	}
	if (format && !strcmp(format, "raw"))
		e.format = COW_FORMAT_RAW;
	if (cli_value(cli, "key-file")) {
		int rc = cli_read_key_file("--key-file", cli_value(cli, "key-file"), false, &password, err);

		if (!rc)
			rc = buf_append(&password, NULL, 1, err);
		if (rc)
			return rc;
		e.password = (const char *)password.data;
	}
	cli_catch_interrupts();
	int rc = cow_export(&e, err);
	cli_progress_end(&progress);
	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s}", "path", e.path, "format", format_name(e.format)));
	return 0;
}

static int run_resize(struct cli *cli, const struct source *source, struct err *err)
{
	struct cow_io *io;
	struct cow_disk *disk;
	uint64_t size;

	if (!size_parse(cli->arguments[2], &size)) {
		err_set(err, ERR_USAGE, EINVAL, "resize: '%s' is no size", cli->arguments[2]);
		return err_hint(err, SIZE_HINT);
	}
	int rc = refuse_sealed(source, cli->arguments[1], err);
	if (rc)
		return rc;
	rc = cow_io_create(NULL, &io, err);
	if (rc)
		return rc;
	rc = cow_open(io, source->path, 0, &disk, err);
	if (!rc) {
		rc = cow_resize(disk, size, err);
		int closed = cow_close(disk, rc ? NULL : err);
		rc = rc ? rc : closed;
	}
	cow_io_destroy(io);
	if (!rc && cli->json)
		cli_print_json(json_pack("{s:s, s:I}", "path", source->path, "size_bytes", (json_int_t)size));
	return rc;
}

static const struct verb {
	const char *name;
	int arguments; /* with the verb */
	int (*run)(struct cli *cli, const struct source *source, struct err *err);
} verbs[] = {{"info", 2, run_info}, {"check", 2, run_check}, {"export", 3, run_export}, {"resize", 3, run_resize}};

static int run_disk(struct cli *cli, struct err *err)
{
	struct source source;

	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		if (strcmp(verbs[i].name, cli->arguments[0]))
			continue;
		if (cli->argument_count != verbs[i].arguments) {
			err_set(err, ERR_USAGE, EINVAL, "disk %s: %s", verbs[i].name,
				cli->argument_count < verbs[i].arguments ? "something is missing" : "a word too many");
			return err_hint(err, "usage: vmcp disk %s", cli->command->synopsis);
		}
		int rc = find_source(cli, cli->arguments[1], &source, err);
		if (!rc)
			rc = verbs[i].run(cli, &source, err);
		if (rc == -EBUSY && source.running[0]) {
			err->hint[0] = '\0'; /* here it is known who holds it */
			err_hint(err, "VM %s runs on it: stop it, or take a checkpoint and name that one's disk, as ID:DISK", source.running);
		}
		free(source.path);
		return rc;
	}
	return cli_unknown_verb(cli, err);
}

static const struct cli_option disk_options[] = {
	{"repair", 0, NULL, "check: make the reference counts right; what a table leads to is never lost"},
	{"second-opinion", 0, NULL, "check: let libqcow read it too, and compare"},
	{"format", 0, "FORMAT", "export: qcow2 (default) or raw", "qcow2|raw"},
	{"key-file", 0, "FILE", "export: the password of an image of old that is encrypted", "@file"},
	{0},
};

const struct cli_command cli_disk = {
	.name = "disk",
	.synopsis = "info SRC | check [--repair] [--second-opinion] SRC | export SRC FILE [--format FORMAT] "
		    "[--key-file FILE] | resize SRC SIZE",
	.summary = "look at, check, write out or enlarge a disk image",
	.help = "SRC is an image file, VM:DISK (its present state; the VM must not run) or CKPT:DISK.\n\n"
		"  vmcp disk info root.qcow2              the file and its backing chain\n"
		"  vmcp disk check web:root               each file of the chain; exit status 5 if one is damaged\n"
		"  vmcp disk export web~2:root old.qcow2  one file without a backing file\n"
		"  vmcp disk export old.qcow root.qcow2   an image of qcow version 1, or encrypted with AES\n"
		"  vmcp disk resize web:root 40G          disks only grow",
	.options = disk_options,
	.min_arguments = 1,
	.words = "info|check|export|resize @file|@disk @file",
	.max_arguments = 3,
	.json =
		"chain [path, format, size_bytes, file_bytes, occupied_bytes, backing, version?, cluster_bytes?, refcount_bits?, snapshots?, "
		"compression?, dirty?, corrupt?, bitmaps?] | images, ok, second_opinion? | before, after, images, ok | path, format | path, "
		"size_bytes",
	.run = run_disk,
};
