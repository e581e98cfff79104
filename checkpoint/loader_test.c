/* Starting from a checkpoint's memory: what is mapped, copied and filled in later is what was saved, and damage is noticed. Not a Criterion test: runs under
 * ThreadSanitizer too. */
#include "checkpoint/loader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/file.h"
#include "checkpoint/sums.h"
#include "tests/lib/check.h"


#define MEMORY_BYTES (64u << 20)
#define PAGES	     (MEMORY_BYTES / PAGE_BYTES)
#define LAYERS	     5u

/* --- a VM as the loader sees it --- */

struct vm {
	struct mem *mem;
	uint64_t entry_ns;
	_Atomic unsigned failures, damages;
	struct err why; /* read after the loader's end */
};

struct mem *vm_memory(struct vm *vm) { return vm->mem; }
uint64_t vm_first_entry_ns(const struct vm *vm) { return vm->entry_ns; }
void vm_busy_processors(const struct vm *vm, cpu_set_t *out)
{
	(void)vm;
	CPU_ZERO(out);
}
void vm_fail(struct vm *vm, const struct err *err)
{
	(void)err;
	vm->failures++;
}
static void damaged(void *opaque, const struct err *err)
{
	struct vm *vm = opaque;
	vm->why = *err;
	vm->damages++;
}

/* --- a checkpoint whose pages lie in several layers --- */

struct rig {
	struct store *store;
	char dir[64], id[STORE_ID_BYTES], layers[LAYERS][STORE_ID_BYTES];
	uint8_t layer_of[PAGES]; /* 0: zero */
	uint8_t *reference;
};

static void fill_page(uint8_t *page, uint64_t number, unsigned layer)
{
	for (unsigned i = 0; i < PAGE_BYTES; i += 8)
		put_le64(page + i, number * 1000003 + layer * 7 + i + 1);
}

/* Stretches of up to `longest` pages. */
static void choose_layers(struct rig *rig, unsigned longest)
{
	uint64_t random = 4711;
	for (unsigned page = 0; page < PAGES;) {
		random = random * 6364136223846793005u + 1442695040888963407u;
		unsigned layer = (unsigned)(random >> 33) % (LAYERS + 1), count = (unsigned)(random >> 50) % longest + 1;
		for (; count > 0 && page < PAGES; count--)
			rig->layer_of[page++] = (uint8_t)layer;
	}
}

/* Every other layer is packed. */
static unsigned place_of(const struct rig *rig, unsigned page)
{
	unsigned layer = rig->layer_of[page], place = 0;
	if (layer % 2 == 0)
		return page;
	for (unsigned p = 0; p < page; p++)
		place += rig->layer_of[p] == layer;
	return place;
}

static void make_layer(struct rig *rig, struct store_draft *draft, unsigned layer)
{
	struct err err = ERR_INIT;
	int fd, sums_fd;
	uint64_t saved[BITMAP_WORDS(PAGES)] = {0};
	uint64_t *sums = xcalloc(PAGES, sizeof(*sums));
	CHECK(store_draft_memory_layer(draft, rig->layers[layer - 1], &fd, &sums_fd, &err) == 0);
	for (unsigned page = 0; page < PAGES; page++) {
		uint8_t *at = rig->reference + (size_t)page * PAGE_BYTES;
		if (rig->layer_of[page] != layer)
			continue;
		fill_page(at, page, layer);
		sums[page] = page_sum(page, at);
		bitmap_fill(saved, page, 1);
		CHECK(pwrite(fd, at, PAGE_BYTES, (off_t)place_of(rig, page) * PAGE_BYTES) == PAGE_BYTES);
	}
	CHECK(page_sums_write(sums_fd, saved, layer % 2 ? saved : NULL, sums, PAGES, &err) == 0);
	close(fd);
	close(sums_fd);
	free(sums);
}

static void make_index(const struct rig *rig, struct page_index *out)
{
	*out = (struct page_index){.page_count = PAGES, .layer_count = LAYERS};
	out->layers = xcalloc(LAYERS, sizeof(*out->layers));
	memcpy(out->layers, rig->layers, sizeof(rig->layers));
	out->extents = xcalloc(PAGES, sizeof(*out->extents));
	for (unsigned page = 0; page < PAGES; page++) {
		if (page == 0 || rig->layer_of[page] != rig->layer_of[page - 1])
			out->extents[out->extent_count++] =
				(struct index_extent){.first = page, .layer = rig->layer_of[page]};
		out->extents[out->extent_count - 1].count++;
	}
}

