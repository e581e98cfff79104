#include "cli/ext4_view.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ext2fs/ext2fs.h>
#include <xxhash.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/library.h"
#include "cli/ext4_journal.h"

#define SUPER_OFFSET 1024u
#define MAGIC_OFFSET 56u
#define MBR_ENTRIES  4u
#define GPT_MAX_BYTES (1u << 20)

/* The last one is libcom_err's, which libext2fs brings along. */
#define FUNCTIONS(X) \
	X(ext2fs_open2) X(ext2fs_free) X(ext2fs_bmap2) X(ext2fs_read_inode_full) X(ext2fs_dir_iterate2) X(ext2fs_block_iterate3) X(error_message)
static struct {
	FUNCTIONS(LIBRARY_FIELD)
} lib;
static const struct library libext2fs = {"libext2fs.so.2", LIBRARY_NAMES(FUNCTIONS)};

/* Blocks that the journal holds, by number. The newest list entry of a bucket stands for older ones. */
#define BUCKETS 4096u
struct patch {
	struct patch *next;
	uint64_t block;
	uint8_t data[];
};

struct ext4_view {
	struct cow_disk *disk;
	uint64_t offset, size; /* of the filesystem on the disk */
	struct patch *patches[BUCKETS];
	uint32_t patch_bytes; /* of a block */
	ext2_filsys fs;
	struct struct_io_channel channel;
	struct err failed; /* the first error of reading */
};

/* --- libext2fs's way to the disk --- */

static errcode_t read_range(struct ext4_view *view, uint64_t offset, uint64_t length, uint8_t *data)
{
	/* The image may end within the last block. */
	uint64_t there = offset >= view->size ? 0 : min_u64(length, view->size - offset);
	memset(data + there, 0, length - there);
	struct err *err = &view->failed;
	/* Whole sectors, wherever they begin. */
	uint64_t from = round_down(view->offset + offset, COW_SECTOR_BYTES), to = round_up(view->offset + offset + there, COW_SECTOR_BYTES);
	CLEANUP_FREE uint8_t *sectors = there ? malloc(to - from) : NULL;
	if (there == 0)
		return 0;
	if (!sectors || cow_read_sync(view->disk, from, sectors, to - from, err->number ? NULL : err) < 0)
		return EXT2_ET_SHORT_READ;
	memcpy(data, sectors + (view->offset + offset - from), there);
	return 0;
}

static const struct patch *find_patch(const struct ext4_view *view, uint64_t block)
{
	const struct patch *patch = view->patches[block % BUCKETS];
	while (patch && patch->block != block)
		patch = patch->next;
	return patch;
}

static errcode_t view_read64(io_channel channel, unsigned long long block, int count, void *data)
{
	struct ext4_view *view = channel->private_data;
	/* A negative count is one of bytes. */
	uint64_t bytes = count < 0 ? (uint64_t)-(int64_t)count : (uint64_t)count * (uint64_t)channel->block_size;
	uint64_t offset = (uint64_t)block * (uint64_t)channel->block_size;
	errcode_t r = read_range(view, offset, bytes, data);
	/* Also where libext2fs reads with another block size than the journal's, as it does for the superblock. */
	for (uint64_t at = offset; r == 0 && view->patch_bytes && at < offset + bytes;) {
		uint64_t number = at / view->patch_bytes, within = at % view->patch_bytes;
		uint64_t length = min_u64(view->patch_bytes - within, offset + bytes - at);
		const struct patch *patch = find_patch(view, number);
		if (patch)
			memcpy((uint8_t *)data + (at - offset), patch->data + within, length);
		at += length;
	}
	return r;
}

static errcode_t view_read(io_channel channel, unsigned long block, int count, void *data) { return view_read64(channel, block, count, data); }

/* The name is the address of the view, as text: libext2fs hands over nothing else. */
static errcode_t view_open(const char *name, int flags, io_channel *out)
{
	void *address = NULL;
	(void)flags;
	if (sscanf(name, "%p", &address) != 1)
		return EXT2_ET_BAD_DEVICE_NAME;
	struct ext4_view *view = address;
	view->channel.block_size = 1024;
	view->channel.refcount = 1;
	*out = &view->channel;
	return 0;
}

static errcode_t view_close(io_channel channel)
{
	(void)channel;
	return 0;
}

