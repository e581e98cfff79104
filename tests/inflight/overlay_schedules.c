/*
 * Random schedules of requests and overlay switches on one disk, in one thread: the same seed gives the same run, operation by operation.
 * Requests overlap as they like; operations end in any order, in pieces, some with errors; checkpoints come while they are held. Then every
 * layer must hold what was issued before its switch and nothing else, and the disk all of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "base/log.h"
#include "cowdisk/check.h"
#include "cowdisk/overlay.h"
#include "tests/inflight/history.h"
#include "tests/inflight/schedules.h"
#include "tests/inflight/test_layer.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SCHEDULES = 500 };
#else
enum { SCHEDULES = 2000 };
#endif
enum { SLOTS = 64, LAYERS = 4, MOST_SECTORS = 512, MOST_IOV = 4 };

struct sim;

struct slot {
	struct cow_request request;
	struct iovec iov[MOST_IOV];
	struct sim *sim;
	bool busy;
	uint64_t sector, count, from;
	unsigned event;
	uint8_t data[MOST_SECTORS * SECTOR];
};

struct sealed {
	struct cow_overlay *overlay; /* NULL: sealed */
	char *path;
	uint64_t moment; /* of the switch */
	uint64_t sum;	 /* of the file, when it was sealed */
	bool failed, raw;
};

struct sim {
	uint64_t random, version, sectors, cluster_sectors;
	struct cow_io *io;
	struct cow_disk *disk;
	struct test_layer *layer;
	struct history *history;
	struct test_rule rules[2];
	unsigned depth, busy;
	struct sealed sealed[LAYERS];
	unsigned switches;
	unsigned long failed;
	struct slot slots[SLOTS];
};

static char folder[64];
static unsigned long requests, failed_requests, pending_at_switches, errors, cuts;

static uint64_t pick(struct sim *s, uint64_t below) { return pick_below(&s->random, below); }

static char *path_of(unsigned n) { return xasprintf("%s/%u.qcow2", folder, n); }

static void check_sectors(struct sim *s, const char *what, const uint8_t *data, uint64_t sector, uint64_t count, uint64_t from, uint64_t moment)
{
	for (uint64_t i = 0; i < count; i++) {
		uint64_t version;
		bool whole = read_version(data + i * SECTOR, sector + i, &version);
		bool allowed = whole && history_allows(s->history, sector + i, version, from, moment);
		if (!allowed && s->failed++ < 3) {
			fprintf(stderr, "%s: sector %" PRIu64 ": %s version %" PRIu64 ", read from %" PRIu64 ", moment %" PRIu64 "\n", what,
				sector + i, whole ? "whole" : "torn", version, from, moment);
			history_print(s->history, sector + i);
		}
		CHECK(allowed);
	}
}

static void on_done(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	struct sim *s = slot->sim;
	CHECK(slot->busy);
	slot->busy = false;
	s->busy--;
	requests++;
	failed_requests += result < 0;
	CHECK(result == 0 || (s->rules[1].error_percent && result == -EIO));
	if (request->op == COW_READ && result == 0)
		check_sectors(s, "read", slot->data, slot->sector, slot->count, slot->from, HISTORY_ALL);
	else if (request->op != COW_READ && request->op != COW_FLUSH)
		history_end(s->history, slot->event, result == 0);
}

static void choose_range(struct sim *s, struct slot *slot)
{
	uint64_t most = pick(s, 3) ? 8 : MOST_SECTORS;
	slot->count = 1 + pick(s, min_u64(most, s->sectors));
	/* Mostly in a few clusters, so that they meet. */
	uint64_t room = s->sectors - slot->count + 1;
	slot->sector = pick(s, pick(s, 3) ? min_u64(room, 3 * s->cluster_sectors) : room);
	if (pick(s, 3) == 0) {
		slot->sector = round_down(slot->sector, s->cluster_sectors);
		slot->count = min_u64(min_u64(round_up(slot->count, s->cluster_sectors), s->sectors - slot->sector), MOST_SECTORS);
	}
}

static void make_iov(struct sim *s, struct slot *slot)
{
	uint64_t left = slot->count * SECTOR, at = 0;
	unsigned n = 0;
	for (; left > 0; n++) {
		uint64_t take = n == MOST_IOV - 1 || pick(s, 2) ? left : 1 + pick(s, left);
		slot->iov[n] = (struct iovec){slot->data + at, (size_t)take};
		at += take;
		left -= take;
	}
	slot->request.iov = slot->iov;
	slot->request.iov_count = n;
}

