#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/index.h"
#include "checkpoint/restore.h"
#include "machine/qemu_internal.h"

#define IMAGE_NAME "restore"

/* The head of an image that libvirt has saved: its magic, version, bytes of the definition, whether it ran, and that the stream is as QEMU wrote it. In the host's byte
 * order; libvirt looks at the version for that. */
struct image_head {
	char magic[16];
	uint32_t version, definition_bytes, ran, compressed, cookie, unused[14];
};

struct revert {
	struct store *store;
	const char *id;
	struct store_checkpoint checkpoint;
	struct machine_config config;
	struct store_pin *pin;
	struct store_vm_lock *lock;
	struct libvirt *libvirt;
	struct libvirt_guest *guest; /* NULL: libvirt does not know it (any more) */
	struct libvirt_guest_state state;
	struct qemu_domain before; /* its disks until now */
	char *xml, *definition;	   /* as it is to run; of its next start, NULL: it has none */
	uint64_t stream_bytes;
	char *overlays[CONFIG_MAX_DISKS];
	unsigned overlay_count;
	char *image;
};

/* --- what is to be started --- */

static int read_checkpoint(struct revert *r, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	char what[STORE_ID_BYTES + 16];
	int rc = store_pin(r->store, r->id, &r->pin, err);

	if (!rc)
		rc = store_checkpoint_get(r->store, r->id, &r->checkpoint, err);
	if (rc)
		return rc;
	snprintf(what, sizeof(what), "checkpoint %.8s", r->id);
	rc = config_read_text(what, r->checkpoint.config_text, &r->config, err);
	if (rc)
		return rc;
	if (!r->config.qemu) {
		err_set(err, ERR_USAGE, EINVAL, "%s: is of a VM of vmcp's own, not of a domain", what);
		return err_hint(err, "without --connect: vmcp revert %.8s", r->id);
	}
	rc = qemu_check_store(r->store, err);
	if (!rc)
		rc = store_checkpoint_read(r->store, &r->checkpoint, "state", &state, err);
	if (!rc)
		rc = qemu_state_decode(state.data, state.length, &r->xml, &r->stream_bytes, err);
	if (!rc && r->stream_bytes > r->checkpoint.memory_bytes)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "state: the stream is longer than its layer");
	return rc ? err_prefix(err, "%s", what) : 0;
}

static const char *path_of(const struct revert *r, const char *disk)
{
	for (unsigned i = 0; i < r->config.disk_count; i++)
		if (!strcmp(r->config.disks[i].name, disk))
			return r->config.disks[i].path;
	return NULL;
}

/* In both definitions. */
static int replace_image(struct revert *r, const char *target, const char *path, struct err *err)
{
	char **texts[] = {&r->xml, &r->definition};

	for (size_t i = 0; i < ARRAY_LENGTH(texts); i++) {
		char *text = *texts[i] ? qemu_replace_image(*texts[i], target, path) : NULL;

		if (*texts[i] && !text && i == 0)
			return err_set(err, ERR_DAMAGED, EINVAL, "disk %s: the domain's definition has no such disk", target);
		if (!text)
			continue; /* its next start is of other disks by now */
		free(*texts[i]);
		*texts[i] = text;
	}
	return 0;
}

static int make_disk(struct revert *r, const struct store_disk_layer *layer, const char *mark, struct err *err)
{
	CLEANUP_FREE char *layer_path = NULL;
	const char *path = path_of(r, layer->disk);
	bool qcow2 = !strcmp(layer->format, "qcow2");
	int rc = path ? store_disk_layer_path(r->store, layer->layer, layer->format, &layer_path, err)
		      : err_set(err, ERR_DAMAGED, EINVAL, "its configuration has no such disk");

	if (rc)
		return rc;
	char *overlay = qemu_overlay_path(path, mark);
	rc = store_note_image(r->store, overlay, err);
	if (!rc)
		rc = qemu_make_overlay(overlay, layer_path, qcow2, layer->size_bytes, err);
	if (rc) {
		free(overlay);
		return rc;
	}
	r->overlays[r->overlay_count++] = overlay;
	return replace_image(r, layer->disk, overlay, err);
}

