/*
 * Virtio memory balloon (virtio 1.2, 5.5) with free page reporting (5.5.6.7): the guest gives pages back, the host has their memory.
 *
 * Inflating only notes the pages; they are given back in slices, a little later, so that neither the loop nor a pause waits for it. That
 * needs a driver that tells before it uses a page of the balloon again (VIRTIO_BALLOON_F_MUST_TELL_HOST, which all known ones do); of
 * another one nothing is given back. Reported pages are given back before the report is answered.
 *
 * While a checkpoint holds memory (mem_hold_discards) nothing is given back: ballooned pages are, later, unless they leave the balloon
 * before; reported ones stay the guest's. No page poisoning is offered: a guest that relies on the content of its free pages does
 * not report then. A page that was given back is zero when the guest next sees it.
 *
 * What a state holds: the target and what the guest says of its balloon. Pages that were still to be given back are not in it: after
 * a revert they stay.
 */
#ifndef VMCP_DEVICES_VIRTIO_BALLOON_H
#define VMCP_DEVICES_VIRTIO_BALLOON_H

#include <stdint.h>

#include "base/component.h"
#include "base/err.h"
#include "base/event.h"
#include "devices/pci.h"
#include "vmm/memory.h"

struct virtio_balloon;

/* Before VM and loop run. */
int virtio_balloon_create(struct pci_bus *bus, struct mem *mem, struct loop *io_loop, struct virtio_balloon **out,
			  struct err *err);
/* VM and loop do not run. NULL is allowed. */
void virtio_balloon_destroy(struct virtio_balloon *balloon);
/* After the bus's component in the machine's list. */
struct component virtio_balloon_component(struct virtio_balloon *balloon, uint32_t instance);

/* Asks the guest to have so many bytes in its balloon (rounded down to pages, at most all of memory), and returns: the guest does it in
 * its own time. Any thread but one that holds the loop parked. */
void virtio_balloon_set_target(struct virtio_balloon *balloon, uint64_t bytes);

struct virtio_balloon_stats {
	uint64_t target_bytes;
	uint64_t balloon_bytes;	   /* as the guest says */
	uint64_t pending_bytes;	   /* in the balloon, still to be given back */
	uint64_t given_back_bytes; /* from the balloon, since the start */
	uint64_t reported_bytes;   /* given back as free, since the start */
	uint64_t kept_bytes;	   /* reported as free, but kept, as a checkpoint held memory */
};
/* Any thread. */
void virtio_balloon_get_stats(struct virtio_balloon *balloon, struct virtio_balloon_stats *out);

#endif
