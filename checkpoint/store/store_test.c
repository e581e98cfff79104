#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/fault.h"
#include "base/file.h"
#include "checkpoint/store/store_test.h"

TestSuite(store, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

/* --- opening --- */

Test(store, opens_again_and_is_private)
{
	struct stat st;

	cr_assert_eq(stat(store_test_folder, &st), 0);
	cr_assert_eq(st.st_mode & 0777, 0700);
	cr_assert_str_eq(store_path(store_test_store), store_test_folder);
	store_close(store_test_store);
	cr_assert_eq(store_open(store_test_folder, false, &store_test_store, NULL), 0);
}

Test(store, what_is_handed_over_is_in_the_log_and_complete)
{
	struct store_vm vm = {.name = "later", .state = "running", .pid = 1, .config_text = ""}, back;
	char log[128];

	snprintf(log, sizeof(log), "%s/catalog.db-wal", store_test_folder);
	for (int handed = 0; handed < 2; handed++) {
		vm.memory_bytes = 1000u + (unsigned)handed;
		cr_assert_eq(store_vm_put(store_test_store, &vm, NULL), 0);
		(handed ? store_hand_over : store_close)(store_test_store);
		cr_expect_eq(access(log, F_OK), handed ? 0 : -1);
		cr_assert_eq(store_open(store_test_folder, false, &store_test_store, NULL), 0);
		cr_assert_eq(store_vm_get(store_test_store, "later", &back, NULL), 0);
		cr_expect_eq(back.memory_bytes, vm.memory_bytes);
		store_vm_free(&back);
	}
}

Test(store, a_missing_or_empty_folder_is_no_store_unless_asked_for)
{
	struct err err = ERR_INIT;
	struct store *other = NULL;
	char path[128];

	snprintf(path, sizeof(path), "%s/none", store_test_work);
	cr_assert_eq(store_open(path, false, &other, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	cr_assert_neq(err.hint[0], '\0');
	cr_assert_eq(access(path, F_OK), -1);
	cr_assert_eq(mkdir(path, 0700), 0);
	err = ERR_INIT;
	cr_assert_eq(store_open(path, false, &other, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	cr_assert_eq(rmdir(path), 0, "something was put into it");
	strcat(path, "/deep/er");
	cr_assert_eq(store_open(path, true, &other, &err), 0);
	store_close(other);
}

Test(store, a_foreign_folder_is_refused_and_left_alone)
{
	struct err err = ERR_INIT;
	struct store *other = NULL;
	char path[128];

	snprintf(path, sizeof(path), "%s/precious", store_test_work);
	store_test_write_text(path, "mine");
	cr_assert_eq(store_open(store_test_work, true, &other, &err), -ENOTDIR);
	cr_assert_not_null(strstr(err.message, "no vmcp store"));
	cr_assert_neq(err.hint[0], '\0');
	cr_assert_eq(store_open(path, true, &other, &err), -ENOTDIR);
	snprintf(path, sizeof(path), "%s/format", store_test_work);
	cr_assert_eq(access(path, F_OK), -1);
}

Test(store, formats_newer_or_damaged_are_refused)
{
	struct err err = ERR_INIT;
	struct store *other = NULL;
	char path[128];

	snprintf(path, sizeof(path), "%s/format", store_test_folder);
	store_test_write_text(path, "vmcp store 3\n");
	cr_assert_eq(store_open(store_test_folder, true, &other, &err), -ENOTSUP);
	cr_assert_eq(err.class, ERR_FAILED);
	cr_assert_not_null(strstr(err.hint, "newer vmcp"));
	store_test_write_text(path, "something else\n");
	cr_assert_neq(store_open(store_test_folder, true, &other, &err), 0);
	cr_assert_eq(err.class, ERR_DAMAGED);
	store_test_write_text(path, "");
	cr_assert_neq(store_open(store_test_folder, true, &other, &err), 0);
	cr_assert_eq(err.class, ERR_DAMAGED);
	store_test_write_text(path, "vmcp store 1\n");
}

Test(store, a_damaged_catalogue_is_reported_as_damaged)
{
	struct err err = ERR_INIT;
	struct store *other = NULL;
	char path[128], garbage[8192];

	store_close(store_test_store);
	store_test_store = NULL;
	memset(garbage, 'x', sizeof(garbage));
	garbage[sizeof(garbage) - 1] = '\0';
	snprintf(path, sizeof(path), "%s/catalog.db", store_test_folder);
	store_test_write_text(path, garbage);
	cr_assert_neq(store_open(store_test_folder, true, &other, &err), 0);
	cr_assert_eq(err.class, ERR_DAMAGED, "%s", err.message);
}

Test(store, many_processes_may_be_the_first_to_open)
{
	for (int round = 0; round < 15; round++) {
		int start[2];
		cr_assert_eq(pipe(start), 0);
		snprintf(store_test_folder, sizeof(store_test_folder), "%s/first-%d", store_test_work, round);
		for (int i = 0; i < 6; i++) {
			if (fork() == 0) {
				struct err err = ERR_INIT;
				struct store *mine;
				char byte;
				close(start[1]);
				(void)!read(start[0], &byte, 1);
				int rc = store_open(store_test_folder, true, &mine, &err);
				if (rc)
					fprintf(stderr, "round %d: %s\n", round, err.message);
				else
					store_close(mine);
				_exit(rc != 0);
			}
		}
		close(start[0]);
		close(start[1]);
		for (int i = 0; i < 6; i++) {
			int status;
			cr_assert_gt(wait(&status), 0);
			cr_expect_eq(status, 0, "round %d", round);
		}
	}
}

/* --- names --- */

Test(store, names_are_checked)
{
	static const char *const good[] = {"a", "web-1", "A.b_c", "0",
					   "x23456789012345678901234567890123456789012345678901234567890123"};
	static const char *const bad[] = {"",
					  ".",
					  "..",
					  "-a",
					  "_a",
					  "a/b",
					  "a b",
					  "a\n",
					  "VM~1",
					  "\xc3\xa4",
					  "x234567890123456789012345678901234567890123456789012345678901234"};
	struct err err = ERR_INIT;

	for (size_t i = 0; i < ARRAY_LENGTH(good); i++)
		cr_expect_eq(store_check_name("tag", good[i], NULL), 0, "%s", good[i]);
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		err = ERR_INIT;
		cr_expect_eq(store_check_name("tag", bad[i], &err), -EINVAL, "%s", bad[i]);
		cr_expect_eq(err.class, ERR_USAGE);
		cr_expect_neq(err.hint[0], '\0');
	}
}

Test(store, ids_are_new_every_time)
{
	char a[STORE_ID_BYTES], b[STORE_ID_BYTES];

	store_new_id(a);
	store_new_id(b);
	cr_assert_eq(strlen(a), 32);
	cr_assert_eq(strspn(a, "0123456789abcdef"), 32);
	cr_assert_str_neq(a, b);
}

/* --- drafts --- */

Test(store, a_commit_gives_back_what_was_put)
{
	struct store_checkpoint c;
	struct err err = ERR_INIT;
	char id[STORE_ID_BYTES], child[STORE_ID_BYTES], at[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	store_test_must_take(&(struct store_test_plan){.tag = "first", .disk = true, .live = true}, id);
	cr_assert(store_test_is_whole(store_test_store, id, &err), "%s", err.message);
	cr_assert_eq(store_checkpoint_get(store_test_store, id, &c, &err), 0, "%s", err.message);
	cr_assert_str_eq(c.id, id);
	cr_assert_str_eq(c.parent, "");
	cr_assert_str_eq(c.vm, "web");
	cr_assert_str_eq(c.tag, "first");
	cr_assert_str_eq(c.message, "a message");
	cr_assert_str_eq(c.config_text, "[vm]\nname = web\n");
	cr_assert(c.live);
	cr_assert_eq(c.cpus, 2);
	cr_assert_eq(c.disk_count, 1);
	cr_assert_str_eq(c.disks[0].disk, "root");
	store_checkpoint_free(&c);
	store_test_position_of(store_test_store, "web", at);
	cr_assert_str_eq(at, id);
	store_test_must_take(&(struct store_test_plan){.parent = id}, child);
	store_test_position_of(store_test_store, "web", at);
	cr_assert_str_eq(at, child);
	cr_assert_eq(store_test_count_listed(store_test_store, NULL), 2);
	cr_assert_eq(store_test_count_listed(store_test_store, "web"), 2);
	cr_assert_eq(store_test_count_listed(store_test_store, "other"), 0);
	cr_assert_eq(store_test_count_in("staging", ""), 0);
	char path[200];
	snprintf(path, sizeof(path), "checkpoints/%s", id);
	cr_assert_eq(store_test_count_in(path, ""), 3, "manifest, state, index");
}

Test(store, layers_have_the_promised_shape)
{
	struct store_draft *draft;
	struct stat mem_stat, sums_stat;
	char layer[STORE_ID_BYTES];
	int mem, sums;

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, layer, &mem, &sums, NULL), 0);
	cr_assert_eq(fstat(mem, &mem_stat), 0);
	cr_assert_eq(fstat(sums, &sums_stat), 0);
	cr_assert_eq(mem_stat.st_size, 0);
	cr_assert_eq(sums_stat.st_size, 0);
	cr_assert_lt(mem_stat.st_blocks, 16);
	cr_assert_eq(mem_stat.st_mode & 0777, 0600);
	close(mem);
	close(sums);
	store_draft_abort(draft);
}

Test(store, an_abort_leaves_nothing)
{
	char id[STORE_ID_BYTES], layer[STORE_ID_BYTES], *path;
	struct store_draft *draft;
	struct stat st;
	int mem, sums;

	store_test_must_take(&(struct store_test_plan){.disk = true}, id);
	CLEANUP_FREE char *before = store_test_listing();
	store_draft_abort(NULL);
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, layer, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	cr_assert_eq(store_draft_disk_layer(draft, "root", store_test_image, "qcow2", layer, &path, NULL), 0);
	cr_assert_eq(stat(path, &st), 0);
	cr_assert_eq(st.st_nlink, 3, "the store_test_image, the first checkpoint's layer, this one");
	free(path);
	cr_assert_eq(store_draft_put(draft, "state", "x", 1, NULL), 0);
	CLEANUP_FREE char *during = store_test_listing();
	cr_assert_str_neq(before, during);
	store_draft_abort(draft);
	CLEANUP_FREE char *after = store_test_listing();
	cr_assert_str_eq(before, after);
	cr_assert_eq(store_test_count_listed(store_test_store, NULL), 1);
}

Test(store, an_abort_after_the_switch_keeps_disk_layers)
{
	char layer[STORE_ID_BYTES], disk_layer[STORE_ID_BYTES], *path;
	struct store_draft *draft;
	int mem, sums;

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, layer, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	cr_assert_eq(store_draft_disk_layer(draft, "root", store_test_image, "qcow2", disk_layer, &path, NULL), 0);
	store_draft_switched(draft);
	store_draft_abort(draft);
	cr_assert_eq(access(path, F_OK), 0);
	free(path);
	cr_assert_eq(store_test_count_in("layers", ".mem") + store_test_count_in("layers", ".sums"), 0);
	cr_assert_eq(store_test_count_in("staging", ""), 0);
	cr_assert_eq(store_disk_layer_path(store_test_store, disk_layer, "qcow2", &path, NULL), 0);
	free(path);
}

Test(store, a_disk_behind_a_symbolic_link_is_linked_itself)
{
	char layer[STORE_ID_BYTES], *path, alias[128];
	struct store_draft *draft;
	struct stat st;

	snprintf(alias, sizeof(alias), "%s/alias.qcow2", store_test_work);
	cr_assert_eq(symlink(store_test_image, alias), 0);
	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_disk_layer(draft, "root", alias, "qcow2", layer, &path, NULL), 0);
	cr_assert_eq(lstat(path, &st), 0);
	cr_assert(S_ISREG(st.st_mode));
	free(path);
	store_draft_abort(draft);
}

Test(store, disk_layers_that_cannot_be)
{
	char layer[STORE_ID_BYTES], *path, elsewhere[] = "/dev/shm/vmcp-store-test-XXXXXX";
	struct store_draft *draft;
	struct err err = ERR_INIT;
	struct stat here, there;

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_disk_layer(draft, "root", "/nowhere/x", "qcow2", layer, &path, &err), -ENOENT);
	cr_assert_not_null(strstr(err.message, "/nowhere/x"));
	cr_assert_eq(store_draft_disk_layer(draft, "root", store_test_image, "../../x", layer, &path, &err), -EINVAL);
	CLEANUP_CLOSE int fd = mkstemp(elsewhere);
	if (fd >= 0 && fstat(fd, &there) == 0 && stat(store_test_work, &here) == 0 && here.st_dev != there.st_dev) {
		err = ERR_INIT;
		cr_assert_eq(store_draft_disk_layer(draft, "root", elsewhere, "qcow2", layer, &path, &err), -EXDEV);
		cr_assert_not_null(strstr(err.message, "different filesystems"));
		cr_assert_neq(err.hint[0], '\0');
	} else {
		cr_log_warn("SKIP the message of EXDEV: /tmp and /dev/shm are one filesystem here");
	}
	unlink(elsewhere);
	store_draft_abort(draft);
	cr_assert_eq(store_test_count_in("layers", ""), 0);
}

Test(store, a_tag_that_is_taken_fails_before_the_commit)
{
	char id[STORE_ID_BYTES], other[STORE_ID_BYTES];
	struct err err = ERR_INIT;

	store_test_must_take(&(struct store_test_plan){.tag = "gold"}, id);
	CLEANUP_FREE char *before = store_test_listing();
	cr_assert_eq(store_test_take(store_test_store, &(struct store_test_plan){.tag = "gold"}, NULL, &err), -EEXIST);
	cr_assert_eq(err.class, ERR_STATE);
	cr_assert_not_null(strstr(err.message, "gold"));
	CLEANUP_FREE char *after = store_test_listing();
	cr_assert_str_eq(before, after);

	store_test_must_take(&(struct store_test_plan){0}, other);
	cr_assert_eq(store_tag(store_test_store, other, "gold", &err), -EEXIST);
	cr_assert_eq(store_tag(store_test_store, id, "gold", NULL), 0, "the same again is no error");
	cr_assert_eq(store_tag(store_test_store, other, "silver", NULL), 0);
	cr_assert_eq(store_tag(store_test_store, other, "no name", NULL), -EINVAL);
	cr_assert_eq(store_tag(store_test_store, "0123456789abcdef0123456789abcdef", "new", NULL), -ENOENT);
	cr_assert_eq(store_resolve(store_test_store, "silver", id, NULL), 0);
	cr_assert_str_eq(id, other);
}

Test(store, a_text_that_is_no_utf8_is_refused_before_the_commit)
{
	struct store_checkpoint c = {.vm = "web", .message = (char *)"\xff\xfe"};
	struct store_draft *draft;
	struct err err = ERR_INIT;
	CLEANUP_FREE char *before = store_test_listing();

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_commit(draft, &c, &err), -EILSEQ);
	cr_assert_eq(err.class, ERR_USAGE);
	CLEANUP_FREE char *after = store_test_listing();
	cr_assert_str_eq(before, after);
}

