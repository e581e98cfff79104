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
#include "control/splice.h"

#define MAX_PORTS   (CONFIG_MAX_NETS * NET_MAX_FORWARDS)
#define MAX_CALLERS 64u

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

static int add_port(struct sleeper *sleeper, const struct net_forward *forward, struct err *err)
{
	struct port *port = &sleeper->ports[sleeper->port_count++];

	*port = (struct port){.fd = -1, .udp = forward->udp};
	port->address.sin_family = AF_INET;
	port->address.sin_port = htons(forward->host_port);
	memcpy(&port->address.sin_addr, forward->host_address, 4);
	port->fd = splice_listen(&port->address, port->udp, err);
	return port->fd < 0 ? port->fd : 0;
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

static void *hand_through(void *opaque)
{
	struct caller *caller = opaque;
	CLEANUP_CLOSE int fd = splice_connect(&caller->address);

	if (fd >= 0)
		splice_run(&(struct splice){.caller = caller->fd, .server = fd});
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
