#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "control/events.h"
#include "control/group_member.h"
#include "control/protocol.h"
#include "control/server.h"
#include "control/tidy.h"
#include "control/vm_stats.h"

#define MAX_EVENT_WAIT_NS (3600 * 1000000000ull)

/* --- parameters and results --- */

static int get_text(const json_t *params, const char *key, bool needed, const char **out, struct err *err)
{
	const json_t *value = json_object_get(params, key);

	*out = NULL;
	if (!value || json_is_null(value))
		return needed ? err_set(err, ERR_USAGE, EINVAL, "control message: parameter `%s` is missing", key) : 0;
	*out = json_string_value(value);
	return *out ? 0 : err_set(err, ERR_USAGE, EINVAL, "control message: parameter `%s` is no string", key);
}

static int get_bool(const json_t *params, const char *key, bool *out, struct err *err)
{
	const json_t *value = json_object_get(params, key);

	*out = json_is_true(value);
	if (!value || json_is_boolean(value))
		return 0;
	return err_set(err, ERR_USAGE, EINVAL, "control message: parameter `%s` is neither true nor false", key);
}

static int get_count(const json_t *params, const char *key, uint64_t *out, struct err *err)
{
	const json_t *value = json_object_get(params, key);

	*out = 0;
	if (value && (!json_is_integer(value) || json_integer_value(value) < 0))
		return err_set(err, ERR_USAGE, EINVAL, "control message: parameter `%s` is no count", key);
	if (value)
		*out = (uint64_t)json_integer_value(value);
	return 0;
}

static json_int_t number(uint64_t value) { return (json_int_t)value; }

static json_t *planner_to_json(const struct ckpt_result *r)
{
	const struct planner_costs *costs = &r->costs;
	const struct planner_plan *plan = &r->planned;
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
			 "copy_page_ns", number((uint64_t)costs->copy_page_ns), "touch_page_ns", number((uint64_t)costs->touch_page_ns), "log_page_ns", number((uint64_t)costs->log_page_ns),
			 "log_read_ns", number((uint64_t)costs->log_read_ns), "protect_page_ns", number((uint64_t)costs->protect_page_ns),
			 "fault_ns", number((uint64_t)costs->fault_ns), "written_pages_per_s", number((uint64_t)costs->written_pages_per_s),
			 "saved_bytes_per_s", number((uint64_t)costs->saved_bytes_per_s), "free_bytes", number(r->free_bytes),
			 "buffer_bytes", number(plan->buffer_pages * PAGE_BYTES), "stage_ns", number(plan->stage_ns),
			 "left_pages", number(plan->left_pages), "pause_ns", number(plan->pause_ns), "save_ns", number(plan->save_ns),
			 "faults", number(plan->faults));
}

static json_t *memory_to_json(const struct ckpt_result *r)
{
	return json_pack("{s:s, s:s, s:o, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
			 "plan", r->plan, "plan_reason", r->planned.reason, "planner", planner_to_json(r),
			 "total_pages", number(r->total_pages), "saved_pages", number(r->saved_pages),
			 "zero_pages", number(r->zero_pages), "parent_pages", number(r->parent_pages),
			 "cow_faults", number(r->cow_faults), "cow_fault_p50_ns", number(r->cow_fault_p50_ns),
			 "cow_fault_p99_ns", number(r->cow_fault_p99_ns), "cow_fault_p999_ns", number(r->cow_fault_p999_ns),
			 "cow_fault_max_ns", number(r->cow_fault_max_ns), "throttled", number(r->throttled),
			 "throttled_ns", number(r->throttled_ns), "written_bytes", number(r->written_bytes),
			 "armed_again_pages", number(r->armed_again_pages), "stage_ns", number(r->stage_ns),
			 "stage_passes", number(r->stage_passes));
}

