/*
 * A disk that loses power, simulated: whether what was flushed is there, and the image whole, after any crash.
 *
 *     crash_sim IMAGE FOLDER SEED RUNS CRASHES [key=value...]      depth=16 switch=0 pairs=0 (1: mostly writes with a flush after each)
 *
 * Each run copies IMAGE into FOLDER, and works on it at random, with the file operations of the engine carried out here, one at a time in
 * random order. What was written to a file since it was last synced is known, so that at any moment a state can be made that a crash might
 * leave: of each sector, the synced content or that of any write since, as if the disk had kept its writes in a cache and carried them out in any
 * order, in pieces of 512 bytes. Each such state is checked: no corruption, every sector's content that of a write that may be there; some are
 * written to again, and checked again.
 *
 * The engine's operations come by its hook; its plain system calls (new tables, new files) by the linker's --wrap.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "base/log.h"
#include "cowdisk/check.h"
#include "cowdisk/io_internal.h"
#include "cowdisk/overlay.h"
#include "tests/disk/sectors.h"

enum { MAX_FILES = 64, MAX_TAKEN = 512, SLOTS = 32, MAX_SECTORS = 256 };

/* Something that has reached a file and is not yet synced. */
struct pending {
	uint64_t offset, length;
	uint8_t *data; /* NULL: zeroes */
};

struct sim_file {
	dev_t device;
	ino_t inode;
	char name[64];
	uint8_t *durable;
	uint64_t durable_bytes, capacity;
	struct pending *pending;
	size_t count, room;
};

struct taken {
	struct io_op *op;
	size_t covers; /* IO_SYNC: so many of the file's pending writes had ended when it was asked for */
};

struct slot {
	struct cow_request request;
	struct iovec iov;
	bool busy;
	uint64_t sector, count, version, grain;
	uint64_t *snapshot;
	uint8_t *data;
};

static struct sim {
	bool active;
	struct sim_file files[MAX_FILES];
	unsigned file_count;
	struct taken taken[MAX_TAKEN];
	unsigned taken_count;
	uint64_t random;
	struct cow_io *io;
	struct cow_disk *disk;
	uint64_t sectors, version;
	uint64_t *durable, *issued, *zeroed, *complete;
	struct slot slots[SLOTS];
	unsigned busy, depth, switch_every, layers, pairs;
	enum cow_op last; /* issued */
	struct cow_overlay *sealing;
	char top[64];
	uint64_t crashes, failures, seed, stable, joined;
} sim;

static uint64_t pick(uint64_t below) { return next_random(&sim.random) % below; }

static void fail(const char *what, const char *detail)
{
	if (sim.failures++ < 10)
		fprintf(stderr, "crash_sim: seed %" PRIu64 ", crash %" PRIu64 ": %s: %s\n", sim.seed, sim.crashes, what,
			detail);
}

/* --- files --- */

static struct sim_file *file_of(int fd)
{
	struct stat st;
	if (!sim.active || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
		return NULL;
	for (unsigned i = 0; i < sim.file_count; i++)
		if (sim.files[i].device == st.st_dev && sim.files[i].inode == st.st_ino)
			return &sim.files[i];
	if (sim.file_count == MAX_FILES)
		return NULL;
	struct sim_file *f = &sim.files[sim.file_count++];
	char link[64], path[512];
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof(path) - 1);
	path[n > 0 ? n : 0] = 0;
	const char *slash = strrchr(path, '/');
	*f = (struct sim_file){.device = st.st_dev, .inode = st.st_ino};
	snprintf(f->name, sizeof(f->name), "%.63s", slash ? slash + 1 : path);
	return f;
}

static void grow(struct sim_file *f, uint64_t bytes)
{
	if (bytes > f->capacity) {
		uint64_t capacity = round_up(bytes * 2, 4096);
		f->durable = realloc(f->durable, capacity);
		memset(f->durable + f->capacity, 0, capacity - f->capacity);
		f->capacity = capacity;
	}
	f->durable_bytes = max_u64(f->durable_bytes, bytes);
}

