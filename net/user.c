/*
 * Backend user: libslirp, which ends the guest's TCP and UDP in this process and speaks through ordinary sockets of the host.
 *
 * libslirp wants poll(): it says which descriptors it would watch, is told which are ready, and may close and open some in between. They live in
 * an epoll set of their own, the descriptor of which is one source of the loop; after each call into libslirp its wishes are compared with
 * what the set has (`refresh`).
 *
 * Frames to the guest wait in a ring until the card takes them; where it is full they are lost, and TCP sends again.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <slirp/libslirp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/library.h"
#include "base/log.h"
#include "net/flows.h"
#include "net/fragments.h"
#include "net/net_internal.h"

#define READY_AT_ONCE 64
#define FRAMES_IN_A_TURN 64u
#define RING_BYTES    (512u << 10)
/* Where so much waits for the guest nothing is read for it from sockets, until half of that has gone. */
#define RING_ENOUGH   (RING_BYTES / 4)
#define RETRY_MS      1000u
#define NO_TIMEOUT    UINT32_MAX

/* The network as the guest sees it: 10.0.2.0/24, as users of QEMU know it. */
#define NETWORK	    0x0a000200u
#define NETMASK	    0xffffff00u
#define HOST	    0x0a000202u
#define NAME_SERVER 0x0a000203u
#define FIRST_GUEST 0x0a00020fu

#define FUNCTIONS(X) \
	X(slirp_new) X(slirp_cleanup) X(slirp_version_string) X(slirp_add_hostfwd) X(slirp_input) X(slirp_pollfds_fill) X(slirp_pollfds_poll)
static struct {
	FUNCTIONS(LIBRARY_FIELD)
} lib;
static const struct library libslirp = {"libslirp.so.0", LIBRARY_NAMES(FUNCTIONS)};

struct watch {
	uint32_t wished, in_set; /* epoll events */
	uint32_t ready;
	bool ours; /* libslirp has it open */
};

struct user {
	struct net net;
	Slirp *slirp;
	int epoll_fd, timer_fd;
	struct loop_source *source, *timer;
	struct watch *watches; /* by descriptor, which also is libslirp's index */
	int watch_count;
	uint64_t timer_at_ms; /* 0: not set */
	bool bound[NET_MAX_FORWARDS];
	bool full; /* enough waits for the guest: `source` is not heard */
	bool deaf; /* a forwarded port could not be bound again */
	bool arp_came;		  /* from the guest: packets may have waited for it */
	uint64_t emitted;	  /* frames that libslirp gave */
	unsigned offloads;
	/* Frames for the guest: length (4 bytes) and frame, one behind the other. */
	uint8_t *ring;
	size_t ring_head, ring_used;
	struct flows flows;
	struct fragments fragments;
	uint8_t frame[NET_BUFFER_BYTES];
};

static uint64_t now_ms(void) { return clock_now_ns() / 1000000; }

/* --- frames for the guest --- */

static void ring_copy_in(struct user *user, const void *data, size_t bytes)
{
	size_t at = (user->ring_head + user->ring_used) % RING_BYTES, first = min_u64(bytes, RING_BYTES - at);

	memcpy(user->ring + at, data, first);
	memcpy(user->ring, (const uint8_t *)data + first, bytes - first);
	user->ring_used += bytes;
}

static void ring_copy_out(struct user *user, void *data, size_t bytes)
{
	size_t first = min_u64(bytes, RING_BYTES - user->ring_head);

	memcpy(data, user->ring + user->ring_head, first);
	memcpy((uint8_t *)data + first, user->ring, bytes - first);
	user->ring_head = (user->ring_head + bytes) % RING_BYTES;
	user->ring_used -= bytes;
}

static void queue_frame(struct user *user, const void *frame, size_t bytes)
{
	uint32_t length = (uint32_t)bytes;

	if (bytes < NET_ETHERNET_BYTES || bytes > NET_BUFFER_BYTES - NET_HEADER_BYTES || RING_BYTES - user->ring_used < bytes + sizeof(length))
		return;
	ring_copy_in(user, &length, sizeof(length));
	ring_copy_in(user, frame, bytes);
}

static bool waiting(const struct net *net) { return ((const struct user *)net)->ring_used > 0; }

