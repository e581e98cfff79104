/* Names of servers in the first bytes of TLS and HTTP: found however the bytes come, and nothing else taken for one. */
#include "control/server_name.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/buf.h"

/* --- making a ClientHello --- */

struct bytes {
	uint8_t data[20000];
	size_t length;
};
static void put(struct bytes *b, const void *data, size_t length)
{
	memcpy(b->data + b->length, data, length);
	b->length += length;
}
static void number(struct bytes *b, unsigned bytes, size_t value)
{
	for (unsigned i = bytes; i-- > 0;)
		b->data[b->length++] = (uint8_t)(value >> (8 * i));
}
static void vector(struct bytes *b, unsigned bytes, const void *data, size_t length)
{
	number(b, bytes, length);
	put(b, data, length);
}

/* The handshake message; `padding` bytes of another extension before the name. */
static void make_hello(struct bytes *out, const char *name, size_t name_length, size_t padding, unsigned name_type)
{
	static struct bytes body, extensions, list;
	static const uint8_t zeroes[16000];
	body.length = extensions.length = list.length = 0;
	number(&list, 1, name_type);
	vector(&list, 2, name, name_length);
	number(&extensions, 2, 21);
	vector(&extensions, 2, zeroes, padding);
	number(&extensions, 2, 0);
	number(&extensions, 2, list.length + 2);
	vector(&extensions, 2, list.data, list.length);
	number(&body, 2, 0x0303);
	put(&body, zeroes, 32);
	vector(&body, 1, zeroes, 32);
	vector(&body, 2, "\x13\x01", 2);
	vector(&body, 1, "\0", 1);
	vector(&body, 2, extensions.data, extensions.length);
	out->length = 0;
	number(out, 1, 1);
	vector(out, 3, body.data, body.length);
}
/* In records of `most` bytes. */
static void make_records(struct bytes *out, const struct bytes *message, size_t most)
{
	out->length = 0;
	for (size_t done = 0; done < message->length;) {
		size_t n = message->length - done < most ? message->length - done : most;
		put(out, "\x16\x03\x01", 3);
		vector(out, 2, message->data + done, n);
		done += n;
	}
}

static struct bytes message, records;

static void expect(const uint8_t *data, size_t length, const char *want)
{
	char name[SERVER_NAME_BYTES] = "";
	cr_expect_eq(server_name_find(data, length, name), 1);
	cr_expect_str_eq(name, want);
	/* Not from less. */
	for (size_t part = 0; part < length; part++) {
		int rc = server_name_find(data, part, name);
		cr_expect(rc == 0 || rc == 1, "%zu of %zu: %d", part, length, rc);
		cr_expect(rc == 0 || !strcmp(name, want));
	}
}

Test(server_name, tls)
{
	static const size_t sizes[] = {1, 2, 5, 60, 16384};
	make_hello(&message, "Web-1.Example.ORG", 17, 10, 0);
	for (size_t i = 0; i < ARRAY_LENGTH(sizes); i++) {
		make_records(&records, &message, sizes[i]);
		expect(records.data, records.length, "web-1.example.org");
	}
	make_hello(&message, "a", 1, 0, 0);
	make_records(&records, &message, 16384);
	expect(records.data, records.length, "a");
	/* Behind the hello, whatever it is. */
	put(&records, "\0\0\0\0\0", 5);
	char name[SERVER_NAME_BYTES];
	cr_expect_eq(server_name_find(records.data, records.length, name), 1);
}

static int find_in_hello(const char *name, size_t length, size_t padding, unsigned type)
{
	char out[SERVER_NAME_BYTES];
	make_hello(&message, name, length, padding, type);
	make_records(&records, &message, 16384);
	return server_name_find(records.data, records.length, out);
}

