/* What the process of a multiplexer consists of: mux.c serves, mux_members.c chooses. */
#ifndef VMCP_CONTROL_MUX_INTERNAL_H
#define VMCP_CONTROL_MUX_INTERNAL_H

#include <netinet/in.h>

#include "control/mux.h"
#include "control/server_name.h"

#define MUX_FOLDER "mux"

/* "tcp:127.0.0.1:8080:least" and back. */
bool mux_parse_place(const char *place, struct sockaddr_in *address, enum config_sharing *sharing);
/* A socket of the multiplexer's in the folder `dir`: listening, or connected to it. -errno. */
int mux_socket(int dir, const char *place, bool listening);

/* --- the VMs that share the port; under the caller's lock --- */

struct mux_member {
	char vm[STORE_NAME_BYTES];
	struct sockaddr_in at; /* its own port */
	bool present;	       /* it runs, or sleeps, and shares the port */
	unsigned connections;
	uint64_t total; /* connections since the multiplexer began */
};

struct mux_members {
	struct mux_member *list;
	size_t count;
	size_t last; /* index of whom the last connection was given to */
};

/* By what the table says now. Members stay where they are, also those that have gone, as long as they have connections. *present: how many are there. */
int mux_members_look(struct mux_members *members, struct store *store, const char *place, size_t *present, struct err *err);
void mux_members_free(struct mux_members *members);
/* Whom to give the next connection to: an index that is not in `tried` (of `count` flags); -1: nobody. `name`: whom the client asks for, where that
 * decides: its first label or all of it is the VM's name. */
int mux_choose(const struct mux_members *members, enum config_sharing sharing, const char *name, const bool *tried);

#endif
