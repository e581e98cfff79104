/* What taking and going back share. */
#ifndef VMCP_MACHINE_QEMU_INTERNAL_H
#define VMCP_MACHINE_QEMU_INTERNAL_H

#include "machine/libvirt.h"
#include "machine/qemu.h"

#define QEMU_SECTION "qemu"
#define QEMU_MARK_BYTES 14 /* of an overlay's name: ".vmcp-" and eight digits */

struct qemu_disk {
	char target[CONFIG_NAME_BYTES]; /* vda: libvirt's name of it */
	char *path;			/* of its image, as libvirt has it */
	bool qcow2;
	bool left_alone; /* read-only, or a drive: no part of checkpoints */
};

struct qemu_domain {
	uint32_t cpus;
	unsigned disk_count;
	struct qemu_disk disks[CONFIG_MAX_DISKS];
};

/* What a definition says of a domain. A disk that cannot be part of a checkpoint: ERR_USAGE. Freed by qemu_domain_free also after a failure. */
int qemu_domain_read(const char *name, const char *xml, struct qemu_domain *out, struct err *err);
void qemu_domain_free(struct qemu_domain *domain);

/* QEMU reads and writes its stream itself, as it is: ERR_STATE for an encrypted store. */
int qemu_check_store(const struct store *store, struct err *err);

/* For an attribute (malloc). */
char *qemu_escape(const char *text);
/* "IMAGE.vmcp-1a2b3c4d" (malloc): an overlay of checkpoint or start `id`, beside the image, whose own mark goes. */
char *qemu_overlay_path(const char *image, const char *id);
bool qemu_is_overlay(const char *path);
/* A new overlay on a layer: size of the virtual disk, owner and mode as the layer's, as what QEMU may do with the one it may do with the other. A failure leaves none. */
int qemu_make_overlay(const char *path, const char *layer_path, bool qcow2, uint64_t size_bytes, struct err *err);
int qemu_image_size(const char *path, bool qcow2, uint64_t *size_bytes, struct err *err);

/* The definition (malloc) with another image for the disk `target`, a qcow2 one, and without what libvirt knew of those below it. NULL: it has no such disk. */
char *qemu_replace_image(const char *xml, const char *target, const char *path);

/* Section `qemu`: the definition, and how long the stream is. */
struct buf;
int qemu_state_encode(const char *xml, uint64_t stream_bytes, struct buf *out, struct err *err);
int qemu_state_decode(const void *data, size_t length, char **xml, uint64_t *stream_bytes, struct err *err);

#endif
