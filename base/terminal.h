/*
 * A terminal in raw mode that is given back as it was, however the program ends: at terminal_restore, by a signal that ends it (hang-up, kill, a crash),
 * and while it is stopped by SIGTSTP. Only SIGKILL leaves it raw.
 *
 * One terminal at a time, by one thread; the state is the process's, as signal handlers get no context.
 */
#ifndef VMCP_BASE_TERMINAL_H
#define VMCP_BASE_TERMINAL_H

#include <stdbool.h>

struct terminal_size {
	unsigned columns, rows;
};

/* 80 by 24 where fd is no terminal, or it does not say. */
struct terminal_size terminal_size(int fd);

/* False if fd is no terminal, or it does not take the setting. `output`: what is written still gets its carriage returns. Signals that the caller
 * handles or blocks stay as they are. */
bool terminal_set_raw(int fd, bool output);
void terminal_restore(void); /* without effect if it is not raw */

#endif
