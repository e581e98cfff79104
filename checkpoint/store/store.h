/*
 * The store: checkpoints, layers and VM records in one folder. docs/format.md is the specification of its files.
 *
 *     catalog.db                     SQLite, WAL: VMs, checkpoints, layers, references
 *     checkpoints/<id>/manifest      JSON; a checkpoint exists if and only if this file does: the commit point is the rename of its folder
 *     checkpoints/<id>/state         CBOR sections
 *     checkpoints/<id>/index         page -> layer
 *     layers/<id>.mem, <id>.qcow2    memory and disk layers, shared by reference count
 *     layers/<id>.sums               page checksums of a memory layer: lives and dies with it
 *     vms/<name>/                    record, control socket, console log of a VM
 *     staging/<id>/                  what is not committed; removed when its maker is gone
 *     staging/rm-<id>/               a checkpoint that is being removed
 *
 * Several processes use one store at once: SQLite locks the catalogue, a staging folder carries an OFD lock of its maker.
 * Everything read from a store is untrusted. A handle may be used by several threads (it locks itself).
 */
#ifndef VMCP_CHECKPOINT_STORE_STORE_H
#define VMCP_CHECKPOINT_STORE_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

#define STORE_ID_BYTES	 33 /* 32 lower-case hexadecimal digits (128 random bits) and NUL */
#define STORE_NAME_BYTES 64 /* VM and disk names, tags: [A-Za-z0-9][A-Za-z0-9._-]*, at most 63 bytes */
#define STORE_GROUP_MAX	 32 /* checkpoints of a group */

struct store;

/* Opens the store, making it (mode 0700) if `create`. Replays nothing: staging folders of dead makers are removed, manifests that the catalogue
 * lacks (a crash between rename and transaction) are entered. Newer format than ours: ERR_FAILED with a hint. Missing and !create: -ENOENT. */
int store_open(const char *path, bool create, struct store **out, struct err *err);
/*
 * The same with the key of an encrypted store (crypt.h); a store that is made is encrypted with it. One that is not encrypted is refused: ERR_STATE. Another key:
 * -EKEYREJECTED. key NULL: as store_open, which opens an encrypted store too, but whatever needs what is encrypted in it fails as store_check_key says.
 */
struct store_key;
int store_open_with_key(const char *path, bool create, struct store_key *key, struct store **out, struct err *err);
/* secret: a passphrase, or random bytes, at least 1; copied. log_n: of scrypt, for a store that is made; 0: as it should be; tests take less. It remembers the
 * last store that it opened, so that it opens it again at once. Any thread, one at a time. */
struct store_key *store_key_new(const void *secret, size_t bytes, unsigned log_n);
void store_key_free(struct store_key *key); /* NULL is allowed */
/*
 * Another key for the store, which was opened with its present one, `old`. What is in it stays as it is, as its own key, which the user's encrypts, does: who has the store
 * open is not disturbed. From the rename of `format` on `now` opens it, and `old` does not. -EKEYREJECTED: somebody else was faster. ERR_STATE: it is not encrypted.
 */
int store_change_key(struct store *store, struct store_key *old, struct store_key *now, struct err *err);
bool store_is_encrypted(const struct store *store);
/* 0: what it keeps can be read and written. -ENOKEY, ERR_USAGE with a hint: it is encrypted, and was opened without its key. */
int store_check_key(const struct store *store, struct err *err);
void store_close(struct store *store);
/* The same for who then starts processes that open it: the catalogue's log stays as it is for them, instead of being written back and made anew. */
void store_hand_over(struct store *store);
const char *store_path(const struct store *store); /* absolute */

void store_new_id(char id[STORE_ID_BYTES]); /* 128 random bits */
/* -EINVAL, ERR_USAGE, naming `what`, if the name is not as STORE_NAME_BYTES says. */
int store_check_name(const char *what, const char *name, struct err *err);

/* --- VM records --- */

struct store_vm {
	char name[STORE_NAME_BYTES];
	char uuid[37];
	char at[STORE_ID_BYTES]; /* the checkpoint it stands at (newest taken or reverted to), "" */
	int pid;		 /* of the process that runs it or ran it last */
	bool alive;		 /* that process lives and holds the VM's lock */
	char state
		[16]; /* "running", "paused", "stopped", "crashed": as last recorded; "crashed" if recorded running and not alive */
	uint64_t memory_bytes;
	uint32_t cpus;
	uint64_t started_wall_ns;
	char config_path[4096]; /* guest.cfg it was started with, "" if none */
	char note[512];		/* what is wrong with it, such as why its periodic checkpoints fail; "" if nothing */
	char *config_text;	/* malloc; freed by store_vm_free */
};
void store_vm_free(struct store_vm *vm);

