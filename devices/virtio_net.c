#include "devices/virtio_net.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/log.h"
#include "devices/virtio_net_internal.h"
#include "net/flow_hash.h"

#define CLASS_ETHERNET	 0x020000u
#define QUEUE_SIZE	 256u
/* 5.1.4; of a card with one pair no more than up to the status. */
enum { CONFIG_MAC = 0, CONFIG_STATUS = 6, CONFIG_MAX_PAIRS = 8, CONFIG_BYTES = 10 };
#define FRAMES_IN_A_TURN 64u
#define ETHER_ARP	 0x0806u
#define ETHER_RARP	 0x8035u
#define ARP_BYTES	 42u
#define SHORT_BYTES	 512u /* of a frame with its header: no bulk of data */
#define RUNT_BYTES	 60u /* what an Ethernet frame has at least, without its checksum */

void net_look_later(struct virtio_net *n, uint64_t wait_ns)
{
	uint64_t when = clock_now_ns() + wait_ns;
	const struct itimerspec at = {.it_value = {.tv_sec = (time_t)(when / 1000000000), .tv_nsec = (long)(when % 1000000000)}};

	if (n->look_ns != 0 && n->look_ns <= when) /* then at all queues */
		return;
	n->look_ns = when;
	if (timerfd_settime(n->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) < 0)
		log_error("%s: timer: %s", n->name, strerror(errno));
}

/* --- pairs of queues --- */

/* Where the backend has one lane all pairs have it; what is left in the queues of a pair that is no more active goes out by the first. */
static unsigned lane_of(const struct virtio_net *n, unsigned pair) { return pair < n->lanes ? pair : 0; }

static unsigned pair_for(const struct virtio_net *n, unsigned lane)
{
	const struct net_lane *l = &n->lane[lane];

	if (n->lanes > 1 || n->active == 1)
		return lane;
	return net_flow_hash(l->frame + NET_HEADER_BYTES, l->frame_bytes - NET_HEADER_BYTES) % n->active;
}

/* Its place depends on the number of pairs (5.1.2). */
static unsigned control_queue(const struct virtio_net *n)
{
	return NET_QUEUES(virtio_has_feature(n->vdev, NET_F_MQ) ? n->pairs : 1) - 1;
}

void net_drop_waiting(struct virtio_net *n)
{
	for (unsigned i = 0; i < net_lanes(n->net); i++)
		n->lane[i].frame_bytes = 0;
}

static void use_lanes(struct virtio_net *n)
{
	n->lanes = net_use_lanes(n->net, n->active < net_lanes(n->net) ? n->active : net_lanes(n->net));
	for (unsigned i = n->lanes; i < net_lanes(n->net); i++) {
		n->lane[i].frame_bytes = 0;
		if (n->blocked >> i & 1)
			virtio_kick(n->vdev, NET_QUEUE_SEND(i)); /* its lane will not tell any more */
		n->blocked &= ~(1u << i);
	}
}

void net_activate_pairs(struct virtio_net *n, unsigned pairs)
{
	n->active = pairs;
	use_lanes(n);
	for (unsigned i = 0; i < pairs; i++)
		virtio_kick(n->vdev, NET_QUEUE_RECEIVE(i));
}

/* --- after a driver's or a machine's start --- */

static void configure_backend(struct virtio_net *n)
{
	unsigned offloads = 0;

	if (virtio_has_feature(n->vdev, NET_F_GUEST_CSUM)) {
		offloads = NET_OFFLOAD_CSUM;
		offloads |= virtio_has_feature(n->vdev, NET_F_GUEST_TSO4) ? NET_OFFLOAD_TSO4 : 0;
		offloads |= virtio_has_feature(n->vdev, NET_F_GUEST_TSO6) ? NET_OFFLOAD_TSO6 : 0;
		offloads |= virtio_has_feature(n->vdev, NET_F_GUEST_ECN) ? NET_OFFLOAD_ECN : 0;
	}
	net_set_offloads(n->net, offloads);
	use_lanes(n);
	n->configured = true;
}

