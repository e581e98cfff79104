/* The guest's agent: what hosts may say and may not, and what becomes of a folder that stands for a machine. */
#include "guest/agent.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/file.h"

#define ONE   "11111111-2222-4333-8444-555555555555"
#define TWO   "99999999-2222-4333-8444-555555555555"
#define LIFE  "00112233445566778899aabbccddeeff"
#define OTHER "ff112233445566778899aabbccddeeff"
#define CARD  " 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24\n"

/* --- what a host says --- */

/* -EPROTO, or how many lines it took. */
static int take(const char *text, struct agent_identity *identity, struct err *err)
{
	CLEANUP_FREE char *copy = xstrdup(text);
	char *rest = copy, *line;
	int lines = 0;
	*identity = (struct agent_identity){0};
	while ((line = strsep(&rest, "\n")) != NULL && (*line || rest)) {
		int rc = agent_take_line(identity, line, err);
		if (rc < 0)
			return rc;
		lines++;
		if (rc)
			return lines;
	}
	return 0;
}

Test(agent, takes_an_identity)
{
	struct agent_identity identity;
	struct err err = ERR_INIT;
	const char text[] = "vmcp 1\nuuid " ONE "\ngeneration " LIFE "\nname web.1_x\nhostname web-1\nfuture of some kind\ntime 1767225600.123456789\n"
			    "card 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24\ncard 0000:00:1f.0 52:56:00:00:00:02 192.168.100.200/8\nseed 000102030405060708090a0b0c0d0eff\nend\nmore";
	cr_assert_eq(take(text, &identity, &err), 11, "%s", err.message);
	cr_expect_str_eq(identity.uuid, ONE);
	cr_expect_str_eq(identity.generation, LIFE);
	cr_expect_str_eq(identity.name, "web.1_x");
	cr_expect_str_eq(identity.hostname, "web-1");
	cr_expect(identity.has_time && identity.time.tv_sec == 1767225600 && identity.time.tv_nsec == 123456789);
	cr_assert_eq(identity.card_count, 2);
	const struct agent_card *card = &identity.cards[1];
	cr_expect(!strcmp(card->pci, "0000:00:1f.0") && !strcmp(card->mac, "52:56:00:00:00:02") && !strcmp(card->address, "192.168.100.200") && card->length == 8);
	cr_expect(identity.seed_bytes == 16 && identity.seed[1] == 1 && identity.seed[15] == 0xff);
	cr_expect_eq(take("vmcp 1\nuuid " ONE "\n", &identity, &err), 0, "not whole");
}

Test(agent, refuses_what_no_host_says)
{
	static const char *const bad[] = {
		"uuid " ONE,
		"vmcp 2",
		"vmcp",
		"end",
		"vmcp 1\nend",
		"vmcp 1\nuuid " ONE "\nend",
		"vmcp 1\nname x\nend",
		"vmcp 1\nuuid 1",
		"vmcp 1\nuuid " ONE "0",
		"vmcp 1\nuuid 1111111G-2222-4333-8444-555555555555",
		"vmcp 1\nuuid ../../../../../../etc/passwd/x/xxxxx",
		"vmcp 1\nname",
		"vmcp 1\nname -x",
		"vmcp 1\nname a b",
		"vmcp 1\nname a/b",
		"vmcp 1\nname 0123456789012345678901234567890123456789012345678901234567890123",
		"vmcp 1\nhostname a.b",
		"vmcp 1\nhostname a_b",
		"vmcp 1\nhostname a-",
		"vmcp 1\nhostname ",
		"vmcp 1\nhostname $(reboot)",
		"vmcp 1\ncard",
		"vmcp 1\ncard 0000:00:04.0",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.5",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/0",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/33",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24 x",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.0.500/24",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00:01 10.0.5/24",
		"vmcp 1\ncard 0000:00:04.0 52:56:00:00:00 10.0.0.5/24",
		"vmcp 1\ncard 0000:00:04.052:56:00:00:00:01 10.0.0.5/24",
		"vmcp 1\ncard ../../../etc 52:56:00:00:00:01 10.0.0.5/24",
		"vmcp 1\ngeneration xyz",
		"vmcp 1\ngeneration " LIFE "0",
		"vmcp 1\ntime 5",
		"vmcp 1\ntime .123456789",
		"vmcp 1\ntime 1.12345678",
		"vmcp 1\ntime -1.123456789",
		"vmcp 1\ntime 1234567890123.123456789",
		"vmcp 1\nseed 0102",
		"vmcp 1\nseed 000102030405060708090a0b0c0d0ef",
		"vmcp 1\nseed 000102030405060708090a0b0c0d0e0G",
	};
	struct agent_identity identity;
	for (size_t i = 0; i < ARRAY_LENGTH(bad); i++) {
		struct err err = ERR_INIT;
		cr_expect_eq(take(bad[i], &identity, &err), -EPROTO, "%s", bad[i]);
		cr_expect(err.message[0] != '\0');
	}
	/* Bounds. */
	char line[2 * AGENT_LINE_BYTES];
	struct err err = ERR_INIT;
	memset(line, 'x', sizeof(line) - 1);
	line[sizeof(line) - 1] = '\0';
	identity = (struct agent_identity){.greeted = true};
	cr_expect_eq(agent_take_line(&identity, line, &err), -EPROTO);
	identity = (struct agent_identity){.greeted = true};
	for (unsigned i = 0; i < AGENT_MAX_CARDS; i++)
		cr_assert_eq(agent_take_line(&identity, "card 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24", &err), 0);
	cr_expect_eq(agent_take_line(&identity, "card 0000:00:04.0 52:56:00:00:00:01 10.0.0.5/24", &err), -EPROTO);
	identity = (struct agent_identity){.greeted = true};
	for (unsigned i = 0; i < AGENT_MAX_LINES; i++)
		cr_assert_eq(agent_take_line(&identity, "noise", &err), 0);
	cr_expect_eq(agent_take_line(&identity, "noise", &err), -EPROTO);
}

