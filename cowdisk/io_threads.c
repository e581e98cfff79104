/*
 * Blocking system calls in threads.
 *
 * An operation joins a lane: a write that of its file, another one of a few. A lane with operations is ready until a thread takes it; the thread
 * carries out all that the lane holds then, and makes it ready again if more has come. A thread is made when a lane is ready and none is idle, so there are
 * never more than lanes.
 *
 * What ended is told as seldom as can be, as each time may wake the I/O thread on the very processor of the worker: when a thread has done all it took,
 * or TELL_NS after it told last; TELL_AWAKE_NS where that thread looks anyway.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/priority.h"
#include "base/spin.h"
#include "cowdisk/io_internal.h"

enum { BESIDE = 4 }; /* so often a thread that may look found itself on the I/O thread's processor: it leaves */
enum { FILE_LANES = 64, OTHER_LANES = 4, LANES = FILE_LANES + OTHER_LANES };
#define TELL_NS	      250000u
#define TELL_AWAKE_NS 20000u /* where the I/O thread looks for what has ended */

struct op_list {
	struct io_op *head, *last;
};

struct lane {
	int fd; /* of a file's lane that is in use */
	struct op_list ops;
	bool taken; /* by a thread */
	bool ready; /* on the list */
	struct lane *next;
};

/*
 * The one idle thread that looks for a lane awake, where there is a processor to spare for it: it need not be woken.
 *
 *     NOBODY -> LOOKING -> NOBODY (nothing came: it sleeps) | CALLED (instead of a token) -> NOBODY
 */
enum looking { NOBODY, LOOKING, CALLED };

struct io_threads {
	int event_fd; /* immutable */
	bool spin;    /* immutable */
	/* owner: I/O thread */
	struct op_list added;
	unsigned turn;	    /* the lane of the next operation that is no write */
	_Atomic bool armed; /* written by the I/O thread */
	_Atomic bool any_ended;
	pthread_mutex_t lock;
	/* A token for each lane that was made ready by the I/O thread. A byte in a pipe, as its reader is woken in the knowledge that its writer will sleep
	 * soon: on that processor, where no other is idle. Where one is to spare (spin) the writer looks on: a semaphore, whose waiter is woken elsewhere. Immutable. */
	int tokens[2];
	sem_t calls;
	/* under lock */
	struct lane lanes[LANES];
	struct lane *ready, **ready_tail;
	unsigned ready_count;
	struct op_list ended;
	pthread_t workers[LANES];
	unsigned count, idle;
	bool stop;
	_Atomic int io_cpu;  /* the I/O thread's processor, lately */
	_Atomic int looking; /* enum looking: written under lock, or by who was called */
};

static void list_append(struct op_list *list, struct op_list more)
{
	if (!more.head)
		return;
	if (list->last)
		list->last->next = more.head;
	else
		list->head = more.head;
	list->last = more.last;
}

static int run_op(struct io_op *op)
{
	unsigned count;
	const struct iovec *iov = io_op_iov(op, &count);
	off_t offset = (off_t)(op->offset + op->transferred);
	ssize_t n = 0;
	switch (op->kind) {
	case IO_READ:
		n = preadv(op->fd, iov, (int)count, offset);
		break;
	case IO_WRITE:
		n = pwritev2(op->fd, iov, (int)count, offset, op->stable ? RWF_DSYNC : 0);
		if (op->syncs && n >= 0 && (uint64_t)n == op->length - op->transferred) {
			op->synced = fdatasync(op->fd) == 0;
			n = op->synced ? n : -1;
		}
		break;
	case IO_SYNC:
		n = fdatasync(op->fd);
		break;
	case IO_PUNCH:
		n = fallocate(op->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, (off_t)op->length);
		break;
	case IO_ZERO:
		n = fallocate(op->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, (off_t)op->length);
		break;
	}
	return n < 0 ? -errno : (int)n;
}

/* Under lock. */
static void lane_ready(struct io_threads *t, struct lane *lane)
{
	if (lane->ready || lane->taken)
		return;
	lane->ready = true;
	lane->next = NULL;
	*t->ready_tail = lane;
	t->ready_tail = &lane->next;
	t->ready_count++;
}

static struct lane *take_lane(struct io_threads *t)
{
	struct lane *lane = t->ready;
	t->ready = lane->next;
	if (!t->ready)
		t->ready_tail = &t->ready;
	lane->ready = false;
	lane->taken = true;
	t->ready_count--;
	return lane;
}

