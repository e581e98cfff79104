/* Streams made by hand, for the tests and fuzzers of imports: right sums around any content. */
#ifndef VMCP_CHECKPOINT_STORE_TRANSFER_TEST_H
#define VMCP_CHECKPOINT_STORE_TRANSFER_TEST_H

#include "checkpoint/store/transfer_internal.h"

struct test_stream {
	struct buf bytes;
	struct transfer_ledger ledger;
	void *packer;
	struct transfer_slot slot;
};
void test_stream_begin(struct test_stream *s); /* aborts if memory is short */
/* One chunk of that content, cut to what a chunk may hold. */
void test_stream_chunk(struct test_stream *s, uint32_t kind, const void *content, size_t length);
/* The last chunk and the table. */
void test_stream_end(struct test_stream *s);
void test_stream_free(struct test_stream *s);
/* Head, manifest and state of a machine of 64 pages with a disk `data` of 1 MiB and a read-only one `seed` of 64 KiB. NULL: as they are. */
#define TEST_STREAM_PAGES 64u
#define TEST_STREAM_ID	  "0123456789abcdef0123456789abcdef"
void test_stream_machine(struct test_stream *s, void (*change)(struct transfer_head *head, struct store_checkpoint *checkpoint));
/* A table of runs {first, count, kind} and `data_bytes` of data behind it. */
void test_stream_runs(struct test_stream *s, uint32_t kind, uint32_t object, uint32_t count, const uint64_t (*runs)[3], size_t data_bytes);
/* The stream in a file of its own, at its beginning. */
int test_stream_open(const void *data, size_t length);

#endif
