/*
 * Images of old that vmcp does not run and only writes out anew: qcow of version 1, and qcow of versions 1 and 2 with AES.
 *
 * libqcow reads them, in a process of its own: it trusts what a file says, and what a bad one does to it ends there.
 */
#ifndef VMCP_COWDISK_LEGACY_INTERNAL_H
#define VMCP_COWDISK_LEGACY_INTERNAL_H

#include "cowdisk/merge.h"

struct legacy {
	uint32_t version;
	bool encrypted;
	uint64_t size_bytes;
};

/* 1: it is one; 0: it is not, or cannot be read as one; -errno. */
int legacy_recognise(const char *path, struct legacy *out, struct err *err);
/* As cow_export. */
int legacy_export(const struct cow_export *e, const struct legacy *image, struct err *err);

#endif
