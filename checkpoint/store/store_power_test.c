/*
 * The store when the power is cut, and when a call fails, at any point: what was reported durable is there and whole, what was reported gone is gone, nothing
 * half-exists, and the store can be worked with at once.
 *
 * VMCP_POWER_CUTS sets how many cuts (150; 10000 is the whole test), VMCP_POWER_SEED the first seed (1).
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/log.h"
#include "checkpoint/store/power_sim.h"
#include "checkpoint/store/store_test.h"

#define MAX_CLAIMS    256
#define CUTS_EACH_RUN 20

enum claim_state { IS_THERE, MAY_BE_THERE, IS_GONE };
struct claim {
	char id[STORE_ID_BYTES], tag[STORE_NAME_BYTES];
	enum claim_state state;
	bool tag_may_be; /* it is being given, or taken away */
};

static struct {
	struct claim claims[MAX_CLAIMS];
	size_t count;
	bool taking;	 /* one more checkpoint may be there */
	uint64_t number; /* of the next tag */
	bool exists;	 /* the store was opened */
} world;

static void make_work(void)
{
	/* Thousands of stores are made: where that costs no disk anything. */
	if (access("/dev/shm", W_OK) == 0)
		strcpy(store_test_work, "/dev/shm/vmcp-test-XXXXXX"); /* shorter than what is there */
	store_test_make_work();
	log_set_level(LOG_LEVEL_ERROR);
	log_set_sink(open("/dev/null", O_WRONLY | O_CLOEXEC),
		     ""); /* what is told about calls that fail here on purpose */
}

TestSuite(store_power, .init = make_work, .fini = store_test_remove_work, .timeout = 1000);

