#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/index.h"
#include "checkpoint/store/store_test.h"
#include "cowdisk/block.h"

char store_test_work[] = "/tmp/vmcp-store-test-XXXXXX";
char store_test_folder[64], store_test_image[64];
struct store *store_test_store;

struct store *store_test_must_open(void)
{
	struct store *opened = NULL;
	struct err err = ERR_INIT;

	cr_assert_eq(store_open(store_test_folder, true, &opened, &err), 0, "%s", err.message);
	return opened;
}

void store_test_write_text(const char *path, const char *text)
{
	FILE *file = fopen(path, "w");
	cr_assert_not_null(file);
	cr_assert_geq(fputs(text, file), 0);
	cr_assert_eq(fclose(file), 0);
}

void store_test_make_work(void)
{
	unsetenv("VMCP_FAULT");
	fault_init(NULL);
	log_set_level(LOG_LEVEL_ERROR);
	cr_assert_not_null(mkdtemp(store_test_work));
	snprintf(store_test_folder, sizeof(store_test_folder), "%s/store", store_test_work);
	snprintf(store_test_image, sizeof(store_test_image), "%s/root.qcow2", store_test_work);
	cr_assert_eq(cow_create(store_test_image, &(struct cow_create){.size_bytes = 512, .cluster_bytes = 512, .temporary = true}, NULL), 0);
	store_test_store = store_test_must_open();
}

void store_test_remove_work(void)
{
	store_close(store_test_store);
	cr_assert_eq(file_remove_tree(AT_FDCWD, store_test_work, NULL), 0);
}

/* --- what is in a store --- */

/* Names below `path`, sorted, one a line; without the catalogue's own files. */
static void list_tree(const char *path, const char *prefix, struct buf *out)
{
	struct dirent **entries;
	int count = scandir(path, &entries, NULL, alphasort);
	cr_assert_geq(count, 0, "%s", path);
	for (int i = 0; i < count; i++) {
		const char *name = entries[i]->d_name;
		char below[600], line[600];
		if (name[0] != '.' || strncmp(name, FILE_TEMP_PREFIX, 5) == 0) {
			snprintf(line, sizeof(line), "%s%s", prefix, name);
			if (strncmp(line, "catalog.db", 10) != 0) {
				buf_append(out, line, strlen(line), NULL);
				buf_append(out, "\n", 1, NULL);
			}
			snprintf(below, sizeof(below), "%s/%s", path, name);
			strcat(line, "/");
			if (entries[i]->d_type == DT_DIR)
				list_tree(below, line, out);
		}
		free(entries[i]);
	}
	free(entries);
}

char *store_test_listing(void)
{
	struct buf text = BUF_INIT;

	list_tree(store_test_folder, "", &text);
	buf_append(&text, "", 1, NULL);
	return (char *)text.data;
}

unsigned store_test_count_in(const char *folder, const char *suffix)
{
	char path[128];
	unsigned count = 0;
	snprintf(path, sizeof(path), "%s/%s", store_test_folder, folder);
	DIR *dir = opendir(path);
	cr_assert_not_null(dir);
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
		size_t n = strlen(entry->d_name), m = strlen(suffix);
		count += entry->d_name[0] != '.' && n >= m && strcmp(entry->d_name + n - m, suffix) == 0;
		count += strncmp(entry->d_name, FILE_TEMP_PREFIX, 5) == 0;
	}
	closedir(dir);
	return count;
}

/* --- taking --- */

