/*
 * One image file of a disk's chain, the disk itself, and what the qcow2 files do for each other.
 *
 * Invariants of a qcow2 file that this engine writes, at every instant, a crash included. Tests cite the numbers.
 *   I1  What the tables reach is counted: a cluster's reference count, and the block that holds it, are on stable
 *       storage before any entry that points to the cluster is written. A count may be too high (a leak), never too low.
 *   I2  A cluster's data are on stable storage before the entry that points to it is written.
 *   I3  A count is lowered only when the entry that pointed to the cluster is gone from stable storage, and the
 *       cluster is used again only when no request that may have seen that entry is under way.
 *   I4  A flush that ended well has everything on stable storage that was complete when it began.
 *
 * Threads: everything here belongs to the I/O thread. An image that is not yet part of a disk belongs to whoever
 * opened it.
 */
#ifndef VMCP_COWDISK_IMAGE_INTERNAL_H
#define VMCP_COWDISK_IMAGE_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/bytes.h"
#include "base/err.h"
#include "cowdisk/block.h"
#include "cowdisk/io_internal.h"
#include "cowdisk/qcow2_format_internal.h"

struct cow_overlay;
struct work;
struct alloc;
struct slice;
struct slice_cache;
struct round;
struct resolved;
struct retired;

/* Requests that wait for something; first come, first served. */
struct wait_list {
	struct work *head, *tail;
};

/* Somebody who waits for a round of metadata (flush) to end. */
struct flush_wait {
	struct flush_wait *next;
	void (*done)(struct flush_wait *wait, int result); /* NULL: nobody, the round is for its own sake */
	const struct image *guest; /* it is a flush of the guest: the layer that it belongs to; else NULL */
};

/* A table of 64-bit big-endian entries that is wholly in memory: L1, reference count table. Entries in host order. */
struct table {
	uint64_t *entries;
	uint64_t count;
	uint64_t offset; /* in the file */
	uint8_t *dirty;	 /* one per TABLE_SECTOR entries */
	uint64_t dirty_count;
};
#define TABLE_SECTOR 64u /* entries in 512 bytes */

/* Clusters whose references are gone from memory, and perhaps from the file. */
struct free_range {
	uint64_t cluster, count;
	uint64_t sequence; /* of the last request that may have seen the reference */
	bool punch;	   /* give the space back to the file system */
	bool metadata;
};
struct free_list {
	struct free_range *ranges;
	size_t count, capacity;
};

/* A set of cluster numbers (hashed): where metadata is, so that data never goes there, whatever a damaged table
 * says. */
struct cluster_set {
	uint64_t *slots; /* number + 1, 0 is empty */
	size_t used, capacity;
};

/* The state of a qcow2 file beyond its header. */
struct qcow2 {
	struct qcow2_header header;
	unsigned l2_bits; /* log2 of the entries of an L2 table */
	uint32_t slice_bytes;
	struct table l1, reftable;
	uint64_t reftable_clusters;
	bool header_dirty; /* the reference count table has moved */
	bool growing;
	uint64_t free_hint;   /* no free cluster is known below this one */
	uint64_t end_cluster; /* first cluster beyond everything known */
	uint64_t fresh_from;  /* bytes; from here on nothing was ever written: reads as zeroes */
	struct cluster_set metadata;
	uint64_t slice_count;	    /* in the cache */
	struct slice *dirty_slices; /* list through slice.dirty_next */
	uint64_t dirty_bytes;
	struct alloc *allocs; /* allocating writes under way */
	struct wait_list throttled;
	struct free_list frees_new;	   /* unlinked in memory */
	struct free_list frees_committing; /* the round under way makes the unlinking durable */
	struct free_list frees_ready;	   /* durable, waiting for requests that may still look there */
	unsigned punching;
	/* The compressed cluster that was read last; key is its L2 entry. */
	uint64_t unpacked_entry;
	uint8_t *unpacked;
};

