/*
 * The host's side of the guest's agent (guest/protocol.h): tells whoever connects over the guest's vsock what this VM is, and notes what the agent says it
 * made of it. The guest is not trusted: what it says is bounded, and shown, and nothing else.
 *
 * Threads: one of its own.
 */
#ifndef VMCP_CONTROL_AGENT_HOST_H
#define VMCP_CONTROL_AGENT_HOST_H

#include "control/server.h"

struct agent_host;

struct agent_host_identity {
	const char *uuid, *hostname; /* hostname: "" if the guest's stays. Both must outlive it */
	bool tell_time;		     /* the guest is to have the host's time */
};

/* Listens in the folder `dir` of the VM, where its vsock device looks for it. */
int agent_host_start(int dir, struct control_target *target, const struct agent_host_identity *identity, struct agent_host **out, struct err *err);
void agent_host_stop(struct agent_host *host); /* NULL is allowed */
/* For vm.stats: {"connected", "event", "problem"}; NULL gives null. A new reference. Any thread. */
json_t *agent_host_to_json(struct agent_host *host);

#endif
