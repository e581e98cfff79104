#include "cli/diff_files.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "cowdisk/block.h"

void file_diff_free(struct file_diff *diff)
{
	for (size_t i = 0; i < diff->count; i++)
		free(diff->changes[i].path);
	free(diff->changes);
	diff->changes = NULL;
	diff->count = 0;
}

#ifndef VMCP_HAVE_EXT2FS

int diff_files(struct file_diff *diff, struct err *err)
{
	(void)diff;
	err_set(err, ERR_HOST, ENOSYS, "--files: this vmcp was built without libext2fs");
	return err_hint(err, "install libext2fs-dev and build it again");
}

#else

#include "cli/ext4_view.h"

struct listed {
	char *path;
	uint32_t inode;
	uint64_t size_bytes, print;
};

struct listing {
	struct cow_disk *disk;
	struct ext4_place places[EXT4_MAX_PLACES];
	unsigned place_count;
	struct ext4_view *view;
	struct listed *list; /* of the filesystem at hand */
	size_t count, capacity;
};

static void forget_list(struct listing *l)
{
	for (size_t i = 0; i < l->count; i++)
		free(l->list[i].path);
	free(l->list);
	l->list = NULL;
	l->count = l->capacity = 0;
	ext4_close(l->view);
	l->view = NULL;
}

static int add_listed(void *opaque, const struct ext4_file *file)
{
	struct listing *l = opaque;

	if (l->count == l->capacity) {
		struct listed *grown = realloc(l->list, (l->capacity = l->capacity * 2 + 256) * sizeof(*grown));

		if (!grown)
			abort(); /* as xcalloc: a small object */
		l->list = grown;
	}
	l->list[l->count++] = (struct listed){xstrdup(file->path), file->inode, file->size_bytes, file->print};
	return 0;
}

static int by_path(const void *a, const void *b) { return strcmp(((const struct listed *)a)->path, ((const struct listed *)b)->path); }

/* place NULL: there is no such filesystem on this side, and the list is empty. */
static int read_list(struct listing *l, const struct ext4_place *place, struct err *err)
{
	int rc = place ? ext4_open(l->disk, place->offset_bytes, &l->view, err) : 0;

	if (!rc && place)
		rc = ext4_walk(l->view, add_listed, l, err);
	if (!rc && l->count)
		qsort(l->list, l->count, sizeof(*l->list), by_path);
	return rc;
}

static void add_change(struct file_diff *diff, unsigned partition, const struct listed *file, const char *change)
{
	struct file_change *grown = realloc(diff->changes, (diff->count + 1) * sizeof(*grown));

	if (!grown)
		abort();
	diff->changes = grown;
	grown[diff->count++] = (struct file_change){
		.path = partition ? xasprintf("p%u:%s", partition, file->path) : xstrdup(file->path), .change = change, .size_bytes = file->size_bytes};
}

static bool touches(void *opaque, uint64_t offset, uint64_t length)
{
	struct file_diff *diff = opaque;

	return diff->differs(diff->opaque, offset, length) != 0;
}

static void compare_lists(struct file_diff *diff, unsigned partition, struct listing sides[2])
{
	size_t i = 0, j = 0;

	while (i < sides[0].count || j < sides[1].count) {
		int order = i == sides[0].count ? 1 : j == sides[1].count ? -1 : strcmp(sides[0].list[i].path, sides[1].list[j].path);

		if (order < 0)
			add_change(diff, partition, &sides[0].list[i], "removed");
		else if (order > 0)
			add_change(diff, partition, &sides[1].list[j], "added");
		else if (sides[0].list[i].print != sides[1].list[j].print ||
			 ext4_any_block(sides[1].view, sides[1].list[j].inode, touches, diff))
			add_change(diff, partition, &sides[1].list[j], "changed");
		i += order <= 0;
		j += order >= 0;
	}
}

static const struct ext4_place *find_place(const struct listing *l, const struct ext4_place *like)
{
	for (unsigned i = 0; i < l->place_count; i++)
		if (l->places[i].partition == like->partition && l->places[i].offset_bytes == like->offset_bytes)
			return &l->places[i];
	return NULL;
}

static int compare_place(struct file_diff *diff, struct listing sides[2], const struct ext4_place *a, const struct ext4_place *b, struct err *err)
{
	unsigned partition = a ? a->partition : b->partition;
	int rc = read_list(&sides[0], a, err);

	if (!rc)
		rc = read_list(&sides[1], b, err);
	if (!rc)
		compare_lists(diff, partition, sides);
	diff->filesystems++;
	forget_list(&sides[0]);
	forget_list(&sides[1]);
	return rc;
}

static int compare_places(struct file_diff *diff, struct listing sides[2], struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; i < sides[0].place_count && !rc; i++)
		rc = compare_place(diff, sides, &sides[0].places[i], find_place(&sides[1], &sides[0].places[i]), err);
	for (unsigned i = 0; i < sides[1].place_count && !rc; i++)
		if (!find_place(&sides[0], &sides[1].places[i]))
			rc = compare_place(diff, sides, NULL, &sides[1].places[i], err);
	return rc;
}

int diff_files(struct file_diff *diff, struct err *err)
{
	struct listing *sides = xcalloc(2, sizeof(*sides));
	struct cow_io *io = NULL;
	int rc = cow_io_create(NULL, &io, err);

	diff->changes = NULL;
	diff->count = diff->filesystems = 0;
	for (unsigned i = 0; i < 2 && !rc; i++) {
		rc = cow_open_as(io, diff->paths[i], diff->formats[i], COW_OPEN_READONLY, &sides[i].disk, err);
		if (!rc)
			rc = ext4_find(sides[i].disk, sides[i].places, &sides[i].place_count, err);
	}
	if (!rc)
		rc = compare_places(diff, sides, err);
	for (unsigned i = 0; i < 2; i++)
		if (sides[i].disk)
			cow_close(sides[i].disk, NULL);
	if (io)
		cow_io_destroy(io);
	free(sides);
	if (rc)
		file_diff_free(diff);
	return rc;
}

#endif
