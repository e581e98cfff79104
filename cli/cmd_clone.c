/* clone, template, and `show VM --resources`. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/file.h"
#include "cli/cli.h"
#include "control/client.h"
#include "control/clone.h"
#include "control/group.h"

#define RULES_MAX_BYTES (1u << 20)

/* The file of --rules; *text stays NULL without. */
static int read_rules(const struct cli *cli, char **text, struct err *err)
{
	struct buf file = BUF_INIT;
	const char *path = cli_value(cli, "rules");
	int rc = path ? file_read_all(AT_FDCWD, path, RULES_MAX_BYTES, &file, err) : 0;

	if (!rc && path && memchr(file.data, '\0', file.length))
		rc = err_set(err, ERR_USAGE, EINVAL, "%s: is no text", path);
	if (rc || !path)
		buf_free(&file);
	*text = (char *)file.data;
	if (!rc && path && !*text)
		*text = xstrdup("");
	return rc;
}

/* --- what a VM has --- */

static json_t *resource_to_json(const struct store_resource *one)
{
	return json_pack("{s:s, s:s, s:s, s:s, s:b}", "type", one->type, "name", one->name, "guest", one->guest, "host",
			 one->host, "exclusive", one->exclusive);
}

static json_t *resources_to_json(const struct store_resource *list, size_t count)
{
	json_t *array = json_array();

	for (size_t i = 0; i < count; i++)
		json_array_append_new(array, resource_to_json(&list[i]));
	return array;
}

static bool shares(const struct store_resource *a, const struct store_resource *b)
{
	return !strcmp(a->type, b->type) && !strcmp(a->host, b->host);
}

/* The other way: each thing of the host that this VM has, and all VMs that have it. */
static json_t *hosts_to_json(const struct store_resource *own, size_t count, const struct store_resource *all,
			     size_t all_count)
{
	json_t *hosts = json_array();

	for (size_t i = 0; i < count; i++) {
		json_t *vms = json_array();

		for (size_t k = 0; own[i].host[0] && k < all_count; k++)
			if (shares(&own[i], &all[k]))
				json_array_append_new(vms, json_pack("{s:s, s:s, s:s}", "vm", all[k].vm, "name",
								     all[k].name, "guest", all[k].guest));
		if (own[i].host[0])
			json_array_append_new(hosts,
					      json_pack("{s:s, s:s, s:I, s:O}", "type", own[i].type, "host",
							own[i].host, "refs", (json_int_t)own[i].refs, "vms", vms));
		json_decref(vms);
	}
	return hosts;
}

/* Of a VM that runs; null for others, whose next start gives another one. */
static json_t *ask_generation(struct store *store, const char *vm)
{
	json_t *stats = control_ask(store, vm, "vm.stats"), *id = json_incref(json_object_get(stats, "generation_id"));

	json_decref(stats);
	return id ? id : json_null();
}

static void print_resources(const struct store_vm *vm, const json_t *generation, const struct store_resource *own,
			    size_t count, const struct store_resource *all, size_t all_count)
{
	printf("vm          %s\nuuid        %s\ngeneration  %s\n\n%-8s %-20s %-20s %s\n", vm->name, vm->uuid,
	       json_string_value(generation) ? json_string_value(generation) : "-", "TYPE", "NAME", "GUEST", "HOST");
	for (size_t i = 0; i < count; i++)
		printf("%-8s %-20s %-20s %s\n", own[i].type, own[i].name, own[i].guest[0] ? own[i].guest : "-",
		       own[i].host[0] ? own[i].host : "-");
	printf("\n%-8s %4s %-48s %s\n", "TYPE", "REFS", "HOST", "USED BY");
	for (size_t i = 0; i < count; i++) {
		if (!own[i].host[0])
			continue;
		printf("%-8s %4llu %-48s", own[i].type, (unsigned long long)own[i].refs, own[i].host);
		for (size_t k = 0; k < all_count; k++)
			if (shares(&own[i], &all[k]))
				printf(" %s:%s", all[k].vm, all[k].name);
		putchar('\n');
	}
}

int cli_show_resources(struct cli *cli, struct err *err)
{
	struct store_resource *own = NULL, *all = NULL;
	size_t count = 0, all_count = 0;
	struct store *store;
	struct store_vm vm;
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	rc = store_vm_get(store, cli->arguments[0], &vm, err);
	if (rc) {
		store_close(store);
		return rc;
	}
	rc = store_resources_list(store, vm.name, &own, &count, err);
	if (!rc)
		rc = store_resources_list(store, NULL, &all, &all_count, err);
	if (!rc) {
		json_t *generation = ask_generation(store, vm.name);

		if (cli->json)
			cli_print_json(json_pack("{s:s, s:s, s:O, s:o, s:o}", "vm", vm.name, "uuid", vm.uuid,
						 "generation_id", generation, "resources",
						 resources_to_json(own, count), "hosts",
						 hosts_to_json(own, count, all, all_count)));
		else
			print_resources(&vm, generation, own, count, all, all_count);
		json_decref(generation);
	}
	store_resources_free_list(own, count);
	store_resources_free_list(all, all_count);
	store_vm_free(&vm);
	store_close(store);
	return rc;
}