static errcode_t view_set_block_size(io_channel channel, int bytes)
{
	channel->block_size = bytes;
	return 0;
}

static errcode_t no_write(io_channel channel, unsigned long block, int count, const void *data)
{
	(void)channel, (void)block, (void)count, (void)data;
	return EXT2_ET_RO_FILSYS;
}

static errcode_t no_flush(io_channel channel)
{
	(void)channel;
	return 0;
}

static struct struct_io_manager manager = {.magic = EXT2_ET_MAGIC_IO_MANAGER,
					   .name = "vmcp",
					   .open = view_open,
					   .close = view_close,
					   .set_blksize = view_set_block_size,
					   .read_blk = view_read,
					   .read_blk64 = view_read64,
					   .write_blk = no_write,
					   .flush = no_flush};

static int fail(struct ext4_view *view, errcode_t code, const char *what, struct err *err)
{
	if (view->failed.number) {
		if (err)
			*err = view->failed;
		return -view->failed.number;
	}
	if (code == EXT2_ET_UNSUPP_FEATURE || code == EXT2_ET_RO_UNSUPP_FEATURE)
		return err_set(err, ERR_FAILED, ENOTSUP, "%s: it has features that this libext2fs does not know", what);
	return err_set(err, ERR_DAMAGED, EINVAL, "%s: %s", what, lib.error_message(code));
}

static int open_once(struct ext4_view *view, struct err *err)
{
	char name[32];
	snprintf(name, sizeof(name), "%p", (void *)view);
	view->channel = (struct struct_io_channel){.magic = EXT2_ET_MAGIC_IO_CHANNEL, .manager = &manager, .name = NULL, .private_data = view};
	errcode_t code = lib.ext2fs_open2(name, NULL, EXT2_FLAG_64BITS | EXT2_FLAG_SKIP_MMP | EXT2_FLAG_IGNORE_CSUM_ERRORS, 0, 0, &manager, &view->fs);
	return code ? fail(view, code, "filesystem", err) : 0;
}

/* --- the journal --- */

static int read_journal(void *opaque, uint32_t number, uint8_t *data, struct err *err)
{
	struct ext4_view *view = opaque;
	blk64_t block = 0;
	errcode_t code = lib.ext2fs_bmap2(view->fs, view->fs->super->s_journal_inum, NULL, NULL, 0, number, NULL, &block);
	if (code == 0 && block == 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "its journal: block %u is a hole", number);
	if (code == 0)
		code = read_range(view, block * view->fs->blocksize, view->fs->blocksize, data);
	return code ? fail(view, code, "its journal", err) : 0;
}

static int apply_block(void *opaque, uint64_t number, const uint8_t *data, struct err *err)
{
	struct ext4_view *view = opaque;
	struct patch *patch = (struct patch *)find_patch(view, number);
	if (!patch) {
		patch = malloc(sizeof(*patch) + view->fs->blocksize);
		if (!patch)
			return err_sys(err, ENOMEM, "journal");
		patch->block = number;
		patch->next = view->patches[number % BUCKETS];
		view->patches[number % BUCKETS] = patch;
	}
	memcpy(patch->data, data, view->fs->blocksize);
	return 0;
}

static int apply_journal(struct ext4_view *view, struct err *err)
{
	const struct ext2_super_block *super = view->fs->super;
	const struct journal_reader reader = {.read = read_journal, .apply = apply_block, .opaque = view, .block_bytes = view->fs->blocksize};
	if (!ext2fs_has_feature_journal_needs_recovery(view->fs->super))
		return 0;
	if (super->s_journal_inum == 0)
		return err_set(err, ERR_FAILED, ENOTSUP, "filesystem: its journal is on another device");
	int r = journal_replay(&reader, err);
	if (r != 0)
		return r;
	view->patch_bytes = view->fs->blocksize;
	lib.ext2fs_free(view->fs);
	view->fs = NULL;
	return open_once(view, err);
}

