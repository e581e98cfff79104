/* Rules of clones: what they make of a configuration, and every way to get them wrong. */
#include "control/clone_rules.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"

static const char web[] = "[vm]\nname = web\nmemory = 64M\nkernel = /k\nvsock_cid = 3\n"
			  "[disk root]\npath = /d/root.qcow2\n[disk seed]\npath = /d/seed.iso\nreadonly = yes\n"
			  "[net lan]\nmode = user\nmac = 52:54:00:00:00:01\nforward = tcp:8080:80\nforward = "
			  "tcp:2222:22\nforward = udp:0.0.0.0:5353:53\n"
			  "[net lan2]\nmode = user\nforward = tcp:8081:80\n"
			  "[net br]\nmode = bridge\nbridge = br0\n";
static const char with_tap[] =
	"[vm]\nname = web\nmemory = 64M\nkernel = /k\n[net wan]\nmode = tap\ntap = vmtap0\nmac = 52:54:00:00:00:02\n";

struct made {
	struct machine_config config;
	struct store_resource *list;
	size_t count;
};

static void read_config(const char *text, struct machine_config *out)
{
	struct err err = ERR_INIT;
	cr_assert_eq(config_read_text("config", text, out, &err), 0, "%s", err.message);
}

/* Clone `number` of `count`. */
static int make(const char *config, const char *text, unsigned number, unsigned count, struct made *made,
		struct err *err)
{
	struct clone_variables variables = {
		.vm = "web-7", .uuid = "12345678-1234-4234-8234-123456789abc", .store = "/store", .number = number};
	struct clone_rules *rules = NULL;
	*made = (struct made){0};
	*err = ERR_INIT;
	read_config(config, &made->config);
	int rc = clone_rules_read("my.rules", text, &rules, err);
	const struct machine_config *of = &made->config;
	if (!rc)
		rc = clone_rules_check_names(rules, &of, 1, err);
	if (!rc)
		rc = clone_rules_check(rules, &made->config, count, err);
	snprintf(made->config.name, sizeof(made->config.name), "web-7");
	if (!rc)
		rc = clone_rules_apply(rules, &made->config, &variables, &made->list, &made->count, err);
	clone_rules_free(rules);
	return rc;
}
static void end(struct made *made)
{
	config_free(&made->config);
	store_resources_free_list(made->list, made->count);
}
static struct store_resource *find(struct made *made, const char *type, const char *name)
{
	for (size_t i = 0; i < made->count; i++)
		if (!strcmp(made->list[i].type, type) && !strcmp(made->list[i].name, name))
			return &made->list[i];
	cr_assert_fail("no %s %s", type, name);
	return NULL;
}
static void expect_host(struct made *made, const char *type, const char *name, const char *host)
{
	cr_expect_str_eq(find(made, type, name)->host, host, "%s %s: %s, not %s", type, name,
			 find(made, type, name)->host, host);
}

Test(clone_rules, without_any)
{
	struct made made;
	struct err err;
	cr_assert_eq(make(web, "", 1, 3, &made, &err), 0, "%s", err.message);
	struct store_resource *port = find(&made, "port", "lan/tcp/80");
	cr_expect(port->pool_from == 20000 && port->pool_to == 29999 && port->exclusive);
	cr_expect_str_eq(port->host, "tcp:127.0.0.1:");
	cr_expect_str_eq(port->guest, "tcp:80");
	expect_host(&made, "port", "lan/udp/53", "udp:0.0.0.0:");
	expect_host(&made, "bridge", "br", "br0");
	expect_host(&made, "disk", "root", "/store/vms/web-7/root.qcow2");
	expect_host(&made, "disk", "seed", "/d/seed.iso");
	expect_host(&made, "cid", "vsock", "/store/vms/web-7/vsock.sock");
	expect_host(&made, "uuid", "vm", "12345678-1234-4234-8234-123456789abc");
	cr_expect_str_neq(find(&made, "mac", "lan")->guest, "52:54:00:00:00:01", "a new one");
	cr_expect_str_eq(made.config.disks[0].path, "/store/vms/web-7/root.qcow2");
	end(&made);
}

