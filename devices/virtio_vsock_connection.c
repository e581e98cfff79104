/* Connections of the socket device: the host's UNIX sockets on one side, the guest's packets on the other. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "devices/virtio_vsock_internal.h"

#define TYPE_STREAM	1u
#define FIRST_HOST_PORT 0x40000000u

/* --- the table --- */

static void watch(struct vsock_connection *c)
{
	struct err err = ERR_INIT;
	uint32_t events = (c->readable || c->ended ? 0u : (uint32_t)EPOLLIN) | (c->buffer_used > 0 ? (uint32_t)EPOLLOUT : 0u);

	if (c->hung || events == c->events)
		return;
	if (loop_modify(c->v->loop, c->source, events, &err) < 0)
		log_error("vsock: %s", err.message);
	c->events = events;
}

static void destroy(struct vsock_connection *c)
{
	loop_remove(c->v->loop, c->source);
	close(c->fd);
	free(c->buffer);
	free(c);
}

static void drop(struct vsock_connection *c)
{
	struct virtio_vsock *v = c->v;

	for (unsigned i = 0; i < VSOCK_MAX_CONNECTIONS; i++)
		if (v->connections[i] == c)
			v->connections[i] = NULL;
	destroy(c);
}

static void owe_reset(struct virtio_vsock *v, uint32_t host_port, uint32_t guest_port)
{
	/* More than that can only be a guest that asks and asks without looking at answers. */
	if (v->reset_count < VSOCK_MAX_CONNECTIONS)
		v->resets[v->reset_count++] = (struct vsock_reset){.host_port = host_port, .guest_port = guest_port};
	vsock_wake(v);
}

static void drop_with_reset(struct vsock_connection *c)
{
	if (c->state != VSOCK_LINE && !c->request) /* else the guest has never heard of it */
		owe_reset(c->v, c->host_port, c->guest_port);
	drop(c);
}

void vsock_close_all(struct virtio_vsock *v)
{
	for (unsigned i = 0; i < VSOCK_MAX_CONNECTIONS; i++) {
		if (v->connections[i] != NULL)
			destroy(v->connections[i]);
		v->connections[i] = NULL;
	}
	v->reset_count = 0;
}

static struct vsock_connection *find(struct virtio_vsock *v, uint32_t host_port, uint32_t guest_port)
{
	for (unsigned i = 0; i < VSOCK_MAX_CONNECTIONS; i++) {
		struct vsock_connection *c = v->connections[i];
		if (c != NULL && c->state != VSOCK_LINE && c->host_port == host_port && c->guest_port == guest_port)
			return c;
	}
	return NULL;
}

static void ready(void *opaque, uint32_t events);

/* Takes over the descriptor. NULL, and it is closed, if there are too many. */
static struct vsock_connection *add(struct virtio_vsock *v, int fd, enum vsock_state state)
{
	struct err err = ERR_INIT;
	unsigned i = 0;

	while (i < VSOCK_MAX_CONNECTIONS && v->connections[i] != NULL)
		i++;
	struct vsock_connection *c = xcalloc(1, sizeof(*c));
	*c = (struct vsock_connection){.v = v, .fd = fd, .state = state, .events = EPOLLIN};
	if (i == VSOCK_MAX_CONNECTIONS || loop_add(v->loop, fd, EPOLLIN, ready, c, &c->source, &err) < 0) {
		log_warn("vsock: a connection is refused: %s", i == VSOCK_MAX_CONNECTIONS ? "there are too many" : err.message);
		close(fd);
		free(c);
		return NULL;
	}
	v->connections[i] = c;
	return c;
}

/* --- the host's side --- */

void vsock_accept(struct virtio_vsock *v)
{
	int fd = accept4(v->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd >= 0)
		add(v, fd, VSOCK_LINE);
}

/* "CONNECT PORT\n", byte by byte, so that nothing of the stream behind it is taken. False: the connection is gone. */
static bool read_line(struct vsock_connection *c)
{
	char byte, rest;
	unsigned port;

	for (;;) {
		ssize_t got = read(c->fd, &byte, 1);
		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			return true;
		if (got <= 0 || c->line_bytes == sizeof(c->line) - 1) {
			drop(c);
			return false;
		}
		if (byte == '\n')
			break;
		c->line[c->line_bytes++] = byte;
	}
	c->line[c->line_bytes] = '\0';
	if (sscanf(c->line, "CONNECT %u%c", &port, &rest) != 1) {
		drop(c);
		return false;
	}
	do {
		c->host_port = FIRST_HOST_PORT + c->v->next_port++ % FIRST_HOST_PORT;
	} while (find(c->v, c->host_port, port) != NULL);
	c->guest_port = port;
	c->state = VSOCK_ASKING;
	c->request = true;
	vsock_wake(c->v);
	return true;
}

