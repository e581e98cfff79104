/* The only file that knows libvirt: its functions are looked up at run time by the types of its headers. */
#include "machine/libvirt.h"

#include <errno.h>
#include <libvirt/libvirt.h>
#include <libvirt/libvirt-qemu.h>
#include <libvirt/virterror.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/buf.h"
#include "base/library.h"

/* Every function that is used. */
#define FUNCTIONS(X)                                                                                                                        \
	X(virSetErrorFunc)                                                                                                                  \
	X(virGetLastError)                                                                                                                  \
	X(virConnectOpenReadOnly)                                                                                                           \
	X(virConnectOpen)                                                                                                                   \
	X(virDomainGetName)                                                                                                                 \
	X(virDomainGetUUIDString)                                                                                                           \
	X(virDomainIsPersistent)                                                                                                            \
	X(virDomainGetState)                                                                                                                \
	X(virDomainSuspend)                                                                                                                 \
	X(virDomainResume)                                                                                                                  \
	X(virDomainDestroy)                                                                                                                 \
	X(virDomainSnapshotCreateXML)                                                                                                       \
	X(virDomainSnapshotFree)                                                                                                            \
	X(virDomainBlockCommit)                                                                                                             \
	X(virDomainGetBlockJobInfo)                                                                                                         \
	X(virDomainBlockJobAbort)                                                                                                           \
	X(virDomainRestoreFlags)                                                                                                            \
	X(virDomainDefineXML)                                                                                                           \
	X(virConnectClose)                                                                                                                  \
	X(virConnectIsAlive)                                                                                                                \
	X(virDomainLookupByName)                                                                                                            \
	X(virDomainLookupByUUIDString)                                                                                                      \
	X(virDomainIsActive)                                                                                                                \
	X(virDomainGetXMLDesc)                                                                                                              \
	X(virDomainFree)                                                                                                                    \
	X(virNetworkLookupByName)                                                                                                           \
	X(virNetworkIsActive)                                                                                                               \
	X(virNetworkGetBridgeName)                                                                                                          \
	X(virNetworkFree)                                                                                                                   \
	X(virStoragePoolLookupByName)                                                                                                       \
	X(virStoragePoolIsActive)                                                                                                           \
	X(virStoragePoolFree)                                                                                                               \
	X(virStorageVolLookupByName)                                                                                                        \
	X(virStorageVolGetInfo)                                                                                                             \
	X(virStorageVolGetPath)                                                                                                             \
	X(virStorageVolFree)

struct functions {
	FUNCTIONS(LIBRARY_FIELD)
};
static const struct library libvirt_library = {"libvirt.so.0", LIBRARY_NAMES(FUNCTIONS)};

struct libvirt {
	struct functions fn;
	virConnectPtr connection;
	char *uri; /* for messages */
};

static void keep_silent(void *opaque, virErrorPtr error)
{
	(void)opaque, (void)error;
}

static int load(struct functions *fn, struct err *err)
{
	const char *why = library_load(&libvirt_library, fn);

	if (!why)
		return 0;
	err_set(err, ERR_HOST, ENOSYS, "libvirt: %s", why);
	return err_hint(err, "`apt-get install libvirt0` (1.0 or later), or name files and bridges instead");
}

/* --- errors --- */

static enum err_class class_of(int code)
{
	switch (code) {
	case VIR_ERR_NO_DOMAIN:
	case VIR_ERR_NO_NETWORK:
	case VIR_ERR_NO_STORAGE_POOL:
	case VIR_ERR_NO_STORAGE_VOL:
		return ERR_NOT_FOUND;
	case VIR_ERR_OPERATION_INVALID:
	case VIR_ERR_RESOURCE_BUSY:
		return ERR_STATE;
	default:
		return ERR_FAILED;
	}
}

static int number_of(enum err_class class)
{
	return class == ERR_NOT_FOUND ? ENOENT : class == ERR_STATE ? EBUSY : class == ERR_USAGE ? EINVAL : EIO;
}

static const char *last_words(const struct libvirt *libvirt, int *code)
{
	const virError *last = libvirt->fn.virGetLastError();

	*code = last ? last->code : VIR_ERR_INTERNAL_ERROR;
	return last && last->message ? last->message : "it gave no reason";
}

/* "WHAT NAME: what libvirt says". */
static int failed(const struct libvirt *libvirt, const char *what, const char *name, struct err *err)
{
	int code;
	CLEANUP_FREE char *why = xstrdup(last_words(libvirt, &code)); /* the next call forgets it */
	enum err_class class = class_of(code);

	if (!libvirt_is_alive(libvirt))
		return err_set(err, ERR_HOST, ECONNRESET, "%s %s: libvirt's daemon has ended", what, name);
	return err_set(err, class, number_of(class), "%s %s: %s", what, name, why);
}

