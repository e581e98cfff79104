/* Domain XML for the command line: what `vmcp run` makes of a domain, and a VM as a domain. */
#ifndef VMCP_CONTROL_DOMAIN_H
#define VMCP_CONTROL_DOMAIN_H

#include <jansson.h>

#include "base/buf.h"
#include "base/err.h"
#include "checkpoint/store/store.h"
#include "control/client.h"

/* Appends the guest.cfg that a domain becomes to *text: of the file `source`, or, with `connect` (a URI, "" for libvirt's default), of the domain of that name. What is not
 * honoured is told in the log. Files are not looked for. */
int control_domain_convert(const char *connect, const char *source, struct buf *text, struct err *err);
/* Appends domain XML of a VM as it was last started to *xml. Unknown VM: ERR_NOT_FOUND. */
int control_domain_export(struct store *store, const char *vm, struct buf *xml, struct err *err);

/* Checkpoints of domains that QEMU runs below libvirt: machine/qemu.h. *result is a new reference, with the fields of `checkpoint --json` and `revert --json`. */
struct control_domain_take {
	const char *connect, *domain, *tag, *message;
	bool live;
	const volatile bool *cancel;
	control_progress_fn *progress; /* or NULL */
	void *opaque;
};
/* Both: SIGPIPE is ignored from then on. */
int control_domain_checkpoint(struct store *store, const struct control_domain_take *take, json_t **result, struct err *err);
int control_domain_revert(struct store *store, const char *connect, const char *id, json_t **result, struct err *err);

#endif
