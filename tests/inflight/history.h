/*
 * What a disk may hold, judged from a journal of what was issued and when it ended.
 *
 * Requests in flight together have no order, so a sector may hold what any of them wrote; what ended well before another began is gone with
 * it. A failed write may have left anything of its own, or nothing. A discard may leave what was there, or zeroes. A moment can be set, such
 * as that of a checkpoint: then only what was issued before it counts, whenever it ended.
 */
#ifndef VMCP_TESTS_INFLIGHT_HISTORY_H
#define VMCP_TESTS_INFLIGHT_HISTORY_H

#include <stdbool.h>
#include <stdint.h>

#define HISTORY_ALL UINT64_MAX /* as a moment: everything; as `from`: all has ended */

struct history;

struct history *history_create(uint64_t sectors);
void history_free(struct history *history);

/* Moments are counted, not measured: each call gives a later one. */
uint64_t history_moment(struct history *history);

enum history_kind { HISTORY_WRITE, HISTORY_ZEROES, HISTORY_DISCARD };
/* Issued now. `version` is told by the sectors themselves (tests/disk/sectors.h). Returns its number. */
unsigned history_begin(struct history *history, enum history_kind kind, uint64_t sector, uint64_t count, uint64_t version);
void history_end(struct history *history, unsigned number, bool good);

/* Whether a sector may read as `version` (0: zeroes) for a read that was issued at `from`, if nothing was issued since `moment`. */
bool history_allows(const struct history *history, uint64_t sector, uint64_t version, uint64_t from, uint64_t moment);
/* From now on the sector holds `version`: nothing is in flight there, and it was just read. */
void history_settle(struct history *history, uint64_t sector, uint64_t version);
/* No request of those noted is in flight (and, where the disk went back, none counts any more). Every sector is to be settled next. */
void history_forget(struct history *history);
/* Prints what is known of a sector. */
void history_print(const struct history *history, uint64_t sector);

#endif