Test(agent, renames_in_hosts)
{
	static const struct {
		const char *text, *want;
	} cases[] = {
		{"127.0.0.1\tlocalhost old\n", "127.0.0.1\tlocalhost new-name\n"},
		{"old old.example.org older #old\nold\told", "old new-name.example.org older #old\nold\tnew-name"},
		{"  1.2.3.4 old# old\n# old\n1.2.3.4 x-old old.", "  1.2.3.4 new-name# old\n# old\n1.2.3.4 x-old new-name."},
		{"", ""},
		{"\n\n \n", "\n\n \n"},
	};
	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		CLEANUP_FREE char *got = agent_rename_in_hosts(cases[i].text, "old", "new-name");
		cr_expect_str_eq(got, cases[i].want);
	}
	CLEANUP_FREE char *same = agent_rename_in_hosts("1.2.3.4 x\n", "", "y");
	cr_expect_str_eq(same, "1.2.3.4 x\n");
}

/* --- a machine --- */

static char root[64];

static void put(const char *path, const char *text, mode_t mode)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", root, path);
	FILE *file = fopen(full, "w");
	cr_assert_not_null(file, "%s", full);
	fputs(text, file);
	fclose(file);
	chmod(full, mode);
}
static void expect_file(const char *path, const char *want)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", root, path);
	CLEANUP_BUF struct buf text = BUF_INIT;
	struct err err = ERR_INIT;
	cr_assert_eq(file_read_all(AT_FDCWD, full, 1 << 20, &text, &err), 0, "%s", err.message);
	cr_expect_str_eq(text.data ? (char *)text.data : "", want, "%s: '%s', not '%s'", path, (char *)text.data, want);
}
static bool is_there(const char *path)
{
	CLEANUP_FREE char *full = xasprintf("%s%s", root, path);
	return access(full, F_OK) == 0;
}

static void make_machine(void)
{
	static const char *const folders[] = {"/etc", "/etc/ssh", "/etc/vmcp", "/etc/vmcp/hooks.d", "/dev", "/var", "/var/lib", "/var/lib/dbus", "/bin"};
	snprintf(root, sizeof(root), "/tmp/vmcp-agent-test-XXXXXX");
	cr_assert_not_null(mkdtemp(root));
	for (size_t i = 0; i < ARRAY_LENGTH(folders); i++) {
		CLEANUP_FREE char *full = xasprintf("%s%s", root, folders[i]);
		cr_assert_eq(mkdir(full, 0755), 0);
	}
	put("/etc/machine-id", "", 0444);
	put("/var/lib/dbus/machine-id", "old\n", 0444);
	put("/etc/hostname", "debian\n", 0644);
	put("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n", 0644);
	put("/etc/ssh/ssh_host_ed25519_key", "old\n", 0600);
	put("/etc/ssh/ssh_host_rsa_key", "old\n", 0600);
	put("/dev/urandom", "", 0644);
	put("/bin/ssh-keygen", "#!/bin/sh\n[ ! -e ${0%/*}/fail ] || exit 3\nwhile [ $# -gt 0 ]; do [ \"$1\" = -f ] && f=$2; [ \"$1\" = -C ] && c=$2; shift; done\n"
			       "umask 077; echo new >$f; echo \"public $c\" >$f.pub\n", 0755);
	put("/etc/vmcp/hooks.d/10-note", "#!/bin/sh\necho \"$1 $VMCP_EVENT $VMCP_NAME $VMCP_HOSTNAME $VMCP_UUID $VMCP_OLD_UUID $VMCP_GENERATION $VMCP_CARDS\" >>${0%/*}/../noted\n", 0755);
	put("/etc/vmcp/hooks.d/20-off", "#!/bin/sh\nexit 9\n", 0644);
	put("/etc/vmcp/hooks.d/30.bak", "#!/bin/sh\nexit 9\n", 0755);
	CLEANUP_FREE char *path = xasprintf("%s/bin:%s", root, getenv("PATH"));
	setenv("PATH", path, 1);
}
static void remove_machine(void)
{
	file_remove_tree(AT_FDCWD, root, NULL);
}

