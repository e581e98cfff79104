/* A plain program, so that it runs under ThreadSanitizer: the loop's callbacks and the parking threads share plain
 * variables, which is right only where parking excludes callbacks. */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/event.h"
#include "tests/lib/check.h"

static void *run_loop(void *opaque)
{
	CHECK(loop_run(opaque, NULL) == 0);
	return NULL;
}

static pthread_t start(struct loop *loop)
{
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, run_loop, loop) == 0);
	return thread;
}

static void stop(struct loop *loop, pthread_t thread)
{
	loop_stop(loop);
	CHECK(pthread_join(thread, NULL) == 0);
}

static struct loop *create(void)
{
	struct loop *loop = NULL;
	CHECK(loop_create(&loop, NULL) == 0);
	return loop;
}

static void raise_count(int fd, uint64_t n) { CHECK(write(fd, &n, sizeof(n)) == sizeof(n)); }

/* --- sources --- */

struct pair {
	struct loop *loop;
	int fds[2];
	struct loop_source *sources[2];
	unsigned calls[2];
	unsigned in_thread;
};

static void stop_pair(void *opaque) { loop_stop(((struct pair *)opaque)->loop); }

static void on_pair(struct pair *pair, int self)
{
	pair->calls[self]++;
	pair->in_thread += loop_in_thread(pair->loop);
	/* Both are ready in one batch; the first that runs takes the other out. */
	loop_remove(pair->loop, pair->sources[!self]);
	pair->sources[!self] = NULL;
	uint64_t count;
	CHECK(read(pair->fds[self], &count, sizeof(count)) == sizeof(count));
	/* By a task, so that the rest of the batch has its turn first. */
	CHECK(loop_post(pair->loop, stop_pair, pair) == 0);
}
static void on_first(void *opaque, uint32_t events)
{
	CHECK(events & EPOLLIN);
	on_pair(opaque, 0);
}
static void on_second(void *opaque, uint32_t events)
{
	CHECK(events & EPOLLIN);
	on_pair(opaque, 1);
}

static void test_remove_within_a_batch(void)
{
	struct pair pair = {.loop = create(), .fds = {eventfd(1, EFD_NONBLOCK), eventfd(1, EFD_NONBLOCK)}};

	CHECK(loop_add(pair.loop, pair.fds[0], EPOLLIN, on_first, &pair, &pair.sources[0], NULL) == 0);
	CHECK(loop_add(pair.loop, pair.fds[1], EPOLLIN, on_second, &pair, &pair.sources[1], NULL) == 0);
	CHECK(!loop_in_thread(pair.loop));
	CHECK(loop_run(pair.loop, NULL) == 0);
	CHECK(pair.calls[0] + pair.calls[1] == 1);
	CHECK(pair.in_thread == 1);
	CHECK(!loop_in_thread(pair.loop));
	struct err err = ERR_INIT;
	CHECK(loop_add(pair.loop, -1, EPOLLIN, on_first, &pair, NULL, &err) == -EBADF);
	CHECK(strstr(err.message, "-1") != NULL);
	loop_remove(pair.loop, NULL);
	/* One source is left, and is freed here; its descriptor is not closed. */
	loop_destroy(pair.loop);
	CHECK(close(pair.fds[0]) == 0);
	CHECK(close(pair.fds[1]) == 0);
	loop_destroy(NULL);
}

/* --- posts --- */

struct order {
	struct loop *loop;
	unsigned next;
	unsigned wrong;
};
struct numbered {
	struct order *order;
	unsigned number;
};

static void take_number(void *opaque)
{
	struct numbered *numbered = opaque;
	struct order *order = numbered->order;
	order->wrong += numbered->number != order->next++;
	free(numbered);
}
static void take_note(void *opaque) { ++*(unsigned *)opaque; }

static void test_posts_keep_their_order_and_calls_wait(void)
{
	struct order order = {.loop = create()};
	unsigned note = 0;

	/* Posted before the loop runs: stays queued; a call runs at once. */
	for (unsigned i = 0; i < 1000; i++) {
		struct numbered *numbered = xcalloc(1, sizeof(*numbered));
		*numbered = (struct numbered){&order, i};
		CHECK(loop_post(order.loop, take_number, numbered) == 0);
		if (i == 500) {
			loop_call(order.loop, take_note, &note);
			CHECK(note == 1 && order.next == 0);
		}
	}
	pthread_t thread = start(order.loop);
	/* Whether the loop has come up yet or not: afterwards the task has run. */
	loop_call(order.loop, take_note, &note);
	CHECK(note == 2);
	for (unsigned i = 1000; i < 2000; i++) {
		struct numbered *numbered = xcalloc(1, sizeof(*numbered));
		*numbered = (struct numbered){&order, i};
		CHECK(loop_post(order.loop, take_number, numbered) == 0);
	}
	while (order.loop != NULL) {
		loop_call(order.loop, take_note, &note);
		loop_park_request(order.loop);
		loop_park_wait(order.loop);
		unsigned next = order.next;
		loop_unpark(order.loop);
		if (next == 2000)
			break;
	}
	stop(order.loop, thread);
	CHECK(order.wrong == 0);
	loop_destroy(order.loop);
}

