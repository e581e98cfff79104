/*
 * The threads as in a VM: the I/O thread runs the loop and has requests in flight all the time; another thread
 * prepares overlays, parks the loop, switches, unparks, seals, and now and then merges. Every completed write must be read back, whichever
 * layer it went to.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "cowdisk/check.h"
#include "cowdisk/merge.h"
#include "cowdisk/overlay.h"
#include "tests/lib/check.h"

enum { LANES = 16, ROUNDS = 30, MERGE_EVERY = 6, LANE_BYTES = 1 << 20, BLOCK = 4096 };

/* One request at a time in a stretch of the disk of its own. Owner: the I/O thread. */
struct lane {
	struct cow_request request;
	struct iovec iov;
	uint8_t data[BLOCK];
	uint32_t value[LANE_BYTES / BLOCK]; /* of each block; 0: never written */
	unsigned index, block, step;
	uint64_t random;
	struct traffic *traffic;
};

struct traffic {
	struct cow_disk *disk;
	struct lane *lanes;
	_Atomic bool stop;
	_Atomic unsigned ended; /* lanes that have stopped */
	_Atomic unsigned long completed;
};

static void next_request(struct lane *lane);

static void lane_done(struct cow_request *request, int result)
{
	struct lane *lane = request->opaque;
	CHECK(result == 0);
	if (request->op == COW_READ) {
		uint32_t got;
		memcpy(&got, lane->data, sizeof(got));
		CHECK(got == lane->value[lane->block]);
		CHECK(memcmp(lane->data, lane->data + 4, BLOCK - 4) == 0);
	} else if (request->op == COW_WRITE)
		memcpy(&lane->value[lane->block], lane->data, sizeof(uint32_t));
	atomic_fetch_add(&lane->traffic->completed, 1);
	if (atomic_load(&lane->traffic->stop))
		atomic_fetch_add(&lane->traffic->ended, 1);
	else
		next_request(lane);
}

static void next_request(struct lane *lane)
{
	lane->random = lane->random * 6364136223846793005ull + 1442695040888963407ull;
	unsigned kind = (unsigned)(lane->random >> 40) % 16;
	lane->block = (unsigned)(lane->random >> 45) % (LANE_BYTES / BLOCK);
	lane->iov = (struct iovec){lane->data, BLOCK};
	lane->request = (struct cow_request){
		.op = kind == 0	 ? COW_FLUSH
		      : kind < 8 ? COW_READ
				 : COW_WRITE,
		.offset = (uint64_t)lane->index * LANE_BYTES + (uint64_t)lane->block * BLOCK,
		.length = BLOCK,
		.iov = &lane->iov,
		.iov_count = 1,
		.done = lane_done,
		.opaque = lane,
	};
	if (lane->request.op == COW_WRITE) {
		uint32_t value = ++lane->step;
		for (unsigned i = 0; i < BLOCK; i += 4)
			memcpy(lane->data + i, &value, 4);
	}
	cow_submit(lane->traffic->disk, &lane->request);
}

static void start_traffic(void *opaque)
{
	struct traffic *t = opaque;
	for (unsigned i = 0; i < LANES; i++) {
		t->lanes[i].index = i;
		t->lanes[i].random = i + 1;
		t->lanes[i].traffic = t;
		next_request(&t->lanes[i]);
	}
}

static void *io_thread(void *opaque)
{
	CHECK(loop_run(opaque, NULL) == 0);
	return NULL;
}

