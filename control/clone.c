#include "control/clone.h"

#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/log.h"
#include "control/client.h"
#include "control/clone_rules.h"
#include "control/splice.h"

#define END_POLL_NS 5000000
#define END_NS	    10000000000u

/* What some clones of one call come from. */
struct origin {
	struct store *store; /* borrowed */
	struct store_pin *pin;
	struct store_checkpoint checkpoint;
	struct machine_config config;
	struct clone_rules *rules;
};

static void origin_close(struct origin *origin)
{
	clone_rules_free(origin->rules);
	config_free(&origin->config);
	store_checkpoint_free(&origin->checkpoint);
	store_unpin(origin->pin);
}

static int read_config(const struct store_checkpoint *checkpoint, struct machine_config *config, struct err *err)
{
	char what[STORE_ID_BYTES + 16];

	snprintf(what, sizeof(what), "checkpoint %.8s", checkpoint->id);
	return config_read_text(what, checkpoint->config_text, config, err);
}

/* The rules that were given, else those of the template. */
static int read_rules(struct origin *origin, const char *what, const char *text, struct err *err)
{
	CLEANUP_FREE char *kept = NULL;
	char template_what[STORE_ID_BYTES + 32];

	if (!text) {
		int rc = store_template_get(origin->store, origin->checkpoint.id, &kept, err);

		if (rc < 0)
			return rc;
		snprintf(template_what, sizeof(template_what), "template %.8s", origin->checkpoint.id);
		what = template_what;
		text = kept ? kept : "";
	}
	return clone_rules_read(what, text, &origin->rules, err);
}

static int origin_open(struct origin *origin, struct store *store, const char *reference, const char *rules_what, const char *rules, struct err *err)
{
	char id[STORE_ID_BYTES];

	*origin = (struct origin){.store = store};
	int rc = store_resolve(store, reference, id, err);
	if (!rc)
		rc = store_pin(store, id, &origin->pin, err);
	if (!rc)
		rc = store_checkpoint_get(store, id, &origin->checkpoint, err);
	if (!rc)
		rc = read_config(&origin->checkpoint, &origin->config, err);
	if (!rc && origin->config.qemu) {
		err_set(err, ERR_STATE, ENOTSUP, "checkpoint %.8s: is of a domain that QEMU runs, and only QEMU can go on with it", id);
		rc = err_hint(err, "a domain of its own can have its disks: `vmcp disk export %.8s:DISK FILE`", id);
	}
	if (!rc)
		rc = read_rules(origin, rules_what, rules, err);
	return rc;
}

/* --- names --- */

static bool is_known(struct store *store, const char *name)
{
	struct store_vm vm;

	if (store_vm_get(store, name, &vm, NULL))
		return false;
	store_vm_free(&vm);
	return true;
}

/* `pattern` with what <VM> and <N> mean; -EINVAL if that is no name. */
static int make_name(const char *pattern, const char *vm, unsigned number, char out[STORE_NAME_BYTES], struct err *err)
{
	char text[3 * STORE_NAME_BYTES] = "";
	size_t used = 0;

	while (*pattern && used < sizeof(text)) {
		bool is_vm = !strncmp(pattern, "<VM>", 4), is_n = !strncmp(pattern, "<N>", 3);

		used += (size_t)(is_vm	? snprintf(text + used, sizeof(text) - used, "%s", vm)
				 : is_n ? snprintf(text + used, sizeof(text) - used, "%u", number)
					: snprintf(text + used, sizeof(text) - used, "%c", *pattern));
		pattern += is_vm ? 4 : is_n ? 3 : 1;
	}
	int rc = store_check_name("--name", text, err);
	if (!rc)
		snprintf(out, STORE_NAME_BYTES, "%.*s", STORE_NAME_BYTES - 1, text);
	return rc;
}

static int reserve_name(const struct origin *origin, const char *pattern, unsigned number, struct clone *clone, struct err *err)
{
	int rc = make_name(pattern, origin->checkpoint.vm, number, clone->name, err);

	if (rc)
		return rc;
	if (!is_known(origin->store, clone->name))
		return store_vm_reserve(origin->store, clone->name, &clone->reservation, err);
	err_set(err, ERR_STATE, EBUSY, "VM %s: there is one of that name", clone->name);
	err_hint(err, "choose another --name; <N> in it is a number that is free");
	return -EBUSY;
}

/* --- resources --- */

