/* Whom a multiplexer gives a connection to, and which VMs it finds in the table. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "checkpoint/store/resources.h"
#include "control/mux_internal.h"

Test(mux, places)
{
	static const char *const bad[] = {"", "tcp", "udp:127.0.0.1:80:least", "tcp:127.0.0.1:80", "tcp:127.0.0.1:80:", "tcp:127.0.0.1:80:most", "tcp:127.0.0.1:0:least",
					  "tcp:127.0.0.1:65536:least", "tcp:127.0.0.256:80:least", "tcp:127.0.0.1:080:least", "tcp:127.0.0.1:80:least/../x",
					  "tcp:1.1.1:80:least", " tcp:127.0.0.1:80:least"};
	struct sockaddr_in address;
	enum config_sharing sharing;
	cr_assert(mux_parse_place("tcp:127.0.0.1:8080:least", &address, &sharing));
	cr_expect(sharing == CONFIG_LEAST && ntohs(address.sin_port) == 8080 && address.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	cr_assert(mux_parse_place("tcp:0.0.0.0:1:round-robin", &address, &sharing) && sharing == CONFIG_ROUND_ROBIN);
	cr_assert(mux_parse_place("tcp:0.0.0.0:1:name", &address, &sharing) && sharing == CONFIG_BY_NAME);
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++)
		cr_expect_not(mux_parse_place(bad[i], &address, &sharing), "%s", bad[i]);
}

static struct mux_member list[4] = {{.vm = "web-1", .present = true}, {.vm = "web-2", .present = true}, {.vm = "web-3"}, {.vm = "web.4", .present = true}};

Test(mux, choosing)
{
	struct mux_members members = {.list = list, .count = 4, .last = 3};
	bool tried[4] = {false};
	/* By turns, but those that have gone. */
	cr_expect_eq(mux_choose(&members, CONFIG_ROUND_ROBIN, "", tried), 0);
	members.last = 0;
	cr_expect_eq(mux_choose(&members, CONFIG_ROUND_ROBIN, "", tried), 1);
	members.last = 1;
	cr_expect_eq(mux_choose(&members, CONFIG_ROUND_ROBIN, "", tried), 3);
	tried[3] = true;
	cr_expect_eq(mux_choose(&members, CONFIG_ROUND_ROBIN, "", tried), 0);
	/* The fewest; of several by turns. */
	tried[3] = false;
	list[0].connections = 2, list[1].connections = 1, list[3].connections = 1;
	members.last = 0;
	cr_expect_eq(mux_choose(&members, CONFIG_LEAST, "", tried), 1);
	members.last = 1;
	cr_expect_eq(mux_choose(&members, CONFIG_LEAST, "", tried), 3);
	tried[1] = tried[3] = true;
	cr_expect_eq(mux_choose(&members, CONFIG_LEAST, "", tried), 0);
	/* By name: its first label, or all of it. */
	memset(tried, 0, sizeof(tried));
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web-2", tried), 1);
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "WEB-2.example.org", tried), 1);
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web.4", tried), 3);
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web-3", tried), -1, "it has gone");
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web", tried), -1);
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web-2x.example.org", tried), -1);
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "", tried), -1);
	tried[1] = true;
	cr_expect_eq(mux_choose(&members, CONFIG_BY_NAME, "web-2", tried), -1, "it does not answer");
	struct mux_members none = {0};
	cr_expect_eq(mux_choose(&none, CONFIG_ROUND_ROBIN, "", tried), -1);
}

/* A VM that shares the port; it runs if *lock. */
static void enter(struct store *store, const char *name, const char *port, const char *place, struct store_vm_lock **lock)
{
	struct store_resource *resources = NULL;
	size_t count = 0;
	struct err err = ERR_INIT;
	char uuid[37];
	store_resources_add(&resources, &count, "port", "lan/tcp/80", "tcp:80", port, true);
	store_resources_add(&resources, &count, "mux", "lan/tcp/80", "tcp:80", place, false);
	cr_assert_eq(store_vm_lock(store, name, lock, &err), 0, "%s", err.message);
	cr_assert_eq(store_vm_uuid(store, name, "", uuid, &err), 0, "%s", err.message);
	cr_assert_eq(store_resources_bind(store, name, resources, count, NULL, NULL, NULL, &err), 0, "%s", err.message);
	store_resources_free_list(resources, count);
}

Test(mux, members_are_those_of_the_table_that_live)
{
	char path[] = "/tmp/vmcp-mux-test-XXXXXX";
	struct store *store;
	struct store_vm_lock *one, *two, *other;
	struct mux_members members = {0};
	struct err err = ERR_INIT;
	size_t present = 7;
	cr_assert_not_null(mkdtemp(path));
	cr_assert_eq(store_open(path, true, &store, &err), 0, "%s", err.message);
	cr_assert_eq(mux_members_look(&members, store, "tcp:127.0.0.1:8080:least", &present, &err), 0);
	cr_expect_eq(present, 0);
	enter(store, "one", "tcp:127.0.0.1:20001", "tcp:127.0.0.1:8080:least", &one);
	enter(store, "two", "tcp:0.0.0.0:20002", "tcp:127.0.0.1:8080:least", &two);
	enter(store, "other", "tcp:127.0.0.1:20003", "tcp:127.0.0.1:8080:name", &other);
	cr_assert_eq(mux_members_look(&members, store, "tcp:127.0.0.1:8080:least", &present, &err), 0);
	cr_assert(present == 2 && members.count == 2);
	cr_expect_str_eq(members.list[0].vm, "one");
	cr_expect(ntohs(members.list[0].at.sin_port) == 20001 && members.list[0].at.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	cr_expect(ntohs(members.list[1].at.sin_port) == 20002 && members.list[1].at.sin_addr.s_addr == 0);
	members.list[0].connections = 5;
	store_vm_unlock(two);
	cr_assert_eq(mux_members_look(&members, store, "tcp:127.0.0.1:8080:least", &present, &err), 0);
	cr_expect(present == 1 && members.count == 2 && members.list[0].present && !members.list[1].present && members.list[0].connections == 5);
	/* One that has gone, and has no connection any more, makes room. */
	struct store_vm_lock *three;
	enter(store, "three", "tcp:127.0.0.1:20004", "tcp:127.0.0.1:8080:least", &three);
	cr_assert_eq(mux_members_look(&members, store, "tcp:127.0.0.1:8080:least", &present, &err), 0);
	cr_expect(present == 2 && members.count == 2 && members.list[0].connections == 5);
	cr_expect_str_eq(members.list[1].vm, "three");
	store_vm_unlock(one);
	store_vm_unlock(three);
	store_vm_unlock(other);
	mux_members_free(&members);
	store_close(store);
	file_remove_tree(AT_FDCWD, path, NULL);
}