static void nested_call(void *opaque)
{
	struct order *order = opaque;
	CHECK(loop_in_thread(order->loop));
	loop_call(order->loop, take_note, &order->next);
	CHECK(order->next == 1);
}

static void test_a_call_within_a_call(void)
{
	struct order order = {.loop = create()};

	loop_call(order.loop, nested_call, &order);
	order.next = 0;
	pthread_t thread = start(order.loop);
	usleep(20000); /* it sleeps in epoll_wait: nothing but the call wakes it */
	loop_call(order.loop, nested_call, &order);
	stop(order.loop, thread);
	loop_destroy(order.loop);
}

static void test_a_stop_before_the_run_is_not_lost(void)
{
	struct loop *loop = create();
	unsigned note = 0;

	loop_stop(loop);
	CHECK(loop_run(loop, NULL) == 0);
	CHECK(loop_post(loop, take_note, &note) == 0);
	loop_destroy(loop); /* with a task that never ran */
	CHECK(note == 0);
}

/* --- parking --- */

static void test_a_loop_that_does_not_run_is_parked(void)
{
	struct loop *loop = create();
	unsigned note = 0;

	loop_park_request(loop);
	loop_park_wait(loop);
	CHECK(loop_post(loop, take_note, &note) == 0);
	/* It starts parked: the task must wait. */
	pthread_t thread = start(loop);
	usleep(20000);
	loop_park_wait(loop);
	CHECK(note == 0);
	loop_unpark(loop);
	loop_call(loop, take_note, &note);
	/* The call ran in the loop after the post, or in this thread before the loop came up. */
	loop_park_request(loop);
	loop_park_wait(loop);
	CHECK(note >= 1);
	loop_unpark(loop);
	stop(loop, thread);
	loop_destroy(loop);
}

static void post_semaphore(void *opaque) { sem_post(opaque); }

/* Until the loop's thread takes what is posted: a call before that runs in its caller's thread, in no order with what is posted. */
static void wait_until_up(struct loop *loop)
{
	sem_t up;
	sem_init(&up, 0, 0);
	CHECK(loop_post(loop, post_semaphore, &up) == 0);
	while (sem_wait(&up) != 0)
		;
	sem_destroy(&up);
}

static void test_parks_nest(void)
{
	struct loop *loop = create();
	pthread_t thread = start(loop);
	unsigned note = 0;

	wait_until_up(loop);
	loop_park_request(loop);
	loop_park_request(loop);
	loop_park_wait(loop);
	CHECK(loop_post(loop, take_note, &note) == 0);
	loop_unpark(loop);
	usleep(20000);
	CHECK(note == 0);
	loop_unpark(loop);
	loop_call(loop, take_note, &note);
	loop_park_request(loop);
	loop_park_wait(loop);
	CHECK(note == 2);
	loop_unpark(loop);
	stop(loop, thread);
	loop_destroy(loop);
}

/* Times that a thread of this process has gone to sleep. */
static unsigned long count_sleeps(pid_t tid)
{
	char path[64], line[128];
	unsigned long count = 0;
	snprintf(path, sizeof(path), "/proc/self/task/%d/status", (int)tid);
	FILE *file = fopen(path, "r");
	CHECK(file != NULL);
	while (file && fgets(line, sizeof(line), file))
		sscanf(line, "voluntary_ctxt_switches: %lu", &count);
	if (file)
		fclose(file);
	CHECK(count > 0);
	return count;
}

static void take_tid(void *opaque) { *(pid_t *)opaque = gettid(); }

