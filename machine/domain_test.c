#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/file.h"
#include "base/log.h"
#include "machine/domain.h"
#include "machine/qemu_internal.h"
#include "machine/xml.h"

#define OS "<os><type arch='x86_64'>hvm</type><kernel>/boot/vmlinuz</kernel></os>"

static struct buf text;
static char told[8192]; /* what the log said of the last domain */
static struct err error;

/* The log goes to a file in memory while the domain is read. */
static int convert_bytes(const char *xml, size_t length)
{
	int fd = memfd_create("log", MFD_CLOEXEC), rc;

	cr_assert_geq(fd, 0);
	buf_free(&text);
	error = ERR_INIT;
	log_set_level(LOG_LEVEL_WARN);
	log_set_sink(fd, "");
	rc = domain_to_text("d.xml", xml, length, "", &text, &error);
	log_set_sink(STDERR_FILENO, "");
	ssize_t n = pread(fd, told, sizeof(told) - 1, 0);
	cr_assert_geq(n, 0);
	told[n] = '\0';
	close(fd);
	if (!rc)
		cr_assert_eq(buf_append(&text, NULL, 1, NULL), 0);
	return rc;
}

static int convert(const char *xml) { return convert_bytes(xml, strlen(xml)); }

static void domain_becomes(const char *inside, const char *cfg)
{
	CLEANUP_FREE char *xml = xasprintf("<domain type='kvm'><name>web</name><memory>524288</memory>" OS "%s</domain>", inside);

	cr_assert_eq(convert(xml), 0, "%s: %s", xml, error.message);
	CLEANUP_FREE char *whole = xasprintf("[vm]\nname = web\nmemory = 536870912\nkernel = /boot/vmlinuz\n%s", cfg);
	cr_assert_str_eq((char *)text.data, whole, "%s", xml);
}

static void says(const char *words) { cr_assert_not_null(strstr(told, words), "'%s' is not in: %s", words, told); }

static void refuses(const char *xml, const char *words)
{
	cr_assert_eq(convert(xml), -EINVAL, "%s", xml);
	cr_assert_eq(error.class, ERR_USAGE);
	cr_assert_not_null(strstr(error.message, words), "'%s' is not in: %s", words, error.message);
	cr_assert_not_null(strstr(error.message, "d.xml"), "%s", error.message);
	cr_assert(error.hint[0] != '\0', "no hint: %s", error.message);
}

static void domain_refuses(const char *inside, const char *words)
{
	CLEANUP_FREE char *xml = xasprintf("<domain><name>web</name><memory>524288</memory>" OS "%s</domain>", inside);

	refuses(xml, words);
}

/* --- what is honoured --- */

Test(domain, plain)
{
	domain_becomes("", "");
	cr_assert_str_eq(told, "");
}

Test(domain, machine)
{
	domain_becomes("<vcpu placement='static'>4</vcpu><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid><metadata><a/></metadata><features><acpi/><apic/></features>"
		       "<clock offset='utc'/><on_reboot>restart</on_reboot><cpu mode='host-passthrough'/>",
		       "cpus = 4\n");
	cr_assert_str_eq(told, "");
	domain_becomes("<uuid>x</uuid>", "");
	says("uuid: 'x' is no UUID");
	domain_becomes("<memoryBacking><hugepages/></memoryBacking><devices><memballoon model='virtio'/></devices>", "memory_backing = hugetlb\n");
	says("memballoon: not with huge pages");
	domain_becomes("<cpu><model>Skylake-Server</model></cpu>", "cpu_model = x86-64-v3\n");
	says("the guest sees x86-64-v3");
	domain_becomes("<cpu mode='custom'><model>Westmere</model></cpu>", "cpu_model = x86-64-v2\n");
	domain_becomes("<cpu mode='custom'><model>486</model></cpu>", "cpu_model = x86-64-v1\n");
	domain_becomes("<devices><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><vsock model='virtio'><cid auto='yes'/></vsock>"
		       "<memballoon model='virtio'/><serial type='pty'><target port='0'/></serial><console type='pty'><target type='serial' port='0'/></console>"
		       "</devices>",
		       "rng = yes\nvsock_cid = 3\nballoon = yes\n");
	cr_assert_str_eq(told, "");
}

struct memory_case {
	const char *unit, *number, *bytes;
};

