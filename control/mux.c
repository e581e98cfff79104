/* The process of a multiplexer, see mux.h: one thread waits for connections, each has a thread of its own. */
#include "control/mux.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "control/mux_internal.h"
#include "control/splice.h"

#define MAX_CONNECTIONS 4096u
#define STACK_BYTES	(256u << 10)
#define LOOK_MS		1000	   /* how often it looks whether anybody needs it */
#define NAME_NS		10000000000u /* so long a client may take to say whom it wants */
#define END_NS		2000000000u  /* so long it waits for connections of VMs that have gone */
#define TAKE_OVER_NS	10000000000u /* so long it waits for one that is about to end */
#define MOMENT_NS	10000000
#define FRESH_NS	20000000u /* so old may be what the table said, where connections come fast */
#define MAX_MEMBERS	4096u

struct connection {
	struct mux *mux;
	int fd;
	struct sockaddr_in client;
	uint64_t began_ns;
	char name[SERVER_NAME_BYTES]; /* that it asked for, "" where that does not decide */
	char vm[STORE_NAME_BYTES];    /* whom it was given to, "": it is not yet */
	struct sockaddr_in at;
	struct connection *next, *previous;
};

struct mux {
	const char *place;
	enum config_sharing sharing;
	struct store *store;
	int dir, listen_fd, tell_fd;
	pthread_mutex_t lock;
	/* under lock */
	struct mux_members members;
	struct connection *connections;
	unsigned connection_count;
	size_t present;	    /* members, as last seen */
	uint64_t looked_ns; /* when that was */
};

/* Under lock. False: the table cannot be read. */
static bool look(struct mux *mux, uint64_t age_ns)
{
	struct err err = ERR_INIT;

	uint64_t now = clock_now_ns(); /* the table is no younger than this, however long it takes to read */

	if (mux->looked_ns && now - mux->looked_ns < age_ns)
		return true;
	if (mux_members_look(&mux->members, mux->store, mux->place, &mux->present, &err)) {
		log_warn("%s: %s", mux->place, err.message);
		return false;
	}
	mux->looked_ns = now;
	return true;
}

/* --- one connection --- */

/* 1 and what it asks for in connection->name; what was read of it is in `first`. */
static int read_name(struct connection *connection, uint8_t first[SPLICE_FIRST_BYTES], size_t *used)
{
	uint64_t end = clock_now_ns() + NAME_NS;
	char name[SERVER_NAME_BYTES];
	int rc = 0;

	while (rc == 0) {
		struct pollfd one = {.fd = connection->fd, .events = POLLIN};
		uint64_t now = clock_now_ns();

		if (now >= end || *used == SPLICE_FIRST_BYTES || (poll(&one, 1, (int)((end - now) / 1000000) + 1) < 0 && errno != EINTR))
			return -ETIMEDOUT;
		ssize_t got = recv(connection->fd, first + *used, SPLICE_FIRST_BYTES - *used, MSG_DONTWAIT);
		if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
			return -ECONNRESET;
		*used += got > 0 ? (size_t)got : 0;
		rc = server_name_find(first, *used, name);
	}
	if (rc > 0) {
		pthread_mutex_lock(&connection->mux->lock);
		memcpy(connection->name, name, sizeof(name));
		pthread_mutex_unlock(&connection->mux->lock);
	}
	return rc;
}

/* Under lock: by a table that is no older than that. */
static int choose(struct connection *connection, const bool tried[MAX_MEMBERS], uint64_t age_ns)
{
	struct mux *mux = connection->mux;

	return look(mux, age_ns) && mux->members.count <= MAX_MEMBERS ? mux_choose(&mux->members, mux->sharing, connection->name, tried) : -1;
}

