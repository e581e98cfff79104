/* Exports: see transfer.h. export_parts.c produces the chunks, this file opens what is needed and writes the stream. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/export_internal.h"
#include "cowdisk/block.h"

/* --- what is to be exported --- */

/* A disk that is written: as its layer has it, in the order of the manifest. */
static int add_layer(struct export *x, const struct store_disk_layer *layer, struct err *err)
{
	struct transfer_head_disk *disk = &x->head.disks[x->head.disk_count];
	const struct store_disk_layer *before = x->head.since[0] ? transfer_find_layer(&x->since.checkpoint, layer->disk) : NULL;
	int rc = store_disk_layer_path(x->store, layer->layer, layer->format, &x->images[x->head.disk_count], err);

	if (!rc && before)
		rc = store_disk_layer_path(x->store, before->layer, before->format, &x->since_images[x->head.disk_count], err);
	if (rc)
		return err_prefix(err, "disk %s", layer->disk);
	*disk = (struct transfer_head_disk){.size_bytes = layer->size_bytes};
	memcpy(disk->name, layer->disk, sizeof(disk->name));
	x->total_bytes += disk->size_bytes;
	x->head.disk_count++;
	return 0;
}

static bool has_readonly(const struct transfer_disk *disks, uint32_t count, const char *name, const char *path)
{
	for (uint32_t i = 0; i < count; i++)
		if (!strcmp(disks[i].name, name))
			return disks[i].readonly && disks[i].path && !strcmp(disks[i].path, path);
	return false;
}

static int size_of_image(const char *path, uint64_t *size, struct err *err)
{
	struct cow_disk *disk;
	struct cow_io *io;
	int rc = cow_io_create(NULL, &io, err);

	if (rc)
		return rc;
	rc = cow_open(io, path, COW_OPEN_READONLY, &disk, err);
	if (!rc) {
		*size = cow_size(disk);
		cow_close(disk, NULL);
	}
	cow_io_destroy(io);
	return rc;
}

/* A read-only disk is no layer of the store: it is what its path holds now. */
static int add_readonly(struct export *x, const struct transfer_disk *found, const struct transfer_disk *before, uint32_t before_count,
			struct err *err)
{
	struct transfer_head_disk *disk = &x->head.disks[x->head.disk_count];

	if (x->head.disk_count == TRANSFER_MAX_DISKS || !found->path)
		return err_set(err, ERR_DAMAGED, EINVAL, "disk %s: the checkpoint does not hold it", found->name);
	*disk = (struct transfer_head_disk){.readonly = true, .kept = has_readonly(before, before_count, found->name, found->path)};
	memcpy(disk->name, found->name, sizeof(disk->name));
	int rc = size_of_image(found->path, &disk->size_bytes, err);
	if (rc) {
		err_prefix(err, "disk %s", found->name);
		return err_hint(err, "a read-only disk is not in the store: it is exported from its file, which must be there");
	}
	x->images[x->head.disk_count++] = xstrdup(found->path);
	x->total_bytes += disk->kept ? 0 : disk->size_bytes;
	return 0;
}

static void free_disks(struct transfer_disk *disks, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		free(disks[i].path);
}

static int list_disks(struct export *x, struct err *err)
{
	const struct store_checkpoint *c = &x->own.checkpoint;
	struct transfer_disk before[TRANSFER_MAX_DISKS];
	uint32_t before_count = 0;
	int rc = x->options->config->list_disks("configuration", c->config_text, x->disks, &x->disk_count, err);

	if (!rc && x->head.since[0])
		rc = x->options->config->list_disks("configuration", x->since.checkpoint.config_text, before, &before_count, err);
	for (uint32_t i = 0; !rc && i < c->disk_count; i++)
		rc = add_layer(x, &c->disks[i], err);
	for (uint32_t i = 0; !rc && i < x->disk_count; i++)
		if (!transfer_find_layer(c, x->disks[i].name))
			rc = add_readonly(x, &x->disks[i], before, before_count, err);
	free_disks(before, before_count);
	return rc;
}

static int open_since(struct export *x, const char *since, struct err *err)
{
	int rc = transfer_side_open(x->store, since, &x->since, err);

	if (rc)
		return rc;
	const struct store_checkpoint *c = &x->since.checkpoint;
	if (c->memory_bytes != x->own.checkpoint.memory_bytes) {
		err_set(err, ERR_USAGE, EINVAL, "--since %.8s: its memory is of another size than that of %.8s", since, x->own.checkpoint.id);
		return err_hint(err, "name a checkpoint of the same VM");
	}
	memcpy(x->head.since, c->id, sizeof(x->head.since));
	x->head.since_created_ns = c->created_wall_ns;
	uint64_t bytes;
	return store_checkpoint_plain_state(x->store, c, &bytes, &x->head.since_state_xxh3, err);
}

