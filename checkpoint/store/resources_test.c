/* The table of resources: who has what, and that nothing is left when nobody has it. */
#include "checkpoint/store/resources.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sqlite3.h>

#include "base/buf.h"
#include "base/fault.h"
#include "checkpoint/store/store_test.h"
#include "checkpoint/store/verify.h"

TestSuite(resources, .init = store_test_make_work, .fini = store_test_remove_work, .timeout = 120);

/* A VM as this test runs it: it holds its reservation. */
struct vm {
	char name[16];
	struct store_vm_lock *lock;
	struct store_resource *list;
	size_t count;
};

static void hold(struct vm *vm, const char *name)
{
	struct err err = ERR_INIT;
	snprintf(vm->name, sizeof(vm->name), "%s", name);
	cr_assert_eq(store_vm_reserve(store_test_store, name, &vm->lock, &err), 0, "%s", err.message);
}
/* As kill -9: what it has stays in the table. */
static void die(struct vm *vm)
{
	store_vm_unlock(vm->lock);
	vm->lock = NULL;
	store_resources_free_list(vm->list, vm->count);
	vm->list = NULL;
	vm->count = 0;
}
static struct store_resource *add(struct vm *vm, const char *type, const char *name, const char *host, bool exclusive)
{
	return store_resources_add(&vm->list, &vm->count, type, name, "as the guest knows it", host, exclusive);
}
static int bind_all(struct vm *vm, struct err *err)
{
	size_t failed = 0;
	return store_resources_bind(store_test_store, vm->name, vm->list, vm->count, NULL, NULL, &failed, err);
}
static size_t listed(const char *vm, struct store_resource **list)
{
	size_t count;
	struct err err = ERR_INIT;
	cr_assert_eq(store_resources_list(store_test_store, vm, list, &count, &err), 0, "%s", err.message);
	return count;
}
static size_t count_of(const char *vm)
{
	struct store_resource *list;
	size_t count = listed(vm, &list);
	store_resources_free_list(list, count);
	return count;
}
/* Each host resource is counted as often as it is named, and an exclusive one is named once. */
static size_t expect_consistent(void)
{
	struct store_resource *list;
	size_t count = listed(NULL, &list);
	for (size_t i = 0; i < count; i++) {
		uint64_t refs = 0;
		for (size_t k = 0; list[i].host[0] && k < count; k++)
			refs += !strcmp(list[i].type, list[k].type) && !strcmp(list[i].host, list[k].host);
		cr_assert_eq(refs, list[i].refs, "%s %s: %llu, counted as %llu", list[i].type, list[i].host,
			     (unsigned long long)refs, (unsigned long long)list[i].refs);
		cr_assert(!list[i].exclusive || refs == 1, "%s %s of %s has %llu users", list[i].type, list[i].host,
			  list[i].vm, (unsigned long long)refs);
	}
	store_resources_free_list(list, count);
	return count;
}

