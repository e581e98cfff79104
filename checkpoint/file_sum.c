#include "checkpoint/file_sum.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"

#define CHUNK_BYTES (256u << 10) /* stays in a processor's own cache */

int file_sum(int fd, uint64_t size, file_sum_step step, void *opaque, uint64_t *sum, struct err *err)
{
	XXH3_state_t *state = XXH3_createState();
	CLEANUP_FREE uint8_t *chunk = malloc(CHUNK_BYTES);
	int r = state && chunk ? 0 : err_sys(err, ENOMEM, "checksum");
	uint64_t end = 0; /* of the stretch that `at` is in */
	bool hole = false;
	if (r == 0)
		XXH3_64bits_reset(state);
	for (uint64_t at = 0; at < size && r == 0;) {
		if (at >= end)
			hole = file_is_hole(fd, at, &end);
		size_t length = (size_t)min_u64(min_u64(end, size) - at, CHUNK_BYTES);
		if (!hole)
			r = file_pread_full(fd, chunk, length, at, err);
		else
			memset(chunk, 0, length);
		if (r == 0)
			XXH3_64bits_update(state, chunk, length);
		at += length;
		if (r == 0 && step && !step(opaque, length, !hole))
			r = err_set(err, ERR_FAILED, ECANCELED, "cancelled while a file was being checksummed");
	}
	if (r == 0)
		*sum = XXH3_64bits_digest(state);
	XXH3_freeState(state);
	return r;
}
