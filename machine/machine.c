#include "machine/machine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/event.h"
#include "base/log.h"
#include "checkpoint/scheduling.h"
#include "devices/acpi_pm.h"
#include "devices/pci.h"
#include "devices/rtc.h"
#include "devices/serial.h"
#include "devices/virtio_balloon.h"
#include "devices/virtio_blk.h"
#include "devices/virtio_rng.h"
#include "devices/virtio_vsock.h"
#include "machine/machine_internal.h"
#include "machine/slots.h"
#include "vmm/acpi.h"
#include "vmm/boot.h"
#include "vmm/memory_guard.h"

#define MAX_COMPONENTS (VM_MAX_CPUS + CONFIG_MAX_DISKS + CONFIG_MAX_NETS + 16)
#define FIRST_ENTRY_WAIT_NS 1000000000ull
#define PERIODIC_PATIENCE_NS 1000000000ull

struct disk {
	const struct config_disk *config;
	struct cow_disk *image;
	struct virtio_blk *device;
	unsigned component; /* its index in the engine's list */
};

struct machine {
	const struct machine_options options; /* immutable */
	struct loop *loop;
	pthread_t io_thread;
	bool io_thread_runs;
	struct cow_io *io;
	struct vm *vm;
	struct pci_bus *pci;
	struct serial *serial;
	struct rtc *rtc;
	struct acpi_pm *pm;
	struct virtio_rng *rng;
	struct virtio_balloon *balloon;
	struct virtio_vsock *vsock;
	struct disk disks[CONFIG_MAX_DISKS];
	unsigned disk_count;
	struct machine_net nets[CONFIG_MAX_NETS];
	unsigned net_count;
	struct ckpt_engine *engine;
	pthread_mutex_t turn; /* held by whoever stops or starts the VM */
	bool deaf;	      /* under turn: its cards of mode group hear nothing yet */
	_Atomic bool paused;  /* changed under turn: by the user's wish */
	/* Held, before the turn, from a checkpoint's request to its result: the engine keeps only the last result. */
	pthread_mutex_t checkpoint_turn;
	_Atomic unsigned waiting; /* for a periodic one to end */
	_Atomic bool periodic;	  /* the one under way is */
};

/* --- wiring --- */

static void serial_output(void *opaque, const uint8_t *data, size_t length)
{
	struct machine *machine = opaque;

	console_output(machine->options.console, data, length);
}

static void serial_room(void *opaque)
{
	struct machine *machine = opaque;

	console_room(machine->options.console);
}

static size_t typed(void *opaque, const uint8_t *data, size_t length)
{
	struct machine *machine = opaque;

	return serial_input(machine->serial, data, length);
}

static void *io_main(void *opaque)
{
	struct machine *machine = opaque;
	struct err error = ERR_INIT;

	if (loop_run(machine->loop, &error))
		log_error("I/O thread: %s", error.message);
	return NULL;
}

/* --- disks --- */

/* The VM's own layer over a shared base lives in the store; it is made at the first start. */
static int place_base_disk(struct machine *machine, struct config_disk *disk, struct err *err)
{
	struct cow_create create = {.backing = disk->base};
	struct cow_disk *base;
	struct stat st;

	if (!disk->path)
		disk->path = store_vm_disk_path(store_path(machine->options.store), machine->options.config->name, disk->name);
	if (machine->options.from || stat(disk->path, &st) == 0)
		return 0;
	int rc = cow_open(machine->io, disk->base, COW_OPEN_READONLY, &base, err);
	if (rc)
		return rc;
	create.backing_format = cow_format_of(base);
	create.size_bytes = cow_size(base);
	rc = cow_close(base, err);
	return rc ? rc : cow_create(disk->path, &create, err);
}

/* A checkpoint's disk in the place of what is there, unless somebody uses that. */
static int place_checkpoint_disk(struct machine *machine, struct config_disk *disk, struct err *err)
{
	struct err busy = ERR_INIT;
	struct cow_disk *present;

	int rc = cow_open(machine->io, disk->path, 0, &present, &busy);
	if (rc == -EBUSY) {
		if (err)
			*err = busy;
		return rc;
	}
	if (!rc)
		cow_close(present, NULL);
	return ckpt_make_overlay(machine->options.store, machine->options.from, disk->name, disk->path, err);
}

