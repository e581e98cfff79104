/* The store when its processes die, fail and meet. */
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
#include "base/clock.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/store_test.h"

TestSuite(store_fault, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 200);

/* --- faults --- */

static const unsigned points[] = {300, 301, 302, 303, 304, 305, 306, 308};
/* Passages in one checkpoint: a file is written for state, index and manifest. */
static unsigned passages(unsigned point) { return point == 308 ? 3 : 1; }

static void arm(unsigned point, unsigned count, const char *action)
{
	char text[64];
	snprintf(text, sizeof(text), "%u:%u:%s", point, count, action);
	setenv("VMCP_FAULT", text, 1);
	if (fault_init(NULL))
		abort();
}

static void disarm(void)
{
	unsetenv("VMCP_FAULT");
	fault_init(NULL);
}

/* After a crash or failure at `point`, with a store that holds `before` checkpoints: whole or absent, and clean. */
static void expect_consistent(unsigned point, unsigned count, size_t before, const char *tag)
{
	char id[STORE_ID_BYTES], at[STORE_ID_BYTES], last[STORE_ID_BYTES];
	struct err err = ERR_INIT;
	size_t now = store_test_count_listed(store_test_store, NULL);
	bool exists = store_resolve(store_test_store, tag, id, NULL) == 0;

	cr_expect_eq(exists, point == 304 || point == 305, "point %u:%u", point, count);
	cr_expect_eq(now, before + exists, "point %u:%u", point, count);
	cr_expect_eq(store_test_count_in("staging", ""), 0, "point %u:%u", point, count);
	cr_expect_eq(store_test_count_in("checkpoints", ""), now, "point %u:%u", point, count);
	cr_expect_eq(store_test_count_in("layers", ".mem"), now, "point %u:%u", point, count);
	cr_expect_eq(store_test_count_in("layers", ".sums"), now, "point %u:%u", point, count);
	cr_assert_eq(store_resolve(store_test_store, "web", last, NULL), 0);
	cr_expect(store_test_is_whole(store_test_store, last, &err), "point %u:%u: %s", point, count, err.message);
	store_test_position_of(store_test_store, "web", at);
	cr_expect_str_eq(at, last, "point %u:%u", point, count);
	if (exists) {
		char path[200];
		cr_expect_str_eq(id, last);
		snprintf(path, sizeof(path), "checkpoints/%s", id);
		cr_expect_eq(store_test_count_in(path, ""), 3, "point %u:%u: a marker is left", point, count);
	}
}

