/* Commands that act on a VM: pause, resume, suspend, stop, kill, balloon. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/size.h"
#include "cli/cli.h"
#include "control/client.h"

#define STOP_TIMEOUT_S 30
#define KILL_TIMEOUT_S 60 /* of disks that are slow to take what they are owed */
#define KILL_NOTICE_S  5

int cli_call_vm(struct cli *cli, const char *method, json_t *params, char name[STORE_NAME_BYTES], json_t **result, struct err *err)
{
	struct control_client *client = NULL;
	struct store *store;
	json_t *answer = NULL;
	int rc = cli_open_vm(cli, &store, name, err);

	if (!rc) {
		rc = control_connect(store, name, &client, err);
		if (rc)
			store_close(store);
	}
	if (rc) {
		json_decref(params);
		return rc;
	}
	rc = control_call(client, method, params, NULL, NULL, &answer, err);
	control_close(client);
	store_close(store);
	if (result)
		*result = answer;
	else
		json_decref(answer);
	return rc;
}

static int change_state(struct cli *cli, const char *method, const char *state, struct err *err)
{
	char name[STORE_NAME_BYTES];
	int rc = cli_call_vm(cli, method, NULL, name, NULL, err);

	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s}", "vm", name, "state", state));
	else if (!cli->quiet)
		printf("%s: %s\n", name, state);
	return 0;
}

static int run_pause(struct cli *cli, struct err *err) { return change_state(cli, "vm.pause", "paused", err); }

static int run_resume(struct cli *cli, struct err *err) { return change_state(cli, "vm.resume", "running", err); }

/* Waits until the VM's process is gone or, `asleep`, suspended. *there false: it is not, in that time. */
static int wait_ended(struct cli *cli, const char *name, bool asleep, unsigned seconds, bool *there, struct err *err)
{
	const struct timespec moment = {.tv_nsec = 5000000};
	uint64_t limit = clock_now_ns() + seconds * 1000000000ull;
	struct store *store;
	int rc = cli_open_store(cli, &store, err);

	*there = false;
	while (!rc && !*there) {
		struct store_vm vm;

		rc = store_vm_get(store, name, &vm, err);
		if (rc)
			break;
		*there = !vm.alive || (asleep && !strcmp(vm.state, "suspended"));
		store_vm_free(&vm);
		if (*there || clock_now_ns() >= limit)
			break;
		nanosleep(&moment, NULL);
	}
	store_close(store);
	return rc;
}

/* Its machine ends behind the answer. */
static int wait_suspended(struct cli *cli, const char *name, struct err *err)
{
	bool there;
	int rc = wait_ended(cli, name, true, KILL_TIMEOUT_S, &there, err);

	if (rc || there)
		return rc;
	err_set(err, ERR_FAILED, ETIMEDOUT, "%s: its process does not let its machine go", name);
	return err_hint(err, "its checkpoint is there; see vms/%s/log in the store", name);
}

static int run_suspend(struct cli *cli, struct err *err)
{
	char name[STORE_NAME_BYTES];
	json_t *result = NULL;
	int rc = cli_call_vm(cli, "vm.suspend", NULL, name, &result, err);

	if (!rc)
		rc = wait_suspended(cli, name, err);
	if (!rc && cli->json)
		cli_print_json(json_incref(result));
	else if (!rc)
		printf("%s\n", json_string_value(json_object_get(result, "id")));
	json_decref(result);
	return rc;
}

static int tell_stopped(struct cli *cli, const char *name, const char *how)
{
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:s, s:s}", "vm", name, "state", "stopped", "how", how));
	else if (!cli->quiet)
		printf("%s: stopped (%s)\n", name, how);
	return 0;
}

static int kill_vm(struct cli *cli, char name[STORE_NAME_BYTES], struct err *err)
{
	bool gone;
	int rc = cli_call_vm(cli, "vm.kill", NULL, name, NULL, err);

	/* Its process may be gone before it answers. */
	if (rc && rc != -ECONNRESET)
		return rc;
	rc = wait_ended(cli, name, false, KILL_NOTICE_S, &gone, err);
	if (!rc && !gone) {
		if (!cli->quiet)
			fprintf(stderr, "vmcp: %s: waiting for its disks and its checkpoint to be closed\n", name);
		rc = wait_ended(cli, name, false, KILL_TIMEOUT_S - KILL_NOTICE_S, &gone, err);
	}
	if (!rc && !gone) {
		err_set(err, ERR_FAILED, ETIMEDOUT, "%s: its process does not end", name);
		rc = err_hint(err, "see vms/%s/log in the store; SIGKILL ends it in any case", name);
	}
	return rc;
}

