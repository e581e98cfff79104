/* config: writes a guest.cfg to begin with; configurations of VMs in other forms. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"
#include "cli/cli.h"
#include "cli/config_domain.h"

#define DEFAULT_FILE "guest.cfg"

/* Every key that there is; what has no value by default is a comment. tests/cli/config_test.py holds it against docs/guest-cfg.md. */
static const char head[] = "# What machine `vmcp run %s` builds. guest.cfg(5) tells all of it.\n"
			   "# Sizes take K, M, G and T; paths are relative to this file; what follows a # is a comment.\n\n";

static const char vm_rest[] =
	"cpu_model = host            # or x86-64-v1, -v2, -v3: its checkpoints start on every host of that level\n"
	"memory_backing = small      # small, thp (2 MiB pages where there are some) or hugetlb (from the host's pool)\n"
	"console = stdio             # stdio, or socket: `vmcp console` only\n"
	"rng = yes                   # a random number device\n"
	"balloon = no                # the host gets back memory that the guest does not use\n"
	"# vsock_cid = 3             # sockets between guest and host; many VMs may have the same number\n"
	"# hostname = web            # what vmcp-agent in the guest calls it when it is another machine\n"
	"# libvirt = qemu:///system  # whose networks and volumes are meant, where some are named\n\n";

static const char disks_rest[] =
	"# Several disks: the guest sees them in this order, as vda, vdb, ...\n"
	"# [disk data]\n"
	"# base = debian.qcow2       # read-only, shared by many VMs; what this VM writes is kept in the store\n"
	"# detect_zeroes = yes       # a write of nothing but zeroes takes no space\n"
	"# [disk seed]\n"
	"# path = seed.iso\n"
	"# readonly = yes\n\n";

static const char nets[] =
	"# [net lan]\n"
	"# mode = user               # user: no privileges needed; tap, bridge: of the host; none: no card\n"
	"# forward = tcp:2222:22     # a port of the host's 127.0.0.1 that leads to one of the guest; may be repeated\n"
	"# multiplex = tcp:80:22     # a port of the host that several VMs share; 'vmcp mux' shows how; may be repeated\n"
	"# mac = 52:54:00:12:34:56   # chosen if it is not given\n"
	"# queues = 2                # pairs of queues, as many as the guest has CPUs\n"
	"# send_rate = 10M           # bytes a second; 0: no limit\n"
	"# receive_rate = 10M\n"
	"# [net wan]\n"
	"# mode = tap\n"
	"# tap = vmtap0\n"
	"# [net office]\n"
	"# mode = bridge\n"
	"# bridge = br0\n"
	"# ip = 10.0.0.5/24          # what vmcp-agent in the guest gives the card; not with mode = user\n"
	"# [net virt]\n"
	"# mode = libvirt\n"
	"# network = default         # of libvirt\n\n";

static const char checkpoints[] =
	"# [checkpoint]\n"
	"# every = 30s               # periodic live checkpoints\n"
	"# keep = 20                 # how many of these stay\n"
	"# keep_hourly = 24          # and the newest of each of so many hours\n"
	"# keep_daily = 7            # and days\n";

/* "key = value" and, in its column, a comment; commented out itself where there is no value. */
static int add_key(struct buf *out, const char *key, const char *value, const char *otherwise, const char *comment, struct err *err)
{
	CLEANUP_FREE char *line = xasprintf("%s%s = %s", value ? "" : "# ", key, value ? value : otherwise);
	CLEANUP_FREE char *all = xasprintf("%-27s # %s\n", line, comment);

	return buf_append(out, all, strlen(all), err);
}

static int add_text(struct buf *out, const char *text, struct err *err) { return buf_append(out, text, strlen(text), err); }

static int write_text(const struct cli *cli, const char *path, struct buf *out, struct err *err)
{
	const char *memory = cli_value(cli, "memory"), *cpus = cli_value(cli, "cpus"), *kernel = cli_value(cli, "kernel");
	const char *disk = cli_value(cli, "disk"), *name = cli_value(cli, "name");
	CLEANUP_FREE char *first = xasprintf(head, strcmp(path, "-") ? path : DEFAULT_FILE);
	int rc = add_text(out, first, err);

	if (!rc)
		rc = add_text(out, "[vm]\n", err);
	if (!rc)
		rc = add_key(out, "name", name, "web", "what all commands call it; default: this file's name", err);
	if (!rc)
		rc = add_key(out, "memory", memory ? memory : "512M", NULL, "16M to 1024G", err);
	if (!rc)
		rc = add_key(out, "cpus", cpus ? cpus : "1", NULL, "1 to 64", err);
	if (!rc)
		rc = add_key(out, "kernel", kernel ? kernel : "vmlinuz", NULL, "a bzImage, or an ELF with a PVH entry note", err);
	if (!rc)
		rc = add_key(out, "initrd", cli_value(cli, "initrd"), "initrd.img", "initial RAM disk", err);
	if (!rc)
		rc = add_key(out, "cmdline", "console=ttyS0 root=/dev/vda rw", NULL, "the kernel's command line", err);
	if (!rc)
		rc = add_text(out, vm_rest, err);
	if (!rc)
		rc = add_text(out, disk ? "[disk root]\n" : "# [disk root]\n", err);
	if (!rc)
		rc = add_key(out, "path", disk, "root.qcow2", "this file always holds the present state", err);
	if (!rc)
		rc = add_text(out, "\n", err);
	if (!rc)
		rc = add_text(out, disks_rest, err);
	if (!rc)
		rc = add_text(out, nets, err);
	return rc ? rc : add_text(out, checkpoints, err);
}

