/* log and show. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "cli/cli.h"
#include "cli/log_tree.h"
#include "control/client.h"
#include "control/protocol.h"

static int by_parent(const void *a, const void *b, void *opaque)
{
	const struct tree *tree = opaque;
	size_t x = *(const size_t *)a, y = *(const size_t *)b;
	int order = strcmp(tree->list[x].parent, tree->list[y].parent);

	return order ? order : (x > y) - (x < y);
}

static void tree_sort(struct tree *tree)
{
	tree->by_parent = xcalloc(tree->count + 1, sizeof(*tree->by_parent));
	for (size_t i = 0; i < tree->count; i++)
		tree->by_parent[i] = i;
	if (tree->count)
		qsort_r(tree->by_parent, tree->count, sizeof(*tree->by_parent), by_parent, tree);
}

/* Its children are those at [*first, *end) of by_parent. */
static void find_children(const struct tree *tree, const char *parent, size_t *first, size_t *end)
{
	size_t low = 0, high = tree->count;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (strcmp(tree->list[tree->by_parent[middle]].parent, parent) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	for (*first = *end = low; *end < tree->count && !strcmp(tree->list[tree->by_parent[*end]].parent, parent);)
		++*end;
}

static void tree_free(struct tree *tree)
{
	for (size_t i = 0; i < tree->count; i++)
		store_checkpoint_free(&tree->list[i]);
	for (size_t i = 0; i < tree->vm_count; i++)
		store_vm_free(&tree->vms[i]);
	free(tree->list);
	free(tree->by_parent);
	free(tree->levels);
	free(tree->vms);
}

/* Asks a VM for the checkpoint that it is about to commit. False if there is none. *document: all that it says; NULL: not asked for. */
static bool ask_pending(struct store *store, const char *vm, struct store_checkpoint *out, char level[16], json_t **document)
{
	json_t *result = control_ask(store, vm, "checkpoint.pending");
	const char *id = json_string_value(json_object_get(result, "id")), *parent = json_string_value(json_object_get(result, "parent"));
	const char *durability = json_string_value(json_object_get(result, "durability"));

	*out = (struct store_checkpoint){0};
	if (id) {
		snprintf(out->id, sizeof(out->id), "%s", id);
		snprintf(out->parent, sizeof(out->parent), "%s", parent ? parent : "");
		snprintf(out->vm, sizeof(out->vm), "%s", vm);
		snprintf(level, 16, "%s", durability ? durability : "");
		out->created_wall_ns = (uint64_t)json_integer_value(json_object_get(result, "created_wall_ns"));
	}
	if (id && document)
		*document = json_incref(result);
	json_decref(result);
	return id != NULL;
}

static bool has_id(const struct tree *tree, const char *id)
{
	for (size_t i = tree->durable; i-- > 0;)
		if (!strcmp(tree->list[i].id, id))
			return true;
	return false;
}

/* Of all VMs, or one. Before the list is read: what becomes durable in between is then in both, and else it would be in neither. */
static void ask_all(struct store *store, const char *vm, struct tree *tree, struct store_checkpoint *pending, size_t *count)
{
	tree->levels = xcalloc(tree->vm_count + 1, sizeof(*tree->levels));
	for (size_t i = 0; i < tree->vm_count; i++) {
		const struct store_vm *one = &tree->vms[i];

		if (one->alive && (!vm || !strcmp(one->name, vm)))
			*count += ask_pending(store, one->name, &pending[*count], tree->levels[*count], NULL);
	}
}

static void add_pending(struct tree *tree, const struct store_checkpoint *pending, size_t count)
{
	struct store_checkpoint *grown = xcalloc(tree->count + count + 1, sizeof(*grown));

	tree->durable = tree->count;
	if (tree->count)
		memcpy(grown, tree->list, tree->count * sizeof(*grown));
	free(tree->list);
	tree->list = grown;
	for (size_t i = 0; i < count; i++) {
		if (has_id(tree, pending[i].id))
			continue;
		memmove(tree->levels[tree->count - tree->durable], tree->levels[i], sizeof(*tree->levels));
		grown[tree->count++] = pending[i];
	}
}

const char *tree_level(const struct tree *tree, const struct store_checkpoint *c)
{
	size_t at = (size_t)(c - tree->list);

	return at < tree->durable ? "durable" : tree->levels[at - tree->durable];
}

static int tree_read(const struct cli *cli, const char *vm, struct tree *tree, struct err *err)
{
	struct store *store;
	int rc = cli_open_store(cli, &store, err);

	*tree = (struct tree){0};
	if (rc == -ENOENT && !vm)
		return 0; /* nothing was ever run here */
	if (rc)
		return rc;
	if (vm) {
		struct store_vm known;

		rc = store_vm_get(store, vm, &known, err);
		if (!rc)
			store_vm_free(&known);
	}
	if (!rc)
		rc = store_vm_list(store, &tree->vms, &tree->vm_count, err);
	struct store_checkpoint *pending = xcalloc(tree->vm_count + 1, sizeof(*pending));
	size_t count = 0;
	if (!rc)
		ask_all(store, vm, tree, pending, &count);
	if (!rc)
		rc = store_checkpoint_list(store, vm, &tree->list, &tree->count, err);
	if (!rc)
		add_pending(tree, pending, count);
	free(pending);
	store_close(store);
	if (rc)
		tree_free(tree);
	else
		tree_sort(tree);
	return rc;
}

/* "KEY": and a value, in quotes or null. What users may write is escaped; all else is plain by its rules. */
static void print_text(const char *key, const char *text, bool escaped)
{
	json_t *value = text && *text && escaped ? json_string(text) : NULL;
	char *quoted = value ? json_dumps(value, JSON_ENCODE_ANY) : NULL;

	if (quoted)
		printf(",\"%s\":%s", key, quoted);
	else if (text && *text && !escaped)
		printf(",\"%s\":\"%s\"", key, text);
	else
		printf(",\"%s\":null", key);
	free(quoted);
	json_decref(value);
}

/* Written as text: thousands of them as documents would take longer to make than to find. */
static void print_checkpoint(const struct tree *tree, const struct store_checkpoint *c, bool last)
{
	json_t *created = control_time_to_json(c->created_wall_ns);
	size_t first, end;

	find_children(tree, c->id, &first, &end);
	printf("    {\"id\":\"%s\",\"children\":[", c->id);
	for (size_t j = first; j < end; j++)
		printf("%s\"%s\"", j == first ? "" : ",", tree->list[tree->by_parent[j]].id);
	putchar(']');
	print_text("vm", c->vm, false);
	print_text("parent", c->parent, false);
	print_text("created", json_string_value(created), false);
	print_text("tag", c->tag, false);
	print_text("message", c->message, true);
	print_text("group", c->group.id, false);
	print_text("durability", tree_level(tree, c), false);
	printf(",\"size_bytes\":%llu,\"periodic\":%s}%s\n", (unsigned long long)c->size_bytes, c->periodic ? "true" : "false", last ? "" : ",");
	json_decref(created);
}

/* One element of a list, on a line of its own. Steals it. */
static void print_element(json_t *element, bool last)
{
	char *text = json_dumps(element, JSON_COMPACT);

	printf("    %s%s\n", text ? text : "null", last ? "" : ",");
	free(text);
	json_decref(element);
}

static void print_json(const struct tree *tree, const char *vm)
{
	size_t shown = 0, all = 0;

	printf("{\n  \"checkpoints\": [\n");
	for (size_t i = 0; i < tree->count; i++)
		print_checkpoint(tree, &tree->list[i], i + 1 == tree->count);
	printf("  ],\n  \"vms\": [\n");
	for (size_t i = 0; i < tree->vm_count; i++)
		all += !vm || !strcmp(tree->vms[i].name, vm);
	for (size_t i = 0; i < tree->vm_count; i++)
		if (!vm || !strcmp(tree->vms[i].name, vm))
			print_element(json_pack("{s:s, s:s, s:o}", "name", tree->vms[i].name, "state", tree->vms[i].state, "at",
						control_text_or_null(tree->vms[i].at)),
				      ++shown == all);
	printf("  ]\n}\n");
}

char *tree_standing(const struct tree *tree, const char *id)
{
	char *names = NULL;

	for (size_t i = 0; i < tree->vm_count; i++) {
		if (strcmp(tree->vms[i].at, id) != 0)
			continue;
		char *longer = xasprintf("%s%s%s (%s)", names ? names : "", names ? ", " : "", tree->vms[i].name, tree->vms[i].state);

		free(names);
		names = longer;
	}
	return names;
}

static void print_line(const struct tree *tree, const struct store_checkpoint *c)
{
	CLEANUP_FREE char *standing = tree_standing(tree, c->id);
	uint64_t now = clock_wall_ns();
	char age[16], size[16];

	cli_format_age(age, now > c->created_wall_ns ? now - c->created_wall_ns : 0);
	cli_format_size(size, c->size_bytes);
	printf("%.12s  %5s  %-12.12s  %6s  %-16s %s%s%.8s%s%s%s\n", c->id, age, c->parent[0] ? c->parent : "-", size, c->tag[0] ? c->tag : "-",
	       c->message				   ? c->message
	       : (size_t)(c - tree->list) >= tree->durable ? tree_level(tree, c)
	       : c->periodic				   ? "(periodic)"
							   : "",
	       c->group.id[0] ? "  [group " : "", c->group.id, c->group.id[0] ? "]" : "", standing ? "  <- " : "", standing ? standing : "");
}

static void print_list(const struct tree *tree)
{
	printf("%-12s  %5s  %-12s  %6s  %-16s %s\n", "ID", "AGE", "PARENT", "SIZE", "TAG", "MESSAGE");
	for (size_t i = tree->count; i-- > 0;)
		print_line(tree, &tree->list[i]);
}

static int run_log(struct cli *cli, struct err *err)
{
	const char *vm = cli->argument_count ? cli->arguments[0] : NULL;
	struct tree tree;
	int rc = vm ? store_check_name("VM", vm, err) : 0;

	if (!rc)
		rc = tree_read(cli, vm, &tree, err);
	if (rc)
		return rc;
	if (cli_given(cli, "svg"))
		rc = tree_write_svg(&tree, cli_value(cli, "svg"), err);
	else if (cli->json)
		print_json(&tree, vm);
	else if (cli_given(cli, "graph"))
		tree_print_graph(&tree, cli_colour(STDOUT_FILENO));
	else
		print_list(&tree);
	tree_free(&tree);
	return rc;
}

/* --- show --- */

/* Whose machine it is, and who can go on with it: the configuration says so where it is not vmcp. */
static const char *vmm_of(const struct store_checkpoint *c) { return cli_is_of_qemu(c) ? "qemu" : "vmcp"; }

static json_t *show_to_json(const struct store_checkpoint *c, bool encrypted)
{
	json_t *disks = json_array();

	for (uint32_t i = 0; i < c->disk_count; i++) {
		const struct store_disk_layer *disk = &c->disks[i];

		json_array_append_new(disks, json_pack("{s:s, s:s, s:s, s:I, s:I, s:i, s:i}", "name", disk->disk,
						       "layer", disk->layer, "format", disk->format, "size_bytes",
						       (json_int_t)disk->size_bytes, "layer_bytes",
						       (json_int_t)disk->file_bytes, "inflight_writes",
						       (int)disk->inflight_writes, "inflight_reads",
						       (int)disk->inflight_reads));
	}
	json_t *memory =
		json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "layer", c->memory_layer, "size_bytes",
			  (json_int_t)c->memory_bytes, "total_pages", (json_int_t)(c->memory_bytes / PAGE_BYTES),
			  "saved_pages", (json_int_t)c->saved_pages, "zero_pages", (json_int_t)c->zero_pages,
			  "parent_pages", (json_int_t)c->parent_pages, "written_bytes", (json_int_t)c->written_bytes);
	return json_pack("{s:s, s:o, s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:b, s:s, s:i, s:I, s:I, s:I, s:o, s:o, s:b, s:s, s:o, s:s}", "id",
			 c->id, "group", control_text_or_null(c->group.id), "vm", c->vm, "vm_uuid", c->vm_uuid, "parent", control_text_or_null(c->parent), "tag",
			 control_text_or_null(c->tag), "message", control_text_or_null(c->message), "created",
			 control_time_to_json(c->created_wall_ns), "live", c->live, "periodic", c->periodic, "durability", "durable", "cpus",
			 (int)c->cpus, "pause_ns", (json_int_t)c->pause_ns, "durable_ns", (json_int_t)c->durable_ns,
			 "size_bytes", (json_int_t)c->size_bytes, "memory", memory, "disks", disks, "encrypted", encrypted, "vmm", vmm_of(c), "needs",
			 /* none of checkpoints of old, and of domains */ json_split(c->needs ? c->needs : "", "\n"),
			 "config", c->config_text ? c->config_text : "");
}

