/*
 * The console log of a detached VM: console.log in its folder, and the older console.log.1 to .CONSOLE_LOG_KEPT, the highest the oldest. A new
 * one is begun at each start, and, at the end of a line, when the present one has the size that is allowed.
 */
#ifndef VMCP_CONTROL_CONSOLE_LOG_H
#define VMCP_CONTROL_CONSOLE_LOG_H

#include <stddef.h>

#include "base/err.h"

#define CONSOLE_LOG_BYTES (4u << 20)
#define CONSOLE_LOG_KEPT  3

struct console_log;

/* `dir` is the VM's folder, and stays the caller's and open. *fd takes what is to be logged; it is the caller's, who closes it. A thread of the log's own
 * writes the files; it needs no more than `limit` bytes and the rest of a line for each. What cannot be written (a full disk) is left out, and said once. */
int console_log_open(int dir, size_t limit, struct console_log **out, int *fd, struct err *err);
/* Waits until all is written. Every copy of *fd must be closed. NULL is allowed. */
void console_log_close(struct console_log *log);

#endif
