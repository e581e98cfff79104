#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "control/protocol.h"

static int ends[2];
static struct control_reader reader;

static void connect_ends(void)
{
	signal(SIGPIPE, SIG_DFL); /* a peer that is gone must not kill */
	cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	reader = (struct control_reader){.fd = ends[1]};
}

static void close_ends(void)
{
	control_reader_free(&reader);
	if (ends[0] >= 0)
		close(ends[0]);
	close(ends[1]);
}

TestSuite(protocol, .init = connect_ends, .fini = close_ends, .timeout = 60);

static void send_bytes(const char *text, size_t length)
{
	cr_assert_eq(send(ends[0], text, length, MSG_NOSIGNAL), (ssize_t)length);
}

static void send_text(const char *text) { send_bytes(text, strlen(text)); }

static void expect_number(int number)
{
	json_t *document = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(control_receive(&reader, &document, &err), 0, "%s", err.message);
	cr_assert_eq(json_integer_value(json_object_get(document, "n")), number);
	json_decref(document);
}

static void expect_failure(int rc)
{
	json_t *document = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(control_receive(&reader, &document, &err), rc, "%s", err.message);
	cr_assert_eq(err.number, -rc);
	cr_assert_eq(strncmp(err.message, "control ", 8), 0, "%s", err.message);
}

Test(protocol, what_is_sent_is_received)
{
	json_t *document = json_pack("{s:i, s:s}", "n", 5, "text", "a line\nand \xc3\xa4");
	json_t *back = NULL;

	cr_assert_eq(control_send(ends[0], document, NULL), 0);
	cr_assert_eq(control_receive(&reader, &back, NULL), 0);
	cr_assert(json_equal(document, back));
	json_decref(document);
	json_decref(back);
}

Test(protocol, several_documents_in_one_read)
{
	send_text("{\"n\":1}\n{\"n\":2}\r\n {\"n\": 3} \n{\"n\":");
	expect_number(1);
	expect_number(2);
	expect_number(3);
	send_text("4}\n");
	expect_number(4);
}

static void *drip(void *opaque)
{
	for (const char *c = opaque; *c; c++) {
		send_bytes(c, 1);
		usleep(200);
	}
	return NULL;
}

Test(protocol, a_document_in_many_reads)
{
	pthread_t thread;

	cr_assert_eq(pthread_create(&thread, NULL, drip, (void *)"{\"n\": 1}\n{\"n\":2}\n"), 0);
	expect_number(1);
	expect_number(2);
	pthread_join(thread, NULL);
}

Test(protocol, what_does_not_come_in_time)
{
	json_t *document = NULL;
	struct err err = ERR_INIT;
	volatile bool cancel = false;

	send_text("{\"n\":1}\n{\"n\":");
	cr_assert_eq(control_receive_until(&reader, clock_now_ns() + 60000000000, NULL, &document, &err), 0, "%s", err.message);
	cr_assert_eq(json_integer_value(json_object_get(document, "n")), 1);
	json_decref(document);
	uint64_t began = clock_now_ns();
	cr_assert_eq(control_receive_until(&reader, began + 30000000, &cancel, &document, &err), -ETIMEDOUT);
	cr_assert_geq(clock_now_ns() - began, 30000000);
	cancel = true;
	cr_assert_eq(control_receive_until(&reader, 0, &cancel, &document, &err), -ECANCELED);
	cr_assert_eq(err.number, 0);
	send_text("2}\n"); /* what had come is not lost */
	cr_assert_eq(control_receive_until(&reader, 0, NULL, &document, &err), 0, "%s", err.message);
	cr_assert_eq(json_integer_value(json_object_get(document, "n")), 2);
	json_decref(document);
	close(ends[0]);
	ends[0] = -1;
	cr_assert_eq(control_receive_until(&reader, 0, NULL, &document, &err), -ENODATA);
}