static void note(struct sim_file *f, uint64_t offset, uint64_t length, uint8_t *data)
{
	if (f->count == f->room) {
		f->room = f->room ? f->room * 2 : 64;
		f->pending = realloc(f->pending, f->room * sizeof(*f->pending));
	}
	f->pending[f->count++] = (struct pending){offset, length, data};
}

static void apply(struct sim_file *f, const struct pending *p)
{
	if (p->data)
		grow(f, p->offset + p->length);
	uint64_t length = p->offset < f->durable_bytes ? min_u64(p->length, f->durable_bytes - p->offset) : 0;
	if (p->data)
		memcpy(f->durable + p->offset, p->data, p->length);
	else if (length)
		memset(f->durable + p->offset, 0, length);
}

/* The first `count` of what is pending is on stable storage. */
static void settle(struct sim_file *f, size_t count)
{
	count = count < f->count ? count : f->count;
	for (size_t i = 0; i < count; i++) {
		apply(f, &f->pending[i]);
		free(f->pending[i].data);
	}
	memmove(f->pending, f->pending + count, (f->count - count) * sizeof(*f->pending));
	f->count -= count;
	for (unsigned i = 0; i < sim.taken_count; i++) {
		struct taken *t = &sim.taken[i];
		if (t->op->kind == IO_SYNC && file_of(t->op->fd) == f)
			t->covers = t->covers > count ? t->covers - count : 0;
	}
}

static void forget_files(void)
{
	for (unsigned i = 0; i < sim.file_count; i++) {
		for (size_t k = 0; k < sim.files[i].count; k++)
			free(sim.files[i].pending[k].data);
		free(sim.files[i].pending);
		free(sim.files[i].durable);
	}
	sim.file_count = 0;
}

static uint8_t *copy_of(const void *data, size_t length)
{
	uint8_t *copy = malloc(length);
	memcpy(copy, data, length);
	return copy;
}

ssize_t __real_pwrite(int fd, const void *data, size_t length, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *data, size_t length, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *data, size_t length, off_t offset)
{
	ssize_t n = __real_pwrite(fd, data, length, offset);
	struct sim_file *f = n > 0 ? file_of(fd) : NULL;
	if (f)
		note(f, (uint64_t)offset, (uint64_t)n, copy_of(data, (size_t)n));
	return n;
}

int __real_ftruncate(int fd, off_t size);
int __wrap_ftruncate(int fd, off_t size);
int __wrap_ftruncate(int fd, off_t size)
{
	int rc = __real_ftruncate(fd, size);
	struct sim_file *f = rc == 0 ? file_of(fd) : NULL;
	if (f && size > 0) /* that it grew, is a zero in its last byte */
		note(f, (uint64_t)size - 1, 1, calloc(1, 1));
	return rc;
}

int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __wrap_fsync(int fd)
{
	struct sim_file *f = file_of(fd);
	if (f)
		settle(f, f->count);
	return f ? 0 : __real_fsync(fd);
}

int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_fdatasync(int fd)
{
	struct sim_file *f = file_of(fd);
	if (f)
		settle(f, f->count);
	return f ? 0 : __real_fdatasync(fd);
}

/* --- operations --- */

static int on_op(void *opaque, const struct io_op *op)
{
	(void)opaque;
	if (sim.taken_count == MAX_TAKEN)
		abort(); /* more than the requests in flight can have */
	struct sim_file *f = file_of(op->fd);
	sim.taken[sim.taken_count++] = (struct taken){(struct io_op *)(uintptr_t)op, f ? f->count : 0};
	return IO_HOOK_TAKE;
}

static uint8_t *gather(const struct io_op *op)
{
	uint8_t *data = malloc(op->length);
	size_t at = 0;
	for (unsigned i = 0; i < op->iov_count; i++) {
		memcpy(data + at, op->iov[i].iov_base, op->iov[i].iov_len);
		at += op->iov[i].iov_len;
	}
	return data;
}

/* Of a write that is stable by itself: nothing that was written there before may still come after it. */
static void make_stable(struct sim_file *f, const struct io_op *op, uint8_t *data)
{
	struct pending p = {op->offset, op->length, data};
	for (size_t i = 0; i < f->count; i++)
		if (ranges_overlap(f->pending[i].offset, f->pending[i].length, op->offset, op->length))
			fail("stable write", "over one that is not synced");
	apply(f, &p);
	free(data);
	sim.stable++;
}

