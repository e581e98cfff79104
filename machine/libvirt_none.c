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

bool libvirt_is_alive(const struct libvirt *libvirt) { return (void)libvirt, false; }

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

/* None of these is reached: there is no connection. */
int libvirt_open_writable(const char *uri, struct libvirt **out, struct err *err) { return libvirt_open(uri, out, err); }

int libvirt_guest_find(struct libvirt *libvirt, const char *domain, struct libvirt_guest **out, struct err *err)
{
	(void)libvirt, (void)domain, (void)out;
	return missing(err);
}

void libvirt_guest_free(struct libvirt_guest *guest) { (void)guest; }

const char *libvirt_guest_name(const struct libvirt_guest *guest)
{
	(void)guest;
	return "";
}

int libvirt_guest_state(struct libvirt_guest *guest, struct libvirt_guest_state *out, struct err *err)
{
	(void)guest, (void)out;
	return missing(err);
}

int libvirt_guest_xml(struct libvirt_guest *guest, bool inactive, char **xml, struct err *err)
{
	(void)guest, (void)inactive, (void)xml;
	return missing(err);
}

int libvirt_guest_suspend(struct libvirt_guest *guest, struct err *err)
{
	(void)guest;
	return missing(err);
}

int libvirt_guest_resume(struct libvirt_guest *guest, struct err *err)
{
	(void)guest;
	return missing(err);
}

int libvirt_guest_destroy(struct libvirt_guest *guest, struct err *err)
{
	(void)guest;
	return missing(err);
}

int libvirt_guest_overlay(struct libvirt_guest *guest, const char *xml, struct err *err)
{
	(void)guest, (void)xml;
	return missing(err);
}

int libvirt_guest_merge(struct libvirt_guest *guest, const char *disk, struct err *err)
{
	(void)guest, (void)disk;
	return missing(err);
}

int libvirt_guest_command(struct libvirt_guest *guest, const char *command, int fd, char **answer, struct err *err)
{
	(void)guest, (void)command, (void)fd, (void)answer;
	return missing(err);
}

int libvirt_restore(struct libvirt *libvirt, const char *path, const char *xml, struct err *err)
{
	(void)libvirt, (void)path, (void)xml;
	return missing(err);
}

int libvirt_define(struct libvirt *libvirt, const char *xml, struct err *err)
{
	(void)libvirt, (void)xml;
	return missing(err);
}
