/* What checkpoint, revert, clone, show and rm do with groups. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "control/clone.h"
#include "control/group.h"
#include "control/protocol.h"

int cli_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], bool *is_group, struct err *err)
{
	struct err unknown = ERR_INIT;
	int rc = store_resolve(store, reference, id, &unknown);

	*is_group = rc == -ENOENT && store_group_resolve(store, reference, id, NULL) == 0;
	if (rc && !*is_group && err)
		*err = unknown;
	return *is_group ? 0 : rc;
}

/* --- checkpoint --- */

static void print_group(const struct cli *cli, const json_t *result)
{
	char pause[24], durable[24];

	printf("%s\n", json_string_value(json_object_get(result, "group")));
	if (cli->quiet)
		return;
	fflush(stdout);
	cli_format_duration(pause, (uint64_t)json_integer_value(json_object_get(result, "pause_ns")));
	cli_format_duration(durable, (uint64_t)json_integer_value(json_object_get(result, "durable_ns")));
	fprintf(stderr, "vmcp: %zu VMs, durable after %s; from the first stop to the last start %s\n", json_array_size(json_object_get(result, "checkpoints")),
		durable, pause);
}

int cli_group_checkpoint(struct cli *cli, uint64_t max_rate, unsigned seconds, struct err *err)
{
	struct cli_progress progress = cli_progress_begin(cli, "checkpoint");
	const char *wait = cli_value(cli, "wait");
	const struct group_take_options options = {
		.store_path = cli->store_path,
		.vms = cli->arguments,
		.count = (unsigned)cli->argument_count,
		.tag = cli_value(cli, "tag"),
		.message = cli_value(cli, "message"),
		.instant = cli_value(cli, "instant"),
		.full = cli_given(cli, "full"),
		.max_rate = max_rate,
		.timeout_ns = seconds * 1000000000ull,
		.cancel = &cli_interrupted,
		.progress = cli_progress_show,
		.opaque = &progress,
	};
	json_t *result;

	if (!cli_given(cli, "live") || cli_given(cli, "connect") || (wait && strcmp(wait, "durable"))) {
		err_set(err, ERR_USAGE, EINVAL, "--group: needs --live and VMs of this store, and is durable or is not");
		return err_hint(err, "vmcp checkpoint --live --group VM VM...");
	}
	cli_catch_interrupts();
	int rc = group_take(&options, &result, err);
	cli_progress_end(&progress);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	print_group(cli, result);
	json_decref(result);
	return 0;
}

/* --- revert --- */

int cli_group_revert(struct cli *cli, const char *id, struct err *err)
{
	struct group_revert_options options = {.store_path = cli->store_path, .group = id, .cancel = &cli_interrupted};
	json_t *result, *one;
	char took[24];
	size_t index;

	if (cli_given(cli, "vm") || cli_given(cli, "connect"))
		return err_set(err, ERR_USAGE, EINVAL, "revert: --vm and --connect have no meaning for a group");
	int rc = cli_store_key(cli, &options.store_key, err);
	if (rc)
		return rc;
	cli_catch_interrupts();
	rc = group_revert(&options, &result, err);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	json_array_foreach(json_object_get(result, "vms"), index, one)
		printf("%s is back at %.8s (%s)\n", json_string_value(json_object_get(one, "vm")), json_string_value(json_object_get(one, "checkpoint")),
		       json_string_value(json_object_get(one, "mode")));
	cli_format_duration(took, (uint64_t)json_integer_value(json_object_get(result, "revert_ns")));
	fflush(stdout);
	if (!cli->quiet)
		fprintf(stderr, "vmcp: all together in %s\n", took);
	json_decref(result);
	return 0;
}

/* --- show --- */

int cli_group_show(struct cli *cli, struct store *store, const char *id, struct err *err)
{
	struct store_group group;
	int rc = store_group_get(store, id, &group, err);

	if (rc)
		return rc;
	json_t *created = control_time_to_json(group.created_wall_ns), *list = json_array();
	for (unsigned i = 0; i < group.count; i++)
		json_array_append_new(list, json_pack("{s:s, s:o}", "vm", group.members[i].vm, "id", control_text_or_null(group.members[i].checkpoint)));
	if (cli->json) {
		cli_print_json(json_pack("{s:s, s:o, s:O, s:b, s:o}", "group", group.id, "tag", control_text_or_null(group.tag), "created", created, "whole",
					 group.there == group.count, "checkpoints", list));
	} else {
		printf("group       %s%s\ntag         %s\ncreated     %s\n", group.id, group.there == group.count ? "" : " (not whole any more)",
		       group.tag[0] ? group.tag : "-", json_string_value(created));
		for (unsigned i = 0; i < group.count; i++)
			printf("checkpoint  %-32s  %s\n", group.members[i].checkpoint[0] ? group.members[i].checkpoint : "-", group.members[i].vm);
		json_decref(list);
	}
	json_decref(created);
	return 0;
}
