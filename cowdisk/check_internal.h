/* What check.c finds out about a file, for repair.c too. */
#ifndef VMCP_COWDISK_CHECK_INTERNAL_H
#define VMCP_COWDISK_CHECK_INTERNAL_H

#include "cowdisk/check.h"
#include "cowdisk/image_internal.h"

struct checker {
	int fd;
	uint64_t file_bytes;
	struct qcow2_header header;
	struct qcow2_extensions extensions;
	uint64_t cluster; /* bytes */
	uint64_t *reftable;
	uint64_t blocks;      /* entries of it */
	uint64_t *references; /* cluster numbers, sorted in the end */
	size_t count, capacity;
	uint8_t *block; /* the block read last */
	uint64_t block_index;
	uint64_t *l2;
	struct cluster_set seen; /* reference count blocks */
	bool incomplete;	 /* there are tables that could not be followed: more may be in use than is noted */
	struct cow_check *out;
};

/* Opens and locks the file. On failure nothing is open. */
int cow_checker_open(struct checker *c, const char *path, bool writable, struct cow_check *out, struct err *err);
/* Notes everything that is referred to, sorted; the reference count structures too, if `counts`. Loads the table of these in any case. */
int cow_checker_collect(struct checker *c, bool counts, struct err *err);
void cow_checker_close(struct checker *c);
/* The count in the file; *there = false if no block holds it. */
int cow_checker_count(struct checker *c, uint64_t cluster, uint64_t *out, bool *there, struct err *err);

#endif
