/*
 * top: a live view of the VMs that run. Each turn asks every VM for its counters and draws a frame; rates are the differences to the turn before.
 *
 * On a terminal frames replace each other on the alternate screen, in colour if that may be; signals come through a descriptor, so that however it ends,
 * and while it is stopped, the terminal is as it was. Elsewhere frames follow each other as plain text.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/duration.h"
#include "base/terminal.h"
#include "cli/cli.h"
#include "control/client.h"

#define DEFAULT_INTERVAL_NS 1000000000ull
#define FIRST_INTERVAL_NS   200000000ull /* so that the first frame has rates soon */
#define MIN_INTERVAL_NS	    100000000ull
#define NARROW_COLUMNS	    80 /* below: fewer columns */
#define BAR_WIDTH	    16

/* A VM at one instant. */
struct sample {
	struct store_vm vm;
	json_t *stats; /* NULL: it does not run, or did not answer */
	uint64_t cpu_ns, taken_ns;
};

struct samples {
	struct sample *list;
	size_t count;
};

struct top {
	struct cli *cli;
	struct store *store;
	const char *wanted; /* one VM only, or NULL */
	struct samples before, now;
	struct terminal_size size;
	bool screen, colour;
	struct termios terminal;
	bool terminal_set;
	int signal_fd;
};

/* --- asking --- */

