/* rekey. */
#include <stdio.h>

#include "cli/cli.h"

static int change(struct cli *cli, struct store *store, struct err *err)
{
	const char *path = cli->arguments[0];
	struct store_key *now;
	int rc = cli_read_store_key("rekey", path, true, &now, err);

	if (rc)
		return rc;
	rc = store_change_key(store, cli->store_key, now, err);
	store_key_free(now);
	if (!rc && cli->json)
		cli_print_json(json_pack("{s:s, s:s}", "store", store_path(store), "key_file", path));
	else if (!rc && !cli->quiet)
		printf("the key of %s has changed\n", store_path(store));
	return rc;
}

static int run_rekey(struct cli *cli, struct err *err)
{
	struct store *store;
	int rc = cli_open_store_with_key(cli, false, &store, err);

	if (rc)
		return rc;
	rc = change(cli, store, err);
	store_close(store);
	return rc;
}

const struct cli_command cli_rekey = {
	.name = "rekey",
	.synopsis = "FILE|-",
	.summary = "change the key of an encrypted store to that in FILE, - to be asked for it",
	.help = "--store-key names the present key. What is in the store is encrypted with a key of the store's own, and that one with yours: only it is\n"
		"encrypted anew, which takes a second, and VMs that run, run on. From then on the old key opens nothing. Keep it\n"
		"until the command has ended well: if it was interrupted, one of the two is the store's.\n\n"
		"Who has a copy of the store's file `format` from before, and the old key, can still read the store. Where the old key is in other hands, export the\n"
		"checkpoints, and import them into a new store.\n\n"
		"Example:\n"
		"    head -c 32 /dev/urandom | base64 >new.key && vmcp rekey new.key --store-key store.key",
	.words = "@file",
	.min_arguments = 1,
	.max_arguments = 1,
	.json = "store, key_file",
	.run = run_rekey,
};
