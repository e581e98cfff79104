/* How exports and imports understand a machine's configuration: for transfer_options (checkpoint/store/transfer.h). */
#ifndef VMCP_CONTROL_TRANSFER_CONFIG_H
#define VMCP_CONTROL_TRANSFER_CONFIG_H

#include "checkpoint/store/transfer.h"

/* An imported configuration keeps nothing of the host that it comes from: disks are where the place says, kernel, initrd and what cards are bound to are
 * those of the base, or none, and the user network without forwarded ports. Any thread. */
extern const struct transfer_config control_transfer_config;

#endif
