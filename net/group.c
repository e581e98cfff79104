/*
 * Backend group: a network that only VMs of one store are on, and nothing of the host. No process of its own, no rights needed.
 *
 * Each card is a UNIX datagram socket in a folder, which is the network; a frame with its header is a datagram. Each card is its own switch: it knows the others from the
 * folder, and learns from what comes which of them has which address. What goes to everybody, or to an address that is not known, is sent to all. A card whose
 * queue is full (/proc/sys/net/unix/max_dgram_qlen) loses what comes, as on any network; but what goes to it alone waits a moment for room first, as the queue is
 * short and the one that empties it may be waiting for a processor. One that did not empty it in that time is not waited for again before it does.
 *
 *     <folder>/.lock                 held while sockets come and go
 *     <folder>/<network>/<port>      the socket of a card; one that nobody listens to was left by a process that was killed, and goes with the next start here, or by gc
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/dead_sockets.h"
#include "base/log.h"
#include "net/net_internal.h"
#include "net/segment.h"

#define MAX_PEERS    64u
#define MAX_LEARNED  256u /* a power of two */
#define DROP_MOST    65536u
#define SEND_BYTES   (1 << 20)
#define PATIENCE_NS  100000000u
#define RETRY_NS     50000
#define RECENT_NS    1000000000ull /* times of folders are coarse */

struct peer {
	struct sockaddr_un address;
	const char *name; /* the end of the address */
};

struct learned {
	uint8_t mac[6];
	char name[NET_PORT_BYTES]; /* of the peer; "": nothing */
	bool stands;		   /* its queue was full for too long */
	uint64_t waits_since_ns;   /* a frame waits for room there, 0: none does */
};

struct group {
	struct net net;
	char *folder, *network, *port;
	int dir, fd, timer_fd;
	struct loop_source *source, *timer;
	bool deaf; /* what comes is dropped */
	unsigned offloads;
	struct peer peers[MAX_PEERS];
	unsigned peer_count;
	struct timespec read_at; /* the folder's time when peers were read */
	struct learned learned[MAX_LEARNED];
	struct segmenter segments; /* of a frame that the guest cannot take whole */
};

/* --- who is there --- */

static void set_address(int dir, const char *name, struct sockaddr_un *out)
{
	/* By descriptor, as a path has room for 107 bytes only. */
	*out = (struct sockaddr_un){.sun_family = AF_UNIX};
	snprintf(out->sun_path, sizeof(out->sun_path), "/proc/self/fd/%d/%.*s", dir, (int)NET_PORT_BYTES - 1, name);
}

static bool is_port(const struct dirent *entry) { return entry->d_name[0] != '.' && strlen(entry->d_name) < NET_PORT_BYTES; }

