/* A plain program, so that it runs under ThreadSanitizer. The target has no machine, so methods that need one are refused. */
#include "control/server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "control/client.h"
#include "control/protocol.h"
#include "tests/lib/check.h"

static char work[] = "/tmp/vmcp-server-test-XXXXXX";

struct fixture {
	struct store *store;
	struct store_vm_lock *lock;
	int dir;
	struct control_target target;
	struct control_server *server;
	_Atomic unsigned kills;
};

static void count_kill(void *opaque) { ((struct fixture *)opaque)->kills++; }

static void start(struct fixture *f)
{
	struct store_vm vm = {.name = "web", .state = "running", .config_text = (char *)""};
	struct err err = ERR_INIT;

	memset(f, 0, sizeof(*f));
	CHECK(store_open(work, true, &f->store, &err) == 0);
	CHECK(store_vm_put(f->store, &vm, &err) == 0);
	CHECK(store_vm_lock(f->store, "web", &f->lock, &err) == 0);
	f->dir = store_vm_dir(f->store, "web", &err);
	CHECK(f->dir >= 0);
	CHECK(console_create(&f->target.console, &err) == 0);
	f->target.store = f->store;
	f->target.name = "web";
	f->target.kill = count_kill;
	f->target.opaque = f;
	pthread_rwlock_init(&f->target.machine_lock, NULL);
	CHECK(control_server_start(f->dir, &f->target, &f->server, &err) == 0);
}

static void stop(struct fixture *f)
{
	uint64_t begin = clock_now_ns();

	control_server_stop(f->server);
	CHECK(clock_now_ns() - begin < 30000000000ull); /* it gives clients up after seconds: the end comes */
	CHECK(faccessat(f->dir, "control.sock", F_OK, 0) != 0);
	console_destroy(f->target.console);
	pthread_rwlock_destroy(&f->target.machine_lock);
	close(f->dir);
	store_vm_unlock(f->lock);
	store_close(f->store);
}

static int connect_raw(const struct fixture *f)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/control.sock", f->dir);
	CHECK(connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
	return fd;
}

/* Sends a line, returns the answer's error code, 0 for a result, 1 where the connection ended. */
static int ask(struct control_reader *reader, const char *line, char message[512])
{
	json_t *answer;

	CHECK(send(reader->fd, line, strlen(line), MSG_NOSIGNAL) == (ssize_t)strlen(line));
	if (message)
		message[0] = '\0';
	if (control_receive(reader, &answer, NULL))
		return 1;
	CHECK(strcmp(json_string_value(json_object_get(answer, "jsonrpc")), "2.0") == 0);
	CHECK(json_object_get(answer, "id") != NULL);
	const json_t *error = json_object_get(answer, "error");
	CHECK((error != NULL) != (json_object_get(answer, "result") != NULL));
	int code = (int)json_integer_value(json_object_get(error, "code"));
	if (error && message)
		snprintf(message, 512, "%s", json_string_value(json_object_get(error, "message")));
	if (error)
		CHECK(json_is_string(json_object_get(json_object_get(error, "data"), "code")));
	json_decref(answer);
	return code;
}

static int ask_once(const struct fixture *f, const char *line, char message[512])
{
	struct control_reader reader = {.fd = connect_raw(f)};
	int code = ask(&reader, line, message);

	close(reader.fd);
	control_reader_free(&reader);
	return code;
}

static void test_bad_requests(void)
{
	struct fixture f;
	struct control_reader reader;
	char message[512];

	start(&f);
	reader = (struct control_reader){.fd = connect_raw(&f)};
	CHECK(ask(&reader, "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.dance\"}\n", message) == -32601);
	CHECK(strstr(message, "vm.dance") != NULL);
	CHECK(ask(&reader, "{\"jsonrpc\":\"2.0\",\"id\":1}\n", message) == CONTROL_ERROR_CODE);
	CHECK(strstr(message, "method") != NULL);
	CHECK(ask(&reader, "{\"id\":\"x\",\"method\":5}\n", NULL) == CONTROL_ERROR_CODE);
	CHECK(ask(&reader, "{\"id\":[],\"method\":\"vm.info\",\"params\":[1]}\n", NULL) == CONTROL_ERROR_CODE);
	CHECK(ask(&reader, "{\"method\":\"vm.info\",\"params\":null}\n", NULL) == CONTROL_ERROR_CODE);
	CHECK(ask(&reader, "{\"method\":\"vm.info\"}\n", message) == CONTROL_ERROR_CODE);
	CHECK(strstr(message, "starting or ending") != NULL); /* no machine */
	CHECK(ask(&reader, "{\"method\":\"console.attach\",\"params\":{\"scrollback_bytes\":\"all\"}}\n", message) ==
	      CONTROL_ERROR_CODE);
	CHECK(strstr(message, "scrollback_bytes") != NULL);
	CHECK(ask(&reader, "{\"method\":\"console.attach\",\"params\":{\"scrollback_bytes\":-1}}\n", message) ==
	      CONTROL_ERROR_CODE);
	/* The connection serves on after every one of these; after what is no JSON it says so and ends. */
	CHECK(ask(&reader, "nonsense\n", message) == -32700);
	json_t *more;
	CHECK(control_receive(&reader, &more, NULL) == -ENODATA);
	close(reader.fd);
	control_reader_free(&reader);
	CHECK(ask_once(&f, "[]\n", NULL) == -32700);
	CHECK(ask_once(&f, "\n", NULL) == -32700);
	CHECK(ask_once(&f, "{\"id\":7,\"method\":\"vm.kill\"}\n", NULL) == 0);
	CHECK(f.kills == 1);
	stop(&f);
}

