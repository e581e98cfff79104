/*
 * Any bytes as a checkpoint's manifest. What is accepted is written again, and must read back the same. As hardly any mutation would have the right checksum,
 * it is put right first; the input as it is goes in too.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>
#include <xxhash.h>

#include "checkpoint/store/store_internal.h"
#include "fuzz/fuzz.h"

static void must(bool good)
{
	if (!good)
		abort();
}

static void decode(const void *data, size_t length)
{
	struct store_checkpoint one, other;
	struct buf text = BUF_INIT, again = BUF_INIT;
	if (manifest_decode("fuzz", data, length, &one, NULL) != 0)
		return;
	must(manifest_encode(&one, &text, NULL) == 0);
	must(manifest_decode("fuzz", text.data, text.length, &other, NULL) == 0);
	must(manifest_encode(&other, &again, NULL) == 0);
	must(again.length == text.length && memcmp(again.data, text.data, text.length) == 0);
	store_checkpoint_free(&one);
	store_checkpoint_free(&other);
	buf_free(&text);
	buf_free(&again);
}

static void decode_with_right_sum(const uint8_t *data, size_t size)
{
	json_t *manifest = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
	char sum[17];
	if (!json_is_object(manifest)) {
		json_decref(manifest);
		return;
	}
	json_object_del(manifest, "xxh3");
	char *text = json_dumps(manifest, JSON_COMPACT | JSON_SORT_KEYS);
	if (text) {
		snprintf(sum, sizeof(sum), "%016" PRIx64, (uint64_t)XXH3_64bits(text, strlen(text)));
		json_object_set_new(manifest, "xxh3", json_string(sum));
		free(text);
		text = json_dumps(manifest, JSON_COMPACT);
	}
	if (text)
		decode(text, strlen(text));
	free(text);
	json_decref(manifest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	decode(data, size);
	decode_with_right_sum(data, size);
	return 0;
}
