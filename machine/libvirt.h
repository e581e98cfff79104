/*
 * What vmcp asks libvirt: definitions of domains, and where its networks and volumes are; and what it does to domains that QEMU runs below it (struct
 * libvirt_guest). Connections of libvirt_open are read-only.
 *
 * The library is loaded (dlopen) by the first call: a VM that has nothing to do with libvirt neither needs nor carries it. Where vmcp was built without
 * libvirt's headers (libvirt_none.c), every open fails. A connection starts no thread, and belongs to one.
 */
#ifndef VMCP_MACHINE_LIBVIRT_H
#define VMCP_MACHINE_LIBVIRT_H

#include <stdbool.h>

#include "base/err.h"
#include "net/net.h"

struct libvirt;

/* `uri` as virsh takes it; NULL or "": libvirt's own default. Wrong URI: ERR_USAGE; no library, no daemon, no permission: ERR_HOST. */
int libvirt_open(const char *uri, struct libvirt **out, struct err *err);
void libvirt_close(struct libvirt *libvirt); /* NULL is allowed */
bool libvirt_is_alive(const struct libvirt *libvirt); /* false: its daemon is gone */

/* The definition that the next start of the domain would have (malloc), and whether it runs. Unknown: ERR_NOT_FOUND. */
int libvirt_domain_xml(struct libvirt *libvirt, const char *domain, char **xml, bool *active, struct err *err);
/* The bridge of a network that is active. Unknown: ERR_NOT_FOUND; not active: ERR_STATE; a network without a bridge: ERR_USAGE. */
int libvirt_network_bridge(struct libvirt *libvirt, const char *network, char bridge[NET_INTERFACE_BYTES], struct err *err);
/* The file or block device (malloc) of a volume. Unknown: ERR_NOT_FOUND; pool not active: ERR_STATE; volume of another kind: ERR_USAGE. */
int libvirt_volume_path(struct libvirt *libvirt, const char *pool, const char *volume, char **path, struct err *err);

/* --- domains that QEMU runs --- */

struct libvirt_guest;
struct libvirt_guest_state {
	bool active, running; /* running: active, and its processors are not stopped */
	bool persistent; /* it has a definition of its own */
	char uuid[37];
};

/* As libvirt_open, with the right to change. */
int libvirt_open_writable(const char *uri, struct libvirt **out, struct err *err);
/* By name or UUID. Unknown: ERR_NOT_FOUND. Freed before the connection is closed. */
int libvirt_guest_find(struct libvirt *libvirt, const char *domain, struct libvirt_guest **out, struct err *err);
void libvirt_guest_free(struct libvirt_guest *guest); /* NULL is allowed */
const char *libvirt_guest_name(const struct libvirt_guest *guest);
int libvirt_guest_state(struct libvirt_guest *guest, struct libvirt_guest_state *out, struct err *err);
/* The definition as it runs, or the one of its next start, with all that is secret in it (malloc). */
int libvirt_guest_xml(struct libvirt_guest *guest, bool inactive, char **xml, struct err *err);
int libvirt_guest_suspend(struct libvirt_guest *guest, struct err *err);
int libvirt_guest_resume(struct libvirt_guest *guest, struct err *err);
int libvirt_guest_destroy(struct libvirt_guest *guest, struct err *err);
/* Turns disks to overlays that are there already, all at once: xml is a domainsnapshot. libvirt keeps no snapshot of its own. */
int libvirt_guest_overlay(struct libvirt_guest *guest, const char *xml, struct err *err);
/* Merges a disk's overlay into the image below it, and turns the disk to that. Waits for it. */
int libvirt_guest_merge(struct libvirt_guest *guest, const char *disk, struct err *err);
/* One command (JSON) to QEMU's monitor; `fd`, if not -1, goes with it. *answer: JSON (malloc). -ENOSYS, ERR_HOST: this libvirt cannot. */
int libvirt_guest_command(struct libvirt_guest *guest, const char *command, int fd, char **answer, struct err *err);
/* Starts a domain from a saved image, with `xml` in the place of the image's, and lets it run. */
int libvirt_restore(struct libvirt *libvirt, const char *path, const char *xml, struct err *err);
/* Defines a domain, or changes its definition. */
int libvirt_define(struct libvirt *libvirt, const char *xml, struct err *err);

#endif
