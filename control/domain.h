/* Domain XML for the command line: what `vmcp run` makes of a domain, and a VM as a domain. */
#ifndef VMCP_CONTROL_DOMAIN_H
#define VMCP_CONTROL_DOMAIN_H

#include "base/buf.h"
#include "base/err.h"
#include "checkpoint/store/store.h"

/* Appends the guest.cfg that a domain becomes to *text: of the file `source`, or, with `connect` (a URI, "" for libvirt's default), of the domain of that name. What is not
 * honoured is told in the log. Files are not looked for. */
int control_domain_convert(const char *connect, const char *source, struct buf *text, struct err *err);
/* Appends domain XML of a VM as it was last started to *xml. Unknown VM: ERR_NOT_FOUND. */
int control_domain_export(struct store *store, const char *vm, struct buf *xml, struct err *err);

#endif
