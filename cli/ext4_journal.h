/* The journal of an ext3 or ext4 filesystem (jbd2), read to find what a mount would write. */
#ifndef VMCP_CLI_EXT4_JOURNAL_H
#define VMCP_CLI_EXT4_JOURNAL_H

#include <stdint.h>

#include "base/err.h"

struct journal_reader {
	/* Block `number` of the journal, or of the filesystem where it is a journal's copy. */
	int (*read)(void *opaque, uint32_t number, uint8_t *data, struct err *err);
	/* The filesystem's block `number` is to hold `data`. Later ones stand for earlier ones. */
	int (*apply)(void *opaque, uint64_t number, const uint8_t *data, struct err *err);
	void *opaque;
	uint32_t block_bytes;
};
/* Applies every committed transaction, in order. A journal that makes no sense: ERR_DAMAGED. */
int journal_replay(const struct journal_reader *reader, struct err *err);

#endif