static json_t *result_to_json(const char *vm, const struct ckpt_request *request, const struct ckpt_result *r)
{
	json_t *disks = json_array();

	for (uint32_t i = 0; i < r->disk_count; i++)
		json_array_append_new(disks, json_pack("{s:s, s:s, s:I, s:I}", "name", r->disks[i].name, "layer",
						       r->disks[i].layer, "inflight_writes",
						       number(r->disks[i].inflight_writes), "inflight_reads",
						       number(r->disks[i].inflight_reads)));
	json_t *pause = json_pack("{s:I, s:I, s:I, s:I, s:I}", "quiesce_ns", number(r->quiesce_ns), "state_ns",
				  number(r->state_ns), "disks_ns", number(r->disks_ns), "memory_ns",
				  number(r->memory_ns), "resume_ns", number(r->resume_ns));
	json_t *memory = memory_to_json(r);
	return json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:s, s:I, s:o, s:o, s:o, s:I, s:o}", "id", r->id, "vm",
			 vm, "parent", control_text_or_null(r->parent), "tag", control_text_or_null(request->tag), "message",
			 control_text_or_null(request->message), "created", control_time_to_json(r->created_wall_ns), "live",
			 r->live, "durability", ckpt_level_name(r->durable ? CKPT_DURABLE : r->written ? CKPT_WRITTEN : CKPT_CAPTURED), "pause_ns", number(r->pause_ns),
			 "pause", pause, "memory", memory, "disks", disks, "captured_ns", number(r->captured_ns),
			 "durable_ns", r->durable ? json_integer(number(r->durable_ns)) : json_null());
}

/* --- methods; each holds machine_lock for reading, and target->machine is there unless the table says otherwise --- */

static int vm_info(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct machine *machine = x->target->machine;
	char at[STORE_ID_BYTES];

	(void)params;
	(void)err;
	ckpt_position(machine_engine(machine), at);
	*result = json_pack("{s:s, s:s, s:i, s:i, s:o}", "name", x->target->name, "state",
			    machine_is_paused(machine) ? "paused" : "running", "pid", (int)getpid(), "cpus",
			    (int)vm_cpus(machine_vm(machine)), "at", control_text_or_null(at));
	return 0;
}

static int no_machine(const struct control_target *target, struct err *err)
{
	if (!atomic_load(&target->asleep))
		return err_set(err, ERR_STATE, EAGAIN, "%s: the machine is starting or ending", target->name);
	err_set(err, ERR_STATE, EAGAIN, "%s: is suspended", target->name);
	return err_hint(err, "`vmcp resume %s` wakes it, as does a connection to one of its ports", target->name);
}

static int change_state(struct control_exchange *x, int (*change)(struct machine *machine, struct err *err),
			const char *state, json_t **result, struct err *err)
{
	struct control_target *target = x->target;

	pthread_mutex_lock(&target->record_lock);
	int rc = atomic_load(&target->ending) ? no_machine(target, err) : change(target->machine, err);
	if (!rc)
		rc = store_vm_set_state(target->store, target->name, state, err);
	pthread_mutex_unlock(&target->record_lock);
	if (!rc)
		events_post(target->events, strcmp(state, "running") ? state : "resumed", NULL);
	*result = rc ? NULL : json_object();
	return rc;
}

static int vm_pause(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	(void)params;
	return change_state(x, machine_pause, "paused", result, err);
}

static int vm_resume_method(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct control_target *target = x->target;

	(void)params;
	if (atomic_load(&target->asleep)) {
		target->wake(target->opaque);
		*result = json_object();
		return 0;
	}
	if (!target->machine)
		return no_machine(target, err);
	atomic_store(&target->held, false);
	return change_state(x, machine_resume, "running", result, err);
}

static int vm_power_button(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	int rc = machine_power_button(x->target->machine, err);

	(void)params;
	*result = rc ? NULL : json_object();
	return rc;
}

static int vm_kill(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	(void)params;
	(void)err;
	x->target->kill(x->target->opaque);
	*result = json_object();
	return 0;
}

/* What a thread needs that tells the client of the progress while the connection's own thread works. */
struct reporter {
	struct control_exchange *x;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool stop;
	bool late; /* its deadline passed, and it was cancelled */
};

static void send_progress(struct control_exchange *x)
{
	struct ckpt_progress progress;

	ckpt_progress(machine_engine(x->target->machine), &progress);
	if (!progress.active)
		return;
	json_t *note = json_pack("{s:s, s:s, s:{s:s, s:s, s:I, s:I}}", "jsonrpc", "2.0", "method", "progress", "params",
				 "id", progress.id, "phase", progress.phase ? progress.phase : "", "done_pages",
				 number(progress.done_pages), "total_pages", number(progress.total_pages));
	if (progress.waits_for[0])
		json_object_set_new(json_object_get(note, "params"), "waits_for", json_string(progress.waits_for));
	/* A client that went away does not end its checkpoint. What was sent in part leaves no line to go on with. */
	if (control_send(x->fd, note, NULL))
		shutdown(x->fd, SHUT_RDWR);
	json_decref(note);
}

