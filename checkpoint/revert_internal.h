/* What revert.c (a machine that was just built), rewind.c (in place) and revert_node.c share. */
#ifndef VMCP_CHECKPOINT_REVERT_INTERNAL_H
#define VMCP_CHECKPOINT_REVERT_INTERNAL_H

#include "checkpoint/engine_internal.h"
#include "checkpoint/stash.h"

/* Checkpoints that are kept as they were read: those gone back to last. */
#define REVERT_NODES 4u

/*
 * A checkpoint as the way back needs it: read, checked, decoded. It stays so for the next revert as long as its manifest is the same file,
 * unchanged: the manifest has the checksums of state and index, layers never change, and what was read was checked.
 */
struct revert_node {
	struct store_stamp stamp;
	struct store_checkpoint checkpoint; /* id "": this place is free */
	struct page_index index;
	struct restore_layers layers;
	struct page_stash stash;
	struct state_set states;
	char *layer_paths[CKPT_MAX_DISKS]; /* by the engine's disks */
	uint64_t used;			   /* larger: later */
};

/* Owner: the operation under way. */
struct revert_cache {
	struct revert_node nodes[REVERT_NODES];
	uint64_t uses;
	/* For one revert at a time. */
	uint64_t *which, *late; /* bitmaps of ram pages; `late` is all zero in between */
	uint32_t pages[STASH_PAGES];
	bool changed[STASH_PAGES];
};

/* --- revert_node.c --- */
/* The checkpoint, read if it is not kept or has changed. Valid until the next call, and to the operation's end. Everything that can be refused by
 * looking at the checkpoint and the machine is, each time. */
int revert_node_get(struct ckpt_engine *engine, const char *id, struct revert_node **out, struct err *err);
/* The index of a checkpoint that is kept; else NULL. It may have been deleted since: the index still tells where its pages are from. */
const struct page_index *revert_node_index(struct ckpt_engine *engine, const char *id);
/* After use: gives back what should not be held for long. */
void revert_node_rest(struct ckpt_engine *engine, struct revert_node *node);

/* --- revert.c --- */
const struct store_disk_layer *revert_find_layer(const struct store_checkpoint *checkpoint, const char *disk);
/* The machine can take the checkpoint; the paths of its layers for the engine's disks (malloc). */
int revert_check_machine(struct ckpt_engine *engine, const struct store_checkpoint *checkpoint, char *layer_paths[CKPT_MAX_DISKS],
			 struct err *err);
/* Index and states, decoded and validated. */
int revert_read_state(struct ckpt_engine *engine, const struct store_checkpoint *checkpoint, struct page_index *index,
		      struct state_set *states, struct err *err);
int revert_make_overlay(const char *temp_path, const char *layer_path, const struct store_disk_layer *layer, struct err *err);
/* Behind the point of no return: the machine is sticky from here on. Returns the error. */
int revert_half_way(struct ckpt_engine *engine, const char *id, struct err *err);

#endif
