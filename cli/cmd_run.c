#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "cli/cli.h"
#include "control/process.h"

static int print_plan(struct cli *cli, const struct process_options *options, struct err *err)
{
	json_t *plan;
	int rc = process_plan(options, &plan, err);

	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(plan);
		return 0;
	}
	fputs(json_string_value(json_object_get(plan, "config")), stdout);
	json_decref(plan);
	return 0;
}

static int run(struct cli *cli, struct err *err)
{
	struct process_options options = {
		.store_path = cli->store_path,
		.config_path = cli->argument_count ? cli->arguments[0] : NULL,
		.from = cli_value(cli, "from"),
		.connect = cli_value(cli, "connect"),
		.name = cli_value(cli, "name"),
		.memory_backing = cli_value(cli, "memory-backing"),
		.every = cli_value(cli, "every"),
		.keep = cli_value(cli, "keep"),
		.net = cli_value(cli, "net"),
		.detach = cli_given(cli, "detach"),
		.started_ns = cli->started_ns,
	};
	struct process_result result;

	if (!options.config_path == !options.from || (options.connect && options.from)) {
		err_set(err, ERR_USAGE, EINVAL, "run: name either a configuration or --from CKPT");
		return err_hint(err, "usage: vmcp run %s", cli->command->synopsis);
	}
	if (cli_given(cli, "dry-run"))
		return print_plan(cli, &options, err);
	int rc = cli_store_key(cli, &options.store_key, err);
	if (!rc)
		rc = process_run(&options, &result, err);
	if (rc || !options.detach)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s, s:i, s:s, s:I}", "vm", result.vm, "pid", result.pid, "socket",
					 result.socket, "boot_ns", (json_int_t)result.boot_ns));
	else
		printf("%s\n", result.vm);
	free(result.socket);
	return 0;
}

static const struct cli_option options[] = {
	{"detach", 'd', NULL, "return once the guest runs, and print the VM's name"},
	{"connect", 0, "URI", "run a domain of this libvirt, such as qemu:///system"},
	{"dry-run", 'n', NULL, "print the machine that would be built, and start nothing"},
	{"from", 0, "CKPT", "start from a checkpoint instead of booting", "@ckpt"},
	{"memory-backing", 0, "B", "small, thp or hugetlb, whatever the configuration or the checkpoint says", "small|thp|hugetlb"},
	{"net", 0, "SETTING", "NAME:KEY=VALUE[,...]: other settings of network cards, such as lan:forward=tcp:8081:80"},
	{"name", 0, "NAME", "name of the VM (default: the configuration's)"},
	{"every", 0, "TIME", "take a live checkpoint at this interval, such as 30s or 50ms; 0: never (default: the configuration's)"},
	{"keep", 0, "N", "how many of these to keep (default: the configuration's, else 20)"},
	{0},
};

const struct cli_command cli_run = {
	.name = "run",
	.synopsis = "GUEST.CFG | DOMAIN.XML | --connect URI DOMAIN | --from CKPT  [--detach] [--dry-run] [--name NAME] [--memory-backing B] [--net SETTING] [--every TIME] [--keep N]",
	.summary = "boot a VM, or start one from a checkpoint",
	.help = "In the foreground the guest's serial console is on stdin and stdout; Ctrl-] ends the VM. With --from "
		"and another\n"
		"--name the new VM gets disks of its own in the store; without one it takes the place of the VM that "
		"was saved.\n\n"
		"A libvirt domain is read from its XML, or from libvirt, and stays as it is there. What is not honoured is named.\n\n"
		"With --dry-run all that can be found wrong without starting it is told, and the machine is printed as a guest.cfg with every key.\n\n"
		"A small guest.cfg:\n"
		"    [vm]\n"
		"    name = web\n"
		"    memory = 512M\n"
		"    kernel = vmlinuz\n"
		"    initrd = initrd.img\n"
		"    cmdline = console=ttyS0 root=/dev/vda rw\n"
		"    [disk root]\n"
		"    path = root.qcow2\n\n"
		"Examples:\n"
		"    vmcp run guest.cfg\n"
		"    vmcp run --detach guest.cfg && vmcp console web\n"
		"    vmcp run --connect qemu:///system web --detach\n"
		"    vmcp run --from before-upgrade --name try2 --detach\n"
		"    vmcp run --every 50ms --keep 20 guest.cfg",
	.options = options,
	.words = "@file",
	.max_arguments = 1,
	.json =
		"vm, pid, socket, boot_ns | vm, from, memory_bytes, cpus, cpu_model, memory_backing, kernel, initrd, cmdline, rng, balloon, disks "
		"[name, path, base, readonly], nets [name, mode], every_ns, keep, config",
	.run = run,
};
