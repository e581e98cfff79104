/*
 * Multiplexers: a port of the host that several VMs share. There is no daemon: the first VM that shares a port starts a process that listens there, gives each new
 * connection to one of the VMs, and hands it through to that VM's own port for as long as it lasts; the process ends when no VM is left. It is
 * no VM's: whoever is checkpointed, reverted or killed, the others' connections go on.
 *
 * Which VMs share a port is what the store's table of resources says (control/identity.h), looked at for each new connection; who is dead or does not
 * answer is passed over.
 *
 *     <store>/mux/PLACE.lock   held by the process
 *     <store>/mux/PLACE.sock   tells whoever connects, as one JSON document, what it does
 *     <store>/mux/log          what went wrong
 *
 * PLACE is that of identity_shared, "tcp:127.0.0.1:8080:least".
 */
#ifndef VMCP_CONTROL_MUX_H
#define VMCP_CONTROL_MUX_H

#include <jansson.h>

#include "checkpoint/store/store.h"
#include "machine/config.h"

/* Starts the multiplexers of all ports that the configuration shares, where there are none yet. The VM is in the table. -EADDRINUSE, ERR_STATE: somebody
 * else listens there. Any thread. */
int mux_ensure(const char *store_path, const struct machine_config *config, struct err *err);
/* The process: says on `report_fd`, and closes it, what became of its start (mux_ensure reads it); returns when nobody needs it any more. */
int mux_serve(const char *store_path, const char *place, int report_fd, struct err *err);
/* What each multiplexer of the store says: a new reference to an array. */
int mux_list(struct store *store, json_t **out, struct err *err);
/* Removes the sockets of those that were killed. */
void mux_remove_dead(struct store *store);

#endif
