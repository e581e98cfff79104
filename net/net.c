#include "net/net_internal.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"

int net_load(enum net_mode mode, struct err *err) { return mode == NET_USER ? net_user_load(err) : 0; }

int net_open(const struct net_config *config, struct loop *loop, struct net **out, struct err *err)
{
	int ret = config->mode == NET_USER    ? net_user_open(config, loop, out, err)
		  : config->mode == NET_GROUP ? net_group_open(config, loop, out, err)
					      : net_tap_open(config, loop, out, err);

	return ret < 0 ? err_prefix(err, "net %s", config->name) : 0;
}

void net_close(struct net *net)
{
	if (net != NULL)
		net->ops->close(net);
}

void net_listen(struct net *net, const struct net_events *events, void *opaque)
{
	net->events = *events;
	net->opaque = opaque;
}

const char *net_interface(const struct net *net) { return net->interface; }

unsigned net_lanes(const struct net *net) { return net->ops->use_lanes != NULL && net->config.pairs > 1 ? net->config.pairs : 1; }
unsigned net_use_lanes(struct net *net, unsigned lanes) { return net->ops->use_lanes != NULL ? net->ops->use_lanes(net, lanes) : 1; }

void net_want(struct net *net, unsigned lane, bool wanted)
{
	if (wanted == net_wants(net, lane))
		return;
	net->wanted ^= 1u << lane;
	if (net->ops->want != NULL)
		net->ops->want(net, lane);
}

bool net_waiting(const struct net *net) { return net->ops->waiting(net); }
size_t net_receive(struct net *net, unsigned lane, uint8_t *buffer) { return net->ops->receive(net, lane, buffer); }

int net_send(struct net *net, unsigned lane, const struct iovec *iov, unsigned count, size_t bytes)
{
	if (bytes < NET_HEADER_BYTES + NET_ETHERNET_BYTES || bytes > NET_BUFFER_BYTES)
		return -EINVAL;
	return net->ops->send(net, lane, iov, count, bytes);
}

void net_hear(struct net *net)
{
	if (net->ops->hear != NULL)
		net->ops->hear(net);
}

void net_flush(struct net *net)
{
	if (net->ops->flush != NULL)
		net->ops->flush(net);
}

void net_set_offloads(struct net *net, unsigned offloads) { net->ops->set_offloads(net, offloads); }

void net_save_connections(const struct net *net, struct net_connections *out)
{
	out->bytes = 0;
	if (net->ops->save_connections != NULL)
		net->ops->save_connections(net, out);
}

void net_restart(struct net *net, const uint8_t guest_mac[6], const struct net_connections *guest) { net->ops->restart(net, guest_mac, guest); }

size_t net_gather(const struct iovec *iov, unsigned count, uint8_t *out, size_t wanted)
{
	size_t got = 0;

	for (unsigned i = 0; i < count && got < wanted; i++) {
		size_t now = min_u64(iov[i].iov_len, wanted - got);

		memcpy(out + got, iov[i].iov_base, now);
		got += now;
	}
	return got;
}

uint16_t net_sum(const uint8_t *data, size_t bytes)
{
	uint64_t sum = 0;
	size_t i = 0;

	for (; i + 4 <= bytes; i += 4)
		sum += get_le32(data + i);
	if (i + 2 <= bytes) {
		sum += get_le16(data + i);
		i += 2;
	}
	if (i < bytes)
		sum += data[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

int net_fill_checksum(uint8_t *frame, size_t bytes)
{
	uint8_t *packet = frame + NET_HEADER_BYTES;
	size_t length = bytes - NET_HEADER_BYTES, start = get_le16(frame + NET_H_CSUM_START);
	size_t at = start + get_le16(frame + NET_H_CSUM_OFFSET);

	if (!(frame[NET_H_FLAGS] & NET_F_NEEDS_CSUM))
		return 0;
	if (start < NET_ETHERNET_BYTES || start > length || !range_within(at, 2, length))
		return -EINVAL;
	/* The field holds the sum of the pseudo header. */
	uint16_t sum = (uint16_t)~net_sum(packet + start, length - start);
	put_le16(packet + at, sum == 0 ? 0xffff : sum);
	frame[NET_H_FLAGS] &= (uint8_t)~NET_F_NEEDS_CSUM;
	return 0;
}