Test(resources, exclusive_and_shared)
{
	struct vm a = {0}, b = {0};
	struct err err = ERR_INIT;
	hold(&a, "a");
	hold(&b, "b");
	add(&a, "port", "lan/tcp/80", "tcp:127.0.0.1:8080", true);
	add(&a, "bridge", "wan", "br0", false);
	add(&a, "mac", "wan", "", false);
	cr_assert_eq(bind_all(&a, &err), 0, "%s", err.message);
	add(&b, "bridge", "wan", "br0", false);
	add(&b, "port", "lan/tcp/80", "tcp:127.0.0.1:8080", true);
	cr_expect_eq(bind_all(&b, &err), -EBUSY);
	cr_expect(err.class == ERR_STATE && strstr(err.message, "tcp:127.0.0.1:8080") && strstr(err.message, "VM a"),
		  "%s", err.message);
	cr_expect_eq(count_of("b"), 0, "all or none");
	free(b.list[1].host);
	b.list[1].host = xstrdup("tcp:127.0.0.1:8081");
	cr_assert_eq(bind_all(&b, &err), 0, "%s", err.message);
	cr_expect_eq(expect_consistent(), 5);
	struct store_resource *list;
	size_t count = listed("b", &list);
	cr_assert_eq(count, 2);
	cr_expect(!strcmp(list[0].type, "bridge") && list[0].refs == 2 && !list[0].exclusive);
	cr_expect(!strcmp(list[1].host, "tcp:127.0.0.1:8081") && list[1].refs == 1 && list[1].exclusive);
	cr_expect_str_eq(list[1].guest, "as the guest knows it");
	store_resources_free_list(list, count);
	/* Bound again is as bound. */
	cr_expect_eq(bind_all(&b, &err), 0);
	cr_expect_eq(expect_consistent(), 5);
	/* A count that is wrong is seen. */
	static const char *const sql[] = {"UPDATE hosts SET refs = 3 WHERE host = 'br0'",
					  "UPDATE hosts SET refs = 2 WHERE host = 'br0'"};
	char what[512], path[160];
	snprintf(path, sizeof(path), "%s/catalog.db", store_test_folder);
	for (int i = 0; i < 2; i++) {
		sqlite3 *db;
		cr_assert_eq(sqlite3_open(path, &db), SQLITE_OK);
		cr_assert_eq(sqlite3_exec(db, sql[i], NULL, NULL, NULL), SQLITE_OK);
		sqlite3_close(db);
		cr_assert_eq(store_verify_catalog(store_test_store, what, &err), 0, "%s", err.message);
		cr_expect(i == 0 ? strstr(what, "bridge br0") != NULL : !what[0], "%d: %s", i, what);
	}
	cr_expect_eq(store_resources_free(store_test_store, "a", &err), 0);
	cr_expect_eq(expect_consistent(), 2);
	cr_expect_eq(store_resources_free(store_test_store, "a", &err), 0, "twice does nothing");
	cr_expect_eq(store_resources_free(store_test_store, "b", &err), 0);
	cr_expect_eq(expect_consistent(), 0);
	die(&a);
	die(&b);
}

static bool not_odd(void *opaque, const struct store_resource *resource, uint32_t number)
{
	cr_expect_str_eq(resource->host, "tcp:127.0.0.1:");
	++*(unsigned *)opaque;
	return number % 2 == 0;
}

Test(resources, pools)
{
	struct vm vms[4] = {0};
	struct err err = ERR_INIT;
	size_t failed = 99;
	unsigned asked = 0;
	for (unsigned i = 0; i < 4; i++) {
		char name[8];
		snprintf(name, sizeof(name), "v%u", i);
		hold(&vms[i], name);
		add(&vms[i], "mac", "lan", "", false);
		struct store_resource *one = add(&vms[i], "port", "lan/tcp/80", "tcp:127.0.0.1:", true);
		one->pool_from = 20000;
		one->pool_to = 20005;
		int rc = store_resources_bind(store_test_store, name, vms[i].list, 2, not_odd, &asked, &failed, &err);
		char want[32];
		snprintf(want, sizeof(want), "tcp:127.0.0.1:%u", 20000 + 2 * i);
		if (i < 3)
			cr_expect(rc == 0 && !strcmp(vms[i].list[1].host, want), "%u: %d %s, %s", i, rc,
				  vms[i].list[1].host, err.message);
		else
			cr_expect(rc == -ENOSPC && failed == 1 && strstr(err.message, "20005") && err.hint[0], "%d %s",
				  rc, err.message);
	}
	cr_expect_gt(asked, 3);
	cr_expect_eq(expect_consistent(), 6);
	/* A VM that died makes room, without anybody's help. */
	die(&vms[1]);
	cr_assert_eq(store_resources_bind(store_test_store, "v3", vms[3].list, 2, not_odd, &asked, &failed, &err), 0,
		     "%s", err.message);
	cr_expect_str_eq(vms[3].list[1].host, "tcp:127.0.0.1:20002");
	cr_expect_eq(count_of("v1"), 0);
	uint64_t freed;
	die(&vms[0]);
	cr_expect_eq(store_resources_collect(store_test_store, &freed, &err), 0);
	cr_expect_eq(freed, 2);
	cr_expect_eq(expect_consistent(), 4, "those of the living stay");
	die(&vms[2]);
	die(&vms[3]);
	cr_expect_eq(store_resources_collect(store_test_store, &freed, &err), 0);
	cr_expect_eq(expect_consistent(), 0);
}

