#include "net.h"

#include <stddef.h>

#include "cpu.h"
#include "text.h"

#define ID_NET_MODERN 0x1041
#define ID_NET_EITHER 0x1000
#define FEATURE_MAC   0x00000020u /* bit 5 */

#define HEADER_BYTES 12u
#define QUEUE_SIZE   NET_BUFFERS
#define ECHO_PORT    7u

#define BEAT_TYPE  0x88b5u
#define BEAT_BYTES 60u

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

static void offer_buffer(struct net *net, unsigned int i)
{
	virtio_describe(&net->receive, i, net->receive_buffers + i * NET_BUFFER_BYTES, NET_BUFFER_BYTES, VIRTQ_DEVICE_WRITE);
	virtio_offer(&net->receive, i);
}

const char *net_start(struct net *net, struct ram *ram)
{
	const char *wrong = wrong_words[virtio_start(&net->virtio, ID_NET_MODERN, ID_NET_EITHER, 0)];
	unsigned int i;

	if (!wrong && !net->virtio.device)
		wrong = wrong_words[VIRTIO_NOT_MODERN];
	if (!wrong && !(virtio_offered(&net->virtio) & FEATURE_MAC))
		wrong = "card-without-address";
	if (!wrong)
		wrong = wrong_words[virtio_accept(&net->virtio, FEATURE_MAC)];
	if (wrong)
		return wrong;
	net->receive_buffers = ram_take(ram, NET_BUFFERS * NET_BUFFER_BYTES);
	net->send_buffers = ram_take(ram, NET_BUFFERS * NET_BUFFER_BYTES);
	if (!net->receive_buffers || !net->send_buffers || virtio_queue_limit(&net->virtio, 1) < QUEUE_SIZE ||
	    !virtio_queue_start(&net->virtio, &net->receive, ram, 0, QUEUE_SIZE) || !virtio_queue_start(&net->virtio, &net->send, ram, 1, QUEUE_SIZE))
		return "no-memory-for-card";
	for (i = 0; i < sizeof(net->mac); i++)
		net->mac[i] = mmio_read8(net->virtio.device + i);
	net->free_sends = 0xffffffffu;
	virtio_go(&net->virtio);
	for (i = 0; i < NET_BUFFERS; i++)
		offer_buffer(net, i);
	virtio_notify(&net->receive);
	net->there = true;
	return NULL;
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
static uint32_t answer_ip(struct net *net, uint8_t *frame, uint32_t bytes)
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
	} else if (frame[IP_PROTOCOL] == 17 && get16(frame + UDP_TARGET) == ECHO_PORT) {
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

static uint32_t answer(struct net *net, uint8_t *frame, uint32_t bytes)
{
	uint32_t length = 0;

	if (bytes >= ARP_END && get16(frame + ETHER_TYPE) == 0x0806)
		length = answer_arp(net, frame, bytes);
	else if (bytes >= ARP_END && get16(frame + ETHER_TYPE) == 0x0800)
		length = answer_ip(net, frame, bytes);
	else if (bytes >= BEAT_BYTES && get16(frame + ETHER_TYPE) == BEAT_TYPE)
		take_beat(net, frame);
	if (length) {
		memcpy(frame, frame + 6, 6);
		memcpy(frame + 6, net->mac, 6);
	}
	return length;
}

static void send(struct net *net, const uint8_t *frame, uint32_t bytes)
{
	unsigned int i;
	uint8_t *place;

	if (!net->free_sends) {
		net->lost++;
		return;
	}
	i = (unsigned int)__builtin_ctz(net->free_sends);
	net->free_sends &= net->free_sends - 1;
	place = net->send_buffers + i * NET_BUFFER_BYTES;
	memset(place, 0, HEADER_BYTES);
	memcpy(place + HEADER_BYTES, frame, bytes);
	virtio_describe(&net->send, i, place, HEADER_BYTES + bytes, 0);
	virtio_offer(&net->send, i);
}

void net_turn(struct net *net)
{
	uint32_t head, bytes, length;
	uint8_t *frame;

	while (virtio_poll(&net->send, &head))
		net->free_sends |= 1u << (head % NET_BUFFERS);
	while (virtio_poll(&net->receive, &head)) {
		head %= NET_BUFFERS;
		bytes = net->receive.used->ring[(uint16_t)(net->receive.used_index - 1) % net->receive.size].bytes;
		frame = net->receive_buffers + head * NET_BUFFER_BYTES + HEADER_BYTES;
		length = bytes > HEADER_BYTES && bytes <= NET_BUFFER_BYTES ? answer(net, frame, bytes - HEADER_BYTES) : 0;
		if (length)
			send(net, frame, length);
		offer_buffer(net, head);
	}
	virtio_notify(&net->send);
	virtio_notify(&net->receive);
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
	send(net, frame, sizeof(frame));
}