static int carry_out(const struct taken *t)
{
	struct io_op *op = t->op;
	struct sim_file *f = file_of(op->fd);
	uint8_t *data;
	switch (op->kind) {
	case IO_READ:
		return (int)preadv(op->fd, op->iov, (int)op->iov_count, (off_t)op->offset);
	case IO_WRITE:
		data = gather(op);
		if (__real_pwrite(op->fd, data, op->length, (off_t)op->offset) != (ssize_t)op->length)
			abort();
		if (op->stable)
			make_stable(f, op, data);
		else
			note(f, op->offset, op->length, data);
		op->synced = op->syncs && pick(2);
		if (op->synced) {
			settle(f, f->count);
			sim.joined++;
		}
		return (int)op->length;
	case IO_SYNC:
		settle(f, t->covers);
		return 0;
	case IO_PUNCH:
	case IO_ZERO:
		if (fallocate(op->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
			      (off_t)op->length) < 0)
			return -errno;
		note(f, op->offset, op->length, NULL);
		return 0;
	}
	return -EINVAL;
}

static void end_one(void *opaque)
{
	(void)opaque;
	if (sim.taken_count == 0)
		return;
	unsigned i = (unsigned)pick(sim.taken_count);
	struct taken t = sim.taken[i];
	memmove(sim.taken + i, sim.taken + i + 1, (sim.taken_count - i - 1) * sizeof(t));
	sim.taken_count--;
	int result = carry_out(&t);
	cow_io_end_taken(sim.io, t.op, result);
}

/* --- the crash --- */

enum crash_kind { NOTHING_MORE, EVERYTHING, IN_ORDER, WHOLE_WRITES, TORN, CRASH_KINDS };

static void crash_write(struct sim_file *state, const struct pending *p, enum crash_kind kind)
{
	uint64_t end = p->offset + p->length;
	if (kind == NOTHING_MORE || (kind == WHOLE_WRITES && pick(2)))
		return;
	if (kind != TORN) {
		apply(state, p);
		return;
	}
	for (uint64_t at = p->offset; at < end;) {
		uint64_t next = min_u64(round_up(at + 1, SECTOR), end);
		struct pending piece = {at, next - at, p->data ? p->data + (at - p->offset) : NULL};
		if (pick(2))
			apply(state, &piece);
		at = next;
	}
}

/* What a disk that turns its writes around may have carried out: any of them, in any order. */
static void crash_file(const struct sim_file *f, enum crash_kind kind, const char *folder)
{
	struct sim_file state = {0};
	grow(&state, max_u64(f->durable_bytes, 1));
	memcpy(state.durable, f->durable, f->durable_bytes);
	state.durable_bytes = f->durable_bytes;
	size_t all = f->count, limit = kind == IN_ORDER && all ? pick(all + 1) : all;
	bool turned = (kind == TORN || kind == WHOLE_WRITES) && pick(2);
	for (size_t i = 0; i < limit; i++)
		crash_write(&state, &f->pending[turned ? pick(all) : i], kind);
	for (unsigned i = 0; i < sim.taken_count; i++) {
		const struct io_op *op = sim.taken[i].op;
		if (file_of(op->fd) != f || op->kind != IO_WRITE || kind == IN_ORDER || kind == NOTHING_MORE)
			continue;
		struct pending p = {op->offset, op->length, gather(op)};
		crash_write(&state, &p, kind);
		free(p.data);
	}
	char path[512];
	snprintf(path, sizeof(path), "%s/%s", folder, f->name);
	CLEANUP_CLOSE int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || __real_pwrite(fd, state.durable, state.durable_bytes, 0) != (ssize_t)state.durable_bytes)
		fail("cannot write", path);
	free(state.durable);
}

static bool acceptable(uint64_t sector, bool whole, uint64_t version)
{
	uint64_t durable = sim.durable[sector];
	if (!whole)
		return false;
	if (version == 0)
		return durable == 0 || durable & IS_ZERO || sim.zeroed[sector] > durable;
	return version >= (durable & ~IS_ZERO) && version <= sim.issued[sector];
}

