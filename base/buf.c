#include "base/buf.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

int buf_append(struct buf *buf, const void *data, size_t length, struct err *err)
{
	if (length > SIZE_MAX / 2 - buf->length)
		return err_set(err, ERR_FAILED, ENOMEM, "buffer of %zu bytes: %zu more do not fit", buf->length,
			       length);
	size_t needed = buf->length + length;
	if (needed > buf->capacity) {
		size_t capacity = buf->capacity < 64 ? 64 : buf->capacity;
		while (capacity < needed)
			capacity *= 2;
		uint8_t *grown = realloc(buf->data, capacity);
		if (grown == NULL)
			return err_sys(err, ENOMEM, "buffer of %zu bytes", capacity);
		buf->data = grown;
		buf->capacity = capacity;
	}
	if (length > 0 && data != NULL)
		memcpy(buf->data + buf->length, data, length);
	else if (length > 0)
		memset(buf->data + buf->length, 0, length);
	buf->length = needed;
	return 0;
}

void buf_free(struct buf *buf)
{
	free(buf->data);
	*buf = BUF_INIT;
}

static void *or_abort(void *p, const char *what)
{
	if (p == NULL) {
		log_error("%s: out of memory", what);
		abort();
	}
	return p;
}

void *xcalloc(size_t count, size_t size)
{
	if (count == 0 || size == 0)
		count = size = 1;
	return or_abort(calloc(count, size), "xcalloc");
}

char *xstrdup(const char *text) { return or_abort(strdup(text), "xstrdup"); }

char *xasprintf(const char *format, ...)
{
	char *text = NULL;
	va_list args;
	va_start(args, format);
	if (vasprintf(&text, format, args) < 0)
		text = NULL;
	va_end(args);
	return or_abort(text, "xasprintf");
}