static int open_disk(struct machine *machine, struct config_disk *config, struct err *err)
{
	struct disk *disk = &machine->disks[machine->disk_count];
	struct virtio_blk_config device = {
		.name = config->name, .serial = config->name, .readonly = config->readonly, .detect_zeroes = config->detect_zeroes};
	int rc = 0;

	if (config->base)
		rc = place_base_disk(machine, config, err);
	if (!rc && machine->options.from && !config->readonly)
		rc = place_checkpoint_disk(machine, config, err);
	if (!rc)
		rc = cow_open(machine->io, config->path, config->readonly ? COW_OPEN_READONLY : 0, &disk->image, err);
	if (rc) {
		err_prefix(err, "disk %s", config->name);
		return err_hint(err, "`qemu-img check` and `qemu-img info --backing-chain` tell more of an image");
	}
	disk->config = config;
	machine->disk_count++;
	return virtio_blk_create(machine->pci, vm_memory(machine->vm), machine->loop, disk->image, &device, &disk->device, err);
}

static int open_net(struct machine *machine, struct config_net *config, struct err *err)
{
	CLEANUP_FREE char *networks = xasprintf("%s/networks", store_path(machine->options.store));
	const struct machine_net_place place = {.pci = machine->pci,
						.mem = vm_memory(machine->vm),
						.loop = machine->loop,
						.libvirt = machine->options.config->libvirt,
						.networks = networks,
						.vm = machine->options.config->name,
						.index = machine->net_count,
						.deaf = machine->options.held};

	/* Also one that fails half way: machine_destroy closes it. */
	return machine_net_open(&machine->nets[machine->net_count++], &place, config, err);
}

static int open_vsock(struct machine *machine, struct err *err)
{
	CLEANUP_FREE char *path = xasprintf("%s/vms/%s/vsock.sock", store_path(machine->options.store), machine->options.config->name);

	return virtio_vsock_create(machine->pci, vm_memory(machine->vm), machine->loop, machine->options.config->vsock_cid, path, &machine->vsock, err);
}

/* --- the generation id --- */

static void new_generation(uint8_t id[ACPI_GENERATION_BYTES])
{
	if (getrandom(id, ACPI_GENERATION_BYTES, 0) != (ssize_t)ACPI_GENERATION_BYTES)
		abort(); /* the kernel does not fail for 16 bytes */
}

/* The guest goes on from a checkpoint: what it took for unique may have been used by another life of it. Told before its first instruction. */
static void renew_generation(void *opaque)
{
	struct machine *machine = opaque;
	uint8_t id[ACPI_GENERATION_BYTES];

	new_generation(id);
	if (!acpi_set_generation(vm_memory(machine->vm), id))
		return;
	vm_irq_set(machine->vm, ACPI_GENERATION_GSI, true);
	vm_irq_set(machine->vm, ACPI_GENERATION_GSI, false);
}

void machine_generation(struct machine *machine, char out[MACHINE_GENERATION_BYTES])
{
	uint8_t id[ACPI_GENERATION_BYTES];

	out[0] = '\0';
	if (acpi_get_generation(vm_memory(machine->vm), id))
		put_hex(out, id, sizeof(id));
}

/* --- building --- */

static int create_pci_device(struct machine *machine, const struct slot *slot, struct err *err)
{
	struct machine_config *config = machine->options.config;

	switch (slot->kind) {
	case SLOT_DISK:
		return open_disk(machine, &config->disks[slot->index], err);
	case SLOT_RNG:
		return virtio_rng_create(machine->pci, vm_memory(machine->vm), machine->loop, &machine->rng, err);
	case SLOT_BALLOON:
		return virtio_balloon_create(machine->pci, vm_memory(machine->vm), machine->loop, &machine->balloon, err);
	case SLOT_NET:
		return open_net(machine, &config->nets[slot->index], err);
	case SLOT_VSOCK:
		return open_vsock(machine, err);
	}
	return 0;
}

