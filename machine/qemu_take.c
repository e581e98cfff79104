#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/file_sum.h"
#include "checkpoint/index.h"
#include "checkpoint/sums.h"
#include "machine/qemu_internal.h"
#include "vmm/memory.h"
#include "vmm/vm.h"

#define MEMORY_STEP  (2ull << 20)
#define POLL_NS	     20000000
#define START_SECONDS 60 /* for the processors to run again, once QEMU was told to save */
#define READ_PAGES   256u

struct disk {
	const struct qemu_disk *disk;
	struct store_disk_layer layer;
	char *overlay, *layer_path;
	bool made;
};

struct take {
	struct store *store;
	const struct qemu_request *request;
	struct qemu_result *result;
	struct libvirt *libvirt;
	struct libvirt_guest *guest;
	struct store_vm_lock *lock;
	struct store_pin *parent_pin;
	struct store_draft *draft;
	struct qemu_domain domain;
	struct libvirt_guest_state state;
	char *xml; /* as it ran before */
	struct disk disks[CONFIG_MAX_DISKS];
	unsigned disk_count;
	char layer[STORE_ID_BYTES];
	int fd, sums_fd;
	uint64_t start_ns, pages;
	bool capability, stopped, turned, saving;
};

/* --- QEMU's monitor --- */

/* `command` is stolen. *result is a new reference; NULL: not wanted. */
static int qmp(struct take *take, json_t *command, int fd, json_t **result, struct err *err)
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

static int set_capability(struct take *take, bool on, struct err *err)
{
	return qmp(take, json_pack("{s:s, s:{s:[{s:s, s:b}]}}", "execute", "migrate-set-capabilities", "arguments", "capabilities", "capability",
				   "background-snapshot", "state", on),
		   -1, NULL, err);
}

/* "" if nothing was ever saved. */
static int save_status(struct take *take, char status[32], uint64_t *left, char why[200], struct err *err)
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

static int is_running(struct take *take, bool *running, struct err *err)
{
	json_t *answer;
	int rc = qmp(take, json_pack("{s:s}", "execute", "query-status"), -1, &answer, err);

	if (rc)
		return rc;
	*running = json_is_true(json_object_get(answer, "running"));
	json_decref(answer);
	return 0;
}

static int check_cancel(const struct take *take, struct err *err)
{
	return take->request->cancel && *take->request->cancel ? err_set(err, ERR_FAILED, ECANCELED, "domain %s: cancelled", take->result->vm) : 0;
}

static void tell(const struct take *take, const char *phase, uint64_t done, uint64_t total)
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

static int find_guest(struct take *take, struct err *err)
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
	err_set(err, ERR_STATE, EBUSY, "domain %s: is paused, and QEMU's way of saving would let it run", name);
	return err_hint(err, "`virsh resume %s`", name);
}

/* The tree of that name must be this domain's. */
static int find_parent(struct take *take, struct err *err)
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

static int check_jobs(struct take *take, struct err *err)
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
static int ask_for_snapshots(struct take *take, struct err *err)
{
	struct err why = ERR_INIT;

	/* Off again until it is needed: whoever saves the domain otherwise must not meet it. */
	if (set_capability(take, true, &why) == 0 && set_capability(take, false, &why) == 0)
		return 0;
	err_set(err, ERR_HOST, ENOTSUP, "%s", why.message);
	return err_hint(err, "QEMU 6.0 or later needs userfaultfd with write protection: `sysctl vm.unprivileged_userfaultfd=1` where it does not run as root (docs/libvirt.md)");
}

/* --- staging: the domain is not touched --- */

