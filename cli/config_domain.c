/* config convert and config export: domain XML of libvirt to guest.cfg, and back. */
#include <errno.h>
#include <stdio.h>

#include "base/buf.h"
#include "cli/config_domain.h"
#include "control/domain.h"

static int print(const struct cli *cli, const char *key, struct buf *text, struct err *err)
{
	int rc = buf_append(text, NULL, 1, err);

	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(json_pack("{s:s}", key, (const char *)text->data));
	else
		fputs((const char *)text->data, stdout);
	return 0;
}

int cli_config_convert(struct cli *cli, const char *source, struct err *err)
{
	CLEANUP_BUF struct buf text = BUF_INIT;
	int rc = control_domain_convert(cli_value(cli, "connect"), source, &text, err);

	return rc ? rc : print(cli, "config", &text, err);
}

int cli_config_export(struct cli *cli, const char *vm, struct err *err)
{
	CLEANUP_BUF struct buf xml = BUF_INIT;
	struct store *store;
	int rc;

	if (!cli_given(cli, "libvirt")) {
		err_set(err, ERR_USAGE, EINVAL, "config export: say as what");
		return err_hint(err, "--libvirt: as domain XML");
	}
	rc = cli_open_store(cli, &store, err);
	if (rc)
		return rc;
	rc = control_domain_export(store, vm, &xml, err);
	store_close(store);
	return rc ? rc : print(cli, "xml", &xml, err);
}
