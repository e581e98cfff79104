/*
 * Groups: checkpoints of several VMs of one store that show one instant. A group is whole or does not exist.
 *
 *     store_group_begin      it is open: nothing shows it
 *     each member            makes its checkpoint, names the group in its manifest, and makes all durable but for its folder's rename (store_draft_prepare)
 *     store_group_commit     the commit point: one transaction of the catalogue. Behind it every member comes to be, by its maker (store_draft_finish)
 *                            or by whoever opens the store next (recover.c)
 *     store_group_settle     what became of it. One that is still open is given up by that: whoever asks may act on the answer
 *
 * Whoever dies before the commit point, a member or who leads them, leaves nothing: a group that is open for nobody is given up by its members' ends.
 */
#ifndef VMCP_CHECKPOINT_STORE_GROUP_H
#define VMCP_CHECKPOINT_STORE_GROUP_H

#include "checkpoint/store/store.h"

/* Makes the group's id. -EEXIST, ERR_STATE: the tag (NULL: none) names something already; the commit looks again. */
int store_group_begin(struct store *store, const char *tag, char id[STORE_ID_BYTES], struct err *err);
/* -ECANCELED, ERR_FAILED: it was given up. -EEXIST, ERR_STATE: the tag is taken. After any failure but that of the host it does not exist. */
int store_group_commit(struct store *store, const char *id, const char *tag, struct err *err);
/* 0: it is committed; -ECANCELED, ERR_FAILED: it never will be. Anything else: not known, ask again. */
int store_group_settle(struct store *store, const char *id, struct err *err);

struct store_group {
	char id[STORE_ID_BYTES];
	char tag[STORE_NAME_BYTES]; /* "" if none */
	uint64_t created_wall_ns;   /* of its newest member */
	unsigned count, there;	    /* members that it was taken with; of them those that were not removed */
	struct store_group_member {
		char vm[STORE_NAME_BYTES];
		char checkpoint[STORE_ID_BYTES]; /* "": it was removed */
	} members[STORE_GROUP_MAX];
};

/* Finds the group meant by its id, a unique prefix (4 digits or more) or its tag. None: -ENOENT, ERR_NOT_FOUND. */
int store_group_resolve(struct store *store, const char *reference, char id[STORE_ID_BYTES], struct err *err);
int store_group_get(struct store *store, const char *id, struct store_group *out, struct err *err);
/* -EINVAL, ERR_STATE, naming them, if members are missing: they were removed, or did not come with an import. */
int store_group_check_whole(const struct store_group *group, struct err *err);

#endif
