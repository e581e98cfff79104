/* A growing byte buffer and scoped cleanup. Not for use in the pause: it allocates. */
#ifndef VMCP_BASE_BUF_H
#define VMCP_BASE_BUF_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/err.h"

struct buf {
	uint8_t *data; /* NULL while empty */
	size_t length;
	size_t capacity;
};

#define BUF_INIT ((struct buf){0})

/* Appends; -ENOMEM with the buffer unchanged. data == NULL appends zeroes. */
int buf_append(struct buf *buf, const void *data, size_t length, struct err *err);
void buf_free(struct buf *buf); /* leaves BUF_INIT */

/* malloc/calloc that never return NULL for want of a few bytes: they log and abort, as an out-of-memory
 * for a small object at start cannot be mended. Sizes that come from outside use malloc and check. */
void *xcalloc(size_t count, size_t size);
char *xstrdup(const char *text);
char *xasprintf(const char *format, ...) __attribute__((format(printf, 1, 2)));

static inline void cleanup_free(void *p) { free(*(void **)p); }
static inline void cleanup_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}
#define CLEANUP_FREE __attribute__((cleanup(cleanup_free)))
#define CLEANUP_CLOSE __attribute__((cleanup(cleanup_close)))
#define CLEANUP_BUF __attribute__((cleanup(buf_free)))

#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

#endif
