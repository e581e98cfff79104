/*
 * Who checks the memory that several VMs share. VMs that start from one checkpoint map the same files, so that each one's check reads the same pages of the
 * page cache. They take turns, one at a time; and a check that began after a VM had mapped its memory, and found it whole, is that VM's as well. Of a
 * hundred clones some ten check, one after the other, instead of all of them beside the starts of the next.
 *
 * The file `checks` of the checkpoint counts (docs/format.md); a lock on it (OFD) is held while a check lasts, and goes with its process. It is a hint: where
 * it cannot be had, read or written, each VM checks by itself.
 *
 *     check_turn_open -> memory is mapped -> check_turn_take until it does not say CHECK_TURN_WAIT
 *                     -> if it said CHECK_TURN_MINE: the check, check_turn_passed if all was whole
 *                     -> check_turn_close       at any time
 *
 * Threads: one at a time.
 */
#ifndef VMCP_CHECKPOINT_CHECK_TURN_H
#define VMCP_CHECKPOINT_CHECK_TURN_H

#include <stdint.h>

#include "checkpoint/store/store.h"

#define CHECK_TURN_RECORD_BYTES 56u

struct check_turn {
	int fd; /* -1: no turns are taken */
	uint64_t boot, key, number;
	uint8_t before[CHECK_TURN_RECORD_BYTES]; /* the file as it was before memory was mapped */
	int before_bytes;
};

enum check_turn_answer {
	CHECK_TURN_WAIT, /* another one checks: ask again in a while */
	CHECK_TURN_MINE,
	CHECK_TURN_OVER, /* a check of later than check_turn_open found all whole */
};

void check_turn_open(struct check_turn *turn, struct store *store, const char *checkpoint);
/* key: what is to be checked, and where. Checks of another key are none of this VM's. The same with each call. */
enum check_turn_answer check_turn_take(struct check_turn *turn, uint64_t key);
void check_turn_passed(struct check_turn *turn);
void check_turn_close(struct check_turn *turn);

#endif