Test(clone_rules, what_was_allocated_is_settled)
{
	struct made made;
	struct err err;
	char text[32];
	cr_assert_eq(make(web, "", 1, 3, &made, &err), 0, "%s", err.message);
	unsigned number = 20000;
	for (size_t i = 0; i < made.count; i++) {
		if (!made.list[i].pool_from)
			continue;
		snprintf(text, sizeof(text), "%s%u", made.list[i].host, number++);
		free(made.list[i].host);
		made.list[i].host = xstrdup(text);
	}
	cr_assert_eq(number, 20004);
	cr_assert_eq(clone_rules_settle(&made.config, made.list, made.count, &err), 0);
	cr_expect_eq(made.config.nets[0].forwards[0].host_port, 20000);
	cr_expect_eq(made.config.nets[0].forwards[1].host_port, 20001);
	cr_expect_eq(made.config.nets[0].forwards[2].host_port, 20002);
	cr_expect_eq(made.config.nets[1].forwards[0].host_port, 20003);
	/* And the configuration is one. */
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct machine_config again;
	cr_assert_eq(config_to_text(&made.config, &buf, &err), 0);
	cr_assert_eq(buf_append(&buf, NULL, 1, &err), 0);
	cr_assert_eq(config_read_text("again", (char *)buf.data, &again, &err), 0, "%s", err.message);
	config_free(&again);
	end(&made);
}

Test(clone_rules, the_more_special_one_goes_before)
{
	struct made made;
	struct err err;
	cr_assert_eq(make(web,
			  "# all\n\nport any allocate 30000-30999\n"
			  "port:lan rw drop # of this card\nport:lan/tcp/22 any set 22<N>\n"
			  "mac:lan any share\nmac:br rw set 52:54:00:00:01:0<N>\nbridge:br any set br<N>\n"
			  "disk:root rw copy <STORE>/x/<VM>-<UUID>.qcow2\ndisk ro share\ncid any virtualize\nmemory "
			  "any copy\n",
			  5, 3, &made, &err),
		     0, "%s", err.message);
	expect_host(&made, "port", "lan/tcp/22", "tcp:127.0.0.1:225");
	cr_expect_eq(made.config.nets[0].forward_count, 1);
	cr_expect_eq(find(&made, "port", "lan2/tcp/80")->pool_from, 30000);
	cr_expect_str_eq(find(&made, "mac", "lan")->guest, "52:54:00:00:00:01");
	cr_expect_str_eq(find(&made, "mac", "br")->guest, "52:54:00:00:01:05");
	expect_host(&made, "bridge", "br", "br5");
	expect_host(&made, "disk", "root", "/store/x/web-7-12345678-1234-4234-8234-123456789abc.qcow2");
	end(&made);
}

Test(clone_rules, host_names)
{
	struct made made;
	struct err err;
	/* Where there is a way to an agent: the VM's name, as far as it may be a host's. */
	cr_assert_eq(make(web, "", 1, 3, &made, &err), 0, "%s", err.message);
	cr_expect_str_eq(made.config.hostname, "web-7");
	expect_host(&made, "hostname", "vm", "web-7");
	cr_expect_not(find(&made, "hostname", "vm")->exclusive);
	end(&made);
	cr_assert_eq(make(with_tap, "tap any set vmtap<N>", 1, 3, &made, &err), 0, "%s", err.message);
	cr_expect_str_eq(made.config.hostname, "");
	end(&made);
	cr_assert_eq(make(web, "hostname:vm any set n<N>", 5, 3, &made, &err), 0, "%s", err.message);
	expect_host(&made, "hostname", "vm", "n5");
	end(&made);
	cr_assert_eq(make(web, "hostname any share", 5, 3, &made, &err), 0, "%s", err.message);
	cr_expect_str_eq(made.config.hostname, "");
	end(&made);
	cr_assert_eq(make(web, "hostname any allocate node-:3-9", 5, 3, &made, &err), 0, "%s", err.message);
	struct store_resource *name = find(&made, "hostname", "vm");
	cr_expect(name->pool_from == 3 && name->pool_to == 9 && name->exclusive);
	cr_expect_str_eq(name->host, "node-");
	free(name->host);
	name->host = xstrdup("node-4");
	cr_assert_eq(clone_rules_settle(&made.config, made.list, made.count, &err), 0, "%s", err.message);
	cr_expect_str_eq(made.config.hostname, "node-4");
	cr_expect_str_eq(name->guest, "node-4");
	end(&made);
}

