/* verify. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/size.h"
#include "checkpoint/store/verify.h"
#include "cli/cli.h"

#define SHOWN_IDS 8u /* in a line; --json has all */

struct report {
	struct verify_result found;
	bool has_catalog; /* it was looked at: no checkpoint was named */
	char catalog[512];
	uint64_t took_ns;
};

static void show_progress(void *opaque, const char *phase, uint64_t done, uint64_t total)
{
	cli_progress_update(opaque, phase, done, total);
}

static size_t count_damaged(const struct verify_result *found)
{
	size_t count = 0;

	for (size_t i = 0; i < found->checkpoint_count; i++)
		count += found->checkpoints[i].damage_count > 0;
	return count;
}

static bool is_hurt_by(const struct verify_checkpoint *c, size_t damage)
{
	for (size_t i = 0; i < c->damage_count; i++)
		if (c->damages[i] == damage)
			return true;
	return false;
}

/* --- JSON --- */

static json_t *damage_to_json(const struct verify_result *found, size_t number)
{
	const struct verify_damage *damage = &found->damages[number];
	json_t *ids = json_array();

	for (size_t i = 0; i < found->checkpoint_count; i++)
		if (is_hurt_by(&found->checkpoints[i], number))
			json_array_append_new(ids, json_string(found->checkpoints[i].id));
	return json_pack("{s:s, s:I, s:I, s:s, s:o}", "file", damage->file, "offset_bytes", (json_int_t)damage->offset, "length_bytes",
			 (json_int_t)damage->bytes, "message", damage->message, "checkpoints", ids);
}

static json_t *report_to_json(const struct report *report)
{
	const struct verify_result *found = &report->found;
	json_t *checkpoints = json_array(), *damages = json_array(), *unrecorded = json_array();

	for (size_t i = 0; i < found->checkpoint_count; i++) {
		const struct verify_checkpoint *c = &found->checkpoints[i];
		json_t *errors = json_array();

		for (size_t k = 0; k < c->damage_count; k++)
			json_array_append_new(errors, json_string(found->damages[c->damages[k]].message));
		json_array_append_new(checkpoints, json_pack("{s:s, s:b, s:o}", "id", c->id, "ok", c->damage_count == 0, "errors", errors));
	}
	for (size_t i = 0; i < found->damage_count; i++)
		json_array_append_new(damages, damage_to_json(found, i));
	for (size_t i = 0; i < found->unrecorded_count; i++)
		json_array_append_new(unrecorded, json_string(found->unrecorded[i]));
	json_t *all = json_pack("{s:o, s:o, s:o, s:I, s:I, s:I}", "checkpoints", checkpoints, "damages", damages, "unrecorded", unrecorded,
				"files", (json_int_t)found->files, "read_bytes", (json_int_t)found->read_bytes, "verify_ns",
				(json_int_t)report->took_ns);
	if (report->has_catalog)
		json_object_set_new(all, "catalog",
				    json_pack("{s:b, s:o}", "ok", !report->catalog[0], "errors",
					      report->catalog[0] ? json_pack("[s]", report->catalog) : json_array()));
	return all;
}

/* --- text --- */

static void print_sharers(const struct verify_result *found, size_t number)
{
	size_t shown = 0;

	printf("    needed by %zu of them:", found->damages[number].checkpoints);
	for (size_t i = 0; i < found->checkpoint_count && shown < SHOWN_IDS; i++)
		if (is_hurt_by(&found->checkpoints[i], number)) {
			printf(" %.12s", found->checkpoints[i].id);
			shown++;
		}
	printf("%s\n", found->damages[number].checkpoints > shown ? " ..." : "");
}

static void print_report(const struct cli *cli, const struct report *report)
{
	const struct verify_result *found = &report->found;
	double seconds = (double)report->took_ns / 1e9;
	char size[16], rate[16];

	for (size_t i = 0; i < found->checkpoint_count; i++)
		printf("%.12s  %-16s %s\n", found->checkpoints[i].id, found->checkpoints[i].vm[0] ? found->checkpoints[i].vm : "-",
		       found->checkpoints[i].damage_count ? "DAMAGED" : "whole");
	for (size_t i = 0; i < found->damage_count; i++) {
		printf("%s\n", found->damages[i].message);
		print_sharers(found, i);
	}
	if (report->catalog[0])
		printf("%s\n", report->catalog);
	fflush(stdout);
	if (cli->quiet)
		return;
	for (size_t i = 0; i < found->unrecorded_count; i++)
		fprintf(stderr, "vmcp: %s: is needed, but no checksum of it is recorded\n", found->unrecorded[i]);
	cli_format_size(size, found->read_bytes);
	cli_format_size(rate, seconds > 0 ? (uint64_t)((double)found->read_bytes / seconds) : 0);
	fprintf(stderr, "vmcp: %s of %llu files read in %.2f s (%s/s)\n", size, (unsigned long long)found->files, seconds, rate);
}