static enum agent_event apply(struct agent *agent, const char *uuid, const char *generation, int want, struct err *err)
{
	struct agent_identity identity = {.name = "web-1", .hostname = "web-1", .seed = {1, 2, 3}, .seed_bytes = 16, .has_time = true,
					  .cards = {{"0000:00:04.0", "52:56:00:00:00:01", "10.0.0.5", 24}}, .card_count = 1};
	enum agent_event event = AGENT_SAME;
	snprintf(identity.uuid, sizeof(identity.uuid), "%s", uuid);
	snprintf(identity.generation, sizeof(identity.generation), "%s", generation);
	*err = ERR_INIT;
	int rc = agent_apply(agent, &identity, &event, err);
	cr_expect_eq(rc, want, "%d: %s", rc, err->message);
	return event;
}

Test(agent, makes_a_clone_another_machine, .init = make_machine, .fini = remove_machine)
{
	struct agent agent = {.root = root, .hook_seconds = 20};
	struct err err;
	cr_expect_eq(apply(&agent, ONE, LIFE, 0, &err), AGENT_FIRST);
	expect_file("/etc/hostname", "debian\n");
	expect_file("/etc/ssh/ssh_host_rsa_key", "old\n");
	cr_expect_eq(apply(&agent, ONE, LIFE, 0, &err), AGENT_SAME);
	cr_expect_eq(apply(&agent, ONE, OTHER, 0, &err), AGENT_LIFE);
	expect_file("/etc/machine-id", "");
	cr_expect_eq(apply(&agent, TWO, LIFE, 0, &err), AGENT_CLONE);
	expect_file("/etc/hostname", "web-1\n");
	expect_file("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 web-1\n");
	expect_file("/etc/machine-id", "99999999222243338444555555555555\n");
	expect_file("/var/lib/dbus/machine-id", "99999999222243338444555555555555\n");
	expect_file("/etc/ssh/ssh_host_rsa_key", "new\n");
	expect_file("/etc/ssh/ssh_host_ed25519_key", "new\n");
	expect_file("/etc/ssh/ssh_host_rsa_key.pub", "public root@web-1\n");
	cr_expect_not(is_there("/etc/ssh/ssh_host_ecdsa_key"), "it had none");
	cr_expect_not(is_there("/etc/ssh/ssh_host_rsa_key.vmcp-new"));
	expect_file("/dev/urandom", "\1\2\3");
	expect_file("/etc/vmcp/noted", "first first web-1 web-1 " ONE "  " LIFE CARD "life life web-1 web-1 " ONE " " ONE " " OTHER CARD "clone clone web-1 web-1 " TWO " " ONE " " LIFE CARD);
	/* An agent that begins anew in a machine that is as it was. */
	struct agent fresh = {.root = root, .hook_seconds = 20};
	cr_expect_eq(apply(&fresh, TWO, LIFE, 0, &err), AGENT_LIFE);
}

