/*
 * Memory from layers: reading, checking and putting back.
 *
 * Bitmaps have one bit a ram page (vmm/memory.h). Threads: one at a time for one struct.
 */
#ifndef VMCP_CHECKPOINT_RESTORE_H
#define VMCP_CHECKPOINT_RESTORE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "checkpoint/index.h"
#include "checkpoint/store/crypt.h"
#include "checkpoint/sums.h"
#include "vmm/memory.h"

/* Pages that are read and checked at once. */
#define RESTORE_CHUNK_PAGES PAGE_SUMS_MAX_READ

/* The layers of an index, opened as they are needed. */
struct restore_layers {
	struct store *store;
	const struct page_index *index;
	struct restore_layer {
		int fd;
		uint64_t pages; /* that its file has room for */
		struct page_sums sums;
		struct seal_pages *cipher; /* of an encrypted store */
	} *layers;
};
/* The index stays the caller's, unchanged until restore_close. */
int restore_init(struct restore_layers *layers, struct store *store, const struct page_index *index, struct err *err);
/* All zero is allowed. */
void restore_close(struct restore_layers *layers);
/* Where pages [first, first + count) of one extent are: the layer's file, which stays theirs, and the first one's place in it. What is there is encrypted if the
 * store is. */
int restore_find(struct restore_layers *layers, const struct index_extent *part, int *fd, uint64_t *place, struct err *err);
/* Room for RESTORE_CHUNK_PAGES pages, which the caller frees; NULL with err. Who reads much has it once: to have it anew each time costs more than the
 * checksums of what is read into it. */
uint8_t *restore_alloc_chunk(struct err *err);
/* Reads those pages of [first, end) that the index takes from a layer, by way of `chunk`, and checks them against their checksums. which: bitmap,
 * NULL: all. A page that does not check: ERR_DAMAGED, naming layer and page. */
int restore_verify(struct restore_layers *layers, const uint64_t *which, uint64_t first, uint64_t end, uint8_t *chunk, struct err *err);
/* Reads pages [first, first + count), at most RESTORE_CHUNK_PAGES, of layer `number` (from 1) into `data`, checks and decrypts them. */
int restore_read(struct restore_layers *layers, uint32_t number, uint64_t first, uint64_t count, uint8_t *data, struct err *err);
/* Layers whose files are open. */
unsigned restore_open_layers(const struct restore_layers *layers);
/* Makes the pages of `which` what the index says. `fresh`: memory is all zero, and each page is checked against its checksum on the
 * way. *changed: pages that differed. */
int restore_memory(struct mem *mem, struct restore_layers *layers, const uint64_t *which, bool fresh, uint64_t *changed,
		   struct err *err);

#endif
