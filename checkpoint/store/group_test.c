/* Groups: all of a group or nothing of it, whoever dies. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/fault.h"
#include "checkpoint/store/group.h"
#include "checkpoint/store/store_test.h"

TestSuite(store_group, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

#define MEMBERS "web db"

struct member {
	struct store_draft *draft;
	struct store_checkpoint checkpoint;
};

/* Both are durable but for the commit. */
static void prepare(const char *group, struct member members[2])
{
	static const char *const vms[] = {"web", "db"};
	struct err err = ERR_INIT;

	for (unsigned i = 0; i < 2; i++) {
		const struct store_test_plan plan = {.vm = vms[i], .live = true, .group = group, .members = MEMBERS};

		cr_assert_eq(store_test_prepare(store_test_store, &plan, &members[i].draft, &members[i].checkpoint, &err), 0, "%s", err.message);
		cr_assert_eq(store_draft_prepare(members[i].draft, &members[i].checkpoint, &err), 0, "%s", err.message);
	}
}

static void begin(const char *tag, char id[STORE_ID_BYTES])
{
	struct err err = ERR_INIT;

	cr_assert_eq(store_group_begin(store_test_store, tag, id, &err), 0, "%s", err.message);
}

static void finish(struct member members[2])
{
	for (unsigned i = 0; i < 2; i++) {
		store_draft_finish(members[i].draft, &members[i].checkpoint);
		store_checkpoint_free(&members[i].checkpoint);
	}
}

static void take(const char *tag, char id[STORE_ID_BYTES])
{
	struct member members[2];
	struct err err = ERR_INIT;

	begin(tag, id);
	prepare(id, members);
	cr_assert_eq(store_group_commit(store_test_store, id, tag, &err), 0, "%s", err.message);
	finish(members);
}

static void expect_whole(const char *reference, const char *id)
{
	struct store_group group;
	struct err err = ERR_INIT;
	char found[STORE_ID_BYTES];

	cr_assert_eq(store_group_resolve(store_test_store, reference, found, &err), 0, "%s", err.message);
	cr_expect_str_eq(found, id);
	cr_assert_eq(store_group_get(store_test_store, found, &group, &err), 0, "%s", err.message);
	cr_expect_eq(group.count, 2);
	cr_expect_eq(store_group_check_whole(&group, &err), 0, "%s", err.message);
	cr_expect_str_eq(group.members[0].vm, "web");
	cr_expect_str_eq(group.members[1].vm, "db");
	for (unsigned i = 0; i < group.count; i++)
		cr_expect(store_test_is_whole(store_test_store, group.members[i].checkpoint, &err), "%s", err.message);
}

Test(store_group, is_found_by_id_prefix_and_tag)
{
	char id[STORE_ID_BYTES], found[STORE_ID_BYTES], prefix[9];
	struct err err = ERR_INIT;

	take("before", id);
	expect_whole(id, id);
	expect_whole("before", id);
	snprintf(prefix, sizeof(prefix), "%.8s", id);
	expect_whole(prefix, id);
	cr_expect_eq(store_tag(store_test_store, id, "later", &err), 0, "%s", err.message);
	expect_whole("later", id);
	cr_expect_eq(store_group_resolve(store_test_store, "nothing", found, &err), -ENOENT);
	cr_expect_eq(store_resolve(store_test_store, "before", found, &err), -ENOENT, "a group is no checkpoint");
	cr_expect(strstr(err.hint, "group"), "%s", err.hint);
	/* Tags are of one kind. */
	cr_expect_eq(store_group_begin(store_test_store, "before", found, &err), -EEXIST);
	cr_expect_eq(store_test_take(store_test_store, &(struct store_test_plan){.tag = "later"}, NULL, &err), -EEXIST);
	store_test_expect_exact(store_test_store, "a group");
}

Test(store_group, goes_with_its_last_checkpoint)
{
	char id[STORE_ID_BYTES], found[STORE_ID_BYTES];
	struct store_freed freed = {0};
	struct store_group group;
	struct err err = ERR_INIT;

	take("before", id);
	cr_assert_eq(store_group_get(store_test_store, id, &group, NULL), 0);
	cr_expect_eq(store_checkpoint_remove(store_test_store, group.members[1].checkpoint, false, &freed, &err), 0, "%s", err.message);
	cr_assert_eq(store_group_get(store_test_store, id, &group, NULL), 0);
	cr_expect_eq(store_group_check_whole(&group, &err), -EINVAL);
	cr_expect(strstr(err.message, "db") && !strstr(err.message, "web"), "%s", err.message);
	cr_expect_eq(store_checkpoint_remove(store_test_store, group.members[0].checkpoint, false, &freed, &err), 0, "%s", err.message);
	cr_expect_eq(store_group_resolve(store_test_store, "before", found, NULL), -ENOENT);
	cr_expect_eq(store_test_take(store_test_store, &(struct store_test_plan){.tag = "before"}, NULL, &err), 0, "the tag is free: %s", err.message);
	store_test_expect_exact(store_test_store, "after the group");
}

Test(store_group, given_up_is_given_up)
{
	char id[STORE_ID_BYTES], found[STORE_ID_BYTES];
	struct member members[2];
	struct err err = ERR_INIT;

	begin("never", id);
	prepare(id, members);
	cr_expect_eq(store_group_settle(store_test_store, id, &err), -ECANCELED, "a member asks, and by that gives it up");
	cr_expect_eq(store_group_commit(store_test_store, id, "never", &err), -ECANCELED);
	for (unsigned i = 0; i < 2; i++) {
		store_draft_abort(members[i].draft);
		store_checkpoint_free(&members[i].checkpoint);
	}
	cr_expect_eq(store_group_resolve(store_test_store, "never", found, NULL), -ENOENT);
	cr_expect_eq(store_test_count_listed(store_test_store, NULL), 0);
	store_test_expect_exact(store_test_store, "given up");
	cr_expect_eq(store_test_take(store_test_store, &(struct store_test_plan){.tag = "never"}, NULL, &err), 0, "%s", err.message);
}