/* --- clone --- */

static json_t *clone_to_json(const struct clone *clone)
{
	json_t *generation = clone->result.generation[0] ? json_string(clone->result.generation) : json_null();
	json_t *identity = json_pack("{s:s, s:o, s:o}", "uuid", clone->result.uuid, "generation_id", generation,
				     "resources", resources_to_json(clone->resources, clone->resource_count));

	return json_pack("{s:s, s:i, s:I, s:o}", "name", clone->name, "pid", clone->result.pid, "clone_ns",
			 (json_int_t)clone->result.boot_ns, "identity", identity);
}

/* The name, and the ports by which it is reached. */
static void print_clone(const struct clone *clone)
{
	printf("%s", clone->name);
	for (size_t i = 0; i < clone->resource_count; i++)
		if (!strcmp(clone->resources[i].type, "port") || !strcmp(clone->resources[i].type, "mux"))
			printf("  %s=%s", clone->resources[i].name, clone->resources[i].host);
	putchar('\n');
}

static void print_clones(const struct cli *cli, const struct clone *clones, size_t count)
{
	json_t *vms = json_array();

	for (size_t i = 0; i < count; i++) {
		if (cli->json)
			json_array_append_new(vms, clone_to_json(&clones[i]));
		else
			print_clone(&clones[i]);
	}
	if (cli->json)
		cli_print_json(json_pack("{s:O}", "vms", vms));
	json_decref(vms);
}

/* Of the VM that --live names: it stands no longer than for any live checkpoint. */
static int take_origin(const struct cli *cli, const char *vm, char id[STORE_ID_BYTES], struct err *err)
{
	struct control_client *client;
	struct store *store;
	json_t *taken = NULL;
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	rc = control_connect(store, vm, &client, err);
	if (!rc) {
		rc = control_call(
			client, "checkpoint.take",
			json_pack("{s:b, s:s, s:s}", "live", 1, "wait", "durable", "message", "origin of clones"), NULL,
			NULL, &taken, err);
		control_close(client);
	}
	const char *text = json_string_value(json_object_get(taken, "id"));
	if (!rc)
		snprintf(id, STORE_ID_BYTES, "%s", text ? text : "");
	json_decref(taken);
	store_close(store);
	return rc;
}

/* True if it is a group that is to be cloned. */
static bool find_group(const struct cli *cli, const char *reference, struct store_group *group)
{
	char id[STORE_ID_BYTES];
	struct store *store;
	bool is_group = false;

	if (cli_open_store(cli, &store, NULL))
		return false;
	if (cli_resolve(store, reference, id, &is_group, NULL) || !is_group || store_group_get(store, id, group, NULL))
		is_group = false;
	store_close(store);
	return is_group;
}

static int parse_count(const char *text, unsigned *count, struct err *err)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	*count = (unsigned)value;
	if (*text >= '0' && *text <= '9' && !*end && value >= 1 && value <= CLONE_MAX)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "--count: '%s' is not possible", text);
	return err_hint(err, "a number from 1 to %u", CLONE_MAX);
}

static int parse_clock(const char *text, bool *of_checkpoint, struct err *err)
{
	*of_checkpoint = text && !strcmp(text, "checkpoint");
	if (!text || *of_checkpoint || !strcmp(text, "now"))
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "--clock: '%s' is no policy", text);
	return err_hint(err, "now or checkpoint");
}

static int run_clone(struct cli *cli, struct err *err)
{
	const char *live = cli_value(cli, "live"), *count = cli_value(cli, "count");
	char id[STORE_ID_BYTES];
	CLEANUP_FREE char *rules = NULL;
	const char *origin = live ? id : cli->argument_count ? cli->arguments[0] : NULL;
	struct clone_options options = {.store_path = cli->store_path,
					.checkpoints = &origin,
					.checkpoint_count = 1,
					.pattern = cli_value(cli, "name"),
					.count = 1,
					.rules_what = cli_value(cli, "rules")};
	struct clone *clones = NULL;
	struct store_group group;
	size_t all = 0;

	if (!live == !cli->argument_count) {
		err_set(err, ERR_USAGE, EINVAL, "clone: name either a checkpoint or --live VM");
		return err_hint(err, "usage: vmcp clone %s", cli->command->synopsis);
	}
	int rc = count ? parse_count(count, &options.count, err) : 0;
	if (!rc)
		rc = parse_clock(cli_value(cli, "clock"), &options.clock_of_checkpoint, err);
	if (!rc)
		rc = read_rules(cli, &rules, err);
	if (!rc)
		rc = cli_store_key(cli, &options.store_key, err);
	if (!rc && live)
		rc = take_origin(cli, live, id, err);
	options.rules = rules;
	if (!rc && !live && find_group(cli, origin, &group)) {
		rc = group_clone(&group, &options, &clones, &all, err);
	} else if (!rc) {
		rc = clones_start(&options, &clones, err);
		all = options.count;
	}
	if (rc)
		return rc;
	print_clones(cli, clones, all);
	clones_free(clones, all);
	return 0;
}

