#include <pthread.h>
#include <unistd.h>

#include "base/clock.h"
#include "devices/isa_test.h"
#include "devices/rtc.h"

#define SECOND_NS 1000000000ull
/* 2026-11-21 14:05:09 UTC, a Saturday. */
#define SOME_DAY_NS (1795269909ull * SECOND_NS)

struct fixture {
	struct test_machine m;
	struct rtc *rtc;
	struct component component;
};

static void init_with(struct fixture *f, uint64_t memory_bytes, struct loop *loop)
{
	struct rtc_config config = {.memory_bytes = memory_bytes, .loop = loop};
	struct err err = ERR_INIT;

	test_machine_init(&f->m);
	f->m.wall_ns = SOME_DAY_NS + SECOND_NS / 4;
	cr_assert_eq(rtc_create(&f->m.platform, &config, &f->rtc, &err), 0, "%s", err.message);
	f->component = rtc_component(f->rtc);
}

static void init(struct fixture *f) { init_with(f, 512ull << 20, NULL); }

static void end(struct fixture *f)
{
	rtc_destroy(f->rtc);
	test_machine_end(&f->m);
}

static uint8_t get(struct fixture *f, uint8_t reg)
{
	test_out(&f->m, 0x70, 1, reg);
	return (uint8_t)test_in(&f->m, 0x71, 1);
}

static void set(struct fixture *f, uint8_t reg, uint8_t value)
{
	test_out(&f->m, 0x70, 1, reg);
	test_out(&f->m, 0x71, 1, value);
}

static void expect_time(struct fixture *f, const uint8_t expected[8])
{
	static const uint8_t regs[8] = {0x32, 9, 8, 7, 6, 4, 2, 0};

	for (int i = 0; i < 8; i++)
		cr_expect_eq(get(f, regs[i]), expected[i], "register 0x%x: 0x%x, not 0x%x", regs[i], get(f, regs[i]),
			     expected[i]);
}

Test(rtc, shows_the_time_in_every_format)
{
	struct fixture f;

	init(&f);
	cr_expect_eq(get(&f, 13), 0x80, "battery good");
	cr_expect_eq(get(&f, 11), 0x02);
	expect_time(&f, (uint8_t[]){0x20, 0x26, 0x11, 0x21, 7, 0x14, 0x05, 0x09});
	set(&f, 11, 0x06);
	expect_time(&f, (uint8_t[]){20, 26, 11, 21, 7, 14, 5, 9});
	set(&f, 11, 0x00);
	cr_expect_eq(get(&f, 4), 0x82, "2 PM");
	f.m.wall_ns -= 14 * 3600 * SECOND_NS;
	cr_expect_eq(get(&f, 4), 0x12, "12 AM");
	f.m.wall_ns += 12 * 3600 * SECOND_NS;
	cr_expect_eq(get(&f, 4), 0x92, "12 PM");
	end(&f);
}

Test(rtc, update_in_progress)
{
	struct fixture f;

	init(&f);
	cr_expect_eq(get(&f, 10), 0x26);
	f.m.wall_ns = SOME_DAY_NS + SECOND_NS - 100000;
	cr_expect_eq(get(&f, 10), 0xa6);
	set(&f, 11, 0x82);
	cr_expect_eq(get(&f, 10), 0x26, "no updates while the clock is being set");
	end(&f);
}