/* The next one that was not tried; its index or -1. It counts as having the connection already. */
static int take_member(struct connection *connection, bool tried[MAX_MEMBERS])
{
	struct mux *mux = connection->mux;

	pthread_mutex_lock(&mux->lock);
	int i = choose(connection, tried, FRESH_NS);
	/* Whoever came before the connection did is found. */
	if (i < 0 && mux->looked_ns < connection->began_ns)
		i = choose(connection, tried, 0);
	if (i >= 0) {
		struct mux_member *member = &mux->members.list[i];

		tried[i] = true;
		mux->members.last = (size_t)i;
		member->connections++;
		member->total++;
		connection->at = member->at;
		snprintf(connection->vm, sizeof(connection->vm), "%s", member->vm);
	}
	pthread_mutex_unlock(&mux->lock);
	return i;
}

static void release_member(struct connection *connection, int i, bool answered)
{
	struct mux *mux = connection->mux;

	pthread_mutex_lock(&mux->lock);
	mux->members.list[i].connections--;
	mux->members.list[i].total -= !answered;
	connection->vm[0] = '\0';
	pthread_mutex_unlock(&mux->lock);
}

/* Connects to whoever is to have it. A descriptor, and the member; -1: nobody answers. */
static int find_server(struct connection *connection, int *member)
{
	bool *tried = xcalloc(MAX_MEMBERS, sizeof(*tried));
	int fd = -1;

	while (fd < 0 && (*member = take_member(connection, tried)) >= 0) {
		fd = splice_connect(&connection->at);
		if (fd < 0)
			release_member(connection, *member, false);
	}
	free(tried);
	return fd;
}

static bool has_died(void *opaque)
{
	const struct connection *connection = opaque;

	return !store_vm_is_alive(connection->mux->store, connection->vm);
}

static void hand_through(struct connection *connection)
{
	CLEANUP_FREE uint8_t *first = xcalloc(1, SPLICE_FIRST_BYTES);
	size_t used = 0;
	int member;

	if (connection->mux->sharing == CONFIG_BY_NAME && read_name(connection, first, &used) < 0) {
		splice_break(connection->fd);
		return;
	}
	int server = find_server(connection, &member);
	if (server < 0) {
		splice_break(connection->fd);
		return;
	}
	splice_run(&(struct splice){.caller = connection->fd,
				    .server = server,
				    .first = first,
				    .first_bytes = used,
				    .is_dead = has_died,
				    .opaque = connection});
	close(server);
	release_member(connection, member, true);
}

static void *connection_main(void *opaque)
{
	struct connection *connection = opaque;
	struct mux *mux = connection->mux;

	hand_through(connection);
	close(connection->fd);
	pthread_mutex_lock(&mux->lock);
	if (connection->previous)
		connection->previous->next = connection->next;
	else
		mux->connections = connection->next;
	if (connection->next)
		connection->next->previous = connection->previous;
	mux->connection_count--;
	pthread_mutex_unlock(&mux->lock);
	free(connection);
	return NULL;
}

static int begin_connection(struct connection *connection)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	int rc = pthread_create(&thread, &attributes, connection_main, connection);
	pthread_attr_destroy(&attributes);
	return rc;
}

static void accept_one(struct mux *mux)
{
	struct sockaddr_in client = {0};
	socklen_t length = sizeof(client);
	int fd = accept4(mux->listen_fd, (struct sockaddr *)&client, &length, SOCK_CLOEXEC);

	if (fd < 0) {
		const struct timespec moment = {.tv_nsec = MOMENT_NS};

		nanosleep(&moment, NULL); /* no descriptor is free: not in a circle at full speed */
		return;
	}
	struct connection *connection = xcalloc(1, sizeof(*connection));
	*connection = (struct connection){.mux = mux, .fd = fd, .client = client, .began_ns = clock_now_ns()};
	pthread_mutex_lock(&mux->lock);
	bool full = mux->connection_count == MAX_CONNECTIONS;
	if (!full) {
		connection->next = mux->connections;
		if (connection->next)
			connection->next->previous = connection;
		mux->connections = connection;
		mux->connection_count++;
		full = begin_connection(connection) != 0;
		if (full) {
			mux->connections = connection->next;
			if (connection->next)
				connection->next->previous = NULL;
			mux->connection_count--;
		}
	}
	pthread_mutex_unlock(&mux->lock);
	if (!full)
		return;
	log_warn("%s: a connection is refused: there are too many", mux->place);
	splice_break(fd);
	close(fd);
	free(connection);
}

