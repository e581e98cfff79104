/* Checkpoints as the way back needs them, kept from one revert to the next. */
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "checkpoint/revert_internal.h"

/* Layers whose files are kept open, of each checkpoint: a process has 1024 descriptors, unless it was given more. */
#define KEEP_LAYERS 64u
/* Indices of more extents (24 MiB) are kept of the last checkpoint only. */
#define KEEP_EXTENTS 0x100000u

static void node_free(struct ckpt_engine *engine, struct revert_node *node)
{
	for (unsigned i = 0; i < engine->disk_count; i++)
		free(node->layer_paths[i]);
	restore_close(&node->layers);
	stash_free(&node->stash);
	page_index_free(&node->index);
	state_set_free(&node->states);
	store_checkpoint_free(&node->checkpoint);
	*node = (struct revert_node){0};
}

void revert_cache_free(struct ckpt_engine *engine)
{
	struct revert_cache *cache = engine->reverts;
	if (!cache)
		return;
	for (unsigned i = 0; i < REVERT_NODES; i++)
		node_free(engine, &cache->nodes[i]);
	free(cache->which);
	free(cache->late);
	free(cache);
	engine->reverts = NULL;
}

static struct revert_cache *get_cache(struct ckpt_engine *engine)
{
	if (engine->reverts)
		return engine->reverts;
	struct revert_cache *cache = xcalloc(1, sizeof(*cache));
	cache->which = xcalloc(tracker_words(engine->tracker), sizeof(*cache->which));
	cache->late = xcalloc(tracker_words(engine->tracker), sizeof(*cache->late));
	engine->reverts = cache;
	return cache;
}

static struct revert_node *find(struct revert_cache *cache, const char *id)
{
	for (unsigned i = 0; i < REVERT_NODES && *id; i++) {
		if (strcmp(cache->nodes[i].checkpoint.id, id) == 0)
			return &cache->nodes[i];
	}
	return NULL;
}

/* A free place, or that of the checkpoint used longest ago: but not where the VM stands, which the way to elsewhere begins with. */
static struct revert_node *make_place(struct ckpt_engine *engine, struct revert_cache *cache)
{
	struct revert_node *oldest = NULL;
	char at[STORE_ID_BYTES];
	ckpt_position(engine, at);
	for (unsigned i = 0; i < REVERT_NODES; i++) {
		struct revert_node *node = &cache->nodes[i];
		if (node->index.extent_count > KEEP_EXTENTS && strcmp(node->checkpoint.id, at) != 0)
			node_free(engine, node);
		if (node->checkpoint.id[0] == '\0')
			return node;
		if ((!oldest || node->used < oldest->used) && strcmp(node->checkpoint.id, at) != 0)
			oldest = node;
	}
	node_free(engine, oldest);
	return oldest;
}

static int load(struct ckpt_engine *engine, struct revert_node *node, const char *id, struct err *err)
{
	/* First, so that a manifest that is changed meanwhile does not pass for what was read. */
	int r = store_checkpoint_stamp(engine->store, id, &node->stamp, err);
	if (r == 0)
		r = store_checkpoint_get(engine->store, id, &node->checkpoint, err);
	if (r == 0)
		r = revert_check_machine(engine, &node->checkpoint, node->layer_paths, err);
	if (r == 0)
		r = revert_read_state(engine, &node->checkpoint, &node->index, &node->states, err);
	if (r == 0)
		r = restore_init(&node->layers, engine->store, &node->index, err);
	if (r != 0)
		node_free(engine, node);
	return r;
}

int revert_node_get(struct ckpt_engine *engine, const char *id, struct revert_node **out, struct err *err)
{
	struct revert_cache *cache = get_cache(engine);
	struct revert_node *node = find(cache, id);
	struct store_stamp stamp;
	int r = 0;
	if (node && (store_checkpoint_stamp(engine->store, id, &stamp, NULL) != 0 || memcmp(&stamp, &node->stamp, sizeof(stamp)) != 0)) {
		node_free(engine, node);
		node = NULL;
	}
	if (node) {
		r = state_set_validate(&node->states, err);
	} else {
		node = make_place(engine, cache);
		r = load(engine, node, id, err);
	}
	if (r != 0)
		return r;
	node->used = ++cache->uses;
	*out = node;
	return 0;
}

const struct page_index *revert_node_index(struct ckpt_engine *engine, const char *id)
{
	const struct revert_node *node = find(get_cache(engine), id);
	return node ? &node->index : NULL;
}

void revert_node_rest(struct ckpt_engine *engine, struct revert_node *node)
{
	stash_trim(&node->stash);
	if (restore_open_layers(&node->layers) <= KEEP_LAYERS)
		return;
	restore_close(&node->layers);
	if (restore_init(&node->layers, engine->store, &node->index, NULL) != 0)
		node_free(engine, node);
}
