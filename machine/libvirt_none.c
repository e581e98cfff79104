/* In the place of libvirt.c where vmcp is built without libvirt's headers. */
#include "machine/libvirt.h"

#include <errno.h>
#include <stddef.h>

static int missing(struct err *err)
{
	err_set(err, ERR_HOST, ENOSYS, "libvirt: this vmcp was built without it");
	return err_hint(err, "install libvirt-dev and build again");
}

int libvirt_open(const char *uri, struct libvirt **out, struct err *err)
{
	(void)uri;
	*out = NULL;
	return missing(err);
}

void libvirt_close(struct libvirt *libvirt) { (void)libvirt; }

int libvirt_domain_xml(struct libvirt *libvirt, const char *domain, char **xml, bool *active, struct err *err)
{
	(void)libvirt, (void)domain, (void)xml, (void)active;
	return missing(err);
}

int libvirt_network_bridge(struct libvirt *libvirt, const char *network, char bridge[NET_INTERFACE_BYTES], struct err *err)
{
	(void)libvirt, (void)network, (void)bridge;
	return missing(err);
}

int libvirt_volume_path(struct libvirt *libvirt, const char *pool, const char *volume, char **path, struct err *err)
{
	(void)libvirt, (void)pool, (void)volume, (void)path;
	return missing(err);
}
