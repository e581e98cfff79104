/*
 * What the store's files share. Lock order: a checkpoint's pin or removal lock (an OFD lock on its manifest) > a draft's lock file >
 * store.lock > the catalogue's write lock (BEGIN IMMEDIATE).
 */
#ifndef VMCP_CHECKPOINT_STORE_STORE_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_STORE_INTERNAL_H

#include <pthread.h>

#include <sqlite3.h>

#include "base/fault.h"
#include "checkpoint/store/store.h"

#define STORE_FORMAT_VERSION 2 /* the newest; 1 is that of stores that are not encrypted */
#define MANIFEST_MAX_BYTES   (16u << 20)

struct store {
	char *path; /* absolute; immutable, like the descriptors */
	int dir, checkpoints_dir, layers_dir, vms_dir, staging_dir;
	int lock_fd; /* of STORE_LOCK_FILE */
	pthread_mutex_t lock;
	sqlite3 *db; /* under lock */
	/* immutable; crypt.c */
	bool encrypted, has_key;
	uint8_t master[32];
};

#define STORE_FORMAT_FILE "format"
/* Empty, and one byte of it for each lock (OFD). It is made once: `format` may be replaced below who has the store open. */
#define STORE_LOCK_FILE "store.lock"
enum store_lock {
	STORE_LOCK_OPEN = 0, /* a read lock while the store is open; rebuild.c has to be alone */
	STORE_LOCK_KEY = 1,  /* who changes the key: rekey.c */
};
/* store.c: type is F_RDLCK, F_WRLCK or F_UNLCK. 0, or -EAGAIN: somebody holds it. */
int store_lock_byte(struct store *store, enum store_lock which, short type);
/* The same, tried until then. */
int store_lock_byte_within(struct store *store, enum store_lock which, short type, uint64_t wait_ns);
/* store.c: an enum cow_format, by the manifest's word for it, which is also the ending of a disk layer's name. */
int store_format_named(const char *name);
/* store.c: without the catalogue. */
int store_open_folders(const char *path, bool create, struct store_key *key, struct store **out, struct err *err);

/* In the table `images`: there are some that are not known. */
#define STORE_UNKNOWN_IMAGES "?"

/* catalog.c. All take the lock themselves unless their name says _locked. */
int catalog_open(struct store *store, struct err *err);
/* Makes a new database of that name in the store, filled from the manifests, and opens it. */
int catalog_make(struct store *store, const char *name, struct err *err);
void catalog_close(struct store *store);
void catalog_leave_log(struct store *store); /* at its end, to the next who opens it */
/* Runs statements without results. */
int catalog_run_locked(struct store *store, const char *sql, struct err *err);
/* A transaction that is on the disk when it has ended; where it does not begin there is none. The end commits it if rc, what its statements came to, is 0,
 * and takes it back otherwise, or where it fails; `point` is passed just before the commit. Returns rc, or that failure. */
int catalog_begin_locked(struct store *store, struct err *err);
int catalog_end_locked(struct store *store, int rc, enum fault_point point, struct err *err);
int catalog_prepare_locked(struct store *store, const char *sql, sqlite3_stmt **out, struct err *err);
/* One step of a statement: 1 row, 0 done, -errno. */
int catalog_step_locked(struct store *store, sqlite3_stmt *statement, struct err *err);
int catalog_error_locked(struct store *store, const char *what, struct err *err);
/* Copies column `column` as text; "" for NULL. Too long: cut, as only our own writes are that long. */
void catalog_text(sqlite3_stmt *statement, int column, char *out, size_t size);
/* Of a checkpoint or a group; -EEXIST if it names another one. */
int catalog_enter_tag_locked(struct store *store, const char *id, const char *tag, struct err *err);
/* catalog_names.c: 1 and the checkpoint, or group, that has the tag, 0: none, -errno. */
int catalog_find_tag(struct store *store, const char *tag, char id[STORE_ID_BYTES], struct err *err);
/* -EEXIST, ERR_STATE if the tag names something. */
int catalog_check_tag(struct store *store, const char *tag, struct err *err);
int catalog_tag_is_taken(const char *tag, const char *id, struct err *err); /* that error */
/* The first column of the only row that a query with one text (and perhaps one number) gives. 0 none, 1 one, 2 several, -errno. */
int catalog_find_locked(struct store *store, const char *sql, const char *text, int64_t number, char id[STORE_ID_BYTES],
			struct err *err);