Test(domain, memory)
{
	static const struct memory_case cases[] = {{"KiB", "1048576", "1073741824"}, {"k", "524288", "536870912"}, {"MiB", "512", "536870912"},
						   {"G", "2", "2147483648"},	     {"MB", "512", "513802240"},   {"bytes", "1", "16777216"}};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		CLEANUP_FREE char *xml =
			xasprintf("<domain><name>web</name><memory unit='%s'>%s</memory>" OS "</domain>", cases[i].unit, cases[i].number);
		CLEANUP_FREE char *line = xasprintf("\nmemory = %s\n", cases[i].bytes);

		cr_assert_eq(convert(xml), 0, "%s", error.message);
		cr_assert_not_null(strstr((char *)text.data, line), "%s: %s", xml, (char *)text.data);
	}
	says("rounded up");
	refuses("<domain><name>web</name><memory unit='EiB'>1</memory>" OS "</domain>", "no size");
	refuses("<domain><name>web</name><memory>-1</memory>" OS "</domain>", "no size");
	refuses("<domain><name>web</name><memory unit='TiB'>18446744073709551615</memory>" OS "</domain>", "no size");
}

Test(domain, kernel)
{
	cr_assert_eq(convert("<domain><name>a b</name><memory>524288</memory><os><type>hvm</type><kernel>/k</kernel><initrd>/i</initrd>"
			     "<cmdline>root=/dev/vda a&amp;b&#10;[disk x] # y</cmdline></os></domain>"),
		     0, "%s", error.message);
	cr_assert_str_eq((char *)text.data, "[vm]\nname = a-b\nmemory = 536870912\nkernel = /k\ninitrd = /i\ncmdline = root=/dev/vda a&b [disk x] # y\n");
	says("it is called a-b");
}

Test(domain, disks)
{
	domain_becomes("<devices>"
		       "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/a b.qcow2'/><target dev='vda' bus='virtio'/></disk>"
		       "<disk type='block'><driver type='raw'/><source dev='/dev/vg/lv'/><target dev='sda' bus='scsi'/></disk>"
		       "<disk type='volume'><driver type='qcow2'/><source pool='p' volume='v'/><target dev='vdc'/><readonly/></disk>"
		       "<disk type='file'><driver type='qcow2'/><source file='/t'/><target dev='vdd'/><transient/></disk>"
		       "<disk type='file' device='cdrom'><source file='/c.iso'/><target dev='hdc'/></disk>"
		       "<disk type='file' device='cdrom'><target dev='hdd'/></disk>"
		       "<disk type='network' device='cdrom'><source protocol='http' name='x'/><target dev='hde'/></disk>"
		       "<disk type='file' device='floppy'><source file='/f'/><target dev='fda'/></disk>"
		       "</devices>",
		       "\n[disk vda]\npath = /a b.qcow2\n\n[disk sda]\npath = /dev/vg/lv\n\n[disk vdc]\npath = p:v\nreadonly = yes\n"
		       "\n[disk vdd]\nbase = /t\n\n[disk hdc]\npath = /c.iso\nreadonly = yes\n");
	says("cache='none': not honoured");
	says("sda: bus scsi: the guest finds a virtio disk");
	says("sda: raw: with its first checkpoint");
	says("hdc: a CD-ROM drive becomes");
	says("hdd: an empty drive");
	says("hde: type='network' is not supported: the drive is left out");
	says("fda: there is no floppy");
	domain_refuses("<devices><disk type='network'><source protocol='rbd' name='x'/><target dev='vda'/></disk></devices>", "type='network'");
	domain_refuses("<devices><disk type='file'><target dev='vda'/></disk></devices>", "no source");
	domain_refuses("<devices><disk type='file'><driver type='vmdk'/><source file='/a'/><target dev='vda'/></disk></devices>", "vmdk");
	domain_refuses("<devices><disk type='file'><source file='/a'><encryption format='luks'/></source><target dev='vda'/></disk></devices>", "encrypted");
	domain_refuses("<devices><disk type='file'><source file='/a'><slices/></source><target dev='vda'/></disk></devices>", "part of a file");
	domain_refuses("<devices><disk type='file'><source file='/a'/><target dev='vda'/></disk>"
		       "<disk type='file'><source file='/b'/><target dev='vda'/></disk></devices>",
		       "given twice");
}

