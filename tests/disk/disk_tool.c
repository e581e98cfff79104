/*
 * What the disk tests ask the engine to do, one command a run. Exit status as vmcp's: 0, or the class of the error,
 * whose text is on stderr.
 *
 *     disk_tool read IMAGE RAW         the whole disk, through the chain, into a raw file
 *     disk_tool open IMAGE [rw]        opens and closes
 *     disk_tool hold IMAGE [ro]        opens, says "held", waits for the end of stdin
 *     disk_tool create IMAGE BYTES CLUSTER [BACKING FORMAT]
 *     disk_tool write IMAGE OFFSET LENGTH
 *     disk_tool rotate IMAGE OVERLAY   as a checkpoint does: writes the disk's first and last sector, while the disk turns to the overlay, and again after it
 *     disk_tool check IMAGE            prints "allocated N leaks N corruptions N: FIRST"
 *     disk_tool pattern RAW BYTES SEED
 *     disk_tool repair IMAGE           prints "before N leaks N corruptions after N leaks N corruptions"
 *     disk_tool resize IMAGE BYTES
 *     disk_tool info IMAGE             the chain, a line each
 *     disk_tool opinion IMAGE          prints "compared N skipped N different N"
 *     disk_tool merge IMAGE LAYERS [BYTES_PER_SECOND]
 *     disk_tool export IMAGE FILE qcow2|raw [CLUSTER]
 *     disk_tool stress IMAGE key=value...
 *     disk_tool verify JOURNAL RAW
 *     disk_tool poke IMAGE SEED        reads, writes, discards at random and reports errors only: for damaged images
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "cowdisk/check.h"
#include "cowdisk/info.h"
#include "cowdisk/io_internal.h"
#include "cowdisk/merge.h"
#include "cowdisk/overlay.h"
#include "tests/disk/stress.h"

static int report(const struct err *err)
{
	fprintf(stderr, "disk_tool: %s\n", err->message);
	if (err->hint[0])
		fprintf(stderr, "hint: %s\n", err->hint);
	return err->number ? (int)err->class : ERR_FAILED;
}

static int with_disk(const char *path, unsigned flags, int (*fn)(struct cow_disk *, char **, struct err *), char **args)
{
	struct err err = ERR_INIT;
	struct cow_io *io;
	struct cow_disk *disk;
	if (cow_io_create(NULL, &io, &err) < 0)
		return report(&err);
	int rc = cow_open(io, path, flags, &disk, &err);
	if (rc == 0) {
		rc = fn ? fn(disk, args, &err) : 0;
		int closed = cow_close(disk, rc < 0 ? NULL : &err);
		rc = rc < 0 ? rc : closed;
	}
	cow_io_destroy(io);
	return rc < 0 ? report(&err) : 0;
}

static int copy_out(struct cow_disk *disk, char **args, struct err *err)
{
	size_t step = 1 << 20;
	CLEANUP_FREE uint8_t *data = malloc(step);
	CLEANUP_CLOSE int fd = open(args[0], O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || ftruncate(fd, (off_t)cow_size(disk)) < 0)
		return err_sys(err, EIO, "%s", args[0]);
	int rc = 0;
	for (uint64_t at = 0; rc == 0 && at < cow_size(disk); at += step) {
		size_t n = (size_t)min_u64(step, cow_size(disk) - at);
		rc = cow_read_sync(disk, at, data, n, err);
		if (rc == 0)
			rc = file_pwrite_full(fd, data, n, at, err);
	}
	return rc;
}

static int hold(struct cow_disk *disk, char **args, struct err *err)
{
	char c;
	(void)disk, (void)args, (void)err;
	printf("held\n");
	fflush(stdout);
	while (read(0, &c, 1) > 0)
		;
	return 0;
}

static int write_range(struct cow_disk *disk, char **args, struct err *err)
{
	uint64_t offset = strtoull(args[0], NULL, 0), length = strtoull(args[1], NULL, 0);
	CLEANUP_FREE uint8_t *data = malloc(length);
	memset(data, 0x5a, length);
	int rc = cow_write_sync(disk, offset, data, length, err);
	return rc ? rc : cow_flush_sync(disk, err);
}

static int write_ends(struct cow_disk *disk, uint8_t byte, struct err *err)
{
	uint8_t data[COW_SECTOR_BYTES];
	uint64_t size = cow_size(disk);
	memset(data, byte, sizeof(data));
	int rc = size ? cow_write_sync(disk, 0, data, sizeof(data), err) : 0;
	if (rc == 0 && size)
		rc = cow_write_sync(disk, size - sizeof(data), data, sizeof(data), err);
	if (rc == 0 && cow_read_sync(disk, size, data, sizeof(data), NULL) != -EINVAL)
		rc = err_set(err, ERR_FAILED, EINVAL, "a sector was read beyond the end");
	return rc;
}

static int rotate(struct cow_disk *disk, char **args, struct err *err)
{
	struct cow_overlay *overlay;
	int rc = cow_overlay_prepare(disk, args[0], cow_path(disk), &overlay, err);
	if (rc < 0)
		return rc;
	rc = write_ends(disk, 0x11, err);
	cow_overlay_switch(overlay);
	if (rc == 0)
		rc = write_ends(disk, 0x22, err);
	int sealed = cow_overlay_seal(overlay, NULL, rc < 0 ? NULL : err);
	rc = rc < 0 ? rc : sealed;
	return rc < 0 ? rc : cow_flush_sync(disk, err);
}

static void ignore_done(struct cow_request *request, int result)
{
	(void)result;
	*(bool *)request->opaque = true;
}

/* Everything may fail, nothing may crash, hang or grow without bound. */
static int poke(struct cow_disk *disk, char **args, struct err *err)
{
	uint64_t seed = strtoull(args[0], NULL, 0) * 2654435761u + 1, size = cow_size(disk);
	static uint8_t data[256 << 10];
	(void)err;
	if (size == 0)
		return 0;
	for (int n = 0; n < 60; n++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		bool done = false;
		struct iovec iov = {data, 0};
		struct cow_request r = {.op = (enum cow_op)(seed >> 60) % 5, .done = ignore_done, .opaque = &done};
		if (r.op == COW_READ && cow_is_readonly(disk) == false && n % 2)
			r.op = COW_WRITE;
		r.offset = round_down((seed >> 8) % size, 512);
		if (n % 8 == 0)
			r.offset = round_down(size - 1, 512);
		r.length = min_u64(round_down((seed >> 20) % sizeof(data), 512) + 512, size - r.offset);
		iov.iov_len = (size_t)r.length;
		r.iov = &iov;
		r.iov_count = 1;
		cow_submit(disk, &r);
		while (!done)
			cow_io_drive(cow_disk_io(disk), -1);
	}
	return 0;
}

