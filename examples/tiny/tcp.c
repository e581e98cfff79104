#include "tcp.h"

#include <stddef.h>

#include "text.h"

#define PATIENCE_US 333000u
#define WINDOW	    65535u

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

/* Places in a frame. */
enum {
	ETHER_TYPE = 12,
	IP = 14,
	IP_LENGTH = 16,
	IP_CHECKSUM = 24,
	IP_SOURCE = 26,
	IP_TARGET = 30,
	SOURCE = 34,
	TARGET = 36,
	SEQUENCE = 38,
	ACKNOWLEDGED = 42,
	OFFSET = 46,
	FLAGS = 47,
	TCP_WINDOW = 48,
	CHECKSUM = 50,
	OPTIONS = 54,
};

static uint32_t get16(const uint8_t *at) { return (uint32_t)(at[0] << 8 | at[1]); }
static uint32_t get32(const uint8_t *at) { return get16(at) << 16 | get16(at + 2); }

static void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
	put16(at, value >> 16);
	put16(at + 2, value);
}

static uint64_t sum_of(const uint8_t *at, uint32_t bytes)
{
	uint64_t sum = 0;

	for (; bytes; bytes -= 2, at += 2)
		sum += get16(at);
	return sum;
}

static uint32_t fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint32_t)sum;
}

/* --- what comes --- */

static void begin(struct tcp *tcp, const uint8_t *frame, uint64_t now)
{
	memcpy(tcp->mac, frame + 6, 6);
	memcpy(tcp->own_mac, frame, 6);
	memcpy(tcp->ip, frame + IP_SOURCE, 4);
	memcpy(tcp->own_ip, frame + IP_TARGET, 4);
	tcp->port = (uint16_t)get16(frame + SOURCE);
	tcp->own_port = (uint16_t)get16(frame + TARGET);
	tcp->next_in = get32(frame + SEQUENCE) + 1;
	tcp->first_out = tcp->unacked = tcp->next_out = (uint32_t)now;
	tcp->same_acks = 0;
	tcp->moved_tsc = now;
	tcp->ack_due = tcp->fin_due = false;
	tcp->open = tcp->syn_due = true;
}

/* `alone`: it says nothing else, neither data nor another window. */
static void take_acknowledgement(struct tcp *tcp, uint32_t number, bool alone, uint64_t now)
{
	if (number != tcp->unacked && number - tcp->unacked <= WINDOW) {
		tcp->unacked = number;
		tcp->same_acks = 0;
		tcp->moved_tsc = now;
		/* What was to be sent again had come. */
		if ((int32_t)(tcp->next_out - number) < 0)
			tcp->next_out = number;
	} else if (number == tcp->unacked && tcp->next_out != number && alone && ++tcp->same_acks == 3) {
		tcp->next_out = tcp->unacked;
	}
}

void tcp_take(struct tcp *tcp, const uint8_t *frame, uint64_t now)
{
	uint32_t flags = frame[FLAGS], head = 20 + (frame[OFFSET] >> 4) * 4u, length = get16(frame + IP_LENGTH), bytes, window = get16(frame + TCP_WINDOW);

	if (length < head)
		return;
	bytes = length - head;
	if ((flags & (SYN | ACK | RST)) == SYN) {
		begin(tcp, frame, now);
		return;
	}
	if (!tcp->open || get16(frame + SOURCE) != tcp->port || get16(frame + TARGET) != tcp->own_port)
		return;
	if (flags & RST) {
		tcp->open = false;
		return;
	}
	if (flags & ACK)
		take_acknowledgement(tcp, get32(frame + ACKNOWLEDGED), !bytes && window == tcp->window, now);
	tcp->window = window;
	if (bytes && get32(frame + SEQUENCE) == tcp->next_in) {
		tcp->next_in += bytes;
		tcp->taken += bytes;
	}
	if ((flags & FIN) && get32(frame + SEQUENCE) + bytes == tcp->next_in) {
		tcp->next_in++;
		tcp->fin_due = true;
	}
	tcp->ack_due |= bytes || (flags & FIN);
}

