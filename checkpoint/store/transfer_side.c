/* A checkpoint of this store, opened for reading its memory. */
#include <errno.h>
#include <string.h>

#include "checkpoint/store/transfer_internal.h"

int transfer_side_open(struct store *store, const char *id, struct transfer_side *side, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = store_pin(store, id, &side->pin, err);

	if (!rc)
		rc = store_checkpoint_get(store, id, &side->checkpoint, err);
	if (!rc)
		rc = store_checkpoint_read(store, &side->checkpoint, "index", &text, err);
	if (!rc)
		rc = page_index_decode(text.data, text.length, &side->index, err);
	if (!rc && side->index.page_count * PAGE_BYTES != side->checkpoint.memory_bytes)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "its index is of another size of memory");
	if (!rc)
		rc = restore_init(&side->layers, store, &side->index, err);
	return rc ? err_prefix(err, "checkpoint %.8s", id) : 0;
}

void transfer_side_close(struct transfer_side *side)
{
	restore_close(&side->layers);
	page_index_free(&side->index);
	store_checkpoint_free(&side->checkpoint);
	store_unpin(side->pin);
}

const struct store_disk_layer *transfer_find_layer(const struct store_checkpoint *c, const char *name)
{
	for (uint32_t i = 0; i < c->disk_count; i++)
		if (!strcmp(c->disks[i].disk, name))
			return &c->disks[i];
	return NULL;
}
