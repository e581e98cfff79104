/* checkpoint, cancel, revert, tag. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "cli/cli.h"
#include "control/client.h"
#include "control/domain.h"
#include "control/process.h"

/* --- Ctrl-C cancels --- */

struct canceller {
	struct store *store;
	const char *vm;
	pthread_t thread;
};

/* `wait`: until it has ended. */
static int cancel_checkpoint(struct store *store, const char *vm, bool wait, json_t **result, struct err *err)
{
	struct control_client *client;
	int rc = control_connect(store, vm, &client, err);

	if (rc)
		return rc;
	rc = control_call(client, "checkpoint.cancel", json_pack("{s:b}", "wait", wait), NULL, NULL, result, err);
	control_close(client);
	return rc;
}

static void *canceller_main(void *opaque)
{
	struct canceller *canceller = opaque;
	sigset_t set;
	int number;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	/* A checkpoint that is durable by now cannot be cancelled: its answer is on the way. One that has not begun yet
	 * can be, by the next Ctrl-C. */
	while (sigwait(&set, &number) == 0) {
		pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
		json_t *result = NULL;
		cancel_checkpoint(canceller->store, canceller->vm, false, &result, NULL);
		json_decref(result);
		pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
	}
	return NULL;
}

static bool canceller_start(struct canceller *canceller)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	return pthread_create(&canceller->thread, NULL, canceller_main, canceller) == 0;
}

static void canceller_stop(struct canceller *canceller)
{
	pthread_cancel(canceller->thread);
	pthread_join(canceller->thread, NULL);
}

/* --- checkpoint --- */

static json_t *text_or_null(const char *text) { return text ? json_string(text) : json_null(); }

static int take(struct cli *cli, struct store *store, const char *vm, uint64_t max_rate, unsigned seconds, json_t **result, struct err *err)
{
	const char *wait = cli_value(cli, "wait"), *instant = cli_value(cli, "instant");
	struct cli_progress progress = cli_progress_begin(cli, "checkpoint");
	struct canceller canceller = {.store = store, .vm = vm};
	struct control_client *client;
	int rc = control_connect(store, vm, &client, err);

	if (rc)
		return rc;
	bool cancels = canceller_start(&canceller);
	rc = control_call(client, "checkpoint.take",
			  json_pack("{s:b, s:b, s:I, s:I, s:s, s:o, s:o, s:s}", "live", cli_given(cli, "live"), "full",
				    cli_given(cli, "full"), "max_rate", (json_int_t)max_rate, "timeout_ns",
				    (json_int_t)seconds * 1000000000, "instant",
				    instant ? instant : "now", "tag", text_or_null(cli_value(cli, "tag")), "message",
				    text_or_null(cli_value(cli, "message")), "wait", wait ? wait : "durable"),
			  cli_progress_show, &progress, result, err);
	if (cancels)
		canceller_stop(&canceller);
	cli_progress_end(&progress);
	control_close(client);
	return rc;
}

static void print_taken(const struct cli *cli, const json_t *result)
{
	char pause[24], durable[24];

	printf("%s\n", json_string_value(json_object_get(result, "id")));
	if (cli->quiet)
		return;
	cli_format_duration(pause, (uint64_t)json_integer_value(json_object_get(result, "pause_ns")));
	fflush(stdout);
	if (!json_is_integer(json_object_get(result, "durable_ns"))) {
		fprintf(stderr, "vmcp: %s, the VM stood still for %s; it is not yet durable\n",
			json_string_value(json_object_get(result, "durability")), pause);
		return;
	}
	cli_format_duration(durable, (uint64_t)json_integer_value(json_object_get(result, "durable_ns")));
	fprintf(stderr, "vmcp: durable after %s; the VM stood still for %s\n", durable, pause);
}