static void judge_content(struct cow_disk *disk)
{
	CLEANUP_FREE uint8_t *data = malloc(sim.sectors * SECTOR);
	struct err err = ERR_INIT;
	if (cow_read_sync(disk, 0, data, sim.sectors * SECTOR, &err) < 0) {
		fail("reading", err.message);
		return;
	}
	for (uint64_t i = 0; i < sim.sectors; i++) {
		uint64_t version;
		bool whole = read_version(data + i * SECTOR, i, &version);
		if (acceptable(i, whole, version))
			continue;
		char text[160];
		snprintf(text, sizeof(text),
			 "sector %" PRIu64 " %s version %" PRIu64 ", durable %" PRIu64 " issued %" PRIu64
			 " zeroed %" PRIu64,
			 i, whole ? "whole" : "torn", version, sim.durable[i], sim.issued[i], sim.zeroed[i]);
		fail("content", text);
		return;
	}
}

static void judge_file(const char *path, bool clean)
{
	struct cow_check c;
	struct err err = ERR_INIT;
	if (cow_check(path, &c, &err) < 0)
		fail("check", err.message);
	else if (c.corruptions)
		fail("corrupt", c.first);
	else if (clean && c.leaks)
		fail("check", "a clean close has left new leaks");
}

/* The disk goes on after the crash: everything is written once more. */
static void go_on(const char *path)
{
	struct cow_io *io;
	struct cow_disk *disk;
	struct err err = ERR_INIT;
	static uint8_t data[64 << 10];
	if (cow_io_create_kind(NULL, false, &io, &err) < 0 || cow_open(io, path, 0, &disk, &err) < 0) {
		fail("open for writing", err.message);
		return;
	}
	for (uint64_t at = 0; at < sim.sectors * SECTOR; at += sizeof(data)) {
		uint64_t length = min_u64(sizeof(data), sim.sectors * SECTOR - at);
		if (cow_write_sync(disk, at, data, length, &err) < 0)
			fail("write after the crash", err.message);
	}
	if (cow_close(disk, &err) < 0)
		fail("close after the crash", err.message);
	cow_io_destroy(io);
	judge_file(path, false);
}

static void crash(const char *folder)
{
	static const uint8_t weight[] = {NOTHING_MORE, EVERYTHING, IN_ORDER, IN_ORDER, WHOLE_WRITES,
					 WHOLE_WRITES, TORN,	   TORN,     TORN};
	enum crash_kind kind = weight[pick(sizeof(weight))];
	char path[512];
	struct cow_disk *disk;
	struct err err = ERR_INIT;
	sim.crashes++;
	for (unsigned i = 0; i < sim.file_count; i++)
		crash_file(&sim.files[i], kind, folder);
	bool go = pick(4) == 0;
	sim.active = false;
	snprintf(path, sizeof(path), "%s/%s", folder, sim.top);
	for (unsigned i = 0; i < sim.file_count; i++) {
		char file[512];
		snprintf(file, sizeof(file), "%s/%s", folder, sim.files[i].name);
		judge_file(file, false);
	}
	struct cow_io *io;
	if (cow_io_create_kind(NULL, false, &io, &err) == 0) {
		if (cow_open(io, path, COW_OPEN_READONLY, &disk, &err) == 0) {
			judge_content(disk);
			cow_close(disk, NULL);
		} else
			fail("open", err.message);
		cow_io_destroy(io);
	}
	if (go)
		go_on(path);
	sim.active = true;
}

/* --- the work --- */

static void on_done(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	slot->busy = false;
	sim.busy--;
	if (result < 0)
		fail("request", strerror(-result));
	uint64_t first = slot->sector, end = slot->sector + slot->count, version = slot->version;
	if (request->op == COW_FLUSH)
		for (uint64_t i = 0; i < sim.sectors; i++)
			sim.durable[i] = max_u64(sim.durable[i], slot->snapshot[i]);
	if (request->op == COW_DISCARD) {
		first = round_up(first, slot->grain);
		end = end == sim.sectors ? end : round_down(end, slot->grain);
	}
	if (request->op == COW_DISCARD || request->op == COW_WRITE_ZEROES)
		version |= IS_ZERO;
	for (uint64_t i = first; request->op != COW_READ && request->op != COW_FLUSH && i < end; i++)
		sim.complete[i] = version;
}