/* An index of 64 pages: page 7 in its own layer, and one in each layer of the parent's index, as far as there is room; the rest zero. */
static int make_index(struct store *in, const char *parent, const char *own, struct buf *out, struct err *err)
{
	struct page_index index = {.page_count = MEMORY_BYTES / PAGE_BYTES};
	char layers[48][STORE_ID_BYTES];
	struct index_extent extents[64];
	struct store_checkpoint c;
	CLEANUP_BUF struct buf old = BUF_INIT;
	const char *names;
	uint32_t count = 0;

	if (parent && *parent && store_checkpoint_get(in, parent, &c, NULL) == 0) {
		if (store_checkpoint_read(in, &c, "index", &old, NULL) == 0)
			page_index_layers(old.data, old.length, &names, &count, NULL);
		store_checkpoint_free(&c);
	}
	memcpy(layers[index.layer_count++], own, STORE_ID_BYTES);
	for (uint32_t i = 0; i < count && i < 40; i++) {
		memcpy(layers[index.layer_count], names + i * 32, 32);
		layers[index.layer_count++][32] = '\0';
	}
	for (uint64_t page = 0; page < index.page_count; page++) {
		uint32_t layer = page == 7 ? 1 : page > 10 && page - 10 < index.layer_count ? (uint32_t)(page - 9) : 0;
		extents[index.extent_count++] = (struct index_extent){.first = page, .count = 1, .layer = layer};
	}
	index.layers = layers;
	index.extents = extents;
	return page_index_encode(&index, out, err);
}

int store_test_put_index(struct store *in, struct store_draft *draft, const char *parent, const char *own, struct err *err)
{
	CLEANUP_BUF struct buf file = BUF_INIT;
	int rc = make_index(in, parent, own, &file, err);

	return rc ? rc : store_draft_put(draft, "index", file.data, file.length, err);
}

static int fill_draft(struct store_draft *draft, const struct store_test_plan *plan, struct store_checkpoint *c,
		      struct err *err)
{
	uint8_t page[PAGE_BYTES];
	char *path;
	int mem, sums;
	int rc = store_draft_memory_layer(draft, c->memory_layer, &mem, &sums, err);

	if (rc)
		return rc;
	memset(page, 0x5a, sizeof(page));
	rc = file_pwrite_full(mem, page, sizeof(page), 7 * PAGE_BYTES, err);
	if (!rc)
		rc = file_pwrite_full(sums, "checksum", 8, 7 * 8, err);
	close(mem);
	close(sums);
	if (!rc && plan->disk) {
		c->disk_count = 1;
		c->disks = xcalloc(1, sizeof(*c->disks));
		snprintf(c->disks[0].disk, sizeof(c->disks[0].disk), "root");
		snprintf(c->disks[0].format, sizeof(c->disks[0].format), "qcow2");
		rc = store_draft_disk_layer(draft, "root", store_test_image, "qcow2", c->disks[0].layer, &path, err);
		if (!rc) {
			store_draft_switched(draft);
			free(path);
		}
	}
	if (!rc)
		rc = store_draft_put(draft, "state", "the state", 9, err);
	return rc ? rc : store_test_put_index(plan->store, draft, plan->parent, c->memory_layer, err);
}

int store_test_prepare(struct store *in, const struct store_test_plan *plan, struct store_draft **draft, struct store_checkpoint *c, struct err *err)
{
	struct store_test_plan filled = *plan;
	struct store_pin *pin = NULL;
	int rc = store_draft_begin(in, draft, err);

	*c = (struct store_checkpoint){.live = plan->live, .cpus = 2, .memory_bytes = MEMORY_BYTES, .saved_pages = 1, .periodic = plan->periodic};
	if (rc)
		return rc;
	filled.store = in;
	/* As the engine does; a parent that was removed meanwhile has no index to take from. */
	if (plan->parent && *plan->parent && store_pin(in, plan->parent, &pin, NULL))
		filled.parent = NULL;
	plan = &filled;
	snprintf(c->vm, sizeof(c->vm), "%s", plan->vm ? plan->vm : "web");
	snprintf(c->vm_uuid, sizeof(c->vm_uuid), VM_UUID);
	snprintf(c->parent, sizeof(c->parent), "%s", plan->parent ? plan->parent : "");
	snprintf(c->tag, sizeof(c->tag), "%s", plan->tag ? plan->tag : "");
	snprintf(c->group.id, sizeof(c->group.id), "%s", plan->group ? plan->group : "");
	c->group.members = plan->group ? xstrdup(plan->members) : NULL;
	c->created_wall_ns = plan->created_wall_ns ? plan->created_wall_ns : clock_wall_ns();
	c->message = xstrdup("a message");
	c->config_text = xstrdup("[vm]\nname = web\n");
	rc = fill_draft(*draft, plan, c, err);
	if (rc)
		store_draft_abort(*draft);
	store_unpin(pin);
	return rc;
}

