/* Removing checkpoints, collecting what is left, and the catalogue's references. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/fault.h"
#include "base/log.h"
#include "checkpoint/store/store_internal.h"
#include "checkpoint/store/store_test.h"
#include "cowdisk/block.h"

TestSuite(store_remove, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

static int remove_one(const char *id, bool tagged, struct err *err)
{
	struct store_freed freed = {0};
	return store_checkpoint_remove(store_test_store, id, tagged, &freed, err);
}

static void must_remove(const char *id)
{
	struct err err = ERR_INIT;
	cr_assert_eq(remove_one(id, false, &err), 0, "%s", err.message);
}

static void expect_parent(const char *id, const char *parent)
{
	struct store_checkpoint c;
	cr_assert_eq(store_checkpoint_get(store_test_store, id, &c, NULL), 0);
	cr_expect_str_eq(c.parent, parent);
	store_checkpoint_free(&c);
}

static void open_again(void)
{
	store_close(store_test_store);
	store_test_store = store_test_must_open();
}

/* A chain of `count`, each the child of the one before. */
static void take_chain(char (*ids)[STORE_ID_BYTES], unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		store_test_must_take(&(struct store_test_plan){.parent = i ? ids[i - 1] : NULL}, ids[i]);
}

Test(store_remove, children_stay_whole_and_come_from_the_nearest_ancestor_left)
{
	char ids[5][STORE_ID_BYTES], fork[STORE_ID_BYTES];

	take_chain(ids, 5);
	store_test_must_take(&(struct store_test_plan){.parent = ids[2]}, fork);
	must_remove(ids[2]);
	store_test_expect_exact(store_test_store, "a middle one and fork");
	expect_parent(ids[3], ids[1]);
	expect_parent(fork, ids[1]);
	must_remove(ids[1]);
	expect_parent(fork, ids[0]);
	must_remove(ids[0]);
	expect_parent(ids[3], "");
	store_test_expect_exact(store_test_store, "the root");
	cr_expect_eq(store_test_count_in("layers", ".mem"), 6, "all are still named by indices");
	must_remove(ids[4]);
	cr_expect_eq(store_test_count_in("layers", ".mem"), 5);
	must_remove(fork);
	must_remove(ids[3]);
	cr_expect_eq(store_test_count_in("layers", ""), 0);
	store_test_expect_exact(store_test_store, "nothing left");
	struct err err = ERR_INIT;
	cr_expect_eq(remove_one(ids[3], false, &err), -ENOENT);
	cr_expect_eq(err.class, ERR_NOT_FOUND);
}

Test(store_remove, where_a_vm_stands)
{
	char ids[3][STORE_ID_BYTES], at[STORE_ID_BYTES];
	struct store_vm_lock *lock;
	struct err err = ERR_INIT;

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	take_chain(ids, 3);
	cr_assert_eq(store_vm_lock(store_test_store, "web", &lock, NULL), 0);
	cr_expect_eq(remove_one(ids[2], true, &err), -EBUSY);
	cr_expect_eq(err.class, ERR_STATE);
	cr_expect_not_null(strstr(err.message, "web"));
	cr_expect(err.hint[0]);
	must_remove(ids[1]);
	store_vm_unlock(lock);
	must_remove(ids[2]);
	store_test_position_of(store_test_store, "web", at);
	cr_expect_str_eq(at, ids[0]);
	must_remove(ids[0]);
	store_test_position_of(store_test_store, "web", at);
	cr_expect_str_eq(at, "");
}

Test(store_remove, what_is_held_stays)
{
	char ids[2][STORE_ID_BYTES];
	struct store_pin *pin, *other;
	struct err err = ERR_INIT;

	take_chain(ids, 2);
	cr_assert_eq(store_pin(store_test_store, ids[0], &pin, NULL), 0);
	cr_assert_eq(store_pin(store_test_store, ids[0], &other, NULL), 0);
	store_unpin(other);
	cr_expect_eq(remove_one(ids[0], true, &err), -EBUSY);
	cr_expect_eq(err.class, ERR_STATE);
	store_test_expect_exact(store_test_store, "refused");
	store_unpin(pin);
	store_unpin(NULL);
	must_remove(ids[0]);
	cr_expect_eq(store_pin(store_test_store, ids[0], &pin, &err), -ENOENT);
	cr_expect_eq(store_pin(store_test_store, "../../etc", &pin, &err), -ENOENT);
}

