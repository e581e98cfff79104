/*
 * userfaultfd: write protection of one mapping, and pages that are filled in when they are missed. This file and memcow_fault.c are the
 * only ones that know the kernel's interface.
 *
 * Functions that return int give 0 or -errno. uffd_protect and uffd_release allocate nothing and may be called from any
 * thread; both retry while the kernel reports that the address space is changing.
 */
#ifndef VMCP_CHECKPOINT_UFFD_H
#define VMCP_CHECKPOINT_UFFD_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* A non-blocking userfaultfd that reports write-protect faults of memfds, those of the kernel included. Returns it, or
 * -errno (ERR_HOST and a hint). */
int uffd_open(struct err *err);
/* Registers [base, base + bytes) for write-protect faults. ERR_HOST if the mapping's kind cannot be. */
int uffd_register(int uffd, void *base, size_t bytes, struct err *err);
/* Drops the registration, and with it all protection; wakes whoever waits. */
int uffd_unregister(int uffd, void *base, size_t bytes);

/* Write-protects the pages, populated or not (as page table markers). */
int uffd_protect(int uffd, void *base, size_t bytes);
/* Takes the protection away and wakes the threads that wait for one of the pages. */
int uffd_release(int uffd, void *base, size_t bytes);

/* --- missing pages --- */

/* A non-blocking userfaultfd that reports misses in anonymous memory, those of the kernel included. As uffd_open. */
int uffd_open_missing(struct err *err);
int uffd_register_missing(int uffd, void *base, size_t bytes, struct err *err);
/* The address that the next of the threads misses; -EAGAIN if none waits now. */
int uffd_next_missing(int uffd, uint64_t *address);
/* Fills pages of a registered range, each once, and wakes who waits for them; one that is there already stays as it is. `data` NULL: zeroes. */
int uffd_fill(int uffd, void *to, const void *data, size_t bytes);

#endif
