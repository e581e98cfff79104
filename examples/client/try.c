/*
 * try: runs a command in the hope that it does the VM good, and takes the VM back if it does not.
 *
 *     cc -o try try.c $(pkg-config --cflags --libs vmcp)
 *     ./try web ssh root@web 'apt-get -y full-upgrade && reboot-check'
 *
 * A live checkpoint first; the command; where it fails, back to the checkpoint, in place. Exit status: the command's.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vmcp.h>

static int fail(const struct vmcp_error *error)
{
	fprintf(stderr, "try: %s\n", error->message);
	if (error->hint[0])
		fprintf(stderr, "hint: %s\n", error->hint);
	return 125;
}

static int run(char **command)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		execvp(command[0], command);
		perror(command[0]);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		return 126;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 126;
}

/* What the connection has heard of so far. */
static void tell_events(struct vmcp_vm *vm)
{
	struct vmcp_event event;

	while (vmcp_next_event(vm, 0, &event, NULL) == 0)
		printf("try: %s %s %s\n", event.time, event.type, event.checkpoint);
}

int main(int argc, char **argv)
{
	struct vmcp_checkpoint_options options = {.message = "before a try"};
	struct vmcp_checkpoint_result taken;
	struct vmcp_revert_result back;
	struct vmcp_error error;
	struct vmcp_store *store;
	struct vmcp_vm *vm;

	if (argc < 3) {
		fprintf(stderr, "usage: try VM COMMAND [ARGUMENTS]\n");
		return 2;
	}
	if (vmcp_open(NULL, &store, &error))
		return fail(&error);
	if (vmcp_connect(store, argv[1], &vm, &error) || vmcp_checkpoint(vm, &options, &taken, &error))
		return fail(&error);
	printf("try: checkpoint %.12s, the VM stood still for %.2f ms\n", taken.id, (double)taken.pause_ns / 1e6);
	int status = run(argv + 2);
	if (status != 0) {
		if (vmcp_revert(vm, taken.id, &back, &error))
			return fail(&error);
		printf("try: the command failed (%d); back in %.2f ms\n", status, (double)back.revert_ns / 1e6);
	}
	tell_events(vm);
	vmcp_disconnect(vm);
	vmcp_close(store);
	return status;
}
