/* The catalogue's entries from what is on the disk. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/store_internal.h"

int store_read_manifest_in(int parent, const char *folder, const char *id, struct store_checkpoint *out, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	char path[STORE_ID_BYTES + 16];

	*out = (struct store_checkpoint){0};
	snprintf(path, sizeof(path), "%s/manifest", id);
	int rc = file_read_all(parent, path, MANIFEST_MAX_BYTES, &text, err);
	if (!rc)
		rc = manifest_decode(path, text.data, text.length, out, err);
	if (!rc && strcmp(out->id, id)) {
		rc = err_set(err, ERR_DAMAGED, EINVAL, "%s/%s: it is the manifest of %s", folder, path, out->id);
		store_checkpoint_free(out);
	}
	return rc;
}

int store_read_manifest(struct store *store, const char *id, struct store_checkpoint *out, struct err *err)
{
	return store_read_manifest_in(store->checkpoints_dir, "checkpoints", id, out, err);
}

int store_read_committed(struct store *store, const char *id, struct store_checkpoint *out, struct store_layers *layers,
			 struct err *err)
{
	CLEANUP_BUF struct buf index = BUF_INIT;
	struct err damage = ERR_INIT;

	*layers = (struct store_layers){0};
	int rc = store_read_manifest(store, id, out, err);
	if (rc)
		return rc;
	/* One whose index is damaged has lost its memory, whatever layers it named. */
	if (store_checkpoint_read(store, out, "index", &index, &damage) || layers_of_index(index.data, index.length, layers, &damage))
		log_warn("checkpoint %.8s: %s", id, damage.message);
	return 0;
}

struct found {
	struct store_checkpoint checkpoint;
	struct store_layers layers;
};

static int by_time(const void *a, const void *b)
{
	const struct found *one = a, *other = b;

	return (one->checkpoint.created_wall_ns > other->checkpoint.created_wall_ns) -
	       (one->checkpoint.created_wall_ns < other->checkpoint.created_wall_ns);
}

static int find_all(struct store *store, struct found **list, size_t *count, struct err *err)
{
	int copy = openat(store->checkpoints_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	if (!stream)
		return err_sys(err, errno, "%s/checkpoints", store->path);
	while ((entry = readdir(stream))) {
		struct err damage = ERR_INIT;

		if (!store_is_id(entry->d_name))
			continue;
		struct found *grown = realloc(*list, (*count + 1) * sizeof(*grown));
		if (!grown) {
			closedir(stream);
			return err_sys(err, ENOMEM, "list of checkpoints");
		}
		*list = grown;
		if (store_read_committed(store, entry->d_name, &grown[*count].checkpoint, &grown[*count].layers, &damage) == 0)
			++*count;
		else
			log_warn("checkpoint %.8s: %s", entry->d_name, damage.message);
	}
	closedir(stream);
	return 0;
}

int catalog_fill_locked(struct store *store, struct err *err)
{
	struct found *list = NULL;
	size_t count = 0;
	int rc = find_all(store, &list, &count, err);

	if (count)
		qsort(list, count, sizeof(*list), by_time);
	for (size_t i = 0; i < count; i++) {
		struct found *one = &list[i];

		if (!rc) {
			rc = catalog_enter_inside_locked(store, &one->checkpoint, &one->layers, CATALOG_VM_STAYS, err);
			if (rc == -EEXIST) { /* its tag names another one by now */
				one->checkpoint.tag[0] = '\0';
				rc = catalog_enter_inside_locked(store, &one->checkpoint, &one->layers, CATALOG_VM_STAYS, err);
			}
		}
		store_checkpoint_free(&one->checkpoint);
		layers_free(&one->layers);
	}
	free(list);
	return rc;
}
