#include "disk.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"

#define SECTOR_WORDS  64u
#define SECTOR_MAGIC  0x31746365736e7974ull /* "tynsect1" */
#define READ_PERCENT  25u
#define FLUSH_EACH    64u /* writes */
#define PICKS_AT_MOST 16u
#define LOST_AFTER_US 30000000ull
#define DATA_BYTES    (DISK_LARGEST_SECTORS * VIRTIO_BLK_SECTOR_BYTES)

enum sector_word { WORD_MAGIC, WORD_OWNER, WORD_STAMP, WORD_NUMBER };

/* The largest area of each device that both have. */
static const char *start_devices(struct disk *disk, struct ram *ram, const struct options *options)
{
	uint64_t sectors = options->disk_blocks * DISK_BLOCK_SECTORS / options->disks;
	unsigned int i;

	disk->devices = (unsigned int)options->disks;
	disk->depth = (unsigned int)options->queue_depth;
	for (i = 0; i < disk->devices; i++) {
		const char *wrong = virtio_blk_start(&disk->blk[i], ram, i);

		if (wrong)
			return wrong;
		if (sectors > disk->blk[i].capacity_sectors)
			sectors = disk->blk[i].capacity_sectors;
		if (disk->depth > disk->blk[i].slots)
			disk->depth = disk->blk[i].slots;
	}
	sectors &= ~(uint64_t)(DISK_LARGEST_SECTORS - 1);
	disk->device_sectors = (uint32_t)sectors;
	disk->sectors = disk->device_sectors * disk->devices;
	return sectors ? NULL : "disk-too-small";
}

const char *disk_start(struct disk *disk, struct ram *ram, const struct options *options)
{
	uint64_t sectors;
	const char *wrong;
	unsigned int i;
	uint8_t *data;

	memset(disk, 0, sizeof(*disk));
	wrong = start_devices(disk, ram, options);
	if (wrong)
		return wrong;
	sectors = disk->sectors;
	disk->mixed = options->disk_mixed;
	disk->seed = options->seed;
	disk->issued = ram_take(ram, sectors * sizeof(uint64_t));
	disk->completed = ram_take(ram, sectors * sizeof(uint64_t));
	data = ram_take(ram, (uint64_t)disk->depth * DATA_BYTES);
	if (!disk->issued || !disk->completed || !data)
		return "no-memory-for-disk";
	memset(disk->issued, 0, sectors * sizeof(uint64_t));
	memset(disk->completed, 0, sectors * sizeof(uint64_t));
	for (i = 0; i < disk->depth; i++)
		disk->slot[i].data = data + (uint64_t)i * DATA_BYTES;
	random_start(&disk->random, options->seed ^ SECTOR_MAGIC);
	disk->there = true;
	disk->writing = true;
	return NULL;
}

static uint64_t sector_word(const struct disk *disk, uint32_t sector, uint64_t stamp, uint64_t base, unsigned int word)
{
	switch (word) {
	case WORD_MAGIC:
		return SECTOR_MAGIC;
	case WORD_OWNER:
		return pattern_mix(disk->seed ^ sector);
	case WORD_STAMP:
		return stamp;
	case WORD_NUMBER:
		return sector;
	default:
		return pattern_word(base, word);
	}
}

static void write_sector(const struct disk *disk, uint64_t *words, uint32_t sector, uint64_t stamp)
{
	uint64_t base = pattern_base(disk->seed, sector, stamp);
	unsigned int i;

	for (i = 0; i < SECTOR_WORDS; i++)
		words[i] = sector_word(disk, sector, stamp, base, i);
}

static void note_fault(struct disk *disk, uint32_t sector, unsigned int word, uint64_t want, uint64_t got)
{
	disk->bad_sectors++;
	if (disk->fault_seen)
		return;
	disk->fault_seen = true;
	disk->fault = (struct disk_fault){.sector = sector, .word = word, .want = want, .got = got};
}

static void check_sector(struct disk *disk, const uint64_t *words, uint32_t sector)
{
	uint64_t stamp = disk->completed[sector], base, want;
	unsigned int i;

	if (!stamp)
		return;
	if (words[WORD_STAMP] != stamp) {
		note_fault(disk, sector, WORD_STAMP, stamp, words[WORD_STAMP]);
		return;
	}
	base = pattern_base(disk->seed, sector, stamp);
	for (i = 0; i < SECTOR_WORDS; i++) {
		want = sector_word(disk, sector, stamp, base, i);
		if (words[i] != want) {
			note_fault(disk, sector, i, want, words[i]);
			return;
		}
	}
}

