#include "devices/acpi_pm.h"
#include "devices/isa_test.h"
#include "vmm/acpi.h"

#define STATUS ACPI_PM1A_EVT_PORT
#define ENABLE (ACPI_PM1A_EVT_PORT + 2)

struct fixture {
	struct test_machine m;
	struct acpi_pm *pm;
	struct component component;
};

static void init(struct fixture *f, bool reset_port)
{
	struct err err = ERR_INIT;

	test_machine_init(&f->m);
	f->m.now_ns = 123456789;
	cr_assert_eq(acpi_pm_create(&f->m.platform, reset_port, &f->pm, &err), 0, "%s", err.message);
	f->component = acpi_pm_component(f->pm);
}

static void end(struct fixture *f)
{
	acpi_pm_destroy(f->pm);
	test_machine_end(&f->m);
}

Test(acpi_pm, power_button)
{
	struct fixture f;

	init(&f, true);
	test_out(&f.m, ENABLE, 2, 0x0100);
	acpi_pm_press_power_button(f.pm);
	cr_expect(f.m.line[ACPI_SCI_GSI]);
	cr_expect_eq(test_in(&f.m, STATUS, 2) & 0x100, 0x100);
	cr_expect_eq(test_in(&f.m, STATUS, 4), 0x01000100);
	test_out(&f.m, STATUS, 2, 0x0020);
	cr_expect(f.m.line[ACPI_SCI_GSI], "another bit");
	test_out(&f.m, STATUS, 2, 0x0100);
	cr_expect_not(f.m.line[ACPI_SCI_GSI]);
	cr_expect_eq(test_in(&f.m, STATUS, 2) & 0x100, 0);
	/* Pressed before the guest listens. */
	test_out(&f.m, ENABLE, 2, 0);
	acpi_pm_press_power_button(f.pm);
	cr_expect_not(f.m.line[ACPI_SCI_GSI]);
	test_out(&f.m, ENABLE + 1, 1, 0x01);
	cr_expect(f.m.line[ACPI_SCI_GSI], "enabled by a byte access");
	cr_expect_eq(test_in(&f.m, ENABLE, 2), 0x0100);
	test_out(&f.m, STATUS + 1, 1, 0x01);
	cr_expect_not(f.m.line[ACPI_SCI_GSI]);
	cr_expect_eq(test_in(&f.m, ENABLE, 2), 0x0100, "a byte write to the status leaves the enables");
	end(&f);
}

Test(acpi_pm, power_off)
{
	struct fixture f;

	init(&f, true);
	cr_expect_eq(test_in(&f.m, ACPI_PM1A_CNT_PORT, 2), 1, "ACPI mode");
	test_out(&f.m, ACPI_PM1A_CNT_PORT, 2, 0x0001);
	cr_expect_eq(f.m.stops, 0);
	test_out(&f.m, ACPI_PM1A_CNT_PORT, 2, 0x2000 | 3 << 10);
	cr_expect_eq(f.m.stops, 0, "a sleep type that the tables do not name");
	cr_expect_eq(test_in(&f.m, ACPI_PM1A_CNT_PORT, 2), 1 | 3 << 10);
	test_out(&f.m, ACPI_PM1A_CNT_PORT, 2, 0x2000);
	cr_expect_eq(f.m.stops, 1);
	cr_expect_eq(f.m.stop_reason, VM_STOP_POWER_OFF);
	cr_expect_eq(test_in(&f.m, ACPI_PM1A_CNT_PORT, 2), 1, "SLP_EN reads as zero");
	test_out(&f.m, ACPI_PM1A_CNT_PORT + 1, 1, 0x20);
	cr_expect_eq(f.m.stops, 2);
	end(&f);
}

