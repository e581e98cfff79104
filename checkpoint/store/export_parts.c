/* What an export holds, chunk by chunk: head, manifest, state, memory, disks, end. Runs in one thread, which reads and checks; others compress. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/file_sum.h"
#include "checkpoint/store/export_internal.h"

/* Zeroes are left out, and what differs is found, in such pieces. A qcow2 cluster; half a page of a filesystem less would not pay. */
#define WHOLE_GRAIN 65536u
#define DELTA_GRAIN 4096u

static int given_up(void) { return -ECANCELED; } /* whoever failed first has said why */

/* --- chunks --- */

static int get_slot(struct export *x, uint32_t kind, struct err *err)
{
	if (transfer_is_cancelled(x->options->cancel, err))
		return -ECANCELED;
	x->slot = transfer_pipe_get(x->pipe);
	x->kind = kind;
	return x->slot ? 0 : given_up();
}

static void put_slot(struct export *x, size_t length)
{
	x->slot->header = (struct transfer_header){.kind = x->kind, .number = x->next_number++, .content_bytes = (uint32_t)length};
	transfer_pipe_put(x->pipe, x->slot);
	x->slot = NULL;
}

static int put_bytes(struct export *x, uint32_t kind, const struct buf *bytes, struct err *err)
{
	for (size_t at = 0, n; at < bytes->length; at += n) {
		int rc = get_slot(x, kind, err);
		if (rc)
			return rc;
		n = (size_t)min_u64(bytes->length - at, TRANSFER_DATA_BYTES);
		memcpy(x->slot->content, bytes->data + at, n);
		put_slot(x, n);
	}
	return 0;
}

static void flush_runs(struct export *x)
{
	if (!x->slot)
		return;
	if (x->runs.count)
		put_slot(x, transfer_put_runs(x->slot->content, &x->runs));
	x->slot = NULL;
	x->runs.count = 0;
	x->runs.data_bytes = 0;
}

/* Room for one more run, and for *bytes of data, which becomes less if there is not so much; none only for 0. */
static int need_room(struct export *x, uint32_t kind, uint32_t object, uint64_t unit, uint64_t *bytes, struct err *err)
{
	bool full = x->runs.count == TRANSFER_MAX_RUNS || (*bytes && TRANSFER_DATA_BYTES - x->runs.data_bytes < unit);

	if (x->slot && full)
		flush_runs(x);
	if (!x->slot) {
		int rc = get_slot(x, kind, err);
		if (rc)
			return rc;
		x->runs.object = object;
		x->runs.count = 0;
		x->runs.data_bytes = 0;
	}
	*bytes = round_down(min_u64(*bytes, TRANSFER_DATA_BYTES - x->runs.data_bytes), unit);
	return 0;
}

static uint8_t *data_end(struct export *x) { return x->slot->content + TRANSFER_DATA_AT + x->runs.data_bytes; }

/* The data, if it is any, lies at data_end. */
static void add_run(struct export *x, uint64_t first, uint64_t count, uint64_t data_bytes)
{
	struct transfer_run *last = x->runs.count ? &x->runs.run[x->runs.count - 1] : NULL;
	bool data = data_bytes != 0;

	if (last && last->data == data && last->first + last->count == first)
		last->count += count;
	else
		x->runs.run[x->runs.count++] = (struct transfer_run){first, count, data};
	x->runs.data_bytes += data_bytes;
}

static void report(struct export *x, uint64_t done)
{
	x->done_bytes = done;
	if (x->options->progress)
		x->options->progress(x->options->opaque, done, x->total_bytes);
}

/* --- memory --- */

static int put_pages(struct export *x, const struct index_extent *e, uint64_t first, uint64_t count, struct err *err)
{
	for (uint64_t at = first, n; at < first + count; at += n) {
		uint64_t bytes = min_u64(first + count - at, RESTORE_CHUNK_PAGES) * PAGE_BYTES;
		int rc = need_room(x, TRANSFER_MEMORY, 0, PAGE_BYTES, &bytes, err);
		n = bytes / PAGE_BYTES;
		if (!rc)
			rc = restore_read(&x->own.layers, e->layer, at, n, data_end(x), err);
		if (rc)
			return rc;
		add_run(x, at, n, bytes);
		x->result->pages += n;
		report(x, at * PAGE_BYTES);
	}
	return 0;
}