/* --- what goes --- */

static void make(struct tcp *tcp, uint32_t flags, uint32_t bytes, struct tcp_out *out)
{
	uint32_t option = flags & SYN ? 4 : 0, length = 20 + option + bytes;
	uint8_t *head = out->head;
	uint64_t sum;

	memset(head, 0, sizeof(out->head));
	memcpy(head, tcp->mac, 6);
	memcpy(head + 6, tcp->own_mac, 6);
	put16(head + ETHER_TYPE, 0x0800);
	head[IP] = 0x45;
	put16(head + IP_LENGTH, 20 + length);
	head[IP + 6] = 0x40; /* not to be cut on the way */
	head[IP + 8] = 64;
	head[IP + 9] = 6;
	memcpy(head + IP_SOURCE, tcp->own_ip, 4);
	memcpy(head + IP_TARGET, tcp->ip, 4);
	put16(head + IP_CHECKSUM, ~fold(sum_of(head + IP, 20)));
	put16(head + SOURCE, tcp->own_port);
	put16(head + TARGET, tcp->port);
	put32(head + SEQUENCE, tcp->next_out);
	put32(head + ACKNOWLEDGED, tcp->next_in);
	head[OFFSET] = (uint8_t)((20 + option) << 2);
	head[FLAGS] = (uint8_t)(flags | ACK);
	put16(head + TCP_WINDOW, WINDOW);
	if (option)
		put32(head + OPTIONS, 0x02040000 | TCP_SEGMENT);
	out->head_bytes = OPTIONS + option;
	out->bytes = bytes;
	out->cut = bytes > TCP_SEGMENT;
	/* The pseudo header's is there for a card that fills in the rest. */
	sum = sum_of(head + IP_SOURCE, 8) + 6 + length;
	if (!out->cut)
		sum += sum_of(head + SOURCE, 20 + option) + (uint64_t)(bytes / 2) * (TCP_FILLER << 8 | TCP_FILLER) + (bytes % 2) * (TCP_FILLER << 8);
	put16(head + CHECKSUM, out->cut ? fold(sum) : ~fold(sum));
	tcp->next_out += bytes + (flags & (SYN | FIN) ? 1 : 0);
	tcp->ack_due = false;
}

/* How much may go now. Less than a segment only if nothing is under way. */
static uint32_t room(struct tcp *tcp, uint32_t most)
{
	uint32_t under_way = tcp->next_out - tcp->unacked, free = tcp->window > under_way ? tcp->window - under_way : 0;

	if (free >= most)
		return most;
	if (free >= TCP_SEGMENT)
		return free - free % TCP_SEGMENT;
	return under_way ? 0 : free;
}

bool tcp_next(struct tcp *tcp, const struct clock *clock, uint64_t now, bool can_cut, struct tcp_out *out)
{
	bool sends = tcp->own_port == TCP_SOURCE_PORT && tcp->unacked != tcp->first_out && !tcp->fin_due;
	uint32_t bytes;

	if (!tcp->open)
		return false;
	if (tcp->syn_due) {
		tcp->syn_due = false;
		make(tcp, SYN, 0, out);
		return true;
	}
	if (tcp->next_out == tcp->unacked)
		tcp->moved_tsc = now;
	else if (sends && now - tcp->moved_tsc > clock_from_us(clock, PATIENCE_US))
		tcp->next_out = tcp->unacked;
	bytes = sends ? room(tcp, can_cut ? TCP_LONGEST : TCP_SEGMENT) : 0;
	if (bytes) {
		make(tcp, 0, bytes, out);
	} else if (tcp->fin_due) {
		make(tcp, FIN, 0, out);
		tcp->open = false; /* a FIN that is lost leaves the other side to itself */
	} else if (tcp->ack_due) {
		make(tcp, 0, 0, out);
	} else {
		return false;
	}
	return true;
}
