/*
 * What happens when a page of guest memory that a file is mapped at (mem_map_file) cannot be read: an I/O error, or the file was cut off.
 *
 * A guest's access comes back as an error of KVM_RUN, which stops the VM. An access of the VMM itself is a SIGBUS in whatever thread it is, and there is
 * nothing to go on with: zeroes in place of the page could end up on a disk. So the process says which file it was and ends, as a kill -9
 * would end it; disks and store survive that.
 */
#ifndef VMCP_VMM_MEMORY_GUARD_H
#define VMCP_VMM_MEMORY_GUARD_H

#include "base/err.h"

/* Installs the handler of SIGBUS. For the process of a VM; again does no harm. */
int memory_guard_install(struct err *err);

#endif