Test(resources, pools_of_addresses)
{
	static const char *const want[] = {"bridge:br0/10.0.0.255", "bridge:br0/10.0.1.0"};
	struct vm vms[3] = {0};
	struct err err = ERR_INIT;
	for (unsigned i = 0; i < 3; i++) {
		char name[8];
		snprintf(name, sizeof(name), "v%u", i);
		hold(&vms[i], name);
		struct store_resource *one = add(&vms[i], "ip", "lan", "bridge:br0/", true);
		one->pool_from = 0x0a0000ff;
		one->pool_to = 0x0a000100;
		one->pool_of_ip = true;
		int rc = store_resources_bind(store_test_store, name, vms[i].list, 1, NULL, NULL, NULL, &err);
		if (i < 2)
			cr_expect(rc == 0 && !strcmp(vms[i].list[0].host, want[i]), "%u: %d %s, %s", i, rc, vms[i].list[0].host, err.message);
		else
			cr_expect(rc == -ENOSPC && strstr(err.message, "none of bridge:br0/10.0.0.255 to bridge:br0/10.0.1.0"), "%d %s", rc, err.message);
	}
	for (unsigned i = 0; i < 3; i++)
		die(&vms[i]);
}

Test(resources, uuids_are_of_one_vm)
{
	char a[37], b[37], again[37];
	struct err err = ERR_INIT;
	cr_assert_eq(store_vm_uuid(store_test_store, "a", "", a, &err), 0, "%s", err.message);
	cr_assert_eq(store_vm_uuid(store_test_store, "b", "", b, &err), 0);
	cr_expect(strlen(a) == 36 && a[14] == '4' && strchr("89ab", a[19]), "%s", a);
	cr_expect_str_neq(a, b);
	cr_assert_eq(store_vm_uuid(store_test_store, "a", "", again, &err), 0);
	cr_expect_str_eq(again, a, "as long as it is its own");
	/* One that has a record keeps that; where two have the same, as after an import of a copy, the one that starts gets another. */
	cr_assert_eq(store_test_put_vm(store_test_store, "known", NULL), 0);
	cr_assert_eq(store_vm_uuid(store_test_store, "known", "", again, &err), 0);
	cr_expect_str_eq(again, VM_UUID);
	cr_assert_eq(store_test_put_vm(store_test_store, "copy", NULL), 0);
	cr_assert_eq(store_vm_uuid(store_test_store, "copy", "", again, &err), 0);
	cr_expect_str_neq(again, VM_UUID);
}

Test(resources, a_wanted_uuid_is_given_to_who_has_none)
{
	static const char wanted[] = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", other[] = "5dea22b3-1d52-d8f3-2516-782e98ab3fa0";
	char uuid[37];
	struct err err = ERR_INIT;
	cr_assert_eq(store_vm_uuid(store_test_store, "a", wanted, uuid, &err), 0, "%s", err.message);
	cr_expect_str_eq(uuid, wanted);
	cr_assert_eq(store_vm_uuid(store_test_store, "a", other, uuid, &err), 0);
	cr_expect_str_eq(uuid, wanted, "it keeps what it has");
	cr_assert_eq(store_vm_uuid(store_test_store, "b", wanted, uuid, &err), 0);
	cr_expect(strlen(uuid) == 36 && strcmp(uuid, wanted) != 0, "another VM has it: %s", uuid);
}