static void tell(struct io_threads *t, struct op_list *done)
{
	pthread_mutex_lock(&t->lock);
	list_append(&t->ended, *done);
	pthread_mutex_unlock(&t->lock);
	*done = (struct op_list){0};
	/* We say what ended, then look whether the I/O thread sleeps; it says that it will sleep, then looks for what ended. */
	atomic_store(&t->any_ended, true);
	uint64_t one = 1;
	if (atomic_load(&t->armed) && write(t->event_fd, &one, sizeof(one)) < 0) {
		/* Only EAGAIN is possible: the counter is full, so the reader wakes up anyway. */
	}
}

static void run_list(struct io_threads *t, struct io_op *op)
{
	struct op_list done = {0};
	uint64_t told_ns = clock_now_ns();
	for (struct io_op *next; op; op = next) {
		next = op->next;
		op->result = run_op(op);
		op->next = NULL;
		list_append(&done, (struct op_list){op, op});
		uint64_t now_ns = next ? clock_now_ns() : 0;
		if (next && now_ns - told_ns < (atomic_load(&t->armed) ? TELL_NS : TELL_AWAKE_NS))
			continue;
		tell(t, &done);
		told_ns = now_ns;
	}
}

static void sleep_for_token(struct io_threads *t)
{
	char token;
	while ((t->spin ? sem_wait(&t->calls) : (int)read(t->tokens[0], &token, 1)) < 0) /* EINTR */
		;
}

static void give_token(struct io_threads *t)
{
	while ((t->spin ? sem_post(&t->calls) : (int)write(t->tokens[1], "", 1)) < 0) /* EINTR */
		;
}

/*
 * Away from the processor on which the I/O thread looks for what we do. Who has come to share it stays there: where processors are busy the scheduler does not
 * search for an idle one, and threads that look keep them so.
 */
static void leave_processor(void)
{
	cpu_set_t allowed, others;
	if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
		return;
	others = allowed;
	CPU_CLR((unsigned)sched_getcpu(), &others);
	if (sched_setaffinity(0, sizeof(others), &others) == 0) /* not if there is no other */
		sched_setaffinity(0, sizeof(allowed), &allowed);
}

static bool beside_io(const struct io_threads *t) { return sched_getcpu() == atomic_load_explicit(&t->io_cpu, memory_order_relaxed); }

/* Under lock. Whether this thread is to look, as none does. */
static bool begin_to_look(struct io_threads *t)
{
	if (!t->spin || atomic_load(&t->looking) != NOBODY)
		return false;
	atomic_store(&t->looking, LOOKING);
	return true;
}

/* Until it is called: true, or the budget is spent. */
static bool look(struct io_threads *t, struct spin *spin)
{
	uint64_t begun_ns = clock_now_ns(), now_ns = begun_ns, budget_ns = beside_io(t) ? 0 : spin_begin(spin, now_ns);
	bool crowded = false;
	while (atomic_load(&t->looking) == LOOKING && now_ns - begun_ns < budget_ns && !crowded) {
		__builtin_ia32_pause();
		uint64_t before_ns = now_ns;
		now_ns = clock_now_ns();
		crowded = spin_in_vain(spin, now_ns - before_ns, now_ns);
	}
	pthread_mutex_lock(&t->lock);
	bool called = atomic_exchange(&t->looking, NOBODY) == CALLED;
	pthread_mutex_unlock(&t->lock);
	if (budget_ns > 0)
		spin_end(spin, called);
	return called;
}

static void *worker(void *opaque)
{
	struct io_threads *t = opaque;
	struct spin spin = {0};
	unsigned beside = 0;
	priority_awaited();
	for (bool more = false, looks = false;;) {
		if (looks && beside_io(t) && ++beside >= BESIDE) {
			leave_processor();
			beside = 0;
		}
		if (!more && !(looks && look(t, &spin)))
			sleep_for_token(t);
		pthread_mutex_lock(&t->lock);
		if (t->stop)
			break;
		t->idle--;
		struct lane *lane = take_lane(t);
		struct io_op *ops = lane->ops.head;
		lane->ops = (struct op_list){0};
		pthread_mutex_unlock(&t->lock);

		run_list(t, ops);

		pthread_mutex_lock(&t->lock);
		lane->taken = false;
		more = lane->ops.head != NULL; /* then it is ready, and this thread takes it, or another one's that was ready before */
		if (more)
			lane_ready(t, lane);
		t->idle++;
		looks = !more && begin_to_look(t);
		pthread_mutex_unlock(&t->lock);
	}
	pthread_mutex_unlock(&t->lock);
	return NULL;
}