static void issue(struct sim *s)
{
	static const enum cow_op ops[] = {COW_READ,  COW_READ,	  COW_READ,	    COW_WRITE,	      COW_WRITE, COW_WRITE,
					  COW_WRITE, COW_DISCARD, COW_WRITE_ZEROES, COW_FLUSH,	 COW_FLUSH};
	struct slot *slot = s->slots;
	while (slot->busy)
		slot++;
	enum cow_op op = ops[pick(s, ARRAY_LENGTH(ops))];
	choose_range(s, slot);
	if (op == COW_FLUSH)
		slot->sector = slot->count = 0;
	uint64_t version = s->version += 2;
	slot->sim = s;
	slot->request = (struct cow_request){.op = op, .may_unmap = pick(s, 2), .done = on_done, .opaque = slot};
	slot->request.offset = slot->sector * SECTOR;
	slot->request.length = slot->count * SECTOR;
	if (op == COW_READ || op == COW_WRITE)
		make_iov(s, slot);
	for (uint64_t i = 0; i < slot->count; i++)
		fill_sector(slot->data + i * SECTOR, slot->sector + i, op == COW_WRITE ? version : UINT64_MAX - 1);
	if (op == COW_READ)
		slot->from = history_moment(s->history);
	else if (op != COW_FLUSH)
		slot->event = history_begin(s->history,
					    op == COW_WRITE	? HISTORY_WRITE
					    : op == COW_DISCARD ? HISTORY_DISCARD
								: HISTORY_ZEROES,
					    slot->sector, slot->count, version);
	slot->busy = true;
	s->busy++;
	cow_submit(s->disk, &slot->request);
}

static uint64_t sum_file(const char *path)
{
	CLEANUP_FREE uint8_t *data = malloc(1 << 20);
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	XXH64_hash_t sum = 0;
	ssize_t n;
	CHECK(fd >= 0);
	while ((n = read(fd, data, 1 << 20)) > 0)
		sum = XXH64(data, (size_t)n, sum);
	return sum;
}

static void switch_overlay(struct sim *s)
{
	struct err err = ERR_INIT;
	struct sealed *l = &s->sealed[s->switches];
	CLEANUP_FREE char *path = path_of(s->switches + 1);
	l->path = path_of(s->switches);
	l->raw = cow_format_of(s->disk) == COW_FORMAT_RAW;
	int rc = cow_overlay_prepare(s->disk, path, l->path, &l->overlay, &err);
	CHECK(rc == 0);
	if (rc != 0) {
		fprintf(stderr, "%s\n", err.message);
		return;
	}
	/* Operations go on meanwhile, until the pause. */
	while (pick(s, 2))
		cow_io_drive(s->io, 0);
	l->moment = history_moment(s->history);
	pending_at_switches += s->busy;
	cow_overlay_switch(l->overlay);
	CHECK(cow_overlay_pending(l->overlay) <= s->busy);
	s->switches++;
}

/* The oldest, as the engine does; now and then it is cancelled and called again. */
static void seal_one(struct sim *s)
{
	for (unsigned i = 0; i < s->switches; i++) {
		struct sealed *l = &s->sealed[i];
		struct err err = ERR_INIT;
		volatile bool cancel = pick(s, 3) == 0;
		if (!l->overlay)
			continue;
		int rc = cow_overlay_seal(l->overlay, &(struct wait){.cancel = &cancel}, &err);
		CHECK(rc == 0 || (rc == -ECANCELED && cancel) || (rc == -EIO && s->rules[1].error_percent));
		if (rc == -ECANCELED)
			return;
		l->overlay = NULL;
		l->failed = rc != 0;
		l->sum = sum_file(l->path);
		return;
	}
}

static void step(struct sim *s)
{
	uint64_t what = pick(s, 100);
	if (what < 2 && s->switches < LAYERS)
		switch_overlay(s);
	else if (what < 4)
		seal_one(s);
	else if (what < 60 && s->busy < s->depth)
		issue(s);
	else
		cow_io_drive(s->io, 0);
}

static void check_file(const char *path, bool leaks_allowed)
{
	struct cow_check check;
	struct err err = ERR_INIT;
	int rc = cow_check(path, &check, &err);
	CHECK(rc == 0);
	if (rc != 0 || check.corruptions || check.leaks)
		fprintf(stderr, "%s: %s %s, %" PRIu64 " leaks\n", path, err.message, check.first, (uint64_t)check.leaks);
	CHECK(rc != 0 || check.corruptions == 0);
	CHECK(rc != 0 || leaks_allowed || check.leaks == 0);
}

static void check_disk(struct sim *s, const char *what, struct cow_disk *disk, uint64_t moment)
{
	CLEANUP_FREE uint8_t *data = malloc(s->sectors * SECTOR);
	CHECK(cow_read_sync(disk, 0, data, s->sectors * SECTOR, NULL) == 0);
	check_sectors(s, what, data, 0, s->sectors, HISTORY_ALL, moment);
}

/* As others find them, now that all is over. */
static void check_layers(struct sim *s)
{
	bool failed = false;
	for (unsigned i = 0; i < s->switches; i++) {
		struct sealed *l = &s->sealed[i];
		struct cow_disk *disk;
		failed = failed || l->failed;
		if (failed)
			break; /* a checkpoint that could not be: those above stand on it */
		CHECK(sum_file(l->path) == l->sum);
		if (!l->raw)
			check_file(l->path, s->rules[1].error_percent);
		CHECK(cow_open(s->io, l->path, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, &disk, NULL) == 0);
		check_disk(s, l->path, disk, l->moment);
		cow_close(disk, NULL);
	}
}

