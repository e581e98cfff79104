/* Polling: a plain program, so that it runs under ThreadSanitizer. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

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

struct polled {
	struct loop *loop;
	struct loop_poller *poller;
	_Atomic unsigned offered, looks, rests;
	unsigned taken; /* by the loop's thread; by others while it is parked */
	_Atomic bool resting, helped;
	int fd; /* tells of work while it rests */
	struct polled *waits; /* another one, for which that work is handed on */
};

static bool take_offered(struct polled *p)
{
	unsigned offered = atomic_load(&p->offered);
	bool found = offered != p->taken;
	p->taken = offered;
	return found;
}

static bool poll_polled(void *opaque)
{
	struct polled *p = opaque;
	atomic_fetch_add(&p->looks, 1);
	return take_offered(p);
}

static bool rest_polled(void *opaque)
{
	struct polled *p = opaque;
	atomic_store(&p->resting, true);
	bool found = atomic_load(&p->offered) != p->taken;
	if (found)
		atomic_store(&p->resting, false);
	atomic_fetch_add(&p->rests, 1);
	return found;
}

static bool is_helped(void *opaque) { return atomic_load(&((struct polled *)opaque)->helped); }

static void on_told(void *opaque, uint32_t events)
{
	struct polled *p = opaque;
	uint64_t count;
	(void)events;
	CHECK(read(p->fd, &count, sizeof(count)) == sizeof(count));
	atomic_store(&p->resting, false);
	loop_poller_heat(p->poller);
	if (p->waits != NULL)
		loop_poller_heat(p->waits->poller);
	take_offered(p);
}

static const struct loop_poller_ops polled_ops = {.poll = poll_polled, .rest = rest_polled, .helped = is_helped};

static void polled_create(struct polled *p, unsigned spare)
{
	*p = (struct polled){.resting = true, .fd = eventfd(0, EFD_NONBLOCK)};
	CHECK(loop_create(&p->loop, NULL) == 0);
	loop_set_spare(p->loop, spare);
	loop_add_poller(p->loop, &polled_ops, p, &p->poller);
	CHECK(loop_add(p->loop, p->fd, EPOLLIN, on_told, p, NULL, NULL) == 0);
}

static void polled_destroy(struct polled *p)
{
	loop_destroy(p->loop);
	close(p->fd);
}

static void read_taken(void *opaque)
{
	struct polled *p = opaque;
	CHECK(p->taken == atomic_load(&p->offered));
}

/* As a driver does: offers, then tells if it is asked to. */
static void offer(struct polled *p)
{
	atomic_fetch_add(&p->offered, 1);
	if (atomic_exchange(&p->resting, false))
		CHECK(eventfd_write(p->fd, 1) == 0);
}

static void wait_until_it_rests(struct polled *p)
{
	for (unsigned i = 0; i < 60000 && !atomic_load(&p->resting); i++)
		usleep(1000);
	CHECK(atomic_load(&p->resting));
}

static bool looks_for_long(struct polled *p)
{
	unsigned before = atomic_load(&p->looks);
	offer(p);
	wait_until_it_rests(p);
	return atomic_load(&p->looks) - before > 4;
}

/* Every offer is taken, told or not, whatever the spare processors and helpers; and when none comes the loop sleeps. */
static void test_polling_loses_nothing_and_ends(void)
{
	for (unsigned spare = 0; spare < 3; spare++) {
		struct polled p;
		polled_create(&p, spare);
		pthread_t thread = start(p.loop);
		for (unsigned i = 0; i < 3000; i++) {
			atomic_store(&p.helped, i % 3 == 0);
			offer(&p);
			if (i % 64 == 0)
				usleep(200);
		}
		atomic_store(&p.helped, false);
		wait_until_it_rests(&p);
		loop_call(p.loop, read_taken, &p);
		unsigned looks = atomic_load(&p.looks), rests = atomic_load(&p.rests);
		usleep(50000);
		CHECK(rests > 0 && atomic_load(&p.looks) == looks && atomic_load(&p.rests) == rests);
		stop(p.loop, thread);
		polled_destroy(&p);
	}
}

/* A loop that looks and finds nothing, time after time, looks once and rests, mostly; one that is paid for it looks for long again. */
static void test_polling_in_vain_becomes_seldom(void)
{
	struct polled p;
	polled_create(&p, 2);
	pthread_t thread = start(p.loop);
	unsigned first = 0, later = 0;
	for (unsigned i = 0; i < 108; i++) {
		bool is_long = looks_for_long(&p);
		first += i < 8 && is_long;
		later += i >= 8 && is_long;
	}
	CHECK(first > 0 && later < 30); /* one of 16 is */
	stop(p.loop, thread);
	polled_destroy(&p);
}

/* Who makes room for helpers has not looked in vain, and looks for long when they are done. */
static void test_making_room_is_not_in_vain(void)
{
	struct polled p;
	polled_create(&p, 1);
	atomic_store(&p.helped, true);
	pthread_t thread = start(p.loop);
	for (unsigned i = 0; i < 100; i++)
		looks_for_long(&p);
	atomic_store(&p.helped, false);
	unsigned later = 0;
	for (unsigned i = 0; i < 20; i++)
		later += looks_for_long(&p);
	CHECK(later > 0);
	stop(p.loop, thread);
	polled_destroy(&p);
}

static void count_aside(void *opaque) { atomic_fetch_add((_Atomic unsigned *)opaque, 1); }