/* An ARP packet that asks nobody and tells all: who is `mac`, and that it has `ipv4` (RFC 5227, 3); of RARP that only the card is here. */
static void make_announcement(const struct virtio_net *n, uint16_t kind, uint8_t *out)
{
	uint8_t *frame = out + NET_HEADER_BYTES, *arp = frame + NET_ETHERNET_BYTES;

	memset(out, 0, NET_HEADER_BYTES + RUNT_BYTES);
	memset(frame, 0xff, 6);
	memcpy(frame + 6, n->mac, 6);
	put_be16(frame + 12, kind);
	put_be16(arp, 1);
	put_be16(arp + 2, 0x0800);
	arp[4] = 6;
	arp[5] = 4;
	put_be16(arp + 6, kind == ETHER_RARP ? 3 : 1);
	memcpy(arp + 8, n->mac, 6);
	memcpy(arp + 14, n->ipv4, 4);
	if (kind == ETHER_RARP)
		memcpy(arp + 18, n->mac, 6);
	memcpy(arp + 24, n->ipv4, 4);
}

/* In the guest's name, as switches and neighbours may still look for it elsewhere. */
static void announce(struct virtio_net *n)
{
	static const uint8_t none[4] = {0};
	uint8_t frame[NET_HEADER_BYTES + RUNT_BYTES];
	const struct iovec iov = {.iov_base = frame, .iov_len = sizeof(frame)};

	make_announcement(n, ETHER_RARP, frame);
	net_send(n->net, 0, &iov, 1, sizeof(frame));
	if (memcmp(n->ipv4, none, sizeof(none)) != 0) {
		make_announcement(n, ETHER_ARP, frame);
		net_send(n->net, 0, &iov, 1, sizeof(frame));
	}
	net_flush(n->net);
	if (virtio_has_feature(n->vdev, NET_F_GUEST_ANNOUNCE | NET_F_STATUS | NET_F_CTRL_VQ)) {
		n->status |= NET_S_ANNOUNCE;
		virtio_config_changed(n->vdev);
	}
}

/* Before anything else that the loop does with the card. */
static void prepare(struct virtio_net *n)
{
	if (n->moved)
		announce(n);
	n->moved = false;
	if (!n->configured)
		configure_backend(n);
}

/* --- frames to the guest --- */

/* The driver must see how many buffers hold the frame, in the first of them. */
static int tell_number(struct virtio_net *n, struct virtqueue *q, uint16_t first, uint16_t count, struct err *err)
{
	uint8_t number[2];
	int ret = virtq_walk(q, first, &n->chain, err);

	if (ret < 0)
		return ret;
	put_le16(number, count);
	virtq_copy_to(&n->chain, NET_H_NUM_BUFFERS, number, sizeof(number));
	return 0;
}

/* Takes buffers until the lane's frame fits: how many; 0 if there are too few, then *never says whether it is no use to wait for more; or -EPROTO. */
static int fill_buffers(struct virtio_net *n, const struct net_lane *lane, struct virtqueue *q, bool *never, struct err *err)
{
	bool merge = virtio_has_feature(n->vdev, NET_F_MRG_RXBUF);
	uint16_t count = 0, first = 0;

	for (size_t done = 0; done < lane->frame_bytes; count++) {
		int ret = virtq_pop(q, &n->chain, err);
		if (ret < 0)
			return ret;
		*never = ret == 0 ? count == q->s.size : !merge && n->chain.in_bytes < lane->frame_bytes;
		if (ret == 1 && (n->chain.out_count > 0 || n->chain.in_bytes < (count == 0 ? NET_HEADER_BYTES : 1)))
			return err_set(err, ERR_FAILED, EPROTO, "receive chain %u has %u readable segments and %llu writable bytes", n->chain.head,
				       n->chain.out_count, (unsigned long long)n->chain.in_bytes);
		if (ret == 0 || *never) {
			virtq_unpop(q, (uint16_t)(count + ret));
			return 0;
		}
		uint64_t bytes = virtq_copy_to(&n->chain, 0, lane->frame + done, lane->frame_bytes - done);
		ret = virtq_fill(q, count, n->chain.head, (uint32_t)bytes, err);
		if (ret < 0)
			return ret;
		first = count == 0 ? n->chain.head : first;
		done += bytes;
	}
	int ret = count > 1 ? tell_number(n, q, first, count, err) : 0;
	return ret < 0 ? ret : count;
}