static int run_kill(struct cli *cli, struct err *err)
{
	char name[STORE_NAME_BYTES];
	int rc = kill_vm(cli, name, err);

	return rc ? rc : tell_stopped(cli, name, "killed");
}

static int run_stop(struct cli *cli, struct err *err)
{
	unsigned timeout = STOP_TIMEOUT_S;
	char name[STORE_NAME_BYTES];
	bool gone;
	int rc = cli_given(cli, "timeout") ? cli_parse_seconds("--timeout", cli_value(cli, "timeout"), &timeout, err)
					   : 0;

	if (!rc)
		rc = cli_call_vm(cli, "vm.power-button", NULL, name, NULL, err);
	if (!rc)
		rc = wait_ended(cli, name, false, timeout, &gone, err);
	if (rc)
		return rc;
	if (gone)
		return tell_stopped(cli, name, "powered off");
	if (!cli->quiet)
		fprintf(stderr, "vmcp: %s: the guest did not power off within %u s: ending it\n", name, timeout);
	rc = kill_vm(cli, name, err);
	return rc ? rc : tell_stopped(cli, name, "killed");
}

/* `[VM] SIZE`: with one argument it is the size. */
static int run_balloon(struct cli *cli, struct err *err)
{
	const char *size = cli->arguments[--cli->argument_count];
	char name[STORE_NAME_BYTES];
	uint64_t bytes;

	if (!size_parse(size, &bytes) || bytes > INT64_MAX) {
		err_set(err, ERR_USAGE, EINVAL, "'%s' is no size", size);
		return err_hint(err, SIZE_HINT);
	}
	json_t *result, *params = json_pack("{s:I}", "target_bytes", (json_int_t)bytes);
	int rc = cli_call_vm(cli, "vm.balloon", params, name, &result, err);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	if (!cli->quiet)
		printf("%s: asked to make do with %s; `vmcp stats %s` tells how far it is\n", name, size, name);
	json_decref(result);
	return 0;
}

static const struct cli_option stop_options[] = {
	{"timeout", 0, "SECONDS", "how long to wait for the guest before it is ended (default 30)"},
	{0},
};
static const struct cli_option none[] = {{0}};

const struct cli_command cli_pause = {.name = "pause",
				      .synopsis = "[VM]",
				      .summary = "stop the guest where it stands",
				      .options = none,
				      .words = "@running",
				      .max_arguments = 1,
				      .json = "vm, state",
				      .run = run_pause};
const struct cli_command cli_resume = {.name = "resume",
				       .synopsis = "[VM]",
				       .summary = "let a paused guest go on",
				       .options = none,
				       .words = "@running",
				       .max_arguments = 1,
				       .json = "vm, state",
				       .run = run_resume};
const struct cli_command cli_suspend = {
	.name = "suspend",
	.synopsis = "[VM]",
	.summary = "checkpoint a VM, then free all that it has of the host until it is wanted",
	.help = "Prints the checkpoint's id. What is left is a small process that waits at the VM's forwarded ports: the first connection or\n"
		"datagram, or `vmcp resume`, starts it again from there. Connections that come meanwhile reach the guest; a datagram that wakes\n"
		"it is lost. The guest's own connections have ended, as after a revert.",
	.options = none,
	.words = "@running",
	.max_arguments = 1,
	.json = "id, vm, ...",
	.run = run_suspend,
};
const struct cli_command cli_stop = {.name = "stop",
				     .synopsis = "[VM] [--timeout SECONDS]",
				     .summary = "press the guest's power button; end it if it does not answer",
				     .options = stop_options,
				     .words = "@running",
				     .max_arguments = 1,
				     .json = "vm, state, how",
				     .run = run_stop};
const struct cli_command cli_kill = {.name = "kill",
				     .synopsis = "[VM]",
				     .summary = "end a VM without asking the guest; its disks are closed cleanly",
				     .options = none,
				     .words = "@running",
				     .max_arguments = 1,
				     .json = "vm, state, how",
				     .run = run_kill};
const struct cli_command cli_balloon = {
	.name = "balloon",
	.synopsis = "[VM] SIZE",
	.summary = "ask the guest to make do with SIZE of its memory",
	.help = "The guest gives the rest back to the host, in its own time (`vmcp stats` tells). Its whole memory as SIZE lets it take all back.\n"
		"Needs `balloon = yes` in guest.cfg. For example: vmcp balloon web 512M",
	.options = none,
	.min_arguments = 1,
	.words = "@running",
	.max_arguments = 2,
	.json = "vm, target_bytes",
	.run = run_balloon};