static void print_show(const struct store_checkpoint *c, bool encrypted)
{
	char size[16], other[16], pause[24], durable[24];
	json_t *created = control_time_to_json(c->created_wall_ns);

	cli_format_size(size, c->size_bytes);
	cli_format_duration(pause, c->pause_ns);
	cli_format_duration(durable, c->durable_ns);
	printf("checkpoint  %s\nvm          %s (%s)\nparent      %s\n", c->id, c->vm, c->vm_uuid,
	       c->parent[0] ? c->parent : "-");
	if (c->group.id[0])
		printf("group       %s (%s)\n", c->group.id, c->group.members);
	printf("tag         %s\nmessage     %s\ncreated     %s\n", c->tag[0] ? c->tag : "-",
	       c->message ? c->message : "-", json_string_value(created));
	printf("durability  durable\ntaken       %s%s, %u vCPU%s, pause %s, durable after %s\nsize        %s\n", c->periodic ? "by a timer, " : "", c->live ? "live" : "stopped",
	       c->cpus, c->cpus == 1 ? "" : "s", pause, durable, size);
	if (encrypted)
		printf("encrypted   memory and state; not its disks, names, message and configuration\n");
	if (!strcmp(vmm_of(c), "qemu"))
		printf("runs on     QEMU only: a domain of libvirt, which `vmcp revert --connect URI` starts; its memory is QEMU's stream\n");
	cli_format_size(size, c->memory_bytes);
	cli_format_size(other, c->written_bytes);
	printf("memory      %s: %llu pages saved (%s), %llu zero, %llu of the parent; layer %s\n", size,
	       (unsigned long long)c->saved_pages, other, (unsigned long long)c->zero_pages,
	       (unsigned long long)c->parent_pages, c->memory_layer);
	for (uint32_t i = 0; i < c->disk_count; i++) {
		const struct store_disk_layer *disk = &c->disks[i];

		cli_format_size(size, disk->size_bytes);
		cli_format_size(other, disk->file_bytes);
		printf("disk        %s: %s, layer %s.%s of %s; in flight: %u writes, %u reads\n", disk->disk, size,
		       disk->layer, disk->format, other, disk->inflight_writes, disk->inflight_reads);
	}
	if (c->needs && log_get_level() >= LOG_LEVEL_INFO)
		printf("\nneeds of a host:\n%s", c->needs);
	printf("\n%s", c->config_text ? c->config_text : "");
	json_decref(created);
}

