/* UNIX sockets that processes left in a folder when they were killed. */
#ifndef VMCP_BASE_DEAD_SOCKETS_H
#define VMCP_BASE_DEAD_SOCKETS_H

/* Removes the sockets in the folder `dir` (a descriptor, which stays open) that nobody has open, whatever their type is, and whether anybody listens or not. Nobody may be
 * putting a new one in the place of such a one at that moment. Names that begin with a dot, and what is no socket, stay. */
void dead_sockets_remove(int dir);

#endif
