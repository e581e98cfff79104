#include "tests/inflight/history.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/buf.h"

struct event {
	enum history_kind kind;
	uint64_t sector, count, version;
	uint64_t issued, ended; /* ended: UINT64_MAX while it is in flight */
	bool good;
};

struct base {
	uint64_t version, since;
};

struct history {
	uint64_t sectors, moment;
	struct base *base; /* per sector */
	struct event *events;
	unsigned count, capacity;
};

struct history *history_create(uint64_t sectors)
{
	struct history *h = xcalloc(1, sizeof(*h));
	h->sectors = sectors;
	h->base = xcalloc(sectors, sizeof(*h->base));
	return h;
}

void history_free(struct history *h)
{
	if (!h)
		return;
	free(h->base);
	free(h->events);
	free(h);
}

uint64_t history_moment(struct history *h) { return ++h->moment; }

unsigned history_begin(struct history *h, enum history_kind kind, uint64_t sector, uint64_t count, uint64_t version)
{
	if (h->count == h->capacity) {
		h->capacity = h->capacity ? 2 * h->capacity : 256;
		h->events = realloc(h->events, h->capacity * sizeof(*h->events));
	}
	h->events[h->count] = (struct event){
		.kind = kind,
		.sector = sector,
		.count = count,
		.version = kind == HISTORY_WRITE ? version : 0,
		.issued = ++h->moment,
		.ended = UINT64_MAX,
	};
	return h->count++;
}

void history_end(struct history *h, unsigned number, bool good)
{
	h->events[number].ended = ++h->moment;
	h->events[number].good = good;
}

static bool covers(const struct event *e, uint64_t sector) { return sector >= e->sector && sector - e->sector < e->count; }

/* Something was written over all that ended by `ended`, and that itself ended before `from`. */
static bool is_gone(const struct history *h, uint64_t sector, uint64_t ended, uint64_t from, uint64_t moment)
{
	for (unsigned i = 0; i < h->count; i++) {
		const struct event *e = &h->events[i];
		if (covers(e, sector) && e->issued < moment && e->good && e->kind != HISTORY_DISCARD && e->issued > ended && e->ended < from)
			return true;
	}
	return false;
}

bool history_allows(const struct history *h, uint64_t sector, uint64_t version, uint64_t from, uint64_t moment)
{
	const struct base *base = &h->base[sector];
	if (base->version == version && !is_gone(h, sector, base->since, from, moment))
		return true;
	for (unsigned i = 0; i < h->count; i++) {
		const struct event *e = &h->events[i];
		if (covers(e, sector) && e->version == version && e->issued < moment && e->issued > base->since &&
		    !is_gone(h, sector, e->ended, from, moment))
			return true;
	}
	return false;
}

void history_settle(struct history *h, uint64_t sector, uint64_t version)
{
	h->base[sector] = (struct base){version, ++h->moment};
}

void history_forget(struct history *h) { h->count = 0; }

void history_print(const struct history *h, uint64_t sector)
{
	static const char *const names[] = {"write", "zeroes", "discard"};
	fprintf(stderr, "  sector %" PRIu64 ": at first version %" PRIu64 " (%" PRIu64 ")\n", sector, h->base[sector].version, h->base[sector].since);
	for (unsigned i = 0; i < h->count; i++) {
		const struct event *e = &h->events[i];
		if (covers(e, sector))
			fprintf(stderr, "  %s of %" PRIu64 " sectors at %" PRIu64 ", version %" PRIu64 ", from %" PRIu64 " to %" PRIu64 "%s\n",
				names[e->kind], e->count, e->sector, e->version, e->issued, e->ended, e->good ? "" : " (not well)");
	}
}