/* --- the command --- */

static int find_all(struct cli *cli, struct store *store, char (*ids)[STORE_ID_BYTES], struct err *err)
{
	for (int i = 0; i < cli->argument_count; i++) {
		const char *reference = cli->arguments[i];
		struct err why = ERR_INIT;
		int rc = store_resolve(store, reference, ids[i], &why);

		/* One whose manifest is damaged may be unknown to the catalogue; it goes by its whole id. */
		if (rc == -ENOENT && strlen(reference) == STORE_ID_BYTES - 1 && store_has_folder(store, reference))
			snprintf(ids[i], STORE_ID_BYTES, "%s", reference);
		else if (rc) {
			if (err)
				*err = why;
			return rc;
		}
	}
	return 0;
}

static int look(struct cli *cli, uint64_t max_rate, struct report *report, struct err *err)
{
	struct cli_progress progress = cli_progress_begin(cli, "verify");
	struct verify_options options = {.max_rate = max_rate, .progress = show_progress, .opaque = &progress};
	char(*ids)[STORE_ID_BYTES] = xcalloc((size_t)cli->argument_count + 1, sizeof(*ids));
	struct store *store;
	uint64_t started_ns = clock_now_ns();
	struct store_key *key;
	int rc = cli_store_key(cli, &key, err);

	if (!rc)
		rc = store_open_with_key(cli->store_path, false, key, &store, err);
	if (!rc) {
		rc = find_all(cli, store, ids, err);
		if (!rc)
			rc = store_verify(store, cli->argument_count ? ids : NULL, (size_t)cli->argument_count, &options, &report->found, err);
		report->has_catalog = cli->argument_count == 0;
		if (!rc && report->has_catalog)
			rc = store_verify_catalog(store, report->catalog, err);
		store_close(store);
	}
	cli_progress_end(&progress);
	free(ids);
	report->took_ns = clock_now_ns() - started_ns;
	return rc;
}

static int conclude(const struct report *report, struct err *err)
{
	const struct verify_result *found = &report->found;
	size_t damaged = count_damaged(found);

	if (damaged) {
		err_set(err, ERR_DAMAGED, EBADMSG, "verify: %zu of %zu checkpoints are damaged", damaged, found->checkpoint_count);
		if (damaged < found->checkpoint_count)
			err_hint(err, "those that are whole share nothing that is damaged: start from one with `vmcp run --from`; `vmcp rm` the others");
		else
			err_hint(err, "what is damaged is named above: put it back from a backup, or `vmcp rm` them");
		return -EBADMSG;
	}
	if (report->catalog[0]) {
		err_set(err, ERR_DAMAGED, EBADMSG, "verify: the catalogue is damaged, the checkpoints are whole");
		return err_hint(err, "`vmcp gc --rebuild` makes it anew");
	}
	return 0;
}

static int run_verify(struct cli *cli, struct err *err)
{
	const char *rate_text = cli_value(cli, "max-rate");
	struct report report = {0};
	uint64_t rate = 0;

	if (rate_text && (!size_parse(rate_text, &rate) || rate == 0 || rate > INT64_MAX)) {
		err_set(err, ERR_USAGE, EINVAL, "--max-rate: '%s' is no rate", rate_text);
		return err_hint(err, SIZE_HINT " a second");
	}
	cli_allow_many_files(); /* damaged checkpoints are held while they are looked at again */
	int rc = look(cli, rate, &report, err);
	if (rc)
		return rc;
	if (cli->json)
		cli_print_json(report_to_json(&report));
	else
		print_report(cli, &report);
	rc = conclude(&report, err);
	if (rc && cli->json && err)
		err->message[0] = '\0'; /* the document has it */
	verify_result_free(&report.found);
	return rc;
}

static const struct cli_option verify_options[] = {
	{"max-rate", 0, "SIZE", "read at most so many bytes a second, such as 100M"},
	{0},
};

const struct cli_command cli_verify = {
	.name = "verify",
	.synopsis = "[CKPT...] [--max-rate SIZE]",
	.summary = "read and check every byte that checkpoints need, disks included",
	.help = "Without CKPT: of all checkpoints, and the catalogue. Each file is read once, however many need it. Names each damaged file\n"
		"and range, and the checkpoints that share it; the exit status then is 5. Safe while VMs run.\n\n"
		"Examples:\n"
		"    vmcp verify\n"
		"    vmcp verify before-upgrade --max-rate 200M",
	.options = verify_options,
	.words = "@ckpt",
	.max_arguments = CLI_MAX_ARGUMENTS,
	.json =
		"checkpoints [id, ok, errors], damages [file, offset_bytes, length_bytes, message, checkpoints], unrecorded, files, read_bytes, "
		"verify_ns, catalog? {ok, errors}",
	.run = run_verify,
};
