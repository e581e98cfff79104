#include "checkpoint/index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"

#define MAGIC	     "vmcpidx\n"
#define VERSION	     2u
#define HEADER_BYTES 48u
#define LAYER_BYTES  32u
#define EXTENT_MIN_BYTES 2u /* of each extent two numbers, of 1 to 5 bytes */
#define EXTENT_MAX_BYTES 10u
#define MAX_PAGES    ((uint64_t)1 << 28) /* 1 TiB of memory */

void page_index_free(struct page_index *index)
{
	free(index->layers);
	free(index->extents);
	*index = (struct page_index){0};
}

/* An index being built, and the layers that it took from the parent's. */
struct build {
	struct page_index *out;
	const struct page_index *parent;
	uint32_t *renumbered; /* parent's layer number - 1 -> ours, 0: not used yet */
	uint32_t own;	      /* number of the checkpoint's own layer, 0: not used yet */
	uint64_t room;
};

static int append(struct build *b, uint64_t first, uint64_t count, uint32_t layer, struct err *err)
{
	struct page_index *out = b->out;
	struct index_extent *last = out->extent_count ? &out->extents[out->extent_count - 1] : NULL;
	if (last && last->layer == layer) {
		last->count += count;
		return 0;
	}
	if (out->extent_count == b->room) {
		uint64_t more = b->room ? b->room * 2 : 64;
		struct index_extent *grown = realloc(out->extents, more * sizeof(*grown));
		if (!grown)
			return err_sys(err, ENOMEM, "index of %llu extents", (unsigned long long)more);
		out->extents = grown;
		b->room = more;
	}
	out->extents[out->extent_count++] = (struct index_extent){.first = first, .count = count, .layer = layer};
	return 0;
}

/* The number under which a layer stands in the new table: it joins when it is first needed. */
static uint32_t number_of(struct build *b, uint32_t *number, const char *layer)
{
	if (*number == 0) {
		memcpy(b->out->layers[b->out->layer_count], layer, STORE_ID_BYTES);
		*number = ++b->out->layer_count;
	}
	return *number;
}

static int append_from_parent(struct build *b, uint64_t first, uint64_t count, uint64_t *at, struct err *err)
{
	int r = 0;
	while (count > 0 && r == 0) {
		const struct index_extent *e = &b->parent->extents[*at];
		if (e->first + e->count <= first) {
			++*at;
			continue;
		}
		uint64_t run = min_u64(count, e->first + e->count - first);
		uint32_t layer = e->layer == INDEX_ZERO_LAYER
					 ? INDEX_ZERO_LAYER
					 : number_of(b, &b->renumbered[e->layer - 1], b->parent->layers[e->layer - 1]);
		r = append(b, first, run, layer, err);
		first += run;
		count -= run;
	}
	return r;
}

static int build_extents(struct build *b, const struct page_index_saved *saved, uint64_t page_count, struct err *err)
{
	uint64_t at = 0; /* in the parent's extents */
	int r = 0;
	for (uint64_t page = 0; page < page_count && r == 0;) {
		if (page % 64 == 0 && saved->scope[page / 64] == 0) {
			uint64_t run = min_u64(64, page_count - page);
			r = append_from_parent(b, page, run, &at, err);
			page += run;
			continue;
		}
		if (!(saved->scope[page / 64] >> (page % 64) & 1))
			r = append_from_parent(b, page, 1, &at, err);
		else if (bitmap_test(saved->zero, page))
			r = append(b, page, 1, INDEX_ZERO_LAYER, err);
		else
			r = append(b, page, 1, number_of(b, &b->own, saved->layer), err);
		page++;
	}
	return r;
}

int page_index_build(struct page_index *out, const struct page_index_saved *saved, const struct page_index *parent,
		     uint64_t page_count, struct err *err)
{
	struct build b = {.out = out, .parent = parent};
	uint32_t layers = parent ? parent->layer_count : 0;
	*out = (struct page_index){.page_count = page_count};
	out->layers = calloc((size_t)layers + 1, sizeof(*out->layers));
	b.renumbered = calloc((size_t)layers + 1, sizeof(*b.renumbered));
	int r = out->layers && b.renumbered ? 0 : err_sys(err, ENOMEM, "index of %u layers", layers + 1);
	if (r == 0)
		r = build_extents(&b, saved, page_count, err);
	free(b.renumbered);
	if (r != 0)
		page_index_free(out);
	return r;
}

