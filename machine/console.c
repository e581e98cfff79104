#include "machine/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"

#define TYPED_BYTES 4096
#define FLUSH_NS    2000000000ull
/* A guest prints byte by byte: what comes within this time of the first is passed on at once. */
#define GATHER_NS 1000000

struct watcher {
	struct console_watcher given;
	int own_fd;	   /* a non-blocking description of given.out_fd's terminal or pipe, or -1 */
	uint64_t position; /* of the next byte it gets, in the ring's count */
	bool used, typing;
};

struct console {
	pthread_t thread;
	int wake_fd; /* eventfd */
	pthread_mutex_t lock;
	/* under lock */
	uint8_t *ring;
	uint64_t written; /* bytes ever put into the ring */
	bool stopping;
	bool wake_pending; /* the eventfd is set already: spares the guest a system call a byte */
	console_input_fn *input;
	void *input_opaque;
	bool input_busy; /* a call of input is under way */
	pthread_cond_t input_idle;
	struct watcher watchers[CONSOLE_MAX_WATCHERS];
	unsigned order[CONSOLE_MAX_WATCHERS]; /* indices of used watchers, oldest first */
	unsigned count;
	/* owner: the console's thread */
	uint8_t typed[TYPED_BYTES];
	size_t typed_length;
};

static void wake(struct console *console)
{
	uint64_t one = 1;

	if (console->wake_pending)
		return;
	console->wake_pending = true;
	/* The counter cannot overflow, as it is set at most once between two reads. */
	(void)!write(console->wake_fd, &one, sizeof(one));
}

void console_output(struct console *console, const uint8_t *data, size_t length)
{
	pthread_mutex_lock(&console->lock);
	for (size_t i = 0; i < length; i++)
		console->ring[console->written++ % CONSOLE_RING_BYTES] = data[i];
	wake(console);
	pthread_mutex_unlock(&console->lock);
}

void console_room(struct console *console)
{
	pthread_mutex_lock(&console->lock);
	wake(console);
	pthread_mutex_unlock(&console->lock);
}

void console_set_guest(struct console *console, console_input_fn *input, void *opaque)
{
	pthread_mutex_lock(&console->lock);
	while (console->input_busy)
		pthread_cond_wait(&console->input_idle, &console->lock);
	console->input = input;
	console->input_opaque = opaque;
	wake(console);
	pthread_mutex_unlock(&console->lock);
}

/*
 * A terminal or pipe that is nearly full would block a write for as long as nobody reads, whatever poll said, and with
 * it every other watcher. Not to be mended with O_NONBLOCK on the descriptor itself, as other processes share that. -1
 * where there is no need or no right.
 */
