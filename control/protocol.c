#include "control/protocol.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "base/buf.h"
#include "base/clock.h"

#define CANCEL_LOOK_NS 20000000ull

int control_send(int fd, const json_t *document, struct err *err)
{
	char *text = document ? json_dumps(document, JSON_COMPACT) : NULL;
	size_t length, sent = 0;

	if (!text)
		return err_sys(err, ENOMEM, "control message");
	length = strlen(text);
	text[length++] = '\n'; /* takes the place of the NUL */
	while (sent < length) {
		ssize_t n = send(fd, text + sent, length - sent, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			int number = errno;

			free(text);
			return err_sys(err, number, "control socket");
		}
		sent += (size_t)n;
	}
	free(text);
	return 0;
}

static int read_more(struct control_reader *reader, int flags, struct err *err)
{
	if (reader->length == reader->capacity) {
		size_t capacity = reader->capacity ? reader->capacity * 2 : 4096;

		if (reader->length >= CONTROL_LINE_MAX)
			return err_set(err, ERR_FAILED, EPROTO, "control message: longer than %u bytes",
				       CONTROL_LINE_MAX);
		char *data = realloc(reader->data, capacity);
		if (!data)
			return err_sys(err, ENOMEM, "control message");
		reader->data = data;
		reader->capacity = capacity;
	}
	ssize_t n;
	do
		n = recv(reader->fd, reader->data + reader->length, reader->capacity - reader->length, flags);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return err_sys(err, errno, "control socket");
	if (n == 0)
		return err_set(err, ERR_FAILED, ENODATA, "control socket: closed by the other side");
	reader->length += (size_t)n;
	return 0;
}

/* The document in the first `length` bytes and their end, which go. */
static int take_line(struct control_reader *reader, size_t length, json_t **out, struct err *err)
{
	json_error_t why;

	*out = json_loadb(reader->data, length, JSON_REJECT_DUPLICATES, &why);
	memmove(reader->data, reader->data + length + 1, reader->length - length - 1);
	reader->length -= length + 1;
	if (!*out)
		return err_set(err, ERR_FAILED, EPROTO, "control message: %s", why.text);
	if (!json_is_object(*out)) {
		json_decref(*out);
		*out = NULL;
		return err_set(err, ERR_FAILED, EPROTO, "control message: not an object");
	}
	return 0;
}

/* True if there is a whole line, of *length bytes; the first `searched` bytes are known to have no end. */
static bool find_line(const struct control_reader *reader, size_t searched, size_t *length)
{
	const char *end = reader->length > searched ? memchr(reader->data + searched, '\n', reader->length - searched) : NULL;

	*length = end ? (size_t)(end - reader->data) : 0;
	return end != NULL;
}

int control_receive(struct control_reader *reader, json_t **out, struct err *err)
{
	size_t searched = 0, length;

	while (!find_line(reader, searched, &length)) {
		searched = reader->length;
		int rc = read_more(reader, 0, err);
		if (rc)
			return rc;
	}
	return take_line(reader, length, out, err);
}

/* Until something came, or it is time to look at the clock or at who may cancel. */
static void wait_for_bytes(const struct control_reader *reader, uint64_t deadline_ns, bool may_be_cancelled)
{
	struct pollfd one = {.fd = reader->fd, .events = POLLIN};
	uint64_t now = clock_now_ns(), left = !deadline_ns ? UINT64_MAX : deadline_ns > now ? deadline_ns - now : 0;
	struct timespec moment;

	if (may_be_cancelled && left > CANCEL_LOOK_NS)
		left = CANCEL_LOOK_NS;
	moment = clock_timespec(left);
	ppoll(&one, 1, left == UINT64_MAX ? NULL : &moment, NULL);
}

int control_receive_until(struct control_reader *reader, uint64_t deadline_ns, const volatile bool *cancel, json_t **out, struct err *err)
{
	struct err one = ERR_INIT;
	size_t searched = 0, length;

	while (!find_line(reader, searched, &length)) {
		searched = reader->length;
		int rc = read_more(reader, MSG_DONTWAIT, &one);
		if (rc && rc != -EAGAIN) {
			if (err)
				*err = one;
			return rc;
		}
		if (!rc && find_line(reader, searched, &length))
			break;
		if (cancel && *cancel)
			return -ECANCELED;
		if (deadline_ns && clock_now_ns() >= deadline_ns)
			return -ETIMEDOUT;
		if (rc)
			wait_for_bytes(reader, deadline_ns, cancel != NULL);
	}
	return take_line(reader, length, out, err);
}

void control_reader_free(struct control_reader *reader)
{
	free(reader->data);
	*reader = (struct control_reader){.fd = -1};
}

/* A message may name a file whose name is no UTF-8; what cannot be said in JSON becomes '?'. */
static json_t *any_text(const char *text)
{
	json_t *json = json_string(text);

	if (json)
		return json;
	char *copy = xstrdup(text);
	for (char *c = copy; *c; c++)
		if ((unsigned char)*c >= 0x80)
			*c = '?';
	json = json_string(copy);
	free(copy);
	return json;
}

json_t *control_error_to_json(const struct err *err)
{
	return json_pack("{s:s, s:o, s:o}", "code", err_class_name(err->class), "message", any_text(err->message),
			 "hint", any_text(err->hint));
}

static const char *text_of(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "";
}

void control_error_from_json(const json_t *error, struct err *err)
{
	const json_t *data = json_object_get(error, "data");
	enum err_class class = data ? err_class_from_name(text_of(data, "code")) : ERR_FAILED;

	const char *message = text_of(error, "message");

	err_set(err, class, EIO, "%s", *message ? message : "the other side reports an error without a message");
	if (*text_of(data, "hint"))
		err_hint(err, "%s", text_of(data, "hint"));
}

json_t *control_text_or_null(const char *text) { return text && *text ? json_string(text) : json_null(); }

json_t *control_time_to_json(uint64_t wall_ns)
{
	time_t seconds = (time_t)(wall_ns / 1000000000u);
	char text[64];
	struct tm tm;

	gmtime_r(&seconds, &tm);
	size_t used = strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(text + used, sizeof(text) - used, ".%06" PRIu64 "Z", wall_ns / 1000 % 1000000);
	return json_string(text);
}
