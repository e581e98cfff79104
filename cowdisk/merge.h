/*
 * Merging layers of a chain, and writing a chain out as one file.
 *
 * A merge puts together what a run of sealed layers holds, from one named layer downwards, in a new file that stands on what the lowest of
 * them stood on. That file then takes the name of the topmost one, by rename: whoever names it as backing file, an overlay above or a running VM
 * that opens it later, reads the same as before. No layer is ever changed in place; the other files of the run are left to the caller, who
 * removes them when nobody else stands on them.
 *
 *     prepare   new file beside the topmost layer, durable                     may take long; any failure leaves no trace
 *     commit    rename, folder synced                                          the commit point
 *     adopt     a running disk turns to the new file, by pointers              saves files and space; without it all goes on as it was
 *
 * A crash before the commit leaves the temporary file, PATH.vmcp-merge, which the next merge of that layer removes.
 */
#ifndef VMCP_COWDISK_MERGE_H
#define VMCP_COWDISK_MERGE_H

#include "cowdisk/block.h"

/* Now and then, from the thread that called. */
typedef void cow_progress_fn(void *opaque, uint64_t done_bytes, uint64_t total_bytes);

struct cow_merge {
	const char *path;	   /* the topmost layer of the run: a qcow2 file that nobody writes */
	unsigned layers;	   /* of the run, at least 1; the lowest may be the base of the chain, and then may be raw */
	uint64_t bytes_per_second; /* of data copied, 0: no limit */
	const volatile bool *cancel; /* turning true ends it with -ECANCELED; NULL: never */
	cow_progress_fn *progress;   /* NULL: none. The bytes are those of the virtual disk */
	void *opaque;
};
struct cow_merged;

/*
 * Writes the merged file. Sparse: what no layer of the run has stays a hole, zeroes stay zero clusters, data that are all zero become such. Refuses
 * (ENOTSUP) layers with internal snapshots or bitmaps, which would be lost. One merge of a layer at a time: the caller sees to that. Any
 * thread but one that serves a ring.
 */
int cow_merge_prepare(const struct cow_merge *merge, struct cow_merged **out, struct err *err);
const char *cow_merged_path(const struct cow_merged *merged); /* of the temporary file, for checksums before the commit */
uint64_t cow_merged_data_bytes(const struct cow_merged *merged); /* copied */
/* Renames. -ESTALE if another file has taken the layer's name since. An error of the sync behind the rename leaves the merged file in place: what
 * counts is whether cow_merged_path still exists. */
int cow_merge_commit(struct cow_merged *merged, struct err *err);
/*
 * After the commit: a disk of this process, whose chain goes through the merged layers, turns to the merged file. Requests go on meanwhile. -ESTALE
 * if its chain does not (any more), or not all of the layers are sealed: nothing has changed then. Any thread but a parked loop's parker; the work
 * on the disk is done in its I/O thread.
 */
int cow_merge_adopt(const struct cow_merged *merged, struct cow_disk *disk, struct err *err);
/*
 * Turns a running disk to what *other* processes have merged below it since it was opened: where a name in its chain leads to another file by now, which
 * stands on an image of the chain. *turned: how many. Any thread, as cow_merge_adopt.
 */
int cow_merge_follow(struct cow_disk *disk, unsigned *turned, struct err *err);
/* Not committed: removes the temporary file. NULL is allowed. */
void cow_merge_free(struct cow_merged *merged);

struct cow_export {
	const char *source; /* an image, with its chain */
	bool source_is_raw; /* whatever it begins with, which may be a guest's choice */
	const char *path;   /* must not exist; a failed export leaves nothing there */
	enum cow_format format;
	uint32_t cluster_bytes; /* qcow2; 0: 65536 */
	const char *password;	/* of a source that is encrypted; else NULL */
	uint64_t bytes_per_second;
	const volatile bool *cancel;
	cow_progress_fn *progress;
	void *opaque;
};
/*
 * Writes a chain as one file without a backing file: sparse, durable on return. Any thread but one that serves a ring.
 *
 * The source may also be an image that is not run: qcow of version 1, or one of versions 1 and 2 that is encrypted with AES, without a backing
 * file. That format cannot tell a wrong password: what comes out is noise then. They are read in a child process; bytes_per_second does not count.
 */
int cow_export(const struct cow_export *e, struct err *err);

#endif