static void test_a_line_without_end(void)
{
	struct fixture f;
	char block[4096];
	size_t sent = 0;

	start(&f);
	int fd = connect_raw(&f);
	memset(block, 'x', sizeof(block));
	while (sent < 4 * (size_t)CONTROL_LINE_MAX) {
		ssize_t n = send(fd, block, sizeof(block), MSG_NOSIGNAL);
		if (n <= 0)
			break;
		sent += (size_t)n;
	}
	CHECK(sent < 4 * (size_t)CONTROL_LINE_MAX); /* it was cut */
	close(fd);
	CHECK(ask_once(&f, "{\"id\":1,\"method\":\"vm.dance\"}\n", NULL) == -32601);
	stop(&f);
}

static void test_many_connections(void)
{
	struct fixture f;
	struct control_reader readers[20]; /* those of all rounds fit at once: the server may not have seen yet that some are gone */

	start(&f);
	for (int round = 0; round < 3; round++) {
		for (size_t i = 0; i < ARRAY_LENGTH(readers); i++)
			readers[i] = (struct control_reader){.fd = connect_raw(&f)};
		for (size_t i = 0; i < ARRAY_LENGTH(readers); i++)
			CHECK(ask(&readers[i], "{\"id\":1,\"method\":\"vm.dance\"}\n", NULL) == -32601);
		for (size_t i = 0; i < ARRAY_LENGTH(readers); i++) {
			close(readers[i].fd);
			control_reader_free(&readers[i]);
		}
	}
	stop(&f);
}

/* The places of clients that left become free, as soon as their threads have seen it. */
static int ask_until_free(const struct fixture *f)
{
	uint64_t end = clock_now_ns() + 60000000000ull;
	int code;

	do
		code = ask_once(f, "{\"id\":1,\"method\":\"vm.dance\"}\n", NULL);
	while (code != -32601 && clock_now_ns() < end);
	return code;
}

static void test_one_connection_too_many(void)
{
	struct fixture f;
	struct control_reader readers[64];
	struct control_client *client = NULL;
	struct err err = ERR_INIT;
	json_t *result;

	start(&f);
	for (size_t i = 0; i < ARRAY_LENGTH(readers); i++) {
		readers[i] = (struct control_reader){.fd = connect_raw(&f)};
		CHECK(ask(&readers[i], "{\"id\":1,\"method\":\"vm.dance\"}\n", NULL) == -32601);
	}
	CHECK(control_connect(f.store, "web", &client, &err) == 0);
	CHECK(control_call(client, "vm.kill", NULL, NULL, NULL, &result, &err) != 0);
	CHECK(strstr(err.message, "64 connections") != NULL);
	CHECK(err.class == ERR_STATE);
	control_close(client);
	CHECK(f.kills == 0);
	for (size_t i = 0; i < ARRAY_LENGTH(readers); i++) {
		close(readers[i].fd);
		control_reader_free(&readers[i]);
	}
	CHECK(ask_until_free(&f) == -32601);
	stop(&f);
}

static void test_clients_that_vanish(void)
{
	static const char request[] = "{\"id\":1,\"method\":\"vm.dance\"}\n";
	struct fixture f;

	start(&f);
	for (int i = 0; i < 300; i++) {
		int fd = connect_raw(&f);
		/* Nothing, half a request, a whole one, several. */
		for (int n = i % 4; n > 0; n--)
			(void)!send(fd, request, n == 1 ? 10 : sizeof(request) - 1, MSG_NOSIGNAL);
		close(fd);
	}
	CHECK(ask_until_free(&f) == -32601);
	stop(&f);
}

/* A client that sends and never reads: the server gives it up, and ends when it is told to. */
static void test_a_client_that_does_not_read(void)
{
	static const char request[] = "{\"id\":1,\"method\":\"vm.dance\"}\n";
	struct fixture f;

	start(&f);
	int fd = connect_raw(&f);
	CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	uint64_t end = clock_now_ns() + 1000000000ull;
	while (clock_now_ns() < end)
		if (send(fd, request, sizeof(request) - 1, MSG_NOSIGNAL) < 0)
			poll(NULL, 0, 5);
	stop(&f);
	close(fd);
}

static void test_stop_cuts_idle_connections(void)
{
	struct fixture f;

	start(&f);
	int a = connect_raw(&f), b = connect_raw(&f);
	CHECK(ask_once(&f, "{\"id\":1,\"method\":\"vm.dance\"}\n", NULL) == -32601);
	stop(&f);
	char byte;
	CHECK(recv(a, &byte, 1, 0) <= 0);
	CHECK(recv(b, &byte, 1, 0) <= 0);
	close(a);
	close(b);
}

