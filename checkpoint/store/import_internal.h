/* What the files of an import share. */
#ifndef VMCP_CHECKPOINT_STORE_IMPORT_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_IMPORT_INTERNAL_H

#include "checkpoint/store/transfer_internal.h"
#include "cowdisk/map.h"

struct import_memory {
	char layer[STORE_ID_BYTES];
	int fd, sums_fd; /* -1: none */
	uint64_t pages;	 /* of the machine */
	uint64_t next;	 /* where runs may go on */
	uint64_t places; /* pages in the layer so far */
	/* bitmaps and sums by page; NULL where nothing is written */
	uint64_t *seen, *scope, *saved, *zero;
	uint64_t *sums;
	uint8_t *before; /* RESTORE_CHUNK_PAGES pages of the base */
	struct seal_pages *cipher; /* of the layer, in an encrypted store; with it: */
	uint8_t *sealed;	   /* RESTORE_CHUNK_PAGES pages */
};

struct import_disk {
	bool made;
	char *path; /* where it is being made */
	char layer[STORE_ID_BYTES];
	uint64_t next;		       /* where runs may go on */
	struct cow_disk *disk, *before; /* before: the base's, NULL: none; the new one stands on it */
};

struct import {
	struct store *store; /* NULL: only checked */
	const struct transfer_options *options;
	const char *what;
	const char *wanted_vm; /* NULL: its own name */
	struct transfer_result *result;
	/* owner: the producing thread */
	struct transfer_io in;
	struct transfer_ledger ledger;
	uint8_t end[TRANSFER_END_BYTES]; /* what the last chunk must hold; written before it is put */
	/* owner: the consuming thread */
	uint32_t kind; /* of the last chunk */
	struct buf head_text, manifest, state;
	struct transfer_head head;
	struct store_checkpoint checkpoint;
	bool begun, whole;
	bool has_base;
	struct transfer_side base;
	struct store_draft *draft; /* NULL while nothing is made */
	struct import_memory memory;
	struct cow_io *io;
	uint32_t disk; /* the one that is under way */
	struct import_disk disks[TRANSFER_MAX_DISKS];
	uint8_t *disk_before; /* TRANSFER_DATA_BYTES of the base's */
	uint64_t done_bytes, total_bytes;
};

/* import_begin.c: when head, manifest and state are there: checks them, finds the base, makes the draft. */
int import_begin(struct import *im, struct err *err);
/* What the checkpoint is here: layers and index known, the configuration placed. */
int import_finish_manifest(struct import *im, struct err *err);

/* import_memory.c */
int import_memory_begin(struct import *im, struct err *err);
int import_memory_chunk(struct import *im, const uint8_t *content, size_t length, struct err *err);
/* Writes checksums and index, and what they say into the manifest. */
int import_memory_finish(struct import *im, struct err *err);
void import_memory_free(struct import_memory *m);

/* import_disk.c */
int import_disk_chunk(struct import *im, const uint8_t *content, size_t length, struct err *err);
/* Those that nothing was said of, too. */
int import_disks_finish(struct import *im, struct err *err);
void import_disks_close(struct import *im);

#endif
