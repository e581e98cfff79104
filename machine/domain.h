/*
 * Domains as libvirt defines them (domain XML), read into the machine's configuration and written from it.
 *
 * Reading translates into the text of a guest.cfg, which goes through the same checks as any other. What a domain has and vmcp has not is told in the log
 * (warnings), one line each; an error is only what the guest could not work without, or what would show it other data: disks of other kinds than files and block devices,
 * encrypted ones, another architecture, no kernel. docs/libvirt.md has the table.
 */
#ifndef VMCP_MACHINE_DOMAIN_H
#define VMCP_MACHINE_DOMAIN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/buf.h"
#include "base/err.h"
#include "machine/config.h"

/* True if the file begins as XML does; false if it cannot be read. */
bool domain_is_xml(const char *path);

/* The guest.cfg that a domain becomes, appended to *text and checked, but for its files. `what` names the domain in messages; `connect`: URI of the libvirt that it comes
 * from, "" if none. */
int domain_to_text(const char *what, const char *xml, size_t length, const char *connect, struct buf *text, struct err *err);
/* From a file of domain XML. */
int domain_file_to_text(const char *path, const char *connect, struct buf *text, struct err *err);
/* From libvirt, by name or UUID. *active: the domain runs. */
int domain_fetch_to_text(const char *connect, const char *name, struct buf *text, bool *active, struct err *err);

/* The same, with files looked for and volumes found. The image of each disk must be of the format that the domain says. */
int domain_read_file(const char *path, const char *connect, struct machine_config *out, struct err *err);
/* The domain must not run: -EBUSY, ERR_STATE. */
int domain_fetch(const char *connect, const char *name, struct machine_config *out, struct err *err);

/* Whether a file begins as a qcow2 image does. */
int domain_image_is_qcow2(const char *path, bool *is, struct err *err);

/* Appends domain XML of the same machine, for QEMU below libvirt, to *xml. What it does not carry over is told in the log. Formats of disks are read from their
 * images: -ENOENT, ERR_NOT_FOUND where one is missing. */
int domain_write(const struct machine_config *config, const char *uuid, struct buf *xml, struct err *err);

#endif
