/*
 * Reading everything that checkpoints need, and checking it: manifests, states, indices, the pages of memory layers and disk layers down to
 * their bases. Each file is read once for all checkpoints that need it, by several threads. Nothing is written.
 *
 * Works while VMs run and other processes take and remove checkpoints: one that goes away meanwhile is left out. What looks damaged is looked
 * at once more with its checkpoints held, so that a file that was on its way out is not mistaken for damage.
 */
#ifndef VMCP_CHECKPOINT_STORE_VERIFY_H
#define VMCP_CHECKPOINT_STORE_VERIFY_H

#include "checkpoint/store/store.h"

struct verify_options {
	unsigned threads;     /* 0: one for each processor */
	uint64_t max_rate;    /* bytes a second, over all threads; 0: as fast as it goes */
	/* From the caller's thread, some ten times a second. NULL allowed. */
	void (*progress)(void *opaque, const char *phase, uint64_t done_bytes, uint64_t total_bytes);
	void *opaque;
	const volatile bool *cancel; /* turning true ends it with -ECANCELED; NULL: never */
};

/* One damaged place, told once however many checkpoints need it. */
struct verify_damage {
	char *file;		/* relative to the store where it is in it */
	uint64_t offset, bytes; /* 0 bytes: the file as a whole */
	char *message;		/* one line: file, range, what is wrong */
	size_t checkpoints;	/* how many of those that were looked at need it */
};

struct verify_checkpoint {
	char id[STORE_ID_BYTES];
	uint64_t created_wall_ns;  /* 0, and vm "", where the manifest is damaged */
	char vm[STORE_NAME_BYTES];
	uint32_t *damages;	   /* indices into the list of damages; none: it is whole */
	size_t damage_count;
};

struct verify_result {
	struct verify_checkpoint *checkpoints; /* as asked for, all: oldest first; without those that were removed meanwhile */
	size_t checkpoint_count;
	struct verify_damage *damages;
	size_t damage_count;
	char **unrecorded; /* files that are needed but of which no checksum is recorded: base images. They were opened, not checked */
	size_t unrecorded_count;
	uint64_t files, read_bytes;
};
void verify_result_free(struct verify_result *result);

/*
 * Checks the checkpoints `ids`; NULL: all that are in the store, known to the catalogue or not. Damage is no failure: it is in *out. Fails where it cannot
 * look at all: no memory, no threads, too many open files.
 */
int store_verify(struct store *store, const char (*ids)[STORE_ID_BYTES], size_t count, const struct verify_options *options,
		 struct verify_result *out, struct err *err);

/* The same for one disk layer and what it stands on: ERR_DAMAGED, and which file it is, if they are not whole. The caller sees to it that they stay. */
int store_verify_layer(struct store *store, const struct store_disk_layer *layer, const struct verify_options *options, struct err *err);

/* The catalogue: whether SQLite finds its file sound, and whether it says of each checkpoint what the manifest says. *what: "" or one line that says what
 * is wrong first. Fails where it cannot be looked at. */
int store_verify_catalog(struct store *store, char what[512], struct err *err);

#endif
