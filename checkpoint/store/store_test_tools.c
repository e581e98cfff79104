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
#include "checkpoint/store/store_test.h"

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
	store_test_write_text(store_test_image, "the disk");
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

static int fill_draft(struct store_draft *draft, const struct store_test_plan *plan, struct store_checkpoint *c,
		      struct err *err)
{
	uint8_t page[PAGE_BYTES];
	char *path;
	int mem, sums;
	int rc = store_draft_memory_layer(draft, MEMORY_BYTES, c->memory_layer, &mem, &sums, err);

	if (rc)
		return rc;
	memset(page, 0x5a, sizeof(page));
	rc = file_pwrite_full(mem, page, sizeof(page), 7 * PAGE_BYTES, err);
	if (!rc)
		rc = file_pwrite_full(sums, "checksum", 8, 7 * 8, err);
	fsync(mem);
	fsync(sums);
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
	return rc ? rc : store_draft_put(draft, "index", "the index", 9, err);
}

int store_test_take(struct store *in, const struct store_test_plan *plan, char id[STORE_ID_BYTES], struct err *err)
{
	struct store_checkpoint c = {.live = plan->live, .cpus = 2, .memory_bytes = MEMORY_BYTES, .saved_pages = 1};
	struct store_draft *draft;
	int rc = store_draft_begin(in, &draft, err);

	if (rc)
		return rc;
	snprintf(c.vm, sizeof(c.vm), "%s", plan->vm ? plan->vm : "web");
	snprintf(c.vm_uuid, sizeof(c.vm_uuid), VM_UUID);
	snprintf(c.parent, sizeof(c.parent), "%s", plan->parent ? plan->parent : "");
	snprintf(c.tag, sizeof(c.tag), "%s", plan->tag ? plan->tag : "");
	c.created_wall_ns = clock_wall_ns();
	c.message = xstrdup("a message");
	c.config_text = xstrdup("[vm]\nname = web\n");
	rc = fill_draft(draft, plan, &c, err);
	if (rc)
		store_draft_abort(draft);
	else
		rc = store_draft_commit(draft, &c, err);
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

int store_test_put_vm(struct store *in, const char *name)
{
	struct store_vm vm = {.uuid = VM_UUID,
			      .state = "running",
			      .pid = 4711,
			      .memory_bytes = MEMORY_BYTES,
			      .cpus = 2,
			      .started_wall_ns = clock_wall_ns(),
			      .config_text = (char *)"[vm]\n"};
	snprintf(vm.name, sizeof(vm.name), "%s", name);
	return store_vm_put(in, &vm, NULL);
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
		     memcmp(table.data, "the index", 9) == 0 &&
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