int ext4_open(struct cow_disk *disk, uint64_t offset_bytes, struct ext4_view **out, struct err *err)
{
	const char *why = library_load(&libext2fs, &lib);
	if (why) {
		err_set(err, ERR_HOST, ENOSYS, "libext2fs: %s", why);
		err_hint(err, "`--files` needs it: `apt-get install libext2fs2`");
		return -ENOSYS;
	}
	struct ext4_view *view = xcalloc(1, sizeof(*view));
	view->disk = disk;
	view->offset = offset_bytes;
	view->size = cow_size(disk) - offset_bytes;
	int r = open_once(view, err);
	if (r == 0)
		r = apply_journal(view, err);
	if (r != 0) {
		ext4_close(view);
		return r;
	}
	*out = view;
	return 0;
}

void ext4_close(struct ext4_view *view)
{
	if (!view)
		return;
	if (view->fs)
		lib.ext2fs_free(view->fs);
	for (unsigned i = 0; i < BUCKETS; i++)
		while (view->patches[i]) {
			struct patch *next = view->patches[i]->next;
			free(view->patches[i]);
			view->patches[i] = next;
		}
	free(view);
}

/* --- where filesystems are --- */

static int add_if_ext(struct cow_disk *disk, unsigned partition, uint64_t offset, struct ext4_place *places, unsigned *count, struct err *err)
{
	uint8_t super[1024];
	if (*count == EXT4_MAX_PLACES || offset % COW_SECTOR_BYTES || !range_within(offset, 2 * SUPER_OFFSET, cow_size(disk)))
		return 0;
	int r = cow_read_sync(disk, offset + SUPER_OFFSET, super, sizeof(super), err);
	if (r == 0 && get_le16(super + MAGIC_OFFSET) == EXT2_SUPER_MAGIC)
		places[(*count)++] = (struct ext4_place){.partition = partition, .offset_bytes = offset};
	return r;
}

static int find_in_gpt(struct cow_disk *disk, struct ext4_place *places, unsigned *count, struct err *err)
{
	uint8_t header[COW_SECTOR_BYTES];
	int r = cow_read_sync(disk, COW_SECTOR_BYTES, header, sizeof(header), err);
	uint64_t table = get_le64(header + 72) * COW_SECTOR_BYTES, entries = get_le32(header + 80), bytes = get_le32(header + 84);
	if (r != 0 || memcmp(header, "EFI PART", 8) != 0 || bytes < 128 || entries == 0 || entries > GPT_MAX_BYTES / bytes)
		return r;
	uint64_t length = round_up(entries * bytes, COW_SECTOR_BYTES);
	CLEANUP_FREE uint8_t *data = range_within(table, length, cow_size(disk)) ? malloc(length) : NULL;
	if (!data)
		return 0;
	r = cow_read_sync(disk, table, data, length, err);
	for (uint64_t i = 0; i < entries && r == 0; i++) {
		uint64_t first = get_le64(data + i * bytes + 32);
		if (first && first < cow_size(disk) / COW_SECTOR_BYTES)
			r = add_if_ext(disk, (unsigned)i + 1, first * COW_SECTOR_BYTES, places, count, err);
	}
	return r;
}

int ext4_find(struct cow_disk *disk, struct ext4_place places[EXT4_MAX_PLACES], unsigned *count, struct err *err)
{
	uint8_t sector[COW_SECTOR_BYTES];
	*count = 0;
	if (cow_size(disk) < 4 * SUPER_OFFSET)
		return 0;
	int r = add_if_ext(disk, 0, 0, places, count, err);
	if (r != 0 || *count)
		return r;
	r = cow_read_sync(disk, 0, sector, sizeof(sector), err);
	if (r != 0 || get_le16(sector + 510) != 0xaa55)
		return r;
	if (sector[446 + 4] == 0xee)
		return find_in_gpt(disk, places, count, err);
	for (unsigned i = 0; i < MBR_ENTRIES && r == 0; i++)
		if (get_le32(sector + 446 + 16 * i + 8))
			r = add_if_ext(disk, i + 1, (uint64_t)get_le32(sector + 446 + 16 * i + 8) * COW_SECTOR_BYTES, places, count, err);
	return r;
}

/* --- walking --- */

struct folder {
	ext2_ino_t inode;
	char *path; /* "" for the root */
};

struct walk {
	struct ext4_view *view;
	int (*fn)(void *opaque, const struct ext4_file *file);
	void *opaque;
	struct folder *stack;
	size_t count, capacity;
	uint8_t *seen; /* folders, a bit an inode: a damaged tree may have loops */
	const char *path;
	struct err *err;
	int result;
};

