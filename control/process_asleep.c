/* A suspended VM: what waits in its place, and how it wakes. */
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>

#include "base/clock.h"
#include "base/log.h"
#include "control/identity.h"
#include "control/process_internal.h"
#include "control/sleeper.h"

/* True in *wanted: somebody wants the VM; false: it is killed. */
static int wait_asleep(struct process *process, struct sleeper *sleeper, bool *wanted, struct err *err)
{
	for (*wanted = false;;) {
		pthread_mutex_lock(&process->lock);
		enum event event = process_take_event_locked(process);
		*wanted |= process->wanted;
		process->wanted = false;
		pthread_mutex_unlock(&process->lock);
		*wanted &= event != EVENT_KILL;
		if (event == EVENT_KILL || *wanted)
			return 0;
		int rc = sleeper_wait(sleeper, process->event_fd, wanted, err);
		if (rc)
			return rc;
	}
}

/* Of all that it had it keeps what it is wanted by. */
static int keep_ports(struct process *process, struct err *err)
{
	struct store_resource *list = NULL;
	size_t count = 0, kept = 0;

	identity_list(&process->config, store_path(process->store), process->record.uuid, &list, &count);
	for (size_t i = 0; i < count; i++) {
		const char *type = list[i].type;
		struct store_resource one = list[i];

		if (strcmp(type, "uuid") && strcmp(type, "port") && strcmp(type, IDENTITY_MUX) && strcmp(type, IDENTITY_IP) && strcmp(type, "socket"))
			continue;
		list[i] = list[kept];
		list[kept++] = one;
	}
	int rc = store_resources_bind(process->store, process->config.name, list, kept, NULL, NULL, NULL, err);
	store_resources_free_list(list, count);
	return rc;
}

static int wake_up(struct process *process, struct sleeper *sleeper, struct err *err)
{
	uint64_t began = clock_now_ns();

	sleeper_stop_listening(sleeper);
	int rc = process_bind_resources(process, err);
	if (!rc)
		rc = process_build_machine(process, process->asleep_at, err);
	if (rc)
		return rc;
	atomic_store(&process->target.asleep, false);
	rc = machine_resume(process->target.machine, err);
	if (!rc)
		rc = store_vm_set_state(process->store, process->config.name, "running", err);
	log_info("awake after %.1f ms", (double)(clock_now_ns() - began) / 1e6);
	sleeper_hand_over(sleeper);
	return rc;
}

/* Until it runs again, or (*killed) is not to. What stands in the way of that, such as a device that another VM has by now, is told, and it sleeps on. */
static int sleep_once(struct process *process, bool *killed, struct err *err)
{
	struct sleeper *sleeper = NULL;
	struct err failed = ERR_INIT;
	bool wanted = false;
	int rc = keep_ports(process, err);

	if (!rc)
		rc = sleeper_create(&process->config, &sleeper, err);
	if (!rc)
		rc = wait_asleep(process, sleeper, &wanted, err);
	*killed = !rc && !wanted;
	if (!rc && wanted && wake_up(process, sleeper, &failed))
		log_error("cannot wake: %s%s%s", failed.message, failed.hint[0] ? "; " : "", failed.hint);
	sleeper_destroy(sleeper);
	return rc;
}

int process_sleep_until_wanted(struct process *process, struct err *err)
{
	bool killed = false;
	int rc = process_drop_machine(process, err);

	if (!rc)
		rc = store_vm_set_state(process->store, process->config.name, "suspended", err);
	while (!rc && !killed && !process->target.machine)
		rc = sleep_once(process, &killed, err);
	return rc;
}