static void *send_long(void *opaque)
{
	const struct buf *text = opaque;
	size_t sent = 0;

	while (sent < text->length) {
		ssize_t n = send(ends[0], text->data + sent, text->length - sent, MSG_NOSIGNAL);
		if (n <= 0)
			break;
		sent += (size_t)n;
	}
	return NULL;
}

/* {"n":7,"x":"aaaa..."}, `length` bytes with the newline. */
static void make_long(struct buf *text, size_t length)
{
	static const char head[] = "{\"n\":7,\"x\":\"";

	cr_assert_eq(buf_append(text, NULL, length, NULL), 0);
	memset(text->data, 'a', length);
	memcpy(text->data, head, sizeof(head) - 1);
	memcpy(text->data + length - 3, "\"}\n", 3);
}

Test(protocol, lines_up_to_the_limit)
{
	const size_t lengths[] = {4095, 4096, 4097, 8192, 1 << 19, CONTROL_LINE_MAX - 1, CONTROL_LINE_MAX};

	for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) {
		CLEANUP_BUF struct buf text = BUF_INIT;
		pthread_t thread;
		make_long(&text, lengths[i]);
		cr_assert_eq(pthread_create(&thread, NULL, send_long, &text), 0);
		expect_number(7);
		pthread_join(thread, NULL);
	}
	send_text("{\"n\":8}\n");
	expect_number(8);
}

Test(protocol, a_line_beyond_the_limit)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	pthread_t thread;

	make_long(&text, CONTROL_LINE_MAX * 3);
	cr_assert_eq(pthread_create(&thread, NULL, send_long, &text), 0);
	expect_failure(-EPROTO);
	cr_assert_leq(reader.capacity, CONTROL_LINE_MAX);
	shutdown(ends[1], SHUT_RDWR);
	pthread_join(thread, NULL);
}

Test(protocol, garbage)
{
	static const char *const lines[] = {"",
					    "x",
					    "[]",
					    "1",
					    "\"x\"",
					    "null",
					    "{",
					    "{}{}",
					    "{\"a\":1,\"a\":2}",
					    "{\"a\":\"\xff\"}",
					    "{\"a\":1e999}",
					    "\x01\x02",
					    "GET / HTTP/1.1"};

	for (size_t i = 0; i < ARRAY_LENGTH(lines); i++) {
		send_text(lines[i]);
		send_text("\n");
		expect_failure(-EPROTO);
	}
	send_bytes("{\"n\"\0:1}\n", 9);
	expect_failure(-EPROTO);
	send_text("{\"n\":1}\n"); /* the reader itself is still in step */
	expect_number(1);
}

Test(protocol, deep_nesting)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	pthread_t thread;

	cr_assert_eq(buf_append(&text, NULL, CONTROL_LINE_MAX, NULL), 0);
	memset(text.data, '[', text.length);
	memcpy(text.data, "{\"a\":", 5);
	text.data[text.length - 1] = '\n';
	cr_assert_eq(pthread_create(&thread, NULL, send_long, &text), 0);
	expect_failure(-EPROTO);
	pthread_join(thread, NULL);
}

Test(protocol, the_end_of_the_stream)
{
	send_text("{\"n\":1}\n{\"n\":2");
	close(ends[0]);
	ends[0] = -1;
	expect_number(1);
	expect_failure(-ENODATA);
	expect_failure(-ENODATA);
}

Test(protocol, sending_to_nobody)
{
	json_t *document = json_pack("{s:i}", "n", 1);
	struct err err = ERR_INIT;

	cr_assert_eq(shutdown(ends[1], SHUT_RDWR), 0);
	cr_assert_eq(control_send(ends[0], document, &err), -EPIPE);
	cr_assert_eq(err.number, EPIPE);
	cr_assert_lt(control_send(-1, document, NULL), 0);
	cr_assert_lt(control_send(ends[0], NULL, NULL), 0);
	json_decref(document);
}