static int create_devices(struct machine *machine, struct err *err)
{
	struct machine_config *config = machine->options.config;
	const struct isa_platform isa = isa_platform_of(machine->vm);
	const struct serial_config com1 = {
		.port = SERIAL_COM1_PORT, .gsi = SERIAL_COM1_GSI, .output = serial_output, .room = serial_room, .opaque = machine};
	const struct rtc_config clock = {.memory_bytes = config->memory_bytes, .loop = machine->loop};
	int rc = pci_bus_create(machine->vm, &machine->pci, err);

	if (!rc)
		rc = serial_create(&isa, &com1, &machine->serial, err);
	if (!rc)
		rc = rtc_create(&isa, &clock, &machine->rtc, err);
	if (!rc)
		rc = acpi_pm_create(&isa, false, &machine->pm, err); /* the reset port lies in the PCI bus's ports */
	if (!rc)
		acpi_pm_on_apply(machine->pm, renew_generation, machine);
	struct slot slots[SLOTS_MAX];
	unsigned count = slots_list(config, slots);
	for (unsigned i = 0; !rc && i < count; i++)
		rc = create_pci_device(machine, &slots[i], err);
	return rc;
}

/* In the order of application: what raises interrupts comes after what takes them. */
static unsigned list_components(struct machine *machine, struct component *list)
{
	unsigned n = vm_components(machine->vm, list);

	list[n++] = serial_component(machine->serial, 0);
	list[n++] = rtc_component(machine->rtc);
	list[n++] = acpi_pm_component(machine->pm);
	list[n++] = pci_bus_component(machine->pci);
	for (unsigned i = 0; i < machine->disk_count; i++) {
		machine->disks[i].component = n;
		list[n++] = virtio_blk_component(machine->disks[i].device, i);
	}
	if (machine->rng)
		list[n++] = virtio_rng_component(machine->rng, 0);
	if (machine->balloon)
		list[n++] = virtio_balloon_component(machine->balloon, 0);
	for (unsigned i = 0; i < machine->net_count; i++)
		list[n++] = virtio_net_component(machine->nets[i].device, i);
	if (machine->vsock)
		list[n++] = virtio_vsock_component(machine->vsock, 0);
	return n;
}

static int create_engine(struct machine *machine, struct err *err)
{
	struct component components[MAX_COMPONENTS];
	struct ckpt_disk disks[CONFIG_MAX_DISKS];
	struct ckpt_engine_config config = {
		.vm = machine->vm,
		.io_loop = machine->loop,
		.store = machine->options.store,
		.vm_name = machine->options.config->name,
		.vm_uuid = machine->options.uuid,
		.components = components,
		.disks = disks,
		.parent_id = machine->options.from ? machine->options.from : "",
	};
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = config_to_text(machine->options.config, &text, err);

	if (!rc)
		rc = buf_append(&text, NULL, 1, err);
	if (rc)
		return rc;
	config.config_text = (const char *)text.data;
	config.component_count = list_components(machine, components);
	for (unsigned i = 0; i < machine->disk_count; i++)
		if (!machine->disks[i].config->readonly)
			disks[config.disk_count++] = (struct ckpt_disk){.name = machine->disks[i].config->name,
									.disk = machine->disks[i].image,
									.path = machine->disks[i].config->path,
									.component = machine->disks[i].component};
	return ckpt_engine_create(&config, &machine->engine, err);
}

static int boot(struct machine *machine, struct err *err)
{
	struct machine_config *config = machine->options.config;
	uint8_t generation[ACPI_GENERATION_BYTES];
	struct acpi_config acpi = {.serial = true, .rtc = true, .pci = true, .generation_id = generation};
	struct boot_config kernel = {.kernel = config->kernel, .initrd = config->initrd, .cmdline = config->cmdline};

	new_generation(generation);
	int rc = acpi_build(machine->vm, &acpi, err);
	return rc ? rc : boot_load(machine->vm, &kernel, err);
}

/* Of the host's processors that this process may use, those that its vCPUs leave. */
static unsigned spare_processors(unsigned cpus)
{
	cpu_set_t allowed;
	unsigned count = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? (unsigned)CPU_COUNT(&allowed) : 0;

	return count > cpus ? count - cpus : 0;
}

