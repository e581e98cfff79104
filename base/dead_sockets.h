/* UNIX sockets that processes left in a folder when they were killed. */
#ifndef VMCP_BASE_DEAD_SOCKETS_H
#define VMCP_BASE_DEAD_SOCKETS_H

#include <stdbool.h>

/* Removes the sockets in the folder `dir` (a descriptor, which stays open) that nobody has open, whatever their type is, and whether anybody listens or not. Nobody may be
 * putting a new one in the place of such a one at that moment. Names that begin with a dot, and what is no socket, stay. */
void dead_sockets_remove(int dir);
/* The same in each folder of the folder `parent`, but for those that `skip`, which may be NULL, says of; with `empty_too` folders that are empty then go as well. */
void dead_sockets_remove_below(int parent, bool (*skip)(void *opaque, const char *name), void *opaque, bool empty_too);

#endif
