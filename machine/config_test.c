#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "machine/config.h"

static char work[] = "/tmp/vmcp-config-test-XXXXXX";
static char config_path[64];

static void put(const char *name, const char *text, size_t length)
{
	char path[128];
	snprintf(path, sizeof(path), "%s/%s", work, name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	cr_assert_geq(fd, 0, "%s", path);
	cr_assert_eq(write(fd, text, length), (ssize_t)length);
	close(fd);
}

static void make_work(void)
{
	cr_assert_not_null(mkdtemp(work));
	snprintf(config_path, sizeof(config_path), "%s/guest.cfg", work);
	put("vmlinuz", "k", 1);
	put("initrd", "i", 1);
	put("a.qcow2", "a", 1);
	put("b.qcow2", "b", 1);
	char folder[64];
	snprintf(folder, sizeof(folder), "%s/folder", work);
	cr_assert_eq(mkdir(folder, 0700), 0);
}

static void remove_work(void) { cr_assert_eq(file_remove_tree(AT_FDCWD, work, NULL), 0); }

TestSuite(config, .init = make_work, .fini = remove_work);

static int read_bytes(const char *text, size_t length, struct machine_config *out, struct err *err)
{
	put("guest.cfg", text, length);
	return config_read_file(config_path, out, err);
}

static int read_config(const char *text, struct machine_config *out, struct err *err)
{
	return read_bytes(text, strlen(text), out, err);
}

#define VM "[vm]\nkernel = vmlinuz\n"

/* --- what is right --- */

static void accept(const char *text)
{
	struct machine_config config;
	struct err err = ERR_INIT;

	cr_assert_eq(read_config(text, &config, &err), 0, "%s\n%s", err.message, text);
	cr_assert_eq(err.number, 0);
	config_free(&config);
}

Test(config, every_key)
{
	struct machine_config config;
	struct err err = ERR_INIT;
	char path[128];

	cr_assert_eq(read_config("# a comment\n"
				 "; another\n"
				 "[vm]\n"
				 "name = web-1\n"
				 "memory = 1G\n"
				 "cpus = 4            # inline\n"
				 "\tkernel\t=\tvmlinuz\t# tabs\n"
				 "initrd = initrd\n"
				 "cmdline = console=ttyS0 root=/dev/vda x#y=1 rw # the end\n"
				 "cpu_model = host\n"
				 "memory_backing = thp\n"
				 "console = socket\n"
				 "rng = yes\n"
				 "balloon = yes\n"
				 "\n"
				 "[disk root]\n"
				 "path = a.qcow2\n"
				 "[disk shared]\n"
				 "base = b.qcow2\n"
				 "[disk other]\n"
				 "base = ./folder/../b.qcow2\n"
				 "[net lan]\n"
				 "mode = none\n"
				 "mac = 52:54:00:12:34:56\n"
				 "forward = tcp:8080:80\n"
				 "forward = udp:65535:1\n"
				 "tap = vmtap0\n"
				 "bridge = br0\n"
				 "[checkpoint]\n"
				 "every = 0\n"
				 "keep = 20\n"
				 "keep_hourly = 24\n"
				 "keep_daily = 0\n",
				 &config, &err),
		     0, "%s", err.message);
	cr_assert_str_eq(config.name, "web-1");
	cr_assert_str_eq(config.source, config_path);
	cr_assert_eq(config.memory_bytes, 1ull << 30);
	cr_assert_eq(config.cpus, 4);
	snprintf(path, sizeof(path), "%s/vmlinuz", work);
	cr_assert_str_eq(config.kernel, path);
	snprintf(path, sizeof(path), "%s/initrd", work);
	cr_assert_str_eq(config.initrd, path);
	cr_assert_str_eq(config.cmdline, "console=ttyS0 root=/dev/vda x#y=1 rw");
	cr_assert_eq(config.console, CONFIG_CONSOLE_SOCKET);
	cr_assert(config.rng);
	cr_assert(config.balloon);
	cr_assert_eq(config.memory_backing, MEM_BACKING_THP);
	cr_assert_eq(config.keep_hourly, 24);
	cr_assert_eq(config.keep_daily, 0);
	cr_assert_eq(config.disk_count, 3);
	cr_assert_str_eq(config.disks[0].name, "root");
	snprintf(path, sizeof(path), "%s/a.qcow2", work);
	cr_assert_str_eq(config.disks[0].path, path);
	cr_assert_null(config.disks[0].base);
	snprintf(path, sizeof(path), "%s/b.qcow2", work);
	cr_assert_str_eq(config.disks[1].base, path);
	cr_assert_null(config.disks[1].path);
	cr_assert_str_eq(config.disks[2].base, path);
	config_free(&config);
	cr_assert_eq(config.disk_count, 0);
	config_free(&config);
}

Test(config, defaults)
{
	struct machine_config config;
	struct err err = ERR_INIT;

	cr_assert_eq(read_config(VM, &config, &err), 0, "%s", err.message);
	cr_assert_str_eq(config.name, "guest", "the file's name without its ending");
	cr_assert_eq(config.memory_bytes, 512ull << 20);
	cr_assert_eq(config.cpus, 1);
	cr_assert_null(config.initrd);
	cr_assert_str_eq(config.cmdline, "");
	cr_assert_str_eq(config.cpu_model, "host");
	cr_assert_eq(config.console, CONFIG_CONSOLE_STDIO);
	cr_assert(!config.rng);
	cr_assert(!config.balloon);
	cr_assert_eq(config.disk_count, 0);
	config_free(&config);
}

Test(config, forms_that_work)
{
	accept("\xef\xbb\xbf" VM);
	accept("[vm]\r\nkernel = vmlinuz\r\nmemory = 256M\r\n\r\n# x\r\n[disk root]\r\npath = a.qcow2\r\n");
	accept("[vm]\nkernel = vmlinuz");
	accept("  [ vm ]  # comment\n   kernel=vmlinuz\n");
	accept(VM "[disk   root]\npath = a.qcow2\n");
	accept(VM "[disk\troot]\npath = a.qcow2\n");
	accept(VM "cmdline =\n");
	accept(VM "cmdline = # nothing\n");
	accept(VM "cmdline = \xc3\xa4\n");
	accept(VM "memory = 16M\n");
	accept(VM "memory = 1T\n");
	accept(VM "memory = 536870912\n");
	accept(VM "memory = 524288k\n");
	accept(VM "cpus = 64\n");
	accept(VM "[checkpoint]\n");
	accept(VM "[disk a]\npath = a.qcow2\nreadonly = yes\n[disk b]\npath = a.qcow2\nreadonly = yes\n");
	accept(VM "[disk a]\npath = a.qcow2\nreadonly = yes\n[disk b]\nbase = a.qcow2\n");
	accept(VM "[disk x23456789012345678901234567890123456789012345678901234567890123]\npath = a.qcow2\n");
}

Test(config, long_lines_and_names)
{
	struct machine_config config;
	struct err err = ERR_INIT;
	CLEANUP_FREE char *text = malloc(70000);
	size_t used = (size_t)sprintf(text, VM "cmdline = ");

	/* Longer than any of inih's buffers. */
	memset(text + used, 'x', 50000);
	strcpy(text + used + 50000, "\ncpus = 0\n");
	cr_assert_eq(read_config(text, &config, &err), -EINVAL);
	cr_assert_not_null(strstr(err.message, "guest.cfg:4: cpus"), "%s", err.message);
	text[used + 50000] = '\0';
	cr_assert_eq(read_config(text, &config, NULL), 0);
	cr_assert_eq(strlen(config.cmdline), 50000);
	config_free(&config);
	/* A comment that is too long must not become a key where it is cut. */
	memset(text, '#', 65535);
	strcpy(text + 65535, "cpus = 9\n" VM);
	cr_assert_eq(read_config(text, &config, &err), -EINVAL);
	cr_assert_not_null(strstr(err.message, "guest.cfg:1: "), "%s", err.message);
	/* Names that agree in the 49 bytes that inih keeps of a section. */
	cr_assert_eq(read_config(VM "[disk a123456789012345678901234567890123456789012345678901]\npath = a.qcow2\n"
				    "[disk a123456789012345678901234567890123456789012345678902]\npath = b.qcow2\n",
				 &config, NULL),
		     0);
	cr_assert_eq(config.disk_count, 2);
	cr_assert_str_eq(config.disks[1].name, "a123456789012345678901234567890123456789012345678902");
	config_free(&config);
}

/* --- what is wrong --- */

struct wrong {
	const char *text;
	unsigned line;	  /* 0: the error is of the whole file */
	const char *says; /* in the message */
	const char *hint; /* in the hint */
};

static const struct wrong wrongs[] = {
	/* [vm] */
	{VM "name = \n", 3, "name: ", "letters"},
	{VM "name = a b\n", 3, "'a b'", "letters"},
	{VM "name = ../x\n", 3, "'../x'", "letters"},
	{VM "name = -x\n", 3, "'-x'", "letters"},
	{VM "name = x234567890123456789012345678901234567890123456789012345678901234\n", 3, "name: ", "at most 63"},
	{VM "memory = \n", 3, "memory: ", "512M"},
	{VM "memory = lots\n", 3, "'lots'", "512M"},
	{VM "memory = -1\n", 3, "'-1'", "512M"},
	{VM "memory = 512MB\n", 3, "'512MB'", "512M"},
	{VM "memory = 1.5G\n", 3, "'1.5G'", "512M"},
	{VM "memory = 0x1000000\n", 3, "memory: ", "512M"},
	{VM "memory = 99999999999999999999999\n", 3, "memory: ", "512M"},
	{VM "memory = 18446744073709551615K\n", 3, "memory: ", "512M"},
	{VM "memory = 17179869184G\n", 3, "memory: ", "512M"},
	{VM "memory = 0\n", 3, "not possible", "multiple of 2M from 16M to 1024G"},
	{VM "memory = 1M\n", 3, "not possible", "multiple of 2M"},
	{VM "memory = 2T\n", 3, "not possible", "multiple of 2M"},
	{VM "memory = 17M\n", 3, "not possible", "multiple of 2M"},
	{VM "memory = 16777217\n", 3, "not possible", "multiple of 2M"},
	{VM "cpus = \n", 3, "cpus: ", "from 1 to 64"},
	{VM "cpus = 0\n", 3, "'0'", "from 1 to 64"},
	{VM "cpus = 65\n", 3, "'65'", "from 1 to 64"},
	{VM "cpus = -1\n", 3, "'-1'", "from 1 to 64"},
	{VM "cpus = two\n", 3, "'two'", "from 1 to 64"},
	{VM "cpus = 18446744073709551617\n", 3, "cpus: ", "from 1 to 64"},
	{"[vm]\nkernel = nothing-there\n", 2, "nothing-there: No such file", "relative to the folder"},
	{"[vm]\nkernel = folder\n", 2, "is not a file", "regular file"},
	{"[vm]\nkernel = /dev/null\n", 2, "is not a file", "regular file"},
	{"[vm]\nkernel = vmlinuz/x\n", 2, "Not a directory", "relative"},
	{"[vm]\nkernel =\n", 2, "empty", "kernel = FILE"},
	{VM "initrd = gone\n", 3, "gone: No such file", "relative"},
	{VM "cpu_model = x86-64-v9\n", 3, "'x86-64-v9' is none", "x86-64-v2"},
	{VM "cpu_model = \n", 3, "is none", "host"},
	{VM "memory_backing = hugetlb\nballoon = yes\n", 4, "reserved", "thp or small"},
	{VM "memory_backing = big\n", 3, "'big'", "small, thp or hugetlb"},
	{VM "console = vga\n", 3, "'vga'", "stdio or socket"},
	{VM "rng = true\n", 3, "'true'", "rng = yes or rng = no"},
	{VM "balloon = 1\n", 3, "'1'", "balloon = yes or"},
	{VM "vsock_cid = 2\n", 3, "'2'", "from 3 to"},
	{VM "vsock_cid = 4294967295\n", 3, "vsock_cid: ", "from 3 to"},
	{VM "hostname = a_b\n", 3, "'a_b'", "letters"},
	{VM "hostname = a.b\n", 3, "'a.b'", "letters"},
	{VM "hostname = -a\n", 3, "'-a'", "letters"},
	{VM "hostname = 0123456789012345678901234567890123456789012345678901234567890123\n", 3, "no host name", "63"},
	{VM "\n\n\nmemroy = 1G\n", 6, "memroy: unknown key", "'memory'"},
	{VM "mem = 1G\n", 3, "mem: unknown key", "'memory'"},
	{VM "cpu = 1\n", 3, "cpu: unknown key", "'cpus'"},
	{VM "Kernel = vmlinuz\n", 3, "Kernel: unknown key", "'kernel'"},
	{VM "colour = red\n", 3, "colour: unknown key", "known here: name, memory, cpus"},
	{VM "path = a.qcow2\n", 3, "path: unknown key", "known here"},
	{VM "kernel = vmlinuz\n", 3, "kernel: is given twice in [vm]", "keep one"},
	{VM "cpus = 1\ncpus = 1\n", 4, "given twice", "keep one"},
	/* [disk] */
	{VM "[disk root]\n", 3, "[disk root] names no image", "path = FILE"},
	{VM "[disk root]\nreadonly = yes\n", 3, "names no image", "path = FILE"},
	{VM "[disk root]\npath = gone.qcow2\n", 4, "gone.qcow2: No such file", "relative"},
	{VM "[disk root]\npath = folder\n", 4, "is not a file", "regular file"},
	{VM "[disk root]\npath = \n", 4, "empty", "path = FILE"},
	{VM "[disk root]\nbase = gone.qcow2\n", 4, "gone.qcow2: No such file", "relative"},
	{VM "[disk root]\npath = a.qcow2\nbase = b.qcow2\n", 3, "both path and base", "name one"},
	{VM "[disk root]\nbase = b.qcow2\nreadonly = yes\n", 3, "excludes", "path = FILE and readonly"},
	{VM "[disk root]\npath = a.qcow2\nreadonly = maybe\n", 5, "'maybe'", "readonly = yes"},
	{VM "[disk root]\npath = a.qcow2\ndetect_zeroes = 1\n", 5, "'1'", "detect_zeroes = yes"},
	{VM "[disk root]\npath = a.qcow2\nsize = 1G\n", 5, "size: unknown key", "known here: path, base, readonly, detect_zeroes"},
	{VM "[disk root]\npaht = a.qcow2\n", 4, "paht: unknown key", "'path'"},
	{VM "[disk root]\npath = a.qcow2\npath = b.qcow2\n", 5, "given twice in [disk root]", "keep one"},
	{VM "[disk a]\npath = a.qcow2\n[disk a]\npath = b.qcow2\n", 5, "[disk a] is given twice, first in line 3",
	 "one section"},
	{VM "[disk a]\npath = a.qcow2\n[disk b]\npath = a.qcow2\n", 5, "already [disk a]", "share"},
	{VM "[disk a]\npath = a.qcow2\n[disk b]\npath = folder/../a.qcow2\n", 5, "already [disk a]", "share"},
	{VM "[disk a]\npath = a.qcow2\n[disk b]\npath = link.qcow2\n", 5, "already [disk a]", "share"},
	{VM "[disk a]\npath = a.qcow2\n[disk b]\npath = hard.qcow2\n", 5, "already [disk a]", "share"},
	{VM "[disk a]\npath = a.qcow2\n[disk b]\nbase = a.qcow2\n", 5, "base: ", "share"},
	{VM "[disk a]\npath = a.qcow2\nreadonly = yes\n[disk b]\npath = a.qcow2\n", 6, "already [disk a]", "share"},
	{VM "[disk]\npath = a.qcow2\n", 3, "disk: '' is no name", "letters"},
	{VM "[disk a/b]\npath = a.qcow2\n", 3, "'a/b'", "letters"},
	{VM "[disk a b]\npath = a.qcow2\n", 3, "'a b'", "letters"},
	/* [net] */
	{VM "[net lan]\n", 3, "mode: is missing", "mode = user"},
	{VM "[net lan]\nforward = tcp:1:1\n[disk a]\npath = a.qcow2\n", 3, "mode: is missing in [net lan]",
	 "mode = user"},
	{VM "[net lan]\nmode = user\nmultiplex = tcp:80:80\n", 3, "port 80 of the guest is not forwarded", "forward = tcp:PORT:80"},
	{VM "[net lan]\nmode = user\nforward = udp:81:80\nmultiplex = tcp:80:80\n", 3, "port 80 of the guest is not forwarded", "forward = tcp:PORT:80"},
	{VM "[net lan]\nmode = tap\ntap = t\nmultiplex = tcp:80:80\n", 3, "multiplex: has no meaning", "mode = user"},
	{VM "[net lan]\nmode = user\nmultiplex = udp:80:80\n", 5, "no port to share", "tcp:HOST_PORT"},
	{VM "[net lan]\nmode = user\nmultiplex = tcp:80:80:most\n", 5, "no port to share", ":least or :name"},
	{VM "[net lan]\nmode = user\nmultiplex = tcp:80:80:\n", 5, "no port to share", "tcp:HOST_PORT"},
	{VM "[net lan]\nmode = user\nmultiplex = tcp:80:0:name\n", 5, "no port to share", "tcp:HOST_PORT"},
	{VM "[net lan]\nmode = tap\n", 3, "tap: is missing", "tap = vmtap0"},
	{VM "[net lan]\nmode = bridge\n", 3, "bridge: is missing", "bridge = br0"},
	{VM "[net lan]\nmode = libvirt\n", 3, "network: is missing", "network = default"},
	{VM "[net lan]\nmode = libvirt\nnetwork =\n", 5, "no name of a network", "net-list"},
	{VM "[net lan]\nmode = libvirt\nnetwork = a/b\n", 5, "no name of a network", "net-list"},
	{VM "[net lan]\nmode = group\n", 3, "network: is missing", "network = backend"},
	{VM "[net lan]\nmode = group\nnetwork = ..\n", 3, "no name of a group's network", "network = backend"},
	{VM "[net lan]\nmode = group\nnetwork = a b\n", 3, "no name of a group's network", "network = backend"},
	{VM "[net lan]\nmode = group\nnetwork = a\nbridge = br0\n", 3, "bridge: has no meaning", "mode = bridge"},
	{VM "[net lan]\nmode = user\nnetwork = default\n", 3, "no meaning with mode = user", "mode = libvirt"},
	{VM "libvirt = qemu+ssh://host/system\n", 3, "no libvirt of this host", "qemu:///system"},
	{VM "libvirt = qemu+ext:///?command=/bin/sh\n", 3, "no libvirt of this host", "qemu:///system"},
	{VM "libvirt = qemu:///system?socket=/tmp/s\n", 3, "no libvirt of this host", "qemu:///system"},
	{VM "libvirt = :///\n", 3, "no libvirt of this host", "qemu:///system"},
	{VM "[disk a]\npath = a:b\nbase = c:d\nlibvirt = 1\n", 6, "unknown key", ""},
	{VM "[net lan]\nmode = tap\nforward = tcp:1:1\ntap = t\n", 3, "forward: has no meaning", "mode = user"},
	{VM "[net lan]\nmode = user\ntap = t\n", 3, "tap: has no meaning", "mode = tap"},
	{VM "[net lan]\nmode = user\nbridge = t\n", 3, "bridge: has no meaning", "mode = bridge"},
	{VM "[net lan]\nmode = user\nforward = tcp:80:1\nforward = tcp:80:2\n", 3, "port 80", "another port"},
	{VM "[net a]\nmode = user\nforward = tcp:80:1\n[net b]\nmode = user\nforward = tcp:0.0.0.0:80:2\n", 6, "[net a] and [net b]", "another port"},
	{VM "[net a]\nmode = tap\ntap = t0\n[net b]\nmode = tap\ntap = t0\n", 6, "already that of [net a]", "of its own"},
	{VM "[net a]\nmode = user\nmac = 52:54:00:00:00:01\n[net b]\nmode = user\nmac = 52:54:00:00:00:01\n", 6, "already that of [net a]",
	 "of its own"},
	{VM "[net lan]\nmode = user\nip = 10.0.0.5/24\n", 3, "ip: has no meaning with mode = user", "DHCP"},
	{VM "[net a]\nmode = tap\ntap = t0\nip = 10.0.0.5/24\n[net b]\nmode = tap\ntap = t1\nip = 10.0.0.5/16\n", 7, "already that of [net a]", "of its own"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.5\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.5/0\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.5/33\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.5/24x\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.256/16\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0/24\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.0/24\n", 5, "no address", "neither the first nor the last"},
	{VM "[net lan]\nmode = none\nip = 10.0.0.255/24\n", 5, "no address", "neither the first nor the last"},
	{VM "[net lan]\nmode = none\nip = 127.0.0.1/8\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = 224.0.0.1/8\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = none\nip = fe80::1/64\n", 5, "no address", "10.0.0.5/24"},
	{VM "[net lan]\nmode = user\nqueues = 0\n", 5, "queues: '0' is no number of queues", "from 1 to 16"},
	{VM "[net lan]\nmode = user\nqueues = 17\n", 5, "'17' is no number", "from 1 to 16"},
	{VM "[net lan]\nmode = user\nqueues = 2x\n", 5, "'2x' is no number", "from 1 to 16"},
	{VM "[net lan]\nmode = user\nqueues =\n", 5, "'' is no number", "from 1 to 16"},
	{VM "[net lan]\nmode = user\nsend_rate = 5\n", 5, "send_rate: 5 bytes", "1K"},
	{VM "[net lan]\nmode = user\nreceive_rate = fast\n", 5, "no size", "512M"},
	{VM "[net lan]\nmode = none\nforward = tcp:1.2.3:80:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:1.2.3.256:80:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\ntap = vmtap%d\n", 5, "interface", "15"},
	{VM "[net lan]\nmode = wlan\n", 4, "'wlan'", "user, tap"},
	{VM "[net lan]\nmode = none\nmac = 52:54:00:12:34\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nmac = 53:54:00:12:34:56\n", 5, "MAC address", "first one even"},
	{VM "[net lan]\nmode = none\nmac = 00:00:00:00:00:00\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nmac = 52: 4:00:12:34:56\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nmac = 52-54-00-12-34-56\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nmac = 52:54:00:12:34:5g\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nmac = 52:54:00:12:34:567\n", 5, "MAC address", "52:54"},
	{VM "[net lan]\nmode = none\nforward = 8080:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:8080\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:0:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:80:65536\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp: 80:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:+80:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = tcp:80:80:\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = sctp:80:80\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\nforward = t\n", 5, "no port", "tcp:8080:80"},
	{VM "[net lan]\nmode = none\ntap = a-name-too-long-for-linux\n", 5, "interface", "15"},
	{VM "[net lan]\nmode = none\ntap = a/b\n", 5, "interface", "15"},
	{VM "[net lan]\nmode = none\nbridge =\n", 5, "interface", "15"},
	{VM "[net lan]\nmode = none\nmodel = e1000\n", 5, "model: unknown key", "'mode'"},
	{VM "[net lan]\nmode = none\n[net lan]\nmode = none\n", 5, "given twice", "one section"},
	{VM "[net]\nmode = none\n", 3, "net: '' is no name", "letters"},
	/* [checkpoint] */
	{VM "[checkpoint]\nevery = 9ms\n", 4, "'9ms'", "10ms"},
	{VM "[checkpoint]\nevery = 99999h\n", 4, "'99999h'", "10000h"},
	{VM "[checkpoint]\nevery = soon\n", 4, "'soon'", "30s"},
	{VM "[checkpoint]\nevery = 30d\n", 4, "'30d'", "30s"},
	{VM "[checkpoint]\nkeep = 0\n", 4, "'0'", "from 1"},
	{VM "[checkpoint]\nkeep_hourly = x\n", 4, "'x'", "0 means none"},
	{VM "[checkpoint]\nkeep_daily = 1000001\n", 4, "'1000001'", "from 1"},
	{VM "[checkpoint]\nkeep = -1\n", 4, "'-1'", "from 1"},
	{VM "[checkpoint]\nkeep = all\n", 4, "'all'", "from 1"},
	{VM "[checkpoint]\nevry = 0\n", 4, "unknown key", "'every'"},
	/* sections and syntax */
	{VM "[dsik root]\npath = a.qcow2\n", 3, "unknown section [dsik root]", "[disk NAME]"},
	{VM "[disks]\n", 3, "unknown section [disks]", "[disk NAME]"},
	{VM "[usb]\n", 3, "unknown section [usb]", "known: [vm]"},
	{VM "[usb stick]\npath = x\n", 3, "unknown section [usb stick]", "known: [vm]"},
	{VM "[VM]\n", 3, "unknown section [VM]", "[vm]"},
	{VM "[vm two]\n", 3, "unknown section [vm two]", "[vm]"},
	{VM "[checkpoints]\n", 3, "unknown section", "[checkpoint]"},
	{VM "[]\n", 3, "unknown section []", "known"},
	{VM "[disk root]\npath = a.qcow2\n[vm]\n", 5, "[vm] is given twice, first in line 1", "one section"},
	{"name = x\n[vm]\n", 1, "name: stands before any section", "[vm]"},
	{VM "just words\n", 3, "neither a [section]", "key = value"},
	{VM "[disk root\npath = a.qcow2\n", 3, "neither a [section]", "[vm]"},
	{VM "[disk root] path = a.qcow2\n", 3, "neither a [section]", "[vm]"},
	{VM "= 5\n", 3, "unknown key", "known here"},
	{VM "\n# x\n\nname\n", 6, "neither a [section]", "key = value"},
	{VM "cmdline = \xff\n", 3, "no UTF-8", "guest.cfg"},
	{VM "cmdline = \xc0\xaf\n", 3, "no UTF-8", "guest.cfg"},
	{VM "cmdline = \xed\xa0\x80\n", 3, "no UTF-8", "guest.cfg"},
	{VM "cmdline = \xf0\x9f\x98\n", 3, "no UTF-8", "guest.cfg"},
	{VM "cmdline = \x1b[2J\n", 3, "control characters", "guest.cfg"},
	{VM "cmdline = a\rb\n", 3, "control characters", "guest.cfg"},
	{"\x7f"
	 "ELF\n",
	 1, "control characters", "guest.cfg"},
	/* the whole file */
	{"\n", 0, "no [vm] section", "vmcp help run"},
	{"# nothing\n", 0, "no [vm] section", "vmcp help run"},
	{"[disk root]\npath = a.qcow2\n", 0, "no [vm] section", "vmcp help run"},
	{"\n[vm]\n", 2, "kernel: is missing in [vm]", "kernel = FILE"},
	{"[vm]\nname = x\ncpus = 2\n", 1, "kernel: is missing in [vm]", "kernel = FILE"},
};

static void link_images(void)
{
	char from[128], to[128];
	snprintf(from, sizeof(from), "%s/a.qcow2", work);
	snprintf(to, sizeof(to), "%s/link.qcow2", work);
	cr_assert_eq(symlink(from, to), 0);
	snprintf(to, sizeof(to), "%s/hard.qcow2", work);
	cr_assert_eq(link(from, to), 0);
}

static void expect_wrong(const struct wrong *w, const char *text)
{
	struct machine_config config;
	struct err err = ERR_INIT;
	char place[128];

	int rc = read_config(text, &config, &err);
	cr_expect_lt(rc, 0, "accepted:\n%s", text);
	cr_expect_eq(rc, -err.number);
	cr_expect(err.class == ERR_USAGE || err.class == ERR_NOT_FOUND || strstr(err.message, "Not a directory"), "%s",
		  err.message);
	if (w->line)
		snprintf(place, sizeof(place), "%s:%u: ", config_path, w->line);
	else
		snprintf(place, sizeof(place), "%s: ", config_path);
	cr_expect_eq(strncmp(err.message, place, strlen(place)), 0, "'%s' does not begin with '%s':\n%s", err.message,
		     place, text);
	cr_expect_not_null(strstr(err.message, w->says), "'%s' does not say '%s':\n%s", err.message, w->says, text);
	cr_expect_not_null(strstr(err.hint, w->hint), "hint '%s' does not say '%s':\n%s", err.hint, w->hint, text);
	cr_expect_null(config.kernel, "something is left");
	cr_expect_null(config.cmdline, "something is left");
}

Test(config, every_key_wrong_in_turn)
{
	link_images();
	for (size_t i = 0; i < ARRAY_LENGTH(wrongs); i++)
		expect_wrong(&wrongs[i], wrongs[i].text);
}

static char *with_crlf(const char *text)
{
	char *out = malloc(2 * strlen(text) + 1), *to = out;

	for (; *text; text++) {
		if (*text == '\n')
			*to++ = '\r';
		*to++ = *text;
	}
	*to = '\0';
	return out;
}

Test(config, the_same_with_crlf_and_without_the_last_newline)
{
	link_images();
	for (size_t i = 0; i < ARRAY_LENGTH(wrongs); i++) {
		CLEANUP_FREE char *text = with_crlf(wrongs[i].text);
		expect_wrong(&wrongs[i], text);
		CLEANUP_FREE char *cut = strdup(wrongs[i].text);
		cut[strlen(cut) - 1] = '\0';
		if (*cut)
			expect_wrong(&wrongs[i], cut);
	}
}

Test(config, files_that_are_no_configuration)
{
	struct machine_config config;
	struct err err = ERR_INIT;

	cr_assert_eq(read_bytes("", 0, &config, &err), -EINVAL);
	cr_assert_not_null(strstr(err.message, "it is empty"), "%s", err.message);
	cr_assert_neq(err.hint[0], '\0');
	err = ERR_INIT;
	cr_assert_eq(read_bytes("[vm]\0kernel", 11, &config, &err), -EINVAL);
	cr_assert_not_null(strstr(err.message, "binary"), "%s", err.message);
	cr_assert_eq(err.class, ERR_USAGE);
	CLEANUP_FREE char *big = calloc(1, 2 << 20);
	memset(big, '#', 2 << 20);
	cr_assert_eq(read_bytes(big, 2 << 20, &config, &err), -EFBIG);
	cr_assert_eq(config_read_file("/nowhere/guest.cfg", &config, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	cr_assert_not_null(strstr(err.message, "/nowhere/guest.cfg"));
	cr_assert_lt(config_read_file(work, &config, &err), 0, "a folder");
	cr_assert_lt(config_read_file("/dev/zero", &config, &err), 0);
	cr_assert_lt(config_read_file("/nowhere/guest.cfg", &config, NULL), 0);
}

Test(config, names_that_come_from_the_file)
{
	static const struct {
		const char *file, *name;
	} cases[] = {{"web.cfg", "web"},     {"web", "web"}, {"web.prod.cfg", "web.prod"},
		     {"my guest.cfg", NULL}, {".cfg", NULL}, {"-x.cfg", NULL}};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		struct machine_config config;
		struct err err = ERR_INIT;
		char path[128];

		put(cases[i].file, VM, strlen(VM));
		snprintf(path, sizeof(path), "%s/%s", work, cases[i].file);
		int rc = config_read_file(path, &config, &err);
		if (cases[i].name) {
			cr_assert_eq(rc, 0, "%s", err.message);
			cr_assert_str_eq(config.name, cases[i].name);
			config_free(&config);
		} else {
			cr_assert_eq(rc, -EINVAL);
			cr_assert_not_null(strstr(err.message, ":1: name: "), "%s", err.message);
			cr_assert_not_null(strstr(err.hint, "add name"), "%s", err.hint);
		}
	}
	char path[200], name[100];
	struct machine_config config;
	memset(name, 'n', 80);
	strcpy(name + 80, ".cfg");
	put(name, VM, strlen(VM));
	snprintf(path, sizeof(path), "%s/%s", work, name);
	cr_assert_eq(config_read_file(path, &config, NULL), -EINVAL, "not cut silently");
}

Test(config, relative_to_the_file_itself)
{
	struct machine_config config;
	struct err err = ERR_INIT;
	char link_path[128], kernel[128];

	put("guest.cfg", VM, strlen(VM));
	snprintf(link_path, sizeof(link_path), "%s/folder/alias.cfg", work);
	cr_assert_eq(symlink("../guest.cfg", link_path), 0);
	cr_assert_eq(config_read_file(link_path, &config, &err), 0, "%s", err.message);
	snprintf(kernel, sizeof(kernel), "%s/vmlinuz", work);
	cr_assert_str_eq(config.kernel, kernel);
	config_free(&config);
	cr_assert_eq(chdir(work), 0);
	cr_assert_eq(config_read_file("guest.cfg", &config, &err), 0, "%s", err.message);
	cr_assert_str_eq(config.kernel, kernel);
	cr_assert_str_eq(config.source, config_path);
	config_free(&config);
}

/* --- the canonical form --- */

static bool same_text(const char *a, const char *b) { return (!a && !b) || (a && b && !strcmp(a, b)); }

static void expect_same(const struct machine_config *a, const struct machine_config *b)
{
	cr_assert_str_eq(a->name, b->name);
	cr_assert_eq(a->memory_bytes, b->memory_bytes);
	cr_assert_eq(a->cpus, b->cpus);
	cr_assert(same_text(a->kernel, b->kernel));
	cr_assert(same_text(a->initrd, b->initrd));
	cr_assert(same_text(a->cmdline, b->cmdline), "'%s' is not '%s'", a->cmdline, b->cmdline);
	cr_assert(same_text(a->cpu_model, b->cpu_model));
	cr_assert_eq(a->console, b->console);
	cr_assert_eq(a->rng, b->rng);
	cr_assert_eq(a->balloon, b->balloon);
	cr_assert_eq(a->memory_backing, b->memory_backing);
	cr_assert_eq(a->disk_count, b->disk_count);
	for (unsigned i = 0; i < a->disk_count; i++) {
		cr_assert_str_eq(a->disks[i].name, b->disks[i].name);
		cr_assert(same_text(a->disks[i].base, b->disks[i].base));
		/* Where a disk has a base, its own layer's place is not part of the configuration. */
		cr_assert(a->disks[i].base || same_text(a->disks[i].path, b->disks[i].path));
		cr_assert_eq(a->disks[i].readonly, b->disks[i].readonly);
		cr_assert_eq(a->disks[i].detect_zeroes, b->disks[i].detect_zeroes);
	}
}

static void expect_round_trip(const struct machine_config *config)
{
	CLEANUP_BUF struct buf first = BUF_INIT;
	CLEANUP_BUF struct buf second = BUF_INIT;
	struct machine_config again;
	struct err err = ERR_INIT;

	cr_assert_eq(config_to_text(config, &first, NULL), 0);
	cr_assert_eq(buf_append(&first, "", 1, NULL), 0);
	cr_assert_eq(config_read_text("t", (char *)first.data, &again, &err), 0, "%s:\n%s", err.message,
		     (char *)first.data);
	expect_same(config, &again);
	cr_assert_eq(config_to_text(&again, &second, NULL), 0);
	cr_assert_eq(buf_append(&second, "", 1, NULL), 0);
	cr_assert_str_eq((char *)first.data, (char *)second.data);
	config_free(&again);
}

Test(config, canonical_text_reads_back_equal)
{
	static const char *const texts[] = {
		VM,
		VM "name = n\nmemory = 1T\ncpus = 64\ninitrd = initrd\ncmdline = a;b [c] = d: \"e\" #\nconsole = "
		   "socket\nrng = yes\n",
		VM "cmdline = ;x\n",
		VM "cmdline = #x#y\n",
		VM "[disk a]\npath = a.qcow2\n[disk b]\nbase = b.qcow2\n",
		VM "[disk a]\npath = a.qcow2\ndetect_zeroes = yes\n[disk b]\npath = b.qcow2\ndetect_zeroes = no\n",
		VM "[disk a]\npath = a.qcow2\nreadonly = yes\n[net x]\nmode = none\n[checkpoint]\nkeep = 1\n",
	};
	for (size_t i = 0; i < ARRAY_LENGTH(texts); i++) {
		struct machine_config config;
		struct err err = ERR_INIT;
		cr_assert_eq(read_config(texts[i], &config, &err), 0, "%s", err.message);
		expect_round_trip(&config);
		config_free(&config);
	}
}

Test(config, canonical_text_of_odd_folders)
{
	static const char *const folders[] = {"a #b", "c ;d", "e = f", "[g]", " h ", "\xc3\xa4"};

	for (size_t i = 0; i < ARRAY_LENGTH(folders); i++) {
		struct machine_config config;
		struct err err = ERR_INIT;
		char path[200];
		snprintf(path, sizeof(path), "%s/%s", work, folders[i]);
		cr_assert_eq(mkdir(path, 0700), 0);
		snprintf(path, sizeof(path), "%s/vmlinuz", folders[i]);
		put(path, "k", 1);
		snprintf(path, sizeof(path), "%s/x.cfg", folders[i]);
		put(path, VM, strlen(VM));
		snprintf(path, sizeof(path), "%s/%s/x.cfg", work, folders[i]);
		cr_assert_eq(config_read_file(path, &config, &err), 0, "%s", err.message);
		expect_round_trip(&config);
		config_free(&config);
	}
}

/* A checkpoint's manifest could not hold these: better refused before the VM runs than at its first checkpoint. */
Test(config, folders_that_no_text_can_hold)
{
	static const char *const folders[] = {"a\nb", "\xe4"};

	for (size_t i = 0; i < ARRAY_LENGTH(folders); i++) {
		struct machine_config config;
		struct err err = ERR_INIT;
		char path[200];
		snprintf(path, sizeof(path), "%s/%s", work, folders[i]);
		cr_assert_eq(mkdir(path, 0700), 0);
		snprintf(path, sizeof(path), "%s/vmlinuz", folders[i]);
		put(path, "k", 1);
		snprintf(path, sizeof(path), "%s/x.cfg", folders[i]);
		put(path, VM, strlen(VM));
		snprintf(path, sizeof(path), "%s/%s/x.cfg", work, folders[i]);
		cr_assert_eq(config_read_file(path, &config, &err), -EINVAL);
		cr_assert_not_null(strstr(err.message, "UTF-8"), "%s", err.message);
		cr_assert_not_null(strstr(err.hint, "rename"));
	}
}

static const char sample[] =
	"[vm]\nname = web\nmemory = 536870912\ncpus = 2\nkernel = /boot/vmlinuz\ninitrd = /boot/initrd\n"
	"cmdline = console=ttyS0\ncpu_model = host\nmemory_backing = small\nconsole = stdio\nrng = yes\n\n"
	"[disk root]\npath = /srv/root.qcow2\n\n[disk seed]\npath = /srv/seed.iso\nreadonly = yes\n\n"
	"[disk data]\nbase = /srv/base.qcow2\n";

Test(config, text_of_a_checkpoint_is_not_trusted)
{
	static const char *const texts[] = {"",
					    "[vm]\n",
					    "[vm]\nname = ../x\n",
					    "[vm]\nname = x\nkernel = vmlinuz\n",
					    "[vm]\nname = x\nmemory = 1\n",
					    "[vm]\nname = x\n[disk a]\npath = b\n",
					    "[vm]\nname = x\n[disk ../a]\npath = /b\n",
					    "[vm]\nname = \xff\n"};
	struct machine_config config;
	struct err err = ERR_INIT;

	cr_assert_eq(config_read_text("checkpoint 01234567", sample, &config, &err), 0, "%s", err.message);
	cr_assert_str_eq(config.source, "");
	cr_assert_eq(config.disk_count, 3);
	expect_round_trip(&config);
	config_free(&config);
	for (size_t i = 0; i < ARRAY_LENGTH(texts); i++) {
		err = ERR_INIT;
		cr_expect_lt(config_read_text("checkpoint 01234567", texts[i], &config, &err), 0, "%s", texts[i]);
		cr_expect_eq(err.class, ERR_DAMAGED);
		cr_expect_eq(strncmp(err.message, "checkpoint 01234567:", 20), 0, "%s", err.message);
		cr_expect_null(config.source);
	}
}

Test(config, an_error_of_an_earlier_call_does_not_matter)
{
	struct machine_config config;
	struct err err = ERR_INIT;

	cr_assert_lt(config_read_text("t", "nonsense", &config, &err), 0);
	cr_assert_eq(config_read_text("t", sample, &config, &err), 0);
	cr_assert_eq(err.number, 0);
	config_free(&config);
}

Test(config, hostile_text, .timeout = 120)
{
	static const char bits[] = "[]=:#;\n\r\t \"\\/.-_0Gx\x80\xff\x01";
	static const char *const words[] = {"[disk a]\n", "[net b]\n",	   "[vm]\n", "base = /x\n", "path = /y\n",
					    "\n\n",	  "mode = none\n", "= = =",  "[[",	    "]]"};
	unsigned seed = 77, accepted = 0;

	for (int round = 0; round < 20000; round++) {
		char text[sizeof(sample) + 256];
		struct machine_config config;
		struct err err = ERR_INIT;
		size_t length = sizeof(sample) - 1;

		memcpy(text, sample, sizeof(sample));
		for (int n = rand_r(&seed) % 4 + 1; n > 0; n--) {
			size_t at = (size_t)rand_r(&seed) % (length + 1), span = (size_t)rand_r(&seed) % 12;
			const char *word = words[(size_t)rand_r(&seed) % ARRAY_LENGTH(words)];

			switch (rand_r(&seed) % 4) {
			case 0:
				span = span > length - at ? length - at : span;
				memmove(text + at, text + at + span, length + 1 - at - span);
				length -= span;
				break;
			case 1:
				memmove(text + at + strlen(word), text + at, length + 1 - at);
				memcpy(text + at, word, strlen(word));
				length += strlen(word);
				break;
			default:
				if (at < length)
					text[at] = bits[(size_t)rand_r(&seed) % (sizeof(bits) - 1)];
			}
		}
		/* A copy of its own, so that AddressSanitizer sees a read beyond the end. */
		CLEANUP_FREE char *copy = strdup(text);
		if (config_read_text("t", copy, &config, &err) == 0) {
			accepted++;
			expect_round_trip(&config);
			config_free(&config);
		} else {
			cr_assert_neq(err.message[0], '\0');
			cr_assert_eq(err.class, ERR_DAMAGED);
		}
	}
	cr_assert_gt(accepted, 500, "%u", accepted);
	cr_assert_lt(accepted, 19000, "%u", accepted);
}
