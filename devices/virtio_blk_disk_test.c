/* The block device on real images with cowdisk: a driver with many requests in flight, checked against a copy in
 * memory. */
#include "devices/virtio_test.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "cowdisk/block.h"
#include "devices/virtio_blk.h"

#define DISK_BYTES (4u << 20)
#define SECTORS	   (DISK_BYTES / 512)
#define RINGS	   0x10000u
#define HEADERS	   0x80000u
#define STATUSES   0x90000u
#define DATA	   0x100000u
#define SLOT	   1u
#define DEPTH	   64u
#define STRIPE	   (SECTORS / DEPTH) /* each slot keeps to its own sectors: requests in flight never overlap */
#define F_FLUSH	   (1ull << 9)

struct setup {
	struct rig rig;
	char path[64];
	struct cow_io *io;
	struct cow_disk *disk;
	struct virtio_blk *blk;
	struct rig_queue q;
	uint8_t expected[DISK_BYTES];
};

static void open_machine(struct setup *s)
{
	struct err err = ERR_INIT;
	rig_create(&s->rig);
	cr_assert_eq(cow_io_create(s->rig.loop, &s->io, &err), 0, "%s", err.message);
	cr_assert_eq(cow_open(s->io, s->path, 0, &s->disk, &err), 0, "%s", err.message);
	cr_assert_eq(virtio_blk_create(s->rig.pci, s->rig.mem, s->rig.loop, s->disk,
				       &(struct virtio_blk_config){.name = "root"}, &s->blk, &err),
		     0, "%s", err.message);
	rig_run(&s->rig);
	cr_assert(rig_negotiate(&s->rig, SLOT, VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | F_FLUSH));
	rig_msix(&s->rig, SLOT, 1, 20);
	rig_queue_init(&s->rig, SLOT, 0, 256, RINGS, &s->q);
	rig_driver_ok(&s->rig, SLOT);
}
static void close_machine(struct setup *s)
{
	struct err err = ERR_INIT;
	struct component component = virtio_blk_component(s->blk, 0);
	cr_assert_eq(component.drain(component.opaque, &err), 0);
	rig_stop(&s->rig);
	virtio_blk_destroy(s->blk);
	cr_assert_eq(cow_close(s->disk, &err), 0, "%s", err.message);
	cow_io_destroy(s->io);
	rig_destroy(&s->rig);
}
static struct setup *setup_create(bool qcow2)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	snprintf(s->path, sizeof(s->path), "/tmp/vmcp-blk-test-%d-%d", (int)getpid(), qcow2);
	unlink(s->path);
	cr_assert_eq(
		qcow2 ? cow_create(s->path, &(struct cow_create){.size_bytes = DISK_BYTES, .cluster_bytes = 4096}, &err)
		      : cow_create_raw(s->path, DISK_BYTES, &err),
		0, "%s", err.message);
	open_machine(s);
	return s;
}

struct operation {
	bool busy;
	uint32_t type, sectors;
	uint64_t sector;
	uint8_t value;
};

static uint64_t data_of(unsigned slot) { return DATA + slot * 0x8000; }

static void issue(struct setup *s, struct operation *op, unsigned slot, unsigned *seed)
{
	static const uint32_t types[] = {0, 0, 1, 1, 1, 4, 11, 13};
	uint8_t *header = mem_at(s->rig.mem, HEADERS + 16 * slot, 16, true);
	uint8_t *data = mem_at(s->rig.mem, data_of(slot), 0x8000, true);
	bool whole = false;

	op->type = types[rand_r(seed) % 8];
	op->sector = slot * STRIPE + (unsigned)rand_r(seed) % (STRIPE / 2);
	op->sectors = 1 + (unsigned)rand_r(seed) % (STRIPE / 2);
	op->value = (uint8_t)rand_r(seed);
	op->busy = true;
	*(uint8_t *)mem_at(s->rig.mem, STATUSES + slot, 1, true) = 0xee;
	put_le32(header, op->type);
	put_le64(header + 8, op->type < 2 ? op->sector : 0);
	memset(data, op->type == 1 ? op->value : 0xcc, 512 * op->sectors);
	if (op->type > 4) {
		whole = true;
		put_le64(data, op->sector);
		put_le32(data + 8, op->sectors);
		put_le32(data + 12, op->type == 13 && op->value % 2);
	}
	/* Two segments of data, so that vectors are exercised. */
	struct rig_segment segments[4] = {{HEADERS + 16 * slot, 16, false}};
	unsigned n = 1;
	if (whole) {
		segments[n++] = (struct rig_segment){data_of(slot), 16, false};
	} else if (op->type < 2) {
		uint32_t cut = 1 + (unsigned)rand_r(seed) % (512 * op->sectors - 1);
		segments[n++] = (struct rig_segment){data_of(slot), cut, op->type == 0};
		segments[n++] = (struct rig_segment){data_of(slot) + cut, 512 * op->sectors - cut, op->type == 0};
	}
	segments[n++] = (struct rig_segment){STATUSES + slot, 1, true};
	s->q.next_desc = (uint16_t)(4 * slot);
	rig_add(&s->q, segments, n);
}

