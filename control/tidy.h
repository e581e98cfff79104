/*
 * Tidying the store beside a running VM: a thread that merges disk layers below its disks which no checkpoint names any more, and removes
 * layers that nothing stands on. It sleeps until it is woken.
 */
#ifndef VMCP_CONTROL_TIDY_H
#define VMCP_CONTROL_TIDY_H

#include <jansson.h>

#include "base/err.h"

struct control_target;
struct tidy;

struct tidy *tidy_create(struct control_target *target);
int tidy_begin(struct tidy *tidy, struct err *err); /* starts the thread */
/* Disk layers have come to be named by no checkpoint. Returns at once. Any thread; NULL is allowed. */
void tidy_wake(struct tidy *tidy);
void tidy_end(struct tidy *tidy);     /* asks it to stop; NULL is allowed */
void tidy_destroy(struct tidy *tidy); /* waits for it; NULL is allowed */
/* What it did, for vm.stats. Any thread. */
json_t *tidy_to_json(struct tidy *tidy);

#endif
