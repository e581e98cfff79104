/* The manifest of a checkpoint: JSON with a checksum of its own. docs/format.md specifies it. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>
#include <xxhash.h>

#include "base/json.h"
#include "checkpoint/store/store_internal.h"

#define MANIFEST_FORMAT	 "vmcp-checkpoint"
#define MANIFEST_VERSION 1
#define MAX_DISKS	 26

static json_t *integer(uint64_t value) { return json_integer((json_int_t)value); }

static json_t *hex(uint64_t value)
{
	char text[17];

	snprintf(text, sizeof(text), "%016" PRIx64, value);
	return json_string(text);
}

/* False when memory is short. */
static bool own_sum(json_t *manifest, uint64_t *sum)
{
	char *text = json_dumps(manifest, JSON_COMPACT | JSON_SORT_KEYS);

	if (!text)
		return false;
	*sum = XXH3_64bits(text, strlen(text));
	free(text);
	return true;
}

static json_t *disk_to_json(const struct store_disk_layer *disk)
{
	return json_pack("{s:s, s:s, s:s, s:o, s:o, s:o, s:o, s:o}", "name", disk->disk, "layer", disk->layer, "format",
			 disk->format, "size_bytes", integer(disk->size_bytes), "file_bytes", integer(disk->file_bytes),
			 "xxh3", hex(disk->xxh3), "inflight_writes", integer(disk->inflight_writes), "inflight_reads",
			 integer(disk->inflight_reads));
}

static json_t *file_to_json(uint64_t bytes, uint64_t sum)
{
	return json_pack("{s:o, s:o}", "bytes", integer(bytes), "xxh3", hex(sum));
}

/* An object with the names of all members, so that each manifest alone says whether its group is whole. */
static json_t *group_to_json(const struct store_group_note *group)
{
	json_t *members = json_split(group->members ? group->members : "", " ");

	return json_pack("{s:s, s:s, s:o}", "id", group->id, "tag", group->tag, "members", members);
}

int manifest_encode(const struct store_checkpoint *c, struct buf *out, struct err *err)
{
	json_t *disks = json_array();
	uint64_t sum;

	for (uint32_t i = 0; i < c->disk_count; i++)
		if (json_array_append_new(disks, disk_to_json(&c->disks[i]))) {
			json_decref(disks);
			return err_set(err, ERR_USAGE, EILSEQ, "manifest: disk %s: a name is no valid UTF-8",
				       c->disks[i].disk);
		}
	json_t *memory =
		json_pack("{s:s, s:o, s:o, s:o, s:o, s:o}", "layer", c->memory_layer, "bytes", integer(c->memory_bytes),
			  "saved_pages", integer(c->saved_pages), "zero_pages", integer(c->zero_pages), "parent_pages",
			  integer(c->parent_pages), "written_bytes", integer(c->written_bytes));
	json_t *manifest = json_pack(
		"{s:s, s:i, s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:b, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s}",
		"format", MANIFEST_FORMAT, "version", MANIFEST_VERSION, "id", c->id, "parent", c->parent, "vm", c->vm,
		"vm_uuid", c->vm_uuid, "tag", c->tag, "message", c->message ? c->message : "", "created_wall_ns",
		integer(c->created_wall_ns), "live", c->live, "cpus", (int)c->cpus, "pause_ns", integer(c->pause_ns),
		"durable_ns", integer(c->durable_ns), "size_bytes", integer(c->size_bytes), "memory", memory, "disks",
		disks, "state", file_to_json(c->state_bytes, c->state_xxh3), "index",
		file_to_json(c->index_bytes, c->index_xxh3), "config", c->config_text ? c->config_text : "");
	if (c->periodic)
		json_object_set_new(manifest, "periodic", json_true());
	if (c->group.id[0])
		json_object_set_new(manifest, "group", group_to_json(&c->group));
	if (c->needs)
		json_object_set_new(manifest, "needs", json_split(c->needs, "\n"));
	if (!manifest) /* a text that is no UTF-8 */
		return err_set(err, ERR_USAGE, EILSEQ, "manifest: a name, message or configuration is no valid UTF-8");
	char *text = NULL;
	if (own_sum(manifest, &sum) && json_object_set_new(manifest, "xxh3", hex(sum)) == 0)
		text = json_dumps(manifest, JSON_INDENT(2));
	json_decref(manifest);
	if (!text)
		return err_sys(err, ENOMEM, "manifest");
	int rc = buf_append(out, text, strlen(text), err);
	free(text);
	return rc;
}