/* As it is in its store; of an encrypted one's the state is that of the stream. */
static int read_manifest(struct export *x, struct err *err)
{
	const char *id = x->own.checkpoint.id;
	struct store_checkpoint plain;
	char path[STORE_ID_BYTES + 16];

	snprintf(path, sizeof(path), "%s/manifest", id);
	if (!store_is_encrypted(x->store))
		return file_read_all(x->store->checkpoints_dir, path, MANIFEST_MAX_BYTES, &x->manifest, err);
	int rc = store_read_manifest(x->store, id, &plain, err);
	if (rc)
		return rc;
	plain.state_bytes = x->state.length;
	plain.state_xxh3 = XXH3_64bits(x->state.data, x->state.length);
	rc = manifest_encode(&plain, &x->manifest, err);
	store_checkpoint_free(&plain);
	return rc;
}

static int open_export(struct export *x, const char *id, const char *since, struct err *err)
{
	uint64_t tags;
	int rc = transfer_side_open(x->store, id, &x->own, err);

	if (!rc && since)
		rc = open_since(x, since, err);
	if (rc)
		return rc;
	memcpy(x->head.id, x->own.checkpoint.id, sizeof(x->head.id));
	x->total_bytes = x->own.checkpoint.memory_bytes;
	rc = store_checkpoint_read(x->store, &x->own.checkpoint, "state", &x->state, err);
	if (!rc)
		rc = read_manifest(x, err);
	if (!rc)
		rc = store_count_tags(x->store, x->head.id, &tags, x->head.tag, err);
	if (!rc)
		rc = list_disks(x, err);
	return rc ? rc : transfer_head_encode(&x->head, &x->head_text, err);
}

static void close_export(struct export *x)
{
	transfer_seal_free(&x->out);
	transfer_mark_free(&x->mark);
	transfer_side_close(&x->own);
	transfer_side_close(&x->since);
	buf_free(&x->head_text);
	buf_free(&x->manifest);
	buf_free(&x->state);
	free_disks(x->disks, x->disk_count);
	for (uint32_t i = 0; i < TRANSFER_MAX_DISKS; i++) {
		free(x->images[i]);
		free(x->since_images[i]);
	}
	transfer_ledger_free(&x->ledger);
}

/* --- the stream --- */

static int write_chunk(struct transfer_slot *slot, void *opaque, struct err *err)
{
	uint8_t header[TRANSFER_HEADER_BYTES];
	struct export *x = opaque;
	int rc = 0;

	if (slot->header.kind == TRANSFER_END) {
		void *packer = transfer_make_packer();

		transfer_ledger_end(&x->ledger, slot->content);
		rc = packer ? transfer_pack(slot, packer, err) : err_sys(err, ENOMEM, "compression");
		transfer_free_packer(packer);
	}
	transfer_put_header(header, &slot->header);
	if (!rc)
		rc = transfer_write(&x->out, header, sizeof(header), err);
	if (!rc)
		rc = transfer_write(&x->out, slot->packed, slot->header.packed_bytes, err);
	if (!rc)
		rc = transfer_ledger_add(&x->ledger, &slot->header, err);
	x->result->content_bytes += slot->header.content_bytes;
	return rc ? rc : fault_check(FAULT_EXPORT_CHUNK, err);
}

static const struct transfer_pipe_ops packing = {
	.produce = export_produce,
	.work = transfer_pack,
	.consume = write_chunk,
	.make_context = transfer_make_packer,
	.free_context = transfer_free_packer,
};

/* From where x->from says, which is where x->out stands. */
static int write_stream(struct export *x, struct err *err)
{
	uint8_t start[TRANSFER_START_BYTES];
	CLEANUP_BUF struct buf table = BUF_INIT;
	int rc = 0;

	x->out.started_ns = clock_now_ns();
	transfer_put_start(start);
	if (x->options->key)
		rc = x->from.started ? transfer_seal_go_on(&x->out, x->options->key, &x->mark, err)
				     : transfer_seal_begin(&x->out, x->options->key, x->resume, err);
	if (!rc && !x->from.started)
		rc = transfer_write(&x->out, start, sizeof(start), err);
	if (!rc)
		rc = transfer_pipe_run(&packing, x, err);
	if (!rc)
		rc = transfer_ledger_table(&x->ledger, &table, err);
	if (!rc)
		rc = transfer_write(&x->out, table.data, table.length, err);
	if (!rc)
		rc = transfer_seal_end(&x->out, err);
	memcpy(x->result->id, x->head.id, sizeof(x->result->id));
	memcpy(x->result->since, x->head.since, sizeof(x->result->since));
	memcpy(x->result->tag, x->head.tag, sizeof(x->result->tag));
	memcpy(x->result->vm, x->own.checkpoint.vm, sizeof(x->result->vm));
	x->result->stream_bytes = x->out.bytes + x->result->resumed_bytes;
	return rc;
}