Test(clone_rules, addresses)
{
	struct made made;
	struct err err;
	static const char with_ip[] = "[vm]\nname = web\nmemory = 64M\nkernel = /k\nvsock_cid = 3\n[net lan]\nmode = bridge\nbridge = br0\nip = 10.0.0.5/24\n"
				      "[net wan]\nmode = tap\ntap = vmtap0\n[net out]\nmode = user\n";
	/* As it was, and a network has one of each. */
	cr_assert_eq(make(with_ip, "tap any set t<N>", 1, 3, &made, &err), 0, "%s", err.message);
	expect_host(&made, "ip", "lan", "bridge:br0/10.0.0.5");
	cr_expect_str_eq(find(&made, "ip", "lan")->guest, "10.0.0.5/24");
	cr_expect(find(&made, "ip", "lan")->exclusive);
	for (size_t i = 0; i < made.count; i++)
		cr_expect(strcmp(made.list[i].type, "ip") || !strcmp(made.list[i].name, "lan"), "an address that nobody gave: %s", made.list[i].name);
	end(&made);
	/* Also of a card that had none; none of mode user. */
	cr_assert_eq(make(with_ip, "tap any set t<N>\nip:lan any set 10.1.0.<N>/16\nip:wan rw set 10.2.<N>.1/8", 5, 3, &made, &err), 0, "%s", err.message);
	expect_host(&made, "ip", "lan", "bridge:br0/10.1.0.5");
	expect_host(&made, "ip", "wan", "tap/10.2.5.1");
	cr_expect_not(find(&made, "ip", "wan")->exclusive, "what is behind a tap device nobody knows");
	cr_expect_str_eq(find(&made, "ip", "wan")->guest, "10.2.5.1/8");
	cr_expect_eq(made.config.nets[2].ip_length, 0);
	end(&made);
	cr_assert_eq(make(with_ip, "tap any set t<N>\nip any allocate 10.3.0.250-10.3.1.5/20", 5, 3, &made, &err), 0, "%s", err.message);
	static const char *const cards[] = {"lan", "wan"}, *const networks[] = {"bridge:br0/", "tap/"};
	for (size_t i = 0; i < 2; i++) {
		struct store_resource *one = find(&made, "ip", cards[i]);
		cr_expect(one->pool_from == 0x0a0300fa && one->pool_to == 0x0a030105 && one->pool_of_ip && one->exclusive);
		cr_expect_str_eq(one->host, networks[i]);
		free(one->host);
		one->host = xasprintf("%s10.3.1.%zu", networks[i], i);
	}
	cr_assert_eq(clone_rules_settle(&made.config, made.list, made.count, &err), 0, "%s", err.message);
	cr_expect_str_eq(find(&made, "ip", "wan")->guest, "10.3.1.1/20");
	CLEANUP_BUF struct buf buf = BUF_INIT;
	cr_assert_eq(config_to_text(&made.config, &buf, &err), 0);
	cr_assert_eq(buf_append(&buf, NULL, 1, &err), 0);
	cr_expect(strstr((char *)buf.data, "bridge = br0\n") && strstr((char *)buf.data, "ip = 10.3.1.0/20\n") && strstr((char *)buf.data, "ip = 10.3.1.1/20\n"), "%s", (char *)buf.data);
	end(&made);
	/* One for each card of each clone: 2 times 3. */
	cr_expect_eq(make(with_ip, "tap any set t<N>\nip any allocate 10.3.0.1-10.3.0.5/20", 5, 3, &made, &err), -EINVAL);
	cr_expect(strstr(err.message, ":2: the pool 10.3.0.1-10.3.0.5/20 has 5 numbers, 6 are needed"), "%s", err.message);
	end(&made);
	cr_expect_eq(make(with_ip, "tap any set t<N>\nip any set 10.3.0.<N>/20", 5, 3, &made, &err), -EINVAL);
	cr_expect(strstr(err.message, ":2: ") && strstr(err.message, "already that of [net lan]"), "two cards of one VM: %s", err.message);
	end(&made);
	cr_expect_eq(make(with_ip, "tap any set t<N>\nip:out any share", 1, 3, &made, &err), -EINVAL);
	cr_expect(strstr(err.message, ":2: the VM has no ip out"), "%s", err.message);
	end(&made);
}