Test(store_fault, killed_at_every_fault_point)
{
	char last[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	store_test_must_take(&(struct store_test_plan){.disk = true}, last);
	for (size_t i = 0; i < ARRAY_LENGTH(points); i++) {
		for (unsigned count = 1; count <= passages(points[i]); count++) {
			char tag[32];
			size_t before = store_test_count_listed(store_test_store, NULL);
			int status;

			snprintf(tag, sizeof(tag), "k%u-%u", points[i], count);
			cr_assert_eq(store_resolve(store_test_store, "web", last, NULL), 0);
			store_close(store_test_store);
			pid_t child = fork();
			if (child == 0) {
				struct store *mine;
				if (store_open(store_test_folder, true, &mine, NULL))
					_exit(1);
				arm(points[i], count, "kill");
				store_test_take(mine,
						&(struct store_test_plan){.parent = last, .tag = tag, .disk = true},
						NULL, NULL);
				_exit(2);
			}
			cr_assert_eq(waitpid(child, &status, 0), child);
			cr_assert(WIFSIGNALED(status), "point %u:%u was not passed", points[i], count);
			store_test_store = store_test_must_open();
			expect_consistent(points[i], count, before, tag);
		}
	}
}

Test(store_fault, an_error_at_every_fault_point)
{
	char last[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	store_test_must_take(&(struct store_test_plan){.disk = true}, last);
	for (size_t i = 0; i < ARRAY_LENGTH(points); i++) {
		for (unsigned count = 1; count <= passages(points[i]); count++) {
			struct err err = ERR_INIT;
			char tag[32];
			size_t before = store_test_count_listed(store_test_store, NULL);

			snprintf(tag, sizeof(tag), "e%u-%u", points[i], count);
			cr_assert_eq(store_resolve(store_test_store, "web", last, NULL), 0);
			arm(points[i], count, count % 2 ? "eio" : "enospc");
			log_set_sink(open("/dev/null", O_WRONLY | O_CLOEXEC), "");
			int rc = store_test_take(store_test_store,
						 &(struct store_test_plan){.parent = last, .tag = tag, .disk = true},
						 NULL, &err);
			disarm();
			/* Behind the commit point it is no failure of the checkpoint. */
			cr_expect_eq(rc,
				     points[i] == 304 || points[i] == 305 ? 0
				     : count % 2      ? -EIO
						      : -ENOSPC,
				     "point %u:%u", points[i], count);
			store_close(store_test_store);
			store_test_store = store_test_must_open();
			expect_consistent(points[i], count, before, tag);
		}
	}
}

Test(store_fault, killed_while_the_store_is_made)
{
	for (unsigned point = 1; point <= 3; point++) {
		int status;
		snprintf(store_test_folder, sizeof(store_test_folder), "%s/new-%u", store_test_work, point);
		pid_t child = fork();
		if (child == 0) {
			struct store *mine;
			arm(point, 1, "kill");
			store_open(store_test_folder, true, &mine, NULL);
			_exit(2);
		}
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert(WIFSIGNALED(status));
		store_close(store_test_must_open());
	}
}

/* A checkpoint whose entry comes late must not take back a VM that has gone on since. */
Test(store_fault, a_late_entry_does_not_move_a_vm_that_went_on)
{
	char root[STORE_ID_BYTES], late[STORE_ID_BYTES], other[STORE_ID_BYTES], at[STORE_ID_BYTES];

	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
	store_test_must_take(&(struct store_test_plan){0}, root);
	arm(304, 1, "eio");
	log_set_level(LOG_LEVEL_ERROR);
	store_test_must_take(&(struct store_test_plan){.parent = root}, late);
	disarm();
	store_test_must_take(&(struct store_test_plan){.parent = late}, other);
	store_close(store_test_store);
	store_test_store = store_test_must_open();
	cr_assert_eq(store_test_count_listed(store_test_store, NULL), 3);
	store_test_position_of(store_test_store, "web", at);
	cr_assert_str_eq(at, other);
}

Test(store_fault, a_folder_without_its_lock_is_removed)
{
	char layer[STORE_ID_BYTES], path[200];
	struct store_draft *draft;
	int mem, sums;

	pid_t child = fork();
	if (child == 0) {
		if (store_draft_begin(store_test_store, &draft, NULL) ||
		    store_draft_memory_layer(draft, layer, &mem, &sums, NULL))
			_exit(1);
		snprintf(path, sizeof(path), "%s/staging/%s.lock", store_test_folder, store_draft_id(draft));
		_exit(unlink(path) != 0);
	}
	int status;
	cr_assert_eq(waitpid(child, &status, 0), child);
	cr_assert_eq(status, 0);
	cr_assert_eq(store_test_count_in("staging", ""), 1);
	store_close(store_test_store);
	store_test_store = store_test_must_open();
	cr_assert_eq(store_test_count_in("staging", ""), 0);
	cr_assert_eq(store_test_count_in("layers", ""), 0);
}

Test(store_fault, a_living_maker_is_left_alone)
{
	struct store_checkpoint c = {.vm = "web", .memory_bytes = MEMORY_BYTES};
	struct store_draft *draft;
	struct err err = ERR_INIT;
	int mem, sums;

	cr_assert_eq(store_draft_begin(store_test_store, &draft, NULL), 0);
	cr_assert_eq(store_draft_memory_layer(draft, c.memory_layer, &mem, &sums, NULL), 0);
	close(mem);
	close(sums);
	store_close(store_test_must_open());
	cr_assert_eq(store_draft_put(draft, "state", "s", 1, NULL), 0);
	cr_assert_eq(store_test_put_index(store_test_store, draft, NULL, c.memory_layer, NULL), 0);
	cr_assert_eq(store_draft_commit(draft, &c, &err), 0, "%s", err.message);
	store_close(store_test_must_open());
	cr_assert_eq(store_test_count_listed(store_test_store, NULL), 1);
	cr_assert_eq(store_test_count_in("layers", ".mem"), 1);
}

/* --- many at once --- */

static bool is_whole_or_removed(struct store *mine, const char *id, struct err *err)
{
	struct store_pin *pin;

	if (store_pin(mine, id, &pin, NULL))
		return true;
	bool good = store_test_is_whole(mine, id, err);
	store_unpin(pin);
	return good;
}

/* Any but the newest three, so that there always are some. */
static bool remove_any(struct store *mine, unsigned *seed, struct err *err)
{
	struct store_checkpoint *list;
	struct store_freed freed = {0};
	size_t count;
	int rc = store_checkpoint_list(mine, NULL, &list, &count, err);

	if (rc)
		return false;
	if (count > 3)
		rc = store_checkpoint_remove(mine, list[(size_t)rand_r(seed) % (count - 3)].id, true, &freed, err);
	for (size_t i = 0; i < count; i++)
		store_checkpoint_free(&list[i]);
	free(list);
	return rc == 0 || rc == -ENOENT || rc == -EBUSY;
}

/* *kind: which of its operations. */
static bool do_one(struct store **mine, unsigned *seed, const char *vm, unsigned *kind, struct err *err)
{
	struct store_draft *draft;
	struct store_checkpoint *list;
	char last[STORE_ID_BYTES], tag[32];
	size_t count;
	bool good = true;

	switch (*kind = (unsigned)rand_r(seed) % 10) {
	case 0:
	case 1:
		if (store_resolve(*mine, vm, last, NULL))
			last[0] = '\0';
		/* Few tags, so that they are taken often. */
		snprintf(tag, sizeof(tag), "t%d", rand_r(seed) % 200);
		int rc = store_test_take(
			*mine,
			&(struct store_test_plan){.vm = vm, .parent = last, .tag = tag, .disk = rand_r(seed) & 1}, NULL,
			err);
		return rc == 0 || rc == -EEXIST;
	case 2:
		if (store_draft_begin(*mine, &draft, err))
			return false;
		store_draft_abort(draft);
		return true;
	case 3:
		store_close(*mine);
		return store_open(store_test_folder, rand_r(seed) & 1, mine, err) == 0;
	case 4:
		return store_vm_set_state(*mine, vm, "paused", err) == 0 && store_test_put_vm(*mine, vm, err) == 0;
	case 5:
		if (store_checkpoint_list(*mine, NULL, &list, &count, err))
			return false;
		if (count)
			good = is_whole_or_removed(*mine, list[(size_t)rand_r(seed) % count].id, err);
		for (size_t i = 0; i < count; i++)
			store_checkpoint_free(&list[i]);
		free(list);
		return good;
	case 6:
	case 7:
		return remove_any(*mine, seed, err);
	case 8:
		return store_gc(*mine, &(struct store_gc_result){0}, err) == 0;
	default:
		snprintf(tag, sizeof(tag), "t%d", rand_r(seed) % 200);
		if (store_resolve(*mine, vm, last, NULL))
			return true;
		int tagged = store_tag(*mine, last, tag, NULL);
		if (tagged == 0 || tagged == -EEXIST || tagged == -ENOENT)
			return true;
		err_sys(err, -tagged, "tag");
		return false;
	}
}

Test(store_fault, processes_at_once)
{
	enum { PROCESSES = 3 };
	pid_t children[PROCESSES];

	for (unsigned i = 0; i < PROCESSES; i++) {
		children[i] = fork();
		if (children[i] == 0) {
			uint64_t end = clock_now_ns() + 3000000000ull;
			struct err err = ERR_INIT;
			struct store *mine = NULL;
			unsigned seed = 7 * i + 1, done = 0, kind = 0;
			char vm[16];

			snprintf(vm, sizeof(vm), "vm%u", i);
			bool good = store_open(store_test_folder, true, &mine, &err) == 0 &&
				    store_test_put_vm(mine, vm, NULL) == 0;
			for (; good && clock_now_ns() < end; done++) {
				err = ERR_INIT; /* what was let pass */
				good = do_one(&mine, &seed, vm, &kind, &err);
			}
			if (!good)
				fprintf(stderr, "process %u, operation %u, of kind %u: %s\n", i, done, kind, err.message);
			_exit(good && done > 10 ? 0 : 1);
		}
	}
	for (unsigned i = 0; i < PROCESSES; i++) {
		int status;
		cr_assert_eq(waitpid(children[i], &status, 0), children[i]);
		cr_expect_eq(status, 0, "process %u", i);
	}
	cr_assert_gt(store_test_count_listed(store_test_store, NULL), 0);
	store_test_expect_exact(store_test_store, "in the end");
}