Test(store_remove, a_tag_protects)
{
	char id[STORE_ID_BYTES], found[STORE_ID_BYTES];
	struct err err = ERR_INIT;

	store_test_must_take(&(struct store_test_plan){.tag = "good"}, id);
	cr_expect_eq(remove_one(id, false, &err), -EEXIST);
	cr_expect_eq(err.class, ERR_STATE);
	cr_expect_not_null(strstr(err.message, "good"));
	cr_expect_eq(remove_one(id, true, NULL), 0);
	cr_expect_neq(store_resolve(store_test_store, "good", found, NULL), 0);
	store_test_must_take(&(struct store_test_plan){.tag = "good"}, id);
}

/* --- dying and failing on the way --- */

static const unsigned points[] = {310, 311, 312, 313, 314, 315};

static void arm(unsigned point, const char *action)
{
	char text[64];
	snprintf(text, sizeof(text), "%u:1:%s", point, action);
	setenv("VMCP_FAULT", text, 1);
	if (fault_init(NULL))
		abort();
}

static void disarm(void)
{
	unsetenv("VMCP_FAULT");
	fault_init(NULL);
}

/* A chain of five of which the last two and a fork go: their layers die one after the other. */
static void expect_removal_is_whole(unsigned point, const char *what, const char *id)
{
	char text[64], found[STORE_ID_BYTES];

	snprintf(text, sizeof(text), "point %u: %s", point, what);
	cr_expect_eq(store_resolve(store_test_store, id, found, NULL) == 0, point == 310, "%s", text);
	store_test_expect_exact(store_test_store, text);
}

Test(store_remove, killed_at_every_fault_point)
{
	char ids[4][STORE_ID_BYTES];

	for (size_t i = 0; i < ARRAY_LENGTH(points); i++) {
		take_chain(ids, 4);
		for (unsigned which = 3; which >= 2; which--) {
			int status;
			store_close(store_test_store);
			pid_t child = fork();
			if (child == 0) {
				struct store_freed freed = {0};
				struct store *mine;
				if (store_open(store_test_folder, true, &mine, NULL))
					_exit(1);
				arm(points[i], "kill");
				store_checkpoint_remove(mine, ids[which], false, &freed, NULL);
				_exit(2);
			}
			cr_assert_eq(waitpid(child, &status, 0), child);
			cr_assert(WIFSIGNALED(status), "point %u was not passed", points[i]);
			store_test_store = store_test_must_open();
			expect_removal_is_whole(points[i], "killed", ids[which]);
			if (points[i] == 310)
				must_remove(ids[which]);
		}
		must_remove(ids[0]);
		must_remove(ids[1]);
		cr_expect_eq(store_test_count_in("layers", ""), 0);
	}
}

Test(store_remove, an_error_at_every_fault_point)
{
	char ids[3][STORE_ID_BYTES];

	for (size_t i = 0; i < ARRAY_LENGTH(points); i++) {
		struct err err = ERR_INIT;

		take_chain(ids, 3);
		arm(points[i], i % 2 ? "eio" : "enospc");
		log_set_sink(open("/dev/null", O_WRONLY | O_CLOEXEC), "");
		int rc = remove_one(ids[1], false, &err);
		cr_expect_eq(rc, points[i] == 310 ? -ENOSPC : 0, "point %u: %s", points[i], err.message);
		disarm();
		if (points[i] == 310)
			store_test_expect_exact(store_test_store, "refused");
		open_again();
		expect_removal_is_whole(points[i], "failed", ids[1]);
		for (unsigned k = 3; k-- > 0;)
			remove_one(ids[k], false, NULL);
		open_again();
		cr_expect_eq(store_test_count_in("layers", ""), 0, "point %u", points[i]);
	}
}

/* --- several at once --- */

Test(store_remove, of_several_those_that_may_go_go)
{
	char ids[6][STORE_ID_BYTES];
	struct store_freed freed = {0};
	struct store_pin *pin;
	struct err err = ERR_INIT;

	take_chain(ids, 5);
	cr_assert_eq(store_tag(store_test_store, ids[1], "good", NULL), 0);
	cr_assert_eq(store_pin(store_test_store, ids[3], &pin, NULL), 0);
	store_new_id(ids[5]); /* there is none */
	cr_assert_eq(store_checkpoints_remove(store_test_store, (const char(*)[STORE_ID_BYTES])ids, 6, &freed, &err), 0, "%s", err.message);
	cr_expect_eq(freed.checkpoints, 3);
	cr_expect_eq(store_test_count_listed(store_test_store, NULL), 2);
	expect_parent(ids[3], ids[1]);
	expect_parent(ids[1], "");
	store_test_expect_exact(store_test_store, "three of six");
	store_unpin(pin);
	cr_assert_eq(store_checkpoints_remove(store_test_store, (const char(*)[STORE_ID_BYTES])ids, 0, &freed, &err), 0);
	cr_assert_eq(store_checkpoints_remove(store_test_store, (const char(*)[STORE_ID_BYTES])ids, 5, &freed, &err), 0);
	cr_expect_eq(freed.checkpoints, 4);
	cr_assert_eq(remove_one(ids[1], true, NULL), 0);
	cr_expect_eq(store_test_count_in("layers", ""), 0);
	cr_expect_eq(store_test_count_in("staging", ""), 0);
}