/* 1: delivered or dropped; 0: the guest has no buffers; -EPROTO. */
static int deliver(struct virtio_net *n, struct net_lane *lane, struct virtqueue *q, struct err *err)
{
	bool never = false;
	int count = fill_buffers(n, lane, q, &never, err);

	if (count == 0 && !never && virtq_rearm(q))
		count = fill_buffers(n, lane, q, &never, err);
	if (count < 0 || (count == 0 && !never))
		return count;
	int ret = count > 0 ? virtq_publish(q, (uint16_t)count, err) : 0;
	if (ret < 0)
		return ret;
	n->stats.receive_drops += count == 0;
	n->stats.received_frames += count > 0;
	n->stats.received_bytes += count > 0 ? lane->frame_bytes - NET_HEADER_BYTES : 0;
	lane->frame_bytes = 0;
	return 1;
}

/* The next frame that is for the guest: false if there is none. */
static bool fetch(struct virtio_net *n, unsigned index)
{
	struct net_lane *lane = &n->lane[index];

	while (lane->frame_bytes == 0) {
		lane->frame_bytes = net_receive(n->net, index, lane->frame);
		if (lane->frame_bytes == 0)
			return false;
		if (!net_passes_filter(n, lane->frame + NET_HEADER_BYTES)) {
			n->stats.filtered++;
			lane->frame_bytes = 0;
			continue;
		}
		if (!virtio_has_feature(n->vdev, NET_F_GUEST_CSUM))
			lane->frame[NET_H_FLAGS] = 0;
		put_le16(lane->frame + NET_H_NUM_BUFFERS, 1);
	}
	return true;
}

/* The pair's receive queue has its turn; *pairs has a bit for each that had. `deliver` asks to be told of buffers where they are missing. */
static struct virtqueue *begin_receive(struct virtio_net *n, unsigned pair, unsigned *pairs)
{
	struct virtqueue *q = virtio_queue(n->vdev, NET_QUEUE_RECEIVE(pair));

	if (!(*pairs >> pair & 1))
		virtq_disarm(q);
	*pairs |= 1u << pair;
	return q;
}

/* What the pair's lane has. Frames are wanted unless the guest has no buffers, or has had enough for now. */
static int serve_receive(struct virtio_net *n, unsigned pair, struct err *err)
{
	uint64_t wait_ns = 0, now = n->receive_limit.bytes_per_s ? clock_now_ns() : 0;
	unsigned lane = lane_of(n, pair), turn = 0, pairs = 0;
	int ret = 1;

	begin_receive(n, pair, &pairs);
	for (; turn < FRAMES_IN_A_TURN && ret == 1; turn++) {
		wait_ns = rate_limit_wait_ns(&n->receive_limit, now);
		if (wait_ns > 0 || !fetch(n, lane))
			break;
		size_t bytes = n->lane[lane].frame_bytes;
		ret = deliver(n, &n->lane[lane], begin_receive(n, pair_for(n, lane), &pairs), err);
		if (ret == 1)
			rate_limit_take(&n->receive_limit, now, bytes);
	}
	net_want(n->net, lane, ret == 1 && wait_ns == 0);
	for (unsigned i = 0; i < n->pairs; i++)
		if (pairs >> i & 1)
			virtio_signal(n->vdev, NET_QUEUE_RECEIVE(i));
	if (wait_ns > 0)
		net_look_later(n, wait_ns);
	else if (turn == FRAMES_IN_A_TURN && ret == 1)
		virtio_kick(n->vdev, NET_QUEUE_RECEIVE(pair));
	return ret < 0 ? ret : 0;
}

/* --- frames from the guest --- */