Test(resources, names_are_reserved_once)
{
	struct vm a = {0};
	struct store_vm_lock *second = NULL;
	struct err err = ERR_INIT;
	hold(&a, "a");
	cr_expect_eq(store_vm_reserve(store_test_store, "a", &second, &err), -EBUSY);
	cr_expect(err.class == ERR_STATE && err.hint[0]);
	cr_assert_eq(store_vm_lock(store_test_store, "a", &second, &err), 0, "it may be started: %s", err.message);
	die(&a);
	cr_expect_eq(store_vm_reserve(store_test_store, "a", &a.lock, &err), -EBUSY, "it runs");
	store_vm_unlock(second);
	cr_expect_eq(store_vm_reserve(store_test_store, "../a", &second, &err), -EINVAL);
	hold(&a, "a");
	die(&a);
}

Test(resources, a_vm_that_never_was)
{
	static const char other[] = "5dea22b3-1d52-d8f3-2516-782e98ab3fa0";
	struct store_vm_lock *lock;
	struct err err = ERR_INIT;
	char uuid[37], path[200];
	struct vm a = {.name = "a"};
	snprintf(path, sizeof(path), "%s/vms/a/disk.qcow2", store_test_folder);
	cr_assert_eq(store_test_put_vm(store_test_store, "a", NULL), 0);
	cr_assert_eq(store_vm_lock(store_test_store, "a", &lock, &err), 0);
	fclose(fopen(path, "w"));
	add(&a, "port", "lan", "tcp:1", true);
	cr_assert_eq(bind_all(&a, &err), 0);
	cr_expect_eq(store_vm_forget(store_test_store, "a", VM_UUID, &err), -EBUSY, "it runs");
	store_vm_unlock(lock);
	cr_expect_eq(store_vm_forget(store_test_store, "a", other, &err), -EEXIST, "another one");
	cr_expect(access(path, F_OK) == 0 && count_of("a") == 1);
	cr_assert_eq(store_vm_uuid(store_test_store, "a", "", uuid, &err), 0);
	cr_expect_str_eq(uuid, VM_UUID);
	cr_assert_eq(store_vm_forget(store_test_store, "a", VM_UUID, &err), 0, "%s", err.message);
	cr_expect(access(path, F_OK) != 0 && count_of("a") == 0);
	*strrchr(path, '/') = '\0';
	cr_expect(access(path, F_OK) != 0, "its folder");
	cr_expect_eq(store_vm_forget(store_test_store, "a", VM_UUID, &err), 0, "what is not there");
	store_resources_free_list(a.list, a.count);
}

static void leave_socket(const char *folder, const char *name)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char path[200], command[300];
	snprintf(path, sizeof(path), "%s/%s", store_test_folder, folder);
	snprintf(command, sizeof(command), "mkdir -p %s", path);
	cr_assert_eq(system(command), 0);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/%s", dir, name);
	cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	close(fd);
	close(dir);
}
static bool is_there(const char *name)
{
	char path[200];
	snprintf(path, sizeof(path), "%s/%s", store_test_folder, name);
	return access(path, F_OK) == 0;
}

Test(resources, sockets_of_the_dead)
{
	struct vm a = {0};
	struct err err = ERR_INIT;
	uint64_t freed;
	hold(&a, "a"); /* it may be opening its own just now */
	leave_socket("vms/a", "control.sock");
	leave_socket("vms/dead", "control.sock");
	leave_socket("networks/lan", "dead.1");
	cr_assert_eq(store_resources_collect(store_test_store, &freed, &err), 0, "%s", err.message);
	cr_expect(is_there("vms/a/control.sock") && is_there("vms/dead") && !is_there("vms/dead/control.sock"));
	cr_expect(is_there("networks/lan"), "whoever has no lock there is left alone");
	char command[300];
	snprintf(command, sizeof(command), "touch %s/networks/.lock", store_test_folder);
	cr_assert_eq(system(command), 0);
	cr_assert_eq(store_resources_collect(store_test_store, &freed, &err), 0, "%s", err.message);
	cr_expect(!is_there("networks/lan"));
	die(&a);
	cr_assert_eq(store_resources_collect(store_test_store, &freed, &err), 0, "%s", err.message);
	cr_expect(!is_there("vms/a/control.sock"));
}