/* --- decoding: everything is untrusted --- */

struct decoding {
	const char *what;
	struct err *err;
	int rc; /* the first failure; later reads do nothing */
};

static const json_t *field(struct decoding *d, const json_t *object, const char *key, json_type type)
{
	const json_t *value = json_object_get(object, key);

	if (d->rc)
		return NULL;
	if (value && (json_typeof(value) == type || (type == JSON_TRUE && json_is_boolean(value))))
		return value;
	d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `%s` is missing or of another type", d->what, key);
	return NULL;
}

static void get_text(struct decoding *d, const json_t *object, const char *key, char *out, size_t size)
{
	const json_t *value = field(d, object, key, JSON_STRING);

	if (!value)
		return;
	if (json_string_length(value) >= size || strlen(json_string_value(value)) != json_string_length(value))
		d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `%s` is too long", d->what, key);
	else
		memcpy(out, json_string_value(value), json_string_length(value) + 1);
}

static void get_id(struct decoding *d, const json_t *object, const char *key, bool may_be_empty,
		   char out[STORE_ID_BYTES])
{
	get_text(d, object, key, out, STORE_ID_BYTES);
	if (!d->rc && !store_is_id(out) && !(may_be_empty && !*out))
		d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `%s` is no id", d->what, key);
}

static void get_name(struct decoding *d, const json_t *object, const char *key, bool may_be_empty,
		     char out[STORE_NAME_BYTES])
{
	get_text(d, object, key, out, STORE_NAME_BYTES);
	if (!d->rc && !(may_be_empty && !*out) && store_check_name(key, out, NULL))
		d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `%s` is no name", d->what, key);
}

static uint64_t get_integer(struct decoding *d, const json_t *object, const char *key, uint64_t limit)
{
	const json_t *value = field(d, object, key, JSON_INTEGER);

	if (!value)
		return 0;
	json_int_t number = json_integer_value(value);
	if (number < 0 || (uint64_t)number > limit) {
		d->rc = err_set(d->err, ERR_DAMAGED, ERANGE, "%s: field `%s` is out of range", d->what, key);
		return 0;
	}
	return (uint64_t)number;
}

static uint64_t get_hex(struct decoding *d, const json_t *object, const char *key)
{
	char text[17] = "", *end;

	get_text(d, object, key, text, sizeof(text));
	uint64_t value = strtoull(text, &end, 16);
	if (!d->rc && (strspn(text, "0123456789abcdef") != 16 || *end))
		d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `%s` is no checksum", d->what, key);
	return value;
}

static char *get_long_text(struct decoding *d, const json_t *object, const char *key)
{
	const json_t *value = field(d, object, key, JSON_STRING);

	return value ? xstrdup(json_string_value(value)) : NULL;
}

