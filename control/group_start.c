/* What a group comes back as: revert and clone. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/buf.h"
#include "base/clock.h"
#include "control/group.h"
#include "control/party.h"

/* A VM that was started and stands still until all are ready. */
struct started {
	const char *vm, *checkpoint;
	struct process_result result;
	bool runs; /* its process does */
};

struct comeback {
	const struct group_revert_options *options;
	struct store_group group;
	struct party party; /* of those that ran before */
	struct started started[STORE_GROUP_MAX];
	unsigned started_count;
};

/* --- revert --- */

static int find_members(struct comeback *c, struct err *err)
{
	int rc = store_open(c->options->store_path, false, &c->party.store, err);

	if (!rc)
		rc = store_group_get(c->party.store, c->options->group, &c->group, err);
	if (!rc)
		rc = store_group_check_whole(&c->group, err);
	for (unsigned i = 0; !rc && i < c->group.count; i++) {
		const struct store_group_member *member = &c->group.members[i];

		if (store_vm_is_alive(c->party.store, member->vm)) {
			struct seat *seat = &c->party.seats[c->party.count++];

			seat->vm = member->vm;
			rc = party_begin(&c->party, seat, "vm.revert", json_pack("{s:s, s:b}", "id", member->checkpoint, "group", 1), err);
		} else {
			c->started[c->started_count++] = (struct started){.vm = member->vm, .checkpoint = member->checkpoint};
		}
	}
	return rc;
}

/* They stand still. A database handle must not be in two processes. */
static int start_the_rest(struct comeback *c, struct err *err)
{
	int rc = 0;

	store_hand_over(c->party.store);
	c->party.store = NULL;
	for (unsigned i = 0; !rc && i < c->started_count; i++) {
		struct started *one = &c->started[i];
		const struct process_options options = {.store_path = c->options->store_path,
							.store_key = c->options->store_key,
							.from = one->checkpoint,
							.name = one->vm,
							.detach = true,
							.held = true,
							.started_ns = clock_now_ns()};
		rc = process_run(&options, &one->result, err);
		one->runs = rc == 0;
		if (rc)
			err_prefix(err, "%s", one->vm);
	}
	int opened = store_open(c->options->store_path, false, &c->party.store, rc ? NULL : err);
	if (opened)
		c->party.store = NULL;
	return rc ? rc : opened;
}

static void end_started(struct comeback *c)
{
	for (unsigned i = 0; i < c->started_count; i++)
		if (c->started[i].runs && c->party.store)
			json_decref(control_ask(c->party.store, c->started[i].vm, "vm.kill"));
}

/* What has failed behind the point at which nothing can be undone. */
static int tell_failures(const struct comeback *c, struct err *err)
{
	char text[300] = "";
	unsigned failed = 0;

	for (unsigned i = 0; i < c->party.count; i++) {
		const struct seat *seat = &c->party.seats[i];
		size_t used = strlen(text);

		if (seat->rc == 0 && seat->ended)
			continue;
		failed++;
		snprintf(text + used, sizeof(text) - used, "%s%s: %.150s", used ? "; " : "", seat->vm, seat->ended ? seat->err.message : "no answer");
	}
	for (unsigned i = 0; i < c->started_count; i++) {
		size_t used = strlen(text);

		if (c->started[i].runs)
			continue;
		failed++;
		snprintf(text + used, sizeof(text) - used, "%s%s: was started, but does not go on", used ? "; " : "", c->started[i].vm);
	}
	if (!failed)
		return 0;
	err_set(err, ERR_FAILED, EIO, "group %.8s: %u of %u VMs are not back: %s", c->group.id, failed, c->group.count, text);
	return err_hint(err, "the others run, at their checkpoints of the group; revert the group again, or see `vmcp ps`");
}

/* Each that was started is let go; ->runs tells whether it goes. */
static void release_started(struct comeback *c)
{
	for (unsigned i = 0; i < c->started_count; i++) {
		json_t *answer = control_ask(c->party.store, c->started[i].vm, "vm.resume");

		c->started[i].runs = answer != NULL;
		json_decref(answer);
	}
}

