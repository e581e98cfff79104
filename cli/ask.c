/* Keys that are asked for. On the terminal itself: stdin may be a pipe or the guest's console, and stdout an export. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/terminal.h"
#include "cli/cli.h"

#define LINE_BYTES 1024

enum { KEY_INTERRUPT = 3, KEY_END = 4, KEY_BACKSPACE = 8, KEY_CLEAR = 21, KEY_DELETE = 127 };

static int cancelled(struct err *err) { return err_set(err, ERR_FAILED, ECANCELED, "cancelled"); }

/* The terminal is raw: nothing of the line is shown. */
static int read_keys(int terminal, char line[LINE_BYTES], size_t *length, struct err *err)
{
	unsigned char key;

	for (*length = 0;;) {
		ssize_t n = read(terminal, &key, 1);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_sys(err, errno, "terminal");
		if (n == 0 || key == KEY_INTERRUPT || key == KEY_END)
			return cancelled(err);
		if (key == '\r' || key == '\n')
			return 0;
		if (key == KEY_CLEAR)
			*length = 0;
		else if (key == KEY_BACKSPACE || key == KEY_DELETE)
			*length -= *length > 0;
		else if (*length < LINE_BYTES)
			line[(*length)++] = (char)key;
		else
			return err_set(err, ERR_USAGE, E2BIG, "more than %d bytes", LINE_BYTES);
	}
}

static int ask(int terminal, const char *option, const char *what, char line[LINE_BYTES], size_t *length, struct err *err)
{
	if (!terminal_set_raw(terminal, true))
		return err_sys(err, errno, "terminal");
	dprintf(terminal, "vmcp: %s: %s: ", option, what);
	int rc = read_keys(terminal, line, length, err);
	dprintf(terminal, "\n");
	terminal_restore();
	return rc;
}

int cli_ask_key(const char *option, bool is_new, struct buf *out, struct err *err)
{
	CLEANUP_CLOSE int terminal = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);
	char line[LINE_BYTES], again[LINE_BYTES];
	size_t length = 0, same = 0;

	if (terminal < 0) {
		err_set(err, ERR_USAGE, ENOTTY, "%s: there is no terminal to ask on", option);
		err_hint(err, "name a file that holds the key");
		return -ENOTTY;
	}
	int rc = ask(terminal, option, is_new ? "new key" : "key", line, &length, err);
	if (!rc && length && is_new)
		rc = ask(terminal, option, "once more", again, &same, err);
	if (!rc && length && is_new && (same != length || memcmp(line, again, length)))
		rc = err_set(err, ERR_USAGE, EINVAL, "the two are not the same");
	if (!rc && !length)
		rc = err_set(err, ERR_USAGE, EINVAL, "an empty key is none");
	rc = rc ? (err_prefix(err, "%s", option), rc) : buf_append(out, line, length, err);
	explicit_bzero(line, sizeof(line));
	explicit_bzero(again, sizeof(again));
	return rc;
}
