/*
 * Checkpoints that travel: one stream that stands alone, or, with `since`, one that needs a checkpoint which the other side has. docs/format.md
 * ("Export") specifies every byte. Written and read in one pass, so that a pipe can carry it.
 *
 * Threads: any but one that serves an I/O ring; several calls at once, also on one store handle.
 */
#ifndef VMCP_CHECKPOINT_STORE_TRANSFER_H
#define VMCP_CHECKPOINT_STORE_TRANSFER_H

#include "checkpoint/store/store.h"

#define TRANSFER_MAX_DISKS 26

/* A disk of a machine, as its configuration has it. */
struct transfer_disk {
	char name[STORE_NAME_BYTES];
	char *path; /* malloc; of the present image, or, for an import, where it shall be. NULL: not known */
	bool readonly;
};

/* What an imported checkpoint's configuration must become. */
struct transfer_place {
	const char *vm; /* its name here */
	uint64_t memory_bytes;
	uint32_t cpus;
	const struct transfer_disk *disks; /* all of its disks, with their paths here */
	uint32_t disk_count;
	const char *base_config; /* of the checkpoint here that it stands on: host paths in it are ours. NULL: none */
};

/* How a machine's configuration is understood: given by those who know, as the store only keeps it. */
struct transfer_config {
	/* All disks of it, at most TRANSFER_MAX_DISKS; paths are the caller's to free. The text is untrusted: -EINVAL, ERR_DAMAGED. */
	int (*list_disks)(const char *what, const char *text, struct transfer_disk *disks, uint32_t *count, struct err *err);
	/* The text for this host: no path that it came with is left. Appends to *out, with a NUL. It must fit the place: -EINVAL, ERR_DAMAGED. */
	int (*place)(const char *what, const char *text, const struct transfer_place *place, struct buf *out, struct err *err);
};

/* Now and then, from any thread, one at a time. Bytes of memory and disks as the guest sees them. */
typedef void transfer_progress_fn(void *opaque, uint64_t done_bytes, uint64_t total_bytes);

/* What a user keeps secret: a passphrase, or random bytes. */
struct transfer_key {
	const void *data;
	size_t bytes; /* at least 1 */
	unsigned log_n; /* of scrypt, when encrypting: 0: as it should be; tests take less */
};

struct transfer_options {
	const struct transfer_config *config;
	/* Export: encrypt the stream (AES-256-GCM; the key by scrypt). Import: it must be encrypted, with this key. NULL: it is not. */
	const struct transfer_key *key;
	uint64_t max_rate;	     /* of the stream, bytes a second; 0: as fast as it goes */
	const volatile bool *cancel; /* turning true ends it with -ECANCELED; NULL: never */
	transfer_progress_fn *progress; /* NULL: none */
	void *opaque;
};

struct transfer_result {
	char id[STORE_ID_BYTES];
	char vm[STORE_NAME_BYTES]; /* import: its name here */
	char tag[STORE_NAME_BYTES];
	char since[STORE_ID_BYTES]; /* "" for a whole one */
	uint64_t stream_bytes;	    /* of the file or pipe */
	uint64_t content_bytes;	    /* the same, uncompressed */
	uint64_t pages;		    /* in the stream, with content */
	uint64_t disk_bytes;	    /* the same */
	uint64_t resumed_bytes;	    /* export: that an earlier attempt had left */
	bool present;		    /* import: it was there already, nothing was changed */
	uint64_t shared_pages;	    /* import: that the store had already */
};

/* Writes checkpoint `id` to a descriptor (a pipe, usually). since: a checkpoint of the same size of memory, or NULL. Holds both meanwhile.
 * Checksums of memory and state are checked on the way: ERR_DAMAGED. */
int transfer_export(struct store *store, const char *id, const char *since, int fd, const struct transfer_options *options,
		    struct transfer_result *result, struct err *err);
/*
 * The same to a file, which must not exist (-EEXIST, ERR_STATE) and comes into being whole and durable: PATH.part, synced, renamed. An error or
 * cancel removes PATH.part, unless `resume`: then it stays, and what an earlier attempt for the same checkpoint left there is gone on with, as
 * far as its chunks are whole, and with a key only if it was begun with `resume`. Another key: -EKEYREJECTED, and it stays as it is.
 */
int transfer_export_file(struct store *store, const char *id, const char *since, const char *path, bool resume,
			 const struct transfer_options *options, struct transfer_result *result, struct err *err);

/*
 * Reads a stream to its end and makes the checkpoint that is in it: same id, tag and message, memory and disks as layers of their own or on those
 * of its parent, where that is here. Commits only when all was read and checked: before that a failure, or a death of this process, leaves nothing.
 * vm: the name to keep it under, NULL: its own. `what` names the stream in errors. store NULL: only checks the stream. Everything in it is
 * untrusted: ERR_DAMAGED; -ENOENT, ERR_NOT_FOUND: it needs a checkpoint that is not here; -EEXIST, ERR_STATE: another VM, or another
 * checkpoint, has that name or id; -EKEYREJECTED: it was encrypted with another key. A tag that is taken is left out (result->tag "").
 */
int transfer_import(struct store *store, int fd, const char *what, const char *vm, const struct transfer_options *options,
		    struct transfer_result *result, struct err *err);

#endif
