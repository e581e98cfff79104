/*
 * The control protocol: JSON-RPC 2.0 over a UNIX stream socket, one document a line (docs/control.md lists the methods).
 *
 * A request that takes long may be answered by notifications {"method":"progress"} before its response. An error object carries
 * {"code","message","hint"} in its data, as the command line's JSON does; "code" is the name of an err_class.
 */
#ifndef VMCP_CONTROL_PROTOCOL_H
#define VMCP_CONTROL_PROTOCOL_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"

#define CONTROL_LINE_MAX   (1u << 20)
#define CONTROL_ERROR_CODE (-32000) /* of an error that is vmcp's; others are JSON-RPC's own */

/* A connection's reading side: bytes that came beyond the line read last stay in it. */
struct control_reader {
	int fd;
	char *data;
	size_t length, capacity;
};

/* Sends one document and a newline. -EPIPE and the like when the peer is gone. */
int control_send(int fd, const json_t *document, struct err *err);
/* Receives one document (a new reference). End of stream: -ENODATA. No JSON, not an object, or a line above CONTROL_LINE_MAX: -EPROTO. */
int control_receive(struct control_reader *reader, json_t **out, struct err *err);
/* The same, but waits no longer than until `deadline_ns` (clock_now_ns; 0: for ever): -ETIMEDOUT, without err set, and what came so far stays; nor behind
 * *cancel (NULL: never) turning true: -ECANCELED, without err set. */
int control_receive_until(struct control_reader *reader, uint64_t deadline_ns, const volatile bool *cancel, json_t **out, struct err *err);
void control_reader_free(struct control_reader *reader); /* the descriptor stays open */

/* {"code","message","hint"} as in the command line's JSON, and back. */
json_t *control_error_to_json(const struct err *err);
void control_error_from_json(const json_t *error, struct err *err);
/* null also for "". */
json_t *control_text_or_null(const char *text);
/* RFC 3339 in UTC with microseconds. */
json_t *control_time_to_json(uint64_t wall_ns);

#endif
