#include "control/process_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/terminal.h"
#include "control/agent_host.h"
#include "control/console_log.h"
#include "control/events.h"
#include "control/identity.h"
#include "control/mux.h"
#include "control/periodic.h"
#include "control/protocol.h"
#include "control/server.h"
#include "control/tidy.h"
#include "machine/domain.h"

#define ESCAPE_BYTE 0x1d /* Ctrl-] */

#define END_POLL_NS 10000000
#define LAST_BYTES  4096 /* of the console, kept of a VM that crashed */

static void post_event(struct process *process, enum event event)
{
	pthread_mutex_lock(&process->lock);
	/* A kill stays; and a suspend, but for that. */
	if (event > process->event)
		process->event = event;
	eventfd_write(process->event_fd, 1);
	pthread_cond_broadcast(&process->changed);
	pthread_mutex_unlock(&process->lock);
}

static void guest_stopped(void *opaque, enum vm_stop_reason reason, const struct err *err)
{
	(void)reason;
	(void)err;
	post_event(opaque, EVENT_STOPPED);
}

static void killed(void *opaque) { post_event(opaque, EVENT_KILL); }

static void suspended(void *opaque, const char *id)
{
	struct process *process = opaque;

	pthread_mutex_lock(&process->lock);
	snprintf(process->asleep_at, sizeof(process->asleep_at), "%s", id);
	process->wanted = false;
	pthread_mutex_unlock(&process->lock);
	post_event(process, EVENT_SUSPEND);
}

static void wake(void *opaque)
{
	struct process *process = opaque;

	pthread_mutex_lock(&process->lock);
	process->wanted = true;
	pthread_mutex_unlock(&process->lock);
	post_event(process, EVENT_NONE);
}

enum event process_take_event_locked(struct process *process)
{
	enum event event = process->event;
	eventfd_t count;

	eventfd_read(process->event_fd, &count);
	if (event != EVENT_KILL)
		process->event = EVENT_NONE;
	return event;
}

/* Who was to let it go is gone: it is not held for ever. */
static void let_go(struct process *process)
{
	struct err err = ERR_INIT;

	if (!atomic_exchange(&process->target.held, false))
		return;
	log_warn("nobody has let the VM go: it goes on");
	int rc = machine_resume(process->target.machine, &err);
	if (!rc)
		rc = store_vm_set_state(process->store, process->config.name, "running", &err);
	if (rc)
		log_error("%s", err.message);
}

static enum event wait_event(struct process *process)
{
	uint64_t held_ns = process->options->started_ns + PROCESS_HELD_NS;
	struct timespec until = clock_timespec(held_ns);

	pthread_mutex_lock(&process->lock);
	while (process->event == EVENT_NONE && atomic_load(&process->target.held) && clock_now_ns() < held_ns)
		pthread_cond_timedwait(&process->changed, &process->lock, &until);
	if (process->event == EVENT_NONE) {
		pthread_mutex_unlock(&process->lock);
		let_go(process);
		pthread_mutex_lock(&process->lock);
	}
	while (process->event == EVENT_NONE)
		pthread_cond_wait(&process->changed, &process->lock);
	enum event event = process_take_event_locked(process);
	pthread_mutex_unlock(&process->lock);
	return event;
}

static bool is_killed(struct process *process)
{
	pthread_mutex_lock(&process->lock);
	bool is = process->event == EVENT_KILL;
	pthread_mutex_unlock(&process->lock);
	return is;
}

/* --- signals --- */

/* SIGTERM, SIGINT and SIGHUP end the VM as `kill` does: disks are written back and closed, the record is kept right. */
static void exit_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGINT);
	sigaddset(set, SIGHUP);
}

static void *signal_main(void *opaque)
{
	struct process *process = opaque;
	sigset_t set;
	int number;

	exit_signals(&set);
	if (sigwait(&set, &number) == 0)
		post_event(process, EVENT_KILL);
	return NULL;
}

