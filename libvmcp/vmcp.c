#include "libvmcp/vmcp.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "checkpoint/store/store.h"
#include "control/client.h"

_Static_assert(VMCP_ID_BYTES == STORE_ID_BYTES && VMCP_NAME_BYTES == STORE_NAME_BYTES, "one size of names");
_Static_assert((int)VMCP_HOST == (int)ERR_HOST && (int)VMCP_FAILED == (int)ERR_FAILED, "one set of classes");

struct vmcp_store {
	struct store *store;
};

struct vmcp_vm {
	struct store *store;
	struct control_client *client, *watcher; /* the watcher waits for events */
	uint64_t seen;				 /* number of the last event that was handed out */
	json_t *events;				 /* that came with it and were not handed out yet */
	size_t next;
	uint64_t lost;
};

/* What failed, as the caller is told. */
static int tell(const struct err *err, int rc, struct vmcp_error *error)
{
	if (rc == 0 || !error)
		return rc;
	error->number = err->number ? err->number : -rc;
	error->error_class = (enum vmcp_class)(err->class ? err->class : ERR_FAILED);
	snprintf(error->message, sizeof(error->message), "%s", err->message);
	snprintf(error->hint, sizeof(error->hint), "%s", err->hint);
	return rc;
}

#define COPY(to, from) snprintf((to), sizeof(to), "%s", (from) ? (from) : "")

const char *vmcp_version(void) { return VMCP_VERSION; }

/* --- the store --- */

int vmcp_open(const char *path, struct vmcp_store **out, struct vmcp_error *error)
{
	CLEANUP_FREE char *chosen = path ? xstrdup(path) : control_default_store();
	struct err err = ERR_INIT;
	struct store *store;
	int rc = store_open(chosen, false, &store, &err);

	if (rc)
		return tell(&err, rc, error);
	*out = xcalloc(1, sizeof(**out));
	(*out)->store = store;
	return 0;
}

void vmcp_close(struct vmcp_store *store)
{
	if (!store)
		return;
	store_close(store->store);
	free(store);
}

int vmcp_list_vms(struct vmcp_store *store, struct vmcp_vm_info **list, size_t *count, struct vmcp_error *error)
{
	struct err err = ERR_INIT;
	struct store_vm *found;
	int rc = store_vm_list(store->store, &found, count, &err);

	if (rc)
		return tell(&err, rc, error);
	*list = xcalloc(*count + 1, sizeof(**list));
	for (size_t i = 0; i < *count; i++) {
		struct vmcp_vm_info *to = &(*list)[i];

		COPY(to->name, found[i].name);
		COPY(to->state, found[i].state);
		COPY(to->at, found[i].at);
		to->pid = found[i].alive ? found[i].pid : 0;
		to->memory_bytes = found[i].memory_bytes;
		to->cpus = found[i].cpus;
		store_vm_free(&found[i]);
	}
	free(found);
	return 0;
}

int vmcp_list_checkpoints(struct vmcp_store *store, const char *vm, struct vmcp_checkpoint_info **list, size_t *count, struct vmcp_error *error)
{
	struct store_checkpoint *found;
	struct err err = ERR_INIT;
	struct store_vm known;
	int rc = vm ? store_vm_get(store->store, vm, &known, &err) : 0;

	if (vm && !rc)
		store_vm_free(&known);
	if (!rc)
		rc = store_checkpoint_list(store->store, vm, &found, count, &err);
	if (rc)
		return tell(&err, rc, error);
	*list = xcalloc(*count + 1, sizeof(**list));
	for (size_t i = 0; i < *count; i++) {
		struct vmcp_checkpoint_info *to = &(*list)[i];

		COPY(to->id, found[i].id);
		COPY(to->parent, found[i].parent);
		COPY(to->vm, found[i].vm);
		COPY(to->tag, found[i].tag);
		COPY(to->message, found[i].message);
		to->created_ns = found[i].created_wall_ns;
		to->size_bytes = found[i].size_bytes;
		store_checkpoint_free(&found[i]);
	}
	free(found);
	return 0;
}

/* --- a running VM --- */

static uint64_t number_of(const json_t *object, const char *key)
{
	json_int_t value = json_integer_value(json_object_get(object, key));

	return value < 0 ? 0 : (uint64_t)value;
}

static const char *text_of(const json_t *object, const char *key) { return json_string_value(json_object_get(object, key)); }

static int call(struct control_client *client, const char *method, json_t *params, json_t **result, struct vmcp_error *error)
{
	struct err err = ERR_INIT;

	return tell(&err, control_call(client, method, params, NULL, NULL, result, &err), error);
}

/* So that nothing that happens after vmcp_connect is missed. */
static int note_last_event(struct vmcp_vm *vm, struct vmcp_error *error)
{
	json_t *result;
	int rc = call(vm->watcher, "vm.events", NULL, &result, error);

	if (rc)
		return rc;
	vm->seen = number_of(result, "last");
	json_decref(result);
	return 0;
}

