/* config: configurations of VMs in other forms. */
#include <errno.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/config_domain.h"

static int run_config(struct cli *cli, struct err *err)
{
	const char *what = cli->arguments[0];

	if (cli->argument_count == 2 && !strcmp(what, "convert"))
		return cli_config_convert(cli, cli->arguments[1], err);
	if (cli->argument_count == 2 && !strcmp(what, "export"))
		return cli_config_export(cli, cli->arguments[1], err);
	err_set(err, ERR_USAGE, EINVAL, "config: '%s' is neither convert nor export, or its argument is missing", what);
	return err_hint(err, "usage: vmcp config %s", cli->command->synopsis);
}

static const struct cli_option config_options[] = {
	{"connect", 0, "URI", "convert: the domain is one of this libvirt, not a file"},
	{"libvirt", 0, NULL, "export: as domain XML"},
	{0},
};

const struct cli_command cli_config = {
	.name = "config",
	.synopsis = "convert DOMAIN.XML | convert --connect URI DOMAIN | export --libvirt VM",
	.summary = "a libvirt domain as guest.cfg, a VM as libvirt domain",
	.help = "convert prints the guest.cfg that `vmcp run` makes of a domain, and says what it does not honour.\n\n"
		"Examples:\n"
		"    vmcp config convert web.xml >web.cfg\n"
		"    vmcp config export --libvirt web >web.xml && virsh define web.xml",
	.options = config_options,
	.min_arguments = 1,
	.max_arguments = 2,
	.run = run_config,
};
