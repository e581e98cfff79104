/* Both indices are walked side by side: pages that both take from one layer are equal, of others the content decides. */
#include "checkpoint/store/diff.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "checkpoint/restore.h"

struct side {
	struct store_pin *pin;
	struct store_checkpoint manifest;
	struct page_index index;
	struct restore_layers layers;
	uint8_t *data;
	uint64_t extent; /* the walk's */
};

static void side_free(struct side *s)
{
	if (s->layers.layers)
		restore_close(&s->layers);
	page_index_free(&s->index);
	store_checkpoint_free(&s->manifest);
	store_unpin(s->pin);
	free(s->data);
}

static int side_open(struct side *s, struct store *store, const char *id, struct err *err)
{
	CLEANUP_BUF struct buf data = BUF_INIT;
	int r = store_pin(store, id, &s->pin, err);
	if (r == 0)
		r = store_checkpoint_get(store, id, &s->manifest, err);
	if (r == 0)
		r = store_checkpoint_read(store, &s->manifest, "index", &data, err);
	if (r == 0)
		r = page_index_decode(data.data, data.length, &s->index, err);
	if (r == 0)
		r = restore_init(&s->layers, store, &s->index, err);
	if (r != 0)
		return r;
	s->data = malloc((size_t)RESTORE_CHUNK_PAGES * PAGE_BYTES);
	return s->data ? 0 : err_sys(err, ENOMEM, "buffer");
}

static const struct index_extent *extent_at(struct side *s, uint64_t page)
{
	while (s->index.extents[s->extent].first + s->index.extents[s->extent].count <= page)
		s->extent++;
	return &s->index.extents[s->extent];
}

static int read_pages(struct side *s, uint32_t layer, uint64_t first, uint64_t count, struct err *err)
{
	if (layer != INDEX_ZERO_LAYER)
		return restore_read(&s->layers, layer, first, count, s->data, err);
	memset(s->data, 0, count * PAGE_BYTES);
	return 0;
}

/* Ranges that touch are put together; RAM that touches does so only if the guest sees it so. */
static int note(struct memory_diff *diff, uint64_t page, uint64_t count, struct err *err)
{
	uint64_t ram = page * PAGE_BYTES, gpa = ram < MEM_HOLE_START ? ram : ram - MEM_HOLE_START + MEM_HOLE_END;
	struct diff_range *last = diff->range_count ? &diff->ranges[diff->range_count - 1] : NULL;
	diff->differing_pages += count;
	if (ram < MEM_HOLE_START && ram + count * PAGE_BYTES > MEM_HOLE_START) {
		uint64_t low = (MEM_HOLE_START - ram) / PAGE_BYTES;
		diff->differing_pages -= count;
		int r = note(diff, page, low, err);
		return r ? r : note(diff, page + low, count - low, err);
	}
	if (last && last->start + last->bytes == gpa) {
		last->bytes += count * PAGE_BYTES;
		return 0;
	}
	if ((diff->range_count & (diff->range_count - 1)) == 0) { /* full: its room is the next power of two */
		struct diff_range *grown = realloc(diff->ranges, (diff->range_count ? diff->range_count * 2 : 1) * sizeof(*grown));
		if (!grown)
			return err_sys(err, ENOMEM, "list of ranges");
		diff->ranges = grown;
	}
	diff->ranges[diff->range_count++] = (struct diff_range){gpa, count * PAGE_BYTES};
	return 0;
}

static bool is_same_place(const struct side *a, uint32_t layer_a, const struct side *b, uint32_t layer_b)
{
	if (layer_a == INDEX_ZERO_LAYER || layer_b == INDEX_ZERO_LAYER)
		return layer_a == layer_b;
	return strcmp(a->index.layers[layer_a - 1], b->index.layers[layer_b - 1]) == 0;
}

/* Pages [first, first + count), in one extent of each, at most RESTORE_CHUNK_PAGES. */
static int compare_pages(struct side sides[2], const uint32_t layers[2], uint64_t first, uint64_t count, struct memory_diff *diff, struct err *err)
{
	for (unsigned i = 0; i < 2; i++) {
		int r = read_pages(&sides[i], layers[i], first, count, err);
		if (r != 0)
			return r;
	}
	diff->compared_pages += count;
	for (uint64_t i = 0; i < count; i++) {
		int r = memcmp(sides[0].data + i * PAGE_BYTES, sides[1].data + i * PAGE_BYTES, PAGE_BYTES) ? note(diff, first + i, 1, err) : 0;
		if (r != 0)
			return r;
	}
	return 0;
}

static int walk(struct side sides[2], struct memory_diff *diff, struct err *err)
{
	uint64_t both = min_u64(diff->total_pages[0], diff->total_pages[1]), longer = max_u64(diff->total_pages[0], diff->total_pages[1]);
	int r = 0;
	for (uint64_t page = 0, n; page < both && r == 0; page += n) {
		const struct index_extent *a = extent_at(&sides[0], page), *b = extent_at(&sides[1], page);
		n = min_u64(min_u64(a->first + a->count, b->first + b->count), both) - page;
		if (is_same_place(&sides[0], a->layer, &sides[1], b->layer))
			continue;
		if (diff->cancel && *diff->cancel)
			return err_set(err, ERR_FAILED, ECANCELED, "cancelled");
		n = min_u64(n, RESTORE_CHUNK_PAGES);
		r = compare_pages(sides, (const uint32_t[2]){a->layer, b->layer}, page, n, diff, err);
		if (diff->progress)
			diff->progress(diff->opaque, page * PAGE_BYTES, both * PAGE_BYTES);
	}
	return r == 0 && longer > both ? note(diff, both, longer - both, err) : r;
}

int store_diff_memory(struct store *store, const char *a, const char *b, struct memory_diff *diff, struct err *err)
{
	struct side sides[2] = {{0}, {0}};
	const char *ids[2] = {a, b};
	int r = 0;
	diff->differing_pages = diff->compared_pages = 0;
	diff->ranges = NULL;
	diff->range_count = 0;
	for (unsigned i = 0; i < 2 && r == 0; i++) {
		r = side_open(&sides[i], store, ids[i], err);
		diff->total_pages[i] = sides[i].index.page_count;
	}
	if (r == 0)
		r = walk(sides, diff, err);
	side_free(&sides[0]);
	side_free(&sides[1]);
	if (r != 0) {
		free(diff->ranges);
		diff->ranges = NULL;
	}
	return r;
}
