/* rm and gc. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "checkpoint/store/group.h"
#include "checkpoint/store/resources.h"
#include "cli/cli.h"
#include "control/client.h"
#include "control/mux.h"

/* --- disk layers that nothing names any more --- */

/* So that removing one of many checkpoints does not copy what all the others left. */
#define LEAST_LAYERS_RM 8
#define LEAST_LAYERS_GC 2

static void show_progress(void *opaque, uint64_t done, uint64_t total)
{
	json_t *params = json_pack("{s:s, s:I, s:I}", "phase", "merging disk layers", "done_pages", (json_int_t)(done / PAGE_BYTES),
				   "total_pages", (json_int_t)(total / PAGE_BYTES));

	cli_progress_show(opaque, params);
	json_decref(params);
}

/* VMs that run merge what lies below their disks themselves. One that does not answer will, the next time. */
static void tell_vms(struct store *store)
{
	struct store_vm *list;
	size_t count;

	if (store_vm_list(store, &list, &count, NULL))
		return;
	for (size_t i = 0; i < count; i++) {
		if (list[i].alive)
			json_decref(control_ask(store, list[i].name, "vm.tidy"));
		store_vm_free(&list[i]);
	}
	free(list);
}

/* Merges below disks that nobody uses. Somebody else who does so already will find what there is. */
static int merge_unused(struct cli *cli, struct store *store, size_t least, struct store_merge_result *merged, struct err *err)
{
	struct cli_progress progress = cli_progress_begin(cli, "merge");
	const struct store_merge_unused how = {
		.least = least, .cancel = &cli_interrupted, .progress = progress.terminal ? show_progress : NULL, .opaque = &progress};

	cli_catch_interrupts();
	int rc = store_merge_unused(store, &how, merged, err);
	cli_progress_end(&progress);
	if (rc != -EBUSY)
		return rc;
	if (err)
		*err = ERR_INIT;
	return 0;
}

/* --- rm --- */

/* True if the checkpoint was called by its only tag: then that may go with it. */
static bool named_by_tag(struct store *store, const char *reference, const char *id)
{
	char tag[STORE_NAME_BYTES];
	uint64_t count;

	return store_count_tags(store, id, &count, tag, NULL) == 0 && count == 1 && !strcmp(tag, reference);
}

/* A checkpoint that the command line names. */
struct wanted {
	char id[STORE_ID_BYTES];
	bool tagged; /* its tags may go with it */
};

/* Each of a group; its tag goes with the last one, if the group was called by it. */
static int find_group(struct cli *cli, struct store *store, const char *reference, struct wanted *list, int *count, struct err *err)
{
	struct store_group group;
	char id[STORE_ID_BYTES];
	int rc = store_group_resolve(store, reference, id, err);

	if (!rc)
		rc = store_group_get(store, id, &group, err);
	if (rc)
		return rc;
	if (group.tag[0] && strcmp(group.tag, reference) && !cli_given(cli, "force")) {
		err_set(err, ERR_STATE, EEXIST, "group %.8s: it has the tag '%s'", group.id, group.tag);
		return err_hint(err, "`vmcp rm --force %.8s` removes it with its tag", group.id);
	}
	for (unsigned i = 0; i < group.count; i++) {
		if (!group.members[i].checkpoint[0])
			continue;
		list[*count] = (struct wanted){.tagged = cli_given(cli, "force")};
		memcpy(list[(*count)++].id, group.members[i].checkpoint, STORE_ID_BYTES);
	}
	return 0;
}

static int find_one(struct cli *cli, struct store *store, const char *reference, struct wanted *wanted, struct err *err)
{
	struct err unknown = ERR_INIT;
	int rc = store_resolve(store, reference, wanted->id, &unknown);

	wanted->tagged = cli_given(cli, "force") || (!rc && named_by_tag(store, reference, wanted->id));
	/* One whose manifest is damaged may be unknown to the catalogue; it goes by its whole id. */
	if (rc == -ENOENT && strlen(reference) == STORE_ID_BYTES - 1) {
		snprintf(wanted->id, sizeof(wanted->id), "%s", reference);
		return 0;
	}
	if (rc && err)
		*err = unknown;
	return rc;
}