/* What vmcp's own VMs can, and QEMU cannot. */
static int check_domain_options(const struct cli *cli, struct err *err)
{
	static const struct {
		const char *option, *why;
	} own[] = {
		{"full", "QEMU saves all memory each time"},
		{"instant", "QEMU's instant is the one at which it begins"},
		{"max-rate", "QEMU saves as fast as it can"},
		{"wait", "it is durable when the command ends"},
		{"timeout", "Ctrl-C cancels it"},
	};

	for (size_t i = 0; i < ARRAY_LENGTH(own); i++)
		if (cli_given(cli, own[i].option)) {
			err_set(err, ERR_USAGE, EINVAL, "--%s: has no effect with --connect: %s", own[i].option, own[i].why);
			return err_hint(err, "leave --%s out", own[i].option);
		}
	if (cli->argument_count == 1)
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "checkpoint: --connect needs the name of a domain");
	return err_hint(err, "vmcp checkpoint --live --connect qemu:///system DOMAIN");
}

/* Of a domain that QEMU runs below libvirt: this process takes it. */
static int take_domain(struct cli *cli, json_t **result, struct err *err)
{
	struct cli_progress progress = cli_progress_begin(cli, "checkpoint");
	int rc = check_domain_options(cli, err);

	if (rc)
		return rc;
	const struct control_domain_take take = {
		.connect = cli_value(cli, "connect"),
		.domain = cli->arguments[0],
		.live = cli_given(cli, "live"),
		.tag = cli_value(cli, "tag"),
		.message = cli_value(cli, "message"),
		.cancel = &cli_interrupted,
		.progress = cli_progress_show,
		.opaque = &progress,
	};
	struct store *store;

	rc = store_open(cli->store_path, true, &store, err);
	if (rc)
		return rc;
	cli_catch_interrupts();
	rc = control_domain_checkpoint(store, &take, result, err);
	cli_progress_end(&progress);
	store_close(store);
	return rc;
}

static int run_checkpoint(struct cli *cli, struct err *err)
{
	const char *wait = cli_value(cli, "wait"), *tag = cli_value(cli, "tag"), *instant = cli_value(cli, "instant");
	const char *max_rate = cli_value(cli, "max-rate"), *timeout = cli_value(cli, "timeout");
	unsigned seconds = 0;
	char name[STORE_NAME_BYTES];
	struct store *store;
	json_t *result;
	uint64_t rate = 0;
	int rc = 0;

	if (wait && strcmp(wait, "captured") && strcmp(wait, "written") && strcmp(wait, "durable")) {
		err_set(err, ERR_USAGE, EINVAL, "--wait: '%s' is not captured, written or durable", wait);
		return err_hint(err, "durable is the default");
	}
	if (max_rate && (!size_parse(max_rate, &rate) || rate == 0 || rate > INT64_MAX)) {
		err_set(err, ERR_USAGE, EINVAL, "--max-rate: '%s' is no rate", max_rate);
		return err_hint(err, SIZE_HINT " a second");
	}
	if (instant && strcmp(instant, "now") && strcmp(instant, "settled")) {
		err_set(err, ERR_USAGE, EINVAL, "--instant: '%s' is neither now nor settled", instant);
		return err_hint(err, "now is the default");
	}
	if (timeout)
		rc = cli_parse_seconds("--timeout", timeout, &seconds, err);
	if (!rc && timeout && seconds == 0)
		rc = err_set(err, ERR_USAGE, EINVAL, "--timeout: no checkpoint takes less than a second for sure");
	if (!rc && tag)
		rc = store_check_name("--tag", tag, err);
	if (!rc && cli_given(cli, "group"))
		return cli_group_checkpoint(cli, rate, seconds, err);
	if (!rc && cli->argument_count > 1) {
		err_set(err, ERR_USAGE, EINVAL, "checkpoint: more than one VM");
		rc = err_hint(err, "of several VMs at one instant: vmcp checkpoint --live --group VM VM...");
	}
	if (!rc && cli_given(cli, "connect"))
		rc = take_domain(cli, &result, err);
	else if (!rc) {
		rc = cli_open_vm(cli, &store, name, err);
		if (rc)
			return rc;
		rc = take(cli, store, name, rate, seconds, &result, err);
		store_close(store);
	}
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	print_taken(cli, result);
	json_decref(result);
	return 0;
}