Test(domain, cards)
{
	domain_becomes("<devices>"
		       "<interface type='network'><source network='default'/><mac address='52:54:00:00:00:01'/><model type='virtio'/><driver name='vhost' queues='4'/><target dev='vnet0'/></interface>"
		       "<interface type='bridge'><source bridge='br0'/><model type='e1000'/><bandwidth><inbound average='1000' peak='2'/><outbound average='2'/></bandwidth></interface>"
		       "<interface type='user'><model type='virtio'/><portForward proto='tcp' address='127.0.0.1'><range start='2022' to='22'/><range start='1' end='9'/></portForward></interface>"
		       "<interface type='ethernet'><target dev='tap0' managed='no'/><model type='virtio'/><driver queues='32' txmode='iothread'/></interface>"
		       "<interface type='direct'><source dev='eth0'/></interface>"
		       "<interface type='hostdev'/>"
		       "</devices>",
		       "\n[net net0]\nmode = libvirt\nnetwork = default\nmac = 52:54:00:00:00:01\nqueues = 4\n"
		       "\n[net net1]\nmode = bridge\nbridge = br0\nreceive_rate = 1000000\nsend_rate = 2000\n"
		       "\n[net net2]\nmode = user\nforward = tcp:127.0.0.1:2022:22\n"
		       "\n[net net3]\nmode = tap\ntap = tap0\nqueues = 16\n");
	says("e1000: the guest finds a virtio card");
	says("peak='2': not honoured");
	says("only single ports");
	says("txmode='iothread': not honoured");
	says("queues='32': the card has 16");
	says("type='direct' is not supported: the card is left out");
	says("type='hostdev'");
	domain_refuses("<devices><interface type='bridge'><source bridge='br0'/><mac address='53:00:00:00:00:00'/></interface></devices>", "MAC");
}

/* --- what is not --- */

Test(domain, told_by_line)
{
	domain_becomes("\n<devices>\n<graphics type='vnc'/>\n<video><model type='qxl'/></video><tpm model='tpm-crb'/></devices><cputune/>"
		       "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>",
		       "");
	says("vmcp: d.xml:3: devices/graphics: 'vnc' is not honoured\n");
	says("vmcp: d.xml:4: devices/video: not honoured\n");
	says("vmcp: d.xml:4: devices/tpm: 'tpm-crb' is not honoured\n");
	says("cputune: not honoured\n");
	says("commandline: not honoured\n");
}

Test(domain, refused)
{
	refuses("<domain><name>a</name><memory>524288</memory><os><type>hvm</type><boot dev='hd'/></os></domain>", "firmware");
	refuses("<domain type='lxc'><name>a</name><memory>524288</memory><os><type>exe</type><init>/bin/sh</init></os></domain>", "'exe'");
	refuses("<domain><name>a</name><memory>524288</memory><os><type arch='aarch64'>hvm</type><kernel>/k</kernel></os></domain>", "aarch64");
	refuses("<domain><name>a</name><memory>524288</memory></domain>", "<os>");
	refuses("<network/>", "no domain");
	domain_refuses("<launchSecurity type='sev'/>", "encrypted");
	domain_refuses("<vcpu>0</vcpu>", "CPUs");
	domain_refuses("<vcpu>1</vcpu><vcpu>2</vcpu>", "given twice");
}

/* --- documents --- */

Test(domain, documents)
{
	refuses("", "XML");
	refuses("<domain><name>a</domain>", "d.xml:1");
	refuses("<domain>\n<name>&lol;</name></domain>", "XML");
	refuses("<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><domain><name>&b;</name></domain>", "DTD");
	refuses("<!DOCTYPE d SYSTEM '/etc/passwd'><domain/>", "DTD");
	cr_assert_eq(convert_bytes("\0\0\0", 3), -EINVAL);
	CLEANUP_BUF struct buf deep = BUF_INIT;
	for (int i = 0; i < 200; i++)
		cr_assert_eq(buf_append(&deep, "<domain>", 8, NULL), 0);
	for (int i = 0; i < 200; i++)
		cr_assert_eq(buf_append(&deep, "</domain>", 9, NULL), 0);
	cr_assert_eq(convert_bytes((char *)deep.data, deep.length), -EINVAL);
	cr_assert_not_null(strstr(error.message, "deep"), "%s", error.message);
}

Test(domain, trees)
{
	struct xml_node *root;

	const char *xml = "<a x='1'><b>  two  words </b><!-- c --><b y='&lt;'/><n:b xmlns:n='u'/></a>";

	cr_assert_eq(xml_parse("t", xml, strlen(xml), &root, &error), 0, "%s", error.message);
	cr_assert_str_eq(xml_attribute(root, "x"), "1");
	cr_assert_null(xml_attribute(root, "y"));
	cr_assert_str_eq(xml_child_text(root, "b"), "two  words");
	cr_assert_str_eq(xml_attribute(root->children->next, "y"), "<");
	cr_assert(root->children->next->next->foreign);
	cr_assert_null(root->children->next->next->next);
	cr_assert_null(xml_child(NULL, "b"));
	xml_free(root);
}