static void test_an_idle_loop_sleeps_through_a_park(void)
{
	struct loop *loop = create();
	pthread_t thread = start(loop);
	pid_t tid = 0;
	unsigned note = 0;

	wait_until_up(loop);
	loop_call(loop, take_tid, &tid);
	usleep(50000);
	unsigned long before = count_sleeps(tid);
	for (unsigned i = 0; i < 1000; i++) {
		loop_park_request(loop);
		loop_park_wait(loop);
		loop_unpark(loop);
	}
	CHECK(count_sleeps(tid) - before < 100);
	/* But it does not run while it is parked, whatever wakes it. */
	loop_park_request(loop);
	loop_park_wait(loop);
	CHECK(loop_post(loop, take_note, &note) == 0);
	usleep(20000);
	CHECK(note == 0);
	loop_unpark(loop);
	loop_call(loop, take_note, &note);
	CHECK(note == 2);
	stop(loop, thread);
	loop_destroy(loop);
}

/* Nobody but the parker gets at a loop that is parked and does not run. */
static void *call_once(void *opaque)
{
	struct order *order = opaque;
	loop_call(order->loop, take_note, &order->next);
	return NULL;
}

static void test_calls_to_a_parked_loop_that_does_not_run(void)
{
	struct order order = {.loop = create()};
	pthread_t thread;

	loop_park_request(order.loop);
	loop_park_request(order.loop);
	loop_park_wait(order.loop);
	loop_unpark(order.loop);
	loop_call(order.loop, take_note, &order.next);
	CHECK(order.next == 1);
	CHECK(pthread_create(&thread, NULL, call_once, &order) == 0);
	usleep(20000);
	CHECK(order.next == 1);
	loop_unpark(order.loop);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(order.next == 2);
	loop_destroy(order.loop);
}

/* A parked loop does not end; loop_run returns after the unpark. */
static _Atomic bool run_returned;
static void *run_and_tell(void *opaque)
{
	CHECK(loop_run(opaque, NULL) == 0);
	atomic_store(&run_returned, true);
	return NULL;
}

static void test_a_parked_loop_stops_when_unparked(void)
{
	struct loop *loop = create();
	pthread_t thread;
	unsigned note = 0;

	CHECK(pthread_create(&thread, NULL, run_and_tell, loop) == 0);
	while (note == 0)
		loop_call(loop, take_note, &note);
	usleep(10000);
	loop_park_request(loop);
	loop_park_wait(loop);
	loop_stop(loop);
	usleep(20000);
	CHECK(!atomic_load(&run_returned));
	loop_unpark(loop);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(atomic_load(&run_returned));
	loop_destroy(loop);
}

/* --- stress --- */

enum { STRESS_MS = 1500 };

struct stress {
	struct loop *loop;
	int fd;
	_Atomic bool over;
	/* Not atomic on purpose: written by callbacks, and by the parking threads while the loop stands. TSan tells. */
	uint64_t plain;
	uint64_t callbacks;
	_Atomic uint64_t posted, called;
	uint64_t ran_posts, ran_calls;
	pthread_mutex_t parking; /* between the two parking threads */
	uint64_t parks;
};

static void on_stress(void *opaque, uint32_t events)
{
	struct stress *stress = opaque;
	uint64_t count;
	(void)events;
	stress->plain++;
	stress->callbacks++;
	if (read(stress->fd, &count, sizeof(count)) == sizeof(count) && !atomic_load(&stress->over))
		raise_count(stress->fd, 1);
}
static void stress_post(void *opaque)
{
	struct stress *stress = opaque;
	stress->plain++;
	stress->ran_posts++;
}
static void stress_call(void *opaque)
{
	struct stress *stress = opaque;
	stress->plain++;
	stress->ran_calls++;
}

static void *park_often(void *opaque)
{
	struct stress *stress = opaque;
	while (!atomic_load(&stress->over)) {
		loop_park_request(stress->loop);
		loop_park_wait(stress->loop);
		pthread_mutex_lock(&stress->parking);
		uint64_t before = stress->plain;
		stress->parks++;
		for (volatile int i = 0; i < 300; i++)
			;
		CHECK(stress->plain == before);
		stress->plain++;
		pthread_mutex_unlock(&stress->parking);
		loop_unpark(stress->loop);
		usleep(20); /* or the loop would stand most of the time */
	}
	return NULL;
}
static void *post_often(void *opaque)
{
	struct stress *stress = opaque;
	while (!atomic_load(&stress->over)) {
		CHECK(loop_post(stress->loop, stress_post, stress) == 0);
		if (atomic_fetch_add(&stress->posted, 1) % 64 == 0)
			usleep(100); /* or the queue would grow without end */
	}
	return NULL;
}
static void *call_often(void *opaque)
{
	struct stress *stress = opaque;
	while (!atomic_load(&stress->over)) {
		loop_call(stress->loop, stress_call, stress);
		atomic_fetch_add(&stress->called, 1);
	}
	return NULL;
}

