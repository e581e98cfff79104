#include "net.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"

#define ID_NET_MODERN 0x1041
#define ID_NET_EITHER 0x1000
#define FEATURE_CSUM  0x00000001u
#define FEATURE_MAC   0x00000020u /* bit 5 */
#define FEATURE_TSO4  0x00000800u /* bit 11, of what is sent */
#define FEATURE_CTRL  0x00020000u /* bit 17: a control queue */
#define FEATURE_MQ    0x00400000u /* bit 22: several pairs of queues */
#define DEVICE_PAIRS  8u	    /* in the configuration, with FEATURE_MQ */

#define HEADER_BYTES 12u
/* Of the header (5.1.6). */
enum { HEADER_FLAGS = 0, HEADER_GSO_TYPE = 1, HEADER_LENGTH = 2, HEADER_GSO_SIZE = 4, HEADER_CSUM_START = 6, HEADER_CSUM_OFFSET = 8 };
#define NEEDS_CSUM   1u
#define GSO_TCPV4    1u
#define QUEUE_SIZE   NET_BUFFERS
#define SEND_QUEUE_SIZE (2 * NET_BUFFERS) /* a frame may be two parts */
#define ECHO_PORT    7u
#define SINK_PORT    9u
#define STREAM_PORT  19u

#define BEAT_TYPE  0x88b5u
#define BEAT_BYTES 60u

#define STREAM_TYPE  0x88b6u
#define STREAM_BYTES 1514u

/* Places in a frame. */
enum {
	BEAT_NUMBER = 14,
	ETHER_TYPE = 12,
	ARP_OPERATION = 20,
	ARP_SENDER_MAC = 22,
	ARP_SENDER_IP = 28,
	ARP_TARGET_MAC = 32,
	ARP_TARGET_IP = 38,
	ARP_END = 42,
	IP_VERSION = 14,
	IP_LENGTH = 16,
	IP_FRAGMENT = 20,
	IP_PROTOCOL = 23,
	IP_SOURCE = 26,
	IP_TARGET = 30,
	IP_DATA = 34,
	ICMP_CHECKSUM = 36,
	UDP_TARGET = 36,
	UDP_END = 42,
};

static const uint8_t our_ip[4] = {10, 0, 2, 15};

static const char *const wrong_words[] = {
	[VIRTIO_GOOD] = NULL,
	[VIRTIO_NOT_FOUND] = "no-card-found",
	[VIRTIO_NOT_MODERN] = "card-has-no-modern-interface",
	[VIRTIO_NO_RESET] = "card-does-not-reset",
	[VIRTIO_NOT_1] = "card-not-virtio-1",
	[VIRTIO_REFUSES] = "card-refuses-features",
};

static uint16_t get16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }

static void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static bool same(const uint8_t *a, const uint8_t *b, unsigned int bytes)
{
	while (bytes && *a == *b) {
		a++;
		b++;
		bytes--;
	}
	return bytes == 0;
}

static void swap(uint8_t *a, uint8_t *b, unsigned int bytes)
{
	for (; bytes; bytes--, a++, b++) {
		uint8_t kept = *a;

		*a = *b;
		*b = kept;
	}
}

static void offer_buffer(struct net_pair *pair, unsigned int i)
{
	virtio_describe(&pair->receive, i, pair->receive_buffers + i * NET_BUFFER_BYTES, NET_BUFFER_BYTES, VIRTQ_DEVICE_WRITE);
	virtio_offer(&pair->receive, i);
}

static bool start_pair(struct net *net, struct ram *ram, unsigned int number)
{
	struct net_pair *pair = &net->pairs[number];
	uint16_t receive = (uint16_t)(2 * number), send = (uint16_t)(receive + 1);

	pair->receive_buffers = ram_take(ram, NET_BUFFERS * NET_BUFFER_BYTES);
	pair->send_buffers = ram_take(ram, NET_BUFFERS * NET_BUFFER_BYTES);
	pair->free_sends = 0xffffffffu;
	return pair->receive_buffers && pair->send_buffers && virtio_queue_limit(&net->virtio, send) >= SEND_QUEUE_SIZE &&
	       virtio_queue_start(&net->virtio, &pair->receive, ram, receive, QUEUE_SIZE) &&
	       virtio_queue_start(&net->virtio, &pair->send, ram, send, SEND_QUEUE_SIZE);
}

/* VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (5.1.6.5.5). */
static bool use_pairs(struct net *net, struct ram *ram)
{
	uint8_t *command = ram_take(ram, PAGE_BYTES);
	volatile uint8_t *status = command + 4;
	uint32_t head;

	if (!command)
		return false;
	command[0] = 4;
	command[1] = 0;
	command[2] = (uint8_t)net->pair_count;
	command[3] = 0;
	*status = 1;
	virtio_describe(&net->control, 0, command, 4, VIRTQ_NEXT);
	virtio_describe(&net->control, 1, status, 1, VIRTQ_DEVICE_WRITE);
	virtio_offer(&net->control, 0);
	virtio_notify(&net->control);
	while (!virtio_poll(&net->control, &head))
		;
	return *status == 0;
}

static const char *start_queues(struct net *net, struct ram *ram, uint16_t control)
{
	bool good = true;
	unsigned int i, n;

	for (n = 0; n < net->pair_count && good; n++)
		good = start_pair(net, ram, n);
	if (good && net->pair_count > 1)
		good = virtio_queue_start(&net->virtio, &net->control, ram, control, 2);
	if (!good)
		return "no-memory-for-card";
	virtio_go(&net->virtio);
	if (net->pair_count > 1 && !use_pairs(net, ram))
		return "card-refuses-pairs";
	for (n = 0; n < net->pair_count; n++) {
		for (i = 0; i < NET_BUFFERS; i++)
			offer_buffer(&net->pairs[n], i);
		virtio_notify(&net->pairs[n].receive);
	}
	return NULL;
}