/* True if the text may be the beginning of an id. */
bool catalog_is_prefix(const char *text);
enum catalog_position {
	CATALOG_VM_STAYS,
	CATALOG_VM_MOVES,
	CATALOG_VM_MADE,	       /* an import: if there is no record of the VM, or it was never started here */
	CATALOG_VM_MOVES_IF_AT_PARENT, /* entered late: only if the VM has gone nowhere else since */
};
/* The memory layers that an index names. */
struct store_layers {
	char (*names)[STORE_ID_BYTES]; /* malloc */
	uint32_t count;
};
void layers_free(struct store_layers *layers);
/* From the bytes of an index file. -EINVAL, ERR_DAMAGED: it is none. */
int layers_of_index(const void *index, size_t length, struct store_layers *out, struct err *err);

/* Enters a checkpoint (by its manifest), its references and tag; an entry that is there already stays. */
int catalog_enter_locked(struct store *store, const struct store_checkpoint *checkpoint, const struct store_layers *layers,
			 enum catalog_position position, struct err *err);
/* The same inside the caller's transaction. */
int catalog_enter_inside_locked(struct store *store, const struct store_checkpoint *checkpoint, const struct store_layers *layers,
				enum catalog_position position, struct err *err);

/* refs.c: which checkpoint needs which layers. Inside the caller's transaction. */
/* The layers of the manifest and of the index. */
int refs_enter_locked(struct store *store, const struct store_checkpoint *checkpoint, const struct store_layers *layers,
		      struct err *err);
/* Layers that nobody names any more. */
struct dead_layers {
	struct dead_layer {
		char id[STORE_ID_BYTES];
		char kind[8]; /* "mem", "qcow2", "raw" */
	} *list;	      /* malloc */
	size_t count;
};
/* Takes a checkpoint out of all tables: its children, and VMs that stood at it, are its parent's from then on. 1: it was
 * there; 0: it was not; -errno. Adds to *dead. */
int refs_forget_locked(struct store *store, const char *id, struct dead_layers *dead, struct err *err);
/* 1 if some checkpoint names the layer, 0, -errno. */
int refs_has_layer_locked(struct store *store, const char *layer, struct err *err);

/* group.c: inside the caller's transaction. */
/* The group that a committed checkpoint names is committed. */
int group_enter_locked(struct store *store, const struct store_checkpoint *checkpoint, struct err *err);
/* Groups that were begun a day ago and are still open: nobody leads them. */
void group_collect(struct store *store);
/* What is known of a group ("": none) goes with the last of its checkpoints. */
int group_forget_locked(struct store *store, const char *id, struct err *err);

/* store.c: the file as it is, which in an encrypted store is not what store_checkpoint_read gives. */
int store_checkpoint_read_stored(struct store *store, const struct store_checkpoint *checkpoint, const char *name, struct buf *out,
				 struct err *err);
/* What the state is that store_checkpoint_read gives: what the manifest says of it where the store is not encrypted. */
int store_checkpoint_plain_state(struct store *store, const struct store_checkpoint *checkpoint, uint64_t *bytes, uint64_t *xxh3, struct err *err);

