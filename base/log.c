#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static struct {
	_Atomic int level; /* atomic, as a later change of the level is harmless */
	int fd;		   /* set once, before threads */
	char name[128];	   /* set once, before threads */
} log_state = {.level = LOG_LEVEL_INFO, .fd = STDERR_FILENO};

void log_set_level(enum log_level level) { atomic_store_explicit(&log_state.level, (int)level, memory_order_relaxed); }

enum log_level log_get_level(void)
{
	return (enum log_level)atomic_load_explicit(&log_state.level, memory_order_relaxed);
}

void log_set_sink(int fd, const char *name)
{
	log_state.fd = fd;
	snprintf(log_state.name, sizeof(log_state.name), "%s", name != NULL ? name : "");
}

/* One write per line, so that the lines of several threads and processes do not mix. */
static void log_line(enum log_level level, const char *format, va_list args)
{
	if (level > log_get_level())
		return;

	int saved_errno = errno;
	char line[2048];
	const char *name = log_state.name;
	int n = snprintf(line, sizeof(line), "vmcp: %s%s", name, name[0] != '\0' ? ": " : "");
	size_t used = n > 0 ? (size_t)n : 0;
	errno = saved_errno; /* for %m */
	n = vsnprintf(line + used, sizeof(line) - used, format, args);
	if (n > 0)
		used += (size_t)n;
	if (used > sizeof(line) - 2)
		used = sizeof(line) - 2;
	while (used > 0 && line[used - 1] == '\n')
		used--;
	/* What a guest or a peer put into a message must not look like a line of our own. */
	for (size_t i = 0; i < used; i++) {
		if ((unsigned char)line[i] < 0x20 && line[i] != '\t')
			line[i] = '?';
	}
	line[used++] = '\n';

	const char *at = line;
	while (used > 0) {
		ssize_t written = write(log_state.fd, at, used);
		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			break; /* nowhere left to report to */
		at += written;
		used -= (size_t)written;
	}
	errno = saved_errno;
}

#define LOG_FUNCTION(function, level)                                                                                  \
	void function(const char *format, ...)                                                                         \
	{                                                                                                              \
		va_list args;                                                                                          \
		va_start(args, format);                                                                                \
		log_line((level), format, args);                                                                       \
		va_end(args);                                                                                          \
	}

LOG_FUNCTION(log_error, LOG_LEVEL_ERROR)
LOG_FUNCTION(log_warn, LOG_LEVEL_WARN)
LOG_FUNCTION(log_info, LOG_LEVEL_INFO)
LOG_FUNCTION(log_debug, LOG_LEVEL_DEBUG)