static uint64_t read_cpu_ns(int pid)
{
	CLEANUP_FREE char *path = xasprintf("/proc/%d/stat", pid);
	unsigned long user = 0, system = 0;
	char text[1024];
	FILE *file = fopen(path, "re");

	if (!file)
		return 0;
	size_t n = fread(text, 1, sizeof(text) - 1, file);
	fclose(file);
	text[n] = '\0';
	/* Behind the name, which may hold anything: fields 14 and 15 of proc(5). */
	char *rest = strrchr(text, ')');
	if (!rest || sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
		return 0;
	return (uint64_t)(user + system) * (1000000000ull / (uint64_t)sysconf(_SC_CLK_TCK));
}

static void take_sample(struct store *store, struct sample *sample)
{
	sample->stats = sample->vm.alive ? control_ask(store, sample->vm.name, "vm.stats") : NULL;
	sample->cpu_ns = sample->vm.alive ? read_cpu_ns(sample->vm.pid) : 0;
	sample->taken_ns = clock_now_ns();
}

static void samples_free(struct samples *samples)
{
	for (size_t i = 0; i < samples->count; i++) {
		json_decref(samples->list[i].stats);
		store_vm_free(&samples->list[i].vm);
	}
	free(samples->list);
	*samples = (struct samples){0};
}

/* The turn before this one goes, and a new one is taken. */
static int take_samples(struct top *top, struct err *err)
{
	struct store_vm *list;
	size_t count;
	int rc = store_vm_list(top->store, &list, &count, err);

	if (rc)
		return rc;
	samples_free(&top->before);
	top->before = top->now;
	top->now = (struct samples){.list = xcalloc(count + 1, sizeof(struct sample))};
	for (size_t i = 0; i < count; i++) {
		if (top->wanted ? strcmp(list[i].name, top->wanted) != 0 : !list[i].alive) {
			store_vm_free(&list[i]);
			continue;
		}
		struct sample *sample = &top->now.list[top->now.count++];
		sample->vm = list[i];
		take_sample(top->store, sample);
	}
	free(list);
	return 0;
}

/* --- figures --- */

static uint64_t figure(const json_t *from, const char *key)
{
	json_int_t value = json_integer_value(json_object_get(from, key));

	return value < 0 ? 0 : (uint64_t)value;
}

/* A counter, or the sum of one over a list's members. */
static uint64_t counter(const struct sample *sample, const char *list, const char *key)
{
	uint64_t sum = 0;
	json_t *member;
	size_t i;

	if (!list)
		return figure(sample->stats, key);
	json_array_foreach(json_object_get(sample->stats, list), i, member) sum += figure(member, key);
	return sum;
}

static const struct sample *sample_before(const struct top *top, const struct sample *now)
{
	for (size_t i = 0; i < top->before.count; i++) {
		const struct sample *before = &top->before.list[i];

		if (!strcmp(before->vm.name, now->vm.name) && before->vm.pid == now->vm.pid && before->stats && before->taken_ns < now->taken_ns)
			return before;
	}
	return NULL;
}

/* In a second. A machine that was built anew counts from 0: no rate. */
static uint64_t rate(const struct top *top, const struct sample *now, const char *list, const char *key)
{
	const struct sample *before = sample_before(top, now);
	uint64_t from = before ? counter(before, list, key) : 0, to = counter(now, list, key);

	if (!before || to < from)
		return 0;
	return (uint64_t)((double)(to - from) * 1e9 / (double)(now->taken_ns - before->taken_ns));
}

static double cpu_percent(const struct top *top, const struct sample *now)
{
	const struct sample *before = sample_before(top, now);

	if (!before || now->cpu_ns < before->cpu_ns)
		return 0;
	return (double)(now->cpu_ns - before->cpu_ns) * 100 / (double)(now->taken_ns - before->taken_ns);
}

static uint64_t latency(const struct sample *sample, const char *which, const char *key)
{
	return figure(json_object_get(sample->stats, which), key);
}

/* --- a frame, line by line --- */

static void format_count(char out[16], uint64_t value)
{
	if (value < 100000)
		snprintf(out, 16, "%llu", (unsigned long long)value);
	else if (value < 100000000)
		snprintf(out, 16, "%lluk", (unsigned long long)value / 1000);
	else
		snprintf(out, 16, "%lluM", (unsigned long long)value / 1000000);
}

static void format_latency(char out[16], uint64_t ns)
{
	if (ns == 0)
		snprintf(out, 16, "-");
	else if (ns < 1000000)
		snprintf(out, 16, "%.0f us", (double)ns / 1e3);
	else if (ns < 1000000000)
		snprintf(out, 16, "%.1f ms", (double)ns / 1e6);
	else
		snprintf(out, 16, "%.1f s", (double)ns / 1e9);
}

/* Not beyond the right edge; what ends a line is the screen's affair. */
static void put_line(const struct top *top, FILE *out, const char *style, const char *text)
{
	bool styled = top->colour && *style;

	fprintf(out, "%s%.*s%s%s\n", styled ? style : "", (int)top->size.columns, text, styled ? "\033[0m" : "", top->screen ? "\033[K" : "");
}

static void put_vm(const struct top *top, FILE *out, const struct sample *s)
{
	char memory[16], exits[16], written[16], pause[16], fault[16], disk[16], net[16];
	CLEANUP_FREE char *line = NULL;
	const char *style = !strcmp(s->vm.state, "running") ? "" : !strcmp(s->vm.state, "crashed") ? "\033[31m" : "\033[33m";

	cli_format_size(memory, s->vm.memory_bytes);
	format_count(exits, rate(top, s, NULL, "exits"));
	cli_format_size(written, figure(s->stats, "written_pages_per_s") * PAGE_BYTES);
	format_latency(pause, latency(s, "pause", "p99_ns"));
	format_latency(fault, latency(s, "cow_fault", "p99_ns"));
	cli_format_size(disk, rate(top, s, "disks", "read_bytes") + rate(top, s, "disks", "written_bytes"));
	cli_format_size(net, rate(top, s, "nets", "sent_bytes") + rate(top, s, "nets", "received_bytes"));
	if (top->size.columns < NARROW_COLUMNS)
		line = xasprintf("%-11.11s %-4.4s %4.0f %7s %8s", s->vm.name, s->vm.state, cpu_percent(top, s), written, pause);
	else
		line = xasprintf("%-11.11s %-7.7s %5.0f %6s %7s %7s %8s %8s %6s %6s", s->vm.name, s->vm.state, cpu_percent(top, s), memory, exits, written,
				 pause, fault, disk, net);
	put_line(top, out, style, line);
}

/* The checkpoint or revert under way. */
static void put_operation(const struct top *top, FILE *out, const struct sample *s)
{
	const json_t *operation = json_object_get(s->stats, "operation");
	uint64_t done = figure(operation, "done_pages"), total = figure(operation, "total_pages");
	const char *id = json_string_value(json_object_get(operation, "id")), *phase = json_string_value(json_object_get(operation, "phase"));
	unsigned part = total && done <= total ? (unsigned)(done * BAR_WIDTH / total) : 0;

	if (!id || !phase)
		return;
	CLEANUP_FREE char *line = xasprintf("  %s %.8s [%.*s%*s] %s", json_is_true(json_object_get(operation, "revert")) ? "revert" : "checkpoint", id,
					    (int)part, "################", (int)(BAR_WIDTH - part), "", phase);
	put_line(top, out, "\033[36m", line);
}

/* How many took so long: a character for each power of two, denser for more, from 16 us on. */
static void put_histogram(const struct top *top, FILE *out, const struct sample *s, const char *key, const char *what)
{
	static const char shades[] = " .:-=+*#@";
	const json_t *from = json_object_get(s->stats, key), *pairs = json_object_get(from, "below");
	uint64_t counts[64] = {0}, most = 0, sum = 0;
	char bars[65] = "", p50[16], max[16];
	size_t n = json_array_size(pairs) < 64 ? json_array_size(pairs) : 64;

	for (size_t i = 0; i < n; i++) {
		uint64_t below = (uint64_t)json_integer_value(json_array_get(json_array_get(pairs, i), 1));

		counts[i] = below - sum;
		sum = below;
		most = counts[i] > most ? counts[i] : most;
	}
	for (size_t i = 0; i < n; i++)
		bars[i] = shades[counts[i] ? 1 + counts[i] * (sizeof(shades) - 3) / most : 0];
	format_latency(p50, figure(from, "p50_ns"));
	format_latency(max, figure(from, "max_ns"));
	CLEANUP_FREE char *line = top->size.columns < NARROW_COLUMNS
					  ? xasprintf("  %-6s |%s|", what, bars)
					  : xasprintf("  %-6s 16us |%s| 17s  %llu, half below %s, at most %s", what, bars,
						      (unsigned long long)figure(from, "count"), p50, max);
	put_line(top, out, "", line);
}

static void put_frame(const struct top *top, FILE *out)
{
	time_t now = time(NULL);
	char clock[16] = "";
	struct tm tm;
	size_t detailed = top->wanted || top->now.count * 4 + 4 <= top->size.rows ? top->now.count : 0;

	if (localtime_r(&now, &tm))
		strftime(clock, sizeof(clock), "%H:%M:%S", &tm);
	CLEANUP_FREE char *title = xasprintf("vmcp top  %s  %zu VM%s run%s", clock, top->now.count, top->now.count == 1 ? "" : "s",
					     top->now.count == 1 ? "s" : "");
	put_line(top, out, "\033[1m", title);
	CLEANUP_FREE char *heads = top->size.columns < NARROW_COLUMNS ? xasprintf("%-11s %-4s %4s %7s %8s", "NAME", "STAT", "CPU%", "DIRTY/s", "PAUSE99")
								 : xasprintf("%-11s %-7s %5s %6s %7s %7s %8s %8s %6s %6s", "NAME", "STATE", "CPU%", "MEM",
									     "EXITS/s", "DIRTY/s", "PAUSE99", "FAULT99", "DISK/s", "NET/s");
	put_line(top, out, "\033[7m", heads);
	for (size_t i = 0; i < top->now.count; i++) {
		put_vm(top, out, &top->now.list[i]);
		put_operation(top, out, &top->now.list[i]);
		if (i < detailed && top->now.list[i].stats) {
			put_histogram(top, out, &top->now.list[i], "pause", "pauses");
			put_histogram(top, out, &top->now.list[i], "cow_fault", "faults");
		}
	}
	if (top->now.count == 0)
		put_line(top, out, "", "no VM runs; `vmcp ps` shows those that are known");
	if (top->screen)
		put_line(top, out, "\033[2m", "q quits, space looks again now");
}

/* The frame from the screen's top, as many lines as it has. */
static void show_screen(const struct top *top)
{
	CLEANUP_FREE char *text = NULL;
	size_t length = 0;
	unsigned lines = 0;
	FILE *out = open_memstream(&text, &length);

	if (!out)
		return;
	put_frame(top, out);
	if (fclose(out))
		return;
	fputs("\033[H", stdout);
	for (char *line = text, *end; (end = strchr(line, '\n')) && lines < top->size.rows; line = end + 1)
		printf("%s%.*s", lines++ ? "\r\n" : "", (int)(end - line), line);
	fputs("\033[J", stdout);
	fflush(stdout);
}

/* --- as JSON --- */

static json_t *sample_to_json(const struct top *top, const struct sample *s)
{
	return json_pack("{s:s, s:s, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:O?}", "name", s->vm.name, "state", s->vm.state, "cpu_percent",
			 cpu_percent(top, s), "memory_bytes", (json_int_t)s->vm.memory_bytes, "exits_per_s", (json_int_t)rate(top, s, NULL, "exits"),
			 "written_pages_per_s", (json_int_t)figure(s->stats, "written_pages_per_s"), "pause_p99_ns",
			 (json_int_t)latency(s, "pause", "p99_ns"), "cow_fault_p99_ns", (json_int_t)latency(s, "cow_fault", "p99_ns"),
			 "disk_read_bytes_per_s", (json_int_t)rate(top, s, "disks", "read_bytes"), "disk_written_bytes_per_s",
			 (json_int_t)rate(top, s, "disks", "written_bytes"), "net_bytes_per_s",
			 (json_int_t)(rate(top, s, "nets", "sent_bytes") + rate(top, s, "nets", "received_bytes")), "operation",
			 json_object_get(s->stats, "operation"));
}

static void print_document(const struct top *top)
{
	json_t *vms = json_array();

	for (size_t i = 0; i < top->now.count; i++)
		json_array_append_new(vms, sample_to_json(top, &top->now.list[i]));
	cli_print_json(json_pack("{s:o}", "vms", vms));
}

/* --- the terminal --- */

static void begin_screen(struct top *top)
{
	struct termios keys;

	if (isatty(STDIN_FILENO) && tcgetattr(STDIN_FILENO, &top->terminal) == 0) {
		keys = top->terminal;
		keys.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
		top->terminal_set = tcsetattr(STDIN_FILENO, TCSADRAIN, &keys) == 0;
	}
	fputs("\033[?1049h\033[?25l", stdout);
	fflush(stdout);
}

static void end_screen(struct top *top)
{
	fputs("\033[?25h\033[?1049l", stdout);
	fflush(stdout);
	if (top->terminal_set)
		tcsetattr(STDIN_FILENO, TCSADRAIN, &top->terminal);
	top->terminal_set = false;
}

static int watch_signals(struct top *top, struct err *err)
{
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < 5; i++)
		sigaddset(&set, (int[]){SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGWINCH}[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	top->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return top->signal_fd < 0 ? err_sys(err, errno, "signals") : 0;
}

/* Stopped by Ctrl-Z, the shell has its terminal as it was. */
static void stop_here(struct top *top)
{
	end_screen(top);
	raise(SIGSTOP);
	begin_screen(top);
}

/* Until the next turn is due, or somebody does not want to wait for it. False: it is to end. */
static bool wait_turn(struct top *top, uint64_t until_ns)
{
	struct pollfd list[2] = {{.fd = top->signal_fd, .events = POLLIN}, {.fd = top->terminal_set ? STDIN_FILENO : -1, .events = POLLIN}};

	for (;;) {
		uint64_t now = clock_now_ns();
		struct signalfd_siginfo info;
		char key;

		if (now >= until_ns)
			return true;
		int ready = poll(list, 2, (int)((until_ns - now) / 1000000) + 1);
		if (ready < 0 && errno != EINTR)
			return false;
		while (ready > 0 && read(top->signal_fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
			if (info.ssi_signo != SIGTSTP && info.ssi_signo != SIGWINCH)
				return false;
			if (info.ssi_signo == SIGTSTP && top->screen)
				stop_here(top);
			else if (info.ssi_signo == SIGTSTP)
				raise(SIGSTOP);
			top->size = terminal_size(STDOUT_FILENO);
			if (top->screen)
				show_screen(top);
		}
		if (ready > 0 && list[1].revents) {
			if (read(STDIN_FILENO, &key, 1) != 1 || key == 'q' || key == 'Q')
				return false;
			if (key == ' ')
				return true;
		}
	}
}

/* --- the command --- */

/* `turns` frames; 0: without end. */
static int loop(struct top *top, uint64_t interval_ns, uint64_t turns, struct err *err)
{
	int rc = take_samples(top, err);
	bool more = !rc && wait_turn(top, clock_now_ns() + (interval_ns < FIRST_INTERVAL_NS ? interval_ns : FIRST_INTERVAL_NS));

	for (uint64_t turn = 1; more && !rc; turn++) {
		rc = take_samples(top, err);
		if (rc)
			break;
		top->size = terminal_size(STDOUT_FILENO);
		if (top->cli->json)
			print_document(top);
		else if (top->screen)
			show_screen(top);
		else
			put_frame(top, stdout), fflush(stdout);
		more = turn != turns && wait_turn(top, clock_now_ns() + interval_ns);
	}
	return rc;
}

static int parse(struct cli *cli, uint64_t *interval_ns, uint64_t *turns, struct err *err)
{
	const char *interval = cli_value(cli, "interval"), *count = cli_value(cli, "count");
	char *end;

	*interval_ns = DEFAULT_INTERVAL_NS;
	*turns = cli->json ? 1 : 0;
	if (interval && (!duration_parse(interval, interval_ns) || *interval_ns < MIN_INTERVAL_NS)) {
		err_set(err, ERR_USAGE, EINVAL, "--interval: '%s' is no time of 100ms or more", interval);
		return err_hint(err, DURATION_HINT);
	}
	if (!count)
		return 0;
	*turns = strtoull(count, &end, 10);
	if (*end || *count < '0' || *count > '9' || *turns == 0 || (cli->json && *turns > 1)) {
		err_set(err, ERR_USAGE, EINVAL, "--count: '%s' is no number of frames", count);
		return err_hint(err, cli->json ? "with --json there is one document" : "1 or more");
	}
	return 0;
}

static int run(struct cli *cli, struct err *err)
{
	struct top top = {.cli = cli, .wanted = cli->argument_count ? cli->arguments[0] : NULL, .signal_fd = -1};
	uint64_t interval_ns, turns;
	struct store_vm known;
	int rc = parse(cli, &interval_ns, &turns, err);

	if (!rc)
		rc = cli_open_store(cli, &top.store, err);
	if (rc)
		return rc;
	if (top.wanted) {
		rc = store_vm_get(top.store, top.wanted, &known, err);
		if (!rc)
			store_vm_free(&known);
	}
	if (!rc)
		rc = watch_signals(&top, err);
	if (!rc) {
		top.screen = isatty(STDOUT_FILENO) && !cli->json && !cli_given(cli, "count");
		top.colour = cli_colour(STDOUT_FILENO);
		if (top.screen)
			begin_screen(&top);
		rc = loop(&top, interval_ns, turns, err);
		if (top.screen)
			end_screen(&top);
		close(top.signal_fd);
	}
	samples_free(&top.before);
	samples_free(&top.now);
	store_close(top.store);
	return rc;
}

static const struct cli_option options[] = {
	{"interval", 'n', "TIME", "how long between frames, such as 500ms (default 1s)"},
	{"count", 'c', "N", "print N frames as plain text, and end"},
	{0},
};

const struct cli_command cli_top = {
	.name = "top",
	.synopsis = "[VM] [--interval TIME] [--count N]",
	.summary = "a live view of the VMs that run",
	.help = "Processor time of the VM's process, exits, what the guest writes (as measured for its last checkpoints), pauses and write faults (99 of\n"
		"100 are shorter), disks and networks; the checkpoint or revert that is under way; where there is room, or VM is named, histograms:\n"
		"a character for each power of two of time. q ends it. With --json one document.\n\n"
		"Examples:\n"
		"    vmcp top\n"
		"    vmcp top web --interval 500ms\n"
		"    vmcp top --count 1",
	.words = "@running",
	.options = options,
	.max_arguments = 1,
	.json =
		"vms [name, state, cpu_percent, memory_bytes, exits_per_s, written_pages_per_s, pause_p99_ns, cow_fault_p99_ns, "
		"disk_read_bytes_per_s, disk_written_bytes_per_s, net_bytes_per_s, operation]",
	.run = run,
};
