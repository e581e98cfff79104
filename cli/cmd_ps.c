/* ps: the VMs of the store; of one that crashed why, what it said last, and the way back. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "cli/cli.h"
#include "control/protocol.h"

#define TAIL_BYTES 4096u
#define TAIL_LINES 5u

static bool is_crashed(const struct store_vm *vm) { return !strcmp(vm->state, "crashed"); }

/* The file's end, without what a terminal would act on. "" if there is none. */
static void read_end(int dir, const char *name, char text[TAIL_BYTES + 1])
{
	CLEANUP_CLOSE int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	ssize_t n = size > 0 ? pread(fd, text, TAIL_BYTES, size > (off_t)TAIL_BYTES ? size - (off_t)TAIL_BYTES : 0) : 0;
	size_t kept = 0;

	for (ssize_t i = 0; i < n; i++)
		if (text[i] == '\n' || ((unsigned char)text[i] >= 0x20 && (unsigned char)text[i] < 0x7f))
			text[kept++] = text[i];
	while (kept && text[kept - 1] == '\n')
		kept--;
	text[kept] = '\0';
}

/* The last lines of the console, as a list; null if it said nothing, or nothing of it was kept. */
static json_t *last_lines(struct store *store, const struct store_vm *vm)
{
	CLEANUP_CLOSE int dir = store_vm_dir(store, vm->name, NULL);
	char text[TAIL_BYTES + 1] = "";

	if (dir >= 0)
		read_end(dir, "console.last", text); /* of one that ended with an error */
	if (dir >= 0 && !text[0])
		read_end(dir, "console.log", text);
	if (!text[0])
		return json_null();
	char *line = text + strlen(text);
	for (unsigned lines = 0; line > text; line--)
		if (line[-1] == '\n' && ++lines == TAIL_LINES)
			break;
	json_t *list = json_array();
	for (char *rest, *one = strtok_r(line, "\n", &rest); one; one = strtok_r(NULL, "\n", &rest))
		json_array_append_new(list, json_string(one));
	return list;
}

static const char *reason(const struct store_vm *vm)
{
	if (vm->note[0])
		return vm->note;
	return is_crashed(vm) ? "its process is gone without a word: it was killed, or the host went down" : NULL;
}

static json_t *vm_to_json(struct store *store, const struct store_vm *vm, uint64_t now)
{
	json_t *one = json_pack("{s:s, s:s, s:o, s:o, s:I, s:i, s:o, s:o}", "name", vm->name, "state", vm->state, "pid",
				vm->alive ? json_integer(vm->pid) : json_null(), "uptime_ns",
				vm->alive && now > vm->started_wall_ns ? json_integer((json_int_t)(now - vm->started_wall_ns)) : json_null(),
				"memory_bytes", (json_int_t)vm->memory_bytes, "cpus", (int)vm->cpus, "last_checkpoint", control_text_or_null(vm->at),
				"note", control_text_or_null(vm->alive || is_crashed(vm) ? reason(vm) : NULL));

	if (is_crashed(vm))
		json_object_set_new(one, "console", last_lines(store, vm));
	return one;
}

static void print_crash(struct store *store, const struct store_vm *vm)
{
	json_t *lines = last_lines(store, vm), *line;
	size_t i;

	printf("    why: %s\n", reason(vm));
	json_array_foreach(lines, i, line)
		printf("    %s %s\n", i ? "        |" : "console: |", json_string_value(line));
	if (vm->at[0])
		printf("    back to its last checkpoint, %.12s: vmcp revert %.12s%s%s\n", vm->at, vm->at, " --vm ", vm->name);
	else if (vm->config_path[0])
		printf("    it has no checkpoint; from the beginning: vmcp run %s\n", vm->config_path);
	json_decref(lines);
}

static void print_vm(struct store *store, const struct store_vm *vm, uint64_t now)
{
	char pid[16] = "-", uptime[16] = "-", memory[16];

	if (vm->alive) {
		snprintf(pid, sizeof(pid), "%d", vm->pid);
		cli_format_age(uptime, now > vm->started_wall_ns ? now - vm->started_wall_ns : 0);
	}
	cli_format_size(memory, vm->memory_bytes);
	printf("%-20s %-8s %8s %7s %7s %5u  %.8s\n", vm->name, vm->state, pid, uptime, memory, vm->cpus, vm->at[0] ? vm->at : "-");
	if (is_crashed(vm))
		print_crash(store, vm);
	else if (vm->alive && vm->note[0])
		printf("    %s\n", vm->note);
}

static void print_all(struct cli *cli, struct store *store, const struct store_vm *list, size_t count)
{
	uint64_t now = clock_wall_ns();
	json_t *vms = json_array();

	if (!cli->json)
		printf("%-20s %-8s %8s %7s %7s %5s  %s\n", "NAME", "STATE", "PID", "UPTIME", "MEMORY", "CPUS", "CHECKPOINT");
	for (size_t i = 0; i < count; i++)
		if (cli->json)
			json_array_append_new(vms, vm_to_json(store, &list[i], now));
		else
			print_vm(store, &list[i], now);
	if (cli->json)
		cli_print_json(json_pack("{s:o}", "vms", vms));
	else
		json_decref(vms);
}

static int run_ps(struct cli *cli, struct err *err)
{
	struct store_vm *list = NULL;
	struct store *store = NULL;
	size_t count = 0;
	int rc = cli_open_store(cli, &store, err);

	if (!rc)
		rc = store_vm_list(store, &list, &count, err);
	else if (rc == -ENOENT) /* nothing was ever run here */
		rc = 0, store = NULL;
	if (!rc)
		print_all(cli, store, list, count);
	for (size_t i = 0; i < count; i++)
		store_vm_free(&list[i]);
	free(list);
	store_close(store);
	return rc;
}

static const struct cli_option none[] = {{0}};

const struct cli_command cli_ps = {
	.name = "ps",
	.synopsis = "",
	.summary = "the VMs of the store, running or not",
	.help = "Of one that crashed also why, the last lines of its console, and how to get it back.",
	.options = none,
	.json = "vms [name, state, pid, uptime_ns, memory_bytes, cpus, last_checkpoint, note, console?]",
	.run = run_ps,
};
