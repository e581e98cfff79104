/*
 * The work on the disk. Unit: the sector of 512 bytes; words 0-3 are magic, seed and number (mixed), stamp and
 * number, the rest follows from (seed, number, stamp). For each sector the ledger has the stamp of the last write
 * issued and of the last write completed. Two requests that touch the same sector are never in flight together, so
 * what a sector must hold is known whenever no write to it is in flight. Of two devices the second one's sectors follow the first one's.
 */
#ifndef TINY_DISK_H
#define TINY_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"
#include "options.h"
#include "pattern.h"
#include "virtio_blk.h"

#define DISK_BLOCK_BYTES     4096u
#define DISK_BLOCK_SECTORS   8u
#define DISK_LARGEST_SECTORS 128u /* one request: 64 KiB */
#define DISK_DEVICES	     2u

enum disk_purpose { DISK_FREE, DISK_WRITE, DISK_READ, DISK_FLUSH };

struct disk_slot {
	enum disk_purpose purpose;
	uint32_t first; /* sector */
	uint32_t sectors;
	unsigned int device;
	uint64_t stamp;
	uint8_t *data;
};

struct disk_fault {
	uint64_t sector;
	uint64_t word; /* of the sector; for word 2 want and got are stamps */
	uint64_t want;
	uint64_t got;
};

struct disk {
	bool there;
	bool writing; /* false: no new requests */
	bool mixed;
	uint64_t seed;
	unsigned int devices;
	uint32_t device_sectors; /* of the area in use of each, which begins at its sector 0 */
	uint32_t sectors;	 /* of all */
	unsigned int depth;
	unsigned int in_flight;
	uint64_t *issued; /* stamps; 0 = never written, content unknown */
	uint64_t *completed;
	uint64_t sum; /* of pattern_base() over `issued` */
	uint64_t writes, reads, flushes, since_flush;
	uint64_t errors;      /* requests that the device failed */
	uint64_t bad_sectors; /* found wrong since boot */
	bool fault_seen;
	struct disk_fault fault; /* the first of them */
	struct random random;
	struct virtio_blk blk[DISK_DEVICES];
	struct disk_slot slot[VIRTIO_BLK_SLOTS];
};

/* Returns NULL, or what is wrong. */
const char *disk_start(struct disk *disk, struct ram *ram, const struct options *options);

/* Writes the whole area once. False if a request failed or never came back. */
bool disk_fill(struct disk *disk, struct stamp_source *stamps, const struct clock *clock);

/* One small piece of work: takes at most one finished request and, if may_issue, issues at most one. True if a write. */
bool disk_turn(struct disk *disk, struct stamp_source *stamps, bool may_issue);

/* Waits for all that is in flight. False if something does not come back within 30 s. */
bool disk_drain(struct disk *disk, const struct clock *clock);

/*
 * After a drain: reads the whole area and compares it with the ledger, and the ledger with the running sum.
 * False if it could not be carried out. The number of wrong sectors is what bad_sectors grew by.
 */
bool disk_check(struct disk *disk, const struct clock *clock, bool *ledger_right);

#endif
