#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "cowdisk/io_internal.h"
#include "cowdisk/merge.h"
#include "cowdisk/overlay.h"
#include "tests/disk/sectors.h"
#include "tests/disk/stress.h"

/* The journal: mapped, or in memory only. */
struct journal {
	uint64_t sectors;
	uint64_t *durable; /* newest version that a flush covered */
	uint64_t *issued;  /* newest version issued */
	uint64_t *zeroed;  /* newest zero version issued */
	void *map;
	size_t map_bytes;
};

static int journal_open(struct journal *j, const char *path, uint64_t sectors, bool create)
{
	j->map_bytes = 4096 + (size_t)sectors * 24;
	int fd = path ? open(path, O_RDWR | O_CREAT | (create ? O_TRUNC : 0), 0644) : -1;
	if (path && create && ftruncate(fd, (off_t)j->map_bytes) < 0)
		return -errno;
	if (path && !create) {
		struct stat st;
		if (fstat(fd, &st) < 0 || st.st_size < 4096)
			return -EINVAL;
		j->map_bytes = (size_t)st.st_size;
	}
	int flags = path ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
	j->map = mmap(NULL, j->map_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (fd >= 0)
		close(fd);
	if (j->map == MAP_FAILED)
		return -errno;
	uint64_t *head = j->map;
	if (create)
		head[0] = sectors;
	j->sectors = head[0];
	j->durable = (uint64_t *)(void *)((char *)j->map + 4096);
	j->issued = j->durable + j->sectors;
	j->zeroed = j->issued + j->sectors;
	return 0;
}

enum { SLOTS = 256, MAX_SECTORS = 4096 };

struct run;
struct slot {
	struct cow_request request;
	struct iovec iov[8];
	struct run *run;
	bool busy;
	uint64_t sector, count, version;
	uint64_t grain; /* sectors of a cluster of the layer that the request belongs to */
	uint8_t *data;
	uint64_t *snapshot; /* flush: versions that were complete at its start */
};

struct pending_overlay {
	struct cow_overlay *overlay;
	struct pending_overlay *next;
};

struct run {
	const struct stress *s;
	struct cow_io *io;
	struct cow_disk *disk;
	struct journal journal;
	uint64_t *complete; /* per sector: newest version that has ended */
	uint8_t *unknown;   /* per sector: a failed request was there */
	uint64_t sectors, version, random;
	struct slot slots[SLOTS];
	unsigned busy, issued, failures, errors, switches, layer;
	struct pending_overlay *sealing;
	char **chain; /* names of the layers, deepest first */
	unsigned chain_count, pending, merges, adoptions;
	bool strayed; /* a merge was not adopted: the chain in memory is not the one of the files */
};

static uint64_t pick(struct run *r, uint64_t below) { return next_random(&r->random) % below; }

static void complain(struct run *r, const char *what, uint64_t sector, uint64_t got, uint64_t want)
{
	if (r->failures++ < 10)
		fprintf(stderr,
			"%s: sector %" PRIu64 ": version %" PRIu64 ", want %" PRIu64 " (seed %" PRIu64 ", op %u)\n",
			what, sector, got, want, r->s->seed, r->issued);
}

static void check_read(struct run *r, const struct slot *slot)
{
	for (uint64_t i = 0; i < slot->count; i++) {
		uint64_t sector = slot->sector + i, want = r->complete[sector], got;
		bool whole = read_version(slot->data + i * SECTOR, sector, &got);
		if (r->unknown[sector])
			continue;
		if (!whole)
			complain(r, "read: torn or foreign", sector, got, want);
		else if (got != (want & IS_ZERO ? 0 : want))
			complain(r, "read", sector, got, want);
	}
}

/* The part of a discard that our engine promises to make zero: whole clusters (the disk's last may be short). */
static void discarded(struct run *r, const struct slot *slot)
{
	uint64_t first = round_up(slot->sector, slot->grain), end = slot->sector + slot->count;
	if (end != r->sectors)
		end = round_down(end, slot->grain);
	for (uint64_t i = first; i < end; i++)
		r->complete[i] = slot->version | IS_ZERO;
}

static void on_done(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	struct run *r = slot->run;
	slot->busy = false;
	r->busy--;
	if (result < 0) {
		r->errors++;
		if (!r->s->tolerate && r->failures++ < 10)
			fprintf(stderr, "request %d failed: %s\n", request->op, strerror(-result));
		if (request->op != COW_FLUSH && request->op != COW_READ)
			memset(r->unknown + slot->sector, 1, slot->count);
		free(slot->snapshot);
		slot->snapshot = NULL;
		return;
	}
	switch (request->op) {
	case COW_READ:
		check_read(r, slot);
		break;
	case COW_WRITE:
		for (uint64_t i = 0; i < slot->count; i++)
			r->complete[slot->sector + i] = slot->version;
		memset(r->unknown + slot->sector, 0, slot->count);
		break;
	case COW_WRITE_ZEROES:
		for (uint64_t i = 0; i < slot->count; i++)
			r->complete[slot->sector + i] = slot->version | IS_ZERO;
		memset(r->unknown + slot->sector, 0, slot->count);
		break;
	case COW_DISCARD:
		discarded(r, slot);
		break;
	case COW_FLUSH:
		/* A later flush may have ended first. */
		for (uint64_t i = 0; i < r->sectors; i++)
			r->journal.durable[i] = max_u64(r->journal.durable[i], slot->snapshot[i]);
		free(slot->snapshot);
		slot->snapshot = NULL;
		break;
	}
}

static bool overlaps(const struct run *r, uint64_t sector, uint64_t count)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		const struct slot *o = &r->slots[i];
		if (o->busy && o->request.op != COW_FLUSH && ranges_overlap(o->sector, o->count, sector, count))
			return true;
	}
	return false;
}

