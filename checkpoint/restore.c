/* Memory from layers: checking and putting back. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/engine_internal.h"
#include "checkpoint/memcow_internal.h"

#define CHUNK_PAGES 256u
/* Zero pages in a row that are worth a hole instead of zeroes written. */
#define HOLE_PAGES 16u

void restore_close(struct restore_layers *layers)
{
	for (uint32_t i = 0; i < layers->count; i++) {
		if (layers->layers[i].fd >= 0)
			close(layers->layers[i].fd);
		if (layers->layers[i].sums_fd >= 0)
			close(layers->layers[i].sums_fd);
	}
	free(layers->layers);
	*layers = (struct restore_layers){0};
}

/* Pages are read by pread, and only below the size seen here: a layer that is cut off later gives an error, never
 * SIGBUS. */
static int check_size(int fd, uint64_t bytes, const char *layer, const char *kind, struct err *err)
{
	struct stat st;
	if (fstat(fd, &st) != 0)
		return err_sys(err, errno, "memory layer %s", layer);
	if ((uint64_t)st.st_size < bytes)
		return err_set(err, ERR_DAMAGED, EINVAL, "memory layer %s: its %s has %llu bytes instead of %llu",
			       layer, kind, (unsigned long long)st.st_size, (unsigned long long)bytes);
	return 0;
}

int restore_open(struct store *store, const struct page_index *index, struct restore_layers *out, struct err *err)
{
	int r = 0;
	out->count = 0;
	out->layers = calloc((size_t)index->layer_count + 1, sizeof(*out->layers));
	if (!out->layers)
		return err_sys(err, ENOMEM, "%u memory layers", index->layer_count);
	for (uint32_t i = 0; i < index->layer_count && r == 0; i++) {
		struct restore_layer *layer = &out->layers[i];
		const char *name = index->layers[i];
		layer->sums_fd = -1;
		out->count = i + 1;
		layer->fd = store_memory_layer_open(store, name, err);
		if (layer->fd >= 0)
			layer->sums_fd = store_memory_sums_open(store, name, err);
		r = layer->fd < 0 ? layer->fd : layer->sums_fd < 0 ? layer->sums_fd : 0;
		if (r == 0)
			r = check_size(layer->fd, index->page_count * PAGE_BYTES, name, "file", err);
		if (r == 0)
			r = check_size(layer->sums_fd, index->page_count * 8, name, "checksums' file", err);
	}
	if (r != 0)
		restore_close(out);
	return r;
}

static int check_pages(const struct page_index *index, const struct restore_layers *layers, uint32_t number,
		       uint64_t first, uint64_t count, const uint8_t *data, struct err *err)
{
	uint64_t sums[CHUNK_PAGES];
	const char *name = index->layers[number - 1];
	int r = file_pread_full(layers->layers[number - 1].sums_fd, sums, count * 8, first * 8, err);
	if (r != 0)
		return err_prefix(err, "memory layer %s: checksums", name);
	for (uint64_t i = 0; i < count; i++) {
		if (get_le64(&sums[i]) == XXH3_64bits(data + i * PAGE_BYTES, PAGE_BYTES))
			continue;
		err_set(err, ERR_DAMAGED, EINVAL, "memory layer %s: page %llu has a wrong checksum", name,
			(unsigned long long)(first + i));
		return err_hint(err, "checkpoints that do not share this layer are not affected: see `vmcp log`");
	}
	return 0;
}

static int read_pages(const struct page_index *index, const struct restore_layers *layers, uint32_t number,
		      uint64_t first, uint64_t count, uint8_t *data, struct err *err)
{
	int r = file_pread_full(layers->layers[number - 1].fd, data, count * PAGE_BYTES, first * PAGE_BYTES, err);
	return r == 0 ? 0 : err_prefix(err, "memory layer %s", index->layers[number - 1]);
}

static uint8_t *alloc_chunk(struct err *err)
{
	void *chunk = NULL;
	if (posix_memalign(&chunk, PAGE_BYTES, CHUNK_PAGES * PAGE_BYTES) != 0)
		err_sys(err, ENOMEM, "buffer");
	return chunk;
}

int restore_verify(const struct page_index *index, const struct restore_layers *layers, struct err *err)
{
	CLEANUP_FREE uint8_t *chunk = alloc_chunk(err);
	int r = chunk ? 0 : -ENOMEM;
	for (uint64_t i = 0; i < index->extent_count && r == 0; i++) {
		const struct index_extent *e = &index->extents[i];
		for (uint64_t done = 0; e->layer != INDEX_ZERO_LAYER && done < e->count && r == 0;
		     done += CHUNK_PAGES) {
			uint64_t count = min_u64(e->count - done, CHUNK_PAGES);
			r = read_pages(index, layers, e->layer, e->first + done, count, chunk, err);
			if (r == 0)
				r = check_pages(index, layers, e->layer, e->first + done, count, chunk, err);
		}
	}
	return r;
}