struct image {
	struct cow_io *io;
	struct cow_disk *disk; /* NULL while prepared */
	struct image *backing;
	char *path;
	int fd;
	dev_t device;
	ino_t inode;
	enum cow_format format;
	bool readonly; /* opened so */
	bool sealed;   /* never changes (any more); all but the top one, and what is still being sealed */
	bool fixed;    /* sealed, and so is everything below: the map of resolve.c may speak of it */
	bool guarded;  /* raw by what it begins with: that may not become another format's beginning, as what is opened next time would be what the guest names */
	bool refused;  /* and such a write was told of */
	bool write_locked;
	bool damaged;		       /* found wrong while running: nothing more is allocated */
	uint64_t size;		       /* of the virtual disk in bytes */
	uint64_t generation;	       /* position in the chain, the base is 0 */
	char *backing_name;	       /* as in the header, NULL if none */
	int backing_format;	       /* enum cow_format, or -1 if the header names none */
	_Atomic unsigned inflight;     /* requests that belong to this layer; written by the I/O thread */
	_Atomic bool touched;	       /* a request that may change it was submitted since it was made; written by the I/O thread */
	uint64_t writes;	       /* writes that ended: counted up */
	uint64_t synced;	       /* so many of `writes` are on stable storage */
	struct round *round;	       /* metadata on its way to the file, NULL if none */
	struct flush_wait *flush_next; /* for the next round */
	int lost_error;		       /* of a round that the guest was not told of: its next flush reports it */
	int unsealable;		       /* the same, told to a flush that was issued after the switch: a guest that goes back would never hear of it */
	struct cow_overlay *seal;      /* who waits until this layer is sealed */
	struct qcow2 q;		       /* COW_FORMAT_QCOW2 only */
};

struct cow_disk {
	struct cow_io *io;
	struct image *top;
	unsigned flags;			  /* of cow_open */
	uint64_t size;			  /* multiple of 512 */
	_Atomic unsigned length;	  /* images in the chain; written by the I/O thread, or while it is parked */
	struct cow_request *first, *last; /* in flight, in order of submission */
	unsigned inflight;
	uint64_t sequence;	      /* of the last request */
	bool unflushed;		      /* the last request that is no read was no flush either */
	unsigned flushed_alone;	      /* so many writes in a row, FLUSHED_ALONE at most, were each followed by a flush */
	struct cow_overlay *overlays; /* switched to, not yet sealed */
	struct resolved *resolved;    /* NULL until needed */
	struct retired *retired;      /* layers that a merge has put out of the chain */
};

/* image.c: one file. */

/* Opens, checks, locks. Not its backing file. writable: also clears unknown autoclear bits. Any thread. */
int cow_image_open(struct cow_io *io, const char *path, int format, bool writable, bool lock, struct image **out,
		   struct err *err);
/* Closes without writing anything. In the I/O thread if the image ever was part of a disk. NULL is allowed. */
void cow_image_free(struct image *image);
/* The only place that opens image files (O_DIRECT will be decided here). */
int cow_image_open_fd(const char *path, bool writable, struct err *err);

/* chain.c */

/* Opens what lies behind `top`, downwards. -ESTALE: a file of the chain was replaced meanwhile, as a merge does; begin again with the top. */
int cow_chain_open(struct image *top, bool lock, struct err *err);
void cow_chain_free(struct image *top);
/* Malloced path of `name` as named by the file `referrer`. -ENOTSUP for what is no file. */
int cow_resolve_name(const char *referrer, const char *name, char **out, struct err *err);

/* It and all below it are sealed. I/O thread. */
bool cow_image_is_fixed(struct image *image);

enum map_kind {
	MAP_HOLE,      /* not in this layer */
	MAP_ZERO,      /* reads as zeroes, no space */
	MAP_ZERO_HOST, /* reads as zeroes, has space */
	MAP_DATA,
	MAP_COMPRESSED, /* one cluster at most */
};
struct mapping {
	enum map_kind kind;
	bool copied;	 /* the space is this layer's alone: may be written in place */
	uint64_t host;	 /* file offset of the first byte (MAP_DATA, MAP_ZERO_HOST) */
	uint64_t length; /* bytes for which this holds, at least 1 */
	uint64_t entry;	 /* MAP_COMPRESSED: the L2 entry */
};
/* What the first bytes of the range are in one layer. The range lies within the image. */
int cow_image_map(struct image *image, uint64_t offset, uint64_t length, struct mapping *out);
/* The same through the chain from `image` down; never MAP_HOLE. *owner: the layer that says so, to which host and entry
 * refer; NULL where all have a hole (MAP_ZERO). */