const char *net_start(struct net *net, struct ram *ram, unsigned int pairs)
{
	const char *wrong = wrong_words[virtio_start(&net->virtio, ID_NET_MODERN, ID_NET_EITHER, 0)];
	uint32_t cutting = FEATURE_CSUM | FEATURE_TSO4, several = FEATURE_CTRL | FEATURE_MQ, offered;
	uint16_t most = 1;
	unsigned int i;

	if (!wrong && !net->virtio.device)
		wrong = wrong_words[VIRTIO_NOT_MODERN];
	if (wrong)
		return wrong;
	offered = virtio_offered(&net->virtio);
	if (!(offered & FEATURE_MAC))
		return "card-without-address";
	net->cuts = (offered & cutting) == cutting;
	if (pairs > 1 && (offered & several) == several)
		most = mmio_read16(net->virtio.device + DEVICE_PAIRS);
	net->pair_count = pairs < most ? pairs : most;
	wrong = wrong_words[virtio_accept(&net->virtio, FEATURE_MAC | (net->cuts ? cutting : 0) | (net->pair_count > 1 ? several : 0))];
	if (wrong)
		return wrong;
	net->filler = ram_take(ram, (TCP_LONGEST + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
	if (!net->filler)
		return "no-memory-for-card";
	memset(net->filler, TCP_FILLER, TCP_LONGEST);
	for (i = 0; i < sizeof(net->mac); i++)
		net->mac[i] = mmio_read8(net->virtio.device + i);
	wrong = start_queues(net, ram, (uint16_t)(2 * most));
	net->there = !wrong;
	return wrong;
}

/* Each makes the answer of the question in place: its length, 0 if there is none to give. */

static uint32_t answer_arp(struct net *net, uint8_t *frame, uint32_t bytes)
{
	if (bytes < ARP_END || get16(frame + ARP_OPERATION) != 1 || !same(frame + ARP_TARGET_IP, our_ip, 4))
		return 0;
	put16(frame + ARP_OPERATION, 2);
	swap(frame + ARP_SENDER_IP, frame + ARP_TARGET_IP, 4);
	memcpy(frame + ARP_TARGET_MAC, frame + ARP_SENDER_MAC, 6);
	memcpy(frame + ARP_SENDER_MAC, net->mac, 6);
	net->arps++;
	return ARP_END;
}

/* Turned round, addresses and ports leave checksums as they are. */
static uint32_t answer_ip(struct net *net, uint8_t *frame, uint32_t bytes, uint64_t now)
{
	uint32_t sum;

	if (bytes < UDP_END || frame[IP_VERSION] != 0x45 || (get16(frame + IP_FRAGMENT) & 0x3fff) || !same(frame + IP_TARGET, our_ip, 4) ||
	    (uint32_t)get16(frame + IP_LENGTH) + IP_VERSION > bytes)
		return 0;
	if (frame[IP_PROTOCOL] == 1 && frame[IP_DATA] == 8) {
		frame[IP_DATA] = 0;
		sum = (uint32_t)get16(frame + ICMP_CHECKSUM) + 0x0800;
		put16(frame + ICMP_CHECKSUM, sum + (sum >> 16));
		net->pings++;
	} else if (frame[IP_PROTOCOL] == 6 && (get16(frame + UDP_TARGET) == TCP_SINK_PORT || get16(frame + UDP_TARGET) == TCP_SOURCE_PORT)) {
		tcp_take(&net->tcp, frame, now);
		return 0;
	} else if (frame[IP_PROTOCOL] == 17 && get16(frame + UDP_TARGET) == SINK_PORT) {
		net->sunk++;
		return 0;
	} else if (frame[IP_PROTOCOL] == 17 && (get16(frame + UDP_TARGET) == ECHO_PORT || get16(frame + UDP_TARGET) == STREAM_PORT)) {
		swap(frame + IP_DATA, frame + UDP_TARGET, 2);
		net->datagrams++;
	} else {
		return 0;
	}
	swap(frame + IP_SOURCE, frame + IP_TARGET, 4);
	return (uint32_t)get16(frame + IP_LENGTH) + IP_VERSION;
}

static struct net_sender *find_sender(struct net *net, const uint8_t *mac)
{
	unsigned int i;

	for (i = 0; i < NET_SENDERS && net->senders[i].known; i++)
		if (same(net->senders[i].mac, mac, 6))
			return &net->senders[i];
	if (i == NET_SENDERS)
		return NULL;
	net->senders[i].known = true;
	memcpy(net->senders[i].mac, mac, 6);
	return &net->senders[i];
}

static void take_beat(struct net *net, const uint8_t *frame)
{
	struct net_sender *sender = find_sender(net, frame + 6);
	uint64_t number = 0;
	unsigned int i;

	if (!sender)
		return;
	for (i = 0; i < 8; i++)
		number = number << 8 | frame[BEAT_NUMBER + i];
	net->heard++;
	net->behind += number <= sender->last;
	sender->last = number;
}

static bool asks_for_stream(const uint8_t *frame, uint32_t bytes)
{
	return bytes > UDP_END && get16(frame + ETHER_TYPE) == 0x0800 && frame[IP_PROTOCOL] == 17 && get16(frame + IP_DATA) == STREAM_PORT;
}

static void begin_stream(struct net *net, const uint8_t *frame, uint32_t bytes, uint64_t frames)
{
	memcpy(net->stream, frame, bytes);
	net->stream_bytes = bytes;
	net->stream_left = frames;
}

static uint64_t number_at(const uint8_t *at, const uint8_t *end)
{
	uint64_t number = 0;

	for (; at < end && *at >= '0' && *at <= '9'; at++)
		number = number * 10 + (uint64_t)(*at - '0');
	return number;
}

static uint32_t answer(struct net *net, uint8_t *frame, uint32_t bytes, uint64_t now)
{
	uint32_t length = 0;

	if (bytes >= ARP_END && get16(frame + ETHER_TYPE) == 0x0806)
		length = answer_arp(net, frame, bytes);
	else if (bytes >= ARP_END && get16(frame + ETHER_TYPE) == 0x0800)
		length = answer_ip(net, frame, bytes, now);
	else if (bytes >= BEAT_BYTES && get16(frame + ETHER_TYPE) == BEAT_TYPE)
		take_beat(net, frame);
	else if (bytes == STREAM_BYTES && get16(frame + ETHER_TYPE) == STREAM_TYPE)
		net->sunk++;
	if (!length)
		return 0;
	memcpy(frame, frame + 6, 6);
	memcpy(frame + 6, net->mac, 6);
	if (!asks_for_stream(frame, length))
		return length;
	begin_stream(net, frame, length, number_at(frame + UDP_END, frame + length));
	return 0;
}

/* One of the free places, with a header of zeroes. */
static unsigned int take_place(struct net_pair *pair, uint8_t **place)
{
	unsigned int i = (unsigned int)__builtin_ctz(pair->free_sends);

	pair->free_sends &= pair->free_sends - 1;
	*place = pair->send_buffers + i * NET_BUFFER_BYTES;
	memset(*place, 0, HEADER_BYTES);
	return i;
}

static void send(struct net *net, struct net_pair *pair, const uint8_t *frame, uint32_t bytes)
{
	unsigned int i;
	uint8_t *place;

	if (!pair->free_sends) {
		net->lost++;
		return;
	}
	i = take_place(pair, &place);
	memcpy(place + HEADER_BYTES, frame, bytes);
	virtio_describe(&pair->send, 2 * i, place, HEADER_BYTES + bytes, 0);
	virtio_offer(&pair->send, 2 * i);
}

static void put_le16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)value;
	at[1] = (uint8_t)(value >> 8);
}

