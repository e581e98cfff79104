/*
 * Backends tap and bridge: a tap device with virtio's header, so that checksums and segmentation are the kernel's affair. A lane is a queue of the device, with
 * a descriptor of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/log.h"
#include "net/net_internal.h"

#define TUN_DEVICE "/dev/net/tun"
#define DROP_MOST  4096u /* frames; the kernel's queue holds 1000 by default */
#define TURN_MOST_MS 1000u

struct tap;
struct tap_lane {
	struct tap *tap;
	unsigned index;
	int fd;
	struct loop_source *source; /* of one that is in use */
	bool blocked;		    /* net_send found no room */
};

struct tap {
	struct net net;
	bool multi_queue; /* the device is one of several queues, though only one of them may be ours */
	bool gone;	  /* the device is not there any more */
	unsigned in_use;  /* the first so many lanes; the kernel gives nothing to the others */
	unsigned count;
	struct tap_lane lanes[NET_MAX_PAIRS];
};

static uint32_t wanted_events(const struct tap_lane *lane)
{
	return (net_wants(&lane->tap->net, lane->index) ? (uint32_t)EPOLLIN : 0) | (lane->blocked ? (uint32_t)EPOLLOUT : 0);
}

static void watch(struct tap_lane *lane)
{
	struct tap *tap = lane->tap;
	struct err err = ERR_INIT;

	if (!tap->gone && loop_modify(tap->net.loop, lane->source, wanted_events(lane), &err) < 0)
		log_error("net %s: %s", tap->net.config.name, err.message);
}

static void forget_sources(struct tap *tap)
{
	for (unsigned i = 0; i < tap->count; i++) {
		loop_remove(tap->net.loop, tap->lanes[i].source);
		tap->lanes[i].source = NULL;
	}
}

/* Somebody removed the interface: the descriptors will never work again. */
static void lose(struct tap *tap)
{
	log_error("net %s: interface %s is gone; the card has no link until the VM starts anew", tap->net.config.name, tap->net.interface);
	forget_sources(tap);
	tap->gone = true;
	if (tap->net.events.link != NULL)
		tap->net.events.link(tap->net.opaque, false);
}

static void ready(void *opaque, uint32_t events)
{
	struct tap_lane *lane = opaque;
	struct net *net = &lane->tap->net;

	/* A device that was removed answers so; one that is only down does not. */
	if (events & EPOLLERR) {
		struct ifreq request = {0};
		if (ioctl(lane->fd, TUNGETIFF, &request) < 0) {
			lose(lane->tap);
			return;
		}
	}
	if ((events & EPOLLOUT) && lane->blocked) {
		lane->blocked = false;
		watch(lane);
		if (net->events.writable != NULL)
			net->events.writable(net->opaque, lane->index);
	}
	if ((events & EPOLLIN) && net_wants(net, lane->index) && net->events.readable != NULL)
		net->events.readable(net->opaque, lane->index);
}

static void want(struct net *net, unsigned lane) { watch(&((struct tap *)net)->lanes[lane]); }

static bool waiting(const struct net *net)
{
	(void)net;
	return false; /* epoll tells */
}

static size_t receive(struct net *net, unsigned lane, uint8_t *buffer)
{
	ssize_t got;

	do {
		got = read(((struct tap *)net)->lanes[lane].fd, buffer, NET_BUFFER_BYTES);
	} while (got < 0 && errno == EINTR);
	return got > (ssize_t)(NET_HEADER_BYTES + NET_ETHERNET_BYTES) ? (size_t)got : 0;
}

static int send_frame(struct net *net, unsigned index, const struct iovec *iov, unsigned count, size_t bytes)
{
	struct tap_lane *lane = &((struct tap *)net)->lanes[index];
	ssize_t sent;
	(void)bytes;

	do {
		sent = writev(lane->fd, iov, (int)count);
	} while (sent < 0 && errno == EINTR);
	if (sent >= 0)
		return 0;
	if (errno == EINVAL)
		return -EINVAL;
	if (errno != EAGAIN)
		return 0; /* an interface that is down, or gone: a cable without an end */
	lane->blocked = true;
	watch(lane);
	return -EAGAIN;
}