/*
 * A port is bound by the clone's own process, behind the starts of those before it: until then nobody else may take it for free, who may choose for another store.
 * So its number is held by a name that is once in a network namespace, as the port is (unix(7), abstract sockets); `held` has the descriptors. False: somebody holds it.
 * Where there is no descriptor any more it goes unheld.
 */
static bool hold_port(struct buf *held, const char *host, uint32_t number)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	int length = snprintf(name.sun_path + 1, sizeof(name.sun_path) - 1, "vmcp port %.3s:%u", host, number);
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return true;
	if (bind(fd, (const struct sockaddr *)&name, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) < 0) {
		bool taken = errno == EADDRINUSE;

		close(fd);
		return !taken;
	}
	buf_append(held, &fd, sizeof(fd), NULL);
	return true;
}

static void release_ports(struct buf *held)
{
	for (size_t at = 0; at < held->length; at += sizeof(int)) {
		int fd;

		memcpy(&fd, held->data + at, sizeof(fd));
		close(fd);
	}
	buf_free(held);
}

static bool port_is_free(const char *host, uint32_t number)
{
	unsigned a, b, c, d;

	if (sscanf(host + 4, "%u.%u.%u.%u:", &a, &b, &c, &d) != 4)
		return false;
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_port = htons((uint16_t)number),
				      .sin_addr.s_addr = htonl(a << 24 | b << 16 | c << 8 | d)};
	CLEANUP_CLOSE int fd = splice_listen(&address, host[0] == 'u', NULL);
	return fd >= 0;
}

/* A port that nobody listens at; a tap device that is there; of host names and IP addresses the table knows all. */
static bool is_free(void *opaque, const struct store_resource *resource, uint32_t number)
{
	if (!strcmp(resource->type, "port"))
		return hold_port(opaque, resource->host, number) && port_is_free(resource->host, number);
	if (strcmp(resource->type, "tap"))
		return true;
	CLEANUP_FREE char *path = xasprintf("/sys/class/net/%s%u/tun_flags", resource->host, number);
	return access(path, F_OK) == 0;
}

/* A rule may name any place for an overlay: what is there already is not written over. */
static int check_places(const struct origin *origin, const struct machine_config *config, struct err *err)
{
	CLEANUP_FREE char *own = xasprintf("%s/vms/%s/", store_path(origin->store), config->name);

	for (unsigned i = 0; i < config->disk_count; i++) {
		const struct config_disk *disk = &config->disks[i];

		if (disk->readonly || !strncmp(disk->path, own, strlen(own)) || access(disk->path, F_OK))
			continue;
		err_set(err, ERR_STATE, EEXIST, "disk %s: %s is there already", disk->name, disk->path);
		return err_hint(err, "remove it, or name another place in the rules");
	}
	return 0;
}

static int reserve_resources(const struct origin *origin, const struct clone_variables *variables, struct buf *held, struct clone *clone,
			     struct machine_config *config, struct err *err)
{
	struct buf text = BUF_INIT;
	size_t failed = 0;

	snprintf(config->name, sizeof(config->name), "%s", clone->name);
	int rc = clone_rules_apply(origin->rules, config, variables, &clone->resources, &clone->resource_count, err);
	if (!rc)
		rc = check_places(origin, config, err);
	if (rc)
		return rc;
	rc = store_resources_bind(origin->store, clone->name, clone->resources, clone->resource_count, is_free, held,
				  &failed, err);
	if (rc == -EBUSY || rc == -ENOSPC)
		clone_rules_blame(origin->rules, &clone->resources[failed], err);
	if (!rc)
		rc = clone_rules_settle(config, clone->resources, clone->resource_count, err);
	if (!rc)
		rc = config_to_text(config, &text, err);
	if (!rc)
		rc = buf_append(&text, NULL, 1, err);
	clone->config_text = (char *)text.data;
	return rc;
}

static int reserve(const struct origin *origin, const struct clone_options *options, unsigned index, unsigned number, struct buf *held,
		   struct clone *clone, struct err *err)
{
	struct machine_config config = {0};
	int rc = store_vm_uuid(origin->store, clone->name, "", clone->uuid, err);

	if (!rc)
		rc = read_config(&origin->checkpoint, &config, err);
	const struct clone_variables variables = {.vm = clone->name,
						  .uuid = clone->uuid,
						  .store = store_path(origin->store),
						  .number = number,
						  .same_addresses = options->same_addresses,
						  .network = options->networks ? options->networks[index] : NULL};
	if (!rc)
		rc = reserve_resources(origin, &variables, held, clone, &config, err);
	config_free(&config);
	return rc ? err_prefix(err, "clone %s", clone->name) : 0;
}

