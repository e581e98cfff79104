/* What the store's tests share: a store in a scratch folder, and checkpoints taken in it without a VM. */
#ifndef VMCP_CHECKPOINT_STORE_STORE_TEST_H
#define VMCP_CHECKPOINT_STORE_STORE_TEST_H

#include "base/bytes.h"
#include "checkpoint/store/store.h"

#define MEMORY_BYTES (64 * PAGE_BYTES)
#define VM_UUID	     "11111111-2222-4333-8444-555555555555"

extern char store_test_work[];	       /* the scratch folder */
extern char store_test_folder[64];     /* of the store */
extern char store_test_image[64];      /* a file that serves as a disk */
extern struct store *store_test_store; /* the store, open */

/* For .init and .fini of a suite. */
void store_test_make_work(void);
void store_test_remove_work(void);

struct store *store_test_must_open(void);
void store_test_write_text(const char *path, const char *text);
/* Names of all files but the catalogue's, sorted, one a line; to be freed. */
char *store_test_listing(void);
/* Entries of a folder of the store whose names end with `suffix`, and temporaries. */
unsigned store_test_count_in(const char *folder, const char *suffix);

struct store_test_plan {
	const char *vm, *parent, *tag; /* NULL: "web", none, none */
	const char *group, *members;   /* NULL: in none */
	bool disk, live, periodic;
	uint64_t created_wall_ns; /* 0: now */
	struct store *store; /* set by store_test_take */
};
int store_test_take(struct store *in, const struct store_test_plan *plan, char id[STORE_ID_BYTES], struct err *err);
/* All up to the commit; after a failure there is no draft. *c is to be freed in any case. */
int store_test_prepare(struct store *in, const struct store_test_plan *plan, struct store_draft **draft, struct store_checkpoint *c, struct err *err);
void store_test_must_take(const struct store_test_plan *plan, char id[STORE_ID_BYTES]);
/* An index of MEMORY_BYTES: page 7 in layer `own`, and one page in each layer that the parent's ("" or NULL: none) has. */
int store_test_put_index(struct store *in, struct store_draft *draft, const char *parent, const char *own, struct err *err);
/* Every checkpoint is whole and its parent there; the memory layers that are there are those that they need; nothing is staged. */
void store_test_expect_exact(struct store *in, const char *what);
int store_test_put_vm(struct store *in, const char *name, struct err *err);
/* True if every byte that the checkpoint needs is there. */
bool store_test_is_whole(struct store *in, const char *id, struct err *err);
size_t store_test_count_listed(struct store *in, const char *vm);
void store_test_position_of(struct store *in, const char *name, char at[STORE_ID_BYTES]);

#endif