static void read_peers(struct group *g)
{
	int copy = openat(g->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	g->peer_count = 0;
	while (stream && g->peer_count < MAX_PEERS && (entry = readdir(stream))) {
		struct peer *peer = &g->peers[g->peer_count];

		if (!is_port(entry) || !strcmp(entry->d_name, g->port))
			continue;
		set_address(g->dir, entry->d_name, &peer->address);
		peer->name = strrchr(peer->address.sun_path, '/') + 1;
		g->peer_count++;
	}
	if (stream)
		closedir(stream);
}

/* The folder's time changes with each that comes or goes. */
static void look_for_peers(struct group *g)
{
	struct stat st;

	if (fstat(g->dir, &st))
		return;
	uint64_t changed_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
	bool same = st.st_mtim.tv_sec == g->read_at.tv_sec && st.st_mtim.tv_nsec == g->read_at.tv_nsec;

	if (same && clock_wall_ns() - changed_ns > RECENT_NS)
		return;
	g->read_at = st.st_mtim;
	read_peers(g);
}

static struct learned *place_of(struct group *g, const uint8_t mac[6])
{
	unsigned hash = (unsigned)mac[5] ^ (unsigned)mac[4] * 31 ^ (unsigned)mac[3] * 7 ^ (unsigned)mac[2];

	return &g->learned[hash % MAX_LEARNED];
}

static void learn(struct group *g, const uint8_t mac[6], const struct sockaddr_un *from)
{
	const char *slash = strrchr(from->sun_path, '/');
	struct learned *place = place_of(g, mac);

	if (!slash || (mac[0] & 1))
		return;
	memcpy(place->mac, mac, sizeof(place->mac));
	snprintf(place->name, sizeof(place->name), "%.*s", (int)NET_PORT_BYTES - 1, slash + 1);
}

/* --- frames --- */

static int send_to(struct group *g, const struct sockaddr_un *to, const struct iovec *iov, unsigned count)
{
	const struct msghdr message = {
		.msg_name = (void *)(uintptr_t)to, .msg_namelen = sizeof(*to), .msg_iov = (struct iovec *)(uintptr_t)iov, .msg_iovlen = count};
	ssize_t sent;

	do
		sent = sendmsg(g->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : 0;
}

/* Whether it is tried again soon. */
static bool wait_for_room(struct group *g, struct learned *place)
{
	const struct itimerspec soon = {.it_value.tv_nsec = RETRY_NS};
	uint64_t now = clock_now_ns();

	if (!place->waits_since_ns)
		place->waits_since_ns = now;
	return now - place->waits_since_ns < PATIENCE_NS && timerfd_settime(g->timer_fd, 0, &soon, NULL) == 0;
}

/* 0: sent, or lost; -EAGAIN: it waits for room; -ENOENT: nobody is known to have this address. */
static int send_to_learned(struct group *g, const uint8_t mac[6], const struct iovec *iov, unsigned count)
{
	struct learned *place = place_of(g, mac);
	struct sockaddr_un address;

	if ((mac[0] & 1) || !place->name[0] || memcmp(place->mac, mac, sizeof(place->mac)))
		return -ENOENT;
	set_address(g->dir, place->name, &address);
	int rc = send_to(g, &address, iov, count);
	if (rc == -EAGAIN && !place->stands && wait_for_room(g, place))
		return rc;
	place->stands = rc == -EAGAIN;
	place->waits_since_ns = 0;
	if (rc != -ECONNREFUSED && rc != -ENOENT)
		return 0;
	place->name[0] = '\0';
	return -ENOENT;
}

static void timer_ready(void *opaque, uint32_t events)
{
	struct group *g = opaque;
	uint64_t count;
	(void)events;

	if (read(g->timer_fd, &count, sizeof(count)) > 0 && g->net.events.writable != NULL)
		g->net.events.writable(g->net.opaque, 0);
}

/* The guest's own words. */
static bool is_sane(const uint8_t *header, size_t bytes)
{
	uint8_t type = header[NET_H_GSO_TYPE] & (uint8_t)~NET_GSO_ECN;
	size_t start = get_le16(header + NET_H_CSUM_START), at = start + get_le16(header + NET_H_CSUM_OFFSET);

	if (type == NET_GSO_NONE && !(header[NET_H_FLAGS] & NET_F_NEEDS_CSUM))
		return true;
	if (start < NET_ETHERNET_BYTES || !range_within(at, 2, bytes - NET_HEADER_BYTES))
		return false;
	return type == NET_GSO_NONE || ((type == NET_GSO_TCPV4 || type == NET_GSO_TCPV6) && (header[NET_H_FLAGS] & NET_F_NEEDS_CSUM) &&
					get_le16(header + NET_H_GSO_SIZE) > 0);
}

static int send_frame(struct net *net, unsigned lane, const struct iovec *iov, unsigned count, size_t bytes)
{
	struct group *g = (struct group *)net;
	uint8_t head[NET_HEADER_BYTES + NET_ETHERNET_BYTES];
	(void)lane;

	if (net_gather(iov, count, head, sizeof(head)) < sizeof(head) || !is_sane(head, bytes))
		return -EINVAL;
	int rc = send_to_learned(g, head + NET_HEADER_BYTES, iov, count);
	if (rc != -ENOENT)
		return rc;
	look_for_peers(g);
	for (unsigned i = 0; i < g->peer_count; i++)
		send_to(g, &g->peers[i].address, iov, count);
	return 0;
}

/* Of the frame in `buffer`: what the guest does not do itself. 0: it is none that can be given to it. */
static size_t suit(struct group *g, uint8_t *buffer, size_t bytes)
{
	uint8_t type = buffer[NET_H_GSO_TYPE] & (uint8_t)~NET_GSO_ECN;
	unsigned needs = type == NET_GSO_TCPV4 ? NET_OFFLOAD_TSO4 : type == NET_GSO_TCPV6 ? NET_OFFLOAD_TSO6 : 0;

	if (!is_sane(buffer, bytes))
		return 0;
	if (needs && (!(g->offloads & needs) || ((buffer[NET_H_GSO_TYPE] & NET_GSO_ECN) && !(g->offloads & NET_OFFLOAD_ECN)))) {
		memcpy(g->segments.frame, buffer, bytes);
		return segmenter_begin(&g->segments, bytes) ? 0 : segmenter_next(&g->segments, buffer);
	}
	if (!(g->offloads & NET_OFFLOAD_CSUM) && net_fill_checksum(buffer, bytes))
		return 0;
	return bytes;
}

/* The next datagram, into `size` bytes: as recv; *from: who sent it. */
static ssize_t take(struct group *g, uint8_t *buffer, size_t size, struct sockaddr_un *from)
{
	socklen_t length = sizeof(*from);
	ssize_t got;

	*from = (struct sockaddr_un){0};
	do
		got = recvfrom(g->fd, buffer, size, MSG_DONTWAIT | MSG_TRUNC, (struct sockaddr *)from, &length);
	while (got < 0 && errno == EINTR);
	from->sun_path[sizeof(from->sun_path) - 1] = '\0';
	return got;
}

static size_t receive(struct net *net, unsigned lane, uint8_t *buffer)
{
	struct group *g = (struct group *)net;
	size_t bytes = segmenter_next(&g->segments, buffer);
	struct sockaddr_un from;
	ssize_t got;
	(void)lane;

	while (bytes == 0 && (got = take(g, buffer, NET_BUFFER_BYTES, &from)) >= 0) {
		if (g->deaf || got < (ssize_t)(NET_HEADER_BYTES + NET_ETHERNET_BYTES) || got > (ssize_t)NET_BUFFER_BYTES)
			continue;
		learn(g, buffer + NET_HEADER_BYTES + 6, &from);
		bytes = suit(g, buffer, (size_t)got);
	}
	return bytes;
}

static bool waiting(const struct net *net) { return ((const struct group *)net)->segments.bytes > 0; }

static void forget_what_waits(struct group *g)
{
	struct sockaddr_un from;
	uint8_t some[1];

	g->segments.bytes = 0;
	for (unsigned i = 0; i < DROP_MOST && take(g, some, sizeof(some), &from) >= 0; i++)
		;
}

static void ready(void *opaque, uint32_t events)
{
	struct group *g = opaque;

	if (!(events & EPOLLIN))
		return;
	if (g->deaf)
		forget_what_waits(g);
	else if (net_wants(&g->net, 0) && g->net.events.readable != NULL)
		g->net.events.readable(g->net.opaque, 0);
}

static void watch(struct group *g)
{
	struct err err = ERR_INIT;

	if (loop_modify(g->net.loop, g->source, net_wants(&g->net, 0) || g->deaf ? (uint32_t)EPOLLIN : 0, &err) < 0)
		log_error("net %s: %s", g->net.config.name, err.message);
}

static void want(struct net *net, unsigned lane)
{
	(void)lane;
	watch((struct group *)net);
}

static void hear(struct net *net)
{
	struct group *g = (struct group *)net;

	forget_what_waits(g);
	g->deaf = false;
	watch(g);
}

static void set_offloads(struct net *net, unsigned offloads) { ((struct group *)net)->offloads = offloads; }

static void restart(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest)
{
	struct group *g = (struct group *)net;
	(void)guest_mac;
	(void)guest;

	for (unsigned i = 0; i < MAX_LEARNED; i++)
		g->learned[i].waits_since_ns = 0;
	forget_what_waits(g);
	watch(g);
}

/* --- life --- */

/* While it is held no socket comes or goes. A descriptor, or -errno. */
static int lock_networks(const char *folder, struct err *err)
{
	CLEANUP_FREE char *path = xasprintf("%s/.lock", folder);
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	int fd;

	if (mkdir(folder, 0700) && errno != EEXIST)
		return err_sys(err, errno, "%s", folder);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	while (fcntl(fd, F_OFD_SETLKW, &lock)) {
		if (errno == EINTR)
			continue;
		int number = errno;

		close(fd);
		return err_sys(err, number, "%s", path);
	}
	return fd;
}

static int open_folder(struct group *g, struct err *err)
{
	CLEANUP_FREE char *path = xasprintf("%s/%s", g->folder, g->network);

	if (mkdir(path, 0700) && errno != EEXIST)
		return err_sys(err, errno, "%s", path);
	g->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	return g->dir < 0 ? err_sys(err, errno, "%s", path) : 0;
}

/* What processes left in all networks that were killed. The lock is held. */
static void remove_dead(const char *folder)
{
	CLEANUP_CLOSE int parent = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (parent >= 0)
		dead_sockets_remove_below(parent, NULL, NULL, true);
}

static int create_timer(struct group *g, struct err *err)
{
	g->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	return g->timer_fd < 0 ? err_sys(err, errno, "timerfd") : loop_add(g->net.loop, g->timer_fd, EPOLLIN, timer_ready, g, &g->timer, err);
}

static int bind_port(struct group *g, struct err *err)
{
	struct sockaddr_un address;
	int size = SEND_BYTES;

	g->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (g->fd < 0)
		return err_sys(err, errno, "socket");
	setsockopt(g->fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	set_address(g->dir, g->port, &address);
	unlinkat(g->dir, g->port, 0); /* its name is that of one VM, whose only process this is */
	if (bind(g->fd, (const struct sockaddr *)&address, sizeof(address)))
		return err_sys(err, errno, "%s/%s/%s", g->folder, g->network, g->port);
	return 0;
}

static void close_group(struct net *net)
{
	struct group *g = (struct group *)net;
	int lock = lock_networks(g->folder, NULL);

	loop_remove(net->loop, g->source);
	loop_remove(net->loop, g->timer);
	if (g->timer_fd >= 0)
		close(g->timer_fd);
	if (g->fd >= 0) {
		unlinkat(g->dir, g->port, 0);
		close(g->fd);
	}
	if (g->dir >= 0) {
		CLEANUP_FREE char *path = xasprintf("%s/%s", g->folder, g->network);

		close(g->dir);
		rmdir(path); /* by the last one */
	}
	if (lock >= 0)
		close(lock);
	free(g->folder);
	free(g->network);
	free(g->port);
	free(g);
}

static const struct net_ops ops = {
	.close = close_group,
	.want = want,
	.waiting = waiting,
	.receive = receive,
	.send = send_frame,
	.set_offloads = set_offloads,
	.restart = restart,
	.hear = hear,
};

int net_group_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err)
{
	struct group *g = xcalloc(1, sizeof(*g));

	g->net.ops = &ops;
	g->net.loop = loop;
	g->net.config = *config;
	g->folder = xstrdup(config->folder);
	g->network = xstrdup(config->network);
	g->port = xstrdup(config->port);
	g->dir = g->fd = g->timer_fd = -1;
	g->deaf = config->deaf;
	CLEANUP_CLOSE int lock = lock_networks(g->folder, err);
	if (lock >= 0)
		remove_dead(g->folder);
	int rc = lock < 0 ? lock : open_folder(g, err);
	if (rc == 0)
		rc = bind_port(g, err);
	if (rc == 0)
		rc = create_timer(g, err);
	if (rc == 0)
		rc = loop_add(loop, g->fd, g->deaf ? (uint32_t)EPOLLIN : 0, ready, g, &g->source, err);
	if (rc == 0) {
		*out = &g->net;
		return 0;
	}
	if (lock >= 0) {
		close(lock); /* closing takes it itself */
		lock = -1;
	}
	close_group(&g->net);
	return rc;
}
