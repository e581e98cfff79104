#include "control/sleeper.h"

#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/log.h"

#define MAX_PORTS   (CONFIG_MAX_NETS * NET_MAX_FORWARDS)
#define MAX_CALLERS 64u
#define PUMP_BYTES  65536u

struct port {
	int fd;
	bool udp;
	struct sockaddr_in address;
};

/* Somebody who waits for the VM. */
struct caller {
	int fd;
	struct sockaddr_in address; /* where he called */
};

struct sleeper {
	struct port ports[MAX_PORTS];
	unsigned port_count;
	struct caller callers[MAX_CALLERS];
	unsigned caller_count;
};

/* --- listening --- */

static int listen_at(struct port *port, struct err *err)
{
	const uint8_t *a = (const uint8_t *)&port->address.sin_addr;

	port->fd = socket(AF_INET, (port->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (port->fd < 0)
		return err_sys(err, errno, "socket");
	if (!port->udp)
		setsockopt(port->fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
	if (bind(port->fd, (struct sockaddr *)&port->address, sizeof(port->address)) == 0 && (port->udp || listen(port->fd, MAX_CALLERS) == 0))
		return 0;
	int number = errno;
	err_set(err, number == EADDRINUSE ? ERR_STATE : ERR_FAILED, number, "%s port %u.%u.%u.%u:%u: %s", port->udp ? "udp" : "tcp", a[0], a[1], a[2],
		a[3], ntohs(port->address.sin_port), strerror(number));
	return -number;
}

static int add_port(struct sleeper *sleeper, const struct net_forward *forward, struct err *err)
{
	struct port *port = &sleeper->ports[sleeper->port_count++];

	*port = (struct port){.fd = -1, .udp = forward->udp};
	port->address.sin_family = AF_INET;
	port->address.sin_port = htons(forward->host_port);
	memcpy(&port->address.sin_addr, forward->host_address, 4);
	return listen_at(port, err);
}

int sleeper_create(const struct machine_config *config, struct sleeper **out, struct err *err)
{
	struct sleeper *sleeper = xcalloc(1, sizeof(*sleeper));
	int rc = 0;

	for (unsigned i = 0; !rc && i < config->net_count; i++)
		for (unsigned k = 0; !rc && config->nets[i].mode == NET_USER && k < config->nets[i].forward_count; k++)
			rc = add_port(sleeper, &config->nets[i].forwards[k], err);
	if (rc) {
		sleeper_destroy(sleeper);
		return rc;
	}
	*out = sleeper;
	return 0;
}

static void take_callers(struct sleeper *sleeper, const struct port *port)
{
	while (sleeper->caller_count < MAX_CALLERS) {
		int fd = accept4(port->fd, NULL, NULL, SOCK_CLOEXEC);

		if (fd < 0)
			return;
		sleeper->callers[sleeper->caller_count++] = (struct caller){.fd = fd, .address = port->address};
	}
}

int sleeper_wait(struct sleeper *sleeper, int fd, bool *wanted, struct err *err)
{
	struct pollfd list[MAX_PORTS + 1] = {{.fd = fd, .events = POLLIN}};

	*wanted = false;
	for (unsigned i = 0; i < sleeper->port_count; i++)
		list[i + 1] = (struct pollfd){.fd = sleeper->ports[i].fd, .events = POLLIN};
	while (poll(list, sleeper->port_count + 1, -1) < 0)
		if (errno != EINTR)
			return err_sys(err, errno, "poll");
	for (unsigned i = 0; i < sleeper->port_count; i++)
		*wanted |= list[i + 1].revents != 0;
	return 0;
}

void sleeper_stop_listening(struct sleeper *sleeper)
{
	for (unsigned i = 0; i < sleeper->port_count; i++) {
		struct port *port = &sleeper->ports[i];

		if (!port->udp && port->fd >= 0)
			take_callers(sleeper, port);
		if (port->fd >= 0)
			close(port->fd);
		port->fd = -1;
	}
}

/* --- handing through --- */

/* One way of a connection. */
struct way {
	int from, to;
	size_t at, used;
	bool ended;
	char data[PUMP_BYTES];
};

static void move(struct way *way, short readable, short writable)
{
	if (readable && way->used == 0 && !way->ended) {
		ssize_t got = read(way->from, way->data, sizeof(way->data));

		way->ended = got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
		way->at = 0;
		way->used = got > 0 ? (size_t)got : 0;
		if (way->ended)
			shutdown(way->to, SHUT_WR);
		writable = 1;
	}
	if (writable && way->used > 0) {
		ssize_t put = send(way->to, way->data + way->at, way->used, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (put < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		way->at += put > 0 ? (size_t)put : way->used;
		way->used -= put > 0 ? (size_t)put : way->used;
		way->ended |= put < 0; /* nobody reads it any more */
	}
}

static void pump(struct way *there, struct way *back)
{
	while (!there->ended || !back->ended || there->used || back->used) {
		struct pollfd list[2] = {{.fd = there->from}, {.fd = back->from}};

		list[0].events = (short)((there->used || there->ended ? 0 : POLLIN) | (back->used ? POLLOUT : 0));
		list[1].events = (short)((back->used || back->ended ? 0 : POLLIN) | (there->used ? POLLOUT : 0));
		if (poll(list, 2, -1) < 0 && errno != EINTR)
			return;
		/* An error of one side is the end of both ways: nothing comes or goes there any more. */
		if ((list[0].revents | list[1].revents) & (POLLERR | POLLNVAL))
			return;
		move(there, list[0].revents & (POLLIN | POLLHUP), list[1].revents & POLLOUT);
		move(back, list[1].revents & (POLLIN | POLLHUP), list[0].revents & POLLOUT);
		/* One that has left for good takes nothing any more. */
		if (((list[0].revents & POLLHUP) && there->ended && !there->used) || ((list[1].revents & POLLHUP) && back->ended && !back->used))
			return;
	}
}

static void *hand_through(void *opaque)
{
	struct caller *caller = opaque;
	struct sockaddr_in to = caller->address;
	CLEANUP_CLOSE int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (to.sin_addr.s_addr == htonl(INADDR_ANY))
		to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0) {
		struct way *ways = xcalloc(2, sizeof(*ways));

		ways[0].from = ways[1].to = caller->fd;
		ways[0].to = ways[1].from = fd;
		pump(&ways[0], &ways[1]);
		free(ways);
	}
	close(caller->fd);
	free(caller);
	return NULL;
}

void sleeper_hand_over(struct sleeper *sleeper)
{
	for (unsigned i = 0; i < sleeper->caller_count; i++) {
		struct caller *caller = xcalloc(1, sizeof(*caller));
		pthread_t thread;

		*caller = sleeper->callers[i];
		int rc = pthread_create(&thread, NULL, hand_through, caller);
		if (rc == 0) {
			pthread_detach(thread);
			continue;
		}
		log_error("a connection is cut off: thread: %s", strerror(rc));
		close(caller->fd);
		free(caller);
	}
	sleeper->caller_count = 0;
}

void sleeper_destroy(struct sleeper *sleeper)
{
	if (!sleeper)
		return;
	for (unsigned i = 0; i < sleeper->port_count; i++)
		if (sleeper->ports[i].fd >= 0)
			close(sleeper->ports[i].fd);
	for (unsigned i = 0; i < sleeper->caller_count; i++)
		close(sleeper->callers[i].fd);
	free(sleeper);
}