static int check_image(const char *path)
{
	struct err err = ERR_INIT;
	struct cow_check c;
	if (cow_check(path, &c, &err) < 0)
		return report(&err);
	printf("allocated %llu leaks %llu corruptions %llu: %s\n", (unsigned long long)c.allocated_clusters,
	       (unsigned long long)c.leaks, (unsigned long long)c.corruptions, c.first);
	return c.corruptions ? ERR_DAMAGED : 0;
}

static int repair_image(const char *path)
{
	struct err err = ERR_INIT;
	struct cow_check before, after;
	if (cow_repair(path, &before, &after, &err) < 0)
		return report(&err);
	printf("before %llu leaks %llu corruptions after %llu leaks %llu corruptions %s\n",
	       (unsigned long long)before.leaks, (unsigned long long)before.corruptions,
	       (unsigned long long)after.leaks, (unsigned long long)after.corruptions, after.first);
	return after.corruptions ? ERR_DAMAGED : 0;
}

static int resize(struct cow_disk *disk, char **args, struct err *err)
{
	return cow_resize(disk, strtoull(args[0], NULL, 0), err);
}

static int info(const char *path)
{
	struct err err = ERR_INIT;
	struct cow_info *chain;
	size_t count;
	if (cow_info(path, -1, &chain, &count, &err) < 0)
		return report(&err);
	for (size_t i = 0; i < count; i++)
		printf("%s %s size %llu cluster %u version %u refcount_bits %u snapshots %u backing %s\n", chain[i].path,
		       chain[i].format == COW_FORMAT_RAW ? "raw" : "qcow2", (unsigned long long)chain[i].size_bytes,
		       chain[i].cluster_bytes, chain[i].version, chain[i].refcount_bits, chain[i].snapshots,
		       chain[i].backing ? chain[i].backing : "-");
	cow_info_free(chain, count);
	return 0;
}

static int opinion(const char *path)
{
	struct err err = ERR_INIT;
	struct cow_second_opinion o;
	if (cow_second_opinion(path, -1, &o, &err) < 0)
		return report(&err);
	printf("compared %llu skipped %llu different %llu\n", (unsigned long long)o.compared_bytes,
	       (unsigned long long)o.skipped_bytes, (unsigned long long)o.different_bytes);
	return o.different_bytes ? ERR_DAMAGED : 0;
}

static int create(char **args, int count)
{
	struct err err = ERR_INIT;
	struct cow_create c = {.size_bytes = strtoull(args[1], NULL, 0)};
	c.cluster_bytes = (uint32_t)strtoul(args[2], NULL, 0);
	if (count > 3) {
		c.backing = args[3];
		c.backing_format = strcmp(args[4], "raw") == 0 ? COW_FORMAT_RAW : COW_FORMAT_QCOW2;
	}
	return cow_create(args[0], &c, &err) < 0 ? report(&err) : 0;
}

static void show_progress(void *opaque, uint64_t done, uint64_t total)
{
	(void)opaque;
	printf("%llu of %llu\n", (unsigned long long)done, (unsigned long long)total);
}

