#include "text.h"

void *memset(void *to, int value, size_t bytes)
{
	void *at = to;

	__asm__ volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
	return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
	void *at = to;

	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(bytes) : : "memory");
	return to;
}

size_t text_length(const char *text)
{
	size_t length = 0;

	while (text[length])
		length++;
	return length;
}

bool text_equal(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

const char *text_after(const char *text, const char *prefix)
{
	while (*prefix) {
		if (*text++ != *prefix++)
			return NULL;
	}
	return text;
}

static bool digit_value(char c, unsigned int base, unsigned int *value)
{
	unsigned int found;

	if (c >= '0' && c <= '9')
		found = (unsigned int)(c - '0');
	else if (c >= 'a' && c <= 'f')
		found = (unsigned int)(c - 'a') + 10;
	else if (c >= 'A' && c <= 'F')
		found = (unsigned int)(c - 'A') + 10;
	else
		return false;
	*value = found;
	return found < base;
}

static bool suffix_shift(const char *suffix, unsigned int *shift)
{
	*shift = 0;
	if (!suffix[0])
		return true;
	if (suffix[1])
		return false;
	if (suffix[0] == 'K')
		*shift = 10;
	else if (suffix[0] == 'M')
		*shift = 20;
	else if (suffix[0] == 'G')
		*shift = 30;
	return *shift != 0;
}

bool text_to_number(const char *text, uint64_t *number)
{
	unsigned int base = 10, digit, shift;
	const char *at = text_after(text, "0x");
	uint64_t value = 0;
	const char *first;

	if (at)
		base = 16;
	else
		at = text;
	for (first = at; digit_value(*at, base, &digit); at++) {
		if (value > (UINT64_MAX - digit) / base)
			return false;
		value = value * base + digit;
	}
	if (at == first || !suffix_shift(at, &shift) || value > UINT64_MAX >> shift)
		return false;
	*number = value << shift;
	return true;
}

static void line_char(struct line *line, char c)
{
	if (line->length + 1 < sizeof(line->text)) /* the last byte is kept for the newline */
		line->text[line->length++] = c;
}

void line_word(struct line *line, const char *word)
{
	while (*word)
		line_char(line, *word++);
}

void line_start(struct line *line, const char *what)
{
	line->length = 0;
	line_word(line, "tiny: ");
	line_word(line, what);
}

static void line_key(struct line *line, const char *key)
{
	line_char(line, ' ');
	line_word(line, key);
	line_char(line, '=');
}

void line_number(struct line *line, const char *key, uint64_t value)
{
	char digits[20];
	unsigned int count = 0;

	line_key(line, key);
	do {
		digits[count++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (count)
		line_char(line, digits[--count]);
}

void line_hex(struct line *line, const char *key, uint64_t value)
{
	unsigned int shift = 64;

	line_key(line, key);
	line_word(line, "0x");
	while (shift) {
		shift -= 4;
		line_char(line, "0123456789abcdef"[value >> shift & 15]);
	}
}

void line_string(struct line *line, const char *key, const char *value)
{
	line_key(line, key);
	line_word(line, value);
}

void line_finish(struct line *line) { line->text[line->length++] = '\n'; }
