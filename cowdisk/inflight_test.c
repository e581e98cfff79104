/* Requests in flight at an overlay switch, with a layer below that holds operations back for as long as a test
 * likes. */
#include <criterion/criterion.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "cowdisk/check.h"
#include "cowdisk/disk_internal.h"
#include "cowdisk/merge.h"

#define CLUSTER 65536u
#define KIND(k) (1u << (k))

struct fixture {
	char folder[64];
	struct cow_io *io;
	struct cow_disk *disk;
	unsigned hold;	       /* kinds that are held back */
	const char *hold_name; /* only for files of this name, if set */
	int fail;	       /* errno for writes, 0: none */
	int fail_sync;	       /* errno for the next sync of the layer */
	unsigned layer_syncs;
	unsigned joined_syncs;	/* of writes that take their sync with them */
	unsigned stable_writes; /* that are made so by themselves */
	unsigned reads;
};

struct pending {
	struct cow_request request;
	struct iovec iov;
	uint8_t *data;
	bool done;
	int result;
};

static bool names_file(const struct io_op *op, const char *name)
{
	char link[64], path[PATH_MAX] = "";
	snprintf(link, sizeof(link), "/proc/self/fd/%d", op->fd);
	if (readlink(link, path, sizeof(path) - 1) < 0)
		return false;
	const char *slash = strrchr(path, '/');
	return slash && strcmp(slash + 1, name) == 0;
}

static int hook(void *opaque, const struct io_op *op)
{
	struct fixture *f = opaque;
	if (op->kind == IO_SYNC && names_file(op, "layer.qcow2")) {
		int fail = f->fail_sync;
		f->layer_syncs++;
		f->fail_sync = 0;
		if (fail)
			return -fail;
	}
	f->reads += op->kind == IO_READ;
	f->stable_writes += op->kind == IO_WRITE && op->stable;
	f->joined_syncs += op->kind == IO_WRITE && op->syncs;
	if (f->fail && op->kind == IO_WRITE)
		return -f->fail;
	if (!(f->hold & KIND(op->kind)) || (f->hold_name && !names_file(op, f->hold_name)))
		return IO_HOOK_PASS;
	return IO_HOOK_HOLD;
}

static char *path_of(const struct fixture *f, const char *name) { return xasprintf("%s/%s", f->folder, name); }

static void setup(struct fixture *f)
{
	struct err err = ERR_INIT;
	*f = (struct fixture){.folder = "/tmp/vmcp-inflight-XXXXXX"};
	cr_assert(mkdtemp(f->folder) != NULL);
	CLEANUP_FREE char *path = path_of(f, "layer.qcow2");
	struct cow_create create = {.size_bytes = 64 * CLUSTER, .cluster_bytes = CLUSTER};
	cr_assert_eq(cow_create(path, &create, &err), 0, "%s", err.message);
	cr_assert_eq(cow_io_create(NULL, &f->io, &err), 0, "%s", err.message);
	cr_assert_eq(cow_open(f->io, path, 0, &f->disk, &err), 0, "%s", err.message);
	cow_io_set_hook(f->io, hook, f);
}

static void teardown(struct fixture *f)
{
	struct err err = ERR_INIT;
	cr_expect_eq(cow_close(f->disk, &err), 0, "%s", err.message);
	cow_io_destroy(f->io);
	static const char *const names[] = {"layer.qcow2", "top.qcow2", "third.qcow2", "fourth.qcow2"};
	for (size_t i = 0; i < ARRAY_LENGTH(names); i++) {
		struct cow_check check;
		CLEANUP_FREE char *path = path_of(f, names[i]);
		if (access(path, F_OK) == 0) {
			cr_expect_eq(cow_check(path, &check, &err), 0, "%s", err.message);
			cr_expect_eq(check.corruptions, 0, "%s: %s", names[i], check.first);
			cr_expect_eq(check.leaks, 0, "%s: %llu leaks", names[i], (unsigned long long)check.leaks);
		}
	}
	file_remove_tree(AT_FDCWD, f->folder, NULL);
}

static void on_done(struct cow_request *request, int result)
{
	struct pending *p = request->opaque;
	p->done = true;
	p->result = result;
}

