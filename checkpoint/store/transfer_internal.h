/* What the files of exports and imports share: chunks, the pipeline that packs or unpacks them on all processors. */
#ifndef VMCP_CHECKPOINT_STORE_TRANSFER_INTERNAL_H
#define VMCP_CHECKPOINT_STORE_TRANSFER_INTERNAL_H

#include <pthread.h>

#include <xxhash.h>

#include "base/bytes.h"
#include "checkpoint/restore.h"
#include "checkpoint/store/seal_crypto.h"
#include "checkpoint/store/store_internal.h"
#include "checkpoint/store/transfer.h"

#define TRANSFER_VERSION      1
#define TRANSFER_START_BYTES  24
#define TRANSFER_HEADER_BYTES 32
#define TRANSFER_DATA_BYTES   (1u << 20) /* of pages or disk in one chunk */
#define TRANSFER_MAX_RUNS     256u
#define TRANSFER_RUN_BYTES    24u
#define TRANSFER_RUNS_BYTES   8u /* header of a chunk with runs */
#define TRANSFER_DATA_AT      8192u /* in a buffer, while runs are gathered: room for the table, and aligned for direct I/O */
#define TRANSFER_MAX_CONTENT  (TRANSFER_DATA_AT + TRANSFER_DATA_BYTES)
#define TRANSFER_MAX_STATE    (1ull << 30)
#define TRANSFER_MAX_CHUNKS   (1u << 26)
#define TRANSFER_END_BYTES    16u

enum transfer_kind {
	TRANSFER_HEAD = 1,
	TRANSFER_MANIFEST = 2,
	TRANSFER_STATE = 3,
	TRANSFER_MEMORY = 4,
	TRANSFER_DISK = 5,
	TRANSFER_END = 6,
};

struct transfer_header {
	uint32_t kind, number;
	uint32_t content_bytes, packed_bytes;
	uint64_t sum;
};

/* transfer_chunk.c */
void transfer_put_start(uint8_t out[TRANSFER_START_BYTES]);
int transfer_check_start(const uint8_t start[TRANSFER_START_BYTES], struct err *err);
void transfer_put_header(uint8_t out[TRANSFER_HEADER_BYTES], const struct transfer_header *header);
/* Bounds and number are checked. */
int transfer_get_header(const uint8_t in[TRANSFER_HEADER_BYTES], uint32_t number, struct transfer_header *header, struct err *err);
uint64_t transfer_sum(const struct transfer_header *header, const void *content);

/* The sums of all chunks, and the table at the end of the stream. */
struct transfer_ledger {
	XXH3_state_t *sums;
	uint32_t chunks;
	struct buf table; /* entries of the seek table */
};
int transfer_ledger_init(struct transfer_ledger *ledger, struct err *err);
void transfer_ledger_free(struct transfer_ledger *ledger);
int transfer_ledger_add(struct transfer_ledger *ledger, const struct transfer_header *header, struct err *err);
/* Content of the last chunk: what the ones before it are. */
void transfer_ledger_end(const struct transfer_ledger *ledger, uint8_t out[TRANSFER_END_BYTES]);
/* The frame of the seek table. */
int transfer_ledger_table(const struct transfer_ledger *ledger, struct buf *out, struct err *err);

/* A stretch of pages or of a disk: pages count from 0, disks in bytes. */
struct transfer_run {
	uint64_t first, count;
	bool data; /* false: zeroes */
};
struct transfer_runs {
	uint32_t object; /* the disk's number; 0 for memory */
	uint32_t count;
	struct transfer_run run[TRANSFER_MAX_RUNS];
	uint64_t data_bytes;
	const uint8_t *data;
};
/* Decodes content of a chunk of memory (unit 4096) or a disk (unit 1). Runs ascend from *next on, which becomes the end of the last, and
 * lie below `limit`; there is as much data as they say. */
int transfer_get_runs(const uint8_t *content, size_t length, uint64_t unit, uint64_t limit, uint64_t *next, struct transfer_runs *out,
		      struct err *err);
/* The header and table in front of the data, which lies at TRANSFER_DATA_AT of the same buffer until now. Returns the content's length. */
size_t transfer_put_runs(uint8_t *content, const struct transfer_runs *runs);

/* The first chunk. */
struct transfer_head {
	char id[STORE_ID_BYTES];
	char tag[STORE_NAME_BYTES];
	char since[STORE_ID_BYTES]; /* "": whole */
	uint64_t since_created_ns, since_state_xxh3;
	uint32_t disk_count;
	struct transfer_head_disk {
		char name[STORE_NAME_BYTES];
		uint64_t size_bytes;
		bool readonly;
		bool kept; /* read-only, and as `since` has it: not in the stream */
	} disks[TRANSFER_MAX_DISKS];
};
int transfer_head_encode(const struct transfer_head *head, struct buf *out, struct err *err);
int transfer_head_decode(const void *data, size_t length, struct transfer_head *out, struct err *err);

/* transfer_pipe.c */

