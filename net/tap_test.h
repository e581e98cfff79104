/* For tests with tap devices: a network namespace of the test's own. */
#ifndef VMCP_NET_TAP_TEST_H
#define VMCP_NET_TAP_TEST_H

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline bool run(const char *command) { return system(command) == 0; }

/* False, and the reason on stderr, where there can be none. */
static inline bool own_namespace(void)
{
	if (unshare(CLONE_NEWNET) < 0) {
		fprintf(stderr, "SKIP: no network namespace of its own: %s\n", strerror(errno));
		return false;
	}
	if (access("/dev/net/tun", R_OK | W_OK) < 0 || !run("ip link set lo up && ip tuntap add probe mode tap 2>/dev/null && ip link del probe")) {
		fprintf(stderr, "SKIP: no tap devices: /dev/net/tun or `ip` is missing\n");
		return false;
	}
	return true;
}

#endif
