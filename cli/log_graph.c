/*
 * The tree of checkpoints as text. Newest first: a lane is the line that leads from what was printed down to a parent that is still to come.
 *
 *     * 7be2ea9c41ab
 *     | * 19d484fffdf8
 *     |/
 *     * 9a1a3d58b5f8
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/clock.h"
#include "cli/cli.h"
#include "cli/log_tree.h"

/* --- the order --- */

/* Indices by id, for finding parents. */
static int by_id(const void *a, const void *b, void *opaque)
{
	const struct tree *tree = opaque;

	return strcmp(tree->list[*(const size_t *)a].id, tree->list[*(const size_t *)b].id);
}

static size_t find_id(const struct tree *tree, const size_t *sorted, const char *id)
{
	size_t low = 0, high = tree->count;

	while (id[0] && low < high) {
		size_t middle = (low + high) / 2;
		int order = strcmp(tree->list[sorted[middle]].id, id);

		if (order == 0)
			return sorted[middle];
		if (order < 0)
			low = middle + 1;
		else
			high = middle;
	}
	return TREE_NONE;
}

static void find_parents(const struct tree *tree, struct tree_layout *layout)
{
	size_t *sorted = xcalloc(tree->count + 1, sizeof(*sorted));

	for (size_t i = 0; i < tree->count; i++)
		sorted[i] = i;
	if (tree->count)
		qsort_r(sorted, tree->count, sizeof(*sorted), by_id, (void *)tree);
	for (size_t i = 0; i < tree->count; i++) {
		layout->parents[i] = find_id(tree, sorted, tree->list[i].parent);
		if (layout->parents[i] != TREE_NONE)
			layout->children[layout->parents[i]]++;
	}
	free(sorted);
}

/* From each tip, the newest first, down to where another branch is still to come. Whatever the clocks said, children come before parents. */
static size_t put_branch(const struct tree_layout *layout, size_t *left, size_t at, size_t rows)
{
	while (at != TREE_NONE && left[at] == 0) {
		layout->order[rows++] = at;
		at = layout->parents[at];
		if (at != TREE_NONE)
			left[at]--;
	}
	return rows;
}

void tree_layout(const struct tree *tree, struct tree_layout *out)
{
	size_t *left = xcalloc(tree->count + 1, sizeof(*left));
	size_t rows = 0;

	*out = (struct tree_layout){.order = xcalloc(tree->count + 1, sizeof(*out->order)),
				    .parents = xcalloc(tree->count + 1, sizeof(*out->parents)),
				    .children = xcalloc(tree->count + 1, sizeof(*out->children))};
	find_parents(tree, out);
	memcpy(left, out->children, tree->count * sizeof(*left));
	for (size_t i = tree->count; i-- > 0;)
		if (out->children[i] == 0)
			rows = put_branch(out, left, i, rows);
	/* In a store that somebody made up parents may form a ring, which no tip leads to: in the list's order, then. */
	for (size_t i = tree->count; i-- > 0 && rows < tree->count;)
		if (left[i])
			out->order[rows++] = i;
	free(left);
}

void tree_layout_free(struct tree_layout *layout)
{
	free(layout->order);
	free(layout->parents);
	free(layout->children);
}

/* --- lanes --- */

struct lanes {
	size_t *to; /* the index that each leads to, from the left */
	size_t count;
};

/* A row, column by column: what does not follow from a character before it is a space. */
static void print_row(const char *row, size_t width)
{
	while (width && row[width - 1] == ' ')
		width--;
	printf("%.*s\n", (int)width, row);
}

static char *blank_row(size_t lanes)
{
	char *row = xcalloc(1, 2 * lanes + 3);

	memset(row, ' ', 2 * lanes + 2);
	return row;
}

