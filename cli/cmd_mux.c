/* mux: what multiplexers do; and __mux, the process of one (control/mux.h). */
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "cli/cli.h"
#include "control/mux.h"

static const char *text_of(const json_t *object, const char *key)
{
	const char *text = json_string_value(json_object_get(object, key));

	return text ? text : "-";
}

static long long number_of(const json_t *object, const char *key) { return (long long)json_integer_value(json_object_get(object, key)); }

static void print_one(const json_t *mux)
{
	const json_t *one;
	size_t i;

	printf("%s  %s  (process %lld)\n    %-24s %-22s %11s %8s\n", text_of(mux, "host"), text_of(mux, "sharing"), number_of(mux, "pid"), "VM", "PORT",
	       "CONNECTIONS", "TOTAL");
	json_array_foreach(json_object_get(mux, "members"), i, one)
		printf("    %-24s %-22s %11lld %8lld\n", text_of(one, "vm"), text_of(one, "host"), number_of(one, "connections"), number_of(one, "total"));
	if (!json_array_size(json_object_get(mux, "connections")))
		return;
	printf("    %-24s %-24s %-22s %8s %s\n", "CLIENT", "VM", "PORT", "AGE", "NAME");
	json_array_foreach(json_object_get(mux, "connections"), i, one)
	{
		char age[16];

		cli_format_age(age, (uint64_t)number_of(one, "age_ns"));
		printf("    %-24s %-24s %-22s %8s %s\n", text_of(one, "client"), text_of(one, "vm"), text_of(one, "host"), age, text_of(one, "name"));
	}
}

static int run_mux(struct cli *cli, struct err *err)
{
	struct store *store;
	json_t *list = NULL;
	const json_t *one;
	size_t i;
	int rc = cli_open_store(cli, &store, err);

	if (rc)
		return rc;
	rc = mux_list(store, &list, err);
	store_close(store);
	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(json_pack("{s:o}", "multiplexers", list));
		return 0;
	}
	json_array_foreach(list, i, one)
		print_one(one);
	json_decref(list);
	return 0;
}

/* In a child, so that whoever started this program, and waits for its end, is not its parent as long as it serves. */
static int run_serve(struct cli *cli, struct err *err)
{
	int report = dup(STDOUT_FILENO);
	pid_t pid = report < 0 ? -1 : fork();

	if (pid < 0)
		return err_sys(err, errno, "multiplexer");
	dup2(STDIN_FILENO, STDOUT_FILENO); /* it stays taken: no file of the store gets its number */
	if (pid > 0)
		_exit(0);
	cli_allow_many_files();
	int rc = mux_serve(cli->store_path, cli->arguments[0], report, err);
	/* Threads of its connections may still run. */
	if (!rc)
		_exit(0);
	return rc;
}

const struct cli_command cli_mux = {
	.name = "mux",
	.synopsis = "",
	.summary = "show the ports that VMs share, and who is connected to which",
	.help = "A multiplexer listens at a port of the host and gives each new connection to one of the VMs that share it:\n"
		"by turns, to the one with the fewest connections, or by the name that the client asks for.\n"
		"It begins with the first VM and ends with the last. `multiplex` in guest.cfg and in rules of clones share a port.\n\n"
		"Example:\n"
		"    echo 'port:lan/tcp/80 any multiplex 8080:least' > web.rules && vmcp clone web --count 4 --rules web.rules",
	.json = "multiplexers [host, sharing, pid, members [vm, host, connections, total], connections [client, vm, host, name, age_ns]]",
	.run = run_mux,
};
const struct cli_command cli_mux_serve = {
	.name = "__mux",
	.synopsis = "PLACE",
	.summary = "be a multiplexer",
	.help = "Started by VMs that share a port.",
	.words = "@any",
	.min_arguments = 1,
	.max_arguments = 1,
	.hidden = true,
	.run = run_serve,
};