/* One that is not in the store yet, by its id or the beginning of it: what its VM says. False: there is none. */
static bool show_pending(const struct cli *cli, struct store *store)
{
	const char *reference = cli->arguments[0];
	struct store_checkpoint c;
	struct store_vm *vms;
	json_t *document = NULL;
	char level[16] = "";
	size_t count;

	if (strlen(reference) < 4 || store_vm_list(store, &vms, &count, NULL))
		return false;
	for (size_t i = 0; i < count; i++) {
		if (vms[i].alive && !document && ask_pending(store, vms[i].name, &c, level, &document) && strncmp(c.id, reference, strlen(reference))) {
			json_decref(document);
			document = NULL;
		}
		store_vm_free(&vms[i]);
	}
	free(vms);
	if (!document)
		return false;
	if (cli->json) {
		cli_print_json(document);
		return true;
	}
	printf("checkpoint  %s\nvm          %s\nparent      %s\ndurability  %s\nat          %s\n", c.id, c.vm, c.parent[0] ? c.parent : "-", level,
	       json_string_value(json_object_get(document, "phase")));
	json_decref(document);
	return true;
}

static int run_show(struct cli *cli, struct err *err)
{
	struct store_checkpoint checkpoint;
	char id[STORE_ID_BYTES];
	struct store *store;

	if (cli_given(cli, "resources"))
		return cli_show_resources(cli, err);
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	rc = store_resolve(store, cli->arguments[0], id, err);
	if (rc == -ENOENT && show_pending(cli, store)) {
		store_close(store);
		return 0;
	}
	bool is_group = false;
	if (rc == -ENOENT) /* it may have been committed since, and it may be a group */
		rc = cli_resolve(store, cli->arguments[0], id, &is_group, err);
	if (!rc && is_group)
		rc = cli_group_show(cli, store, id, err);
	else if (!rc)
		rc = store_checkpoint_get(store, id, &checkpoint, err);
	bool encrypted = store_is_encrypted(store);
	store_close(store);
	if (rc || is_group)
		return rc;
	if (cli->json)
		cli_print_json(show_to_json(&checkpoint, encrypted));
	else
		print_show(&checkpoint, encrypted);
	store_checkpoint_free(&checkpoint);
	return 0;
}

