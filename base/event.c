/*
 * State, under `lock`:
 *
 *     IDLE --loop_run--> RUNNING --loop_stop--> IDLE        IDLE --loop_call--> BORROWED --fn returned--> IDLE
 *
 * Parking: park_count is raised and lowered under the lock and read without it between callbacks (one load). The
 * loop's thread sets `parked` under the lock and stands until the count is 0. It counts as parked, too, while the
 * state is IDLE: loop_run looks at the count before its first callback, so a loop that starts in between parks at once.
 * And while it sleeps in epoll_wait (`asleep`, under the lock): whatever wakes it, it looks at the count first. So an
 * idle loop is parked without being woken.
 *
 * No wakeup is lost: whoever raises the count, posts or stops does so before it writes the eventfd, and the loop's
 * thread looks at all three after it read the eventfd and before it sleeps in epoll_wait.
 */
#include "base/event.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/event_internal.h"

enum { BATCH = 32 };

enum loop_state { LOOP_IDLE, LOOP_RUNNING, LOOP_BORROWED };

struct loop_source {
	int fd;
	loop_fn *fn;
	void *opaque;
	struct loop_source *next, *previous;
};

struct task {
	loop_task_fn *fn;
	void *opaque;
	struct task *next;
	bool caller_waits; /* the node is on the stack of loop_call, which reads `done` */
	bool done;	   /* under lock */
};

struct loop {
	/* Immutable after loop_create. */
	int epoll_fd;
	int wake_fd;

	/* Owner: the loop's thread. */
	struct loop_source *sources;
	struct epoll_event batch[BATCH];
	int batch_length;
	struct polling polling;

	/* Written under lock, read by anyone. */
	_Atomic unsigned park_count;
	_Atomic bool stop;
	_Atomic(const void *) owner; /* thread_mark() of the thread that runs callbacks */

	pthread_mutex_t lock; /* innermost: nothing is called with it held */
	/* Under lock. */
	enum loop_state state;
	bool parked;
	bool asleep;	    /* in epoll_wait, or on the way in or out */
	const void *parker; /* thread_mark() of who raised park_count from 0 */
	struct task *tasks;
	struct task **tasks_end;
	pthread_cond_t standing; /* parked became true, or state IDLE */
	pthread_cond_t released; /* park_count became 0 */
	pthread_cond_t finished; /* a task of loop_call is done, state IDLE, or park_count 0 */
};

/* An address that no two threads share at one time. */
static const void *thread_mark(void)
{
	static _Thread_local char mark;
	return &mark;
}

static void wake(struct loop *loop)
{
	uint64_t one = 1;
	/* EAGAIN: the counter is full, so the loop is awake anyway. */
	while (write(loop->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

int loop_create(struct loop **out, struct err *err)
{
	struct loop *loop = xcalloc(1, sizeof(*loop));
	int ret;

	loop->tasks_end = &loop->tasks;
	loop->polling.loop = loop;
	pthread_mutex_init(&loop->lock, NULL);
	pthread_cond_init(&loop->standing, NULL);
	pthread_cond_init(&loop->released, NULL);
	pthread_cond_init(&loop->finished, NULL);
	loop->wake_fd = -1;
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (loop->epoll_fd < 0) {
		ret = err_sys(err, errno, "event loop: epoll_create1");
		goto out;
	}
	loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (loop->wake_fd < 0) {
		ret = err_sys(err, errno, "event loop: eventfd");
		goto out;
	}
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
	if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, loop->wake_fd, &event) < 0) {
		ret = err_sys(err, errno, "event loop: epoll_ctl");
		goto out;
	}
	*out = loop;
	return 0;
out:
	loop_destroy(loop);
	return ret;
}

void loop_destroy(struct loop *loop)
{
	if (loop == NULL)
		return;
	assert(loop->state == LOOP_IDLE);
	while (loop->sources != NULL) {
		struct loop_source *source = loop->sources;
		loop->sources = source->next;
		free(source);
	}
	polling_clear(&loop->polling);
	while (loop->tasks != NULL) {
		struct task *task = loop->tasks;
		loop->tasks = task->next;
		free(task);
	}
	if (loop->wake_fd >= 0)
		close(loop->wake_fd);
	if (loop->epoll_fd >= 0)
		close(loop->epoll_fd);
	pthread_cond_destroy(&loop->finished);
	pthread_cond_destroy(&loop->released);
	pthread_cond_destroy(&loop->standing);
	pthread_mutex_destroy(&loop->lock);
	free(loop);
}

/* --- sources --- */

int loop_add(struct loop *loop, int fd, uint32_t events, loop_fn *fn, void *opaque, struct loop_source **out,
	     struct err *err)
{
	struct loop_source *source = xcalloc(1, sizeof(*source));
	struct epoll_event event = {.events = events, .data.ptr = source};

	*source = (struct loop_source){.fd = fd, .fn = fn, .opaque = opaque, .next = loop->sources};
	if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
		int number = errno;
		free(source);
		return err_sys(err, number, "event loop: watching descriptor %d", fd);
	}
	if (loop->sources != NULL)
		loop->sources->previous = source;
	loop->sources = source;
	if (out != NULL)
		*out = source;
	return 0;
}