static void start(struct fixture *f, struct pending *p, enum cow_op op, uint64_t offset, uint64_t length, int value)
{
	*p = (struct pending){.request = {.op = op, .offset = offset, .length = length, .done = on_done, .opaque = p}};
	p->data = calloc(1, length + 1);
	memset(p->data, value, length);
	p->iov = (struct iovec){p->data, length};
	p->request.iov = &p->iov;
	p->request.iov_count = 1;
	p->request.may_unmap = true;
	cow_submit(f->disk, &p->request);
	cr_expect(!p->done, "completed from within the submitting call");
}

/* Lets everything happen that can. */
static void settle(struct fixture *f)
{
	for (int i = 0; i < 20; i++)
		cow_io_drive(f->io, 5);
}

static int finish(struct fixture *f, struct pending *p)
{
	for (int i = 0; i < 1000 && !p->done; i++)
		cow_io_drive(f->io, 10);
	cr_assert(p->done, "a request does not end");
	free(p->data);
	return p->result;
}

static struct cow_overlay *prepare(struct fixture *f, const char *name, const char *layer)
{
	struct err err = ERR_INIT;
	struct cow_overlay *o;
	CLEANUP_FREE char *path = path_of(f, name);
	cr_assert_eq(cow_overlay_prepare(f->disk, path, layer, &o, &err), 0, "%s", err.message);
	return o;
}

static void seal(struct cow_overlay *o)
{
	struct err err = ERR_INIT;
	cr_assert_eq(cow_overlay_seal(o, NULL, &err), 0, "%s", err.message);
}

/* True if all bytes of the range, read from the named file by somebody else, are `value`. */
static bool file_holds(struct fixture *f, const char *name, uint64_t offset, uint64_t length, int value)
{
	struct err err = ERR_INIT;
	struct cow_io *io;
	struct cow_disk *disk;
	CLEANUP_FREE char *path = path_of(f, name);
	CLEANUP_FREE uint8_t *data = malloc(length);
	cr_assert_eq(cow_io_create(NULL, &io, &err), 0);
	cr_assert_eq(cow_open(io, path, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, &disk, &err), 0, "%s", err.message);
	cr_assert_eq(cow_read_sync(disk, offset, data, length, &err), 0, "%s", err.message);
	cow_close(disk, NULL);
	cow_io_destroy(io);
	for (uint64_t i = 0; i < length; i++)
		if (data[i] != value)
			return false;
	return true;
}

static bool disk_holds(struct fixture *f, uint64_t offset, uint64_t length, int value)
{
	struct err err = ERR_INIT;
	CLEANUP_FREE uint8_t *data = malloc(length);
	cr_assert_eq(cow_read_sync(f->disk, offset, data, length, &err), 0, "%s", err.message);
	for (uint64_t i = 0; i < length; i++)
		if (data[i] != value)
			return false;
	return true;
}

static uint64_t allocated_in(struct fixture *f, const char *name)
{
	struct cow_check check = {0};
	struct err err = ERR_INIT;
	CLEANUP_FREE char *path = path_of(f, name);
	cr_expect_eq(cow_check(path, &check, &err), 0, "%s", err.message);
	return check.allocated_clusters;
}