static void *reporter_main(void *opaque)
{
	struct reporter *reporter = opaque;
	struct timespec until;

	pthread_mutex_lock(&reporter->lock);
	while (!reporter->stop) {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += 200000000;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		if (pthread_cond_timedwait(&reporter->changed, &reporter->lock, &until) == ETIMEDOUT && !reporter->stop) {
			reporter->late |= ckpt_cancel_late(machine_engine(reporter->x->target->machine));
			send_progress(reporter->x);
		}
	}
	pthread_mutex_unlock(&reporter->lock);
	return NULL;
}

static bool reporter_begin(struct reporter *reporter, struct control_exchange *x)
{
	*reporter = (struct reporter){.x = x, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
	return pthread_create(&reporter->thread, NULL, reporter_main, reporter) == 0;
}

static void reporter_end(struct reporter *reporter)
{
	pthread_mutex_lock(&reporter->lock);
	reporter->stop = true;
	pthread_cond_signal(&reporter->changed);
	pthread_mutex_unlock(&reporter->lock);
	pthread_join(reporter->thread, NULL);
}

static int checkpoint_take(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct ckpt_request request = {0};
	struct reporter reporter;
	struct ckpt_result taken;
	const char *wait, *instant;
	struct group_member member;
	uint64_t timeout_ns, started_ns = clock_now_ns();
	int rc;

	rc = get_bool(params, "live", &request.live, err);
	if (!rc)
		rc = get_bool(params, "full", &request.full, err);
	if (!rc)
		rc = get_text(params, "tag", false, &request.tag, err);
	if (!rc)
		rc = get_text(params, "message", false, &request.message, err);
	if (!rc)
		rc = get_text(params, "wait", false, &wait, err);
	if (!rc)
		rc = get_text(params, "instant", false, &instant, err);
	if (!rc)
		rc = get_count(params, "max_rate", &request.max_rate, err);
	if (!rc)
		rc = get_count(params, "timeout_ns", &timeout_ns, err);
	if (!rc)
		rc = group_member_of_take(&member, x, params, &request, err);
	if (rc)
		return rc;
	if (instant && strcmp(instant, "now") && strcmp(instant, "settled"))
		return err_set(err, ERR_USAGE, EINVAL, "control message: `instant` is '%s', neither now nor settled", instant);
	if (wait && strcmp(wait, "captured") && strcmp(wait, "written") && strcmp(wait, "durable"))
		return err_set(err, ERR_USAGE, EINVAL, "control message: `wait` is '%s', not captured, written or durable", wait);
	if (request.tag) {
		rc = store_check_name("tag", request.tag, err);
		if (rc)
			return rc;
	}
	request.instant = instant && !strcmp(instant, "settled") ? CKPT_INSTANT_SETTLED : CKPT_INSTANT_NOW;
	request.wait = wait && !strcmp(wait, "captured") ? CKPT_WAIT_CAPTURED : wait && !strcmp(wait, "written") ? CKPT_WAIT_WRITTEN : CKPT_WAIT_DURABLE;
	request.deadline_ns = timeout_ns ? started_ns + timeout_ns : 0;
	/* Of a group, who leads it is told where each VM is, by this thread. */
	bool reports = !request.group && reporter_begin(&reporter, x);
	rc = machine_checkpoint(x->target->machine, &request, &taken, err);
	if (reports)
		reporter_end(&reporter);
	if (rc == -ECANCELED && reports && reporter.late) {
		rc = err_set(err, ERR_FAILED, ETIMEDOUT, "%s: the checkpoint was not done in time, and was cancelled", x->target->name);
		err_hint(err, "the VM runs on; give it more time, or see what it waits for: `vmcp checkpoint` shows it");
	}
	if (!rc) {
		*result = result_to_json(x->target->name, &request, &taken);
		if (request.group)
			group_member_tell(request.group, &taken, *result);
		events_post(x->target->events, "checkpoint", json_pack("{s:s, s:O, s:b}", "checkpoint", taken.id, "durability", json_object_get(*result, "durability"), "periodic", false));
	} else
		tidy_wake(x->target->tidy); /* it may have left disk layers */
	return rc;
}

/* Nothing begins on the machine between its checkpoint and its end: it stands still, and whoever would change that waits for the lock. */
static int suspend_machine(struct control_exchange *x, json_t **result, struct err *err)
{
	const struct ckpt_request request = {.message = "suspended", .wait = CKPT_WAIT_DURABLE};
	struct control_target *target = x->target;
	bool paused = machine_is_paused(target->machine);
	struct reporter reporter;
	struct ckpt_result taken;
	int rc = paused ? 0 : machine_pause(target->machine, err);

	if (rc)
		return rc;
	bool reports = reporter_begin(&reporter, x);
	rc = machine_checkpoint(target->machine, &request, &taken, err);
	if (reports)
		reporter_end(&reporter);
	if (rc && !paused)
		machine_resume(target->machine, NULL);
	if (rc)
		return rc;
	*result = result_to_json(target->name, &request, &taken);
	atomic_store(&target->asleep, true);
	atomic_store(&target->ending, true);
	target->suspend(target->opaque, taken.id);
	return 0;
}

static int vm_suspend(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	(void)params;
	pthread_mutex_lock(&x->target->record_lock);
	int rc = atomic_load(&x->target->ending) ? no_machine(x->target, err) : suspend_machine(x, result, err);
	pthread_mutex_unlock(&x->target->record_lock);
	return rc;
}

static int checkpoint_cancel(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct ckpt_engine *engine = machine_engine(x->target->machine);
	struct ckpt_progress what;
	bool wait;
	int rc = get_bool(params, "wait", &wait, err);

	if (rc)
		return rc;
	if (!ckpt_cancel(engine, &what))
		return err_set(err, ERR_STATE, ENOENT, "%s: no checkpoint or revert is under way", x->target->name);
	*result = json_pack("{s:s, s:s, s:b}", "id", what.id, "phase", what.phase, "revert", what.reverts);
	if (what.waits_for[0])
		json_object_set_new(*result, "waits_for", json_string(what.waits_for));
	if (wait)
		ckpt_wait_end(engine, &what);
	return 0;
}

/* The one that is under way, once it is captured. */
static int checkpoint_pending(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct ckpt_engine *engine = machine_engine(x->target->machine);
	char parent[STORE_ID_BYTES];
	struct ckpt_progress now;

	(void)params, (void)err;
	ckpt_position(engine, parent);
	ckpt_progress(engine, &now);
	if (!now.active || now.level == CKPT_NOTHING) {
		*result = json_object();
		return 0;
	}
	*result = json_pack("{s:s, s:s, s:s, s:o, s:I, s:s, s:I, s:I}", "id", now.id, "vm", x->target->name, "durability", ckpt_level_name(now.level),
			    "parent", control_text_or_null(parent), "created_wall_ns", number(now.created_wall_ns), "phase", now.phase, "done_pages",
			    number(now.done_pages), "total_pages", number(now.total_pages));
	return 0;
}

/* A revert takes a moment: a thread is worth starting only for a client that wants to hear. */
static int revert_reporting(struct control_exchange *x, const char *id, bool wants, const struct ckpt_group *group, struct ckpt_revert_result *out,
			    struct err *err)
{
	struct reporter reporter;
	bool reports = wants && !group && reporter_begin(&reporter, x);
	int rc = machine_revert_in_group(x->target->machine, id, group, out, err);

	if (reports)
		reporter_end(&reporter);
	return rc;
}

static int revert(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	struct ckpt_revert_result reverted;
	const char *id;
	bool wants = false, with_others = false;
	struct group_member member;
	int rc = get_text(params, "id", true, &id, err);

	if (!rc)
		rc = get_bool(params, "progress", &wants, err);
	if (!rc)
		rc = get_bool(params, "group", &with_others, err);
	if (!rc)
		rc = revert_reporting(x, id, wants, with_others ? group_member_of_revert(&member, x) : NULL, &reverted, err);
	if (rc)
		return rc;
	json_t *parts = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "check_ns", number(reverted.check_ns), "stop_ns",
				  number(reverted.stop_ns), "pages_ns", number(reverted.pages_ns), "drain_ns",
				  number(reverted.drain_ns), "memory_ns", number(reverted.memory_ns), "state_ns",
				  number(reverted.state_ns), "disks_ns", number(reverted.disks_ns), "resume_ns",
				  number(reverted.resume_ns));
	*result = json_pack("{s:s, s:s, s:s, s:I, s:I, s:o}", "vm", x->target->name, "checkpoint", reverted.id, "mode",
			    "in-place", "restored_pages", number(reverted.restored_pages), "revert_ns",
			    number(reverted.revert_ns), "parts", parts);
	events_post(x->target->events, "reverted", json_pack("{s:s}", "checkpoint", reverted.id));
	return 0;
}