static int start_signals(struct process *process, struct err *err)
{
	sigset_t set;

	signal(SIGPIPE, SIG_IGN);
	exit_signals(&set);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	int rc = pthread_create(&process->signal_thread, NULL, signal_main, process);
	if (rc)
		return err_sys(err, rc, "signal thread");
	process->signal_thread_runs = true;
	return 0;
}

/* --- what to run --- */

static int read_config(const struct process_options *options, struct machine_config *config, struct err *err)
{
	if (options->connect)
		return domain_fetch(options->connect, options->config_path, config, err);
	if (domain_is_xml(options->config_path))
		return domain_read_file(options->config_path, "", config, err);
	return config_read_file(options->config_path, config, err);
}

static int find_config(struct process *process, struct err *err)
{
	const struct process_options *options = process->options;
	struct store_checkpoint checkpoint;
	char what[STORE_ID_BYTES + 16];
	int rc;

	if (!options->from)
		return read_config(options, &process->config, err);
	rc = store_resolve(process->store, options->from, process->from, err);
	if (!rc)
		rc = store_pin(process->store, process->from, &process->from_pin, err);
	if (!rc)
		rc = store_checkpoint_get(process->store, process->from, &checkpoint, err);
	if (rc)
		return rc;
	snprintf(what, sizeof(what), "checkpoint %.8s", process->from);
	rc = config_read_text(what, options->config_text ? options->config_text : checkpoint.config_text, &process->config, err);
	bool other = options->name && strcmp(options->name, checkpoint.vm);
	uint64_t now = clock_wall_ns();
	if (options->clock_of_checkpoint && now > checkpoint.created_wall_ns)
		process->clock_back_ns = now - checkpoint.created_wall_ns;
	store_checkpoint_free(&checkpoint);
	if (!rc && process->config.qemu) {
		err_set(err, ERR_STATE, ENOTSUP, "%s: is of a domain that QEMU runs, and only QEMU can go on with it", what);
		rc = err_hint(err, "vmcp revert --connect URI %.8s", process->from);
	}
	/* Another VM than the one that was saved. */
	if (!rc && other && !options->config_text)
		identity_own_disks(&process->config, store_path(process->store), options->name);
	return rc;
}

/* All that this VM has of its host, before any of it is opened. Another VM that has some of it is named. */
int process_bind_resources(struct process *process, struct err *err)
{
	struct store_resource *list = NULL;
	size_t count = 0, failed = 0;
	const char *name = process->config.name;
	int rc = store_vm_uuid(process->store, name, process->config.uuid, process->record.uuid, err);

	if (rc)
		return rc;
	process->bound = true;
	identity_list(&process->config, store_path(process->store), process->record.uuid, &list, &count);
	rc = store_resources_bind(process->store, name, list, count, NULL, NULL, &failed, err);
	if (rc == -EBUSY)
		err_hint(err, "give it another one, for network cards by `vmcp run --net %.*s:KEY=VALUE`", (int)strcspn(list[failed].name, "/"),
			 list[failed].name);
	store_resources_free_list(list, count);
	return rc;
}

/* Enters the VM, which is about to run, into the catalogue. */
static int write_record(struct process *process, struct err *err)
{
	struct store_vm *vm = &process->record;
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = config_to_text(&process->config, &text, err);

	if (!rc)
		rc = buf_append(&text, NULL, 1, err);
	if (rc)
		return rc;
	/* A boot is a new root: its memory comes from no checkpoint. */
	snprintf(vm->at, sizeof(vm->at), "%s", process->from);
	snprintf(vm->name, sizeof(vm->name), "%s", process->config.name);
	snprintf(vm->state, sizeof(vm->state), process->options->held ? "paused" : "running");
	snprintf(vm->config_path, sizeof(vm->config_path), "%s", process->config.source);
	vm->pid = (int)getpid();
	vm->memory_bytes = process->config.memory_bytes;
	vm->cpus = process->config.cpus;
	vm->started_wall_ns = clock_wall_ns();
	vm->config_text = (char *)text.data;
	rc = store_vm_put(process->store, vm, err);
	vm->config_text = NULL;
	return rc;
}