Test(clone_rules, shared_ports)
{
	struct made made;
	struct err err;
	cr_assert_eq(make(web, "port:lan/tcp/80 any multiplex 8000:least\nport:lan/tcp/22 any multiplex 0.0.0.0:2<N>", 5, 3, &made, &err), 0, "%s", err.message);
	expect_host(&made, "mux", "lan/tcp/80", "tcp:127.0.0.1:8000:least");
	expect_host(&made, "mux", "lan/tcp/22", "tcp:0.0.0.0:25:round-robin");
	cr_expect_not(find(&made, "mux", "lan/tcp/80")->exclusive);
	struct store_resource *port = find(&made, "port", "lan/tcp/80");
	cr_expect(port->pool_from == 20000 && port->pool_to == 29999 && port->exclusive, "one of its own behind it");
	end(&made);
	/* The origin's own sharing goes on, and goes with its port. */
	static const char shared[] = "[vm]\nname = web\nmemory = 64M\nkernel = /k\n[net lan]\nmode = user\nforward = tcp:8080:80\nforward = tcp:8443:443\n"
				     "multiplex = tcp:80:80\nmultiplex = tcp:443:443:name\n";
	cr_assert_eq(make(shared, "port:lan/tcp/443 any multiplex 444", 1, 3, &made, &err), 0, "%s", err.message);
	expect_host(&made, "mux", "lan/tcp/80", "tcp:127.0.0.1:80:round-robin");
	expect_host(&made, "mux", "lan/tcp/443", "tcp:127.0.0.1:444:round-robin");
	end(&made);
	cr_assert_eq(make(shared, "port:lan/tcp/80 any drop", 1, 3, &made, &err), 0, "%s", err.message);
	cr_expect_eq(made.config.nets[0].shared_count, 1);
	expect_host(&made, "mux", "lan/tcp/443", "tcp:127.0.0.1:443:name");
	end(&made);
}

Test(clone_rules, tap_devices)
{
	struct made made;
	struct err err;
	cr_expect_eq(make(with_tap, "", 1, 1, &made, &err), -EINVAL);
	cr_expect(err.class == ERR_USAGE && strstr(err.message, "tap wan") && strstr(err.message, "vmtap0") &&
			  strstr(err.hint, "tap:wan"),
		  "%s", err.message);
	end(&made);
	cr_assert_eq(make(with_tap, "tap any set vmtap<N>", 4, 2, &made, &err), 0, "%s", err.message);
	expect_host(&made, "tap", "wan", "vmtap4");
	cr_expect_str_eq(made.config.nets[0].tap, "vmtap4");
	end(&made);
	cr_assert_eq(make(with_tap, "tap any allocate vmtap:3-9", 1, 2, &made, &err), 0, "%s", err.message);
	struct store_resource *tap = find(&made, "tap", "wan");
	cr_expect(tap->pool_from == 3 && tap->pool_to == 9 && tap->exclusive);
	cr_expect_str_eq(tap->host, "vmtap");
	free(tap->host);
	tap->host = xstrdup("vmtap8");
	cr_assert_eq(clone_rules_settle(&made.config, made.list, made.count, &err), 0);
	cr_expect_str_eq(made.config.nets[0].tap, "vmtap8");
	end(&made);
}