static void notify(struct disk *disk)
{
	unsigned int i;

	for (i = 0; i < disk->devices; i++)
		virtio_blk_notify(&disk->blk[i]);
}

/* Flushes go to the devices in turn. */
static void submit(struct disk *disk, struct disk_slot *slot, enum virtio_blk_kind kind)
{
	uint32_t split = 0;

	if (slot->sectors > 1 && (random_next(&disk->random) & 1ull << 40))
		split = (1 + (uint32_t)random_below(&disk->random, slot->sectors - 1)) * VIRTIO_BLK_SECTOR_BYTES;
	disk->in_flight++;
	slot->device = kind == VIRTIO_BLK_FLUSH ? (unsigned int)(disk->flushes % disk->devices) : slot->first / disk->device_sectors;
	virtio_blk_submit(&disk->blk[slot->device], (unsigned int)(slot - disk->slot), kind, slot->first % disk->device_sectors, slot->data,
			  slot->sectors * VIRTIO_BLK_SECTOR_BYTES, split);
}

static void issue_write(struct disk *disk, struct disk_slot *slot, struct stamp_source *stamps)
{
	uint64_t stamp = stamp_next(stamps), old;
	uint32_t i, sector;

	slot->purpose = DISK_WRITE;
	slot->stamp = stamp;
	for (i = 0; i < slot->sectors; i++) {
		sector = slot->first + i;
		old = disk->issued[sector];
		disk->sum +=
			pattern_base(disk->seed, sector, stamp) - (old ? pattern_base(disk->seed, sector, old) : 0);
		disk->issued[sector] = stamp;
		write_sector(disk, (uint64_t *)(slot->data + i * VIRTIO_BLK_SECTOR_BYTES), sector, stamp);
	}
	disk->writes++;
	disk->since_flush++;
	submit(disk, slot, VIRTIO_BLK_WRITE);
}

static void issue_read(struct disk *disk, struct disk_slot *slot)
{
	slot->purpose = DISK_READ;
	memset(slot->data, 0xee,
	       slot->sectors * VIRTIO_BLK_SECTOR_BYTES); /* data that never arrive must not look right */
	disk->reads++;
	submit(disk, slot, VIRTIO_BLK_READ);
}

static void issue_flush(struct disk *disk, struct disk_slot *slot)
{
	slot->purpose = DISK_FLUSH;
	slot->first = slot->sectors = 0;
	disk->flushes++;
	disk->since_flush = 0;
	submit(disk, slot, VIRTIO_BLK_FLUSH);
}

static void finish(struct disk *disk, struct disk_slot *slot, bool good)
{
	uint32_t i;

	if (!good)
		disk->errors++;
	for (i = 0; i < slot->sectors && good; i++) {
		if (slot->purpose == DISK_WRITE)
			disk->completed[slot->first + i] = slot->stamp;
		else if (slot->purpose == DISK_READ)
			check_sector(disk, (const uint64_t *)(slot->data + i * VIRTIO_BLK_SECTOR_BYTES),
				     slot->first + i);
	}
	slot->purpose = DISK_FREE;
	disk->in_flight--;
}

/* Takes one finished request, if there is one. */
static bool reap(struct disk *disk)
{
	unsigned int slot, device = 0;
	bool good;

	if (!disk->in_flight)
		return false;
	while (!virtio_blk_poll(&disk->blk[device], &slot, &good))
		if (++device == disk->devices)
			return false;
	if (slot >= disk->depth || disk->slot[slot].purpose == DISK_FREE || disk->slot[slot].device != device)
		disk->errors++; /* the device returned what it does not have */
	else
		finish(disk, &disk->slot[slot], good);
	return true;
}

static struct disk_slot *free_slot(struct disk *disk)
{
	unsigned int i;

	for (i = 0; i < disk->depth; i++) {
		if (disk->slot[i].purpose == DISK_FREE)
			return &disk->slot[i];
	}
	return NULL;
}

static bool is_busy(const struct disk *disk, uint32_t first, uint32_t sectors)
{
	const struct disk_slot *slot;

	for (slot = disk->slot; slot < disk->slot + disk->depth; slot++) {
		if (slot->purpose != DISK_FREE && first < slot->first + slot->sectors && slot->first < first + sectors)
			return true;
	}
	return false;
}

