/* Saved vCPUs as notes of an ELF core file, which debuggers read. */
#ifndef VMCP_VMM_CORE_H
#define VMCP_VMM_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

/* The value of e_machine for guests of this architecture. */
uint16_t core_machine(void);
/* The id of the components whose state core_add_vcpu takes. */
const char *core_vcpu_id(void);
/* Appends NT_PRSTATUS and NT_FPREGSET of vCPU `index`, from the body of its section in a checkpoint's state, which is untrusted. As a core file knows
 * processes only, vCPU N is the thread N + 1. */
int core_add_vcpu(const void *body, size_t length, unsigned index, struct buf *notes, struct err *err);

#endif
