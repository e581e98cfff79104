/*
 * ACPI's fixed hardware (ACPI 6.4, chapter 4.8) as vmm/acpi.h describes it: PM1a status, enable and control, the PM
 * timer, the power button; and the ports by which a guest resets the machine.
 *
 * The machine is always in ACPI mode (SCI_EN reads as one). The timer's status bit is kept, but its overflow raises no
 * interrupt.
 *
 * Threads: acpi_pm_press_power_button from any thread.
 */
#ifndef VMCP_DEVICES_ACPI_PM_H
#define VMCP_DEVICES_ACPI_PM_H

#include "base/component.h"
#include "base/err.h"
#include "devices/isa.h"

struct acpi_pm;

/* Before the VM runs. `reset_port`: serve ACPI_RESET_PORT too; false where the PCI bus does. */
int acpi_pm_create(const struct isa_platform *platform, bool reset_port, struct acpi_pm **out, struct err *err);
/* The VM does not run. NULL is allowed. */
void acpi_pm_destroy(struct acpi_pm *pm);
/* The guest's system is asked to shut down; a guest that has not enabled the button's event sees it once it does. */
void acpi_pm_press_power_button(struct acpi_pm *pm);

/* `applied` is called at the end of each load of a saved state, when guest memory is the checkpoint's: for what is to be new then. Before the VM runs. */
void acpi_pm_on_apply(struct acpi_pm *pm, void (*applied)(void *opaque), void *opaque);

struct component acpi_pm_component(struct acpi_pm *pm);

#endif
