/*
 * Any bytes on a control socket, both ways: as requests to a VM's process, whose machine is just not there, and as answers to a client.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control/protocol.h"
#include "control/server.h"
#include "fuzz/fuzz.h"

enum { LIMIT = 64 << 10 }; /* what a socket takes without a reader */

static void no_kill(void *opaque) { (void)opaque; }

static void dispatch(struct control_exchange *x, const json_t *request)
{
	const char *method = json_string_value(json_object_get(request, "method"));
	json_t *result = NULL;
	struct err err = ERR_INIT;
	/* The only one that keeps the connection. */
	if (!method || strcmp(method, "console.attach") == 0)
		return;
	x->id = json_object_get(request, "id");
	if (control_dispatch(x, method, json_object_get(request, "params"), &result, &err) != 0)
		json_decref(control_error_to_json(&err));
	json_decref(result);
}

static void receive_all(int fd)
{
	struct control_target target = {.name = "fuzz", .machine_lock = PTHREAD_RWLOCK_INITIALIZER, .kill = no_kill};
	struct control_exchange x = {.target = &target, .fd = fd};
	struct control_reader reader = {.fd = fd};
	struct err err = ERR_INIT;
	json_t *document;
	int rc;
	while ((rc = control_receive(&reader, &document, NULL)) == 0 || rc == -EPROTO) {
		if (rc != 0)
			continue;
		dispatch(&x, document);
		control_error_from_json(json_object_get(document, "error"), &err);
		json_decref(document);
	}
	control_reader_free(&reader);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int pair[2];
	if (size > LIMIT)
		return 0;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		abort();
	if (size && send(pair[0], data, size, MSG_NOSIGNAL) != (ssize_t)size)
		abort();
	shutdown(pair[0], SHUT_WR);
	receive_all(pair[1]);
	close(pair[0]);
	close(pair[1]);
	return 0;
}
