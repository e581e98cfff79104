/* For tests of the block device: a machine with one disk in memory, which holds requests back for as long as a test likes.
 * It stands in for cowdisk, so a test program includes this in one file only. */
#ifndef VMCP_DEVICES_VIRTIO_BLK_TEST_H
#define VMCP_DEVICES_VIRTIO_BLK_TEST_H

#include "devices/virtio_test.h"

#include <errno.h>
#include <unistd.h>

#include "devices/virtio_blk.h"

#define DISK_BYTES (1u << 20)
#define RINGS	   0x10000u
#define HEADERS	   0x80000u /* 16 bytes each */
#define STATUSES   0x90000u /* 1 byte each */
#define DATA	   0x100000u
#define SLOT	   1u
#define F_FLUSH	   (1ull << 9)
#define UNTOUCHED  0xee

enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };

/* --- a disk in memory --- */

struct cow_disk {
	struct loop *loop;
	bool readonly;
	_Atomic bool hold;
	int result; /* of every request */
	uint8_t data[DISK_BYTES];
	struct cow_request *held[1024]; /* owner: I/O thread */
	unsigned count;
	enum cow_op last_op;
	bool last_may_unmap;
	_Atomic unsigned flushes, submitted;
};

uint64_t cow_size(const struct cow_disk *disk) { return (void)disk, DISK_BYTES; }
bool cow_is_readonly(const struct cow_disk *disk) { return disk->readonly; }

/* The ring that it does not have: its only turn is carry_out_all. */
static struct cow_turn *disk_turns; /* owner: I/O thread */
struct cow_io *cow_disk_io(const struct cow_disk *disk) { return (void)disk, NULL; }
void cow_io_plug(struct cow_io *io) { (void)io; }
static inline void end_turn(void)
{
	while (disk_turns != NULL) {
		struct cow_turn *turn = disk_turns;
		disk_turns = turn->next;
		turn->queued = false;
		turn->fn(turn);
	}
}
void cow_io_unplug(struct cow_io *io) { (void)io; }
void cow_io_at_turn_end(struct cow_io *io, struct cow_turn *turn)
{
	(void)io;
	if (turn->queued)
		return;
	turn->queued = true;
	turn->next = disk_turns;
	disk_turns = turn;
}
void cow_io_cancel_turn(struct cow_io *io, struct cow_turn *turn)
{
	(void)io;
	if (turn->queued)
		disk_turns = NULL; /* there is one device */
}

static inline void carry_out(struct cow_disk *disk, struct cow_request *r)
{
	uint64_t at = r->offset;
	if (disk->result == 0) {
		for (unsigned i = 0; i < r->iov_count; i++) {
			if (r->op == COW_READ)
				memcpy(r->iov[i].iov_base, disk->data + at, r->iov[i].iov_len);
			else
				memcpy(disk->data + at, r->iov[i].iov_base, r->iov[i].iov_len);
			at += r->iov[i].iov_len;
		}
		if (r->op == COW_DISCARD || r->op == COW_WRITE_ZEROES)
			memset(disk->data + r->offset, 0, r->length);
		disk->flushes += r->op == COW_FLUSH;
	}
	r->done(r, disk->result);
}
/* The last submitted first. */
static inline void carry_out_all(void *opaque)
{
	struct cow_disk *disk = opaque;
	while (disk->count > 0)
		carry_out(disk, disk->held[--disk->count]);
	end_turn();
}
void cow_submit(struct cow_disk *disk, struct cow_request *request)
{
	uint64_t sum = 0;
	for (unsigned i = 0; i < request->iov_count; i++)
		sum += request->iov[i].iov_len;
	cr_assert(request->iov_count == 0 || sum == request->length);
	cr_assert(range_within(request->offset, request->length, DISK_BYTES));
	cr_assert(loop_in_thread(disk->loop));
	request->disk = disk; /* as the real one, writes into the request */
	disk->held[disk->count++] = request;
	disk->last_op = request->op;
	disk->last_may_unmap = request->may_unmap;
	disk->submitted++;
	if (!atomic_load(&disk->hold))
		loop_post(disk->loop, carry_out_all, disk);
}

/* --- a machine with one disk --- */

struct setup {
	struct rig rig;
	struct cow_disk disk;
	struct virtio_blk *blk;
	struct component component;
	struct rig_queue q;
	unsigned requests; /* made so far */
};