Test(clone_rules, bad_ones_are_refused_with_line_and_reason)
{
	static const struct {
		const char *text, *where, *what;
	} bad[] = {
		{"prot any drop", ":1:", "no type"},
		{"uuid any share", ":1:", "no type"},
		{"\n\nport", ":3:", "missing"},
		{"port any", ":1:", "missing"},
		{"port: any drop", ":1:", "missing"},
		{"port all drop", ":1:", "no access"},
		{"port any loop", ":1:", "no action"},
		{"port any drop it", ":1:", "takes no value"},
		{"port any set 80 81", ":1:", "too many"},
		{"port any set", ":1:", "value is missing"},
		{"port any share", ":1:", "not possible"},
		{"port ro drop", ":1:", "not possible"},
		{"disk any copy", ":1:", "not possible"},
		{"disk rw share", ":1:", "not possible"},
		{"disk ro copy", ":1:", "not possible"},
		{"tap rw share", ":1:", "not possible"},
		{"memory any share", ":1:", "not possible"},
		{"disk rw copy here/<N>", ":1:", "no absolute path"},
		{"port any allocate 0-5", ":1:", "no pool"},
		{"port any allocate 9-5", ":1:", "no pool"},
		{"port any allocate 5-65536", ":1:", "no pool"},
		{"port any allocate x", ":1:", "no pool"},
		{"port any allocate <N>-9", ":1:", "no pool"},
		{"tap any allocate 5-6", ":1:", "no pool"},
		{"mac any set <MAC>", ":1:", "no variable"},
		{"mac any set <mac", ":1:", "no variable"},
		{"mac any share\nport any drop\nmac rw new", ":3:", "contradicts line 1"},
		{"port:lan any drop\nport:lan any drop", ":2:", "contradicts line 1"},
		{"port:wan any drop", ":1:", "has no port wan"},
		{"port:lan/tcp/81 any drop", ":1:", "has no port lan/tcp/81"},
		{"port:la any drop", ":1:", "has no port la"},
		{"disk:data rw copy", ":1:", "has no disk data"},
		{"port any set 8080", ":1:", "all 3 clones"},
		{"disk:root rw copy /x.qcow2", ":1:", "all 3 clones"},
		{"port any allocate 20000-20010", ":1:", "11 numbers, 12 are needed"},
		{"port:lan any set 800000<N>", ":1:", "no port"},
		{"mac:lan any set 53:<N>", ":1:", "no MAC"},
		{"bridge any set a/<N>", ":1:", "no interface"},
		{"hostname any set", ":1:", "value is missing"},
		{"hostname any drop", ":1:", "not possible"},
		{"hostname any set same", ":1:", "all 3 clones"},
		{"hostname any set a_<N>", ":1:", "no host name"},
		{"hostname any allocate web", ":1:", "no pool"},
		{"hostname any allocate web:1-2", ":1:", "2 numbers, 3 are needed"},
		{"hostname:x any share", ":1:", "has no hostname x"},
		{"ip any set", ":1:", "value is missing"},
		{"ip any drop", ":1:", "not possible"},
		{"ip ro share", ":1:", "not possible"},
		{"ip any share 10.0.0.1/8", ":1:", "takes no value"},
		{"ip:lan any share", ":1:", "has no ip lan"},
		{"ip any share\nip rw set 10.0.0.<N>/24", ":2:", "contradicts line 1"},
		{"ip:br any set 10.0.0.1/24", ":1:", "all 3 clones"},
		{"ip:br any set 10.0.0.<N>", ":1:", "no address of a network card"},
		{"ip:br any set 10.0.<VM>.5/24", ":1:", "no address of a network card"},
		{"ip:br any allocate 10.0.0.1/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1-9/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1-10.0.0.9", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.9-10.0.0.1/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.9-10.0.1.9/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.0-10.0.0.9/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1-10.0.0.255/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1/24-10.0.0.9/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.<N>-10.0.0.9/24", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1-10.240.0.1/8", ":1:", "no pool"},
		{"ip:br any allocate lan:10-20", ":1:", "no pool"},
		{"ip:br any allocate 10.0.0.1-10.0.0.2/24", ":1:", "2 numbers, 3 are needed"},
		{"port:lan/tcp/80 any multiplex", ":1:", "value is missing"},
		{"port:lan/tcp/80 any multiplex x", ":1:", "no port to share"},
		{"port:lan/tcp/80 any multiplex 80:most", ":1:", "no port to share"},
		{"port:lan/tcp/80 any multiplex 70000", ":1:", "no port to share"},
		{"port:lan/udp/53 any multiplex 80", ":1:", "only ports of TCP"},
		{"port:lan2 any multiplex 80\nport:lan any multiplex 80", ":2:", "only ports of TCP"},
		{"port:lan/tcp any multiplex 80", ":1:", "cannot be one port"},
		{"mac any multiplex 80", ":1:", "not possible"},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		struct made made;
		struct err err;
		cr_expect_eq(make(web, bad[i].text, 1, 3, &made, &err), -EINVAL, "%s", bad[i].text);
		cr_expect(err.class == ERR_USAGE && strstr(err.message, "my.rules") &&
				  strstr(err.message, bad[i].where) && strstr(err.message, bad[i].what),
			  "%s: %s", bad[i].text, err.message);
		end(&made);
	}
	struct made made;
	struct err err;
	cr_expect_eq(make(with_tap, "hostname any share\ntap any set vmtap<N>", 1, 3, &made, &err), -EINVAL);
	cr_expect(strstr(err.message, ":1:") && strstr(err.message, "vsock_cid"), "%s", err.message);
	end(&made);
	cr_expect_eq(make(with_tap, "tap any set vmtap<N>\nip any set 10.0.0.<N>/24", 1, 3, &made, &err), -EINVAL);
	cr_expect(strstr(err.message, ":2:") && strstr(err.message, "its address: it has no vsock_cid"), "%s", err.message);
	end(&made);
	cr_expect_eq(make(web, "port any allocate 20000-20011", 1, 3, &made, &err), 0, "just enough: %s", err.message);
	end(&made);
}

