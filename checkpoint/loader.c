#include "checkpoint/loader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/priority.h"
#include "checkpoint/check_turn.h"
#include "checkpoint/filler.h"
#include "checkpoint/restore.h"
#include "checkpoint/scheduling.h"
#include "checkpoint/working_set.h"

/* A run this long is mapped: to map it costs about what copying so many pages does. */
#define MAP_MIN_PAGES 4u
/* Each costs some 5 us before the guest runs. Where a long history has left more of them, only longer ones are mapped; what is copied instead is
 * the VM's own, and not shared. */
#define MAP_MAX_RUNS 512u
/* Scattered pages that are copied before the start: a millisecond or two. */
#define COPY_MAX_PAGES 512u
/* Checked before the thread looks around. */
#define SLICE_PAGES RESTORE_CHUNK_PAGES
/* Gaps that are read ahead along with what surrounds them: a disk reads 128 KiB about as fast as 4. */
#define READ_AHEAD_GAP_PAGES 32u
/* What the guest touched so long after its start is recorded; of a run that ended sooner, if it lasted half a second. */
#define RECORD_AFTER_NS 2000000000u
#define RECORD_LEAST_NS 500000000u
/* For so long after its first instruction others that start are probably on their way. */
#define YOUNG_NS 1000000000u
#define PIECE_REST_MAX_NS 2000000u
/* How often is looked whether another VM's check is over. */
#define TURN_EACH_NS 50000000u

struct loader {
	struct vm *vm;
	struct mem *mem;
	struct store *store;
	char checkpoint[STORE_ID_BYTES];
	struct store_pin *pin; /* while layers are still to be opened: the VM may stand elsewhere by then. Owner: the thread while it runs */
	void (*damaged)(void *opaque, const struct err *err);
	void *opaque;
	struct page_index index;
	struct restore_layers layers;
	uint64_t words;
	uint64_t *mapped, *copied; /* bitmaps: pages that are to be checked, and those that are copied in */
	struct filler *filler;	   /* copies them, NULL: they are there */
	struct check_turn turn;
	struct priority_room room;
	pthread_t thread;
	bool started;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	_Atomic bool stop; /* changed under lock */
	bool filling;	   /* under lock */
};

/* --- mapping --- */

/* The shortest run that is mapped, so that there are not too many mappings. */
static uint64_t choose_shortest(const struct page_index *index)
{
	uint64_t shortest = MAP_MIN_PAGES, runs;
	do {
		runs = 0;
		for (uint64_t i = 0; i < index->extent_count; i++)
			runs += index->extents[i].layer != INDEX_ZERO_LAYER && index->extents[i].count >= shortest;
		if (runs > MAP_MAX_RUNS)
			shortest *= 2;
	} while (runs > MAP_MAX_RUNS);
	return shortest;
}

/* Sets the bitmaps. Returns how many pages are copied. */
static uint64_t sort_extents(struct loader *l)
{
	uint64_t shortest = store_is_encrypted(l->store) ? UINT64_MAX : choose_shortest(&l->index), copied = 0;
	for (uint64_t i = 0; i < l->index.extent_count; i++) {
		const struct index_extent *e = &l->index.extents[i];
		bool map = e->count >= shortest;
		if (e->layer == INDEX_ZERO_LAYER)
			continue;
		bitmap_fill(map ? l->mapped : l->copied, e->first, e->count);
		copied += map ? 0 : e->count;
	}
	return copied;
}

static int map_extents(struct loader *l, struct err *err)
{
	int r = 0;
	for (uint64_t i = 0; i < l->index.extent_count && r == 0; i++) {
		const struct index_extent *e = &l->index.extents[i];
		uint64_t place;
		int fd;
		if (e->layer == INDEX_ZERO_LAYER || !bitmap_has(l->mapped, e->first))
			continue;
		r = restore_find(&l->layers, e, &fd, &place, err);
		if (r == 0)
			r = mem_map_file(l->mem, e->first, e->count, fd, place, err);
	}
	mem_map_done(l->mem);
	return r;
}

static int fill_memory(struct loader *l, struct err *err)
{
	uint64_t scattered = sort_extents(l), changed;
	struct err unknown = ERR_INIT;
	if (scattered > COPY_MAX_PAGES &&
	    filler_create(l->mem, &l->layers, l->copied, l->mapped, &l->filler, &unknown) != 0)
		log_debug("checkpoint %.8s: %llu scattered pages are copied before the start: %s", l->checkpoint,
			  (unsigned long long)scattered, unknown.message);
	int r = map_extents(l, err);
	return r == 0 && !l->filler ? restore_memory(l->mem, &l->layers, l->copied, true, &changed, err) : r;
}

/* --- the thread --- */

