#include "checkpoint/consolidate.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "base/priority.h"
#include "checkpoint/engine_internal.h"

#define ENOUGH_LAYERS 8u
#define TIER_FACTOR   4u
/* Waste that is not worth the syncs of a new layer. */
#define LITTLE_PAGES   1024u
#define CHUNK_PAGES    PAGE_SUMS_MAX_READ
#define WRITEBACK_BYTES (4u << 20)
/* Shorter runs are written: as pieces of their own they would cost more than that. */
#define SHARE_PAGES 16u

/* --- what is worth it --- */

static uint64_t dead_of(const struct layer_use *use) { return use->held - use->live; }

static int by_live_part(const void *a, const void *b)
{
	const struct layer_use *x = a, *y = b;
	/* x.live / x.held < y.live / y.held; pages are below 2^28. */
	uint64_t left = x->live * y->held, right = y->live * x->held;
	return (left > right) - (left < right);
}

static unsigned tier_of(const struct layer_use *use)
{
	unsigned tier = 0;
	for (uint64_t size = use->live; size >= TIER_FACTOR; size /= TIER_FACTOR)
		tier++;
	return tier;
}

static unsigned choose_by_waste(struct layer_use *list, unsigned count, uint64_t stored)
{
	uint64_t live = 0, dead = 0;
	unsigned n = 0;
	while (n < count && live + list[n].live <= dead + dead_of(&list[n])) {
		live += list[n].live;
		dead += dead_of(&list[n]);
		n++;
	}
	if (n < ENOUGH_LAYERS && dead < max_u64(LITTLE_PAGES, stored / 4))
		return 0;
	for (unsigned i = 0; i < n; i++)
		list[i].chosen = true;
	return n;
}

static unsigned choose_by_number(struct layer_use *list, unsigned count)
{
	unsigned tiers[32] = {0}, tier = 0;
	for (unsigned i = 0; i < count; i++)
		tiers[tier_of(&list[i])]++;
	while (tier < ARRAY_LENGTH(tiers) && tiers[tier] < ENOUGH_LAYERS)
		tier++;
	if (tier == ARRAY_LENGTH(tiers))
		return 0;
	for (unsigned i = 0; i < count; i++)
		list[i].chosen = tier_of(&list[i]) == tier;
	return tiers[tier];
}

unsigned consolidation_choose(struct layer_use *list, unsigned count, uint64_t stored)
{
	if (count)
		qsort(list, count, sizeof(*list), by_live_part);
	unsigned chosen = choose_by_waste(list, count, stored);
	return chosen ? chosen : choose_by_number(list, count);
}

void consolidated_free(struct consolidated *c)
{
	if (!c)
		return;
	store_draft_abort(c->draft);
	page_index_free(&c->from);
	free(c);
}

/* --- one consolidation --- */

struct source {
	int fd;
	struct page_sums sums;
	struct seal_pages *cipher; /* of an encrypted store */
	bool chosen, spoilt; /* a page of it is damaged: no more of it is copied */
};

struct merge {
	struct ckpt_engine *engine;
	const _Atomic bool *stop;
	struct page_index index; /* of the position */
	struct source *sources;	 /* by number - 1 */
	struct layer_use *uses;	 /* those that may be merged */
	unsigned use_count;
	uint64_t stored;
	struct consolidated *made;
	int fd, sums_fd;
	struct seal_pages *cipher; /* of the new layer: every layer has a key of its own */
	uint64_t *saved, *sums; /* bitmap, by page */
	uint8_t *chunk;
	uint64_t copied, unflushed;
	uint64_t shared; /* of those copied, by the filesystem */
	bool no_sharing; /* it cannot */
	struct priority_room room;
};

static void merge_free(struct merge *m)
{
	for (uint32_t i = 0; m->sources && i < m->index.layer_count; i++) {
		if (m->sources[i].fd >= 0)
			close(m->sources[i].fd);
		page_sums_close(&m->sources[i].sums);
		seal_pages_free(m->sources[i].cipher);
		if (m->sources[i].sums.fd >= 0)
			close(m->sources[i].sums.fd);
	}
	if (m->fd >= 0)
		close(m->fd);
	if (m->sums_fd >= 0)
		close(m->sums_fd);
	seal_pages_free(m->cipher);
	consolidated_free(m->made);
	page_index_free(&m->index);
	free(m->sources);
	free(m->uses);
	free(m->saved);
	free(m->sums);
	free(m->chunk);
}