Test(protocol, random_bytes)
{
	unsigned seed = 5;
	char bytes[512];

	for (int round = 0; round < 3000; round++) {
		size_t length = (size_t)rand_r(&seed) % sizeof(bytes) + 1;
		for (size_t i = 0; i < length; i++)
			bytes[i] =
				rand_r(&seed) % 3 ? "{}[]\",:01nulltrue \\u"[rand_r(&seed) % 20] : (char)rand_r(&seed);
		send_bytes(bytes, length);
		send_text("\n");
		unsigned lines = 1;
		for (size_t i = 0; i < length; i++)
			lines += bytes[i] == '\n';
		while (lines--) {
			json_t *document = NULL;
			if (control_receive(&reader, &document, NULL) == 0)
				json_decref(document);
		}
	}
	send_text("{\"n\":9}\n");
	expect_number(9);
}

/* --- errors --- */

static void round_trip(const struct err *given, struct err *back)
{
	json_t *data = control_error_to_json(given);

	cr_assert_not_null(data);
	json_t *error = json_pack("{s:i, s:O, s:o}", "code", CONTROL_ERROR_CODE, "message",
				  json_object_get(data, "message"), "data", data);
	cr_assert_not_null(error);
	control_error_from_json(error, back);
	json_decref(error);
}

Test(protocol, errors_go_there_and_back)
{
	static const enum err_class classes[] = {ERR_FAILED, ERR_USAGE,	  ERR_NOT_FOUND,
						 ERR_STATE,  ERR_DAMAGED, ERR_HOST};

	for (size_t i = 0; i < ARRAY_LENGTH(classes); i++) {
		struct err err = ERR_INIT, back = ERR_INIT;
		err_set(&err, classes[i], EBUSY, "disk %s: \"in use\"", "root");
		if (i % 2)
			err_hint(&err, "try again");
		round_trip(&err, &back);
		cr_expect_eq(back.class, classes[i]);
		cr_expect_str_eq(back.message, err.message);
		cr_expect_str_eq(back.hint, err.hint);
		cr_expect_neq(back.number, 0);
	}
}

Test(protocol, an_error_that_is_no_utf8_is_told_all_the_same)
{
	struct err err = ERR_INIT, back = ERR_INIT;

	err_set(&err, ERR_NOT_FOUND, ENOENT, "/home/\xe4/x: No such file");
	err_hint(&err, "look at \xff");
	round_trip(&err, &back);
	cr_assert_str_eq(back.message, "/home/?/x: No such file");
	cr_assert_str_eq(back.hint, "look at ?");
	cr_assert_eq(back.class, ERR_NOT_FOUND);
}

Test(protocol, errors_of_others)
{
	static const char *const texts[] = {"{}",
					    "[]",
					    "1",
					    "null",
					    "{\"message\":5,\"data\":7}",
					    "{\"message\":\"\",\"data\":{}}",
					    "{\"data\":{\"code\":\"nonsense\",\"hint\":[]}}"};

	for (size_t i = 0; i < ARRAY_LENGTH(texts); i++) {
		struct err err = ERR_INIT;
		json_t *error = json_loads(texts[i], JSON_DECODE_ANY, NULL);
		control_error_from_json(error, &err);
		cr_expect_neq(err.number, 0);
		cr_expect_eq(err.class, ERR_FAILED);
		cr_expect_neq(err.message[0], '\0', "%s", texts[i]);
		json_decref(error);
	}
}

Test(protocol, times)
{
	static const struct {
		uint64_t ns;
		const char *text;
	} cases[] = {{0, "1970-01-01T00:00:00.000000Z"},
		     {1000, "1970-01-01T00:00:00.000001Z"},
		     {951782400999999999, "2000-02-29T00:00:00.999999Z"},
		     {4102444799000000000, "2099-12-31T23:59:59.000000Z"}};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		json_t *time = control_time_to_json(cases[i].ns);
		cr_expect_str_eq(json_string_value(time), cases[i].text);
		json_decref(time);
	}
}