/* The lanes right of `gone` come one column to the left, as `gone` does on its way to `target` (equal: it just ends). */
static void close_lane(struct lanes *lanes, size_t gone, size_t target)
{
	CLEANUP_FREE char *row = blank_row(lanes->count);

	for (size_t i = 0; i < lanes->count; i++)
		if (i < gone)
			row[2 * i] = '|';
		else if (i > gone || target < gone)
			row[2 * i - 1] = '/';
	if (target < gone || gone + 1 < lanes->count)
		print_row(row, 2 * lanes->count);
	memmove(lanes->to + gone, lanes->to + gone + 1, (lanes->count - gone - 1) * sizeof(*lanes->to));
	lanes->count--;
	/* It crosses those between. */
	for (size_t at = gone; at > target + 1; at--) {
		memset(row, ' ', 2 * lanes->count + 2);
		for (size_t i = 0; i < lanes->count; i++)
			row[2 * i] = '|';
		row[2 * (at - 1) - 1] = '/';
		print_row(row, 2 * lanes->count);
	}
}

static size_t find_lane(const struct lanes *lanes, size_t to)
{
	for (size_t i = 0; i < lanes->count; i++)
		if (lanes->to[i] == to)
			return i;
	return TREE_NONE;
}

/* A tip gets a new one. */
static size_t take_lane(struct lanes *lanes, size_t index)
{
	size_t lane = find_lane(lanes, index);

	if (lane != TREE_NONE)
		return lane;
	lanes->to[lanes->count] = index;
	return lanes->count++;
}

/* It goes on to the parent; if another one leads there already, they join at once, so that there are no more lanes than forks. */
static void lead_on(struct lanes *lanes, size_t lane, size_t parent)
{
	size_t other = parent == TREE_NONE ? TREE_NONE : find_lane(lanes, parent);

	if (parent == TREE_NONE) {
		close_lane(lanes, lane, lane);
		return;
	}
	lanes->to[lane] = parent;
	if (other != TREE_NONE)
		close_lane(lanes, other > lane ? other : lane, other > lane ? lane : other);
}

static void print_marks(const struct tree *tree, const struct store_checkpoint *c, bool colour)
{
	CLEANUP_FREE char *standing = tree_standing(tree, c->id);

	if (!standing && !c->tag[0])
		return;
	printf("  %s(%s%s%s%s)%s", colour ? "\033[32m" : "", standing ? standing : "", standing && c->tag[0] ? ", " : "", c->tag[0] ? "tag: " : "",
	       c->tag, colour ? "\033[0m" : "");
}

static void print_node(const struct tree *tree, const struct store_checkpoint *c, const struct lanes *lanes, size_t lane, bool colour)
{
	uint64_t now = clock_wall_ns();
	char age[16], size[16];

	for (size_t i = 0; i < lanes->count; i++)
		printf("%c ", i == lane ? '*' : '|');
	cli_format_age(age, now > c->created_wall_ns ? now - c->created_wall_ns : 0);
	cli_format_size(size, c->size_bytes);
	printf("%s%.12s%s  %s, %s", colour ? "\033[33m" : "", c->id, colour ? "\033[0m" : "", age, size);
	print_marks(tree, c, colour);
	if (c->message)
		printf("  %s", c->message);
	else if (strcmp(tree_level(tree, c), "durable") != 0)
		printf("  %s", tree_level(tree, c));
	else if (c->periodic)
		printf("  (periodic)");
	putchar('\n');
}

void tree_print_graph(const struct tree *tree, bool colour)
{
	struct lanes lanes = {.to = xcalloc(tree->count + 1, sizeof(*lanes.to))};
	struct tree_layout layout;

	tree_layout(tree, &layout);
	for (size_t row = 0; row < tree->count; row++) {
		size_t at = layout.order[row], lane = take_lane(&lanes, at);

		print_node(tree, &tree->list[at], &lanes, lane, colour);
		lead_on(&lanes, lane, layout.parents[at]);
	}
	free(lanes.to);
	tree_layout_free(&layout);
}
