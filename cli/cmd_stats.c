/* stats: what a running VM counts, as text, as JSON, and for Prometheus. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "cli/cli.h"
#include "control/client.h"

/* --- text --- */

static void print_figure(const char *key, const char *part, const json_t *value)
{
	CLEANUP_FREE char *name = xasprintf(part ? "%s.%s" : "%s", key, part);

	if (json_is_integer(value))
		printf("%-28s %lld\n", name, (long long)json_integer_value(value));
	else if ((part || !strcmp(key, "memory_backing")) && json_is_string(value))
		printf("%-28s %s\n", name, json_string_value(value));
}

/* Of an object each figure; of a list each member's, by its name: nets.lan.sent_bytes. */
static void print_parts(const char *key, json_t *value)
{
	const char *part;
	json_t *figure, *member;
	size_t i;

	json_object_foreach(value, part, figure)
		print_figure(key, part, figure);
	json_array_foreach(value, i, member)
	{
		CLEANUP_FREE char *name = xasprintf("%s.%s", key, json_string_value(json_object_get(member, "name")));

		print_parts(name, member);
	}
}

static int run_text(struct cli *cli, struct err *err)
{
	char name[STORE_NAME_BYTES];
	json_t *result, *value;
	const char *key;
	int rc = cli_call_vm(cli, "vm.stats", NULL, name, &result, err);

	if (rc)
		return rc;
	if (cli->json) {
		cli_print_json(result);
		return 0;
	}
	json_object_foreach(result, key, value)
	{
		print_figure(key, NULL, value);
		print_parts(key, value);
	}
	json_decref(result);
	return 0;
}

/* --- Prometheus --- */

struct sample {
	struct store_vm vm;
	json_t *stats; /* NULL: it does not run, or did not answer */
};

/* Where the figure is: `key` of the answer; of each member of the list `list`, labelled `label`; or of the object `list` without a label. */
static const struct metric {
	const char *name, *type, *list, *label, *key, *help;
	bool nanoseconds; /* told in seconds */
} metrics[] = {
	{"exits_total", "counter", NULL, NULL, "exits", "Exits of vCPUs", false},
	{"io_exits_total", "counter", NULL, NULL, "io_exits", "Exits for port I/O", false},
	{"mmio_exits_total", "counter", NULL, NULL, "mmio_exits", "Exits for memory-mapped I/O", false},
	{"halts_total", "counter", NULL, NULL, "halts", "Exits as the guest had nothing to do", false},
	{"memory_allocated_bytes", "gauge", NULL, NULL, "memory_allocated_bytes", "Host memory that guest memory takes", false},
	{"written_pages_per_second", "gauge", NULL, NULL, "written_pages_per_s", "Different pages that the guest writes, as last measured", false},
	{"throttled_total", "counter", NULL, NULL, "throttled", "Write faults that waited for a buffer", false},
	{"throttled_seconds_total", "counter", NULL, NULL, "throttled_ns", "How long those waited", true},
	{"periodic_taken_total", "counter", "periodic", NULL, "taken", "Periodic checkpoints", false},
	{"periodic_skipped_total", "counter", "periodic", NULL, "skipped", "Instants of periodic checkpoints that were left out", false},
	{"periodic_failed_total", "counter", "periodic", NULL, "failed", "Periodic checkpoints that failed", false},
	{"disk_reads_total", "counter", "disks", "disk", "reads", "Reads that the guest was answered", false},
	{"disk_read_bytes_total", "counter", "disks", "disk", "read_bytes", "Bytes of these", false},
	{"disk_writes_total", "counter", "disks", "disk", "writes", "Writes that the guest was answered", false},
	{"disk_written_bytes_total", "counter", "disks", "disk", "written_bytes", "Bytes of these", false},
	{"disk_flushes_total", "counter", "disks", "disk", "flushes", "Flushes that the guest was answered", false},
	{"disk_errors_total", "counter", "disks", "disk", "errors", "Requests that failed", false},
	{"net_sent_frames_total", "counter", "nets", "net", "sent_frames", "Frames that the guest sent", false},
	{"net_sent_bytes_total", "counter", "nets", "net", "sent_bytes", "Bytes of these", false},
	{"net_received_frames_total", "counter", "nets", "net", "received_frames", "Frames that the guest got", false},
	{"net_received_bytes_total", "counter", "nets", "net", "received_bytes", "Bytes of these", false},
	{"net_receive_drops_total", "counter", "nets", "net", "receive_drops", "Frames that did not fit into the guest's buffers", false},
};