static void print_cancelled(const struct cli *cli, const json_t *result)
{
	const char *waited_for = json_string_value(json_object_get(result, "waits_for"));

	printf("%s\n", json_string_value(json_object_get(result, "id")));
	fflush(stdout);
	if (waited_for && !cli->quiet)
		fprintf(stderr, "vmcp: it waited for %s\n", waited_for);
}

static int run_cancel(struct cli *cli, struct err *err)
{
	char name[STORE_NAME_BYTES];
	struct store *store;
	json_t *result = NULL;
	int rc = cli_open_vm(cli, &store, name, err);

	if (rc)
		return rc;
	rc = cancel_checkpoint(store, name, true, &result, err);
	store_close(store);
	if (rc)
		return rc;
	if (cli->json) {
		json_object_set_new(result, "vm", json_string(name));
		cli_print_json(result);
		return 0;
	}
	print_cancelled(cli, result);
	json_decref(result);
	return 0;
}

/* --- revert --- */

static int revert_in_place(struct cli *cli, struct store *store, const char *vm, const char *id, json_t **result, struct err *err)
{
	struct cli_progress progress = cli_progress_begin(cli, "revert");
	struct canceller canceller = {.store = store, .vm = vm};
	struct control_client *client;
	int rc = control_connect(store, vm, &client, err);

	if (rc)
		return rc;
	bool cancels = canceller_start(&canceller);
	rc = control_call(client, "vm.revert", json_pack("{s:s, s:b}", "id", id, "progress", !cli->quiet), cli_progress_show, &progress, result, err);
	if (cancels)
		canceller_stop(&canceller);
	cli_progress_end(&progress);
	control_close(client);
	return rc;
}

/* The VM is gone: it starts from the checkpoint, detached. */
static int revert_by_start(struct cli *cli, const char *id, const char *name, json_t **result, struct err *err)
{
	struct process_options options = {
		.store_path = cli->store_path, .from = id, .name = name, .detach = true, .started_ns = cli->started_ns};
	struct process_result started;
	int rc = cli_store_key(cli, &options.store_key, err);
	if (!rc)
		rc = process_run(&options, &started, err);

	if (rc)
		return rc;
	*result = json_pack("{s:s, s:s, s:s, s:i, s:I, s:i}", "vm", started.vm, "checkpoint", started.checkpoint,
			    "mode", "started", "restored_pages", 0, "revert_ns", (json_int_t)started.boot_ns,
			    "pid", started.pid);
	free(started.socket);
	return 0;
}

static void print_reverted(const json_t *result)
{
	char took[24];

	cli_format_duration(took, (uint64_t)json_integer_value(json_object_get(result, "revert_ns")));
	printf("%s is back at %.8s (%s, %s)\n", json_string_value(json_object_get(result, "vm")),
	       json_string_value(json_object_get(result, "checkpoint")),
	       json_string_value(json_object_get(result, "mode")), took);
}

/* Finds the group, or the checkpoint, the VM that is meant, --vm or the one that took it, and whether it runs. */
static int find_target(struct cli *cli, struct store *store, char id[STORE_ID_BYTES], char name[STORE_NAME_BYTES],
		       bool *alive, bool *is_group, struct err *err)
{
	struct store_checkpoint checkpoint;
	struct store_vm vm;
	int rc = cli_resolve(store, cli->arguments[0], id, is_group, err);

	if (!rc && *is_group)
		return 0;
	if (!rc)
		rc = store_checkpoint_get(store, id, &checkpoint, err);
	if (rc)
		return rc;
	const char *wanted = cli_value(cli, "vm");
	snprintf(name, STORE_NAME_BYTES, "%s", wanted ? wanted : checkpoint.vm);
	store_checkpoint_free(&checkpoint);
	*alive = false;
	rc = store_vm_get(store, name, &vm, wanted ? err : NULL);
	if (rc)
		return wanted ? rc : 0;
	*alive = vm.alive;
	store_vm_free(&vm);
	return 0;
}