Test(rtc, is_set_as_linux_does)
{
	struct fixture f;

	init(&f);
	set(&f, 11, 0x82);
	f.m.wall_ns += 5 * SECOND_NS;
	cr_expect_eq(get(&f, 0), 0x09, "the time stands still");
	static const uint8_t regs[][2] = {{0, 0x30}, {2, 0x59}, {4, 0x23},   {7, 0x31},
					  {8, 0x12}, {9, 0x99}, {0x32, 0x19}};
	for (size_t i = 0; i < ARRAY_LENGTH(regs); i++)
		set(&f, regs[i][0], regs[i][1]);
	set(&f, 11, 0x02);
	expect_time(&f, (uint8_t[]){0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x30});
	f.m.wall_ns += SECOND_NS / 2 - 1;
	cr_expect_eq(get(&f, 0), 0x30);
	f.m.wall_ns += 1;
	cr_expect_eq(get(&f, 0), 0x31, "half a second after it was let go");
	f.m.wall_ns += 29 * SECOND_NS;
	expect_time(&f, (uint8_t[]){0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00});
	/* Single registers, without stopping it. */
	set(&f, 4, 0x17);
	expect_time(&f, (uint8_t[]){0x20, 0x00, 0x01, 0x01, 7, 0x17, 0x00, 0x00});
	end(&f);
}

Test(rtc, nonsense_is_survived)
{
	struct fixture f;

	init(&f);
	for (unsigned reg = 0; reg < 256; reg++)
		for (unsigned value = 0; value < 256; value += 15) {
			set(&f, (uint8_t)reg, (uint8_t)value);
			f.m.wall_ns += SECOND_NS / 3;
			get(&f, 0);
			get(&f, 12);
		}
	test_out(&f.m, 0x70, 2, 0x0a5f); /* index and data at once */
	cr_expect_eq(test_in(&f.m, 0x70, 2), 0x0aff);
	end(&f);
}

Test(rtc, flags_without_interrupts)
{
	struct fixture f;

	init(&f);
	set(&f, 10, 0x20);
	get(&f, 12);
	f.m.wall_ns += SECOND_NS / 2;
	cr_expect_eq(get(&f, 12), 0);
	f.m.wall_ns += SECOND_NS / 2;
	cr_expect_eq(get(&f, 12), 0x10, "update ended");
	cr_expect_eq(get(&f, 12), 0);
	set(&f, 10, 0x26);
	f.m.wall_ns += 1000000;
	cr_expect_eq(get(&f, 12), 0x40, "periodic");
	cr_expect_eq(f.m.edges[RTC_GSI], 0);
	end(&f);
}

Test(rtc, alarm)
{
	struct fixture f;

	init(&f);
	set(&f, 10, 0x20);
	set(&f, 1, 0x11);
	set(&f, 3, 0x05);
	set(&f, 5, 0x14);
	set(&f, 11, 0x22);
	f.m.wall_ns += SECOND_NS;
	cr_expect_eq(get(&f, 12), 0x10);
	f.m.wall_ns += SECOND_NS;
	cr_expect_eq(get(&f, 12), 0xb0, "14:05:11");
	cr_expect_eq(f.m.edges[RTC_GSI], 1);
	cr_expect_not(f.m.line[RTC_GSI], "reading C answers it");
	f.m.wall_ns += 86399 * SECOND_NS;
	cr_expect_eq(get(&f, 12), 0x10);
	f.m.wall_ns += SECOND_NS;
	cr_expect_eq(get(&f, 12), 0xb0, "a day later");
	set(&f, 3, 0xff);
	set(&f, 5, 0xff);
	f.m.wall_ns += 60 * SECOND_NS;
	cr_expect_eq(get(&f, 12), 0xb0, "any minute");
	set(&f, 1, 0x99);
	f.m.wall_ns += 86400 * SECOND_NS;
	cr_expect_eq(get(&f, 12), 0x10, "a second that never comes");
	end(&f);
}

static void *run_loop(void *opaque)
{
	struct err err = ERR_INIT;

	loop_run(opaque, &err);
	return NULL;
}

static uint64_t real_wall_ns(void *opaque)
{
	(void)opaque;
	return clock_wall_ns();
}

static bool wait_for_line(struct fixture *f)
{
	for (int i = 0; i < 6000 && !f->m.line[RTC_GSI]; i++)
		usleep(10000);
	return f->m.line[RTC_GSI];
}