/* All are found before the first goes, as web~2 means another one afterwards. */
static int remove_all(struct cli *cli, struct store *store, struct store_freed *freed, json_t *removed, struct err *err)
{
	struct wanted *list = xcalloc((size_t)cli->argument_count * STORE_GROUP_MAX, sizeof(*list));
	char group[STORE_ID_BYTES];
	int rc = 0, count = 0;

	for (int i = 0; !rc && i < cli->argument_count; i++) {
		const char *reference = cli->arguments[i];
		bool is_group = false;

		if (cli_resolve(store, reference, group, &is_group, NULL) == 0 && is_group)
			rc = find_group(cli, store, reference, list, &count, err);
		else
			rc = find_one(cli, store, reference, &list[count++], err);
	}
	for (int i = 0; !rc && i < count; i++) {
		rc = store_checkpoint_remove(store, list[i].id, list[i].tagged, freed, err);
		if (!rc)
			json_array_append_new(removed, json_string(list[i].id));
	}
	free(list);
	return rc;
}

static void print_removed(const struct cli *cli, const json_t *removed, uint64_t bytes)
{
	char size[16];
	size_t index;
	json_t *id;

	json_array_foreach(removed, index, id) printf("%s\n", json_string_value(id));
	fflush(stdout);
	cli_format_size(size, bytes);
	if (!cli->quiet && json_array_size(removed))
		fprintf(stderr, "vmcp: %s given back\n", size);
}

static int run_rm(struct cli *cli, struct err *err)
{
	struct store_freed freed = {0};
	struct store_gc_result collected = {0};
	struct store_merge_result merged = {0};
	struct err later = ERR_INIT;
	struct store *store;
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	json_t *removed = json_array();
	rc = remove_all(cli, store, &freed, removed, err);
	/* Disk layers go with the rest, where nothing stands on them. That this fails is no failure of the removal. */
	if (freed.disk_layers) {
		tell_vms(store);
		int left = merge_unused(cli, store, LEAST_LAYERS_RM, &merged, &later);
		if (!left)
			left = store_gc(store, &collected, &later);
		if (left && !cli->quiet)
			fprintf(stderr, "vmcp: %s\n", later.message);
	}
	store_close(store);
	freed.bytes += collected.bytes;
	if (!cli->json)
		print_removed(cli, removed, freed.bytes);
	else if (!rc)
		cli_print_json(json_pack("{s:O, s:I, s:I, s:I, s:I}", "removed", removed, "freed_bytes", (json_int_t)freed.bytes,
					 "memory_layers", (json_int_t)(freed.memory_layers + collected.memory_layers),
					 "disk_layers", (json_int_t)collected.disk_layers, "merged_layers",
					 (json_int_t)merged.layers));
	json_decref(removed);
	return rc;
}

/* --- gc --- */

static int rebuild(struct cli *cli, json_t **document, struct err *err)
{
	struct store_rebuilt made;
	int rc = store_rebuild(cli->store_path, &made, err);

	if (rc)
		return rc;
	*document = json_pack("{s:I, s:I, s:I, s:b, s:b, s:b}", "checkpoints", (json_int_t)made.checkpoints, "vms", (json_int_t)made.vms, "tags",
			      (json_int_t)made.tags, "lost_vms", made.lost_vms, "lost_tags", made.lost_tags, "lost_images", made.lost_images);
	if (!cli->quiet)
		fprintf(stderr, "vmcp: the catalogue is new: %llu checkpoints, %llu VMs\n", (unsigned long long)made.checkpoints,
			(unsigned long long)made.vms);
	if (!cli->quiet && (made.lost_vms || made.lost_tags || made.lost_images))
		fprintf(stderr, "vmcp: the old one could not be read to its end: look whether%s%s%s are missing\n", made.lost_vms ? " VMs," : "",
			made.lost_tags ? " tags," : "", made.lost_images ? " images that stand on layers" : "");
	return 0;
}