static int stage_disk(struct take *take, const struct qemu_disk *disk, struct err *err)
{
	struct disk *d = &take->disks[take->disk_count++];
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

/* What QEMU may do with the image it may do with the overlay. */
static int hand_over(const struct disk *d, struct err *err)
{
	struct stat st;

	if (stat(d->disk->path, &st) || chown(d->overlay, st.st_uid, st.st_gid) || chmod(d->overlay, st.st_mode & 0777))
		return err_sys(err, errno, "%s: owner and mode of the image", d->overlay);
	return 0;
}

static int stage(struct take *take, struct err *err)
{
	int rc = store_draft_begin(take->store, &take->draft, err);

	if (rc)
		return rc;
	snprintf(take->result->id, sizeof(take->result->id), "%s", store_draft_id(take->draft));
	rc = store_draft_memory_layer(take->draft, take->layer, &take->fd, &take->sums_fd, err);
	for (unsigned i = 0; !rc && i < take->domain.disk_count; i++) {
		if (take->domain.disks[i].left_alone)
			continue;
		rc = stage_disk(take, &take->domain.disks[i], err);
		if (!rc)
			rc = hand_over(&take->disks[take->disk_count - 1], err);
		if (rc)
			err_prefix(err, "disk %s", take->domain.disks[i].target);
	}
	if (!rc)
		rc = qmp(take, json_pack("{s:s, s:{s:I}}", "execute", "migrate-set-parameters", "arguments", "max-bandwidth", (json_int_t)1 << 40), -1,
			 NULL, err);
	if (!rc)
		rc = qmp(take, json_pack("{s:s, s:{s:s}}", "execute", "getfd", "arguments", "fdname", "vmcp"), take->fd, NULL, err);
	return rc ? rc : check_cancel(take, err);
}

/* --- the pause --- */

static int describe_turn(const struct take *take, struct buf *xml, struct err *err)
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

static int wait_running(struct take *take, struct err *err)
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

static int take_in_pause(struct take *take, struct err *err)
{
	CLEANUP_BUF struct buf xml = BUF_INIT;
	int rc = describe_turn(take, &xml, err);
	uint64_t begin, stopped, turned, running;

	if (rc)
		return rc;
	take->capability = true;
	rc = set_capability(take, true, err);
	begin = clock_now_ns();
	take->result->created_wall_ns = clock_wall_ns();
	take->stopped = true;
	if (!rc)
		rc = libvirt_guest_suspend(take->guest, err);
	stopped = clock_now_ns();
	if (!rc && take->disk_count)
		rc = libvirt_guest_overlay(take->guest, (const char *)xml.data, err);
	if (rc)
		return rc;
	take->turned = take->disk_count > 0;
	turned = clock_now_ns();
	rc = fault_check(FAULT_QEMU_TURNED, err);
	if (!rc) {
		take->saving = true;
		rc = qmp(take, json_pack("{s:s, s:{s:s}}", "execute", "migrate", "arguments", "uri", "fd:vmcp"), -1, NULL, err);
	}
	if (!rc)
		rc = wait_running(take, err);
	if (rc)
		return rc;
	take->stopped = false;
	running = clock_now_ns();
	take->result->stop_ns = stopped - begin;
	take->result->turn_ns = turned - stopped;
	take->result->start_ns = running - turned;
	take->result->pause_ns = running - begin;
	return 0;
}

static int wait_saved(struct take *take, struct err *err)
{
	char status[32] = "", why[200];
	uint64_t left, most = 0;
	int rc;

	for (;;) {
		rc = save_status(take, status, &left, why, err);
		if (!rc && !is_over(status))
			rc = check_cancel(take, err);
		if (rc || is_over(status))
			break;
		most = max_u64(most, left);
		tell(take, "memory", most - left, most);
		rest();
	}
	take->saving = rc != 0;
	if (!rc && strcmp(status, "completed") != 0)
		rc = err_set(err, ERR_FAILED, EIO, "domain %s: QEMU could not save it: %s", take->result->vm, why);
	return rc ? rc : fault_check(FAULT_QEMU_SAVED, err);
}

/* --- persist --- */

struct maps {
	uint64_t *scope, *saved, *zero, *sums;
};

static int read_back(struct take *take, const struct maps *maps, struct err *err)
{
	uint64_t file_pages = div_round_up(take->result->stream_bytes, PAGE_BYTES);
	CLEANUP_FREE uint8_t *data = malloc(READ_PAGES * PAGE_BYTES);
	int rc = data ? 0 : err_sys(err, ENOMEM, "checksums");

	for (uint64_t page = 0; page < take->pages; page++)
		maps->scope[page / 64] |= 1ull << (page % 64);
	for (uint64_t at = 0, n; !rc && at < file_pages; at += n) {
		n = min_u64(READ_PAGES, file_pages - at);
		rc = file_pread_full(take->fd, data, n * PAGE_BYTES, at * PAGE_BYTES, err);
		for (uint64_t i = 0; !rc && i < n; i++) {
			const uint8_t *page = data + i * PAGE_BYTES;
			uint64_t number = at + i, bit = 1ull << (number % 64);

			if (bytes_are_zero(page, PAGE_BYTES)) {
				maps->zero[number / 64] |= bit;
				continue;
			}
			maps->saved[number / 64] |= bit;
			maps->sums[number] = page_sum(number, page);
			take->result->saved_pages++;
		}
		tell(take, "checksums", at * PAGE_BYTES, take->result->stream_bytes);
		rc = rc ? rc : check_cancel(take, err);
	}
	for (uint64_t page = file_pages; page < take->pages; page++)
		maps->zero[page / 64] |= 1ull << (page % 64);
	take->result->zero_pages = take->pages - take->result->saved_pages;
	return rc;
}

static int put_index(struct take *take, const struct maps *maps, struct err *err)
{
	const struct page_index_saved saved = {take->layer, maps->scope, (const _Atomic uint64_t *)maps->zero};
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct page_index index = {0};
	int rc = page_sums_write(take->sums_fd, maps->saved, NULL, maps->sums, take->pages, err);

	if (!rc)
		rc = page_index_build(&index, &saved, NULL, take->pages, err);
	if (!rc)
		rc = page_index_encode(&index, &text, err);
	page_index_free(&index);
	return rc ? rc : store_draft_put(take->draft, "index", text.data, text.length, err);
}

/* The stream as pages of a layer: its length is rounded up to what memory of a VM may have. */
static int put_stream(struct take *take, struct err *err)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	struct stat st;

	if (fstat(take->fd, &st) || ftruncate(take->fd, (off_t)round_up((uint64_t)st.st_size, PAGE_BYTES)))
		return err_sys(err, errno, "layer of the stream");
	take->result->stream_bytes = (uint64_t)st.st_size;
	take->pages = max_u64(round_up((uint64_t)st.st_size, MEMORY_STEP), MEM_MIN_BYTES) / PAGE_BYTES;
	size_t words = (size_t)div_round_up(take->pages, 64);
	CLEANUP_FREE uint64_t *bits = calloc(3 * words, sizeof(uint64_t)), *sums = calloc(take->pages, sizeof(uint64_t));
	if (!bits || !sums)
		return err_sys(err, ENOMEM, "map of %llu pages", (unsigned long long)take->pages);
	const struct maps maps = {bits, bits + words, bits + 2 * words, sums};
	int rc = read_back(take, &maps, err);
	if (!rc)
		rc = put_index(take, &maps, err);
	if (!rc)
		rc = qemu_state_encode(take->xml, take->result->stream_bytes, &state, err);
	return rc ? rc : store_draft_put(take->draft, "state", state.data, state.length, err);
}