static const struct {
	const char *name, *key, *help;
} histograms[] = {
	{"pause_seconds", "pause", "How long the VM stood still for live checkpoints"},
	{"cow_fault_seconds", "cow_fault", "How long a write waited for its page to be saved"},
};

static void put_head(FILE *out, const char *name, const char *type, const char *help)
{
	fprintf(out, "# HELP vmcp_%s %s.\n# TYPE vmcp_%s %s\n", name, help, name, type);
}

/* Names have no character that a label would not take. */
static void put_figure(FILE *out, const struct metric *m, const char *vm, const char *member, const json_t *value)
{
	if (!json_is_integer(value))
		return;
	fprintf(out, "vmcp_%s{vm=\"%s\"", m->name, vm);
	if (member)
		fprintf(out, ",%s=\"%s\"", m->label, member);
	if (m->nanoseconds)
		fprintf(out, "} %.9f\n", (double)json_integer_value(value) / 1e9);
	else
		fprintf(out, "} %lld\n", (long long)json_integer_value(value));
}

static void put_metric(FILE *out, const struct metric *m, const struct sample *samples, size_t count)
{
	put_head(out, m->name, m->type, m->help);
	for (size_t i = 0; i < count; i++) {
		const json_t *from = m->list ? json_object_get(samples[i].stats, m->list) : samples[i].stats;
		json_t *member;
		size_t k;

		if (!m->label)
			put_figure(out, m, samples[i].vm.name, NULL, json_object_get(from, m->key));
		else
			json_array_foreach(from, k, member)
				put_figure(out, m, samples[i].vm.name, json_string_value(json_object_get(member, "name")), json_object_get(member, m->key));
	}
}

static void put_histogram(FILE *out, const char *name, const char *vm, const json_t *latency)
{
	long long count = json_integer_value(json_object_get(latency, "count"));
	json_t *pair;
	size_t i;

	json_array_foreach(json_object_get(latency, "below"), i, pair)
		fprintf(out, "vmcp_%s_bucket{vm=\"%s\",le=\"%.9f\"} %lld\n", name, vm, (double)json_integer_value(json_array_get(pair, 0)) / 1e9,
			(long long)json_integer_value(json_array_get(pair, 1)));
	fprintf(out, "vmcp_%s_bucket{vm=\"%s\",le=\"+Inf\"} %lld\n", name, vm, count);
	fprintf(out, "vmcp_%s_sum{vm=\"%s\"} %.9f\n", name, vm, (double)json_integer_value(json_object_get(latency, "sum_ns")) / 1e9);
	fprintf(out, "vmcp_%s_count{vm=\"%s\"} %lld\n", name, vm, count);
}

static void put_all(FILE *out, const struct sample *samples, size_t count)
{
	put_head(out, "up", "gauge", "1 for a VM that runs and answers");
	for (size_t i = 0; i < count; i++)
		fprintf(out, "vmcp_up{vm=\"%s\",state=\"%s\"} %d\n", samples[i].vm.name, samples[i].vm.state, samples[i].stats != NULL);
	put_head(out, "memory_bytes", "gauge", "Memory of the guest");
	for (size_t i = 0; i < count; i++)
		fprintf(out, "vmcp_memory_bytes{vm=\"%s\"} %llu\n", samples[i].vm.name, (unsigned long long)samples[i].vm.memory_bytes);
	for (size_t m = 0; m < ARRAY_LENGTH(metrics); m++)
		put_metric(out, &metrics[m], samples, count);
	for (size_t h = 0; h < ARRAY_LENGTH(histograms); h++) {
		put_head(out, histograms[h].name, "histogram", histograms[h].help);
		for (size_t i = 0; i < count; i++)
			if (samples[i].stats)
				put_histogram(out, histograms[h].name, samples[i].vm.name, json_object_get(samples[i].stats, histograms[h].key));
	}
}