Test(inflight, pending_writes_land_in_the_layer_only)
{
	struct fixture f;
	struct pending w[8], later;
	setup(&f);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_WRITE);
	for (unsigned i = 0; i < 8; i++)
		start(&f, &w[i], COW_WRITE, i * 2 * CLUSTER + 4096, 8192, 0x10 + (int)i);
	settle(&f);
	uint64_t before = clock_now_ns();
	cow_overlay_switch(o);
	cr_expect_lt(clock_now_ns() - before, 1000000, "the switch waited for something");
	cr_expect_eq(cow_overlay_pending(o), 8);

	f.hold = 0;
	start(&f, &later, COW_WRITE, 40 * CLUSTER, CLUSTER, 0x77);
	cr_expect_eq(finish(&f, &later), 0, "a new write does not wait for old ones");
	cr_expect_eq(cow_overlay_pending(o), 8);
	cow_io_release_held(f.io);
	for (unsigned i = 0; i < 8; i++)
		cr_expect_eq(finish(&f, &w[i]), 0);
	cr_expect_eq(cow_overlay_pending(o), 0);
	seal(o);

	for (unsigned i = 0; i < 8; i++) {
		cr_expect(file_holds(&f, "layer.qcow2", i * 2 * CLUSTER + 4096, 8192, 0x10 + (int)i),
			  "write %u is not in the layer", i);
		cr_expect(disk_holds(&f, i * 2 * CLUSTER + 4096, 8192, 0x10 + (int)i), "write %u is not in the disk",
			  i);
	}
	cr_expect(file_holds(&f, "layer.qcow2", 40 * CLUSTER, CLUSTER, 0), "a new write is in the layer");
	cr_expect(disk_holds(&f, 40 * CLUSTER, CLUSTER, 0x77));
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	struct cow_check c;
	CLEANUP_FREE char *path = path_of(&f, "layer.qcow2");
	cr_expect_eq(cow_check(path, &c, NULL), 0, "a sealed layer can be opened by readers");
	cr_expect_eq(c.allocated_clusters, 8);
	teardown(&f);
}

Test(inflight, overlay_holds_nothing_of_pending_writes)
{
	struct fixture f;
	struct pending w;
	setup(&f);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_WRITE);
	start(&f, &w, COW_WRITE, 0, 3 * CLUSTER, 0x21);
	settle(&f);
	cow_overlay_switch(o);
	f.hold = 0;
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &w), 0);
	seal(o);
	cr_assert_eq(cow_close(f.disk, NULL), 0);
	cr_expect_eq(allocated_in(&f, "top.qcow2"), 0);
	cr_expect_eq(allocated_in(&f, "layer.qcow2"), 3);
	CLEANUP_FREE char *path = path_of(&f, "top.qcow2");
	cr_assert_eq(cow_open(f.io, path, 0, &f.disk, NULL), 0);
	cr_expect(disk_holds(&f, 0, 3 * CLUSTER, 0x21));
	teardown(&f);
}

static int run_one(struct fixture *f, enum cow_op op, uint64_t offset, uint64_t length, int value)
{
	struct pending p;
	start(f, &p, op, offset, length, value);
	return finish(f, &p);
}

static void write_and_flush(struct fixture *f, unsigned times)
{
	for (unsigned i = 0; i < times; i++) {
		cr_assert_eq(run_one(f, COW_WRITE, 4096, 4096, 0x30), 0);
		cr_assert_eq(run_one(f, COW_FLUSH, 0, 0, 0), 0);
	}
}

/* `stable` and `syncs` have come since the last time. */
static void expect_new(struct fixture *f, unsigned stable, unsigned syncs, const char *when)
{
	cr_expect_eq(f->stable_writes, stable, "%s: %u writes stable by themselves, not %u", when, f->stable_writes, stable);
	cr_expect_eq(f->layer_syncs, syncs, "%s: %u syncs, not %u", when, f->layer_syncs, syncs);
	f->stable_writes = f->layer_syncs = 0;
}

Test(inflight, what_is_flushed_each_time_is_made_stable_by_the_write)
{
	struct fixture f;
	struct pending first, second;
	setup(&f);
	cr_assert_eq(run_one(&f, COW_WRITE, 0, CLUSTER, 0x20), 0);
	cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	f.layer_syncs = 0;
	write_and_flush(&f, 3);
	expect_new(&f, 0, 3, "until it is seen");
	write_and_flush(&f, 5);
	expect_new(&f, 5, 0, "then");

	cr_assert_eq(run_one(&f, COW_READ, 0, 4096, 0), 0);
	cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	write_and_flush(&f, 1);
	expect_new(&f, 1, 0, "after a read and a flush of nothing");

	/* Both are under way at once, and end in this order: the flush owes the second. */
	f.hold = KIND(IO_WRITE);
	start(&f, &first, COW_WRITE, 0, 4096, 0x41);
	start(&f, &second, COW_WRITE, 8192, 4096, 0x42);
	f.hold = 0;
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &first), 0);
	cr_expect_eq(finish(&f, &second), 0);
	cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	expect_new(&f, 1, 1, "two writes and a flush");
	write_and_flush(&f, 3);
	expect_new(&f, 0, 3, "until it is seen again");
	write_and_flush(&f, 1);
	expect_new(&f, 1, 0, "and then");

	f.fail = EIO;
	cr_expect_eq(run_one(&f, COW_WRITE, 4096, 4096, 0x50), -EIO);
	f.fail = 0;
	cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	expect_new(&f, 1, 1, "a write that failed");
	teardown(&f);
}

