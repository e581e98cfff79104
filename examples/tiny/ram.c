#include "ram.h"

#include <stddef.h>

#define LARGE_PAGE     (2ull << 20)
#define PTE_LARGE      0x87ull
#define PD_LOW_END     (4ull << 30)  /* boot.S maps what is below */
#define WINDOW_START   (64ull << 30) /* the last page directory of boot.S: device memory that lies higher */
#define WINDOW_SLOTS   512u
#define LOW_MEMORY_END (1ull << 20)

extern uint64_t pd_high[]; /* from 4 GiB on, one entry for 2 MiB */
extern char image_start[], image_end[];

static uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) & ~(unit - 1); }

/* An entry that was absent becomes present: no stale translation can exist, so nothing needs flushing. */
static void map_identity(uint64_t start, uint64_t end)
{
	uint64_t at = start & ~(LARGE_PAGE - 1);

	if (at < PD_LOW_END)
		at = PD_LOW_END;
	for (; at < end; at += LARGE_PAGE)
		pd_high[(at - PD_LOW_END) / LARGE_PAGE] = at | PTE_LARGE;
}

static void add_range(struct ram *ram, uint64_t start, uint64_t end)
{
	if (start < end && ram->ranges < RAM_RANGES) {
		map_identity(start, end);
		ram->range[ram->ranges++] = (struct ram_range){start, end};
	}
}

bool ram_start(struct ram *ram, const struct pvh_start_info *info)
{
	const struct pvh_memmap_entry *entry = (const struct pvh_memmap_entry *)(uintptr_t)info->memmap_gpa;
	uint64_t image_from = (uintptr_t)image_start & ~(uint64_t)(PAGE_BYTES - 1);
	uint64_t image_to = (uintptr_t)image_end;
	uint64_t start, end;
	uint32_t i;

	ram->total_bytes = 0;
	ram->ranges = 0;
	if (info->version < 1 || !entry)
		return false;
	for (i = 0; i < info->memmap_entries; i++) {
		if (entry[i].type != PVH_MEM_RAM || entry[i].size_bytes > RAM_MAPPED_END)
			continue;
		ram->total_bytes += entry[i].size_bytes;
		start = round_up(entry[i].gpa, PAGE_BYTES);
		end = (entry[i].gpa + entry[i].size_bytes) & ~(uint64_t)(PAGE_BYTES - 1);
		if (start < LOW_MEMORY_END)
			start = LOW_MEMORY_END;
		if (end > RAM_MAPPED_END)
			end = RAM_MAPPED_END;
		if (start < image_to && end > image_from) {
			add_range(ram, start, image_from);
			start = image_to;
		}
		add_range(ram, start, end);
	}
	return ram->ranges != 0;
}

uint64_t ram_free_bytes(const struct ram *ram)
{
	uint64_t bytes = 0;
	unsigned int i;

	for (i = 0; i < ram->ranges; i++)
		bytes += ram->range[i].end_gpa - ram->range[i].start_gpa;
	return bytes;
}

void *ram_take(struct ram *ram, uint64_t bytes)
{
	uint64_t size = round_up(bytes, PAGE_BYTES), start;
	unsigned int i;

	for (i = 0; i < ram->ranges; i++) {
		start = ram->range[i].start_gpa;
		if (ram->range[i].end_gpa - start >= size) {
			ram->range[i].start_gpa += size;
			return (void *)(uintptr_t)start;
		}
	}
	return NULL;
}

volatile uint8_t *ram_map_device(uint64_t gpa, uint64_t bytes)
{
	uint64_t *window = pd_high + (WINDOW_START - PD_LOW_END) / LARGE_PAGE;
	uint64_t first = gpa & ~(LARGE_PAGE - 1), at;
	unsigned int slot = 0, used;

	if (gpa + bytes < gpa)
		return NULL;
	if (gpa + bytes <= RAM_MAPPED_END) {
		map_identity(gpa, gpa + bytes);
		return (volatile uint8_t *)(uintptr_t)gpa;
	}
	while (slot < WINDOW_SLOTS && window[slot])
		slot++;
	for (used = slot, at = first; at < gpa + bytes; at += LARGE_PAGE) {
		if (used == WINDOW_SLOTS)
			return NULL;
		window[used++] = at | PTE_LARGE;
	}
	return (volatile uint8_t *)(uintptr_t)(WINDOW_START + slot * LARGE_PAGE + (gpa - first));
}