static void init(struct export *x, struct store *store, const struct transfer_options *options, struct transfer_result *result)
{
	*result = (struct transfer_result){0};
	*x = (struct export){.store = store, .options = options, .result = result};
	x->out = (struct transfer_io){.fd = -1, .cancel = options->cancel, .max_rate = options->max_rate};
}

int transfer_export(struct store *store, const char *id, const char *since, int fd, const struct transfer_options *options,
		    struct transfer_result *result, struct err *err)
{
	struct export *x = xcalloc(1, sizeof(*x));

	init(x, store, options, result);
	x->out.fd = fd;
	x->out.what = "output";
	int rc = open_export(x, id, since, err);
	if (!rc)
		rc = transfer_ledger_init(&x->ledger, err);
	if (!rc)
		rc = write_stream(x, err);
	close_export(x);
	free(x);
	return rc;
}

/* --- to a file --- */

struct target {
	const char *path;
	char *part, *name, *part_name; /* names: in the folder */
	int folder, fd;
};

static int exists(const char *path, struct err *err)
{
	err_set(err, ERR_STATE, EEXIST, "%s: there is a file already", path);
	return err_hint(err, "remove it, or choose another name");
}

static int open_target(struct target *t, bool resume, struct err *err)
{
	const char *slash = strrchr(t->path, '/');
	CLEANUP_FREE char *folder = slash ? xasprintf("%.*s", (int)(slash - t->path + 1), t->path) : xstrdup(".");

	t->name = xstrdup(slash ? slash + 1 : t->path);
	t->part_name = xasprintf("%s.part", t->name);
	t->part = xasprintf("%s.part", t->path);
	t->folder = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (t->folder < 0)
		return err_sys(err, errno, "%s", folder);
	if (!*t->name || faccessat(t->folder, t->name, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
		return exists(t->path, err);
	t->fd = openat(t->folder, t->part_name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (t->fd < 0)
		return err_sys(err, errno, "%s", t->part);
	if (store_try_lock(t->fd)) {
		close(t->fd);
		t->fd = -1;
		return err_set(err, ERR_STATE, EBUSY, "%s: another export is writing it", t->part);
	}
	return resume || ftruncate(t->fd, 0) == 0 ? 0 : err_sys(err, errno, "%s", t->part);
}

static int commit_target(struct target *t, struct err *err)
{
	if (fsync(t->fd))
		return err_sys(err, errno, "%s", t->part);
	int rc = fault_check(FAULT_EXPORT_BEFORE_RENAME, err);
	if (rc)
		return rc;
	if (renameat2(t->folder, t->part_name, t->folder, t->name, RENAME_NOREPLACE)) {
		if (errno == EEXIST)
			return exists(t->path, err);
		/* A filesystem that does not know the flag. */
		if (errno != EINVAL || renameat(t->folder, t->part_name, t->folder, t->name))
			return err_sys(err, errno, "%s", t->path);
	}
	return file_sync_dir(t->folder, err);
}

static void close_target(struct target *t, bool remove)
{
	if (remove && t->fd >= 0)
		unlinkat(t->folder, t->part_name, 0);
	if (t->fd >= 0)
		close(t->fd);
	if (t->folder >= 0)
		close(t->folder);
	free(t->name);
	free(t->part_name);
	free(t->part);
}

int transfer_export_file(struct store *store, const char *id, const char *since, const char *path, bool resume,
			 const struct transfer_options *options, struct transfer_result *result, struct err *err)
{
	struct export *x = xcalloc(1, sizeof(*x));
	struct target target = {.path = path, .folder = -1, .fd = -1};

	init(x, store, options, result);
	x->resume = resume;
	int rc = open_export(x, id, since, err);
	if (!rc)
		rc = open_target(&target, resume, err);
	if (!rc)
		rc = transfer_ledger_init(&x->ledger, err);
	if (!rc && resume)
		rc = export_resume(x, target.fd, target.part, err);
	x->out.fd = target.fd;
	x->out.what = path;
	if (!rc)
		rc = write_stream(x, err);
	if (!rc)
		rc = commit_target(&target, err);
	close_target(&target, rc && !resume);
	close_export(x);
	free(x);
	return rc;
}
