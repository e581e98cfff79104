#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/terminal.h"
#include "cli/cli.h"
#include "control/client.h"

#define ESCAPE_BYTE	 0x1d /* Ctrl-] */
#define SCROLLBACK_BYTES 8192

static int write_all(int fd, const void *data, size_t length)
{
	const char *bytes = data;

	while (length) {
		ssize_t n = write(fd, bytes, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		bytes += n;
		length -= (size_t)n;
	}
	return 0;
}

/* Until the escape byte (true) or the end of the VM (false). The end of stdin ends typing only. */
static bool move_bytes(int fd, bool terminal)
{
	struct pollfd list[2] = {{.fd = fd, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
	char bytes[4096];

	for (;;) {
		if (poll(list, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return false;
		}
		if (list[0].revents) {
			ssize_t n = read(fd, bytes, sizeof(bytes));

			if (n <= 0 || write_all(STDOUT_FILENO, bytes, (size_t)n))
				return false;
		}
		if (list[1].revents) {
			ssize_t n = read(STDIN_FILENO, bytes, sizeof(bytes));
			char *escape = terminal && n > 0 ? memchr(bytes, ESCAPE_BYTE, (size_t)n) : NULL;

			if (n <= 0)
				list[1].fd = -1;
			else if (write_all(fd, bytes, escape ? (size_t)(escape - bytes) : (size_t)n))
				return false;
			if (escape)
				return true;
		}
	}
}

static void attached(struct cli *cli, const char *name, int fd, const struct buf *early)
{
	bool terminal = isatty(STDIN_FILENO);
	struct terminal_size size = terminal_size(STDIN_FILENO);

	/* A serial line has no way to tell the guest of the window's size. */
	if (terminal && !cli->quiet)
		fprintf(stderr, "vmcp: console of %s; Ctrl-] leaves it, all other keys are the guest's\nvmcp: this window, for the guest: stty rows %u cols %u\n", name,
			size.rows, size.columns);
	terminal = terminal && terminal_set_raw(STDIN_FILENO, false);
	bool left = write_all(STDOUT_FILENO, early->data, early->length) == 0 && move_bytes(fd, terminal);
	terminal_restore();
	if (terminal && !cli->quiet)
		fprintf(stderr, "\nvmcp: %s\n", left ? "console left; the VM runs on" : "the VM has ended");
}

static int run(struct cli *cli, struct err *err)
{
	CLEANUP_BUF struct buf early = BUF_INIT;
	struct control_client *client = NULL;
	char name[STORE_NAME_BYTES];
	struct store *store;
	int rc = cli_open_vm(cli, &store, name, err);

	if (rc)
		return rc;
	rc = control_connect(store, name, &client, err);
	store_close(store);
	if (rc)
		return rc;
	int fd = control_attach_console(client, SCROLLBACK_BYTES, &early, err);
	if (fd >= 0)
		attached(cli, name, fd, &early);
	control_close(client);
	return fd < 0 ? fd : 0;
}

static const struct cli_option none[] = {{0}};

const struct cli_command cli_console = {
	.name = "console",
	.synopsis = "[VM]",
	.summary = "attach to a VM's serial console",
	.help = "On a terminal Ctrl-] leaves the console; the VM runs on. Where stdin is no terminal its bytes pass "
		"untouched.\n"
		"Several may watch; the one that came first types.\n"
		"A serial line does not carry the size of the window: what is said first ends with the `stty` that tells the guest.",
	.options = none,
	.words = "@running",
	.max_arguments = 1,
	.run = run,
};
