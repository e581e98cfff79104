#include "control/events.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/buf.h"
#include "base/clock.h"
#include "control/protocol.h"

struct events {
	pthread_mutex_t lock;
	pthread_cond_t changed; /* on CLOCK_MONOTONIC */
	/* under lock */
	json_t *kept[EVENTS_KEPT]; /* number n at n % EVENTS_KEPT */
	uint64_t last;		   /* number of the newest, 0: none yet */
	bool ended;
};

struct events *events_create(void)
{
	struct events *events = xcalloc(1, sizeof(*events));

	pthread_mutex_init(&events->lock, NULL);
	clock_cond_init(&events->changed);
	return events;
}

void events_destroy(struct events *events)
{
	if (!events)
		return;
	for (size_t i = 0; i < EVENTS_KEPT; i++)
		json_decref(events->kept[i]);
	pthread_cond_destroy(&events->changed);
	pthread_mutex_destroy(&events->lock);
	free(events);
}

/* Under lock. */
static void add(struct events *events, const char *type, json_t *detail)
{
	json_t *event = detail ? detail : json_object();
	uint64_t number = ++events->last;

	json_object_set_new(event, "number", json_integer((json_int_t)number));
	json_object_set_new(event, "time", control_time_to_json(clock_wall_ns()));
	json_object_set_new(event, "type", json_string(type));
	json_decref(events->kept[number % EVENTS_KEPT]);
	events->kept[number % EVENTS_KEPT] = event;
	pthread_cond_broadcast(&events->changed);
}

void events_post(struct events *events, const char *type, json_t *detail)
{
	if (!events) {
		json_decref(detail);
		return;
	}
	pthread_mutex_lock(&events->lock);
	add(events, type, detail);
	pthread_mutex_unlock(&events->lock);
}

void events_end(struct events *events)
{
	if (!events)
		return;
	pthread_mutex_lock(&events->lock);
	if (!events->ended)
		add(events, "ended", NULL);
	events->ended = true;
	pthread_mutex_unlock(&events->lock);
}

/* Under lock, which stands for the documents' reference counts too: what leaves it is a copy. */
static json_t *collect(struct events *events, uint64_t after)
{
	uint64_t first = events->last >= EVENTS_KEPT ? events->last - EVENTS_KEPT + 1 : 1;
	uint64_t lost = after + 1 < first ? first - after - 1 : 0;
	json_t *list = json_array();

	for (uint64_t number = after + 1 < first ? first : after + 1; number <= events->last; number++)
		json_array_append_new(list, json_deep_copy(events->kept[number % EVENTS_KEPT]));
	return json_pack("{s:o, s:I, s:I}", "events", list, "last", (json_int_t)events->last, "lost", (json_int_t)lost);
}

json_t *events_wait(struct events *events, uint64_t after, uint64_t timeout_ns)
{
	uint64_t until_ns = clock_now_ns() + timeout_ns;
	struct timespec until = clock_timespec(until_ns);

	if (!events)
		return json_pack("{s:[], s:i, s:i}", "events", "last", 0, "lost", 0);
	pthread_mutex_lock(&events->lock);
	if (after > events->last)
		after = events->last;
	while (events->last == after && !events->ended && timeout_ns)
		if (pthread_cond_timedwait(&events->changed, &events->lock, &until) == ETIMEDOUT)
			break;
	json_t *result = collect(events, after);
	pthread_mutex_unlock(&events->lock);
	return result;
}