struct transfer_slot {
	struct transfer_header header;
	uint8_t *content; /* TRANSFER_MAX_CONTENT bytes */
	uint8_t *packed;  /* transfer_packed_bound() */
	enum { SLOT_FREE, SLOT_FILLED, SLOT_WORKED_ON, SLOT_DONE } state;
};
size_t transfer_packed_bound(void);

struct transfer_pipe;
struct transfer_pipe_ops {
	/* In a thread of its own: gets slots, fills them, puts them. */
	int (*produce)(struct transfer_pipe *pipe, void *opaque, struct err *err);
	/* On all processors. */
	int (*work)(struct transfer_slot *slot, void *context, struct err *err);
	/* In the calling thread, in the order in which they were put. */
	int (*consume)(struct transfer_slot *slot, void *opaque, struct err *err);
	void *(*make_context)(void); /* for one thread's work; NULL: out of memory */
	void (*free_context)(void *context);
};
/* Runs to the end of all three, or the first failure of any. */
int transfer_pipe_run(const struct transfer_pipe_ops *ops, void *opaque, struct err *err);
/* Waits for room. NULL: somebody failed, give up (return -ECANCELED). */
struct transfer_slot *transfer_pipe_get(struct transfer_pipe *pipe);
void transfer_pipe_put(struct transfer_pipe *pipe, struct transfer_slot *slot);

/* Work of exports and of imports: for transfer_pipe_ops. */
void *transfer_make_packer(void);
void transfer_free_packer(void *context);
int transfer_pack(struct transfer_slot *slot, void *context, struct err *err);
void *transfer_make_unpacker(void);
void transfer_free_unpacker(void *context);
int transfer_unpack(struct transfer_slot *slot, void *context, struct err *err);

/* transfer_side.c: a checkpoint of this store, held and opened. All zero is closed. */
struct transfer_side {
	struct store_checkpoint checkpoint;
	struct store_pin *pin;
	struct page_index index;
	struct restore_layers layers;
};
/* On failure the caller closes it, too. */
int transfer_side_open(struct store *store, const char *id, struct transfer_side *side, struct err *err);
void transfer_side_close(struct transfer_side *side);
/* NULL: it has no such disk. */
const struct store_disk_layer *transfer_find_layer(const struct store_checkpoint *c, const char *name);

/* transfer_io.c: whole reads and writes on pipes and files that a cancel ends. */
struct transfer_io {
	int fd;
	const char *what;
	const volatile bool *cancel;
	uint64_t max_rate, started_ns, bytes;
	struct transfer_seal *seal; /* NULL: as it is; else what is written and read goes through it */
};
bool transfer_is_cancelled(const volatile bool *cancel, struct err *err);
/* transfer_seal.c: where a file may be cut off and gone on with, if what was read of it until now is to stay. */
struct transfer_mark {
	uint64_t bytes; /* of the file; of an encrypted one 0: nothing of it can stay */
	/* Encrypted: the tag of the piece that ends there, and what was read behind it, to be written once more. */
	uint8_t tag[SEAL_TAG_BYTES];
	uint8_t *text; /* malloc */
	size_t text_bytes;
};
void transfer_mark(const struct transfer_io *io, struct transfer_mark *mark);
void transfer_mark_free(struct transfer_mark *mark);
int transfer_write(struct transfer_io *io, const void *data, size_t length, struct err *err);
/* *got: less than length only at the end. */
int transfer_read(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err);
int transfer_write_raw(struct transfer_io *io, const void *data, size_t length, struct err *err);
int transfer_read_raw(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err);

/* transfer_seal.c: encryption, between the stream and the file or pipe. */
bool transfer_is_sealed(const uint8_t start[TRANSFER_START_BYTES]);
/* Writes the start, and what is written from then on is encrypted; the last bytes only with the end, which does nothing without a seal. resumable: it is a file, which may be
 * gone on with; older vmcps do not know such ones. */
int transfer_seal_begin(struct transfer_io *io, const struct transfer_key *key, bool resumable, struct err *err);
/* The same for a file that was read until the mark, and cut off there: with a key of its own. */
int transfer_seal_go_on(struct transfer_io *io, const struct transfer_key *key, const struct transfer_mark *mark, struct err *err);
int transfer_seal_end(struct transfer_io *io, struct err *err);
/* The first bytes are read already, and the key is the caller's until all is. key NULL: ERR_USAGE. A wrong key: -EKEYREJECTED, ERR_FAILED. */
int transfer_seal_open(struct transfer_io *io, const uint8_t begun[TRANSFER_START_BYTES], const struct transfer_key *key, struct err *err);
int transfer_seal_write(struct transfer_io *io, const void *data, size_t length, struct err *err);
int transfer_seal_read(struct transfer_io *io, void *data, size_t length, size_t *got, struct err *err);
/* Whatever became of the above. */
void transfer_seal_free(struct transfer_io *io);
/* Of one that was opened: it was begun as such. */
bool transfer_seal_is_resumable(const struct transfer_io *io);

#endif