/* --- what it tells --- */

static json_t *address_to_json(const struct sockaddr_in *address)
{
	char text[INET_ADDRSTRLEN + 8], host[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &address->sin_addr, host, sizeof(host));
	snprintf(text, sizeof(text), "%s:%u", host, ntohs(address->sin_port));
	return json_string(text);
}

static json_t *to_json(struct mux *mux)
{
	json_t *members = json_array(), *connections = json_array();
	struct sockaddr_in at;
	enum config_sharing sharing;

	pthread_mutex_lock(&mux->lock);
	look(mux, 0);
	for (size_t i = 0; i < mux->members.count; i++) {
		const struct mux_member *member = &mux->members.list[i];

		if (member->present || member->connections)
			json_array_append_new(members, json_pack("{s:s, s:o, s:i, s:I}", "vm", member->vm, "host", address_to_json(&member->at),
								 "connections", (int)member->connections, "total", (json_int_t)member->total));
	}
	for (const struct connection *c = mux->connections; c; c = c->next)
		json_array_append_new(connections,
				      json_pack("{s:o, s:s?, s:o, s:s?, s:I}", "client", address_to_json(&c->client), "vm", c->vm[0] ? c->vm : NULL,
						"host", c->vm[0] ? address_to_json(&c->at) : json_null(), "name", c->name[0] ? c->name : NULL,
						"age_ns", (json_int_t)(clock_now_ns() - c->began_ns)));
	pthread_mutex_unlock(&mux->lock);
	mux_parse_place(mux->place, &at, &sharing);
	return json_pack("{s:o, s:s, s:i, s:o, s:o}", "host", address_to_json(&at), "sharing", config_sharing_name(sharing), "pid", (int)getpid(), "members",
			 members, "connections", connections);
}

