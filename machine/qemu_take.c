#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "machine/qemu_take_internal.h"

#define POLL_NS	      20000000
#define DEVICES_BYTES (64ull << 20)
#define START_SECONDS 60 /* for the processors to run again, once QEMU was told to save */

/* --- QEMU's monitor --- */

/* `command` is stolen. *result is a new reference; NULL: not wanted. */
static int qmp(struct qemu_take *take, json_t *command, int fd, json_t **result, struct err *err)
{
	CLEANUP_FREE char *text = command ? json_dumps(command, JSON_COMPACT) : NULL, *answer_text = NULL;
	const char *why = "it cannot be understood";

	json_decref(command);
	int rc = text ? libvirt_guest_command(take->guest, text, fd, &answer_text, err) : err_sys(err, ENOMEM, "QEMU");
	if (rc)
		return rc;
	json_t *answer = json_loads(answer_text, 0, NULL), *value = json_object_get(answer, "return");
	if (value && result)
		*result = json_incref(value);
	if (!value) {
		json_unpack(answer, "{s:{s:s}}", "error", "desc", &why);
		rc = err_set(err, ERR_FAILED, EIO, "domain %s: QEMU: %s", take->result->vm, why);
	}
	json_decref(answer);
	return rc;
}

static int set_capability(struct qemu_take *take, bool on, struct err *err)
{
	return qmp(take, json_pack("{s:s, s:{s:[{s:s, s:b}]}}", "execute", "migrate-set-capabilities", "arguments", "capabilities", "capability",
				   "background-snapshot", "state", on),
		   -1, NULL, err);
}

/* "" if nothing was ever saved. */
static int save_status(struct qemu_take *take, char status[32], uint64_t *left, char why[200], struct err *err)
{
	json_t *answer;
	int rc = qmp(take, json_pack("{s:s}", "execute", "query-migrate"), -1, &answer, err);

	if (rc)
		return rc;
	const char *text = json_string_value(json_object_get(answer, "status")), *desc = json_string_value(json_object_get(answer, "error-desc"));
	snprintf(status, 32, "%s", text ? text : "");
	snprintf(why, 200, "%s", desc ? desc : "it gave no reason");
	*left = (uint64_t)json_integer_value(json_object_get(json_object_get(answer, "ram"), "remaining"));
	json_decref(answer);
	return 0;
}

static bool is_over(const char *status)
{
	return !*status || !strcmp(status, "none") || !strcmp(status, "completed") || !strcmp(status, "failed") || !strcmp(status, "cancelled");
}

static int is_running(struct qemu_take *take, bool *running, struct err *err)
{
	json_t *answer;
	int rc = qmp(take, json_pack("{s:s}", "execute", "query-status"), -1, &answer, err);

	if (rc)
		return rc;
	*running = json_is_true(json_object_get(answer, "running"));
	json_decref(answer);
	return 0;
}

int qemu_check_cancel(const struct qemu_take *take, struct err *err)
{
	return take->request->cancel && *take->request->cancel ? err_set(err, ERR_FAILED, ECANCELED, "domain %s: cancelled", take->result->vm) : 0;
}

void qemu_tell(const struct qemu_take *take, const char *phase, uint64_t done, uint64_t total)
{
	if (take->request->progress)
		take->request->progress(take->request->opaque, phase, done, total);
}

static void rest(void)
{
	const struct timespec moment = {.tv_nsec = POLL_NS};

	nanosleep(&moment, NULL);
}

/* --- before anything is changed --- */

static int find_guest(struct qemu_take *take, struct err *err)
{
	const char *name;
	int rc = libvirt_open_writable(take->request->connect, &take->libvirt, err);

	if (!rc)
		rc = libvirt_guest_find(take->libvirt, take->request->domain, &take->guest, err);
	if (!rc)
		rc = libvirt_guest_state(take->guest, &take->state, err);
	if (rc)
		return rc;
	name = libvirt_guest_name(take->guest);
	rc = store_check_name("domain", name, err);
	if (rc)
		return rc;
	snprintf(take->result->vm, sizeof(take->result->vm), "%s", name);
	if (!take->state.active) {
		err_set(err, ERR_STATE, ESRCH, "domain %s: is off", name);
		return err_hint(err, "`virsh start %s`", name);
	}
	if (take->state.running)
		return 0;
	err_set(err, ERR_STATE, EBUSY, "domain %s: is paused, and a checkpoint would let it run", name);
	return err_hint(err, "`virsh resume %s`", name);
}

