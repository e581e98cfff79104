/*
 * A computer that loses power, simulated: what a cut may leave of a folder in which this process works.
 *
 * Every call of this process, and of the libraries in it, that changes something below the folder is watched, as this program's own pwrite, fsync, renameat and
 * the like come before the C library's (power_sim.c). So at any moment a state can be made that a cut might leave:
 *
 *   content   of each file what was synced, and of each write since: nothing, all, the first ones, any whole ones in any order, or any sectors of 512 bytes
 *   names     of each folder what was synced, and of what was done to it since: nothing, all, what came first over all folders, or what came first in each of
 *             them. A rename between two folders is in both or in none. The name of a file is durable only when its folder was synced, not with the file
 *
 * which is less than any journaling filesystem promises. One simulation at a time. Works beside threads; but which of several syncs at once comes first, no seed
 * says.
 */
#ifndef VMCP_CHECKPOINT_STORE_POWER_SIM_H
#define VMCP_CHECKPOINT_STORE_POWER_SIM_H

#include <stdbool.h>
#include <stdint.h>

/* `root` is an empty folder, durable as it is. What is linked into it from elsewhere is durable, too. */
void power_sim_begin(const char *root, uint64_t seed);
void power_sim_end(void);
/* Below `limit`, from the seed. */
uint64_t power_sim_pick(uint64_t limit);

/* The power is cut behind the `calls`-th change or sync from now (1: the next one): what that leaves comes to be in `folder`, made anew. Work goes on. */
void power_sim_arm(uint64_t calls, const char *folder);
/* True if that has happened since power_sim_arm. */
bool power_sim_was_cut(void);

/* The `calls`-th change or sync from now fails with `error`, without effect. 0: none does. */
void power_sim_fail(uint64_t calls, int error);
/* True if that has happened since power_sim_fail. */
bool power_sim_has_failed(void);

#endif