static struct slot *free_slot(struct run *r)
{
	for (unsigned i = 0; i < SLOTS; i++)
		if (!r->slots[i].busy)
			return &r->slots[i];
	return NULL;
}

static void make_iov(struct run *r, struct slot *slot)
{
	uint64_t left = slot->count * SECTOR, at = 0;
	unsigned n = 0;
	for (; left > 0; n++) {
		/* Odd lengths, as a guest may give them. */
		uint64_t take = n == 7 || pick(r, 3) == 0 ? left : 1 + pick(r, left);
		slot->iov[n] = (struct iovec){slot->data + at, (size_t)take};
		at += take;
		left -= take;
	}
	slot->request.iov = slot->iov;
	slot->request.iov_count = n;
}

static enum cow_op choose_op(struct run *r)
{
	if (r->s->flush_every && pick(r, r->s->flush_every) == 0)
		return COW_FLUSH;
	uint64_t p = pick(r, 100);
	if (p < 30)
		return COW_READ;
	if (p < 84)
		return COW_WRITE;
	if (p < 92 && !r->s->no_discard)
		return COW_DISCARD;
	return COW_WRITE_ZEROES;
}

static void choose_range(struct run *r, struct slot *slot)
{
	uint64_t limit = r->s->max_sectors;
	/* Mostly small, in a hot part of the disk, some aligned to clusters. */
	if (pick(r, 4))
		limit = min_u64(limit, 16);
	slot->count = min_u64(1 + pick(r, limit), r->sectors);
	uint64_t room = r->sectors - slot->count + 1;
	slot->sector = pick(r, pick(r, 3) ? room : (room + 7) / 8);
	uint64_t cluster = cow_cluster_bytes(r->disk) / SECTOR;
	if (pick(r, 4) == 0 && slot->sector >= cluster)
		slot->sector -= slot->sector % cluster;
}

