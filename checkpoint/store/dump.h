/* A checkpoint's memory and registers as an ELF core file, for gdb and crash. */
#ifndef VMCP_CHECKPOINT_STORE_DUMP_H
#define VMCP_CHECKPOINT_STORE_DUMP_H

#include "checkpoint/store/store.h"

struct dump {
	const char *path;	     /* replaced if it is there */
	const volatile bool *cancel; /* turning true ends it with -ECANCELED. NULL allowed */
	/* From the caller's thread, for every megabyte or so. NULL allowed. */
	void (*progress)(void *opaque, uint64_t done_bytes, uint64_t total_bytes);
	void *opaque;
	/* results */
	uint64_t memory_bytes, written_bytes; /* zero pages are holes */
	unsigned cpus;
};

/*
 * Writes the file beside `path`, syncs it and renames it: `path` is whole or as it was. One PT_LOAD for each range of guest-physical addresses that is RAM,
 * with these as virtual and physical address; for each vCPU NT_PRSTATUS and NT_FPREGSET. Everything read is checked against its checksums: damage is
 * ERR_DAMAGED, and no file comes to be.
 */
int store_dump(struct store *store, const char *id, struct dump *dump, struct err *err);

#endif