static int merge(const char *image, char **args, int count)
{
	struct err err = ERR_INIT;
	struct cow_merged *merged;
	struct cow_merge m = {.path = image, .layers = (unsigned)strtoul(args[0], NULL, 0), .progress = show_progress};
	if (count > 1)
		m.bytes_per_second = strtoull(args[1], NULL, 0);
	int rc = cow_merge_prepare(&m, &merged, &err);
	if (rc < 0)
		return report(&err);
	rc = cow_merge_commit(merged, &err);
	printf("data %llu\n", (unsigned long long)cow_merged_data_bytes(merged));
	cow_merge_free(merged);
	return rc < 0 ? report(&err) : 0;
}

static int export_image(const char *image, char **args, int count)
{
	struct err err = ERR_INIT;
	struct cow_export e = {.source = image, .path = args[0], .format = COW_FORMAT_QCOW2, .progress = show_progress};
	if (strcmp(args[1], "raw") == 0)
		e.format = COW_FORMAT_RAW;
	if (count > 2)
		e.cluster_bytes = (uint32_t)strtoul(args[2], NULL, 0);
	return cow_export(&e, &err) < 0 ? report(&err) : 0;
}

static int stress(const char *image, char **args, int count)
{
	struct stress s = {.image = image, .operations = 2000, .depth = 16, .max_sectors = 1024, .flush_every = 40};
	for (int i = 0; i < count; i++) {
		char *value = strchr(args[i], '=');
		if (!value)
			return 2;
		*value++ = 0;
		const struct {
			const char *key;
			const char **text;
			unsigned *number;
			bool *flag;
		} keys[] = {
			{"initial", &s.initial, NULL, NULL},	     {"journal", &s.journal, NULL, NULL},
			{"expect", &s.expect, NULL, NULL},	     {"layers", &s.layers, NULL, NULL},
			{"operations", NULL, &s.operations, NULL},   {"depth", NULL, &s.depth, NULL},
			{"switch", NULL, &s.switch_every, NULL},     {"flush", NULL, &s.flush_every, NULL},
			{"merge", NULL, &s.merge_every, NULL},	     {"max_sectors", NULL, &s.max_sectors, NULL}, {"threads", NULL, NULL, &s.threads},
			{"tolerate", NULL, NULL, &s.tolerate},	     {"no_discard", NULL, NULL, &s.no_discard},
		};
		for (size_t k = 0; k < ARRAY_LENGTH(keys); k++) {
			if (strcmp(keys[k].key, args[i]) != 0)
				continue;
			if (keys[k].text)
				*keys[k].text = value;
			if (keys[k].number)
				*keys[k].number = (unsigned)strtoul(value, NULL, 0);
			if (keys[k].flag)
				*keys[k].flag = value[0] == '1';
		}
		if (strcmp(args[i], "seed") == 0)
			s.seed = strtoull(value, NULL, 0);
	}
	return stress_run(&s);
}

int main(int argc, char **argv)
{
	struct err err = ERR_INIT;
	if (argc < 3)
		return ERR_USAGE;
	if (fault_init(&err) < 0)
		return report(&err);
	const char *command = argv[1];
	char **args = argv + 3;
	int count = argc - 3;
	if (strcmp(command, "read") == 0 && count == 1)
		return with_disk(argv[2], COW_OPEN_READONLY, copy_out, args);
	if (strcmp(command, "open") == 0)
		return with_disk(argv[2], count ? 0 : COW_OPEN_READONLY, NULL, args);
	if (strcmp(command, "hold") == 0)
		return with_disk(argv[2], count ? COW_OPEN_READONLY : 0, hold, args);
	if (strcmp(command, "write") == 0 && count == 2)
		return with_disk(argv[2], 0, write_range, args);
	if (strcmp(command, "poke") == 0 && count == 1) {
		log_set_level(LOG_LEVEL_ERROR);
		int rc = with_disk(argv[2], COW_OPEN_READONLY, poke, args);
		return rc ? rc : with_disk(argv[2], 0, poke, args);
	}
	if (strcmp(command, "create") == 0 && (count == 2 || count == 4))
		return create(argv + 2, argc - 2);
	if (strcmp(command, "rotate") == 0 && count == 1)
		return with_disk(argv[2], 0, rotate, args);
	if (strcmp(command, "check") == 0)
		return check_image(argv[2]);
	if (strcmp(command, "pattern") == 0 && count == 2)
		return stress_pattern(argv[2], strtoull(args[0], NULL, 0), strtoull(args[1], NULL, 0));
	if (strcmp(command, "repair") == 0)
		return repair_image(argv[2]);
	if (strcmp(command, "opinion") == 0)
		return opinion(argv[2]);
	if (strcmp(command, "resize") == 0 && count == 1)
		return with_disk(argv[2], 0, resize, args);
	if (strcmp(command, "info") == 0)
		return info(argv[2]);
	if (strcmp(command, "merge") == 0 && (count == 1 || count == 2))
		return merge(argv[2], args, count);
	if (strcmp(command, "export") == 0 && (count == 2 || count == 3))
		return export_image(argv[2], args, count);
	if (strcmp(command, "stress") == 0)
		return stress(argv[2], args, count);
	if (strcmp(command, "verify") == 0 && count == 1)
		return stress_verify(argv[2], args[0]);
	return ERR_USAGE;
}
