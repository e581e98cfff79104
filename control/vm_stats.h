/* What a VM counts, and what it is at: the document of `vm.stats` (docs/control.md). */
#ifndef VMCP_CONTROL_VM_STATS_H
#define VMCP_CONTROL_VM_STATS_H

#include <jansson.h>

#include "control/server.h"

/* The caller holds machine_lock, and target->machine is there. */
json_t *vm_stats_to_json(struct control_target *target);

#endif
