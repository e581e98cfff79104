#include "tests/inflight/machine.h"

#include <fcntl.h>
#include <inttypes.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "tests/disk/sectors.h"
#include "tests/lib/check.h"
#include "vmm/dirty_log.h"

#define RINGS	 0x10000u
#define HEADERS	 0x100000u
#define STATUSES 0x110000u
#define INDIRECT 0x120000u
#define DATA	 0x400000u
#define GUEST	 0xa00000u
#define DATA_BYTES (GUEST_SECTORS * SECTOR)
#define F_FLUSH	   (1ull << 9)
#define F_MQ	   (1ull << 12)
#define UNTOUCHED  0xee
#define LOST_NS	   30000000000ull

/* --- the VM that is none: its one vCPU is the test --- */

struct mem *vm_memory(struct vm *vm) { return vm->mem; }
unsigned vm_cpus(const struct vm *vm) { return (void)vm, 1; }
void vm_quiesce_request(struct vm *vm) { (void)vm; }
int vm_quiesce_wait(struct vm *vm, struct err *err)
{
	(void)err;
	vm->standing = true;
	return 0;
}
int vm_quiesce_discard(struct vm *vm, struct err *err) { return vm_quiesce_wait(vm, err); }
void vm_resume(struct vm *vm, bool wait)
{
	(void)wait;
	vm->standing = false;
}
bool vm_is_quiesced(const struct vm *vm) { return vm->standing; }
void vm_busy_processors(const struct vm *vm, cpu_set_t *out)
{
	(void)vm;
	CPU_ZERO(out);
}
uint64_t vm_first_entry_ns(const struct vm *vm) { return (void)vm, clock_now_ns(); }
uint64_t vm_resumed_ns(const struct vm *vm) { return (void)vm, clock_now_ns(); }
void vm_fail(struct vm *vm, const struct err *err)
{
	(void)vm;
	fprintf(stderr, "%s\n", err->message);
	CHECK(!"the VM failed");
}
int vm_dirty_log_start(struct vm *vm, bool *all_set, struct err *err)
{
	(void)vm, (void)err;
	*all_set = true;
	return 0;
}
void vm_dirty_log_stop(struct vm *vm) { (void)vm; }
int vm_dirty_log_get(struct vm *vm, uint64_t *words, struct err *err)
{
	(void)err;
	for (uint64_t w = 0; w < mem_pages(vm->mem) / 64; w++)
		words[w] = atomic_load(&vm->log[w]);
	return 0;
}
int vm_dirty_log_clear(struct vm *vm, uint64_t first, uint64_t count, const uint64_t *words, struct err *err)
{
	(void)err;
	for (uint64_t w = 0; w < count; w++)
		atomic_fetch_and(&vm->log[first + w], ~words[w]);
	return 0;
}

/* --- the machine --- */

static void *at(struct machine *m, uint64_t gpa, uint64_t bytes) { return mem_at(m->rig.mem, gpa, bytes, true); }

/* Behind the guest's write, as KVM does it. */
static void touched(struct machine *m, uint64_t gpa, uint64_t bytes)
{
	for (uint64_t page = gpa / PAGE_BYTES; page <= (gpa + bytes - 1) / PAGE_BYTES; page++)
		bitmap_claim(m->vm.log, page);
}

static void touched_guest(struct machine *m) { touched(m, GUEST, sizeof(struct guest)); }

static bool ok(int r, const struct err *err, const char *what)
{
	if (r != 0)
		fprintf(stderr, "%s: %s\n", what, err->message);
	CHECK(r == 0);
	return r == 0;
}

static uint64_t rings_of(unsigned disk, unsigned queue) { return RINGS + (uint64_t)(disk * MACHINE_QUEUES + queue) * 0x10000; }

