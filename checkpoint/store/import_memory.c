/* The memory of an import: one layer of what its base has not, and an index. */
#include <errno.h>
#include <string.h>

#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/import_internal.h"

static void set_bit(uint64_t *bits, uint64_t n) { bits[n / 64] |= 1ull << (n % 64); }
static bool get_bit(const uint64_t *bits, uint64_t n) { return bits[n / 64] >> (n % 64) & 1; }

int import_memory_begin(struct import *im, struct err *err)
{
	struct import_memory *m = &im->memory;
	size_t words = (size_t)div_round_up(m->pages, 64);
	int rc = store_draft_memory_layer(im->draft, m->layer, &m->fd, &m->sums_fd, err);

	if (rc) {
		m->fd = m->sums_fd = -1; /* closed */
		return rc;
	}
	m->seen = calloc(words, sizeof(uint64_t));
	m->scope = calloc(words, sizeof(uint64_t));
	m->saved = calloc(words, sizeof(uint64_t));
	m->zero = calloc(words, sizeof(uint64_t));
	m->sums = calloc(m->pages, sizeof(uint64_t)); /* touched only where there are pages */
	m->before = malloc(RESTORE_CHUNK_PAGES * PAGE_BYTES);
	m->sealed = malloc(RESTORE_CHUNK_PAGES * PAGE_BYTES);
	if (!m->seen || !m->scope || !m->saved || !m->zero || !m->sums || !m->before || !m->sealed)
		return err_sys(err, ENOMEM, "map of %llu pages", (unsigned long long)m->pages);
	return store_layer_cipher(im->store, m->layer, true, &m->cipher, err);
}

void import_memory_free(struct import_memory *m)
{
	if (m->fd >= 0)
		close(m->fd);
	if (m->sums_fd >= 0)
		close(m->sums_fd);
	free(m->seen);
	free(m->scope);
	free(m->saved);
	free(m->zero);
	free(m->sums);
	free(m->before);
	free(m->sealed);
	seal_pages_free(m->cipher);
}

/* Pages that the base does not have so: appended to the layer, in order. At most RESTORE_CHUNK_PAGES. */
static int save(struct import_memory *m, uint64_t first, uint64_t count, const uint8_t *data, struct err *err)
{
	int rc = 0;

	if (!count)
		return 0;
	if (m->cipher) {
		data = memcpy(m->sealed, data, count * PAGE_BYTES);
		rc = store_cipher_pages(m->cipher, first, count, m->sealed, err);
	}
	if (!rc)
		rc = file_pwrite_full(m->fd, data, count * PAGE_BYTES, m->places * PAGE_BYTES, err);

	for (uint64_t i = 0; !rc && i < count; i++) {
		set_bit(m->scope, first + i);
		set_bit(m->saved, first + i);
		m->sums[first + i] = page_sum(first + i, data + i * PAGE_BYTES);
	}
	m->places += count;
	return rc ? err_prefix(err, "memory layer") : 0;
}

/* Pages of one extent of the base, at most RESTORE_CHUNK_PAGES. Those that cannot be read there are saved anew. */
static int save_if_new(struct import *im, const struct index_extent *e, uint64_t first, uint64_t count, const uint8_t *data, struct err *err)
{
	struct import_memory *m = &im->memory;
	uint64_t from = 0;
	bool known = e->layer != INDEX_ZERO_LAYER && restore_read(&im->base.layers, e->layer, first, count, m->before, NULL) == 0;
	int rc = 0;

	for (uint64_t i = 0; !rc && known && i < count; i++) {
		if (memcmp(m->before + i * PAGE_BYTES, data + i * PAGE_BYTES, PAGE_BYTES) != 0)
			continue;
		rc = save(m, first + from, i - from, data + from * PAGE_BYTES, err);
		from = i + 1;
		im->result->shared_pages++;
	}
	return rc ? rc : save(m, first + from, count - from, data + from * PAGE_BYTES, err);
}