/* A checkpoint that has `layer` as its own, and `index`. */
static void commit(struct rig *rig, unsigned layer, const struct page_index *index)
{
	struct err err = ERR_INIT;
	struct store_draft *draft;
	CLEANUP_BUF struct buf file = BUF_INIT;
	struct store_checkpoint c = {.cpus = 1,
				     .vm = "toy",
				     .vm_uuid = "00000000-0000-0000-0000-000000000000",
				     .memory_bytes = MEMORY_BYTES,
				     .config_text = xstrdup("[vm]\nname = toy\n")};
	struct page_index full;
	CHECK(store_draft_begin(rig->store, &draft, &err) == 0);
	make_layer(rig, draft, layer);
	if (!index)
		make_index(rig, &full);
	CHECK(page_index_encode(index ? index : &full, &file, &err) == 0);
	if (!index)
		page_index_free(&full);
	CHECK(store_draft_put(draft, "index", file.data, file.length, &err) == 0);
	CHECK(store_draft_put(draft, "state", "the state", 9, &err) == 0);
	memcpy(c.memory_layer, rig->layers[layer - 1], STORE_ID_BYTES);
	CHECK(store_draft_commit(draft, &c, &err) == 0);
	memcpy(rig->id, c.id, STORE_ID_BYTES);
	store_checkpoint_free(&c);
}

static void rig_make(struct rig *rig, unsigned longest)
{
	struct err err = ERR_INIT;
	struct index_extent zeroes = {.count = PAGES};
	const struct page_index nothing = {.page_count = PAGES, .extent_count = 1, .extents = &zeroes};
	snprintf(rig->dir, sizeof(rig->dir), "loader_test.XXXXXX");
	CHECK(mkdtemp(rig->dir) != NULL);
	rig->reference = xcalloc(1, MEMORY_BYTES);
	choose_layers(rig, longest);
	CHECK(store_open(rig->dir, true, &rig->store, &err) == 0);
	for (unsigned layer = 1; layer <= LAYERS; layer++)
		commit(rig, layer, layer < LAYERS ? &nothing : NULL);
}

static void rig_free(struct rig *rig)
{
	store_close(rig->store);
	file_remove_tree(AT_FDCWD, rig->dir, NULL);
	free(rig->reference);
}

static int start(struct rig *rig, struct vm *vm, struct loader **loader, struct err *err)
{
	const struct loader_config config = {
		.vm = vm, .store = rig->store, .checkpoint = rig->id, .damaged = damaged, .opaque = vm};
	struct page_index index;
	*vm = (struct vm){.entry_ns = 1};
	*loader = NULL;
	make_index(rig, &index);
	CHECK(mem_create_private(MEMORY_BYTES, &vm->mem, err) == 0);
	return loader_start(&config, &index, loader, err);
}

static bool has_working_set(const struct rig *rig)
{
	char path[256];
	snprintf(path, sizeof(path), "%s/checkpoints/%s/working-set", rig->dir, rig->id);
	return access(path, R_OK) == 0;
}

/* A page of a layer that lies in a stretch of at least `count` pages of that layer. */
static unsigned find_page(const struct rig *rig, unsigned count)
{
	for (unsigned page = PAGES / 2, run = 1; page < PAGES - 1; page++) {
		run = rig->layer_of[page] && rig->layer_of[page] == rig->layer_of[page - 1] ? run + 1 : 1;
		if (rig->layer_of[page] && run >= count)
			return page;
	}
	CHECK(false);
	return 0;
}

static void flip(const struct rig *rig, unsigned page)
{
	char path[256];
	uint8_t byte;
	snprintf(path, sizeof(path), "%s/layers/%s.mem", rig->dir, rig->layers[rig->layer_of[page] - 1]);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	off_t at = (off_t)place_of(rig, page) * PAGE_BYTES + 99;
	CHECK(fd >= 0 && pread(fd, &byte, 1, at) == 1);
	byte ^= 0x10;
	CHECK(pwrite(fd, &byte, 1, at) == 1);
	close(fd);
}

/* --- tests --- */

