/* The part of acpi.h that needs no VM, for tests. */
#ifndef VMCP_VMM_X86_ACPI_INTERNAL_H
#define VMCP_VMM_X86_ACPI_INTERNAL_H

#include "vmm/acpi.h"
#include "vmm/memory.h"
#include "vmm/x86/aml.h"

int acpi_build_tables(struct mem *mem, unsigned cpus, const struct acpi_config *config, struct err *err);

/* Where the id itself is: a multiple of 8. */
uint64_t acpi_generation_gpa(void);

/* acpi_dsdt.c: appends the content of the DSDT, without its header. */
void acpi_write_dsdt(struct aml *aml, const struct mem *mem, unsigned cpus, const struct acpi_config *config);

#endif
