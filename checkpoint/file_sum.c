#include "checkpoint/file_sum.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"

#define CHUNK_BYTES (256u << 10) /* stays in a processor's own cache */

/* Where the next stretch of data is. What the filesystem cannot tell is data. */
static void find_data(int fd, uint64_t at, uint64_t size, uint64_t *data, uint64_t *hole)
{
	off_t next = lseek(fd, (off_t)at, SEEK_DATA);
	*data = next >= 0 ? (uint64_t)next : errno == ENXIO ? size : at;
	off_t end = next >= 0 ? lseek(fd, next, SEEK_HOLE) : -1;
	*hole = end > (off_t)at ? (uint64_t)end : size;
}

int file_sum(int fd, uint64_t size, file_sum_step step, void *opaque, uint64_t *sum, struct err *err)
{
	XXH3_state_t *state = XXH3_createState();
	CLEANUP_FREE uint8_t *chunk = malloc(CHUNK_BYTES);
	int r = state && chunk ? 0 : err_sys(err, ENOMEM, "checksum");
	uint64_t data = 0, hole = 0; /* [data, hole) is the next stretch of data */
	if (r == 0)
		XXH3_64bits_reset(state);
	for (uint64_t at = 0; at < size && r == 0;) {
		if (at >= hole)
			find_data(fd, at, size, &data, &hole);
		bool read = at >= data;
		size_t length = (size_t)min_u64(min_u64(read ? hole : data, size) - at, CHUNK_BYTES);
		if (read)
			r = file_pread_full(fd, chunk, length, at, err);
		else
			memset(chunk, 0, length);
		if (r == 0)
			XXH3_64bits_update(state, chunk, length);
		at += length;
		if (r == 0 && step && !step(opaque, length, read))
			r = err_set(err, ERR_FAILED, ECANCELED, "cancelled while a file was being checksummed");
	}
	if (r == 0)
		*sum = XXH3_64bits_digest(state);
	XXH3_freeState(state);
	return r;
}