static bool same_layer(const struct page_index *a, uint32_t x, const struct page_index *b, uint32_t y)
{
	if (x == INDEX_ZERO_LAYER || y == INDEX_ZERO_LAYER)
		return x == y;
	return memcmp(a->layers[x - 1], b->layers[y - 1], STORE_ID_BYTES) == 0;
}

static bool is_meant(const struct page_index *from, const struct index_extent *e, const struct page_index *index, uint32_t layer)
{
	return e->layer != INDEX_ZERO_LAYER && same_layer(from, e->layer, index, layer);
}

int page_index_replace(struct page_index *out, const struct page_index *index, const struct page_index *from, const char *layer,
		       struct err *err)
{
	struct build b = {.out = out};
	uint64_t i = 0, k = 0;
	int r = 0;
	*out = (struct page_index){.page_count = index->page_count, .layer_count = index->layer_count + 1};
	out->layers = calloc((size_t)index->layer_count + 1, sizeof(*out->layers));
	if (!out->layers)
		return err_sys(err, ENOMEM, "index of %u layers", index->layer_count + 1);
	memcpy(out->layers, index->layers, index->layer_count * sizeof(*out->layers));
	memcpy(out->layers[index->layer_count], layer, STORE_ID_BYTES);
	for (uint64_t page = 0; page < index->page_count && r == 0;) {
		const struct index_extent *x = &index->extents[i], *y = &from->extents[k];
		uint64_t x_end = x->first + x->count, y_end = y->first + y->count, end = min_u64(x_end, y_end);
		r = append(&b, page, end - page, is_meant(from, y, index, x->layer) ? out->layer_count : x->layer, err);
		page = end;
		i += x_end == end;
		k += y_end == end;
	}
	if (r != 0)
		page_index_free(out);
	return r;
}

bool page_index_names(const struct page_index *index, const char *layer)
{
	for (uint32_t i = 0; i < index->layer_count; i++)
		if (strcmp(index->layers[i], layer) == 0)
			return true;
	return false;
}

/* LEB128: 7 bits a byte, the lowest first; the highest bit says that more follow. */
static size_t put_number(uint8_t *at, uint32_t number)
{
	size_t length = 0;
	for (; number > 0x7f; number >>= 7)
		at[length++] = (uint8_t)(number | 0x80);
	at[length++] = (uint8_t)number;
	return length;
}

/* *at moves behind it. -EINVAL: it ends too soon, or is no number of 32 bits. */
static int get_number(const uint8_t **at, const uint8_t *end, uint32_t *number)
{
	uint64_t value = 0;
	for (unsigned shift = 0; shift < 35 && *at < end; shift += 7) {
		uint8_t byte = *(*at)++;
		value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80)) {
			*number = (uint32_t)value;
			return value <= UINT32_MAX ? 0 : -EINVAL;
		}
	}
	return -EINVAL;
}