static void test_content(struct rig *rig)
{
	struct err err = ERR_INIT;
	struct loader *loader;
	struct vm vm;
	CHECK(start(rig, &vm, &loader, &err) == 0);
	/* From behind, against the direction of who fills. */
	for (unsigned page = PAGES; page-- > 0;)
		CHECK(memcmp(mem_base(vm.mem) + (size_t)page * PAGE_BYTES, rig->reference + (size_t)page * PAGE_BYTES, PAGE_BYTES) == 0);
	memset(mem_base(vm.mem), 0xee, MEMORY_BYTES); /* ours alone */
	uint64_t until = clock_now_ns() + 60000000000ull;
	while (!has_working_set(rig) && clock_now_ns() < until)
		usleep(10000);
	CHECK(has_working_set(rig));
	loader_destroy(loader);
	CHECK(vm.failures == 0 && vm.damages == 0);
	mem_destroy(vm.mem);
	/* Again, with what was recorded. */
	CHECK(start(rig, &vm, &loader, &err) == 0);
	CHECK(memcmp(mem_base(vm.mem), rig->reference, MEMORY_BYTES) == 0);
	loader_destroy(loader);
	CHECK(vm.failures == 0);
	mem_destroy(vm.mem);
}

static void test_end_at_any_time(struct rig *rig)
{
	for (unsigned i = 0; i < 10; i++) {
		struct err err = ERR_INIT;
		struct loader *loader;
		struct vm vm;
		CHECK(start(rig, &vm, &loader, &err) == 0);
		usleep(i * 500);
		loader_destroy(loader);
		CHECK(vm.failures == 0);
		mem_destroy(vm.mem);
	}
}

static void wait_for_damage(struct vm *vm)
{
	uint64_t until = clock_now_ns() + 60000000000ull;
	while (vm->failures == 0 && clock_now_ns() < until)
		usleep(1000);
	CHECK(vm->failures == 1);
}

/* A changed page that is mapped: the VM is stopped, with an error that names it. */
static void test_changed_page(struct rig *rig)
{
	unsigned page = find_page(rig, 20);
	struct err err = ERR_INIT;
	struct loader *loader;
	struct vm vm;
	char number[32];
	flip(rig, page);
	CHECK(start(rig, &vm, &loader, &err) == 0);
	wait_for_damage(&vm);
	CHECK(vm.damages == 1);
	loader_destroy(loader);
	snprintf(number, sizeof(number), "page %u ", page);
	CHECK(vm.why.class == ERR_DAMAGED && strstr(vm.why.message, number));
	CHECK(strstr(vm.why.message, rig->layers[rig->layer_of[page] - 1]) != NULL);
	mem_destroy(vm.mem);
	flip(rig, page);
}

/* A changed page that is filled in while the guest runs: nobody ever sees it, the process ends. */
static void test_changed_scattered_page(struct rig *rig)
{
	unsigned page = find_page(rig, 1);
	flip(rig, page);
	pid_t pid = fork();
	if (pid == 0) {
		struct err err = ERR_INIT;
		struct loader *loader;
		struct vm vm;
		if (start(rig, &vm, &loader, &err) != 0)
			_exit(err.class == ERR_DAMAGED ? 1 : 3); /* without userfaultfd it was copied, and refused */
		_exit(memcmp(mem_base(vm.mem), rig->reference, MEMORY_BYTES) == 0 ? 4 : 5);
	}
	int status = 0;
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 1);
	flip(rig, page);
}

static int open_checks(const struct rig *rig)
{
	char path[256];
	snprintf(path, sizeof(path), "%s/checkpoints/%s/checks", rig->dir, rig->id);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0);
	return fd;
}

/* Until its check is over: what it touched is recorded after that. */
static void start_and_wait(struct rig *rig, struct vm *vm, struct loader **loader)
{
	char path[256];
	struct err err = ERR_INIT;
	uint64_t until = clock_now_ns() + 60000000000ull;
	snprintf(path, sizeof(path), "%s/checkpoints/%s/working-set", rig->dir, rig->id);
	unlink(path);
	CHECK(start(rig, vm, loader, &err) == 0);
	while (!has_working_set(rig) && clock_now_ns() < until)
		usleep(1000);
	CHECK(has_working_set(rig));
}

/*
 * VMs that start while another one's check is under way wait for it, and do not go by it: it may have read a page before they mapped it. By one that began
 * after that they go, however many they are, and by none that found damage or never ended.
 */