/* --- references --- */

static void expect_none(const char *reference)
{
	struct err err = ERR_INIT;
	char id[STORE_ID_BYTES];

	cr_expect_eq(store_resolve(store_test_store, reference, id, &err), -ENOENT, "'%s'", reference);
	cr_expect_eq(err.class, ERR_NOT_FOUND, "'%s'", reference);
	cr_expect_neq(err.hint[0], '\0', "'%s'", reference);
}

static void expect_found(const char *reference, const char *wanted)
{
	struct err err = ERR_INIT;
	char id[STORE_ID_BYTES];

	cr_expect_eq(store_resolve(store_test_store, reference, id, &err), 0, "'%s': %s", reference, err.message);
	cr_expect_str_eq(id, wanted, "'%s'", reference);
}

static void expect_meant(const char *reference, const char *meant)
{
	struct err err = ERR_INIT;
	char id[STORE_ID_BYTES];

	cr_expect_eq(store_resolve(store_test_store, reference, id, &err), -ENOENT, "'%s'", reference);
	cr_expect_not_null(strstr(err.hint, meant), "'%s': '%s' is not in '%s'", reference, meant, err.hint);
}

Test(store, what_is_meant_is_suggested)
{
	struct err err = ERR_INIT;
	char id[STORE_ID_BYTES];

	store_test_must_take(&(struct store_test_plan){.tag = "before-upgrade"}, id);
	store_test_must_take(&(struct store_test_plan){.parent = id}, id);
	expect_meant("before-upgarde", "'before-upgrade'");
	expect_meant("before", "'before-upgrade'");
	expect_meant("wbe", "'web'");
	expect_meant("wbe~1", "'web~1'");
	expect_meant("web~7", "web~1");
	expect_meant("nobody", "vmcp log");
	cr_expect_eq(store_untag(store_test_store, "before_upgrade", &err), -ENOENT);
	cr_expect_not_null(strstr(err.hint, "'before-upgrade'"), "%s", err.hint);
}

