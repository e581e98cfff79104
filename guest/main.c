/* vmcp-agent: the program that runs in a guest. docs/agent.md tells how to put it there. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Behind sys/socket.h, as it wants that. */
#include <linux/vm_sockets.h>

#include "base/buf.h"
#include "base/log.h"
#include "guest/agent.h"

#define FIRST_REST_MS 50u /* between two tries to reach the host: after a revert it is there at once */
#define LAST_REST_MS  2000u
#define HOOK_SECONDS  60u

struct options {
	const char *root, *socket;
	bool once;
};

static void say(const struct err *err) { log_error("%s%s%s", err->message, err->hint[0] ? "; " : "", err->hint); }

static int connect_host(const struct options *options)
{
	const struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_port = AGENT_PORT, .svm_cid = VMADDR_CID_HOST};
	struct sockaddr_un path = {.sun_family = AF_UNIX};
	const struct sockaddr *address = options->socket ? (const struct sockaddr *)&path : (const struct sockaddr *)&host;
	int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(path.sun_path, sizeof(path.sun_path), "%s", options->socket ? options->socket : "");
	if (fd < 0 || connect(fd, address, (socklen_t)(options->socket ? sizeof(path) : sizeof(host))) == 0)
		return fd;
	close(fd);
	return -1;
}

static int send_line(int fd, const char *key, const char *value)
{
	char line[AGENT_LINE_BYTES + 1];
	int length = snprintf(line, sizeof(line) - 1, "%s %s", key, value);

	if (length < 0 || length > (int)sizeof(line) - 2)
		length = (int)sizeof(line) - 2;
	for (int i = 0; i < length; i++)
		if (line[i] < ' ' || line[i] > '~')
			line[i] = '?';
	line[length++] = '\n';
	return send(fd, line, (size_t)length, MSG_NOSIGNAL) == length ? 0 : -EPIPE;
}

/* One byte at a time: it is little, and comes once in a life. -ENODATA: the connection has ended. */
static int read_line(int fd, char line[AGENT_LINE_BYTES], struct err *err)
{
	for (size_t used = 0; used < AGENT_LINE_BYTES; used++) {
		ssize_t n = read(fd, line + used, 1);

		if (n < 0 && errno == EINTR) {
			used--;
			continue;
		}
		if (n <= 0)
			return -ENODATA;
		if (line[used] == '\n' || line[used] == '\0') {
			line[used] = '\0';
			return 0;
		}
	}
	return err_set(err, ERR_FAILED, EPROTO, "the host's line is too long");
}

static int take_identity(int fd, struct agent_identity *identity, struct err *err)
{
	char line[AGENT_LINE_BYTES];
	int rc = 0;

	*identity = (struct agent_identity){0};
	while (rc == 0) {
		rc = read_line(fd, line, err);
		if (!rc)
			rc = agent_take_line(identity, line, err);
	}
	return rc < 0 ? rc : 0;
}

static int apply(int fd, struct agent *agent, const struct agent_identity *identity)
{
	enum agent_event event = AGENT_SAME;
	struct err err = ERR_INIT;
	int rc = agent_apply(agent, identity, &event, &err);

	if (event != AGENT_SAME)
		log_info("%s: %s %s", agent_event_name(event), identity->name, identity->uuid);
	if (rc) {
		say(&err);
		send_line(fd, "failed", err.message);
	}
	send_line(fd, "done", agent_event_name(event));
	return rc;
}

/* Until the host ends the connection; 1 if it never was one. */
static int serve(const struct options *options, struct agent *agent)
{
	struct agent_identity identity;
	struct err err = ERR_INIT;
	CLEANUP_CLOSE int fd = connect_host(options);
	int applied = 0;

	if (fd < 0 || send_line(fd, "agent", AGENT_VERSION))
		return 1;
	int rc = take_identity(fd, &identity, &err);
	while (!rc) {
		applied = apply(fd, agent, &identity);
		if (options->once)
			return applied;
		rc = take_identity(fd, &identity, &err);
	}
	if (rc == -EPROTO)
		say(&err);
	return rc == -EPROTO;
}

static int usage(void)
{
	fprintf(stderr, "usage: vmcp-agent [--once] [--root FOLDER] [--socket PATH]\n"
			"  --once    apply the identity once, and end\n"
			"  --root    change files below FOLDER, and nothing of the running kernel\n"
			"  --socket  reach the host at this UNIX socket, and not by vsock\n");
	return 2;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{"once", no_argument, NULL, 'o'}, {"root", required_argument, NULL, 'r'}, {"socket", required_argument, NULL, 's'}, {0}};
	struct options options = {.root = ""};
	unsigned rest_ms = FIRST_REST_MS;

	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		if (c == 'o')
			options.once = true;
		else if (c == 'r')
			options.root = optarg;
		else if (c == 's')
			options.socket = optarg;
		else
			return usage();
	}
	if (optind < argc)
		return usage();
	signal(SIGPIPE, SIG_IGN);
	log_set_sink(STDERR_FILENO, "agent");
	struct agent agent = {.root = options.root, .hook_seconds = HOOK_SECONDS};
	for (;;) {
		int rc = serve(&options, &agent);

		if (options.once)
			return rc ? 1 : 0;
		rest_ms = rc == 1 ? (rest_ms * 2 < LAST_REST_MS ? rest_ms * 2 : LAST_REST_MS) : FIRST_REST_MS;
		const struct timespec moment = {.tv_sec = rest_ms / 1000, .tv_nsec = (long)(rest_ms % 1000) * 1000000};
		nanosleep(&moment, NULL);
	}
}
