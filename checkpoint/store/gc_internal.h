/* What collecting (gc.c) and merging (chains.c, merge.c) share: the layers that are there, and who needs them. */
#ifndef VMCP_CHECKPOINT_STORE_GC_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_GC_INTERNAL_H

#include <sys/stat.h>

#include "checkpoint/store/store_internal.h"

struct layer {
	char name[STORE_ID_BYTES + 8]; /* of the file */
	char id[STORE_ID_BYTES];
	dev_t device;
	ino_t inode;
	nlink_t links;
	uint64_t bytes; /* occupied */
	bool disk, needed, named;
	bool making; /* a draft's: it may have no header yet */
	int format; /* of a disk layer, by its name: a raw one stands on nothing, whatever a guest has written to its beginning */
};

struct collection {
	struct store *store;
	struct layer *list; /* sorted by name */
	size_t count;
	uint64_t forgotten; /* entries of the catalogue without a checkpoint */
	void *opaque;	    /* for a collection_image_fn */
};

/* Fills in the list, and `named` (and with it `needed`) for what checkpoints and drafts name. The caller frees the list. */
int collection_judge(struct collection *g, struct err *err);
/* NULL: it is no disk layer. */
struct layer *collection_at(struct collection *g, const struct stat *st);
/* Every image that may stand on layers. The function frees `path`; the file may be missing. */
typedef int collection_image_fn(struct collection *g, char *path, struct err *err);
int collection_each_image(struct collection *g, collection_image_fn *fn, struct err *err);

/*
 * Locks on <store>/layers.lock, one byte each; they end with the descriptor that is returned. -EBUSY, ERR_STATE: somebody has it, unless `wait`.
 *   LAYERS_MERGE   who merges disk layers. Held for long
 *   LAYERS_SHAPE   who removes disk layers, or puts a merged one in place. Held for moments. Inside LAYERS_MERGE
 */
enum layers_lock { LAYERS_MERGE = 0, LAYERS_SHAPE = 1 };
int layers_lock(struct store *store, enum layers_lock which, bool wait, struct err *err);

#endif
