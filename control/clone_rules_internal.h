/* What reading rules (clone_rules.c) and applying them (clone_apply.c) share. */
#ifndef VMCP_CONTROL_CLONE_RULES_INTERNAL_H
#define VMCP_CONTROL_CLONE_RULES_INTERNAL_H

#include "control/clone_rules.h"

#define CLONE_MAX_RULES 256u

enum clone_type { TYPE_PORT, TYPE_MAC, TYPE_TAP, TYPE_BRIDGE, TYPE_CID, TYPE_DISK, TYPE_MEMORY, TYPE_HOSTNAME, TYPE_IP, TYPES };
enum clone_access { ACCESS_ANY, ACCESS_RO, ACCESS_RW };
enum clone_action {
	ACTION_SHARE,
	ACTION_COPY,
	ACTION_VIRTUALIZE,
	ACTION_NEW,
	ACTION_ALLOCATE,
	ACTION_SET,
	ACTION_DROP,
	ACTION_MULTIPLEX,
	ACTIONS
};

struct clone_rule {
	unsigned line;
	enum clone_type type;
	char *name; /* "": all of the type */
	enum clone_access access;
	enum clone_action action;
	char *value;  /* "" if none; variables are in it as they were written */
	char *prefix; /* of `allocate`, with the next two */
	uint32_t from, to;
	unsigned length; /* of the prefix of the addresses from..to, as IPv4 */
};

struct clone_rules {
	char *what;
	struct clone_rule list[CLONE_MAX_RULES + 1]; /* the last is the default of ports */
	unsigned count;
};

/* "FILE:LINE: WHY", ERR_USAGE. Returns -EINVAL. */
int clone_rules_fail(const struct clone_rules *rules, unsigned line, struct err *err, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
/* An enum clone_type, or -1. */
int clone_rules_type(const char *word);
const char *clone_rules_type_name(enum clone_type type);
/* "20000-29999", or one number: from 1 to `most`. */
bool clone_rules_range(const char *text, uint32_t most, uint32_t *from, uint32_t *to);

#endif
