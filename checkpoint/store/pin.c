/*
 * Pins: an OFD read lock on a checkpoint's manifest. A removal takes a write lock on it, so that neither can begin while the other lasts, and
 * none survives its process. The lock is the file's, whatever its folder is called by now.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "checkpoint/store/store_internal.h"

struct store_pin {
	int fd;
};

static int removed(const char *id, struct err *err)
{
	return err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %.8s: it was removed", id);
}

int store_pin(struct store *store, const char *id, struct store_pin **out, struct err *err)
{
	struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET};
	char path[STORE_ID_BYTES + 16];
	struct stat locked, named;

	if (!store_is_id(id))
		return err_set(err, ERR_NOT_FOUND, ENOENT, "checkpoint %s: there is none", id);
	snprintf(path, sizeof(path), "%s/manifest", id);
	int fd = openat(store->checkpoints_dir, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0)
		return errno == ENOENT ? removed(id, err) : err_sys(err, errno, "checkpoint %.8s", id);
	/* Under the lock it must still be there: a removal moves the folder away before it lets go of its own. */
	bool held = fcntl(fd, F_OFD_SETLK, &lock) == 0;
	if (!held || fstat(fd, &locked) || fstatat(store->checkpoints_dir, path, &named, AT_SYMLINK_NOFOLLOW) ||
	    locked.st_ino != named.st_ino || locked.st_dev != named.st_dev) {
		close(fd);
		return removed(id, err);
	}
	*out = xcalloc(1, sizeof(**out));
	(*out)->fd = fd;
	return 0;
}

void store_unpin(struct store_pin *pin)
{
	if (!pin)
		return;
	close(pin->fd);
	free(pin);
}