static const struct cli_option log_options[] = {
	{"graph", 0, NULL, "draw the tree"},
	{"svg", 0, "FILE", "write a picture of the tree, with sizes and times; - is stdout", "@file"},
	{0},
};
static const struct cli_option show_options[] = {
	{"resources", 0, NULL, "of a VM: its identity, what of the host is behind what its guest knows, and which VMs have that"},
	{0},
};

const struct cli_command cli_log = {.name = "log",
				    .synopsis = "[VM] [--graph] [--svg FILE]",
				    .summary =
					    "the checkpoints, newest first, or as a tree; marks where each VM stands",
				    .help = "With --graph the newest is on top, and lines lead down to parents: where branches fork shows at a glance. Behind the id:\n"
					    "age, what it occupies itself, in brackets the VMs that stand there and its tag, and its message.\n\n"
					    "Examples:\n"
					    "    vmcp log web\n"
					    "    vmcp log --graph\n"
					    "    vmcp log --svg tree.svg",
				    .options = log_options,
				    .words = "@vm",
				    .max_arguments = 1,
				    .json = "checkpoints [id, vm, parent, children, created, tag, message, size_bytes, durability, periodic, group], vms [name, state, at]",
				    .run = run_log};
const struct cli_command cli_show = {.name = "show",
				     .synopsis = "CKPT | GROUP | VM --resources",
				     .summary = "everything about one checkpoint or group, or what a VM has",
				     .help = "With -v it tells what a host must have to go on with it: processor, features, MSRs, capabilities of KVM, components.",
				     .options = show_options,
				     .min_arguments = 1,
				     .words = "@ckpt",
				     .max_arguments = 1,
				     .json =
					     "id, group, vm, vm_uuid, parent, tag, message, created, live, periodic, durability, cpus, pause_ns, durable_ns, size_bytes, memory {layer, "
					     "size_bytes, total_pages, saved_pages, zero_pages, parent_pages, written_bytes}, disks [name, layer, format, size_bytes, "
					     "layer_bytes, inflight_writes, inflight_reads], encrypted, vmm, needs, config | id, vm, durability, parent, created_wall_ns, phase, done_pages, "
					     "total_pages | group, tag, created, whole, checkpoints [vm, id] | vm, uuid, generation_id, resources [type, name, guest, host, exclusive], hosts [type, host, refs, vms [vm, name, guest]]",
				     .run = run_show};