/* What comes meanwhile stays in the kernel's buffers, and what these do not hold is lost there: reading it only to lose it takes time that the guest needs. */
static void set_full(struct user *user, bool full)
{
	struct err err = ERR_INIT;

	if (full == user->full)
		return;
	user->full = full;
	if (loop_modify(user->net.loop, user->source, full ? 0 : EPOLLIN, &err) < 0)
		log_error("net %s: %s", user->net.config.name, err.message);
}

static size_t receive(struct net *net, unsigned lane, uint8_t *buffer)
{
	struct user *user = (struct user *)net;
	uint32_t length;
	(void)lane;

	if (user->ring_used == 0)
		return 0;
	ring_copy_out(user, &length, sizeof(length));
	ring_copy_out(user, buffer + NET_HEADER_BYTES, length);
	if (user->ring_used < RING_ENOUGH / 2)
		set_full(user, false);
	memset(buffer, 0, NET_HEADER_BYTES);
	/* It never left this process. */
	buffer[NET_H_FLAGS] = user->offloads & NET_OFFLOAD_CSUM ? NET_F_DATA_VALID : 0;
	return NET_HEADER_BYTES + length;
}

/* --- what libslirp calls --- */

static ssize_t send_packet(const void *frame, size_t bytes, void *opaque)
{
	struct user *user = opaque;

	user->emitted++;
	flows_see(&user->flows, frame, bytes, false);
	queue_frame(user, frame, bytes);
	return (ssize_t)bytes;
}

static void guest_error(const char *message, void *opaque) { log_debug("net %s: %s", ((struct user *)opaque)->net.config.name, message); }

static int64_t clock_get_ns(void *opaque)
{
	(void)opaque;
	return (int64_t)clock_now_ns();
}

static struct watch *watch_of(struct user *user, int fd)
{
	if (fd >= user->watch_count) {
		int count = fd + 64;
		struct watch *more = xcalloc((size_t)count, sizeof(*more));
		if (user->watch_count > 0)
			memcpy(more, user->watches, (size_t)user->watch_count * sizeof(*more));
		free(user->watches);
		user->watches = more;
		user->watch_count = count;
	}
	return &user->watches[fd];
}

/* A descriptor that is new, or about to be closed: the set is not to have it. */
static void descriptor_comes(int fd, void *opaque)
{
	if (fd >= 0)
		*watch_of(opaque, fd) = (struct watch){.ours = true};
}