static void issue(struct run *r)
{
	struct slot *slot = free_slot(r);
	enum cow_op op = choose_op(r);
	slot->sector = slot->count = 0;
	if (op != COW_FLUSH) {
		choose_range(r, slot);
		if (overlaps(r, slot->sector, slot->count))
			return;
	}
	slot->version = r->version += 2;
	slot->grain = cow_format_of(r->disk) == COW_FORMAT_RAW ? 1 : cow_cluster_bytes(r->disk) / SECTOR;
	slot->run = r;
	slot->request = (struct cow_request){.op = op, .done = on_done, .opaque = slot};
	slot->request.offset = slot->sector * SECTOR;
	slot->request.length = slot->count * SECTOR;
	slot->request.may_unmap = pick(r, 2);
	if (op == COW_READ || op == COW_WRITE)
		make_iov(r, slot);
	for (uint64_t i = 0; i < slot->count && op != COW_READ; i++) {
		uint64_t sector = slot->sector + i;
		if (op == COW_WRITE)
			fill_sector(slot->data + i * SECTOR, sector, slot->version);
		else
			r->journal.zeroed[sector] = slot->version;
		r->journal.issued[sector] = slot->version;
	}
	if (op == COW_FLUSH) {
		slot->snapshot = malloc(r->sectors * 8);
		memcpy(slot->snapshot, r->complete, r->sectors * 8);
	}
	slot->busy = true;
	r->busy++;
	cow_submit(r->disk, &slot->request);
}

static void seal_some(struct run *r, bool all)
{
	while (r->sealing && (all || pick(r, 4) == 0)) {
		struct pending_overlay *p = r->sealing;
		struct err err = ERR_INIT;
		volatile bool cancel = !all && pick(r, 3) == 0;
		int rc = cow_overlay_seal(p->overlay, &(struct wait){.cancel = &cancel}, &err);
		if (rc == -ECANCELED)
			continue;
		if (rc < 0 && !r->s->tolerate) {
			r->failures++;
			fprintf(stderr, "seal: %s\n", err.message);
		}
		r->sealing = p->next;
		r->pending--;
		free(p);
	}
}

static void complain_text(struct run *r, const char *what, const struct err *err)
{
	if (!r->s->tolerate && r->failures++ < 10)
		fprintf(stderr, "%s: %s (seed %" PRIu64 ", op %u)\n", what, err->message, r->s->seed, r->issued);
}

/* The layers of the run but its topmost are nobody's any more. */
static void forget_merged(struct run *r, unsigned top, unsigned layers)
{
	unsigned first = top + 1 - layers;
	for (unsigned i = first; i < top; i++) {
		if (i > 0)
			unlink(r->chain[i]);
		free(r->chain[i]);
	}
	memmove(r->chain + first, r->chain + top, (r->chain_count - top) * sizeof(*r->chain));
	r->chain_count -= layers - 1;
}

/* Merges some of the sealed layers while requests are in flight. */
static void merge_some(struct run *r)
{
	unsigned sealed = r->chain_count - 1 - r->pending, top;
	if (sealed == 0)
		return;
	top = (unsigned)pick(r, sealed);
	volatile bool cancel = pick(r, 8) == 0;
	struct cow_merge m = {.path = r->chain[top], .layers = 1 + (unsigned)pick(r, top + 1), .cancel = &cancel};
	struct cow_merged *merged;
	struct err err = ERR_INIT;
	int rc = cow_merge_prepare(&m, &merged, &err);
	if (rc < 0) {
		if (rc != -ECANCELED && rc != -ENOTSUP)
			complain_text(r, "merge", &err);
		return;
	}
	rc = cow_merge_commit(merged, &err);
	if (rc < 0) {
		complain_text(r, "commit", &err);
		r->strayed = true; /* perhaps */
	} else if (pick(r, 8) == 0)
		r->strayed = true;
	else if ((rc = cow_merge_adopt(merged, r->disk, &err)) == 0)
		r->adoptions++;
	else if (rc == -ESTALE && r->strayed)
		rc = 0;
	else
		complain_text(r, "adopt", &err);
	if (rc == 0)
		forget_merged(r, top, m.layers);
	r->merges++;
	cow_merge_free(merged);
}

