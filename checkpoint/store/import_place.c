/* Read-only disks of an import. No layers, as later checkpoints of the VM do not name them: they are the VM's, in its folder. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/store_internal.h"

/* The @ is in no disk's name: no other disk of the VM is called so. */
static char *own_name(const char *id, const char *disk) { return xasprintf("%s@%.8s.qcow2", disk, id); }

char *store_own_disk(struct store *store, const char *vm, const char *id, const char *disk)
{
	CLEANUP_FREE char *name = own_name(id, disk);

	return xasprintf("%s/vms/%s/%s", store->path, vm, name);
}

int draft_place_disks(struct store *store, int dir, const struct store_checkpoint *checkpoint, struct err *err)
{
	int rc = fault_check(FAULT_IMPORT_PLACING, err);

	if (rc)
		return rc;
	CLEANUP_CLOSE int folder = file_open_dir(store->vms_dir, checkpoint->vm, 1, err);
	int copy = folder >= 0 ? openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (folder < 0)
		return folder;
	if (!stream)
		return err_sys(err, errno, "%s/checkpoints/%s", store->path, checkpoint->id);
	while (!rc && (entry = readdir(stream))) {
		if (strncmp(entry->d_name, DRAFT_OWN_PREFIX, strlen(DRAFT_OWN_PREFIX)) != 0)
			continue;
		CLEANUP_FREE char *name = own_name(checkpoint->id, entry->d_name + strlen(DRAFT_OWN_PREFIX));
		if (renameat(dir, entry->d_name, folder, name))
			rc = err_sys(err, errno, "%s/vms/%s/%s", store->path, checkpoint->vm, name);
	}
	closedir(stream);
	return rc ? rc : file_sync_dir(folder, err);
}
