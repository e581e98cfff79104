#include "control/vm_stats.h"

#include <stdio.h>

#include "control/agent_host.h"
#include "control/periodic.h"
#include "control/tidy.h"

static json_int_t number(uint64_t value) { return (json_int_t)value; }

static void add_balloon(json_t *result, struct machine *machine)
{
	struct virtio_balloon_stats b;

	if (!machine_balloon_stats(machine, &b))
		return;
	json_object_update_new(result, json_pack("{s:I, s:I, s:I, s:I, s:I, s:I}", "balloon_target_bytes", number(b.target_bytes),
						 "balloon_bytes", number(b.balloon_bytes), "balloon_pending_bytes",
						 number(b.pending_bytes), "balloon_given_back_bytes", number(b.given_back_bytes),
						 "reported_bytes", number(b.reported_bytes), "reported_kept_bytes",
						 number(b.kept_bytes)));
}

static json_t *nets_to_json(struct machine *machine)
{
	json_t *list = json_array();
	struct machine_net_stats n;

	for (unsigned i = 0; machine_net_stats(machine, i, &n); i++) {
		char mac[18];

		snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", n.mac[0], n.mac[1], n.mac[2], n.mac[3], n.mac[4], n.mac[5]);
		json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "name", n.name, "mode", n.mode,
						      "interface", n.interface, "mac", mac, "sent_frames", number(n.traffic.sent_frames),
						      "sent_bytes", number(n.traffic.sent_bytes), "received_frames",
						      number(n.traffic.received_frames), "received_bytes", number(n.traffic.received_bytes),
						      "send_errors", number(n.traffic.send_errors), "receive_drops",
						      number(n.traffic.receive_drops), "filtered", number(n.traffic.filtered)));
	}
	return list;
}

static json_t *latency_to_json(const struct ckpt_latency *l)
{
	json_t *below = json_array();

	for (unsigned i = 0; i < CKPT_LATENCY_BUCKETS; i++)
		json_array_append_new(below, json_pack("[I, I]", number(1ull << (CKPT_LATENCY_FIRST_POWER + i)), number(l->below[i])));
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "count", number(l->count), "p50_ns", number(l->p50_ns), "p99_ns",
			 number(l->p99_ns), "p999_ns", number(l->p999_ns), "max_ns", number(l->max_ns), "sum_ns", number(l->sum_ns), "below", below);
}

static json_t *disks_to_json(struct machine *machine)
{
	json_t *list = json_array();
	struct virtio_blk_stats d;
	const char *name;

	for (unsigned i = 0; machine_disk_stats(machine, i, &name, &d); i++)
		json_array_append_new(list, json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "name", name, "reads", number(d.reads), "read_bytes",
						      number(d.read_bytes), "writes", number(d.writes), "written_bytes",
						      number(d.written_bytes), "flushes", number(d.flushes), "discards",
						      number(d.discards), "errors", number(d.errors)));
	return list;
}

/* The checkpoint or revert that is under way, or null. */
static json_t *operation_to_json(struct machine *machine)
{
	struct ckpt_progress now;

	ckpt_progress(machine_engine(machine), &now);
	if (!now.active)
		return json_null();
	return json_pack("{s:s, s:b, s:s, s:I, s:I}", "id", now.id, "revert", now.reverts, "phase", now.phase ? now.phase : "", "done_pages",
			 number(now.done_pages), "total_pages", number(now.total_pages));
}

static json_t *generation_to_json(struct machine *machine)
{
	char id[MACHINE_GENERATION_BYTES];

	machine_generation(machine, id);
	return id[0] ? json_string(id) : json_null();
}

json_t *vm_stats_to_json(struct control_target *target)
{
	struct ckpt_history history;
	struct vm_counters c;

	vm_get_counters(machine_vm(target->machine), &c);
	const struct mem *mem = vm_memory(machine_vm(target->machine));
	ckpt_history(machine_engine(target->machine), &history);
	json_t *result = json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:I, s:I, s:o, s:o}", "vm", target->name,
			    "memory_backing", config_backing_name(mem_backing(mem)), "memory_allocated_bytes",
			    number(mem_allocated_bytes(mem)), "exits",
			    number(c.exits), "io_exits", number(c.io_exits), "mmio_exits", number(c.mmio_exits), "halts",
			    number(c.halts), "signals", number(c.signals), "pause", latency_to_json(&history.pauses),
			    "cow_fault", latency_to_json(&history.cow_faults), "throttled", number(history.throttled),
			    "throttled_ns", number(history.throttled_ns), "periodic",
			    target->periodic ? periodic_to_json(target->periodic) : json_null(), "disk_layers",
			    tidy_to_json(target->tidy));
	add_balloon(result, target->machine);
	json_object_set_new(result, "nets", nets_to_json(target->machine));
	json_object_set_new(result, "disks", disks_to_json(target->machine));
	json_object_set_new(result, "written_pages_per_s", json_integer(number(history.written_pages_per_s)));
	json_object_set_new(result, "operation", operation_to_json(target->machine));
	json_object_set_new(result, "generation_id", generation_to_json(target->machine));
	json_object_set_new(result, "agent", agent_host_to_json(target->agent));
	return result;
}