static bool overlaps(uint64_t sector, uint64_t count)
{
	for (unsigned i = 0; i < SLOTS; i++)
		if (sim.slots[i].busy && sim.slots[i].request.op != COW_FLUSH &&
		    ranges_overlap(sim.slots[i].sector, sim.slots[i].count, sector, count))
			return true;
	return false;
}

static void issue(void)
{
	static const enum cow_op ops[] = {COW_WRITE, COW_WRITE, COW_WRITE,   COW_WRITE,	       COW_WRITE, COW_WRITE,
					  COW_WRITE, COW_READ,	COW_DISCARD, COW_WRITE_ZEROES, COW_FLUSH, COW_FLUSH};
	struct slot *slot = NULL;
	for (unsigned i = 0; i < SLOTS && !slot; i++)
		slot = sim.slots[i].busy ? NULL : &sim.slots[i];
	enum cow_op op = ops[pick(sizeof(ops) / sizeof(ops[0]))];
	if (sim.pairs && pick(16))
		op = sim.last == COW_WRITE ? COW_FLUSH : COW_WRITE;
	slot->count = op == COW_FLUSH ? 0 : 1 + pick(pick(4) ? 16 : MAX_SECTORS);
	slot->sector = op == COW_FLUSH ? 0 : pick(sim.sectors - slot->count + 1);
	uint64_t cluster = cow_cluster_bytes(sim.disk) / SECTOR;
	if (pick(3) == 0)
		slot->sector = round_down(slot->sector, cluster);
	if (op != COW_FLUSH && overlaps(slot->sector, slot->count))
		return;
	sim.last = op;
	slot->version = sim.version += 2;
	slot->grain = cluster;
	slot->request = (struct cow_request){.op = op, .done = on_done, .opaque = slot, .may_unmap = pick(2)};
	slot->request.offset = slot->sector * SECTOR;
	slot->request.length = slot->count * SECTOR;
	for (uint64_t i = 0; i < slot->count && op != COW_READ; i++) {
		if (op == COW_WRITE)
			fill_sector(slot->data + i * SECTOR, slot->sector + i, slot->version);
		else
			sim.zeroed[slot->sector + i] = slot->version;
		sim.issued[slot->sector + i] = slot->version;
	}
	if (op == COW_READ || op == COW_WRITE) {
		slot->iov = (struct iovec){slot->data, slot->count * SECTOR};
		slot->request.iov = &slot->iov;
		slot->request.iov_count = 1;
	}
	if (op == COW_FLUSH)
		memcpy(slot->snapshot, sim.complete, sim.sectors * 8);
	slot->busy = true;
	sim.busy++;
	cow_submit(sim.disk, &slot->request);
}

static void seal(void)
{
	struct err err = ERR_INIT;
	if (sim.sealing && cow_overlay_seal(sim.sealing, NULL, &err) < 0)
		fail("seal", err.message);
	sim.sealing = NULL;
}

static void switch_overlay(void)
{
	char path[64], name[64];
	struct err err = ERR_INIT;
	struct cow_overlay *o;
	seal();
	snprintf(name, sizeof(name), "%s", sim.top);
	snprintf(path, sizeof(path), "l%u.qcow2", ++sim.layers);
	if (cow_overlay_prepare(sim.disk, path, name, &o, &err) < 0) {
		fail("prepare", err.message);
		return;
	}
	snprintf(sim.top, sizeof(sim.top), "%s", path);
	cow_overlay_switch(o);
	sim.sealing = o;
}

static void remove_layers(unsigned count)
{
	char path[64];
	for (unsigned i = 1; i <= count; i++) {
		snprintf(path, sizeof(path), "l%u.qcow2", i);
		unlink(path);
		snprintf(path, sizeof(path), "crash/l%u.qcow2", i);
		unlink(path);
	}
}

