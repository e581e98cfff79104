/* UNIX stream sockets in a folder that is open: an address has room for 107 bytes of a path, and a store may lie deep. */
#ifndef VMCP_CONTROL_LOCAL_SOCKET_H
#define VMCP_CONTROL_LOCAL_SOCKET_H

#include "base/err.h"

/* Listens at `name` in the folder `dir`; what a dead process left there is replaced. A descriptor or -errno. */
int local_socket_listen(int dir, const char *name, struct err *err);
/* Connects to it. A descriptor or -errno: -ENOENT, -ECONNREFUSED if nobody listens. */
int local_socket_connect(int dir, const char *name, struct err *err);

#endif