static int open_failed(const struct libvirt *libvirt, struct err *err)
{
	int code;
	const char *why = last_words(libvirt, &code);

	switch (code) {
	case VIR_ERR_SYSTEM_ERROR:
	case VIR_ERR_RPC:
	case VIR_ERR_SSH:
	case VIR_ERR_LIBSSH:
	case VIR_ERR_UNKNOWN_HOST:
		err_set(err, ERR_HOST, ECONNREFUSED, "libvirt %s: %s", libvirt->uri, why);
		return err_hint(err, "does its daemon run? `systemctl start libvirtd`, or `virsh -c %s version` tells more", libvirt->uri);
	case VIR_ERR_AUTH_FAILED:
	case VIR_ERR_AUTH_CANCELLED:
	case VIR_ERR_AUTH_UNAVAILABLE:
	case VIR_ERR_ACCESS_DENIED:
	case VIR_ERR_OPERATION_DENIED:
		err_set(err, ERR_HOST, EACCES, "libvirt %s: %s", libvirt->uri, why);
		return err_hint(err, "add yourself to the group libvirt, or run as root");
	default:
		err_set(err, ERR_USAGE, EINVAL, "libvirt %s: %s", libvirt->uri, why);
		return err_hint(err, "a URI as `virsh uri` prints it, for example qemu:///system");
	}
}

/* --- connections --- */

static int open_connection(const char *uri, bool writable, struct libvirt **out, struct err *err)
{
	struct libvirt *libvirt = xcalloc(1, sizeof(*libvirt));
	bool given = uri && *uri;
	int rc = load(&libvirt->fn, err);

	*out = NULL;
	if (!rc) {
		libvirt->uri = xstrdup(given ? uri : "(default URI)");
		libvirt->fn.virSetErrorFunc(NULL, keep_silent);
		libvirt->connection = writable ? libvirt->fn.virConnectOpen(given ? uri : NULL) : libvirt->fn.virConnectOpenReadOnly(given ? uri : NULL);
		if (!libvirt->connection)
			rc = open_failed(libvirt, err);
	}
	if (rc) {
		libvirt_close(libvirt);
		return rc;
	}
	*out = libvirt;
	return 0;
}

int libvirt_open(const char *uri, struct libvirt **out, struct err *err) { return open_connection(uri, false, out, err); }

int libvirt_open_writable(const char *uri, struct libvirt **out, struct err *err) { return open_connection(uri, true, out, err); }

void libvirt_close(struct libvirt *libvirt)
{
	if (!libvirt)
		return;
	if (libvirt->connection)
		libvirt->fn.virConnectClose(libvirt->connection);
	free(libvirt->uri);
	free(libvirt);
}

bool libvirt_is_alive(const struct libvirt *libvirt) { return libvirt->fn.virConnectIsAlive(libvirt->connection) != 0; }

/* --- what is asked --- */

static int find_domain(const struct libvirt *libvirt, const char *domain, virDomainPtr *out, struct err *err)
{
	*out = libvirt->fn.virDomainLookupByName(libvirt->connection, domain);
	if (!*out)
		*out = libvirt->fn.virDomainLookupByUUIDString(libvirt->connection, domain);
	if (*out)
		return 0;
	err_set(err, ERR_NOT_FOUND, ENOENT, "libvirt %s: there is no domain '%s'", libvirt->uri, domain);
	return err_hint(err, "`virsh -c %s list --all` lists them", libvirt->uri);
}

int libvirt_domain_xml(struct libvirt *libvirt, const char *domain, char **xml, bool *active, struct err *err)
{
	const struct functions *fn = &libvirt->fn;
	virDomainPtr found;

	if (find_domain(libvirt, domain, &found, err))
		return -ENOENT;
	*active = fn->virDomainIsActive(found) == 1;
	*xml = fn->virDomainGetXMLDesc(found, VIR_DOMAIN_XML_INACTIVE);
	int rc = *xml ? 0 : failed(libvirt, "domain", domain, err);
	fn->virDomainFree(found);
	return rc;
}

static int bridge_of(const struct libvirt *libvirt, virNetworkPtr network, const char *name, char bridge[NET_INTERFACE_BYTES], struct err *err)
{
	if (libvirt->fn.virNetworkIsActive(network) != 1) {
		err_set(err, ERR_STATE, ENETDOWN, "network %s: libvirt has not started it", name);
		return err_hint(err, "`virsh net-start %s`", name);
	}
	CLEANUP_FREE char *found = libvirt->fn.virNetworkGetBridgeName(network);
	if (!found || !*found || strlen(found) >= NET_INTERFACE_BYTES) {
		err_set(err, ERR_USAGE, EINVAL, "network %s: it has no bridge", name);
		return err_hint(err, "networks with forward mode nat, route, open or bridge, or without one, can be used");
	}
	snprintf(bridge, NET_INTERFACE_BYTES, "%s", found);
	return 0;
}