/* --- domains of QEMU --- */

#define TWO_DISKS                                                                                                                           \
	"<domain type='kvm' id='3'>\n  <name>web</name>\n  <vcpu placement='static'>2</vcpu>\n  <devices>\n"                                 \
	"    <disk type='file' device='disk'>\n      <driver name='qemu' type='raw' cache='none'/>\n      <source file='/a' index='2'/>\n"     \
	"      <backingStore type='file' index='1'>\n        <format type='raw'/>\n        <source file='/below'/>\n"                          \
	"        <backingStore/>\n      </backingStore>\n      <target dev='vda' bus='virtio'/>\n    </disk>\n"                               \
	"    <disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2'/>\n      <source file='/b'>\n        <seclabel model='dac'/>\n" \
	"      </source>\n      <backingStore/>\n      <target dev='vdb' bus='virtio'/>\n    </disk>\n"                                       \
	"    <disk type='file' device='cdrom'>\n      <target dev='hda'/>\n    </disk>\n  </devices>\n</domain>\n"

Test(qemu, images_replaced)
{
	CLEANUP_FREE char *one = qemu_replace_image(TWO_DISKS, "vda", "/new & 'it'"), *both = one ? qemu_replace_image(one, "vdb", "/c") : NULL;
	struct qemu_domain domain;

	cr_assert_not_null(both);
	cr_assert_eq(qemu_domain_read("web", both, &domain, &error), 0, "%s\n%s", error.message, both);
	cr_assert_eq(domain.cpus, 2);
	cr_assert_eq(domain.disk_count, 3);
	cr_assert_str_eq(domain.disks[0].path, "/new & 'it'");
	cr_assert_str_eq(domain.disks[0].target, "vda");
	cr_assert(domain.disks[0].qcow2);
	cr_assert_str_eq(domain.disks[1].path, "/c");
	cr_assert(domain.disks[2].left_alone);
	cr_assert_null(strstr(both, "/below"), "%s", both);
	cr_assert_null(strstr(both, "seclabel"), "%s", both);
	cr_assert_null(strstr(both, "backingStore"), "%s", both);
	qemu_domain_free(&domain);
	cr_assert_null(qemu_replace_image(TWO_DISKS, "vdc", "/c"));
	cr_assert_null(qemu_replace_image(TWO_DISKS, "vd", "/c"));
}

Test(qemu, disks_that_cannot_be_saved)
{
	static const char *const disks[] = {"<disk type='block'><source dev='/dev/sda'/><target dev='vda'/></disk>",
					    "<disk type='network'><source protocol='rbd' name='x'/><target dev='vda'/></disk>",
					    "<disk type='file'><driver type='vmdk'/><source file='/a'/><target dev='vda'/></disk>"};
	struct qemu_domain domain;

	for (size_t i = 0; i < ARRAY_LENGTH(disks); i++) {
		CLEANUP_FREE char *xml = xasprintf("<domain><devices>%s</devices></domain>", disks[i]);

		error = ERR_INIT;
		cr_assert_eq(qemu_domain_read("web", xml, &domain, &error), -EINVAL, "%s", xml);
		cr_assert_not_null(strstr(error.message, "vda"), "%s", error.message);
		qemu_domain_free(&domain);
	}
}

Test(qemu, overlay_names)
{
	CLEANUP_FREE char *first = qemu_overlay_path("/d/a.qcow2", "0123456789abcdef"), *next = qemu_overlay_path(first, "fedcba98");

	cr_assert_str_eq(first, "/d/a.qcow2.vmcp-01234567");
	cr_assert_str_eq(next, "/d/a.qcow2.vmcp-fedcba98");
	cr_assert(qemu_is_overlay(first));
	cr_assert(!qemu_is_overlay("/d/a.qcow2"));
	cr_assert(!qemu_is_overlay("vmcp-"));
}

Test(qemu, section)
{
	CLEANUP_BUF struct buf state = BUF_INIT;
	CLEANUP_FREE char *xml = NULL, *none = NULL;
	uint64_t bytes;

	cr_assert_eq(qemu_state_encode(TWO_DISKS, 12345, &state, &error), 0);
	cr_assert_eq(qemu_state_decode(state.data, state.length, &xml, &bytes, &error), 0, "%s", error.message);
	cr_assert_str_eq(xml, TWO_DISKS);
	cr_assert_eq(bytes, 12345);
	state.data[state.length - 3] ^= 1;
	cr_assert_eq(qemu_state_decode(state.data, state.length, &none, &bytes, &error), -EINVAL);
	cr_assert_eq(error.class, ERR_DAMAGED);
	cr_assert_neq(qemu_state_encode("\xff", 1, &state, &error), 0);
}

