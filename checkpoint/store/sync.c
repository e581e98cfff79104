/*
 * Making several files and folders durable at once. Each fsync that finds something to do waits for a commit of the filesystem's journal. So all
 * data are sent on their way first: the first fsync then commits what the others wait for.
 */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "checkpoint/store/store_internal.h"

int store_sync(const struct store_unsynced *files, unsigned count, struct err *err)
{
	/* Fails for folders, and does nothing on some filesystems. */
	for (unsigned i = 0; i < count; i++)
		sync_file_range(files[i].fd, 0, 0, SYNC_FILE_RANGE_WRITE);
	for (unsigned i = 0; i < count; i++)
		if (fsync(files[i].fd))
			return err_sys(err, errno, "%s: fsync", files[i].name);
	return 0;
}