static void switch_overlay(struct run *r)
{
	char path[512];
	const char *present = cow_path(r->disk), *slash = strrchr(present, '/');
	struct err err = ERR_INIT;
	snprintf(path, sizeof(path), "%s%u.qcow2", r->s->layers, ++r->layer);
	struct pending_overlay *p = xcalloc(1, sizeof(*p));
	int rc = cow_overlay_prepare(r->disk, path, slash ? slash + 1 : present, &p->overlay, &err);
	if (rc < 0) {
		free(p);
		if (!r->s->tolerate) {
			r->failures++;
			fprintf(stderr, "prepare: %s\n", err.message);
		}
		return;
	}
	if (pick(r, 8) == 0) {
		cow_overlay_abandon(p->overlay);
		unlink(path);
		free(p);
		return;
	}
	cow_overlay_switch(p->overlay);
	r->switches++;
	r->pending++;
	r->chain = realloc(r->chain, (r->chain_count + 1) * sizeof(*r->chain));
	r->chain[r->chain_count++] = xstrdup(path);
	struct pending_overlay **q = &r->sealing;
	while (*q)
		q = &(*q)->next;
	*q = p;
}

static int load_initial(struct run *r)
{
	uint8_t data[SECTOR];
	if (!r->s->initial)
		return 0;
	CLEANUP_CLOSE int fd = open(r->s->initial, O_RDONLY);
	if (fd < 0)
		return -errno;
	for (uint64_t i = 0; i < r->sectors; i++) {
		memset(data, 0, sizeof(data));
		if (pread(fd, data, SECTOR, (off_t)(i * SECTOR)) < 0)
			return -errno;
		if (!read_version(data, i, &r->complete[i]))
			return -EINVAL;
		r->journal.durable[i] = r->journal.issued[i] = r->complete[i];
		r->version = max_u64(r->version, r->complete[i]);
	}
	return 0;
}

static int write_expected(struct run *r)
{
	uint8_t data[SECTOR];
	CLEANUP_CLOSE int fd = open(r->s->expect, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || ftruncate(fd, (off_t)(r->sectors * SECTOR)) < 0)
		return -errno;
	for (uint64_t i = 0; i < r->sectors; i++) {
		if (r->complete[i] & IS_ZERO || r->complete[i] == 0)
			continue;
		fill_sector(data, i, r->complete[i]);
		if (pwrite(fd, data, SECTOR, (off_t)(i * SECTOR)) != SECTOR)
			return -EIO;
	}
	return 0;
}

static void drain(struct run *r)
{
	while (r->busy)
		cow_io_drive(r->io, -1);
}

static void check_everything(struct run *r)
{
	struct slot slot = {.count = 128};
	slot.data = malloc(128 * SECTOR);
	for (uint64_t at = 0; at < r->sectors; at += slot.count) {
		struct err err = ERR_INIT;
		slot.sector = at;
		slot.count = min_u64(128, r->sectors - at);
		if (cow_read_sync(r->disk, at * SECTOR, slot.data, slot.count * SECTOR, &err) < 0) {
			r->failures++;
			fprintf(stderr, "%s\n", err.message);
			break;
		}
		check_read(r, &slot);
	}
	free(slot.data);
}

static int open_everything(struct run *r, struct err *err)
{
	int rc = cow_io_create_kind(NULL, r->s->threads, &r->io, err);
	if (rc == 0)
		rc = cow_open(r->io, r->s->image, 0, &r->disk, err);
	if (rc < 0)
		return rc;
	r->sectors = cow_size(r->disk) / SECTOR;
	r->complete = calloc(r->sectors, 8);
	r->unknown = calloc(r->sectors, 1);
	rc = journal_open(&r->journal, r->s->journal, r->sectors, true);
	for (unsigned i = 0; i < SLOTS; i++)
		r->slots[i].data = malloc((size_t)MAX_SECTORS * SECTOR);
	r->chain = malloc(sizeof(*r->chain));
	r->chain[r->chain_count++] = xstrdup(r->s->image);
	return rc == 0 ? load_initial(r) : rc;
}

static void work_through(struct run *r)
{
	for (; r->issued < r->s->operations && r->failures == 0; r->issued++) {
		while (r->busy >= r->s->depth)
			cow_io_drive(r->io, -1);
		issue(r);
		if (r->s->switch_every && r->issued % r->s->switch_every == r->s->switch_every - 1)
			switch_overlay(r);
		if (r->sealing && pick(r, 50) == 0)
			seal_some(r, false);
		if (r->s->merge_every && r->issued % r->s->merge_every == r->s->merge_every - 1)
			merge_some(r);
	}
	drain(r);
	seal_some(r, true);
}