static void start_driver(struct machine *m, unsigned disk)
{
	unsigned slot = disk + 1;
	uint64_t features = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | (m->flushes ? F_FLUSH : 0) | (m->queue_count > 1 ? F_MQ : 0);
	cr_assert(rig_negotiate(&m->rig, slot, features));
	rig_msix(&m->rig, slot, m->queue_count, 1 + disk * (MACHINE_QUEUES + 1));
	for (unsigned q = 0; q < m->queue_count; q++)
		rig_queue_init(&m->rig, slot, q, 256, rings_of(disk, q), &m->guest->queues[disk][q]);
	rig_driver_ok(&m->rig, slot);
}

static void fill_at_first(struct machine *m, unsigned disk, uint64_t *random)
{
	struct cow_disk *d = m->disks[disk].disk;
	CLEANUP_FREE uint8_t *data = malloc(64 * SECTOR);
	for (uint64_t sector = 0; sector < m->disks[disk].sectors;) {
		uint64_t run = min_u64(1 + next_random(random) % 64, m->disks[disk].sectors - sector);
		uint64_t version = next_random(random) % 3 ? m->version += 2 : 0;
		for (uint64_t i = 0; i < run; i++) {
			fill_sector(data + i * SECTOR, sector + i, version);
			history_settle(m->disks[disk].history, sector + i, version);
		}
		if (version)
			CHECK(cow_write_sync(d, sector * SECTOR, data, run * SECTOR, NULL) == 0);
		sector += run;
	}
}

static bool open_disk(struct machine *m, unsigned i, const struct machine_shape *shape, uint64_t *random, struct err *err)
{
	struct cow_create create = {.size_bytes = shape->sectors * SECTOR, .cluster_bytes = shape->cluster_bytes};
	char name[16];
	snprintf(name, sizeof(name), "d%u", i);
	m->disks[i].path = xasprintf("%s/d%u.img", m->dir, i);
	m->disks[i].sectors = shape->sectors;
	m->disks[i].cluster_sectors = (shape->cluster_bytes ? shape->cluster_bytes : 4096) / SECTOR;
	m->disks[i].history = history_create(shape->sectors);
	int r = shape->cluster_bytes ? cow_create(m->disks[i].path, &create, err) : cow_create_raw(m->disks[i].path, create.size_bytes, err);
	if (r == 0)
		r = cow_open(m->io, m->disks[i].path, 0, &m->disks[i].disk, err);
	if (r == 0)
		fill_at_first(m, i, random);
	const struct virtio_blk_config config = {.name = name, .queues = m->queue_count};
	if (r == 0)
		r = virtio_blk_create(m->rig.pci, m->rig.mem, m->rig.loop, m->disks[i].disk, &config, &m->disks[i].blk, err);
	return ok(r, err, "disk");
}

static bool start_engine(struct machine *m, struct err *err)
{
	struct component components[MACHINE_DISKS];
	struct ckpt_disk disks[MACHINE_DISKS];
	char names[MACHINE_DISKS][16];
	const struct store_vm record = {.name = "m",
					.uuid = "00000000-0000-0000-0000-000000000000",
					.state = "running",
					.memory_bytes = RIG_MEMORY_BYTES,
					.cpus = 1};
	for (unsigned i = 0; i < m->disk_count; i++) {
		snprintf(names[i], sizeof(names[i]), "d%u", i);
		components[i] = virtio_blk_component(m->disks[i].blk, i);
		disks[i] = (struct ckpt_disk){.name = names[i], .disk = m->disks[i].disk, .path = m->disks[i].path, .component = i};
	}
	const struct ckpt_engine_config config = {.vm = &m->vm,
						  .io_loop = m->rig.loop,
						  .store = m->store,
						  .vm_name = record.name,
						  .vm_uuid = record.uuid,
						  .components = components,
						  .component_count = m->disk_count,
						  .disks = disks,
						  .disk_count = m->disk_count,
						  .config_text = "",
						  .parent_id = ""};
	return ok(store_vm_put(m->store, &record, err), err, "record") && ok(ckpt_engine_create(&config, &m->engine, err), err, "engine");
}

