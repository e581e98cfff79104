/* What an import is of, and what of it is here: everything that can be refused before anything is made. */
#include <errno.h>
#include <string.h>

#include "base/fault.h"
#include "base/log.h"
#include "checkpoint/store/import_internal.h"

#define MAX_PAGES (1ull << 28)

static int damaged(struct err *err, const char *why) { return err_set(err, ERR_DAMAGED, EINVAL, "damaged: %s", why); }

/* --- what it says agrees with itself --- */

static int check_disks(const struct import *im, struct err *err)
{
	const struct store_checkpoint *c = &im->checkpoint;
	uint32_t writable = 0;

	while (writable < im->head.disk_count && !im->head.disks[writable].readonly)
		writable++;
	if (writable != c->disk_count)
		return damaged(err, "its head and its manifest are of different disks");
	for (uint32_t i = 0; i < im->head.disk_count; i++)
		if (i < writable ? strcmp(im->head.disks[i].name, c->disks[i].disk) != 0 || im->head.disks[i].size_bytes != c->disks[i].size_bytes
				 : !im->head.disks[i].readonly)
			return damaged(err, "its head and its manifest are of different disks");
	return 0;
}

static int check_config(const struct import *im, struct err *err)
{
	struct transfer_disk disks[TRANSFER_MAX_DISKS];
	uint32_t count = 0, known = 0;
	int rc = im->options->config->list_disks("configuration", im->checkpoint.config_text, disks, &count, err);

	for (uint32_t i = 0; i < count; i++) {
		for (uint32_t k = 0; k < im->head.disk_count; k++)
			known += !strcmp(disks[i].name, im->head.disks[k].name) && disks[i].readonly == im->head.disks[k].readonly;
		free(disks[i].path);
	}
	if (rc)
		return rc;
	return count == im->head.disk_count && known == count ? 0 : damaged(err, "its configuration is of other disks");
}

static int check_all(struct import *im, struct err *err)
{
	struct store_checkpoint *c = &im->checkpoint;
	int rc = transfer_head_decode(im->head_text.data, im->head_text.length, &im->head, err);

	if (!rc)
		rc = manifest_decode("manifest", im->manifest.data, im->manifest.length, c, err);
	if (rc)
		return rc;
	im->memory.pages = c->memory_bytes / PAGE_BYTES;
	if (strcmp(c->id, im->head.id) || c->memory_bytes % PAGE_BYTES || im->memory.pages == 0 || im->memory.pages > MAX_PAGES || c->cpus == 0)
		return damaged(err, "its manifest is of no machine");
	if (!strcmp(im->head.id, im->head.since))
		return damaged(err, "it needs itself");
	if (im->state.length != c->state_bytes || XXH3_64bits(im->state.data, im->state.length) != c->state_xxh3)
		return damaged(err, "its state does not fit the manifest");
	rc = check_disks(im, err);
	return rc || !im->options->config ? rc : check_config(im, err);
}

/* --- what is here --- */

/* Sets result->present. */
static int look_for_it(struct import *im, struct err *err)
{
	const struct store_checkpoint *c = &im->checkpoint;
	struct store_checkpoint there;
	uint64_t bytes, state_xxh3;
	int rc = store_checkpoint_get(im->store, c->id, &there, err);

	if (rc == -ENOENT)
		return 0;
	if (rc)
		return rc;
	rc = store_checkpoint_plain_state(im->store, &there, &bytes, &state_xxh3, err);
	im->result->present = !rc && there.created_wall_ns == c->created_wall_ns && state_xxh3 == c->state_xxh3 &&
			      there.memory_bytes == c->memory_bytes && !strcmp(there.vm_uuid, c->vm_uuid);
	memcpy(im->result->vm, there.vm, sizeof(im->result->vm));
	store_checkpoint_free(&there);
	if (rc || im->result->present)
		return rc;
	return err_set(err, ERR_STATE, EEXIST, "checkpoint %.8s: another one of that id is here", c->id);
}

static int need_since(struct import *im, struct err *err)
{
	const struct store_checkpoint *base = &im->base.checkpoint;
	uint64_t bytes, state_xxh3;
	int rc = transfer_side_open(im->store, im->head.since, &im->base, err);

	if (rc == -ENOENT) {
		err_set(err, ERR_NOT_FOUND, ENOENT, "it holds only what differs from checkpoint %.8s, which is not here", im->head.since);
		return err_hint(err, "import that one first, or export %.8s whole, without --since", im->head.id);
	}
	if (!rc)
		rc = store_checkpoint_plain_state(im->store, base, &bytes, &state_xxh3, err);
	if (rc)
		return rc;
	if (base->created_wall_ns != im->head.since_created_ns || state_xxh3 != im->head.since_state_xxh3 ||
	    base->memory_bytes != im->checkpoint.memory_bytes)
		return err_set(err, ERR_STATE, ESTALE, "it needs checkpoint %.8s, and the one of that id here is another", im->head.since);
	im->has_base = true;
	return 0;
}

