/*
 * Who waits at the forwarded ports of a suspended VM: the first connection, or datagram, tells that somebody wants it.
 *
 * TCP connections that come until the VM runs are kept, and handed through to it then, each by a thread of its own, for as long as they last. Datagrams
 * are lost, as in a network.
 *
 * Threads: one at a time.
 */
#ifndef VMCP_CONTROL_SLEEPER_H
#define VMCP_CONTROL_SLEEPER_H

#include <stdbool.h>

#include "machine/config.h"

struct sleeper;

/* Listens at all forwarded ports. -EADDRINUSE, ERR_STATE, naming the one that somebody else has. */
int sleeper_create(const struct machine_config *config, struct sleeper **out, struct err *err);
/* Waits until somebody wants the VM (*wanted), or `fd` is readable. */
int sleeper_wait(struct sleeper *sleeper, int fd, bool *wanted, struct err *err);
/* Lets go of the ports, so that the VM may have them. Who is connected by then is kept. */
void sleeper_stop_listening(struct sleeper *sleeper);
/* The VM listens: its callers are handed through to it. */
void sleeper_hand_over(struct sleeper *sleeper);
/* Callers that were not handed over are cut off. NULL is allowed. */
void sleeper_destroy(struct sleeper *sleeper);

#endif
