#include "control/group_member.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "checkpoint/store/group.h"
#include "control/protocol.h"

#define RUNNING_NS (60 * 1000000000ull) /* while the VM runs, though its writes may cost more */
#define REVERT_NS  (10 * 1000000000ull)
#define SETTLE_NS  (10 * 1000000000ull)

static const struct place {
	const char *name;
	uint64_t patience_ns; /* 0: as long as it takes */
} places[] = {
	[CKPT_MEET_STAGED] = {"staged", RUNNING_NS},	 [CKPT_MEET_STOPPED] = {"stopped", GROUP_PAUSE_NS}, [CKPT_MEET_PREPARED] = {"prepared", 0},
	[CKPT_MEET_CHECKED] = {"checked", RUNNING_NS}, [CKPT_MEET_PARKED] = {"parked", REVERT_NS},	   [CKPT_MEET_RESTORED] = {"restored", REVERT_NS},
};

static int check_fault(enum ckpt_meeting where, struct err *err)
{
	return where == CKPT_MEET_STOPPED ? fault_check(FAULT_GROUP_STOPPED, err) : where == CKPT_MEET_PREPARED ? fault_check(FAULT_GROUP_PREPARED, err) : 0;
}

static int say(const struct group_member *member, enum ckpt_meeting where, const char *checkpoint, struct err *err)
{
	json_t *note = json_pack("{s:s, s:s, s:{s:s, s:s}}", "jsonrpc", "2.0", "method", "group", "params", "at", places[where].name, "checkpoint",
				 checkpoint);
	int rc = control_send(member->x->fd, note, err);

	json_decref(note);
	return rc;
}

/* What the other side says: go on, or why not. */
static int hear(const json_t *message, struct err *err)
{
	const char *method = json_string_value(json_object_get(message, "method"));
	const char *why = json_string_value(json_object_get(json_object_get(message, "params"), "why"));

	if (method && !strcmp(method, "group.go"))
		return 0;
	if (method && !strcmp(method, "group.give-up"))
		return err_set(err, ERR_FAILED, ECANCELED, "the group was given up: %s", why ? why : "no reason is given");
	return err_set(err, ERR_USAGE, EPROTO, "control message: neither group.go nor group.give-up");
}

static int wait_for_word(const struct group_member *member, enum ckpt_meeting where, const volatile bool *cancel, struct err *err)
{
	uint64_t patience_ns = places[where].patience_ns, deadline_ns = patience_ns ? clock_now_ns() + patience_ns : 0;
	json_t *message = NULL;
	int rc = control_receive_until(member->x->reader, deadline_ns, cancel, &message, err);

	if (rc == -ETIMEDOUT)
		return err_set(err, ERR_FAILED, ETIMEDOUT, "the other VMs of the group were not there in time");
	if (rc == -ECANCELED)
		return err_set(err, ERR_FAILED, ECANCELED, "it was cancelled");
	if (!rc)
		rc = hear(message, err);
	json_decref(message);
	return rc;
}

/* That the catalogue cannot be asked is no answer: it is asked again for a while. */
static int settle(const struct group_member *member, struct err *why)
{
	const struct timespec moment = {.tv_nsec = 50000000};
	uint64_t until_ns = clock_now_ns() + SETTLE_NS;
	struct err unknown = ERR_INIT;
	int rc;

	while ((rc = store_group_settle(member->x->target->store, member->id, &unknown)) != 0 && rc != -ECANCELED && clock_now_ns() < until_ns)
		nanosleep(&moment, NULL);
	if (rc && !why->number)
		*why = unknown;
	return rc;
}

static int meet(void *opaque, enum ckpt_meeting where, const char *checkpoint, const volatile bool *cancel, struct err *err)
{
	const struct group_member *member = opaque;
	struct err why = ERR_INIT;
	int rc = check_fault(where, &why);

	if (!rc)
		rc = say(member, where, checkpoint, &why);
	if (!rc)
		rc = wait_for_word(member, where, cancel, &why);
	/* Whatever was said or not: the catalogue knows. */
	if (where == CKPT_MEET_PREPARED)
		rc = settle(member, &why);
	if (rc && err)
		*err = why;
	return rc;
}

/* --- what is asked for --- */

static int join_names(const json_t *list, char *out, size_t size, struct err *err)
{
	size_t count = json_array_size(list), used = 0;

	if (!count || count > STORE_GROUP_MAX)
		return err_set(err, ERR_USAGE, EINVAL, "control message: `group`: from 1 to %d members are possible", STORE_GROUP_MAX);
	for (size_t i = 0; i < count; i++) {
		const char *name = json_string_value(json_array_get(list, i));
		int rc = store_check_name("group", name ? name : "", err);

		if (rc)
			return rc;
		used += (size_t)snprintf(out + used, size - used, "%s%s", i ? " " : "", name);
	}
	return 0;
}

int group_member_of_take(struct group_member *member, struct control_exchange *x, const json_t *params, struct ckpt_request *request, struct err *err)
{
	const json_t *group = json_object_get(params, "group");
	const char *id = json_string_value(json_object_get(group, "id")), *tag = json_string_value(json_object_get(group, "tag"));

	if (!group)
		return 0;
	if (!id || strlen(id) >= sizeof(member->id) || !request->live || request->tag || (tag && store_check_name("tag", tag, NULL)))
		return err_set(err, ERR_USAGE, EINVAL, "control message: `group` needs an id, and `live`; its tag is its own");
	*member = (struct group_member){.x = x};
	snprintf(member->id, sizeof(member->id), "%s", id);
	snprintf(member->tag, sizeof(member->tag), "%s", tag ? tag : "");
	member->group = (struct ckpt_group){.id = member->id, .tag = member->tag, .members = member->names, .meet = meet, .opaque = member};
	request->group = &member->group;
	return join_names(json_object_get(group, "members"), member->names, sizeof(member->names), err);
}

const struct ckpt_group *group_member_of_revert(struct group_member *member, struct control_exchange *x)
{
	*member = (struct group_member){.x = x, .group = {.meet = meet}};
	member->group.opaque = member;
	return &member->group;
}

void group_member_tell(const struct ckpt_group *group, const struct ckpt_result *taken, json_t *result)
{
	json_object_set_new(result, "group", json_string(group->id));
	json_object_set_new(result, "pause_start_ns", json_integer((json_int_t)taken->pause_start_ns));
	json_object_set_new(json_object_get(result, "pause"), "group_ns", json_integer((json_int_t)taken->group_ns));
}