static json_t *reverted_to_json(const struct comeback *c, uint64_t began_ns)
{
	json_t *vms = json_array();

	for (unsigned i = 0; i < c->party.count; i++)
		json_array_append(vms, c->party.seats[i].result);
	for (unsigned i = 0; i < c->started_count; i++)
		json_array_append_new(vms, json_pack("{s:s, s:s, s:s, s:i, s:I, s:i}", "vm", c->started[i].vm, "checkpoint", c->started[i].checkpoint, "mode",
						     "started", "restored_pages", 0, "revert_ns", (json_int_t)c->started[i].result.boot_ns, "pid",
						     c->started[i].result.pid));
	return json_pack("{s:s, s:I, s:o}", "group", c->group.id, "revert_ns", (json_int_t)(clock_now_ns() - began_ns), "vms", vms);
}

/* Behind this nothing is undone, and each VM comes to its checkpoint by itself, even if this process dies. */
static void bring_back(struct comeback *c)
{
	struct party *party = &c->party;

	party->cancel = NULL;
	party_go(party);
	party_gather(party, "parked", false, clock_now_ns() + PARTY_GOODBYE_NS, NULL);
	party_go(party);
	party_gather(party, "restored", false, clock_now_ns() + PARTY_GOODBYE_NS, NULL);
	party_go(party);
	release_started(c);
	party_gather(party, NULL, false, clock_now_ns() + PARTY_GOODBYE_NS, NULL);
}

int group_revert(const struct group_revert_options *options, json_t **result, struct err *err)
{
	uint64_t began_ns = clock_now_ns();
	struct comeback *c = xcalloc(1, sizeof(*c));
	struct err why = ERR_INIT;

	*c = (struct comeback){.options = options, .party = {.cancel = options->cancel}};
	int rc = find_members(c, &why);
	if (!rc)
		rc = party_gather(&c->party, "checked", true, 0, &why);
	if (!rc)
		rc = start_the_rest(c, &why);
	if (rc) {
		end_started(c);
		party_give_up(&c->party, &why);
		if (err)
			*err = why;
	} else {
		bring_back(c);
		rc = tell_failures(c, err);
		if (!rc)
			*result = reverted_to_json(c, began_ns);
	}
	party_close(&c->party);
	for (unsigned i = 0; i < c->started_count; i++)
		free(c->started[i].result.socket);
	free(c);
	return rc;
}

/* --- clone --- */

/* Each of the new groups has its own networks: no network of theirs is known to anybody yet. */
static int make_suffixes(char (**out)[CLONE_NETWORK_BYTES], unsigned count)
{
	*out = xcalloc(count, sizeof(**out));
	for (unsigned i = 0; i < count; i++) {
		uint32_t number;

		if (getrandom(&number, sizeof(number), 0) != (ssize_t)sizeof(number))
			return -EIO;
		snprintf((*out)[i], sizeof(**out), "%08x", number);
	}
	return 0;
}

static int release_clones(const char *store_path, const struct clone *clones, size_t count, struct err *err)
{
	struct store *store = NULL;
	int rc = store_open(store_path, false, &store, err);

	for (size_t i = 0; !rc && i < count; i++) {
		struct control_client *client;
		json_t *result = NULL;

		rc = control_connect(store, clones[i].name, &client, err);
		if (rc)
			break;
		rc = control_call(client, "vm.resume", NULL, NULL, NULL, &result, err);
		control_close(client);
		json_decref(result);
	}
	store_close(store);
	return rc;
}

int group_clone(const struct store_group *group, const struct clone_options *options, struct clone **out, size_t *count, struct err *err)
{
	const char *checkpoints[STORE_GROUP_MAX];
	char (*suffixes)[CLONE_NETWORK_BYTES];
	struct clone_options all = *options;
	int rc = store_group_check_whole(group, err);

	if (rc)
		return rc;
	if (make_suffixes(&suffixes, options->count)) {
		free(suffixes);
		return err_set(err, ERR_HOST, EIO, "clone: the kernel gives no random numbers");
	}
	for (unsigned i = 0; i < group->count; i++)
		checkpoints[i] = group->members[i].checkpoint;
	all.checkpoints = checkpoints;
	all.checkpoint_count = group->count;
	all.held = all.same_addresses = true;
	all.networks = (const char (*)[CLONE_NETWORK_BYTES])suffixes;
	rc = clones_start(&all, out, err);
	free(suffixes);
	if (rc)
		return rc;
	*count = (size_t)group->count * options->count;
	rc = release_clones(options->store_path, *out, *count, err);
	if (!rc)
		return 0;
	clones_undo(options->store_path, *out, *count);
	clones_free(*out, *count);
	*out = NULL;
	return rc;
}