/* The tree of that name must be this domain's. */
static int find_parent(struct qemu_take *take, struct err *err)
{
	struct store_vm known;
	char *parent = take->result->parent;

	int rc = store_vm_lock(take->store, take->result->vm, &take->lock, err);
	if (rc)
		return rc;
	if (store_vm_get(take->store, take->result->vm, &known, NULL))
		return 0;
	if (strcmp(known.uuid, take->state.uuid) != 0) {
		err_set(err, ERR_STATE, EEXIST, "domain %s: the store has checkpoints of another VM of that name", take->result->vm);
		rc = err_hint(err, "choose another store: vmcp --store DIR");
	} else if (known.at[0] && store_pin(take->store, known.at, &take->parent_pin, NULL) == 0)
		snprintf(parent, STORE_ID_BYTES, "%s", known.at);
	store_vm_free(&known);
	return rc;
}

static int check_jobs(struct qemu_take *take, struct err *err)
{
	char status[32], why[200];
	uint64_t left;
	json_t *jobs = NULL;
	int rc = save_status(take, status, &left, why, err);

	if (!rc && !is_over(status)) {
		err_set(err, ERR_STATE, EBUSY, "domain %s: QEMU is migrating or saving it", take->result->vm);
		return err_hint(err, "`virsh domjobinfo %s` tells more", take->result->vm);
	}
	if (!rc)
		rc = qmp(take, json_pack("{s:s}", "execute", "query-block-jobs"), -1, &jobs, err);
	if (!rc && json_array_size(jobs)) {
		err_set(err, ERR_STATE, EBUSY, "domain %s: a job is at work on its disks", take->result->vm);
		rc = err_hint(err, "`virsh blockjob %s DISK` tells more", take->result->vm);
	}
	json_decref(jobs);
	return rc;
}

/* QEMU tries the kernel at once, and refuses what does not go together. */
static int ask_for_snapshots(struct qemu_take *take, struct err *err)
{
	struct err why = ERR_INIT;

	/* Off again until it is needed: whoever saves the domain otherwise must not meet it. */
	if (set_capability(take, true, &why) == 0 && set_capability(take, false, &why) == 0)
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "%s", why.message);
	return err_hint(err, "QEMU 6.0 or later and userfaultfd with write protection are needed: `sysctl vm.unprivileged_userfaultfd=1` where QEMU does not run as root. Without --live "
			     "the domain stands still while it is saved");
}

/* --- staging: the domain is not touched --- */

static int stage_disk(struct qemu_take *take, const struct qemu_disk *disk, struct err *err)
{
	struct qemu_take_disk *d = &take->disks[take->disk_count++];
	CLEANUP_FREE char *real = realpath(disk->path, NULL);
	struct store_disk_layer *layer = &d->layer;

	d->disk = disk;
	if (!real)
		return err_sys(err, errno, "%s", disk->path);
	_Static_assert(sizeof(layer->disk) == sizeof(disk->target), "both are names of disks");
	memcpy(layer->disk, disk->target, sizeof(layer->disk));
	snprintf(layer->format, sizeof(layer->format), "%s", disk->qcow2 ? "qcow2" : "raw");
	int rc = qemu_image_size(real, disk->qcow2, &layer->size_bytes, err);
	if (!rc)
		rc = store_draft_disk_layer(take->draft, layer->disk, real, layer->format, layer->layer, &d->layer_path, err);
	if (rc)
		return rc;
	d->overlay = qemu_overlay_path(disk->path, take->result->id);
	/* Before it stands on the layer. */
	rc = store_note_image(take->store, d->overlay, err);
	if (!rc)
		rc = qemu_make_overlay(d->overlay, d->layer_path, disk->qcow2, layer->size_bytes, err);
	d->made = rc == 0;
	return rc;
}

/* The space that the stream can take: a background snapshot that fails for want of it leaves the guest's memory protected (see end_saving). */
static int reserve_space(struct qemu_take *take, struct err *err)
{
	json_t *answer = NULL;
	int rc = qmp(take, json_pack("{s:s}", "execute", "query-memory-size-summary"), -1, &answer, err);
	uint64_t bytes = (uint64_t)json_integer_value(json_object_get(answer, "base-memory")) +
			 (uint64_t)json_integer_value(json_object_get(answer, "plugged-memory"));

	json_decref(answer);
	if (rc)
		return rc;
	/* Beside the pages: their numbers, memory of devices, states. */
	if (fallocate(take->fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)(bytes + bytes / 64 + DEVICES_BYTES)) == 0 || (errno != ENOSPC && errno != EDQUOT && errno != EFBIG))
		return 0;
	return err_sys(err, errno, "domain %s: the store has no space for its memory", take->result->vm);
}

