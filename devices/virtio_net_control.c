/* The control queue (virtio 1.2, 5.1.6.5) and the filters that it sets. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "devices/virtio_net_internal.h"

#define MAC_BYTES	  6u
#define COMMAND_BYTES	  2u
#define COMMAND_MAX_BYTES (64u << 10)

enum { CLASS_RX = 0, CLASS_MAC = 1, CLASS_ANNOUNCE = 3, CLASS_MQ = 4 };
enum { RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST };
enum { MAC_TABLE_SET, MAC_ADDR_SET };
enum { ANNOUNCE_ACK };
enum { MQ_VQ_PAIRS_SET };

void net_reset_settings(struct virtio_net *n)
{
	memcpy(n->mac, n->own_mac, sizeof(n->mac));
	n->active = 1;
	n->filter = (struct net_filter){.promiscuous = true};
	n->status &= (uint16_t)~NET_S_ANNOUNCE;
}

/* --- filters --- */

static bool listed(const uint8_t *list, uint32_t bytes, const uint8_t *address)
{
	for (uint32_t i = 0; i + MAC_BYTES <= bytes; i += MAC_BYTES)
		if (memcmp(list + i, address, MAC_BYTES) == 0)
			return true;
	return false;
}

bool net_passes_filter(const struct virtio_net *n, const uint8_t *frame)
{
	static const uint8_t broadcast[MAC_BYTES] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
	const struct net_filter *f = &n->filter;

	if (f->promiscuous)
		return true;
	if (memcmp(frame, broadcast, MAC_BYTES) == 0)
		return !f->no_broadcast;
	if (frame[0] & 1)
		return !f->no_multicast && (f->all_multicast || f->multicast_overflow || listed(f->multicast, f->multicast_bytes, frame));
	return !f->no_unicast && (f->all_unicast || f->unicast_overflow || memcmp(frame, n->mac, MAC_BYTES) == 0 ||
				  listed(f->unicast, f->unicast_bytes, frame));
}

/* --- commands: true where the device did it --- */

static bool set_mode(struct virtio_net *n, uint8_t command)
{
	bool *const modes[] = {
		[RX_PROMISC] = &n->filter.promiscuous,	 [RX_ALLMULTI] = &n->filter.all_multicast, [RX_ALLUNI] = &n->filter.all_unicast,
		[RX_NOMULTI] = &n->filter.no_multicast, [RX_NOUNI] = &n->filter.no_unicast,	   [RX_NOBCAST] = &n->filter.no_broadcast,
	};
	uint64_t needed = command >= RX_ALLUNI ? NET_F_CTRL_RX_EXTRA : NET_F_CTRL_RX;
	uint8_t on;

	if (command >= sizeof(modes) / sizeof(modes[0]) || !virtio_has_feature(n->vdev, needed) ||
	    virtq_copy_from(&n->chain, COMMAND_BYTES, &on, 1) != 1 || on > 1)
		return false;
	*modes[command] = on;
	return true;
}

/* A list: its length (4 bytes) and addresses. Moves *at behind it. */
static bool read_list(const struct virtq_chain *chain, uint64_t *at, uint8_t *list, uint32_t *bytes, bool *overflow)
{
	uint8_t raw[4];

	if (virtq_copy_from(chain, *at, raw, sizeof(raw)) != sizeof(raw))
		return false;
	uint64_t length = (uint64_t)get_le32(raw) * MAC_BYTES;
	*at += sizeof(raw);
	if (!range_within(*at, length, chain->out_bytes))
		return false;
	*overflow = length > MAC_BYTES * NET_FILTER_ADDRESSES;
	*bytes = *overflow ? 0 : (uint32_t)length;
	virtq_copy_from(chain, *at, list, *bytes);
	*at += length;
	return true;
}

static bool set_table(struct virtio_net *n)
{
	struct net_filter f = n->filter;
	uint64_t at = COMMAND_BYTES;

	if (!virtio_has_feature(n->vdev, NET_F_CTRL_RX) || !read_list(&n->chain, &at, f.unicast, &f.unicast_bytes, &f.unicast_overflow) ||
	    !read_list(&n->chain, &at, f.multicast, &f.multicast_bytes, &f.multicast_overflow))
		return false;
	n->filter = f;
	return true;
}

static bool set_address(struct virtio_net *n)
{
	uint8_t mac[MAC_BYTES];

	if (!virtio_has_feature(n->vdev, NET_F_CTRL_MAC_ADDR) || virtq_copy_from(&n->chain, COMMAND_BYTES, mac, sizeof(mac)) != sizeof(mac) ||
	    (mac[0] & 1))
		return false;
	memcpy(n->mac, mac, sizeof(n->mac));
	return true;
}

static bool acknowledge_announcement(struct virtio_net *n)
{
	if (!virtio_has_feature(n->vdev, NET_F_GUEST_ANNOUNCE) || !(n->status & NET_S_ANNOUNCE))
		return false;
	n->status &= (uint16_t)~NET_S_ANNOUNCE;
	return true;
}

/* A driver sets its queues up before it asks for them (5.1.6.5.5). */
static bool are_enabled(const struct virtio_net *n, unsigned pairs)
{
	for (unsigned i = 0; i < NET_QUEUE_RECEIVE(pairs); i++)
		if (!virtio_queue(n->vdev, i)->s.enabled)
			return false;
	return true;
}

static bool set_pairs(struct virtio_net *n)
{
	uint8_t raw[2];

	if (!virtio_has_feature(n->vdev, NET_F_MQ) || virtq_copy_from(&n->chain, COMMAND_BYTES, raw, sizeof(raw)) != sizeof(raw))
		return false;
	unsigned pairs = get_le16(raw);
	if (pairs < 1 || pairs > n->pairs || !are_enabled(n, pairs))
		return false;
	net_activate_pairs(n, pairs);
	return true;
}

static bool obey(struct virtio_net *n, uint8_t class, uint8_t command)
{
	if (class == CLASS_RX)
		return set_mode(n, command);
	if (class == CLASS_MAC && command == MAC_TABLE_SET)
		return set_table(n);
	if (class == CLASS_MAC && command == MAC_ADDR_SET)
		return set_address(n);
	if (class == CLASS_MQ && command == MQ_VQ_PAIRS_SET)
		return set_pairs(n);
	return class == CLASS_ANNOUNCE && command == ANNOUNCE_ACK && acknowledge_announcement(n);
}

int net_control(struct virtio_net *n, struct virtqueue *q, struct err *err)
{
	uint8_t head[COMMAND_BYTES], status;
	int ret = virtq_pop(q, &n->chain, err);

	if (ret != 1)
		return ret;
	if (n->chain.out_bytes > COMMAND_MAX_BYTES || n->chain.in_bytes < 1 ||
	    virtq_copy_from(&n->chain, 0, head, sizeof(head)) != sizeof(head))
		return err_set(err, ERR_FAILED, EPROTO, "control chain %u has %llu readable and %llu writable bytes", n->chain.head,
			       (unsigned long long)n->chain.out_bytes, (unsigned long long)n->chain.in_bytes);
	status = obey(n, head[0], head[1]) ? 0 : 1;
	virtq_copy_to(&n->chain, 0, &status, 1);
	ret = virtq_push(q, n->chain.head, 1, err);
	return ret < 0 ? ret : 1;
}
