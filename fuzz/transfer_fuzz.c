/*
 * Imports. Input that begins as an export does, or as an encrypted one, is read as one; of the latter those are left out of which the key would take long to make. Any other is what chunks hold: a byte, of which bit 0 asks for head, manifest and
 * state of a machine that is right; then chunks, each a byte for its kind, two for its length, and its content. They get the sums that they need, so
 * that what lies behind the sums is reached. Nothing is kept: there is no store.
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "checkpoint/store/transfer_test.h"
#include "control/transfer_config.h"
#include "fuzz/fuzz.h"

#define SEALED_LOG_N 32 /* in the start of an encrypted one: the cost of its key */
#define SEALED_MOST  4

static void import_bytes(const uint8_t *data, size_t size, const struct transfer_key *key)
{
	const struct transfer_options options = {.config = &control_transfer_config, .key = key};
	struct transfer_result result;
	CLEANUP_CLOSE int fd = test_stream_open(data, size);

	transfer_import(NULL, fd, "stream", NULL, &options, &result, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct transfer_key key = {"corpus", 6, .log_n = 1};
	uint8_t start[TRANSFER_START_BYTES];
	struct test_stream s;

	log_set_sink(-1, NULL);
	transfer_put_start(start);
	if (size > SEALED_LOG_N && transfer_is_sealed(data)) {
		if (data[SEALED_LOG_N] <= SEALED_MOST)
			import_bytes(data, size, &key);
		return 0;
	}
	if (size >= 4 && memcmp(data, start, 4) == 0) {
		import_bytes(data, size, NULL);
		return 0;
	}
	test_stream_begin(&s);
	if (size && data[0] & 1)
		test_stream_machine(&s, NULL);
	for (size_t at = 1; at + 3 < size;) {
		size_t length = min_u64(get_le16(data + at + 1), size - at - 3);

		test_stream_chunk(&s, data[at] % 8, data + at + 3, length);
		at += 3 + length;
	}
	test_stream_end(&s);
	import_bytes(s.bytes.data, s.bytes.length, NULL);
	test_stream_free(&s);
	return 0;
}
