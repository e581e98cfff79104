/* See map.h. */
#include "cowdisk/map.h"

#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "cowdisk/io_internal.h"
#include "cowdisk/image_internal.h"

int cow_map(struct cow_disk *disk, uint64_t offset, uint64_t length, struct cow_run *out, struct err *err)
{
	struct image *owner;
	struct mapping m;

	if (length == 0 || !range_within(offset, length, disk->size))
		return err_set(err, ERR_FAILED, EINVAL, "%s: no bytes at %" PRIu64, disk->top->path, offset);
	int rc = cow_chain_map(disk->top, offset, length, &owner, &m);
	if (rc < 0)
		return err_sys(err, rc, "%s: the map at %" PRIu64, disk->top->path, offset);
	*out = (struct cow_run){.length = min_u64(m.length, length)};
	if (m.kind != MAP_DATA && m.kind != MAP_COMPRESSED)
		return 0;
	out->data = true;
	out->compressed = m.kind == MAP_COMPRESSED;
	out->device = owner->device;
	out->inode = owner->inode;
	out->place = out->compressed ? m.entry : m.host;
	return 0;
}

struct zero_call {
	struct cow_request request;
	bool done;
	int result;
};

static void zero_done(struct cow_request *request, int result)
{
	struct zero_call *call = request->opaque;
	call->result = result;
	call->done = true;
}

int cow_zero_sync(struct cow_disk *disk, uint64_t offset, uint64_t length, struct err *err)
{
	struct zero_call call = {.request = {.op = COW_WRITE_ZEROES, .may_unmap = true, .offset = offset, .length = length, .done = zero_done}};

	call.request.opaque = &call;
	cow_submit(disk, &call.request);
	while (!call.done)
		cow_io_drive(disk->io, -1);
	if (call.result < 0)
		return err_sys(err, call.result, "%s: zeroes of %" PRIu64 " bytes at %" PRIu64, disk->top->path, length, offset);
	return 0;
}
