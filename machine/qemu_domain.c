/* Definitions of domains that QEMU runs, as far as checkpoints are concerned, and their disks. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"
#include "checkpoint/state_file.h"
#include "cowdisk/block.h"
#include "machine/qemu_internal.h"
#include "machine/xml.h"

#define MARK ".vmcp-"

int qemu_check_store(const struct store *store, struct err *err)
{
	if (!store_is_encrypted(store))
		return 0;
	err_set(err, ERR_STATE, ENOTSUP, "store %s: it is encrypted, and what QEMU writes and reads is not", store_path(store));
	return err_hint(err, "keep checkpoints of domains in another store, on an encrypted filesystem: vmcp --store DIR");
}

/* --- definitions --- */

static int read_disk(const char *name, const struct xml_node *node, struct qemu_disk *disk, struct err *err)
{
	const char *type = xml_attribute(node, "type"), *device = xml_attribute(node, "device"), *target = xml_child_attribute(node, "target", "dev");
	const char *file = xml_child_attribute(node, "source", "file"), *format = xml_child_attribute(node, "driver", "type");

	snprintf(disk->target, sizeof(disk->target), "%s", target ? target : "");
	disk->left_alone = xml_child(node, "readonly") || (device && strcmp(device, "disk") != 0 && strcmp(device, "lun") != 0);
	if (disk->left_alone)
		return 0;
	disk->qcow2 = format && !strcmp(format, "qcow2");
	if (!type || strcmp(type, "file") != 0 || !file || !target) {
		err_set(err, ERR_USAGE, EINVAL, "domain %s: disk %s: type='%s': only disks that are files can be in a checkpoint", name, disk->target, type ? type : "");
		return err_hint(err, "copy it into a qcow2 image with `virsh blockcopy`");
	}
	if (!disk->qcow2 && format && strcmp(format, "raw") != 0) {
		err_set(err, ERR_USAGE, EINVAL, "domain %s: disk %s: images of type '%s' cannot be in a checkpoint", name, disk->target, format);
		return err_hint(err, "convert it with `qemu-img convert -O qcow2`");
	}
	disk->path = xstrdup(file);
	return store_check_name("disk", disk->target, err);
}

static int read_disks(const char *name, const struct xml_node *devices, struct qemu_domain *out, struct err *err)
{
	int rc = 0;

	for (const struct xml_node *node = devices ? devices->children : NULL; !rc && node; node = node->next) {
		if (strcmp(node->name, "disk") != 0)
			continue;
		if (out->disk_count == CONFIG_MAX_DISKS)
			return err_set(err, ERR_USAGE, E2BIG, "domain %s: more than %d disks", name, CONFIG_MAX_DISKS);
		rc = read_disk(name, node, &out->disks[out->disk_count++], err);
	}
	return rc;
}

int qemu_domain_read(const char *name, const char *xml, struct qemu_domain *out, struct err *err)
{
	struct xml_node *root;

	*out = (struct qemu_domain){0};
	int rc = xml_parse(name, xml, strlen(xml), &root, err);
	if (rc)
		return rc;
	const char *cpus = xml_child_text(root, "vcpu");
	out->cpus = cpus ? (uint32_t)strtoul(cpus, NULL, 10) : 1;
	rc = read_disks(name, xml_child(root, "devices"), out, err);
	xml_free(root);
	return rc;
}

void qemu_domain_free(struct qemu_domain *domain)
{
	for (unsigned i = 0; i < domain->disk_count; i++)
		free(domain->disks[i].path);
	domain->disk_count = 0;
}

/* --- another image in a definition: libvirt's own text, in its one way of writing it --- */

char *qemu_escape(const char *text)
{
	char *out = xcalloc(strlen(text) + 1, 6), *to = out;

	for (; *text; text++) {
		const char *entity = *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : *text == '>' ? "&gt;" : *text == '\'' ? "&apos;" : *text == '"' ? "&quot;" : NULL;

		if (entity)
			to = stpcpy(to, entity);
		else
			*to++ = *text;
	}
	return out;
}

/* [*begin, *end): what stands between `open` and `close`, both included. */
static bool find_part(const char *from, const char *limit, const char *open, const char *close, const char **begin, const char **end)
{
	*begin = strstr(from, open);
	*end = *begin && *begin < limit ? strstr(*begin, close) : NULL;
	if (!*end || *end >= limit)
		return false;
	*end += strlen(close);
	return true;
}

/* Cuts out the first element of that name, with all that is in it: others of its name may be within it. */
static void remove_element(char *text, const char *name)
{
	CLEANUP_FREE char *open = xasprintf("<%s", name), *close = xasprintf("</%s>", name);
	char *begin = text, *end, *last = NULL;

	do
		begin = strstr(begin, open);
	while (begin && !strchr(" />", begin[strlen(open)]) && *++begin);
	end = begin ? strchr(begin, '>') : NULL;
	if (!end)
		return;
	if (end[-1] != '/') {
		for (char *at = end; (at = strstr(at, close)) != NULL; at++)
			last = at;
		if (!last)
			return;
		end = last + strlen(close) - 1;
	}
	memmove(begin, end + 1, strlen(end + 1) + 1);
}

