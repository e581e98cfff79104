/* Connections that are handed through: ends stay ends, resets stay resets, a death is a reset; no byte is lost. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "control/splice.h"
#include "tests/lib/check.h"

/* Two ends of a connection over TCP. */
static void connect_pair(int ends[2])
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	int listener = splice_listen(&address, false, NULL);

	CHECK(listener >= 0 && getsockname(listener, (struct sockaddr *)&address, &length) == 0);
	address.sin_addr.s_addr = htonl(INADDR_ANY); /* by the loopback */
	ends[0] = splice_connect(&address);
	CHECK(ends[0] >= 0);
	while ((ends[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0)
		;
	close(listener);
}

struct line {
	int client, server; /* the ends that the test holds */
	struct splice splice;
	pthread_t thread;
};
static void *run(void *opaque)
{
	struct line *line = opaque;

	splice_run(&line->splice);
	close(line->splice.caller);
	close(line->splice.server);
	return NULL;
}
static bool yes(void *opaque) { return *(bool *)opaque; }

static void begin(struct line *line, bool *dead, const char *first)
{
	int a[2], b[2];

	connect_pair(a);
	connect_pair(b);
	*line = (struct line){.client = a[0], .server = b[1]};
	line->splice = (struct splice){.caller = a[1], .server = b[0], .first = first, .first_bytes = first ? strlen(first) : 0,
				       .is_dead = dead ? yes : NULL, .opaque = dead};
	CHECK(pthread_create(&line->thread, NULL, run, line) == 0);
}
static void end(struct line *line)
{
	pthread_join(line->thread, NULL);
	close(line->client);
	close(line->server);
}
/* What comes until the end; *number: 0, or how it broke. */
static size_t drain(int fd, char *out, size_t room, int *number)
{
	size_t used = 0;
	ssize_t n = 0;

	while (used < room && (n = read(fd, out + used, room - used)) > 0)
		used += (size_t)n;
	*number = used < room && n < 0 ? errno : 0;
	return used;
}

struct job {
	int fd;
	const char *data;
	size_t bytes;
};
static void *send_all(void *opaque)
{
	const struct job *job = opaque;

	for (size_t done = 0; done < job->bytes;) {
		ssize_t n = send(job->fd, job->data + done, job->bytes - done, MSG_NOSIGNAL);

		if (n <= 0)
			break;
		done += (size_t)n;
	}
	shutdown(job->fd, SHUT_WR);
	return NULL;
}

static void test_both_ways(void)
{
	static char sent[3000000], got[sizeof(sent) + 10];
	struct line line;
	int number;

	begin(&line, NULL, "first");
	for (size_t i = 0; i < sizeof(sent); i++)
		sent[i] = (char)(i * 11 ^ i >> 8);
	CHECK(send(line.client, " second", 7, 0) == 7);
	CHECK(shutdown(line.client, SHUT_WR) == 0);
	CHECK(drain(line.server, got, sizeof(got), &number) == 12 && number == 0 && !memcmp(got, "first second", 12));
	/* A client that has ended its side still gets its answer. */
	struct job job = {line.server, sent, sizeof(sent)};
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, send_all, &job) == 0);
	CHECK(drain(line.client, got, sizeof(got), &number) == sizeof(sent) && number == 0 && !memcmp(got, sent, sizeof(sent)));
	pthread_join(thread, NULL);
	end(&line);
}
static void test_resets(void)
{
	struct line line;
	char byte;
	int number;

	begin(&line, NULL, NULL);
	splice_break(line.server);
	close(line.server);
	line.server = -1;
	CHECK(drain(line.client, &byte, 1, &number) == 0 && number == ECONNRESET);
	end(&line);

	begin(&line, NULL, NULL);
	splice_break(line.client);
	close(line.client);
	line.client = -1;
	CHECK(drain(line.server, &byte, 1, &number) == 0 && number == ECONNRESET);
	end(&line);
}

/* The server ends its side: what it said comes, and then an end, or a reset if it is dead. */
static void test_death(void)
{
	for (int dying = 0; dying < 2; dying++) {
		struct line line;
		bool dead = dying;
		char text[10];
		int number;

		begin(&line, &dead, NULL);
		CHECK(send(line.server, "last", 4, 0) == 4);
		CHECK(drain(line.client, text, 4, &number) == 4 && !memcmp(text, "last", 4));
		close(line.server);
		line.server = -1;
		CHECK(drain(line.client, text, sizeof(text), &number) == 0 && number == (dying ? ECONNRESET : 0));
		close(line.client);
		line.client = -1;
		end(&line);
	}
}

static void test_ports_that_are_taken(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	struct err err = ERR_INIT;
	int fd = splice_listen(&address, false, NULL);

	CHECK(fd >= 0 && getsockname(fd, (struct sockaddr *)&address, &length) == 0);
	CHECK(splice_listen(&address, false, &err) == -EADDRINUSE);
	CHECK(err.class == ERR_STATE && strstr(err.message, "tcp port 127.0.0.1:"));
	close(fd);
	CHECK(splice_connect(&address) == -ECONNREFUSED);
}

int main(void)
{
	test_both_ways();
	test_resets();
	test_death();
	test_ports_that_are_taken();
	return check_report();
}
