/* The console log: nothing is lost, files begin at lines, no more of them than are kept. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "control/console_log.h"
#include "tests/lib/check.h"

#define LIMIT 1000u

static char folder[] = "/tmp/vmcp-console-log-XXXXXX";

static size_t read_file(int dir, const char *name, struct buf *out)
{
	*out = BUF_INIT;
	return file_read_all(dir, name, 1u << 20, out, NULL) ? 0 : out->length;
}

/* Numbered lines, in pieces that do not end where lines do. */
static void write_lines(int fd, unsigned count)
{
	char text[64];
	size_t length = 0;

	for (unsigned i = 0; i < count; i++) {
		length += (size_t)snprintf(text + length, sizeof(text) - length, "line %06u\n", i);
		size_t now = length > 7 ? 7 : length;

		for (; length; length -= now, memmove(text, text + now, length), now = length > 7 ? 7 : length)
			CHECK(write(fd, text, now) == (ssize_t)now);
	}
}

static void test_rotates(int dir)
{
	unsigned lines = 600, next;
	struct console_log *log;
	struct buf text;
	int fd;

	CHECK(console_log_open(dir, LIMIT, &log, &fd, NULL) == 0);
	write_lines(fd, lines);
	close(fd);
	console_log_close(log);
	CHECK(faccessat(dir, "console.log.4", F_OK, 0) != 0);
	/* The newest is the last; going back, each file ends where the next one begins. */
	next = lines;
	for (unsigned i = 0; i <= CONSOLE_LOG_KEPT; i++) {
		char name[32];
		unsigned first;

		snprintf(name, sizeof(name), i ? "console.log.%u" : "console.log", i);
		size_t length = read_file(dir, name, &text);
		CHECK(i == 0 || (length >= LIMIT && length < LIMIT + 12));
		CHECK(length % 12 == 0);
		if (length) {
			CHECK(sscanf((char *)text.data, "line %u\n", &first) == 1);
			CHECK(first + length / 12 == next);
			next = first;
		}
		buf_free(&text);
	}
	CHECK(next < lines && next > 0);
}

static void test_begins_anew(int dir)
{
	struct console_log *log;
	struct buf text;
	int fd;

	CHECK(console_log_open(dir, LIMIT, &log, &fd, NULL) == 0);
	CHECK(write(fd, "second run", 10) == 10);
	close(fd);
	console_log_close(log);
	CHECK(read_file(dir, "console.log", &text) == 10);
	buf_free(&text);
	CHECK(read_file(dir, "console.log.1", &text) > 0 && !memcmp(text.data, "line ", 5));
	buf_free(&text);
}

/* Output without a line's end does not grow a file for ever. */
static void test_endless_line(int dir)
{
	char block[1024];
	struct console_log *log;
	struct buf text;
	int fd;

	memset(block, 'x', sizeof(block));
	CHECK(console_log_open(dir, LIMIT, &log, &fd, NULL) == 0);
	for (unsigned i = 0; i < 200; i++)
		CHECK(write(fd, block, sizeof(block)) == (ssize_t)sizeof(block));
	close(fd);
	console_log_close(log);
	size_t length = read_file(dir, "console.log.1", &text);
	CHECK(length >= 65536 && length < 65536 + LIMIT + 8192);
	buf_free(&text);
}

/* A folder that takes no file: the writer is not held up. */
static void test_cannot_write(void)
{
	int dir = open("/proc/self", O_RDONLY | O_DIRECTORY | O_CLOEXEC), fd;
	struct console_log *log;

	CHECK(dir >= 0);
	CHECK(console_log_open(dir, LIMIT, &log, &fd, NULL) == 0);
	write_lines(fd, 20000);
	close(fd);
	console_log_close(log);
	close(dir);
}

int main(void)
{
	CHECK(mkdtemp(folder) != NULL);
	int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(dir >= 0);
	test_rotates(dir);
	test_begins_anew(dir);
	test_endless_line(dir);
	test_cannot_write();
	close(dir);
	file_remove_tree(AT_FDCWD, folder, NULL);
	return check_report();
}
