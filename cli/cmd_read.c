/* diff and dump: what is read out of checkpoints. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "checkpoint/store/diff.h"
#include "checkpoint/store/dump.h"
#include "cli/cli.h"
#include "cli/diff_files.h"
#include "cowdisk/compare.h"

#define SHOWN_RANGES 10u /* --json has all */

/* The progress line, and what it is about. */
struct watched {
	struct cli_progress progress;
	char phase[STORE_NAME_BYTES + 8];
};

static struct watched watch(const struct cli *cli)
{
	cli_catch_interrupts();
	return (struct watched){.progress = cli_progress_begin(cli, cli->command->name)};
}

static void show_progress(void *opaque, uint64_t done, uint64_t total)
{
	struct watched *watched = opaque;

	cli_progress_update(&watched->progress, watched->phase, done, total);
}

/* --- diff --- */

struct disk_diff {
	const char *name, *state; /* "same", "differs", "only in A", "only in B" */
	struct cow_compare compare;
	struct diff_range *ranges; /* malloc */
	size_t count, capacity;
	struct file_diff files;
};

struct diff {
	struct watched watched;
	bool files; /* look at those too */
	struct store_checkpoint sides[2];
	struct memory_diff memory;
	struct disk_diff *disks; /* malloc */
	size_t disk_count;
};

static void diff_free(struct diff *diff)
{
	for (size_t i = 0; i < diff->disk_count; i++)
		free(diff->disks[i].ranges), file_diff_free(&diff->disks[i].files);
	free(diff->disks);
	free(diff->memory.ranges);
	store_checkpoint_free(&diff->sides[0]);
	store_checkpoint_free(&diff->sides[1]);
}

/* While disks are compared, `opaque` is the diff and its last disk is the one. */
static void add_range(void *opaque, uint64_t offset, uint64_t length)
{
	struct diff *diff = opaque;
	struct disk_diff *disk = &diff->disks[diff->disk_count - 1];

	if (disk->count == disk->capacity) {
		disk->capacity = disk->capacity ? disk->capacity * 2 : 16;
		struct diff_range *grown = xcalloc(disk->capacity, sizeof(*grown));

		if (disk->count)
			memcpy(grown, disk->ranges, disk->count * sizeof(*grown));
		free(disk->ranges);
		disk->ranges = grown;
	}
	disk->ranges[disk->count++] = (struct diff_range){offset, length};
}

static void show_disk_progress(void *opaque, uint64_t done, uint64_t total)
{
	struct diff *diff = opaque;

	show_progress(&diff->watched, done, total);
}