static int stats(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	(void)params;
	(void)err;
	*result = vm_stats_to_json(x->target);
	return 0;
}

/* The answer comes before the work. */
static int vm_tidy(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	(void)params;
	(void)err;
	tidy_wake(x->target->tidy);
	*result = json_object();
	return 0;
}

static int vm_balloon(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	uint64_t bytes;

	if (!json_object_get(params, "target_bytes"))
		return err_set(err, ERR_USAGE, EINVAL, "control message: parameter `target_bytes` is missing");
	int rc = get_count(params, "target_bytes", &bytes, err);
	if (!rc)
		rc = machine_set_balloon(x->target->machine, bytes, err);
	*result = rc ? NULL : json_pack("{s:s, s:I}", "vm", x->target->name, "target_bytes", number(bytes));
	return rc;
}

static int console_attach_method(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	const json_t *wanted = json_object_get(params, "scrollback_bytes");
	json_int_t scrollback = json_integer_value(wanted);

	(void)result;
	if (wanted && (!json_is_integer(wanted) || scrollback < 0))
		return err_set(err, ERR_USAGE, EINVAL, "control message: parameter `scrollback_bytes` is no count");
	int fd = fcntl(x->fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return err_sys(err, errno, "console");
	struct console_watcher watcher = {
		.in_fd = fd, .out_fd = fd, .owned = true, .escape = -1, .scrollback_bytes = (size_t)scrollback};
	/* The response first: from the attachment on the socket carries the console's bytes. */
	json_t *response = json_pack("{s:s, s:O, s:{}}", "jsonrpc", "2.0", "id", x->id, "result");
	int rc = control_send(x->fd, response, err);
	json_decref(response);
	if (rc) {
		close(fd);
		return rc;
	}
	x->console_taken = true;
	rc = console_attach(x->target->console, &watcher, err);
	if (rc) {
		dprintf(fd, "vmcp: %s\r\n", err ? err->message : "no room for another watcher");
		close(fd);
	}
	return rc;
}

/* Outside of the machine's lock, as it waits: the machine may go meanwhile. */
static int vm_events(struct control_exchange *x, const json_t *params, json_t **result, struct err *err)
{
	uint64_t after = UINT64_MAX, timeout_ns;
	int rc = get_count(params, "timeout_ns", &timeout_ns, err);

	if (!rc && json_object_get(params, "after"))
		rc = get_count(params, "after", &after, err);
	if (!rc && timeout_ns > MAX_EVENT_WAIT_NS)
		rc = err_set(err, ERR_USAGE, EINVAL, "control message: `timeout_ns` is above an hour");
	*result = rc ? NULL : events_wait(x->target->events, after, timeout_ns);
	return rc;
}

static const struct method {
	const char *name;
	int (*run)(struct control_exchange *x, const json_t *params, json_t **result, struct err *err);
	bool without_machine; /* works while there is none: the guest resets, or the process ends */
	bool unlocked;	      /* and does not look at it */
} methods[] = {
	{"vm.info", vm_info, false, false},
	{"vm.pause", vm_pause, false, false},
	{"vm.resume", vm_resume_method, true, false},
	{"vm.suspend", vm_suspend, false, false},
	{"vm.power-button", vm_power_button, false, false},
	{"vm.kill", vm_kill, true, false},
	{"vm.stats", stats, false, false},
	{"vm.balloon", vm_balloon, false, false},
	{"vm.tidy", vm_tidy, true, false},
	{"vm.revert", revert, false, false},
	{"vm.events", vm_events, true, true},
	{"checkpoint.take", checkpoint_take, false, false},
	{"checkpoint.cancel", checkpoint_cancel, false, false},
	{"checkpoint.pending", checkpoint_pending, false, false},
	{"console.attach", console_attach_method, true, false},
};

int control_dispatch(struct control_exchange *x, const char *method, const json_t *params, json_t **result,
		     struct err *err)
{
	for (size_t i = 0; i < ARRAY_LENGTH(methods); i++) {
		if (strcmp(methods[i].name, method))
			continue;
		if (methods[i].unlocked)
			return methods[i].run(x, params, result, err);
		pthread_rwlock_rdlock(&x->target->machine_lock);
		bool usable = x->target->machine && !atomic_load(&x->target->ending);
		int rc = usable || methods[i].without_machine
				 ? methods[i].run(x, params, result, err)
				 : no_machine(x->target, err);
		pthread_rwlock_unlock(&x->target->machine_lock);
		return rc;
	}
	return err_set(err, ERR_USAGE, ENOSYS, "control message: unknown method '%s'", method);
}