/* --- life --- */

static int start_agent_host(struct process *process, struct err *err)
{
	const struct agent_host_identity identity = {
		.uuid = process->record.uuid, .hostname = process->config.hostname, .tell_time = !process->options->clock_of_checkpoint};

	return process->config.vsock_cid ? agent_host_start(process->dir, &process->target, &identity, &process->target.agent, err) : 0;
}

static void foreground_escape(void *opaque)
{
	struct process *process = opaque;

	log_info("console closed by Ctrl-]: the VM is ended (`vmcp run --detach` keeps it without a terminal)");
	post_event(process, EVENT_KILL);
}

static int attach_terminal(struct process *process, struct err *err)
{
	struct console_watcher watcher = {
		.in_fd = STDIN_FILENO, .out_fd = STDOUT_FILENO, .escape = -1, .escaped = foreground_escape, .opaque = process};

	if (process->options->detach || process->config.console != CONFIG_CONSOLE_STDIO)
		return 0;
	if (terminal_set_raw(STDIN_FILENO, true)) /* what vmcp itself says still gets its carriage returns */
		watcher.escape = ESCAPE_BYTE;
	return console_attach(process->console, &watcher, err);
}

/* A detached VM's console goes to vms/NAME/console.log. */
static int attach_console_log(struct process *process, struct err *err)
{
	int fd;

	unlinkat(process->dir, "console.last", 0);
	if (!process->options->detach)
		return 0;
	int rc = console_log_open(process->dir, CONSOLE_LOG_BYTES, &process->console_log, &fd, err);
	if (rc)
		return rc;
	struct console_watcher watcher = {.in_fd = -1, .out_fd = fd, .owned = true, .escape = -1};
	rc = console_attach(process->console, &watcher, err);
	if (rc)
		close(fd);
	return rc;
}

int process_build_machine(struct process *process, const char *from, struct err *err)
{
	struct machine_options options = {
		.config = &process->config,
		.store = process->store,
		.uuid = process->record.uuid,
		.from = from && *from ? from : NULL,
		.console = process->console,
		.held = atomic_load(&process->target.held),
		.clock_back_ns = from == process->from ? process->clock_back_ns : 0, /* not when it wakes up */
		.stopped = guest_stopped,
		.opaque = process,
	};
	struct machine *machine;
	int rc = machine_create(&options, &machine, err);

	if (rc)
		return rc;
	pthread_rwlock_wrlock(&process->target.machine_lock);
	process->target.machine = machine;
	process->target.ending = false;
	pthread_rwlock_unlock(&process->target.machine_lock);
	return 0;
}

/*
 * Lets no method begin any more (target.ending), waits for those under way, and returns with machine_lock held. What
 * users were promised is kept: a checkpoint that is being written may become durable. Only a kill cancels it; again and
 * again, as one that had not begun at the first time has at the next.
 */
static void close_machine(struct process *process)
{
	const struct timespec moment = {.tv_nsec = END_POLL_NS};
	struct ckpt_engine *engine = machine_engine(process->target.machine);

	process->target.ending = true;
	for (;;) {
		bool kill = is_killed(process);

		if (kill)
			ckpt_cancel(engine, NULL);
		if (pthread_rwlock_trywrlock(&process->target.machine_lock) == 0) {
			struct ckpt_progress progress;

			ckpt_progress(engine, &progress);
			if (kill || !progress.active)
				return;
			pthread_rwlock_unlock(&process->target.machine_lock);
		}
		nanosleep(&moment, NULL);
	}
}

int process_drop_machine(struct process *process, struct err *err)
{
	struct machine *machine = process->target.machine;

	if (!machine)
		return 0;
	close_machine(process);
	process->target.machine = NULL;
	pthread_rwlock_unlock(&process->target.machine_lock);
	return machine_destroy(machine, err);
}

