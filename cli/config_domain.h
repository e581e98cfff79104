/* The parts of `vmcp config` that deal with libvirt's domains. */
#ifndef VMCP_CLI_CONFIG_DOMAIN_H
#define VMCP_CLI_CONFIG_DOMAIN_H

#include "cli/cli.h"

/* Options: connect. */
int cli_config_convert(struct cli *cli, const char *source, struct err *err);
/* Options: libvirt. */
int cli_config_export(struct cli *cli, const char *vm, struct err *err);

#endif