int loop_modify(struct loop *loop, struct loop_source *source, uint32_t events, struct err *err)
{
	struct epoll_event event = {.events = events, .data.ptr = source};

	if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_MOD, source->fd, &event) < 0)
		return err_sys(err, errno, "event loop: watching descriptor %d", source->fd);
	return 0;
}

void loop_remove(struct loop *loop, struct loop_source *source)
{
	if (source == NULL)
		return;
	/* Fails where the caller closed the descriptor first, which took it out of the epoll set. */
	epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, source->fd, NULL);
	for (int i = 0; i < loop->batch_length; i++) {
		if (loop->batch[i].data.ptr == source)
			loop->batch[i].data.ptr = NULL;
	}
	if (source->next != NULL)
		source->next->previous = source->previous;
	if (source->previous != NULL)
		source->previous->next = source->next;
	else
		loop->sources = source->next;
	free(source);
}

/* --- parking --- */

/* Under lock. */
static void stand(struct loop *loop)
{
	while (atomic_load_explicit(&loop->park_count, memory_order_relaxed) > 0) {
		if (!loop->parked) {
			loop->parked = true;
			pthread_cond_broadcast(&loop->standing);
		}
		pthread_cond_wait(&loop->released, &loop->lock);
	}
	loop->parked = false;
}

bool loop_is_to_park(const struct loop *loop) { return atomic_load_explicit(&loop->park_count, memory_order_acquire) > 0; }

/* Every place between two callbacks. */
bool loop_park_point(struct loop *loop)
{
	if (__builtin_expect(!loop_is_to_park(loop), 1))
		return false;
	pthread_mutex_lock(&loop->lock);
	stand(loop);
	pthread_mutex_unlock(&loop->lock);
	return true;
}

void loop_park_request(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	if (atomic_fetch_add_explicit(&loop->park_count, 1, memory_order_release) == 0)
		loop->parker = thread_mark();
	bool running = loop->state == LOOP_RUNNING && !loop->parked && !loop->asleep;
	pthread_mutex_unlock(&loop->lock);
	if (running)
		wake(loop);
}

void loop_park_wait(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	assert(atomic_load(&loop->park_count) > 0 && !loop_in_thread(loop));
	while (loop->state != LOOP_IDLE && !loop->parked && !loop->asleep)
		pthread_cond_wait(&loop->standing, &loop->lock);
	pthread_mutex_unlock(&loop->lock);
}

void loop_unpark(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	unsigned before = atomic_fetch_sub_explicit(&loop->park_count, 1, memory_order_release);
	assert(before > 0);
	if (before == 1) {
		loop->parker = NULL;
		pthread_cond_signal(&loop->released);
		pthread_cond_broadcast(&loop->finished);
	}
	pthread_mutex_unlock(&loop->lock);
}

