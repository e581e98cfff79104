/* <disk> of domain XML. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "machine/config_internal.h"
#include "machine/domain_internal.h"

struct disk {
	const char *device, *name; /* "disk", "vda" */
	char path[4096];	   /* or POOL:VOLUME; "" for none */
	bool removable;
};

static const char *disk_name(const struct xml_node *node)
{
	const char *dev = xml_child_attribute(node, "target", "dev");

	return dev && *dev ? dev : "disk";
}

static int refuse_encryption(struct domain_reading *r, const struct xml_node *node)
{
	return domain_refuse(r, node, "decrypt it with `qemu-img convert`, or let libvirt run this domain", "the guest would see the disk as it is encrypted");
}

static int refuse_slices(struct domain_reading *r, const struct xml_node *node)
{
	return domain_refuse(r, node, "copy the slice into an image of its own with `qemu-img convert`", "a part of a file as a disk is not supported");
}

static const struct domain_rule source_rules[] = {
	{"encryption", refuse_encryption},
	{"slices", refuse_slices},
	{"seclabel", NULL},
};

/* Where the data is: 0 with disk->path, or "" for a drive that stays out. */
static int read_source(struct domain_reading *r, const struct xml_node *node, struct disk *disk)
{
	const char *type = xml_attribute(node, "type");
	const struct xml_node *source = xml_child(node, "source");
	const char *file = xml_attribute(source, "file"), *dev = xml_attribute(source, "dev");
	const char *pool = xml_attribute(source, "pool"), *volume = xml_attribute(source, "volume");
	int length = 0;

	if (!type || !strcmp(type, "file"))
		length = snprintf(disk->path, sizeof(disk->path), "%s", file ? file : "");
	else if (!strcmp(type, "block"))
		length = snprintf(disk->path, sizeof(disk->path), "%s", dev ? dev : "");
	else if (!strcmp(type, "volume") && pool && volume)
		length = snprintf(disk->path, sizeof(disk->path), "%s:%s", pool, volume);
	else if (!disk->removable)
		return domain_refuse(r, node, "disks must be files, block devices or storage volumes", "%s: type='%s' is not supported", disk->name, type);
	else
		domain_tell(r, node, "%s: type='%s' is not supported: the drive is left out", disk->name, type);
	if (length < 0 || (size_t)length >= sizeof(disk->path))
		return domain_refuse(r, node, "move the image to a shorter path", "%s: the path is too long", disk->name);
	if (!disk->path[0] && !disk->removable)
		return domain_refuse(r, node, "add <source file='...'/>", "%s: it has no source", disk->name);
	return source ? domain_walk(r, source, DOMAIN_RULES(source_rules)) : 0;
}

static int read_format(struct domain_reading *r, const struct xml_node *node, const struct disk *disk)
{
	const struct xml_node *driver = xml_child(node, "driver");
	const char *type = xml_attribute(driver, "type");

	/* libvirt takes what is not said for raw: it never looks into an image. */
	if (!type || !strcmp(type, "raw"))
		r->formats[r->disk_count] = DOMAIN_RAW;
	else if (!strcmp(type, "qcow2"))
		r->formats[r->disk_count] = DOMAIN_QCOW2;
	else
		return domain_refuse(r, driver, "convert it with `qemu-img convert -O qcow2`", "%s: images of type '%s' are not supported", disk->name, type);
	if (driver)
		domain_tell_attributes(r, driver, "name type");
	return 0;
}

static int read_target(struct domain_reading *r, const struct xml_node *node)
{
	const char *bus = xml_attribute(node, "bus"), *dev = xml_attribute(node, "dev");

	if (bus ? strcmp(bus, "virtio") != 0 : dev && strncmp(dev, "vd", 2) != 0)
		domain_tell(r, node, "%s: bus %s: the guest finds a virtio disk instead", dev ? dev : "disk", bus ? bus : "of that name");
	return domain_tell_attributes(r, node, "dev bus tray rotation_rate");
}

static int read_serial(struct domain_reading *r, const struct xml_node *node)
{
	return domain_tell(r, node, "'%s': the serial number that the guest sees is the disk's name", node->text);
}

static int read_transient(struct domain_reading *r, const struct xml_node *node)
{
	return domain_tell(r, node, "what the guest writes stays in a layer of its own, and the image as it is");
}

/* `source`, `driver` are read above. */
static const struct domain_rule disk_rules[] = {
	{"source", NULL}, {"driver", NULL}, {"target", read_target}, {"readonly", NULL}, {"serial", read_serial}, {"backingStore", NULL}, {"alias", NULL},
	{"address", NULL}, {"boot", NULL}, {"acpi", NULL}, {"transient", read_transient}, {"encryption", refuse_encryption},
};

static int put_disk(struct domain_reading *r, const struct xml_node *node, const struct disk *disk)
{
	bool transient = xml_child(node, "transient") != NULL;
	bool readonly = xml_child(node, "readonly") || disk->removable;
	char name[CONFIG_NAME_BYTES];

	domain_make_name(disk->name, name);
	int rc = config_append(&r->disks, r->err, "\n[disk %s]\n", name);
	if (!rc)
		rc = domain_put(r, &r->disks, transient && !readonly ? "base" : "path", disk->path);
	if (!rc && readonly)
		rc = domain_put(r, &r->disks, "readonly", "yes");
	if (!rc && !readonly && !transient && r->formats[r->disk_count] == DOMAIN_RAW)
		domain_tell(r, node,
			    "%s: raw: with its first checkpoint the file becomes a qcow2 image, and the domain's <driver type='raw'/> wrong: change it before libvirt starts it again",
			    disk->name);
	r->disk_count++;
	return rc;
}

int domain_read_disk(struct domain_reading *r, const struct xml_node *node)
{
	const char *device = xml_attribute(node, "device");
	struct disk disk = {.device = device ? device : "disk", .name = disk_name(node)};

	if (!strcmp(disk.device, "floppy"))
		return domain_tell(r, node, "%s: there is no floppy drive: it is left out", disk.name);
	if (r->disk_count == CONFIG_MAX_DISKS)
		return domain_refuse(r, node, "leave some out", "more than %d disks", CONFIG_MAX_DISKS);
	disk.removable = !strcmp(disk.device, "cdrom");
	int rc = read_source(r, node, &disk);
	if (rc)
		return rc;
	if (!disk.path[0])
		return xml_child(node, "source") ? 0 : domain_tell(r, node, "%s: an empty drive: it is left out", disk.name);
	if (disk.removable)
		domain_tell(r, node, "%s: a CD-ROM drive becomes a read-only virtio disk", disk.name);
	else if (strcmp(disk.device, "disk") != 0)
		domain_tell(r, node, "%s: device='%s' becomes a plain virtio disk", disk.name, disk.device);
	rc = read_format(r, node, &disk);
	if (!rc)
		rc = domain_walk(r, node, DOMAIN_RULES(disk_rules));
	return rc ? rc : put_disk(r, node, &disk);
}