/* Each passage of each point: some of the three have gone then, others have not. */
static void remove_three(const char (*ids)[STORE_ID_BYTES], unsigned point, unsigned passage, const char *action)
{
	struct store_freed freed = {0};
	struct store *mine;
	char text[64];

	log_set_sink(open("/dev/null", O_WRONLY | O_CLOEXEC), "");
	if (store_open(store_test_folder, true, &mine, NULL))
		_exit(1);
	snprintf(text, sizeof(text), "%u:%u:%s", point, passage, action);
	setenv("VMCP_FAULT", text, 1);
	if (fault_init(NULL))
		_exit(1);
	store_checkpoints_remove(mine, ids, 3, &freed, NULL);
	_exit(0);
}

Test(store_remove, several_at_once_and_trouble_at_every_fault_point)
{
	static const char *const actions[] = {"kill", "eio"};
	char ids[5][STORE_ID_BYTES];

	for (size_t i = 0; i < ARRAY_LENGTH(points) * 6; i++) {
		unsigned point = points[i / 6], passage = (unsigned)(i % 3) + 1;
		struct store_freed freed = {0};
		char text[64];
		int status;

		snprintf(text, sizeof(text), "point %u:%u:%s", point, passage, actions[i / 3 % 2]);
		take_chain(ids, 5);
		store_close(store_test_store);
		pid_t child = fork();
		if (child == 0)
			remove_three((const char(*)[STORE_ID_BYTES]) & ids[1], point, passage, actions[i / 3 % 2]);
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert(WIFSIGNALED(status) || WEXITSTATUS(status) == 0, "%s", text);
		store_test_store = store_test_must_open();
		store_test_expect_exact(store_test_store, text);
		cr_expect_eq(store_test_count_in("staging", ""), 0, "%s", text);
		cr_assert_eq(store_checkpoints_remove(store_test_store, (const char(*)[STORE_ID_BYTES])ids, 5, &freed, NULL), 0, "%s", text);
		cr_expect_eq(store_test_count_in("layers", ""), 0, "%s", text);
	}
}

/* A checkpoint whose entry is late names layers of its parent, which somebody removes before anybody opens the store again. */
Test(store_remove, a_late_entry_keeps_its_layers)
{
	char ids[2][STORE_ID_BYTES], late[STORE_ID_BYTES];

	take_chain(ids, 2);
	arm(304, "eio");
	log_set_sink(open("/dev/null", O_WRONLY | O_CLOEXEC), "");
	store_test_must_take(&(struct store_test_plan){.parent = ids[1]}, late);
	disarm();
	cr_expect_eq(store_test_count_listed(store_test_store, NULL), 2);
	must_remove(ids[1]);
	must_remove(ids[0]);
	expect_parent(late, "");
	store_test_expect_exact(store_test_store, "the late one");
}

/* --- the catalogue --- */

static void run_sql(const char *sql)
{
	char path[160];
	sqlite3 *db;
	snprintf(path, sizeof(path), "%s/catalog.db", store_test_folder);
	cr_assert_eq(sqlite3_open(path, &db), SQLITE_OK);
	cr_assert_eq(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK, "%s", sqlite3_errmsg(db));
	sqlite3_close(db);
}

static const char to_version_1[] =
	"DROP TABLE resources; DROP TABLE hosts; DROP TABLE templates; DROP TABLE refs; DROP TABLE layers; DROP TABLE images; DROP INDEX checkpoints_parent; DROP INDEX checkpoints_memory_layer; DROP INDEX checkpoints_periodic;"
	"DROP TABLE groups; DROP INDEX checkpoints_group; ALTER TABLE checkpoints DROP COLUMN group_id;"
	"ALTER TABLE vms DROP COLUMN note; ALTER TABLE checkpoints DROP COLUMN periodic;"
	"CREATE TABLE refs(layer TEXT NOT NULL, checkpoint TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY(layer, checkpoint)) WITHOUT ROWID;"
	"PRAGMA user_version = 1";