/* Under lock. */
static int add_worker(struct io_threads *t)
{
	int rc = pthread_create(&t->workers[t->count], NULL, worker, t);
	t->count += rc == 0;
	t->idle += rc == 0; /* from the start, or one would be made for each look at it until it runs */
	return rc;
}

int io_threads_create(int event_fd, bool spin, struct io_threads **out, struct err *err)
{
	struct io_threads *t = xcalloc(1, sizeof(*t));
	t->event_fd = event_fd;
	t->spin = spin;
	t->ready_tail = &t->ready;
	pthread_mutex_init(&t->lock, NULL);
	t->tokens[0] = t->tokens[1] = -1;
	sem_init(&t->calls, 0, 0);
	int rc = pipe2(t->tokens, O_CLOEXEC) < 0 ? errno : 0;
	if (rc == 0) {
		pthread_mutex_lock(&t->lock);
		rc = add_worker(t);
		pthread_mutex_unlock(&t->lock);
	}
	if (rc) {
		io_threads_destroy(t);
		return err_sys(err, rc, "disk I/O threads");
	}
	*out = t;
	return 0;
}

void io_threads_destroy(struct io_threads *t)
{
	if (!t)
		return;
	pthread_mutex_lock(&t->lock);
	t->stop = true;
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < t->count; i++)
		give_token(t);
	for (unsigned i = 0; i < t->count; i++)
		pthread_join(t->workers[i], NULL);
	for (unsigned i = 0; i < 2 && t->tokens[i] >= 0; i++)
		close(t->tokens[i]);
	sem_destroy(&t->calls);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

/* The file's own, as long as there are enough. */
static struct lane *lane_for(struct io_threads *t, const struct io_op *op)
{
	if (op->kind != IO_WRITE)
		return &t->lanes[FILE_LANES + t->turn++ % OTHER_LANES];
	for (unsigned i = 0; i < FILE_LANES; i++) {
		struct lane *lane = &t->lanes[((unsigned)op->fd + i) % FILE_LANES];
		bool used = lane->ready || lane->taken;
		if (!used)
			lane->fd = op->fd;
		if (lane->fd == op->fd)
			return lane;
	}
	return &t->lanes[(unsigned)op->fd % FILE_LANES];
}

void io_threads_add(struct io_threads *t, struct io_op *op)
{
	op->next = NULL;
	list_append(&t->added, (struct op_list){op, op});
}

void io_threads_go(struct io_threads *t)
{
	if (!t->added.head)
		return;
	if (t->spin)
		atomic_store_explicit(&t->io_cpu, sched_getcpu(), memory_order_relaxed);
	pthread_mutex_lock(&t->lock);
	unsigned before = t->ready_count;
	for (struct io_op *op = t->added.head, *next; op; op = next) {
		next = op->next;
		op->next = NULL;
		struct lane *lane = lane_for(t, op);
		list_append(&lane->ops, (struct op_list){op, op});
		lane_ready(t, lane);
	}
	t->added = (struct op_list){0};
	unsigned wake = t->ready_count - before;
	/* Who is idle may have been woken for another lane, and not have taken it yet. If no thread can be made, the lane waits for one that is done. */
	while (t->ready_count > t->idle && t->count < LANES && add_worker(t) == 0)
		;
	int looking = LOOKING;
	if (wake > 0 && atomic_compare_exchange_strong(&t->looking, &looking, CALLED))
		wake--;
	pthread_mutex_unlock(&t->lock);
	for (; wake > 0; wake--) /* without the lock, which is the first that who wakes up asks for */
		give_token(t);
}

struct io_op *io_threads_reap(struct io_threads *t)
{
	atomic_store(&t->any_ended, false);
	pthread_mutex_lock(&t->lock);
	struct io_op *list = t->ended.head;
	t->ended = (struct op_list){0};
	pthread_mutex_unlock(&t->lock);
	return list;
}

bool io_threads_ended(const struct io_threads *t) { return atomic_load(&t->any_ended); }
void io_threads_arm(struct io_threads *t, bool armed) { atomic_store(&t->armed, armed); }