static int start(struct process *process, struct err *err)
{
	int rc = start_signals(process, err);
	if (!rc)
		rc = console_create(&process->console, err);
	if (rc)
		return rc;
	process->target.console = process->console;
	rc = process_bind_resources(process, err);
	if (!rc)
		rc = process_build_machine(process, process->from, err);
	if (!rc)
		machine_generation(process->target.machine, process->generation);
	if (!rc)
		rc = mux_ensure(store_path(process->store), &process->config, err);
	if (!rc)
		rc = attach_console_log(process, err);
	/* From here on it is known; a VM that cannot be built leaves what is known of it as it was. */
	if (!rc)
		rc = write_record(process, err);
	if (!rc)
		process->periodic = process->target.periodic =
			periodic_create(&process->target, &process->config);
	if (!rc)
		process->tidy = process->target.tidy = tidy_create(&process->target);
	if (!rc)
		process->target.events = events_create();
	if (!rc)
		rc = start_agent_host(process, err);
	if (!rc)
		rc = control_server_start(process->dir, &process->target, &process->server, err);
	if (!rc)
		rc = attach_terminal(process, err);
	if (!rc && !process->options->held)
		rc = machine_resume(process->target.machine, err);
	if (!rc)
		rc = periodic_begin(process->periodic, err);
	if (!rc)
		rc = tidy_begin(process->tidy, err);
	store_unpin(process->from_pin);
	process->from_pin = NULL;
	return rc;
}

static void tell_result(struct process *process, struct process_result *result)
{
	uint64_t entry = process->options->held ? clock_now_ns() : machine_first_entry_ns(process->target.machine);

	snprintf(result->vm, sizeof(result->vm), "%s", process->config.name);
	snprintf(result->checkpoint, sizeof(result->checkpoint), "%s", process->from);
	snprintf(result->uuid, sizeof(result->uuid), "%s", process->record.uuid);
	snprintf(result->generation, sizeof(result->generation), "%s", process->generation);
	result->pid = (int)getpid();
	result->boot_ns = entry > process->options->started_ns ? entry - process->options->started_ns : 0;
}

/* The guest begins anew, in a machine that stands at no checkpoint. */
static int reset(struct process *process, struct err *err)
{
	log_info("the guest resets");
	int rc = process_drop_machine(process, err);
	if (!rc && process->from[0] && !process->config.kernel)
		rc = err_set(err, ERR_FAILED, ENOENT, "%s: reset: the configuration names no kernel", process->config.name);
	if (!rc)
		rc = store_vm_set_position(process->store, process->config.name, "", err);
	if (!rc)
		rc = process_build_machine(process, NULL, err);
	if (!rc)
		events_post(process->target.events, "reset", NULL);
	return rc ? rc : machine_resume(process->target.machine, err);
}

/* Asked once no method is under way: a revert may have brought the guest back to life since it stopped. If not, nothing
 * can any more. */
static bool is_at_end(struct process *process, enum vm_stop_reason *reason, struct err *error)
{
	close_machine(process);
	bool stopped = vm_has_stopped(machine_vm(process->target.machine), reason, error);
	process->target.ending = stopped || process->target.asleep;
	pthread_rwlock_unlock(&process->target.machine_lock);
	return stopped;
}

/* Until the VM ends. */
static int live(struct process *process, struct err *err)
{
	for (enum event event; (event = wait_event(process)) != EVENT_KILL;) {
		struct err error = ERR_INIT;
		enum vm_stop_reason reason;
		int rc;

		if (event == EVENT_SUSPEND) {
			rc = process_sleep_until_wanted(process, err);
			if (rc)
				return rc;
			continue;
		}
		if (!is_at_end(process, &reason, &error))
			continue;
		switch (reason) {
		case VM_STOP_POWER_OFF:
			return 0;
		case VM_STOP_RESET:
			rc = reset(process, err);
			if (rc)
				return rc;
			break;
		default:
			if (err)
				*err = error;
			return -(error.number ? error.number : EIO);
		}
	}
	return 0;
}

