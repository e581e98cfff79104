/* qcow2 on disk, after "Qcow2 Image File Format" (docs/interop/qcow2 of the QEMU project). Numbers are big-endian
 * there. */
#ifndef VMCP_COWDISK_QCOW2_FORMAT_INTERNAL_H
#define VMCP_COWDISK_QCOW2_FORMAT_INTERNAL_H

#include <stdint.h>

#define QCOW2_MAGIC 0x514649fbu /* "QFI\xfb" */

enum {
	QCOW2_HEADER_V2_BYTES = 72,
	QCOW2_HEADER_V3_BYTES = 104,
	QCOW2_MIN_CLUSTER_BITS = 9,
	QCOW2_MAX_CLUSTER_BITS = 21,
	QCOW2_MAX_BACKING_NAME = 1023,
	QCOW2_SNAPSHOT_HEADER_BYTES = 40,
};
/* Offsets of header fields. */
enum {
	QCOW2_AT_MAGIC = 0,
	QCOW2_AT_VERSION = 4,
	QCOW2_AT_BACKING_OFFSET = 8,
	QCOW2_AT_BACKING_SIZE = 16,
	QCOW2_AT_CLUSTER_BITS = 20,
	QCOW2_AT_SIZE = 24,
	QCOW2_AT_CRYPT = 32,
	QCOW2_AT_L1_COUNT = 36,
	QCOW2_AT_L1_OFFSET = 40,
	QCOW2_AT_REFTABLE_OFFSET = 48,
	QCOW2_AT_REFTABLE_CLUSTERS = 56,
	QCOW2_AT_SNAPSHOT_COUNT = 60,
	QCOW2_AT_SNAPSHOTS_OFFSET = 64,
	QCOW2_AT_INCOMPATIBLE = 72,
	QCOW2_AT_COMPATIBLE = 80,
	QCOW2_AT_AUTOCLEAR = 88,
	QCOW2_AT_REFCOUNT_ORDER = 96,
	QCOW2_AT_HEADER_LENGTH = 100,
	QCOW2_AT_COMPRESSION = 104,
};
/* Incompatible features. */
#define QCOW2_INCOMPAT_DIRTY	   1u
#define QCOW2_INCOMPAT_CORRUPT	   2u
#define QCOW2_INCOMPAT_DATA_FILE   4u
#define QCOW2_INCOMPAT_COMPRESSION 8u
#define QCOW2_INCOMPAT_EXTENDED_L2 16u
/* Autoclear features. */
#define QCOW2_AUTOCLEAR_BITMAPS 1u

/* Header extensions. */
#define QCOW2_EXT_END		 0u
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acau
#define QCOW2_EXT_BITMAPS	 0x23852875u

/* Entries of L1 and L2 tables. */
#define QCOW2_OFFSET_MASK 0x00fffffffffffe00ull
#define QCOW2_COPIED	  (1ull << 63)
#define QCOW2_COMPRESSED  (1ull << 62)
#define QCOW2_ZERO	  1ull

/* Bounds on what is kept in memory whole, whatever a header says. The same as QEMU's. */
#define QCOW2_MAX_L1_BYTES	 (32u << 20)
#define QCOW2_MAX_REFTABLE_BYTES (8u << 20)
#define QCOW2_MAX_SNAPSHOTS	 65536u

enum { QCOW2_COMPRESSION_ZLIB = 0, QCOW2_COMPRESSION_ZSTD = 1 };

struct qcow2_header {
	uint32_t version;
	unsigned cluster_bits;
	uint64_t size;
	uint32_t crypt;
	uint32_t l1_count;
	uint64_t l1_offset;
	uint64_t reftable_offset;
	uint32_t reftable_clusters;
	uint32_t snapshot_count;
	uint64_t snapshots_offset;
	uint64_t incompatible, compatible, autoclear;
	unsigned refcount_order;
	uint32_t header_length;
	unsigned compression;
};

#endif