static int stage(struct qemu_take *take, struct err *err)
{
	int rc = store_draft_begin(take->store, &take->draft, err);

	if (rc)
		return rc;
	snprintf(take->result->id, sizeof(take->result->id), "%s", store_draft_id(take->draft));
	rc = store_draft_memory_layer(take->draft, take->layer, &take->fd, &take->sums_fd, err);
	if (!rc)
		rc = reserve_space(take, err);
	for (unsigned i = 0; !rc && i < take->domain.disk_count; i++) {
		if (take->domain.disks[i].left_alone)
			continue;
		rc = stage_disk(take, &take->domain.disks[i], err);
		if (rc)
			err_prefix(err, "disk %s", take->domain.disks[i].target);
	}
	if (!rc)
		rc = qmp(take, json_pack("{s:s, s:{s:I}}", "execute", "migrate-set-parameters", "arguments", "max-bandwidth", (json_int_t)1 << 40), -1,
			 NULL, err);
	if (!rc)
		rc = qmp(take, json_pack("{s:s, s:{s:s}}", "execute", "getfd", "arguments", "fdname", "vmcp"), take->fd, NULL, err);
	return rc ? rc : qemu_check_cancel(take, err);
}

/* --- the pause --- */

static int describe_turn(const struct qemu_take *take, struct buf *xml, struct err *err)
{
	int rc = buf_append(xml, "<domainsnapshot><disks>", 23, err);
	unsigned k = 0;

	for (unsigned i = 0; !rc && i < take->domain.disk_count; i++) {
		const struct qemu_disk *disk = &take->domain.disks[i];
		CLEANUP_FREE char *line = NULL;

		if (disk->left_alone)
			line = xasprintf("<disk name='%s' snapshot='no'/>", disk->target);
		else {
			CLEANUP_FREE char *file = qemu_escape(take->disks[k++].overlay);

			line = xasprintf("<disk name='%s' snapshot='external' type='file'><driver type='qcow2'/><source file='%s'/></disk>", disk->target, file);
		}
		rc = buf_append(xml, line, strlen(line), err);
	}
	return rc ? rc : buf_append(xml, "</disks></domainsnapshot>", 26, err);
}

static int wait_running(struct qemu_take *take, struct err *err)
{
	uint64_t limit = clock_now_ns() + START_SECONDS * 1000000000ull, left;
	char status[32], why[200];
	bool running = false;
	int rc = 0;

	while (!rc && !running) {
		rc = is_running(take, &running, err);
		if (rc || running)
			break;
		rc = save_status(take, status, &left, why, err);
		if (!rc && is_over(status) && strcmp(status, "completed") != 0)
			rc = err_set(err, ERR_FAILED, EIO, "domain %s: QEMU cannot save it: %s", take->result->vm, why);
		if (!rc && clock_now_ns() > limit)
			rc = err_set(err, ERR_FAILED, ETIMEDOUT, "domain %s: QEMU did not begin to save it in %d s", take->result->vm, START_SECONDS);
	}
	return rc;
}

static int wait_saved(struct qemu_take *take, struct err *err)
{
	char status[32] = "", why[200];
	uint64_t left, most = 0;
	int rc = fault_check(FAULT_QEMU_SAVING, err);

	while (!rc) {
		rc = save_status(take, status, &left, why, err);
		if (!rc && !is_over(status))
			rc = qemu_check_cancel(take, err);
		if (rc || is_over(status))
			break;
		most = max_u64(most, left);
		qemu_tell(take, "memory", most - left, most);
		rest();
	}
	take->saving = rc != 0;
	if (!rc && strcmp(status, "completed") != 0)
		rc = err_set(err, ERR_FAILED, EIO, "domain %s: QEMU could not save it: %s", take->result->vm, why);
	return rc ? rc : fault_check(FAULT_QEMU_SAVED, err);
}

static int take_in_pause(struct qemu_take *take, struct err *err)
{
	CLEANUP_BUF struct buf xml = BUF_INIT;
	int rc = describe_turn(take, &xml, err);
	uint64_t begin, stopped, turned, saved, running;

	if (rc)
		return rc;
	take->capability = take->request->live;
	if (take->capability)
		rc = set_capability(take, true, err);
	else
		set_capability(take, false, NULL); /* one that was given up may have left it on */
	begin = clock_now_ns();
	take->result->created_wall_ns = clock_wall_ns();
	take->stopped = true;
	if (!rc)
		rc = libvirt_guest_suspend(take->guest, err);
	stopped = clock_now_ns();
	if (!rc && take->disk_count)
		rc = libvirt_guest_overlay(take->guest, (const char *)xml.data, err);
	/* A daemon that ended meanwhile may have turned them. */
	take->turned = take->disk_count > 0 && (!rc || !libvirt_is_alive(take->libvirt));
	if (rc)
		return rc;
	turned = clock_now_ns();
	rc = fault_check(FAULT_QEMU_TURNED, err);
	if (!rc) {
		take->saving = true;
		rc = qmp(take, json_pack("{s:s, s:{s:s}}", "execute", "migrate", "arguments", "uri", "fd:vmcp"), -1, NULL, err);
	}
	if (!rc && !take->request->live)
		rc = wait_saved(take, err);
	saved = clock_now_ns();
	if (!rc)
		rc = take->request->live ? wait_running(take, err) : libvirt_guest_resume(take->guest, err);
	if (rc)
		return rc;
	take->stopped = false;
	running = clock_now_ns();
	take->result->stop_ns = stopped - begin;
	take->result->turn_ns = turned - stopped;
	take->result->save_ns = saved - turned;
	take->result->start_ns = running - saved;
	take->result->pause_ns = running - begin;
	return 0;
}

