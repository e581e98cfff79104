/* Sockets of the host in front of a VM: listening for its callers, and handing their connections through. */
#ifndef VMCP_CONTROL_SPLICE_H
#define VMCP_CONTROL_SPLICE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

#define SPLICE_FIRST_BYTES 16384u

/* Listens at an address as those that forward ports to a VM do. A descriptor that does not block; or -errno, ERR_STATE naming the port if somebody has it. */
int splice_listen(const struct sockaddr_in *address, bool udp, struct err *err);
/* Connects over TCP to who listens at the address; where that is every address of the host, by its loopback. A descriptor or -errno. */
int splice_connect(const struct sockaddr_in *address);

struct splice {
	int caller, server;
	/* What was read of the caller already. */
	const void *first;
	size_t first_bytes; /* SPLICE_FIRST_BYTES at most */
	/* Asked when the server has ended its side: did it die, so that this is no end but a reset? NULL: it did not. */
	bool (*is_dead)(void *opaque);
	void *opaque;
};

/* Hands bytes both ways, for as long as the connection lasts. If it was broken on one side, by a reset or a death, the other will see a reset, too: from
 * then on closing either of the descriptors, which is the caller's to do, sends one. Any thread. */
void splice_run(const struct splice *splice);
/* Closing the descriptor will send a reset. */
void splice_break(int fd);

#endif