/* Processes at once: nobody gets what another one has, and all of them get something. */
Test(resources, many_at_once)
{
	enum { PROCESSES = 6, EACH = 10 };
	pid_t children[PROCESSES];
	for (unsigned p = 0; p < PROCESSES; p++) {
		children[p] = fork();
		cr_assert_geq(children[p], 0);
		if (children[p])
			continue;
		struct store *store;
		if (store_open(store_test_folder, false, &store, NULL))
			_exit(1);
		for (unsigned i = 0; i < EACH; i++) {
			struct store_vm_lock *lock;
			struct store_resource *list = NULL;
			size_t count = 0, failed;
			char name[16], uuid[37];
			snprintf(name, sizeof(name), "p%u-%u", p, i);
			if (store_vm_reserve(store, name, &lock, NULL) || store_vm_uuid(store, name, "", uuid, NULL))
				_exit(2);
			struct store_resource *one =
				store_resources_add(&list, &count, "port", "lan", "", "tcp:", true);
			one->pool_from = 1;
			one->pool_to = PROCESSES * EACH;
			store_resources_add(&list, &count, "uuid", "vm", "", uuid, true);
			if (store_resources_bind(store, name, list, count, NULL, NULL, &failed, NULL))
				_exit(3);
			/* The lock is kept until the process ends. */
		}
		pause();
	}
	/* All have bound when the pool is empty; they are alive all the time. */
	struct vm late = {0};
	struct err err;
	hold(&late, "late");
	add(&late, "port", "lan", "tcp:", true);
	late.list[0].pool_from = 1;
	late.list[0].pool_to = PROCESSES * EACH;
	for (;;) {
		int status;
		cr_assert_eq(waitpid(-1, &status, WNOHANG), 0, "a child has failed: %d", WEXITSTATUS(status));
		if (count_of(NULL) == 2 * PROCESSES * EACH)
			break;
		usleep(10000);
	}
	err = ERR_INIT;
	size_t failed;
	cr_expect_eq(store_resources_bind(store_test_store, "late", late.list, 1, NULL, NULL, &failed, &err), -ENOSPC);
	cr_expect_eq(expect_consistent(), 2 * PROCESSES * EACH);
	for (unsigned p = 0; p < PROCESSES; p++) {
		kill(children[p], SIGKILL);
		waitpid(children[p], NULL, 0);
	}
	cr_expect_eq(store_resources_bind(store_test_store, "late", late.list, 1, NULL, NULL, &failed, &err), 0);
	uint64_t freed;
	cr_expect_eq(store_resources_collect(store_test_store, &freed, &err), 0);
	cr_expect_eq(expect_consistent(), 1);
	die(&late);
}

/* Killed between allocation and commit, and between release and commit: as if it had not begun. */
Test(resources, killed_on_the_way)
{
	struct vm a = {0};
	struct err err = ERR_INIT;
	hold(&a, "a");
	add(&a, "port", "lan", "tcp:1", true);
	for (unsigned point = 360; point <= 361; point++) {
		if (point == 361)
			cr_assert_eq(bind_all(&a, &err), 0);
		size_t before = count_of(NULL);
		pid_t child = fork();
		if (child == 0) {
			char text[16];
			struct store *store;
			snprintf(text, sizeof(text), "%u", point);
			setenv("VMCP_FAULT", text, 1);
			size_t failed;
			if (fault_init(NULL) || store_open(store_test_folder, false, &store, NULL))
				_exit(1);
			if (point == 360)
				store_resources_bind(store, "a", a.list, a.count, NULL, NULL, &failed, NULL);
			else
				store_resources_free(store, "a", NULL);
			_exit(2);
		}
		int status;
		cr_assert_eq(waitpid(child, &status, 0), child);
		cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "point %u: %d", point, status);
		cr_expect_eq(expect_consistent(), before, "point %u", point);
	}
	die(&a);
}

#define VMS 12u