/* Puts back pages of one extent of a layer, comparing first: a page that is not written stays shared with whoever has
 * it cached. */
static int restore_extent(struct mem *mem, const struct page_index *index, const struct restore_layers *layers,
			  const struct index_extent *e, uint8_t *chunk, uint64_t *changed, struct err *err)
{
	for (uint64_t done = 0; done < e->count; done += CHUNK_PAGES) {
		uint64_t count = min_u64(e->count - done, CHUNK_PAGES), first = e->first + done;
		uint8_t *base = mem_base(mem) + first * PAGE_BYTES;
		int r = read_pages(index, layers, e->layer, first, count, chunk, err);
		if (r != 0)
			return r;
		for (uint64_t i = 0; i < count; i++) {
			if (memcmp(base + i * PAGE_BYTES, chunk + i * PAGE_BYTES, PAGE_BYTES) == 0)
				continue;
			memcpy(base + i * PAGE_BYTES, chunk + i * PAGE_BYTES, PAGE_BYTES);
			++*changed;
		}
	}
	return 0;
}

static int load_extent(struct mem *mem, const struct page_index *index, const struct restore_layers *layers,
		       const struct index_extent *e, uint64_t *changed, struct err *err)
{
	for (uint64_t done = 0; done < e->count; done += CHUNK_PAGES) {
		uint64_t count = min_u64(e->count - done, CHUNK_PAGES), first = e->first + done;
		uint8_t *base = mem_base(mem) + first * PAGE_BYTES;
		int r = read_pages(index, layers, e->layer, first, count, base, err);
		if (r == 0)
			r = check_pages(index, layers, e->layer, first, count, base, err);
		if (r != 0)
			return r;
	}
	*changed += e->count;
	return 0;
}

/* [first, first + count) is populated and not zero. */
static int clear_run(struct mem *mem, uint64_t first, uint64_t count, struct err *err)
{
	if (count >= HOLE_PAGES && fallocate(mem_fd(mem), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					     (off_t)(first * PAGE_BYTES), (off_t)(count * PAGE_BYTES)) != 0)
		return err_sys(err, errno, "guest memory: cannot clear %llu pages", (unsigned long long)count);
	if (count > 0 && count < HOLE_PAGES)
		memset(mem_base(mem) + first * PAGE_BYTES, 0, count * PAGE_BYTES);
	return 0;
}

/* Pages that must be zero. Only populated ones are looked at: looking at others would populate them. */
static int clear_extent(struct mem *mem, const struct index_extent *e, uint64_t *changed, struct err *err)
{
	uint64_t end = e->first + e->count;
	int r = 0;
	for (uint64_t page = e->first; page < end && r == 0;) {
		off_t data = lseek(mem_fd(mem), (off_t)(page * PAGE_BYTES), SEEK_DATA);
		if (data < 0 && errno == ENXIO)
			return 0;
		off_t hole = data < 0 ? -1 : lseek(mem_fd(mem), data, SEEK_HOLE);
		if (hole < 0)
			return err_sys(err, errno, "guest memory: cannot find populated pages");
		uint64_t until = min_u64((uint64_t)hole / PAGE_BYTES, end), run = 0;
		for (page = (uint64_t)data / PAGE_BYTES; page < until && r == 0; page++) {
			if (!page_is_zero(mem_base(mem) + page * PAGE_BYTES)) {
				run++;
				continue;
			}
			r = clear_run(mem, page - run, run, err);
			*changed += run;
			run = 0;
		}
		if (r == 0)
			r = clear_run(mem, page - run, run, err);
		*changed += run;
	}
	return r;
}

int restore_memory(struct mem *mem, const struct page_index *index, const struct restore_layers *layers, bool fresh,
		   uint64_t *changed, struct err *err)
{
	CLEANUP_FREE uint8_t *chunk = alloc_chunk(err);
	int r = chunk ? 0 : -ENOMEM;
	*changed = 0;
	for (uint64_t i = 0; i < index->extent_count && r == 0; i++) {
		const struct index_extent *e = &index->extents[i];
		if (e->layer == INDEX_ZERO_LAYER)
			r = fresh ? 0 : clear_extent(mem, e, changed, err);
		else
			r = fresh ? load_extent(mem, index, layers, e, changed, err)
				  : restore_extent(mem, index, layers, e, chunk, changed, err);
	}
	return r;
}