static int run_revert(struct cli *cli, struct err *err)
{
	char id[STORE_ID_BYTES], name[STORE_NAME_BYTES];
	const char *connect = cli_value(cli, "connect");
	struct store *store;
	json_t *result;
	bool alive, is_group = false;
	int rc = 0;

	if (connect && cli_given(cli, "vm")) {
		err_set(err, ERR_USAGE, EINVAL, "--vm: has no effect with --connect: the domain that the checkpoint was taken of is taken back");
		rc = err_hint(err, "leave --vm out");
	}
	if (!rc)
		rc = cli_open_store(cli, &store, err);
	if (rc)
		return rc;
	rc = find_target(cli, store, id, name, &alive, &is_group, err);
	if (!rc && is_group) {
		store_close(store);
		return cli_group_revert(cli, id, err);
	}
	if (!rc && connect)
		rc = control_domain_revert(store, connect, id, &result, err);
	else if (!rc && alive)
		rc = revert_in_place(cli, store, name, id, &result, err);
	store_close(store); /* before a process is forked: a database handle must not be in two */
	if (!rc && !alive && !connect)
		rc = revert_by_start(cli, id, name, &result, err);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	print_reverted(result);
	json_decref(result);
	return 0;
}

/* --- tag --- */

static int delete_tag(struct cli *cli, struct err *err)
{
	struct store *store;
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	rc = store_untag(store, cli->arguments[0], err);
	store_close(store);
	if (!rc && cli->json)
		cli_print_json(json_pack("{s:s}", "deleted", cli->arguments[0]));
	return rc;
}

static int run_tag(struct cli *cli, struct err *err)
{
	char id[STORE_ID_BYTES];
	struct store *store;
	bool delete = cli_given(cli, "delete"), is_group;

	if (cli->argument_count != (delete ? 1 : 2)) {
		err_set(err, ERR_USAGE, EINVAL, delete ? "tag --delete: it takes one name" : "tag: it takes a checkpoint and a name");
		return err_hint(err, "vmcp tag CKPT NAME, or vmcp tag --delete NAME");
	}
	int rc = delete ? delete_tag(cli, err) : cli_open_store(cli, &store, err);
	if (rc || delete)
		return rc;
	rc = cli_resolve(store, cli->arguments[0], id, &is_group, err);
	if (!rc)
		rc = store_tag(store, id, cli->arguments[1], err);
	store_close(store);
	if (!rc && cli->json)
		cli_print_json(json_pack("{s:s, s:s}", "id", id, "tag", cli->arguments[1]));
	return rc;
}

static const struct cli_option checkpoint_options[] = {
	{"connect", 0, "URI", "of a domain that QEMU runs below this libvirt, such as qemu:///system"},
	{"live", 0, NULL, "the VM keeps running while the checkpoint is generated"},
	{"group", 0, NULL, "of several VMs, at one instant: all or none"},
	{"full", 0, NULL, "save all memory again, not only what was written since the parent"},
	{"instant", 0, "WHEN",
	 "now (default): the checkpoint shows the VM as it is now; settled: as it is at the end of the save, with less cost to it meanwhile",
	 "now|settled"},
	{"max-rate", 0, "SIZE", "write memory with at most so many bytes a second, such as 100M"},
	{"message", 'm', "TEXT", "a note that `vmcp log` shows"},
	{"tag", 't', "NAME", "a name for it"},
	{"wait", 0, "WHAT",
	 "captured: return when the VM runs again; written: when all is handed to the filesystem; durable (default): when it is on stable storage",
	 "captured|written|durable"},
	{"timeout", 0, "SECONDS", "cancel it if what is waited for has not come by then"},
	{0},
};
static const struct cli_option revert_options[] = {
	{"connect", 0, "URI", "the checkpoint is of a domain: this libvirt starts it"},
	{"vm", 0, "VM", "the VM to take there, where it is another than the one that the checkpoint was taken of", "@vm"},
	{0},
};
static const struct cli_option none[] = {{0}};

