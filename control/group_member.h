/*
 * A VM's side of what several VMs do together: it stops at each meeting place of checkpoint/checkpoint.h, says so on the connection by which it was asked,
 * and goes on when the other side, which leads all of them (control/group.h), says so. docs/control.md has the messages.
 *
 * A VM is not held for ever by others: who leads and is gone, or is silent for too long, lets it go. At STOPPED, where it stands still, that is
 * GROUP_PAUSE_NS.
 */
#ifndef VMCP_CONTROL_GROUP_MEMBER_H
#define VMCP_CONTROL_GROUP_MEMBER_H

#include <jansson.h>

#include "checkpoint/checkpoint.h"
#include "control/server.h"

#define GROUP_PAUSE_NS 2000000000ull

struct group_member {
	struct control_exchange *x;
	struct ckpt_group group; /* its texts are those below */
	char id[STORE_ID_BYTES], tag[STORE_NAME_BYTES], names[STORE_GROUP_MAX * STORE_NAME_BYTES];
};

/* Reads `group` of checkpoint.take's parameters, if it is there: request->group then is the member's, and lives as long as it does. */
int group_member_of_take(struct group_member *member, struct control_exchange *x, const json_t *params, struct ckpt_request *request, struct err *err);
const struct ckpt_group *group_member_of_revert(struct group_member *member, struct control_exchange *x);
/* Adds what the result of a checkpoint in a group has more. */
void group_member_tell(const struct ckpt_group *group, const struct ckpt_result *taken, json_t *result);

#endif