static bool was_spoilt(const struct ckpt_engine *engine, const char *layer)
{
	for (unsigned i = 0; i < ARRAY_LENGTH(engine->spoilt_layers); i++)
		if (strcmp(engine->spoilt_layers[i], layer) == 0)
			return true;
	return false;
}

/* Pages that each layer holds for the index. */
static uint64_t *count_live(struct merge *m)
{
	uint64_t *live = xcalloc((size_t)m->index.layer_count + 1, sizeof(*live));
	for (uint64_t i = 0; i < m->index.extent_count; i++) {
		const struct index_extent *e = &m->index.extents[i];
		live[e->layer] += e->count;
		m->stored += e->layer ? e->count : 0;
	}
	return live;
}

static int open_sums(struct merge *m, uint32_t number, struct err *err)
{
	struct source *source = &m->sources[number - 1];
	int fd = store_memory_sums_open(m->engine->store, m->index.layers[number - 1], err);
	return fd < 0 ? fd : page_sums_open(&source->sums, fd, err);
}

/* Which layers may be merged, and how much they hold. One whose checksums cannot be read is none. */
static int find_uses(struct merge *m, struct err *err)
{
	uint32_t count = m->index.layer_count;
	CLEANUP_FREE bool *may = xcalloc((size_t)count + 1, sizeof(*may));
	int r = store_mergeable(m->engine->store, m->engine->vm_name, (const char(*)[STORE_ID_BYTES])m->index.layers, count, may, err);
	if (r != 0)
		return r;
	CLEANUP_FREE uint64_t *live = count_live(m);
	m->uses = xcalloc((size_t)count + 1, sizeof(*m->uses));
	m->sources = xcalloc((size_t)count + 1, sizeof(*m->sources));
	for (uint32_t i = 0; i < count; i++)
		m->sources[i] = (struct source){.fd = -1, .sums = {.fd = -1}};
	for (uint32_t number = 1; number <= count; number++) {
		const struct source *source = &m->sources[number - 1];
		if (!may[number - 1] || live[number] == 0 || was_spoilt(m->engine, m->index.layers[number - 1]) ||
		    open_sums(m, number, NULL) != 0 || source->sums.count < live[number])
			continue;
		m->uses[m->use_count++] = (struct layer_use){.number = number, .live = live[number], .held = source->sums.count};
	}
	return 0;
}

static int open_chosen(struct merge *m, struct err *err)
{
	for (unsigned i = 0; i < m->use_count; i++) {
		uint32_t number = m->uses[i].number;
		if (!m->uses[i].chosen)
			continue;
		struct source *source = &m->sources[number - 1];
		source->fd = store_memory_layer_open(m->engine->store, m->index.layers[number - 1], err);
		int r = source->fd < 0 ? source->fd
				       : store_layer_cipher(m->engine->store, m->index.layers[number - 1], false, &source->cipher, err);
		if (r != 0)
			return r;
		source->chosen = true;
	}
	return 0;
}

static int make_layer(struct merge *m, struct err *err)
{
	uint64_t pages = m->index.page_count;
	m->made = xcalloc(1, sizeof(*m->made));
	m->saved = calloc(pages / 64 + 1, sizeof(*m->saved));
	m->sums = calloc(pages, sizeof(*m->sums));
	m->chunk = malloc(CHUNK_PAGES * PAGE_BYTES);
	/* A damaged layer splits one extent. */
	m->made->from.extents = calloc(m->index.extent_count + m->index.layer_count, sizeof(*m->made->from.extents));
	m->made->from.layers = calloc((size_t)m->index.layer_count + 1, sizeof(*m->made->from.layers));
	if (!m->saved || !m->sums || !m->chunk || !m->made->from.extents || !m->made->from.layers)
		return err_sys(err, ENOMEM, "consolidation of %llu pages", (unsigned long long)pages);
	m->made->from.page_count = pages;
	m->made->from.layer_count = m->index.layer_count;
	memcpy(m->made->from.layers, m->index.layers, m->index.layer_count * sizeof(*m->index.layers));
	int r = store_draft_begin(m->engine->store, &m->made->draft, err);
	if (r == 0)
		r = store_draft_memory_layer(m->made->draft, m->made->layer, &m->fd, &m->sums_fd, err);
	if (r != 0)
		m->fd = m->sums_fd = -1; /* closed by whom failed */
	else
		r = store_layer_cipher(m->engine->store, m->made->layer, true, &m->cipher, err);
	m->no_sharing = m->cipher != NULL; /* the same page has other bytes there */
	return r == 0 ? fault_check(FAULT_CONSOLIDATE_LAYER_MADE, err) : r;
}

