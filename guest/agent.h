/*
 * The guest's agent: makes a machine that was cloned another one than its origin, by what the host says of it (guest/protocol.h).
 *
 * What it changes lies below `root`, "" for the machine itself. With another root, as in tests, it keeps to files: nothing of the running kernel is changed.
 *
 * Threads: one.
 */
#ifndef VMCP_GUEST_AGENT_H
#define VMCP_GUEST_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "base/err.h"
#include "guest/protocol.h"

#define AGENT_UUID_BYTES       37
#define AGENT_GENERATION_BYTES 33
#define AGENT_NAME_BYTES       64

/* A network card and the address that it is to have. */
struct agent_card {
	char pci[13];	 /* "0000:00:04.0" */
	char mac[18];	 /* "52:56:00:00:00:01": what the card's registers show */
	char address[16];
	unsigned length; /* of the address's prefix */
};

struct agent_identity {
	char uuid[AGENT_UUID_BYTES];
	char generation[AGENT_GENERATION_BYTES]; /* "" if the machine has none */
	char name[AGENT_NAME_BYTES];
	char hostname[AGENT_HOSTNAME_MAX + 1]; /* "": as it is */
	struct agent_card cards[AGENT_MAX_CARDS];
	unsigned card_count;
	bool has_time;
	struct timespec time;
	uint8_t seed[AGENT_SEED_BYTES];
	unsigned seed_bytes;
	/* while it is read */
	unsigned lines;
	bool greeted;
};

/* Takes one line, without its newline. 1: the identity is whole; 0: more is to come; -EPROTO: what no host says. An identity begins as zeroes. */
int agent_take_line(struct agent_identity *identity, const char *line, struct err *err);

enum agent_event {
	AGENT_SAME,  /* nothing has happened: the connection was lost, or the agent began anew */
	AGENT_FIRST, /* the machine had no agent before: it is what it is, and that is noted */
	AGENT_LIFE,  /* the same machine after a boot, start or revert */
	AGENT_CLONE, /* another machine than the one before */
};
const char *agent_event_name(enum agent_event event);

struct agent {
	const char *root;
	unsigned hook_seconds; /* then a hook is killed */
	char generation[AGENT_GENERATION_BYTES]; /* of what was applied last */
};

/*
 * Applies the identity: random seed, clock and addresses of network cards in each life, host name, machine id and SSH host keys of a clone, then the hooks. What fails is left
 * as it was, and does not keep the rest from being done; err has the first of it, and the return value is its -errno. The uuid is noted last, so that a
 * clone whose agent is killed half way is begun again.
 */
int agent_apply(struct agent *agent, const struct agent_identity *identity, enum agent_event *event, struct err *err);

/* --- the parts of it --- */

/* Of all cards of the identity: they are found by their places on the PCI bus. */
int agent_apply_cards(const struct agent *agent, const struct agent_identity *identity, struct err *err);
/* Gives a network interface the address, and with `mac`, "52:56:...", that of its card, and says so on the network. Routes by gateways stay. Nothing is done
 * where it has them already. */
int agent_set_card(const char *interface, const char *mac, const char *address, unsigned length, struct err *err);
/* Replaces the word `from` (and FROM.DOMAIN) by `to` in the text of /etc/hosts, but for addresses and comments. malloc. */
char *agent_rename_in_hosts(const char *text, const char *from, const char *to);
/* Runs a program to its end. -ETIMEDOUT: it was killed after so many seconds; -EIO: it failed, err says how. `environment` may be NULL: the agent's own. */
int agent_run(char *const argv[], char *const environment[], unsigned seconds, struct err *err);

#endif
