/*
 * What happened to a VM, for clients that want to be told: the newest EVENTS_KEPT, numbered from 1 on. A client asks for those after the number it has
 * seen, and waits for the next.
 *
 * Threads: any. NULL stands for a VM whose events nobody can ask for.
 */
#ifndef VMCP_CONTROL_EVENTS_H
#define VMCP_CONTROL_EVENTS_H

#include <stdint.h>

#include <jansson.h>

#define EVENTS_KEPT 256u

struct events;

struct events *events_create(void);
/* Nobody waits any more: after events_end, with all clients' threads joined. */
void events_destroy(struct events *events);
/* `detail` (an object, stolen; NULL: none) is what belongs to the event beside its number, time and type. */
void events_post(struct events *events, const char *type, json_t *detail);
/* Posts "ended", and lets nobody wait any more. */
void events_end(struct events *events);
/* Those after number `after`, waiting up to timeout_ns for the first. A new document: docs/control.md, `vm.events`. UINT64_MAX: none of those that were. */
json_t *events_wait(struct events *events, uint64_t after, uint64_t timeout_ns);

#endif
