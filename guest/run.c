/* Programs that the agent runs. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "guest/agent.h"

#define LOOK_NS 5000000 /* between two looks whether it has ended */

static void begin(char *const argv[], char *const environment[])
{
	setpgid(0, 0);
	if (environment)
		execvpe(argv[0], argv, environment);
	else
		execvp(argv[0], argv);
	_exit(127);
}

/* 0: it has ended; -ETIMEDOUT. */
static int wait_for(pid_t pid, unsigned seconds, int *status)
{
	const struct timespec moment = {.tv_nsec = LOOK_NS};
	uint64_t end = clock_now_ns() + (uint64_t)seconds * 1000000000u;

	while (waitpid(pid, status, WNOHANG) == 0) {
		if (clock_now_ns() > end) {
			kill(-pid, SIGKILL);
			waitpid(pid, status, 0);
			return -ETIMEDOUT;
		}
		nanosleep(&moment, NULL);
	}
	return 0;
}

int agent_run(char *const argv[], char *const environment[], unsigned seconds, struct err *err)
{
	int status = 0;
	pid_t pid = fork();

	if (pid < 0)
		return err_sys(err, errno, "%s", argv[0]);
	if (pid == 0)
		begin(argv, environment);
	setpgid(pid, pid); /* whoever is first */
	if (wait_for(pid, seconds, &status))
		return err_set(err, ERR_FAILED, ETIMEDOUT, "%s: killed after %u s", argv[0], seconds);
	if (WIFSIGNALED(status))
		return err_set(err, ERR_FAILED, EIO, "%s: ended by signal %d", argv[0], WTERMSIG(status));
	if (WEXITSTATUS(status) == 127)
		return err_set(err, ERR_FAILED, EIO, "%s: cannot be run", argv[0]);
	return WEXITSTATUS(status) ? err_set(err, ERR_FAILED, EIO, "%s: exit status %d", argv[0], WEXITSTATUS(status)) : 0;
}
