/* What the store's files share. Lock order: store.lock is the only lock. */
#ifndef VMCP_CHECKPOINT_STORE_STORE_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_STORE_INTERNAL_H

#include <pthread.h>

#include <sqlite3.h>

#include "checkpoint/store/store.h"

#define STORE_FORMAT_VERSION 1
#define MANIFEST_MAX_BYTES   (16u << 20)

struct store {
	char *path; /* absolute; immutable, like the descriptors */
	int dir, checkpoints_dir, layers_dir, vms_dir, staging_dir;
	pthread_mutex_t lock;
	sqlite3 *db; /* under lock */
};

/* catalog.c. All take the lock themselves unless their name says _locked. */
int catalog_open(struct store *store, struct err *err);
void catalog_close(struct store *store);
/* Runs statements without results. */
int catalog_run_locked(struct store *store, const char *sql, struct err *err);
int catalog_prepare_locked(struct store *store, const char *sql, sqlite3_stmt **out, struct err *err);
/* One step of a statement: 1 row, 0 done, -errno. */
int catalog_step_locked(struct store *store, sqlite3_stmt *statement, struct err *err);
int catalog_error_locked(struct store *store, const char *what, struct err *err);
/* Copies column `column` as text; "" for NULL. Too long: cut, as only our own writes are that long. */
void catalog_text(sqlite3_stmt *statement, int column, char *out, size_t size);
enum catalog_position {
	CATALOG_VM_STAYS,
	CATALOG_VM_MOVES,
	CATALOG_VM_MOVES_IF_AT_PARENT, /* entered late: only if the VM has gone nowhere else since */
};
/* Enters a checkpoint (by its manifest), its references and tag; an entry that is there already stays. */
int catalog_enter_locked(struct store *store, const struct store_checkpoint *checkpoint, enum catalog_position position,
			 struct err *err);

/* manifest.c */
int manifest_encode(const struct store_checkpoint *checkpoint, struct buf *out, struct err *err);
int manifest_decode(const char *what, const void *data, size_t length, struct store_checkpoint *out, struct err *err);

/* draft.c: removes what makers left that are dead, and enters what they had committed. */
int draft_recover(struct store *store, struct err *err);

bool store_is_id(const char *text);
/* "<id><suffix>" */
void store_file_name(char out[STORE_ID_BYTES + 8], const char *id, const char *suffix);
/* An OFD write lock on the whole file: 0, or -EAGAIN if somebody holds it. */
int store_try_lock(int fd);

#endif
