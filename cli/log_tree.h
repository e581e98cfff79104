/* The tree of checkpoints as `vmcp log` reads it, and what draws it. */
#ifndef VMCP_CLI_LOG_TREE_H
#define VMCP_CLI_LOG_TREE_H

#include <stdbool.h>
#include <stddef.h>

#include "checkpoint/store/store.h"

struct tree {
	struct store_checkpoint *list; /* by creation */
	size_t count;
	size_t durable; /* the first so many are in the store; the others are what VMs are about to commit */
	char (*levels)[16]; /* of the others */
	size_t *by_parent; /* indices of the list, by parent, then in the list's order */
	struct store_vm *vms;
	size_t vm_count;
};

#define TREE_NONE ((size_t)-1)

/* What each is drawn with: rows from above, children above parents, a branch in one piece where that can be. */
struct tree_layout {
	size_t *order;	 /* indices of the list, by row */
	size_t *parents; /* of each of the list: its parent's index, or TREE_NONE */
	size_t *children; /* how many each has */
};
void tree_layout(const struct tree *tree, struct tree_layout *out);
void tree_layout_free(struct tree_layout *layout);

const char *tree_level(const struct tree *tree, const struct store_checkpoint *c);
/* Names of the VMs that stand there, with what they do: "web (running), api (stopped)"; malloc, NULL if none does. */
char *tree_standing(const struct tree *tree, const char *id);

/* As `git log --graph` draws it, on stdout. */
void tree_print_graph(const struct tree *tree, bool colour);
/* An SVG picture. -errno, with err set. Replaces the file as a whole or not at all; "-" is stdout. */
int tree_write_svg(const struct tree *tree, const char *path, struct err *err);

#endif