/* The recorded pages that are mapped; NULL if there is no record. */
static uint64_t *read_working_set(struct loader *l)
{
	CLEANUP_BUF struct buf file = BUF_INIT;
	struct err err = ERR_INIT;
	uint64_t *set = xcalloc(l->words, sizeof(*set));
	int r = store_hint_get(l->store, l->checkpoint, "working-set", WORKING_SET_MAX_BYTES, &file, &err);
	if (r == 0)
		r = working_set_decode(file.data, file.length, set, l->index.page_count, &err);
	if (r != 0) {
		if (err.number != ENOENT)
			log_debug("checkpoint %.8s: %s", l->checkpoint, err.message);
		free(set);
		return NULL;
	}
	for (uint64_t w = 0; w < l->words; w++)
		set[w] &= l->mapped[w];
	return set;
}

/* Pages [*first, *end): the next run of `which` from *end on, over gaps of up to `gap` pages. */
static bool next_stretch(const uint64_t *which, uint64_t pages, uint64_t gap, uint64_t *first, uint64_t *end)
{
	uint64_t page = *end, last = 0;
	bool found = false;
	for (; page < pages && !(found && page - last > gap); page++) {
		if (page % 64 == 0 && which[page / 64] == 0) {
			page += 63;
		} else if (bitmap_has(which, page)) {
			*first = found ? *first : page;
			last = page;
			found = true;
		}
	}
	*end = last + 1;
	return found;
}

/* Asks the kernel for pages, which it reads by itself, many at once. */
static void read_ahead(struct loader *l, const uint64_t *set)
{
	uint64_t first = 0, end = 0;
	while (!l->stop && next_stretch(set, l->index.page_count, READ_AHEAD_GAP_PAGES, &first, &end)) {
		for (uint64_t page = first; page < end;) {
			const struct index_extent *e = page_index_find(&l->index, page);
			struct index_extent part = {.first = page, .count = min_u64(end, e->first + e->count) - page, .layer = e->layer};
			uint64_t place;
			int fd;
			if (e->layer != INDEX_ZERO_LAYER && restore_find(&l->layers, &part, &fd, &place, NULL) == 0)
				posix_fadvise(fd, (off_t)(place * PAGE_BYTES), (off_t)(part.count * PAGE_BYTES), POSIX_FADV_WILLNEED);
			page += part.count;
		}
	}
}

/* Or until the loader is to end. */
static void wait_until(struct loader *l, uint64_t until_ns)
{
	struct timespec until = clock_timespec(until_ns);
	pthread_mutex_lock(&l->lock);
	while (!l->stop && pthread_cond_timedwait(&l->changed, &l->lock, &until) != ETIMEDOUT)
		;
	pthread_mutex_unlock(&l->lock);
}

/* VMs often start by the dozen: then the check takes no more than a quarter of a processor, in short pieces. */
static void make_room(struct loader *l, uint64_t worked_ns)
{
	uint64_t entry_ns = vm_first_entry_ns(l->vm);
	if (entry_ns != 0 && clock_now_ns() - entry_ns > YOUNG_NS)
		priority_give_way_each(SCHEDULING_ROOM_EACH_NS, &l->room);
	else
		wait_until(l, clock_now_ns() + min_u64(3 * worked_ns, PIECE_REST_MAX_NS));
}

static int check_pages(struct loader *l, const uint64_t *which, struct err *err)
{
	CLEANUP_FREE uint8_t *chunk = restore_alloc_chunk(err);
	uint64_t pages = l->index.page_count;
	int r = chunk ? 0 : -ENOMEM;
	for (uint64_t first = 0; first < pages && r == 0; first += SLICE_PAGES) {
		uint64_t begun_ns = clock_now_ns();
		r = l->stop ? -ECANCELED : restore_verify(&l->layers, which, first, min_u64(first + SLICE_PAGES, pages), chunk, err);
		make_room(l, clock_now_ns() - begun_ns);
	}
	return r;
}

/* What is mapped, and of which layers. */
static uint64_t hash_mapped(const struct loader *l)
{
	uint64_t layers = XXH3_64bits(l->index.layers, l->index.layer_count * sizeof(*l->index.layers));
	return XXH3_64bits_withSeed(l->mapped, l->words * sizeof(*l->mapped), layers);
}

/* Whether this VM is to check. Not if another one did, or the loader is to end. */
static bool wait_for_turn(struct loader *l)
{
	uint64_t key = hash_mapped(l);
	while (!l->stop) {
		enum check_turn_answer answer = check_turn_take(&l->turn, key);
		if (answer != CHECK_TURN_WAIT)
			return answer == CHECK_TURN_MINE;
		wait_until(l, clock_now_ns() + TURN_EACH_NS);
	}
	return false;
}

/* Those of `set` first, which may be NULL. */
static int check_mapped(struct loader *l, uint64_t *set, struct err *err)
{
	int r = set ? check_pages(l, set, err) : 0;
	for (uint64_t w = 0; set && w < l->words; w++)
		set[w] = l->mapped[w] & ~set[w];
	return r == 0 ? check_pages(l, set ? set : l->mapped, err) : r;
}