struct store_vm_lock;
/* Takes the VM's name for this process: an OFD lock on vms/<name>/lock, held until release or death. Taken: -EBUSY, ERR_STATE, naming the pid. */
int store_vm_lock(struct store *store, const char *name, struct store_vm_lock **out, struct err *err);
void store_vm_unlock(struct store_vm_lock *lock);
/* The VM was never there: its record, what it has of the host, and its folder with all that is in it are removed. -EBUSY: it runs; -EEXIST: the one of that name has
 * another uuid. */
int store_vm_forget(struct store *store, const char *name, const char *uuid, struct err *err);
/* True if some process holds it. */
bool store_vm_is_alive(struct store *store, const char *name);
/* Folder of the VM (made by store_vm_lock), as a descriptor to be closed by the caller. The control socket is `control.sock` in it. */
int store_vm_dir(struct store *store, const char *name, struct err *err);
/* Where the image of a disk is that is the VM's own (malloc): over a shared base, of a clone, of an import. `store`: as store_path says it. */
char *store_vm_disk_path(const char *store, const char *vm, const char *disk);
int store_vm_put(struct store *store, const struct store_vm *vm, struct err *err); /* inserts or replaces the record */
int store_vm_set_state(struct store *store, const char *name, const char *state, struct err *err);
/* One line, "" for none. store_vm_put clears it. */
int store_vm_set_note(struct store *store, const char *name, const char *note, struct err *err);
int store_vm_set_position(struct store *store, const char *name, const char *checkpoint_id, struct err *err);
/* -ENOENT, ERR_NOT_FOUND with the known names as hint. */
int store_vm_get(struct store *store, const char *name, struct store_vm *out, struct err *err);
/* All, by name. *list is malloc'ed, each element freed by store_vm_free. */
int store_vm_list(struct store *store, struct store_vm **list, size_t *count, struct err *err);

/* --- taking a checkpoint --- */

struct store_disk_layer {
	char disk[STORE_NAME_BYTES]; /* the VM's disk */
	char layer[STORE_ID_BYTES];
	char format[8];	     /* "qcow2" | "raw" */
	uint64_t size_bytes; /* of the virtual disk */
	uint64_t file_bytes; /* of the layer file as sealed */
	uint64_t xxh3;	     /* of the file */
	uint32_t inflight_writes, inflight_reads;
};

/* Of a checkpoint that is one of a group's (checkpoint/store/group.h). */
struct store_group_note {
	char id[STORE_ID_BYTES]; /* "": it is in none */
	/* What follows is in the manifest only. */
	char tag[STORE_NAME_BYTES]; /* of the group as it was taken, "" if none */
	char *members;		    /* malloc: names of the VMs, with spaces between; or NULL */
};

struct store_checkpoint {
	char id[STORE_ID_BYTES];
	char parent[STORE_ID_BYTES]; /* "" for a root. Where the catalogue is asked: the nearest ancestor that was not removed */
	char vm[STORE_NAME_BYTES];
	char vm_uuid[37];
	char tag[STORE_NAME_BYTES]; /* "" if none. In the catalogue only: a tag may move */
	char *message;		    /* malloc or NULL */
	uint64_t created_wall_ns;
	bool live;
	bool periodic; /* taken by a timer: `keep` may remove it */
	struct store_group_note group;
	uint64_t memory_bytes, saved_pages, zero_pages, parent_pages, written_bytes;
	uint64_t pause_ns, durable_ns;
	uint32_t cpus;
	char memory_layer[STORE_ID_BYTES];
	uint32_t disk_count;
	struct store_disk_layer *disks; /* malloc */
	char *config_text;		/* malloc */
	char *needs; /* malloc, or NULL: not recorded. What a host must have to go on with it: lines of a word, ": " and a list */
	uint64_t state_bytes, state_xxh3, index_bytes, index_xxh3;
	uint64_t size_bytes; /* what it occupies itself: its memory and disk layers, state, index */
};
void store_checkpoint_free(struct store_checkpoint *checkpoint);

/* A checkpoint in the making. */
struct store_draft;
/* Makes staging/<id>/ for a new checkpoint with a new id. */
int store_draft_begin(struct store *store, struct store_draft **out, struct err *err);
/* The same for a checkpoint that comes from elsewhere and keeps its id: -EBUSY, ERR_STATE: somebody else is making it; -EEXIST, ERR_STATE: it is
 * there. Its commit leaves VMs where they stand; if there is no record of its VM, that is made, at this checkpoint. */
