/* What virtio_blk.c (requests) and virtio_blk_state.c (checkpoints) share. */
#ifndef VMCP_DEVICES_VIRTIO_BLK_INTERNAL_H
#define VMCP_DEVICES_VIRTIO_BLK_INTERNAL_H

#include "base/buf.h"
#include "devices/virtio_blk.h"

#define BLK_CONFIG_BYTES 60u /* struct virtio_blk_config up to write_zeroes_may_unmap (5.2.4) */
#define BLK_ID_BYTES	 20u

/* Request types (5.2.6). */
enum {
	BLK_IN = 0,
	BLK_OUT = 1,
	BLK_FLUSH = 4,
	BLK_GET_ID = 8,
	BLK_DISCARD = 11,
	BLK_WRITE_ZEROES = 13,
};
enum { BLK_S_OK = 0, BLK_S_IOERR = 1, BLK_S_UNSUPP = 2 };

/*
 *     free --pop--> [listed] --start--> with cowdisk --done--> published, free
 *                      ^
 *     checkpoint ------'  (deferred: listed, started by the I/O thread when the loop runs again)
 */
struct blk_request {
	struct cow_request cow;
	struct virtio_blk *blk;
	struct blk_request *prev, *next; /* in the list of requests in flight; next also in a free list */
	uint16_t queue;
	bool deferred;	/* restored from a checkpoint and not started yet */
	bool flushing;	/* the write is done, its flush is under way (write-through) */
	bool recorded;	/* listed in the last capture; its completion goes into the log */
	uint64_t since_ns; /* in flight since then */
	uint32_t index; /* place in that list */
	uint32_t type;
	uint64_t sector, bytes;		 /* what the request is about */
	uint32_t flags;			 /* of a discard or write of zeroes */
	uint64_t data_bytes;		 /* in the chain */
	unsigned data_first, data_count; /* the data's segments in chain.iov */
	uint32_t in_bytes;		 /* all that the driver gave to be written, status included */
	uint8_t *status;
	uint64_t status_gpa;
	struct virtq_chain chain; /* without header and status once prepared */
};

struct blk_queue {
	struct blk_request *requests; /* VIRTQ_MAX_SIZE; touched only as far as they were used at once */
	struct blk_request *free;
	unsigned fresh; /* how many were ever taken */
	bool starved;	/* a completion must look at the queue again */
};

/* One of the requests in flight in a checkpoint. */
struct blk_inflight {
	uint16_t queue, head;
	uint32_t type;
	uint64_t sector, bytes;
};

struct virtio_blk {
	struct virtio_device *vdev; /* immutable, as all down to the next comment */
	struct cow_disk *disk;
	unsigned queue_count;
	bool readonly, detect_zeroes;
	char id[BLK_ID_BYTES];
	uint8_t config[BLK_CONFIG_BYTES];

	/* under the device lock */
	struct blk_queue queues[VIRTIO_BLK_MAX_QUEUES];
	struct blk_request *first, *last; /* in flight, in order of submission */
	unsigned errors;		  /* for the log */
	struct virtio_blk_stats stats;
	unsigned unpublished;		  /* queues, by bit: the turn of the ring will publish */
	struct cow_turn turn;

	/* under the device lock: the last capture */
	struct component_inflight captured;
	uint32_t recorded_pending; /* recorded requests that have not ended */
	struct buf log;

	/* between apply and apply_log */
	struct blk_inflight *restored;
	uint32_t restored_count;
};

/* All with the device lock held. */
struct blk_request *blk_take(struct virtio_blk *blk, unsigned queue); /* NULL: all in flight */
void blk_link(struct blk_request *r);				      /* in flight from here */
void blk_release(struct blk_request *r);			      /* taken, not in flight */
void blk_end(struct blk_request *r);				      /* in flight no more, nothing published */
int blk_prepare(struct blk_request *r,
		struct err *err); /* reads the header; -EPROTO if header or status have no room */
/* Puts it into the used ring; blk_publish_all or virtio_publish shows it. */
void blk_put(struct blk_request *r, uint8_t status);
bool blk_is_write(uint32_t type);
const char *blk_type_name(uint32_t type);

/* virtio_blk_state.c: r was recorded and has ended (logged: with this status). */
void blk_record_end(struct blk_request *r, bool logged, uint8_t status);

#endif