Test(store_group, a_tag_that_was_taken_meanwhile_ends_it)
{
	char id[STORE_ID_BYTES];
	struct member members[2];
	struct err err = ERR_INIT;

	begin("mine", id);
	prepare(id, members);
	store_test_must_take(&(struct store_test_plan){.tag = "mine"}, NULL);
	cr_expect_eq(store_group_commit(store_test_store, id, "mine", &err), -EEXIST);
	cr_expect_eq(store_group_settle(store_test_store, id, &err), -ECANCELED);
	for (unsigned i = 0; i < 2; i++) {
		store_draft_abort(members[i].draft);
		store_checkpoint_free(&members[i].checkpoint);
	}
	cr_expect_eq(store_test_count_listed(store_test_store, NULL), 1);
	store_test_expect_exact(store_test_store, "the tag was taken");
}

Test(store_group, is_made_anew_from_manifests)
{
	char id[STORE_ID_BYTES], path[160];
	struct store_rebuilt made;
	struct err err = ERR_INIT;

	take(NULL, id);
	store_close(store_test_store);
	snprintf(path, sizeof(path), "%s/catalog.db", store_test_folder);
	cr_assert_eq(unlink(path), 0);
	cr_assert_eq(store_rebuild(store_test_folder, &made, &err), 0, "%s", err.message);
	store_test_store = store_test_must_open();
	expect_whole(id, id);
}

/* In another process, which dies at that point. */
static void die_at(unsigned point, unsigned passage, char id[STORE_ID_BYTES])
{
	char fault[32];
	int ends[2], status;

	cr_assert_eq(pipe(ends), 0);
	store_close(store_test_store);
	store_test_store = NULL;
	pid_t child = fork();
	if (child == 0) {
		struct err err = ERR_INIT;
		char own[STORE_ID_BYTES];

		snprintf(fault, sizeof(fault), "%u:%u:kill", point, passage);
		setenv("VMCP_FAULT", fault, 1);
		fault_init(&err);
		store_test_store = store_test_must_open();
		begin("group", own);
		(void)!write(ends[1], own, sizeof(own));
		struct member members[2];
		prepare(own, members);
		if (store_group_commit(store_test_store, own, "group", NULL) == 0)
			finish(members);
		_exit(0);
	}
	cr_assert_eq(waitpid(child, &status, 0), child);
	cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "point %u was not passed", point);
	cr_assert_eq(read(ends[0], id, STORE_ID_BYTES), STORE_ID_BYTES);
	close(ends[0]);
	close(ends[1]);
	store_test_store = store_test_must_open();
}

Test(store_group, killed_before_the_commit_point_there_is_none)
{
	static const unsigned points[][2] = {{303, 1}, {303, 2}, {342, 1}};

	for (unsigned i = 0; i < 3; i++) {
		char id[STORE_ID_BYTES], found[STORE_ID_BYTES];

		die_at(points[i][0], points[i][1], id);
		cr_expect_eq(store_test_count_listed(store_test_store, NULL), 0, "point %u", points[i][0]);
		cr_expect_eq(store_group_resolve(store_test_store, "group", found, NULL), -ENOENT);
		cr_expect_eq(store_group_settle(store_test_store, id, NULL), -ECANCELED);
		store_test_expect_exact(store_test_store, "killed before");
	}
}

/* 343: no member told; 344: before the first, and before the second is moved; 304, 305: the first is moved and not entered. */
Test(store_group, killed_behind_the_commit_point_it_is_whole)
{
	static const unsigned points[][2] = {{343, 1}, {344, 1}, {344, 2}, {304, 1}, {305, 1}};

	for (unsigned i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
		char id[STORE_ID_BYTES];
		struct store_freed freed = {0};
		struct store_group group;

		die_at(points[i][0], points[i][1], id);
		expect_whole("group", id);
		store_test_expect_exact(store_test_store, "killed behind");
		cr_assert_eq(store_group_get(store_test_store, id, &group, NULL), 0);
		for (unsigned k = 0; k < group.count; k++)
			cr_expect_eq(store_checkpoint_remove(store_test_store, group.members[k].checkpoint, true, &freed, NULL), 0);
	}
}

/* Members die too, before and behind the commit point, which another process passes. */
Test(store_group, a_member_that_died_is_completed_or_gone)
{
	for (int commits = 0; commits < 2; commits++) {
		char id[STORE_ID_BYTES];
		int status;

		begin(NULL, id);
		pid_t child = fork();
		if (child == 0) {
			struct member members[2];

			store_test_store = store_test_must_open();
			prepare(id, members);
			_exit(0); /* as if killed: what it made stays */
		}
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert(WIFEXITED(status));
		cr_assert_eq(store_test_count_in("staging", ""), 4, "two folders and their locks");
		if (commits)
			cr_assert_eq(store_group_commit(store_test_store, id, NULL, NULL), 0);
		store_close(store_test_store);
		store_test_store = store_test_must_open();
		cr_expect_eq(store_test_count_listed(store_test_store, NULL), commits ? 2 : 0);
		if (commits)
			expect_whole(id, id);
		store_test_expect_exact(store_test_store, "a member died");
	}
}
