#include "base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* Messages become one line of a log and one JSON string: no control characters, and no half UTF-8 sequence
 * where a long text was cut. */
static void tidy(char *text, size_t capacity)
{
	size_t length = strlen(text);

	for (size_t i = 0; i < length; i++) {
		if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
			text[i] = '?';
	}
	if (length + 1 < capacity)
		return;
	size_t start = length;
	while (start > 0 && length - start < 4) {
		unsigned char c = (unsigned char)text[--start];
		size_t needed = c < 0x80 ? 1 : c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 0;
		if (needed == 0)
			continue;
		if (start + needed > length)
			text[start] = '\0';
		return;
	}
}

/* Joins to "A: B"; either may be the old content of `out`. */
static void join(char *out, size_t capacity, const char *a, const char *b)
{
	char text[sizeof(((struct err *)0)->message)];

	size_t used = strnlen(a, sizeof(text) - 1);
	memcpy(text, a, used);
	const char *parts[] = {": ", b};
	for (size_t i = 0; i < 2; i++) {
		size_t n = strnlen(parts[i], sizeof(text) - 1 - used);
		memcpy(text + used, parts[i], n);
		used += n;
	}
	text[used] = '\0';
	if (used >= capacity)
		used = capacity - 1;
	memcpy(out, text, used);
	out[used] = '\0';
	tidy(out, capacity);
}

int err_set(struct err *err, enum err_class class, int number, const char *format, ...)
{
	if (number <= 0)
		number = EIO;
	if (err == NULL)
		return -number;

	/* The arguments may point into *err, so it is not touched before they were read. */
	struct err fresh = {.number = number, .class = class};
	va_list args;
	va_start(args, format);
	vsnprintf(fresh.message, sizeof(fresh.message), format, args);
	va_end(args);
	tidy(fresh.message, sizeof(fresh.message));
	*err = fresh;
	return -number;
}

static enum err_class class_of(int number)
{
	switch (number) {
	case ENOENT:
		return ERR_NOT_FOUND;
	case EBUSY:
		return ERR_STATE;
	default:
		return ERR_FAILED;
	}
}

int err_sys(struct err *err, int number, const char *format, ...)
{
	if (number < 0)
		number = -number;
	if (number <= 0)
		number = EIO;
	if (err == NULL)
		return -number;

	struct err fresh = {.number = number, .class = class_of(number)};
	va_list args;
	va_start(args, format);
	vsnprintf(fresh.message, sizeof(fresh.message), format, args);
	va_end(args);
	char text[128];
	join(fresh.message, sizeof(fresh.message), fresh.message, strerror_r(number, text, sizeof(text)));
	/* The one errno with the same mend wherever it comes from. */
	if (number == ENOSPC || number == EDQUOT)
		snprintf(fresh.hint, sizeof(fresh.hint), "free space on that filesystem, then try again");
	*err = fresh;
	return -number;
}

static int failing(const struct err *err) { return err == NULL || err->number <= 0 ? -EIO : -err->number; }

int err_prefix(struct err *err, const char *format, ...)
{
	if (err == NULL)
		return failing(err);

	char text[sizeof(err->message)];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	join(err->message, sizeof(err->message), text, err->message);
	return failing(err);
}

int err_hint(struct err *err, const char *format, ...)
{
	if (err == NULL || err->hint[0] != '\0')
		return failing(err);

	char text[sizeof(err->hint)];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	tidy(text, sizeof(text));
	memcpy(err->hint, text, sizeof(text));
	return failing(err);
}

static const struct {
	enum err_class class;
	const char *name;
} class_names[] = {
	{ERR_FAILED, "failed"}, {ERR_USAGE, "usage"},	  {ERR_NOT_FOUND, "not-found"},
	{ERR_STATE, "state"},	{ERR_DAMAGED, "damaged"}, {ERR_HOST, "host"},
};

const char *err_class_name(enum err_class class)
{
	for (size_t i = 0; i < sizeof(class_names) / sizeof(class_names[0]); i++) {
		if (class_names[i].class == class)
			return class_names[i].name;
	}
	return "failed";
}

enum err_class err_class_from_name(const char *name)
{
	for (size_t i = 0; name != NULL && i < sizeof(class_names) / sizeof(class_names[0]); i++) {
		if (strcmp(class_names[i].name, name) == 0)
			return class_names[i].class;
	}
	return ERR_FAILED;
}
