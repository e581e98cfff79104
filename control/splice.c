#include "control/splice.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"

#define BACKLOG	   64
#define PUMP_BYTES 65536u

int splice_listen(const struct sockaddr_in *address, bool udp, struct err *err)
{
	const uint8_t *a = (const uint8_t *)&address->sin_addr;
	int fd = socket(AF_INET, (udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return err_sys(err, errno, "socket");
	/* Of UDP it would let in everybody. */
	if (!udp)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
	if (bind(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 && (udp || listen(fd, BACKLOG) == 0))
		return fd;
	int number = errno;
	close(fd);
	err_set(err, number == EADDRINUSE ? ERR_STATE : ERR_FAILED, number, "%s port %u.%u.%u.%u:%u: %s", udp ? "udp" : "tcp", a[0], a[1], a[2], a[3],
		ntohs(address->sin_port), strerror(number));
	return -number;
}

int splice_connect(const struct sockaddr_in *address)
{
	struct sockaddr_in to = *address;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	if (to.sin_addr.s_addr == htonl(INADDR_ANY))
		to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0)
		return fd;
	int number = errno;
	close(fd);
	return -number;
}

void splice_break(int fd)
{
	const struct linger now = {.l_onoff = 1};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
}

/* One way of a connection. */
struct way {
	int from, to;
	size_t at, used;
	bool ended;
	char data[PUMP_BYTES];
};

static bool is_passing(int number) { return number == EAGAIN || number == EINTR; }

/* False: the connection is broken. */
static bool take(struct way *way)
{
	if (way->used || way->ended)
		return true;
	ssize_t got = recv(way->from, way->data, sizeof(way->data), MSG_DONTWAIT);
	if (got < 0)
		return is_passing(errno);
	way->at = 0;
	way->used = (size_t)got;
	way->ended = got == 0;
	return true;
}

static bool give(struct way *way)
{
	if (!way->used)
		return true;
	ssize_t put = send(way->to, way->data + way->at, way->used, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (put < 0)
		return is_passing(errno);
	way->at += (size_t)put;
	way->used -= (size_t)put;
	return true;
}

static bool move(const struct splice *splice, struct way *way, short readable)
{
	bool before = way->ended;

	if (!give(way) || (readable && !take(way)) || !give(way))
		return false;
	if (!way->ended || before)
		return true;
	/* A process that was killed closes its sockets as one that has said all. */
	if (way->from == splice->server && splice->is_dead && splice->is_dead(splice->opaque))
		return false;
	shutdown(way->to, SHUT_WR);
	return true;
}

/* False: the connection was broken. */
static bool pump(const struct splice *splice, struct way *there, struct way *back)
{
	bool caller_left = false, server_left = false; /* in both directions: they take nothing any more */

	while (!there->ended || !back->ended || there->used || back->used) {
		struct pollfd list[2] = {{.fd = splice->caller}, {.fd = splice->server}};

		list[0].events = (short)((there->used || there->ended ? 0 : POLLIN) | (back->used ? POLLOUT : 0));
		list[1].events = (short)((back->used || back->ended ? 0 : POLLIN) | (there->used ? POLLOUT : 0));
		/* Who has left would wake us all the time. */
		for (int i = 0; i < 2; i++)
			if (!list[i].events && (i ? server_left : caller_left))
				list[i].fd = -1;
		if (poll(list, 2, -1) < 0 && errno != EINTR)
			return false;
		if (!move(splice, there, list[0].revents & (POLLIN | POLLHUP | POLLERR)) ||
		    !move(splice, back, list[1].revents & (POLLIN | POLLHUP | POLLERR)))
			return false;
		if ((list[0].revents | list[1].revents) & (POLLERR | POLLNVAL))
			return false;
		caller_left |= (list[0].revents & POLLHUP) != 0;
		server_left |= (list[1].revents & POLLHUP) != 0;
		if ((caller_left && there->ended && !there->used) || (server_left && back->ended && !back->used))
			return there->ended && back->ended && !there->used && !back->used;
	}
	return true;
}

void splice_run(const struct splice *splice)
{
	struct way *ways = xcalloc(2, sizeof(*ways));

	ways[0].from = ways[1].to = splice->caller;
	ways[0].to = ways[1].from = splice->server;
	ways[0].used = splice->first_bytes;
	if (splice->first_bytes)
		memcpy(ways[0].data, splice->first, splice->first_bytes);
	if (!pump(splice, &ways[0], &ways[1])) {
		splice_break(splice->caller);
		splice_break(splice->server);
	}
	free(ways);
}