struct machine *machine_start(const struct machine_shape *shape)
{
	struct machine *m = xcalloc(1, sizeof(*m));
	struct err err = ERR_INIT;
	uint64_t random = shape->seed;
	char store[96];
	snprintf(m->dir, sizeof(m->dir), "%s/vmcp-machine-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
	cr_assert(mkdtemp(m->dir) != NULL);
	snprintf(store, sizeof(store), "%s/store", m->dir);
	rig_create(&m->rig);
	m->vm.mem = m->rig.mem;
	m->vm.log = xcalloc(mem_pages(m->rig.mem) / 64, sizeof(*m->vm.log));
	m->guest = at(m, GUEST, sizeof(*m->guest));
	m->disk_count = shape->disks;
	m->queue_count = shape->queues;
	m->flushes = !shape->without_flush;
	cr_assert(ok(cow_io_create(m->rig.loop, &m->io, &err), &err, "I/O"));
	for (unsigned i = 0; i < m->disk_count; i++)
		cr_assert(open_disk(m, i, shape, &random, &err));
	m->layer = test_layer_create(m->io, m->rig.loop, next_random(&random));
	cr_assert(ok(store_open(store, true, &m->store, &err), &err, "store"));
	cr_assert(ok(store_vm_lock(m->store, "m", &m->vm_lock, &err), &err, "lock"));
	cr_assert(start_engine(m, &err));
	loop_set_spare(m->rig.loop, (unsigned)(shape->seed % 3));
	rig_run(&m->rig);
	for (unsigned i = 0; i < m->disk_count; i++)
		start_driver(m, i);
	touched(m, 0, RIG_MEMORY_BYTES);
	return m;
}

void machine_end(struct machine *m)
{
	struct err err = ERR_INIT;
	m->vm.standing = true;
	machine_set_rules(m, NULL, 0);
	for (unsigned i = 0; i < m->disk_count; i++) {
		struct component c = virtio_blk_component(m->disks[i].blk, i);
		c.drain(c.opaque, NULL);
	}
	ckpt_engine_destroy(m->engine);
	rig_stop(&m->rig);
	for (unsigned i = 0; i < m->disk_count; i++) {
		virtio_blk_destroy(m->disks[i].blk);
		int r = cow_close(m->disks[i].disk, &err);
		CHECK(r == 0 || m->may_fail);
		history_free(m->disks[i].history);
		free(m->disks[i].path);
	}
	test_layer_destroy(m->layer);
	cow_io_destroy(m->io);
	store_vm_unlock(m->vm_lock);
	store_close(m->store);
	rig_destroy(&m->rig);
	free((void *)m->vm.log);
	file_remove_tree(AT_FDCWD, m->dir, NULL);
	free(m);
}

/* --- the block layer, from outside the I/O thread --- */

struct call {
	struct machine *m;
	const struct test_rule *rules;
	unsigned count;
};

static void set_rules(void *opaque)
{
	struct call *call = opaque;
	test_layer_set_rules(call->m->layer, call->rules, call->count);
}

static void end_some(void *opaque)
{
	struct call *call = opaque;
	for (unsigned i = 0; i < call->count; i++)
		test_layer_end_one(call->m->layer);
}

static void count_held(void *opaque)
{
	struct call *call = opaque;
	call->count = test_layer_held(call->m->layer);
}

void machine_set_rules(struct machine *m, const struct test_rule *rules, unsigned count)
{
	loop_call(m->rig.loop, set_rules, &(struct call){m, rules, count});
}

void machine_end_some(struct machine *m, unsigned count) { loop_call(m->rig.loop, end_some, &(struct call){.m = m, .count = count}); }

unsigned machine_held(struct machine *m)
{
	struct call call = {.m = m};
	loop_call(m->rig.loop, count_held, &call);
	return call.count;
}

/* A device that looks at a queue on its own does not ask for notifications (used ring, flags: bit 0). */
static bool is_looked_at(struct machine *m)
{
	for (unsigned d = 0; d < m->disk_count; d++) {
		for (unsigned q = 0; q < m->queue_count; q++) {
			const uint16_t *flags = mem_at(m->rig.mem, m->guest->queues[d][q].used, 2, false);
			if (__atomic_load_n(flags, __ATOMIC_ACQUIRE) & 1)
				return true;
		}
	}
	return false;
}

void machine_settle(struct machine *m)
{
	uint64_t until = clock_now_ns() + LOST_NS;
	rig_settle(&m->rig);
	while (is_looked_at(m) && clock_now_ns() < until)
		usleep(20);
	CHECK(!is_looked_at(m));
}

/* --- the guest --- */

static unsigned slot_index(const struct machine *m, const struct guest_slot *slot) { return (unsigned)(slot - m->guest->slots); }

static struct guest_slot *free_slot(struct machine *m)
{
	for (unsigned i = 0; i < GUEST_SLOTS; i++) {
		if (!m->guest->slots[i].busy)
			return &m->guest->slots[i];
	}
	return NULL;
}

static unsigned free_descriptor(struct machine *m, unsigned disk, unsigned queue)
{
	unsigned d = 0;
	while (d < 256 && m->guest->owner[disk][queue][d] != 0)
		d++;
	return d;
}

static bool has_data(uint32_t type) { return type == GUEST_READ || type == GUEST_WRITE; }

static void fill_request(struct machine *m, const struct guest_slot *slot)
{
	unsigned i = slot_index(m, slot);
	uint8_t *header = at(m, HEADERS + 16 * i, 16), *data = at(m, DATA + (uint64_t)DATA_BYTES * i, DATA_BYTES);
	put_le32(header, slot->type);
	put_le32(header + 4, 0);
	put_le64(header + 8, has_data(slot->type) ? slot->sector : 0);
	*(uint8_t *)at(m, STATUSES + i, 1) = UNTOUCHED;
	memset(data, UNTOUCHED, DATA_BYTES);
	for (uint64_t s = 0; s < slot->count && slot->type == GUEST_WRITE; s++)
		fill_sector(data + s * SECTOR, slot->sector + s, slot->version);
	if (slot->type == GUEST_DISCARD || slot->type == GUEST_ZEROES) {
		put_le64(data, slot->sector);
		put_le32(data + 8, (uint32_t)slot->count);
		put_le32(data + 12, slot->type == GUEST_ZEROES && slot->version % 4 != 0);
	}
	touched(m, HEADERS + 16 * i, 16);
	touched(m, STATUSES + i, 1);
	touched(m, DATA + (uint64_t)DATA_BYTES * i, DATA_BYTES);
}

/* Header, data in two pieces, status, in a table of its own. */
static void fill_table(struct machine *m, const struct guest_slot *slot)
{
	unsigned i = slot_index(m, slot), n = 0;
	uint64_t table = INDIRECT + 128 * i, data = DATA + (uint64_t)DATA_BYTES * i;
	uint32_t bytes = slot->type == GUEST_FLUSH ? 0 : has_data(slot->type) ? (uint32_t)slot->count * SECTOR : 16;
	uint32_t cut = bytes > 512 ? 512u - 8u * (i % 3) : 0;
	uint16_t write = slot->type == GUEST_READ ? 2 : 0;
	rig_descriptor(&m->rig, table, n, HEADERS + 16 * i, 16, 1, (uint16_t)(n + 1));
	n++;
	if (cut) {
		rig_descriptor(&m->rig, table, n, data, cut, write | 1, (uint16_t)(n + 1));
		n++;
	}
	if (bytes) {
		rig_descriptor(&m->rig, table, n, data + cut, bytes - cut, write | 1, (uint16_t)(n + 1));
		n++;
	}
	rig_descriptor(&m->rig, table, n, STATUSES + i, 1, 2, 0);
	rig_descriptor(&m->rig, m->guest->queues[slot->disk][slot->queue].desc, slot->descriptor, table, 16 * (n + 1), 4, 0);
}

static void note_issue(struct machine *m, struct guest_slot *slot)
{
	struct history *h = m->disks[slot->disk].history;
	slot->since = history_moment(h);
	if (slot->type == GUEST_READ || slot->type == GUEST_FLUSH)
		return;
	slot->number = history_begin(h,
				     slot->type == GUEST_WRITE	   ? HISTORY_WRITE
				     : slot->type == GUEST_DISCARD ? HISTORY_DISCARD
								   : HISTORY_ZEROES,
				     slot->sector, slot->count, slot->version);
}

struct guest_slot *guest_offer(struct machine *m, unsigned disk, unsigned queue, enum guest_type type, uint64_t sector, uint64_t count,
			       bool quiet)
{
	struct guest *g = m->guest;
	struct guest_slot *slot = free_slot(m);
	unsigned descriptor = free_descriptor(m, disk, queue);
	if (!slot || descriptor == 256)
		return NULL;
	*slot = (struct guest_slot){
		.busy = true,
		.quiet = quiet,
		.disk = (uint8_t)disk,
		.queue = (uint8_t)queue,
		.descriptor = (uint16_t)descriptor,
		.type = type,
		.sector = sector,
		.count = count,
		.version = m->version += 2,
	};
	g->owner[disk][queue][descriptor] = (uint16_t)(slot_index(m, slot) + 1);
	g->busy++;
	g->issued++;
	g->untold[disk][queue] = true;
	if (!quiet)
		note_issue(m, slot);
	fill_request(m, slot);
	fill_table(m, slot);
	touched(m, INDIRECT + 128 * slot_index(m, slot), 128);
	rig_offer(&g->queues[disk][queue], slot->descriptor);
	touched(m, rings_of(disk, queue), 0x2000);
	touched_guest(m);
	return slot;
}

void guest_notify(struct machine *m)
{
	for (unsigned i = 0; i < GUEST_SLOTS; i++) {
		struct guest_slot *slot = &m->guest->slots[i];
		if (slot->busy && slot->quiet)
			note_issue(m, slot);
		slot->quiet = false;
	}
	for (unsigned d = 0; d < m->disk_count; d++) {
		for (unsigned q = 0; q < m->queue_count; q++) {
			if (m->guest->untold[d][q])
				rig_kick(&m->guest->queues[d][q]);
			m->guest->untold[d][q] = false;
		}
	}
	touched_guest(m);
}

void machine_check_sectors(struct machine *m, const char *what, unsigned disk, const uint8_t *data, uint64_t sector, uint64_t count,
			   uint64_t from, uint64_t moment)
{
	const struct history *h = m->disks[disk].history;
	for (uint64_t i = 0; i < count; i++) {
		uint64_t version;
		bool whole = read_version(data + i * SECTOR, sector + i, &version);
		bool allowed = whole && history_allows(h, sector + i, version, from, moment);
		CHECK(allowed);
		if (allowed)
			continue;
		fprintf(stderr, "%s: disk %u, sector %" PRIu64 ": %s version %" PRIu64 ", read from %" PRIu64 ", moment %" PRIu64 "\n", what, disk,
			sector + i, whole ? "whole" : "torn", version, from, moment);
		history_print(h, sector + i);
		break;
	}
}

/* The first to see it notes what it saw, and those that go back must see the same. */
static void check_outcome(struct machine *m, unsigned i, const struct outcome *outcome)
{
	const struct outcome *first = &m->outcomes[i];
	if (!m->comparing) {
		m->outcomes[i] = *outcome;
		return;
	}
	CHECK(first->status == outcome->status);
	CHECK(first->written == outcome->written);
	CHECK(first->data == outcome->data);
}

static void complete(struct machine *m, struct guest_slot *slot, uint32_t written)
{
	unsigned i = slot_index(m, slot);
	uint8_t status = *(uint8_t *)at(m, STATUSES + i, 1);
	const uint8_t *data = at(m, DATA + (uint64_t)DATA_BYTES * i, DATA_BYTES);
	uint64_t moment = m->disks[slot->disk].moment;
	bool before = slot->since < moment, good = status == 0, again = m->comparing && m->outcomes[i].seen;
	bool read = slot->type == GUEST_READ && good;
	CHECK(good || (m->may_fail && status == 1));
	CHECK(written == (slot->type == GUEST_READ ? slot->count * SECTOR : 0) + 1);
	if (read && !again)
		machine_check_sectors(m, "read", slot->disk, data, slot->sector, slot->count, slot->since, before ? moment : HISTORY_ALL);
	else if (slot->type != GUEST_READ && slot->type != GUEST_FLUSH && !again)
		history_end(m->disks[slot->disk].history, slot->number, good);
	if (before || again)
		check_outcome(m, i, &(struct outcome){true, status, written, read ? XXH64(data, slot->count * SECTOR, 0) : 0});
	m->guest->owner[slot->disk][slot->queue][slot->descriptor] = 0;
	slot->busy = false;
	m->guest->busy--;
	m->guest->completed++;
}

static unsigned reap_queue(struct machine *m, unsigned disk, unsigned queue)
{
	struct rig_queue *q = &m->guest->queues[disk][queue];
	unsigned n = 0;
	while (__atomic_load_n((uint16_t *)at(m, q->used + 2, 2), __ATOMIC_ACQUIRE) != q->seen) {
		uint32_t written, id = rig_used_id(q, q->seen++, &written);
		unsigned owner = id < 256 ? m->guest->owner[disk][queue][id] : 0;
		CHECK(owner != 0); /* else it is not in flight: completed twice, or never issued */
		if (owner != 0)
			complete(m, &m->guest->slots[owner - 1], written);
		n++;
	}
	return n;
}

unsigned guest_reap(struct machine *m)
{
	unsigned n = 0;
	for (unsigned d = 0; d < m->disk_count; d++) {
		for (unsigned q = 0; q < m->queue_count; q++)
			n += reap_queue(m, d, q);
	}
	if (n > 0)
		touched_guest(m);
	return n;
}

bool guest_drain(struct machine *m)
{
	uint64_t until = clock_now_ns() + LOST_NS;
	guest_notify(m);
	while (m->guest->busy > 0 && clock_now_ns() < until) {
		if (guest_reap(m) == 0)
			usleep(20);
	}
	CHECK(m->guest->busy == 0);
	CHECK(m->guest->issued == m->guest->completed);
	return m->guest->busy == 0;
}

/* --- what the disks hold --- */

struct reading {
	struct cow_disk *disk;
	struct cow_request request;
	struct iovec iov;
	_Atomic bool done;
	int result;
};

static void read_done(struct cow_request *request, int result)
{
	struct reading *r = request->opaque;
	r->result = result;
	atomic_store(&r->done, true);
}

static void read_start(void *opaque)
{
	struct reading *r = opaque;
	cow_submit(r->disk, &r->request);
}

uint8_t *machine_read_disk(struct machine *m, unsigned disk)
{
	uint64_t bytes = m->disks[disk].sectors * SECTOR;
	struct reading r = {.disk = m->disks[disk].disk, .iov = {malloc(bytes), bytes}};
	r.request = (struct cow_request){.op = COW_READ, .length = bytes, .iov = &r.iov, .iov_count = 1, .done = read_done, .opaque = &r};
	loop_call(m->rig.loop, read_start, &r);
	while (!atomic_load(&r.done))
		usleep(20);
	CHECK(r.result == 0);
	return r.iov.iov_base;
}

/* Its history begins anew, with this content. */
static void settle_disk(struct machine *m, unsigned disk, const uint8_t *data)
{
	struct history *h = m->disks[disk].history;
	history_forget(h);
	for (uint64_t s = 0; s < m->disks[disk].sectors; s++) {
		uint64_t version = 0;
		read_version(data + s * SECTOR, s, &version);
		history_settle(h, s, version);
	}
}

void machine_check_disks(struct machine *m)
{
	for (unsigned d = 0; d < m->disk_count; d++) {
		CLEANUP_FREE uint8_t *data = machine_read_disk(m, d);
		machine_check_sectors(m, "disk", d, data, 0, m->disks[d].sectors, HISTORY_ALL, HISTORY_ALL);
		settle_disk(m, d, data);
	}
}

void machine_mark(struct machine *m)
{
	for (unsigned d = 0; d < m->disk_count; d++)
		m->disks[d].moment = history_moment(m->disks[d].history);
	memset(m->outcomes, 0, sizeof(m->outcomes));
	m->comparing = false;
}

/* The guest is where it was at the mark; layers[i] is what the checkpoint, and so disk i, holds. */
static void went_back(struct machine *m, uint8_t *const layers[MACHINE_DISKS])
{
	for (unsigned d = 0; d < m->disk_count; d++) {
		settle_disk(m, d, layers[d]);
		m->disks[d].moment = 0;
	}
	m->comparing = true;
}

void machine_end_everything(struct machine *m)
{
	machine_set_rules(m, NULL, 0);
	guest_drain(m);
}

void machine_check_layers(struct machine *m, const char *checkpoint, uint8_t *layers[MACHINE_DISKS])
{
	struct store_checkpoint c;
	struct cow_io *io;
	struct err err = ERR_INIT;
	if (!ok(store_checkpoint_get(m->store, checkpoint, &c, &err), &err, "checkpoint") || !ok(cow_io_create(NULL, &io, &err), &err, "I/O"))
		abort();
	for (unsigned d = 0; d < m->disk_count; d++) {
		struct cow_disk *disk;
		CLEANUP_FREE char *path = NULL;
		layers[d] = malloc(m->disks[d].sectors * SECTOR);
		if (!ok(store_disk_layer_path(m->store, c.disks[d].layer, c.disks[d].format, &path, &err), &err, "layer") ||
		    !ok(cow_open(io, path, COW_OPEN_READONLY | COW_OPEN_NO_LOCK, &disk, &err), &err, "layer"))
			abort();
		CHECK(cow_read_sync(disk, 0, layers[d], m->disks[d].sectors * SECTOR, &err) == 0);
		cow_close(disk, NULL);
		machine_check_sectors(m, "layer", d, layers[d], 0, m->disks[d].sectors, HISTORY_ALL, m->disks[d].moment);
	}
	cow_io_destroy(io);
	store_checkpoint_free(&c);
}

/* Each queue in which something was in flight has told the guest. */
static void check_interrupts(struct machine *m, const unsigned before[64])
{
	for (unsigned i = 0; i < GUEST_SLOTS; i++) {
		const struct guest_slot *slot = &m->guest->slots[i];
		unsigned vector = 1u + slot->disk * (MACHINE_QUEUES + 1u) + slot->queue + 1u;
		CHECK(!slot->busy || slot->quiet || atomic_load(&m->rig.msis[vector]) > before[vector]);
	}
}

unsigned machine_go_back(struct machine *m, const char *checkpoint, uint8_t *const layers[MACHINE_DISKS])
{
	static const struct test_rule hold = {.kinds = RULE_ALL, .hold = true};
	struct ckpt_revert_result reverted;
	struct err err = ERR_INIT;
	unsigned msis[64], again = 0;
	machine_set_rules(m, &hold, 1);
	for (unsigned v = 0; v < 64; v++)
		msis[v] = atomic_load(&m->rig.msis[v]);
	if (!ok(ckpt_revert(m->engine, checkpoint, true, &reverted, &err), &err, "revert"))
		return 0;
	went_back(m, layers);
	check_interrupts(m, msis);
	guest_notify(m);
	machine_settle(m);
	guest_reap(m);
	for (unsigned i = 0; i < GUEST_SLOTS; i++) {
		again += m->guest->slots[i].busy;
		CHECK(!m->guest->slots[i].busy || !m->outcomes[i].seen);
	}
	machine_end_everything(m);
	machine_check_disks(m);
	m->comparing = false;
	return again;
}
