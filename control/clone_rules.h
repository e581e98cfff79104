/*
 * Rules of a clone: what becomes of each resource of a checkpoint's VM in a VM that is cloned from it. One rule a line, docs/clones.md tells more:
 *
 *     TYPE[:NAME]  ACCESS  ACTION  [VALUE]        # comment
 *
 * TYPE and NAME are those of control/identity.h, and `memory`. VALUE may hold <VM>, <N>, <UUID> and <STORE>, which are put in for each clone.
 *
 * Threads: a struct is used by one at a time.
 */
#ifndef VMCP_CONTROL_CLONE_RULES_H
#define VMCP_CONTROL_CLONE_RULES_H

#include "checkpoint/store/resources.h"
#include "machine/config.h"

struct clone_rules;

/* `what` names the text in errors, which say the line. ERR_USAGE: a line that is no rule, or rules that contradict each other. */
int clone_rules_read(const char *what, const char *text, struct clone_rules **out, struct err *err);
void clone_rules_free(struct clone_rules *rules); /* NULL is allowed */

/* A rule about what none of these VMs has is a mistake: ERR_USAGE. */
int clone_rules_check_names(const struct clone_rules *rules, const struct machine_config *const *configs, unsigned config_count, struct err *err);
/* After that. Can VMs of this configuration be cloned by these rules, so many at once? ERR_USAGE: a rule gives all clones the same; a pool is too small; a
 * resource can be neither shared nor virtualised: it is named. */
int clone_rules_check(const struct clone_rules *rules, const struct machine_config *config, unsigned count,
		      struct err *err);

/* What variables mean for one clone. */
struct clone_variables {
	const char *vm, *uuid, *store;
	unsigned number;
	bool same_addresses; /* of network cards, where no rule says another thing */
	const char *network; /* makes the networks of cards of mode group others than the origin's: NAME becomes NAME@this; NULL: they are the same */
};

/* After the check. Makes the configuration that of the clone, all but what is to be allocated: that has its pool in the list of all that the clone has,
 * which is appended to *list. */
int clone_rules_apply(const struct clone_rules *rules, struct machine_config *config,
		      const struct clone_variables *variables, struct store_resource **list, size_t *count,
		      struct err *err);
/* Puts what was allocated for the list into the configuration, and into the list what the guest will know of it. */
int clone_rules_settle(struct machine_config *config, struct store_resource *list, size_t count, struct err *err);
/* Puts which rule is to blame in front of an error about a resource. Returns as err_prefix. */
int clone_rules_blame(const struct clone_rules *rules, const struct store_resource *resource, struct err *err);

#endif