Test(store, references_resolve)
{
	char ids[3][STORE_ID_BYTES], prefix[STORE_ID_BYTES];

	store_test_must_take(&(struct store_test_plan){.tag = "v1"}, ids[0]);
	store_test_must_take(&(struct store_test_plan){.parent = ids[0]}, ids[1]);
	store_test_must_take(&(struct store_test_plan){.vm = "db"}, ids[2]);
	expect_found(ids[0], ids[0]);
	expect_found("v1", ids[0]);
	expect_found("web", ids[1]);
	expect_found("web~0", ids[1]);
	expect_found("web~1", ids[0]);
	expect_found("db", ids[2]);
	/* 8 digits: two of three random ids do not share them. */
	snprintf(prefix, sizeof(prefix), "%.8s", ids[1]);
	expect_found(prefix, ids[1]);

	static const char *const none[] = {"",
					   "web~2",
					   "web~",
					   "web~x",
					   "web~-1",
					   "web~1x",
					   "~1",
					   "nobody",
					   "v1~1",
					   "%",
					   "_",
					   "v2",
					   "web~99999999999999999999",
					   "'; DROP TABLE checkpoints",
					   "zzzz",
					   "*"};
	for (size_t i = 0; i < ARRAY_LENGTH(none); i++)
		expect_none(none[i]);
	snprintf(prefix, sizeof(prefix), "%.3s", ids[1]);
	expect_none(prefix);
	char upper[STORE_ID_BYTES + 2] = "";
	snprintf(upper, sizeof(upper), "%s0", ids[0]);
	expect_none(upper);
	cr_assert_eq(store_test_put_vm(store_test_store, "fresh", NULL), 0);
	struct err err = ERR_INIT;
	cr_assert_eq(store_resolve(store_test_store, "fresh", prefix, &err), -ENOENT);
	cr_assert_not_null(strstr(err.hint, "vmcp checkpoint"));
}