/* --- of a group --- */

static void apply(const char *config, const char *text, const struct clone_variables *variables, struct made *made)
{
	struct clone_rules *rules;
	struct err err = ERR_INIT;

	*made = (struct made){0};
	read_config(config, &made->config);
	cr_assert_eq(clone_rules_read("my.rules", text, &rules, &err), 0, "%s", err.message);
	cr_assert_eq(clone_rules_apply(rules, &made->config, variables, &made->list, &made->count, &err), 0, "%s", err.message);
	cr_assert_eq(clone_rules_settle(&made->config, made->list, made->count, &err), 0, "%s", err.message);
	clone_rules_free(rules);
}

Test(clone_rules, a_group_keeps_addresses_in_a_network_of_its_own)
{
	static const char config[] = "[vm]\nname = web\nmemory = 64M\nkernel = /k\n[net lan]\nmode = group\nnetwork = backend@00000000\nmac = 52:54:00:00:00:01\nip = 10.0.0.5/24\n"
				     "[net out]\nmode = user\nmac = 52:54:00:00:00:02\nforward = tcp:8080:80\n";
	struct clone_variables variables = {.vm = "web-1", .uuid = "12345678-1234-4234-8234-123456789abc", .store = "/store", .number = 1};
	struct made made;

	apply(config, "port any set 9000\n", &variables, &made);
	cr_expect_str_eq(made.config.nets[0].network, "backend@00000000", "one that is cloned alone stays where it was");
	cr_expect_eq(made.config.nets[0].mac[1], 0x56, "with an address of its own");
	end(&made);
	variables.same_addresses = true;
	variables.network = "89abcdef";
	apply(config, "port any set 9000\nmac:out any new\n", &variables, &made);
	cr_expect_str_eq(made.config.nets[0].network, "backend@89abcdef");
	cr_expect_eq(made.config.nets[0].mac[5], 1);
	cr_expect(made.config.nets[1].mac[0] == 0x52 && made.config.nets[1].mac[1] == 0x56, "a rule says more");
	cr_expect_eq(made.config.nets[1].forwards[0].host_port, 9000);
	cr_expect_str_eq(find(&made, "network", "lan")->host, "group:backend@89abcdef");
	expect_host(&made, "ip", "lan", "group:backend@89abcdef/10.0.0.5");
	end(&made);
}