int store_draft_begin_import(struct store *store, const char *id, struct store_draft **out, struct err *err);
const char *store_draft_id(const struct store_draft *draft);
/* A new memory layer in layers/ (not referenced until commit), opened O_RDWR, empty; O_DIRECT is the caller's affair (fcntl).
 * Beside it layers/<id>.sums, the same, for the places and checksums of its pages. Both descriptors are the caller's to close; the commit makes both
 * files durable. */
int store_draft_memory_layer(struct store_draft *draft, char layer[STORE_ID_BYTES], int *fd, int *sums_fd, struct err *err);
/*
 * A disk's present top image becomes layer `layer`: hard link of `path` into layers/<id>.qcow2 (or .raw). On another filesystem: -EXDEV with a hint. The full
 * path of the layer is given in *layer_path (malloc). Undone by store_draft_abort unless the draft was marked switched (abort: the link may be gone
 * already, as the engine renames it back over `path`). The link is durable on return (layers/ synced): the VM's disk stands on it from then on, before
 * any commit. For the same reason the disk layers of a *dead* maker are never removed with its staging folder: they become layers of the VM.
 */
int store_draft_disk_layer(struct store_draft *draft, const char *disk, const char *path, const char *format,
			   char layer[STORE_ID_BYTES], char **layer_path, struct err *err);
/* Of an import. A qcow2 layer that the caller makes at *path (malloc); gone if the draft is. */
int store_draft_new_disk(struct store_draft *draft, char layer[STORE_ID_BYTES], char **path, struct err *err);
/* The same for a read-only disk: where to make it (malloc). The commit moves it to where store_own_disk says. */
char *store_draft_own_disk(struct store_draft *draft, const char *disk);
char *store_own_disk(struct store *store, const char *vm, const char *id, const char *disk);
/* The commit makes that file durable. */
int store_draft_sync_at_commit(struct store_draft *draft, const char *path, struct err *err);
/* The VM has switched to its overlays: from here on abort keeps the disk layers (the VM's chain needs them), as layers of the VM. */
void store_draft_switched(struct store_draft *draft);
/* From here on the memory layer that `made` owns, written and synced, belongs to `draft`, and lives and dies with it. `made` is freed in
 * every case. */
int store_draft_adopt(struct store_draft *draft, struct store_draft *made, struct err *err);
/* Writes `state` and `index` (bytes as given) into the staging folder, and notes their checksums. An index is looked at: every
 * memory layer that it names is kept as long as the checkpoint is. */
int store_draft_put(struct store_draft *draft, const char *name, const void *data, size_t length, struct err *err);
/* Makes what the memory layers hold so far durable, so that the commit finds little to do. */
int store_draft_sync_layers(struct store_draft *draft, struct err *err);
/*
 * The commit: checksums of layers' files are in `checkpoint` (the rest of its fields filled in by the caller, state/index by store_draft_put); manifest written,
 * everything synced, folder renamed to checkpoints/<id>, one catalogue transaction (checkpoint, layer references, tag, VM position). Frees the draft in every case.
 * -EEXIST if the tag is taken.
 */
int store_draft_commit(struct store_draft *draft, struct store_checkpoint *checkpoint, struct err *err);
/*
 * The same in two steps, for one of a group: all up to the rename, after which the draft may still be aborted (a failure has done so); and, once the group is committed, the
 * rest, which cannot fail: what cannot be done now is done by whoever opens the store next.
 */
int store_draft_prepare(struct store_draft *draft, struct store_checkpoint *checkpoint, struct err *err);
void store_draft_finish(struct store_draft *draft, struct store_checkpoint *checkpoint);
/* Removes everything the draft made (see store_draft_switched). Frees it. NULL allowed. */
void store_draft_abort(struct store_draft *draft);

/* --- reading --- */

