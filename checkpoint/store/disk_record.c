/*
 * Checksums of disk layers whose checkpoint is gone. A layer's checksum is in the manifests that name it; when the last of them goes, others may still stand
 * on the layer. So a removal leaves the checksum beside it, in layers/<id>.<format>.sum. It is about one inode: a merge puts another file in the place of the
 * layer, and the record of that one beside it. Best effort: what is missing here was never wrong.
 */
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"
#include "checkpoint/store/store_internal.h"

#define SUFFIX	  ".sum"
#define NAME_BYTES (STORE_ID_BYTES + 16)

static void record_name(char out[NAME_BYTES], const char *layer, const char *format)
{
	snprintf(out, NAME_BYTES, "%.32s.%.7s" SUFFIX, layer, format);
}

void disk_record_keep(struct store *store, const struct store_disk_layer *disk)
{
	char name[NAME_BYTES], file[NAME_BYTES], line[96];
	struct stat st;

	snprintf(file, sizeof(file), "%.32s.%.7s", disk->layer, disk->format);
	if (fstatat(store->layers_dir, file, &st, AT_SYMLINK_NOFOLLOW))
		return;
	record_name(name, disk->layer, disk->format);
	int length = snprintf(line, sizeof(line), "vmcp disk sum 1 %" PRIu64 " %" PRIu64 " %016" PRIx64 "\n", (uint64_t)st.st_ino, disk->file_bytes,
			      disk->xxh3);
	CLEANUP_CLOSE int fd = openat(store->layers_dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd >= 0)
		file_pwrite_full(fd, line, (size_t)length, 0, NULL);
}

void disk_records_keep(struct store *store, const char *staged)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct store_checkpoint c;
	char path[STORE_ID_BYTES + 24];

	snprintf(path, sizeof(path), "%s/manifest", staged);
	if (file_read_all(store->staging_dir, path, MANIFEST_MAX_BYTES, &text, NULL) || manifest_decode(path, text.data, text.length, &c, NULL))
		return;
	for (uint32_t i = 0; i < c.disk_count; i++)
		if (!strcmp(c.disks[i].format, "qcow2") || !strcmp(c.disks[i].format, "raw"))
			disk_record_keep(store, &c.disks[i]);
	store_checkpoint_free(&c);
}

void disk_record_forget(struct store *store, const char *layer, const char *format)
{
	char name[NAME_BYTES];

	record_name(name, layer, format);
	unlinkat(store->layers_dir, name, 0);
}

bool disk_record_find(struct store *store, const char *layer, const char *format, uint64_t *bytes, uint64_t *xxh3)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	char name[NAME_BYTES], file[NAME_BYTES];
	uint64_t inode;
	struct stat st;

	record_name(name, layer, format);
	snprintf(file, sizeof(file), "%.32s.%.7s", layer, format);
	return file_read_all(store->layers_dir, name, 4096, &text, NULL) == 0 &&
	       sscanf((const char *)text.data, "vmcp disk sum 1 %" SCNu64 " %" SCNu64 " %" SCNx64, &inode, bytes, xxh3) == 3 &&
	       fstatat(store->layers_dir, file, &st, AT_SYMLINK_NOFOLLOW) == 0 && inode == (uint64_t)st.st_ino;
}

void disk_records_collect(struct store *store)
{
	int copy = openat(store->layers_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
	struct dirent *entry;

	while (stream && (entry = readdir(stream))) {
		size_t length = strlen(entry->d_name), suffix = strlen(SUFFIX);
		char file[NAME_BYTES];

		/* Not `.sums`, which is a memory layer's. */
		if (length <= suffix || length >= sizeof(file) || strcmp(entry->d_name + length - suffix, SUFFIX))
			continue;
		memcpy(file, entry->d_name, length - suffix);
		file[length - suffix] = '\0';
		if (faccessat(store->layers_dir, file, F_OK, AT_SYMLINK_NOFOLLOW))
			unlinkat(store->layers_dir, entry->d_name, 0);
	}
	if (stream)
		closedir(stream);
}