int cow_chain_map(struct image *image, uint64_t offset, uint64_t length, struct image **owner, struct mapping *out);
/* 1 if the range surely reads as zeroes, 0 if perhaps not, -errno. */
int cow_chain_is_zero(struct image *image, uint64_t offset, uint64_t length);

/* resolve.c */

/* What cow_chain_map says of `root`, which is fixed, and has a backing file; from memory if it was asked before. */
int cow_resolve(struct cow_disk *disk, struct image *root, uint64_t offset, uint64_t length, struct image **owner,
		struct mapping *out);
/* The chain has changed other than by a new top. */
void cow_resolved_forget(struct cow_disk *disk);

/* lock.c: QEMU's lock bytes. */
int cow_lock_take(int fd, bool write, const char *path, struct err *err);
void cow_lock_drop_write(int fd); /* keeps the lock of a reader */
void cow_lock_drop(int fd);

/* qcow2_header.c */
struct qcow2_extensions {
	char *backing_name;
	int backing_format;
	uint32_t bitmap_count;
	uint64_t bitmap_directory_offset, bitmap_directory_bytes;
};
/* Reads and checks header and extensions; strings are malloced. Nothing beyond the header is looked at. */
int qcow2_read_header(int fd, uint64_t file_bytes, struct qcow2_header *out, struct qcow2_extensions *extensions,
		      struct err *err);
/* 0, or why this file cannot be written. */
int qcow2_check_writable(const struct qcow2_header *header, struct err *err);
int qcow2_clear_autoclear(int fd, struct qcow2_header *header, struct err *err);

/* qcow2_open.c */
int qcow2_open(struct image *image, uint64_t file_bytes, bool writable, struct err *err);
void qcow2_close(struct image *image);
/* Reads `count` big-endian entries. */
int qcow2_read_entries(int fd, uint64_t offset, uint64_t count, uint64_t *entries, struct err *err);

/* qcow2_cache.c: slices (up to 4 KiB) of L2 tables and reference count blocks, shared by all disks of a ring. */
struct slice {
	struct slice *hash_next;
	struct slice *lru_prev, *lru_next;     /* on the list unless dirty or writing */
	struct slice *dirty_prev, *dirty_next; /* the image's list, if dirty */
	struct image *image;
	uint64_t offset;
	bool dirty;
	bool counts;  /* holds reference counts, else L2 entries */
	bool writing; /* a round has a copy of it under way: must stay in memory */
	uint8_t data[];
};
struct slice_cache *slice_cache_create(void);
void slice_cache_destroy(struct slice_cache *cache);
/* The slice at `offset`, read if need be. Valid until the next call that takes a slice, unless it is dirty. */
int slice_get(struct image *image, uint64_t offset, bool counts, struct slice **out);
void slice_mark_dirty(struct slice *slice);
/* A round has taken a copy / has ended. */
void slice_begin_write(struct slice *slice);
void slice_end_write(struct slice *slice, bool written);
/* Forgets all slices in the range (metadata that is no more). */
void slice_drop(struct image *image, uint64_t offset, uint64_t length);
void slice_drop_image(struct image *image);

/* qcow2_table.c: L1 and L2. */
int qcow2_map(struct image *image, uint64_t offset, uint64_t length, struct mapping *out);
/* Makes sure that the L2 table for `offset` exists and may be changed. */
int qcow2_prepare_l2(struct image *image, uint64_t offset);
/* Points `count` guest clusters from `offset` on to consecutive clusters from `host` on; what they were is freed.
 * One slice at most. */
