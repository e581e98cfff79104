/* The network card in a checkpoint. */
#include <errno.h>
#include <string.h>

#include "devices/virtio_net_internal.h"

static const struct codec_field filter_fields[] = {
	CODEC_INT(struct net_filter, promiscuous, CODEC_U8),
	CODEC_INT(struct net_filter, all_multicast, CODEC_U8),
	CODEC_INT(struct net_filter, all_unicast, CODEC_U8),
	CODEC_INT(struct net_filter, no_multicast, CODEC_U8),
	CODEC_INT(struct net_filter, no_unicast, CODEC_U8),
	CODEC_INT(struct net_filter, no_broadcast, CODEC_U8),
	CODEC_INT(struct net_filter, unicast_overflow, CODEC_U8),
	CODEC_INT(struct net_filter, multicast_overflow, CODEC_U8),
	CODEC_VRAW(struct net_filter, unicast, unicast_bytes),
	CODEC_VRAW(struct net_filter, multicast, multicast_bytes),
	CODEC_END,
};
static const struct codec_table filter_table = {"filter", sizeof(struct net_filter), filter_fields};

static const struct codec_field connections_fields[] = {
	CODEC_VRAW(struct net_connections, data, bytes),
	CODEC_END,
};
static const struct codec_table connections_table = {"connections", sizeof(struct net_connections), connections_fields};

static const struct codec_field state_fields[] = {
	CODEC_SUB(struct net_state, virtio, &virtio_state_table),
	CODEC_RAW(struct net_state, mac),
	CODEC_INT(struct net_state, status, CODEC_U16),
	CODEC_RAW(struct net_state, ipv4),
	CODEC_SUB(struct net_state, filter, &filter_table),
	CODEC_SUB(struct net_state, connections, &connections_table),
	CODEC_OPTIONAL_INT(struct net_state, more_pairs, CODEC_U8),
	CODEC_END,
};
const struct codec_table net_state_table = {"virtio-net", sizeof(struct net_state), state_fields};

static int capture(void *opaque, void *state, struct err *err)
{
	struct virtio_net *n = opaque;
	struct net_state *s = state;
	(void)err;

	virtio_capture(n->vdev, &s->virtio);
	virtio_lock(n->vdev);
	memcpy(s->mac, n->mac, sizeof(s->mac));
	memcpy(s->ipv4, n->ipv4, sizeof(s->ipv4));
	s->status = n->status;
	s->filter = n->filter;
	s->more_pairs = (uint8_t)(n->active - 1);
	net_save_connections(n->net, &s->connections);
	virtio_unlock(n->vdev);
	return 0;
}

/* The guest has counted its pairs. */
static int other_queues(const struct virtio_net *n, uint32_t queues, struct err *err)
{
	err_set(err, ERR_STATE, EINVAL, "%s: the checkpoint's card has %u pairs of queues, this one has %u", n->name, queues / 2, n->pairs);
	err_hint(err, "give the card `queues = %u`, or start the checkpoint with a configuration of its own", queues / 2);
	return -EINVAL;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	struct virtio_net *n = opaque;
	const struct net_state *s = state;

	if (s->virtio.queue_count != NET_QUEUES(n->pairs) && s->virtio.queue_count % 2 == 1)
		return other_queues(n, s->virtio.queue_count, err);
	if (s->more_pairs >= n->pairs || (s->more_pairs > 0 && !(s->virtio.driver_features & NET_F_MQ)))
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: %u pairs of queues are active", n->name, s->more_pairs + 1u);
	if ((s->mac[0] & 1) || (s->status & ~(NET_S_LINK_UP | NET_S_ANNOUNCE)) || s->filter.unicast_bytes % 6 != 0 ||
	    s->filter.multicast_bytes % 6 != 0 || s->connections.bytes % NET_CONNECTION_BYTES != 0)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: MAC, status, filters or connections make no sense", n->name);
	return virtio_validate(n->vdev, &s->virtio, err);
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct virtio_net *n = opaque;
	const struct net_state *s = state;

	int ret = virtio_apply(n->vdev, &s->virtio, err);
	if (ret < 0)
		return ret;
	virtio_lock(n->vdev);
	memcpy(n->mac, s->mac, sizeof(n->mac));
	memcpy(n->ipv4, s->ipv4, sizeof(n->ipv4));
	/* Whether there is a link is the host's affair; a guest that thinks otherwise is told. */
	bool link_differs = (s->status ^ n->status) & NET_S_LINK_UP;
	n->status = (uint16_t)((n->status & NET_S_LINK_UP) | (s->status & NET_S_ANNOUNCE));
	n->filter = s->filter;
	n->active = s->more_pairs + 1u;
	n->configured = false;
	net_drop_waiting(n);
	/* Here and not in the loop, which may be late: whoever connects once it is told that the machine runs would be cut off. */
	net_restart(n->net, n->mac, &s->connections);
	virtio_activate(n->vdev);
	n->moved = virtio_is_live(n->vdev);
	net_look_later(n, 0);
	if (link_differs || (s->status & NET_S_ANNOUNCE))
		virtio_config_changed(n->vdev);
	virtio_unlock(n->vdev);
	return 0;
}

static int drain(void *opaque, struct err *err) { return virtio_drain(((struct virtio_net *)opaque)->vdev, err); }

struct component virtio_net_component(struct virtio_net *n, uint32_t instance)
{
	return (struct component){
		.id = "virtio-net",
		.instance = instance,
		.version = 1,
		.table = &net_state_table,
		.opaque = n,
		.capture = capture,
		.validate = validate,
		.apply = apply,
		.drain = drain,
	};
}