Test(inflight, a_stable_write_that_fails_spoils_the_round_under_way)
{
	struct fixture f;
	struct pending flush;
	setup(&f);
	cr_assert_eq(run_one(&f, COW_WRITE, 0, 2 * CLUSTER, 0x20), 0);
	cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	write_and_flush(&f, 3);
	f.hold = KIND(IO_WRITE);
	cr_assert_eq(run_one(&f, COW_DISCARD, CLUSTER, CLUSTER, 0), 0);
	start(&f, &flush, COW_FLUSH, 0, 0, 0);
	settle(&f);
	cr_assert_gt(cow_io_held(f.io), 0, "no metadata on its way");
	f.hold = 0;
	f.fail = EIO;
	cr_expect_eq(run_one(&f, COW_WRITE, 4096, 4096, 0x21), -EIO);
	cr_expect_eq(f.stable_writes, 1);
	f.fail = 0;
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &flush), -EIO);
	cr_expect_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
	cr_expect(disk_holds(&f, CLUSTER, CLUSTER, 0));
	teardown(&f);
}

Test(inflight, a_small_write_copies_up_with_one_read)
{
	struct fixture f;
	setup(&f);
	cr_assert_eq(run_one(&f, COW_WRITE, 0, CLUSTER, 0x11), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	seal(o);
	f.reads = 0;
	cr_assert_eq(run_one(&f, COW_WRITE, 5 * 512, 512, 0x22), 0);
	cr_expect_eq(f.reads, 1);
	cr_expect(disk_holds(&f, 0, 5 * 512, 0x11));
	cr_expect(disk_holds(&f, 5 * 512, 512, 0x22));
	cr_expect(disk_holds(&f, 6 * 512, CLUSTER - 6 * 512, 0x11));
	f.reads = 0;
	cr_assert_eq(run_one(&f, COW_WRITE, 4096 + 512, 4096, 0x33), 0);
	cr_expect_eq(f.reads, 1, "a page between, of which both sides have some");
	cr_expect(disk_holds(&f, 6 * 512, 3 * 512, 0x11));
	cr_expect(disk_holds(&f, 9 * 512, 4096, 0x33));
	cr_expect(disk_holds(&f, 17 * 512, CLUSTER - 17 * 512, 0x11));
	teardown(&f);
}

/* Counts, then links: each is one write here, which takes its sync with it. */
Test(inflight, a_flush_of_a_new_cluster_waits_twice)
{
	struct fixture f;
	setup(&f);
	write_and_flush(&f, 2);
	for (unsigned i = 1; i < 4; i++) {
		f.layer_syncs = f.joined_syncs = 0;
		cr_assert_eq(run_one(&f, COW_WRITE, i * CLUSTER, 4096, 0x12), 0);
		cr_assert_eq(run_one(&f, COW_FLUSH, 0, 0, 0), 0);
		cr_expect_eq(f.joined_syncs, i == 1 ? 0 : 2, "seen after four");
		cr_expect_eq(f.layer_syncs, i == 1 ? 2 : 0);
	}
	teardown(&f);
}

Test(inflight, copy_up_waits_for_pending_write_in_the_cluster)
{
	struct fixture f;
	struct pending old, new, whole;
	setup(&f);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_WRITE);
	start(&f, &old, COW_WRITE, 0, 1024, 0xaa);
	settle(&f);
	cow_overlay_switch(o);
	f.hold = 0;
	start(&f, &new, COW_WRITE, 2048, 1024, 0xbb); /* copies up the rest of the overlay's cluster, 4 KiB: must wait */
	start(&f, &whole, COW_WRITE, CLUSTER, CLUSTER, 0xcc); /* copies nothing: must not */
	settle(&f);
	cr_expect(!new.done, "the cluster was copied up under a pending write");
	cr_expect_eq(finish(&f, &whole), 0);
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &old), 0);
	cr_expect_eq(finish(&f, &new), 0);
	cr_expect(disk_holds(&f, 0, 1024, 0xaa), "the pending write was hidden by the copy");
	cr_expect(disk_holds(&f, 2048, 1024, 0xbb));
	cr_expect(disk_holds(&f, 1024, 1024, 0));
	seal(o);
	cr_expect(file_holds(&f, "layer.qcow2", 0, 1024, 0xaa));
	cr_expect(file_holds(&f, "layer.qcow2", 2048, 1024, 0));
	teardown(&f);
}

