/* For tests of backends: a loop that runs, a card that takes what comes, and frames made by hand. */
#ifndef VMCP_NET_NET_TEST_H
#define VMCP_NET_NET_TEST_H

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "net/net_internal.h"

#define CARD_FRAMES 256u
#define WAIT_NS	    60000000000ull

static const uint8_t guest_mac[6] = {0x52, 0x56, 1, 2, 3, 4};
static const uint8_t everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

struct frame {
	size_t bytes; /* header included */
	uint8_t *data;
	unsigned lane;
};

struct card {
	struct loop *loop;
	struct net *net;
	pthread_t thread;
	pthread_mutex_t lock;
	struct frame frames[CARD_FRAMES];
	unsigned count, taken;
	_Atomic unsigned link_changes, writable;
	unsigned lanes, send_lane; /* in use; that frames are sent by */
	uint8_t buffer[NET_BUFFER_BYTES];
};

static void card_take(struct card *card, unsigned lane)
{
	size_t bytes;

	while ((bytes = net_receive(card->net, lane, card->buffer)) > 0) {
		pthread_mutex_lock(&card->lock);
		if (card->count < CARD_FRAMES) {
			struct frame *frame = &card->frames[card->count++];
			frame->bytes = bytes;
			frame->lane = lane;
			frame->data = xcalloc(1, bytes);
			memcpy(frame->data, card->buffer, bytes);
		}
		pthread_mutex_unlock(&card->lock);
	}
}
static void card_readable(void *opaque, unsigned lane) { card_take(opaque, lane); }
static void card_writable(void *opaque, unsigned lane)
{
	(void)lane;
	atomic_fetch_add(&((struct card *)opaque)->writable, 1);
}
static void card_link(void *opaque, bool up)
{
	(void)up;
	atomic_fetch_add(&((struct card *)opaque)->link_changes, 1);
}
static void *card_loop(void *opaque)
{
	loop_run(((struct card *)opaque)->loop, NULL);
	return NULL;
}
static void card_begin(void *opaque)
{
	struct card *card = opaque;
	card->lanes = net_use_lanes(card->net, card->lanes);
	for (unsigned i = 0; i < card->lanes; i++)
		net_want(card->net, i, true);
}

static inline struct card *card_create(const struct net_config *config, struct err *err)
{
	static const struct net_events events = {.readable = card_readable, .writable = card_writable, .link = card_link};
	struct card *card = xcalloc(1, sizeof(*card));

	pthread_mutex_init(&card->lock, NULL);
	cr_assert_eq(loop_create(&card->loop, err), 0);
	if (net_open(config, card->loop, &card->net, err) < 0) {
		loop_destroy(card->loop);
		free(card);
		return NULL;
	}
	net_listen(card->net, &events, card);
	card->lanes = 1;
	pthread_create(&card->thread, NULL, card_loop, card);
	loop_call(card->loop, card_begin, card);
	return card;
}
static inline void card_destroy(struct card *card)
{
	loop_stop(card->loop);
	pthread_join(card->thread, NULL);
	net_close(card->net);
	loop_destroy(card->loop);
	for (unsigned i = 0; i < card->count; i++)
		free(card->frames[i].data);
	free(card);
}