int libvirt_network_bridge(struct libvirt *libvirt, const char *network, char bridge[NET_INTERFACE_BYTES], struct err *err)
{
	virNetworkPtr found = libvirt->fn.virNetworkLookupByName(libvirt->connection, network);

	if (!found) {
		failed(libvirt, "network", network, err);
		return err_hint(err, "`virsh -c %s net-list --all` lists them", libvirt->uri);
	}
	int rc = bridge_of(libvirt, found, network, bridge, err);
	libvirt->fn.virNetworkFree(found);
	return rc;
}

static int path_of(const struct libvirt *libvirt, virStorageVolPtr volume, const char *name, char **path, struct err *err)
{
	virStorageVolInfo info;

	if (libvirt->fn.virStorageVolGetInfo(volume, &info) < 0)
		return failed(libvirt, "volume", name, err);
	if (info.type != VIR_STORAGE_VOL_FILE && info.type != VIR_STORAGE_VOL_BLOCK) {
		err_set(err, ERR_USAGE, EINVAL, "volume %s: is neither a file nor a block device", name);
		return err_hint(err, "volumes of pools of type dir, fs, netfs, logical and disk can be used");
	}
	*path = libvirt->fn.virStorageVolGetPath(volume);
	return *path ? 0 : failed(libvirt, "volume", name, err);
}

static int find_volume(const struct libvirt *libvirt, virStoragePoolPtr pool, const char *pool_name, const char *name, char **path,
		       struct err *err)
{
	if (libvirt->fn.virStoragePoolIsActive(pool) != 1) {
		err_set(err, ERR_STATE, EBUSY, "storage pool %s: libvirt has not started it", pool_name);
		return err_hint(err, "`virsh pool-start %s`", pool_name);
	}
	virStorageVolPtr volume = libvirt->fn.virStorageVolLookupByName(pool, name);
	if (!volume) {
		failed(libvirt, "volume", name, err);
		return err_hint(err, "`virsh -c %s vol-list %s` lists those of the pool; `virsh pool-refresh` finds new ones", libvirt->uri, pool_name);
	}
	int rc = path_of(libvirt, volume, name, path, err);
	libvirt->fn.virStorageVolFree(volume);
	return rc;
}

int libvirt_volume_path(struct libvirt *libvirt, const char *pool, const char *volume, char **path, struct err *err)
{
	virStoragePoolPtr found = libvirt->fn.virStoragePoolLookupByName(libvirt->connection, pool);

	if (!found) {
		failed(libvirt, "storage pool", pool, err);
		return err_hint(err, "`virsh -c %s pool-list --all` lists them", libvirt->uri);
	}
	int rc = find_volume(libvirt, found, pool, volume, path, err);
	libvirt->fn.virStoragePoolFree(found);
	return rc;
}

/* --- domains that QEMU runs --- */

#define MERGE_POLL_NS 20000000

typedef __typeof__(virDomainQemuMonitorCommandWithFiles) monitor_command;
static const struct library libvirt_qemu = {"libvirt-qemu.so.0", (const char *const[]){"virDomainQemuMonitorCommandWithFiles", NULL}};

struct libvirt_guest {
	const struct libvirt *libvirt;
	virDomainPtr domain;
	char *name; /* to ask for it would forget what went wrong */
	monitor_command *command; /* NULL until it is looked for */
};

int libvirt_guest_find(struct libvirt *libvirt, const char *domain, struct libvirt_guest **out, struct err *err)
{
	struct libvirt_guest *guest = xcalloc(1, sizeof(*guest));
	int rc = find_domain(libvirt, domain, &guest->domain, err);

	*out = rc ? NULL : guest;
	if (rc) {
		free(guest);
		return rc;
	}
	guest->libvirt = libvirt;
	guest->name = xstrdup(libvirt->fn.virDomainGetName(guest->domain));
	return 0;
}

void libvirt_guest_free(struct libvirt_guest *guest)
{
	if (!guest)
		return;
	guest->libvirt->fn.virDomainFree(guest->domain);
	free(guest->name);
	free(guest);
}

const char *libvirt_guest_name(const struct libvirt_guest *guest) { return guest->name; }

static int guest_failed(const struct libvirt_guest *guest, struct err *err) { return failed(guest->libvirt, "domain", libvirt_guest_name(guest), err); }