static void learn_address(struct virtio_net *n)
{
	uint8_t frame[ARP_BYTES];

	if (virtq_copy_from(&n->chain, NET_HEADER_BYTES, frame, sizeof(frame)) != sizeof(frame))
		return;
	if (get_be16(frame + 12) == ETHER_ARP && get_be16(frame + 16) == 0x0800 && memcmp(frame + 22, n->mac, 6) == 0)
		memcpy(n->ipv4, frame + 28, sizeof(n->ipv4));
}

/* 1, 0 if there is none, -EAGAIN if it must wait, -EPROTO. */
static int send_one(struct virtio_net *n, unsigned lane, struct virtqueue *q, struct err *err)
{
	int ret = virtq_pop(q, &n->chain, err);

	if (ret != 1)
		return ret;
	if (n->chain.in_count > 0 || n->chain.out_bytes < NET_HEADER_BYTES || n->chain.out_bytes > NET_BUFFER_BYTES)
		return err_set(err, ERR_FAILED, EPROTO, "send chain %u has %u writable segments and %llu bytes", n->chain.head, n->chain.in_count,
			       (unsigned long long)n->chain.out_bytes);
	size_t bytes = n->chain.out_bytes;
	ret = net_send(n->net, lane, n->chain.iov, n->chain.out_count, bytes);
	if (ret == -EAGAIN) {
		virtq_unpop(q, 1);
		return ret;
	}
	learn_address(n);
	if (ret < 0) {
		n->stats.send_errors++;
	} else {
		n->stats.sent_frames++;
		n->stats.sent_bytes += bytes - NET_HEADER_BYTES;
	}
	rate_limit_take(&n->send_limit, n->send_limit.bytes_per_s ? clock_now_ns() : 0, bytes);
	ret = virtq_push(q, n->chain.head, 0, err);
	return ret < 0 ? ret : 1;
}

static int serve_send(struct virtio_net *n, unsigned pair, struct err *err)
{
	struct virtqueue *q = virtio_queue(n->vdev, NET_QUEUE_SEND(pair));
	uint64_t wait_ns = 0;
	int ret = 1;

	virtq_disarm(q); /* until all is sent */
	for (unsigned turn = 0; turn < FRAMES_IN_A_TURN && ret == 1; turn++) {
		wait_ns = n->send_limit.bytes_per_s ? rate_limit_wait_ns(&n->send_limit, clock_now_ns()) : 0;
		if (wait_ns > 0)
			break;
		ret = send_one(n, lane_of(n, pair), q, err);
		if (ret == 0 && virtq_rearm(q))
			ret = 1;
	}
	net_flush(n->net);
	virtio_signal(n->vdev, NET_QUEUE_SEND(pair));
	if (wait_ns > 0)
		net_look_later(n, wait_ns);
	else if (ret == 1)
		virtio_kick(n->vdev, NET_QUEUE_SEND(pair));
	else if (ret == -EAGAIN)
		n->blocked |= 1u << pair;
	return ret == -EPROTO ? ret : 0;
}

/* --- events --- */

static int serve_control(struct virtio_net *n, unsigned queue, struct err *err)
{
	struct virtqueue *q = virtio_queue(n->vdev, queue);
	int ret;

	do {
		ret = net_control(n, q, err);
	} while (ret == 1 || (ret == 0 && virtq_rearm(q)));
	virtio_signal(n->vdev, queue);
	return ret;
}

/* With the lock held. */
static void serve(struct virtio_net *n, unsigned queue)
{
	unsigned pair = queue / 2, control = control_queue(n);
	bool receive = queue < control && queue == NET_QUEUE_RECEIVE(pair), send = queue < control && !receive;
	struct err err = ERR_INIT;
	int ret = 0;

	prepare(n);
	if (queue == control && virtio_has_feature(n->vdev, NET_F_CTRL_VQ))
		ret = serve_control(n, queue, &err);
	else if (send)
		ret = serve_send(n, pair, &err);
	/* What was sent may have been answered at once. */
	if (ret == 0 && (receive || net_waiting(n->net)))
		ret = serve_receive(n, receive ? pair : 0, &err);
	if (ret < 0)
		virtio_break(n->vdev, &err);
}