/* What whoever finds it crashed wants to know: why, what the guest said last, and the way back. */
static void note_crash(struct process *process, struct err *err)
{
	char said[LAST_BYTES], at[STORE_ID_BYTES] = "";
	size_t length = console_tail(process->console, said, sizeof(said));

	if (process->target.machine)
		ckpt_position(machine_engine(process->target.machine), at);
	file_write_atomic(process->dir, "console.last", said, length, 0600, NULL);
	if (at[0])
		err_hint(err, "`vmcp revert %.12s --vm %s` takes it back to its last checkpoint; `vmcp ps` shows what it said last", at,
			 process->config.name);
}

static int end(struct process *process, int rc, struct err *err)
{
	struct err closing = ERR_INIT;

	if (rc && process->record.name[0])
		note_crash(process, err);
	periodic_end(process->periodic);
	tidy_end(process->tidy);
	/* First, as a method that waits for a checkpoint would hold up the server's end. */
	int closed = process_drop_machine(process, &closing);
	events_end(process->target.events);
	control_server_stop(process->server);
	agent_host_stop(process->target.agent);
	periodic_destroy(process->periodic);
	tidy_destroy(process->tidy);
	events_destroy(process->target.events);
	console_destroy(process->console);
	console_log_close(process->console_log);
	terminal_restore();
	if (process->signal_thread_runs) {
		pthread_cancel(process->signal_thread);
		pthread_join(process->signal_thread, NULL);
	}
	if (!rc && closed) {
		rc = closed;
		if (err)
			*err = closing;
	}
	/* Behind the machine's end, as nothing is open any more. */
	if (process->bound)
		store_resources_free(process->store, process->config.name, NULL);
	if (process->record.name[0])
		store_vm_set_state(process->store, process->record.name, rc ? "crashed" : "stopped", NULL);
	if (process->record.name[0] && rc && err)
		store_vm_set_note(process->store, process->record.name, err->message, NULL);
	return rc;
}

/* The machine's configuration, from wherever it comes, with what the command line changes of it. */
static int configure(struct process *process, struct err *err)
{
	const struct process_options *options = process->options;
	int rc = find_config(process, err);

	if (!rc && options->memory_backing)
		rc = config_choose_backing(&process->config, options->memory_backing, err);
	if (!rc && options->net)
		rc = config_set_nets(&process->config, options->net, err);
	if (!rc && options->name) {
		rc = store_check_name("--name", options->name, err);
		if (strcmp(process->config.name, options->name) != 0)
			process->config.uuid[0] = '\0'; /* not that domain, but one like it */
		if (!rc)
			snprintf(process->config.name, sizeof(process->config.name), "%s", options->name);
	}
	return rc ? rc : periodic_override(&process->config, options->every, options->keep, err);
}

static int prepare(struct process *process, struct err *err)
{
	int rc = store_open_with_key(process->options->store_path, true, process->options->store_key, &process->store, err);

	if (!rc)
		rc = store_check_key(process->store, err);
	if (!rc)
		rc = configure(process, err);
	if (!rc)
		rc = store_vm_lock(process->store, process->config.name, &process->name_lock, err);
	if (rc)
		return rc;
	process->dir = store_vm_dir(process->store, process->config.name, err);
	return process->dir < 0 ? process->dir : 0;
}

