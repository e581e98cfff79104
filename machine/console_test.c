/* A plain program, so that it runs under ThreadSanitizer. */
#include "machine/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "tests/lib/check.h"

static struct console *make(void)
{
	struct console *console = NULL;

	CHECK(console_create(&console, NULL) == 0);
	return console;
}

static void say(struct console *console, const char *text)
{
	console_output(console, (const uint8_t *)text, strlen(text));
}

static void rest_ms(long ms)
{
	const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

	nanosleep(&time, NULL);
}

static void attach(struct console *console, int in_fd, int out_fd, bool owned, size_t scrollback)
{
	const struct console_watcher watcher = {
		.in_fd = in_fd, .out_fd = out_fd, .owned = owned, .scrollback_bytes = scrollback, .escape = -1};

	CHECK(console_attach(console, &watcher, NULL) == 0);
}

/* What a test waits for comes at once on an idle host; on a busy one only something that does not come may take this long. */
#define PATIENCE_MS 20000

static uint64_t patience_end(void) { return clock_now_ns() + PATIENCE_MS * 1000000ull; }

/* Reads `length` bytes, or up to the text `last` where one is given. */
static size_t collect_until(int fd, char *text, size_t length, const char *last)
{
	uint64_t end = patience_end();
	size_t got = 0, last_bytes = last ? strlen(last) : 0;

	while (got < length && clock_now_ns() < end) {
		if (last && got >= last_bytes && memcmp(text + got - last_bytes, last, last_bytes) == 0)
			break;
		struct pollfd one = {.fd = fd, .events = POLLIN};
		if (poll(&one, 1, 50) != 1)
			continue;
		ssize_t n = read(fd, text + got, length - got);
		if (n <= 0)
			break;
		got += (size_t)n;
	}
	text[got] = '\0';
	return got;
}

static size_t collect(int fd, char *text, size_t length) { return collect_until(fd, text, length, NULL); }

static void expect(int fd, const char *wanted)
{
	char text[256];

	collect(fd, text, strlen(wanted));
	CHECK(strcmp(text, wanted) == 0);
	if (strcmp(text, wanted))
		fprintf(stderr, "wanted '%s', got '%s'\n", wanted, text);
}

static bool is_silent(int fd)
{
	struct pollfd one = {.fd = fd, .events = POLLIN};
	return poll(&one, 1, 60) == 0;
}

static bool is_at_end(int fd)
{
	struct pollfd one = {.fd = fd, .events = POLLIN};
	char byte;
	return poll(&one, 1, PATIENCE_MS) == 1 && read(fd, &byte, 1) == 0;
}

/* --- the guest's side of typing --- */

struct guest {
	pthread_mutex_t lock;
	char text[65536];
	size_t length, limit; /* takes no more than `limit` in all */
	unsigned calls;
};

static size_t take_input(void *opaque, const uint8_t *data, size_t length)
{
	struct guest *guest = opaque;

	pthread_mutex_lock(&guest->lock);
	guest->calls++;
	if (length > guest->limit - guest->length)
		length = guest->limit - guest->length;
	memcpy(guest->text + guest->length, data, length);
	guest->length += length;
	guest->text[guest->length] = '\0';
	pthread_mutex_unlock(&guest->lock);
	return length;
}

static struct guest *make_guest(size_t limit)
{
	struct guest *guest = calloc(1, sizeof(*guest));

	pthread_mutex_init(&guest->lock, NULL);
	guest->limit = limit;
	return guest;
}

static size_t taken(struct guest *guest)
{
	pthread_mutex_lock(&guest->lock);
	size_t length = guest->length;
	pthread_mutex_unlock(&guest->lock);
	return length;
}

static void wait_taken(struct guest *guest, size_t length)
{
	uint64_t end = patience_end();

	while (taken(guest) < length && clock_now_ns() < end)
		rest_ms(1);
	CHECK(taken(guest) == length);
}

static void type_text(int fd, const char *text) { CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text)); }

/* --- output --- */