static void get_disks(struct decoding *d, const json_t *manifest, struct store_checkpoint *out)
{
	const json_t *list = field(d, manifest, "disks", JSON_ARRAY);

	if (!list)
		return;
	if (json_array_size(list) > MAX_DISKS) {
		d->rc = err_set(d->err, ERR_DAMAGED, ERANGE, "%s: more than %d disks", d->what, MAX_DISKS);
		return;
	}
	out->disk_count = (uint32_t)json_array_size(list);
	out->disks = xcalloc(out->disk_count + 1, sizeof(*out->disks));
	for (uint32_t i = 0; i < out->disk_count; i++) {
		const json_t *one = json_array_get(list, i);
		struct store_disk_layer *disk = &out->disks[i];

		get_name(d, one, "name", false, disk->disk);
		get_id(d, one, "layer", false, disk->layer);
		get_text(d, one, "format", disk->format, sizeof(disk->format));
		disk->size_bytes = get_integer(d, one, "size_bytes", INT64_MAX);
		disk->file_bytes = get_integer(d, one, "file_bytes", INT64_MAX);
		disk->xxh3 = get_hex(d, one, "xxh3");
		disk->inflight_writes = (uint32_t)get_integer(d, one, "inflight_writes", UINT32_MAX);
		disk->inflight_reads = (uint32_t)get_integer(d, one, "inflight_reads", UINT32_MAX);
	}
}

static void get_group(struct decoding *d, const json_t *group, struct store_group_note *out)
{
	const json_t *members = field(d, group, "members", JSON_ARRAY);
	CLEANUP_BUF struct buf names = BUF_INIT;

	get_id(d, group, "id", false, out->id);
	get_name(d, group, "tag", true, out->tag);
	if (!d->rc && (json_array_size(members) == 0 || json_array_size(members) > STORE_GROUP_MAX))
		d->rc = err_set(d->err, ERR_DAMAGED, ERANGE, "%s: field `members`: a group has from 1 to %d", d->what, STORE_GROUP_MAX);
	for (size_t i = 0; !d->rc && i < json_array_size(members); i++) {
		const char *text = json_string_value(json_array_get(members, i));

		if (!text || store_check_name("member", text, NULL)) {
			d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `members`: one is no name", d->what);
			break;
		}
		if (i)
			d->rc = buf_append(&names, " ", 1, d->err);
		if (!d->rc)
			d->rc = buf_append(&names, text, strlen(text), d->err);
	}
	if (!d->rc)
		d->rc = buf_append(&names, NULL, 1, d->err);
	if (d->rc)
		return;
	out->members = (char *)names.data;
	names = BUF_INIT;
}

static char *get_needs(struct decoding *d, const json_t *needs)
{
	CLEANUP_BUF struct buf lines = BUF_INIT;

	for (size_t i = 0; !d->rc && i < json_array_size(needs); i++) {
		const char *line = json_string_value(json_array_get(needs, i));

		if (!line || !*line || strchr(line, '\n'))
			d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: field `needs`: one is no line of text", d->what);
		else if (!(d->rc = buf_append(&lines, line, strlen(line), d->err)))
			d->rc = buf_append(&lines, "\n", 1, d->err);
	}
	if (!d->rc)
		d->rc = buf_append(&lines, NULL, 1, d->err);
	if (d->rc)
		return NULL;
	char *text = (char *)lines.data;
	lines = (struct buf)BUF_INIT;
	return text;
}

static void get_memory(struct decoding *d, const json_t *manifest, struct store_checkpoint *out)
{
	const json_t *memory = field(d, manifest, "memory", JSON_OBJECT);

	get_id(d, memory, "layer", false, out->memory_layer);
	out->memory_bytes = get_integer(d, memory, "bytes", 1ull << 52);
	out->saved_pages = get_integer(d, memory, "saved_pages", 1ull << 40);
	out->zero_pages = get_integer(d, memory, "zero_pages", 1ull << 40);
	out->parent_pages = get_integer(d, memory, "parent_pages", 1ull << 40);
	out->written_bytes = get_integer(d, memory, "written_bytes", INT64_MAX);
}