Test(store, an_ambiguous_prefix_is_wrong_usage)
{
	/* Manifests are needed by no reference, so the entries are made by hand. */
	char sql[512], id[STORE_ID_BYTES];
	struct err err = ERR_INIT;

	snprintf(sql, sizeof(sql),
		 "sqlite3 %s/catalog.db \"insert into checkpoints select null, x, '', 'v', '', '', "
		 "1,0,0,0,0,0,0,0,0,0,0, '', 0, '' from "
		 "(select 'abcd0000000000000000000000000000' as x union select 'abcd1000000000000000000000000000')\"",
		 store_test_folder);
	if (system("command -v sqlite3 >/dev/null") != 0)
		cr_skip_test("SKIP: there is no sqlite3 program");
	cr_assert_eq(system(sql), 0);
	cr_assert_eq(store_resolve(store_test_store, "abcd", id, &err), -EINVAL);
	cr_assert_eq(err.class, ERR_USAGE);
	cr_assert_not_null(strstr(err.hint, "digits"));
	expect_found("abcd0", "abcd0000000000000000000000000000");
	expect_found("abcd1", "abcd1000000000000000000000000000");
}

/* --- reading what is damaged --- */

static void damage(const char *id, const char *name, const char *text)
{
	char path[200];
	snprintf(path, sizeof(path), "%s/checkpoints/%s/%s", store_test_folder, id, name);
	store_test_write_text(path, text);
}