/* --- tasks --- */

static void append_task(struct loop *loop, struct task *task)
{
	bool was_empty = loop->tasks == NULL;
	*loop->tasks_end = task;
	loop->tasks_end = &task->next;
	/* Within the lock, so that whoever finds the queue not empty knows that the loop has been woken. */
	if (was_empty)
		wake(loop);
}

static struct task *take_task(struct loop *loop)
{
	struct task *task = loop->tasks;
	if (task != NULL) {
		loop->tasks = task->next;
		if (loop->tasks == NULL)
			loop->tasks_end = &loop->tasks;
	}
	return task;
}

/* False if it is not there: another thread took it. */
static bool withdraw_task(struct loop *loop, struct task *task)
{
	for (struct task **at = &loop->tasks; *at != NULL; at = &(*at)->next) {
		if (*at == task) {
			*at = task->next;
			if (*at == NULL)
				loop->tasks_end = at;
			return true;
		}
	}
	return false;
}

/* At most as many tasks as wait now, so that a task that posts itself does not starve the descriptors. */
static void run_tasks(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	struct task **last = loop->tasks_end;
	struct task *task;
	bool more = loop->tasks != NULL;
	while (more && !atomic_load(&loop->stop)) {
		pthread_mutex_unlock(&loop->lock);
		loop_park_point(loop);
		pthread_mutex_lock(&loop->lock);
		if (atomic_load(&loop->stop) || (task = take_task(loop)) == NULL)
			break;
		more = &task->next != last && loop->tasks != NULL;
		pthread_mutex_unlock(&loop->lock);
		task->fn(task->opaque);
		bool caller_waits = task->caller_waits;
		if (!caller_waits)
			free(task);
		pthread_mutex_lock(&loop->lock);
		if (caller_waits) {
			task->done = true;
			pthread_cond_broadcast(&loop->finished);
		}
	}
	pthread_mutex_unlock(&loop->lock);
}

int loop_post(struct loop *loop, loop_task_fn *fn, void *opaque)
{
	struct task *task = malloc(sizeof(*task));
	if (task == NULL)
		return -ENOMEM;
	*task = (struct task){.fn = fn, .opaque = opaque};
	pthread_mutex_lock(&loop->lock);
	append_task(loop, task);
	pthread_mutex_unlock(&loop->lock);
	return 0;
}

/* Called and returns with the lock held, the state IDLE. */
static void run_borrowed(struct loop *loop, loop_task_fn *fn, void *opaque)
{
	loop->state = LOOP_BORROWED;
	atomic_store(&loop->owner, thread_mark());
	pthread_mutex_unlock(&loop->lock);
	fn(opaque);
	pthread_mutex_lock(&loop->lock);
	loop->state = LOOP_IDLE;
	atomic_store(&loop->owner, NULL);
	pthread_cond_broadcast(&loop->finished);
	pthread_cond_broadcast(&loop->standing);
}

void loop_call(struct loop *loop, loop_task_fn *fn, void *opaque)
{
	if (loop_in_thread(loop)) {
		fn(opaque);
		return;
	}

	struct task task = {.fn = fn, .opaque = opaque, .caller_waits = true};
	bool queued = false;
	pthread_mutex_lock(&loop->lock);
	while (!task.done) {
		/* A loop that does not run is kept still by a park, too, but not for the thread that parked it. */
		bool still = atomic_load(&loop->park_count) > 0 && loop->parker != thread_mark();
		if (loop->state == LOOP_IDLE && !still) {
			/* Not running, or it stopped before it came to our task. */
			if (queued)
				withdraw_task(loop, &task);
			run_borrowed(loop, fn, opaque);
			break;
		}
		if (loop->state == LOOP_RUNNING && !queued) {
			append_task(loop, &task);
			queued = true;
		}
		pthread_cond_wait(&loop->finished, &loop->lock);
	}
	pthread_mutex_unlock(&loop->lock);
}

bool loop_is_stopping(struct loop *loop) { return atomic_load_explicit(&loop->stop, memory_order_relaxed); }