static void test_several_watchers_see_all(void)
{
	struct console *console = make();
	int pipes[3][2];

	say(console, "before ");
	for (int i = 0; i < 3; i++) {
		CHECK(pipe(pipes[i]) == 0);
		attach(console, -1, pipes[i][1], i == 2, i == 1 ? 4 : i == 2 ? 1000 : 0);
	}
	say(console, "hello");
	expect(pipes[0][0], "hello");
	expect(pipes[1][0], "ore hello");
	expect(pipes[2][0], "before hello");
	char tail[8];
	CHECK(console_tail(console, tail, sizeof(tail)) == 7);
	CHECK(strcmp(tail, "e hello") == 0);
	CHECK(console_tail(console, tail, 0) == 0);
	console_destroy(console);
	CHECK(is_at_end(pipes[2][0])); /* owned, so closed */
	CHECK(fcntl(pipes[0][1], F_GETFD) >= 0);
	for (int i = 0; i < 3; i++)
		close(pipes[i][0]);
	close(pipes[0][1]);
	close(pipes[1][1]);
}

/* The bytes of a numbered stream, so that a gap or a repetition shows. */
static void say_numbers(struct console *console, unsigned from, unsigned to)
{
	char line[16];

	for (unsigned i = from; i < to; i++) {
		snprintf(line, sizeof(line), "%07u\n", i);
		console_output(console, (const uint8_t *)line, 8);
	}
}

static void test_a_blocked_pipe_holds_up_nobody(void)
{
	struct console *console = make();
	const unsigned lines = 40000; /* 320,000 bytes: more than a pipe holds, less than the ring */
	CLEANUP_FREE char *text = malloc(lines * 8 + 1);
	int blocked[2], good[2];

	CHECK(pipe(blocked) == 0 && pipe(good) == 0);
	attach(console, -1, blocked[1], false, 0);
	attach(console, -1, good[1], false, 0);
	uint64_t start = clock_now_ns();
	say_numbers(console, 0, lines);
	CHECK(clock_now_ns() - start < PATIENCE_MS * 1000000ull);
	CHECK(collect(good[0], text, lines * 8) == lines * 8);
	CHECK(memcmp(text + (lines - 1) * 8, "0039999\n", 8) == 0);
	/* The slow one gets it all later. */
	CHECK(collect(blocked[0], text, lines * 8) == lines * 8);
	bool whole = true;
	for (unsigned i = 0; i < lines; i++)
		whole = whole && (unsigned)atoi(text + i * 8) == i;
	CHECK(whole);
	say_numbers(console, 0, lines); /* blocks again: the end must come all the same */
	start = clock_now_ns();
	console_destroy(console);
	CHECK(clock_now_ns() - start < PATIENCE_MS * 1000000ull);
	for (int i = 0; i < 2; i++) {
		close(blocked[i]);
		close(good[i]);
	}
}

static void test_bytes_lost_are_told(void)
{
	struct console *console = make();
	const unsigned lines = CONSOLE_RING_BYTES / 8 * 2;
	CLEANUP_FREE char *text = malloc(lines * 8 + 200);
	int pipes[2];

	CHECK(pipe(pipes) == 0);
	attach(console, -1, pipes[1], false, 0);
	say_numbers(console, 0, lines);
	rest_ms(50);
	size_t got = collect_until(pipes[0], text, lines * 8, "0262143\n");
	unsigned long long lost = 0;
	size_t note_bytes = 0;
	/* One that had caught up may fall behind again. */
	for (char *note = strstr(text, "\r\n["), *end; note; note = strstr(end, "\r\n[")) {
		end = strchr(note + 2, '\n') + 1;
		CHECK(strstr(note, " bytes of output lost]\r\n") + strlen(" bytes of output lost]\r\n") == end);
		lost += strtoull(note + 3, NULL, 10);
		note_bytes += (size_t)(end - note);
	}
	CHECK(lost > 0);
	CHECK(got - note_bytes + lost == lines * 8); /* not one byte unaccounted for */
	CHECK(memcmp(text + got - 8, "0262143\n", 8) == 0);
	console_destroy(console);
	close(pipes[0]);
	close(pipes[1]);
}

