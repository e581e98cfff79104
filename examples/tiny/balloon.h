/*
 * A virtio balloon with free page reporting (OASIS virtio 1.2, section 5.5): a spare area of memory that is given back to the
 * host and taken again, by chunks of 64 pages. The balloon follows the size that the host asks for; besides, chunks are reported as
 * free and filled again at random, `report_rate` of either a second.
 *
 *     HELD --inflate--> LEAVING --answer--> OUT --deflate--> RETURNING --answer--> FREE
 *     HELD --report--> REPORTED --answer--> FREE --refill--> HELD
 *
 * The pages of a chunk that is HELD have content that follows from its stamp. Each page of one that is FREE is all zero, or as it was before it
 * was given back: nothing else may ever be seen there, and it is looked at before the chunk is filled again, with a new stamp.
 */
#ifndef TINY_BALLOON_H
#define TINY_BALLOON_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"
#include "options.h"
#include "pattern.h"
#include "virtio.h"

#define BALLOON_CHUNK_PAGES 64u

enum balloon_state { BALLOON_HELD, BALLOON_LEAVING, BALLOON_OUT, BALLOON_RETURNING, BALLOON_REPORTED, BALLOON_FREE };

struct balloon {
	bool there;
	uint64_t seed;
	uint64_t chunks;
	uint8_t *area;
	uint64_t *stamp; /* of each chunk */
	uint8_t *state;	 /* of each chunk */
	uint64_t sum;	 /* of pattern_base() over stamps and states */
	uint64_t target, out; /* chunks */
	uint32_t moving, reported; /* the chunk that is LEAVING or RETURNING; that is REPORTED; BALLOON_NONE */
	uint32_t cursor;
	uint32_t *pfns;
	uint64_t reports, zeroed, kept, bad; /* pages found in a FREE chunk: zero, as they were, neither (or wrong in a HELD one) */
	struct random random;
	struct virtio virtio;
	struct virtio_queue inflate, deflate, report;
};

/* Returns NULL, or what is wrong. Fills the area. */
const char *balloon_start(struct balloon *balloon, struct ram *ram, const struct options *options, struct stamp_source *stamps);

/* Takes what was answered, and moves on towards the host's target. look: asks the host for it, at the price of a device access. */
void balloon_turn(struct balloon *balloon, struct stamp_source *stamps, bool look);

/* Reports a chunk, or fills a free one. */
void balloon_step(struct balloon *balloon, struct stamp_source *stamps);

/* Waits for what is in flight. False: no answer in 30 s. */
bool balloon_drain(struct balloon *balloon, const struct clock *clock);

/* Drains, then looks at every page that is not the host's: what is wrong counts in `bad`. False: no answer, or the ledger is wrong. */
bool balloon_check(struct balloon *balloon, const struct clock *clock);

#endif
