/* Calls to several VMs' processes at once, which wait for each other (control/group_member.h); of one thread. */
#ifndef VMCP_CONTROL_PARTY_H
#define VMCP_CONTROL_PARTY_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "control/client.h"

#define PARTY_GOODBYE_NS (10 * 1000000000ull) /* for what cannot take long */

/* One VM that is led: a call to it that is under way. */
struct seat {
	const char *vm;
	struct control_client *client; /* NULL: there is none */
	char at[16];		       /* where it waits; "" while it works */
	char checkpoint[STORE_ID_BYTES];
	bool ended;
	int rc; /* how it ended */
	struct err err;
	json_t *result;
};

struct party {
	struct store *store; /* NULL while processes are started */
	struct seat seats[STORE_GROUP_MAX];
	unsigned count;
	const volatile bool *cancel;
	uint64_t deadline_ns; /* 0: none */
};

/* Calls `method`; `params` is stolen. The seat's `vm` is set. */
int party_begin(struct party *party, struct seat *seat, const char *method, json_t *params, struct err *err);
/*
 * Until all wait at `at`, or, where that is NULL, their calls have ended. `strict`: the first that fails is an error of all; else one that has ended is there.
 * -ETIMEDOUT at `until_ns` (clock_now_ns; 0: never), -ECANCELED when party->cancel turns true.
 */
int party_gather(struct party *party, const char *at, bool strict, uint64_t until_ns, struct err *err);
/* All that wait go on. */
void party_go(struct party *party);
/* All that wait go on as if nothing had been; what they had begun is gone when this returns. */
void party_give_up(struct party *party, const struct err *why);
void party_close(struct party *party);

#endif