/* The disk again: one driver of type qcow2, one source, nothing on what is below. */
static char *rewrite_disk(const char *disk, const char *disk_end, const char *path)
{
	CLEANUP_FREE char *name = qemu_escape(path), *copy = strndup(disk, (size_t)(disk_end - disk));

	if (!copy)
		return NULL;
	remove_element(copy, "backingStore");
	remove_element(copy, "source");
	remove_element(copy, "driver");
	char *first = strchr(copy, '>');
	return first ? xasprintf("%.*s<driver name='qemu' type='qcow2'/><source file='%s'/>%s", (int)(first + 1 - copy), copy, name, first + 1) : NULL;
}

char *qemu_replace_image(const char *xml, const char *target, const char *path)
{
	CLEANUP_FREE char *wanted = xasprintf("<target dev='%s'", target);
	const char *begin = xml, *end;

	while (find_part(begin, xml + strlen(xml), "<disk ", "</disk>", &begin, &end)) {
		const char *found = strstr(begin, wanted);

		if (found && found < end) {
			CLEANUP_FREE char *disk = rewrite_disk(begin, end, path);
			return disk ? xasprintf("%.*s%s%s", (int)(begin - xml), xml, disk, end) : NULL;
		}
		begin = end;
	}
	return NULL;
}

/* --- overlays --- */

bool qemu_is_overlay(const char *path)
{
	size_t length = strlen(path);

	return length > QEMU_MARK_BYTES && !strncmp(path + length - QEMU_MARK_BYTES, MARK, strlen(MARK));
}

char *qemu_overlay_path(const char *image, const char *id)
{
	size_t length = strlen(image) - (qemu_is_overlay(image) ? QEMU_MARK_BYTES : 0);

	return xasprintf("%.*s" MARK "%.8s", (int)length, image, id);
}

int qemu_image_size(const char *path, bool qcow2, uint64_t *size_bytes, struct err *err)
{
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	uint8_t size[8];
	struct stat st;
	int rc = 0;

	if (fd < 0 || fstat(fd, &st))
		return err_sys(err, errno, "%s", path);
	*size_bytes = (uint64_t)st.st_size;
	if (qcow2)
		rc = file_pread_full(fd, size, sizeof(size), 24, err); /* of the virtual disk, in its header */
	if (rc)
		return err_prefix(err, "%s", path);
	if (qcow2)
		*size_bytes = get_be64(size);
	return 0;
}

int qemu_make_overlay(const char *path, const char *layer_path, bool qcow2, uint64_t size_bytes, struct err *err)
{
	const struct cow_create create = {
		.size_bytes = size_bytes, .backing = layer_path, .backing_format = qcow2 ? COW_FORMAT_QCOW2 : COW_FORMAT_RAW};

	struct stat st;
	int rc = cow_create(path, &create, err);

	if (rc)
		return rc;
	if (stat(layer_path, &st) == 0 && chown(path, st.st_uid, st.st_gid) == 0 && chmod(path, st.st_mode & 0777) == 0)
		return 0;
	rc = err_sys(err, errno, "%s: owner and mode of its layer", path);
	unlink(path);
	return rc;
}

/* --- the section --- */

int qemu_state_encode(const char *xml, uint64_t stream_bytes, struct buf *out, struct err *err)
{
	json_t *body = json_pack("{s:s, s:I}", "domain", xml, "stream_bytes", (json_int_t)stream_bytes);
	CLEANUP_FREE char *text = body ? json_dumps(body, JSON_COMPACT | JSON_SORT_KEYS) : NULL;

	json_decref(body);
	if (!text)
		return err_set(err, ERR_FAILED, EINVAL, "the domain's definition is no UTF-8");
	const struct state_section section = {
		.kind = STATE_SECTION_STATE, .id = QEMU_SECTION, .version = 1, .body = (const uint8_t *)text, .length = strlen(text)};
	int rc = state_file_start(out, 1, err);
	return rc ? rc : state_file_add(out, &section, err);
}

int qemu_state_decode(const void *data, size_t length, char **xml, uint64_t *stream_bytes, struct err *err)
{
	struct state_section *sections;
	const char *domain = NULL;
	json_int_t bytes = -1;
	size_t count;
	int rc = state_file_parse(data, length, &sections, &count, err);

	if (rc)
		return rc;
	json_t *body = count == 1 && !strcmp(sections[0].id, QEMU_SECTION) && sections[0].version == 1
			       ? json_loadb((const char *)sections[0].body, sections[0].length, 0, NULL)
			       : NULL;
	if (!body || json_unpack(body, "{s:s, s:I}", "domain", &domain, "stream_bytes", &bytes) || bytes <= 0)
		rc = err_set(err, ERR_DAMAGED, EINVAL, "state: holds no domain of QEMU");
	else {
		*xml = xstrdup(domain);
		*stream_bytes = (uint64_t)bytes;
	}
	json_decref(body);
	free(sections);
	return rc;
}