static void begin_run(const char *image)
{
	struct err err = ERR_INIT;
	remove_layers(sim.layers);
	struct buf content = BUF_INIT;
	snprintf(sim.top, sizeof(sim.top), "a.qcow2");
	sim.layers = 0;
	if (file_read_all(AT_FDCWD, image, 64 << 20, &content, &err) < 0)
		fail("image", err.message);
	CLEANUP_CLOSE int fd = open(sim.top, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || __real_pwrite(fd, content.data, content.length, 0) != (ssize_t)content.length)
		fail("copy of the image", strerror(errno));
	buf_free(&content);
	sim.active = true;
	struct sim_file *f = file_of(fd);
	grow(f, (uint64_t)lseek(fd, 0, SEEK_END));
	if (pread(fd, f->durable, f->durable_bytes, 0) < 0)
		fail("copy of the image", strerror(errno));
	if (cow_io_create_kind(NULL, false, &sim.io, &err) < 0 || cow_open(sim.io, sim.top, 0, &sim.disk, &err) < 0) {
		fail("open", err.message);
		exit(1);
	}
	cow_io_set_hook(sim.io, on_op, NULL);
	cow_io_set_pump(sim.io, end_one, NULL);
	sim.sectors = cow_size(sim.disk) / SECTOR;
	uint64_t **arrays[] = {&sim.durable, &sim.issued, &sim.zeroed, &sim.complete};
	for (unsigned i = 0; i < 4; i++)
		*arrays[i] = calloc(sim.sectors, 8);
	for (unsigned i = 0; i < SLOTS; i++) {
		sim.slots[i].data = malloc(MAX_SECTORS * SECTOR);
		sim.slots[i].snapshot = malloc(sim.sectors * 8);
	}
}

static void end_run(void)
{
	struct err err = ERR_INIT;
	while (sim.busy)
		cow_io_drive(sim.io, -1);
	seal();
	if (cow_close(sim.disk, &err) < 0)
		fail("close", err.message);
	cow_io_destroy(sim.io);
	sim.active = false;
	for (unsigned i = 0; i < sim.file_count; i++)
		judge_file(sim.files[i].name, true);
	forget_files();
	for (unsigned i = 0; i < SLOTS; i++) {
		free(sim.slots[i].data);
		free(sim.slots[i].snapshot);
	}
	free(sim.durable);
	free(sim.issued);
	free(sim.zeroed);
	free(sim.complete);
}

static void run(const char *image, unsigned crashes)
{
	begin_run(image);
	for (unsigned step = 0, made = 0; made < crashes && sim.failures == 0; step++) {
		if (sim.busy < sim.depth)
			issue();
		if (sim.busy >= sim.depth || pick(2))
			cow_io_drive(sim.io, 0);
		if (sim.switch_every && step % sim.switch_every == sim.switch_every - 1)
			switch_overlay();
		if (pick(12) == 0) {
			crash("crash");
			made++;
		}
	}
	if (sim.failures == 0)
		end_run();
}

int main(int argc, char **argv)
{
	if (argc < 6)
		return 2;
	char *image = realpath(argv[1], NULL);
	uint64_t first = strtoull(argv[3], NULL, 0), runs = strtoull(argv[4], NULL, 0);
	sim.depth = 16;
	for (int i = 6; i < argc; i++) {
		if (strncmp(argv[i], "depth=", 6) == 0)
			sim.depth = (unsigned)atoi(argv[i] + 6);
		if (strncmp(argv[i], "switch=", 7) == 0)
			sim.switch_every = (unsigned)atoi(argv[i] + 7);
		if (strncmp(argv[i], "pairs=", 6) == 0)
			sim.pairs = (unsigned)atoi(argv[i] + 6);
	}
	log_set_level(LOG_LEVEL_ERROR);
	if (!image || chdir(argv[2]) < 0 || (mkdir("crash", 0755) < 0 && errno != EEXIST) || sim.depth > SLOTS) {
		fprintf(stderr, "crash_sim: %s: %s\n", argv[2], strerror(errno));
		return 2;
	}
	for (sim.seed = first; sim.seed < first + runs && sim.failures == 0; sim.seed++) {
		sim.random = sim.seed;
		run(image, (unsigned)atoi(argv[5]));
	}
	printf("crashes %" PRIu64 " failures %" PRIu64 " stable %" PRIu64 " joined %" PRIu64 "\n", sim.crashes, sim.failures, sim.stable, sim.joined);
	free(image);
	return sim.failures != 0;
}
