/* What the files of an export share. */
#ifndef VMCP_CHECKPOINT_STORE_EXPORT_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_EXPORT_INTERNAL_H

#include "checkpoint/store/transfer_internal.h"
#include "cowdisk/map.h"

/* Where a stream goes on: behind what its last whole chunk says. */
struct export_position {
	bool started;	   /* something of memory or disks is there */
	uint64_t page;	   /* of memory, the next; all of it if a disk has begun */
	uint32_t disk;	   /* the disk that is under way */
	uint64_t offset;   /* in it, the next byte */
};

struct export {
	struct store *store;
	const struct transfer_options *options;
	struct transfer_side own, since; /* since: only if head.since says so */
	struct transfer_head head;
	struct buf head_text, manifest, state;
	struct transfer_disk disks[TRANSFER_MAX_DISKS]; /* as the configuration has them */
	uint32_t disk_count;
	char *images[TRANSFER_MAX_DISKS], *since_images[TRANSFER_MAX_DISKS]; /* by number in the head; NULL: none */
	uint64_t total_bytes, done_bytes;
	bool resume;
	struct export_position from; /* where to begin: all zero for the beginning */
	struct transfer_mark mark;   /* of the file, where that is */
	/* owner: the producing thread */
	struct transfer_pipe *pipe;
	struct transfer_slot *slot; /* being filled with runs, or NULL */
	struct transfer_runs runs;
	uint32_t kind; /* of it */
	uint32_t next_number;
	/* owner: the consuming thread, but for what was read before it began */
	struct transfer_io out;
	struct transfer_ledger ledger;
	struct transfer_result *result;
};

/* export_parts.c: the producer. */
int export_produce(struct transfer_pipe *pipe, void *opaque, struct err *err);

/* export_resume.c: reads what an earlier attempt left in the file, checks it, cuts off what cannot be used. On success
 * the file, the ledger and x->from are where the stream goes on, which may be the beginning. */
int export_resume(struct export *x, int fd, const char *path, struct err *err);

#endif
