/*
 * host_stalls - how long this host itself stands still while a processor works and the disk is written, without vmcp
 *
 *   host_stalls [THREADS]
 *
 * One thread, or so many, reads the clock without an end, as a guest does that never idles, until standard input ends; whoever runs this writes to the
 * disk meanwhile.
 * A virtual machine with a limit on its processors' time is stopped whole, for tens of milliseconds, where these and the work behind
 * its disk use more: what a guest of ours sees then is not vmcp's.
 *
 * Writes one JSON document: `gap_ns`, the longest time between two readings of a thread, `over_1ms`, how many were longer than that, and `seconds`.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 256

struct watch {
	pthread_t thread;
	uint64_t longest_ns, over_1ms;
};

static atomic_bool done;

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *spin_main(void *opaque)
{
	struct watch *watch = opaque;
	uint64_t last_ns = now_ns();
	while (!atomic_load_explicit(&done, memory_order_relaxed)) {
		uint64_t at_ns = now_ns(), gap_ns = at_ns - last_ns;
		if (gap_ns > watch->longest_ns)
			watch->longest_ns = gap_ns;
		watch->over_1ms += gap_ns > 1000000;
		last_ns = at_ns;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	static struct watch watches[MOST_THREADS];
	int threads = argc > 1 ? atoi(argv[1]) : 1;
	if (threads < 1 || threads > MOST_THREADS) {
		fprintf(stderr, "host_stalls: '%s': 1 to %d threads\n", argv[1], MOST_THREADS);
		return 2;
	}
	uint64_t start_ns = now_ns(), longest_ns = 0, over_1ms = 0;
	for (int i = 0; i < threads; i++) {
		int r = pthread_create(&watches[i].thread, NULL, spin_main, &watches[i]);
		if (r != 0) {
			fprintf(stderr, "host_stalls: pthread_create: %s\n", strerror(r));
			return 1;
		}
	}
	char byte;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	atomic_store(&done, true);
	for (int i = 0; i < threads; i++) {
		pthread_join(watches[i].thread, NULL);
		if (watches[i].longest_ns > longest_ns)
			longest_ns = watches[i].longest_ns;
		over_1ms += watches[i].over_1ms;
	}
	printf("{\"gap_ns\": %llu, \"over_1ms\": %llu, \"seconds\": %.3f}\n", (unsigned long long)longest_ns, (unsigned long long)over_1ms,
	       (double)(now_ns() - start_ns) / 1e9);
	return fflush(stdout) == 0 ? 0 : 1;
}