Test(server_name, tls_without_a_good_one)
{
	char name[SERVER_NAME_BYTES], longer[300];
	memset(longer, 'a', sizeof(longer));
	cr_expect_eq(find_in_hello("", 0, 0, 0), -ENOENT);
	cr_expect_eq(find_in_hello("a b", 3, 0, 0), -ENOENT);
	cr_expect_eq(find_in_hello("a\0b", 3, 0, 0), -ENOENT, "no end of a string");
	cr_expect_eq(find_in_hello("../etc", 6, 0, 0), -ENOENT);
	cr_expect_eq(find_in_hello(longer, 256, 0, 0), -ENOENT);
	cr_expect_eq(find_in_hello(longer, 255, 0, 0), 1);
	cr_expect_eq(find_in_hello("a", 1, 0, 7), -ENOENT, "another type of name");
	/* A hello that is larger than what is looked at. */
	make_hello(&message, "a", 1, 15900, 0);
	make_records(&records, &message, 8000);
	cr_expect_eq(server_name_find(records.data, records.length, name), 1);
	message.data[1] = 1;
	make_records(&records, &message, 8000);
	cr_expect_eq(server_name_find(records.data, records.length, name), -ENOENT);
	/* Each length that is wrong is found or means that there is less: nothing is read outside (under a sanitizer). */
	make_hello(&message, "web", 3, 4, 0);
	for (size_t i = 0; i < message.length; i++)
		for (unsigned v = 0; v < 256; v += 51) {
			uint8_t before = message.data[i];
			message.data[i] = (uint8_t)v;
			make_records(&records, &message, 16384);
			int rc = server_name_find(records.data, records.length, name);
			cr_expect(rc == 1 || rc == 0 || rc == -ENOENT || rc == -EPROTO);
			message.data[i] = before;
		}
}

Test(server_name, http)
{
	static const struct {
		const char *text, *want;
	} good[] = {
		{"GET / HTTP/1.1\r\nHost: web-1.example.org\r\n", "web-1.example.org"},
		{"GET /a?b HTTP/1.1\r\nAccept: x\r\nhOsT:\t WEB-1:8080 \r\n", "web-1"},
		{"OPTIONS * HTTP/1.0\nHost:web_2.\n", "web_2"},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(good); i++)
		expect((const uint8_t *)good[i].text, strlen(good[i].text), good[i].want);
}

Test(server_name, others)
{
	static const struct {
		const char *text;
		int want;
	} cases[] = {
		{"", 0},
		{"GET / HTT", 0},
		{"GET / HTTP/1.1\r\nA: b\r\n\r\nHost: x\r\n", -ENOENT},
		{"GET / HTTP/1.1\r\nHost: \r\n", -ENOENT},
		{"GET / HTTP/1.1\r\nHost: a b\r\n", -ENOENT},
		{"GET / HTTP/1.1\r\nHost: [::1]:80\r\n", -ENOENT},
		{"GET / HTTP/1.1\r\nHost: a:8x\r\n", -ENOENT},
		{"GET / HTTP/1.1\r\nHost: a/b\r\n", -ENOENT},
		{"GET /\r\n", -EPROTO},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", -EPROTO},
		{"SSH-2.0-OpenSSH_9.2\r\n", -EPROTO},
		{"get / HTTP/1.1\r\n", -EPROTO},
		{"\x16\x03\x01", 0},
		{"\x16\x02\x01\x01\x01", -EPROTO},
		{"\x17\x03\x01\x01\x01", -EPROTO},
		{"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", -EPROTO},
	};
	char name[SERVER_NAME_BYTES];
	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++)
		cr_expect_eq(server_name_find((const uint8_t *)cases[i].text, strlen(cases[i].text), name), cases[i].want, "%s", cases[i].text);
	/* A client that goes on and on. */
	static char endless[SERVER_NAME_LOOK + 1];
	memset(endless, 'x', sizeof(endless));
	memcpy(endless, "GET /", 5);
	cr_expect_eq(server_name_find((const uint8_t *)endless, SERVER_NAME_LOOK - 1, name), 0);
	cr_expect_eq(server_name_find((const uint8_t *)endless, SERVER_NAME_LOOK, name), -ENOENT);
}
