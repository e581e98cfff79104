/*
 * The engine end to end without KVM: a thread that writes memory stands in for the vCPU, a toy component for the
 * devices; memory, I/O loop, disk and store are the real ones. Checks that a revert gives back memory, state and disk;
 * the differential oracle; and, by running itself once for each fault point, that a failure leaves the machine running
 * and a death leaves the disk whole.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/store/group.h"
#include "cowdisk/check.h"
#include "tests/lib/check.h"
#include "vmm/dirty_log.h"

/* It has the same threads again for each fault point, some hundred times. */
#ifdef __SANITIZE_THREAD__
#define UNDER_TSAN true
#else
#define UNDER_TSAN false
#endif

#define MEMORY_BYTES  (18ull << 20) /* more than is put back from memory at once: STASH_PAGES */
#define DISK_BYTES    (8u << 20)
#define PATTERN_BYTES (1u << 20)
#define TREE_NODES    8u

/* --- the VM that is none --- */

struct vm {
	struct mem *mem;
	_Atomic uint64_t *log; /* the dirty log */
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool asked, standing, quit; /* under lock */
	atomic_bool stop;
	_Atomic uint64_t steps, failures;
};

/* A host whose KVM has no dirty log: every checkpoint saves all memory. */
static bool no_dirty_log;
/* Called when the dirty log is read the next time: in a harvest, when disks are staged and the VM runs. */
static void (*while_harvesting)(void *opaque);
static void *while_harvesting_opaque;

static void *vcpu_main(void *opaque)
{
	struct vm *vm = opaque;
	uint64_t random = 12345, pages = mem_pages(vm->mem);
	uint8_t *base = mem_base(vm->mem);
	for (;;) {
		if (atomic_load(&vm->stop)) {
			pthread_mutex_lock(&vm->lock);
			vm->standing = true;
			pthread_cond_broadcast(&vm->cond);
			while (vm->asked && !vm->quit)
				pthread_cond_wait(&vm->cond, &vm->lock);
			vm->standing = false;
			pthread_cond_broadcast(&vm->cond);
			bool quit = vm->quit;
			pthread_mutex_unlock(&vm->lock);
			if (quit)
				return NULL;
		}
		random = random * 6364136223846793005u + 1442695040888963407u;
		uint64_t page = (random >> 33) % (pages * 3 / 4);
		uint64_t value = random >> 60 ? random : 0;
		__atomic_store_n((uint64_t *)(void *)(base + page * PAGE_BYTES + (random >> 20) % 8 * 8), value,
				 __ATOMIC_RELAXED);
		/* Behind the write: KVM's log cannot be cleared between a page's entry and the write that caused it. */
		bitmap_claim(vm->log, page);
		atomic_fetch_add(&vm->steps, 1);
	}
}

