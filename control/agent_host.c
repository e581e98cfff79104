#include "control/agent_host.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "control/local_socket.h"
#include "control/protocol.h"
#include "guest/protocol.h"

#define LOG_REST_NS 60000000000u
#define MAX_AGENTS 8u /* one is right; anybody in the guest may connect */

struct agent {
	int fd; /* -1: free */
	char line[AGENT_LINE_BYTES];
	size_t used;
	unsigned lines;
	bool greeted;
};

struct agent_host {
	struct control_target *target;
	struct agent_host_identity identity;
	int dir, listen_fd, stop_fd;
	pthread_t thread;
	/* owner: the thread */
	struct agent agents[MAX_AGENTS];
	uint64_t logged_ns; /* when a problem was last written to the log */
	pthread_mutex_t lock;
	/* under lock */
	unsigned connected;
	char event[16];
	char problem[AGENT_LINE_BYTES];
};

/* --- what the guest is told --- */

/* A line for each card that is given an IP address: where it is on the PCI bus, as a guest may call it anything. malloc. */
static char *list_cards(struct machine *machine)
{
	char *lines = xstrdup("");
	struct machine_net_stats card;

	for (unsigned i = 0; machine_net_stats(machine, i, &card); i++) {
		const uint8_t *m = card.mac;
		char *longer;

		if (!card.ip[0])
			continue;
		longer = xasprintf("%scard 0000:00:%02x.0 %02x:%02x:%02x:%02x:%02x:%02x %s\n", lines, card.slot, m[0], m[1], m[2], m[3], m[4], m[5], card.ip);
		free(lines);
		lines = longer;
	}
	return lines;
}

/* *cards: malloc. */
static void ask_machine(const struct agent_host *host, char generation[MACHINE_GENERATION_BYTES], char **cards)
{
	struct control_target *target = host->target;

	generation[0] = '\0';
	pthread_rwlock_rdlock(&target->machine_lock);
	if (target->machine)
		machine_generation(target->machine, generation);
	*cards = target->machine ? list_cards(target->machine) : xstrdup("");
	pthread_rwlock_unlock(&target->machine_lock);
}

static char *make_seed(void)
{
	uint8_t bytes[AGENT_SEED_BYTES];
	char *text = xcalloc(1, 2 * sizeof(bytes) + 1);

	if (getrandom(bytes, sizeof(bytes), 0) != (ssize_t)sizeof(bytes))
		abort(); /* the kernel does not fail for so few bytes */
	put_hex(text, bytes, sizeof(bytes));
	return text;
}

static bool tell(const struct agent_host *host, int fd)
{
	char generation[MACHINE_GENERATION_BYTES], time[40] = "";
	uint64_t now = clock_wall_ns();
	const char *hostname = host->identity.hostname;
	CLEANUP_FREE char *seed = make_seed(), *cards = NULL;

	ask_machine(host, generation, &cards);
	if (host->identity.tell_time)
		snprintf(time, sizeof(time), "time %llu.%09llu\n", (unsigned long long)(now / 1000000000), (unsigned long long)(now % 1000000000));
	CLEANUP_FREE char *text =
		xasprintf("vmcp " AGENT_VERSION "\nuuid %s\ngeneration %s\nname %s\n%s%s%s%s%sseed %s\nend\n", host->identity.uuid, generation, host->target->name,
			  *hostname ? "hostname " : "", hostname, *hostname ? "\n" : "", cards, time, seed);
	size_t length = strlen(text);
	/* A new socket has room for so little. */
	return send(fd, text, length, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)length;
}

/* --- what the guest says --- */

static void drop(struct agent_host *host, struct agent *agent)
{
	close(agent->fd);
	agent->fd = -1;
	pthread_mutex_lock(&host->lock);
	host->connected -= agent->greeted;
	pthread_mutex_unlock(&host->lock);
}

static void note_problem(struct agent_host *host, const char *text)
{
	pthread_mutex_lock(&host->lock);
	snprintf(host->problem, sizeof(host->problem), "%s", text);
	pthread_mutex_unlock(&host->lock);
	/* A guest must not fill the log. */
	if (host->logged_ns && clock_now_ns() - host->logged_ns < LOG_REST_NS)
		return;
	host->logged_ns = clock_now_ns();
	log_warn("agent in the guest: %s", text);
}

static bool note_event(struct agent_host *host, const char *event)
{
	static const char *const known[] = {"same", "first", "life", "clone"};
	size_t i = 0;

	while (i < ARRAY_LENGTH(known) && strcmp(known[i], event))
		i++;
	if (i == ARRAY_LENGTH(known))
		return false;
	pthread_mutex_lock(&host->lock);
	snprintf(host->event, sizeof(host->event), "%s", event);
	pthread_mutex_unlock(&host->lock);
	return true;
}

static bool take_greeting(struct agent_host *host, struct agent *agent)
{
	if (agent->greeted)
		return false;
	agent->greeted = true;
	pthread_mutex_lock(&host->lock);
	host->connected++;
	host->event[0] = host->problem[0] = '\0';
	pthread_mutex_unlock(&host->lock);
	return true;
}

