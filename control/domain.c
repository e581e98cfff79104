#include "control/domain.h"

#include <signal.h>

#include "base/bytes.h"
#include "control/protocol.h"
#include "machine/domain.h"
#include "machine/qemu.h"

int control_domain_convert(const char *connect, const char *source, struct buf *text, struct err *err)
{
	bool active;

	if (connect)
		return domain_fetch_to_text(connect, source, text, &active, err);
	return domain_file_to_text(source, "", text, err);
}

/* The VM's own layers over shared bases, as the machine places them. */
static void place_disks(struct store *store, struct machine_config *config)
{
	for (unsigned i = 0; i < config->disk_count; i++)
		if (!config->disks[i].path)
			config->disks[i].path = store_vm_disk_path(store_path(store), config->name, config->disks[i].name);
}

int control_domain_export(struct store *store, const char *vm, struct buf *xml, struct err *err)
{
	struct machine_config config;
	struct store_vm record;
	int rc = store_vm_get(store, vm, &record, err);

	if (rc)
		return rc;
	rc = config_read_text(vm, record.config_text, &config, err);
	if (!rc) {
		place_disks(store, &config);
		rc = domain_write(&config, record.uuid, xml, err);
		config_free(&config);
	}
	store_vm_free(&record);
	return rc;
}

/* --- domains of QEMU --- */

static void show_progress(void *opaque, const char *phase, uint64_t done, uint64_t total)
{
	const struct control_domain_take *take = opaque;
	json_t *params = json_pack("{s:s, s:I, s:I}", "phase", phase, "done_pages", (json_int_t)(done / PAGE_BYTES),
				   "total_pages", (json_int_t)(total / PAGE_BYTES));

	take->progress(take->opaque, params);
	json_decref(params);
}

static json_int_t number(uint64_t value) { return (json_int_t)value; }

static json_t *disks_to_json(const struct qemu_result *r)
{
	json_t *disks = json_array();

	/* libvirt lets requests end before it turns the disks. */
	for (uint32_t i = 0; i < r->disk_count; i++)
		json_array_append_new(disks, json_pack("{s:s, s:s, s:i, s:i}", "name", r->disks[i].disk, "layer", r->disks[i].layer, "inflight_writes", 0,
						       "inflight_reads", 0));
	return disks;
}

static json_t *taken_to_json(const struct control_domain_take *take, const struct qemu_result *r)
{
	/* QEMU does not say how long the devices' states take it. */
	json_t *pause = json_pack("{s:I, s:n, s:I, s:I, s:I}", "quiesce_ns", number(r->stop_ns), "state_ns", "disks_ns", number(r->turn_ns), "memory_ns",
				  number(r->save_ns), "resume_ns", number(r->start_ns));
	json_t *memory = json_pack("{s:I, s:I, s:I, s:I, s:n, s:n, s:n, s:n, s:I}", "total_pages", number(r->saved_pages + r->zero_pages), "saved_pages",
				   number(r->saved_pages), "zero_pages", number(r->zero_pages), "parent_pages", number(0), "cow_faults", "cow_fault_p50_ns",
				   "cow_fault_p99_ns", "cow_fault_max_ns", "written_bytes", number(r->stream_bytes));

	return json_pack("{s:s, s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:s, s:I, s:o, s:o, s:o, s:I}", "id", r->id, "vm", r->vm, "vmm", "qemu", "parent",
			 control_text_or_null(r->parent), "tag", control_text_or_null(take->tag), "message", control_text_or_null(take->message), "created",
			 control_time_to_json(r->created_wall_ns), "live", take->live, "durability", "durable", "pause_ns", number(r->pause_ns), "pause", pause, "memory",
			 memory, "disks", disks_to_json(r), "durable_ns", number(r->durable_ns));
}

int control_domain_checkpoint(struct store *store, const struct control_domain_take *take, json_t **result, struct err *err)
{
	const struct qemu_request request = {
		.connect = take->connect,
		.domain = take->domain,
		.tag = take->tag,
		.message = take->message,
		.live = take->live,
		.cancel = take->cancel,
		.progress = take->progress ? show_progress : NULL,
		.opaque = (void *)(uintptr_t)take,
	};
	struct qemu_result taken;

	/* A daemon that ends is an error of the call that finds out. */
	signal(SIGPIPE, SIG_IGN);
	int rc = qemu_checkpoint(store, &request, &taken, err);

	if (!rc)
		*result = taken_to_json(take, &taken);
	return rc;
}

int control_domain_revert(struct store *store, const char *connect, const char *id, json_t **result, struct err *err)
{
	struct qemu_revert_result back;

	signal(SIGPIPE, SIG_IGN);
	int rc = qemu_revert(store, connect, id, &back, err);

	if (!rc)
		*result = json_pack("{s:s, s:s, s:s, s:i, s:I}", "vm", back.vm, "checkpoint", id, "mode", "started", "restored_pages", 0, "revert_ns",
				    number(back.revert_ns));
	return rc;
}
