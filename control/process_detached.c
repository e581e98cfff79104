/* A VM in the background: a child of its own session, whose caller hears when the guest runs. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/log.h"
#include "control/process_internal.h"

/* What the child sends to its parent when the guest runs or could not start: plain structs, as both are the same program. */
struct child_report {
	int rc;
	struct process_result result;
	struct err error;
};

struct child {
	int report_fd;
	const struct process_options *options;
};

static void send_report(int *fd, const struct child_report *report)
{
	if (*fd < 0)
		return;
	(void)!write(*fd, report, sizeof(*report)); /* a parent that is gone does not matter */
	close(*fd);
	*fd = -1;
}

/* The guest runs: the parent may go, and stdout, stderr belong to the log from now on. */
static void child_running(void *opaque, const struct process_result *result)
{
	struct child *child = opaque;
	struct child_report report = {.result = *result};
	char *path = xasprintf("%s/vms/%s/log", child->options->store_path, result->vm);
	int log = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	free(path);
	if (log < 0)
		log = open("/dev/null", O_WRONLY | O_CLOEXEC); /* whoever reads what we say must see its end in any case */
	if (log >= 0) {
		dup2(log, STDOUT_FILENO);
		dup2(log, STDERR_FILENO);
		close(log);
	}
	send_report(&child->report_fd, &report);
}

/* Whatever else the caller left open: a pipe or lock of its own must not live as long as the VM. */
static void close_inherited(int keep)
{
	if (keep > STDERR_FILENO + 1)
		close_range(STDERR_FILENO + 1, (unsigned)keep - 1, 0);
	close_range((unsigned)keep + 1, ~0u, 0);
}

static int child_main(struct child *child)
{
	struct child_report report = {0};

	setsid();
	close_inherited(child->report_fd);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null >= 0) {
		dup2(null, STDIN_FILENO);
		close(null);
	}
	report.rc = process_run_here(child->options, child_running, child, &report.result, &report.error);
	if (report.rc && child->report_fd < 0)
		log_error("%s", report.error.message);
	if (report.rc && child->report_fd < 0 && report.error.hint[0])
		log_error("hint: %s", report.error.hint);
	send_report(&child->report_fd, &report);
	return report.rc ? 1 : 0;
}

int process_run_detached(const struct process_options *options, struct process_result *result, struct err *err)
{
	struct child_report report;
	struct child child = {.options = options};
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return err_sys(err, errno, "pipe");
	pid_t pid = fork();
	if (pid < 0) {
		int number = errno;

		close(ends[0]);
		close(ends[1]);
		return err_sys(err, number, "fork");
	}
	if (pid == 0) {
		close(ends[0]);
		child.report_fd = ends[1];
		_exit(child_main(&child));
	}
	close(ends[1]);
	ssize_t n;
	do
		n = read(ends[0], &report, sizeof(report));
	while (n < 0 && errno == EINTR);
	close(ends[0]);
	if (n != (ssize_t)sizeof(report))
		return err_set(err, ERR_FAILED, EPIPE, "the VM's process ended before its guest ran");
	if (report.rc) {
		if (err)
			*err = report.error;
		return report.rc;
	}
	*result = report.result;
	return 0;
}