/* Of 100 requests 70 are one 4 KiB block, 10 one sector, 10 a few sectors anywhere, 10 are 64 KiB. */
static void pick_range(struct disk *disk, uint32_t *first, uint32_t *sectors)
{
	uint64_t kind = disk->mixed ? random_below(&disk->random, 100) : 0;
	uint32_t unit = 1;

	if (kind < 70)
		unit = *sectors = DISK_BLOCK_SECTORS;
	else if (kind < 80)
		*sectors = 1;
	else if (kind < 90)
		*sectors = 2 + (uint32_t)random_below(&disk->random, 22);
	else
		unit = *sectors = DISK_LARGEST_SECTORS;
	*first = (uint32_t)random_below(&disk->random, (disk->sectors - *sectors) / unit + 1) * unit;
}

static bool pick_idle_range(struct disk *disk, struct disk_slot *slot)
{
	unsigned int i;

	for (i = 0; i < PICKS_AT_MOST; i++) {
		pick_range(disk, &slot->first, &slot->sectors);
		if (slot->first / disk->device_sectors == (slot->first + slot->sectors - 1) / disk->device_sectors && !is_busy(disk, slot->first, slot->sectors))
			return true;
	}
	return false;
}

/* True if a new write went out. */
static bool issue_one(struct disk *disk, struct stamp_source *stamps)
{
	struct disk_slot *slot = free_slot(disk);

	if (!slot)
		return false;
	if (disk->blk[0].has_flush && disk->since_flush >= FLUSH_EACH) {
		issue_flush(disk, slot);
		return false;
	}
	if (!pick_idle_range(disk, slot))
		return false;
	if (random_below(&disk->random, 100) < READ_PERCENT) {
		issue_read(disk, slot);
		return false;
	}
	issue_write(disk, slot, stamps);
	return true;
}

bool disk_turn(struct disk *disk, struct stamp_source *stamps, bool may_issue)
{
	unsigned int before = disk->in_flight;
	bool wrote = false;

	reap(disk);
	if (may_issue && disk->writing)
		wrote = issue_one(disk, stamps);
	if (disk->in_flight == disk->depth || disk->in_flight <= before) /* full, or nothing more comes now */
		notify(disk);
	return wrote;
}

/* Waits until a slot is free and returns it; NULL if a request is lost. */
static struct disk_slot *wait_for_slot(struct disk *disk, const struct clock *clock)
{
	struct patience patience;
	struct disk_slot *slot;

	patience_begin(&patience);
	while (!(slot = free_slot(disk))) {
		notify(disk);
		if (!reap(disk)) {
			if (patience_ends(&patience, clock, LOST_AFTER_US))
				return NULL;
			cpu_relax();
		}
	}
	return slot;
}

bool disk_drain(struct disk *disk, const struct clock *clock)
{
	struct patience patience;

	notify(disk);
	patience_begin(&patience);
	while (disk->in_flight) {
		if (reap(disk))
			patience_begin(&patience);
		else if (patience_ends(&patience, clock, LOST_AFTER_US))
			return false;
		else
			cpu_relax();
	}
	return true;
}

/* The whole area in large requests, as many at a time as the depth allows. */
static bool sweep(struct disk *disk, struct stamp_source *stamps, const struct clock *clock)
{
	struct disk_slot *slot;
	uint32_t first, left;

	for (first = 0; first < disk->sectors; first += DISK_LARGEST_SECTORS) {
		slot = wait_for_slot(disk, clock);
		if (!slot)
			return false;
		left = disk->sectors - first;
		slot->first = first;
		slot->sectors = left < DISK_LARGEST_SECTORS ? left : DISK_LARGEST_SECTORS;
		if (stamps)
			issue_write(disk, slot, stamps);
		else
			issue_read(disk, slot);
	}
	return disk_drain(disk, clock);
}

bool disk_fill(struct disk *disk, struct stamp_source *stamps, const struct clock *clock)
{
	bool good = sweep(disk, stamps, clock) && !disk->errors;

	disk->writes = 0; /* the counts are about the work, which begins after this */
	disk->since_flush = 0;
	return good;
}

bool disk_check(struct disk *disk, const struct clock *clock, bool *ledger_right)
{
	uint64_t sum = 0, errors = disk->errors, reads = disk->reads;
	uint32_t sector;
	bool good;

	*ledger_right = true;
	for (sector = 0; sector < disk->sectors; sector++) {
		if (disk->issued[sector] != disk->completed[sector])
			*ledger_right = false;
		if (disk->issued[sector])
			sum += pattern_base(disk->seed, sector, disk->issued[sector]);
	}
	if (sum != disk->sum)
		*ledger_right = false;
	good = sweep(disk, NULL, clock) && disk->errors == errors;
	disk->reads = reads;
	return good;
}