Test(store, damage_is_found_and_named)
{
	char id[STORE_ID_BYTES], other[STORE_ID_BYTES], path[320], *found;
	struct store_checkpoint c;
	struct err err = ERR_INIT;
	CLEANUP_BUF struct buf data = BUF_INIT;

	store_test_must_take(&(struct store_test_plan){.disk = true}, id);
	store_test_must_take(&(struct store_test_plan){0}, other);
	cr_assert_eq(store_checkpoint_get(store_test_store, id, &c, NULL), 0);
	damage(id, "state", "thE state");
	cr_assert_eq(store_checkpoint_read(store_test_store, &c, "state", &data, &err), -EBADMSG);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_not_null(strstr(err.message, "/state"));
	damage(id, "index", "the index and more");
	cr_assert_eq(store_checkpoint_read(store_test_store, &c, "index", &data, &err), -EBADMSG);
	snprintf(path, sizeof(path), "%s/layers/%s.mem", store_test_folder, c.memory_layer);
	cr_assert_eq(unlink(path), 0);
	cr_assert_eq(store_memory_layer_open(store_test_store, c.memory_layer, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_eq(mkfifo(path, 0600), 0);
	cr_assert_lt(store_memory_layer_open(store_test_store, c.memory_layer, &err), 0, "a FIFO does not hold us up");
	cr_assert_eq(unlink(path), 0);
	cr_assert_eq(symlink("/etc/passwd", path), 0);
	cr_assert_lt(store_memory_layer_open(store_test_store, c.memory_layer, &err), 0);
	cr_assert_eq(store_memory_layer_open(store_test_store, "../format", &err), -EINVAL);
	cr_assert_eq(store_disk_layer_path(store_test_store, "../format", "qcow2", &found, &err), -EINVAL);
	cr_assert_eq(store_disk_layer_path(store_test_store, c.disks[0].layer, "raw", &found, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_DAMAGED);
	store_checkpoint_free(&c);

	cr_assert_eq(store_checkpoint_get(store_test_store, "../../etc", &c, &err), -ENOENT);
	snprintf(path, sizeof(path), "cp %s/checkpoints/%s/manifest %s/checkpoints/%s/manifest", store_test_folder,
		 other, store_test_folder, id);
	cr_assert_eq(system(path), 0);
	cr_assert_eq(store_checkpoint_get(store_test_store, id, &c, &err), -EINVAL, "another checkpoint's manifest");
	cr_assert_eq(err.class, ERR_DAMAGED);
	damage(id, "manifest", "{}");
	cr_assert_neq(store_checkpoint_get(store_test_store, id, &c, &err), 0);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert(store_test_is_whole(store_test_store, other, &err), "%s", err.message);
}

/* --- VMs --- */

Test(store, vm_records)
{
	struct store_vm vm, *list;
	struct err err = ERR_INIT;
	size_t count;

	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	cr_assert_not_null(strstr(err.hint, "vmcp run"));
	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	cr_assert_eq(store_test_put_vm(store_test_store, "db", NULL), 0);
	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	err = ERR_INIT;
	cr_assert_eq(store_vm_get(store_test_store, "bew", &vm, &err), -ENOENT);
	cr_assert_not_null(strstr(err.hint, "db, web"));
	cr_assert_eq(store_vm_list(store_test_store, &list, &count, NULL), 0);
	cr_assert_eq(count, 2);
	cr_assert_str_eq(list[0].name, "db");
	cr_assert_str_eq(list[1].name, "web");
	for (size_t i = 0; i < count; i++)
		store_vm_free(&list[i]);
	free(list);
	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, NULL), 0);
	cr_assert_str_eq(vm.state, "crashed", "recorded running, but nobody holds its lock");
	cr_assert(!vm.alive);
	cr_assert_eq(vm.pid, 4711);
	cr_assert_str_eq(vm.config_text, "[vm]\n");
	store_vm_free(&vm);
	cr_assert_eq(store_vm_set_state(store_test_store, "web", "stopped", NULL), 0);
	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, NULL), 0);
	cr_assert_str_eq(vm.state, "stopped");
	store_vm_free(&vm);
	cr_assert_eq(store_vm_dir(store_test_store, "../x", NULL), -EINVAL);
}