struct card_call {
	struct card *card;
	const uint8_t *data;
	size_t bytes;
	const struct net_connections *connections;
	int result;
};
static void card_do_send(void *opaque)
{
	struct card_call *call = opaque;
	/* In two pieces, as a guest does. */
	struct iovec iov[2] = {{(void *)(uintptr_t)call->data, NET_HEADER_BYTES},
			       {(void *)(uintptr_t)(call->data + NET_HEADER_BYTES), call->bytes - NET_HEADER_BYTES}};
	call->result = net_send(call->card->net, call->card->send_lane, iov, 2, call->bytes);
	net_flush(call->card->net);
	card_take(call->card, 0);
}
/* With the header in front. */
static inline int card_send_raw(struct card *card, const uint8_t *data, size_t bytes)
{
	struct card_call call = {.card = card, .data = data, .bytes = bytes};
	loop_call(card->loop, card_do_send, &call);
	return call.result;
}
static inline int card_send(struct card *card, const uint8_t *frame, size_t bytes)
{
	CLEANUP_FREE uint8_t *data = xcalloc(1, NET_HEADER_BYTES + bytes);
	memcpy(data + NET_HEADER_BYTES, frame, bytes);
	return card_send_raw(card, data, NET_HEADER_BYTES + bytes);
}
static void card_do_restart(void *opaque)
{
	struct card_call *call = opaque;
	net_restart(call->card->net, guest_mac, call->connections);
	card_take(call->card, 0);
}
static inline void card_restart(struct card *card, const struct net_connections *connections)
{
	struct card_call call = {.card = card, .connections = connections};
	loop_call(card->loop, card_do_restart, &call);
}
static void card_do_save(void *opaque)
{
	struct card_call *call = opaque;
	net_save_connections(call->card->net, (struct net_connections *)(uintptr_t)call->connections);
}
static inline void card_save(struct card *card, struct net_connections *out)
{
	struct card_call call = {.card = card, .connections = out};
	loop_call(card->loop, card_do_save, &call);
}

/* The next frame not looked at yet for which `matches` says so, without its header; NULL if none comes in time. */
typedef bool card_match(const uint8_t *frame, size_t bytes);
static inline const uint8_t *card_wait_for(struct card *card, card_match *matches, size_t *bytes, uint64_t ns)
{
	for (uint64_t until = clock_now_ns() + ns; clock_now_ns() < until; usleep(500)) {
		pthread_mutex_lock(&card->lock);
		while (card->taken < card->count) {
			struct frame *frame = &card->frames[card->taken++];
			if (!matches(frame->data + NET_HEADER_BYTES, frame->bytes - NET_HEADER_BYTES))
				continue;
			pthread_mutex_unlock(&card->lock);
			if (bytes != NULL)
				*bytes = frame->bytes - NET_HEADER_BYTES;
			return frame->data + NET_HEADER_BYTES;
		}
		pthread_mutex_unlock(&card->lock);
	}
	return NULL;
}

static inline const uint8_t *card_wait(struct card *card, card_match *matches, size_t *bytes) { return card_wait_for(card, matches, bytes, WAIT_NS); }

/* --- frames by hand --- */

static inline uint16_t checksum(uint32_t sum, const uint8_t *data, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		sum += i % 2 ? data[i] : (uint32_t)data[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}
static inline void make_ethernet(uint8_t *frame, const uint8_t to[6], uint16_t kind)
{
	memcpy(frame, to, 6);
	memcpy(frame + 6, guest_mac, 6);
	put_be16(frame + 12, kind);
}
/* `payload` bytes are to follow at frame + 34. */
static inline void make_ip(uint8_t *frame, uint8_t protocol, uint32_t from, uint32_t to, size_t payload)
{
	uint8_t *ip = frame + 14;
	memset(ip, 0, 20);
	ip[0] = 0x45;
	put_be16(ip + 2, (uint16_t)(20 + payload));
	ip[8] = 64;
	ip[9] = protocol;
	put_be32(ip + 12, from);
	put_be32(ip + 16, to);
	put_be16(ip + 10, checksum(0, ip, 20));
}
static inline uint32_t pseudo_sum(const uint8_t *frame, size_t payload)
{
	const uint8_t *ip = frame + 14;
	uint32_t sum = ip[9] + (uint32_t)payload;
	for (unsigned i = 12; i < 20; i += 2)
		sum += get_be16(ip + i);
	return sum;
}
static inline void make_arp(uint8_t frame[42], const uint8_t to[6], uint16_t operation, uint32_t from, uint32_t target)
{
	memset(frame, 0, 42);
	make_ethernet(frame, to, 0x0806);
	put_be16(frame + 14, 1);
	put_be16(frame + 16, 0x0800);
	frame[18] = 6;
	frame[19] = 4;
	put_be16(frame + 20, operation);
	memcpy(frame + 22, guest_mac, 6);
	put_be32(frame + 28, from);
	put_be32(frame + 38, target);
}

#endif