/* What it was last read, and checksums, are no change. */
static uint64_t print_of(struct ext2_inode_large *inode)
{
	inode->i_atime = inode->i_atime_extra = 0;
	inode->osd2.linux2.l_i_checksum_lo = 0;
	inode->i_checksum_hi = 0;
	return XXH3_64bits(inode, sizeof(*inode));
}

static void push(struct walk *w, ext2_ino_t inode, char *path)
{
	if (inode == 0 || inode > w->view->fs->super->s_inodes_count || w->seen[inode / 8] >> (inode % 8) & 1) {
		free(path);
		return;
	}
	w->seen[inode / 8] |= (uint8_t)(1u << (inode % 8));
	if (w->count == w->capacity) {
		struct folder *grown = realloc(w->stack, (w->capacity = w->capacity * 2 + 64) * sizeof(*grown));
		if (!grown)
			abort(); /* as xcalloc: a small object */
		w->stack = grown;
	}
	w->stack[w->count++] = (struct folder){inode, path};
}

static int visit(ext2_ino_t dir, int entry, struct ext2_dir_entry *dirent, int offset, int block_bytes, char *buffer, void *opaque)
{
	struct walk *w = opaque;
	struct ext2_inode_large inode;
	int length = ext2fs_dirent_name_len(dirent);
	(void)dir, (void)offset, (void)block_bytes, (void)buffer;
	if (entry != DIRENT_OTHER_FILE || dirent->inode == 0)
		return 0;
	memset(&inode, 0, sizeof(inode));
	errcode_t code = lib.ext2fs_read_inode_full(w->view->fs, dirent->inode, (struct ext2_inode *)&inode, sizeof(inode));
	char *path = xasprintf("%s/%.*s", w->path, length, dirent->name);
	if (code)
		w->result = fail(w->view, code, path, w->err);
	struct ext4_file file = {.path = path, .inode = dirent->inode, .size_bytes = EXT2_I_SIZE(&inode)};
	bool is_folder = LINUX_S_ISDIR(inode.i_mode);
	file.print = print_of(&inode);
	if (w->result == 0)
		w->result = w->fn(w->opaque, &file);
	if (w->result == 0 && is_folder)
		push(w, dirent->inode, path);
	else
		free(path);
	return w->result ? DIRENT_ABORT : 0;
}

int ext4_walk(struct ext4_view *view, int (*fn)(void *opaque, const struct ext4_file *file), void *opaque, struct err *err)
{
	struct walk w = {.view = view, .fn = fn, .opaque = opaque, .err = err};
	w.seen = xcalloc(1, view->fs->super->s_inodes_count / 8 + 1);
	push(&w, EXT2_ROOT_INO, xstrdup(""));
	while (w.count && w.result == 0) {
		struct folder folder = w.stack[--w.count];
		w.path = folder.path;
		errcode_t code = lib.ext2fs_dir_iterate2(view->fs, folder.inode, 0, NULL, visit, &w);
		if (code && w.result == 0)
			w.result = fail(view, code, *folder.path ? folder.path : "/", err);
		free(folder.path);
	}
	while (w.count)
		free(w.stack[--w.count].path);
	free(w.stack);
	free(w.seen);
	return w.result;
}

struct touching {
	struct ext4_view *view;
	bool (*touches)(void *opaque, uint64_t offset, uint64_t length);
	void *opaque;
	bool any;
};

static int look_at_block(ext2_filsys fs, blk64_t *block, e2_blkcnt_t number, blk64_t parent, int offset, void *opaque)
{
	struct touching *t = opaque;
	(void)number, (void)parent, (void)offset;
	t->any = *block && t->touches(t->opaque, t->view->offset + *block * fs->blocksize, fs->blocksize);
	return t->any ? BLOCK_ABORT : 0;
}

bool ext4_any_block(struct ext4_view *view, uint32_t inode, bool (*touches)(void *opaque, uint64_t offset, uint64_t length), void *opaque)
{
	struct touching t = {.view = view, .touches = touches, .opaque = opaque};
	/* Links that are within their inode, and devices, have none: that is an error to libext2fs. */
	lib.ext2fs_block_iterate3(view->fs, inode, BLOCK_FLAG_READ_ONLY | BLOCK_FLAG_DATA_ONLY, NULL, look_at_block, &t);
	return t.any;
}
