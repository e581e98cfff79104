/*
 * Block interface: asynchronous requests on a disk image (qcow2 or raw, with its backing chain).
 *
 * A cow_io is one io_uring with its completion eventfd, served by one thread (the I/O thread). All cow_* functions that take a disk run in
 * that thread, unless said otherwise; a disk belongs to one cow_io. Requests complete through their callback, in that thread, never from
 * within the submitting call. Requests that overlap and are in flight together have no order, as on hardware.
 */
#ifndef VMCP_COWDISK_BLOCK_H
#define VMCP_COWDISK_BLOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"
#include "base/event.h"

#define COW_SECTOR_BYTES 512u
#define COW_MAX_IOV 256u

struct cow_io;
struct cow_disk;

enum cow_op { COW_READ, COW_WRITE, COW_FLUSH, COW_DISCARD, COW_WRITE_ZEROES };

struct cow_request;
/* result: 0, or -errno (EIO, ENOSPC, ...). The request may be reused or freed from here on. */
typedef void cow_done_fn(struct cow_request *request, int result);

/* The caller's; must stay in place until done. The fields before `done` are set by the caller, the rest is cowdisk's. */
struct cow_request {
	enum cow_op op;
	bool may_unmap;		/* COW_WRITE_ZEROES: the range may be deallocated */
	uint64_t offset;	/* bytes; a multiple of 512 */
	uint64_t length;	/* bytes; a multiple of 512; the sum of the iov for reads and writes */
	const struct iovec *iov; /* guest memory or any other; must stay valid until done */
	unsigned iov_count;
	cow_done_fn *done;
	void *opaque;
	/* private to cowdisk */
	struct cow_disk *disk;
	struct cow_request *prev, *next; /* the disk's list of requests in flight */
	void *work;
};

/* The ring is added to `loop`, whose thread is the I/O thread; NULL: only the synchronous forms below serve it. No io_uring on this host: falls back to threads, same contract. */
int cow_io_create(struct loop *loop, struct cow_io **out, struct err *err);
void cow_io_destroy(struct cow_io *io); /* nothing in flight, no disk open */

enum { COW_OPEN_READONLY = 1, COW_OPEN_NO_LOCK = 2 /* checkers and tests only */ };
enum cow_format { COW_FORMAT_RAW, COW_FORMAT_QCOW2 };

/*
 * Opens an image and its backing chain (relative names are relative to the file that names them; a loop, a missing file, a
 * chain longer than 1024 are errors that name the file). Format by content: qcow2 magic, else raw, except that a backing file named with
 * a format in the header is opened as that format. Takes QEMU's OFD lock bytes: shared "consistent read" on all, exclusive "write" on the top
 * unless read-only; -EBUSY, ERR_STATE if somebody holds them. Everything in the files is untrusted. Synchronous. Any thread.
 * Who writes to a raw image so opened may be a guest, which is not to choose what is opened the next time: a write that puts qcow2's magic at its beginning is -EPERM.
 */
int cow_open(struct cow_io *io, const char *path, unsigned flags, struct cow_disk **out, struct err *err);
/* With the format given, not looked for (-1: as above). */
int cow_open_as(struct cow_io *io, const char *path, int format, unsigned flags, struct cow_disk **out, struct err *err);
/* Waits for nothing: no request may be in flight. Writes back metadata (so that a clean close loses nothing), closes the chain. */
int cow_close(struct cow_disk *disk, struct err *err);

uint64_t cow_size(const struct cow_disk *disk); /* bytes of the virtual disk, a multiple of 512 */
enum cow_format cow_format_of(const struct cow_disk *disk);
bool cow_is_readonly(const struct cow_disk *disk);
uint32_t cow_cluster_bytes(const struct cow_disk *disk); /* 4096 for raw */
const char *cow_path(const struct cow_disk *disk);	 /* of the top image as opened */

/* Starts a request. Bad ranges complete with -EINVAL, writes to a read-only disk with -EROFS. Never fails itself. */
void cow_submit(struct cow_disk *disk, struct cow_request *request);
/*
 * Between the two, the operations of several requests gather and go to the kernel together: for callers that submit more than one, such as
 * a queue that was kicked. Optional; nests. I/O thread.
 */
void cow_io_plug(struct cow_io *io);
void cow_io_unplug(struct cow_io *io);
/* The ring that serves a disk. */
struct cow_io *cow_disk_io(const struct cow_disk *disk);
/*
 * The ring works in turns, of which each runs callbacks of all requests that have ended. A callback may ask for fn to be called once at the end of its turn,
 * which is before the loop may park: for what is done once for all of them. Asked for outside a turn: at the end of the next. I/O thread.
 */
struct cow_turn {
	void (*fn)(struct cow_turn *turn); /* the caller's; the rest is cowdisk's, 0 at first */
	bool queued;
	struct cow_turn *next;
};
void cow_io_at_turn_end(struct cow_io *io, struct cow_turn *turn); /* nothing if it was asked for already */
void cow_io_cancel_turn(struct cow_io *io, struct cow_turn *turn);
/* Number of requests submitted and not yet done. */
unsigned cow_inflight(const struct cow_disk *disk);

/* Synchronous forms for tools and tests: run the ring until done. Only while no loop serves the ring. */
int cow_read_sync(struct cow_disk *disk, uint64_t offset, void *data, size_t length, struct err *err);
int cow_write_sync(struct cow_disk *disk, uint64_t offset, const void *data, size_t length, struct err *err);
int cow_flush_sync(struct cow_disk *disk, struct err *err);

/*
 * Makes the disk larger, durable on return; what is new reads as zeroes. A qcow2 image's table moves if it must. Making it smaller would lose data: -EINVAL.
 * No request in flight, no loop served by another thread: for tools.
 */
int cow_resize(struct cow_disk *disk, uint64_t size_bytes, struct err *err);

struct cow_create {
	uint64_t size_bytes;	    /* 0 with a backing file: its size */
	uint32_t cluster_bytes;	    /* 0: 65536 */
	const char *backing;	    /* name to be written into the header, NULL if none */
	enum cow_format backing_format;
	bool temporary; /* it gets another name, by whom the folder is then synced */
};
/* Makes a new, empty qcow2 v3 file at `path` (must not exist), durable on return (file and folder synced). Any thread. */
int cow_create(const char *path, const struct cow_create *create, struct err *err);
/* Makes a raw file. */
int cow_create_raw(const char *path, uint64_t size_bytes, struct err *err);

#endif
