/* The start of a VM in the background goes before other work of the host, where CAP_SYS_NICE allows it: some 4 ms of work that somebody waits for. Beside VMs
 * that never idle its turns would come so seldom that it took ten times as long. */
#ifndef VMCP_CONTROL_HURRY_H
#define VMCP_CONTROL_HURRY_H

#include <stdbool.h>

struct hurry {
	bool thread, session; /* goes before others of its session; before other sessions */
};

/* Of the calling thread, which leads a session of its own. Threads and processes that it makes do not inherit the first. */
void hurry_begin(struct hurry *hurry);
/* By the same thread; once more does nothing. */
void hurry_end(struct hurry *hurry);

#endif