static int make_disks(struct revert *r, struct err *err)
{
	char mark[STORE_ID_BYTES];

	store_new_id(mark);
	for (uint32_t i = 0; i < r->checkpoint.disk_count; i++) {
		int rc = make_disk(r, &r->checkpoint.disks[i], mark, err);

		if (rc)
			return err_prefix(err, "disk %s", r->checkpoint.disks[i].disk);
	}
	return 0;
}

/* --- the image that libvirt starts from --- */

/* Pages of one extent; every one is checked on the way. */
static int copy_extent(struct restore_layers *layers, const struct index_extent *extent, uint64_t limit, int fd, uint64_t offset, uint8_t *data,
		       struct err *err)
{
	for (uint64_t at = extent->first, n; at < extent->first + extent->count && at * PAGE_BYTES < limit; at += n) {
		n = min_u64(extent->first + extent->count - at, RESTORE_CHUNK_PAGES);
		uint64_t bytes = min_u64(n * PAGE_BYTES, limit - at * PAGE_BYTES);
		int rc = extent->layer == INDEX_ZERO_LAYER ? 0 : restore_read(layers, extent->layer, at, n, data, err);

		if (extent->layer == INDEX_ZERO_LAYER)
			memset(data, 0, n * PAGE_BYTES);
		if (!rc)
			rc = file_pwrite_full(fd, data, bytes, offset + at * PAGE_BYTES, err);
		if (rc)
			return rc;
	}
	return 0;
}

static int copy_stream(struct revert *r, int fd, uint64_t offset, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	CLEANUP_FREE uint8_t *data = malloc(RESTORE_CHUNK_PAGES * PAGE_BYTES);
	struct restore_layers layers = {0};
	struct page_index index = {0};
	int rc = data ? store_checkpoint_read(r->store, &r->checkpoint, "index", &text, err) : err_sys(err, ENOMEM, "stream");

	if (!rc)
		rc = page_index_decode(text.data, text.length, &index, err);
	if (!rc)
		rc = restore_init(&layers, r->store, &index, err);
	for (uint64_t i = 0; !rc && i < index.extent_count; i++)
		rc = copy_extent(&layers, &index.extents[i], r->stream_bytes, fd, offset, data, err);
	restore_close(&layers);
	page_index_free(&index);
	return rc;
}