/* --- the end of what was begun --- */

void clones_free(struct clone *clones, size_t count)
{
	for (size_t i = 0; clones && i < count; i++) {
		store_resources_free_list(clones[i].resources, clones[i].resource_count);
		store_vm_unlock(clones[i].reservation);
		free(clones[i].config_text);
		free(clones[i].result.socket);
	}
	free(clones);
}

/* A VM that was told to end may take a moment. */
static void wait_for_end(struct store *store, const char *vm)
{
	const struct timespec moment = {.tv_nsec = END_POLL_NS};
	uint64_t end = clock_now_ns() + END_NS;

	while (store_vm_is_alive(store, vm) && clock_now_ns() < end)
		nanosleep(&moment, NULL);
}

/* Of one that ran: they are its own, wherever they are. */
static void remove_overlays(const struct clone *clone)
{
	struct machine_config config;

	if (!clone->result.pid || config_read_text(clone->name, clone->config_text, &config, NULL))
		return;
	for (unsigned i = 0; i < config.disk_count; i++)
		if (!config.disks[i].readonly)
			unlink(config.disks[i].path);
	config_free(&config);
}

void clones_undo(const char *store_path, struct clone *clones, size_t count)
{
	struct store *store;
	struct err err = ERR_INIT;

	if (store_open(store_path, false, &store, NULL))
		return;
	for (size_t i = 0; i < count; i++)
		if (clones[i].result.pid)
			json_decref(control_ask(store, clones[i].name, "vm.kill"));
	for (size_t i = 0; i < count; i++) {
		if (!clones[i].result.pid && !clones[i].reservation)
			continue;
		wait_for_end(store, clones[i].name);
		if (store_vm_forget(store, clones[i].name, clones[i].uuid, &err) == 0)
			remove_overlays(&clones[i]);
		else
			log_warn("clone %s: %s", clones[i].name, err.message);
	}
	store_close(store);
}

/* --- starting --- */

static int start(const struct clone_options *options, const char *id, struct clone *clone, struct err *err)
{
	const struct process_options process = {
		.store_path = options->store_path,
		.store_key = options->store_key,
		.from = id,
		.name = clone->name,
		.config_text = clone->config_text,
		.clock_of_checkpoint = options->clock_of_checkpoint,
		.detach = true,
		.held = options->held,
		.started_ns = clock_now_ns(),
	};
	int rc = process_run(&process, &clone->result, err);

	return rc ? err_prefix(err, "clone %s", clone->name) : 0;
}

static int check_count(const struct clone_options *options, struct err *err)
{
	if (options->count < 1 || options->count > CLONE_MAX)
		return err_set(err, ERR_USAGE, EINVAL, "--count: 1 to %u are possible", CLONE_MAX);
	if (options->count == 1 || !options->pattern || strstr(options->pattern, "<N>"))
		return 0;
	err_set(err, ERR_USAGE, EINVAL, "--name: %u clones would be called '%s'", options->count, options->pattern);
	return err_hint(err, "<N> in it is the number of each: %s-<N>", options->pattern);
}

/* Of one call: clones[o * options->count + i] is copy i of origins[o]. */
struct batch {
	const struct clone_options *options;
	struct store *store;
	struct origin *origins;
	struct clone *clones;
	struct buf held; /* hold_port */
};

static int open_origins(struct batch *batch, struct err *err)
{
	const struct clone_options *options = batch->options;
	int rc = store_open_with_key(options->store_path, false, options->store_key, &batch->store, err);

	for (unsigned o = 0; !rc && o < options->checkpoint_count; o++)
		rc = origin_open(&batch->origins[o], batch->store, options->checkpoints[o], options->rules_what, options->rules, err);
	return rc ? rc : store_check_key(batch->store, err);
}

/* Rules that were given are about all origins, those of a template about its own VM. */
static int check_rules(const struct batch *batch, struct err *err)
{
	const struct clone_options *options = batch->options;
	unsigned all = options->checkpoint_count;
	CLEANUP_FREE const struct machine_config **configs = xcalloc(all, sizeof(*configs));
	int rc = 0;

	for (unsigned o = 0; o < all; o++)
		configs[o] = &batch->origins[o].config;
	for (unsigned o = 0; !rc && o < all; o++) {
		rc = options->rules ? clone_rules_check_names(batch->origins[o].rules, configs, all, err)
				    : clone_rules_check_names(batch->origins[o].rules, &configs[o], 1, err);
		if (!rc)
			rc = clone_rules_check(batch->origins[o].rules, configs[o], options->count, err);
	}
	return rc;
}