/* False: that is no agent. */
static bool take_line(struct agent_host *host, struct agent *agent)
{
	const char *line = agent->line;

	for (const char *c = line; *c; c++)
		if (*c < ' ' || *c > '~')
			return false;
	if (++agent->lines > AGENT_MAX_LINES)
		return false;
	if (!strcmp(line, "agent " AGENT_VERSION))
		return take_greeting(host, agent);
	if (!agent->greeted)
		return false;
	if (!strncmp(line, "done ", 5))
		return note_event(host, line + 5);
	if (!strncmp(line, "failed ", 7))
		note_problem(host, line + 7);
	return true; /* what a newer one says is passed over */
}

static void listen_to(struct agent_host *host, struct agent *agent)
{
	char data[AGENT_LINE_BYTES];
	ssize_t got = recv(agent->fd, data, sizeof(data), MSG_DONTWAIT);
	bool good = got > 0;

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	for (ssize_t i = 0; good && i < got; i++) {
		if (data[i] != '\n') {
			agent->line[agent->used++] = data[i] ? data[i] : '\1'; /* refused with the line */
			good = agent->used < sizeof(agent->line);
			continue;
		}
		agent->line[agent->used] = '\0';
		agent->used = 0;
		good = take_line(host, agent);
	}
	if (!good)
		drop(host, agent);
}

/* --- life --- */

static void accept_one(struct agent_host *host)
{
	int fd = accept4(host->listen_fd, NULL, NULL, SOCK_CLOEXEC);
	unsigned i = 0;

	if (fd < 0)
		return;
	while (i < MAX_AGENTS && host->agents[i].fd >= 0)
		i++;
	if (i == MAX_AGENTS || !tell(host, fd)) {
		close(fd);
		return;
	}
	host->agents[i] = (struct agent){.fd = fd};
}

static void *main_of(void *opaque)
{
	struct agent_host *host = opaque;

	pthread_setname_np(pthread_self(), "vmcp-agent");
	for (;;) {
		struct pollfd list[MAX_AGENTS + 2] = {{.fd = host->stop_fd, .events = POLLIN}, {.fd = host->listen_fd, .events = POLLIN}};

		for (unsigned i = 0; i < MAX_AGENTS; i++)
			list[i + 2] = (struct pollfd){.fd = host->agents[i].fd, .events = POLLIN};
		if (poll(list, MAX_AGENTS + 2, -1) < 0 && errno != EINTR)
			log_error("agent: poll: %s", strerror(errno));
		if (list[0].revents)
			return NULL;
		/* Ends first: a guest's new life connects behind the end of its old one. */
		for (unsigned i = 0; i < MAX_AGENTS; i++)
			if (list[i + 2].revents)
				listen_to(host, &host->agents[i]);
		if (list[1].revents)
			accept_one(host);
	}
}

int agent_host_start(int dir, struct control_target *target, const struct agent_host_identity *identity, struct agent_host **out, struct err *err)
{
	struct agent_host *host = xcalloc(1, sizeof(*host));
	char name[32];
	int rc;

	host->target = target;
	host->identity = *identity;
	for (unsigned i = 0; i < MAX_AGENTS; i++)
		host->agents[i].fd = -1;
	pthread_mutex_init(&host->lock, NULL);
	host->dir = fcntl(dir, F_DUPFD_CLOEXEC, 0);
	host->stop_fd = eventfd(0, EFD_CLOEXEC);
	snprintf(name, sizeof(name), "vsock.sock_%u", AGENT_PORT);
	host->listen_fd = rc = local_socket_listen(dir, name, err);
	if (rc >= 0) {
		rc = pthread_create(&host->thread, NULL, main_of, host);
		if (rc) {
			rc = err_sys(err, rc, "thread of the guest's agent");
			close(host->listen_fd);
		}
	}
	if (rc == 0) {
		*out = host;
		return 0;
	}
	close(host->dir);
	close(host->stop_fd);
	pthread_mutex_destroy(&host->lock);
	free(host);
	return rc;
}

void agent_host_stop(struct agent_host *host)
{
	char name[32];

	if (!host)
		return;
	eventfd_write(host->stop_fd, 1);
	pthread_join(host->thread, NULL);
	snprintf(name, sizeof(name), "vsock.sock_%u", AGENT_PORT);
	unlinkat(host->dir, name, 0);
	for (unsigned i = 0; i < MAX_AGENTS; i++)
		if (host->agents[i].fd >= 0)
			close(host->agents[i].fd);
	close(host->listen_fd);
	close(host->stop_fd);
	close(host->dir);
	pthread_mutex_destroy(&host->lock);
	free(host);
}

json_t *agent_host_to_json(struct agent_host *host)
{
	if (!host)
		return json_null();
	pthread_mutex_lock(&host->lock);
	json_t *result = json_pack("{s:b, s:o, s:o}", "connected", host->connected > 0, "event", control_text_or_null(host->event), "problem",
				   control_text_or_null(host->problem));
	pthread_mutex_unlock(&host->lock);
	return result;
}