struct mem *vm_memory(struct vm *vm) { return vm->mem; }
unsigned vm_cpus(const struct vm *vm)
{
	(void)vm;
	return 1;
}
void vm_quiesce_request(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->asked = true;
	atomic_store(&vm->stop, true);
	pthread_mutex_unlock(&vm->lock);
}
int vm_quiesce_wait(struct vm *vm, struct err *err)
{
	(void)err;
	pthread_mutex_lock(&vm->lock);
	while (!vm->standing)
		pthread_cond_wait(&vm->cond, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
	return 0;
}
int vm_quiesce_discard(struct vm *vm, struct err *err)
{
	vm_quiesce_request(vm);
	return vm_quiesce_wait(vm, err);
}
void vm_resume(struct vm *vm, bool wait)
{
	pthread_mutex_lock(&vm->lock);
	vm->asked = false;
	atomic_store(&vm->stop, false);
	pthread_cond_broadcast(&vm->cond);
	while (wait && vm->standing)
		pthread_cond_wait(&vm->cond, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
}
void vm_busy_processors(const struct vm *vm, cpu_set_t *out)
{
	(void)vm;
	CPU_ZERO(out);
}
uint64_t vm_first_entry_ns(const struct vm *vm)
{
	(void)vm;
	return clock_now_ns();
}
void vm_fail(struct vm *vm, const struct err *err)
{
	(void)err;
	atomic_fetch_add(&vm->failures, 1);
}
uint64_t vm_resumed_ns(const struct vm *vm)
{
	(void)vm;
	return clock_now_ns();
}
int vm_dirty_log_start(struct vm *vm, bool *all_set, struct err *err)
{
	(void)vm;
	*all_set = true;
	return no_dirty_log ? err_set(err, ERR_HOST, ENOTSUP, "no dirty log") : 0;
}
void vm_dirty_log_stop(struct vm *vm) { (void)vm; }
int vm_dirty_log_get(struct vm *vm, uint64_t *words, struct err *err)
{
	(void)err;
	void (*call)(void *opaque) = while_harvesting;
	while_harvesting = NULL;
	if (call)
		call(while_harvesting_opaque);
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
bool vm_is_quiesced(const struct vm *vm)
{
	struct vm *v = (struct vm *)(uintptr_t)vm;
	pthread_mutex_lock(&v->lock);
	bool standing = v->standing;
	pthread_mutex_unlock(&v->lock);
	return standing;
}

/* --- the toy device --- */

struct toy_state {
	uint64_t counter;
};
static const struct codec_field toy_fields[] = {CODEC_INT(struct toy_state, counter, CODEC_U64), CODEC_END};
static const struct codec_table toy_table = {.name = "toy", .size = sizeof(struct toy_state), .fields = toy_fields};

static int toy_capture(void *opaque, void *state, struct err *err)
{
	(void)err;
	memcpy(state, opaque, sizeof(struct toy_state));
	return 0;
}
static int toy_apply(void *opaque, const void *state, struct err *err)
{
	(void)err;
	memcpy(opaque, state, sizeof(struct toy_state));
	return 0;
}

/* --- the machine --- */

struct rig {
	char dir[64], store_path[96], disk_path[96];
	struct vm vm;
	struct loop *loop;
	pthread_t loop_thread;
	struct cow_io *io;
	struct cow_disk *disk;
	struct store *store;
	struct store_vm_lock *vm_lock;
	struct toy_state toy;
	struct ckpt_engine *engine;
	uint8_t *reference;
};

static bool ok(int r, const struct err *err, const char *what)
{
	if (r != 0)
		fprintf(stderr, "%s: %s\n", what, err->message);
	CHECK(r == 0);
	return r == 0;
}

static void *loop_main(void *opaque)
{
	loop_run(opaque, NULL);
	return NULL;
}

struct transfer {
	struct rig *rig;
	struct cow_request request;
	struct iovec iov;
	sem_t done;
	int result;
};

static void transfer_done(struct cow_request *request, int result)
{
	struct transfer *t = request->opaque;
	t->result = result;
	sem_post(&t->done);
}

static void transfer_submit(void *opaque)
{
	struct transfer *t = opaque;
	cow_submit(t->rig->disk, &t->request);
}

static int disk_transfer(struct rig *rig, enum cow_op op, void *data, uint64_t length)
{
	struct transfer t = {.rig = rig, .iov = {.iov_base = data, .iov_len = length}};
	t.request = (struct cow_request){.op = op,
					 .length = length,
					 .iov = &t.iov,
					 .iov_count = length ? 1 : 0,
					 .done = transfer_done,
					 .opaque = &t};
	sem_init(&t.done, 0, 0);
	loop_call(rig->loop, transfer_submit, &t);
	sem_wait(&t.done);
	return t.result;
}

static void disk_fill(struct rig *rig, char letter)
{
	void *data = aligned_alloc(PAGE_BYTES, PATTERN_BYTES);
	memset(data, letter, PATTERN_BYTES);
	CHECK(disk_transfer(rig, COW_WRITE, data, PATTERN_BYTES) == 0);
	CHECK(disk_transfer(rig, COW_FLUSH, NULL, 0) == 0);
	free(data);
}

/* The letter that fills the pattern, 0 if it was never written, '!' if it is torn. */
static char pattern_letter(const uint8_t *data)
{
	for (unsigned i = 1; i < PATTERN_BYTES; i++) {
		if (data[i] != data[0])
			return '!';
	}
	return (char)data[0];
}

static char disk_letter(struct rig *rig)
{
	uint8_t *data = aligned_alloc(PAGE_BYTES, PATTERN_BYTES);
	CHECK(disk_transfer(rig, COW_READ, data, PATTERN_BYTES) == 0);
	char letter = pattern_letter(data);
	free(data);
	return letter;
}

static void rig_names(struct rig *rig, const char *dir)
{
	snprintf(rig->dir, sizeof(rig->dir), "%s", dir);
	snprintf(rig->store_path, sizeof(rig->store_path), "%s/store", dir);
	snprintf(rig->disk_path, sizeof(rig->disk_path), "%s/disk.qcow2", dir);
}

static bool rig_start(struct rig *rig, struct err *err)
{
	struct cow_create create = {.size_bytes = DISK_BYTES};
	const struct component component = {.id = "toy",
					    .version = 1,
					    .table = &toy_table,
					    .opaque = &rig->toy,
					    .capture = toy_capture,
					    .apply = toy_apply};
	if (!ok(mem_create(MEMORY_BYTES, &rig->vm.mem, err), err, "memory") ||
	    !ok(loop_create(&rig->loop, err), err, "loop") || !ok(cow_io_create(rig->loop, &rig->io, err), err, "io") ||
	    !ok(cow_create(rig->disk_path, &create, err), err, "image") ||
	    !ok(cow_open(rig->io, rig->disk_path, 0, &rig->disk, err), err, "disk") ||
	    !ok(store_open(rig->store_path, true, &rig->store, err), err, "store") ||
	    !ok(store_vm_lock(rig->store, "toy", &rig->vm_lock, err), err, "vm lock"))
		return false;
	const struct store_vm record = {.name = "toy",
					.uuid = "00000000-0000-0000-0000-000000000000",
					.state = "running",
					.memory_bytes = MEMORY_BYTES,
					.cpus = 1};
	const struct ckpt_disk disk = {.name = "root", .disk = rig->disk, .path = rig->disk_path};
	struct ckpt_engine_config config = {.vm = &rig->vm,
					    .io_loop = rig->loop,
					    .store = rig->store,
					    .vm_name = "toy",
					    .vm_uuid = record.uuid,
					    .components = &component,
					    .component_count = 1,
					    .disks = &disk,
					    .disk_count = 1,
					    .config_text = "[vm]\nname = toy\n",
					    .parent_id = ""};
	pthread_mutex_init(&rig->vm.lock, NULL);
	pthread_cond_init(&rig->vm.cond, NULL);
	rig->vm.log = xcalloc(mem_pages(rig->vm.mem) / 64, sizeof(*rig->vm.log));
	if (!ok(store_vm_put(rig->store, &record, err), err, "record") ||
	    !ok(ckpt_engine_create(&config, &rig->engine, err), err, "engine"))
		return false;
	rig->reference = malloc(MEMORY_BYTES);
	CHECK(pthread_create(&rig->loop_thread, NULL, loop_main, rig->loop) == 0);
	CHECK(pthread_create(&rig->vm.thread, NULL, vcpu_main, &rig->vm) == 0);
	return true;
}

static void rig_end(struct rig *rig)
{
	struct err err = ERR_INIT;
	vm_quiesce_request(&rig->vm);
	vm_quiesce_wait(&rig->vm, NULL);
	ckpt_engine_destroy(rig->engine);
	pthread_mutex_lock(&rig->vm.lock);
	rig->vm.quit = true;
	pthread_cond_broadcast(&rig->vm.cond);
	pthread_mutex_unlock(&rig->vm.lock);
	pthread_join(rig->vm.thread, NULL);
	loop_stop(rig->loop);
	pthread_join(rig->loop_thread, NULL);
	ok(cow_close(rig->disk, &err), &err, "close");
	cow_io_destroy(rig->io);
	loop_destroy(rig->loop);
	store_vm_unlock(rig->vm_lock);
	store_close(rig->store);
	mem_destroy(rig->vm.mem);
	free((void *)rig->vm.log);
	free(rig->reference);
}

static void check_progress(struct rig *rig)
{
	uint64_t before = atomic_load(&rig->vm.steps), until = clock_now_ns() + 60000000000ull;
	while (atomic_load(&rig->vm.steps) < before + 1000 && clock_now_ns() < until)
		usleep(500);
	CHECK(atomic_load(&rig->vm.steps) >= before + 1000);
}

static void check_image(const char *path)
{
	struct cow_check check;
	struct err err = ERR_INIT;
	if (ok(cow_check(path, &check, &err), &err, "check"))
		CHECK(check.corruptions == 0);
}

/* --- tests --- */

static int take(struct rig *rig, bool live, const char *tag, struct ckpt_result *result, struct err *err)
{
	const struct ckpt_request request = {.live = live, .tag = tag, .wait = CKPT_WAIT_DURABLE};
	return ckpt_take(rig->engine, &request, result, err);
}

/* Pauses, remembers memory, takes, and lets the VM run into other contents. */
static void take_paused(struct rig *rig, bool live, const char *tag, struct ckpt_result *result)
{
	struct err err = ERR_INIT;
	vm_quiesce_request(&rig->vm);
	vm_quiesce_wait(&rig->vm, NULL);
	memcpy(rig->reference, mem_base(rig->vm.mem), MEMORY_BYTES);
	ok(take(rig, live, tag, result, &err), &err, "take");
	CHECK(vm_is_quiesced(&rig->vm));
	CHECK(result->durable &&
	      result->saved_pages + result->zero_pages + result->parent_pages == MEMORY_BYTES / PAGE_BYTES);
	vm_resume(&rig->vm, true);
}

static void revert_and_check(struct rig *rig, const char *id, char letter, uint64_t counter)
{
	struct ckpt_revert_result result;
	struct err err = ERR_INIT;
	if (!ok(ckpt_revert(rig->engine, id, false, &result, &err), &err, "revert"))
		return;
	CHECK(memcmp(rig->reference, mem_base(rig->vm.mem), MEMORY_BYTES) == 0);
	CHECK(rig->toy.counter == counter);
	CHECK(disk_letter(rig) == letter);
	char at[STORE_ID_BYTES];
	ckpt_position(rig->engine, at);
	CHECK(strcmp(at, id) == 0);
	vm_resume(&rig->vm, true);
	check_progress(rig);
}

static void test_back_and_forth(struct rig *rig)
{
	struct ckpt_result result[2];
	struct err err = ERR_INIT;
	for (int live = 1; live >= 0; live--) {
		struct ckpt_result *r = &result[live];
		disk_fill(rig, live ? 'a' : 'b');
		rig->toy.counter = 100 + (uint64_t)live;
		check_progress(rig);
		take_paused(rig, live, live ? "live" : NULL, r);
		disk_fill(rig, 'x');
		rig->toy.counter = 7;
		check_progress(rig);
		revert_and_check(rig, r->id, live ? 'a' : 'b', 100 + (uint64_t)live);
	}
	CHECK(strcmp(result[0].parent, result[1].id) == 0);
	/* To another node, and memory that is not the parent's. */
	struct ckpt_revert_result reverted;
	ok(ckpt_revert(rig->engine, result[1].id, true, &reverted, &err), &err, "revert to the first");
	CHECK(disk_letter(rig) == 'a');
	CHECK(rig->toy.counter == 101);
	struct ckpt_result again;
	CHECK(take(rig, true, "live", &again, &err) == -EEXIST && err.class == ERR_STATE);
	CHECK(take(rig, true, "bad tag", &again, &err) < 0);
	CHECK(ckpt_revert(rig->engine, "00000000000000000000000000000000", true, &reverted, &err) < 0);
	check_progress(rig);
	ok(take(rig, true, "branch", &again, &err), &err, "branch");
	CHECK(strcmp(again.parent, result[1].id) == 0);
}

/* Checkpoints, each with only what was written since its parent, and the way back to each of them from any other. */
static void test_tree(struct rig *rig)
{
	uint8_t *reference[TREE_NODES], *first = rig->reference;
	char id[TREE_NODES][STORE_ID_BYTES];
	struct ckpt_result result;
	uint64_t random = 7;
	for (unsigned i = 0; i < TREE_NODES; i++) {
		rig->reference = reference[i] = malloc(MEMORY_BYTES);
		disk_fill(rig, (char)('a' + i));
		rig->toy.counter = i;
		check_progress(rig);
		take_paused(rig, i % 3 != 2, NULL, &result);
		memcpy(id[i], result.id, STORE_ID_BYTES);
		CHECK(i == 0 || no_dirty_log || result.parent_pages > 0);
		CHECK(!no_dirty_log || result.parent_pages == 0);
		random = random * 6364136223846793005u + 1442695040888963407u;
		unsigned back = (unsigned)(random >> 33) % (i + 1);
		check_progress(rig);
		rig->reference = reference[back];
		revert_and_check(rig, id[back], (char)('a' + back), back);
	}
	for (unsigned i = 0; i < 2 * TREE_NODES; i++) {
		unsigned to = i * 5 % TREE_NODES;
		rig->reference = reference[to];
		revert_and_check(rig, id[to], (char)('a' + to), to);
	}
	for (unsigned i = 0; i < TREE_NODES; i++)
		free(reference[i]);
	rig->reference = first;
}

/* Many ways back to one checkpoint, and to and fro between two, with a checkpoint in between: each gives all of it. */
static void test_in_a_row(struct rig *rig)
{
	uint8_t *reference[3], *first = rig->reference;
	struct ckpt_result result[3];
	struct stat before, after;
	for (unsigned i = 0; i < 3; i++)
		reference[i] = malloc(MEMORY_BYTES);
	for (unsigned i = 0; i < 2; i++) {
		rig->reference = reference[i];
		disk_fill(rig, (char)('p' + i));
		rig->toy.counter = 30 + i;
		take_paused(rig, true, NULL, &result[i]);
		check_progress(rig);
	}
	for (unsigned round = 0; round < 40; round++) {
		unsigned to = round < 15 ? 1 : round % 2;
		if (round == 30) {
			rig->reference = reference[2];
			disk_fill(rig, 'r');
			rig->toy.counter = 32;
			take_paused(rig, round % 4 != 0, NULL, &result[2]);
		}
		if (round > 30)
			to = round % 3;
		rig->toy.counter = 7;
		rig->reference = reference[to];
		revert_and_check(rig, result[to].id, (char)('p' + to), 30 + to);
	}
	/* A disk that was not written stays on its overlay; one that was gets another. */
	CHECK(stat(rig->disk_path, &before) == 0);
	rig->reference = reference[0];
	for (unsigned written = 0; written < 3; written++) {
		revert_and_check(rig, result[0].id, 'p', 30);
		CHECK(stat(rig->disk_path, &after) == 0);
		CHECK((before.st_ino == after.st_ino) == (written != 2));
		before = after;
		if (written == 1)
			disk_fill(rig, 'x');
	}
	for (unsigned i = 0; i < 3; i++)
		free(reference[i]);
	rig->reference = first;
}

static int read_file(const char *path, struct buf *out)
{
	struct err err = ERR_INIT;
	return ok(file_read_all(AT_FDCWD, path, 1u << 30, out, &err), &err, path) ? 0 : -1;
}

static void fill_with_m(void *opaque) { disk_fill(opaque, 'm'); }

/* A disk that was not written since the parent: the parent's layer is named again. Whatever writes it makes a new one. */
static void test_unchanged_disk(struct rig *rig)
{
	enum { WRITTEN, SAME, SAME_AGAIN, CHANGED, RACED, AFTER, REVERTED, TAKEN };
	struct ckpt_result r[TAKEN];
	struct ckpt_revert_result reverted;
	struct err err = ERR_INIT;
	disk_fill(rig, 'p');
	for (int i = WRITTEN; i <= SAME_AGAIN; i++)
		ok(take(rig, i != SAME, NULL, &r[i], &err), &err, "take");
	disk_fill(rig, 'q');
	ok(take(rig, true, NULL, &r[CHANGED], &err), &err, "changed");
	while_harvesting_opaque = rig;
	while_harvesting = fill_with_m;
	ok(take(rig, true, NULL, &r[RACED], &err), &err, "written between staging and pause");
	bool raced = while_harvesting == NULL;
	while_harvesting = NULL;
	CHECK(raced != no_dirty_log);
	ok(take(rig, true, NULL, &r[AFTER], &err), &err, "after");
	CHECK(strcmp(r[WRITTEN].disks[0].layer, r[SAME].disks[0].layer) == 0);
	CHECK(strcmp(r[WRITTEN].disks[0].layer, r[SAME_AGAIN].disks[0].layer) == 0);
	CHECK(strcmp(r[WRITTEN].disks[0].layer, r[CHANGED].disks[0].layer) != 0);
	CHECK(strcmp(r[CHANGED].disks[0].layer, r[RACED].disks[0].layer) != 0 || !raced);
	CHECK(strcmp(r[RACED].disks[0].layer, r[AFTER].disks[0].layer) == 0);
	const char letters[] = {'p', 'p', 'p', 'q', raced ? 'm' : 'q', raced ? 'm' : 'q'};
	for (int i = AFTER; i >= WRITTEN; i--) {
		ok(ckpt_revert(rig->engine, r[i].id, true, &reverted, &err), &err, "revert");
		CHECK(disk_letter(rig) == letters[i]);
	}
	ok(take(rig, true, NULL, &r[REVERTED], &err), &err, "after a revert");
	CHECK(disk_letter(rig) == 'p');
	ok(ckpt_revert(rig->engine, r[RACED].id, true, &reverted, &err), &err, "revert");
	disk_fill(rig, 'z');
	ok(ckpt_revert(rig->engine, r[REVERTED].id, true, &reverted, &err), &err, "revert");
	CHECK(disk_letter(rig) == 'p');
	check_progress(rig);
}

/* Layer, sums and state of two checkpoints of one paused VM are the same bytes, where both save all memory. */
static void test_oracle(struct rig *rig)
{
	struct ckpt_result result[2];
	struct store_checkpoint checkpoint[2];
	struct err err = ERR_INIT;
	vm_quiesce_request(&rig->vm);
	vm_quiesce_wait(&rig->vm, NULL);
	for (int live = 0; live < 2; live++) {
		const struct ckpt_request request = {.live = live, .full = true, .wait = CKPT_WAIT_DURABLE};
		ok(ckpt_take(rig->engine, &request, &result[live], &err), &err, "oracle");
		CHECK(strcmp(result[live].plan, live ? "protect-all" : "stopped-all") == 0);
		ok(store_checkpoint_get(rig->store, result[live].id, &checkpoint[live], &err), &err, "get");
	}
	CHECK(vm_is_quiesced(&rig->vm));
	vm_resume(&rig->vm, true);
	CHECK(checkpoint[0].state_xxh3 == checkpoint[1].state_xxh3 &&
	      checkpoint[0].state_bytes == checkpoint[1].state_bytes);
	static const char *const suffixes[] = {"mem", "sums"};
	for (unsigned s = 0; s < 2; s++) {
		struct buf data[2] = {BUF_INIT, BUF_INIT};
		for (unsigned i = 0; i < 2; i++) {
			char path[1024];
			snprintf(path, sizeof(path), "%s/layers/%s.%s", rig->store_path, checkpoint[i].memory_layer,
				 suffixes[s]);
			read_file(path, &data[i]);
		}
		CHECK(data[0].length == data[1].length && data[0].length > 0);
		CHECK(memcmp(data[0].data, data[1].data, data[0].length) == 0);
		buf_free(&data[0]);
		buf_free(&data[1]);
	}
	store_checkpoint_free(&checkpoint[0]);
	store_checkpoint_free(&checkpoint[1]);
}

/* The instant at the end of the save: after it memory, state and disk are those of the pause, though the guest ran on. */
static void test_settled(struct rig *rig)
{
	struct ckpt_request request = {.live = true, .full = true, .instant = CKPT_INSTANT_SETTLED, .wait = CKPT_WAIT_DURABLE};
	struct ckpt_result result;
	struct err err = ERR_INIT;
	disk_fill(rig, 's');
	for (int full = 1; full >= 0; full--) {
		request.full = full;
		int r = ckpt_take(rig->engine, &request, &result, &err);
		/* This guest never rests: it may be too fast. */
		CHECK(r == 0 || r == -EAGAIN || r == -ENOBUFS);
		check_progress(rig);
		vm_quiesce_request(&rig->vm);
		vm_quiesce_wait(&rig->vm, NULL);
		memcpy(rig->reference, mem_base(rig->vm.mem), MEMORY_BYTES);
		ok(ckpt_take(rig->engine, &request, &result, &err), &err, "settled, of a VM that stands");
		CHECK(no_dirty_log || full == (strcmp(result.plan, "settle-all") == 0));
		vm_resume(&rig->vm, true);
		check_progress(rig);
		revert_and_check(rig, result.id, 's', rig->toy.counter);
	}
}

static void test_background_and_cancel(struct rig *rig)
{
	struct ckpt_request request = {.live = true, .wait = CKPT_WAIT_CAPTURED};
	struct ckpt_result captured, final;
	struct err err = ERR_INIT;
	ok(ckpt_take(rig->engine, &request, &captured, &err), &err, "captured");
	CHECK(!captured.durable && captured.pause_ns > 0);
	ok(ckpt_wait(rig->engine, &final, &err), &err, "wait");
	CHECK(final.durable && strcmp(final.id, captured.id) == 0);
	CHECK(ckpt_wait(rig->engine, &final, &err) == 0 && final.id[0] == '\0');
	for (unsigned i = 0; i < 4; i++) {
		ok(ckpt_take(rig->engine, &request, &captured, &err), &err, "captured");
		int second = ckpt_take(rig->engine, &request, &final, &err);
		CHECK(second == -EBUSY || second == 0);
		usleep(i * 2000);
		struct ckpt_progress what, after;
		bool there = ckpt_cancel(rig->engine, &what);
		if (there) {
			ckpt_wait_end(rig->engine, &what);
			ckpt_progress(rig->engine, &after);
			CHECK(what.active && !after.active);
		}
		int r = ckpt_wait(rig->engine, &final, &err);
		CHECK(r == 0 || (there && r == -ECANCELED));
		check_progress(rig);
	}
	CHECK(!ckpt_cancel(rig->engine, NULL));
	ok(take(rig, true, NULL, &final, &err), &err, "after cancel");
	disk_fill(rig, 'c');
	CHECK(disk_letter(rig) == 'c');
}

/* The other VMs of a group, as a member meets them: one that fails at one place, and looks whether the VM stands where it must. */
struct others {
	struct rig *rig;
	char group[STORE_ID_BYTES];
	int fails_at; /* -1: nowhere */
	unsigned met; /* a bit for each place */
};

static int meet_others(void *opaque, enum ckpt_meeting where, const char *checkpoint, const volatile bool *cancel, struct err *err)
{
	struct others *others = opaque;
	bool stands = where == CKPT_MEET_STOPPED || where == CKPT_MEET_PARKED || where == CKPT_MEET_RESTORED;
	CHECK(strlen(checkpoint) == STORE_ID_BYTES - 1 && !*cancel);
	CHECK(vm_is_quiesced(&others->rig->vm) == stands);
	others->met |= 1u << where;
	if (others->fails_at == (int)where)
		return err_set(err, ERR_FAILED, ECANCELED, "the others cannot");
	return where == CKPT_MEET_PREPARED ? store_group_commit(others->rig->store, others->group, NULL, err) : 0;
}

static void test_group(struct rig *rig)
{
	struct others others = {.rig = rig};
	struct ckpt_group group = {.id = others.group, .tag = "", .members = "engine other", .meet = meet_others, .opaque = &others};
	struct ckpt_request request = {.live = true, .wait = CKPT_WAIT_DURABLE, .group = &group};
	struct ckpt_revert_result reverted;
	struct ckpt_result result;
	struct err err = ERR_INIT;
	char before[STORE_ID_BYTES], after[STORE_ID_BYTES];
	ckpt_position(rig->engine, before);
	for (others.fails_at = CKPT_MEET_STAGED; others.fails_at <= CKPT_MEET_PREPARED; others.fails_at++) {
		ok(store_group_begin(rig->store, NULL, others.group, &err), &err, "begin");
		CHECK(ckpt_take(rig->engine, &request, &result, &err) == -ECANCELED && strstr(err.message, "the others cannot"));
		CHECK(store_group_settle(rig->store, others.group, NULL) == -ECANCELED);
		ckpt_position(rig->engine, after);
		CHECK(strcmp(before, after) == 0);
		check_progress(rig);
	}
	others.fails_at = -1;
	others.met = 0;
	disk_fill(rig, 'g');
	rig->toy.counter = 77;
	ok(store_group_begin(rig->store, NULL, others.group, &err), &err, "begin");
	ok(ckpt_take(rig->engine, &request, &result, &err), &err, "take in a group");
	CHECK(result.durable && others.met == (1u << CKPT_MEET_STAGED | 1u << CKPT_MEET_STOPPED | 1u << CKPT_MEET_PREPARED));
	struct store_checkpoint taken;
	ok(store_checkpoint_get(rig->store, result.id, &taken, &err), &err, "get");
	CHECK(strcmp(taken.group.id, others.group) == 0 && taken.group.members && strcmp(taken.group.members, "engine other") == 0);
	store_checkpoint_free(&taken);
	disk_fill(rig, 'h');
	rig->toy.counter = 78;
	others.fails_at = CKPT_MEET_CHECKED;
	CHECK(ckpt_revert_in_group(rig->engine, result.id, true, &group, &reverted, &err) == -ECANCELED);
	CHECK(disk_letter(rig) == 'h' && rig->toy.counter == 78);
	check_progress(rig);
	/* Behind that it goes through with it, whatever the others do. */
	for (others.fails_at = CKPT_MEET_PARKED; others.fails_at <= CKPT_MEET_RESTORED; others.fails_at++) {
		others.met = 0;
		rig->toy.counter = 78;
		ok(ckpt_revert_in_group(rig->engine, result.id, true, &group, &reverted, &err), &err, "revert in a group");
		CHECK(others.met == (1u << CKPT_MEET_CHECKED | 1u << CKPT_MEET_PARKED | 1u << CKPT_MEET_RESTORED));
		CHECK(disk_letter(rig) == 'g' && rig->toy.counter == 77);
		check_progress(rig);
	}
}

/* A layer with one flipped bit: refused, and the machine has noticed nothing. */
static void test_damage(struct rig *rig)
{
	struct ckpt_result result;
	struct ckpt_revert_result reverted;
	struct store_checkpoint checkpoint;
	struct err err = ERR_INIT;
	char path[256];
	uint8_t byte = 0;
	disk_fill(rig, 'd');
	ok(take(rig, true, NULL, &result, &err), &err, "take");
	disk_fill(rig, 'e');
	ok(store_checkpoint_get(rig->store, result.id, &checkpoint, &err), &err, "get");
	snprintf(path, sizeof(path), "%s/layers/%s.mem", rig->store_path, checkpoint.memory_layer);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	off_t at = lseek(fd, 0, SEEK_DATA) + 4100;
	CHECK(fd >= 0 && pread(fd, &byte, 1, at) == 1);
	byte ^= 4;
	CHECK(pwrite(fd, &byte, 1, at) == 1);
	CHECK(ckpt_revert(rig->engine, result.id, true, &reverted, &err) < 0 && err.class == ERR_DAMAGED);
	check_progress(rig);
	CHECK(disk_letter(rig) == 'e');
	byte ^= 4;
	CHECK(pwrite(fd, &byte, 1, at) == 1);
	ok(ckpt_revert(rig->engine, result.id, true, &reverted, &err), &err, "mended");
	CHECK(disk_letter(rig) == 'd');
	close(fd);
	store_checkpoint_free(&checkpoint);
}

/* --- files that are damaged between two reverts --- */

/* One page of a paused VM, and where its checkpoint has it. */
struct victim {
	struct rig *rig;
	struct ckpt_result result;
	char layer_path[256], manifest_path[256];
	uint64_t page;
	int fd;
};

static void flip(const struct victim *v, uint64_t page)
{
	uint8_t byte = 0;
	off_t at = (off_t)(page * PAGE_BYTES + 100);
	CHECK(pread(v->fd, &byte, 1, at) == 1);
	byte ^= 4;
	CHECK(pwrite(v->fd, &byte, 1, at) == 1);
}

/* The guest writes `count` pages and goes back: refused, and then they are as it wrote them, or all of it is there. */
static void write_and_revert(const struct victim *v, uint64_t page, uint64_t count, bool damaged)
{
	struct rig *rig = v->rig;
	struct ckpt_revert_result reverted;
	struct err err = ERR_INIT;
	static const char text[] = "other content";
	for (uint64_t p = page; p < page + count; p++)
		ok(mem_write(rig->vm.mem, p * PAGE_BYTES + 200, text, sizeof(text), &err), &err, "write");
	int r = ckpt_revert(rig->engine, v->result.id, false, &reverted, &err);
	CHECK(vm_is_quiesced(&rig->vm) && ckpt_check(rig->engine, NULL) == 0);
	if (damaged) {
		CHECK(r < 0 && err.class == ERR_DAMAGED);
		CHECK(memcmp(mem_base(rig->vm.mem) + page * PAGE_BYTES + 200, text, sizeof(text)) == 0);
		return;
	}
	ok(r, &err, "revert");
	CHECK(no_dirty_log || reverted.restored_pages == count);
	CHECK(memcmp(rig->reference, mem_base(rig->vm.mem), MEMORY_BYTES) == 0);
}

/* Another file with the same content in the place of the manifest: what was kept of the checkpoint must be read again. */
static void renew_manifest(const struct victim *v)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	char other[300];
	snprintf(other, sizeof(other), "%s.new", v->manifest_path);
	read_file(v->manifest_path, &text);
	int fd = open(other, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && write(fd, text.data, text.length) == (ssize_t)text.length);
	close(fd);
	CHECK(rename(other, v->manifest_path) == 0);
}

static bool victim_init(struct victim *v, struct rig *rig)
{
	const struct ckpt_request request = {.full = true, .wait = CKPT_WAIT_DURABLE};
	struct store_checkpoint checkpoint;
	struct err err = ERR_INIT;
	*v = (struct victim){.rig = rig, .page = 50, .fd = -1};
	if (!ok(ckpt_take(rig->engine, &request, &v->result, &err), &err, "take") ||
	    !ok(store_checkpoint_get(rig->store, v->result.id, &checkpoint, &err), &err, "get"))
		return false;
	memcpy(rig->reference, mem_base(rig->vm.mem), MEMORY_BYTES);
	snprintf(v->layer_path, sizeof(v->layer_path), "%s/layers/%s.mem", rig->store_path, checkpoint.memory_layer);
	snprintf(v->manifest_path, sizeof(v->manifest_path), "%s/checkpoints/%s/manifest", rig->store_path, v->result.id);
	store_checkpoint_free(&checkpoint);
	v->fd = open(v->layer_path, O_RDWR | O_CLOEXEC);
	return v->fd >= 0;
}

static void test_damage_between_reverts(struct rig *rig)
{
	struct victim v;
	struct err err = ERR_INIT;
	uint64_t pages = MEMORY_BYTES / PAGE_BYTES;
	vm_quiesce_request(&rig->vm);
	vm_quiesce_wait(&rig->vm, NULL);
	/* Pages of which none is zero. */
	for (uint64_t p = 0; p < pages; p++)
		mem_write(rig->vm.mem, p * PAGE_BYTES + 3000, "#", 1, &err);
	CHECK(victim_init(&v, rig));
	write_and_revert(&v, v.page, 1, false);
	/* Not read yet: found. */
	flip(&v, v.page + 1);
	write_and_revert(&v, v.page + 1, 1, true);
	write_and_revert(&v, v.page, 2, true);
	flip(&v, v.page + 1);
	write_and_revert(&v, v.page, 2, false);
	/* In memory, and checked when it was read: what is put back is right, whatever the file says now. Where nobody knows what was written
	 * all is read each time. */
	flip(&v, v.page);
	write_and_revert(&v, v.page, 1, no_dirty_log);
	/* Read again: found. */
	renew_manifest(&v);
	write_and_revert(&v, v.page, 1, true);
	flip(&v, v.page);
	write_and_revert(&v, v.page, 1, false);
	/* More than is kept in memory, and than is put back from there. */
	write_and_revert(&v, 3, 2000, false);
	flip(&v, 1800);
	write_and_revert(&v, 3, 2000, true);
	flip(&v, 1800);
	write_and_revert(&v, 3, pages - 3, false);
	flip(&v, pages - 2);
	write_and_revert(&v, 3, pages - 3, true);
	flip(&v, pages - 2);
	write_and_revert(&v, 3, pages - 3, false);
	/* Cut off. */
	renew_manifest(&v);
	CHECK(ftruncate(v.fd, 1 << 20) == 0);
	write_and_revert(&v, pages - 2, 1, true);
	/* A manifest that is no more. */
	struct ckpt_revert_result reverted;
	CHECK(unlink(v.manifest_path) == 0);
	CHECK(ckpt_revert(rig->engine, v.result.id, false, &reverted, &err) < 0);
	CHECK(ckpt_check(rig->engine, NULL) == 0);
	close(v.fd);
	vm_resume(&rig->vm, true);
	check_progress(rig);
}

/* --- fault points: this program again, with VMCP_FAULT set --- */

/* A checkpoint that meets the fault, one that does not, a revert that meets it, one that does not. */
static int child(const char *dir)
{
	struct rig rig = {0};
	struct ckpt_result first, second;
	struct ckpt_revert_result reverted;
	struct err err = ERR_INIT, failed = ERR_INIT;
	rig_names(&rig, dir);
	if (fault_init(&err) != 0 || !rig_start(&rig, &err))
		return 1;
	disk_fill(&rig, 'a');
	int r = take(&rig, true, NULL, &first, &failed);
	printf("  first checkpoint: %s\n", r == 0 ? "taken" : failed.message);
	check_progress(&rig);
	disk_fill(&rig, 'b');
	r = take(&rig, true, NULL, &second, &failed);
	if (r != 0 && strstr(failed.message, "fault point")) { /* one that only this one passes */
		printf("  second checkpoint: %s\n", failed.message);
		check_progress(&rig);
		r = take(&rig, true, NULL, &second, &failed);
	}
	/* Protection that was lost is not had again; without userfaultfd there is none to begin with, and this guest may be too fast. */
	if (r != 0 && (failed.class == ERR_HOST || failed.number == EAGAIN || failed.number == ENOBUFS))
		r = take(&rig, false, NULL, &second, &failed);
	ok(r, &failed, "second checkpoint");
	disk_fill(&rig, 'c');
	r = ckpt_revert(rig.engine, second.id, true, &reverted, &failed);
	printf("  revert: %s\n", r == 0 ? "done" : failed.message);
	if (ckpt_check(rig.engine, &err) == 0) {
		check_progress(&rig);
	} else {
		CHECK(r != 0 && vm_is_quiesced(&rig.vm));
		CHECK(take(&rig, true, NULL, &first, &err) != 0);
	}
	ok(ckpt_revert(rig.engine, second.id, true, &reverted, &err), &err, "second revert");
	CHECK(ckpt_check(rig.engine, &err) == 0);
	CHECK(disk_letter(&rig) == 'b');
	check_progress(&rig);
	ok(take(&rig, false, NULL, &first, &err), &err, "last checkpoint");
	rig_end(&rig);
	check_image(rig.disk_path);
	return check_report();
}

/* After a death: the disk reads as one of its whole states, the store opens, and what it lists can be read. */
static void check_remains(const char *dir)
{
	struct rig rig = {0};
	struct err err = ERR_INIT;
	uint8_t *data = aligned_alloc(PAGE_BYTES, PATTERN_BYTES);
	rig_names(&rig, dir);
	if (ok(store_open(rig.store_path, true, &rig.store, &err), &err, "store") &&
	    ok(loop_create(&rig.loop, &err), &err, "loop") && ok(cow_io_create(rig.loop, &rig.io, &err), &err, "io") &&
	    ok(cow_open(rig.io, rig.disk_path, 0, &rig.disk, &err), &err, "disk after death")) {
		ok(cow_read_sync(rig.disk, 0, data, PATTERN_BYTES, &err), &err, "read");
		char letter = pattern_letter(data);
		CHECK(letter == '\0' || letter == 'a' || letter == 'b' || letter == 'c');
		struct store_checkpoint *list;
		size_t count = 0;
		ok(store_checkpoint_list(rig.store, NULL, &list, &count, &err), &err, "list");
		for (size_t i = 0; i < count; i++) {
			struct store_checkpoint c;
			CLEANUP_BUF struct buf state = BUF_INIT;
			if (ok(store_checkpoint_get(rig.store, list[i].id, &c, &err), &err, "manifest")) {
				ok(store_checkpoint_read(rig.store, &c, "state", &state, &err), &err, "state");
				store_checkpoint_free(&c);
			}
			store_checkpoint_free(&list[i]);
		}
		free(list);
		cow_close(rig.disk, NULL);
		cow_io_destroy(rig.io);
		loop_destroy(rig.loop);
		store_close(rig.store);
		check_image(rig.disk_path);
	}
	free(data);
}

static void run_child(unsigned number, const char *name, const char *action)
{
	char dir[] = "engine_test.XXXXXX", fault[64];
	CHECK(mkdtemp(dir) != NULL);
	CLEANUP_FREE char *full = realpath(dir, NULL);
	snprintf(fault, sizeof(fault), "%u:%s", number, action);
	printf("%u %s %s\n", number, name, action);
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		setenv("VMCP_FAULT", fault, 1);
		alarm(300); /* a machine that hangs is a failure */
		execl("/proc/self/exe", "engine_test", full, (char *)NULL);
		_exit(127);
	}
	int status = 0;
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
	if (strcmp(action, "kill") == 0 && WIFSIGNALED(status))
		check_remains(full);
	else
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	file_remove_tree(AT_FDCWD, full, NULL);
}

static void test_fault_points(void)
{
	unsigned number;
	const char *meaning, *name;
	for (unsigned i = 0; (name = fault_name(i, &number, &meaning)) != NULL; i++) {
		/* Those from 310 on are of the store alone: its own tests pass them. */
		if (number < 200 || number > 309)
			continue;
		run_child(number, name, "eio");
#if !defined(__SANITIZE_ADDRESS__) /* of one that dies it says nothing */
		run_child(number, name, "kill");
#endif
	}
}

static void test_machine(void)
{
	struct rig rig = {0};
	struct err err = ERR_INIT;
	char dir[] = "engine_test.XXXXXX";
	CHECK(mkdtemp(dir) != NULL);
	CLEANUP_FREE char *full = realpath(dir, NULL);
	rig_names(&rig, full);
	if (rig_start(&rig, &err)) {
		test_back_and_forth(&rig);
		test_tree(&rig);
		test_in_a_row(&rig);
		test_oracle(&rig);
		test_unchanged_disk(&rig);
		test_settled(&rig);
		test_background_and_cancel(&rig);
		test_group(&rig);
		test_damage(&rig);
		test_damage_between_reverts(&rig);
		rig_end(&rig);
		check_image(rig.disk_path);
	}
	file_remove_tree(AT_FDCWD, full, NULL);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		return child(argv[1]);
	test_machine();
	no_dirty_log = true;
	test_machine();
	if (!UNDER_TSAN)
		test_fault_points();
	return check_report();
}
