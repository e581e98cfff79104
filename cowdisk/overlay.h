/*
 * The overlay switch of a checkpoint: at one instant the running disk turns to a new, empty overlay, and what was written before is
 * a layer that only requests already in flight still change.
 *
 *     stage (VM runs)   cow_overlay_prepare   overlay file made and opened, everything allocated
 *     pause             cow_overlay_switch    pointers only
 *     persist           cow_overlay_sealed?   when the last request that was in flight ended: layer's metadata written, layer synced
 *
 * After the switch, reads fall through the overlay to the sealing layer in memory (same process, same metadata cache), so nothing waits. A new write that
 * must copy up part of a cluster waits for pending writes of the layer in that cluster. A flush of the disk also makes the sealing layer durable
 * (writes that completed before the switch are still owed to the guest).
 */
#ifndef VMCP_COWDISK_OVERLAY_H
#define VMCP_COWDISK_OVERLAY_H

#include "base/wait.h"
#include "cowdisk/block.h"

struct cow_overlay;

/*
 * Makes the overlay for the disk at `overlay_path` (a new file, durable), whose header names `layer_name` as backing file (the name under which
 * the present top image will be found from then on; the caller has linked it there), and opens it as the disk's future top. The disk is
 * unchanged. Any thread (posts to the I/O thread where it must). The lock of the new file is taken.
 */
int cow_overlay_prepare(struct cow_disk *disk, const char *overlay_path, const char *layer_name, struct cow_overlay **out,
			struct err *err);
/* Drops a prepared overlay that was not switched to (does not delete the file). Any thread. */
void cow_overlay_abandon(struct cow_overlay *overlay);

/*
 * The instant. I/O thread parked (call from the pausing thread). Allocates nothing, touches no file, cannot fail. From here on the disk's top is
 * the overlay; requests in flight stay with the layer.
 */
void cow_overlay_switch(struct cow_overlay *overlay);
/* Requests that were in flight at the switch and have not ended. Any thread. */
unsigned cow_overlay_pending(const struct cow_overlay *overlay);
/*
 * Begins the sealing, so that several disks' layers are sealed at a time; cow_overlay_seal then waits for it. Any thread but the I/O thread; the same thread
 * for all of a disk where no loop runs.
 */
void cow_overlay_seal_begin(struct cow_overlay *overlay);
/*
 * Waits until the layer is sealed: pending requests ended, its metadata is written and the file synced. From then on the file never changes. Any thread but the
 * I/O thread. A cancelled wait: -ECANCELED, the message naming the oldest request it waits for, as reports do. On any error the disk stays usable. Frees the handle
 * in every case but -ECANCELED (then call again, or leave it: the disk closes it). `wait` may be NULL.
 */
int cow_overlay_seal(struct cow_overlay *overlay, const struct wait *wait, struct err *err);

/*
 * After the sealing, for a checkpoint that failed: the layer becomes the top again, with what was written to the overlay since, and takes the name
 * `path` of the overlay from it; `layer_path` is its own. Nobody else may stand on the layer. The disk's I/O stands still meanwhile. Any error leaves the disk on
 * the overlay, a valid one: much was written to it (EFBIG), or requests did not end within a moment (EBUSY). Any thread but the I/O thread.
 */
int cow_overlay_undo(struct cow_disk *disk, const char *layer_path, const char *path, struct err *err);

/*
 * False: the disk's top is an overlay that was switched to, and since then no request that may change it was submitted: it reads as its layer.
 * Any thread; while the I/O thread is not parked, it may become true at any instant. Does not fall back.
 */
bool cow_is_touched(const struct cow_disk *disk);
/* Images in the disk's chain, the top and the base included. Any thread. */
unsigned cow_chain_length(const struct cow_disk *disk);

/*
 * True if the disk stands on an overlay without any content, found at `path`, right on the layer at `layer_path`: then it reads as that layer, in
 * memory and in the file, and a fresh overlay would be no different. No error of a write is owed to the guest, nothing is in flight. I/O
 * thread parked or inside it.
 */
bool cow_is_empty_overlay(const struct cow_disk *disk, const char *path, const char *layer_path);

/*
 * Puts another image in the place of the disk's whole chain (revert): no request in flight, I/O thread parked or inside it. The old chain is closed
 * without writing back anything (its content is dropped by the caller's wish). On failure the disk is unchanged.
 */
int cow_replace(struct cow_disk *disk, const char *path, struct err *err);

#endif