static void spoil(struct merge *m, uint32_t number, const struct err *why)
{
	struct ckpt_engine *engine = m->engine;
	m->sources[number - 1].spoilt = true;
	log_warn("memory layer %s: %s; it is not consolidated", m->index.layers[number - 1], why->message);
	memcpy(engine->spoilt_layers[engine->spoilt_count++ % ARRAY_LENGTH(engine->spoilt_layers)], m->index.layers[number - 1],
	       STORE_ID_BYTES);
}

/* In an encrypted store: from the old layer's key to the new one's. */
static int cipher_anew(struct merge *m, const struct source *source, uint64_t first, uint64_t count, struct err *err)
{
	int r = store_cipher_pages(source->cipher, first, count, m->chunk, err);
	if (r == 0)
		r = store_cipher_pages(m->cipher, first, count, m->chunk, err);
	for (uint64_t i = 0; r == 0 && m->cipher && i < count; i++)
		m->sums[first + i] = page_sum(first + i, m->chunk + i * PAGE_BYTES);
	return r;
}

/* Reads and checks a run of one layer's pages, as the new layer shall have them. *place: where in the layer they begin. -EBADMSG: the layer is damaged. */
static int read_run(struct merge *m, uint32_t number, uint64_t first, uint64_t count, uint64_t *place, struct err *err)
{
	struct source *source = &m->sources[number - 1];
	struct page_entry entries[CHUNK_PAGES];
	int r = page_sums_read(&source->sums, first, count, entries, err);
	if (r == 0)
		r = file_pread_full(source->fd, m->chunk, count * PAGE_BYTES, entries[0].place * PAGE_BYTES, err);
	*place = entries[0].place;
	if (r == -ENODATA || r == -EINVAL)
		return -EBADMSG;
	for (uint64_t i = 0; i < count && r == 0; i++) {
		m->sums[first + i] = page_sum(first + i, m->chunk + i * PAGE_BYTES);
		if (m->sums[first + i] != entries[i].sum) {
			err_set(err, ERR_DAMAGED, EBADMSG, "page %llu has a wrong checksum", (unsigned long long)(first + i));
			r = -EBADMSG;
		}
	}
	return r == 0 ? cipher_anew(m, source, first, count, err) : r;
}

/* A filesystem with reflinks gives the new layer the old one's blocks: nothing is written, and no space taken while both are there. */
static bool share_run(struct merge *m, int from, uint64_t place, uint64_t count)
{
	const struct file_clone_range range = {
		.src_fd = from, .src_offset = place * PAGE_BYTES, .src_length = count * PAGE_BYTES, .dest_offset = m->copied * PAGE_BYTES};
	if (m->no_sharing || count < SHARE_PAGES)
		return false;
	m->no_sharing = ioctl(m->fd, FICLONERANGE, &range) != 0;
	m->shared += m->no_sharing ? 0 : count;
	return !m->no_sharing;
}

static int write_run(struct merge *m, int from, uint64_t place, uint64_t first, uint64_t count, struct err *err)
{
	bool shared = share_run(m, from, place, count);
	int r = shared ? 0 : file_pwrite_full(m->fd, m->chunk, count * PAGE_BYTES, m->copied * PAGE_BYTES, err);
	if (r != 0)
		return r;
	bitmap_fill(m->saved, first, count);
	m->copied += count;
	m->unflushed += shared ? 0 : count * PAGE_BYTES;
	/* A little at a time, so that a checkpoint's sync does not find all of it still to be written. */
	if (m->unflushed >= WRITEBACK_BYTES) {
		sync_file_range(m->fd, 0, 0, SYNC_FILE_RANGE_WRITE);
		m->unflushed = 0;
	}
	return 0;
}

/* Notes in `from` what became of an extent: [first, first + copied) was copied from the layer, the rest was not. */
static void note(struct page_index *from, const struct index_extent *e, uint64_t copied)
{
	const struct index_extent parts[] = {{e->first, copied, e->layer}, {e->first + copied, e->count - copied, INDEX_ZERO_LAYER}};
	for (unsigned i = 0; i < ARRAY_LENGTH(parts); i++) {
		struct index_extent *last = from->extent_count ? &from->extents[from->extent_count - 1] : NULL;
		if (parts[i].count == 0)
			continue;
		if (last && last->layer == parts[i].layer)
			last->count += parts[i].count;
		else
			from->extents[from->extent_count++] = parts[i];
	}
}