/* A terminal blocks a write that is larger than its room, although poll reports it writable. */
static void test_a_terminal_that_stands_still(void)
{
	struct console *console = make();
	int master, slave, good[2];

	CHECK(openpty(&master, &slave, NULL, NULL, NULL) == 0);
	CHECK(pipe(good) == 0);
	attach(console, -1, slave, false, 0);
	attach(console, -1, good[1], false, 0);
	CLEANUP_FREE char *text = malloc(200001);
	say_numbers(console, 0, 25000);
	CHECK(collect(good[0], text, 200000) == 200000);
	CHECK((fcntl(slave, F_GETFL) & O_NONBLOCK) == 0); /* the terminal's other users are not affected */
	uint64_t start = clock_now_ns();
	console_destroy(console);
	CHECK(clock_now_ns() - start < PATIENCE_MS * 1000000ull);
	close(master);
	close(slave);
	close(good[0]);
	close(good[1]);
}

static void test_a_watcher_that_goes_away(void)
{
	struct console *console = make();
	int pipes[2], pair[2], good[2];

	CHECK(pipe(pipes) == 0 && pipe(good) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
	attach(console, -1, pipes[1], false, 0);
	attach(console, pair[0], pair[0], true, 0);
	attach(console, -1, good[1], false, 0);
	close(pipes[0]);
	close(pair[1]);
	say(console, "still here");
	expect(good[0], "still here");
	/* Their places are free again. */
	int more[CONSOLE_MAX_WATCHERS][2];
	rest_ms(50);
	for (int i = 0; i < CONSOLE_MAX_WATCHERS - 1; i++) {
		CHECK(pipe(more[i]) == 0);
		attach(console, -1, more[i][1], true, 0);
	}
	const struct console_watcher one_more = {.in_fd = -1, .out_fd = good[1], .escape = -1};
	struct err err = ERR_INIT;
	CHECK(console_attach(console, &one_more, &err) == -EBUSY);
	CHECK(err.class == ERR_STATE);
	say(console, "all");
	for (int i = 0; i < CONSOLE_MAX_WATCHERS - 1; i++) {
		expect(more[i][0], "all");
		close(more[i][0]);
	}
	console_destroy(console);
	close(pipes[1]);
	close(good[0]);
	close(good[1]);
}

static void test_destroy_flushes(void)
{
	for (int round = 0; round < 50; round++) {
		struct console *console = make();
		int pipes[2];

		CHECK(pipe(pipes) == 0);
		attach(console, -1, pipes[1], true, 0);
		say(console, "the last words");
		console_destroy(console);
		expect(pipes[0], "the last words");
		CHECK(is_at_end(pipes[0]));
		close(pipes[0]);
	}
	console_destroy(NULL);
}

/* --- input --- */

static void test_only_the_oldest_types(void)
{
	struct console *console = make();
	struct guest *guest = make_guest(1000);
	int a[2], b[2], null = open("/dev/null", O_WRONLY | O_CLOEXEC);

	CHECK(pipe(a) == 0 && pipe(b) == 0);
	console_set_guest(console, take_input, guest);
	attach(console, a[0], null, false, 0);
	attach(console, b[0], null, false, 0);
	type_text(b[1], "second");
	rest_ms(30);
	CHECK(taken(guest) == 0);
	type_text(a[1], "first ");
	wait_taken(guest, 6);
	close(a[1]); /* the end of its typing: now the other one is heard */
	wait_taken(guest, 12);
	CHECK(strcmp(guest->text, "first second") == 0);
	close(b[1]);
	rest_ms(30);
	say(console, "not over");
	console_destroy(console);
	close(a[0]);
	close(b[0]);
	close(null);
	free(guest);
}

static void test_typed_bytes_wait_for_room(void)
{
	struct console *console = make();
	struct guest *guest = make_guest(0);
	int a[2], null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	char text[20001];

	CHECK(pipe(a) == 0);
	for (size_t i = 0; i < 20000; i++)
		text[i] = (char)('a' + i % 26);
	text[20000] = '\0';
	attach(console, a[0], null, false, 0);
	type_text(a[1], text); /* more than the console keeps: the rest stays in the pipe */
	rest_ms(30);
	console_set_guest(console, take_input, guest);
	rest_ms(30);
	CHECK(taken(guest) == 0);
	for (size_t limit = 1; limit < 20000; limit = limit * 3 + 1) {
		pthread_mutex_lock(&guest->lock);
		guest->limit = limit;
		pthread_mutex_unlock(&guest->lock);
		console_room(console);
		wait_taken(guest, limit);
	}
	pthread_mutex_lock(&guest->lock);
	unsigned calls = guest->calls;
	guest->limit = 20000;
	pthread_mutex_unlock(&guest->lock);
	CHECK(calls < 200); /* it does not ask again and again */
	console_room(console);
	wait_taken(guest, 20000);
	CHECK(strcmp(guest->text, text) == 0);
	console_destroy(console);
	close(a[0]);
	close(a[1]);
	close(null);
	free(guest);
}

static void note_escape(void *opaque) { atomic_fetch_add((_Atomic unsigned *)opaque, 1); }

static void test_escape(void)
{
	struct console *console = make();
	struct guest *guest = make_guest(1000);
	_Atomic unsigned escapes = 0;
	int a[2], null = open("/dev/null", O_WRONLY | O_CLOEXEC);

	CHECK(pipe(a) == 0);
	console_set_guest(console, take_input, guest);
	const struct console_watcher watcher = {
		.in_fd = a[0], .out_fd = null, .escape = 0x1d, .escaped = note_escape, .opaque = &escapes};
	CHECK(console_attach(console, &watcher, NULL) == 0);
	type_text(a[1], "ab\x1d"
			"cd\x1d");
	wait_taken(guest, 4);
	CHECK(strcmp(guest->text, "abcd") == 0);
	uint64_t end = patience_end();
	while (escapes < 2 && clock_now_ns() < end)
		rest_ms(1);
	CHECK(escapes == 2);
	console_destroy(console);
	close(a[0]);
	close(a[1]);
	close(null);
	free(guest);
}

static uint64_t own_cpu_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Ends of input of every kind end typing; none makes the console's thread run in circles, or ends the output. */
static void test_ends_of_input_are_quiet(void)
{
	struct console *console = make();
	int out[2], closed[2], hung[2], master, slave;

	CHECK(pipe(out) == 0 && pipe(closed) == 0 && pipe(hung) == 0);
	CHECK(openpty(&master, &slave, NULL, NULL, NULL) == 0);
	int bad = dup(closed[0]);
	close(bad);
	attach(console, bad, out[1], false, 0); /* a descriptor that is not open */
	rest_ms(20);
	int folder = open("/", O_RDONLY | O_CLOEXEC);
	attach(console, folder, out[1], false, 0); /* read fails */
	rest_ms(20);
	attach(console, hung[0], out[1], false, 0);
	close(hung[1]);
	attach(console, slave, out[1], false, 0);
	close(master); /* a terminal that hung up: EIO */
	rest_ms(50);
	uint64_t before = own_cpu_ns();
	rest_ms(200);
	CHECK(own_cpu_ns() - before < 50000000ull);
	say(console, "x");
	expect(out[0], "xxxx");
	console_destroy(console);
	const int fds[] = {out[0], out[1], closed[0], closed[1], hung[0], folder, slave};
	for (size_t i = 0; i < ARRAY_LENGTH(fds); i++)
		close(fds[i]);
}

static void test_an_owned_connection_ends_with_its_input(void)
{
	struct console *console = make();
	struct guest *guest = make_guest(1000);
	int pair[2];

	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
	console_set_guest(console, take_input, guest);
	attach(console, pair[0], pair[0], true, 0);
	say(console, "prompt$ ");
	expect(pair[1], "prompt$ ");
	type_text(pair[1], "ls\n");
	wait_taken(guest, 3);
	CHECK(is_silent(pair[1]));
	CHECK(shutdown(pair[1], SHUT_WR) == 0);
	CHECK(is_at_end(pair[1]));
	close(pair[1]);
	console_destroy(console);
	free(guest);
}

/* A socket whose peer does not read, given in blocking mode. */
static void test_a_blocked_socket_holds_up_nobody(void)
{
	struct console *console = make();
	int pair[2], good[2];
	CLEANUP_FREE char *text = malloc(800001);

	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
	CHECK(pipe(good) == 0);
	attach(console, pair[0], pair[0], true, 0);
	attach(console, -1, good[1], false, 0);
	say_numbers(console, 0, 100000);
	CHECK(collect(good[0], text, 800000) == 800000);
	console_destroy(console);
	close(pair[1]);
	close(good[0]);
	close(good[1]);
}

/* --- many threads --- */

struct storm {
	struct console *console;
	struct guest *guest;
	_Atomic bool stop;
};

static void *write_storm(void *opaque)
{
	struct storm *storm = opaque;

	while (!storm->stop) {
		say(storm->console, "0123456789abcdef\n");
		console_room(storm->console);
	}
	return NULL;
}

static void *attach_storm(void *opaque)
{
	struct storm *storm = opaque;
	char text[4096];

	while (!storm->stop) {
		int pair[2];
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			break;
		const struct console_watcher watcher = {
			.in_fd = pair[0], .out_fd = pair[0], .owned = true, .scrollback_bytes = 100, .escape = -1};
		if (console_attach(storm->console, &watcher, NULL)) {
			close(pair[0]);
		} else {
			(void)!write(pair[1], "typed", 5);
			(void)!read(pair[1], text, sizeof(text));
		}
		close(pair[1]);
	}
	return NULL;
}

static void *guest_storm(void *opaque)
{
	struct storm *storm = opaque;
	char tail[64];

	while (!storm->stop) {
		console_set_guest(storm->console, take_input, storm->guest);
		pthread_mutex_lock(&storm->guest->lock);
		storm->guest->length = 0;
		pthread_mutex_unlock(&storm->guest->lock);
		rest_ms(1);
		console_set_guest(storm->console, NULL, NULL);
		/* From here on nobody may call take_input. */
		pthread_mutex_lock(&storm->guest->lock);
		unsigned calls = storm->guest->calls;
		pthread_mutex_unlock(&storm->guest->lock);
		console_tail(storm->console, tail, sizeof(tail));
		pthread_mutex_lock(&storm->guest->lock);
		CHECK(storm->guest->calls == calls);
		pthread_mutex_unlock(&storm->guest->lock);
	}
	return NULL;
}

static void test_storm(void)
{
	static void *(*const mains[])(void *) = {write_storm, write_storm, attach_storm, attach_storm, guest_storm};
	struct storm storm = {.console = make(), .guest = make_guest(60000)};
	pthread_t threads[ARRAY_LENGTH(mains)];

	for (size_t i = 0; i < ARRAY_LENGTH(mains); i++)
		CHECK(pthread_create(&threads[i], NULL, mains[i], &storm) == 0);
	rest_ms(1500);
	storm.stop = true;
	for (size_t i = 0; i < ARRAY_LENGTH(mains); i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	console_destroy(storm.console);
	free(storm.guest);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	test_several_watchers_see_all();
	test_a_blocked_pipe_holds_up_nobody();
	test_a_blocked_socket_holds_up_nobody();
	test_bytes_lost_are_told();
	test_a_terminal_that_stands_still();
	test_a_watcher_that_goes_away();
	test_destroy_flushes();
	test_only_the_oldest_types();
	test_typed_bytes_wait_for_room();
	test_escape();
	test_ends_of_input_are_quiet();
	test_an_owned_connection_ends_with_its_input();
	test_storm();
	return check_report();
}