static void descriptor_goes(int fd, void *opaque)
{
	struct user *user = opaque;

	if (fd < 0)
		return;
	if (watch_of(user, fd)->in_set != 0)
		epoll_ctl(user->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	*watch_of(user, fd) = (struct watch){0};
}

static void notify(void *opaque) { (void)opaque; /* only for guest forwards, which are not used */ }

/* Timers are made for router advertisements only; there is no IPv6 here. */
static const SlirpCb callbacks = {
	.send_packet = send_packet,
	.guest_error = guest_error,
	.clock_get_ns = clock_get_ns,
	.register_poll_fd = descriptor_comes,
	.unregister_poll_fd = descriptor_goes,
	.notify = notify,
};

/* --- polling --- */

static int add_poll(int fd, int events, void *opaque)
{
	struct watch *watch = watch_of(opaque, fd);

	watch->wished = (events & SLIRP_POLL_IN ? (uint32_t)EPOLLIN : 0) | (events & SLIRP_POLL_OUT ? (uint32_t)EPOLLOUT : 0) |
			(events & SLIRP_POLL_PRI ? (uint32_t)EPOLLPRI : 0) | EPOLLERR | EPOLLHUP;
	return fd;
}

static int get_revents(int fd, void *opaque)
{
	struct user *user = opaque;
	uint32_t ready = fd >= 0 && fd < user->watch_count ? user->watches[fd].ready : 0;

	return (ready & EPOLLIN ? SLIRP_POLL_IN : 0) | (ready & EPOLLOUT ? SLIRP_POLL_OUT : 0) | (ready & EPOLLPRI ? SLIRP_POLL_PRI : 0) |
	       (ready & EPOLLERR ? SLIRP_POLL_ERR : 0) | (ready & EPOLLHUP ? SLIRP_POLL_HUP : 0);
}

static void update_set(struct user *user, int fd)
{
	struct watch *watch = &user->watches[fd];
	struct epoll_event event = {.events = watch->wished, .data.fd = fd};
	int ret;

	if (watch->wished == 0) {
		ret = epoll_ctl(user->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	} else {
		ret = epoll_ctl(user->epoll_fd, watch->in_set ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
		if (ret < 0 && (errno == ENOENT || errno == EEXIST))
			ret = epoll_ctl(user->epoll_fd, errno == ENOENT ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
	}
	if (ret < 0 && watch->wished != 0)
		log_warn("net %s: watching descriptor %d: %s", user->net.config.name, fd, strerror(errno));
	watch->in_set = watch->wished;
}

static void set_timer(struct user *user, uint32_t timeout_ms)
{
	struct itimerspec at = {0};
	uint64_t due = timeout_ms == NO_TIMEOUT ? 0 : now_ms() + max_u64(timeout_ms, 1);

	/* One that comes a little earlier does no harm, and saves a call. */
	if (due == user->timer_at_ms || (due != 0 && user->timer_at_ms != 0 && user->timer_at_ms < due && user->timer_at_ms + 20 > due))
		return;
	at.it_value = (struct timespec){.tv_sec = (time_t)(due / 1000), .tv_nsec = (long)(due % 1000) * 1000000};
	if (timerfd_settime(user->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) == 0)
		user->timer_at_ms = due;
}

static void refresh(struct user *user)
{
	uint32_t timeout = user->deaf ? RETRY_MS : NO_TIMEOUT;

	for (int fd = 0; fd < user->watch_count; fd++)
		user->watches[fd].wished = 0;
	if (user->slirp != NULL)
		lib.slirp_pollfds_fill(user->slirp, &timeout, add_poll, user);
	for (int fd = 0; fd < user->watch_count; fd++)
		if (user->watches[fd].wished != user->watches[fd].in_set)
			update_set(user, fd);
	set_timer(user, timeout);
}

static void hand_over(struct user *user)
{
	if (net_wants(&user->net, 0) && user->ring_used > 0 && user->net.events.readable != NULL)
		user->net.events.readable(user->net.opaque, 0);
}

/* False: again, and no socket has anything. */
static bool poll_once(struct user *user, bool again)
{
	struct epoll_event events[READY_AT_ONCE];
	int count = user->full ? 0 : epoll_wait(user->epoll_fd, events, READY_AT_ONCE, 0);

	if (again && count == 0)
		return false;
	for (int i = 0; i < count; i++)
		watch_of(user, events[i].data.fd)->ready = events[i].events;
	if (user->slirp != NULL)
		lib.slirp_pollfds_poll(user->slirp, count < 0, get_revents, user);
	for (int i = 0; i < count; i++)
		watch_of(user, events[i].data.fd)->ready = 0;
	refresh(user);
	return true;
}

/* libslirp takes one datagram of each socket at a time: asked for more while there are some, the card and its guest are told once of all. */
static void poll_slirp(struct user *user)
{
	uint64_t first = user->emitted, before = first;
	bool more = poll_once(user, false);

	while (more && user->emitted != before && user->emitted - first < FRAMES_IN_A_TURN && user->ring_used < RING_ENOUGH) {
		before = user->emitted;
		more = poll_once(user, true);
	}
	hand_over(user);
	if (user->ring_used >= RING_ENOUGH)
		set_full(user, true);
}

static void ready(void *opaque, uint32_t events)
{
	(void)events;
	poll_slirp(opaque);
}

/* --- the network --- */

static void describe_forward(const struct net_forward *forward, char *out, size_t bytes)
{
	const uint8_t *a = forward->host_address;

	snprintf(out, bytes, "%u.%u.%u.%u:%u", a[0], a[1], a[2], a[3], forward->host_port);
}

static int forward_fails(const struct net_forward *forward, int number, struct err *err)
{
	const char *protocol = forward->udp ? "udp" : "tcp";
	char place[32];

	describe_forward(forward, place, sizeof(place));
	if (number == EADDRINUSE) {
		err_set(err, ERR_STATE, number, "forward %s:%u:%u: port %s of the host is taken", protocol, forward->host_port,
			forward->guest_port, place);
		return err_hint(err, "end what listens there (`ss -%sp sport = %u` shows it), or give the card other ports", forward->udp ? "lun" : "ltn",
				forward->host_port);
	}
	err_set(err, number == EACCES ? ERR_HOST : ERR_FAILED, number, "forward %s:%u:%u: listening at %s: %s", protocol, forward->host_port,
		forward->guest_port, place, strerror(number));
	if (number == EACCES)
		return err_hint(err, "ports below 1024 need root or CAP_NET_BIND_SERVICE; choose a higher one");
	return err_hint(err, "the address must be one of this host, or 0.0.0.0 for all");
}

/* Those that are not bound yet. */
static int add_forwards(struct user *user, struct err *err)
{
	for (unsigned i = 0; i < user->net.config.forward_count; i++) {
		const struct net_forward *forward = &user->net.config.forwards[i];
		struct in_addr host, guest = {0};

		memcpy(&host, forward->host_address, sizeof(host));
		if (!user->bound[i] && lib.slirp_add_hostfwd(user->slirp, forward->udp, host, forward->host_port, guest, forward->guest_port) < 0)
			return forward_fails(forward, errno, err);
		user->bound[i] = true;
	}
	return 0;
}

int net_user_load(struct err *err)
{
	const char *why = library_load(&libslirp, &lib);

	if (!why)
		return 0;
	err_set(err, ERR_HOST, ENOSYS, "libslirp: %s", why);
	err_hint(err, "`mode = user` needs it: `apt-get install libslirp0`");
	return -ENOSYS;
}

static int start(struct user *user, struct err *err)
{
	const SlirpConfig config = {
		.version = SLIRP_CONFIG_VERSION_MAX,
		.in_enabled = true,
		.vnetwork.s_addr = htonl(NETWORK),
		.vnetmask.s_addr = htonl(NETMASK),
		.vhost.s_addr = htonl(HOST),
		.vnameserver.s_addr = htonl(NAME_SERVER),
		.vdhcp_start.s_addr = htonl(FIRST_GUEST),
	};

	int rc = net_user_load(err);

	if (rc)
		return rc;
	user->slirp = lib.slirp_new(&config, &callbacks, user);
	if (user->slirp == NULL)
		return err_set(err, ERR_FAILED, ENOMEM, "libslirp %s does not start", lib.slirp_version_string());
	return add_forwards(user, err);
}

/* The guest has ended its side of a connection. */
static bool has_said_all(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof(info);

	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 &&
	       (info.tcpi_state == TCP_FIN_WAIT1 || info.tcpi_state == TCP_FIN_WAIT2 || info.tcpi_state == TCP_CLOSING || info.tcpi_state == TCP_LAST_ACK);
}

/* Whoever speaks with the guest over a socket sees a reset, not an end that looks like the guest's own. With `spare` where it was the guest's own that
 * stays one: what it said last is to arrive. */
static void stop(struct user *user, bool spare)
{
	const struct linger now = {.l_onoff = 1};

	if (user->slirp == NULL)
		return;
	for (int fd = 0; fd < user->watch_count; fd++)
		if ((user->watches[fd].ours || user->watches[fd].in_set != 0) && !(spare && has_said_all(fd)))
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)); /* of UDP it changes nothing */
	lib.slirp_cleanup(user->slirp);
	user->slirp = NULL;
	memset(user->bound, 0, sizeof(user->bound));
}

static void shake_connections(struct user *user, const uint8_t guest_mac[6])
{
	static const uint8_t peer_mac[6] = {0x52, 0x55, 0x0a, 0x00, 0x02, 0x02}; /* as libslirp makes it */
	uint8_t syn[FLOWS_SYN_BYTES];

	for (unsigned i = 0; i < user->flows.count; i++) {
		flows_make_syn(&user->flows.flow[i], guest_mac, peer_mac, syn);
		queue_frame(user, syn, sizeof(syn));
	}
}

static void restart(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest)
{
	struct user *user = (struct user *)net;
	struct err err = ERR_INIT;

	user->ring_head = user->ring_used = 0;
	set_full(user, false);
	fragments_clear(&user->fragments);
	stop(user, false);
	/* The ports were ours a moment ago; where somebody was faster it is tried again. */
	user->deaf = start(user, &err) < 0;
	if (user->deaf)
		log_error("net %s: %s; trying again every second", net->config.name, err.message);
	if (flows_load(&user->flows, guest) == 0)
		shake_connections(user, guest_mac);
	refresh(user);
}

static void try_forwards_again(struct user *user)
{
	struct err err = ERR_INIT;

	user->deaf = (user->slirp == NULL ? start(user, &err) : add_forwards(user, &err)) < 0;
	if (!user->deaf)
		log_info("net %s: all ports are forwarded again", user->net.config.name);
}

static void timer_ready(void *opaque, uint32_t events)
{
	struct user *user = opaque;
	uint64_t count;
	(void)events;

	if (read(user->timer_fd, &count, sizeof(count)) < 0)
		return;
	user->timer_at_ms = 0;
	if (user->deaf)
		try_forwards_again(user);
	poll_slirp(user);
}

/* --- frames from the guest --- */

static int send_frame(struct net *net, unsigned lane, const struct iovec *iov, unsigned count, size_t bytes)
{
	struct user *user = (struct user *)net;
	(void)lane;
	size_t done = net_gather(iov, count, user->frame, bytes);
	const uint8_t *packet = user->frame + NET_HEADER_BYTES;
	if (done != bytes || net_fill_checksum(user->frame, bytes) < 0)
		return -EINVAL;
	if (user->slirp == NULL)
		return 0;
	flows_see(&user->flows, packet, bytes - NET_HEADER_BYTES, true);
	user->arp_came |= get_be16(packet + 12) == 0x0806;
	/* A segment of 64 KiB is taken whole: to libslirp it is a long packet. */
	size_t length = fragments_take(&user->fragments, &packet, bytes - NET_HEADER_BYTES);
	if (length > 0)
		lib.slirp_input(user->slirp, packet, (int)length);
	return 0;
}

static void flush(struct net *net)
{
	struct user *user = (struct user *)net;

	/* libslirp looks at packets that wait for an address only when it is polled, and then gives one for each of its sockets. */
	for (uint64_t before = user->emitted - 1; user->arp_came && user->slirp != NULL && before != user->emitted;) {
		before = user->emitted;
		lib.slirp_pollfds_poll(user->slirp, 0, get_revents, user);
	}
	user->arp_came = false;
	refresh(user);
}

static void set_offloads(struct net *net, unsigned offloads) { ((struct user *)net)->offloads = offloads; }

static void save_connections(const struct net *net, struct net_connections *out) { flows_save(&((const struct user *)net)->flows, out); }

static void close_user(struct net *net)
{
	struct user *user = (struct user *)net;

	stop(user, true);
	loop_remove(net->loop, user->source);
	loop_remove(net->loop, user->timer);
	if (user->epoll_fd >= 0)
		close(user->epoll_fd);
	if (user->timer_fd >= 0)
		close(user->timer_fd);
	fragments_clear(&user->fragments);
	free(user->watches);
	free(user->ring);
	free(user);
}

static const struct net_ops ops = {
	.close = close_user,
	/* No .want: the card looks for waiting frames itself when it begins to want them. */
	.waiting = waiting,
	.receive = receive,
	.send = send_frame,
	.flush = flush,
	.set_offloads = set_offloads,
	.save_connections = save_connections,
	.restart = restart,
};

int net_user_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err)
{
	struct user *user = xcalloc(1, sizeof(*user));
	int ret = 0;

	user->net = (struct net){.ops = &ops, .loop = loop, .config = *config};
	user->ring = xcalloc(1, RING_BYTES);
	user->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	user->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (user->epoll_fd < 0 || user->timer_fd < 0)
		ret = err_sys(err, errno, "epoll, timerfd");
	if (ret == 0)
		ret = loop_add(loop, user->epoll_fd, EPOLLIN, ready, user, &user->source, err);
	if (ret == 0)
		ret = loop_add(loop, user->timer_fd, EPOLLIN, timer_ready, user, &user->timer, err);
	if (ret == 0)
		ret = start(user, err);
	if (ret < 0) {
		close_user(&user->net);
		return ret;
	}
	refresh(user);
	*out = &user->net;
	return 0;
}