static int take_data(struct import *im, uint64_t first, uint64_t count, const uint8_t *data, struct err *err)
{
	for (uint64_t at = first, n; at < first + count; at += n) {
		const struct index_extent *e = im->has_base ? page_index_find(&im->base.index, at) : NULL;
		const uint8_t *from = data + (at - first) * PAGE_BYTES;

		n = min_u64((e ? min_u64(first + count, e->first + e->count) : first + count) - at, RESTORE_CHUNK_PAGES);
		int rc = e ? save_if_new(im, e, at, n, from, err) : save(&im->memory, at, n, from, err);
		if (rc)
			return rc;
	}
	return 0;
}

/* Zero now. */
static void take_zeroes(struct import *im, uint64_t first, uint64_t count)
{
	struct import_memory *m = &im->memory;

	for (uint64_t page = first; page < first + count; page++) {
		if (im->has_base && page_index_find(&im->base.index, page)->layer == INDEX_ZERO_LAYER)
			continue;
		set_bit(m->scope, page);
		set_bit(m->zero, page);
	}
}

int import_memory_chunk(struct import *im, const uint8_t *content, size_t length, struct err *err)
{
	struct import_memory *m = &im->memory;
	struct transfer_runs runs;
	int rc = transfer_get_runs(content, length, PAGE_BYTES, m->pages, &m->next, &runs, err);

	if (!rc && runs.object != 0)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "damaged: memory number %u", runs.object);
	const uint8_t *data = runs.data;
	for (uint32_t i = 0; !rc && i < runs.count; i++) {
		const struct transfer_run *run = &runs.run[i];

		im->result->pages += run->data ? run->count : 0;
		if (!im->draft) {
			continue;
		} else if (run->data) {
			rc = take_data(im, run->first, run->count, data, err);
			data += run->count * PAGE_BYTES;
		} else
			take_zeroes(im, run->first, run->count);
		for (uint64_t page = run->first; im->draft && page < run->first + run->count; page++)
			set_bit(m->seen, page);
	}
	im->done_bytes = m->next * PAGE_BYTES;
	return rc || !im->draft ? rc : fault_check(FAULT_IMPORT_PAGES, err);
}

/* A whole stream says nothing of zero pages, one with a base nothing of what is as there. */
static void settle_unseen(struct import *im)
{
	struct import_memory *m = &im->memory;

	if (im->head.since[0])
		return;
	if (!im->has_base) {
		for (uint64_t page = 0; page < m->pages; page++) {
			set_bit(m->scope, page);
			if (!get_bit(m->saved, page))
				set_bit(m->zero, page);
		}
		return;
	}
	for (uint64_t i = 0; i < im->base.index.extent_count; i++) {
		const struct index_extent *e = &im->base.index.extents[i];

		for (uint64_t page = e->first; e->layer != INDEX_ZERO_LAYER && page < e->first + e->count; page++)
			if (!get_bit(m->seen, page))
				take_zeroes(im, page, 1);
	}
}

int import_memory_finish(struct import *im, struct err *err)
{
	struct import_memory *m = &im->memory;
	struct store_checkpoint *c = &im->checkpoint;
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct page_index index = {0};

	settle_unseen(im);
	const struct page_index_saved saved = {m->layer, m->scope, (const _Atomic uint64_t *)m->zero};
	int rc = page_sums_write(m->sums_fd, m->saved, m->saved, m->sums, m->pages, err);
	if (!rc)
		rc = page_index_build(&index, &saved, im->has_base ? &im->base.index : NULL, m->pages, err);
	if (!rc)
		rc = page_index_encode(&index, &text, err);
	if (!rc)
		rc = store_draft_put(im->draft, "index", text.data, text.length, err);
	memcpy(c->memory_layer, m->layer, sizeof(c->memory_layer));
	c->saved_pages = m->places;
	c->written_bytes = m->places * PAGE_BYTES;
	c->zero_pages = 0;
	for (uint64_t i = 0; !rc && i < index.extent_count; i++)
		c->zero_pages += index.extents[i].layer == INDEX_ZERO_LAYER ? index.extents[i].count : 0;
	c->parent_pages = m->pages - c->saved_pages - c->zero_pages;
	page_index_free(&index);
	return rc;
}