int libvirt_guest_state(struct libvirt_guest *guest, struct libvirt_guest_state *out, struct err *err)
{
	const struct functions *fn = &guest->libvirt->fn;
	int state, reason;

	*out = (struct libvirt_guest_state){0};
	if (fn->virDomainGetState(guest->domain, &state, &reason, 0) < 0 || fn->virDomainGetUUIDString(guest->domain, out->uuid) < 0)
		return guest_failed(guest, err);
	out->active = fn->virDomainIsActive(guest->domain) == 1;
	out->persistent = fn->virDomainIsPersistent(guest->domain) == 1;
	out->running = state == VIR_DOMAIN_RUNNING || state == VIR_DOMAIN_BLOCKED;
	return 0;
}

int libvirt_guest_xml(struct libvirt_guest *guest, bool inactive, char **xml, struct err *err)
{
	*xml = guest->libvirt->fn.virDomainGetXMLDesc(guest->domain, VIR_DOMAIN_XML_SECURE | (inactive ? VIR_DOMAIN_XML_INACTIVE : VIR_DOMAIN_XML_MIGRATABLE));
	return *xml ? 0 : guest_failed(guest, err);
}

int libvirt_guest_suspend(struct libvirt_guest *guest, struct err *err)
{
	return guest->libvirt->fn.virDomainSuspend(guest->domain) < 0 ? guest_failed(guest, err) : 0;
}

int libvirt_guest_resume(struct libvirt_guest *guest, struct err *err)
{
	return guest->libvirt->fn.virDomainResume(guest->domain) < 0 ? guest_failed(guest, err) : 0;
}

int libvirt_guest_destroy(struct libvirt_guest *guest, struct err *err)
{
	return guest->libvirt->fn.virDomainDestroy(guest->domain) < 0 ? guest_failed(guest, err) : 0;
}

int libvirt_guest_overlay(struct libvirt_guest *guest, const char *xml, struct err *err)
{
	const unsigned flags = VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT |
			       VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC;
	virDomainSnapshotPtr snapshot = guest->libvirt->fn.virDomainSnapshotCreateXML(guest->domain, xml, flags);

	if (!snapshot)
		return guest_failed(guest, err);
	guest->libvirt->fn.virDomainSnapshotFree(snapshot);
	return 0;
}

int libvirt_guest_merge(struct libvirt_guest *guest, const char *disk, struct err *err)
{
	const struct functions *fn = &guest->libvirt->fn;
	const struct timespec moment = {.tv_nsec = MERGE_POLL_NS};
	virDomainBlockJobInfo info;
	int there;

	if (fn->virDomainBlockCommit(guest->domain, disk, NULL, NULL, 0, VIR_DOMAIN_BLOCK_COMMIT_SHALLOW | VIR_DOMAIN_BLOCK_COMMIT_ACTIVE) < 0)
		return guest_failed(guest, err);
	/* libvirt refuses the turn until the two are the same. */
	while ((there = fn->virDomainGetBlockJobInfo(guest->domain, disk, &info, 0)) == 1) {
		if (info.cur == info.end && info.end && fn->virDomainBlockJobAbort(guest->domain, disk, VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT) == 0)
			return 0;
		nanosleep(&moment, NULL);
	}
	return there < 0 ? guest_failed(guest, err) : err_set(err, ERR_FAILED, EIO, "domain %s: disk %s: the merge ended early", libvirt_guest_name(guest), disk);
}

static int find_command(struct libvirt_guest *guest, struct err *err)
{
	if (!library_load(&libvirt_qemu, &guest->command))
		return 0;
	err_set(err, ERR_HOST, ENOSYS, "libvirt: this version cannot hand files to QEMU");
	return err_hint(err, "libvirt 8.2 or later is needed");
}

int libvirt_guest_command(struct libvirt_guest *guest, const char *command, int fd, char **answer, struct err *err)
{
	int rc = find_command(guest, err), code;

	if (rc)
		return rc;
	if (guest->command(guest->domain, command, fd < 0 ? 0 : 1, fd < 0 ? NULL : &fd, NULL, NULL, answer, 0) == 0)
		return 0;
	last_words(guest->libvirt, &code);
	if (code != VIR_ERR_NO_SUPPORT)
		return guest_failed(guest, err);
	err_set(err, ERR_HOST, ENOTSUP, "domain %s: is none of QEMU", libvirt_guest_name(guest));
	return err_hint(err, "checkpoints of domains are for those that QEMU runs: qemu:///system");
}

int libvirt_restore(struct libvirt *libvirt, const char *path, const char *xml, struct err *err)
{
	return libvirt->fn.virDomainRestoreFlags(libvirt->connection, path, xml, VIR_DOMAIN_SAVE_RUNNING) < 0 ? failed(libvirt, "restore from", path, err) : 0;
}

int libvirt_define(struct libvirt *libvirt, const char *xml, struct err *err)
{
	virDomainPtr domain = libvirt->fn.virDomainDefineXML(libvirt->connection, xml);

	if (!domain)
		return failed(libvirt, "definition", "of the domain", err);
	libvirt->fn.virDomainFree(domain);
	return 0;
}
