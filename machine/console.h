/*
 * The console: what the guest's serial port says goes to every watcher, what one of them types goes to the guest.
 *
 * Output is kept in a ring of CONSOLE_RING_BYTES, which is also the scrollback of a watcher that comes later. A watcher that cannot keep up
 * loses the oldest bytes and is told how many; the guest never waits for a watcher.
 *
 * Threads: one thread of the console's own moves all bytes. All functions may be called from any thread but that one.
 */
#ifndef VMCP_MACHINE_CONSOLE_H
#define VMCP_MACHINE_CONSOLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define CONSOLE_RING_BYTES   (1u << 20)
#define CONSOLE_MAX_WATCHERS 16

struct console;

int console_create(struct console **out, struct err *err);
/* What is still in the ring is written to watchers that take it at once; descriptors given with `owned` are closed. */
void console_destroy(struct console *console);

/* Where typed bytes go; returns how many were taken. When it took less, console_room says that there is room again. NULL: typed bytes wait.
 * On return the former function is not running and will not be called again. */
typedef size_t console_input_fn(void *opaque, const uint8_t *data, size_t length);
void console_set_guest(struct console *console, console_input_fn *input, void *opaque);
void console_room(struct console *console);
/* The guest's output. Never blocks; from any thread, vCPU threads included. */
void console_output(struct console *console, const uint8_t *data, size_t length);

struct console_watcher {
	int in_fd;  /* typed bytes, -1 for a watcher that only reads. Its end ends typing, or the watcher if `owned` */
	int out_fd; /* output */
	bool owned; /* the descriptors are the console's from now on (in_fd may equal out_fd) */
	size_t scrollback_bytes;       /* earlier output to begin with */
	int escape;		       /* a byte that calls `escaped` instead of being typed, -1 for none */
	void (*escaped)(void *opaque); /* in the console's thread; must not block */
	void *opaque;
};
/* -EBUSY, ERR_STATE when there are CONSOLE_MAX_WATCHERS already. Only the oldest watcher that can type is heard. */
int console_attach(struct console *console, const struct console_watcher *watcher, struct err *err);
/* The last bytes of output, for a report on a machine that crashed. Returns how many. */
size_t console_tail(struct console *console, char *text, size_t size);

#endif