/* Finds the checkpoint meant by an id, a unique prefix (4 digits or more), a tag, a VM's name (the newest of it) or VM~N. Ambiguous: ERR_USAGE. None: ERR_NOT_FOUND. */
int store_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], struct err *err);
/* True if there is a folder of such a checkpoint, whatever is in it and whether or not the catalogue knows it. */
bool store_has_folder(struct store *store, const char *id);
/* Reads and validates the manifest. Damaged: ERR_DAMAGED naming file and field. */
int store_checkpoint_get(struct store *store, const char *id, struct store_checkpoint *out, struct err *err);
/* What tells whether a checkpoint's manifest, and with it all that is sealed by its checksums, is still the one that was read. */
struct store_stamp {
	uint64_t device, inode, bytes, modified_ns, changed_ns;
};
/* Taken before store_checkpoint_get, it is that of what is read, or of something older. None: -ENOENT, ERR_NOT_FOUND. */
int store_checkpoint_stamp(struct store *store, const char *id, struct store_stamp *out, struct err *err);
/* All of a VM, or of all VMs (vm NULL), by creation time; from the catalogue: config_text and disks are NULL. *list malloc'ed, elements freed by store_checkpoint_free. */
int store_checkpoint_list(struct store *store, const char *vm, struct store_checkpoint **list, size_t *count,
			  struct err *err);
/* Reads `state` or `index` of a checkpoint whole and checks it against the manifest's checksum. */
int store_checkpoint_read(struct store *store, const struct store_checkpoint *checkpoint, const char *name,
			  struct buf *out, struct err *err);
/* Opens a memory layer read-only. Returns a descriptor or -errno. A file shorter than the memory: the caller's check. */
int store_memory_layer_open(struct store *store, const char *layer, struct err *err);
/* The same for its page checksums, layers/<id>.sums. */
int store_memory_sums_open(struct store *store, const char *layer, struct err *err);
/* An enum cow_format, as cow_open_as takes it: what a layer is the manifest says, not its content, which may be a guest's. */
int store_disk_layer_format(const struct store_disk_layer *layer);
/* Full path of a disk layer (malloc). Missing file: ERR_DAMAGED. */
int store_disk_layer_path(struct store *store, const char *layer, const char *format, char **path, struct err *err);

/* --- hints --- */

/* A file beside a checkpoint's own that nothing depends on, and that goes with it. put replaces what is there, whole. get: -ENOENT if there is none;
 * what it reads is nobody's promise. */
int store_hint_put(struct store *store, const char *id, const char *name, const void *data, size_t length, struct err *err);
int store_hint_get(struct store *store, const char *id, const char *name, size_t limit, struct buf *out, struct err *err);
/* For one that is changed in place, under a lock of its own. Made, empty, if there is none. *fd: the caller's. */
int store_hint_open(struct store *store, const char *id, const char *name, int *fd, struct err *err);

/* --- removing --- */

struct store_pin;
/*
 * Holds a checkpoint: it cannot be removed until it is let go or this process ends. A VM's process holds the one that it stands at, and the
 * one that it goes back to or starts from; who makes a checkpoint holds its parent from before it reads the index until it has committed.
 * Any number of holders. -ENOENT: there is none (any more).
 */
int store_pin(struct store *store, const char *id, struct store_pin **out, struct err *err);
void store_unpin(struct store_pin *pin); /* NULL is allowed */

/* What a removal gave back. Adds up over calls. */
struct store_freed {
	uint64_t checkpoints, memory_layers, bytes;
	uint64_t disk_layers; /* that no checkpoint names any more: store_gc removes those of them that no disk stands on */
};
/*
 * Removes a checkpoint. Its children stay whole, as their indices name all layers that they need, and become its parent's; so do VMs that do
 * not run and stood at it. Memory layers that no other checkpoint names are unlinked; whoever has them mapped or open keeps them.
 * The commit point is the rename of its folder into staging/. Refused, without effect: -EBUSY, ERR_STATE while a living process holds it or a
 * living VM stands at it; -EEXIST, ERR_STATE if it has a tag, unless `tagged`.
 */
int store_checkpoint_remove(struct store *store, const char *id, bool tagged, struct store_freed *freed, struct err *err);
/* Several, which costs hardly more than one. Those that are in use, have a tag, or are gone stay as they are, and are no failure. */
int store_checkpoints_remove(struct store *store, const char (*ids)[STORE_ID_BYTES], size_t count, struct store_freed *freed,
			     struct err *err);
/* Of periodic checkpoints these stay: the newest ones, and the newest one of each of so many hours, and days, of UTC that have any. */
struct store_keep {
	uint64_t newest, hourly, daily;
};
/*
 * The checkpoints of a VM that `keep` lets go: periodic ones beyond those that it keeps which have no tag, at which no VM
 * stands, and from which no more than one checkpoint, of the same VM, comes. Oldest first, at most `most`. *ids is malloc'ed.
 */