void loop_add_poller(struct loop *loop, const struct loop_poller_ops *ops, void *opaque, struct loop_poller **out)
{
	*out = polling_add(&loop->polling, ops, opaque);
}

void loop_remove_poller(struct loop *loop, struct loop_poller *poller)
{
	if (poller != NULL)
		polling_remove(&loop->polling, poller);
}

void loop_set_spare(struct loop *loop, unsigned processors) { loop->polling.spare = processors; }
unsigned loop_spare(const struct loop *loop) { return loop->polling.spare; }

bool loop_may_glance(const struct loop *loop, struct loop_glance *glance) { return polling_may_glance(&loop->polling, glance); }
bool loop_glance(const struct loop *loop, struct loop_glance *glance, bool (*look)(void *opaque), void *opaque)
{
	return polling_glance(&loop->polling, glance, look, opaque);
}

void loop_set_aside(struct loop *loop, loop_task_fn *fn, void *opaque)
{
	loop->polling.step_aside = fn;
	loop->polling.aside_opaque = opaque;
}

/* --- running --- */

static void drain_wake(struct loop *loop)
{
	uint64_t count;
	while (read(loop->wake_fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

/* Returns whether tasks wait. */
static bool fall_asleep(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	stand(loop);
	loop->asleep = true;
	bool wait = loop->tasks != NULL;
	pthread_mutex_unlock(&loop->lock);
	return wait;
}

static void wake_up(struct loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	stand(loop);
	loop->asleep = false;
	pthread_mutex_unlock(&loop->lock);
}

static void dispatch(struct loop *loop)
{
	for (int i = 0; i < loop->batch_length && !atomic_load(&loop->stop); i++) {
		loop_park_point(loop);
		struct loop_source *source = loop->batch[i].data.ptr; /* after parking; NULL once removed */
		if (source != NULL)
			source->fn(source->opaque, loop->batch[i].events);
	}
	loop->batch_length = 0;
}

static int wait_events(struct loop *loop, bool sleep)
{
	if (fall_asleep(loop))
		sleep = false;
	return epoll_wait(loop->epoll_fd, loop->batch, BATCH, sleep ? -1 : 0);
}

static int run(struct loop *loop, struct err *err)
{
	while (!atomic_load(&loop->stop)) {
		loop_park_point(loop);
		run_tasks(loop);
		if (atomic_load(&loop->stop))
			break;
		int n = wait_events(loop, !polling_look(&loop->polling));
		int number = errno;
		wake_up(loop);
		if (n < 0 && number == EINTR)
			continue;
		if (n < 0)
			return err_sys(err, number, "event loop: epoll_wait");
		loop->batch_length = n;
		loop->polling.told |= n > 0;
		for (int i = 0; i < n; i++) {
			if (loop->batch[i].data.ptr == NULL)
				drain_wake(loop);
		}
		dispatch(loop);
	}
	return 0;
}

int loop_run(struct loop *loop, struct err *err)
{
	pthread_mutex_lock(&loop->lock);
	while (loop->state == LOOP_BORROWED)
		pthread_cond_wait(&loop->finished, &loop->lock);
	assert(loop->state == LOOP_IDLE);
	loop->state = LOOP_RUNNING;
	atomic_store(&loop->owner, thread_mark());
	pthread_mutex_unlock(&loop->lock);

	int ret = run(loop, err);

	loop_park_point(loop);
	pthread_mutex_lock(&loop->lock);
	loop->state = LOOP_IDLE;
	atomic_store(&loop->owner, NULL);
	atomic_store(&loop->stop, false);
	pthread_cond_broadcast(&loop->standing);
	pthread_cond_broadcast(&loop->finished);
	pthread_mutex_unlock(&loop->lock);
	return ret;
}

void loop_stop(struct loop *loop)
{
	atomic_store(&loop->stop, true);
	wake(loop);
}

bool loop_in_thread(const struct loop *loop) { return atomic_load(&loop->owner) == thread_mark(); }