static void send_segment(struct net *net, struct net_pair *pair, const struct tcp_out *out)
{
	uint8_t *place;
	unsigned int i = take_place(pair, &place);

	if (out->cut) {
		place[HEADER_FLAGS] = NEEDS_CSUM;
		place[HEADER_GSO_TYPE] = GSO_TCPV4;
		put_le16(place + HEADER_LENGTH, out->head_bytes);
		put_le16(place + HEADER_GSO_SIZE, TCP_SEGMENT);
		put_le16(place + HEADER_CSUM_START, IP_DATA);
		put_le16(place + HEADER_CSUM_OFFSET, 16);
	}
	memcpy(place + HEADER_BYTES, out->head, out->head_bytes);
	virtio_describe(&pair->send, 2 * i, place, HEADER_BYTES + out->head_bytes, out->bytes ? VIRTQ_NEXT : 0);
	virtio_describe(&pair->send, 2 * i + 1, net->filler, out->bytes, 0);
	virtio_offer(&pair->send, 2 * i);
}

static void turn_pair(struct net *net, struct net_pair *pair, uint64_t now)
{
	uint32_t head, bytes, length;
	uint8_t *frame;

	while (virtio_poll(&pair->send, &head))
		pair->free_sends |= 1u << (head / 2 % NET_BUFFERS);
	while (virtio_poll(&pair->receive, &head)) {
		head %= NET_BUFFERS;
		bytes = pair->receive.used->ring[(uint16_t)(pair->receive.used_index - 1) % pair->receive.size].bytes;
		frame = pair->receive_buffers + head * NET_BUFFER_BYTES + HEADER_BYTES;
		length = bytes > HEADER_BYTES && bytes <= NET_BUFFER_BYTES ? answer(net, frame, bytes - HEADER_BYTES, now) : 0;
		pair->came++;
		if (length)
			send(net, pair, frame, length);
		offer_buffer(pair, head);
	}
}

void net_turn(struct net *net, const struct clock *clock, uint64_t now)
{
	struct net_pair *first = &net->pairs[0], *pair;
	struct tcp_out out;

	for (pair = first; pair < first + net->pair_count; pair++)
		turn_pair(net, pair, now);
	for (; net->stream_left && first->free_sends; net->stream_left--)
		send(net, first, net->stream, net->stream_bytes);
	while (first->free_sends && tcp_next(&net->tcp, clock, now, net->cuts, &out))
		send_segment(net, first, &out);
	for (pair = first; pair < first + net->pair_count; pair++) {
		virtio_notify(&pair->send);
		virtio_notify(&pair->receive);
	}
}

void net_beat(struct net *net)
{
	uint8_t frame[BEAT_BYTES];
	unsigned int i;

	memset(frame, 0, sizeof(frame));
	memset(frame, 0xff, 6);
	memcpy(frame + 6, net->mac, 6);
	put16(frame + ETHER_TYPE, BEAT_TYPE);
	net->beats++;
	for (i = 0; i < 8; i++)
		frame[BEAT_NUMBER + i] = (uint8_t)(net->beats >> (56 - 8 * i));
	send(net, &net->pairs[0], frame, sizeof(frame));
}

bool net_stream(struct net *net, uint64_t frames)
{
	uint8_t frame[STREAM_BYTES];

	if (!net->senders[0].known)
		return false;
	memset(frame, 0x5a, sizeof(frame));
	memcpy(frame, net->senders[0].mac, 6);
	memcpy(frame + 6, net->mac, 6);
	put16(frame + ETHER_TYPE, STREAM_TYPE);
	begin_stream(net, frame, sizeof(frame), frames);
	return true;
}