const struct cli_command cli_checkpoint = {
	.name = "checkpoint",
	.synopsis = "[--live] [--connect URI] [--group] [--full] [--instant now|settled] [--max-rate SIZE] [VM...] [-m TEXT] [--tag NAME] [--wait captured|written|durable] [--timeout SECONDS]",
	.summary = "save a VM: registers, devices, memory and disks at one instant",
	.help = "Prints the checkpoint's id. Where one VM runs, VM may be left out. Ctrl-C cancels cleanly: the VM "
		"runs on and\n"
		"nothing of the checkpoint is left.\n\n"
		"Captured, it is whole in the VM's process and dies with it; written, it is in the host's page cache; durable, a crash of the\n"
		"host does not hurt it. `vmcp log` shows those that are not durable yet too.\n\n"
		"With --group each VM stops, and none goes on before all stand: no frame that one of them received is missing from what another had sent. Prints the\n"
		"group's id, which `revert`, `clone`, `show`, `tag` and `rm` take. All are saved, or none.\n\n"
		"Examples:\n"
		"    vmcp checkpoint --live web --tag before-upgrade -m 'all tests pass'\n"
		"    vmcp checkpoint --live --wait captured\n"
		"    vmcp checkpoint --live --group web db --tag before-upgrade\n"
		"    vmcp checkpoint --live --connect qemu:///system web",
	.options = checkpoint_options,
	.words = "@running",
	.max_arguments = STORE_GROUP_MAX,
	.json =
		"id, vm, vmm?, parent, tag, message, created, live, durability, pause_ns, pause {quiesce_ns, state_ns, disks_ns, memory_ns, "
		"resume_ns, group_ns?}, memory {total_pages, saved_pages, zero_pages, parent_pages, cow_faults, cow_fault_p50_ns, cow_fault_p99_ns, "
		"cow_fault_p999_ns?, cow_fault_max_ns, throttled?, throttled_ns?, written_bytes, plan?, plan_reason?, planner?, armed_again_pages?, "
		"stage_ns?, stage_passes?}, disks [name, layer, inflight_writes, inflight_reads], captured_ns?, durable_ns, group?, "
		"pause_start_ns? | group, tag, message, created, live, durability, pause_ns, durable_ns, checkpoints [id, vm, ...]",
	.run = run_checkpoint,
};
const struct cli_command cli_cancel = {.name = "cancel",
				       .synopsis = "[VM]",
				       .summary = "cancel the checkpoint, or the revert that waits, that is under way",
				       .help = "Returns when it has ended, and prints the id that it would have had. The VM runs on, and nothing of\n"
					       "the checkpoint is left. Where it waited for a request to a disk that does not answer, it says for which.",
				       .options = none,
				       .words = "@running",
				       .max_arguments = 1,
				       .json = "vm, id, phase, revert, waits_for?",
				       .run = run_cancel};
const struct cli_command cli_revert = {
	.name = "revert",
	.synopsis = "CKPT | GROUP  [--vm VM] [--connect URI]",
	.summary = "take a VM back to a checkpoint",
	.help = "In place if the VM runs; else it starts from the checkpoint, detached. What the VM did since, on its "
		"disks too, is\n"
		"dropped: take a checkpoint first if it matters.\n\n"
		"Of a group all VMs come back together: none runs before all are ready. Until the first is changed a failure is without effect.\n\n"
		"Examples:\n"
		"    vmcp revert before-upgrade\n"
		"    vmcp revert web~2\n"
		"    vmcp revert trained --vm worker7\n"
		"    vmcp revert --connect qemu:///system web~1",
	.options = revert_options,
	.min_arguments = 1,
	.words = "@ckpt",
	.max_arguments = 1,
	.json = "vm, checkpoint, mode, restored_pages, revert_ns, parts?, pid? | group, revert_ns, vms [vm, checkpoint, mode, restored_pages, revert_ns, parts?, pid?]",
	.run = run_revert,
};
static const struct cli_option tag_options[] = {
	{"delete", 0, NULL, "take the name away instead; the checkpoint stays"},
	{0},
};
const struct cli_command cli_tag = {.name = "tag",
				    .synopsis = "CKPT NAME | --delete NAME",
				    .summary = "give a checkpoint a name",
				    .options = tag_options,
				    .min_arguments = 1,
				    .words = "@ckpt @any",
				    .max_arguments = 2,
				    .json = "id, tag | deleted",
				    .run = run_tag};
