/*
 * A guest that fills memory and disk with content it can check, keeps changing it, and watches how long it is held
 * up. README.md has the protocol. One CPU, no interrupts, everything polled, everything at CPL 3.
 */
#include <stddef.h>

#include "cpu.h"
#include "image.h"
#include "pvh.h"
#include "text.h"
#include "tiny.h"

#define LOOK_EACH_US	10000u
#define CATCH_UP_US	20000u
#define WRITES_EACH_TURN 8u
#define ACPI_PM1A_PORT	0x604
#define ACPI_SLEEP_S5	0x2000
#define DEBUG_EXIT_PORT 0xf4

extern uint64_t fault_vector, fault_error, fault_address, fault_rip, fault_rsp;

_Noreturn void tiny_main(const struct pvh_start_info *info);
_Noreturn void tiny_exception(void);

/* The exception entry has no other way to find the serial port than this. */
static struct tiny the_guest;

void pace_set(struct pace *pace, const struct clock *clock, uint64_t rate)
{
	pace->interval_cycles = rate ? clock->khz * 1000 / rate : 0;
	pace->catch_up_cycles = clock_from_us(clock, CATCH_UP_US);
	pace->next_tsc = cpu_tsc();
}

void tiny_print(struct tiny *tiny)
{
	if (serial_print(&tiny->serial, &tiny->line))
		gap_restart(&tiny->gap);
}

_Noreturn void tiny_power_off(struct tiny *tiny)
{
	line_start(&tiny->line, "bye");
	tiny_print(tiny);
	serial_drain(&tiny->serial);
	outw(ACPI_PM1A_PORT, ACPI_SLEEP_S5);
	outb(DEBUG_EXIT_PORT, 0);
	for (;;)
		cpu_relax();
}

_Noreturn void tiny_fail(struct tiny *tiny, const char *reason, const char *detail)
{
	line_start(&tiny->line, "error");
	line_string(&tiny->line, "reason", reason);
	if (detail)
		line_string(&tiny->line, "detail", detail);
	tiny_print(tiny);
	tiny_power_off(tiny);
}

_Noreturn void tiny_exception(void)
{
	struct tiny *tiny = &the_guest;

	line_start(&tiny->line, "exception");
	line_number(&tiny->line, "vector", fault_vector);
	line_hex(&tiny->line, "error", fault_error);
	line_hex(&tiny->line, "rip", fault_rip);
	line_hex(&tiny->line, "rsp", fault_rsp);
	line_hex(&tiny->line, "address", fault_address);
	tiny_print(tiny);
	tiny_power_off(tiny);
}

static void copy_command_line(struct tiny *tiny, const struct pvh_start_info *info)
{
	const char *from = (const char *)(uintptr_t)info->cmdline_gpa;
	size_t i;

	if (!from)
		return;
	for (i = 0; i + 1 < sizeof(tiny->command_line) && from[i]; i++)
		tiny->command_line[i] = from[i];
	tiny->command_line[i] = '\0';
}

/* Everything that the loader left is read here, before anything is written outside our own image. */
static void take_over(struct tiny *tiny, const struct pvh_start_info *info)
{
	const char *wrong;

	options_default(&tiny->options);
	copy_command_line(tiny, info);
	line_start(&tiny->line, "boot version=1");
	tiny_print(tiny);
	if (info->magic != PVH_MAGIC || !ram_start(&tiny->ram, info))
		tiny_fail(tiny, "no-memory-map", NULL);
	wrong = options_parse(&tiny->options, tiny->command_line);
	if (wrong)
		tiny_fail(tiny, "bad-option", wrong);
	if (tiny->options.unknown) {
		line_start(&tiny->line, "warning");
		line_string(&tiny->line, "unknown_option", tiny->options.unknown);
		tiny_print(tiny);
	}
	serial_drain(&tiny->serial);
}

