/*
 * Periodic live checkpoints of the process's VM, and what follows them: old ones go as `keep` says, and the memory layers that these leave are
 * consolidated. Two threads: one takes, one keeps house.
 *
 * Instants lie on a fixed grid; those that pass while a checkpoint is still written, while another operation is under way, or while the VM is
 * paused, are left out. Failures are told once, in the log and in the VM's record, and harm nobody: the next instant is another try.
 */
#ifndef VMCP_CONTROL_PERIODIC_H
#define VMCP_CONTROL_PERIODIC_H

#include <stdint.h>

#include <jansson.h>

#include "base/err.h"

struct control_target;
struct machine_config;
struct periodic;

/* Puts --every and --keep, where not NULL, into the configuration. ERR_USAGE, naming the option. */
int periodic_override(struct machine_config *config, const char *every, const char *keep, struct err *err);

/* No periodic checkpoints are configured: NULL, which all functions allow. No thread runs yet. The target stays the caller's, and in place. */
struct periodic *periodic_create(struct control_target *target, const struct machine_config *config);
int periodic_begin(struct periodic *periodic, struct err *err);
/* Begins nothing new. What is under way goes on. */
void periodic_end(struct periodic *periodic);
/* Waits for the threads. After periodic_end, with the machine gone or about to be. */
void periodic_destroy(struct periodic *periodic);
/* For vm.stats: docs/control.md. Any thread. */
json_t *periodic_to_json(struct periodic *periodic);

#endif