Test(store, a_lock_lives_as_long_as_its_process)
{
	struct store_vm_lock *lock = NULL;
	struct store_vm vm;
	struct err err = ERR_INIT;
	int ready[2];
	char byte, pid_text[16];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	cr_assert_eq(pipe(ready), 0);
	pid_t child = fork();
	if (child == 0) {
		struct store *mine;
		if (store_open(store_test_folder, true, &mine, NULL) || store_vm_lock(mine, "web", &lock, NULL))
			_exit(1);
		(void)!write(ready[1], "r", 1);
		for (;;)
			pause();
	}
	close(ready[1]);
	cr_assert_eq(read(ready[0], &byte, 1), 1);
	cr_assert_eq(store_vm_lock(store_test_store, "web", &lock, &err), -EBUSY);
	cr_assert_eq(err.class, ERR_STATE);
	snprintf(pid_text, sizeof(pid_text), "%d", (int)child);
	cr_assert_not_null(strstr(err.message, pid_text), "%s", err.message);
	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, NULL), 0);
	cr_assert(vm.alive);
	cr_assert_str_eq(vm.state, "running");
	store_vm_free(&vm);
	kill(child, SIGKILL);
	cr_assert_eq(waitpid(child, NULL, 0), child);
	cr_assert_eq(store_vm_get(store_test_store, "web", &vm, NULL), 0);
	cr_assert(!vm.alive);
	cr_assert_str_eq(vm.state, "crashed");
	store_vm_free(&vm);
	cr_assert_eq(store_vm_lock(store_test_store, "web", &lock, &err), 0);
	struct store_vm_lock *second = NULL;
	cr_assert_eq(store_vm_lock(store_test_store, "web", &second, NULL), -EBUSY, "in the same process too");
	store_vm_unlock(lock);
	store_vm_unlock(NULL);
	cr_assert_eq(store_vm_lock(store_test_store, "web", &lock, NULL), 0);
	store_vm_unlock(lock);
	close(ready[0]);
}