/* --- a failure --- */

/* QEMU 7.2 forgets to release memory when a background snapshot is cancelled: the guest would stand in its next write for ever. So that is waited for. */
static void end_saving(struct qemu_take *take)
{
	char status[32] = "active", why[200];
	uint64_t left;

	if (!take->request->live)
		qmp(take, json_pack("{s:s}", "execute", "migrate_cancel"), -1, NULL, NULL);
	while (!is_over(status) && save_status(take, status, &left, why, NULL) == 0)
		rest();
}

static void turn_back(struct qemu_take *take, struct err *err)
{
	if (take->turned && !libvirt_is_alive(take->libvirt)) {
		/* Nobody is left to merge them, and nothing is lost: a chain that is longer by an image. */
		if (take->draft)
			store_draft_switched(take->draft);
		err_hint(err, "the domain goes on without it, on its overlays, and so will the next checkpoint: `systemctl start libvirtd`");
		return;
	}
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct qemu_take_disk *d = &take->disks[i];
		struct err why = ERR_INIT;

		if (take->turned && libvirt_guest_merge(take->guest, d->layer.disk, &why)) {
			/* It runs on what is there: a chain that is longer by an image, all of which stays. */
			log_error("disk %s: stays on %s: %s", d->layer.disk, d->overlay, why.message);
			if (take->draft)
				store_draft_switched(take->draft);
		} else if (d->made)
			unlink(d->overlay);
	}
}

/* The guest first. */
static void fail(struct qemu_take *take, struct err *err)
{
	bool running = false;
	struct err why = ERR_INIT;

	if (take->saving)
		end_saving(take);
	if (take->stopped && (is_running(take, &running, NULL) || !running) && libvirt_guest_resume(take->guest, &why)) {
		if (libvirt_is_alive(take->libvirt))
			log_error("domain %s: stands still: %s (`virsh resume %s` lets it run)", take->result->vm, why.message, take->result->vm);
		else
			err_hint(err, "the domain stands still, and nothing is lost: `systemctl start libvirtd`, then `virsh resume %s`", take->result->vm);
	}
	turn_back(take, err);
}

static void close_take(struct qemu_take *take)
{
	if (take->capability)
		set_capability(take, false, NULL);
	store_draft_abort(take->draft);
	for (unsigned i = 0; i < take->disk_count; i++) {
		free(take->disks[i].overlay);
		free(take->disks[i].layer_path);
	}
	if (take->fd >= 0)
		close(take->fd);
	if (take->sums_fd >= 0)
		close(take->sums_fd);
	qemu_domain_free(&take->domain);
	free(take->xml);
	store_unpin(take->parent_pin);
	store_vm_unlock(take->lock);
	libvirt_guest_free(take->guest);
	libvirt_close(take->libvirt);
}

int qemu_checkpoint(struct store *store, const struct qemu_request *request, struct qemu_result *result, struct err *err)
{
	struct qemu_take take = {.store = store, .request = request, .result = result, .fd = -1, .sums_fd = -1, .start_ns = clock_now_ns()};

	*result = (struct qemu_result){0};
	int rc = qemu_check_store(store, err);
	if (!rc)
		rc = find_guest(&take, err);
	if (!rc)
		rc = find_parent(&take, err);
	if (!rc)
		rc = check_jobs(&take, err);
	if (!rc)
		rc = libvirt_guest_xml(take.guest, false, &take.xml, err);
	if (!rc)
		rc = qemu_domain_read(result->vm, take.xml, &take.domain, err);
	if (!rc && request->live)
		rc = ask_for_snapshots(&take, err);
	if (!rc)
		rc = stage(&take, err);
	if (!rc)
		rc = take_in_pause(&take, err);
	if (!rc && request->live)
		rc = wait_saved(&take, err);
	if (!rc)
		rc = qemu_put_stream(&take, err);
	if (!rc)
		rc = qemu_measure_layers(&take, err);
	if (!rc)
		rc = qemu_commit(&take, err);
	if (rc)
		fail(&take, err);
	close_take(&take);
	return rc;
}