int qcow2_link(struct image *image, uint64_t offset, uint64_t host, uint64_t count);
/* How many clusters from `offset` on share its slice (so: may go to one qcow2_link or qcow2_clear). */
uint64_t qcow2_slice_clusters(const struct image *image, uint64_t offset);
/* Makes `count` guest clusters (of one slice) read as zeroes. keep: where there is space it stays. */
int qcow2_clear(struct image *image, uint64_t offset, uint64_t count, bool keep);
/* Bytes from `offset` on for which there is no L2 table; 0 if there is one. */
uint64_t qcow2_missing_l2(const struct image *image, uint64_t offset);
void table_mark_dirty(struct table *table, uint64_t index);

/* qcow2_refcount.c */
int qcow2_get_refcount(struct image *image, uint64_t cluster, uint64_t *out);
/* The count at `index` of a block, or of a slice of one. */
uint64_t qcow2_decode_count(const uint8_t *data, unsigned order, uint64_t index);
void qcow2_encode_count(uint8_t *data, unsigned order, uint64_t index, uint64_t value);
/* More entries, zero; in memory only. */
int table_extend(struct table *table, uint64_t count);
int qcow2_set_refcount(struct image *image, uint64_t cluster, uint64_t value);
/* Makes sure that the count of `cluster` has a place. *taken: the new block was put into that very cluster. */
int qcow2_ensure_refblock(struct image *image, uint64_t cluster, bool *taken);
/* Makes a cluster that will hold metadata read as zeroes. */
int qcow2_zero_cluster(struct image *image, uint64_t cluster);

/* qcow2_alloc.c */

/* Claims 1..want consecutive clusters. *fresh: they read as zeroes. */
int qcow2_alloc(struct image *image, uint64_t want, uint64_t *first, uint64_t *got, bool *fresh);
/* Claims exactly `count` at the end of the file. */
int qcow2_alloc_run(struct image *image, uint64_t count, uint64_t *first);
/* Gives back what was never linked. */
void qcow2_unalloc(struct image *image, uint64_t first, uint64_t count);
/* Frees what was unlinked just now: when that is durable (I3). */
void qcow2_free_later(struct image *image, uint64_t first, uint64_t count, bool punch, bool metadata);
/* The round has made the unlinkings of frees_committing durable, or has failed to. */
void qcow2_frees_committed(struct image *image, bool durable);
/* Lowers the counts of frees_ready as far as that is allowed now. */
void qcow2_frees_release(struct image *image);
bool qcow2_frees_pending(const struct image *image);
void free_list_clear(struct free_list *list);
void cluster_set_add(struct cluster_set *set, uint64_t cluster);
void cluster_set_remove(struct cluster_set *set, uint64_t cluster);
bool cluster_set_has(const struct cluster_set *set, uint64_t cluster);
/* True if a byte of the range belongs to metadata. */
bool qcow2_hits_metadata(const struct image *image, uint64_t offset, uint64_t length);
/* Logs, once, what is wrong with the file, and stops allocation. Returns -EIO. */
int qcow2_damaged(struct image *image, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* qcow2_flush.c: rounds, for raw files too. */
void cow_image_flush(struct image *image, struct flush_wait *wait);
/* A write that was to be stable has failed. The kernel tells an error once, and it may be that of what the round under way has written: that fails too. */
void cow_image_sync_failed(struct image *image, int result);
/* Starts a round if much is dirty. */
void cow_image_writeback(struct image *image);
bool cow_image_throttled(const struct image *image);
/* Nothing to be written any more. */
bool cow_image_clean(const struct image *image);

/* qcow2_compressed.c: where the data of a compressed cluster is, and unpacking it. */
void qcow2_compressed_range(const struct image *image, uint64_t entry, uint64_t *offset, uint64_t *length);
int qcow2_unpack(const struct image *image, const void *packed, size_t packed_bytes, void *cluster);

/* merge.c */
void cow_retired_release(struct cow_disk *disk, bool all); /* frees what no request in flight may have seen */

/* overlay.c */
void cow_seal_progress(struct image *image);	/* a request of this layer has ended */
void cow_overlay_forget(struct cow_disk *disk); /* the disk is being closed */

static inline uint64_t image_cluster_bytes(const struct image *image)
{
	return image->format == COW_FORMAT_QCOW2 ? (uint64_t)1 << image->q.header.cluster_bits : PAGE_BYTES;
}

#endif