/* As small as a guest's writes, as long as the tables that are held in memory stay small. */
Test(inflight, clusters_of_overlays)
{
	static const struct {
		uint64_t size;
		uint32_t cluster, overlay;
	} cases[] = {
		{1 << 20, 65536, 4096},	     {32ull << 30, 65536, 4096}, {(32ull << 30) + 65536, 65536, 8192}, {1ull << 40, 65536, 32768},
		{8ull << 40, 65536, 65536}, {1 << 20, 512, 512},	   {1 << 20, 2 << 20, 4096},	       {1 << 20, 0, 4096},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		struct fixture f = {.folder = "/tmp/vmcp-inflight-XXXXXX"};
		cr_assert(mkdtemp(f.folder) != NULL);
		CLEANUP_FREE char *layer = path_of(&f, "layer"), *top = path_of(&f, "top.qcow2");
		struct cow_create create = {.size_bytes = cases[i].size, .cluster_bytes = cases[i].cluster};
		struct cow_disk *overlay;
		cr_assert_eq(cases[i].cluster ? cow_create(layer, &create, NULL) : cow_create_raw(layer, create.size_bytes, NULL), 0);
		cr_assert_eq(cow_io_create(NULL, &f.io, NULL), 0);
		cr_assert_eq(cow_open(f.io, layer, 0, &f.disk, NULL), 0);
		cow_overlay_abandon(prepare(&f, "top.qcow2", "layer"));
		cr_assert_eq(cow_open(f.io, top, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, &overlay, NULL), 0);
		cr_expect_eq(cow_cluster_bytes(overlay), cases[i].overlay, "case %zu: %u", i, cow_cluster_bytes(overlay));
		cow_close(overlay, NULL);
		cow_close(f.disk, NULL);
		cow_io_destroy(f.io);
		file_remove_tree(AT_FDCWD, f.folder, NULL);
	}
}

Test(inflight, pending_read_and_discard_and_flush)
{
	struct fixture f;
	struct pending read, discard, flush;
	uint8_t pattern[4096];
	setup(&f);
	memset(pattern, 0x42, sizeof(pattern));
	for (unsigned i = 0; i < 32; i++)
		cr_assert_eq(cow_write_sync(f.disk, i * 4096, pattern, sizeof(pattern), NULL), 0);
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_READ) | KIND(IO_SYNC);
	start(&f, &read, COW_READ, 0, 4096, 0);
	start(&f, &flush, COW_FLUSH, 0, 0, 0);
	start(&f, &discard, COW_DISCARD, CLUSTER, CLUSTER, 0);
	cow_overlay_switch(o);
	settle(&f);
	cr_expect(!read.done);
	cr_expect_eq(cow_overlay_pending(o), 1 + !flush.done, "read, and the flush if it has to sync");
	uint8_t *data = read.data;
	cr_assert_eq(data[0], 0);
	f.hold = 0;
	cow_io_release_held(f.io);
	while (!read.done)
		cow_io_drive(f.io, 10);
	cr_expect_eq(data[0], 0x42);
	cr_expect_eq(finish(&f, &read), 0);
	cr_expect_eq(finish(&f, &flush), 0);
	cr_expect_eq(finish(&f, &discard), 0);
	seal(o);
	cr_expect(file_holds(&f, "layer.qcow2", CLUSTER, CLUSTER, 0), "the discard did not reach the layer");
	cr_expect(disk_holds(&f, CLUSTER, CLUSTER, 0));
	teardown(&f);
}

