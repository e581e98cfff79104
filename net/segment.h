/* Cuts a TCP segment of up to 64 KiB, as cards with segmentation offload send it, into frames for a card without. */
#ifndef VMCP_NET_SEGMENT_H
#define VMCP_NET_SEGMENT_H

#include <stdbool.h>

#include "net/net.h"

struct segmenter {
	size_t bytes; /* of the frame; 0: there is none, or nothing is left of it */
	size_t tcp, data, at, size; /* places in it: the TCP header, the data, the data that comes next; data in one piece */
	bool ipv6;
	unsigned pieces; /* so far */
	uint8_t frame[NET_BUFFER_BYTES]; /* with virtio's header */
};

/* Of the `bytes` in s->frame, whose header says that they are to be cut. -EINVAL: they are no such frame. */
int segmenter_begin(struct segmenter *s, size_t bytes);
/* The next frame, with its header, checksums filled in: its length, 0 behind the last. */
size_t segmenter_next(struct segmenter *s, uint8_t *out);

#endif