/* What waits for room in the socket. False: the connection is gone. */
static bool write_out(struct vsock_connection *c)
{
	while (c->buffer_used > 0) {
		size_t n = min_u64(c->buffer_used, VSOCK_BUFFER_BYTES - c->buffer_head);
		ssize_t done = send(c->fd, c->buffer + c->buffer_head, n, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (done < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		/* Nobody reads it any more. What was written to us may still wait: the end comes with that. */
		if (done < 0)
			done = (ssize_t)n;
		c->buffer_head = (c->buffer_head + (uint32_t)done) % VSOCK_BUFFER_BYTES;
		c->buffer_used -= (uint32_t)done;
		c->forwarded += (uint32_t)done;
	}
	if (c->buffer_used == 0 && c->closing) {
		drop_with_reset(c); /* which is how a shutdown of both ways is acknowledged (5.10.6.5) */
		return false;
	}
	if (c->buffer_used == 0 && c->guest_ended)
		shutdown(c->fd, SHUT_WR);
	/* Before the guest runs out of what it knows that it may send. */
	if (c->forwarded - c->told >= VSOCK_BUFFER_BYTES / 2 && !c->credit) {
		c->credit = true;
		vsock_wake(c->v);
	}
	return true;
}

static void handle(struct vsock_connection *c, uint32_t events)
{
	if (c->state == VSOCK_LINE && !read_line(c))
		return;
	if ((events & EPOLLOUT) && c->state == VSOCK_OPEN && !write_out(c))
		return;
	/* Nobody is there any more to write to. What is left to read the guest still gets; epoll would tell of this end again and again. */
	if (events & (EPOLLERR | EPOLLHUP)) {
		if (c->state != VSOCK_OPEN) {
			drop_with_reset(c);
			return;
		}
		loop_remove(c->v->loop, c->source);
		c->source = NULL;
		c->hung = true;
	}
	/* While the guest is asked this waits for its answer. */
	c->readable = c->state != VSOCK_LINE;
	if (c->state == VSOCK_OPEN)
		vsock_wake(c->v);
	watch(c);
}

static void ready(void *opaque, uint32_t events)
{
	struct vsock_connection *c = opaque;
	struct virtio_vsock *v = c->v;

	if (vsock_enter(v))
		handle(c, events);
	vsock_leave(v);
}

/* --- the guest's side --- */

static void take_data(struct vsock_connection *c, const uint8_t *data, uint32_t bytes)
{
	c->received += bytes;
	/* More than it was allowed, or after it said that it sends no more. */
	if (c->received - c->forwarded > VSOCK_BUFFER_BYTES || c->guest_ended) {
		drop_with_reset(c);
		return;
	}
	if (c->buffer == NULL)
		c->buffer = xcalloc(1, VSOCK_BUFFER_BYTES);
	uint32_t at = (c->buffer_head + c->buffer_used) % VSOCK_BUFFER_BYTES, first = (uint32_t)min_u64(bytes, VSOCK_BUFFER_BYTES - at);
	memcpy(c->buffer + at, data, first);
	memcpy(c->buffer, data + first, bytes - first);
	c->buffer_used += bytes;
	if (write_out(c))
		watch(c);
}

static void take_shutdown(struct vsock_connection *c, uint32_t flags)
{
	c->guest_ended |= (flags & VSOCK_SHUT_SEND) != 0;
	if (flags & VSOCK_SHUT_RECEIVE)
		shutdown(c->fd, SHUT_RD);
	c->closing |= (flags & (VSOCK_SHUT_RECEIVE | VSOCK_SHUT_SEND)) == (VSOCK_SHUT_RECEIVE | VSOCK_SHUT_SEND);
	if (write_out(c))
		watch(c);
}

static void take_response(struct vsock_connection *c)
{
	char line[32];
	int bytes = snprintf(line, sizeof(line), "OK %u\n", c->host_port);

	c->state = VSOCK_OPEN;
	/* The socket is new: there is room. */
	if (send(c->fd, line, (size_t)bytes, MSG_NOSIGNAL | MSG_DONTWAIT) != bytes)
		drop_with_reset(c);
}

/* The guest connects: whoever listens at PATH_PORT. */
static void take_request(struct virtio_vsock *v, const struct vsock_header *h)
{
	struct sockaddr_un to = v->address;
	size_t used = strlen(to.sun_path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	int n = snprintf(to.sun_path + used, sizeof(to.sun_path) - used, "_%u", h->to_port);
	bool good = fd >= 0 && n > 0 && (size_t)n < sizeof(to.sun_path) - used && connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0;
	if (!good && fd >= 0)
		close(fd);
	struct vsock_connection *c = good ? add(v, fd, VSOCK_OPEN) : NULL;
	if (c == NULL) {
		owe_reset(v, h->to_port, h->from_port);
		return;
	}
	c->host_port = h->to_port;
	c->guest_port = h->from_port;
	c->guest_buffer = h->buffer_bytes;
	c->guest_forwarded = h->forwarded;
	c->response = true;
	vsock_wake(v);
}

void vsock_take(struct virtio_vsock *v, const struct vsock_header *h, const uint8_t *data)
{
	if (h->from_cid != v->guest_cid || h->to_cid != VSOCK_HOST_CID)
		return;
	struct vsock_connection *c = h->type == TYPE_STREAM ? find(v, h->to_port, h->from_port) : NULL;
	if (c == NULL) {
		if (h->op == VSOCK_OP_REQUEST && h->type == TYPE_STREAM)
			take_request(v, h);
		else if (h->op != VSOCK_OP_RST)
			owe_reset(v, h->to_port, h->from_port);
		return;
	}
	c->guest_buffer = h->buffer_bytes;
	c->guest_forwarded = h->forwarded;
	vsock_wake(v); /* there may be credit for what waits */
	if (h->op == VSOCK_OP_RST)
		drop(c);
	else if (h->op == VSOCK_OP_RESPONSE && c->state == VSOCK_ASKING)
		take_response(c);
	else if (c->state != VSOCK_OPEN || h->op == VSOCK_OP_REQUEST || h->op == VSOCK_OP_RESPONSE)
		drop_with_reset(c);
	else if (h->op == VSOCK_OP_RW)
		take_data(c, data, h->bytes);
	else if (h->op == VSOCK_OP_SHUTDOWN)
		take_shutdown(c, h->flags);
	else if (h->op == VSOCK_OP_CREDIT_REQUEST)
		c->credit = true;
	else if (h->op != VSOCK_OP_CREDIT_UPDATE)
		drop_with_reset(c);
}

/* --- packets for the guest --- */

static uint32_t credit_of(const struct vsock_connection *c)
{
	uint32_t under_way = c->sent - c->guest_forwarded;

	return under_way < c->guest_buffer ? c->guest_buffer - under_way : 0;
}

static bool take_flag(bool *flag)
{
	bool was = *flag;

	*flag = false;
	return was;
}

/* What the socket has, as far as there is credit and room: an op, or 0. */
static uint16_t read_socket(struct vsock_connection *c, size_t room, struct vsock_header *h, uint8_t *data)
{
	size_t most = min_u64(min_u64(room, credit_of(c)), VSOCK_PACKET_BYTES);

	if (c->state != VSOCK_OPEN || !c->readable || c->ended || most == 0)
		return 0;
	ssize_t got = read(c->fd, data, most);
	if (got > 0) {
		c->sent += (uint32_t)got;
		h->bytes = (uint32_t)got;
		return VSOCK_OP_RW;
	}
	c->readable = false;
	/* Its end, or an error, which is one too. */
	c->ended = got == 0 || (errno != EAGAIN && errno != EINTR);
	c->shutdown = c->ended;
	watch(c);
	return 0;
}

static uint16_t next_op(struct vsock_connection *c, size_t room, struct vsock_header *h, uint8_t *data)
{
	if (!c->v->held && take_flag(&c->request))
		return VSOCK_OP_REQUEST;
	if (take_flag(&c->response))
		return VSOCK_OP_RESPONSE;
	uint16_t op = read_socket(c, room, h, data);
	if (op != 0)
		return op;
	if (c->ended && c->hung)
		return VSOCK_OP_RST;
	if (take_flag(&c->shutdown)) {
		h->flags = VSOCK_SHUT_SEND;
		return VSOCK_OP_SHUTDOWN;
	}
	return take_flag(&c->credit) ? VSOCK_OP_CREDIT_UPDATE : 0;
}

static void address_to(struct virtio_vsock *v, struct vsock_header *h, uint32_t host_port, uint32_t guest_port)
{
	h->from_cid = VSOCK_HOST_CID;
	h->to_cid = v->guest_cid;
	h->from_port = host_port;
	h->to_port = guest_port;
	h->type = TYPE_STREAM;
	h->buffer_bytes = VSOCK_BUFFER_BYTES;
}

bool vsock_next(struct virtio_vsock *v, size_t room, struct vsock_header *h, uint8_t *data)
{
	*h = (struct vsock_header){0};
	if (v->reset_count > 0) {
		const struct vsock_reset *reset = &v->resets[--v->reset_count];
		address_to(v, h, reset->host_port, reset->guest_port);
		h->op = VSOCK_OP_RST;
		return true;
	}
	for (unsigned i = 0; i < VSOCK_MAX_CONNECTIONS; i++) {
		struct vsock_connection *c = v->connections[(v->turn + i) % VSOCK_MAX_CONNECTIONS];
		uint16_t op = c != NULL ? next_op(c, room, h, data) : 0;
		if (op == 0)
			continue;
		address_to(v, h, c->host_port, c->guest_port);
		h->op = op;
		h->forwarded = c->told = c->forwarded;
		c->credit = false;
		v->turn = (v->turn + i + 1) % VSOCK_MAX_CONNECTIONS;
		if (op == VSOCK_OP_RST)
			drop(c);
		return true;
	}
	return false;
}
