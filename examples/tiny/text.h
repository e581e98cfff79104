/* Strings, numbers and lines of output, as far as a guest without a C library needs them. */
#ifndef TINY_TEXT_H
#define TINY_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *memset(void *to, int value, size_t bytes);
void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
size_t text_length(const char *text);
bool text_equal(const char *a, const char *b);

/* If text begins with prefix, returns what follows it, else NULL. */
const char *text_after(const char *text, const char *prefix);

/* A decimal or 0x number with an optional K, M or G behind it. False if it is anything else or too large. */
bool text_to_number(const char *text, uint64_t *number);

/* One line of output, built piece by piece. What does not fit is cut off; the newline always fits. */
struct line {
	size_t length;
	char text[512];
};

void line_start(struct line *line, const char *what); /* "tiny: what" */
void line_word(struct line *line, const char *word);
void line_number(struct line *line, const char *key, uint64_t value); /* " key=value" */
void line_hex(struct line *line, const char *key, uint64_t value);
void line_string(struct line *line, const char *key, const char *value);
void line_finish(struct line *line);

#endif