static void set_offloads(struct net *net, unsigned offloads)
{
	struct tap *tap = (struct tap *)net;
	unsigned bits = 0;

	if (offloads & NET_OFFLOAD_CSUM) {
		bits |= TUN_F_CSUM;
		bits |= offloads & NET_OFFLOAD_TSO4 ? TUN_F_TSO4 : 0;
		bits |= offloads & NET_OFFLOAD_TSO6 ? TUN_F_TSO6 : 0;
		bits |= (offloads & NET_OFFLOAD_ECN) && (bits & (TUN_F_TSO4 | TUN_F_TSO6)) ? TUN_F_TSO_ECN : 0;
	}
	/* Of the device, by any of its descriptors. */
	if (!tap->gone && ioctl(tap->lanes[0].fd, TUNSETOFFLOAD, (unsigned long)bits) < 0)
		log_warn("net %s: offloads 0x%x of %s: %s", net->config.name, bits, net->interface, strerror(errno));
}

static void restart(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest)
{
	struct tap *tap = (struct tap *)net;
	uint8_t some[NET_HEADER_BYTES + NET_ETHERNET_BYTES];
	(void)guest_mac;
	(void)guest;

	for (struct tap_lane *lane = tap->lanes; lane < tap->lanes + tap->in_use; lane++) {
		/* A read takes a frame, however short, if only the header fits. */
		for (unsigned i = 0; i < DROP_MOST && !tap->gone && read(lane->fd, some, sizeof(some)) >= 0; i++)
			;
		lane->blocked = false;
		watch(lane);
	}
}

/* --- lanes --- */

static int set_queue(const struct tap_lane *lane, short what)
{
	struct ifreq request = {.ifr_flags = what};

	return ioctl(lane->fd, TUNSETQUEUE, &request) < 0 ? -errno : 0;
}

static bool take_into_use(struct tap_lane *lane)
{
	struct tap *tap = lane->tap;
	struct err err = ERR_INIT;
	int ret = set_queue(lane, IFF_ATTACH_QUEUE);

	if (ret < 0)
		err_sys(&err, -ret, "queue %u of %s", lane->index, tap->net.interface);
	else if (loop_add(tap->net.loop, lane->fd, 0, ready, lane, &lane->source, &err) < 0)
		set_queue(lane, IFF_DETACH_QUEUE);
	else
		return true;
	log_error("net %s: %s", tap->net.config.name, err.message);
	return false;
}

/* What waits in it is lost. The loop must not watch it: to epoll a queue that is detached is one with an error. */
static void put_out_of_use(struct tap_lane *lane)
{
	struct tap *tap = lane->tap;

	loop_remove(tap->net.loop, lane->source);
	lane->source = NULL;
	lane->blocked = false;
	tap->net.wanted &= ~(1u << lane->index);
	int ret = set_queue(lane, IFF_DETACH_QUEUE);
	if (ret < 0)
		log_error("net %s: queue %u of %s: %s", tap->net.config.name, lane->index, tap->net.interface, strerror(-ret));
}

static unsigned use_lanes(struct net *net, unsigned lanes)
{
	struct tap *tap = (struct tap *)net;

	if (tap->gone)
		return tap->in_use;
	while (tap->in_use > lanes)
		put_out_of_use(&tap->lanes[--tap->in_use]);
	while (tap->in_use < lanes && take_into_use(&tap->lanes[tap->in_use]))
		tap->in_use++;
	return tap->in_use;
}

static void close_tap(struct net *net)
{
	struct tap *tap = (struct tap *)net;

	forget_sources(tap);
	for (unsigned i = 0; i < tap->count; i++)
		if (tap->lanes[i].fd >= 0)
			close(tap->lanes[i].fd); /* a device made for this card goes with the last */
	free(tap);
}

static const struct net_ops ops = {
	.close = close_tap,
	.use_lanes = use_lanes,
	.want = want,
	.waiting = waiting,
	.receive = receive,
	.send = send_frame,
	.set_offloads = set_offloads,
	.restart = restart,
};

/* --- opening --- */