/* Of all VMs of the store, or the one that is named. One that does not answer is no failure: its "up" says so. */
static int read_samples(struct cli *cli, struct sample **out, size_t *count, struct err *err)
{
	const char *wanted = cli->argument_count ? cli->arguments[0] : NULL;
	struct store_vm *list = NULL, one;
	struct store *store;
	int rc = cli_open_store(cli, &store, err);

	*out = NULL;
	*count = 0;
	if (rc)
		return rc == -ENOENT && !wanted ? 0 : rc;
	if (wanted) {
		rc = store_vm_get(store, wanted, &one, err);
		list = &one;
		*count = 1;
	} else
		rc = store_vm_list(store, &list, count, err);
	if (!rc) {
		*out = xcalloc(*count + 1, sizeof(**out));
		for (size_t i = 0; i < *count; i++)
			(*out)[i] = (struct sample){.vm = list[i], .stats = list[i].alive ? control_ask(store, list[i].name, "vm.stats") : NULL};
	} else
		*count = 0;
	if (!wanted && !rc)
		free(list);
	store_close(store);
	return rc;
}

static int run_prometheus(struct cli *cli, struct err *err)
{
	const char *path = cli_value(cli, "output");
	CLEANUP_FREE char *text = NULL;
	struct sample *samples;
	size_t length = 0, count;
	int rc = read_samples(cli, &samples, &count, err);

	if (rc)
		return rc;
	FILE *out = open_memstream(&text, &length);
	if (out) {
		put_all(out, samples, count);
		rc = fclose(out) ? err_sys(err, ENOMEM, "stats") : 0;
	} else
		rc = err_sys(err, errno, "stats");
	for (size_t i = 0; i < count; i++) {
		json_decref(samples[i].stats);
		store_vm_free(&samples[i].vm);
	}
	free(samples);
	if (!rc && path)
		rc = cli_replace_file(path, text, length, err);
	else if (!rc)
		fwrite(text, 1, length, stdout);
	return rc;
}

static int run_stats(struct cli *cli, struct err *err)
{
	if (cli_given(cli, "prometheus")) {
		if (!cli->json)
			return run_prometheus(cli, err);
		err_set(err, ERR_USAGE, EINVAL, "stats: --prometheus and --json are two forms of the same");
		return err_hint(err, "leave one of them out");
	}
	if (!cli_given(cli, "output"))
		return run_text(cli, err);
	err_set(err, ERR_USAGE, EINVAL, "stats: --output is for --prometheus");
	return err_hint(err, "redirect stdout: vmcp stats --json web > FILE");
}

static const struct cli_option stats_options[] = {
	{"prometheus", 0, NULL, "as Prometheus reads it; of all VMs where none is named"},
	{"output", 'o', "FILE", "with --prometheus: replace FILE, whole, instead of writing to stdout", "@file"},
	{0},
};

const struct cli_command cli_stats = {
	.name = "stats",
	.synopsis = "[VM] [--prometheus] [--output FILE]",
	.summary = "counters of a running VM",
	.help = "Exits, pauses and write faults of live checkpoints, disks, network cards: docs/control.md says what each is. For a live view: vmcp top.\n\n"
		"Examples:\n"
		"    vmcp stats web\n"
		"    vmcp stats --prometheus --output /var/lib/prometheus/node-exporter/vmcp.prom",
	.words = "@running",
	.options = stats_options,
	.max_arguments = 1,
	.json = "vm, ...",
	.run = run_stats,
};
