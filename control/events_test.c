/* Events: nothing is missed or told twice, those that wait are woken, a client that is too late is told what it lost. */
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "control/events.h"
#include "tests/lib/check.h"

#define SECOND	 1000000000ull
#define FOREVER (3600 * SECOND)

static uint64_t last_of(const json_t *answer) { return (uint64_t)json_integer_value(json_object_get(answer, "last")); }

static size_t count_of(const json_t *answer) { return json_array_size(json_object_get(answer, "events")); }

static const char *type_of(const json_t *answer, size_t i)
{
	return json_string_value(json_object_get(json_array_get(json_object_get(answer, "events"), i), "type"));
}

static void test_in_order(void)
{
	struct events *events = events_create();

	events_post(events, "one", NULL);
	events_post(events, "two", json_pack("{s:s}", "checkpoint", "abc"));
	json_t *answer = events_wait(events, 0, FOREVER);
	CHECK(count_of(answer) == 2 && last_of(answer) == 2);
	CHECK(!strcmp(type_of(answer, 0), "one") && !strcmp(type_of(answer, 1), "two"));
	json_decref(answer);
	answer = events_wait(events, 1, FOREVER);
	CHECK(count_of(answer) == 1 && !strcmp(type_of(answer, 0), "two"));
	json_decref(answer);
	answer = events_wait(events, UINT64_MAX, 0); /* from now on */
	CHECK(count_of(answer) == 0 && last_of(answer) == 2);
	json_decref(answer);
	answer = events_wait(events, 2, 1000000);
	CHECK(count_of(answer) == 0 && last_of(answer) == 2);
	json_decref(answer);
	events_destroy(events);
}

static void test_lost(void)
{
	struct events *events = events_create();

	for (unsigned i = 0; i < EVENTS_KEPT + 10; i++)
		events_post(events, "many", NULL);
	json_t *answer = events_wait(events, 3, 0);
	CHECK(count_of(answer) == EVENTS_KEPT);
	CHECK(json_integer_value(json_object_get(answer, "lost")) == 7);
	CHECK(last_of(answer) == EVENTS_KEPT + 10);
	json_decref(answer);
	events_destroy(events);
}

static void *wait_main(void *opaque)
{
	uint64_t seen = 0;
	size_t count = 0;

	for (;;) {
		json_t *answer = events_wait(opaque, seen, FOREVER);

		CHECK(count_of(answer) > 0);
		count += count_of(answer);
		seen = last_of(answer);
		bool ended = !strcmp(type_of(answer, count_of(answer) - 1), "ended");
		json_decref(answer);
		if (ended)
			break;
	}
	CHECK(count == 101);
	return NULL;
}

static void test_waiters(void)
{
	struct events *events = events_create();
	pthread_t threads[4];

	for (unsigned i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, wait_main, events) == 0);
	for (unsigned i = 0; i < 100; i++)
		events_post(events, "tick", json_object());
	events_end(events);
	events_end(events); /* once is enough */
	for (unsigned i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	json_t *answer = events_wait(events, 101, FOREVER); /* at once, as nothing will come */
	CHECK(count_of(answer) == 0);
	json_decref(answer);
	events_destroy(events);
}

int main(void)
{
	test_in_order();
	test_lost();
	test_waiters();
	events_post(NULL, "nobody", json_object());
	return check_report();
}