static void notify(void *opaque, unsigned queue) { serve(opaque, queue); }

/*
 * If the next frame is a short one, a question or an acknowledgement: pairs of the lane that have nothing to send. What they send next needs no telling, until
 * take_answers. Where data comes what the guest says to it had better come late, for many frames at
 * once.
 */
static unsigned expect_answers(struct virtio_net *n, unsigned lane)
{
	unsigned pairs = 0;

	if (!fetch(n, lane) || n->lane[lane].frame_bytes > SHORT_BYTES || !loop_may_glance(n->loop, &n->glance))
		return 0;
	for (unsigned i = 0; i < n->active; i++) {
		struct virtqueue *q = virtio_queue(n->vdev, NET_QUEUE_SEND(i));
		if (lane_of(n, i) != lane || virtq_has_chain(q))
			continue;
		virtq_disarm(q);
		pairs |= 1u << i;
	}
	return pairs;
}

struct expected {
	struct virtio_net *n;
	unsigned pairs;
};

static bool has_answer(void *opaque)
{
	const struct expected *e = opaque;

	for (unsigned i = 0; i < e->n->active; i++)
		if ((e->pairs >> i & 1) && virtq_has_chain(virtio_queue(e->n->vdev, NET_QUEUE_SEND(i))))
			return true;
	return false;
}

static void take_answers(const struct expected *e)
{
	struct virtio_net *n = e->n;

	for (unsigned i = 0; i < n->active; i++)
		if ((e->pairs >> i & 1) && virtio_is_live(n->vdev) && virtq_rearm(virtio_queue(n->vdev, NET_QUEUE_SEND(i))))
			serve(n, NET_QUEUE_SEND(i));
}

/* A guest that answers at once is spared an exit, and this thread from falling asleep in between. */
static void serve_and_expect(struct virtio_net *n, unsigned lane)
{
	prepare(n);
	struct expected expected = {.n = n, .pairs = expect_answers(n, lane)};
	uint64_t before = n->stats.received_frames;

	serve(n, NET_QUEUE_RECEIVE(lane));
	if (expected.pairs == 0)
		return;
	if (n->stats.received_frames != before)
		loop_glance(n->loop, &n->glance, has_answer, &expected);
	take_answers(&expected);
}

static void readable(void *opaque, unsigned lane)
{
	struct virtio_net *n = opaque;

	virtio_lock(n->vdev);
	if (virtio_is_live(n->vdev))
		serve_and_expect(n, lane);
	else
		net_want(n->net, lane, false); /* a kick comes when the device lives */
	virtio_unlock(n->vdev);
}

static void writable(void *opaque, unsigned lane)
{
	struct virtio_net *n = opaque;

	virtio_lock(n->vdev);
	for (unsigned i = 0; i < n->pairs; i++) {
		if (!(n->blocked >> i & 1) || lane_of(n, i) != lane)
			continue;
		n->blocked &= ~(1u << i);
		if (virtio_is_live(n->vdev))
			serve(n, NET_QUEUE_SEND(i));
	}
	virtio_unlock(n->vdev);
}

static void link_changed(void *opaque, bool up)
{
	struct virtio_net *n = opaque;

	virtio_lock(n->vdev);
	n->status = (uint16_t)((n->status & ~NET_S_LINK_UP) | (up ? NET_S_LINK_UP : 0));
	virtio_config_changed(n->vdev);
	virtio_unlock(n->vdev);
}

static void timer_ready(void *opaque, uint32_t events)
{
	struct virtio_net *n = opaque;
	uint64_t count;
	(void)events;

	if (read(n->timer_fd, &count, sizeof(count)) < 0)
		return;
	virtio_lock(n->vdev);
	n->look_ns = 0;
	virtio_unlock(n->vdev);
	/* What a limit allows may be little: each pair is the first to have it once. */
	for (unsigned i = 0; i < n->pairs; i++) {
		unsigned pair = (n->first + i) % n->pairs;

		virtio_kick(n->vdev, NET_QUEUE_RECEIVE(pair));
		virtio_kick(n->vdev, NET_QUEUE_SEND(pair));
	}
	n->first++;
}

