/*
 * Which disk layers a merge may put together.
 *
 * A run is a part of a chain that no checkpoint names, of layers that lie directly one on the other and, but for the topmost, under nothing else. The
 * merged file takes the topmost one's name: so no file that a manifest has a checksum of ever changes, and everything that stands on
 * the run reads the same. What lies beneath it in the run then is needed by nobody, and goes with the next gc.
 *
 * A layer that nobody names is never named again: a checkpoint names a layer that it made itself, or its parent's, which it holds. So what is found
 * here stays true while the merge goes on; only somebody else's merge could change it, and there is one at a time (LAYERS_MERGE).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "checkpoint/store/gc_internal.h"
#include "cowdisk/check.h"

#define NONE SIZE_MAX

struct node {
	size_t below;	/* what it stands on, if that is a layer too */
	unsigned above; /* images and layers that stand on it */
	bool free;	/* may be put together with others */
	bool reached;	/* from an image or a layer that counts */
	bool inner;	/* in a run, and not its topmost */
};

struct chains {
	struct collection g;
	struct node *nodes; /* by the collection's list */
	const char *const *images; /* that count; NULL: all, and named layers too */
	size_t image_count;
};

bool store_choose_window(const uint64_t *bytes, size_t count, size_t least, size_t *first, size_t *length)
{
	*length = 0;
	for (size_t i = 0; i < count; i++) {
		uint64_t sum = 0, most = 0;

		for (size_t j = i; j < count; j++) {
			sum += bytes[j];
			most = max_u64(most, bytes[j]);
			if (j - i + 1 >= max_u64(least, 2) && j - i + 1 > *length && most <= 2 * (sum - most)) {
				*first = i;
				*length = j - i + 1;
			}
		}
	}
	return *length > 0;
}

static char *path_of(const struct collection *g, size_t i) { return xasprintf("%s/layers/%s", g->store->path, g->list[i].name); }

static size_t find(struct collection *g, const char *path)
{
	struct stat st;
	const struct layer *layer = path && stat(path, &st) == 0 ? collection_at(g, &st) : NULL;

	return layer ? (size_t)(layer - g->list) : NONE;
}

/* A header that cannot be read makes a layer that is left alone. */
static void look_at_layer(struct chains *c, size_t i)
{
	struct node *node = &c->nodes[i];
	const struct layer *layer = &c->g.list[i];
	CLEANUP_FREE char *path = path_of(&c->g, i);
	CLEANUP_FREE char *backing = NULL;
	bool plain = true;

	node->below = NONE;
	if (!layer->disk || cow_look(path, layer->format, &backing, &plain, NULL))
		return;
	node->below = find(&c->g, backing);
	node->free = !layer->named && plain && layer->links == 1;
}

static bool counts(const struct chains *c, const char *path)
{
	for (size_t i = 0; i < c->image_count; i++)
		if (!strcmp(c->images[i], path))
			return true;
	return !c->images;
}

static void reach(struct chains *c, size_t i)
{
	for (; i != NONE && !c->nodes[i].reached; i = c->nodes[i].below)
		c->nodes[i].reached = true;
}

/* An image in the folder of layers itself, in the moment of a checkpoint, was looked at as one. */
static int look_at_image(struct collection *g, char *path, struct err *err)
{
	struct chains *c = g->opaque;
	CLEANUP_FREE char *backing = NULL;
	CLEANUP_FREE char *owned = path;
	size_t same = find(g, path);
	struct stat st;

	(void)err;
	if (same == NONE && stat(path, &st) == 0 && (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode)))
		cow_backing(path, -1, &backing, NULL);
	size_t below = same != NONE ? c->nodes[same].below : find(g, backing);
	if (same == NONE && below != NONE)
		c->nodes[below].above++;
	if (counts(c, owned))
		reach(c, same != NONE ? same : below);
	return 0;
}

static int look(struct chains *c, struct err *err)
{
	c->g.opaque = c;
	int rc = collection_judge(&c->g, err);
	if (rc)
		return rc;
	c->nodes = xcalloc(c->g.count + 1, sizeof(*c->nodes));
	for (size_t i = 0; i < c->g.count; i++)
		look_at_layer(c, i);
	for (size_t i = 0; i < c->g.count; i++)
		if (c->nodes[i].below != NONE)
			c->nodes[c->nodes[i].below].above++;
	rc = collection_each_image(&c->g, look_at_image, err);
	for (size_t i = 0; i < c->g.count && !c->images; i++)
		if (c->g.list[i].disk && c->g.list[i].named)
			reach(c, i);
	return rc;
}

static bool is_part(const struct chains *c, size_t i) { return i != NONE && c->nodes[i].free && c->nodes[i].reached; }

static void find_inner(struct chains *c)
{
	for (size_t i = 0; i < c->g.count; i++) {
		size_t below = c->nodes[i].below;

		if (is_part(c, i) && is_part(c, below) && c->nodes[below].above == 1)
			c->nodes[below].inner = true;
	}
}

static int add_run(struct chains *c, size_t head, size_t least, struct store_run **list, size_t *count, struct err *err)
{
	CLEANUP_FREE uint64_t *bytes = xcalloc(c->g.count, sizeof(*bytes));
	size_t length = 0, first = 0, chosen = 0;

	/* A header that a guest could not have written may still lead in a circle: no run is longer than there are layers. */
	for (size_t i = head; i != NONE && length < c->g.count && (i == head || c->nodes[i].inner); i = c->nodes[i].below)
		bytes[length++] = c->g.list[i].bytes;
	if (!store_choose_window(bytes, length, least, &first, &chosen))
		return 0;
	struct store_run *grown = realloc(*list, (*count + 1) * sizeof(*grown));
	if (!grown)
		return err_sys(err, ENOMEM, "list of layers");
	*list = grown;
	struct store_run *run = &grown[(*count)++];
	*run = (struct store_run){.layers = (unsigned)chosen};
	for (size_t n = 0; n < first; n++)
		head = c->nodes[head].below;
	run->path = path_of(&c->g, head);
	for (size_t n = 0; n < chosen; n++)
		run->bytes += bytes[first + n];
	return 0;
}

int store_merge_runs(struct store_merging *merging, const char *const *images, size_t image_count, size_t least, struct store_run **list,
		     size_t *count, struct err *err)
{
	struct chains c = {.g.store = merging->store, .images = images, .image_count = image_count};

	*list = NULL;
	*count = 0;
	/* Nothing is removed while the headers are read. */
	int lock = layers_lock(merging->store, LAYERS_SHAPE, true, err);
	int rc = lock < 0 ? lock : look(&c, err);
	if (lock >= 0)
		close(lock);
	if (!rc)
		find_inner(&c);
	for (size_t i = 0; i < c.g.count && !rc; i++)
		if (is_part(&c, i) && !c.nodes[i].inner)
			rc = add_run(&c, i, least, list, count, err);
	free(c.nodes);
	free(c.g.list);
	if (rc)
		store_runs_free(*list, *count);
	return rc;
}

void store_runs_free(struct store_run *list, size_t count)
{
	for (size_t i = 0; i < count; i++)
		free(list[i].path);
	free(list);
}