Test(agent, what_fails_is_told_and_the_rest_is_done, .init = make_machine, .fini = remove_machine, .timeout = 60)
{
	struct agent agent = {.root = root, .hook_seconds = 1};
	struct err err;
	apply(&agent, ONE, LIFE, 0, &err);
	put("/bin/fail", "", 0644);
	put("/etc/vmcp/hooks.d/05-slow", "#!/bin/sh\nsleep 600 & wait\n", 0755);
	cr_expect_eq(apply(&agent, TWO, LIFE, -EIO, &err), AGENT_CLONE);
	cr_expect(strstr(err.message, "/etc/ssh/ssh_host_ed25519_key is the origin's") && strstr(err.message, "exit status 3"), "%s", err.message);
	expect_file("/etc/ssh/ssh_host_rsa_key", "old\n");
	expect_file("/etc/hostname", "web-1\n");
	expect_file("/var/lib/vmcp-agent/uuid", TWO "\n");
	CLEANUP_FREE char *fail = xasprintf("%s/bin/fail", root);
	unlink(fail);
	cr_expect_eq(apply(&agent, ONE, OTHER, -ETIMEDOUT, &err), AGENT_CLONE);
	cr_expect(strstr(err.message, "05-slow: killed after 1 s"), "%s", err.message);
	expect_file("/etc/ssh/ssh_host_rsa_key", "new\n");
}

/* --- addresses of cards, in a network namespace of the test's own --- */

static bool run(const char *command) { return system(command) == 0; }

/* A tap device is a card whose frames we see. */
static int make_card(void)
{
	struct ifreq r = {.ifr_name = "probe", .ifr_flags = IFF_TAP | IFF_NO_PI};
	int fd = unshare(CLONE_NEWNET) ? -1 : open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0 || ioctl(fd, TUNSETIFF, &r) < 0) {
		fprintf(stderr, "SKIP: no network namespace of its own, or no tap devices: %s\n", strerror(errno));
		return -1;
	}
	return fd;
}

/* A gratuitous ARP: both addresses in it are the sender's (RFC 5227, 3). */
static bool is_announced(int fd, const uint8_t mac[6], uint32_t address)
{
	const struct timespec moment = {.tv_nsec = 5000000};
	uint8_t frame[2000];

	for (int i = 0; i < 1000; i++) {
		ssize_t n = read(fd, frame, sizeof(frame));

		if (n >= 42 && get_be16(frame + 12) == 0x0806 && !memcmp(frame + 22, mac, 6) && get_be32(frame + 28) == address && get_be32(frame + 38) == address)
			return true;
		if (n < 0)
			nanosleep(&moment, NULL);
	}
	return false;
}

Test(agent, gives_a_card_its_addresses, .timeout = 60)
{
	const uint8_t mac[6] = {0x52, 0x56, 0, 0, 0, 1};
	struct err err = ERR_INIT;
	int fd = make_card();
	if (fd < 0)
		return;
	cr_assert_eq(agent_set_card("probe", "52:56:00:00:00:01", "10.0.0.5", 24, &err), 0, "%s", err.message);
	cr_expect(run("ip -4 addr show dev probe up | grep -q '10.0.0.5/24 brd 10.0.0.255 '") && run("ip link show dev probe | grep -q 52:56:00:00:00:01"));
	cr_expect(is_announced(fd, mac, 0x0a000005));
	cr_assert(run("ip route add default via 10.0.0.1 metric 7 && ip route add 10.9.0.0/16 via 10.0.0.2 dev probe && ip addr add 10.0.0.77/24 dev probe && ip addr add 172.16.0.9/24 dev probe"));
	cr_expect_eq(agent_set_card("probe", "52:56:00:00:00:01", "10.0.0.5", 24, &err), 0);
	cr_expect(run("ip -4 addr show dev probe | grep -q 10.0.0.77"), "nothing was to be done");
	cr_assert_eq(agent_set_card("probe", "52:56:00:00:00:01", "10.0.0.6", 16, &err), 0, "%s", err.message);
	cr_expect(run("ip -4 addr show dev probe | grep -q '10.0.0.6/16 brd 10.0.255.255 ' && test $(ip -o -4 addr show dev probe | wc -l) = 1"));
	cr_expect(run("ip route | grep -q '^default via 10.0.0.1 dev probe .*metric 7' && ip route | grep -q '^10.9.0.0/16 via 10.0.0.2'"), "routes");
	cr_expect(is_announced(fd, mac, 0x0a000006));
	/* A route that leads nowhere now; the address is there all the same. */
	cr_expect_eq(agent_set_card("probe", "52:56:00:00:00:01", "10.200.0.6", 24, &err), -ENETUNREACH);
	cr_expect(strstr(err.message, "probe: the route by 10.0.0."), "%s", err.message);
	cr_expect(run("ip -4 addr show dev probe | grep -q 10.200.0.6/24"));
	cr_expect_eq(agent_set_card("nothing", "52:56:00:00:00:01", "10.0.0.5", 24, &err), -ENODEV);
	close(fd);
}