/* The I/O thread. Then it may run anywhere again, and be moved by the kernel as any other. */
static void leave_vcpus(void *opaque)
{
	struct machine *machine = opaque;
	cpu_set_t busy, before;
	int here = sched_getcpu();

	vm_busy_processors(machine->vm, &busy);
	if (here < 0 || here >= CPU_SETSIZE || !CPU_ISSET((unsigned)here, &busy))
		return;
	scheduling_leave_vcpus(machine->vm, &before, NULL);
	scheduling_restore(&before);
}

static int build(struct machine *machine, struct err *err)
{
	struct machine_config *config = machine->options.config;
	machine_choose_macs(config, machine->options.uuid);
	struct vm_config vm = {
		.memory_bytes = config->memory_bytes,
		.memory_backing = config->memory_backing,
		/* Files cannot be mapped as huge pages: such memory is read whole before the VM runs. */
		.private_memory = machine->options.from != NULL && config->memory_backing == MEM_BACKING_SMALL,
		.cpus = config->cpus,
		.cpu_model = config->cpu_model,
		.stopped = machine->options.stopped,
		.opaque = machine->options.opaque,
	};
	int rc = memory_guard_install(err);

	if (!rc)
		rc = vm_create(&vm, &machine->vm, err);
	if (!rc)
		rc = loop_create(&machine->loop, err);
	if (!rc) {
		loop_set_spare(machine->loop, spare_processors(config->cpus));
		loop_set_aside(machine->loop, leave_vcpus, machine);
	}
	if (!rc)
		rc = cow_io_create(machine->loop, &machine->io, err);
	if (!rc)
		rc = create_devices(machine, err);
	if (!rc)
		rc = create_engine(machine, err);
	if (rc)
		return rc;
	rc = pthread_create(&machine->io_thread, NULL, io_main, machine);
	if (rc)
		return err_sys(err, rc, "I/O thread");
	machine->io_thread_runs = true;
	rc = machine->options.from ? ckpt_load(machine->engine, machine->options.from, err) : boot(machine, err);
	if (!rc && machine->options.clock_back_ns)
		rtc_set_back(machine->rtc, machine->options.clock_back_ns);
	return rc ? rc : vm_start(machine->vm, err);
}

int machine_create(const struct machine_options *options, struct machine **out, struct err *err)
{
	struct machine init = {.options = *options, .paused = true, .deaf = options->held};
	struct machine *machine = xcalloc(1, sizeof(*machine));
	int rc;

	memcpy(machine, &init, sizeof(*machine));
	pthread_mutex_init(&machine->turn, NULL);
	pthread_mutex_init(&machine->checkpoint_turn, NULL);
	rc = build(machine, err);
	if (rc) {
		machine_destroy(machine, NULL);
		return rc;
	}
	console_set_guest(options->console, typed, machine);
	*out = machine;
	return 0;
}

/* --- the end --- */

/* In the I/O thread's absence: requests of the guest that were in flight have ended by then (drained). */
static int close_disks(struct machine *machine, struct err *err)
{
	int rc = 0;

	for (unsigned i = 0; i < machine->disk_count; i++) {
		struct err one = ERR_INIT;

		if (cow_close(machine->disks[i].image, &one) == 0)
			continue;
		log_error("disk %s: %s", machine->disks[i].config->name, one.message);
		if (!rc && err)
			*err = one;
		rc = rc ? rc : -one.number;
	}
	return rc;
}

static void drain_disks(struct machine *machine)
{
	for (unsigned i = 0; i < machine->disk_count; i++) {
		struct component component = virtio_blk_component(machine->disks[i].device, i);

		component.drain(component.opaque, NULL);
	}
}

