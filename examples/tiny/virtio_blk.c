#include "virtio_blk.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"

#define ID_BLK_MODERN 0x1042
#define ID_BLK_EITHER 0x1001

#define FEATURE_READ_ONLY 0x00000020u /* bit 5 */
#define FEATURE_FLUSH	  0x00000200u /* bit 9 */

static const char *const wrong_words[] = {
	[VIRTIO_GOOD] = NULL,
	[VIRTIO_NOT_FOUND] = "no-disk-found",
	[VIRTIO_NOT_MODERN] = "disk-has-no-modern-interface",
	[VIRTIO_NO_RESET] = "disk-does-not-reset",
	[VIRTIO_NOT_1] = "disk-not-virtio-1",
	[VIRTIO_REFUSES] = "disk-refuses-features",
};

static const char *negotiate(struct virtio_blk *blk)
{
	uint32_t features = virtio_offered(&blk->virtio);

	if (features & FEATURE_READ_ONLY)
		return "disk-read-only";
	blk->has_flush = features & FEATURE_FLUSH;
	return wrong_words[virtio_accept(&blk->virtio, features & FEATURE_FLUSH)];
}

static const char *set_up_queue(struct virtio_blk *blk, struct ram *ram)
{
	uint16_t largest = virtio_queue_limit(&blk->virtio, 0), size;
	uint8_t *place;

	blk->slots = largest / VIRTIO_BLK_DESCRIPTORS;
	if (blk->slots > VIRTIO_BLK_SLOTS)
		blk->slots = VIRTIO_BLK_SLOTS;
	if (!blk->slots)
		return "disk-queue-too-small";
	for (size = 1; size < blk->slots * VIRTIO_BLK_DESCRIPTORS;)
		size = (uint16_t)(size * 2);
	if (size > largest)
		size = largest;

	place = ram_take(ram, PAGE_BYTES); /* headers and status */
	if (!place || !virtio_queue_start(&blk->virtio, &blk->queue, ram, 0, size))
		return "no-memory-for-disk";
	memset(place, 0, PAGE_BYTES);
	blk->headers = (struct virtio_blk_header *)place;
	blk->status = place + VIRTIO_BLK_SLOTS * sizeof(struct virtio_blk_header);
	return NULL;
}

const char *virtio_blk_start(struct virtio_blk *blk, struct ram *ram, unsigned int number)
{
	const char *wrong;

	memset(blk, 0, sizeof(*blk));
	wrong = wrong_words[virtio_start(&blk->virtio, ID_BLK_MODERN, ID_BLK_EITHER, number)];
	if (!wrong && !blk->virtio.device)
		wrong = wrong_words[VIRTIO_NOT_MODERN];
	if (!wrong)
		wrong = negotiate(blk);
	if (!wrong)
		wrong = set_up_queue(blk, ram);
	if (wrong)
		return wrong;
	virtio_go(&blk->virtio);
	blk->capacity_sectors = mmio_read32(blk->virtio.device) | (uint64_t)mmio_read32(blk->virtio.device + 4) << 32;
	return NULL;
}

void virtio_blk_submit(struct virtio_blk *blk, unsigned int slot, enum virtio_blk_kind kind, uint64_t sector,
		       void *data, uint32_t bytes, uint32_t split_bytes)
{
	unsigned int head = slot * VIRTIO_BLK_DESCRIPTORS, at = head;
	unsigned int data_flags = VIRTQ_NEXT | (kind == VIRTIO_BLK_READ ? VIRTQ_DEVICE_WRITE : 0u);

	blk->headers[slot] = (struct virtio_blk_header){.type = (uint32_t)kind, .sector = sector};
	blk->status[slot] = 0xff;
	virtio_describe(&blk->queue, at++, &blk->headers[slot], sizeof(blk->headers[slot]), VIRTQ_NEXT);
	if (split_bytes)
		virtio_describe(&blk->queue, at++, data, split_bytes, data_flags);
	if (bytes > split_bytes)
		virtio_describe(&blk->queue, at++, (uint8_t *)data + split_bytes, bytes - split_bytes, data_flags);
	virtio_describe(&blk->queue, at, &blk->status[slot], 1, VIRTQ_DEVICE_WRITE);
	virtio_offer(&blk->queue, head);
}

void virtio_blk_notify(struct virtio_blk *blk) { virtio_notify(&blk->queue); }

bool virtio_blk_poll(struct virtio_blk *blk, unsigned int *slot, bool *good)
{
	uint32_t head;

	if (!virtio_poll(&blk->queue, &head))
		return false;
	*slot = head / VIRTIO_BLK_DESCRIPTORS;
	*good = *slot < blk->slots && blk->status[*slot] == 0;
	return true;
}