Test(inflight, flush_after_the_switch_covers_the_layer)
{
	struct fixture f;
	uint8_t data[4096];
	setup(&f);
	memset(data, 0x33, sizeof(data));
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	cr_expect(file_holds(&f, "layer.qcow2", 0, 4096, 0),
		  "metadata is written back later, or this test tests nothing");
	unsigned before = f.layer_syncs;
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	cr_expect_gt(f.layer_syncs, before);
	cr_expect(file_holds(&f, "layer.qcow2", 0, 4096, 0x33), "a flush left a completed write behind");
	seal(o);
	before = f.layer_syncs;
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	cr_expect_eq(f.layer_syncs, before, "a sealed layer is left alone");
	teardown(&f);
}

Test(inflight, cancelled_seal_names_the_request_and_goes_on)
{
	struct fixture f;
	struct pending w;
	struct err err = ERR_INIT;
	volatile bool cancel = true;
	setup(&f);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_WRITE);
	start(&f, &w, COW_WRITE, 5 * CLUSTER, 4096, 0x11);
	settle(&f);
	cow_overlay_switch(o);
	cr_expect_eq(cow_overlay_seal(o, &(struct wait){.cancel = &cancel}, &err), -ECANCELED);
	cr_expect(strstr(err.message, "a write of 4096 bytes at sector 640, for 0.") != NULL, "%s", err.message);
	f.hold = 0;
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &w), 0);
	seal(o);
	cr_expect(file_holds(&f, "layer.qcow2", 5 * CLUSTER, 4096, 0x11));
	teardown(&f);
}

Test(inflight, abandoned_and_left_overlays)
{
	struct fixture f;
	struct err err = ERR_INIT;
	volatile bool cancel = true;
	uint8_t data[4096] = {1};
	setup(&f);
	cow_overlay_abandon(prepare(&f, "third.qcow2", "layer.qcow2"));
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	/* Cancelled and never sealed: closing the disk still writes the layer's metadata. */
	cr_expect_eq(cow_overlay_seal(o, &(struct wait){.cancel = &cancel}, &err), -ECANCELED);
	teardown(&f);
}

Test(inflight, two_layers_being_sealed)
{
	struct fixture f;
	struct pending a, b, c;
	setup(&f);
	struct cow_overlay *first = prepare(&f, "top.qcow2", "layer.qcow2");
	f.hold = KIND(IO_WRITE);
	start(&f, &a, COW_WRITE, 0, 512, 0xa1);
	settle(&f);
	cow_overlay_switch(first);
	f.hold = 0;
	struct cow_overlay *second = prepare(&f, "third.qcow2", "top.qcow2");
	start(&f, &b, COW_WRITE, 512, 512, 0xb2); /* waits for a */
	settle(&f);
	cow_overlay_switch(second);
	start(&f, &c, COW_WRITE, 1024, 512, 0xc3); /* waits for both */
	settle(&f);
	cr_expect(!a.done && !b.done && !c.done);
	cr_expect_eq(cow_overlay_pending(first), 1);
	cr_expect_eq(cow_overlay_pending(second), 1);
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &a), 0);
	cr_expect_eq(finish(&f, &b), 0);
	cr_expect_eq(finish(&f, &c), 0);
	seal(second);
	seal(first);
	cr_expect(file_holds(&f, "layer.qcow2", 0, 512, 0xa1) && file_holds(&f, "layer.qcow2", 512, 512, 0));
	cr_expect(file_holds(&f, "top.qcow2", 0, 512, 0xa1) && file_holds(&f, "top.qcow2", 512, 512, 0xb2));
	cr_expect(file_holds(&f, "top.qcow2", 1024, 512, 0));
	cr_expect(disk_holds(&f, 0, 512, 0xa1) && disk_holds(&f, 512, 512, 0xb2) && disk_holds(&f, 1024, 512, 0xc3));
	teardown(&f);
}