/* --- the client --- */

static void test_the_client(void)
{
	struct control_client *client = NULL;
	struct fixture f;
	struct err err = ERR_INIT;
	json_t *result = NULL;

	start(&f);
	CHECK(control_connect(f.store, "nobody", &client, &err) == -ENOENT);
	CHECK(err.class == ERR_NOT_FOUND && err.hint[0]);
	CHECK(control_connect(f.store, "web", &client, &err) == 0);
	err = ERR_INIT;
	CHECK(control_call(client, "vm.dance", NULL, NULL, NULL, &result, &err) != 0);
	CHECK(err.class == ERR_USAGE && strstr(err.message, "vm.dance"));
	CHECK(control_call(client, "vm.dance", NULL, NULL, NULL, &result, NULL) != 0);
	err = ERR_INIT;
	CHECK(control_call(client, "vm.info", NULL, NULL, NULL, &result, &err) != 0);
	CHECK(err.class == ERR_STATE);
	CHECK(control_call(client, "vm.kill", json_object(), NULL, NULL, &result, &err) == 0);
	CHECK(json_is_object(result));
	json_decref(result);
	CHECK(f.kills == 1);
	control_close(client);
	control_close(NULL);

	/* The VM's lock is held, but nobody listens yet or any more. */
	control_server_stop(f.server);
	f.server = NULL;
	err = ERR_INIT;
	CHECK(control_connect(f.store, "web", &client, &err) == -EAGAIN);
	CHECK(err.class == ERR_STATE && err.hint[0]);
	stop(&f);
}

static size_t take_typed(void *opaque, const uint8_t *data, size_t length)
{
	(void)data;
	atomic_fetch_add((_Atomic size_t *)opaque, length);
	return length;
}

static void test_the_console(void)
{
	struct control_client *client = NULL;
	CLEANUP_BUF struct buf early = BUF_INIT;
	struct fixture f;
	struct err err = ERR_INIT;
	_Atomic size_t typed = 0;
	char text[64] = "";

	start(&f);
	console_set_guest(f.target.console, take_typed, &typed);
	console_output(f.target.console, (const uint8_t *)"login: ", 7);
	CHECK(control_connect(f.store, "web", &client, &err) == 0);
	int fd = control_attach_console(client, 100, &early, &err);
	CHECK(fd >= 0);
	size_t got = early.length;
	memcpy(text, early.data ? (char *)early.data : "", got);
	console_output(f.target.console, (const uint8_t *)"more", 4);
	while (got < 11) {
		ssize_t n = recv(fd, text + got, sizeof(text) - 1 - got, 0);
		if (n <= 0)
			break;
		got += (size_t)n;
	}
	CHECK(strcmp(text, "login: more") == 0);
	CHECK(send(fd, "root\n", 5, MSG_NOSIGNAL) == 5);
	uint64_t end = clock_now_ns() + 60000000000ull;
	while (typed < 5 && clock_now_ns() < end)
		poll(NULL, 0, 1);
	CHECK(typed == 5);
	control_close(client);
	stop(&f);
}

static void test_no_room_for_another_console(void)
{
	struct control_client *clients[CONSOLE_MAX_WATCHERS + 1];
	struct fixture f;
	struct err err = ERR_INIT;
	char text[200] = "";

	start(&f);
	for (int i = 0; i <= CONSOLE_MAX_WATCHERS; i++) {
		CLEANUP_BUF struct buf early = BUF_INIT;
		CHECK(control_connect(f.store, "web", &clients[i], &err) == 0);
		int fd = control_attach_console(clients[i], 0, &early, &err);
		CHECK(fd >= 0);
		if (i < CONSOLE_MAX_WATCHERS) {
			/* The response comes before the attachment: until a byte comes it is not certain. */
			while (early.length == 0 && recv(fd, text, 1, MSG_DONTWAIT) != 1)
				console_output(f.target.console, (const uint8_t *)"x", 1);
			continue;
		}
		size_t got = early.length;
		memcpy(text, early.data ? (char *)early.data : "", got);
		ssize_t n;
		while ((n = recv(fd, text + got, sizeof(text) - 1 - got, 0)) > 0)
			got += (size_t)n;
		CHECK(strstr(text, "watchers") != NULL);
	}
	for (int i = 0; i <= CONSOLE_MAX_WATCHERS; i++)
		control_close(clients[i]);
	stop(&f);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	log_set_level(LOG_LEVEL_ERROR);
	CHECK(mkdtemp(work) != NULL);
	test_bad_requests();
	test_a_line_without_end();
	test_many_connections();
	test_one_connection_too_many();
	test_clients_that_vanish();
	test_a_client_that_does_not_read();
	test_stop_cuts_idle_connections();
	test_the_client();
	test_the_console();
	test_no_room_for_another_console();
	CHECK(file_remove_tree(AT_FDCWD, work, NULL) == 0);
	return check_report();
}
