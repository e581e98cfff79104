#include "control/group.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/priority.h"
#include "control/party.h"
#include "control/protocol.h"

static void show(const struct group_take_options *options, const char *phase)
{
	json_t *params = json_pack("{s:s, s:i, s:i}", "phase", phase, "done_pages", 0, "total_pages", 0);

	if (options->progress)
		options->progress(options->opaque, params);
	json_decref(params);
}

static int check_names(const struct group_take_options *options, struct err *err)
{
	if (options->count < 2 || options->count > STORE_GROUP_MAX)
		return err_set(err, ERR_USAGE, EINVAL, "--group: from 2 to %d VMs are possible", STORE_GROUP_MAX);
	for (unsigned i = 0; i < options->count; i++)
		for (unsigned k = 0; k < i; k++)
			if (!strcmp(options->vms[i], options->vms[k]))
				return err_set(err, ERR_USAGE, EINVAL, "--group: %s is named twice", options->vms[i]);
	return 0;
}

static int begin_all(struct party *party, const struct group_take_options *options, const char *id, struct err *err)
{
	json_t *members = json_array();
	int rc = 0;

	for (unsigned i = 0; i < options->count; i++)
		json_array_append_new(members, json_string(options->vms[i]));
	for (unsigned i = 0; !rc && i < options->count; i++) {
		json_t *group = json_pack("{s:s, s:O}", "id", id, "members", members);

		if (options->tag)
			json_object_set_new(group, "tag", json_string(options->tag));
		party->seats[i].vm = options->vms[i];
		party->count = i + 1;
		rc = party_begin(party, &party->seats[i], "checkpoint.take",
			   json_pack("{s:b, s:b, s:I, s:s, s:o, s:s, s:o}", "live", 1, "full", options->full, "max_rate", (json_int_t)options->max_rate,
				     "instant", options->instant ? options->instant : "now", "message", control_text_or_null(options->message), "wait",
				     "durable", "group", group),
			   err);
	}
	json_decref(members);
	return rc;
}

/* Until all are durable but for the commit. */
static int lead(struct party *party, const struct group_take_options *options, struct err *err)
{
	show(options, "stage");
	int rc = party_gather(party, "staged", true, party->deadline_ns, err);
	if (rc)
		return rc;
	show(options, "pause");
	int nice = priority_urgent(); /* those that stand wait for this process */
	party_go(party);
	rc = party_gather(party, "stopped", true, party->deadline_ns, err);
	if (!rc)
		party_go(party);
	priority_restore(nice);
	if (rc)
		return rc;
	show(options, "memory");
	return party_gather(party, "prepared", true, party->deadline_ns, err);
}

static uint64_t number_of(const json_t *object, const char *key) { return (uint64_t)json_integer_value(json_object_get(object, key)); }

/* Behind the commit: of one that died since, what is known is that its checkpoint is there. */
static json_t *take_to_json(struct party *party, const char *id, const struct group_take_options *options, uint64_t began_ns)
{
	uint64_t first_ns = UINT64_MAX, last_ns = 0;
	json_t *list = json_array(), *created = NULL;

	for (unsigned i = 0; i < party->count; i++) {
		struct seat *seat = &party->seats[i];

		if (!seat->result) {
			json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "id", seat->checkpoint, "vm", seat->vm, "group", id, "durability",
							      "durable"));
			continue;
		}
		uint64_t start_ns = number_of(seat->result, "pause_start_ns"), end_ns = start_ns + number_of(seat->result, "pause_ns");
		first_ns = start_ns < first_ns ? start_ns : first_ns;
		last_ns = end_ns > last_ns ? end_ns : last_ns;
		created = json_object_get(seat->result, "created");
		json_array_append(list, seat->result);
	}
	return json_pack("{s:s, s:o, s:o, s:O?, s:b, s:s, s:I, s:I, s:o}", "group", id, "tag", control_text_or_null(options->tag), "message",
			 control_text_or_null(options->message), "created", created, "live", 1, "durability", "durable", "pause_ns",
			 (json_int_t)(last_ns > first_ns ? last_ns - first_ns : 0), "durable_ns", (json_int_t)(clock_now_ns() - began_ns), "checkpoints",
			 list);
}

/* Whoever opens the store completes what a member that died has left. */
static void mend(struct party *party, const char *store_path)
{
	bool died = false;

	for (unsigned i = 0; i < party->count; i++)
		died |= party->seats[i].rc != 0;
	if (!died)
		return;
	store_close(party->store);
	if (store_open(store_path, false, &party->store, NULL))
		party->store = NULL;
}

int group_take(const struct group_take_options *options, json_t **result, struct err *err)
{
	uint64_t began_ns = clock_now_ns();
	struct party party = {.cancel = options->cancel, .deadline_ns = options->timeout_ns ? began_ns + options->timeout_ns : 0};
	struct err why = ERR_INIT;
	char id[STORE_ID_BYTES] = "";
	int rc = check_names(options, err);

	if (!rc)
		rc = store_open(options->store_path, false, &party.store, err);
	if (rc)
		return rc;
	rc = store_group_begin(party.store, options->tag, id, &why);
	if (!rc)
		rc = begin_all(&party, options, id, &why);
	if (!rc)
		rc = lead(&party, options, &why);
	if (!rc)
		rc = store_group_commit(party.store, id, options->tag, &why);
	if (rc) {
		/* Before the members are told: none can be committed any more. */
		if (id[0])
			store_group_settle(party.store, id, NULL);
		party_give_up(&party, &why);
		if (err)
			*err = why;
	} else {
		party_go(&party);
		party_gather(&party, NULL, false, clock_now_ns() + PARTY_GOODBYE_NS, NULL);
		mend(&party, options->store_path);
		*result = take_to_json(&party, id, options, began_ns);
	}
	party_close(&party);
	return rc;
}