/* The checkpoint of the same VM here that is nearest in time. "": none. */
static int find_nearest(struct import *im, char id[STORE_ID_BYTES], struct err *err)
{
	const struct store_checkpoint *c = &im->checkpoint;
	struct store_checkpoint *list;
	uint64_t nearest = UINT64_MAX;
	size_t count;
	int rc = store_checkpoint_list(im->store, im->wanted_vm ? im->wanted_vm : c->vm, &list, &count, err);

	id[0] = '\0';
	for (size_t i = 0; !rc && i < count; i++) {
		const struct store_checkpoint *one = &list[i];
		uint64_t apart = one->created_wall_ns > c->created_wall_ns ? one->created_wall_ns - c->created_wall_ns : c->created_wall_ns - one->created_wall_ns;

		if (!strcmp(one->vm_uuid, c->vm_uuid) && one->memory_bytes == c->memory_bytes && apart < nearest) {
			nearest = apart;
			memcpy(id, one->id, STORE_ID_BYTES);
		}
		store_checkpoint_free(&list[i]);
	}
	if (!rc)
		free(list);
	return rc;
}

/* What a whole stream is likest to here: its parent, else the nearest one of its VM. It is a saving: where it cannot be read, that is no reason to fail. */
static int find_likest(struct import *im, struct err *err)
{
	const struct store_checkpoint *c = &im->checkpoint;
	char id[STORE_ID_BYTES];
	struct err none = ERR_INIT;
	int rc = 0;

	memcpy(id, c->parent, sizeof(id));
	if (!id[0] || !store_has_folder(im->store, id))
		rc = find_nearest(im, id, err);
	if (rc || !id[0])
		return rc;
	rc = transfer_side_open(im->store, id, &im->base, &none);
	im->has_base = !rc && im->base.checkpoint.memory_bytes == c->memory_bytes;
	if (rc && rc != -ENOENT)
		log_warn("memory and disks are not shared with what is here: %s", none.message);
	return 0;
}

/* What the manifest says of where it stands here: the parent if that is here, else what it was exported against. */
static void set_parent(struct import *im)
{
	struct store_checkpoint *c = &im->checkpoint;
	struct store_stamp stamp;

	if (c->parent[0] && store_checkpoint_stamp(im->store, c->parent, &stamp, NULL) != 0)
		memcpy(c->parent, im->head.since, sizeof(c->parent));
	c->periodic = false; /* somebody wants it: no `keep` takes it away */
}

static int set_vm(struct import *im, struct err *err)
{
	struct store_checkpoint *c = &im->checkpoint;
	const char *name = im->wanted_vm ? im->wanted_vm : im->has_base ? im->base.checkpoint.vm : c->vm;
	struct store_vm there;
	int rc = store_check_name("VM", name, err);

	if (rc)
		return rc;
	if (strcmp(c->vm, name))
		c->group.id[0] = '\0'; /* which knows its VMs by their names */
	memmove(c->vm, name, strlen(name) + 1);
	rc = store_vm_get(im->store, c->vm, &there, NULL);
	if (rc)
		return rc == -ENOENT ? 0 : rc;
	bool same = !strcmp(there.uuid, c->vm_uuid) || (im->has_base && !strcmp(c->vm, im->base.checkpoint.vm));
	store_vm_free(&there);
	if (same)
		return 0;
	err_set(err, ERR_STATE, EEXIST, "VM %s: there is another one of that name here", c->vm);
	return err_hint(err, "give it another name: vmcp import --name NAME FILE");
}

static int set_tag(struct import *im, struct err *err)
{
	struct store_checkpoint *c = &im->checkpoint;
	char other[STORE_ID_BYTES] = "";

	memcpy(c->tag, im->head.tag, sizeof(c->tag));
	if (!c->tag[0])
		return 0;
	int rc = catalog_find_tag(im->store, c->tag, other, err);
	if (rc == 1) {
		log_warn("tag '%s': it names checkpoint %.8s here, so %.8s comes without it", c->tag, other, c->id);
		c->tag[0] = '\0';
	}
	return rc < 0 ? rc : 0;
}