static int put_memory(struct export *x, struct err *err)
{
	const struct page_index *index = &x->own.index;

	for (uint64_t i = 0; i < index->extent_count; i++) {
		const struct index_extent *e = &index->extents[i];
		uint64_t first = max_u64(e->first, x->from.page), end = e->first + e->count;
		int rc = e->layer == INDEX_ZERO_LAYER || first >= end ? 0 : put_pages(x, e, first, end - first, err);

		if (rc)
			return rc;
	}
	flush_runs(x);
	return 0;
}

/* Pages [first, first + count), at most RESTORE_CHUNK_PAGES, of one extent on either side: those that differ. */
static int put_changed(struct export *x, const struct index_extent *e, const struct index_extent *before, uint64_t first, uint64_t count,
		       uint8_t *now, uint8_t *then, struct err *err)
{
	uint64_t bytes = 0;
	int rc = 0;

	if (e->layer == INDEX_ZERO_LAYER) {
		rc = need_room(x, TRANSFER_MEMORY, 0, PAGE_BYTES, &bytes, err);
		if (!rc)
			add_run(x, first, count, 0);
		return rc;
	}
	rc = restore_read(&x->own.layers, e->layer, first, count, now, err);
	if (!rc && before->layer != INDEX_ZERO_LAYER)
		rc = restore_read(&x->since.layers, before->layer, first, count, then, err);
	for (uint64_t i = 0; !rc && i < count; i++) {
		/* The same bytes in another layer: consolidation does that. */
		if (before->layer != INDEX_ZERO_LAYER && memcmp(now + i * PAGE_BYTES, then + i * PAGE_BYTES, PAGE_BYTES) == 0)
			continue;
		bytes = PAGE_BYTES;
		rc = need_room(x, TRANSFER_MEMORY, 0, PAGE_BYTES, &bytes, err);
		if (rc)
			break;
		memcpy(data_end(x), now + i * PAGE_BYTES, PAGE_BYTES);
		add_run(x, first + i, 1, PAGE_BYTES);
		x->result->pages++;
	}
	return rc;
}

/* One word of pages that differ, from `page` on. */
static uint64_t count_set(const uint64_t *bits, uint64_t page, uint64_t end)
{
	uint64_t n = 0;

	while (page + n < end && bits[(page + n) / 64] >> ((page + n) % 64) & 1)
		n++;
	return n;
}

static int put_memory_delta(struct export *x, struct err *err)
{
	const struct page_index *index = &x->own.index, *before = &x->since.index;
	CLEANUP_FREE uint64_t *bits = calloc(div_round_up(index->page_count, 64), sizeof(*bits));
	CLEANUP_FREE uint8_t *now = malloc(2 * RESTORE_CHUNK_PAGES * PAGE_BYTES);
	uint64_t page = x->from.page;
	int rc = bits && now ? 0 : err_sys(err, ENOMEM, "map of pages");

	if (rc)
		return rc;
	page_index_diff(index, before, bits);
	while (!rc && page < index->page_count) {
		if (page % 64 == 0 && bits[page / 64] == 0) {
			page += 64;
			continue;
		}
		const struct index_extent *e = page_index_find(index, page), *b = page_index_find(before, page);
		uint64_t end = min_u64(min_u64(e->first + e->count, b->first + b->count), page + RESTORE_CHUNK_PAGES);
		uint64_t n = count_set(bits, page, end);
		if (n)
			rc = put_changed(x, e, b, page, n, now, now + RESTORE_CHUNK_PAGES * PAGE_BYTES, err);
		page += n ? n : 1;
		report(x, min_u64(page, index->page_count) * PAGE_BYTES);
	}
	if (!rc)
		flush_runs(x);
	return rc;
}