/* Looking in vain makes the thread step aside, now and then. */
static void test_who_looks_in_vain_steps_aside(void)
{
	struct polled p;
	_Atomic unsigned asides = 0;
	polled_create(&p, 1);
	loop_set_aside(p.loop, count_aside, &asides);
	uint64_t begun_ns = clock_now_ns();
	pthread_t thread = start(p.loop);
	for (unsigned i = 0; i < 100; i++)
		looks_for_long(&p);
	loop_call(p.loop, read_taken, &p);
	CHECK(atomic_load(&asides) > 0 && atomic_load(&asides) <= 1 + (clock_now_ns() - begun_ns) / 50000000);
	stop(p.loop, thread);
	polled_destroy(&p);
}

/* Where the helpers of one poller need the processor that is to spare, none is looked at twice in vain. */
static void test_all_rest_while_one_is_helped(void)
{
	struct polled p, helped = {.helped = true};
	polled_create(&p, 1);
	loop_add_poller(p.loop, &polled_ops, &helped, &helped.poller);
	p.waits = &helped;
	pthread_t thread = start(p.loop);
	for (unsigned i = 0; i < 100; i++) {
		offer(&p);
		wait_until_it_rests(&p);
	}
	loop_call(p.loop, read_taken, &p);
	stop(p.loop, thread);
	CHECK(atomic_load(&p.looks) < 150 && atomic_load(&helped.looks) < 150); /* an offer may come while it lies down */
	polled_destroy(&p);
}

/* A parked loop does not look, and one that looks parks. */
static void test_a_polling_loop_parks(void)
{
	struct polled p;
	polled_create(&p, 2);
	pthread_t thread = start(p.loop);
	for (unsigned i = 0; i < 2000; i++) {
		offer(&p);
		loop_park_request(p.loop);
		loop_park_wait(p.loop);
		unsigned looks = atomic_load(&p.looks);
		CHECK(p.taken <= atomic_load(&p.offered)); /* for ThreadSanitizer: a plain read */
		if (i % 100 == 0)
			usleep(200);
		CHECK(atomic_load(&p.looks) == looks);
		loop_unpark(p.loop);
	}
	wait_until_it_rests(&p);
	loop_call(p.loop, read_taken, &p);
	stop(p.loop, thread);
	polled_destroy(&p);
}

/* Looks `in_vain` times before it finds something. */
struct looked {
	struct loop *loop;
	_Atomic int ready; /* the callback has begun; the loop is to park */
	unsigned in_vain, looks;
};

static bool look(void *opaque)
{
	struct looked *l = opaque;
	return l->looks++ >= l->in_vain;
}

static bool glance(struct looked *l, struct loop_glance *kind, unsigned in_vain)
{
	l->in_vain = in_vain;
	l->looks = 0;
	return loop_glance(l->loop, kind, look, l);
}

/* A kind of glance that is in vain time after time is one of 16, until one of these pays. */
static void test_glances_are_where_they_pay(void)
{
	struct looked l = {0};
	struct loop_glance kind = {0};
	unsigned may = 0, paid = 0, looked = 0; /* one of 10 us is over at once where this thread loses its processor */
	CHECK(loop_create(&l.loop, NULL) == 0);
	CHECK(!loop_may_glance(l.loop, &kind)); /* no processor is spare */
	loop_set_spare(l.loop, 1);
	for (unsigned i = 0; i < 200; i++)
		if (loop_may_glance(l.loop, &kind) && glance(&l, &kind, 3)) {
			paid++;
			CHECK(l.looks == 4);
		}
	CHECK(paid > 0);
	kind = (struct loop_glance){0};
	for (unsigned i = 0; i < 8 + 10 * 16; i++) {
		if (!loop_may_glance(l.loop, &kind))
			continue;
		may++;
		CHECK(!glance(&l, &kind, UINT32_MAX));
		looked += l.looks > 1;
	}
	CHECK(looked > 0);
	CHECK(may == 8 + 10);
	while (!loop_may_glance(l.loop, &kind))
		may++;
	CHECK(may == 8 + 10 + 15 && glance(&l, &kind, 0));
	for (unsigned i = 0; i < 20; i++)
		CHECK(loop_may_glance(l.loop, &kind) && glance(&l, &kind, 0));
	loop_destroy(l.loop);
}

static void glance_while_parking(void *opaque)
{
	struct looked *l = opaque;
	struct loop_glance kind = {0};
	atomic_store(&l->ready, 1);
	while (atomic_load(&l->ready) != 2)
		sched_yield();
	CHECK(!glance(l, &kind, UINT32_MAX) && l->looks == 1);
}

static void test_a_glance_ends_for_a_park(void)
{
	struct looked l = {0};
	CHECK(loop_create(&l.loop, NULL) == 0);
	pthread_t thread = start(l.loop);
	CHECK(loop_post(l.loop, glance_while_parking, &l) == 0);
	while (atomic_load(&l.ready) != 1)
		sched_yield();
	loop_park_request(l.loop);
	atomic_store(&l.ready, 2);
	loop_park_wait(l.loop);
	loop_unpark(l.loop);
	stop(l.loop, thread);
	loop_destroy(l.loop);
}

int main(void)
{
	alarm(300); /* a lost wakeup is a hang */
	test_polling_loses_nothing_and_ends();
	test_polling_in_vain_becomes_seldom();
	test_making_room_is_not_in_vain();
	test_who_looks_in_vain_steps_aside();
	test_all_rest_while_one_is_helped();
	test_a_polling_loop_parks();
	test_glances_are_where_they_pay();
	test_a_glance_ends_for_a_park();
	return check_report();
}
