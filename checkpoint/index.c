#include "checkpoint/index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"

#define MAGIC	     "vmcpidx\n"
#define VERSION	     1u
#define HEADER_BYTES 48u
#define LAYER_BYTES  32u
#define EXTENT_BYTES 16u
#define MAX_PAGES    ((uint64_t)1 << 28) /* 1 TiB of memory */

void page_index_free(struct page_index *index)
{
	free(index->layers);
	free(index->extents);
	*index = (struct page_index){0};
}

static int add_extent(struct page_index *index, uint64_t *room, struct index_extent extent, struct err *err)
{
	if (index->extent_count == *room) {
		uint64_t more = *room ? *room * 2 : 64;
		struct index_extent *grown = realloc(index->extents, more * sizeof(*grown));
		if (!grown)
			return err_sys(err, ENOMEM, "index of %llu extents", (unsigned long long)more);
		index->extents = grown;
		*room = more;
	}
	index->extents[index->extent_count++] = extent;
	return 0;
}

int page_index_from_zero_map(struct page_index *out, const char *layer, const _Atomic uint64_t *zero_map,
			     uint64_t page_count, struct err *err)
{
	uint64_t room = 0;
	int r = 0;
	*out = (struct page_index){.page_count = page_count, .layer_count = 1};
	out->layers = calloc(1, sizeof(*out->layers));
	if (!out->layers)
		return err_sys(err, ENOMEM, "index");
	memcpy(out->layers[0], layer, STORE_ID_BYTES);
	struct index_extent run = {.count = 0};
	for (uint64_t page = 0; page < page_count && r == 0; page++) {
		uint32_t number = bitmap_test(zero_map, page) ? INDEX_ZERO_LAYER : 1;
		if (run.count > 0 && run.layer != number) {
			r = add_extent(out, &room, run, err);
			run.count = 0;
		}
		if (run.count++ == 0)
			run = (struct index_extent){.first = page, .count = 1, .layer = number};
	}
	if (r == 0 && run.count > 0)
		r = add_extent(out, &room, run, err);
	if (r != 0)
		page_index_free(out);
	return r;
}

int page_index_encode(const struct page_index *index, struct buf *out, struct err *err)
{
	uint8_t header[HEADER_BYTES] = {0};
	memcpy(header, MAGIC, 8);
	put_le32(header + 8, VERSION);
	put_le32(header + 12, PAGE_BYTES);
	put_le64(header + 16, index->page_count);
	put_le32(header + 24, index->layer_count);
	put_le64(header + 32, index->extent_count);
	int r = buf_append(out, header, sizeof(header), err);
	for (uint32_t i = 0; i < index->layer_count && r == 0; i++)
		r = buf_append(out, index->layers[i], LAYER_BYTES, err);
	for (uint64_t i = 0; i < index->extent_count && r == 0; i++) {
		uint8_t extent[EXTENT_BYTES];
		put_le64(extent, index->extents[i].first);
		put_le32(extent + 8, (uint32_t)index->extents[i].count);
		put_le32(extent + 12, index->extents[i].layer);
		r = buf_append(out, extent, sizeof(extent), err);
	}
	return r;
}

static int damaged(struct err *err, const char *what, uint64_t value)
{
	return err_set(err, ERR_DAMAGED, EINVAL, "index: %s (%llu)", what, (unsigned long long)value);
}

static int decode_layers(const uint8_t *data, struct page_index *out, struct err *err)
{
	for (uint32_t i = 0; i < out->layer_count; i++) {
		memcpy(out->layers[i], data + (size_t)i * LAYER_BYTES, LAYER_BYTES);
		out->layers[i][LAYER_BYTES] = '\0';
		if (strspn(out->layers[i], "0123456789abcdef") != LAYER_BYTES)
			return damaged(err, "not the name of a layer", i + 1);
	}
	return 0;
}

static int decode_extents(const uint8_t *data, struct page_index *out, struct err *err)
{
	uint64_t next = 0;
	for (uint64_t i = 0; i < out->extent_count; i++, data += EXTENT_BYTES) {
		struct index_extent *extent = &out->extents[i];
		*extent = (struct index_extent){
			.first = get_le64(data), .count = get_le32(data + 8), .layer = get_le32(data + 12)};
		if (extent->first != next)
			return damaged(err, "extents leave a gap, overlap or are out of order at page", next);
		if (extent->count == 0 || extent->count > out->page_count - next)
			return damaged(err, "an extent of a wrong length at page", next);
		if (extent->layer > out->layer_count)
			return damaged(err, "an extent names no layer of the table", extent->layer);
		next += extent->count;
	}
	return next == out->page_count ? 0 : damaged(err, "extents end before the memory does, at page", next);
}

int page_index_decode(const void *data, size_t length, struct page_index *out, struct err *err)
{
	const uint8_t *at = data;
	*out = (struct page_index){0};
	if (length < HEADER_BYTES || memcmp(at, MAGIC, 8) != 0)
		return damaged(err, "no index file", length);
	if (get_le32(at + 8) != VERSION) {
		damaged(err, "unknown version", get_le32(at + 8));
		return err_hint(err, "it was made by another version of vmcp");
	}
	out->page_count = get_le64(at + 16);
	out->layer_count = get_le32(at + 24);
	out->extent_count = get_le64(at + 32);
	if (get_le32(at + 12) != PAGE_BYTES || get_le32(at + 28) != 0 || get_le64(at + 40) != 0)
		return damaged(err, "a fixed field has another value", get_le32(at + 12));
	if (out->page_count == 0 || out->page_count > MAX_PAGES || out->extent_count > out->page_count)
		return damaged(err, "absurd number of pages or extents", out->page_count);
	/* No overflow: both products are below 2^38. */
	if (length != HEADER_BYTES + (uint64_t)out->layer_count * LAYER_BYTES + out->extent_count * EXTENT_BYTES)
		return damaged(err, "the length does not fit the header", length);
	out->layers = malloc((size_t)out->layer_count * sizeof(*out->layers) + 1);
	out->extents = malloc(out->extent_count * sizeof(*out->extents) + 1);
	int r = out->layers && out->extents ? 0 : err_sys(err, ENOMEM, "index of %zu bytes", length);
	if (r == 0)
		r = decode_layers(at + HEADER_BYTES, out, err);
	if (r == 0)
		r = decode_extents(at + HEADER_BYTES + (size_t)out->layer_count * LAYER_BYTES, out, err);
	if (r != 0)
		page_index_free(out);
	return r;
}

const struct index_extent *page_index_find(const struct page_index *index, uint64_t page)
{
	uint64_t low = 0, high = index->extent_count;
	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;
		if (index->extents[middle].first <= page)
			low = middle;
		else
			high = middle;
	}
	return &index->extents[low];
}