static int measure_layers(struct take *take, struct err *err)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct disk *d = &take->disks[i];
		CLEANUP_CLOSE int fd = open(d->layer_path, O_RDONLY | O_CLOEXEC);
		struct stat st;

		if (fd < 0 || fstat(fd, &st) || fsync(fd))
			return err_sys(err, errno, "%s", d->layer_path);
		d->layer.file_bytes = (uint64_t)st.st_size;
		int rc = file_sum(fd, d->layer.file_bytes, NULL, NULL, &d->layer.xxh3, err);
		if (rc)
			return err_prefix(err, "disk %s: layer", d->layer.disk);
		take->result->disks[i] = d->layer;
	}
	take->result->disk_count = take->disk_count;
	return 0;
}

/* What lists, imports and exports know a checkpoint's machine by. */
static int describe_machine(const struct take *take, char **text, struct err *err)
{
	struct machine_config config = {.memory_bytes = take->pages * PAGE_BYTES, .cpus = (unsigned)min_u64(max_u64(take->domain.cpus, 1), VM_MAX_CPUS), .qemu = true};
	CLEANUP_BUF struct buf out = BUF_INIT;

	snprintf(config.name, sizeof(config.name), "%s", take->result->vm);
	config.source = xstrdup("");
	config.cmdline = xstrdup("");
	config.cpu_model = xstrdup("host");
	config.libvirt = xstrdup("");
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct config_disk *disk = &config.disks[config.disk_count++];

		snprintf(disk->name, sizeof(disk->name), "%s", take->disks[i].layer.disk);
		disk->path = xstrdup(take->disks[i].disk->path);
	}
	int rc = config_to_text(&config, &out, err);
	if (!rc)
		rc = buf_append(&out, NULL, 1, err);
	config_free(&config);
	if (!rc)
		*text = xstrdup((const char *)out.data);
	return rc;
}

static int put_record(const struct take *take, const char *text, struct err *err)
{
	struct store_vm vm = {.memory_bytes = take->pages * PAGE_BYTES, .cpus = take->domain.cpus, .started_wall_ns = clock_wall_ns()};

	snprintf(vm.name, sizeof(vm.name), "%s", take->result->vm);
	snprintf(vm.uuid, sizeof(vm.uuid), "%s", take->state.uuid);
	snprintf(vm.at, sizeof(vm.at), "%s", take->result->parent);
	snprintf(vm.state, sizeof(vm.state), "stopped");
	vm.config_text = xstrdup(text);
	int rc = store_vm_put(take->store, &vm, err);
	free(vm.config_text);
	if (!rc)
		rc = store_vm_set_note(take->store, vm.name, "a domain of libvirt, which vmcp does not run", err);
	return rc;
}