static void check(struct setup *s, struct operation *op, unsigned slot)
{
	uint8_t *expected = s->expected + 512 * op->sector;
	uint8_t *data = mem_at(s->rig.mem, data_of(slot), 0x8000, false);
	uint8_t status = *(uint8_t *)mem_at(s->rig.mem, STATUSES + slot, 1, false);

	cr_assert_eq(status, 0, "type %u sector %llu: status %u", op->type, (unsigned long long)op->sector, status);
	if (op->type == 0)
		cr_assert_eq(memcmp(data, expected, 512 * op->sectors), 0, "sector %llu",
			     (unsigned long long)op->sector);
	else if (op->type == 1)
		memset(expected, op->value, 512 * op->sectors);
	else if (op->type == 13)
		memset(expected, 0, 512 * op->sectors);
	else if (op->type == 11) /* what a discard leaves is not said: take what is there from now on */
		op->type = 100;
	op->busy = false;
}

static unsigned collect(struct setup *s, struct operation *ops)
{
	unsigned n = 0;
	while (__atomic_load_n((uint16_t *)mem_at(s->rig.mem, s->q.used + 2, 2, false), __ATOMIC_ACQUIRE) !=
	       s->q.seen) {
		uint32_t head = rig_used_id(&s->q, s->q.seen++, NULL);
		cr_assert(head % 4 == 0 && head / 4 < DEPTH && ops[head / 4].busy, "head %u", head);
		check(s, &ops[head / 4], head / 4);
		n++;
	}
	return n;
}

/* Makes the content of a discarded range known again. */
static void settle_discard(struct setup *s, struct operation *op, unsigned slot)
{
	uint8_t *header = mem_at(s->rig.mem, HEADERS + 16 * slot, 16, true);
	op->type = 1;
	op->busy = true;
	op->value = 0x5a;
	put_le32(header, 1);
	put_le64(header + 8, op->sector);
	memset(mem_at(s->rig.mem, data_of(slot), 0x8000, true), op->value, 512 * op->sectors);
	s->q.next_desc = (uint16_t)(4 * slot);
	rig_add(&s->q,
		(struct rig_segment[]){{HEADERS + 16 * slot, 16, false},
				       {data_of(slot), 512 * op->sectors, false},
				       {STATUSES + slot, 1, true}},
		3);
}

static void work(struct setup *s, unsigned rounds, unsigned *seed)
{
	static struct operation ops[DEPTH];
	unsigned issued = 0, ended = 0, idle = 0;

	memset(ops, 0, sizeof(ops));
	while (ended < rounds) {
		for (unsigned slot = 0; slot < DEPTH; slot++) {
			if (ops[slot].busy || (ops[slot].type != 100 && issued - ended >= rounds - ended))
				continue;
			if (ops[slot].type == 100)
				settle_discard(s, &ops[slot], slot);
			else
				issue(s, &ops[slot], slot, seed);
			issued++;
		}
		rig_kick(&s->q);
		unsigned n = collect(s, ops);
		ended += n;
		idle = n > 0 ? 0 : idle + 1;
		cr_assert_lt(idle, 100000, "requests do not end");
		if (n == 0)
			usleep(50);
	}
	for (unsigned slot = 0; slot < DEPTH; slot++) {
		while (ops[slot].busy || ops[slot].type == 100) {
			if (!ops[slot].busy)
				settle_discard(s, &ops[slot], slot);
			rig_kick(&s->q);
			usleep(50);
			collect(s, ops);
		}
	}
}

static void run(bool qcow2)
{
	struct setup *s = setup_create(qcow2);
	struct err err = ERR_INIT;
	unsigned seed = 7;
	uint8_t *found = malloc(DISK_BYTES);

	for (unsigned life = 0; life < 3; life++) {
		work(s, 1500, &seed);
		close_machine(s);
		struct loop *loop;
		cr_assert_eq(loop_create(&loop, &err), 0);
		cr_assert_eq(cow_io_create(loop, &s->io, &err), 0);
		cr_assert_eq(cow_open(s->io, s->path, COW_OPEN_READONLY, &s->disk, &err), 0, "%s", err.message);
		cr_assert_eq(cow_read_sync(s->disk, 0, found, DISK_BYTES, &err), 0, "%s", err.message);
		cr_assert_eq(memcmp(found, s->expected, DISK_BYTES), 0, "the image holds what was written");
		cr_assert_eq(cow_close(s->disk, &err), 0);
		cow_io_destroy(s->io);
		loop_destroy(loop);
		open_machine(s);
	}
	close_machine(s);
	unlink(s->path);
	free(found);
	free(s);
}

Test(virtio_blk_disk, raw_image) { run(false); }
Test(virtio_blk_disk, qcow2_image) { run(true); }
