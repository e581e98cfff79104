/*
 * COM1, polled. Output goes through a ring and leaves byte by byte, one port access per serial_turn(), so that
 * printing a line never keeps the main loop from its other work for longer than one exit to the VMM. (A `rep
 * outsb` would not help: KVM hands the bytes of a string output to the VMM one exit each.)
 */
#ifndef TINY_SERIAL_H
#define TINY_SERIAL_H

#include "text.h"

#define SERIAL_RING_BYTES 4096u /* a power of two */

struct serial {
	uint32_t head, tail;	/* free-running: bytes put in, bytes sent */
	uint32_t room_bytes;	/* how many bytes the transmit FIFO surely takes */
	uint32_t command_bytes; /* length of the command line read so far */
	bool input_waits;	/* the last look at the line status saw input */
	char command[96];
	char ring[SERIAL_RING_BYTES];
};

void serial_start(struct serial *serial);

/* Finishes the line and queues it. True if it had to wait for the ring to empty, which takes long. */
bool serial_print(struct serial *serial, struct line *line);

/* True while a turn has something to do without being asked to look for input. */
bool serial_busy(const struct serial *serial);

/*
 * One small piece of work, at most two port accesses: send a byte, take a byte, or (if `look` is set or the
 * others need it) read the line status. Returns the command line when one is complete, valid until the next
 * turn, else NULL. Empty lines are dropped.
 */
const char *serial_turn(struct serial *serial, bool look);

/* Sends all that is queued. */
void serial_drain(struct serial *serial);

#endif