static int commit(struct take *take, struct err *err)
{
	struct qemu_result *result = take->result;
	struct store_checkpoint checkpoint = {.created_wall_ns = result->created_wall_ns, .live = true};
	struct stat st;
	int rc = describe_machine(take, &checkpoint.config_text, err);

	if (!rc)
		rc = put_record(take, checkpoint.config_text, err);
	if (!rc)
		rc = fault_check(FAULT_QEMU_BEFORE_COMMIT, err);
	if (rc) {
		free(checkpoint.config_text);
		return rc;
	}
	checkpoint.memory_bytes = take->pages * PAGE_BYTES;
	checkpoint.saved_pages = result->saved_pages;
	checkpoint.zero_pages = result->zero_pages;
	checkpoint.written_bytes = result->stream_bytes;
	checkpoint.pause_ns = result->pause_ns;
	checkpoint.durable_ns = clock_now_ns() - take->start_ns;
	checkpoint.cpus = take->domain.cpus;
	checkpoint.disk_count = take->disk_count;
	checkpoint.disks = xcalloc(take->disk_count + 1, sizeof(*checkpoint.disks));
	checkpoint.message = take->request->message ? xstrdup(take->request->message) : NULL;
	checkpoint.size_bytes = fstat(take->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
	snprintf(checkpoint.id, sizeof(checkpoint.id), "%s", result->id);
	snprintf(checkpoint.parent, sizeof(checkpoint.parent), "%s", result->parent);
	snprintf(checkpoint.vm, sizeof(checkpoint.vm), "%s", result->vm);
	snprintf(checkpoint.vm_uuid, sizeof(checkpoint.vm_uuid), "%s", take->state.uuid);
	snprintf(checkpoint.tag, sizeof(checkpoint.tag), "%s", take->request->tag ? take->request->tag : "");
	snprintf(checkpoint.memory_layer, sizeof(checkpoint.memory_layer), "%s", take->layer);
	for (unsigned i = 0; i < take->disk_count; i++) {
		checkpoint.disks[i] = take->disks[i].layer;
		checkpoint.size_bytes += stat(take->disks[i].layer_path, &st) ? 0 : (uint64_t)st.st_blocks * 512;
	}
	struct store_draft *draft = take->draft;
	take->draft = NULL; /* freed in every case */
	rc = store_draft_commit(draft, &checkpoint, err);
	store_checkpoint_free(&checkpoint);
	result->durable_ns = clock_now_ns() - take->start_ns;
	return rc;
}

/* --- a failure --- */

static void end_saving(struct take *take)
{
	char status[32] = "active", why[200];
	uint64_t left;

	qmp(take, json_pack("{s:s}", "execute", "migrate_cancel"), -1, NULL, NULL);
	while (!is_over(status) && save_status(take, status, &left, why, NULL) == 0)
		rest();
}

static void turn_back(struct take *take)
{
	for (unsigned i = 0; i < take->disk_count; i++) {
		struct disk *d = &take->disks[i];
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
static void fail(struct take *take)
{
	bool running = false;
	struct err why = ERR_INIT;

	if (take->saving)
		end_saving(take);
	if (take->stopped && (is_running(take, &running, NULL) || !running) && libvirt_guest_resume(take->guest, &why))
		log_error("domain %s: stands still: %s (`virsh resume %s` lets it run)", take->result->vm, why.message, take->result->vm);
	turn_back(take);
}

static void close_take(struct take *take)
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
	struct take take = {.store = store, .request = request, .result = result, .fd = -1, .sums_fd = -1, .start_ns = clock_now_ns()};

	*result = (struct qemu_result){0};
	int rc = find_guest(&take, err);
	if (!rc)
		rc = find_parent(&take, err);
	if (!rc)
		rc = check_jobs(&take, err);
	if (!rc)
		rc = libvirt_guest_xml(take.guest, false, &take.xml, err);
	if (!rc)
		rc = qemu_domain_read(result->vm, take.xml, &take.domain, err);
	if (!rc)
		rc = ask_for_snapshots(&take, err);
	if (!rc)
		rc = stage(&take, err);
	if (!rc)
		rc = take_in_pause(&take, err);
	if (!rc)
		rc = wait_saved(&take, err);
	if (!rc)
		rc = put_stream(&take, err);
	if (!rc)
		rc = measure_layers(&take, err);
	if (!rc)
		rc = commit(&take, err);
	if (rc)
		fail(&take);
	close_take(&take);
	return rc;
}