/* fill.c */
/* Of the folder <id> in `parent`, whose name is `folder`. */
int store_read_manifest_in(int parent, const char *folder, const char *id, struct store_checkpoint *out, struct err *err);
/* The manifest itself, whatever the catalogue says. */
int store_read_manifest(struct store *store, const char *id, struct store_checkpoint *out, struct err *err);
/* Reads a committed checkpoint's manifest, and the layer table of its index: empty if that is damaged, which is told. */
int store_read_committed(struct store *store, const char *id, struct store_checkpoint *out, struct store_layers *layers,
			 struct err *err);
/* Enters all checkpoints whose manifest can be read, inside the caller's transaction. */
int catalog_fill_locked(struct store *store, struct err *err);

/* remove.c: completes the removal whose folder in staging/ has this name ("rm-<id>"), if its maker died. */
#define REMOVED_PREFIX "rm-"
void remove_recover(struct store *store, const char *name);

/* disk_record.c: checksums of disk layers that no manifest names any more */
/* Of the layers that the checkpoint in staging/<staged> names. */
void disk_records_keep(struct store *store, const char *staged);
/* Of one layer: of the file that has its name now. */
void disk_record_keep(struct store *store, const struct store_disk_layer *disk);
void disk_record_forget(struct store *store, const char *layer, const char *format);
/* True if one is recorded of the very file that the layer is now. */
bool disk_record_find(struct store *store, const char *layer, const char *format, uint64_t *bytes, uint64_t *xxh3);
/* Removes records of layers that are gone. */
void disk_records_collect(struct store *store);

/* manifest.c */
int manifest_encode(const struct store_checkpoint *checkpoint, struct buf *out, struct err *err);
int manifest_decode(const char *what, const void *data, size_t length, struct store_checkpoint *out, struct err *err);

/* merge.c */
struct store_merging {
	struct store *store;
	int lock;
};

/* chains.c: of layers in a run, topmost first, the longest stretch of at least `least` of which the largest is not more than twice all others
 * together: so each byte is copied a few times only, and few layers are left. False: none. */
bool store_choose_window(const uint64_t *bytes, size_t count, size_t least, size_t *first, size_t *length);

/* sync.c: fsync of all, many at the same time; the first error. */
struct store_unsynced {
	int fd;
	const char *name; /* for an error */
};
int store_sync(const struct store_unsynced *files, unsigned count, struct err *err);

/* draft.c: enters a committed checkpoint, without its tag if that is taken. */
int draft_enter(struct store *store, struct store_checkpoint *checkpoint, const struct store_layers *layers,
		enum catalog_position position, struct err *err);

/* import_place.c: the read-only disks in the folder of a committed import go to its VM's. What is done already is no error. */
#define DRAFT_IMPORTED	 "imported"
#define DRAFT_OWN_PREFIX "own-"
int draft_place_disks(struct store *store, int dir, const struct store_checkpoint *checkpoint, struct err *err);

/* recover.c: removes what makers left that are dead, and enters what they had committed. */
int draft_recover(struct store *store, struct err *err);
/* The same, and waits for living makers between their rename and their entry: every checkpoint that was there at the call is in the
 * catalogue on return. -EBUSY, ERR_STATE if one does not get there. */
int draft_settle(struct store *store, struct err *err);
/* The layers that drafts in the making own: appends their ids, STORE_ID_BYTES each. */
int draft_owned_layers(struct store *store, struct buf *ids, struct err *err);
void store_unlink_memory_layer(struct store *store, const char *layer);

/* vm_record.c: true if the VM is alive, or some process is about to start it. */
bool store_vm_is_held(struct store *store, const char *name);

bool store_is_id(const char *text);
/* "<id><suffix>" */
void store_file_name(char out[STORE_ID_BYTES + 8], const char *id, const char *suffix);
/* An OFD write lock on the whole file: 0, or -EAGAIN if somebody holds it. */
int store_try_lock(int fd);
/* Temporaries that a crash left do not count: the folder may hold one of the format file itself. False also where it cannot be read. */
bool store_folder_is_empty(int dir);

#endif
