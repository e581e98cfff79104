/* Blocking system calls in threads, for hosts where io_uring is switched off. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "base/buf.h"
#include "cowdisk/io_internal.h"

enum { WORKERS = 4 };

struct io_threads {
	int event_fd; /* immutable */
	pthread_t workers[WORKERS];
	unsigned count; /* immutable after creation */
	pthread_mutex_t lock;
	pthread_cond_t work;
	/* under lock */
	struct io_op *submitted, **submitted_tail;
	struct io_op *ended, **ended_tail;
	bool stop;
};

static int run_op(const struct io_op *op)
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
		n = pwritev(op->fd, iov, (int)count, offset);
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

static void *worker(void *opaque)
{
	struct io_threads *t = opaque;
	pthread_mutex_lock(&t->lock);
	for (;;) {
		while (!t->submitted && !t->stop)
			pthread_cond_wait(&t->work, &t->lock);
		if (!t->submitted)
			break;
		struct io_op *op = t->submitted;
		t->submitted = op->next;
		if (!t->submitted)
			t->submitted_tail = &t->submitted;
		pthread_mutex_unlock(&t->lock);

		op->result = run_op(op);
		op->next = NULL;

		pthread_mutex_lock(&t->lock);
		*t->ended_tail = op;
		t->ended_tail = &op->next;
		uint64_t one = 1;
		if (write(t->event_fd, &one, sizeof(one)) < 0) {
			/* Only EAGAIN is possible: the counter is full, so the reader wakes up anyway. */
		}
	}
	pthread_mutex_unlock(&t->lock);
	return NULL;
}

int io_threads_create(int event_fd, struct io_threads **out, struct err *err)
{
	struct io_threads *t = xcalloc(1, sizeof(*t));
	t->event_fd = event_fd;
	t->submitted_tail = &t->submitted;
	t->ended_tail = &t->ended;
	pthread_mutex_init(&t->lock, NULL);
	pthread_cond_init(&t->work, NULL);
	while (t->count < WORKERS) {
		int rc = pthread_create(&t->workers[t->count], NULL, worker, t);
		if (rc && t->count == 0) {
			io_threads_destroy(t);
			return err_sys(err, rc, "disk I/O threads");
		}
		if (rc)
			break;
		t->count++;
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
	pthread_cond_broadcast(&t->work);
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < t->count; i++)
		pthread_join(t->workers[i], NULL);
	pthread_cond_destroy(&t->work);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

void io_threads_submit(struct io_threads *t, struct io_op *op)
{
	op->next = NULL;
	pthread_mutex_lock(&t->lock);
	*t->submitted_tail = op;
	t->submitted_tail = &op->next;
	pthread_cond_signal(&t->work);
	pthread_mutex_unlock(&t->lock);
}

struct io_op *io_threads_reap(struct io_threads *t)
{
	pthread_mutex_lock(&t->lock);
	struct io_op *list = t->ended;
	t->ended = NULL;
	t->ended_tail = &t->ended;
	pthread_mutex_unlock(&t->lock);
	return list;
}