static int open_tun(struct tap_lane *lane, struct err *err)
{
	lane->fd = open(TUN_DEVICE, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (lane->fd >= 0)
		return 0;
	int number = errno;
	err_set(err, ERR_HOST, number, "%s: %s", TUN_DEVICE, strerror(number));
	return err_hint(err, number == ENOENT || number == ENODEV ? "load the kernel's module: `modprobe tun`"
								  : "let this user open it, or choose mode = user");
}

static int attach_fails(const struct tap *tap, const char *name, bool own, int number, struct err *err)
{
	switch (number) {
	case EBUSY:
		err_set(err, ERR_STATE, EBUSY, "tap device %s is in use by another process", name);
		return err_hint(err, "end what uses it, or give this card a tap device of its own: `ip tuntap add NAME mode tap`");
	case EPERM:
	case EACCES:
		err_set(err, ERR_HOST, number, "no permission to %s", own ? "create a tap device" : "use it");
		if (own)
			return err_hint(err, "run as root or with CAP_NET_ADMIN, or let root make a device and use mode = tap");
		err_prefix(err, "tap device %s", name);
		return err_hint(err, "run as root or with CAP_NET_ADMIN, or give it to this user: `ip tuntap add %s mode tap user NAME`", name);
	case EINVAL:
		err_set(err, ERR_STATE, EINVAL, "interface %s is no tap device%s", name, tap->count > 1 ? " of several queues" : "");
		return err_hint(err, tap->count > 1 ? "make one with `ip tuntap add NAME mode tap multi_queue`, or leave out `queues`"
						    : "make one with `ip tuntap add NAME mode tap`");
	default:
		return err_sys(err, number, "tap device %s", name);
	}
}

/* `name`: of a device that is there, or a pattern for a new one. 0 or -errno. */
static int attach(struct tap *tap, const struct tap_lane *lane, const char *name)
{
	struct ifreq request = {.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (tap->multi_queue ? IFF_MULTI_QUEUE : 0))};

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(lane->fd, TUNSETIFF, &request) < 0)
		return -errno;
	snprintf(tap->net.interface, sizeof(tap->net.interface), "%s", request.ifr_name);
	return 0;
}

/* Of a device of several queues, which the kernel shares out to all who come: as long as anybody has one there is a carrier. */
static bool has_carrier(int control, const char *name)
{
	struct ethtool_value link = {.cmd = ETHTOOL_GLINK};
	struct ifreq request = {.ifr_data = (char *)&link};

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	return ioctl(control, SIOCETHTOOL, &request) == 0 && link.data;
}

/* To look whether a device has a user and to become its user are two steps: no other vmcp of this host does either meanwhile. The end of the turn is an unlock, or
 * that of the descriptor. Anybody may lock the file, so whoever does it for long is not waited for. */
static void take_turn(int fd)
{
	for (unsigned i = 0; i < TURN_MOST_MS && flock(fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK; i++)
		usleep(1000);
}

static int attach_first(struct tap *tap, int control, const char *name, bool own, struct err *err)
{
	int header = NET_HEADER_BYTES, little = 1;
	int ret = open_tun(&tap->lanes[0], err);

	if (ret < 0)
		return ret;
	take_turn(tap->lanes[0].fd);
	bool taken = !own && has_carrier(control, name);
	tap->multi_queue = tap->count > 1;
	ret = attach(tap, &tap->lanes[0], name);
	if (ret == -EINVAL && !tap->multi_queue) {
		tap->multi_queue = true;
		ret = attach(tap, &tap->lanes[0], name);
	}
	if (ret == 0 && tap->multi_queue && taken)
		ret = -EBUSY;
	if (ret < 0)
		return attach_fails(tap, name, own, -ret, err);
	int fd = tap->lanes[0].fd;
	flock(fd, LOCK_UN);
	if (ioctl(fd, TUNSETVNETHDRSZ, &header) < 0 || ioctl(fd, TUNSETVNETLE, &little) < 0 || ioctl(fd, TUNSETOFFLOAD, 0ul) < 0)
		return err_sys(err, errno, "tap device %s", tap->net.interface);
	return 0;
}

/* The others, out of use until the guest asks for more than one. */
static int attach_rest(struct tap *tap, bool own, struct err *err)
{
	for (struct tap_lane *lane = tap->lanes + 1; lane < tap->lanes + tap->count; lane++) {
		int ret = open_tun(lane, err);

		if (ret < 0)
			return ret;
		ret = attach(tap, lane, tap->net.interface);
		if (ret == 0)
			ret = set_queue(lane, IFF_DETACH_QUEUE);
		if (ret < 0)
			return attach_fails(tap, tap->net.interface, own, -ret, err);
	}
	return 0;
}

static int attach_all(struct tap *tap, int control, const char *name, bool own, struct err *err)
{
	int ret = attach_first(tap, control, name, own, err);

	return ret < 0 ? ret : attach_rest(tap, own, err);
}

static int get_flags(int control, const char *name, short *flags)
{
	struct ifreq request = {0};

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(control, SIOCGIFFLAGS, &request) < 0)
		return -errno;
	*flags = request.ifr_flags;
	return 0;
}