Test(acpi_pm, resets)
{
	struct fixture f;

	init(&f, true);
	test_out(&f.m, ACPI_RESET_PORT, 1, 2);
	cr_expect_eq(f.m.stops, 0);
	test_out(&f.m, ACPI_RESET_PORT, 1, 6);
	cr_expect_eq(f.m.stops, 1);
	cr_expect_eq(f.m.stop_reason, VM_STOP_RESET);
	test_out(&f.m, 0x64, 1, 0xd1);
	cr_expect_eq(f.m.stops, 1);
	test_out(&f.m, 0x64, 1, 0xfe);
	cr_expect_eq(f.m.stops, 2);
	cr_expect_eq(test_in(&f.m, 0x64, 1) & 3, 1, "no controller, and no waiting for one");
	end(&f);
	init(&f, false);
	test_out(&f.m, ACPI_RESET_PORT, 1, 6);
	cr_expect_eq(f.m.stops, 0, "the PCI bus serves that port");
	end(&f);
}

Test(acpi_pm, timer_counts_24_bits)
{
	struct fixture f;

	init(&f, true);
	cr_expect_eq(test_in(&f.m, ACPI_PM_TIMER_PORT, 4), 0);
	f.m.now_ns += 1000000000;
	cr_expect_eq(test_in(&f.m, ACPI_PM_TIMER_PORT, 4), 3579545);
	cr_expect_eq(test_in(&f.m, ACPI_PM_TIMER_PORT + 2, 1), 3579545 >> 16);
	/* Ten years on: no overflow on the way. */
	f.m.now_ns += 10ull * 365 * 86400 * 1000000000;
	cr_expect_eq(test_in(&f.m, ACPI_PM_TIMER_PORT, 4), (10ull * 365 * 86400 * 3579545 + 3579545) & 0xffffff);
	test_out(&f.m, STATUS, 2, 0xffff);
	cr_expect_eq(test_in(&f.m, STATUS, 2) & 1, 0);
	f.m.now_ns += 2400000000; /* half a turn is 2.34 s */
	cr_expect_eq(test_in(&f.m, STATUS, 2) & 1, 1);
	end(&f);
}

Test(acpi_pm, state_is_carried_and_time_goes_on_from_it)
{
	struct fixture a, b;

	init(&a, true);
	init(&b, true);
	a.m.now_ns += 1500000000;
	b.m.now_ns = 77;
	test_out(&a.m, ENABLE, 2, 0x0100);
	acpi_pm_press_power_button(a.pm);
	test_carry_state(&a.component, &b.component);
	cr_expect(b.m.line[ACPI_SCI_GSI]);
	uint32_t count = test_in(&a.m, ACPI_PM_TIMER_PORT, 4);
	cr_expect_eq(test_in(&b.m, ACPI_PM_TIMER_PORT, 4), count);
	b.m.now_ns += 1000000;
	cr_expect_eq(test_in(&b.m, ACPI_PM_TIMER_PORT, 4), count + 3579);
	end(&a);
	end(&b);
}

Test(acpi_pm, damaged_state_is_refused)
{
	struct fixture f;
	uint8_t state[256];
	struct err err = ERR_INIT;

	init(&f, true);
	memset(state, 0xff, sizeof(state));
	cr_expect_lt(f.component.validate(f.component.opaque, state, &err), 0);
	cr_expect_eq(err.class, ERR_DAMAGED);
	end(&f);
}

static void count(void *opaque) { ++*(unsigned *)opaque; }

Test(acpi_pm, tells_when_a_state_is_in_place)
{
	struct fixture f;
	struct err err = ERR_INIT;
	unsigned applied = 0;

	init(&f, true);
	acpi_pm_on_apply(f.pm, count, &applied);
	void *state = xcalloc(1, f.component.table->size);
	cr_assert_eq(f.component.capture(f.component.opaque, state, &err), 0);
	cr_expect_eq(applied, 0);
	cr_assert_eq(f.component.apply(f.component.opaque, state, &err), 0);
	cr_expect_eq(applied, 1);
	free(state);
	end(&f);
}
