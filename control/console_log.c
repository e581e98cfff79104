#include "control/console_log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/log.h"

#define LINE_BYTES 65536u /* a line that is longer is cut where a new file begins */

struct console_log {
	int dir, pipe_fd; /* immutable */
	size_t limit;
	pthread_t thread;
	/* owner: the thread */
	int fd; /* -1: could not be opened */
	size_t bytes;
	bool told;
};

static void tell(struct console_log *log)
{
	if (!log->told)
		log_warn("console.log: %s: what the guest says is not logged", strerror(errno));
	log->told = true;
}

/* console.log.2 becomes .3 and so on, and a new file is begun. */
static void rotate(struct console_log *log)
{
	char from[32], to[32];

	if (log->fd >= 0)
		close(log->fd);
	for (int i = CONSOLE_LOG_KEPT; i > 0; i--) {
		snprintf(to, sizeof(to), "console.log.%d", i);
		snprintf(from, sizeof(from), i > 1 ? "console.log.%d" : "console.log", i - 1);
		renameat(log->dir, from, log->dir, to);
	}
	log->fd = openat(log->dir, "console.log", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
	log->bytes = 0;
	if (log->fd < 0)
		tell(log);
}

static void put(struct console_log *log, const char *bytes, size_t length)
{
	log->bytes += length;
	while (length && log->fd >= 0) {
		ssize_t n = write(log->fd, bytes, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			tell(log);
			return;
		}
		log->told = false;
		bytes += n;
		length -= (size_t)n;
	}
}

/* How much of it still goes into the present file; `*full`: the rest goes into a new one. */
static size_t share(const struct console_log *log, const char *bytes, size_t length, bool *full)
{
	size_t room = log->bytes < log->limit ? log->limit - log->bytes : 0;

	*full = length > room;
	if (!*full)
		return length;
	const char *end = memchr(bytes + room, '\n', length - room);
	if (end)
		return (size_t)(end - bytes) + 1;
	*full = log->bytes + length >= log->limit + LINE_BYTES;
	return length;
}

static void *log_main(void *opaque)
{
	struct console_log *log = opaque;
	char bytes[4096];
	ssize_t n;

	while ((n = read(log->pipe_fd, bytes, sizeof(bytes))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			break;
		for (size_t done = 0; done < (size_t)n;) {
			bool full;
			size_t now = share(log, bytes + done, (size_t)n - done, &full);

			put(log, bytes + done, now);
			done += now;
			if (full)
				rotate(log);
		}
	}
	return NULL;
}

int console_log_open(int dir, size_t limit, struct console_log **out, int *fd, struct err *err)
{
	struct console_log *log;
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return err_sys(err, errno, "console.log: pipe");
	log = xcalloc(1, sizeof(*log));
	*log = (struct console_log){.dir = dir, .pipe_fd = ends[0], .limit = limit, .fd = -1};
	rotate(log);
	int rc = pthread_create(&log->thread, NULL, log_main, log);
	if (rc) {
		close(ends[0]);
		close(ends[1]);
		if (log->fd >= 0)
			close(log->fd);
		free(log);
		return err_sys(err, rc, "console.log: thread");
	}
	*out = log;
	*fd = ends[1];
	return 0;
}

void console_log_close(struct console_log *log)
{
	if (!log)
		return;
	pthread_join(log->thread, NULL);
	if (log->fd >= 0)
		close(log->fd);
	close(log->pipe_fd);
	free(log);
}
