/* Any bytes as a checkpoint's index. What is accepted covers its pages once, and reads back the same when it is written again. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/index.h"
#include "fuzz/fuzz.h"

static void must(bool good)
{
	if (!good)
		abort();
}

static void check(const struct page_index *index)
{
	struct page_index again;
	struct buf out = BUF_INIT;
	uint64_t page = 0;
	for (uint64_t i = 0; i < index->extent_count; page += index->extents[i++].count) {
		must(index->extents[i].first == page && index->extents[i].count > 0 && index->extents[i].layer <= index->layer_count);
		must(page_index_find(index, page) == &index->extents[i]);
	}
	must(page == index->page_count);
	must(page_index_encode(index, &out, NULL) == 0);
	must(page_index_decode(out.data, out.length, &again, NULL) == 0);
	must(again.page_count == index->page_count && again.layer_count == index->layer_count);
	page_index_free(&again);
	buf_free(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct page_index index;
	const char *names;
	uint32_t count;
	bool has_names = page_index_layers(data, size, &names, &count, NULL) == 0;
	if (page_index_decode(data, size, &index, NULL) != 0)
		return 0;
	must(has_names && count == index.layer_count);
	check(&index);
	page_index_free(&index);
	return 0;
}