static int write_image(struct revert *r, struct err *err)
{
	struct image_head head = {.version = 2, .definition_bytes = (uint32_t)strlen(r->xml) + 1, .ran = 1};
	CLEANUP_CLOSE int dir = store_vm_dir(r->store, r->checkpoint.vm, err);

	if (dir < 0)
		return dir;
	memcpy(head.magic, "LibvirtQemudSave", sizeof(head.magic));
	r->image = xasprintf("%s/vms/%s/" IMAGE_NAME, store_path(r->store), r->checkpoint.vm);
	CLEANUP_CLOSE int fd = openat(dir, IMAGE_NAME, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return err_sys(err, errno, "%s", r->image);
	int rc = file_pwrite_full(fd, &head, sizeof(head), 0, err);
	if (!rc)
		rc = file_pwrite_full(fd, r->xml, head.definition_bytes, sizeof(head), err);
	return rc ? rc : copy_stream(r, fd, sizeof(head) + head.definition_bytes, err);
}

/* --- the domain as it is now --- */

static int find_guest(struct revert *r, const char *connect, struct err *err)
{
	CLEANUP_FREE char *now = NULL;
	int rc = libvirt_open_writable(connect, &r->libvirt, err);

	/* One that is gone, or never was on this host, is started all the same. */
	if (rc || libvirt_guest_find(r->libvirt, r->checkpoint.vm, &r->guest, NULL))
		return rc;
	rc = libvirt_guest_state(r->guest, &r->state, err);
	if (!rc && strcmp(r->state.uuid, r->checkpoint.vm_uuid) != 0) {
		err_set(err, ERR_STATE, EEXIST, "domain %s: is another one than that of the checkpoint", r->checkpoint.vm);
		rc = err_hint(err, "rename it: `virsh domrename %s NAME`", r->checkpoint.vm);
	}
	if (!rc && r->state.persistent)
		rc = libvirt_guest_xml(r->guest, true, &r->definition, err);
	if (!rc)
		rc = libvirt_guest_xml(r->guest, !r->state.active, &now, err);
	if (!rc)
		qemu_domain_read(r->checkpoint.vm, now, &r->before, NULL);
	return rc;
}

/* --- going back --- */

static int exchange(struct revert *r, struct err *err)
{
	int rc = r->guest && r->state.active ? libvirt_guest_destroy(r->guest, err) : 0;

	if (!rc)
		rc = fault_check(FAULT_QEMU_ENDED, err);
	if (!rc)
		rc = libvirt_restore(r->libvirt, r->image, NULL, err);
	if (rc && r->state.active)
		err_hint(err, "the domain is off; its disks are as they were: `virsh start %s` boots it", r->checkpoint.vm);
	return rc;
}

/* Earlier overlays of this disk that are layers of the store by now: their names beside the image were for the process that ended. */
static void drop_names(const char *overlay)
{
	CLEANUP_FREE char *folder = strndup(overlay, (size_t)(strrchr(overlay, '/') - overlay));
	const char *own = strrchr(overlay, '/') + 1;
	size_t stem = strlen(own) - QEMU_MARK_BYTES;
	DIR *stream = folder ? opendir(folder) : NULL;
	struct dirent *entry;
	struct stat st;

	while (stream && (entry = readdir(stream)))
		if (strlen(entry->d_name) == stem + QEMU_MARK_BYTES && !strncmp(entry->d_name, own, stem) && qemu_is_overlay(entry->d_name) &&
		    strcmp(entry->d_name, own) != 0 && fstatat(dirfd(stream), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_nlink > 1)
			unlinkat(dirfd(stream), entry->d_name, 0);
	if (stream)
		closedir(stream);
}

/* What it stood on, where that is ours: nobody wants it any more. The user's own images stay, being layers of the store. */
static void drop_before(struct revert *r)
{
	for (unsigned i = 0; i < r->before.disk_count; i++)
		if (r->before.disks[i].path && qemu_is_overlay(r->before.disks[i].path))
			unlink(r->before.disks[i].path);
	for (unsigned i = 0; i < r->overlay_count; i++)
		drop_names(r->overlays[i]);
}

/* It runs: what goes wrong from here on is told, and no failure. */
static void settle(struct revert *r)
{
	struct err why = ERR_INIT;

	if (r->definition && libvirt_define(r->libvirt, r->definition, &why))
		log_error("domain %s: its definition still names the disks of before: %s", r->checkpoint.vm, why.message);
	else
		drop_before(r);
	if (store_vm_set_position(r->store, r->checkpoint.vm, r->id, &why))
		log_error("domain %s: where it stands could not be noted: %s", r->checkpoint.vm, why.message);
}

static void close_revert(struct revert *r, bool failed)
{
	for (unsigned i = 0; i < r->overlay_count; i++) {
		if (failed)
			unlink(r->overlays[i]);
		free(r->overlays[i]);
	}
	if (r->image)
		unlink(r->image);
	free(r->image);
	free(r->xml);
	free(r->definition);
	qemu_domain_free(&r->before);
	libvirt_guest_free(r->guest);
	libvirt_close(r->libvirt);
	store_vm_unlock(r->lock);
	store_unpin(r->pin);
	config_free(&r->config);
	store_checkpoint_free(&r->checkpoint);
}

int qemu_revert(struct store *store, const char *connect, const char *id, struct qemu_revert_result *result, struct err *err)
{
	struct revert r = {.store = store, .id = id};
	uint64_t begin = clock_now_ns();
	int rc = read_checkpoint(&r, err);

	*result = (struct qemu_revert_result){0};
	if (!rc)
		rc = store_vm_lock(store, r.checkpoint.vm, &r.lock, err);
	if (!rc)
		rc = find_guest(&r, connect, err);
	if (!rc)
		rc = make_disks(&r, err);
	if (!rc)
		rc = write_image(&r, err);
	if (!rc)
		rc = exchange(&r, err);
	if (!rc) {
		settle(&r);
		snprintf(result->vm, sizeof(result->vm), "%s", r.checkpoint.vm);
		result->revert_ns = clock_now_ns() - begin;
	}
	close_revert(&r, rc != 0);
	return rc;
}
