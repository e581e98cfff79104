/*
 * The disk engine without a guest: so many requests of one size in flight on one image, and how long they take.
 *
 *     disk_bench IMAGE [key=value...]
 *         op=read|write  block=4096  depth=16  count=100000  seq=0  step=BYTES (instead of random)  seed=1  flush=0 (after so many writes)
 *         threads=0  span=BYTES (of the disk, 0: all)  plug=1
 *         spare=N (served by a loop with so many processors to spare, as a VM's I/O thread serves it; without it: as tools do, which sleep at once)
 *
 * All requests have the same buffer, as those of `qemu-img bench` have: with 16 of 1 MiB each it is the processor's cache that one would compare.
 *
 * Prints one line: "ns N requests N open_ns N". The part `disk_engine` of bench/run.sh compares it with `qemu-img bench`.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/event.h"
#include "cowdisk/block.h"
#include "cowdisk/io_internal.h"

#define NO_LOOP UINT64_MAX

struct bench {
	uint64_t block, depth, count, seq, step, seed, flush, threads, span, plug, spare;
	bool write;
	struct slot *slots;
	uint8_t *data; /* of a block */
	struct loop *loop; /* NULL: cow_io_drive */
	struct cow_io *io;
	struct cow_disk *disk;
	uint64_t issued, done, position, random;
	int result;
};

struct slot {
	struct cow_request request;
	struct iovec iov;
	struct bench *bench;
};

static uint64_t next_offset(struct bench *b)
{
	uint64_t blocks = b->span / b->block;
	if (b->step) {
		uint64_t offset = b->position;
		b->position += b->step;
		if (b->position + b->block > b->span)
			b->position %= b->span - b->block + 1; /* as qemu-img bench does */
		return offset / COW_SECTOR_BYTES * COW_SECTOR_BYTES;
	}
	if (b->seq)
		return b->position++ % blocks * b->block;
	b->random = b->random * 6364136223846793005ull + 1442695040888963407ull;
	return (b->random >> 20) % blocks * b->block;
}

static void on_done(struct cow_request *request, int result);

static void issue(struct slot *slot)
{
	struct bench *b = slot->bench;
	b->issued++;
	bool flush = b->flush && b->issued % (b->flush + 1) == 0;
	slot->request = (struct cow_request){
		.op = flush	 ? COW_FLUSH
		      : b->write ? COW_WRITE
				 : COW_READ,
		.done = on_done,
		.opaque = slot,
	};
	if (!flush) {
		slot->request.offset = next_offset(b);
		slot->request.length = b->block;
		slot->request.iov = &slot->iov;
		slot->request.iov_count = 1;
	}
	cow_submit(b->disk, &slot->request);
}

static void on_done(struct cow_request *request, int result)
{
	struct slot *slot = request->opaque;
	struct bench *b = slot->bench;
	if (result < 0)
		b->result = result;
	b->done++;
	if (b->issued < b->count)
		issue(slot);
	else if (b->loop && b->done == b->count)
		loop_stop(b->loop);
}

static void begin(void *opaque)
{
	struct bench *b = opaque;
	if (b->plug)
		cow_io_plug(b->io);
	for (uint64_t i = 0; i < b->depth && b->issued < b->count; i++) {
		b->slots[i].bench = b;
		b->slots[i].iov = (struct iovec){b->data, b->block};
		issue(&b->slots[i]);
	}
	if (b->plug)
		cow_io_unplug(b->io);
}

static int serve(struct bench *b)
{
	if (b->loop) {
		int rc = loop_post(b->loop, begin, b);
		return rc < 0 ? rc : loop_run(b->loop, NULL);
	}
	begin(b);
	while (b->done < b->count)
		cow_io_drive(b->io, -1);
	return 0;
}

static int run(struct bench *b, uint64_t open_ns)
{
	b->slots = xcalloc(b->depth, sizeof(*b->slots));
	if (posix_memalign((void **)&b->data, 4096, b->block))
		return 1;
	memset(b->data, 0x5a, b->block);
	uint64_t start = clock_now_ns();
	int rc = serve(b);
	uint64_t spent = clock_now_ns() - start;
	if (rc < 0)
		b->result = rc;
	free(b->slots);
	free(b->data);
	if (b->result)
		fprintf(stderr, "disk_bench: %s\n", strerror(-b->result));
	else
		printf("ns %llu requests %llu open_ns %llu\n", (unsigned long long)spent, (unsigned long long)b->done,
		       (unsigned long long)open_ns);
	return b->result != 0;
}

static int parse(struct bench *b, int count, char **args)
{
	const struct {
		const char *key;
		uint64_t *value;
	} keys[] = {{"block", &b->block},   {"depth", &b->depth},     {"count", &b->count}, {"seq", &b->seq},
		    {"step", &b->step},	    {"seed", &b->seed},	      {"flush", &b->flush}, {"span", &b->span},
		    {"threads", &b->threads}, {"plug", &b->plug},   {"spare", &b->spare}};
	for (int i = 0; i < count; i++) {
		char *value = strchr(args[i], '=');
		bool known = false;
		if (!value)
			return 2;
		*value++ = 0;
		if (strcmp(args[i], "op") == 0)
			known = true, b->write = strcmp(value, "write") == 0;
		for (size_t k = 0; k < sizeof(keys) / sizeof(keys[0]); k++)
			if (strcmp(keys[k].key, args[i]) == 0)
				known = true, *keys[k].value = strtoull(value, NULL, 0);
		if (!known)
			return 2;
	}
	return b->block && b->block % 512 == 0 && b->depth ? 0 : 2;
}

int main(int argc, char **argv)
{
	struct bench b = {.block = 4096, .depth = 16, .count = 100000, .seed = 1, .plug = 1, .spare = NO_LOOP};
	struct err err = ERR_INIT;
	if (argc < 2 || parse(&b, argc - 2, argv + 2)) {
		fprintf(stderr, "usage: disk_bench IMAGE [key=value...]: see the head of bench/disk_bench.c\n");
		return 2;
	}
	b.random = b.seed;
	int rc = b.spare == NO_LOOP ? 0 : loop_create(&b.loop, &err);
	if (b.loop)
		loop_set_spare(b.loop, (unsigned)b.spare);
	if (rc == 0)
		rc = cow_io_create_kind(b.loop, b.threads, &b.io, &err);
	uint64_t start = clock_now_ns();
	if (rc == 0)
		rc = cow_open(b.io, argv[1], b.write ? 0 : COW_OPEN_READONLY, &b.disk, &err);
	if (rc < 0) {
		fprintf(stderr, "disk_bench: %s\n", err.message);
		return 1;
	}
	uint64_t opened = clock_now_ns() - start;
	if (b.span == 0 || b.span > cow_size(b.disk))
		b.span = cow_size(b.disk);
	rc = b.span < b.block ? 2 : run(&b, opened);
	if (cow_close(b.disk, &err) < 0) {
		fprintf(stderr, "disk_bench: %s\n", err.message);
		rc = 1;
	}
	cow_io_destroy(b.io);
	if (b.loop)
		loop_destroy(b.loop);
	return rc;
}
