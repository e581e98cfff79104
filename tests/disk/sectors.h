/* Sectors that say which write they come from: number and version, the rest derived from both. */
#ifndef VMCP_TESTS_DISK_SECTORS_H
#define VMCP_TESTS_DISK_SECTORS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SECTOR	512u
#define STAMP	0x76304d43504b5344ull
#define IS_ZERO 1ull /* versions count in twos; an odd one is zeroes */

static inline uint64_t next_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static inline void fill_sector(uint8_t *data, uint64_t sector, uint64_t version)
{
	if (version & IS_ZERO || version == 0) {
		memset(data, 0, SECTOR);
		return;
	}
	uint64_t state = sector * 0x2545f4914f6cdd1dull + version;
	uint64_t words[SECTOR / 8] = {STAMP, sector, version};
	for (unsigned i = 3; i < SECTOR / 8; i++)
		words[i] = next_random(&state);
	memcpy(data, words, SECTOR);
}

/* False if the sector is neither zeroes nor a whole write. */
static inline bool read_version(const uint8_t *data, uint64_t sector, uint64_t *version)
{
	uint8_t want[SECTOR];
	uint64_t words[3];
	memcpy(words, data, sizeof(words));
	*version = words[0] == STAMP ? words[2] : 0;
	fill_sector(want, sector, *version);
	return (words[0] != STAMP || words[1] == sector) && memcmp(want, data, SECTOR) == 0;
}

#endif