int page_index_encode(const struct page_index *index, struct buf *out, struct err *err)
{
	uint8_t header[HEADER_BYTES] = {0};
	size_t start = out->length;
	memcpy(header, MAGIC, 8);
	put_le32(header + 8, VERSION);
	put_le32(header + 12, PAGE_BYTES);
	put_le64(header + 16, index->page_count);
	put_le32(header + 24, index->layer_count);
	put_le64(header + 32, index->extent_count);
	int r = buf_append(out, header, sizeof(header), err);
	for (uint32_t i = 0; i < index->layer_count && r == 0; i++)
		r = buf_append(out, index->layers[i], LAYER_BYTES, err);
	size_t extents = out->length;
	for (uint64_t i = 0; i < index->extent_count && r == 0; i++) {
		uint8_t extent[EXTENT_MAX_BYTES];
		size_t length = put_number(extent, (uint32_t)index->extents[i].count);
		length += put_number(extent + length, index->extents[i].layer);
		r = buf_append(out, extent, length, err);
	}
	if (r == 0)
		put_le64((uint8_t *)out->data + start + 40, out->length - extents);
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

static int decode_extents(const uint8_t *data, const uint8_t *end, struct page_index *out, struct err *err)
{
	uint64_t next = 0;
	for (uint64_t i = 0; i < out->extent_count; i++) {
		struct index_extent *extent = &out->extents[i];
		uint32_t count, layer;
		if (get_number(&data, end, &count) != 0 || get_number(&data, end, &layer) != 0)
			return damaged(err, "an extent that is none at page", next);
		*extent = (struct index_extent){.first = next, .count = count, .layer = layer};
		if (extent->count == 0 || extent->count > out->page_count - next)
			return damaged(err, "an extent of a wrong length at page", next);
		if (extent->layer > out->layer_count)
			return damaged(err, "an extent names no layer of the table", extent->layer);
		next += extent->count;
	}
	if (data != end)
		return damaged(err, "bytes behind the last extent", (uint64_t)(end - data));
	return next == out->page_count ? 0 : damaged(err, "extents end before the memory does, at page", next);
}

/* The header's counts, as far as they fit the length. */
static int decode_header(const uint8_t *at, size_t length, struct page_index *out, struct err *err)
{
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
	if (get_le32(at + 12) != PAGE_BYTES || get_le32(at + 28) != 0)
		return damaged(err, "a fixed field has another value", get_le32(at + 12));
	if (out->page_count == 0 || out->page_count > MAX_PAGES || out->extent_count > out->page_count)
		return damaged(err, "absurd number of pages or extents", out->page_count);
	/* No overflow: products are below 2^38. */
	uint64_t extent_bytes = get_le64(at + 40);
	if (extent_bytes > length || length != HEADER_BYTES + (uint64_t)out->layer_count * LAYER_BYTES + extent_bytes ||
	    extent_bytes < out->extent_count * EXTENT_MIN_BYTES)
		return damaged(err, "the length does not fit the header", length);
	return 0;
}

int page_index_decode(const void *data, size_t length, struct page_index *out, struct err *err)
{
	const uint8_t *at = data;
	struct err unset = ERR_INIT;
	int r = decode_header(at, length, out, err ? err : &unset);
	if (r != 0)
		return r;
	out->layers = malloc((size_t)out->layer_count * sizeof(*out->layers) + 1);
	out->extents = malloc(out->extent_count * sizeof(*out->extents) + 1);
	r = out->layers && out->extents ? 0 : err_sys(err, ENOMEM, "index of %zu bytes", length);
	if (r == 0)
		r = decode_layers(at + HEADER_BYTES, out, err);
	if (r == 0)
		r = decode_extents(at + HEADER_BYTES + (size_t)out->layer_count * LAYER_BYTES, at + length, out, err);
	if (r != 0)
		page_index_free(out);
	return r;
}

int page_index_layers(const void *data, size_t length, const char **names, uint32_t *count, struct err *err)
{
	const uint8_t *at = data;
	struct page_index header;
	struct err unset = ERR_INIT;
	int r = decode_header(at, length, &header, err ? err : &unset);
	if (r != 0)
		return r;
	*names = (const char *)at + HEADER_BYTES;
	*count = header.layer_count;
	for (size_t i = 0; i < (size_t)header.layer_count * LAYER_BYTES; i++)
		if (!memchr("0123456789abcdef", (*names)[i], 16))
			return damaged(err, "not the name of a layer", i / LAYER_BYTES + 1);
	return 0;
}

void page_index_diff(const struct page_index *a, const struct page_index *b, uint64_t *pages)
{
	uint64_t i = 0, k = 0, page = 0;
	while (page < a->page_count) {
		const struct index_extent *x = &a->extents[i], *y = &b->extents[k];
		uint64_t x_end = x->first + x->count, y_end = y->first + y->count, end = min_u64(x_end, y_end);
		if (!same_layer(a, x->layer, b, y->layer)) {
			for (uint64_t p = page; p < end; p++)
				pages[p / 64] |= (uint64_t)1 << (p % 64);
		}
		page = end;
		i += x_end == end;
		k += y_end == end;
	}
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