/* What of an extent could be copied: all, or what lies before the first damaged run. */
static int copy_extent(struct merge *m, const struct index_extent *e, struct err *err)
{
	uint64_t done = 0;
	int r = 0;
	while (done < e->count && !m->sources[e->layer - 1].spoilt) {
		uint64_t first = e->first + done, count = min_u64(CHUNK_PAGES, e->count - done);
		uint64_t place = 0;
		struct err why = ERR_INIT;
		if (atomic_load_explicit(m->stop, memory_order_relaxed))
			return err_set(err, ERR_FAILED, ECANCELED, "the machine is ending");
		r = read_run(m, e->layer, first, count, &place, &why);
		if (r == -EBADMSG) {
			spoil(m, e->layer, &why);
			r = 0;
			break;
		}
		if (r == 0)
			r = write_run(m, m->sources[e->layer - 1].fd, place, first, count, &why);
		if (r != 0) {
			if (err)
				*err = why;
			return r;
		}
		done += count;
		priority_give_way_each(SCHEDULING_ROOM_EACH_NS, &m->room);
	}
	note(&m->made->from, e, done);
	return 0;
}

static int copy_all(struct merge *m, struct err *err)
{
	int r = 0;
	for (uint64_t i = 0; i < m->index.extent_count && r == 0; i++) {
		const struct index_extent *e = &m->index.extents[i];
		if (e->layer != INDEX_ZERO_LAYER && m->sources[e->layer - 1].chosen)
			r = copy_extent(m, e, err);
		else
			note(&m->made->from, e, 0);
	}
	if (r == 0)
		r = page_sums_write(m->sums_fd, m->saved, m->saved, m->sums, m->index.page_count, err);
	if (r == 0)
		r = fault_check(FAULT_CONSOLIDATE_COPIED, err);
	return r == 0 ? store_draft_sync_layers(m->made->draft, err) : r;
}

static int read_position(struct merge *m, struct store_pin **pin, struct err *err)
{
	struct store_checkpoint checkpoint;
	char at[STORE_ID_BYTES];
	ckpt_position(m->engine, at);
	if (!at[0])
		return -ENOENT;
	int r = store_pin(m->engine->store, at, pin, err);
	if (r == 0)
		r = store_checkpoint_get(m->engine->store, at, &checkpoint, err);
	if (r != 0)
		return r;
	r = engine_read_index(m->engine, &checkpoint, &m->index, err);
	store_checkpoint_free(&checkpoint);
	return r;
}

static int merge(struct merge *m, struct ckpt_consolidation *done, struct err *err)
{
	unsigned chosen = consolidation_choose(m->uses, m->use_count, m->stored);
	if (chosen == 0)
		return 0;
	int r = open_chosen(m, err);
	if (r == 0)
		r = make_layer(m, err);
	if (r == 0)
		r = copy_all(m, err);
	if (r == 0)
		r = fault_check(FAULT_CONSOLIDATE_READY, err);
	if (r != 0 || m->copied == 0)
		return r;
	done->layers = chosen;
	done->pages = m->copied;
	done->shared_pages = m->shared;
	log_debug("%u memory layers consolidated: %llu pages", chosen, (unsigned long long)m->copied);
	pthread_mutex_lock(&m->engine->lock);
	m->engine->consolidated = m->made;
	pthread_mutex_unlock(&m->engine->lock);
	m->made = NULL;
	return 0;
}

int ckpt_consolidate(struct ckpt_engine *engine, const _Atomic bool *stop, struct ckpt_consolidation *done, struct err *err)
{
	struct merge m = {.engine = engine, .stop = stop, .fd = -1, .sums_fd = -1};
	struct store_pin *pin = NULL;
	cpu_set_t before;
	struct err local = ERR_INIT;
	*done = (struct ckpt_consolidation){0};
	pthread_mutex_lock(&engine->lock);
	bool waits = engine->consolidated != NULL;
	pthread_mutex_unlock(&engine->lock);
	if (waits)
		return 0;
	scheduling_leave_vcpus(engine->vm, &before, NULL);
	/* Nothing to stand on is no error; a checkpoint that follows says what is wrong. */
	int r = read_position(&m, &pin, &local);
	if (r == 0) {
		r = find_uses(&m, err);
		if (r == 0)
			r = merge(&m, done, err);
	} else {
		r = 0;
	}
	scheduling_restore(&before);
	merge_free(&m);
	store_unpin(pin);
	return r;
}