/* The next number whose names nobody has, from *number on, is this copy's: the same for all that are of it. */
static int reserve_names(const struct batch *batch, unsigned copy, unsigned *number, struct err *err)
{
	const struct clone_options *options = batch->options;
	const char *pattern = options->pattern ? options->pattern : "<VM>-<N>";

	for (;; ++*number) {
		struct err why = ERR_INIT;
		unsigned o = 0;
		int rc = 0;

		for (; !rc && o < options->checkpoint_count; o++)
			rc = reserve_name(&batch->origins[o], pattern, *number, &batch->clones[o * options->count + copy], &why);
		if (!rc)
			return 0;
		while (o-- > 0) {
			struct clone *clone = &batch->clones[o * options->count + copy];

			store_vm_unlock(clone->reservation);
			clone->reservation = NULL;
		}
		if (rc != -EBUSY || !strstr(pattern, "<N>") || *number > 1000000) {
			if (err)
				*err = why;
			return rc;
		}
	}
}

static int reserve_all(struct batch *batch, struct err *err)
{
	const struct clone_options *options = batch->options;
	unsigned number = 1;
	int rc = 0;

	for (unsigned i = 0; !rc && i < options->count; i++, number++) {
		rc = reserve_names(batch, i, &number, err);
		for (unsigned o = 0; !rc && o < options->checkpoint_count; o++)
			rc = reserve(&batch->origins[o], options, i, number, &batch->held, &batch->clones[o * options->count + i], err);
	}
	return rc;
}

static int start_all(struct batch *batch, struct err *err)
{
	const struct clone_options *options = batch->options;
	int rc = 0;

	for (unsigned o = 0; o < options->checkpoint_count; o++)
		machine_preload(&batch->origins[o].config);
	/* A database handle must not be in two processes; the pins may. */
	store_hand_over(batch->store);
	batch->store = NULL;
	for (unsigned o = 0; o < options->checkpoint_count; o++)
		for (unsigned i = 0; !rc && i < options->count; i++)
			rc = start(options, batch->origins[o].checkpoint.id, &batch->clones[o * options->count + i], err);
	return rc;
}

int clones_start(const struct clone_options *options, struct clone **out, struct err *err)
{
	struct batch batch = {.options = options};
	size_t all = (size_t)options->checkpoint_count * options->count;
	int rc = check_count(options, err);

	if (rc)
		return rc;
	batch.origins = xcalloc(options->checkpoint_count, sizeof(*batch.origins));
	batch.clones = xcalloc(all, sizeof(*batch.clones));
	rc = open_origins(&batch, err);
	if (!rc)
		rc = check_rules(&batch, err);
	if (!rc)
		rc = reserve_all(&batch, err);
	if (!rc)
		rc = start_all(&batch, err);
	release_ports(&batch.held);
	store_close(batch.store);
	if (rc)
		clones_undo(options->store_path, batch.clones, all);
	for (unsigned o = 0; o < options->checkpoint_count; o++)
		origin_close(&batch.origins[o]);
	free(batch.origins);
	for (size_t i = 0; i < all; i++) {
		store_vm_unlock(batch.clones[i].reservation);
		batch.clones[i].reservation = NULL;
	}
	if (rc)
		clones_free(batch.clones, all);
	else
		*out = batch.clones;
	return rc;
}

int clone_template(const char *store_path, const char *checkpoint, const char *name, const char *rules_what,
		   const char *rules, char id[STORE_ID_BYTES], struct err *err)
{
	struct store *store = NULL;
	struct origin origin = {0};
	int rc = store_open(store_path, false, &store, err);

	if (!rc)
		rc = origin_open(&origin, store, checkpoint, rules_what ? rules_what : "no rules", rules ? rules : "", err);
	const struct machine_config *config = &origin.config;
	if (!rc)
		rc = clone_rules_check_names(origin.rules, &config, 1, err);
	if (!rc)
		rc = clone_rules_check(origin.rules, config, 2, err);
	if (!rc)
		rc = store_template_put(store, origin.checkpoint.id, name, rules ? rules : "", err);
	if (!rc)
		snprintf(id, STORE_ID_BYTES, "%s", origin.checkpoint.id);
	else if (origin.checkpoint.id[0])
		err_prefix(err, "template %s", name);
	origin_close(&origin);
	store_close(store);
	return rc;
}