/* --- disks --- */

struct copying {
	struct export *x;
	uint32_t number; /* of the disk in the head */
	struct cow_disk *disk, *since; /* since: NULL if there is none to compare with */
	uint8_t *now, *then;	       /* TRANSFER_DATA_BYTES each */
};

static int put_zeroes(struct copying *c, uint64_t offset, uint64_t length, struct err *err)
{
	uint64_t bytes = 0;
	int rc = need_room(c->x, TRANSFER_DISK, c->number, 1, &bytes, err);

	if (!rc)
		add_run(c->x, offset, length, 0);
	return rc;
}

static int put_data(struct copying *c, uint64_t offset, const uint8_t *data, uint64_t length, struct err *err)
{
	for (uint64_t done = 0, n; done < length; done += n) {
		n = length - done;
		int rc = need_room(c->x, TRANSFER_DISK, c->number, COW_SECTOR_BYTES, &n, err);
		if (rc)
			return rc;
		memcpy(data_end(c->x), data + done, n);
		add_run(c->x, offset + done, n, n);
		c->x->result->disk_bytes += n;
	}
	return 0;
}

/* What `since` is there: past its end, zeroes. */
static int map_since(struct copying *c, uint64_t offset, uint64_t length, struct cow_run *out, struct err *err)
{
	uint64_t size = cow_size(c->since);

	*out = (struct cow_run){.length = length};
	return offset >= size ? 0 : cow_map(c->since, offset, min_u64(length, size - offset), out, err);
}

/* Data of one run of either side, at most TRANSFER_DATA_BYTES, in pieces. */
static int put_pieces(struct copying *c, uint64_t offset, uint64_t length, const struct cow_run *before, struct err *err)
{
	uint64_t grain = c->since ? DELTA_GRAIN : WHOLE_GRAIN;
	int rc = cow_read_sync(c->disk, offset, c->now, length, err);

	if (!rc && before && before->data)
		rc = cow_read_sync(c->since, offset, c->then, length, err);
	for (uint64_t at = 0, n; !rc && at < length; at += n) {
		n = min_u64(length - at, grain - (offset + at) % grain);
		bool zero = bytes_are_zero(c->now + at, n);

		if (before && before->data ? memcmp(c->now + at, c->then + at, n) == 0 : zero)
			continue;
		rc = zero ? put_zeroes(c, offset + at, n, err) : put_data(c, offset + at, c->now + at, n, err);
	}
	return rc;
}

static int put_range(struct copying *c, uint64_t offset, uint64_t *length, struct err *err)
{
	struct cow_run run, before = {0};
	int rc = cow_map(c->disk, offset, *length, &run, err);

	if (!rc && c->since)
		rc = map_since(c, offset, run.length, &before, err);
	if (rc)
		return rc;
	*length = c->since ? min_u64(run.length, before.length) : run.length;
	if (!run.data)
		return before.data ? put_zeroes(c, offset, *length, err) : 0;
	if (before.data && !run.compressed && !before.compressed && run.device == before.device && run.inode == before.inode &&
	    run.place == before.place)
		return 0;
	*length = min_u64(*length, TRANSFER_DATA_BYTES);
	return put_pieces(c, offset, *length, c->since ? &before : NULL, err);
}

static int copy_disk(struct copying *c, uint64_t offset, struct err *err)
{
	uint64_t size = c->x->head.disks[c->number].size_bytes, start = c->x->done_bytes;
	int rc = 0;

	if (cow_size(c->disk) != size)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: its size is not the one that was recorded", cow_path(c->disk));
	for (uint64_t n; !rc && offset < size; offset += n) {
		n = size - offset;
		rc = put_range(c, offset, &n, err);
		report(c->x, start + offset);
		if (!rc && transfer_is_cancelled(c->x->options->cancel, err))
			rc = -ECANCELED;
	}
	if (!rc)
		flush_runs(c->x);
	report(c->x, start + size);
	return rc;
}