static int run_gc(struct cli *cli, struct err *err)
{
	struct store_gc_result first, result = {0};
	struct store_merge_result merged = {0};
	json_t *rebuilt = NULL;
	struct store *store;
	uint64_t resources = 0;
	char size[16];
	int rc = cli_given(cli, "rebuild") ? rebuild(cli, &rebuilt, err) : 0;

	if (!rc)
		rc = cli_open_store(cli, &store, err);
	if (rc)
		return rc;
	/* What is in nobody's chain goes first, so that it is not merged. */
	rc = store_gc(store, &first, err);
	if (!rc) {
		tell_vms(store);
		rc = merge_unused(cli, store, LEAST_LAYERS_GC, &merged, err);
	}
	if (!rc)
		rc = store_gc(store, &result, err);
	result.memory_layers += first.memory_layers;
	result.disk_layers += first.disk_layers;
	result.bytes += first.bytes;
	result.forgotten += first.forgotten;
	if (!rc)
		rc = store_resources_collect(store, &resources, err);
	if (!rc)
		mux_remove_dead(store);
	store_close(store);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o*}", "freed_bytes", (json_int_t)result.bytes, "memory_layers",
					 (json_int_t)result.memory_layers, "disk_layers", (json_int_t)result.disk_layers,
					 "kept_disk_layers", (json_int_t)result.kept_disk_layers, "merged_layers", (json_int_t)merged.layers,
					 "forgotten", (json_int_t)result.forgotten, "freed_resources", (json_int_t)resources, "rebuilt", rebuilt));
		return 0;
	}
	json_decref(rebuilt);
	cli_format_size(size, result.bytes);
	printf("%s given back: %llu memory layers, %llu disk layers\n", size, (unsigned long long)result.memory_layers,
	       (unsigned long long)result.disk_layers);
	if (merged.layers)
		printf("%llu disk layers merged into %llu\n", (unsigned long long)merged.layers, (unsigned long long)merged.runs);
	if (resources)
		printf("%llu resources of VMs that are gone are free\n", (unsigned long long)resources);
	if (result.kept_disk_layers)
		printf("%llu disk layers belong to no checkpoint, but disks stand on them\n", (unsigned long long)result.kept_disk_layers);
	return 0;
}

static const struct cli_option rm_options[] = {
	{"force", 'f', NULL, "remove checkpoints with their tags"},
	{0},
};
static const struct cli_option gc_options[] = {
	{"rebuild", 0, NULL, "first make the catalogue anew from the checkpoints; no VM may run on the store"},
	{0},
};

const struct cli_command cli_rm = {
	.name = "rm",
	.synopsis = "CKPT... [--force]",
	.summary = "remove checkpoints; those that come from them stay whole",
	.help = "Prints the ids of those that are gone. Memory and disk layers go when no other checkpoint, and no disk, needs\n"
		"them. One with a tag is removed if it is called by that tag, its only one, or with --force. One at which a\n"
		"running VM stands is not.\n\n"
		"Examples:\n"
		"    vmcp rm before-upgrade\n"
		"    vmcp rm web~7 web~8 web~9",
	.options = rm_options,
	.min_arguments = 1,
	.words = "@ckpt",
	.max_arguments = CLI_MAX_ARGUMENTS,
	.json = "removed, freed_bytes, memory_layers, disk_layers, merged_layers",
	.run = run_rm,
};
const struct cli_command cli_gc = {
	.name = "gc",
	.synopsis = "[--rebuild]",
	.summary = "give back the space of what nothing needs",
	.help = "Removes memory and disk layers that no checkpoint needs and no disk of a VM stands on: what commands that were\n"
		"killed left, and disk layers of removed checkpoints; frees ports, devices and names of VMs that were killed. Those that disks still stand on are merged; below a disk of a\n"
		"VM that runs it is that VM that does so, in the background. Safe at any time; Ctrl-C ends it.",
	.options = gc_options,
	.json =
		"freed_bytes, memory_layers, disk_layers, kept_disk_layers, merged_layers, forgotten, freed_resources, rebuilt? {checkpoints, vms, "
		"tags, lost_vms, lost_tags, lost_images}",
	.run = run_gc,
};