Test(store_remove, an_older_catalogue_learns_the_references)
{
	char ids[4][STORE_ID_BYTES], at[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	take_chain(ids, 4);
	cr_assert_eq(store_tag(store_test_store, ids[1], "later", NULL), 0);
	store_close(store_test_store);
	run_sql(to_version_1);
	int status;
	pid_t child = fork();
	if (child == 0) {
		struct store *mine;
		arm(317, "kill");
		_exit(store_open(store_test_folder, true, &mine, NULL));
	}
	cr_assert_eq(waitpid(child, &status, 0), child);
	cr_assert(WIFSIGNALED(status));
	store_test_store = store_test_must_open();
	store_test_position_of(store_test_store, "web", at);
	cr_expect_str_eq(at, ids[3]);
	cr_expect_eq(remove_one(ids[1], false, NULL), -EEXIST, "the tag is still there");
	must_remove(ids[0]);
	cr_expect_eq(remove_one(ids[1], true, NULL), 0);
	store_test_expect_exact(store_test_store, "upgraded");
	expect_parent(ids[2], "");
}

Test(store_remove, a_lost_catalogue_is_made_anew)
{
	char ids[3][STORE_ID_BYTES], path[160];

	take_chain(ids, 3);
	store_test_must_take(&(struct store_test_plan){.parent = ids[2], .tag = "good", .periodic = true}, path);
	must_remove(ids[1]);
	store_close(store_test_store);
	for (const char *const *suffix = (const char *const[]){"", "-wal", "-shm", NULL}; *suffix; suffix++) {
		snprintf(path, sizeof(path), "%s/catalog.db%s", store_test_folder, *suffix);
		unlink(path);
	}
	store_test_store = store_test_must_open();
	cr_assert_eq(store_test_count_listed(store_test_store, NULL), 3);
	cr_assert_eq(store_resolve(store_test_store, "good", path, NULL), 0);
	/* What became of a parent that was removed is known to the catalogue only. */
	must_remove(ids[2]);
	must_remove(ids[0]);
	expect_parent(path, "");
	store_close(store_test_store);
	run_sql("PRAGMA user_version = 99");
	struct err err = ERR_INIT;
	cr_assert_eq(store_open(store_test_folder, true, &store_test_store, &err), -ENOTSUP);
	cr_assert_not_null(strstr(err.message, "newer"));
	store_test_store = NULL;
}

/* --- gc --- */

static void touch_layer(const char *name)
{
	char path[200];
	snprintf(path, sizeof(path), "%s/layers/%s", store_test_folder, name);
	store_test_write_text(path, "x");
}

#define ORPHAN "00000000000000000000000000000001"

static struct store_gc_result collect(void)
{
	struct store_gc_result result;
	struct err err = ERR_INIT;
	cr_assert_eq(store_gc(store_test_store, &result, &err), 0, "%s", err.message);
	return result;
}

Test(store_remove, gc_takes_what_nobody_needs)
{
	char ids[2][STORE_ID_BYTES], layer[STORE_ID_BYTES];
	struct store_draft *draft;
	int mem, sums;

	take_chain(ids, 2);
	touch_layer(ORPHAN ".mem");
	touch_layer(ORPHAN ".sums");
	touch_layer("README");
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, layer, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	struct store_gc_result result = collect();
	cr_expect_eq(result.memory_layers, 1);
	cr_expect_gt(result.bytes, 0);
	cr_expect_eq(store_test_count_in("layers", ".mem"), 3, "two checkpoints' and the draft's");
	store_draft_abort(draft);
	store_test_expect_exact(store_test_store, "collected");
	cr_expect_eq(store_test_count_in("layers", "README"), 1);
	cr_expect_eq(collect().memory_layers, 0);
}

Test(store_remove, gc_removes_nothing_while_a_checkpoint_cannot_be_read)
{
	char path[200];
	struct store_gc_result result;
	struct err err = ERR_INIT;

	touch_layer(ORPHAN ".mem");
	snprintf(path, sizeof(path), "%s/checkpoints/%s", store_test_folder, ORPHAN);
	cr_assert_eq(mkdir(path, 0700), 0);
	strcat(path, "/manifest");
	store_test_write_text(path, "{}");
	cr_expect_lt(store_gc(store_test_store, &result, &err), 0);
	cr_expect_eq(err.class, ERR_DAMAGED);
	cr_expect_not_null(strstr(err.hint, "vmcp rm"));
	cr_expect_eq(store_test_count_in("layers", ".mem"), 1);
	must_remove(ORPHAN);
	cr_expect_eq(collect().memory_layers, 1);
	cr_expect_eq(store_test_count_in("checkpoints", ""), 0);
}

Test(store_remove, gc_forgets_what_was_removed_by_hand)
{
	char ids[3][STORE_ID_BYTES], command[300];

	take_chain(ids, 3);
	snprintf(command, sizeof(command), "rm -r %s/checkpoints/%s", store_test_folder, ids[2]);
	cr_assert_eq(system(command), 0);
	cr_expect_eq(collect().forgotten, 1);
	store_test_expect_exact(store_test_store, "forgotten");
}

/* A qcow2 image at `path` on `backing` (NULL: none). */
static void make_image(const char *path, const char *backing)
{
	struct cow_create create = {.size_bytes = backing ? 0 : 1 << 20, .backing = backing, .backing_format = COW_FORMAT_QCOW2};
	struct err err = ERR_INIT;
	unlink(path);
	create.size_bytes = 1 << 20;
	cr_assert_eq(cow_create(path, &create, &err), 0, "%s", err.message);
}

/* A checkpoint with the image at store_test_image as its disk's layer, and a new overlay on that in its place. */
static void take_with_disk(const char *parent, char id[STORE_ID_BYTES], char layer[200])
{
	struct store_checkpoint c;
	store_test_must_take(&(struct store_test_plan){.parent = parent, .disk = true}, id);
	cr_assert_eq(store_checkpoint_get(store_test_store, id, &c, NULL), 0);
	snprintf(layer, 200, "%s/layers/%.32s.qcow2", store_test_folder, c.disks[0].layer);
	store_checkpoint_free(&c);
	make_image(store_test_image, layer);
}

Test(store_remove, gc_keeps_what_disks_stand_on)
{
	char ids[4][STORE_ID_BYTES], layers[4][200], copy[300], command[700];
	struct store_gc_result result;
	struct err err = ERR_INIT;

	make_image(store_test_image, NULL);
	cr_assert_eq(store_note_image(store_test_store, store_test_image, NULL), 0);
	for (unsigned i = 0; i < 4; i++)
		take_with_disk(i ? ids[i - 1] : NULL, ids[i], layers[i]);
	must_remove(ids[1]);
	result = collect();
	cr_expect_eq(result.disk_layers, 0);
	cr_expect_eq(result.kept_disk_layers, 1, "the next one stands on it");
	/* One that is being made has no header yet, which is no reason not to collect. One that a checkpoint names has one: without it nobody knows what it stands on. */
	struct store_draft *draft;
	char *made;
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_new_disk(draft, (char[STORE_ID_BYTES]){0}, &made, NULL), 0);
	store_test_write_text(made, "not yet");
	collect();
	store_draft_abort(draft);
	free(made);
	snprintf(command, sizeof(command), "cp %s %s/saved && printf QFO | dd of=%s conv=notrunc status=none", layers[2], store_test_work, layers[2]);
	cr_assert_eq(system(command), 0);
	cr_expect_lt(store_gc(store_test_store, &result, &err), 0);
	cr_expect_not_null(strstr(err.message, layers[2]));
	cr_expect_eq(store_test_count_in("layers", ".qcow2"), 4);
	snprintf(command, sizeof(command), "cp %s/saved %s", store_test_work, layers[2]);
	cr_assert_eq(system(command), 0);
	err = ERR_INIT;
	must_remove(ids[2]);
	must_remove(ids[3]);
	cr_expect_eq(collect().disk_layers, 0, "the disk stands on it");
	/* The disk goes back to the first one. A copy of its present image is a disk of another VM. */
	snprintf(copy, sizeof(copy), "%s/vms/other", store_test_folder);
	cr_assert_eq(mkdir(copy, 0700), 0);
	snprintf(command, sizeof(command), "cp %s %s/disk.qcow2", store_test_image, copy);
	cr_assert_eq(system(command), 0);
	make_image(store_test_image, layers[0]);
	cr_expect_eq(collect().disk_layers, 0, "the other VM's disk stands on them");
	/* What cannot be read may stand on anything. */
	strcat(copy, "/disk.qcow2");
	cr_assert_eq(truncate(copy, 50), 0);
	cr_expect_lt(store_gc(store_test_store, &result, &err), 0);
	cr_expect_not_null(strstr(err.message, "disk.qcow2"));
	cr_expect_eq(store_test_count_in("layers", ".qcow2"), 4);
	cr_assert_eq(unlink(copy), 0);
	cr_expect_eq(collect().disk_layers, 3);
	cr_expect_eq(store_test_count_in("layers", ".qcow2"), 1);
	must_remove(ids[0]);
	cr_expect_eq(collect().disk_layers, 0, "the disk stands on it");
	cr_assert_eq(unlink(store_test_image), 0);
	cr_expect_eq(collect().disk_layers, 1);
}

