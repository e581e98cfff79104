/*
 * A block layer for tests, between cowdisk and the kernel: operations that a rule names are held back, and end later, in any order, as the
 * rule says: after a time, or when the test wants; whole, in short pieces, or with an error.
 *
 * What an operation does to the file happens when it ends, at once and whole. All functions run in the I/O thread, or where no other runs.
 */
#ifndef VMCP_TESTS_INFLIGHT_TEST_LAYER_H
#define VMCP_TESTS_INFLIGHT_TEST_LAYER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/event.h"
#include "cowdisk/io_internal.h"

#define RULE_KIND(kind) (1u << (kind))
#define RULE_ALL	0x1fu

struct test_rule {
	unsigned kinds;		    /* RULE_KIND(IO_READ) | ... */
	const char *file;	    /* the end of the file's path; NULL: all files */
	uint64_t from, to;	    /* bytes of the file; both 0: all of it */
	bool hold;		    /* until test_layer_end_one, or until the rules change */
	unsigned reluctance;	    /* test_layer_end_one, when it has chosen one, ends it in one of so many cases only; 0: always */
	uint64_t least_ns, most_ns; /* else: how long it lasts */
	unsigned error_percent;
	int error; /* EIO, ENOSPC, ... */
	unsigned short_percent; /* transfers that end with a part, at least one sector; the rest goes on like a new operation */
};

struct test_layer;

/* Between the ring and its first disk. Without a loop (NULL) held operations end as cow_io_drive is called: some, chosen at random, a call. */
struct test_layer *test_layer_create(struct cow_io *io, struct loop *loop, uint64_t seed);
/* Nothing is held any more. */
void test_layer_destroy(struct test_layer *layer);

/* The first that fits counts; what none fits passes. What was held is judged again. The array stays the caller's, unchanged. */
void test_layer_set_rules(struct test_layer *layer, const struct test_rule *rules, unsigned count);
/* Ends one of those held, chosen at random, if it is not reluctant. False: there is none. */
bool test_layer_end_one(struct test_layer *layer);
unsigned test_layer_held(const struct test_layer *layer);
/* How many were given an error or cut short so far. */
unsigned long test_layer_errors(const struct test_layer *layer);
unsigned long test_layer_cuts(const struct test_layer *layer);

#endif