/* True if the disk's ranges, in ascending order, have something of it. */
static int differs_there(void *opaque, uint64_t offset, uint64_t length)
{
	const struct disk_diff *disk = opaque;
	size_t low = 0, high = disk->count;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (disk->ranges[middle].start + disk->ranges[middle].bytes <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low < disk->count && disk->ranges[low].start < offset + length;
}

static int diff_layers(struct store *store, struct diff *diff, struct disk_diff *disk, const struct store_disk_layer *layers[2], struct err *err)
{
	char *paths[2] = {NULL, NULL};
	int rc = 0;

	snprintf(diff->watched.phase, sizeof(diff->watched.phase), "disk %s", disk->name);
	disk->compare = (struct cow_compare){.differs = add_range, .progress = show_disk_progress, .opaque = diff, .cancel = &cli_interrupted};
	for (unsigned i = 0; i < 2 && !rc; i++) {
		rc = store_disk_layer_path(store, layers[i]->layer, layers[i]->format, &paths[i], err);
		disk->compare.paths[i] = paths[i];
		disk->compare.formats[i] = store_disk_layer_format(layers[i]);
	}
	if (!rc)
		rc = cow_compare(&disk->compare, err);
	disk->files = (struct file_diff){.paths = {paths[0], paths[1]},
					 .formats = {disk->compare.formats[0], disk->compare.formats[1]},
					 .differs = differs_there, .opaque = disk};
	if (!rc && diff->files && disk->compare.differing_bytes) {
		rc = diff_files(&disk->files, err);
		if (rc)
			err_prefix(err, "disk %s", disk->name);
	}
	disk->files.paths[0] = disk->files.paths[1] = NULL;
	disk->compare.paths[0] = disk->compare.paths[1] = NULL;
	disk->state = disk->compare.differing_bytes ? "differs" : "same";
	free(paths[0]);
	free(paths[1]);
	return rc;
}

static const struct store_disk_layer *find_disk(const struct store_checkpoint *c, const char *name)
{
	for (uint32_t i = 0; i < c->disk_count; i++)
		if (!strcmp(c->disks[i].disk, name))
			return &c->disks[i];
	return NULL;
}

static int diff_disk(struct store *store, struct diff *diff, const char *name, struct err *err)
{
	const struct store_disk_layer *layers[2] = {find_disk(&diff->sides[0], name), find_disk(&diff->sides[1], name)};
	struct disk_diff *disk = &diff->disks[diff->disk_count++];

	*disk = (struct disk_diff){.name = name, .state = "same"};
	if (!layers[0] || !layers[1])
		disk->state = layers[0] ? "only in A" : "only in B";
	else if (strcmp(layers[0]->layer, layers[1]->layer))
		return diff_layers(store, diff, disk, layers, err);
	return 0;
}

static int diff_disks(struct store *store, struct diff *diff, struct err *err)
{
	int rc = 0;

	diff->disks = xcalloc(diff->sides[0].disk_count + diff->sides[1].disk_count + 1, sizeof(*diff->disks));
	for (uint32_t i = 0; i < diff->sides[0].disk_count && !rc; i++)
		rc = diff_disk(store, diff, diff->sides[0].disks[i].disk, err);
	for (uint32_t i = 0; i < diff->sides[1].disk_count && !rc; i++)
		if (!find_disk(&diff->sides[0], diff->sides[1].disks[i].disk))
			rc = diff_disk(store, diff, diff->sides[1].disks[i].disk, err);
	return rc;
}

bool cli_is_of_qemu(const struct store_checkpoint *checkpoint)
{
	return checkpoint->config_text && strstr(checkpoint->config_text, "\nmade_by = qemu\n");
}

/* What QEMU saved is a stream of its own, no pages at their places. */
static int refuse_qemu(const struct store_checkpoint *checkpoint, const char *what, const char *hint, struct err *err)
{
	if (!cli_is_of_qemu(checkpoint))
		return 0;
	err_set(err, ERR_STATE, ENOTSUP, "%s: checkpoint %.8s is of a domain that QEMU runs, and its memory is a stream that only QEMU reads", what, checkpoint->id);
	return err_hint(err, "%s", hint);
}

static int diff_held(struct store *store, const char *a, const char *b, struct diff *diff, struct err *err)
{
	int rc = store_checkpoint_get(store, a, &diff->sides[0], err);

	if (!rc)
		rc = store_checkpoint_get(store, b, &diff->sides[1], err);
	for (unsigned i = 0; i < 2 && !rc; i++)
		rc = refuse_qemu(&diff->sides[i], "diff", "its disks can be compared: `vmcp disk export CKPT:DISK FILE` of both, then `qemu-img compare`", err);
	if (rc)
		return rc;
	diff->memory = (struct memory_diff){.cancel = &cli_interrupted, .progress = show_progress, .opaque = &diff->watched};
	snprintf(diff->watched.phase, sizeof(diff->watched.phase), "memory");
	rc = store_diff_memory(store, a, b, &diff->memory, err);
	return rc ? rc : diff_disks(store, diff, err);
}

static json_t *ranges_to_json(const char *key, const struct diff_range *ranges, size_t count)
{
	json_t *list = json_array();

	for (size_t i = 0; i < count; i++)
		json_array_append_new(list, json_pack("{s:I, s:I}", key, (json_int_t)ranges[i].start, "length_bytes", (json_int_t)ranges[i].bytes));
	return list;
}

/* A name need be no UTF-8; what is none becomes '?'. */
static json_t *path_to_json(const char *path)
{
	json_t *text = json_string(path);

	if (text)
		return text;
	char *copy = xstrdup(path);
	for (char *c = copy; *c; c++)
		if ((unsigned char)*c >= 0x80)
			*c = '?';
	text = json_string(copy);
	free(copy);
	return text;
}

static json_t *files_to_json(const struct disk_diff *disk)
{
	json_t *list = json_array();

	for (size_t i = 0; i < disk->files.count; i++)
		json_array_append_new(list, json_pack("{s:o, s:s, s:I}", "path", path_to_json(disk->files.changes[i].path), "change",
						      disk->files.changes[i].change, "size_bytes", (json_int_t)disk->files.changes[i].size_bytes));
	return list;
}

static json_t *diff_to_json(const struct diff *diff)
{
	const struct memory_diff *memory = &diff->memory;
	json_t *disks = json_array();

	for (size_t i = 0; i < diff->disk_count; i++) {
		const struct disk_diff *disk = &diff->disks[i];

		json_array_append_new(disks, json_pack("{s:s, s:s, s:I, s:I, s:o, s:o*}", "name", disk->name, "state", disk->state, "differing_bytes",
						       (json_int_t)disk->compare.differing_bytes, "compared_bytes",
						       (json_int_t)disk->compare.read_bytes, "ranges",
						       ranges_to_json("offset_bytes", disk->ranges, disk->count), "files",
						       diff->files ? files_to_json(disk) : NULL));
	}
	return json_pack("{s:s, s:s, s:{s:I, s:I, s:I, s:I, s:o}, s:o}", "a", diff->sides[0].id, "b", diff->sides[1].id, "memory", "total_pages",
			 (json_int_t)memory->total_pages[1], "differing_pages", (json_int_t)memory->differing_pages, "differing_bytes",
			 (json_int_t)memory->differing_pages * PAGE_BYTES, "compared_pages", (json_int_t)memory->compared_pages, "ranges",
			 ranges_to_json("gpa", memory->ranges, memory->range_count), "disks", disks);
}

static void print_ranges(const struct diff_range *ranges, size_t count)
{
	for (size_t i = 0; i < count && i < SHOWN_RANGES; i++) {
		char size[16];

		cli_format_size(size, ranges[i].bytes);
		printf("    0x%012llx  %6s\n", (unsigned long long)ranges[i].start, size);
	}
	if (count > SHOWN_RANGES)
		printf("    and %zu more\n", count - SHOWN_RANGES);
}

static void print_files(const struct diff *diff, const struct disk_diff *disk)
{
	if (diff->files && disk->compare.differing_bytes && disk->files.filesystems == 0)
		printf("    no ext2, ext3 or ext4 filesystem on it\n");
	for (size_t i = 0; i < disk->files.count; i++) {
		const struct file_change *change = &disk->files.changes[i];
		char size[16];

		cli_format_size(size, change->size_bytes);
		printf("    %-8s %6s  %s\n", change->change, size, change->path);
	}
}

static void print_diff(const struct diff *diff)
{
	const struct memory_diff *memory = &diff->memory;
	char size[16];

	cli_format_size(size, memory->differing_pages * PAGE_BYTES);
	printf("memory  %llu of %llu pages differ (%s)\n", (unsigned long long)memory->differing_pages,
	       (unsigned long long)memory->total_pages[1], size);
	print_ranges(memory->ranges, memory->range_count);
	for (size_t i = 0; i < diff->disk_count; i++) {
		const struct disk_diff *disk = &diff->disks[i];

		cli_format_size(size, disk->compare.differing_bytes);
		printf("disk %s  %s%s%s\n", disk->name, disk->state, disk->compare.differing_bytes ? ": " : "",
		       disk->compare.differing_bytes ? size : "");
		print_ranges(disk->ranges, disk->count);
		print_files(diff, disk);
	}
}

/* Both are held from before they are read to the end, so that no layer of theirs goes or changes. */
static int diff_named(struct cli *cli, struct store *store, struct diff *diff, struct err *err)
{
	char ids[2][STORE_ID_BYTES];
	struct store_pin *pins[2] = {NULL, NULL};
	int rc = 0;

	for (unsigned i = 0; i < 2 && !rc; i++) {
		rc = store_resolve(store, cli->arguments[i], ids[i], err);
		if (!rc)
			rc = store_pin(store, ids[i], &pins[i], err);
	}
	if (!rc)
		rc = diff_held(store, ids[0], ids[1], diff, err);
	store_unpin(pins[0]);
	store_unpin(pins[1]);
	return rc;
}

static int run_diff(struct cli *cli, struct err *err)
{
	struct diff diff = {.watched = watch(cli), .files = cli_given(cli, "files")};
	struct store *store;
	int rc = cli_open_store_with_key(cli, false, &store, err);

	if (rc)
		return rc;
	cli_allow_many_files();
	rc = diff_named(cli, store, &diff, err);
	store_close(store);
	cli_progress_end(&diff.watched.progress);
	if (!rc && cli->json)
		cli_print_json(diff_to_json(&diff));
	else if (!rc)
		print_diff(&diff);
	diff_free(&diff);
	return rc;
}

/* --- dump --- */

static int run_dump(struct cli *cli, struct err *err)
{
	struct watched watched = watch(cli);
	struct dump dump = {.path = cli->arguments[1], .cancel = &cli_interrupted, .progress = show_progress, .opaque = &watched};
	struct store_checkpoint checkpoint;
	char id[STORE_ID_BYTES], size[16];
	struct store *store;

	if (!strcmp(dump.path, "-")) {
		err_set(err, ERR_USAGE, EINVAL, "dump: '-': a core file has holes, and is written in no order: it cannot go through a pipe");
		return err_hint(err, "name a file");
	}
	snprintf(watched.phase, sizeof(watched.phase), "memory");
	int rc = cli_open_store_with_key(cli, false, &store, err);
	if (rc)
		return rc;
	cli_allow_many_files();
	rc = store_resolve(store, cli->arguments[0], id, err);
	if (!rc)
		rc = store_checkpoint_get(store, id, &checkpoint, err);
	if (!rc) {
		rc = refuse_qemu(&checkpoint, "dump", "take the domain back to it, then `virsh dump --memory-only DOMAIN FILE`", err);
		store_checkpoint_free(&checkpoint);
	}
	if (!rc)
		rc = store_dump(store, id, &dump, err);
	store_close(store);
	cli_progress_end(&watched.progress);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(json_pack("{s:s, s:s, s:i, s:I, s:I}", "id", id, "path", dump.path, "cpus", (int)dump.cpus, "memory_bytes",
					 (json_int_t)dump.memory_bytes, "written_bytes", (json_int_t)dump.written_bytes));
	} else if (!cli->quiet) {
		cli_format_size(size, dump.written_bytes);
		fprintf(stderr, "vmcp: %u vCPU%s, %s of memory that is not zero\n", dump.cpus, dump.cpus == 1 ? "" : "s", size);
	}
	return 0;
}

