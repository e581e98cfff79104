#include "control/server_name.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"

enum { RECORD_HANDSHAKE = 22, RECORD_HEADER_BYTES = 5, RECORD_MAX_BYTES = 16384 };
enum { CLIENT_HELLO = 1, EXTENSION_SERVER_NAME = 0, HOST_NAME = 0 };

/* IPv6 addresses in brackets are no names of servers. */
static int take_name(const uint8_t *text, size_t length, char name[SERVER_NAME_BYTES])
{
	if (length && text[length - 1] == '.')
		length--;
	if (length == 0 || length >= SERVER_NAME_BYTES)
		return -ENOENT;
	for (size_t i = 0; i < length; i++) {
		if (!isalnum(text[i]) && (!text[i] || !strchr("-._", text[i])))
			return -ENOENT;
		name[i] = (char)tolower(text[i]);
	}
	name[length] = '\0';
	return 1;
}

/* --- TLS --- */

/* What is left of a structure whose length is known. `short_of` it: more is to come. */
struct part {
	const uint8_t *at;
	size_t left;
};

/* A number of `bytes` bytes; false if they are not there. */
static bool take_number(struct part *from, unsigned bytes, size_t *out)
{
	if (from->left < bytes)
		return false;
	*out = 0;
	for (unsigned i = 0; i < bytes; i++)
		*out = *out << 8 | from->at[i];
	from->at += bytes;
	from->left -= bytes;
	return true;
}

/* A vector with a length of `bytes` bytes before it. */
static bool take_vector(struct part *from, unsigned bytes, struct part *out)
{
	size_t length;

	if (!take_number(from, bytes, &length) || length > from->left)
		return false;
	*out = (struct part){from->at, length};
	from->at += length;
	from->left -= length;
	return true;
}

static int find_in_names(struct part extension, char name[SERVER_NAME_BYTES])
{
	struct part list, one;
	size_t type;

	if (!take_vector(&extension, 2, &list))
		return -EPROTO;
	while (list.left) {
		if (!take_number(&list, 1, &type) || !take_vector(&list, 2, &one))
			return -EPROTO;
		if (type == HOST_NAME)
			return take_name(one.at, one.left, name);
	}
	return -ENOENT;
}

/* Behind its header, and whole (RFC 8446, 4.1.2). */
static int find_in_hello(struct part hello, char name[SERVER_NAME_BYTES])
{
	struct part skipped, extensions, one;
	size_t number;

	if (hello.left < 34)
		return -EPROTO;
	hello.at += 34; /* version and random */
	hello.left -= 34;
	if (!take_vector(&hello, 1, &skipped) || !take_vector(&hello, 2, &skipped) || !take_vector(&hello, 1, &skipped))
		return -EPROTO;
	if (!hello.left)
		return -ENOENT;
	if (!take_vector(&hello, 2, &extensions))
		return -EPROTO;
	while (extensions.left) {
		if (!take_number(&extensions, 2, &number) || !take_vector(&extensions, 2, &one))
			return -EPROTO;
		if (number == EXTENSION_SERVER_NAME)
			return find_in_names(one, name);
	}
	return -ENOENT;
}

/* A hello may lie in several records: their contents are put together. */
static int find_in_tls(const uint8_t *data, size_t length, char name[SERVER_NAME_BYTES])
{
	uint8_t message[SERVER_NAME_LOOK];
	size_t used = 0, wanted = 4;

	for (size_t at = 0; used < wanted;) {
		if (length - at < RECORD_HEADER_BYTES)
			return 0;
		size_t record = get_be16(data + at + 3), there = length - at - RECORD_HEADER_BYTES;
		if (data[at] != RECORD_HANDSHAKE || data[at + 1] != 3 || record == 0 || record > RECORD_MAX_BYTES)
			return -EPROTO;
		size_t take = record < there ? record : there;
		if (take > sizeof(message) - used)
			take = sizeof(message) - used;
		memcpy(message + used, data + at + RECORD_HEADER_BYTES, take);
		used += take;
		if (used >= 4) {
			wanted = 4 + ((size_t)message[1] << 16 | get_be16(message + 2));
			if (message[0] != CLIENT_HELLO)
				return -EPROTO;
			if (wanted > sizeof(message))
				return -ENOENT;
		}
		if (used < wanted && there < record)
			return 0;
		at += RECORD_HEADER_BYTES + record;
	}
	return find_in_hello((struct part){message + 4, wanted - 4}, name);
}

/* --- HTTP --- */

/* The end of the line that begins at `at`, where its '\n' is; `length` if it has none yet. */
static size_t line_end(const uint8_t *data, size_t at, size_t length)
{
	const uint8_t *end = memchr(data + at, '\n', length - at);

	return end ? (size_t)(end - data) : length;
}

static int take_host(const uint8_t *value, size_t length, char name[SERVER_NAME_BYTES])
{
	while (length && (*value == ' ' || *value == '\t')) {
		value++;
		length--;
	}
	while (length && strchr(" \t\r", value[length - 1]) && value[length - 1])
		length--;
	const uint8_t *colon = memchr(value, ':', length);
	if (colon) {
		for (const uint8_t *c = colon + 1; c < value + length; c++)
			if (!isdigit(*c))
				return -ENOENT;
		length = (size_t)(colon - value);
	}
	return take_name(value, length, name);
}

/* METHOD SP: so much must be there to see that it is no HTTP; a request of text alone is refused at its first line's end. */
static bool may_be_request(const uint8_t *data, size_t length)
{
	size_t i = 0;

	while (i < length && i < 20 && isupper(data[i]))
		i++;
	return i == length || (i > 0 && i < 20 && data[i] == ' ');
}

static int find_in_http(const uint8_t *data, size_t length, char name[SERVER_NAME_BYTES])
{
	static const char version[] = " HTTP/1.";
	size_t end = line_end(data, 0, length), text = end;

	if (!may_be_request(data, length))
		return -EPROTO;
	if (end == length)
		return 0;
	if (text && data[text - 1] == '\r')
		text--;
	if (text < sizeof(version) || memcmp(data + text - sizeof(version), version, sizeof(version) - 1))
		return -EPROTO;
	for (size_t at = end + 1; at < length; at = end + 1) {
		end = line_end(data, at, length);
		if (end == length)
			return 0;
		if (end == at || (end == at + 1 && data[at] == '\r'))
			return -ENOENT; /* the header's end */
		if (end - at > 5 && !strncasecmp((const char *)data + at, "host:", 5))
			return take_host(data + at + 5, end - at - 5, name);
	}
	return 0;
}

int server_name_find(const uint8_t *data, size_t length, char name[SERVER_NAME_BYTES])
{
	if (length == 0)
		return 0;
	int rc = data[0] == RECORD_HANDSHAKE ? find_in_tls(data, length, name) : find_in_http(data, length, name);
	return rc == 0 && length >= SERVER_NAME_LOOK ? -ENOENT : rc;
}