int store_test_take(struct store *in, const struct store_test_plan *plan, char id[STORE_ID_BYTES], struct err *err)
{
	struct store_pin *pin = NULL;
	struct store_checkpoint c;
	struct store_draft *draft;

	/* Held until the commit. */
	if (plan->parent && *plan->parent)
		store_pin(in, plan->parent, &pin, NULL);
	int rc = store_test_prepare(in, plan, &draft, &c, err);
	if (!rc)
		rc = store_draft_commit(draft, &c, err);
	store_unpin(pin);
	if (id)
		snprintf(id, STORE_ID_BYTES, "%s", rc ? "" : c.id);
	store_checkpoint_free(&c);
	return rc;
}

void store_test_must_take(const struct store_test_plan *plan, char id[STORE_ID_BYTES])
{
	struct err err = ERR_INIT;
	cr_assert_eq(store_test_take(store_test_store, plan, id, &err), 0, "%s", err.message);
}

int store_test_put_vm(struct store *in, const char *name, struct err *err)
{
	struct store_vm vm = {.uuid = VM_UUID,
			      .state = "running",
			      .pid = 4711,
			      .memory_bytes = MEMORY_BYTES,
			      .cpus = 2,
			      .started_wall_ns = clock_wall_ns(),
			      .config_text = (char *)"[vm]\n"};
	snprintf(vm.name, sizeof(vm.name), "%s", name);
	return store_vm_put(in, &vm, err);
}

static bool has_all_layers(struct store *in, const struct buf *index, struct err *err)
{
	struct page_index read;
	bool good = page_index_decode(index->data, index->length, &read, err) == 0;

	for (uint32_t i = 0; good && i < read.layer_count; i++) {
		CLEANUP_CLOSE int mem = store_memory_layer_open(in, read.layers[i], err);
		CLEANUP_CLOSE int sums = store_memory_sums_open(in, read.layers[i], err);

		good = mem >= 0 && sums >= 0;
	}
	page_index_free(&read);
	return good;
}

/* True if every byte that the checkpoint needs is there. */
bool store_test_is_whole(struct store *in, const char *id, struct err *err)
{
	struct store_checkpoint c;
	CLEANUP_BUF struct buf state = BUF_INIT;
	CLEANUP_BUF struct buf table = BUF_INIT;
	char bytes[8];

	if (store_checkpoint_get(in, id, &c, err))
		return false;
	CLEANUP_CLOSE int mem = store_memory_layer_open(in, c.memory_layer, err);
	CLEANUP_CLOSE int sums = store_memory_sums_open(in, c.memory_layer, err);
	bool whole = mem >= 0 && sums >= 0 && store_checkpoint_read(in, &c, "state", &state, err) == 0 &&
		     store_checkpoint_read(in, &c, "index", &table, err) == 0 && state.length == 9 &&
		     has_all_layers(in, &table, err) &&
		     file_pread_full(mem, bytes, 8, 7 * PAGE_BYTES, err) == 0 && bytes[0] == 0x5a &&
		     file_pread_full(sums, bytes, 8, 7 * 8, err) == 0 && bytes[0] == 'c';
	for (uint32_t i = 0; whole && i < c.disk_count; i++) {
		char *path;
		whole = store_disk_layer_path(in, c.disks[i].layer, c.disks[i].format, &path, err) == 0;
		if (whole)
			free(path);
	}
	store_checkpoint_free(&c);
	return whole;
}

size_t store_test_count_listed(struct store *in, const char *vm)
{
	struct store_checkpoint *list;
	size_t count;

	cr_assert_eq(store_checkpoint_list(in, vm, &list, &count, NULL), 0);
	for (size_t i = 0; i < count; i++)
		store_checkpoint_free(&list[i]);
	free(list);
	return count;
}