static void test_turns(struct rig *rig)
{
	enum { VMS = 5 };
	const struct flock held = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	struct vm vm[VMS], first;
	struct loader *loader[VMS], *first_loader;
	struct err err = ERR_INIT;
	unsigned page = find_page(rig, 20);
	start_and_wait(rig, &first, &first_loader);
	CHECK(first.failures == 0);
	int fd = open_checks(rig);
	struct {
		uint64_t begun, passed;
	} before, after;
	CHECK(pread(fd, &before, sizeof(before), 24) == sizeof(before) && before.begun == before.passed);
	/* Somebody checks: nobody else does. */
	CHECK(fcntl(fd, F_OFD_SETLK, &held) == 0);
	for (unsigned i = 0; i < VMS; i++)
		CHECK(start(rig, &vm[i], &loader[i], &err) == 0);
	flip(rig, page);
	usleep(300000);
	for (unsigned i = 0; i < VMS; i++)
		CHECK(vm[i].failures == 0);
	/* It ends, as by kill -9. What it would have found each finds by itself, as no check passes. */
	close(fd);
	for (unsigned i = 0; i < VMS; i++) {
		wait_for_damage(&vm[i]);
		loader_destroy(loader[i]);
		mem_destroy(vm[i].mem);
	}
	flip(rig, page);
	fd = open_checks(rig);
	CHECK(pread(fd, &after, sizeof(after), 24) == sizeof(after));
	CHECK(after.begun == before.begun + VMS && after.passed == before.passed);
	/* The same, and all is whole: one of them checks for all. */
	CHECK(fcntl(fd, F_OFD_SETLK, &held) == 0);
	for (unsigned i = 0; i < VMS; i++)
		CHECK(start(rig, &vm[i], &loader[i], &err) == 0);
	close(fd);
	fd = open_checks(rig);
	uint64_t until = clock_now_ns() + 60000000000ull;
	do {
		usleep(1000);
		CHECK(pread(fd, &after, sizeof(after), 24) == sizeof(after) && clock_now_ns() < until);
	} while (after.passed == before.passed);
	flip(rig, page); /* those that would check now see it */
	usleep(300000);
	CHECK(pread(fd, &after, sizeof(after), 24) == sizeof(after));
	CHECK(after.begun == before.begun + VMS + 1 && after.passed == after.begun);
	for (unsigned i = 0; i < VMS; i++) {
		loader_destroy(loader[i]);
		CHECK(vm[i].failures == 0);
		mem_destroy(vm[i].mem);
	}
	/* One that comes later does not go by it. */
	CHECK(start(rig, &vm[0], &loader[0], &err) == 0);
	wait_for_damage(&vm[0]);
	loader_destroy(loader[0]);
	mem_destroy(vm[0].mem);
	flip(rig, page);
	/* A file that is not what it should be is nobody's check. */
	CHECK(pwrite(fd, "nonsense", 8, 32) == 8);
	close(fd);
	flip(rig, page);
	CHECK(start(rig, &vm[0], &loader[0], &err) == 0);
	wait_for_damage(&vm[0]);
	loader_destroy(loader[0]);
	mem_destroy(vm[0].mem);
	flip(rig, page);
	loader_destroy(first_loader);
	mem_destroy(first.mem);
}

static void test_missing_layer(struct rig *rig)
{
	char path[256], away[256];
	struct err err = ERR_INIT;
	struct loader *loader;
	struct vm vm;
	snprintf(path, sizeof(path), "%s/layers/%s.sums", rig->dir, rig->layers[0]);
	snprintf(away, sizeof(away), "%s/away", rig->dir);
	CHECK(rename(path, away) == 0);
	CHECK(start(rig, &vm, &loader, &err) < 0 && loader == NULL && err.class == ERR_DAMAGED);
	CHECK(strstr(err.message, rig->layers[0]) != NULL);
	mem_destroy(vm.mem);
	CHECK(rename(away, path) == 0);
	snprintf(path, sizeof(path), "%s/layers/%s.mem", rig->dir, rig->layers[1]);
	CHECK(truncate(path, MEMORY_BYTES / 2) == 0);
	err = ERR_INIT;
	CHECK(start(rig, &vm, &loader, &err) < 0 && err.class == ERR_DAMAGED);
	mem_destroy(vm.mem);
}

int main(void)
{
	/* Long stretches are mapped, short ones are many and filled in later. */
	for (unsigned longest = 2; longest <= 200; longest = longest * 10) {
		struct rig *rig = xcalloc(1, sizeof(*rig));
		rig_make(rig, longest);
		test_content(rig);
		test_end_at_any_time(rig);
		if (longest > 8) {
			test_changed_page(rig);
			test_turns(rig);
		} else {
			test_changed_scattered_page(rig);
		}
		test_missing_layer(rig);
		rig_free(rig);
		free(rig);
	}
	return check_report();
}