static uint64_t number_from(const char *variable, uint64_t otherwise)
{
	const char *text = getenv(variable);
	return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

/* --- what is claimed, against what is there --- */

static void expect_claim(struct store *in, const struct claim *claim, const char *what)
{
	char id[STORE_ID_BYTES];
	bool there = store_has_folder(in, claim->id);

	cr_assert(claim->state != IS_THERE || there, "%s: checkpoint %.8s was durable and is lost", what, claim->id);
	cr_assert(claim->state != IS_GONE || !there, "%s: checkpoint %.8s was removed and is there", what, claim->id);
	if (!*claim->tag || claim->tag_may_be || claim->state != IS_THERE)
		return;
	cr_assert_eq(store_resolve(in, claim->tag, id, NULL), 0, "%s: the tag %s is lost", what, claim->tag);
	cr_assert_str_eq(id, claim->id, "%s: the tag %s", what, claim->tag);
}

static bool is_claimed(const char *id)
{
	for (size_t i = 0; i < world.count; i++)
		if (strcmp(world.claims[i].id, id) == 0)
			return true;
	return false;
}

/* The disk layers are whole, too: store_test_is_whole only looks whether they are there. */
static void expect_disks(struct store *in, const char *id, const char *what)
{
	struct store_checkpoint c;
	struct err err = ERR_INIT;

	cr_assert_eq(store_checkpoint_get(in, id, &c, &err), 0, "%s: %s", what, err.message);
	for (uint32_t i = 0; i < c.disk_count; i++) {
		CLEANUP_BUF struct buf content = BUF_INIT, disk = BUF_INIT;
		char *path = NULL;

		cr_assert_eq(store_disk_layer_path(in, c.disks[i].layer, c.disks[i].format, &path, &err), 0, "%s: %s",
			     what, err.message);
		cr_assert_eq(file_read_all(AT_FDCWD, path, 4096, &content, &err), 0, "%s: %s", what, err.message);
		cr_assert_eq(file_read_all(AT_FDCWD, store_test_image, 4096, &disk, &err), 0, "%s: %s", what, err.message);
		cr_assert(content.length == disk.length && memcmp(content.data, disk.data, disk.length) == 0, "%s: %s", what, path);
		free(path);
	}
	store_checkpoint_free(&c);
}

static void expect_claims(struct store *in, const char *what)
{
	struct store_checkpoint *list;
	struct err err = ERR_INIT;
	size_t count, unknown = 0;

	for (size_t i = 0; i < world.count; i++)
		expect_claim(in, &world.claims[i], what);
	cr_assert_eq(store_checkpoint_list(in, NULL, &list, &count, &err), 0, "%s: %s", what, err.message);
	for (size_t i = 0; i < count; i++) {
		unknown += !is_claimed(list[i].id);
		cr_assert(store_test_is_whole(in, list[i].id, &err), "%s: checkpoint %.8s half-exists: %s", what,
			  list[i].id, err.message);
		expect_disks(in, list[i].id, what);
		store_checkpoint_free(&list[i]);
	}
	free(list);
	cr_assert_leq(unknown, world.taking, "%s: checkpoints that nobody took", what);
}

/* A store after a cut: opened, judged, collected, and worked with. */
static void judge(const char *folder, const char *what)
{
	char whole[sizeof(store_test_folder)];
	struct store_gc_result collected;
	struct err err = ERR_INIT;
	struct store *in;

	memcpy(whole, store_test_folder, sizeof(whole));
	snprintf(store_test_folder, sizeof(store_test_folder), "%s", folder);
	int rc = store_open(store_test_folder, true, &in, &err);
	cr_assert_eq(rc, 0, "%s: the store does not open: %s", what, err.message);
	expect_claims(in, what);
	cr_assert_eq(store_gc(in, &collected, &err), 0, "%s: gc: %s", what, err.message);
	store_test_expect_exact(in, what);
	expect_claims(in, what);
	if (power_sim_pick(4) == 0) {
		cr_assert_eq(store_test_put_vm(in, "web", NULL), 0, "%s: a VM's record", what);
		cr_assert_eq(store_test_take(in, &(struct store_test_plan){.disk = true}, NULL, &err), 0,
			     "%s: the next checkpoint: %s", what, err.message);
	}
	store_close(in);
	memcpy(store_test_folder, whole, sizeof(whole));
}

/* --- work --- */

static struct claim *any_there(void)
{
	size_t found = 0, chosen = 0;
	for (size_t i = 0; i < world.count; i++)
		if (world.claims[i].state == IS_THERE && power_sim_pick(++found) == 0)
			chosen = i;
	return found ? &world.claims[chosen] : NULL;
}

enum work { TAKE, TAKE_TOO, TAKE_THREE, REMOVE, TAG, COLLECT, ABORT, REOPEN, REBUILD, MOVE, WORKS };

/* Of a step that may be cut or fail: how to do it, and what is claimed when it is done (rc 0). A step that failed may have had its effect. */
static int take(struct err *err)
{
	struct claim *parent = any_there(), *claim = &world.claims[world.count];
	struct store_test_plan plan = {.disk = power_sim_pick(2), .parent = parent ? parent->id : NULL};
	char tag[STORE_NAME_BYTES] = "";

	if (world.count == MAX_CLAIMS)
		return 0;
	if (power_sim_pick(3) == 0)
		snprintf(tag, sizeof(tag), "t%llu", (unsigned long long)world.number++);
	plan.tag = *tag ? tag : NULL;
	*claim = (struct claim){.state = IS_THERE};
	world.taking = true;
	int rc = store_test_take(store_test_store, &plan, claim->id, err);
	if (rc == 0)
		memcpy(claim->tag, tag, sizeof(tag));
	return rc;
}

static int remove_one(struct claim *claim, struct err *err)
{
	struct store_freed freed = {0};
	claim->state = MAY_BE_THERE;
	return store_checkpoint_remove(store_test_store, claim->id, true, &freed, err);
}

static int tag_one(struct claim *claim, struct err *err)
{
	if (*claim->tag)
		return 0;
	snprintf(claim->tag, sizeof(claim->tag), "t%llu", (unsigned long long)world.number++);
	claim->tag_may_be = true;
	return store_tag(store_test_store, claim->id, claim->tag, err);
}

static int reopen(struct err *err)
{
	store_close(store_test_store);
	store_test_store = NULL;
	return store_open(store_test_folder, true, &store_test_store, err);
}

static int rebuild(struct err *err)
{
	struct store_rebuilt made;
	store_close(store_test_store);
	store_test_store = NULL;
	int rc = store_rebuild(store_test_folder, &made, err);
	return rc ? rc : store_open(store_test_folder, true, &store_test_store, err);
}

static int begin_and_abort(struct err *err)
{
	struct store_draft *draft;
	char layer[STORE_ID_BYTES];
	int mem, sums;
	int rc = store_draft_begin(store_test_store, &draft, err);

	if (rc)
		return rc;
	rc = store_draft_memory_layer(draft, layer, &mem, &sums, err);
	if (rc == 0) {
		close(mem);
		close(sums);
	}
	store_draft_abort(draft);
	return rc;
}

static int step(enum work work, struct claim *claim, struct err *err)
{
	struct store_gc_result collected;

	switch (work) {
	case REMOVE:
		return claim ? remove_one(claim, err) : 0;
	case TAG:
		return claim ? tag_one(claim, err) : 0;
	case COLLECT:
		return store_gc(store_test_store, &collected, err);
	case ABORT:
		return begin_and_abort(err);
	case REOPEN:
		return reopen(err);
	case REBUILD:
		return rebuild(err);
	case MOVE:
		return claim ? store_vm_set_position(store_test_store, "web", claim->id, err) : 0;
	default:
		return take(err);
	}
}

/* What is claimed once it has ended well. */
static void claim_done(enum work work, struct claim *claim)
{
	if (work <= TAKE_THREE && world.count < MAX_CLAIMS && *world.claims[world.count].id)
		world.count++;
	if (work == REMOVE && claim)
		claim->state = IS_GONE;
	if (work == TAG && claim)
		claim->tag_may_be = false;
	world.taking = false;
}

static void begin_run(uint64_t seed)
{
	memset(&world, 0, sizeof(world));
	store_close(store_test_store);
	cr_assert_eq(file_remove_tree(AT_FDCWD, store_test_folder, NULL), 0);
	cr_assert_eq(mkdir(store_test_folder, 0700), 0);
	power_sim_begin(store_test_folder, seed);
	store_test_store = store_test_must_open();
	cr_assert_eq(store_test_put_vm(store_test_store, "web", NULL), 0);
}

/* The store itself comes into being while cuts may come. */
static void cut_while_it_is_made(uint64_t seed, const char *folder)
{
	char what[64];

	memset(&world, 0, sizeof(world));
	store_close(store_test_store);
	cr_assert_eq(file_remove_tree(AT_FDCWD, store_test_folder, NULL), 0);
	cr_assert_eq(mkdir(store_test_folder, 0700), 0);
	power_sim_begin(store_test_folder, seed);
	power_sim_arm(1 + power_sim_pick(40), folder);
	store_test_store = store_test_must_open();
	power_sim_arm(0, folder);
	power_sim_end();
	snprintf(what, sizeof(what), "seed %llu, while the store is made", (unsigned long long)seed);
	if (access(folder, F_OK) == 0)
		judge(folder, what);
	cr_assert_eq(file_remove_tree(AT_FDCWD, folder, NULL), 0);
}

/* Until a cut has come. Returns after the step in which it did. */
static void work_until_cut(uint64_t seed, unsigned cut, const char *folder)
{
	struct err err = ERR_INIT;
	char what[96];

	power_sim_arm(1 + power_sim_pick(160), folder);
	while (!power_sim_was_cut()) {
		enum work work = (enum work)power_sim_pick(WORKS);
		struct claim *claim = any_there();
		int rc = step(work, claim, &err);

		snprintf(what, sizeof(what), "seed %llu, cut %u, work %u", (unsigned long long)seed, cut, work);
		cr_assert_eq(rc, 0, "%s: %s", what, err.message);
		if (power_sim_was_cut())
			judge(folder, what);
		claim_done(work, claim);
	}
	cr_assert_eq(file_remove_tree(AT_FDCWD, folder, NULL), 0);
}

Test(store_power, cuts)
{
	uint64_t cuts = number_from("VMCP_POWER_CUTS", 150), seed = number_from("VMCP_POWER_SEED", 1), made = 0;
	char folder[128];

	snprintf(folder, sizeof(folder), "%s/cut", store_test_work);
	for (; made < cuts; seed++) {
		cut_while_it_is_made(seed, folder);
		begin_run(seed);
		for (unsigned cut = 0; cut < CUTS_EACH_RUN && made < cuts; cut++, made++)
			work_until_cut(seed, cut, folder);
		power_sim_end();
	}
	fprintf(stderr, "power cuts: %llu\n", (unsigned long long)made);
	cr_assert_eq(made, cuts);
}

/* --- the key of an encrypted store --- */

static bool opens(const char *folder, const char *secret)
{
	struct store_key *key = store_key_new(secret, strlen(secret), 1);
	struct store *in = NULL;
	struct err err = ERR_INIT;
	int rc = store_open_with_key(folder, false, key, &in, &err);

	store_key_free(key);
	store_close(in);
	cr_assert(rc == 0 || rc == -EKEYREJECTED, "%s: %s", folder, err.message);
	return rc == 0;
}

/* The n-th change or sync of a change of the key is the last one that happens. False: there are not so many. */
static bool cut_while_the_key_changes(uint64_t seed, uint64_t n, const char *folder, bool *changed)
{
	struct store_key *old = store_key_new("old", 3, 1), *now = store_key_new("new", 3, 1);
	struct err err = ERR_INIT;

	store_close(store_test_store);
	cr_assert_eq(file_remove_tree(AT_FDCWD, store_test_folder, NULL), 0);
	cr_assert_eq(mkdir(store_test_folder, 0700), 0);
	power_sim_begin(store_test_folder, seed);
	cr_assert_eq(store_open_with_key(store_test_folder, true, old, &store_test_store, &err), 0, "%s", err.message);
	power_sim_arm(n, folder);
	cr_assert_eq(store_change_key(store_test_store, old, now, &err), 0, "%s", err.message);
	bool cut = power_sim_was_cut();
	power_sim_arm(0, folder);
	power_sim_end();
	if (cut) {
		*changed = opens(folder, "new");
		cr_assert_neq(opens(folder, "old"), *changed, "seed %llu, change %llu: one key opens it", (unsigned long long)seed, (unsigned long long)n);
	}
	cr_assert_eq(file_remove_tree(AT_FDCWD, folder, NULL), 0);
	store_key_free(old);
	store_key_free(now);
	return cut;
}

/* One of both keys opens it, whenever the power goes; the new one once that was reported. */
Test(store_power, cuts_while_the_key_changes)
{
	bool both[2] = {false, false};
	char folder[128];

	snprintf(folder, sizeof(folder), "%s/cut", store_test_work);
	for (uint64_t seed = 1; seed <= 20; seed++) {
		bool changed = false;
		uint64_t n = 1;

		while (cut_while_the_key_changes(seed, n, folder, &changed)) {
			both[changed] = true;
			n++;
		}
		cr_assert(n > 4 && changed, "seed %llu: reported, and lost", (unsigned long long)seed);
	}
	cr_assert(both[false] && both[true]);
}

/* --- calls that fail --- */

/* One step in which the n-th change fails. False: it had ended before. */
static bool fail_one(enum work work, uint64_t n, int error)
{
	struct claim *claim = any_there();
	struct err err = ERR_INIT, again = ERR_INIT;
	char what[96];

	snprintf(what, sizeof(what), "work %u, change %llu fails with %s", work, (unsigned long long)n,
		 strerror(error));
	power_sim_fail(n, error);
	int rc = step(work, claim, &err);
	bool failed = power_sim_has_failed();
	power_sim_fail(0, 0);
	cr_assert(rc == 0 || failed, "%s: %s", what, err.message);
	if (rc == 0)
		claim_done(work, claim);
	cr_assert_eq(reopen(&again), 0, "%s: %s", what, again.message);
	expect_claims(store_test_store, what);
	if (rc != 0 && claim && work == REMOVE && !store_has_folder(store_test_store, claim->id))
		claim->state = IS_GONE;
	else if (rc != 0 && claim && work == REMOVE)
		claim->state = IS_THERE;
	if (rc != 0 && claim && work == TAG)
		claim->tag[0] = '\0', claim->tag_may_be = false;
	cr_assert_eq(store_gc(store_test_store, &(struct store_gc_result){0}, &again), 0, "%s: %s", what,
		     again.message);
	store_test_expect_exact(store_test_store, what);
	/* A checkpoint whose commit failed is not there: nobody will ever ask for it. */
	if (work <= TAKE_THREE && rc != 0)
		world.taking = false;
	expect_claims(store_test_store, what);
	return failed;
}

static void fail_each(enum work work, uint64_t stride)
{
	static const int errors[] = {EIO, ENOSPC};
	bool any = true;

	for (uint64_t n = 1 + power_sim_pick(stride); any && n < 400; n += stride)
		for (size_t i = 0; i < ARRAY_LENGTH(errors) && any; i++) {
			while (world.count < 4) {
				cr_assert_eq(step(TAKE, NULL, NULL), 0);
				claim_done(TAKE, NULL);
			}
			/* Room for more, and something to remove and to tag. */
			for (size_t k = 0; world.count > 12 && k < world.count; k++)
				if (world.claims[k].state == IS_THERE && k % 2 == 0) {
					cr_assert_eq(step(REMOVE, &world.claims[k], NULL), 0);
					claim_done(REMOVE, &world.claims[k]);
				}
			for (size_t k = 0; k < world.count;)
				if (world.claims[k].state == IS_GONE)
					world.claims[k] = world.claims[--world.count];
				else
					k++;
			any = fail_one(work, n, errors[i]);
		}
	cr_assert(!any, "work %u has no end", work);
}

/* Every change that a step makes fails once, with an error of the device and for lack of space. VMCP_POWER_CUTS=10000: each one, else every third. */
Test(store_power, each_change_fails)
{
	static const enum work works[] = {TAKE, REMOVE, TAG, COLLECT, ABORT, MOVE};
	uint64_t stride = number_from("VMCP_POWER_CUTS", 0) >= 10000 ? 1 : 3;

	begin_run(1);
	for (size_t i = 0; i < ARRAY_LENGTH(works); i++)
		fail_each(works[i], stride);
	power_sim_end();
}