int machine_destroy(struct machine *machine, struct err *err)
{
	int rc;

	console_set_guest(machine->options.console, NULL, NULL);
	ckpt_engine_destroy(machine->engine);
	if (machine->io_thread_runs) {
		vm_quiesce_request(machine->vm);
		vm_quiesce_wait(machine->vm, NULL);
		drain_disks(machine);
		loop_stop(machine->loop);
		pthread_join(machine->io_thread, NULL);
	}
	virtio_vsock_destroy(machine->vsock);
	for (unsigned i = 0; i < machine->net_count; i++)
		machine_net_close(&machine->nets[i]);
	virtio_balloon_destroy(machine->balloon);
	virtio_rng_destroy(machine->rng);
	for (unsigned i = 0; i < machine->disk_count; i++)
		virtio_blk_destroy(machine->disks[i].device);
	rc = close_disks(machine, err);
	acpi_pm_destroy(machine->pm);
	rtc_destroy(machine->rtc);
	serial_destroy(machine->serial);
	pci_bus_destroy(machine->pci);
	if (machine->io)
		cow_io_destroy(machine->io);
	if (machine->loop)
		loop_destroy(machine->loop);
	if (machine->vm)
		vm_destroy(machine->vm);
	pthread_mutex_destroy(&machine->checkpoint_turn);
	pthread_mutex_destroy(&machine->turn);
	free(machine);
	return rc;
}

/* --- running --- */

static void hear_networks(void *opaque)
{
	struct machine *machine = opaque;

	for (unsigned i = 0; i < machine->net_count; i++)
		machine_net_hear(&machine->nets[i]);
}

int machine_resume(struct machine *machine, struct err *err)
{
	int rc;

	pthread_mutex_lock(&machine->turn);
	rc = ckpt_check(machine->engine, err);
	if (!rc && machine->paused) {
		if (machine->deaf)
			loop_call(machine->loop, hear_networks, machine);
		machine->deaf = false;
		vm_resume(machine->vm, true);
		machine->paused = false;
	} else if (!rc) {
		rc = err_set(err, ERR_STATE, EALREADY, "%s: runs already", machine->options.config->name);
	}
	pthread_mutex_unlock(&machine->turn);
	return rc;
}

int machine_pause(struct machine *machine, struct err *err)
{
	int rc;

	pthread_mutex_lock(&machine->turn);
	rc = ckpt_check(machine->engine, err);
	if (!rc && machine->paused) {
		rc = err_set(err, ERR_STATE, EALREADY, "%s: is paused already", machine->options.config->name);
	} else if (!rc) {
		vm_quiesce_request(machine->vm);
		rc = vm_quiesce_wait(machine->vm, err);
		machine->paused = rc == 0;
		if (rc)
			vm_resume(machine->vm, false);
	}
	pthread_mutex_unlock(&machine->turn);
	return rc;
}

bool machine_is_paused(struct machine *machine) { return machine->paused; }

int machine_power_button(struct machine *machine, struct err *err)
{
	if (machine_is_paused(machine)) {
		err_set(err, ERR_STATE, EBUSY, "%s: is paused, so the guest cannot see its power button", machine->options.config->name);
		return err_hint(err, "`vmcp resume` it first, or end it with `vmcp kill`");
	}
	acpi_pm_press_power_button(machine->pm);
	return 0;
}

uint64_t machine_first_entry_ns(struct machine *machine)
{
	const struct timespec moment = {.tv_nsec = 20000};
	uint64_t limit = clock_now_ns() + FIRST_ENTRY_WAIT_NS, entry;

	while ((entry = vm_first_entry_ns(machine->vm)) == 0 && clock_now_ns() < limit)
		nanosleep(&moment, NULL);
	return entry;
}

static int take_checkpoint(struct machine *machine, const struct ckpt_request *request, struct ckpt_result *result,
			   struct err *err)
{
	struct ckpt_request first = *request;
	int rc;

	/* Live: the turn is given up as soon as the VM runs again, so that it can be paused while the checkpoint is written. */
	if (request->live)
		first.wait = CKPT_WAIT_CAPTURED;
	pthread_mutex_lock(&machine->turn);
	rc = ckpt_take(machine->engine, &first, result, err);
	pthread_mutex_unlock(&machine->turn);
	if (rc || result->durable || request->wait == CKPT_WAIT_CAPTURED)
		return rc;
	return request->wait == CKPT_WAIT_WRITTEN ? ckpt_wait_written(machine->engine, result, err) : ckpt_wait(machine->engine, result, err);
}