static void process_init(struct process *process, const struct process_options *options)
{
	*process = (struct process){.options = options, .dir = -1, .event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
	pthread_mutex_init(&process->lock, NULL);
	clock_cond_init(&process->changed);
	atomic_init(&process->target.held, options->held);
	pthread_rwlock_init(&process->target.machine_lock, NULL);
	pthread_mutex_init(&process->target.record_lock, NULL);
}

static void process_free(struct process *process)
{
	if (process->dir >= 0)
		close(process->dir);
	if (process->event_fd >= 0)
		close(process->event_fd);
	store_vm_unlock(process->name_lock);
	config_free(&process->config);
	store_unpin(process->from_pin);
	store_close(process->store);
	pthread_mutex_destroy(&process->target.record_lock);
	pthread_rwlock_destroy(&process->target.machine_lock);
	pthread_cond_destroy(&process->changed);
	pthread_mutex_destroy(&process->lock);
}

int process_run_here(const struct process_options *options, process_running_fn *running, void *opaque, struct process_result *result,
		    struct err *err)
{
	struct process process;
	int rc;

	process_init(&process, options);
	if (options->detach)
		hurry_begin(&process.hurry);
	rc = prepare(&process, err);
	/* Other memory than small pages is read whole before the VM runs, which takes too long to go before others. */
	if (process.config.memory_backing != MEM_BACKING_SMALL)
		hurry_end(&process.hurry);
	if (!rc) {
		process.target.store = process.store;
		process.target.name = process.config.name;
		process.target.kill = killed;
		process.target.suspend = suspended;
		process.target.wake = wake;
		process.target.opaque = &process;
		rc = start(&process, err);
		if (!rc) {
			tell_result(&process, result);
			log_set_sink(STDERR_FILENO, process.config.name);
			if (running)
				running(opaque, result);
			hurry_end(&process.hurry);
			rc = live(&process, err);
		}
		rc = end(&process, rc, err);
	}
	process_free(&process);
	return rc;
}

/* --- what would run --- */

static json_t *config_to_json(const struct machine_config *config)
{
	json_t *disks = json_array(), *nets = json_array();

	for (unsigned i = 0; i < config->disk_count; i++) {
		const struct config_disk *disk = &config->disks[i];

		json_array_append_new(disks, json_pack("{s:s, s:o, s:o, s:b}", "name", disk->name, "path", control_text_or_null(disk->path), "base",
						       control_text_or_null(disk->base), "readonly", disk->readonly));
	}
	for (unsigned i = 0; i < config->net_count; i++)
		json_array_append_new(nets, json_pack("{s:s, s:s}", "name", config->nets[i].name, "mode", config_net_mode_name(config->nets[i].mode)));
	return json_pack("{s:s, s:I, s:i, s:s, s:s, s:o, s:o, s:s, s:b, s:b, s:o, s:o, s:I, s:I}", "vm", config->name, "memory_bytes",
			 (json_int_t)config->memory_bytes, "cpus", (int)config->cpus, "cpu_model", config->cpu_model, "memory_backing",
			 config_backing_name(config->memory_backing), "kernel", control_text_or_null(config->kernel), "initrd",
			 control_text_or_null(config->initrd), "cmdline", config->cmdline, "rng", config->rng, "balloon", config->balloon, "disks",
			 disks, "nets", nets, "every_ns", (json_int_t)config->every_ns, "keep", (json_int_t)config->keep);
}

int process_plan(const struct process_options *options, json_t **plan, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct process process;

	process_init(&process, options);
	int rc = options->from ? store_open(options->store_path, false, &process.store, err) : 0;
	if (!rc)
		rc = configure(&process, err);
	if (!rc)
		rc = config_to_text(&process.config, &text, err);
	if (!rc)
		rc = buf_append(&text, NULL, 1, err);
	if (!rc) {
		*plan = config_to_json(&process.config);
		json_object_set_new(*plan, "from", control_text_or_null(process.from));
		json_object_set_new(*plan, "config", json_string((const char *)text.data));
	}
	process_free(&process);
	return rc;
}

int process_run(const struct process_options *options, struct process_result *result, struct err *err)
{
	int rc;

	*result = (struct process_result){0};
	rc = options->detach ? process_run_detached(options, result, err) : process_run_here(options, NULL, NULL, result, err);
	if (!rc && options->detach)
		result->socket = xasprintf("%s/vms/%s/control.sock", options->store_path, result->vm);
	return rc;
}