static const struct cli_option none[] = {{0}};

static const struct cli_option diff_options[] = {
	{"files", 0, NULL, "also which files of ext2, ext3 and ext4 filesystems on the disks changed"},
	{0},
};

const struct cli_command cli_diff = {
	.name = "diff",
	.synopsis = "A B [--files]",
	.summary = "which memory pages and disk ranges of two checkpoints differ",
	.help = "A and B are checkpoints, of one VM or of two. Memory is told in guest-physical addresses, disks in offsets.\n"
		"What both have from one layer is equal without being read. --json lists all ranges.\n\n"
		"--files reads the filesystems as a mount would find them, with what their journals hold.\n\n"
		"Examples:\n"
		"    vmcp diff web~1 web\n"
		"    vmcp diff before-upgrade web --files",
	.options = diff_options,
	.min_arguments = 2,
	.words = "@ckpt",
	.max_arguments = 2,
	.json =
		"a, b, memory {total_pages, differing_pages, differing_bytes, compared_pages, ranges [gpa, length_bytes]}, disks [name, state, "
		"differing_bytes, compared_bytes, ranges [offset_bytes, length_bytes], files? [path, change, size_bytes]]",
	.run = run_diff,
};
const struct cli_command cli_dump = {
	.name = "dump",
	.synopsis = "CKPT FILE",
	.summary = "a checkpoint's memory and registers as an ELF core file, for gdb and crash",
	.help = "Addresses are guest-physical. vCPU N is gdb's thread N + 1. Zero pages are holes of the file, which is replaced as a whole\n"
		"or not at all.\n\n"
		"Example:\n"
		"    vmcp dump web core.elf && gdb -batch -ex 'info threads' -ex 'info registers' vmlinux core.elf",
	.options = none,
	.min_arguments = 2,
	.words = "@ckpt @file",
	.max_arguments = 2,
	.json = "id, path, cpus, memory_bytes, written_bytes",
	.run = run_dump,
};