/* --- template --- */

static int run_template(struct cli *cli, struct err *err)
{
	char id[STORE_ID_BYTES];
	CLEANUP_FREE char *rules = NULL;
	int rc = read_rules(cli, &rules, err);

	if (!rc)
		rc = clone_template(cli->store_path, cli->arguments[0], cli->arguments[1], cli_value(cli, "rules"),
				    rules, id, err);
	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s}", "id", id, "template", cli->arguments[1]));
	return 0;
}

static const struct cli_option clone_options[] = {
	{"count", 0, "N", "how many (default: 1)", NULL},
	{"name", 0, "PATTERN",
	 "names of the clones; <VM> is the VM that was saved, <N> a number that is free (default: <VM>-<N>)", NULL},
	{"rules", 0, "FILE", "what becomes of ports, addresses, devices and disks (default: the template's rules)", "@file"},
	{"live", 0, "VM", "of a VM that runs, as it is now: takes a live checkpoint of it first", "@running"},
	{"clock", 0, "WHEN",
	 "now (default): the real-time clock shows the host's time; checkpoint: it goes on from the checkpoint's", "now|checkpoint"},
	{0},
};
static const struct cli_option template_options[] = {
	{"rules", 0, "FILE", "rules for its clones, kept with it; variables are put in for each clone", "@file"},
	{0},
};

const struct cli_command cli_clone = {
	.name = "clone",
	.synopsis = "CKPT | GROUP | --live VM  [--count N] [--name PATTERN] [--rules FILE] [--clock now|checkpoint]",
	.summary = "start new VMs from a checkpoint, each with its own identity",
	.help = "Memory that a clone does not write, and disks, are shared. Each gets a uuid, a generation id, "
		"addresses for its network\n"
		"cards and ports of the host, from 20000 on where no rule says more. All start, or none. Prints their "
		"names and ports.\n\n"
		"Rules, one a line: TYPE[:NAME] any|ro|rw ACTION [VALUE]\n"
		"    port any allocate 20000-20999          # of the host; also: set PORT, drop\n"
		"    port:lan/tcp/22 any set 22<N>\n"
		"    port:lan/tcp/80 any multiplex 8080     # one for all clones; or 8080:least, 8080:name\n"
		"    hostname any set web-<N>               # where an agent is in the guest; also: allocate web:1-99, share\n"
		"    ip:lan any allocate 10.0.0.10-10.0.0.99/24  # the same; also: set ADDRESS/LENGTH, share\n"
		"    mac:lan any share                      # what the guest has; also: new, set MAC\n"
		"    tap:wan rw set vmtap<N>                # also: allocate vmtap:0-99\n"
		"    disk:root rw copy /srv/<VM>.qcow2      # the overlay's place\n"
		"<VM>, <N>, <UUID> and <STORE> are put in for each clone.\n\n"
		"Of a group a VM of each comes to be, all at once, in networks (mode = group) of their own and with the addresses that the guests know.\n\n"
		"Examples:\n"
		"    vmcp clone trained --count 8\n"
		"    vmcp clone web~2 --name try2 --rules clone.rules\n"
		"    vmcp clone --live web",
	.options = clone_options,
	.words = "@ckpt",
	.max_arguments = 1,
	.json = "vms [name, pid, clone_ns, identity {uuid, generation_id, resources [type, name, guest, host, exclusive]}]",
	.run = run_clone,
};
const struct cli_command cli_template = {
	.name = "template",
	.synopsis = "CKPT NAME [--rules FILE]",
	.summary = "make a checkpoint the origin of clones",
	.help = "Checks that all its resources can be shared or virtualised, tags it NAME and keeps the rules with it "
		"for `vmcp clone`.\n\n"
		"Example:\n"
		"    vmcp template web worker --rules worker.rules && vmcp clone worker --count 8",
	.options = template_options,
	.min_arguments = 2,
	.words = "@ckpt @any",
	.max_arguments = 2,
	.json = "id, template",
	.run = run_template,
};