Test(rtc, interrupts_come_by_themselves)
{
	struct fixture f;
	struct loop *loop;
	struct err err = ERR_INIT;
	pthread_t thread;

	cr_assert_eq(loop_create(&loop, &err), 0);
	init_with(&f, 512ull << 20, loop);
	rtc_destroy(f.rtc);
	f.m.platform.wall_ns = real_wall_ns;
	struct rtc_config config = {.memory_bytes = 512ull << 20, .loop = loop};
	cr_assert_eq(rtc_create(&f.m.platform, &config, &f.rtc, &err), 0);
	cr_assert_eq(pthread_create(&thread, NULL, run_loop, loop), 0);
	set(&f, 10, 0x2e); /* 4 Hz */
	get(&f, 12);
	set(&f, 11, 0x42);
	cr_expect(wait_for_line(&f));
	cr_expect_eq(get(&f, 12) & 0xc0, 0xc0);
	cr_expect(wait_for_line(&f), "again, once the flags were read");
	set(&f, 11, 0x12);
	get(&f, 12);
	cr_expect(wait_for_line(&f));
	cr_expect_eq(get(&f, 12) & 0x90, 0x90);
	loop_stop(loop);
	pthread_join(thread, NULL);
	end(&f);
	loop_destroy(loop);
}

Test(rtc, memory_size)
{
	struct fixture f;

	init_with(&f, 5ull << 30, NULL);
	cr_expect_eq(get(&f, 0x15) | get(&f, 0x16) << 8, 640);
	cr_expect_eq(get(&f, 0x17) | get(&f, 0x18) << 8, 0xffff);
	cr_expect_eq(get(&f, 0x34) | get(&f, 0x35) << 8, (3072 - 16) * 16, "64 KiB units from 16 MiB to the hole");
	cr_expect_eq(get(&f, 0x5b) | get(&f, 0x5c) << 8, 2048 * 16, "64 KiB units from 4 GiB");
	end(&f);
	init_with(&f, 32ull << 20, NULL);
	cr_expect_eq(get(&f, 0x17) | get(&f, 0x18) << 8, 31 * 1024);
	cr_expect_eq(get(&f, 0x34) | get(&f, 0x35) << 8, 256);
	end(&f);
}

Test(rtc, state_is_carried_as_an_offset)
{
	struct fixture a, b;

	init(&a);
	init(&b);
	set(&a, 4, 0x20);
	set(&a, 0x40, 0x77);
	test_out(&a.m, 0x70, 1, 0x40);
	b.m.wall_ns += 3600 * SECOND_NS;
	test_carry_state(&a.component, &b.component);
	cr_expect_eq(test_in(&b.m, 0x71, 1), 0x77, "index and memory");
	cr_expect_eq(get(&b, 4), 0x21, "six hours ahead of the host, as before");
	cr_expect_eq(get(&b, 11), 0x02);
	end(&a);
	end(&b);
}

Test(rtc, is_set_back)
{
	struct fixture f;

	init(&f);
	set(&f, 11, 0x06);
	rtc_set_back(f.rtc, 26 * 3600 * SECOND_NS);
	expect_time(&f, (uint8_t[]){20, 26, 11, 20, 6, 12, 5, 9});
	f.m.wall_ns += SECOND_NS;
	expect_time(&f, (uint8_t[]){20, 26, 11, 20, 6, 12, 5, 10});
	rtc_set_back(f.rtc, UINT64_MAX); /* no such time */
	expect_time(&f, (uint8_t[]){20, 26, 11, 20, 6, 12, 5, 10});
	end(&f);
}

Test(rtc, damaged_state_is_refused)
{
	struct fixture f;
	uint8_t state[512];
	struct err err = ERR_INIT;

	init(&f);
	memset(state, 0x7f, sizeof(state));
	cr_expect_lt(f.component.validate(f.component.opaque, state, &err), 0);
	cr_expect_eq(err.class, ERR_DAMAGED);
	end(&f);
}