static void cancel(void *opaque)
{
	struct virtio_net *n = opaque;

	net_drop_waiting(n);
	n->blocked = 0;
	n->configured = n->moved = false;
	if (virtio_is_resetting(n->vdev))
		net_reset_settings(n);
}

static void config_read(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct virtio_net *n = opaque;
	uint8_t config[CONFIG_BYTES];

	memcpy(config + CONFIG_MAC, n->mac, sizeof(n->mac));
	put_le16(config + CONFIG_STATUS, n->status);
	put_le16(config + CONFIG_MAX_PAIRS, (uint16_t)n->pairs);
	memcpy(data, config + offset, size);
}

static const struct virtio_ops ops = {.notify = notify, .cancel = cancel, .config_read = config_read};
static const struct net_events events = {.readable = readable, .writable = writable, .link = link_changed};

/* --- life --- */

static int create_timer(struct virtio_net *n, struct err *err)
{
	n->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (n->timer_fd < 0)
		return err_sys(err, errno, "%s: timerfd", n->name);
	return loop_add(n->loop, n->timer_fd, EPOLLIN, timer_ready, n, &n->timer, err);
}

int virtio_net_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct net *net, const struct virtio_net_config *config,
		      struct virtio_net **out, struct err *err)
{
	struct virtio_net *n = xcalloc(1, sizeof(*n) + net_lanes(net) * sizeof(n->lane[0]));
	unsigned pairs = config->pairs == 0 ? 1 : config->pairs;
	const struct virtio_config about = {
		.name = n->name,
		.device_id = VIRTIO_ID_NET,
		.class_code = CLASS_ETHERNET,
		.features = NET_F_CSUM | NET_F_GUEST_CSUM | NET_F_MAC | NET_F_GUEST_TSO4 | NET_F_GUEST_TSO6 | NET_F_GUEST_ECN | NET_F_HOST_TSO4 |
			    NET_F_HOST_TSO6 | NET_F_HOST_ECN | NET_F_MRG_RXBUF | NET_F_STATUS | NET_F_CTRL_VQ | NET_F_CTRL_RX |
			    NET_F_CTRL_RX_EXTRA | NET_F_GUEST_ANNOUNCE | NET_F_CTRL_MAC_ADDR | (pairs > 1 ? NET_F_MQ : 0),
		.queues = NET_QUEUES(pairs),
		.queue_size = QUEUE_SIZE,
		.config_bytes = pairs > 1 ? CONFIG_BYTES : CONFIG_MAX_PAIRS,
		.ops = &ops,
		.opaque = n,
	};

	snprintf(n->name, sizeof(n->name), "net %s", config->name);
	n->net = net;
	n->loop = io_loop;
	memcpy(n->own_mac, config->mac, sizeof(n->own_mac));
	n->pairs = pairs;
	n->lanes = 1;
	n->status = NET_S_LINK_UP;
	n->send_limit.bytes_per_s = config->send_rate;
	n->receive_limit.bytes_per_s = config->receive_rate;
	net_reset_settings(n);
	int ret = create_timer(n, err);
	if (ret == 0)
		ret = virtio_create(bus, mem, io_loop, &about, &n->vdev, err);
	if (ret < 0) {
		virtio_net_destroy(n);
		return ret;
	}
	net_listen(net, &events, n);
	*out = n;
	return 0;
}

void virtio_net_destroy(struct virtio_net *n)
{
	if (n == NULL)
		return;
	virtio_destroy(n->vdev);
	loop_remove(n->loop, n->timer);
	if (n->timer_fd >= 0)
		close(n->timer_fd);
	free(n);
}

unsigned virtio_net_slot(const struct virtio_net *n) { return virtio_pci_slot(n->vdev); }

void virtio_net_get_stats(struct virtio_net *n, struct virtio_net_stats *out)
{
	virtio_lock(n->vdev);
	*out = n->stats;
	virtio_unlock(n->vdev);
}