static bool wait_for_turn(struct machine *machine, uint64_t ns)
{
	uint64_t until = clock_wall_ns() + ns;
	struct timespec at = clock_timespec(until);

	return pthread_mutex_timedlock(&machine->checkpoint_turn, &at) == 0;
}

/* Behind a periodic checkpoint, which gives way. */
static bool take_turn_from_periodic(struct machine *machine)
{
	bool mine;

	atomic_fetch_add(&machine->waiting, 1);
	mine = wait_for_turn(machine, PERIODIC_PATIENCE_NS);
	while (!mine && machine->periodic) {
		ckpt_cancel_periodic(machine->engine);
		mine = wait_for_turn(machine, PERIODIC_PATIENCE_NS / 20);
	}
	atomic_fetch_sub(&machine->waiting, 1);
	return mine;
}

static int begin_checkpoint(struct machine *machine, bool periodic, struct err *err)
{
	bool mine = !(periodic && machine->waiting) && pthread_mutex_trylock(&machine->checkpoint_turn) == 0;

	if (!mine && !periodic && machine->periodic)
		mine = take_turn_from_periodic(machine);
	if (mine) {
		machine->periodic = periodic;
		return 0;
	}
	err_set(err, ERR_STATE, EBUSY, "%s: a checkpoint is under way", machine->options.config->name);
	return err_hint(err, "wait for it, or end it with `vmcp cancel %s`", machine->options.config->name);
}

int machine_checkpoint(struct machine *machine, const struct ckpt_request *request, struct ckpt_result *result, struct err *err)
{
	struct err unset = ERR_INIT;
	int rc = begin_checkpoint(machine, request->periodic, err ? err : &unset);

	if (rc)
		return rc;
	rc = take_checkpoint(machine, request, result, err);
	machine->periodic = false;
	pthread_mutex_unlock(&machine->checkpoint_turn);
	return rc;
}

int machine_revert(struct machine *machine, const char *id, struct ckpt_revert_result *result, struct err *err)
{
	return machine_revert_in_group(machine, id, NULL, result, err);
}

int machine_revert_in_group(struct machine *machine, const char *id, const struct ckpt_group *group, struct ckpt_revert_result *result, struct err *err)
{
	ckpt_cancel_periodic(machine->engine);
	pthread_mutex_lock(&machine->turn);
	int rc = ckpt_revert_in_group(machine->engine, id, !machine->paused, group, result, err);
	pthread_mutex_unlock(&machine->turn);
	return rc;
}

int machine_set_balloon(struct machine *machine, uint64_t bytes, struct err *err)
{
	const struct machine_config *config = machine->options.config;

	if (!machine->balloon) {
		err_set(err, ERR_STATE, ENODEV, "%s: has no balloon", config->name);
		return err_hint(err, "write `balloon = yes` in its guest.cfg and start it again");
	}
	if (bytes < MEM_MIN_BYTES || bytes > config->memory_bytes) {
		err_set(err, ERR_USAGE, EINVAL, "%s: cannot make do with %llu bytes", config->name, (unsigned long long)bytes);
		return err_hint(err, "a size from %lluM to its memory, %lluM", MEM_MIN_BYTES >> 20,
				(unsigned long long)config->memory_bytes >> 20);
	}
	virtio_balloon_set_target(machine->balloon, config->memory_bytes - bytes);
	return 0;
}

bool machine_balloon_stats(struct machine *machine, struct virtio_balloon_stats *out)
{
	if (machine->balloon)
		virtio_balloon_get_stats(machine->balloon, out);
	return machine->balloon != NULL;
}

bool machine_net_stats(struct machine *machine, unsigned index, struct machine_net_stats *out)
{
	if (index >= machine->net_count)
		return false;
	machine_net_tell(&machine->nets[index], out);
	return true;
}

bool machine_disk_stats(struct machine *machine, unsigned index, const char **name, struct virtio_blk_stats *out)
{
	if (index >= machine->disk_count)
		return false;
	*name = machine->disks[index].config->name;
	virtio_blk_get_stats(machine->disks[index].device, out);
	return true;
}

struct ckpt_engine *machine_engine(struct machine *machine) { return machine->engine; }

struct vm *machine_vm(struct machine *machine) { return machine->vm; }