Test(inflight, a_flush_outlives_the_layers_that_it_goes_through)
{
	struct fixture f;
	struct pending flush;
	struct cow_merged *merged;
	struct err err = ERR_INIT;
	uint8_t data[4096];
	setup(&f);
	memset(data, 0x5a, sizeof(data));
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *first = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(first);
	struct cow_overlay *second = prepare(&f, "third.qcow2", "top.qcow2");
	cow_overlay_switch(second);
	struct cow_overlay *third = prepare(&f, "fourth.qcow2", "third.qcow2");
	cow_overlay_switch(third);
	start(&f, &flush, COW_FLUSH, 0, 0, 0);
	seal(third);
	seal(second);
	seal(first); /* by the sync that the flush waited for: it has gone on to the next layer, and not beyond */
	cr_expect(!flush.done);
	CLEANUP_FREE char *path = path_of(&f, "third.qcow2");
	const struct cow_merge merge = {.path = path, .layers = 3};
	cr_assert_eq(cow_merge_prepare(&merge, &merged, &err), 0, "%s", err.message);
	cr_assert_eq(cow_merge_commit(merged, &err), 0, "%s", err.message);
	cr_assert_eq(cow_merge_adopt(merged, f.disk, &err), 0, "%s", err.message);
	cow_merge_free(merged);
	cr_expect_eq(finish(&f, &flush), 0);
	cr_expect(file_holds(&f, "third.qcow2", 0, sizeof(data), 0x5a));
	teardown(&f);
}

Test(inflight, error_of_a_pending_write_is_reported_and_harmless)
{
	struct fixture f;
	struct pending w;
	setup(&f);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	f.fail = EIO;
	start(&f, &w, COW_WRITE, 0, 4096, 0x99);
	cow_overlay_switch(o);
	cr_expect_eq(finish(&f, &w), -EIO);
	f.fail = 0;
	seal(o);
	cr_expect(disk_holds(&f, 0, CLUSTER, 0));
	uint8_t data[4096] = {0x98};
	cr_expect_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	teardown(&f);
}

/* The kernel reports a failed write-back once: whoever is told of it, the guest must be, and no layer that lost data may pass for sealed. */
Test(inflight, a_sync_that_fails_for_the_seal_is_reported_to_the_guest)
{
	struct fixture f;
	struct err err = ERR_INIT;
	uint8_t data[4096] = {0x91};
	setup(&f);
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	f.fail_sync = EIO;
	cr_expect_eq(cow_overlay_seal(o, NULL, &err), -EIO);
	cr_expect_eq(cow_flush_sync(f.disk, &err), -EIO, "the guest was not told");
	cr_expect_eq(cow_flush_sync(f.disk, &err), 0, "and told once: %s", err.message);
	teardown(&f);
}

Test(inflight, a_sync_that_fails_for_a_later_flush_spoils_the_layer)
{
	struct fixture f;
	struct err err = ERR_INIT;
	uint8_t data[4096] = {0x92};
	setup(&f);
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	f.fail_sync = EIO;
	cr_expect_eq(cow_flush_sync(f.disk, &err), -EIO);
	cr_expect_eq(cow_overlay_seal(o, NULL, &err), -EIO, "the guest of that checkpoint would never be told");
	cr_expect_eq(cow_flush_sync(f.disk, &err), 0, "%s", err.message);
	teardown(&f);
}

Test(inflight, a_sync_that_fails_for_a_pending_flush_is_known_in_both_copies)
{
	struct fixture f;
	struct pending flush;
	uint8_t data[4096] = {0x93};
	setup(&f);
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	start(&f, &flush, COW_FLUSH, 0, 0, 0);
	cow_overlay_switch(o);
	f.fail_sync = EIO;
	cr_expect_eq(finish(&f, &flush), -EIO);
	seal(o);
	cr_expect_eq(cow_flush_sync(f.disk, NULL), 0);
	teardown(&f);
}

Test(inflight, overlapping_allocations_wait_for_each_other)
{
	struct fixture f;
	struct pending w[16];
	setup(&f);
	f.hold = KIND(IO_WRITE);
	for (unsigned i = 0; i < 16; i++)
		start(&f, &w[i], COW_WRITE, 3 * CLUSTER + i * 4096, 4096, (int)i + 1);
	settle(&f);
	cr_expect_eq(cow_io_held(f.io), 1, "one claims the cluster, the others wait");
	f.hold = 0;
	cow_io_release_held(f.io);
	for (unsigned i = 0; i < 16; i++) {
		cr_expect_eq(finish(&f, &w[i]), 0);
		cr_expect(disk_holds(&f, 3 * CLUSTER + i * 4096, 4096, (int)i + 1));
	}
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	teardown(&f);
}

