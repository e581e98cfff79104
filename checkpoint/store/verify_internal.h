/* What the files of `verify` share. One story in four parts: verify.c gathers what is needed and tells who is hurt by what; verify_memory.c and
 * verify_disks.c know memory layers and disk chains; verify_read.c has the threads that read. */
#ifndef VMCP_CHECKPOINT_STORE_VERIFY_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_VERIFY_INTERNAL_H

#include "checkpoint/index.h"
#include "checkpoint/store/store_internal.h"
#include "checkpoint/store/verify.h"

/* A memory layer, and which of its pages are needed. Entries are those of its .sums, in their order. */
struct needed_layer {
	char id[STORE_ID_BYTES];
	uint64_t count;
	uint32_t *pages; /* by entry, ascending */
	uint64_t *needed, *wrong; /* bitmaps by entry. wrong: under verify.lock */
	uint64_t needed_count;
	bool broken; /* no page of it can be checked: damage says why */
	uint32_t damage;
	struct wrong_run {
		uint64_t first, end; /* entries */
		uint32_t damage;
	} *runs; /* once all is read */
	size_t run_count;
};

/* A disk layer or base image. */
struct needed_disk {
	char *path;
	struct needed_disk *below; /* the file that it stands on, NULL: none */
	int format; /* by its name, -1: it is none of the store's; once looked_below */
	bool looked_below;
	bool recorded; /* bytes and xxh3 are known */
	uint64_t bytes, xxh3;
	char *wrong; /* what is, once it was read; NULL: nothing */
	bool damaged;
	uint32_t damage;
};

struct gathered { /* a checkpoint */
	struct store_pin *pin;
	bool gone, has_index;
	struct needed_disk **disks; /* the top of each disk's chain */
	uint32_t disk_count;
	struct store_checkpoint manifest;
};

struct verify {
	struct store *store;
	const struct verify_options *options;
	struct verify_result *result;
	const struct verify_result *suspects; /* look only at files that are damaged in this one; NULL: at all */
	struct gathered *gathered;	      /* by checkpoint */
	struct needed_layer **layers;	      /* sorted by id */
	size_t layer_count;
	struct needed_disk **disks;
	size_t disk_count;
	struct store_disk_layer *records; /* of all manifests in the store, once needed; sorted by layer */
	size_t record_count;
	bool has_records;

	pthread_mutex_t lock; /* what follows */
	pthread_cond_t ended;
	unsigned working;
	size_t next_disk, next_layer;
	uint64_t next_entry;
	uint64_t done_bytes, total_bytes, started_ns;
};

/* verify.c */
/* The number of a damage, which is entered unless it is there. `message` is taken. */
uint32_t verify_add_damage(struct verify *v, const char *file, uint64_t offset, uint64_t bytes, char *message);
void verify_blame(struct verify *v, size_t checkpoint, uint32_t damage);
/* False: this pass need not look at the file. */
bool verify_wants(const struct verify *v, const char *file);

/* verify_memory.c */
/* The pages of one extent are needed by a checkpoint. What the layer cannot give it is blamed. */
int verify_need_pages(struct verify *v, size_t checkpoint, const struct page_index *index, const struct index_extent *extent,
		      struct err *err);
uint64_t verify_memory_bytes(const struct verify *v);
/* Checks entries [first, end) of a layer, as far as they are needed. `buffer`: VERIFY_BUFFER_PAGES pages. */
#define VERIFY_BUFFER_PAGES 64u
void verify_check_pages(struct verify *v, struct needed_layer *layer, uint64_t first, uint64_t end, uint8_t *buffer);
/* When all is read: makes damages of wrong pages, and finds who takes pages from there. */
void verify_tell_wrong_pages(struct verify *v);
void verify_blame_pages(struct verify *v, size_t checkpoint, const struct page_index *index);
void verify_free_layers(struct verify *v);

/* verify_disks.c */
int verify_need_disks(struct verify *v, size_t checkpoint, const struct store_checkpoint *manifest, struct err *err);
void verify_check_disk(struct verify *v, struct needed_disk *disk);
void verify_tell_wrong_disks(struct verify *v);
void verify_free_disks(struct verify *v);

/* verify_read.c */
/* Reads all that was gathered. */
int verify_read(struct verify *v, struct err *err);
/* Bytes were read: counts them, and waits where the rate is limited. Any thread. */
void verify_count(struct verify *v, uint64_t progress_bytes, uint64_t read_bytes);
/* Then what was read says nothing. */
bool verify_is_cancelled(const struct verify *v);

#endif