static void wait_for(struct traffic *t, unsigned long more)
{
	unsigned long from = atomic_load(&t->completed);
	while (atomic_load(&t->completed) < from + more)
		nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

static void checkpoint(struct loop *loop, struct traffic *t, const char *folder, unsigned n, uint64_t *longest)
{
	struct err err = ERR_INIT;
	struct cow_overlay *o;
	CLEANUP_FREE char *path = xasprintf("%s/%u.qcow2", folder, n);
	CLEANUP_FREE char *layer = xasprintf("%u.qcow2", n - 1);
	int rc = cow_overlay_prepare(t->disk, path, layer, &o, &err);
	CHECK(rc == 0);
	if (rc < 0) {
		fprintf(stderr, "%s\n", err.message);
		return;
	}
	loop_park_request(loop);
	loop_park_wait(loop);
	uint64_t start = clock_now_ns();
	cow_overlay_switch(o);
	uint64_t spent = clock_now_ns() - start;
	loop_unpark(loop);
	*longest = spent > *longest ? spent : *longest;
	rc = cow_overlay_seal(o, NULL, &err);
	CHECK(rc == 0);
	if (rc < 0)
		fprintf(stderr, "%s\n", err.message);
}

/* The layers below the n-th become one, while requests go through them. */
static void merge_below(struct traffic *t, const char *folder, unsigned n, unsigned layers)
{
	struct err err = ERR_INIT;
	struct cow_merged *merged;
	CLEANUP_FREE char *path = xasprintf("%s/%u.qcow2", folder, n - 1);
	struct cow_merge m = {.path = path, .layers = layers};
	int rc = cow_merge_prepare(&m, &merged, &err);
	if (rc == 0) {
		rc = cow_merge_commit(merged, &err);
		if (rc == 0)
			rc = cow_merge_adopt(merged, t->disk, &err);
		cow_merge_free(merged);
	}
	CHECK(rc == 0);
	if (rc < 0)
		fprintf(stderr, "%s\n", err.message);
}

static void stop_traffic(struct traffic *t)
{
	atomic_store(&t->stop, true);
	while (atomic_load(&t->ended) < LANES)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

static void check_content(struct cow_disk *disk, const struct traffic *t)
{
	uint8_t data[BLOCK];
	for (unsigned i = 0; i < LANES; i++)
		for (unsigned b = 0; b < LANE_BYTES / BLOCK; b++) {
			uint32_t got;
			CHECK(cow_read_sync(disk, (uint64_t)i * LANE_BYTES + (uint64_t)b * BLOCK, data, BLOCK, NULL) ==
			      0);
			memcpy(&got, data, sizeof(got));
			CHECK(got == t->lanes[i].value[b]);
		}
}

static void run(const char *folder)
{
	struct loop *loop;
	struct cow_io *io;
	struct traffic t = {.lanes = xcalloc(LANES, sizeof(struct lane))};
	pthread_t thread;
	uint64_t longest = 0;
	CLEANUP_FREE char *path = xasprintf("%s/0.qcow2", folder);
	struct cow_create create = {.size_bytes = LANES * (uint64_t)LANE_BYTES};
	CHECK(cow_create(path, &create, NULL) == 0);
	CHECK(loop_create(&loop, NULL) == 0);
	loop_set_spare(loop, 2);
	CHECK(cow_io_create(loop, &io, NULL) == 0);
	CHECK(cow_open(io, path, 0, &t.disk, NULL) == 0);
	CHECK(pthread_create(&thread, NULL, io_thread, loop) == 0);
	CHECK(loop_post(loop, start_traffic, &t) == 0);
	for (unsigned n = 1; n <= ROUNDS; n++) {
		wait_for(&t, 200);
		checkpoint(loop, &t, folder, n, &longest);
		if (n % MERGE_EVERY == 0)
			merge_below(&t, folder, n, n == ROUNDS ? 2 : MERGE_EVERY - 1);
	}
	stop_traffic(&t);
	loop_stop(loop);
	pthread_join(thread, NULL);
	check_content(t.disk, &t);
	CHECK(cow_close(t.disk, NULL) == 0);
	CLEANUP_FREE char *top = xasprintf("%s/%d.qcow2", folder, ROUNDS);
	CHECK(cow_open(io, top, COW_OPEN_READONLY, &t.disk, NULL) == 0);
	check_content(t.disk, &t);
	CHECK(cow_close(t.disk, NULL) == 0);
	cow_io_destroy(io);
	loop_destroy(loop);
	for (unsigned n = 0; n <= ROUNDS; n++) {
		struct cow_check c;
		CLEANUP_FREE char *layer = xasprintf("%s/%u.qcow2", folder, n);
		CHECK(cow_check(layer, &c, NULL) == 0 && c.corruptions == 0 && c.leaks == 0);
	}
	printf("%lu requests, %d switches, longest %llu ns\n", atomic_load(&t.completed), ROUNDS,
	       (unsigned long long)longest);
	free(t.lanes);
}

int main(void)
{
	char folder[] = "/tmp/vmcp-overlay-XXXXXX";
	CHECK(mkdtemp(folder) != NULL);
	run(folder);
	file_remove_tree(AT_FDCWD, folder, NULL);
	return check_report();
}