int stress_run(const struct stress *s)
{
	struct run *r = xcalloc(1, sizeof(*r));
	struct err err = ERR_INIT;
	r->s = s;
	r->random = s->seed;
	int rc = open_everything(r, &err);
	if (rc < 0) {
		fprintf(stderr, "cannot begin: %s %s\n", strerror(-rc), err.message);
		return 1;
	}
	work_through(r);
	check_everything(r);
	char *top = xstrdup(cow_path(r->disk));
	int closed = rc = cow_close(r->disk, &err);
	if (rc < 0 && !s->tolerate) {
		r->failures++;
		fprintf(stderr, "close: %s\n", err.message);
	}
	/* And what a new process would see. If the metadata could not be written, what was not flushed may be gone: stress_verify judges that. */
	rc = cow_open(r->io, top, COW_OPEN_READONLY, &r->disk, &err);
	if (rc == 0) {
		if (closed == 0)
			check_everything(r);
		cow_close(r->disk, NULL);
	} else {
		r->failures++;
		fprintf(stderr, "reopen: %s\n", err.message);
	}
	if (s->expect && (rc = write_expected(r)) < 0)
		r->failures++;
	cow_io_destroy(r->io);
	printf("top %s\nrequests %u errors %u switches %u merges %u adoptions %u failures %u\n", top, r->issued,
	       r->errors, r->switches, r->merges, r->adoptions, r->failures);
	unsigned failures = r->failures;
	for (unsigned i = 0; i < SLOTS; i++)
		free(r->slots[i].data);
	munmap(r->journal.map, r->journal.map_bytes);
	free(r->complete);
	free(r->unknown);
	for (unsigned i = 0; i < r->chain_count; i++)
		free(r->chain[i]);
	free(r->chain);
	free(top);
	free(r);
	return failures != 0;
}

static bool sector_acceptable(const struct journal *j, uint64_t sector, bool whole, uint64_t version)
{
	if (!whole)
		return false;
	if (version == 0) /* zeroes: never durably written, or zeroed at or after the durable version */
		return j->durable[sector] == 0 || (j->durable[sector] & IS_ZERO) ||
		       j->zeroed[sector] > j->durable[sector];
	return version >= (j->durable[sector] & ~IS_ZERO) && version <= j->issued[sector];
}

int stress_verify(const char *path, const char *raw)
{
	struct journal j;
	uint8_t data[SECTOR];
	unsigned failures = 0;
	if (journal_open(&j, path, 0, false) < 0)
		return 1;
	CLEANUP_CLOSE int fd = open(raw, O_RDONLY);
	for (uint64_t i = 0; i < j.sectors; i++) {
		uint64_t version;
		memset(data, 0, sizeof(data));
		if (pread(fd, data, SECTOR, (off_t)(i * SECTOR)) < 0)
			return 1;
		bool whole = read_version(data, i, &version);
		if (!sector_acceptable(&j, i, whole, version) && failures++ < 10)
			fprintf(stderr,
				"sector %" PRIu64 ": %s version %" PRIu64 ", durable %" PRIu64 " issued %" PRIu64
				" zeroed %" PRIu64 "\n",
				i, whole ? "whole" : "torn", version, j.durable[i], j.issued[i], j.zeroed[i]);
	}
	munmap(j.map, j.map_bytes);
	return failures != 0;
}

int stress_pattern(const char *raw, uint64_t bytes, uint64_t seed)
{
	uint64_t random = seed, sectors = bytes / SECTOR;
	uint8_t data[SECTOR];
	CLEANUP_CLOSE int fd = open(raw, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
		return 1;
	for (uint64_t at = 0; at < sectors;) {
		uint64_t run = 1 + next_random(&random) % 300;
		bool data_run = next_random(&random) % 2;
		for (uint64_t i = at; data_run && i < min_u64(at + run, sectors); i++) {
			fill_sector(data, i, 2);
			if (pwrite(fd, data, SECTOR, (off_t)(i * SECTOR)) != SECTOR)
				return 1;
		}
		at += run;
	}
	return 0;
}