static inline struct setup *setup_create_with(const struct virtio_blk_config *config, bool readonly_disk)
{
	struct setup *s = xcalloc(1, sizeof(*s));
	struct err err = ERR_INIT;
	rig_create(&s->rig);
	s->disk.loop = s->rig.loop;
	s->disk.readonly = readonly_disk;
	for (unsigned i = 0; i < DISK_BYTES; i++)
		s->disk.data[i] = (uint8_t)(i / 512 + 1);
	cr_assert_eq(virtio_blk_create(s->rig.pci, s->rig.mem, s->rig.loop, &s->disk, config, &s->blk, &err), 0, "%s",
		     err.message);
	s->component = virtio_blk_component(s->blk, 0);
	rig_run(&s->rig);
	return s;
}
static inline struct setup *setup_create(void)
{
	return setup_create_with(&(struct virtio_blk_config){.name = "root", .serial = "serial-number-of-the-disk"},
				 false);
}
static inline void setup_destroy(struct setup *s)
{
	atomic_store(&s->disk.hold, false);
	loop_call(s->rig.loop, carry_out_all, &s->disk);
	rig_settle(&s->rig);
	rig_stop(&s->rig);
	virtio_blk_destroy(s->blk);
	rig_destroy(&s->rig);
	free(s);
}
static inline void start_with(struct setup *s, uint64_t features)
{
	cr_assert(rig_negotiate(&s->rig, SLOT, features | VIRTIO_F_VERSION_1));
	rig_msix(&s->rig, SLOT, 1, 20);
	rig_queue_init(&s->rig, SLOT, 0, 256, RINGS, &s->q);
	rig_driver_ok(&s->rig, SLOT);
	s->requests = 0;
}
static inline void start(struct setup *s) { start_with(s, F_FLUSH); }
static inline void hold(struct setup *s) { atomic_store(&s->disk.hold, true); }
static inline void release(struct setup *s)
{
	atomic_store(&s->disk.hold, false);
	loop_call(s->rig.loop, carry_out_all, &s->disk);
	rig_settle(&s->rig);
}
static inline uint8_t *at(struct setup *s, uint64_t gpa) { return mem_at(s->rig.mem, gpa, 1, true); }
static inline uint64_t data_of(unsigned i) { return DATA + (uint64_t)i * 0x8000; }
static inline void header(struct setup *s, unsigned i, uint32_t type, uint64_t sector)
{
	put_le32(at(s, HEADERS + 16 * i), type);
	put_le32(at(s, HEADERS + 16 * i + 4), 0);
	put_le64(at(s, HEADERS + 16 * i + 8), sector);
	*at(s, STATUSES + i) = UNTOUCHED;
}
/* Request number i of the test: its data is at data_of(i), its status at STATUSES + i. */
static inline unsigned request(struct setup *s, uint32_t type, uint64_t sector, uint32_t bytes)
{
	unsigned i = s->requests++, n = 0;
	struct rig_segment segments[3];
	header(s, i, type, sector);
	segments[n++] = (struct rig_segment){HEADERS + 16 * i, 16, false};
	if (bytes > 0)
		segments[n++] = (struct rig_segment){data_of(i), bytes, type == IN || type == GET_ID};
	segments[n++] = (struct rig_segment){STATUSES + i, 1, true};
	rig_add(&s->q, segments, n);
	return i;
}
static inline void go(struct setup *s)
{
	rig_kick(&s->q);
	rig_settle(&s->rig);
}
static inline unsigned do_request(struct setup *s, uint32_t type, uint64_t sector, uint32_t bytes)
{
	unsigned i = request(s, type, sector, bytes);
	go(s);
	return *at(s, STATUSES + i);
}
static inline void range(struct setup *s, uint64_t sector, uint32_t sectors, uint32_t flags)
{
	put_le64(at(s, data_of(s->requests)), sector);
	put_le32(at(s, data_of(s->requests) + 8), sectors);
	put_le32(at(s, data_of(s->requests) + 12), flags);
}
static inline bool filled(const uint8_t *p, uint8_t value, unsigned bytes)
{
	for (unsigned i = 0; i < bytes; i++)
		if (p[i] != value)
			return false;
	return true;
}

#endif