int vmcp_connect(struct vmcp_store *store, const char *name, struct vmcp_vm **out, struct vmcp_error *error)
{
	struct vmcp_vm *vm = xcalloc(1, sizeof(*vm));
	struct err err = ERR_INIT;
	int rc;

	vm->store = store->store;
	rc = control_connect(store->store, name, &vm->client, &err);
	if (!rc)
		rc = control_connect(store->store, name, &vm->watcher, &err);
	tell(&err, rc, error);
	if (!rc)
		rc = note_last_event(vm, error);
	if (rc)
		vmcp_disconnect(vm);
	else
		*out = vm;
	return rc;
}

void vmcp_disconnect(struct vmcp_vm *vm)
{
	if (!vm)
		return;
	control_close(vm->client);
	control_close(vm->watcher);
	json_decref(vm->events);
	free(vm);
}

static json_t *text_or_null(const char *text) { return text ? json_string(text) : json_null(); }

int vmcp_checkpoint(struct vmcp_vm *vm, const struct vmcp_checkpoint_options *options, struct vmcp_checkpoint_result *result, struct vmcp_error *error)
{
	static const struct vmcp_checkpoint_options usual = {.stopped = false};
	static const char *const waits[] = {"durable", "written", "captured"};
	const struct vmcp_checkpoint_options *o = options ? options : &usual;
	struct err err = ERR_INIT;
	json_t *answer;

	if ((unsigned)o->wait >= ARRAY_LENGTH(waits))
		return tell(&err, err_set(&err, ERR_USAGE, EINVAL, "checkpoint: %d is nothing to wait for", (int)o->wait), error);
	int rc = call(vm->client, "checkpoint.take",
		      json_pack("{s:b, s:s, s:o, s:o, s:I}", "live", !o->stopped, "wait", waits[o->wait], "tag", text_or_null(o->tag), "message",
				text_or_null(o->message), "timeout_ns", (json_int_t)o->timeout_ns),
		      &answer, error);
	if (rc)
		return rc;
	if (result) {
		const json_t *memory = json_object_get(answer, "memory");

		*result = (struct vmcp_checkpoint_result){.pause_ns = number_of(answer, "pause_ns"),
							  .durable_ns = number_of(answer, "durable_ns"),
							  .total_pages = number_of(memory, "total_pages"),
							  .saved_pages = number_of(memory, "saved_pages")};
		COPY(result->id, text_of(answer, "id"));
		COPY(result->parent, text_of(answer, "parent"));
		COPY(result->durability, text_of(answer, "durability"));
	}
	json_decref(answer);
	return 0;
}

int vmcp_revert(struct vmcp_vm *vm, const char *checkpoint, struct vmcp_revert_result *result, struct vmcp_error *error)
{
	char id[STORE_ID_BYTES];
	struct err err = ERR_INIT;
	json_t *answer;
	int rc = tell(&err, store_resolve(vm->store, checkpoint, id, &err), error);

	if (!rc)
		rc = call(vm->client, "vm.revert", json_pack("{s:s}", "id", id), &answer, error);
	if (rc)
		return rc;
	if (result) {
		*result = (struct vmcp_revert_result){.restored_pages = number_of(answer, "restored_pages"), .revert_ns = number_of(answer, "revert_ns")};
		COPY(result->checkpoint, text_of(answer, "checkpoint"));
	}
	json_decref(answer);
	return 0;
}

static int call_plain(struct vmcp_vm *vm, const char *method, struct vmcp_error *error)
{
	json_t *answer;
	int rc = call(vm->client, method, NULL, &answer, error);

	if (!rc)
		json_decref(answer);
	return rc;
}

int vmcp_pause(struct vmcp_vm *vm, struct vmcp_error *error) { return call_plain(vm, "vm.pause", error); }

int vmcp_resume(struct vmcp_vm *vm, struct vmcp_error *error) { return call_plain(vm, "vm.resume", error); }

/* --- events --- */

/* Asks for those after the last one that was handed out. */
static int fetch_events(struct vmcp_vm *vm, uint64_t timeout_ns, struct vmcp_error *error)
{
	json_t *answer;
	int rc = call(vm->watcher, "vm.events", json_pack("{s:I, s:I}", "after", (json_int_t)vm->seen, "timeout_ns", (json_int_t)timeout_ns), &answer,
		      error);

	if (rc)
		return rc;
	json_decref(vm->events);
	vm->events = json_incref(json_object_get(answer, "events"));
	vm->lost = number_of(answer, "lost");
	vm->next = 0;
	json_decref(answer);
	return 0;
}

int vmcp_next_event(struct vmcp_vm *vm, uint64_t timeout_ns, struct vmcp_event *event, struct vmcp_error *error)
{
	struct err err = ERR_INIT;
	int rc = vm->next < json_array_size(vm->events) ? 0 : fetch_events(vm, timeout_ns, error);

	if (rc)
		return rc;
	const json_t *one = json_array_get(vm->events, vm->next);
	if (!one)
		return tell(&err, err_set(&err, ERR_FAILED, ETIMEDOUT, "event: none came in time"), error);
	*event = (struct vmcp_event){.number = number_of(one, "number"), .lost = vm->lost};
	COPY(event->time, text_of(one, "time"));
	COPY(event->type, text_of(one, "type"));
	COPY(event->checkpoint, text_of(one, "checkpoint"));
	vm->seen = event->number;
	vm->lost = 0;
	vm->next++;
	return 0;
}