static void start_work(struct tiny *tiny)
{
	const struct options *options = &tiny->options;
	const char *wrong;

	clock_start(&tiny->clock, options->tsc_khz);
	if (options->idle) {
		if (options->disks || options->bench || options->balloon || options->net || options->random_rate)
			tiny_fail(tiny, "idle-and-devices", NULL); /* these are polled */
		idle_start();
	}
	if (options->disks) {
		wrong = disk_start(&tiny->disk, &tiny->ram, options);
		if (wrong)
			tiny_fail(tiny, wrong, NULL);
	}
	if (options->bench) {
		wrong = options->disks ? "disk-and-bench" : bench_start(&tiny->bench, &tiny->ram);
		if (wrong)
			tiny_fail(tiny, wrong, NULL);
	}
	if (options->balloon) {
		wrong = balloon_start(&tiny->balloon, &tiny->ram, options, &tiny->stamps);
		if (wrong)
			tiny_fail(tiny, wrong, NULL);
	}
	if (options->net) {
		wrong = net_start(&tiny->net, &tiny->ram, (unsigned int)options->net);
		if (wrong)
			tiny_fail(tiny, wrong, NULL);
	}
	if (options->random_rate) {
		wrong = rng_start(&tiny->rng, &tiny->ram);
		if (wrong)
			tiny_fail(tiny, wrong, NULL);
	}
	if (!mem_start(&tiny->mem, &tiny->ram, options))
		tiny_fail(tiny, "no-memory-for-the-set", NULL);
	mem_fill(&tiny->mem, &tiny->stamps);
	if (tiny->disk.there && options->disk_fill && !disk_fill(&tiny->disk, &tiny->stamps, &tiny->clock))
		tiny_fail(tiny, "disk-fill-failed", NULL);
	pace_set(&tiny->mem_pace, &tiny->clock, options->rate);
	pace_set(&tiny->disk_pace, &tiny->clock, options->disk_rate);
	pace_set(&tiny->balloon_pace, &tiny->clock, options->report_rate);
	pace_set(&tiny->beat_pace, &tiny->clock, options->beat_rate);
	pace_set(&tiny->random_pace, &tiny->clock, options->random_rate);
	tiny->running = !options->paused;
	tiny->image_sum = image_sum();
	report_ready(tiny);
	serial_drain(&tiny->serial);
}

/* True if there was anything to do. */
static bool mem_turn(struct tiny *tiny, uint64_t now)
{
	unsigned int i;

	if (!tiny->running)
		return false;
	for (i = 0; i < WRITES_EACH_TURN && pace_due(&tiny->mem_pace, now); i++) {
		mem_step(&tiny->mem, &tiny->stamps);
		pace_take(&tiny->mem_pace, now);
		gap_note(&tiny->gap, cpu_tsc());
	}
	return i != 0;
}

static void work_disk(struct tiny *tiny, uint64_t now)
{
	bool due = tiny->running && pace_due(&tiny->disk_pace, now);

	if (disk_turn(&tiny->disk, &tiny->stamps, due))
		pace_take(&tiny->disk_pace, now);
}

static void work_balloon(struct tiny *tiny, uint64_t now, bool look)
{
	if (!tiny->running)
		return; /* nothing is under way: see set_running() */
	balloon_turn(&tiny->balloon, &tiny->stamps, look);
	if (!tiny->options.report_rate || !pace_due(&tiny->balloon_pace, now))
		return;
	balloon_step(&tiny->balloon, &tiny->stamps);
	pace_take(&tiny->balloon_pace, now);
}

static void work_net(struct tiny *tiny, uint64_t now)
{
	if (tiny->options.beat_rate && pace_due(&tiny->beat_pace, now)) {
		net_beat(&tiny->net);
		pace_take(&tiny->beat_pace, now);
	}
	net_turn(&tiny->net, &tiny->clock, now);
}

static void work_random(struct tiny *tiny, uint64_t now)
{
	if (rng_turn(&tiny->rng, tiny->running && pace_due(&tiny->random_pace, now)))
		pace_take(&tiny->random_pace, now);
}

static void work_serial(struct tiny *tiny, bool look)
{
	const char *command;

	if (!look && !serial_busy(&tiny->serial))
		return;
	command = serial_turn(&tiny->serial, look);
	if (command)
		command_run(tiny, command);
}

static void work_report(struct tiny *tiny, uint64_t now)
{
	if (!tiny->options.report_ms || (int64_t)(now - tiny->report_tsc) < 0)
		return;
	tiny->report_tsc = now + clock_from_us(&tiny->clock, tiny->options.report_ms * 1000);
	report_status(tiny);
}

static void rest(const struct tiny *tiny)
{
	if (tiny->options.idle && !serial_busy(&tiny->serial))
		idle_sleep();
	else
		cpu_relax();
}

static _Noreturn void run(struct tiny *tiny)
{
	uint64_t now = cpu_tsc();
	bool look;

	tiny->look_tsc = now;
	tiny->report_tsc = now + clock_from_us(&tiny->clock, tiny->options.report_ms * 1000);
	tiny->status_tsc = now;
	gap_reset(&tiny->gap, &tiny->clock);
	for (;;) {
		now = cpu_tsc();
		gap_note(&tiny->gap, now);
		if (!mem_turn(tiny, now))
			rest(tiny);
		if (tiny->disk.there)
			work_disk(tiny, now);
		look = (int64_t)(now - tiny->look_tsc) >= 0;
		if (look)
			tiny->look_tsc = now + clock_from_us(&tiny->clock, LOOK_EACH_US);
		if (tiny->balloon.there)
			work_balloon(tiny, now, look);
		if (tiny->net.there)
			work_net(tiny, now);
		if (tiny->rng.there)
			work_random(tiny, now);
		work_serial(tiny, look);
		work_report(tiny, now);
	}
}

_Noreturn void tiny_main(const struct pvh_start_info *info)
{
	struct tiny *tiny = &the_guest;

	exception_start();
	serial_start(&tiny->serial);
	take_over(tiny, info);
	start_work(tiny);
	run(tiny);
}
