#include "control/server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/log.h"
#include "control/local_socket.h"
#include "control/protocol.h"

#define MAX_CONNECTIONS 64
#define SEND_SECONDS	5 /* a client that does not read for so long is given up: nothing may wait for it longer */

struct connection {
	struct control_server *server;
	struct control_reader reader;
	pthread_t thread;
	bool used, ended;
};

struct control_server {
	struct control_target *target;
	int listen_fd, stop_fd, dir;
	pthread_t acceptor;
	pthread_mutex_t lock;
	/* under lock */
	struct connection connections[MAX_CONNECTIONS];
	bool stopping;
};

static int error_code(const struct err *error)
{
	switch (error->number) {
	case ENOSYS:
		return -32601; /* JSON-RPC: method not found */
	case EPROTO:
		return -32700; /* JSON-RPC: parse error */
	default:
		return CONTROL_ERROR_CODE;
	}
}

static int send_response(const struct control_exchange *exchange, json_t *result, const struct err *error)
{
	json_t *response;

	if (error) {
		json_t *data = control_error_to_json(error);

		response =
			json_pack("{s:s, s:O, s:{s:i, s:O, s:o}}", "jsonrpc", "2.0", "id", exchange->id, "error",
				  "code", error_code(error), "message", json_object_get(data, "message"), "data", data);
	} else {
		response = json_pack("{s:s, s:O, s:o}", "jsonrpc", "2.0", "id", exchange->id, "result", result);
	}
	int rc = control_send(exchange->fd, response, NULL);
	json_decref(response);
	return rc;
}

/* Answers one request; false if the connection is at its end. */
static bool answer(struct connection *connection, const json_t *request)
{
	struct err error = ERR_INIT;
	const char *method = json_string_value(json_object_get(request, "method"));
	const json_t *params = json_object_get(request, "params");
	json_t *id = json_object_get(request, "id"), *result = NULL;
	struct control_exchange exchange = {
		.target = connection->server->target, .fd = connection->reader.fd, .reader = &connection->reader, .id = id ? id : json_null()};
	int rc;

	if (!method || (params && !json_is_object(params)))
		rc = err_set(&error, ERR_USAGE, EINVAL,
			     "control message: no request: `method` and `params` are missing or of another type");
	else
		rc = control_dispatch(&exchange, method, params, &result, &error);
	if (exchange.console_taken) {
		/* The console owns a duplicate of the socket by now, and has sent the response itself. */
		return false;
	}
	return send_response(&exchange, result, rc ? &error : NULL) == 0;
}

static void *connection_main(void *opaque)
{
	struct connection *connection = opaque;
	struct control_server *server = connection->server;
	struct err error = ERR_INIT;
	json_t *request;
	int rc;

	while ((rc = control_receive(&connection->reader, &request, &error)) == 0) {
		bool more = answer(connection, request);

		json_decref(request);
		if (!more)
			break;
	}
	if (rc == -EPROTO) {
		struct control_exchange exchange = {.fd = connection->reader.fd, .id = json_null()};

		send_response(&exchange, NULL, &error);
	}
	pthread_mutex_lock(&server->lock);
	close(connection->reader.fd);
	control_reader_free(&connection->reader);
	connection->ended = true;
	pthread_mutex_unlock(&server->lock);
	return NULL;
}

/* Under lock: joins threads that ended, and finds a free place; NULL if there is none. */
static struct connection *free_connection(struct control_server *server)
{
	struct connection *place = NULL;

	for (unsigned i = 0; i < MAX_CONNECTIONS; i++) {
		struct connection *connection = &server->connections[i];

		if (connection->used && connection->ended) {
			pthread_join(connection->thread, NULL);
			connection->used = false;
		}
		if (!connection->used)
			place = connection;
	}
	return place;
}

/* Says why, as far as the client's buffer takes it at once. */
static void refuse(int fd)
{
	struct control_exchange exchange = {.fd = fd, .id = json_null()};
	struct err error = ERR_INIT;

	log_warn("control socket: %d connections are open, one more is refused", MAX_CONNECTIONS);
	err_set(&error, ERR_STATE, EBUSY, "%d connections are open already", MAX_CONNECTIONS);
	err_hint(&error, "end some of the commands that wait for this VM");
	send_response(&exchange, NULL, &error);
	close(fd);
}

static void accept_one(struct control_server *server)
{
	const struct timespec moment = {.tv_nsec = 10000000};
	const struct timeval patience = {.tv_sec = SEND_SECONDS};
	int fd = accept4(server->listen_fd, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0) {
		nanosleep(&moment, NULL); /* no descriptor is free: not in a circle at full speed */
		return;
	}
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	pthread_mutex_lock(&server->lock);
	struct connection *connection = free_connection(server);
	if (!connection) {
		refuse(fd);
		goto out;
	}
	*connection = (struct connection){.server = server, .reader.fd = fd, .used = true};
	if (pthread_create(&connection->thread, NULL, connection_main, connection)) {
		connection->used = false;
		close(fd);
	}
out:
	pthread_mutex_unlock(&server->lock);
}

static void *accept_main(void *opaque)
{
	struct control_server *server = opaque;
	struct pollfd list[2] = {{.fd = server->listen_fd, .events = POLLIN},
				 {.fd = server->stop_fd, .events = POLLIN}};

	while (poll(list, 2, -1) >= 0 || errno == EINTR) {
		if (list[1].revents)
			break;
		if (list[0].revents)
			accept_one(server);
	}
	return NULL;
}

int control_server_start(int dir, struct control_target *target, struct control_server **out, struct err *err)
{
	struct control_server *server = xcalloc(1, sizeof(*server));
	int rc;

	server->target = target;
	server->dir = fcntl(dir, F_DUPFD_CLOEXEC, 0);
	server->stop_fd = eventfd(0, EFD_CLOEXEC);
	pthread_mutex_init(&server->lock, NULL);
	/* The folder has mode 0700, so nobody else gets near the socket. */
	server->listen_fd = rc = local_socket_listen(dir, "control.sock", err);
	if (rc < 0)
		goto fail;
	rc = pthread_create(&server->acceptor, NULL, accept_main, server);
	if (rc) {
		rc = err_sys(err, rc, "control thread");
		close(server->listen_fd);
		goto fail;
	}
	*out = server;
	return 0;
fail:
	pthread_mutex_destroy(&server->lock);
	close(server->stop_fd);
	close(server->dir);
	free(server);
	return rc;
}

void control_server_stop(struct control_server *server)
{
	uint64_t one = 1;

	if (!server)
		return;
	(void)!write(server->stop_fd, &one, sizeof(one));
	pthread_join(server->acceptor, NULL);
	unlinkat(server->dir, "control.sock", 0);
	pthread_mutex_lock(&server->lock);
	for (unsigned i = 0; i < MAX_CONNECTIONS; i++)
		if (server->connections[i].used && !server->connections[i].ended)
			shutdown(server->connections[i].reader.fd, SHUT_RD);
	pthread_mutex_unlock(&server->lock);
	for (unsigned i = 0; i < MAX_CONNECTIONS; i++)
		if (server->connections[i].used)
			pthread_join(server->connections[i].thread, NULL);
	close(server->listen_fd);
	close(server->stop_fd);
	close(server->dir);
	pthread_mutex_destroy(&server->lock);
	free(server);
}
