/* The catalogue made anew. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sqlite3.h>

#include "base/fault.h"
#include "checkpoint/store/store_test.h"

TestSuite(store_rebuild, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

static void catalog_path(char path[160], const char *suffix) { snprintf(path, 160, "%s/catalog.db%s", store_test_folder, suffix); }

/* A chain of four of which the second is gone, a tag given later, a VM that stands at the last. */
static void make_history(char ids[4][STORE_ID_BYTES])
{
	struct store_freed freed = {0};
	struct err err = ERR_INIT;

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	for (unsigned i = 0; i < 4; i++)
		store_test_must_take(&(struct store_test_plan){.parent = i ? ids[i - 1] : NULL, .tag = i ? NULL : "born", .disk = i == 2}, ids[i]);
	cr_assert_eq(store_tag(store_test_store, ids[2], "later", NULL), 0);
	cr_assert_eq(store_note_image(store_test_store, store_test_image, NULL), 0);
	cr_assert_eq(store_checkpoint_remove(store_test_store, ids[1], false, &freed, &err), 0, "%s", err.message);
	store_close(store_test_store);
	store_test_store = NULL;
}

static void expect_history(char ids[4][STORE_ID_BYTES], bool taken_over)
{
	struct store_checkpoint *list;
	char found[STORE_ID_BYTES], at[STORE_ID_BYTES];
	size_t count;

	store_test_store = store_test_must_open();
	cr_assert_eq(store_checkpoint_list(store_test_store, NULL, &list, &count, NULL), 0);
	cr_assert_eq(count, 3);
	cr_expect_str_eq(list[0].id, ids[0]);
	cr_expect_str_eq(list[0].parent, "");
	cr_expect_str_eq(list[1].parent, taken_over ? ids[0] : "", "the parent of one whose parent was removed");
	cr_expect_str_eq(list[2].parent, ids[2]);
	for (size_t i = 0; i < count; i++)
		store_checkpoint_free(&list[i]);
	free(list);
	cr_expect_eq(store_resolve(store_test_store, "born", found, NULL), 0);
	cr_expect_str_eq(found, ids[0]);
	cr_expect_eq(store_resolve(store_test_store, "later", found, NULL) == 0, taken_over);
	if (taken_over) {
		store_test_position_of(store_test_store, "web", at);
		cr_expect_str_eq(at, ids[3]);
	}
	store_test_expect_exact(store_test_store, "rebuilt");
}

Test(store_rebuild, keeps_all_that_can_be_read)
{
	char ids[4][STORE_ID_BYTES];
	struct store_rebuilt made;
	struct err err = ERR_INIT;

	make_history(ids);
	cr_assert_eq(store_rebuild(store_test_folder, &made, &err), 0, "%s", err.message);
	cr_expect_eq(made.checkpoints, 3);
	cr_expect_eq(made.vms, 1);
	cr_expect(!made.lost_vms && !made.lost_tags && !made.lost_images);
	expect_history(ids, true);
}

Test(store_rebuild, makes_do_without_the_old_one)
{
	char ids[4][STORE_ID_BYTES], path[160];
	struct store_gc_result collected;
	struct store_rebuilt made;
	struct err err = ERR_INIT;

	make_history(ids);
	catalog_path(path, "");
	store_test_write_text(path, "this is no database, and what follows is not either: it is only long enough to be taken for one that was damaged");
	catalog_path(path, "-wal");
	store_test_write_text(path, "nor is this a log of it");
	cr_assert_eq(store_rebuild(store_test_folder, &made, &err), 0, "%s", err.message);
	cr_expect_eq(made.checkpoints, 3);
	cr_expect(made.lost_vms && made.lost_tags && made.lost_images);
	expect_history(ids, false);
	/* Which images stand on layers is not known: a disk layer that nobody names stays, and gc says why. */
	struct store_freed freed = {0};
	cr_assert_eq(store_checkpoint_remove(store_test_store, ids[2], true, &freed, &err), 0, "%s", err.message);
	cr_expect_neq(store_gc(store_test_store, &collected, &err), 0);
	cr_expect(strstr(err.message, "lost"), "%s", err.message);
	cr_expect_eq(store_test_count_in("layers", ".qcow2"), 1);
}

Test(store_rebuild, is_refused_while_others_have_the_store_open)
{
	char ids[4][STORE_ID_BYTES];
	struct store_rebuilt made;
	struct err err = ERR_INIT;

	make_history(ids);
	store_test_store = store_test_must_open();
	cr_expect_eq(store_rebuild(store_test_folder, &made, &err), -EBUSY);
	cr_expect_eq(err.class, ERR_STATE);
	store_close(store_test_store);
	cr_expect_eq(store_rebuild(store_test_folder, &made, &err), 0);
	expect_history(ids, true);
}

Test(store_rebuild, killed_at_every_fault_point)
{
	static const unsigned points[] = {317, 318, 319};
	char ids[4][STORE_ID_BYTES];
	struct store_rebuilt made;
	struct err err = ERR_INIT;

	make_history(ids);
	for (unsigned i = 0; i < 3; i++) {
		int status;
		pid_t child = fork();
		if (child == 0) {
			char text[16];
			snprintf(text, sizeof(text), "%u", points[i]);
			setenv("VMCP_FAULT", text, 1);
			fault_init(NULL);
			store_rebuild(store_test_folder, &made, NULL);
			_exit(0);
		}
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert(WIFSIGNALED(status), "point %u was not passed", points[i]);
		expect_history(ids, true);
		store_close(store_test_store);
		cr_assert_eq(store_rebuild(store_test_folder, &made, &err), 0, "point %u: %s", points[i], err.message);
		expect_history(ids, true);
		store_close(store_test_store);
	}
	store_test_store = NULL;
}