static void fill_at_first(struct sim *s)
{
	uint8_t *data = s->slots[0].data;
	for (uint64_t at = 0; at < s->sectors;) {
		uint64_t run = min_u64(1 + pick(s, 2 * s->cluster_sectors), min_u64(s->sectors - at, MOST_SECTORS));
		uint64_t version = pick(s, 2) ? s->version += 2 : 0;
		for (uint64_t i = 0; i < run; i++) {
			fill_sector(data + i * SECTOR, at + i, version);
			history_settle(s->history, at + i, version);
		}
		if (version)
			CHECK(cow_write_sync(s->disk, at * SECTOR, data, run * SECTOR, NULL) == 0);
		at += run;
	}
}

static bool start(struct sim *s, uint64_t seed)
{
	static const uint32_t clusters[] = {512, 4096, 4096, 65536};
	struct err err = ERR_INIT;
	CLEANUP_FREE char *path = path_of(0);
	s->random = seed;
	uint32_t cluster = clusters[pick(s, ARRAY_LENGTH(clusters))];
	s->cluster_sectors = cluster / SECTOR;
	s->sectors = (4 + pick(s, 40)) * s->cluster_sectors - pick(s, s->cluster_sectors);
	s->depth = 1 + (unsigned)pick(s, SLOTS);
	s->history = history_create(s->sectors);
	struct cow_create create = {.size_bytes = s->sectors * SECTOR, .cluster_bytes = cluster};
	bool raw = pick(s, 8) == 0;
	int rc = raw ? cow_create_raw(path, create.size_bytes, &err) : cow_create(path, &create, &err);
	if (rc == 0)
		rc = cow_io_create(NULL, &s->io, &err);
	if (rc == 0)
		rc = cow_open(s->io, path, 0, &s->disk, &err);
	CHECK(rc == 0);
	if (rc != 0) {
		fprintf(stderr, "%s\n", err.message);
		return false;
	}
	if (pick(s, 4))
		fill_at_first(s);
	s->layer = test_layer_create(s->io, NULL, next_random(&s->random));
	s->rules[1] = (struct test_rule){.kinds = RULE_ALL, .hold = true, .short_percent = pick(s, 2) ? 30 : 0};
	if (pick(s, 3) == 0) {
		s->rules[1].error_percent = 1 + (unsigned)pick(s, 5);
		s->rules[1].error = EIO;
	}
	/* One kind lasts longer than the others. */
	s->rules[0] = s->rules[1];
	s->rules[0].kinds = RULE_KIND(pick(s, 2) ? IO_READ : pick(s, IO_ZERO + 1));
	s->rules[0].reluctance = 32;
	test_layer_set_rules(s->layer, s->rules, 2);
	return true;
}

static void finish(struct sim *s)
{
	struct err err = ERR_INIT;
	while (s->busy)
		cow_io_drive(s->io, 0);
	for (unsigned n = 0; n < 100 * LAYERS && s->switches && s->sealed[s->switches - 1].overlay; n++)
		seal_one(s);
	errors += test_layer_errors(s->layer);
	cuts += test_layer_cuts(s->layer);
	test_layer_set_rules(s->layer, NULL, 0);
	check_disk(s, "disk", s->disk, HISTORY_ALL);
	CLEANUP_FREE char *top = xstrdup(cow_path(s->disk));
	int rc = cow_close(s->disk, &err);
	CHECK(rc == 0 || s->rules[1].error_percent);
	if (s->rules[1].error_percent == 0 && cow_open(s->io, top, COW_OPEN_READONLY, &s->disk, &err) == 0) {
		check_disk(s, "disk, opened again", s->disk, HISTORY_ALL);
		cow_close(s->disk, NULL);
		if (s->switches)
			check_file(top, false);
	}
	check_layers(s);
}

static void run(uint64_t seed)
{
	struct sim *s = xcalloc(1, sizeof(*s));
	if (start(s, seed)) {
		for (uint64_t n = 20 + pick(s, 300); n > 0 && s->failed == 0; n--)
			step(s);
		finish(s);
		test_layer_destroy(s->layer);
		cow_io_destroy(s->io);
	}
	for (unsigned i = 0; i <= LAYERS; i++) {
		CLEANUP_FREE char *path = path_of(i);
		unlink(path);
		if (i < LAYERS)
			free(s->sealed[i].path);
	}
	history_free(s->history);
	free(s);
}

int main(void)
{
	snprintf(folder, sizeof(folder), "%s/vmcp-overlays-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
	CHECK(mkdtemp(folder) != NULL);
	log_set_level(LOG_LEVEL_ERROR);
	schedules_run("overlay schedules", SCHEDULES, run);
	printf("%lu requests, %lu of them failed, %lu in flight at switches, %lu operations failed, %lu cut short\n", requests, failed_requests,
	       pending_at_switches, errors, cuts);
	CHECK(schedules_asked_for() || (pending_at_switches && failed_requests && errors && cuts));
	file_remove_tree(AT_FDCWD, folder, NULL);
	return check_report();
}