/* --- files --- */

static char work[] = "/tmp/vmcp-domain-test-XXXXXX";

static char *put(const char *name, const char *content)
{
	char *path = xasprintf("%s/%s", work, name);
	CLEANUP_CLOSE int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	cr_assert_geq(fd, 0);
	cr_assert_eq(write(fd, content, strlen(content)), (ssize_t)strlen(content));
	return path;
}

static void make_work(void) { cr_assert_not_null(mkdtemp(work)); }

static void remove_work(void) { cr_assert_eq(file_remove_tree(AT_FDCWD, work, NULL), 0); }

TestSuite(domain_files, .init = make_work, .fini = remove_work);

static int read_domain(const char *format, const char *image, struct machine_config *config)
{
	CLEANUP_FREE char *kernel = put("k", "k");
	CLEANUP_FREE char *xml = xasprintf("<domain><name>web</name><memory>524288</memory><os><type>hvm</type><kernel>%s</kernel></os><devices>"
					   "<disk type='file'><driver type='%s'/><source file='%s'/><target dev='vda'/></disk></devices></domain>",
					   kernel, format, image);
	CLEANUP_FREE char *path = put("d.xml", xml);

	error = ERR_INIT;
	cr_assert(domain_is_xml(path));
	cr_assert(!domain_is_xml(kernel));
	return domain_read_file(path, "", config, &error);
}

Test(domain_files, formats)
{
	CLEANUP_FREE char *raw = put("raw", "plain data"), *qcow2 = put("qcow2", "QFI\xfb and more");
	struct machine_config config;

	log_set_level(LOG_LEVEL_ERROR);
	cr_assert_eq(read_domain("raw", raw, &config), 0, "%s", error.message);
	cr_assert_str_eq(config.disks[0].path, raw);
	config_free(&config);
	cr_assert_eq(read_domain("qcow2", qcow2, &config), 0, "%s", error.message);
	config_free(&config);
	/* A guest can write what looks like a qcow2 image into its raw disk. */
	cr_assert_eq(read_domain("raw", qcow2, &config), -EINVAL);
	cr_assert_not_null(strstr(error.message, "is a qcow2 image"), "%s", error.message);
	cr_assert_eq(read_domain("qcow2", raw, &config), -EINVAL);
	cr_assert_eq(read_domain("raw", "/nowhere", &config), -ENOENT);
	cr_assert_eq(error.class, ERR_NOT_FOUND);
	cr_assert(!strstr(error.message, ":0:"), "%s", error.message);
	cr_assert_eq(domain_read_file("/nowhere.xml", "", &config, &error), -ENOENT);
}

/* What is written is read back as the same machine. */
Test(domain_files, written)
{
	CLEANUP_FREE char *raw = put("a&b", "plain data"), *kernel = put("k", "k");
	CLEANUP_FREE char *cfg = xasprintf("[vm]\nname = web\nmemory = 1073741824\ncpus = 2\nkernel = %s\ncmdline = a<b 'c'\ncpu_model = x86-64-v2\nmemory_backing = small\n"
					   "console = stdio\nrng = yes\nballoon = yes\nvsock_cid = 7\n\n[disk vda]\npath = %s\nreadonly = yes\n\n"
					   "[net net0]\nmode = libvirt\nmac = 52:54:00:00:00:01\nnetwork = default\nqueues = 4\nsend_rate = 2000\n\n[net net1]\nmode = user\n",
					   kernel, raw);
	struct machine_config config, again;
	CLEANUP_BUF struct buf xml = BUF_INIT, back = BUF_INIT;

	cr_assert_eq(config_read_text("cfg", cfg, &config, &error), 0, "%s", error.message);
	cr_assert_eq(domain_write(&config, "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", &xml, &error), 0, "%s", error.message);
	cr_assert_eq(buf_append(&xml, NULL, 1, NULL), 0);
	CLEANUP_FREE char *path = put("out.xml", (char *)xml.data);
	log_set_level(LOG_LEVEL_ERROR);
	cr_assert_eq(domain_read_file(path, "", &again, &error), 0, "%s\n%s", error.message, (char *)xml.data);
	cr_assert_eq(config_to_text(&again, &back, NULL), 0);
	cr_assert_eq(buf_append(&back, NULL, 1, NULL), 0);
	cr_assert_str_eq((char *)back.data, cfg);
	config_free(&config);
	config_free(&again);
}
