#include "control/client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "control/local_socket.h"
#include "control/protocol.h"

struct control_client {
	struct control_reader reader;
	unsigned last_id;
	char name[STORE_NAME_BYTES];
};

char *control_default_store(void)
{
	const char *given = getenv("VMCP_STORE"), *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");

	if (given && *given)
		return xstrdup(given);
	if (geteuid() == 0)
		return xstrdup("/var/lib/vmcp");
	if (state && *state)
		return xasprintf("%s/vmcp", state);
	return xasprintf("%s/.local/state/vmcp", home ? home : "");
}

int control_connect(struct store *store, const char *name, struct control_client **out, struct err *err)
{
	struct store_vm vm;
	int rc = store_vm_get(store, name, &vm, err);

	if (rc)
		return rc;
	bool alive = vm.alive;
	store_vm_free(&vm);
	if (!alive) {
		err_set(err, ERR_STATE, ESRCH, "%s: the VM does not run", name);
		return err_hint(err, "start it with `vmcp run`, or take it back to a checkpoint with `vmcp revert %s`",
				name);
	}
	CLEANUP_CLOSE int dir = store_vm_dir(store, name, err);
	if (dir < 0)
		return dir;
	int fd = local_socket_connect(dir, "control.sock", err);
	if (fd == -ENOENT || fd == -ECONNREFUSED) {
		err_set(err, ERR_STATE, EAGAIN, "%s: the VM is starting or ending", name);
		err_hint(err, "try again in a moment");
		return -EAGAIN;
	}
	if (fd < 0) {
		err_prefix(err, "%s", name);
		return fd;
	}
	struct control_client *client = xcalloc(1, sizeof(*client));
	client->reader.fd = fd;
	snprintf(client->name, sizeof(client->name), "%s", name);
	*out = client;
	return 0;
}

void control_close(struct control_client *client)
{
	if (!client)
		return;
	close(client->reader.fd);
	control_reader_free(&client->reader);
	free(client);
}

static int take_response(struct control_client *client, json_t *message, json_t **result, struct err *err)
{
	json_t *error = json_object_get(message, "error");
	json_t *value = json_object_get(message, "result");

	json_t *id = json_object_get(message, "id");

	/* Without an id: what the server says of the connection, not of a request. */
	if (!(error && json_is_null(id)) && (json_integer_value(id) != client->last_id || (!error && !value)))
		return err_set(err, ERR_FAILED, EPROTO, "%s: an answer to another request", client->name);
	if (error) {
		control_error_from_json(error, err);
		return -err->number;
	}
	*result = json_incref(value);
	return 0;
}

int control_begin(struct control_client *client, const char *method, json_t *params, struct err *err)
{
	json_t *request = json_pack("{s:s, s:i, s:s, s:o}", "jsonrpc", "2.0", "id", (int)++client->last_id, "method",
				    method, "params", params ? params : json_object());
	int rc = control_send(client->reader.fd, request, err);

	json_decref(request);
	/* A server that turned us away may have said why. */
	return rc == -EPIPE || rc == -ECONNRESET ? 0 : rc ? err_prefix(err, "%s", client->name) : 0;
}

int control_tell(struct control_client *client, const char *method, json_t *params, struct err *err)
{
	json_t *note = json_pack("{s:s, s:s, s:o}", "jsonrpc", "2.0", "method", method, "params", params ? params : json_object());
	int rc = control_send(client->reader.fd, note, err);

	json_decref(note);
	return rc ? err_prefix(err, "%s", client->name) : 0;
}

int control_descriptor(const struct control_client *client) { return client->reader.fd; }

int control_next(struct control_client *client, uint64_t deadline_ns, const volatile bool *cancel, json_t **message, json_t **result, struct err *err)
{
	struct err local = ERR_INIT;
	json_t *got;

	*message = *result = NULL;
	if (!err)
		err = &local;
	int rc = control_receive_until(&client->reader, deadline_ns, cancel, &got, err);
	if (rc == -ENODATA || rc == -ECONNRESET) {
		err_set(err, ERR_FAILED, ECONNRESET, "%s: the VM's process ended before it answered", client->name);
		return err_hint(err, "`vmcp ps` shows what became of it");
	}
	if (rc == -ETIMEDOUT || rc == -ECANCELED)
		return rc;
	if (rc)
		return err_prefix(err, "%s", client->name);
	if (json_object_get(got, "method")) {
		*message = got;
		return 0;
	}
	rc = take_response(client, got, result, err);
	json_decref(got);
	return rc;
}

int control_call(struct control_client *client, const char *method, json_t *params, control_progress_fn *progress,
		 void *opaque, json_t **result, struct err *err)
{
	json_t *message;
	int rc = control_begin(client, method, params, err);

	while (!rc) {
		rc = control_next(client, 0, NULL, &message, result, err);
		if (rc || !message)
			break;
		if (progress)
			progress(opaque, json_object_get(message, "params"));
		json_decref(message);
	}
	return rc;
}

json_t *control_ask(struct store *store, const char *name, const char *method)
{
	struct control_client *client;
	json_t *answer = NULL;

	if (control_connect(store, name, &client, NULL))
		return NULL;
	if (control_call(client, method, NULL, NULL, NULL, &answer, NULL))
		answer = NULL;
	control_close(client);
	return answer;
}

int control_attach_console(struct control_client *client, size_t scrollback_bytes, struct buf *early, struct err *err)
{
	json_t *result;
	int rc = control_call(client, "console.attach",
			      json_pack("{s:I}", "scrollback_bytes", (json_int_t)scrollback_bytes), NULL, NULL, &result,
			      err);

	if (rc)
		return rc;
	json_decref(result);
	rc = buf_append(early, client->reader.data, client->reader.length, err);
	client->reader.length = 0;
	return rc ? rc : client->reader.fd;
}
