/* Compressed clusters: read only. */
#include <errno.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "base/bytes.h"
#include "cowdisk/image_internal.h"

void qcow2_compressed_range(const struct image *image, uint64_t entry, uint64_t *offset, uint64_t *length)
{
	unsigned shift = 62 - (image->q.header.cluster_bits - 8);
	uint64_t sectors = ((entry >> shift) & (((uint64_t)1 << (62 - shift)) - 1)) + 1;
	*offset = entry & (((uint64_t)1 << shift) - 1);
	*length = sectors * 512 - (*offset & 511);
}

static int unpack_zlib(const void *packed, size_t packed_bytes, void *cluster, size_t cluster_bytes)
{
	z_stream z = {
		.next_in = (Bytef *)packed,
		.avail_in = (uInt)packed_bytes,
		.next_out = cluster,
		.avail_out = (uInt)cluster_bytes,
	};
	if (inflateInit2(&z, -12) != Z_OK)
		return -ENOMEM;
	int rc = inflate(&z, Z_FINISH);
	/* The input is padded to whole sectors, so its end need not be the stream's. */
	bool whole = (rc == Z_STREAM_END || rc == Z_BUF_ERROR) && z.avail_out == 0;
	inflateEnd(&z);
	return whole ? 0 : -EIO;
}

static int unpack_zstd(const void *packed, size_t packed_bytes, void *cluster, size_t cluster_bytes)
{
	ZSTD_DCtx *context = ZSTD_createDCtx();
	if (!context)
		return -ENOMEM;
	ZSTD_inBuffer in = {.src = packed, .size = packed_bytes};
	ZSTD_outBuffer out = {.dst = cluster, .size = cluster_bytes};
	int rc = 0;
	while (rc == 0 && out.pos < out.size) {
		size_t in_before = in.pos, out_before = out.pos;
		size_t left = ZSTD_decompressStream(context, &out, &in);
		bool stuck = in.pos == in_before && out.pos == out_before;
		if (ZSTD_isError(left) || stuck)
			rc = -EIO;
	}
	ZSTD_freeDCtx(context);
	return rc;
}

int qcow2_unpack(const struct image *image, const void *packed, size_t packed_bytes, void *cluster)
{
	size_t bytes = (size_t)image_cluster_bytes(image);
	if (image->q.header.compression == QCOW2_COMPRESSION_ZSTD)
		return unpack_zstd(packed, packed_bytes, cluster, bytes);
	return unpack_zlib(packed, packed_bytes, cluster, bytes);
}