Test(inflight, an_overlay_is_empty_until_it_is_written)
{
	struct fixture f;
	struct pending p;
	setup(&f);
	CLEANUP_FREE char *layer = path_of(&f, "layer.qcow2");
	CLEANUP_FREE char *top = path_of(&f, "top.qcow2");
	CLEANUP_FREE char *other = path_of(&f, "third.qcow2");
	cr_expect(!cow_is_empty_overlay(f.disk, layer, layer), "no overlay at all");
	start(&f, &p, COW_WRITE, 0, 4096, 0x11);
	cr_expect_eq(finish(&f, &p), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	cr_expect(!cow_is_empty_overlay(f.disk, top, layer), "its layer is not sealed yet");
	seal(o);
	cr_expect(cow_is_empty_overlay(f.disk, top, layer));
	cr_expect(!cow_is_empty_overlay(f.disk, layer, layer), "the path is of another file");
	cr_expect(!cow_is_empty_overlay(f.disk, other, layer), "the path is of none");
	cr_expect(!cow_is_empty_overlay(f.disk, top, top), "it stands on another layer");
	/* Reads and flushes leave it as it is. */
	cr_expect(disk_holds(&f, 0, 4096, 0x11));
	cr_assert_eq(cow_flush_sync(f.disk, NULL), 0);
	cr_expect(cow_is_empty_overlay(f.disk, top, layer));
	f.hold = KIND(IO_WRITE);
	start(&f, &p, COW_WRITE, 8 * CLUSTER, 4096, 0x22);
	settle(&f);
	cr_expect(!cow_is_empty_overlay(f.disk, top, layer), "a write is in flight");
	f.hold = 0;
	cow_io_release_held(f.io);
	cr_expect_eq(finish(&f, &p), 0);
	cr_expect(!cow_is_empty_overlay(f.disk, top, layer));
	teardown(&f);
}

Test(inflight, a_discard_is_content_too)
{
	struct fixture f;
	struct pending p;
	setup(&f);
	CLEANUP_FREE char *layer = path_of(&f, "layer.qcow2");
	CLEANUP_FREE char *top = path_of(&f, "top.qcow2");
	start(&f, &p, COW_WRITE, 0, CLUSTER, 0x11);
	cr_expect_eq(finish(&f, &p), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	seal(o);
	start(&f, &p, COW_WRITE_ZEROES, 0, CLUSTER, 0);
	cr_expect_eq(finish(&f, &p), 0);
	cr_expect(disk_holds(&f, 0, CLUSTER, 0));
	cr_expect(!cow_is_empty_overlay(f.disk, top, layer));
	teardown(&f);
}

Test(inflight, replace_drops_what_was_not_written_back)
{
	struct fixture f;
	struct err err = ERR_INIT;
	uint8_t data[4096];
	setup(&f);
	memset(data, 0x44, sizeof(data));
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	struct cow_overlay *o = prepare(&f, "top.qcow2", "layer.qcow2");
	cow_overlay_switch(o);
	seal(o);
	memset(data, 0x55, sizeof(data));
	cr_assert_eq(cow_write_sync(f.disk, 0, data, sizeof(data), NULL), 0);
	CLEANUP_FREE char *path = path_of(&f, "third.qcow2");
	struct cow_create create = {.backing = "layer.qcow2", .backing_format = COW_FORMAT_QCOW2};
	cr_assert_eq(cow_create(path, &create, &err), 0, "%s", err.message);
	CLEANUP_FREE char *missing = path_of(&f, "missing.qcow2");
	cr_expect_eq(cow_replace(f.disk, missing, &err), -ENOENT);
	cr_expect(disk_holds(&f, 0, 4096, 0x55), "a failed replacement changed the disk");
	cr_assert_eq(cow_replace(f.disk, path, &err), 0, "%s", err.message);
	cr_expect(disk_holds(&f, 0, 4096, 0x44));
	CLEANUP_FREE char *dropped = path_of(&f, "top.qcow2");
	unlink(dropped);
	teardown(&f);
}