void store_test_position_of(struct store *in, const char *name, char at[STORE_ID_BYTES])
{
	struct store_vm vm;
	cr_assert_eq(store_vm_get(in, name, &vm, NULL), 0);
	snprintf(at, STORE_ID_BYTES, "%s", vm.at);
	store_vm_free(&vm);
}

static void add_line(struct buf *text, const char *line)
{
	cr_assert_eq(buf_append(text, line, STORE_ID_BYTES, NULL), 0);
}

static int by_text(const void *a, const void *b) { return memcmp(a, b, STORE_ID_BYTES); }

/* Sorted, each once. */
static size_t sort_ids(struct buf *ids)
{
	size_t count = ids->length / STORE_ID_BYTES, kept = 0;
	if (count)
		qsort(ids->data, count, STORE_ID_BYTES, by_text);
	for (size_t i = 0; i < count; i++)
		if (kept == 0 || memcmp(ids->data + (kept - 1) * STORE_ID_BYTES, ids->data + i * STORE_ID_BYTES, STORE_ID_BYTES))
			memmove(ids->data + kept++ * STORE_ID_BYTES, ids->data + i * STORE_ID_BYTES, STORE_ID_BYTES);
	return kept;
}

static void add_needed(struct store *in, const char *id, struct buf *needed)
{
	struct store_checkpoint c;
	CLEANUP_BUF struct buf index = BUF_INIT;
	struct err err = ERR_INIT;
	const char *names;
	uint32_t count;

	cr_assert_eq(store_checkpoint_get(in, id, &c, &err), 0, "%s", err.message);
	cr_assert_eq(store_checkpoint_read(in, &c, "index", &index, &err), 0, "%s", err.message);
	cr_assert_eq(page_index_layers(index.data, index.length, &names, &count, &err), 0, "%s", err.message);
	add_line(needed, c.memory_layer);
	for (uint32_t i = 0; i < count; i++) {
		char name[STORE_ID_BYTES] = "";
		memcpy(name, names + i * 32, 32);
		add_line(needed, name);
	}
	store_checkpoint_free(&c);
}

void store_test_expect_exact(struct store *in, const char *what)
{
	struct store_checkpoint *list;
	struct buf needed = BUF_INIT, there = BUF_INIT;
	struct err err = ERR_INIT;
	size_t count;
	char path[128];

	cr_assert_eq(store_checkpoint_list(in, NULL, &list, &count, NULL), 0);
	for (size_t i = 0; i < count; i++) {
		cr_expect(store_test_is_whole(in, list[i].id, &err), "%s: %s", what, err.message);
		bool has_parent = !*list[i].parent;
		for (size_t j = 0; j < count; j++)
			has_parent |= !strcmp(list[j].id, list[i].parent);
		cr_expect(has_parent, "%s: a parent that is not there", what);
		add_needed(in, list[i].id, &needed);
	}
	for (size_t i = 0; i < count; i++)
		store_checkpoint_free(&list[i]);
	free(list);
	cr_expect_eq(store_test_count_in("checkpoints", ""), count, "%s", what);
	cr_expect_eq(store_test_count_in("staging", ""), 0, "%s", what);
	snprintf(path, sizeof(path), "%s/layers", store_test_folder);
	DIR *dir = opendir(path);
	cr_assert_not_null(dir);
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
		char name[STORE_ID_BYTES] = "";
		if (strlen(entry->d_name) < 36 || (strcmp(entry->d_name + 32, ".mem") && strcmp(entry->d_name + 32, ".sums")))
			continue;
		memcpy(name, entry->d_name, 32);
		add_line(&there, name);
	}
	closedir(dir);
	size_t files = there.length / STORE_ID_BYTES, layers = sort_ids(&there);
	cr_expect_eq(files, 2 * layers, "%s: .mem and .sums", what);
	size_t wanted = sort_ids(&needed);
	cr_expect_eq(layers, wanted, "%s: %zu memory layers are there, %zu are needed", what, layers, wanted);
	cr_expect(layers != wanted || layers == 0 || memcmp(there.data, needed.data, layers * STORE_ID_BYTES) == 0, "%s", what);
	buf_free(&needed);
	buf_free(&there);
}