static void record_working_set(struct loader *l)
{
	CLEANUP_BUF struct buf file = BUF_INIT;
	struct err err = ERR_INIT;
	uint64_t entry_ns = vm_first_entry_ns(l->vm);
	if (entry_ns == 0 || clock_now_ns() - entry_ns < RECORD_LEAST_NS)
		return;
	CLEANUP_FREE uint64_t *set = xcalloc(l->words, sizeof(*set));
	int r = working_set_find(l->mem, l->mapped, set, &err);
	if (r == 0)
		r = working_set_encode(set, l->index.page_count, &file, &err);
	if (r == 0)
		r = store_hint_put(l->store, l->checkpoint, "working-set", file.data, file.length, &err);
	if (r != 0)
		log_debug("checkpoint %.8s: no working set is recorded: %s", l->checkpoint, err.message);
}

/* Whoever waits for a page that cannot be filled waits for ever, and zeroes in its place could reach a disk. */
static void fill_scattered(struct loader *l)
{
	struct err err = ERR_INIT;
	if (filler_run(l->filler, &err) == 0) {
		mem_release_discards(l->mem);
		pthread_mutex_lock(&l->lock);
		l->filling = false;
		pthread_cond_broadcast(&l->changed);
		pthread_mutex_unlock(&l->lock);
		return;
	}
	log_error("checkpoint %.8s, from which this VM was started: %s: the VM ends", l->checkpoint, err.message);
	_exit(1);
}

static void *loader_main(void *opaque)
{
	struct loader *l = opaque;
	struct err err = ERR_INIT;
	int r = 0;
	pthread_setname_np(pthread_self(), "vmcp-load");
	CLEANUP_FREE uint64_t *set = read_working_set(l);
	if (set)
		read_ahead(l, set);
	if (l->filler)
		fill_scattered(l);
	priority_background();
	scheduling_leave_vcpus(l->vm, NULL, NULL);
	if (wait_for_turn(l)) {
		r = check_mapped(l, set, &err);
		if (r == 0)
			check_turn_passed(&l->turn);
		check_turn_close(&l->turn);
	}
	if (r != 0 && r != -ECANCELED) {
		err_prefix(&err, "checkpoint %.8s, from which this VM was started", l->checkpoint);
		l->damaged(l->opaque, &err);
		vm_fail(l->vm, &err);
	} else if (!set && !store_is_encrypted(l->store)) {
		uint64_t entry_ns = vm_first_entry_ns(l->vm);
		wait_until(l, (entry_ns ? entry_ns : clock_now_ns()) + RECORD_AFTER_NS);
		record_working_set(l);
	}
	store_unpin(l->pin);
	l->pin = NULL;
	return NULL;
}

static struct loader *new_loader(const struct loader_config *config, struct page_index *index)
{
	struct loader *l = xcalloc(1, sizeof(*l));
	l->vm = config->vm;
	l->mem = vm_memory(config->vm);
	l->store = config->store;
	l->turn.fd = -1;
	snprintf(l->checkpoint, sizeof(l->checkpoint), "%s", config->checkpoint);
	l->damaged = config->damaged;
	l->opaque = config->opaque;
	l->index = *index;
	*index = (struct page_index){0};
	l->words = BITMAP_WORDS(l->index.page_count);
	l->mapped = xcalloc(l->words, sizeof(*l->mapped));
	l->copied = xcalloc(l->words, sizeof(*l->copied));
	pthread_mutex_init(&l->lock, NULL);
	clock_cond_init(&l->changed);
	return l;
}

int loader_start(const struct loader_config *config, struct page_index *index, struct loader **out, struct err *err)
{
	struct loader *l = new_loader(config, index);
	int r = restore_init(&l->layers, l->store, &l->index, err);
	if (r == 0)
		r = store_pin(l->store, l->checkpoint, &l->pin, err);
	if (r == 0) {
		check_turn_open(&l->turn, l->store, l->checkpoint);
		r = fill_memory(l, err);
	}
	l->filling = l->filler != NULL;
	if (l->filling)
		mem_hold_discards(l->mem); /* what was given back must not be filled again */
	if (r == 0) {
		r = -pthread_create(&l->thread, NULL, loader_main, l);
		l->started = r == 0;
		if (r != 0)
			err_sys(err, -r, "start the thread that checks memory");
	}
	if (r != 0) {
		loader_destroy(l);
		return r;
	}
	*out = l;
	return 0;
}

void loader_wait_filled(struct loader *l)
{
	if (!l)
		return;
	pthread_mutex_lock(&l->lock);
	while (l->filling)
		pthread_cond_wait(&l->changed, &l->lock);
	pthread_mutex_unlock(&l->lock);
}

void loader_destroy(struct loader *l)
{
	if (!l)
		return;
	pthread_mutex_lock(&l->lock);
	l->stop = true;
	pthread_cond_broadcast(&l->changed);
	pthread_mutex_unlock(&l->lock);
	if (l->started)
		pthread_join(l->thread, NULL);
	check_turn_close(&l->turn);
	filler_destroy(l->filler);
	restore_close(&l->layers);
	store_unpin(l->pin);
	page_index_free(&l->index);
	free(l->mapped);
	free(l->copied);
	pthread_mutex_destroy(&l->lock);
	pthread_cond_destroy(&l->changed);
	free(l);
}
