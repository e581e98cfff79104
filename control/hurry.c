#include "control/hurry.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/priority.h"

/* Linux may weigh sessions (sched(7), autogroup): then niceness counts within one only. 0 or -errno. */
static int weigh_session(const char *nice)
{
	int fd = open("/proc/self/autogroup", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	int rc = write(fd, nice, strlen(nice)) < 0 ? -errno : 0;
	close(fd);
	return rc;
}

void hurry_begin(struct hurry *hurry)
{
	/* A niceness that somebody has chosen stays. */
	hurry->thread = priority_nice() == 0 && priority_set_flags(SCHED_OTHER, -20, PRIORITY_SHORT_SLICE_NS, PRIORITY_NOT_INHERITED) == 0;
	hurry->session = weigh_session("-20") == 0;
}

void hurry_end(struct hurry *hurry)
{
	const struct timespec moment = {.tv_nsec = 20000000};

	if (hurry->thread) /* to take the flag away needs CAP_SYS_NICE, a niceness of -20 RLIMIT_NICE only */
		priority_set_flags(SCHED_OTHER, 0, 0, PRIORITY_NOT_INHERITED);
	/* Without CAP_SYS_ADMIN it may be changed ten times a second only, by all processes together. */
	while (hurry->session && weigh_session("0") == -EAGAIN)
		nanosleep(&moment, NULL);
	*hurry = (struct hurry){0};
}