Test(store_remove, gc_leaves_the_disks_of_drafts_alone)
{
	char layer[STORE_ID_BYTES], *path;
	struct store_draft *draft;

	make_image(store_test_image, NULL);
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_disk_layer(draft, "root", store_test_image, "qcow2", layer, &path, NULL), 0);
	cr_expect_eq(collect().disk_layers, 0);
	store_draft_abort(draft);
	free(path);
	/* The link of a draft that died is nobody's, unless the disk stands on it. */
	touch_layer(ORPHAN ".raw");
	cr_expect_eq(collect().disk_layers, 1);
}

/* --- adopted layers --- */

static struct store_draft *make_spare(char layer[STORE_ID_BYTES])
{
	struct store_draft *made;
	int mem, sums;
	cr_assert_eq(store_draft_begin(store_test_store, &made, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(made, layer, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	return made;
}

Test(store_remove, an_adopted_layer_lives_and_dies_with_its_draft)
{
	char layer[STORE_ID_BYTES], own[STORE_ID_BYTES];
	struct store_draft *draft, *made = make_spare(layer);
	struct err err = ERR_INIT;
	struct store_checkpoint c = {.vm = "web", .memory_bytes = MEMORY_BYTES};
	int mem, sums;

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_adopt(draft, made, &err), 0, "%s", err.message);
	cr_expect_eq(store_test_count_in("staging", ".lock"), 1, "its own draft is gone");
	cr_expect_eq(collect().memory_layers, 0);
	store_draft_abort(draft);
	cr_expect_eq(store_test_count_in("layers", ""), 0);
	/* Committed: it lives as long as an index names it. */
	made = make_spare(layer);
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, own, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	memcpy(c.memory_layer, own, sizeof(own));
	cr_assert_eq(store_draft_adopt(draft, made, NULL), 0);
	cr_assert_eq(store_draft_put(draft, "state", "the state", 9, NULL), 0);
	cr_assert_eq(store_test_put_index(store_test_store, draft, NULL, layer, NULL), 0);
	cr_assert_eq(store_draft_commit(draft, &c, &err), 0, "%s", err.message);
	cr_expect_eq(collect().memory_layers, 0);
	cr_expect_eq(store_test_count_in("layers", ".mem"), 2);
	must_remove(c.id);
	cr_expect_eq(store_test_count_in("layers", ""), 0);
}

Test(store_remove, a_spare_layer_dies_with_its_maker)
{
	char layer[STORE_ID_BYTES];
	int status;

	for (unsigned adopt = 0; adopt < 2; adopt++) {
		pid_t child = fork();
		if (child == 0) {
			struct store_draft *draft, *made = make_spare(layer);
			if (adopt) {
				arm(307, "kill");
				if (store_draft_begin(store_test_store, &draft, NULL) == 0)
					store_draft_adopt(draft, made, NULL);
			}
			_exit(0);
		}
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert_eq(WIFSIGNALED(status), adopt);
		cr_assert_eq(store_test_count_in("layers", ".mem"), 1);
		open_again();
		store_test_expect_exact(store_test_store, "a spare layer");
	}
}

/* --- keep --- */

static size_t surplus(uint64_t keep, char (**ids)[STORE_ID_BYTES])
{
	size_t count;
	cr_assert_eq(store_surplus(store_test_store, "web", &(struct store_keep){.newest = keep}, 100, ids, &count, NULL), 0);
	return count;
}

Test(store_remove, keep_lets_go_what_is_old_periodic_and_nothing_else)
{
	char ids[10][STORE_ID_BYTES], fork[STORE_ID_BYTES], (*gone)[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	cr_assert_eq(store_test_put_vm(store_test_store, "other", NULL), 0);
	for (unsigned i = 0; i < 10; i++) /* 3 by the user, 5 with a tag */
		store_test_must_take(&(struct store_test_plan){.parent = i ? ids[i - 1] : NULL, .periodic = i != 3, .tag = i == 5 ? "good" : NULL},
				     ids[i]);
	cr_assert_eq(store_vm_set_position(store_test_store, "other", ids[1], NULL), 0);
	store_test_must_take(&(struct store_test_plan){.parent = ids[2], .vm = "other"}, fork);
	cr_assert_eq(store_vm_set_position(store_test_store, "other", ids[1], NULL), 0);
	cr_assert_eq(surplus(3, &gone), 3);
	cr_expect_str_eq(gone[0], ids[0]);
	cr_expect_str_eq(gone[1], ids[4]);
	cr_expect_str_eq(gone[2], ids[6]);
	free(gone);
	cr_assert_eq(surplus(8, &gone), 1);
	free(gone);
	cr_assert_eq(surplus(9, &gone), 0);
	free(gone);
	must_remove(fork);
	cr_assert_eq(surplus(3, &gone), 4, "2 is no fork any more");
	free(gone);
	bool may[3];
	struct store_checkpoint c[3];
	char layers[3][STORE_ID_BYTES];
	const unsigned from[3] = {6, 0, 2};
	for (unsigned i = 0; i < 3; i++) {
		cr_assert_eq(store_checkpoint_get(store_test_store, ids[from[i]], &c[i], NULL), 0);
		memcpy(layers[i], c[i].memory_layer, STORE_ID_BYTES);
		store_checkpoint_free(&c[i]);
	}
	cr_assert_eq(store_mergeable(store_test_store, "web", (const char (*)[STORE_ID_BYTES])layers, 3, may, NULL), 0);
	cr_expect(!may[0] && !may[1] && !may[2], "own layers of checkpoints");
	must_remove(ids[6]);
	must_remove(ids[0]);
	cr_assert_eq(store_mergeable(store_test_store, "web", (const char (*)[STORE_ID_BYTES])layers, 3, may, NULL), 0);
	cr_expect(may[0], "named by 7, 8 and 9 only");
	cr_expect(!may[1], "the user's checkpoint 3 names it");
	cr_assert_eq(store_mergeable(store_test_store, "other", (const char (*)[STORE_ID_BYTES])layers, 3, may, NULL), 0);
	cr_expect(!may[0], "of another VM");
}

Test(store_remove, keep_leaves_one_of_each_hour_and_day)
{
	/* Minutes since the beginning of a day of UTC: three on one day, two of them in one hour; five on the next, three of them in one hour; one on the third. */
	static const uint64_t minutes[] = {10, 20, 70, 1440, 1500, 1510, 1559, 1560, 2900};
	const uint64_t day = 20000ull * 86400 * 1000000000;
	char ids[9][STORE_ID_BYTES], (*gone)[STORE_ID_BYTES];
	static const struct {
		struct store_keep keep;
		unsigned left; /* a bit for each */
	} cases[] = {
		{{1, 0, 0}, 0x100}, {{1, 1, 0}, 0x100}, {{1, 3, 0}, 0x1c0}, {{1, 4, 0}, 0x1c8}, {{1, 100, 0}, 0x1ce},
		{{1, 0, 2}, 0x180}, {{1, 0, 100}, 0x184}, {{2, 2, 3}, 0x184}, {{3, 0, 3}, 0x1c4}, {{9, 0, 0}, 0x1ff},
	};

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	for (unsigned i = 0; i < 9; i++)
		store_test_must_take(&(struct store_test_plan){.parent = i ? ids[i - 1] : NULL, .periodic = true,
							       .created_wall_ns = day + minutes[i] * 60000000000}, ids[i]);
	for (size_t k = 0; k < ARRAY_LENGTH(cases); k++) {
		unsigned left = 0x1ff;
		size_t count;
		cr_assert_eq(store_surplus(store_test_store, "web", &cases[k].keep, 100, &gone, &count, NULL), 0);
		for (size_t i = 0; i < count; i++)
			for (unsigned n = 0; n < 9; n++)
				left &= strcmp(gone[i], ids[n]) ? ~0u : ~(1u << n);
		cr_expect_eq(left, cases[k].left, "case %zu: left %x, not %x", k, left, cases[k].left);
		free(gone);
	}
}

Test(store_remove, a_tag_is_taken_away)
{
	char one[STORE_ID_BYTES], id[STORE_ID_BYTES], other[STORE_ID_BYTES];
	struct err err = ERR_INIT;

	store_test_must_take(&(struct store_test_plan){.tag = "good"}, one);
	store_test_must_take(&(struct store_test_plan){.parent = one}, other);
	cr_assert_eq(store_untag(store_test_store, "good", NULL), 0);
	cr_expect_eq(store_resolve(store_test_store, "good", id, &(struct err){0}), -ENOENT);
	cr_expect_eq(store_untag(store_test_store, "good", &err), -ENOENT);
	cr_expect_eq(store_untag(store_test_store, "no/tag", &(struct err){0}), -EINVAL);
	cr_assert_eq(store_tag(store_test_store, other, "good", NULL), 0, "the name is free again");
	cr_assert_eq(store_resolve(store_test_store, "good", id, NULL), 0);
	cr_expect_str_eq(id, other);
	open_again();
	cr_assert_eq(store_resolve(store_test_store, one, id, NULL), 0, "the checkpoint stays");
}

struct window {
	uint64_t bytes[12];
	size_t count, least;
	size_t first, length; /* wanted; length 0: none */
};

Test(store_remove, what_is_worth_merging)
{
	static const struct window cases[] = {
		{{1}, 1, 2, 0, 0},
		{{1, 1}, 2, 2, 0, 2},
		{{1, 2}, 2, 2, 0, 2},
		{{1, 3}, 2, 2, 0, 0}, /* the large one is not copied for the small one */
		{{3, 1}, 2, 2, 0, 0},
		{{1, 1, 1, 1}, 4, 5, 0, 0},
		{{1, 1, 1, 100}, 4, 2, 0, 3},
		{{100, 1, 1, 1, 100}, 5, 4, 0, 5}, /* two large ones are worth it */
		{{100, 1, 1, 1}, 4, 2, 1, 3},
		{{0, 0, 0}, 3, 2, 0, 3},
		{{1, 2, 6, 18, 54}, 5, 2, 0, 5}, /* each is twice all above */
		{{1, 2, 7, 40}, 4, 2, 0, 2},
	};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		const struct window *w = &cases[i];
		size_t first = 0, length = 0;
		cr_expect_eq(store_choose_window(w->bytes, w->count, w->least, &first, &length), w->length > 0, "case %zu", i);
		cr_expect_eq(length, w->length, "case %zu: %zu", i, length);
		cr_expect(length == 0 || first == w->first, "case %zu: from %zu", i, first);
	}
}

/* New layers of one size come at the top: few are left, and each byte is copied a few times only. */
Test(store_remove, merging_leaves_few_layers_and_copies_little)
{
	uint64_t bytes[64] = {0}, copied = 0;
	size_t count = 0, most = 0;

	for (unsigned n = 0; n < 5000; n++) {
		size_t first, length;

		memmove(bytes + 1, bytes, count * sizeof(*bytes));
		bytes[0] = 1;
		count++;
		while (store_choose_window(bytes, count, 8, &first, &length)) {
			for (size_t i = 1; i < length; i++)
				bytes[first] += bytes[first + i];
			copied += bytes[first];
			memmove(bytes + first + 1, bytes + first + length, (count - first - length) * sizeof(*bytes));
			count -= length - 1;
		}
		most = max_u64(most, count);
		cr_assert_lt(count, ARRAY_LENGTH(bytes));
	}
	cr_expect_leq(most, 20, "%zu layers", most);
	cr_expect_leq(copied, 5000 * 10, "%llu copied", (unsigned long long)copied);
}

/* What a removal that was cut off leaves beside a disk layer is about the file of then, not about one that a merge has put in its place since. */
Test(store_remove, a_recovered_removal_says_nothing_of_a_merged_file)
{
	char ids[2][STORE_ID_BYTES], layers[2][200], record[220], other[220], layer[STORE_ID_BYTES];
	uint64_t bytes, sum;
	struct stat st;

	make_image(store_test_image, NULL);
	for (unsigned i = 0; i < 2; i++)
		take_with_disk(i ? ids[i - 1] : NULL, ids[i], layers[i]);
	snprintf(layer, sizeof(layer), "%.32s", strrchr(layers[1], '/') + 1);
	arm(313, "eio");
	must_remove(ids[1]);
	disarm();
	cr_assert(disk_record_find(store_test_store, layer, "qcow2", &bytes, &sum));
	cr_assert_eq(stat(layers[1], &st), 0);
	/* As store_merge_commit does it. */
	disk_record_forget(store_test_store, layer, "qcow2");
	snprintf(other, sizeof(other), "%s.other", layers[1]);
	make_image(other, NULL);
	cr_assert_eq(truncate(other, st.st_size + 65536), 0);
	cr_assert_eq(rename(other, layers[1]), 0);
	open_again();
	cr_expect_eq(store_test_count_in("staging", ""), 0, "the removal was brought to its end");
	cr_expect_not(disk_record_find(store_test_store, layer, "qcow2", &bytes, &sum));
	snprintf(record, sizeof(record), "%s.sum", layers[1]);
	cr_expect_lt(access(record, F_OK), 0);
}
