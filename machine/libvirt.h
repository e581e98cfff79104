/*
 * What vmcp asks libvirt: definitions of domains, and where its networks and volumes are. Nothing is changed there: connections are read-only.
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

/* The definition that the next start of the domain would have (malloc), and whether it runs. Unknown: ERR_NOT_FOUND. */
int libvirt_domain_xml(struct libvirt *libvirt, const char *domain, char **xml, bool *active, struct err *err);
/* The bridge of a network that is active. Unknown: ERR_NOT_FOUND; not active: ERR_STATE; a network without a bridge: ERR_USAGE. */
int libvirt_network_bridge(struct libvirt *libvirt, const char *network, char bridge[NET_INTERFACE_BYTES], struct err *err);
/* The file or block device (malloc) of a volume. Unknown: ERR_NOT_FOUND; pool not active: ERR_STATE; volume of another kind: ERR_USAGE. */
int libvirt_volume_path(struct libvirt *libvirt, const char *pool, const char *volume, char **path, struct err *err);

#endif