int import_begin(struct import *im, struct err *err)
{
	int rc = check_all(im, err);

	im->begun = true;
	memcpy(im->result->id, im->checkpoint.id, sizeof(im->result->id));
	memcpy(im->result->since, im->head.since, sizeof(im->result->since));
	im->total_bytes = im->checkpoint.memory_bytes;
	for (uint32_t i = 0; i < im->head.disk_count; i++)
		im->total_bytes += im->head.disks[i].kept ? 0 : im->head.disks[i].size_bytes;
	if (rc || !im->store)
		return rc;
	rc = look_for_it(im, err);
	if (rc || im->result->present)
		return rc;
	rc = im->head.since[0] ? need_since(im, err) : find_likest(im, err);
	if (!rc)
		rc = set_vm(im, err);
	if (!rc)
		rc = set_tag(im, err);
	if (rc)
		return rc;
	set_parent(im);
	memcpy(im->result->vm, im->checkpoint.vm, sizeof(im->result->vm));
	memcpy(im->result->tag, im->checkpoint.tag, sizeof(im->result->tag));
	rc = store_draft_begin_import(im->store, im->checkpoint.id, &im->draft, err);
	if (!rc)
		rc = store_draft_put(im->draft, "state", im->state.data, im->state.length, err);
	if (!rc)
		rc = import_memory_begin(im, err);
	return rc ? rc : fault_check(FAULT_IMPORT_BEGUN, err);
}

/* --- the configuration here --- */

static const char *kept_path(const struct transfer_disk *disks, uint32_t count, const char *name)
{
	for (uint32_t i = 0; i < count; i++)
		if (!strcmp(disks[i].name, name))
			return disks[i].path;
	return NULL;
}

/* Where its disks are: as the base has them, else in the store. */
static int place_disks(struct import *im, const struct transfer_disk *before, uint32_t before_count, struct transfer_disk *disks, struct err *err)
{
	const struct store_checkpoint *c = &im->checkpoint;

	for (uint32_t i = 0; i < im->head.disk_count; i++) {
		const struct transfer_head_disk *disk = &im->head.disks[i];
		const char *known = !disk->readonly || disk->kept ? kept_path(before, before_count, disk->name) : NULL;

		memcpy(disks[i].name, disk->name, sizeof(disks[i].name));
		disks[i].readonly = disk->readonly;
		if (known && !im->wanted_vm)
			disks[i].path = xstrdup(known);
		else if (disk->kept && !known)
			return err_set(err, ERR_STATE, ENOENT, "disk %s: checkpoint %.8s here has none", disk->name, im->head.since);
		else if (disk->kept)
			disks[i].path = xstrdup(known);
		else
			disks[i].path = disk->readonly ? store_own_disk(im->store, c->vm, c->id, disk->name)
						       : store_vm_disk_path(store_path(im->store), c->vm, disk->name);
	}
	return 0;
}

static int place_config(struct import *im, struct err *err)
{
	struct store_checkpoint *c = &im->checkpoint;
	struct transfer_disk before[TRANSFER_MAX_DISKS], disks[TRANSFER_MAX_DISKS] = {0};
	CLEANUP_BUF struct buf text = BUF_INIT;
	uint32_t before_count = 0;
	const struct transfer_place place = {.vm = c->vm,
					     .memory_bytes = c->memory_bytes,
					     .cpus = c->cpus,
					     .disks = disks,
					     .disk_count = im->head.disk_count,
					     .base_config = im->has_base ? im->base.checkpoint.config_text : NULL};
	int rc = im->has_base ? im->options->config->list_disks("configuration", place.base_config, before, &before_count, err) : 0;

	if (!rc)
		rc = place_disks(im, before, before_count, disks, err);
	if (!rc)
		rc = im->options->config->place("configuration", c->config_text, &place, &text, err);
	for (uint32_t i = 0; i < before_count; i++)
		free(before[i].path);
	for (uint32_t i = 0; i < TRANSFER_MAX_DISKS; i++)
		free(disks[i].path);
	if (rc)
		return rc;
	free(c->config_text);
	c->config_text = xstrdup((const char *)text.data);
	return 0;
}

int import_finish_manifest(struct import *im, struct err *err)
{
	struct store_checkpoint *c = &im->checkpoint;

	c->size_bytes = c->written_bytes + im->state.length;
	for (uint32_t i = 0; i < c->disk_count; i++)
		c->size_bytes += c->disks[i].file_bytes;
	return place_config(im, err);
}
