/* The threads that read. Work is handed out in pieces: first the disk files, the largest first, as one file is one thread's; then memory layers in order, some
 * megabytes at a time. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "checkpoint/store/verify_internal.h"

#define PIECE_ENTRIES 2048u
#define MAX_THREADS   256u
#define SHOW_NS	      100000000l

struct piece {
	struct needed_disk *disk;
	struct needed_layer *layer;
	uint64_t first, end;
};

bool verify_is_cancelled(const struct verify *v) { return v->options->cancel && __atomic_load_n(v->options->cancel, __ATOMIC_RELAXED); }

static bool next_piece(struct verify *v, struct piece *out)
{
	*out = (struct piece){0};
	if (verify_is_cancelled(v))
		return false;
	pthread_mutex_lock(&v->lock);
	if (v->next_disk < v->disk_count)
		out->disk = v->disks[v->next_disk++];
	while (!out->disk && v->next_layer < v->layer_count && v->next_entry >= v->layers[v->next_layer]->count) {
		v->next_layer++;
		v->next_entry = 0;
	}
	if (!out->disk && v->next_layer < v->layer_count) {
		out->layer = v->layers[v->next_layer];
		out->first = v->next_entry;
		out->end = v->next_entry = min_u64(v->next_entry + PIECE_ENTRIES, out->layer->count);
	}
	pthread_mutex_unlock(&v->lock);
	return out->disk || out->layer;
}

static void *reader_main(void *opaque)
{
	struct verify *v = opaque;
	struct piece piece;
	void *buffer = NULL;
	if (posix_memalign(&buffer, PAGE_BYTES, VERIFY_BUFFER_PAGES * PAGE_BYTES) != 0)
		abort(); /* as xcalloc: a small object */
	while (next_piece(v, &piece)) {
		if (piece.disk)
			verify_check_disk(v, piece.disk);
		else
			verify_check_pages(v, piece.layer, piece.first, piece.end, buffer);
	}
	free(buffer);
	pthread_mutex_lock(&v->lock);
	v->working--;
	pthread_cond_signal(&v->ended);
	pthread_mutex_unlock(&v->lock);
	return NULL;
}

void verify_count(struct verify *v, uint64_t progress_bytes, uint64_t read_bytes)
{
	uint64_t rate = v->options->max_rate;
	pthread_mutex_lock(&v->lock);
	v->done_bytes += progress_bytes;
	uint64_t read = v->result->read_bytes += read_bytes;
	pthread_mutex_unlock(&v->lock);
	if (rate == 0)
		return;
	uint64_t due = v->started_ns + (uint64_t)((double)read * 1e9 / (double)rate), now = clock_now_ns();
	if (due > now) {
		const struct timespec wait = clock_timespec(due - now);
		nanosleep(&wait, NULL);
	}
}

static int largest_first(const void *a, const void *b)
{
	const struct needed_disk *x = *(struct needed_disk *const *)a, *y = *(struct needed_disk *const *)b;
	return (x->bytes < y->bytes) - (x->bytes > y->bytes);
}

static void wait_for_all(struct verify *v)
{
	pthread_mutex_lock(&v->lock);
	while (v->working) {
		struct timespec until;
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += SHOW_NS;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		pthread_cond_timedwait(&v->ended, &v->lock, &until);
		uint64_t done = v->done_bytes;
		pthread_mutex_unlock(&v->lock);
		if (v->options->progress)
			v->options->progress(v->options->opaque, "reading", done, v->total_bytes);
		pthread_mutex_lock(&v->lock);
	}
	pthread_mutex_unlock(&v->lock);
}

int verify_read(struct verify *v, struct err *err)
{
	unsigned count = v->options->threads ? v->options->threads : (unsigned)max_u64(1, (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
	pthread_t threads[MAX_THREADS];
	unsigned started = 0;
	int r = 0;
	v->started_ns = clock_now_ns();
	v->total_bytes = verify_memory_bytes(v);
	for (size_t i = 0; i < v->disk_count; i++)
		v->total_bytes += v->disks[i]->recorded ? v->disks[i]->bytes : 0;
	if (v->disk_count)
		qsort(v->disks, v->disk_count, sizeof(struct needed_disk *), largest_first);
	v->result->files += 2 * v->layer_count + v->disk_count;
	for (; started < min_u64(count, MAX_THREADS) && r == 0; started += r == 0) {
		pthread_mutex_lock(&v->lock);
		v->working++;
		pthread_mutex_unlock(&v->lock);
		r = pthread_create(&threads[started], NULL, reader_main, v);
	}
	if (r != 0) {
		pthread_mutex_lock(&v->lock);
		v->working--;
		pthread_mutex_unlock(&v->lock);
	}
	wait_for_all(v);
	for (unsigned i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
	if (verify_is_cancelled(v))
		return err_set(err, ERR_FAILED, ECANCELED, "cancelled");
	return started ? 0 : err_sys(err, r, "thread");
}