int store_surplus(struct store *store, const char *vm, const struct store_keep *keep, size_t most, char (**ids)[STORE_ID_BYTES],
		  size_t *count, struct err *err);

struct store_gc_result {
	uint64_t memory_layers, disk_layers, bytes; /* removed */
	uint64_t kept_disk_layers;		    /* that no checkpoint names, but a disk or another layer stands on */
	uint64_t forgotten;			    /* entries of the catalogue whose checkpoint is gone */
};
/*
 * Removes layers that nothing needs: no checkpoint, no checkpoint in the making, no disk of a VM. Safe while VMs run and other processes take
 * checkpoints. Refuses (ERR_DAMAGED, ERR_FAILED) to remove what it cannot judge: while a checkpoint's manifest, or the header of a
 * disk that may stand on layers, cannot be read.
 */
int store_gc(struct store *store, struct store_gc_result *out, struct err *err);
/* Remembers that the image at `path` may stand on layers of this store. Before it does. */
int store_note_image(struct store *store, const char *path, struct err *err);

struct store_rebuilt {
	uint64_t checkpoints, vms, tags; /* in the new catalogue; tags: taken over from the old one */
	bool lost_vms, lost_tags, lost_images; /* the old one could not be read to the end */
};
/*
 * Makes the catalogue anew from manifests and indices; what it alone knows is taken over from the old one as far as that can be read. For a store that no
 * process has open: -EBUSY, ERR_STATE. If it is not known any more which images stand on layers, store_gc leaves all disk layers alone from then on.
 */
int store_rebuild(const char *path, struct store_rebuilt *out, struct err *err);

/* --- merging disk layers: merge.c tells how --- */

struct cow_merged;
struct store_merging;
/* Holds the right to merge disk layers of this store until store_merge_end or death. -EBUSY, ERR_STATE: somebody else has it. */
int store_merge_begin(struct store *store, struct store_merging **out, struct err *err);
void store_merge_end(struct store_merging *merging); /* NULL is allowed */

struct store_run {
	char *path;	 /* of the topmost layer */
	unsigned layers; /* from it downwards, that are to become one: cow_merge_prepare */
	uint64_t bytes;	 /* that they occupy */
};
/*
 * What is worth merging: layers that no checkpoint names, at least `least` in a run, under `images` (full paths), or in the whole store
 * (NULL). The longest stretch of a run whose largest layer is not more than twice all others.
 */
int store_merge_runs(struct store_merging *merging, const char *const *images, size_t image_count, size_t least, struct store_run **list,
		     size_t *count, struct err *err);
void store_runs_free(struct store_run *list, size_t count);
/* cow_merge_commit, while nobody removes layers. */
int store_merge_commit(struct store_merging *merging, struct cow_merged *merged, struct err *err);
/* True for an error that concerns one run, at this moment: it is in use, has gone, or holds what a merge would lose. */
bool store_merge_passes(int rc);

struct store_merge_unused {
	size_t least;
	const volatile bool *cancel; /* NULL: never */
	void (*progress)(void *opaque, uint64_t done_bytes, uint64_t total_bytes); /* of one run; NULL: none */
	void *opaque;
};
struct store_merge_result {
	uint64_t runs, layers, copied_bytes; /* merged: so many layers became so many */
	uint64_t used;			     /* runs that a process has open, and that are left to it */
};
/* Merges what is worth it of chains that no process uses. What is left over then goes with store_gc. -EBUSY, ERR_STATE as store_merge_begin. */
int store_merge_unused(struct store *store, const struct store_merge_unused *how, struct store_merge_result *out, struct err *err);

/*
 * The memory layers that a consolidation may merge: of those in `layers` the ones that are no checkpoint's own layer, and that no checkpoint
 * names but periodic ones of `vm` without a tag: others keep them in any case. Sets may[i].
 */
int store_mergeable(struct store *store, const char *vm, const char (*layers)[STORE_ID_BYTES], uint32_t count, bool *may,
		    struct err *err);

/* --- naming --- */
int store_tag(struct store *store, const char *id, const char *tag,
	      struct err *err); /* moves nothing: -EEXIST if the tag names another */
/* Takes the tag away; the checkpoint stays. -ENOENT, ERR_NOT_FOUND: there is no such tag. */
int store_untag(struct store *store, const char *tag, struct err *err);
/* How many tags a checkpoint has, and the first of them ("" if none). */
int store_count_tags(struct store *store, const char *id, uint64_t *count, char first[STORE_NAME_BYTES], struct err *err);

#endif
