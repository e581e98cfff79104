/* The host's side of a guest's agent: what it tells, what it notes, and that a guest cannot do more than that. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "control/agent_host.h"
#include "control/local_socket.h"
#include "guest/protocol.h"
#include "tests/lib/check.h"

#define UUID "11111111-2222-4333-8444-555555555555"

struct setting {
	char path[32];
	int dir;
	struct control_target target;
	struct agent_host *host;
};

static void begin(struct setting *s, const char *hostname, bool tell_time)
{
	struct agent_host_identity identity = {.uuid = UUID, .hostname = hostname, .tell_time = tell_time};
	struct err err = ERR_INIT;

	*s = (struct setting){.path = "/tmp/vmcp-agent-XXXXXX", .target.name = "web-1"};
	CHECK(mkdtemp(s->path) != NULL);
	s->dir = open(s->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	pthread_rwlock_init(&s->target.machine_lock, NULL);
	CHECK(agent_host_start(s->dir, &s->target, &identity, &s->host, &err) == 0);
}
static void end(struct setting *s)
{
	agent_host_stop(s->host);
	CHECK(faccessat(s->dir, "vsock.sock_7349", F_OK, 0) != 0);
	close(s->dir);
	pthread_rwlock_destroy(&s->target.machine_lock);
	file_remove_tree(AT_FDCWD, s->path, NULL);
}

static int call(struct setting *s)
{
	int fd = local_socket_connect(s->dir, "vsock.sock_7349", NULL);

	CHECK(fd >= 0);
	return fd;
}
/* All up to "end\n". */
static void hear(int fd, char *out, size_t room)
{
	size_t used = 0;

	while (used + 1 < room && (used < 4 || memcmp(out + used - 4, "end\n", 4) != 0)) {
		ssize_t n = read(fd, out + used, 1);

		if (n <= 0)
			break;
		used += (size_t)n;
	}
	out[used] = '\0';
}
static void say(int fd, const char *text) { CHECK(send(fd, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text)); }
static bool is_cut_off(int fd)
{
	char byte;
	ssize_t n;

	while ((n = read(fd, &byte, 1)) > 0)
		;
	return n == 0 || errno == ECONNRESET;
}

/* Waits until the member is this text, or null. */
static void expect(struct setting *s, const char *key, const char *want)
{
	const struct timespec moment = {.tv_nsec = 1000000};
	uint64_t until = clock_now_ns() + 60000000000u;
	bool same = false;

	while (!same && clock_now_ns() < until) {
		json_t *told = agent_host_to_json(s->host), *value = json_object_get(told, key);

		same = want ? json_is_string(value) && !strcmp(json_string_value(value), want) : json_is_null(value);
		json_decref(told);
		if (!same)
			nanosleep(&moment, NULL);
	}
	CHECK(same);
}

static void test_tells_and_notes(void)
{
	struct setting s;
	char text[2048], seed[200], other[200];

	begin(&s, "web-1", true);
	expect(&s, "event", NULL);
	int fd = call(&s);
	hear(fd, text, sizeof(text));
	const char *head = "vmcp 1\nuuid " UUID "\ngeneration \nname web-1\nhostname web-1\ntime ";
	CHECK(!strncmp(text, head, strlen(head)));
	CHECK(llabs((long long)strtoull(text + strlen(head), NULL, 10) - (long long)time(NULL)) <= 5);
	CHECK(sscanf(strstr(text, "seed "), "seed %199[0-9a-f]\nend", seed) == 1 && strlen(seed) == 2 * AGENT_SEED_BYTES);
	say(fd, "agent 1\n");
	say(fd, "failed /etc/ssh: no\nnews of a newer one\ndone clo");
	say(fd, "ne\n");
	expect(&s, "event", "clone");
	expect(&s, "problem", "/etc/ssh: no");
	/* Each connection gets random bytes of its own; what is told is of the newest agent. */
	int second = call(&s);
	hear(second, text, sizeof(text));
	CHECK(sscanf(strstr(text, "seed "), "seed %199[0-9a-f]\nend", other) == 1 && strcmp(seed, other) != 0);
	say(second, "agent 1\ndone same\n");
	expect(&s, "event", "same");
	expect(&s, "problem", NULL);
	close(fd);
	close(second);
	const struct timespec moment = {.tv_nsec = 1000000};
	bool connected = true;
	for (uint64_t until = clock_now_ns() + 60000000000u; connected && clock_now_ns() < until; nanosleep(&moment, NULL)) {
		json_t *told = agent_host_to_json(s.host);
		connected = json_is_true(json_object_get(told, "connected"));
		json_decref(told);
	}
	CHECK(!connected);
	end(&s);
	/* Nothing that the guest is to keep. */
	begin(&s, "", false);
	fd = call(&s);
	hear(fd, text, sizeof(text));
	CHECK(!strstr(text, "hostname") && !strstr(text, "time") && strstr(text, "\nname web-1\nseed "));
	close(fd);
	end(&s);
	json_t *none = agent_host_to_json(NULL);
	CHECK(json_is_null(none));
	json_decref(none);
}

static void test_what_is_no_agent_is_cut_off(void)
{
	static const char *const bad[] = {"done clone\n", "agent 2\n", "agent 1\nagent 1\n", "agent 1\ndone harm\n", "agent 1\nfailed \x1b[2J\n", "agent 1\nfailed \xff\n"};
	struct setting s;
	char text[2048], many[(AGENT_MAX_LINES + 1) * 2 + 16] = "agent 1\n", longer[2 * AGENT_LINE_BYTES];

	begin(&s, "", false);
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		int fd = call(&s);
		hear(fd, text, sizeof(text));
		say(fd, bad[i]);
		CHECK(is_cut_off(fd));
		close(fd);
	}
	int fd = call(&s);
	CHECK(send(fd, "agent 1\nfailed a\0b\n", 19, MSG_NOSIGNAL) == 19);
	CHECK(is_cut_off(fd));
	close(fd);
	expect(&s, "problem", NULL);
	for (unsigned i = 0; i < AGENT_MAX_LINES; i++)
		strcat(many, "x\n");
	fd = call(&s);
	say(fd, many);
	CHECK(is_cut_off(fd));
	close(fd);
	memset(longer, 'x', sizeof(longer));
	fd = call(&s);
	CHECK(send(fd, longer, sizeof(longer), MSG_NOSIGNAL) > 0);
	CHECK(is_cut_off(fd));
	close(fd);
	/* More than there is room for are turned away, and make room again. */
	int crowd[20], served = 0;
	for (size_t i = 0; i < ARRAY_LENGTH(crowd); i++) {
		crowd[i] = call(&s);
		hear(crowd[i], text, sizeof(text));
		served += text[0] != '\0';
	}
	CHECK(served >= 1 && served < 20);
	for (size_t i = 0; i < ARRAY_LENGTH(crowd); i++)
		close(crowd[i]);
	fd = call(&s);
	hear(fd, text, sizeof(text));
	for (uint64_t until = clock_now_ns() + 60000000000u; !text[0] && clock_now_ns() < until;) {
		close(fd);
		fd = call(&s);
		hear(fd, text, sizeof(text));
	}
	CHECK(text[0] != '\0');
	close(fd);
	end(&s);
}

int main(void)
{
	test_tells_and_notes();
	test_what_is_no_agent_is_cut_off();
	return check_report();
}
