/* Threads that sleep between operations, and threads that look for the next one. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "cowdisk/io_internal.h"

enum { FILES = 3, OPS = 4, TURNS = 1500 };

struct fixture {
	struct io_threads *threads;
	int event_fd, fds[FILES];
	struct io_op ops[OPS];
	uint64_t numbers[OPS];
	struct iovec iov[OPS];
};

static void setup(struct fixture *f, bool spin)
{
	f->event_fd = eventfd(0, EFD_CLOEXEC);
	cr_assert_eq(io_threads_create(f->event_fd, spin, &f->threads, NULL), 0);
	for (unsigned i = 0; i < FILES; i++) {
		char path[] = "/tmp/vmcp-io-threads-XXXXXX";
		f->fds[i] = mkstemp(path);
		cr_assert_geq(f->fds[i], 0);
		unlink(path);
	}
}

static void teardown(struct fixture *f)
{
	io_threads_destroy(f->threads);
	close(f->event_fd);
	for (unsigned i = 0; i < FILES; i++)
		close(f->fds[i]);
}

static void add_write(struct fixture *f, unsigned i, uint64_t number)
{
	f->numbers[i] = number;
	f->iov[i] = (struct iovec){&f->numbers[i], sizeof(number)};
	f->ops[i] = (struct io_op){.kind = IO_WRITE,
				   .fd = f->fds[i % FILES],
				   .offset = i * 8,
				   .length = 8,
				   .iov = &f->iov[i],
				   .iov_count = 1};
	io_threads_add(f->threads, &f->ops[i]);
}

/* Sleeps as the I/O thread does (armed), or looks. */
static void reap_all(struct fixture *f, bool sleeps)
{
	for (unsigned ended = 0; ended < OPS;) {
		uint64_t count;
		io_threads_arm(f->threads, sleeps);
		if (sleeps && !io_threads_ended(f->threads))
			cr_assert_eq(read(f->event_fd, &count, sizeof(count)), (ssize_t)sizeof(count));
		if (!io_threads_ended(f->threads))
			continue;
		for (struct io_op *op = io_threads_reap(f->threads); op; op = op->next, ended++)
			cr_assert_eq(op->result, 8);
	}
}

static void pause_ns(long ns)
{
	if (ns > 0)
		nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}

Test(io_threads, nothing_is_lost_whatever_the_pauses)
{
	static const long pauses[] = {0, 1, 30000, 70000, 200000};
	for (unsigned spin = 0; spin < 2; spin++) {
		struct fixture f;
		setup(&f, spin);
		for (uint64_t turn = 1; turn <= TURNS; turn++) {
			for (unsigned i = 0; i < OPS; i++)
				add_write(&f, i, turn);
			io_threads_go(f.threads);
			reap_all(&f, turn % 2);
			pause_ns(pauses[turn % ARRAY_LENGTH(pauses)]);
		}
		for (unsigned i = 0; i < OPS; i++) {
			uint64_t number = 0;
			cr_expect_eq(pread(f.fds[i % FILES], &number, 8, i * 8), 8);
			cr_expect_eq(number, TURNS);
		}
		teardown(&f);
	}
}

/* Some look when they are told to end, some sleep, and some have not begun. */
Test(io_threads, they_end)
{
	for (unsigned n = 0; n < 100; n++) {
		struct fixture f;
		setup(&f, n % 2);
		for (unsigned i = 0; i < OPS; i++)
			add_write(&f, i, n);
		io_threads_go(f.threads);
		reap_all(&f, false);
		pause_ns((long)(n % 3) * 60000);
		teardown(&f);
	}
}

Test(io_threads, a_write_that_syncs_says_so)
{
	struct fixture f;
	setup(&f, false);
	for (unsigned i = 0; i < OPS; i++) {
		add_write(&f, i, 1);
		f.ops[i].syncs = i % 2;
	}
	io_threads_go(f.threads);
	reap_all(&f, true);
	for (unsigned i = 0; i < OPS; i++)
		cr_expect_eq(f.ops[i].synced, i % 2);

	/* Of a pipe there is nothing to sync, and no place to write at. */
	int pipe_fds[2];
	cr_assert_eq(pipe(pipe_fds), 0);
	add_write(&f, 0, 1);
	f.ops[0].fd = pipe_fds[1];
	f.ops[0].syncs = true;
	io_threads_go(f.threads);
	struct io_op *op = NULL;
	while (!(op = io_threads_reap(f.threads)))
		;
	cr_expect_lt(op->result, 0);
	cr_expect_not(op->synced);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	teardown(&f);
}