static void get_fields(struct decoding *d, const json_t *manifest, struct store_checkpoint *out)
{
	const json_t *live = field(d, manifest, "live", JSON_TRUE);

	get_id(d, manifest, "id", false, out->id);
	get_id(d, manifest, "parent", true, out->parent);
	get_name(d, manifest, "vm", false, out->vm);
	get_text(d, manifest, "vm_uuid", out->vm_uuid, sizeof(out->vm_uuid));
	get_name(d, manifest, "tag", true, out->tag);
	out->message = get_long_text(d, manifest, "message");
	out->config_text = get_long_text(d, manifest, "config");
	out->created_wall_ns = get_integer(d, manifest, "created_wall_ns", INT64_MAX);
	out->live = live && json_is_true(live);
	out->periodic = json_object_get(manifest, "periodic") && json_is_true(field(d, manifest, "periodic", JSON_TRUE));
	if (json_object_get(manifest, "group"))
		get_group(d, field(d, manifest, "group", JSON_OBJECT), &out->group);
	if (json_object_get(manifest, "needs"))
		out->needs = get_needs(d, field(d, manifest, "needs", JSON_ARRAY));
	out->cpus = (uint32_t)get_integer(d, manifest, "cpus", 4096);
	out->pause_ns = get_integer(d, manifest, "pause_ns", INT64_MAX);
	out->durable_ns = get_integer(d, manifest, "durable_ns", INT64_MAX);
	out->size_bytes = get_integer(d, manifest, "size_bytes", INT64_MAX);
	get_memory(d, manifest, out);
	get_disks(d, manifest, out);
	const json_t *state = field(d, manifest, "state", JSON_OBJECT),
		     *index = field(d, manifest, "index", JSON_OBJECT);
	out->state_bytes = get_integer(d, state, "bytes", INT64_MAX);
	out->state_xxh3 = get_hex(d, state, "xxh3");
	out->index_bytes = get_integer(d, index, "bytes", INT64_MAX);
	out->index_xxh3 = get_hex(d, index, "xxh3");
	if (out->message && !*out->message) {
		free(out->message);
		out->message = NULL;
	}
}

/* Format and version first, as the rest means nothing in another format; then the checksum. */
static void check_manifest(struct decoding *d, json_t *manifest)
{
	char format[32];

	get_text(d, manifest, "format", format, sizeof(format));
	uint64_t version = get_integer(d, manifest, "version", UINT32_MAX);
	if (!d->rc && (strcmp(format, MANIFEST_FORMAT) || version == 0))
		d->rc = err_set(d->err, ERR_DAMAGED, EINVAL, "%s: is no manifest of a checkpoint", d->what);
	if (!d->rc && version > MANIFEST_VERSION) {
		err_set(d->err, ERR_FAILED, ENOTSUP, "%s: version %" PRIu64 " is newer than this vmcp knows (%d)",
			d->what, version, MANIFEST_VERSION);
		err_hint(d->err, "use the newer vmcp that wrote it");
		d->rc = -ENOTSUP;
	}
	uint64_t sum = get_hex(d, manifest, "xxh3"), own;
	if (d->rc)
		return;
	json_object_del(manifest, "xxh3");
	if (!own_sum(manifest, &own))
		d->rc = err_sys(d->err, ENOMEM, "%s", d->what);
	else if (own != sum)
		d->rc = err_set(d->err, ERR_DAMAGED, EBADMSG, "%s: damaged: its checksum does not fit", d->what);
}

int manifest_decode(const char *what, const void *data, size_t length, struct store_checkpoint *out, struct err *err)
{
	struct decoding d = {.what = what, .err = err};
	json_error_t why;
	json_t *manifest = json_loadb(data, length, JSON_REJECT_DUPLICATES, &why);

	*out = (struct store_checkpoint){0};
	if (!manifest)
		return err_set(err, ERR_DAMAGED, EINVAL, "%s: damaged: line %d: %s", what, why.line, why.text);
	check_manifest(&d, manifest);
	if (!d.rc)
		get_fields(&d, manifest, out);
	json_decref(manifest);
	if (d.rc)
		store_checkpoint_free(out);
	return d.rc;
}