static void tell_one(struct mux *mux)
{
	const struct timeval patience = {.tv_sec = 1};
	CLEANUP_CLOSE int fd = accept4(mux->tell_fd, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	json_t *document = to_json(mux);
	char *text = json_dumps(document, JSON_COMPACT);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	for (size_t done = 0, length = text ? strlen(text) : 0; done < length;) {
		ssize_t n = send(fd, text + done, length - done, MSG_NOSIGNAL);

		if (n <= 0)
			break;
		done += (size_t)n;
	}
	free(text);
	json_decref(document);
}

/* --- life --- */

/* 1: it is ours. 0: there is one that serves. One that is about to end is waited for. */
static int take_place(struct mux *mux, int lock_fd, struct err *err)
{
	const struct timespec moment = {.tv_nsec = MOMENT_NS};
	uint64_t end = clock_now_ns() + TAKE_OVER_NS;

	while (clock_now_ns() < end) {
		if (flock(lock_fd, LOCK_EX | LOCK_NB) == 0)
			return 1;
		int fd = mux_socket(mux->dir, mux->place, false);
		if (fd >= 0) {
			close(fd);
			return 0;
		}
		nanosleep(&moment, NULL);
	}
	err_set(err, ERR_STATE, EBUSY, "%s: another process holds the lock of the multiplexer, and serves nobody", mux->place);
	return -EBUSY;
}

/* True: nobody needs it. Who comes meanwhile finds no socket, and waits for the lock: it is either seen in the table, or takes over. */
static bool may_end(struct mux *mux)
{
	pthread_mutex_lock(&mux->lock);
	bool needed = !look(mux, 0) || mux->present > 0;
	pthread_mutex_unlock(&mux->lock);
	if (needed)
		return false;
	close(mux->tell_fd);
	mux->tell_fd = -1;
	pthread_mutex_lock(&mux->lock);
	needed = !look(mux, 0) || mux->present > 0;
	pthread_mutex_unlock(&mux->lock);
	if (!needed)
		return true;
	mux->tell_fd = mux_socket(mux->dir, mux->place, true);
	return mux->tell_fd < 0;
}

static void serve(struct mux *mux)
{
	uint64_t next_look = clock_now_ns();

	for (;;) {
		struct pollfd list[2] = {{.fd = mux->listen_fd, .events = POLLIN}, {.fd = mux->tell_fd, .events = POLLIN}};

		if (poll(list, 2, LOOK_MS) < 0 && errno != EINTR)
			return;
		if (list[0].revents)
			accept_one(mux);
		if (list[1].revents)
			tell_one(mux);
		if (clock_now_ns() < next_look)
			continue;
		next_look = clock_now_ns() + (uint64_t)LOOK_MS * 1000000;
		if (may_end(mux))
			return;
	}
}

/* Connections of VMs that have gone are being reset: let their threads do it. */
static void wait_for_connections(struct mux *mux)
{
	const struct timespec moment = {.tv_nsec = MOMENT_NS};
	uint64_t end = clock_now_ns() + END_NS;
	bool any = true;

	while (any && clock_now_ns() < end) {
		pthread_mutex_lock(&mux->lock);
		any = mux->connection_count > 0;
		pthread_mutex_unlock(&mux->lock);
		if (any)
			nanosleep(&moment, NULL);
	}
}

static int open_sockets(struct mux *mux, const struct sockaddr_in *address, struct err *err)
{
	mux->listen_fd = splice_listen(address, false, err);
	if (mux->listen_fd < 0)
		return mux->listen_fd;
	mux->tell_fd = mux_socket(mux->dir, mux->place, true);
	return mux->tell_fd < 0 ? err_sys(err, -mux->tell_fd, "%s: socket", mux->place) : 0;
}

static void report(int fd, int rc, const struct err *err)
{
	char text[sizeof(err->message) + 32];
	int length = rc < 0 ? snprintf(text, sizeof(text), "%d %d %s", (int)err->class, err->number, err->message) : snprintf(text, sizeof(text), "ok");

	(void)!write(fd, text, (size_t)length); /* whoever asked may be gone */
	close(fd);
}

int mux_serve(const char *store_path, const char *place, int report_fd, struct err *err)
{
	/* Lives as long as its last thread does: until the process ends. */
	struct mux *mux = xcalloc(1, sizeof(*mux));
	struct sockaddr_in address;
	int rc = 0;

	*mux = (struct mux){.place = place, .dir = -1, .listen_fd = -1, .tell_fd = -1};
	pthread_mutex_init(&mux->lock, NULL);
	signal(SIGPIPE, SIG_IGN);
	if (!mux_parse_place(place, &address, &mux->sharing))
		rc = err_set(err, ERR_USAGE, EINVAL, "'%s' is no place of a multiplexer", place);
	if (!rc)
		rc = store_open(store_path, false, &mux->store, err);
	CLEANUP_FREE char *folder = xasprintf("%s/" MUX_FOLDER, store_path), *name = xasprintf("%s.lock", place);
	if (!rc)
		mux->dir = rc = file_open_dir(AT_FDCWD, folder, 1, err);
	CLEANUP_CLOSE int lock_fd = rc < 0 ? -1 : openat(mux->dir, name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (rc >= 0 && lock_fd < 0)
		rc = err_sys(err, errno, "%s/%s", folder, name);
	if (rc >= 0)
		rc = take_place(mux, lock_fd, err);
	bool ours = rc == 1;
	if (ours)
		rc = open_sockets(mux, &address, err);
	report(report_fd, rc, err);
	if (!rc && ours) {
		CLEANUP_FREE char *told = xasprintf("%s.sock", place);

		serve(mux);
		unlinkat(mux->dir, told, 0); /* as long as the lock is ours */
		wait_for_connections(mux);
	}
	return rc;
}