static int set_up(int control, const char *name, short flags)
{
	struct ifreq request = {.ifr_flags = (short)(flags | IFF_UP)};

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	return ioctl(control, SIOCSIFFLAGS, &request) < 0 ? -errno : 0;
}

static int no_interface(const char *what, const char *name, const char *make, struct err *err)
{
	err_set(err, ERR_NOT_FOUND, ENODEV, "there is no %s %s", what, name);
	return err_hint(err, "make it with `%s`, or name another in guest.cfg", make);
}

static int open_existing(struct tap *tap, int control, struct err *err)
{
	const char *name = tap->net.config.interface;
	short flags;

	/* Else the kernel would make one. */
	if (get_flags(control, name, &flags) < 0)
		return no_interface("tap device", name, "ip tuntap add NAME mode tap", err);
	int ret = attach_all(tap, control, name, false, err);
	if (ret == 0 && !(flags & IFF_UP) && set_up(control, name, flags) < 0)
		log_warn("net %s: %s is down, nothing gets through until it is up: `ip link set %s up`", tap->net.config.name, name, name);
	return ret;
}

static int enter_bridge(struct tap *tap, int control, struct err *err)
{
	const char *bridge = tap->net.config.interface;
	struct ifreq mtu = {0}, port = {0};
	short flags;

	snprintf(mtu.ifr_name, sizeof(mtu.ifr_name), "%s", bridge);
	if (ioctl(control, SIOCGIFMTU, &mtu) == 0) {
		snprintf(mtu.ifr_name, sizeof(mtu.ifr_name), "%s", tap->net.interface);
		if (ioctl(control, SIOCSIFMTU, &mtu) < 0)
			log_warn("net %s: MTU %d of %s: %s", tap->net.config.name, mtu.ifr_mtu, tap->net.interface, strerror(errno));
	}
	snprintf(port.ifr_name, sizeof(port.ifr_name), "%s", bridge);
	port.ifr_ifindex = (int)if_nametoindex(tap->net.interface);
	if (ioctl(control, SIOCBRADDIF, &port) < 0) {
		int number = errno;
		if (number == EPERM) {
			err_set(err, ERR_HOST, number, "bridge %s: no permission to add a port", bridge);
			return err_hint(err, "run as root or with CAP_NET_ADMIN, or let root make a tap device in it and use mode = tap");
		}
		if (number != EOPNOTSUPP && number != EINVAL)
			return err_sys(err, number, "bridge %s: adding %s", bridge, tap->net.interface);
		err_set(err, ERR_STATE, number, "interface %s is no bridge", bridge);
		return err_hint(err, "name a bridge in guest.cfg; `ip link show type bridge` lists them");
	}
	int ret = get_flags(control, tap->net.interface, &flags);
	if (ret == 0)
		ret = set_up(control, tap->net.interface, flags);
	return ret < 0 ? err_sys(err, ret, "interface %s", tap->net.interface) : 0;
}

static int open_in_bridge(struct tap *tap, int control, struct err *err)
{
	short flags;

	if (get_flags(control, tap->net.config.interface, &flags) < 0)
		return no_interface("bridge", tap->net.config.interface, "ip link add NAME type bridge", err);
	int ret = attach_all(tap, control, "vmcp%d", true, err);
	return ret < 0 ? ret : enter_bridge(tap, control, err);
}

int net_tap_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err)
{
	CLEANUP_CLOSE int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct tap *tap = xcalloc(1, sizeof(*tap));

	tap->net = (struct net){.ops = &ops, .loop = loop, .config = *config};
	tap->in_use = 1;
	tap->count = net_lanes(&tap->net);
	for (unsigned i = 0; i < NET_MAX_PAIRS; i++)
		tap->lanes[i] = (struct tap_lane){.tap = tap, .index = i, .fd = -1};
	int ret = control < 0 ? err_sys(err, errno, "socket") : 0;
	if (ret == 0)
		ret = config->mode == NET_TAP ? open_existing(tap, control, err) : open_in_bridge(tap, control, err);
	if (ret == 0)
		ret = loop_add(loop, tap->lanes[0].fd, 0, ready, &tap->lanes[0], &tap->lanes[0].source, err);
	if (ret < 0) {
		close_tap(&tap->net);
		return ret;
	}
	*out = &tap->net;
	return 0;
}
