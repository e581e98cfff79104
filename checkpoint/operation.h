/* One operation of the engine at a time; see engine_internal.h for the states. */
#ifndef VMCP_CHECKPOINT_OPERATION_H
#define VMCP_CHECKPOINT_OPERATION_H

#include "base/err.h"

struct ckpt_engine;

enum operation_kind {
	OPERATION_TAKE,	  /* refused while the machine is half restored */
	OPERATION_REVERT, /* waits for a checkpoint in the background */
};

/* -EBUSY, ERR_STATE if another is under way. `id`: of the checkpoint that is gone back to, for who asks; "": it has none yet. */
int operation_begin(struct ckpt_engine *engine, enum operation_kind kind, const char *id, struct err *err);
void operation_end(struct ckpt_engine *engine);

#endif