static bool go_on(void *opaque, uint64_t bytes, bool read)
{
	const struct export *x = opaque;

	(void)bytes;
	(void)read;
	return !transfer_is_cancelled(x->options->cancel, NULL);
}

/* Damage of a layer must not be sealed with new checksums. Of files below it others know: `vmcp verify`. */
static int check_layer(struct export *x, uint32_t number, struct err *err)
{
	const struct store_disk_layer *layer = &x->own.checkpoint.disks[number];
	struct stat st;
	uint64_t sum;
	CLEANUP_CLOSE int fd = open(x->images[number], O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st))
		return err_sys(err, errno, "%s", x->images[number]);
	int rc = (uint64_t)st.st_size < layer->file_bytes ? -ENODATA : file_sum(fd, layer->file_bytes, go_on, x, &sum, err);
	if (rc == -ENODATA || (!rc && sum != layer->xxh3)) {
		err_set(err, ERR_DAMAGED, EBADMSG, "%s: damaged: its checksum does not fit", x->images[number]);
		return err_hint(err, "`vmcp verify` tells which checkpoints are affected");
	}
	return rc;
}

static int put_disk(struct export *x, struct cow_io *io, uint32_t number, uint8_t *buffers, struct err *err)
{
	struct copying c = {.x = x, .number = number, .now = buffers, .then = buffers + TRANSFER_DATA_BYTES};
	uint64_t offset = x->from.started && x->from.disk == number ? x->from.offset : 0;
	const struct transfer_head_disk *disk = &x->head.disks[number];
	int rc = disk->readonly ? 0 : check_layer(x, number, err);

	if (!rc)
		rc = cow_open_as(io, x->images[number], disk->readonly ? -1 : store_disk_layer_format(&x->own.checkpoint.disks[number]), COW_OPEN_READONLY,
				 &c.disk, err);
	if (rc)
		return err_prefix(err, "disk %s", disk->name);
	if (x->since_images[number])
		rc = cow_open_as(io, x->since_images[number], store_disk_layer_format(transfer_find_layer(&x->since.checkpoint, disk->name)),
				 COW_OPEN_READONLY, &c.since, err);
	if (!rc)
		rc = copy_disk(&c, offset, err);
	if (c.since)
		cow_close(c.since, NULL);
	cow_close(c.disk, NULL);
	return rc ? err_prefix(err, "disk %s", disk->name) : 0;
}

static int put_disks(struct export *x, struct err *err)
{
	struct cow_io *io;
	void *buffers = NULL;
	int rc = cow_io_create(NULL, &io, err);

	if (rc)
		return rc;
	if (posix_memalign(&buffers, PAGE_BYTES, 2 * TRANSFER_DATA_BYTES))
		rc = err_sys(err, ENOMEM, "buffers");
	for (uint32_t i = x->from.disk; !rc && i < x->head.disk_count; i++)
		if (!x->head.disks[i].kept)
			rc = put_disk(x, io, i, buffers, err);
	free(buffers);
	cow_io_destroy(io);
	return rc;
}

/* --- all of it --- */

int export_produce(struct transfer_pipe *pipe, void *opaque, struct err *err)
{
	struct export *x = opaque;
	int rc = 0;

	x->pipe = pipe;
	if (!x->from.started) {
		rc = put_bytes(x, TRANSFER_HEAD, &x->head_text, err);
		if (!rc)
			rc = put_bytes(x, TRANSFER_MANIFEST, &x->manifest, err);
		if (!rc)
			rc = put_bytes(x, TRANSFER_STATE, &x->state, err);
	}
	if (!rc)
		rc = x->head.since[0] ? put_memory_delta(x, err) : put_memory(x, err);
	report(x, x->own.checkpoint.memory_bytes);
	if (!rc)
		rc = put_disks(x, err);
	if (!rc)
		rc = get_slot(x, TRANSFER_END, err);
	if (rc)
		return rc;
	/* Its content is known when all before it are packed: the consumer makes it. */
	memset(x->slot->content, 0, TRANSFER_END_BYTES);
	put_slot(x, TRANSFER_END_BYTES);
	return 0;
}
