/* The client's side of the control socket. A client is used by one thread. */
#ifndef VMCP_CONTROL_CLIENT_H
#define VMCP_CONTROL_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"
#include "checkpoint/store/store.h"

struct control_client;

/* The store that is meant where none is named: $VMCP_STORE, else /var/lib/vmcp for root, else vmcp in $XDG_STATE_HOME or ~/.local/state. malloc. */
char *control_default_store(void);

/* Connects to the process that runs VM `name`. It does not run: ERR_STATE (known) or ERR_NOT_FOUND, with a hint. */
int control_connect(struct store *store, const char *name, struct control_client **out, struct err *err);
void control_close(struct control_client *client);

/* `params` is stolen (NULL: none). *result is a new reference. `progress` (may be NULL) sees every progress notification. */
typedef void control_progress_fn(void *opaque, const json_t *params);
int control_call(struct control_client *client, const char *method, json_t *params, control_progress_fn *progress,
		 void *opaque, json_t **result, struct err *err);

/*
 * The same in pieces, for a call during which both sides say more: control_begin sends the request; control_next gives what comes, until `deadline_ns` (0: for ever) or
 * *cancel (NULL: never): a message of the other side (its "method" and "params") in *message, or the end of the call: *message is NULL, and *result is set or the call's error
 * returned. -ETIMEDOUT, -ECANCELED (err unset): as control_receive_until; the call goes on. control_tell sends a message without an answer.
 */
int control_begin(struct control_client *client, const char *method, json_t *params, struct err *err);
int control_next(struct control_client *client, uint64_t deadline_ns, const volatile bool *cancel, json_t **message, json_t **result, struct err *err);
int control_tell(struct control_client *client, const char *method, json_t *params, struct err *err);
int control_descriptor(const struct control_client *client); /* to wait for; the client's */

/* One call without parameters, for who does not mind if there is no answer: then NULL. */
json_t *control_ask(struct store *store, const char *name, const char *method);

/* Attaches to the console: after the response the socket carries raw bytes both ways. Returns the descriptor (the client keeps it) or -errno. Bytes that already came
 * are handed out in *early (to be freed by buf_free). */
int control_attach_console(struct control_client *client, size_t scrollback_bytes, struct buf *early, struct err *err);

#endif