/* Never over what somebody wrote, unless told to. */
static int put_file(const char *path, const struct buf *text, bool force, struct err *err)
{
	CLEANUP_CLOSE int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | (force ? O_TRUNC : O_EXCL), 0644);

	if (fd < 0 && errno == EEXIST) {
		err_set(err, ERR_STATE, EEXIST, "%s: is there already", path);
		return err_hint(err, "name another file, or replace it with --force");
	}
	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	return file_pwrite_full(fd, text->data, text->length, 0, err);
}

static int run_init(struct cli *cli, const char *path, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = write_text(cli, path, &text, err);

	if (rc)
		return rc;
	if (!strcmp(path, "-")) {
		fwrite(text.data, 1, text.length, stdout);
		return 0;
	}
	rc = put_file(path, &text, cli_given(cli, "force"), err);
	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s}", "path", path));
	else if (!cli->quiet)
		fprintf(stderr, "vmcp: %s is written: look through it, then `vmcp run --dry-run %s`\n", path, path);
	return 0;
}

static int run_config(struct cli *cli, struct err *err)
{
	const char *what = cli->arguments[0];

	if (!strcmp(what, "init"))
		return run_init(cli, cli->argument_count > 1 ? cli->arguments[1] : DEFAULT_FILE, err);
	if (cli->argument_count == 2 && !strcmp(what, "convert"))
		return cli_config_convert(cli, cli->arguments[1], err);
	if (cli->argument_count == 2 && !strcmp(what, "export"))
		return cli_config_export(cli, cli->arguments[1], err);
	if (!strcmp(what, "convert") || !strcmp(what, "export")) {
		err_set(err, ERR_USAGE, EINVAL, "config %s: something is missing", what);
		return err_hint(err, "usage: vmcp config %s", cli->command->synopsis);
	}
	return cli_unknown_verb(cli, err);
}

static const struct cli_option config_options[] = {
	{"name", 0, "NAME", "init: name of the VM"},
	{"memory", 0, "SIZE", "init: the guest's memory, such as 2G"},
	{"cpus", 0, "N", "init: virtual CPUs"},
	{"kernel", 0, "FILE", "init: the kernel", "@file"},
	{"initrd", 0, "FILE", "init: the initial RAM disk", "@file"},
	{"disk", 0, "FILE", "init: the image of the first disk", "@file"},
	{"force", 'f', NULL, "init: replace a file that is there"},
	{"connect", 0, "URI", "convert: the domain is one of this libvirt, not a file"},
	{"libvirt", 0, NULL, "export: as domain XML"},
	{0},
};

const struct cli_command cli_config = {
	.name = "config",
	.synopsis = "init [FILE|-] [--name NAME] [--memory SIZE] [--cpus N] [--kernel FILE] [--initrd FILE] [--disk FILE] [--force] | convert DOMAIN.XML | "
		    "convert --connect URI DOMAIN | export --libvirt VM",
	.summary = "write a guest.cfg to begin with; turn libvirt domains into VMs and back",
	.help = "init writes a guest.cfg in which every key is explained. FILE is guest.cfg if it is not given; - is stdout. Nothing is overwritten\n"
		"without --force.\n\n"
		"convert prints the guest.cfg that `vmcp run` makes of a domain, and says what it does not honour.\n\n"
		"Examples:\n"
		"    vmcp config init guest.cfg --name web --memory 1G --kernel vmlinuz --initrd initrd.img --disk root.qcow2\n"
		"    vmcp run --dry-run guest.cfg\n"
		"    vmcp config convert web.xml >web.cfg\n"
		"    vmcp config export --libvirt web >web.xml && virsh define web.xml",
	.words = "init|convert|export @file|@vm",
	.options = config_options,
	.min_arguments = 1,
	.max_arguments = 2,
	.json = "path | config | xml",
	.run = run_config,
};