/* What a random VM may have: some of it others may have too. */
static void add_random(struct vm *vm, unsigned *seed)
{
	char name[16], host[32];
	for (int i = rand_r(seed) % 4; i >= 0; i--) {
		bool exclusive = rand_r(seed) % 3 != 0;
		snprintf(name, sizeof(name), "n%d", i);
		snprintf(host, sizeof(host), "h%d", rand_r(seed) % 8);
		struct store_resource *one = add(vm, exclusive ? "port" : "bridge", name, host, exclusive);
		if (exclusive && rand_r(seed) % 2) {
			one->pool_from = (uint32_t)(1 + rand_r(seed) % 3);
			one->pool_to = one->pool_from + (uint32_t)(rand_r(seed) % 4);
		}
	}
}
static void one_operation(struct vm *vm, const char *name, unsigned *seed, unsigned counts[5])
{
	struct err err = ERR_INIT;
	uint64_t freed;
	int rc;
	switch (rand_r(seed) % 5) {
	case 0:
	case 1:
		if (!vm->lock)
			hold(vm, name);
		store_resources_free_list(vm->list, vm->count);
		vm->list = NULL;
		vm->count = 0;
		add_random(vm, seed);
		rc = bind_all(vm, &err);
		cr_assert(rc == 0 || rc == -EBUSY || rc == -ENOSPC, "%d %s", rc, err.message);
		counts[rc == 0 ? 0 : 1]++;
		break;
	case 2:
		cr_assert_eq(store_resources_free(store_test_store, name, &err), 0);
		counts[2]++;
		break;
	case 3:
		counts[3] += vm->lock != NULL;
		die(vm);
		break;
	default:
		if (rand_r(seed) % 8 == 0)
			cr_assert_eq(store_resources_collect(store_test_store, &freed, &err), 0);
		counts[4]++;
	}
}

Test(resources, ten_thousand_random_operations)
{
	struct vm vms[VMS] = {0};
	unsigned seed = 20261129, counts[5] = {0};
	struct err err = ERR_INIT;
	uint64_t freed;
	for (unsigned i = 0; i < 10000; i++) {
		char name[16];
		unsigned at = (unsigned)rand_r(&seed) % VMS;
		snprintf(name, sizeof(name), "vm%u", at);
		one_operation(&vms[at], name, &seed, counts);
		if (i % 50 == 0)
			expect_consistent();
	}
	for (unsigned i = 0; i < 5; i++)
		cr_expect_gt(counts[i], 500, "operation %u: %u times", i, counts[i]);
	for (unsigned i = 0; i < VMS; i++)
		die(&vms[i]);
	cr_expect_eq(store_resources_collect(store_test_store, &freed, &err), 0);
	cr_expect_eq(expect_consistent(), 0);
}

Test(resources, templates)
{
	char id[STORE_ID_BYTES], other[STORE_ID_BYTES], found[STORE_ID_BYTES], *rules;
	struct store_freed freed = {0};
	struct err err = ERR_INIT;
	store_test_must_take(&(struct store_test_plan){0}, id);
	store_test_must_take(&(struct store_test_plan){.vm = "other"}, other);
	cr_expect_eq(store_template_get(store_test_store, id, &rules, &err), 0);
	cr_assert_eq(store_template_put(store_test_store, id, "worker", "mac any new\n", &err), 0, "%s", err.message);
	cr_assert_eq(store_resolve(store_test_store, "worker", found, &err), 0);
	cr_expect_str_eq(found, id);
	cr_assert_eq(store_template_get(store_test_store, id, &rules, &err), 1);
	cr_expect_str_eq(rules, "mac any new\n");
	free(rules);
	cr_expect_eq(store_template_put(store_test_store, other, "worker", "", &err), -EEXIST);
	cr_assert_eq(store_template_put(store_test_store, id, "worker", "", &err), 0, "other rules");
	cr_assert_eq(store_template_get(store_test_store, id, &rules, &err), 1);
	cr_expect_str_eq(rules, "");
	free(rules);
	cr_assert_eq(store_checkpoint_remove(store_test_store, id, true, &freed, &err), 0, "%s", err.message);
	cr_expect_eq(store_template_get(store_test_store, id, &rules, &err), 0);
}