static void test_stress(void)
{
	struct stress stress = {.loop = create(), .fd = eventfd(1, EFD_NONBLOCK)};
	pthread_t threads[6];
	static void *(*const bodies[])(void *) = {park_often, park_often, post_often, call_often, call_often};

	pthread_mutex_init(&stress.parking, NULL);
	CHECK(loop_add(stress.loop, stress.fd, EPOLLIN, on_stress, &stress, NULL, NULL) == 0);
	threads[5] = start(stress.loop);
	for (size_t i = 0; i < ARRAY_LENGTH(bodies); i++)
		CHECK(pthread_create(&threads[i], NULL, bodies[i], &stress) == 0);
	/* The loop also ends and starts again under way. */
	uint64_t end = clock_now_ns() + STRESS_MS * UINT64_C(1000000);
	unsigned restarts = 0;
	uint64_t seen = 0;
	/* On a loaded host longer, until events had their turn often enough. */
	while (clock_now_ns() < end || (seen <= 100 && clock_now_ns() < end + UINT64_C(30000000000))) {
		usleep(5000);
		stop(stress.loop, threads[5]);
		seen = stress.callbacks;
		threads[5] = start(stress.loop);
		restarts++;
	}
	atomic_store(&stress.over, true);
	for (size_t i = 0; i < ARRAY_LENGTH(bodies); i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	stop(stress.loop, threads[5]);
	/* Whatever is still queued runs now. */
	unsigned note = 0;
	CHECK(loop_post(stress.loop, take_note, &note) == 0);
	threads[5] = start(stress.loop);
	uint64_t ran = 0;
	while (ran == 0) {
		loop_park_request(stress.loop);
		loop_park_wait(stress.loop);
		ran = note;
		loop_unpark(stress.loop);
	}
	stop(stress.loop, threads[5]);
	CHECK(stress.ran_posts == stress.posted);
	CHECK(stress.ran_calls == stress.called);
	CHECK(stress.plain == stress.callbacks + stress.ran_posts + stress.ran_calls + stress.parks);
	CHECK(stress.callbacks > 100 && stress.ran_posts > 100 && stress.ran_calls > 100 && stress.parks > 100);
	printf("stress: %llu callbacks, %llu posts, %llu calls, %llu parks, %u restarts\n",
	       (unsigned long long)stress.callbacks, (unsigned long long)stress.ran_posts,
	       (unsigned long long)stress.ran_calls, (unsigned long long)stress.parks, restarts);
	close(stress.fd);
	pthread_mutex_destroy(&stress.parking);
	loop_destroy(stress.loop);
}

/* --- how long a park takes; printed, and bounded only against disasters --- */

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static void test_park_latency(void)
{
	enum { ROUNDS = 2000 };
	static uint64_t park_ns[ROUNDS];
	struct loop *loop = create();
	pthread_t thread = start(loop);

	for (int i = 0; i < ROUNDS; i++) {
		usleep(50); /* the loop sleeps in epoll_wait again */
		uint64_t before = clock_now_ns();
		loop_park_request(loop);
		loop_park_wait(loop);
		park_ns[i] = clock_now_ns() - before;
		loop_unpark(loop);
	}
	stop(loop, thread);
	loop_destroy(loop);
	qsort(park_ns, ROUNDS, sizeof(park_ns[0]), compare_u64);
	printf("park: median %llu ns, 99 %% %llu ns, worst %llu ns\n", (unsigned long long)park_ns[ROUNDS / 2],
	       (unsigned long long)park_ns[ROUNDS * 99 / 100], (unsigned long long)park_ns[ROUNDS - 1]);
	CHECK(park_ns[ROUNDS / 2] < 5000000);
}

int main(void)
{
	/* A lost wakeup is a hang: end it with a signal that the runner reports. */
	alarm(300);
	test_remove_within_a_batch();
	test_posts_keep_their_order_and_calls_wait();
	test_a_call_within_a_call();
	test_a_stop_before_the_run_is_not_lost();
	test_a_loop_that_does_not_run_is_parked();
	test_parks_nest();
	test_an_idle_loop_sleeps_through_a_park();
	test_calls_to_a_parked_loop_that_does_not_run();
	test_a_parked_loop_stops_when_unparked();
	test_stress();
	test_park_latency();
	return check_report();
}