static int open_again(int fd)
{
	char path[32];
	struct stat st;

	if (!isatty(fd) && (fstat(fd, &st) || !S_ISFIFO(st.st_mode)))
		return -1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

int console_attach(struct console *console, const struct console_watcher *given, struct err *err)
{
	int own_fd = open_again(given->out_fd);
	int rc = 0;

	pthread_mutex_lock(&console->lock);
	if (console->count == CONSOLE_MAX_WATCHERS) {
		rc = err_set(err, ERR_STATE, EBUSY, "console: %d watchers are attached already", CONSOLE_MAX_WATCHERS);
		goto out;
	}
	unsigned slot = 0;
	while (console->watchers[slot].used)
		slot++;
	struct watcher *watcher = &console->watchers[slot];
	uint64_t back = min_u64(min_u64(given->scrollback_bytes, console->written), CONSOLE_RING_BYTES);
	*watcher = (struct watcher){.given = *given,
				    .own_fd = own_fd,
				    .position = console->written - back,
				    .used = true,
				    .typing = given->in_fd >= 0};
	own_fd = -1;
	console->order[console->count++] = slot;
	wake(console);
out:
	pthread_mutex_unlock(&console->lock);
	if (own_fd >= 0)
		close(own_fd);
	return rc;
}

size_t console_tail(struct console *console, char *text, size_t size)
{
	if (size == 0)
		return 0;
	pthread_mutex_lock(&console->lock);
	uint64_t length = min_u64(min_u64(size - 1, console->written), CONSOLE_RING_BYTES);
	for (uint64_t i = 0; i < length; i++)
		text[i] = (char)console->ring[(console->written - length + i) % CONSOLE_RING_BYTES];
	text[length] = '\0';
	pthread_mutex_unlock(&console->lock);
	return (size_t)length;
}

/* Under lock. */
static void drop_watcher(struct console *console, unsigned slot)
{
	struct watcher *watcher = &console->watchers[slot];

	if (watcher->own_fd >= 0)
		close(watcher->own_fd);
	if (watcher->given.owned) {
		close(watcher->given.out_fd);
		if (watcher->given.in_fd >= 0 && watcher->given.in_fd != watcher->given.out_fd)
			close(watcher->given.in_fd);
	}
	watcher->used = false;
	for (unsigned i = 0, kept = 0; i < console->count; i++)
		if (console->order[i] != slot)
			console->order[kept++] = console->order[i];
	console->count--;
}

/* Does not wait where that can be had: for sockets, and for what open_again opened. */
static ssize_t write_some(const struct watcher *watcher, const uint8_t *bytes, size_t length)
{
	ssize_t done;

	if (watcher->own_fd >= 0)
		return write(watcher->own_fd, bytes, length);
	done = send(watcher->given.out_fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
	return done < 0 && errno == ENOTSOCK ? write(watcher->given.out_fd, bytes, length) : done;
}

/*
 * Under lock, which is given up for the write: it may block after all, and the guest must not wait for it. Only this thread drops
 * watchers, so the slot stays. False if the watcher is gone.
 */
static bool feed_watcher(struct console *console, struct watcher *watcher)
{
	uint8_t bytes[4096];
	uint64_t behind = console->written - watcher->position, next = watcher->position;
	size_t length;
	bool lost = behind > CONSOLE_RING_BYTES;

	if (lost) {
		length = (size_t)snprintf((char *)bytes, sizeof(bytes), "\r\n[%llu bytes of output lost]\r\n",
					  (unsigned long long)(behind - CONSOLE_RING_BYTES));
		next = console->written - CONSOLE_RING_BYTES;
	} else {
		uint64_t start = watcher->position % CONSOLE_RING_BYTES;

		length = (size_t)min_u64(min_u64(behind, CONSOLE_RING_BYTES - start), sizeof(bytes));
		memcpy(bytes, console->ring + start, length);
	}
	pthread_mutex_unlock(&console->lock);
	ssize_t done = write_some(watcher, bytes, length);
	int number = errno;
	pthread_mutex_lock(&console->lock);
	if (done < 0)
		return number == EAGAIN || number == EINTR;
	watcher->position = lost ? next : next + (uint64_t)done;
	return true;
}

/* Under lock. Reads what is typed; false if the watcher is gone. */
static bool hear_watcher(struct console *console, struct watcher *watcher)
{
	uint8_t bytes[256];
	size_t room = sizeof(console->typed) - console->typed_length;
	ssize_t done = read(watcher->given.in_fd, bytes, room < sizeof(bytes) ? room : sizeof(bytes));

	if (done < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (done <= 0) { /* a failure is for ever too: a closed descriptor, a terminal that hung up */
		watcher->typing = false;
		return !watcher->given.owned;
	}
	for (ssize_t i = 0; i < done; i++) {
		if (watcher->given.escape >= 0 && bytes[i] == watcher->given.escape)
			watcher->given.escaped(watcher->given.opaque);
		else
			console->typed[console->typed_length++] = bytes[i];
	}
	return true;
}

/* Under lock, which is given up for the call: the serial port calls console_output under a lock of its own. */
static void type_to_guest(struct console *console)
{
	console_input_fn *input = console->input;
	void *opaque = console->input_opaque;

	if (!input || console->typed_length == 0)
		return;
	console->input_busy = true;
	pthread_mutex_unlock(&console->lock);
	size_t taken = input(opaque, console->typed, console->typed_length);
	memmove(console->typed, console->typed + taken, console->typed_length - taken);
	console->typed_length -= taken;
	pthread_mutex_lock(&console->lock);
	console->input_busy = false;
	pthread_cond_broadcast(&console->input_idle);
}

/* Under lock. Fills the poll list; entry 2 * i is the output, 2 * i + 1 the input of the i-th oldest watcher. */
static void prepare_poll(struct console *console, struct pollfd *list)
{
	bool heard = console->typed_length == sizeof(console->typed);

	for (unsigned i = 0; i < console->count; i++) {
		struct watcher *watcher = &console->watchers[console->order[i]];
		bool hear = watcher->typing && !heard;

		list[2 * i] = (struct pollfd){.fd = watcher->position < console->written ? watcher->given.out_fd : -1,
					      .events = POLLOUT};
		list[2 * i + 1] = (struct pollfd){.fd = hear ? watcher->given.in_fd : -1, .events = POLLIN};
		/* A watcher that is not heard is still noticed when it hangs up. */
		if (!hear && watcher->given.owned && list[2 * i].fd < 0)
			list[2 * i] = (struct pollfd){.fd = watcher->given.out_fd, .events = POLLRDHUP};
		heard = heard || hear;
	}
}

static void serve(struct console *console, const struct pollfd *list, const unsigned *slots, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct watcher *watcher = &console->watchers[slots[i]];
		bool alive = true;

		if (list[2 * i + 1].revents & (POLLIN | POLLHUP | POLLERR | POLLNVAL))
			alive = hear_watcher(console, watcher);
		if (alive && list[2 * i].revents & POLLOUT)
			alive = feed_watcher(console, watcher);
		else if (alive && list[2 * i].revents & (POLLERR | POLLHUP | POLLRDHUP | POLLNVAL))
			alive = false;
		if (!alive)
			drop_watcher(console, slots[i]);
	}
}

static void *console_main(void *opaque)
{
	struct console *console = opaque;
	struct pollfd list[2 * CONSOLE_MAX_WATCHERS + 1];
	unsigned slots[CONSOLE_MAX_WATCHERS];

	pthread_mutex_lock(&console->lock);
	while (!console->stopping) {
		type_to_guest(console); /* gives up the lock: watchers may come */
		unsigned count = console->count;
		prepare_poll(console, list);
		memcpy(slots, console->order, sizeof(slots));
		list[2 * count] = (struct pollfd){.fd = console->wake_fd, .events = POLLIN};
		pthread_mutex_unlock(&console->lock);
		int ready = poll(list, 2 * count + 1, -1);
		if (ready > 0 && (list[2 * count].revents & POLLIN))
			nanosleep(&(struct timespec){.tv_nsec = GATHER_NS}, NULL);
		pthread_mutex_lock(&console->lock);
		if (ready < 0)
			continue;
		if (list[2 * count].revents & POLLIN) {
			uint64_t value;

			(void)!read(console->wake_fd, &value, sizeof(value));
			console->wake_pending = false;
		}
		serve(console, list, slots, count);
	}
	pthread_mutex_unlock(&console->lock);
	return NULL;
}

int console_create(struct console **out, struct err *err)
{
	struct console *console = xcalloc(1, sizeof(*console));
	int rc;

	pthread_mutex_init(&console->lock, NULL);
	pthread_cond_init(&console->input_idle, NULL);
	console->ring = xcalloc(1, CONSOLE_RING_BYTES);
	console->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (console->wake_fd < 0) {
		rc = err_sys(err, errno, "console: eventfd");
		goto fail;
	}
	rc = pthread_create(&console->thread, NULL, console_main, console);
	if (rc) {
		rc = err_sys(err, rc, "console: thread");
		close(console->wake_fd);
		goto fail;
	}
	*out = console;
	return 0;
fail:
	pthread_cond_destroy(&console->input_idle);
	pthread_mutex_destroy(&console->lock);
	free(console->ring);
	free(console);
	return rc;
}

/* Gives every watcher what it has not seen yet, as long as it takes it without much delay. */
static void flush_watchers(struct console *console)
{
	uint64_t end = clock_now_ns() + FLUSH_NS;

	pthread_mutex_lock(&console->lock);
	for (unsigned i = 0; i < console->count; i++) {
		struct watcher *watcher = &console->watchers[console->order[i]];
		struct pollfd one = {.fd = watcher->given.out_fd, .events = POLLOUT};

		while (watcher->position < console->written && poll(&one, 1, clock_now_ns() < end ? 100 : 0) == 1 &&
		       one.revents == POLLOUT && feed_watcher(console, watcher))
			;
	}
	pthread_mutex_unlock(&console->lock);
}

void console_destroy(struct console *console)
{
	if (!console)
		return;
	pthread_mutex_lock(&console->lock);
	console->stopping = true;
	wake(console);
	pthread_mutex_unlock(&console->lock);
	pthread_join(console->thread, NULL);
	flush_watchers(console);
	while (console->count)
		drop_watcher(console, console->order[0]);
	close(console->wake_fd);
	pthread_cond_destroy(&console->input_idle);
	pthread_mutex_destroy(&console->lock);
	free(console->ring);
	free(console);
}
